r"""Generation in two steps: sums of groups of values first, then how each sum is shared.

A shower has K layer energies :math:`S_k`, which depend strongly on the label, and shares of the
voxels in each, which depend on it weakly once the sums are known,

.. math:: p(x|z) = p_1(S|z)\; p_2(s|z, S)\; \Big|\frac{\partial (S, s)}{\partial x}\Big| ,

with the sticks s of `GroupSums`, which also says what is done with zeros.

Source: *CaloFlow*, C. Krause, D. Shih, 2021, https://arxiv.org/abs/2106.05285.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Size, Tensor

from .._checks import as_tensor, check_shape
from ..likelihood import BoundLikelihood, Likelihood
from ..likelihood.base import check_events
from ..spaces import Positive, Product, Real, Space
from .groups import GroupSums
from .student import Student
from .teacher import Teacher

__all__ = ["BoundTwoStep", "TwoStep"]


class TwoStep(Likelihood):
    """A likelihood of grouped values, from one of their sums and one of the sticks.

    Arguments:
        first: Of the K sums, at labels (N, D): a likelihood of vectors.
        second: Of the sticks, at labels and sums (N, D + K).
        groups: The groups of values.

    Raises:
        ValueError: If the numbers of columns do not fit.

    Example:
        >>> import flowpost as fp
        >>> model = TwoStep.teacher(fp.Positive(), GroupSums([24, 36, 18], threshold=0.002))
        >>> energy = torch.tensor([[10.0], [50.0]])
        >>> model.sample(energy).shape
        torch.Size([2, 78])
    """

    def __init__(self, first: Likelihood, second: Likelihood, groups: GroupSums) -> None:
        super().__init__(first.space)
        wanted = first.space.label_size + len(groups.sizes)
        if second.space.label_size != wanted:
            raise ValueError(
                f"Expected the second likelihood at {wanted} label columns, those of the first and "
                f"the sums; got {second.space.label_size}. TwoStep.teacher builds both."
            )
        for step, count, what in (
            (first, len(groups.sizes), "first likelihood of the sums"),
            (second, groups.sticks, "second likelihood of the sticks"),
        ):
            data = getattr(step, "data", None)
            if isinstance(data, Space) and data.label_size != count:
                raise ValueError(
                    f"Expected the {what}, in {count} columns; got one of {data.label_size}. "
                    "TwoStep.teacher builds both."
                )
        self.first, self.second, self.groups = first, second, groups

    @classmethod
    def teacher(
        cls,
        space: Space,
        groups: GroupSums,
        first: dict[str, Any] | None = None,
        second: dict[str, Any] | None = None,
    ) -> TwoStep:
        """Two teachers, with options of `Teacher` for the first and the second."""
        count = len(groups.sizes)
        joint = Product(label=space, sums=Positive(count))
        return cls(
            Teacher(space, Positive(count), **(first or {})),
            Teacher(joint, Real(groups.sticks), **(second or {})),
            groups,
        )

    def student(self, *, first: bool = False, **options: Any) -> TwoStep:
        """The same with a `Student` of the second step, to be distilled.

        Arguments:
            first: Also with one of the first step. It has few columns: this saves a quarter of a
                draw's time in batches of ten, and hardly anything in large ones.
            options: Those of `Student`, for the second step.
        """
        begin = _student(self.first) if first else self.first
        return TwoStep(begin, _student(self.second, **options), self.groups)

    def config(self) -> dict[str, Any]:
        """JSON description of both steps and the groups."""
        return {
            "type": "TwoStep",
            "first": self.first.config(),
            "second": self.second.config(),
            "groups": self.groups.config(),
        }

    @property
    def size(self) -> int:
        """Of the larger step."""
        return max(self.first.size, self.second.size)

    def fit_scale(self, x: Any, z: Any) -> TwoStep:
        """Set order and scales from data (N, F) and labels (N, D) of the training part."""
        x, z = self.groups.check(x), self._labels(z)
        check_shape(x, (len(z), self.groups.values), "x", "One event for each row of labels.")
        self.groups.fit(x)
        filled, _ = self.groups.fill(x, torch.Generator(x.device).manual_seed(0))
        sums, sticks, _ = self.groups.split(filled)
        self.first.fit_scale(sums, z)
        self.second.fit_scale(sticks, torch.cat([z.to(sums), sums], -1))
        self.fitted = torch.ones_like(self.fitted)
        return self

    def _bind(self, z: Tensor) -> BoundTwoStep:
        return BoundTwoStep(self, z)

    def continuous(self) -> TwoStep:
        """The same networks on filled values: no noise, no threshold, and an exact density.

        What is drawn with its density or weighted is this; `groups.cut` then sets the zeros.
        """
        groups = GroupSums(self.groups.sizes)
        groups.order = self.groups.order
        view = TwoStep(self.first, self.second, groups)
        view.fitted = self.fitted
        return view.train(self.training)

    def distillation(
        self, x: Tensor, z: Tensor, generator: torch.Generator | None = None
    ) -> dict[str, Tensor]:
        """Losses of the students of both steps added up, see `Student.distillation`."""
        if not isinstance(self.second, Student):
            raise ValueError("Expected a student as the second step. Use TwoStep.student().")
        filled, _ = self.groups.fill(x, generator)
        sums, sticks, _ = self.groups.split(filled)
        found = self.second.distillation(sticks, torch.cat([z, sums], -1), generator)
        if isinstance(self.first, Student):
            begin = self.first.distillation(sums, z, generator)
            found = {name: value + begin[name] for name, value in found.items()}
        return found


def _student(step: Likelihood, **options: Any) -> Student:
    if not isinstance(step, Teacher):
        raise ValueError(f"Expected a teacher to learn from; got {type(step).__name__}.")
    return Student(step, **options)


class BoundTwoStep(BoundLikelihood):
    """Two steps at labels."""

    def __init__(self, model: TwoStep, z: Tensor) -> None:
        self.model, self.z = model, z
        self.batch_shape: Size = z.shape[:-1]
        self._first = model.first(z)

    def _parts(
        self, x: Any, generator: torch.Generator | None
    ) -> tuple[Tensor, BoundLikelihood, Tensor, Tensor]:
        """Sums, the second step at them, sticks, and ladj with the density of the noise."""
        x = self.model.groups.check(as_tensor(x, "x", like=self.z)).to(self.z)
        check_events(x.shape[:-1], self.batch_shape, "x")
        filled, count = self.model.groups.fill(x.expand(*self.batch_shape, -1), generator)
        sums, sticks, ladj = self.model.groups.split(filled)
        return sums, self._second(sums), sticks, ladj + count

    def _second(self, sums: Tensor) -> BoundLikelihood:
        return self.model.second(torch.cat([self.z, sums], -1))

    def log_prob(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x|z) (*batch) of data (*batch, F), its zeros filled with noise of the generator."""
        sums, second, sticks, ladj = self._parts(x, generator)
        return self._first.log_prob(sums) + second.log_prob(sticks) + ladj

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Data (*batch, F)."""
        with torch.no_grad():
            sums = self._first.sample(generator)
            sticks = self._second(sums).sample(generator)
            return self.model.groups.cut(self.model.groups.join(sums, sticks))

    def sample_and_log_prob(
        self, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data (*batch, F) and ln p of them; from the same passes where there is no threshold."""
        if self.model.groups.threshold:
            return super().sample_and_log_prob(generator)
        with torch.no_grad():
            sums, first = self._first.sample_and_log_prob(generator)
            sticks, second = self._second(sums).sample_and_log_prob(generator)
            x = self.model.groups.join(sums, sticks)
            return x, first + second + self.model.groups.split(x)[2]

    def measured(self, x: Any) -> Tensor:
        """The values of x, zeros among them."""
        x = as_tensor(x, "x", like=self.z)
        check_shape(x, (*("batch",) * (x.ndim - 1), self.model.groups.values), "x")
        return x.new_full(x.shape[:-1], float(x.shape[-1]))

    def residuals(
        self, x: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Base points (*batch, F) of both steps."""
        sums, second, sticks, _ = self._parts(x, generator)
        parts = [self._first.residuals(sums)[0], second.residuals(sticks)[0]]
        return torch.cat(parts, -1), None
