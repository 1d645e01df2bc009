r"""The student: an inverse autoregressive flow that draws in one pass as its teacher in many.

Teacher and student are flows of the same layers. The teacher's networks read the data's side of
each layer, the student's the base's side: data to base is one pass of the teacher
:math:`h_0 = x \to h_1 \to \dots \to h_K = u`, base to data one pass of the student
:math:`g_K = u \to \dots \to g_0 = x`. It learns from both passes, never from a slow inverse:

.. math::

    L_x = \mathrm{E}_{x \sim p} \sum_k |g_k - h_k|^2, \; g_K = h_K(x) ; \qquad
    L_u = \mathrm{E}_{u \sim N} \sum_k |h_k - g_k|^2, \; h_0 = g_0(u) ,

data through the teacher to the base and back through the student, and noise through the student to
data and back through the teacher; every state after a layer is compared, and the parameters
of the maps may be too. The same pass of noise gives

.. math:: \mathrm{KL}(q_S \| p_T) = \mathrm{E}_u \big[\ln q_S(g_0(u)|z) - \ln p_T(g_0(u)|z)\big]

for nothing, which is what the weights of the draws are made of.

Source: *CaloFlow II: even faster and still accurate generation of calorimeter showers with
normalizing flows*, C. Krause, D. Shih, 2021, https://arxiv.org/abs/2110.11377; the Kullback–Leibler
term: *Parallel WaveNet*, A. van den Oord et al., 2018, https://arxiv.org/abs/1711.10433.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .columns import Columns
from .teacher import Teacher
from .weights import WeightedDraws, weighted_draws

__all__ = ["Student"]

_OPTIONS = ("layers", "bins", "hidden", "depth", "context", "label_hidden", "label_layers")


class Student(Columns):
    """An inverse autoregressive flow in the place of a trained teacher.

    A draw with its ln q takes one pass of the networks, ln q of other data as many as there are
    columns. The student starts with the teacher's weights.

    Arguments:
        teacher: A trained teacher. It is part of the student, and not trained further.
        hidden: Units of a hidden layer of each masked network; by default the teacher's.
        depth: Hidden layers of each masked network; by default the teacher's.

    Raises:
        ValueError: If the teacher is none, or an option is out of range.

    Example:
        >>> import flowpost as fp
        >>> from flowpost.generators import Student, Teacher
        >>> student = Student(Teacher(fp.Real(2), data=5))
        >>> x, log_q = student(torch.zeros(3, 2)).sample_and_log_prob()
        >>> x.shape, log_q.shape
        (torch.Size([3, 5]), torch.Size([3]))
    """

    def __init__(
        self, teacher: Teacher, *, hidden: int | None = None, depth: int | None = None
    ) -> None:
        if not isinstance(teacher, Teacher):
            raise ValueError(
                f"Expected a Teacher to learn from; got {type(teacher).__name__}. Train one with "
                "flowpost.generators.fit."
            )
        options = {k: teacher._options[k] for k in _OPTIONS}
        own = {"hidden": hidden, "depth": depth}
        options.update({k: v for k, v in own.items() if v is not None})
        super().__init__(teacher.space, teacher.data, True, **options)
        self._options = {**own, "teacher": teacher.config()}
        self.teacher = teacher
        self.to(teacher.loc)
        state, given = self.state_dict(), teacher.state_dict()
        same = {k: v for k, v in given.items() if k in state and state[k].shape == v.shape}
        self.load_state_dict(same, strict=False)

    def learned(self) -> list[Tensor]:
        """The student's own parameters."""
        return [*self.labels.parameters(), *self.flow.parameters()]

    def fit_scale(self, x: Any, z: Any) -> Student:
        """Refused: the scales are the teacher's."""
        raise ValueError("Expected no fit_scale of a student: it has the teacher's scales.")

    def distillation(
        self, x: Tensor, z: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses of a batch, each a mean over events and columns; see the module.

        Arguments:
            x: Data (N, F) of the training.
            z: Labels (N, D).
            generator: Of the noise.

        Returns:
            "data" and "noise", of all states after a layer, the last one included; "parameters",
            of the maps of both passes; and "kl" in nats per event.
        """
        own = self(z)
        with torch.no_grad():
            theirs = self.teacher(z)
            columns, _ = self.to_chart(self.data.validate(x, "x"))
            down = theirs.path_of(columns)
        up = own.path_of(down.states[-1])
        u = own.noise(generator)
        drawn = own.path_of(u)
        back = theirs.path_of(drawn.states[0])
        last = self.flow.log_base(u) - drawn.ladj
        given = self.flow.log_base(back.states[-1]) + back.ladj
        return {
            "data": _distance(up.states[:-1], down.states[:-1]),
            "noise": _distance(back.states[1:], drawn.states[1:]),
            "parameters": _distance(up.parameters, down.parameters)
            + _distance(back.parameters, drawn.parameters),
            "kl": (last - given).mean(),
        }

    def weighted(
        self,
        z: Any,
        draws: int = 256,
        *,
        minimum_ess: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> WeightedDraws:
        """Draws at labels (*batch, D), weighted to the teacher; see `weighted_draws`."""
        return weighted_draws(
            self.teacher, self, z, draws, minimum_ess=minimum_ess, generator=generator
        )


def _distance(own: tuple[Tensor, ...], other: tuple[Tensor, ...]) -> Tensor:
    """Mean square distance of pairs of tensors, over all their numbers."""
    pairs = zip(own, other, strict=True)
    return torch.stack([(a - b).square().mean() for a, b in pairs]).mean()
