r"""Sampling-only generators trained with the conditional energy distance.

The energy score of a distribution q(x|z) at an event (x, z), with independent draws y, y' ~ q(·|z),

.. math:: S(q, x) = \mathbb{E}|x - y| - \tfrac12 \mathbb{E}|y - y'| ,

is a strictly proper score: its mean over events is lowest for q(x|z) = p(x|z), by half the energy
distance of the two at each z. It needs draws only, and two at each event's own label estimate it
and its gradient without bias. In the words of adversarial training it has the critic
:math:`f(x) = \mathbb{E}|x - y'| - \mathbb{E}|x - x'|` in closed form, and there is no second
network; the transformation h before the distance (eq. 9 of the first source, where it is learned)
is the identity here, and whatever fixed `views` are given: the scores of several views of an event
add up to a proper score.

Where data have many columns the distance between two events hardly changes with their details, and
the score is slow to see them: marginals and widths come first, correlations last.

Sources: M. Bellemare et al., *The Cramer distance as a solution to biased Wasserstein gradients*,
2017, https://arxiv.org/abs/1705.10743; T. Gneiting, A. Raftery, *Strictly proper scoring rules,
prediction, and estimation*, 2007, https://doi.org/10.1198/016214506000001437, eq. 22.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .base import NoiseNetwork
from .rounds import Learner, train
from .training import GeneratorHistory, divided

__all__ = ["Views", "energy_score", "fit_energy", "held_score"]

View = Callable[[Tensor], Tensor]
# of held-out events: their draws, and how many of them are held at once
_DRAWS = 4
_CHUNK = 4096


def energy_score(draws: Any, x: Any) -> Tensor:
    """Energy score (N,) of events x (N, F) by draws (S, N, F) at their labels; lower is better.

    It is unbiased: pairs are of different draws.

    Raises:
        ValueError: If shapes do not fit or there are fewer than two draws.

    Example:
        >>> energy_score(torch.tensor([[[0.0]], [[2.0]]]), torch.tensor([[1.0]]))
        tensor([0.])
    """
    draws = as_tensor(draws, "draws")
    x = as_tensor(x, "x", like=draws)
    check_shape(x, ("N", "F"), "x")
    check_shape(draws, ("S", *x.shape), "draws", "S draws at the label of each event.")
    count = len(draws)
    if count < 2:
        raise ValueError(f"Expected at least two draws of each event; got {count}.")
    far = torch.linalg.vector_norm(draws - x, dim=-1).mean(0)
    own = [
        torch.linalg.vector_norm(draws[i + 1 :] - draws[i], dim=-1).sum(0) for i in range(count - 1)
    ]
    return far - sum(own) / (count * (count - 1))


class Views(nn.Module):
    """Several views of an event, each in units of its columns' standard deviations.

    Arguments:
        views: Functions of data (N, F) to (N, F'), of each event alone and differentiable; the data
            themselves come first, always.
        x: Training data (N, F), of which the units are.

    Raises:
        ValueError: If a view is no function, or gives another shape or numbers that are not finite.
    """

    def __init__(self, views: Sequence[View], x: Tensor) -> None:
        super().__init__()
        self.functions: tuple[View, ...] = (_whole, *views)
        for k, function in enumerate(self.functions):
            if not callable(function):
                raise ValueError(
                    f"Expected views as functions of data; got {type(function).__name__}."
                )
            value = as_tensor(function(x), "a view")
            check_shape(value, (len(x), "F"), "a view", "It maps data (N, F) to (N, F').")
            check_finite(value, "a view")
            spread = value.double().std(0, correction=0)
            self.register_buffer(f"loc{k}", value.double().mean(0).to(x))
            self.register_buffer(f"scale{k}", torch.where(spread > 0, spread, 1.0).to(x))

    @property
    def columns(self) -> int:
        """Columns of all views."""
        return sum(len(getattr(self, f"loc{k}")) for k in range(len(self.functions)))

    def forward(self, x: Tensor) -> list[Tensor]:
        """Views (N, F') of data (N, F)."""
        return [
            (function(x) - getattr(self, f"loc{k}")) / getattr(self, f"scale{k}")
            for k, function in enumerate(self.functions)
        ]

    def score(self, draws: Tensor, x: Tensor) -> Tensor:
        """Mean over views of the energy score (N,) per root of its columns."""
        many, size = draws.flatten(0, 1), (len(draws), len(x))
        scores = [
            energy_score(a.unflatten(0, size), b) / b.shape[1] ** 0.5
            for a, b in zip(self(many), self(x), strict=True)
        ]
        return torch.stack(scores).mean(0)


def _whole(x: Tensor) -> Tensor:
    return x


def held_score(
    network: NoiseNetwork, views: Views, x: Tensor, z: Tensor, seed: int
) -> Callable[[], float]:
    """Return what gives the mean energy score of held-out events, with the same noise each time."""

    @torch.no_grad()
    def score() -> float:
        like = network.loc
        generator = torch.Generator().manual_seed(seed)
        total = 0.0
        for a, b in zip(x.split(_CHUNK), z.split(_CHUNK), strict=True):
            draws = network.draw(b, _DRAWS, generator)
            total += float(views.score(draws, a.to(like)).double().sum())
        return total / len(x)

    return score


class _Energy:
    """Energy score of draws at each event's label."""

    def __init__(
        self, network: NoiseNetwork, views: Views, draws: int, lr: float, decay: float
    ) -> None:
        self.network, self.views, self.draws = network, views, draws
        self.learners: tuple[Learner, ...] = (Learner(network, lr, (0.9, 0.99), decay),)

    def steps(self, x: Tensor, z: Tensor, index: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        self.views.to(x.device)
        yield 0, lambda: self.views.score(self.network.draw(z, self.draws), x).mean()


def fit_energy(
    network: NoiseNetwork,
    x: Any,
    z: Any,
    val: Any = 0.1,
    *,
    views: Sequence[View] = (),
    draws: int = 2,
    epochs: int = 50,
    batch_size: int = 256,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    gradient_clip: float | None = 5.0,
    progress: bool = True,
) -> GeneratorHistory:
    """Train a sampling-only generator with the energy score; it keeps its best weights.

    Weights are averaged along the training, and those of the lowest energy score on held-out events
    are kept. The same seed gives the same weights twice on the same machine.

    Arguments:
        network: The generator; its scales are set by the training part, unless they were before.
        x: Data (N, F), in the coordinates in which distances are to count.
        z: Labels (N, D).
        val: Share of the events that is held out, or held-out events (x, z) of their own.
        views: Functions of data whose energy scores are added to that of the data themselves, such
            as sums of columns.
        draws: Draws S at each event's label, at least two.
        epochs: Passes over the events.
        batch_size: Events of a step.
        lr: Peak learning rate.
        weight_decay: Decay of the weights (AdamW).
        seed: Of the division, the order of events and the noise.
        gradient_clip: Largest norm of a step's gradient, or None.
        progress: Show a progress bar.

    Returns:
        Scores of every epoch.

    Raises:
        ValueError: If data or labels do not fit or are not finite, or the training diverged.
        ImportError: If Lightning is not installed.
    """
    check_positive_int(draws, "draws", minimum=2)
    own, held = prepared(network, x, z, val, seed)
    seen = Views(views, own[0])
    return train(
        _Energy(network, seen, draws, lr, weight_decay),
        own,
        held_score(network, seen, *held, seed),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        gradient_clip=gradient_clip,
        progress=progress,
    )


def prepared(
    network: NoiseNetwork, x: Any, z: Any, val: Any, seed: int
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Training events and held-out ones in the precision of a network whose scales are set.

    Raises:
        ValueError: If the network is none, or events do not fit.
    """
    if not isinstance(network, NoiseNetwork):
        raise ValueError(f"Expected a NoiseNetwork; got {type(network).__name__}.")
    own, held = divided(network.check(x, z), val, seed, network.check)
    if not network.fitted:
        network.fit_scale(*own)
    a, b, c, d = (t.detach().to(network.loc) for t in (*own, *held))
    return (a, b), (c, d)
