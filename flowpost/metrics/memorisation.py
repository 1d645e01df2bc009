r"""Memorisation: does a generator repeat its training events?

With :math:`d(x, A) = \min_{a \in A} |x - a|` in units of the training events' spread, there are two
questions, for generated events g, training events A and held-out events H of the same truth.

*Are generated events nearer to the training set than held-out events are?* Given A, the distances
d(g, A) and d(h, A) are independent of each other, although their nearest neighbours may coincide,
and under the null, generated events being fresh ones, of one distribution: labels of g and h are
exchanged, and p is exact. The statistic is the studentised AUC of the distances, one-sided. A
generator that is too narrow, or that follows the centre of the truth, has near neighbours too.

*Are generated events nearer to training events than to held-out ones?* If g says no more of A than
of H, these are exchangeable beside it, whatever the distribution of g: with c(a) the number of
generated events whose nearest neighbour in A ∪ H is a, labels of A and H are exchanged in

.. math:: T = \frac{1}{M} \sum_{a \in A} c(a) .

All events that share a neighbour move together, so that p is exact, also where generated events
depend on each other. That is what is called memorised here. Nothing in it says that an event is a
copy: a model of n events is always a little nearer to these than to others, which enough generated
events show.

Distances among training events, their own zero distances left out, are *not* a null: each of them
counts in several, and A is not independent of itself.

References:
    A Non-Parametric Test to Detect Data-Copying in Generative Models
    (C. Meehan, K. Chaudhuri, S. Dasgupta, 2020) https://arxiv.org/abs/2004.05675

    Multivariate Two-Sample Tests Based on Nearest Neighbors (M. Schilling, 1986)
    https://doi.org/10.2307/2289012
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from .._progress import progress_bar
from .ranks import RankTest, permutation_pvalues

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["MemorisationTest", "memorisation"]

_ALARM = 0.01
_FEWEST = 20
_CHUNK = 1 << 22
# of the spread: coordinates that agree so well are one and the same
_COPY = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class MemorisationTest:
    """Result of `memorisation`.

    Attributes:
        distance_generated: From generated events to the nearest training event (M,), in units of
            the columns' spread.
        distance_held_out: From held-out events to the nearest training event (H,).
        auc: Probability that a generated event is nearer to the training set than a held-out one;
            0.5 for fresh events.
        p_close: P-value of that, one-sided.
        share: Share of generated events nearer to a training event than to any held-out one.
        expected: The same for a generator that has not seen the training set.
        share_error: Standard deviation of the share under the null.
        p_value: P-value of the share, one-sided: of memorisation.
        copies: Share of generated events that are copies of a training event.
        copies_held_out: The same of held-out events: not 0 where events are discrete.
        count: Generated, training and held-out events.
        permutations: B.
    """

    distance_generated: Tensor
    distance_held_out: Tensor
    auc: float
    p_close: float
    share: float
    expected: float
    share_error: float
    p_value: float
    copies: float
    copies_held_out: float
    count: tuple[int, int, int]
    permutations: int

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 %."""
        if self.p_value <= _ALARM:
            what = (
                f"{100 * self.copies:.3g} % of the generated events are copies of training events"
                if self.copies > self.copies_held_out
                else f"{100 * self.share:.3g} % of the generated events are nearer to training "
                f"events than to held-out ones, where {100 * self.expected:.3g} % should be"
            )
            return f"memorised (p = {self.p_value:.3g}): {what}"
        if self.p_close <= _ALARM:
            return (
                f"too close to the training events (p = {self.p_close:.3g}), and to held-out ones "
                f"alike (p = {self.p_value:.3g}): not memorised, but too narrow or smooth"
            )
        return f"no sign of memorisation (p = {self.p_value:.3g})"

    def __str__(self) -> str:
        m, n, h = self.count
        median = [float(d.median()) for d in (self.distance_generated, self.distance_held_out)]
        return (
            f"Nearest training events of {m} generated and {h} held-out events, of {n}\n"
            f"  median distance   generated {median[0]:.4g}, held-out {median[1]:.4g}\n"
            f"  nearer than held-out events  AUC {self.auc:.4f}, p {self.p_close:.3g}\n"
            f"  nearest is a training event  {self.share:.4f}, expected {self.expected:.4f} ± "
            f"{self.share_error:.4f}, p {self.p_value:.3g}\n"
            f"  exact copies  generated {100 * self.copies:.3g} %, held-out "
            f"{100 * self.copies_held_out:.3g} %\n"
            f"  => {self.verdict()}"
        )

    def __repr__(self) -> str:
        return (
            f"MemorisationTest(share={self.share:.4f}, expected={self.expected:.4f}, "
            f"copies={self.copies:.3g}, p_value={self.p_value:.3g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the distribution functions of the distances of generated and held-out events."""
        from ..plots.generative import plot_memorisation

        return plot_memorisation(self, ax)


def memorisation(
    generated: Any,
    training: Any,
    held_out: Any,
    *,
    scale: Any = None,
    permutations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> MemorisationTest:
    """Ask whether generated events are nearer to the training set than they have a right to be.

    Arguments:
        generated: Generated events (M, …), without event weights.
        training: The events that trained the generator (N, …).
        held_out: Events of the same truth that did not (H, …), about as many: a choice among
            trained generators by these makes them training events too.
        scale: Units of the columns (D,); by default the standard deviations of training and
            held-out events together. For heavy tails take logarithms first.
        permutations: B; the least p-value is 1/(1 + B).
        seed: Of permutations and of ties.
        progress: Show a progress bar over generated and held-out events.

    Returns:
        Distances, shares and p-values; print it.

    Raises:
        ValueError: If there are fewer than 20 events of a kind, held-out events are the training
            events, columns differ, a scale is not
            positive or a value is not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> training, held_out, fresh = torch.randn(3, 200, 2, generator=g)
        >>> jitter = 0.01 * torch.randn(200, 2, generator=g)
        >>> memorisation(training + jitter, training, held_out).p_value < 0.01
        True
        >>> memorisation(fresh, training, held_out).p_value < 0.01
        False
    """
    permutations = check_positive_int(permutations, "permutations")
    parts = [
        _events(v, f"{name} events")
        for v, name in ((generated, "generated"), (training, "training"), (held_out, "held-out"))
    ]
    if len({p.shape[1] for p in parts}) > 1:
        raise ValueError(
            f"Expected as many columns of all events; got {[p.shape[1] for p in parts]}."
        )
    made, trained, held = (p.to(parts[1].device) for p in parts)
    unit = _unit(scale, torch.cat([trained, held]))
    if torch.equal(trained, held):
        raise ValueError(
            "Expected held-out events that did not train the generator; got the training events "
            "themselves. Keep some events back before the training."
        )
    made, trained, held = (p / unit for p in (made, trained, held))
    rng = np.random.default_rng(seed)
    pooled = torch.cat([trained, held])
    with progress_bar(len(made) + len(held), "neighbours", progress) as bar:
        near, nearest = _nearest(made, pooled, len(trained), rng, bar)
        near_held, _ = _nearest(held, trained, len(trained), rng, bar)
    counts = np.bincount(nearest, minlength=len(pooled))
    share, null = _shares(counts, len(trained), permutations, rng)
    scores = -np.concatenate([near, near_held])
    ranks = RankTest(scores)
    label = (np.arange(len(scores)) < len(near)).astype(float)[None]
    close = permutation_pvalues([ranks], np.ones(len(scores)), len(near), permutations, rng)[1]
    limit = _COPY * trained.shape[1] ** 0.5
    return MemorisationTest(
        distance_generated=torch.as_tensor(near),
        distance_held_out=torch.as_tensor(near_held),
        auc=float(ranks(label, 1 - label)[0][0]),
        p_close=float(close[0]),
        share=share,
        expected=len(trained) / (len(trained) + len(held)),
        share_error=float(null.std()),
        p_value=_rank_p(share, null, rng),
        copies=float((near <= limit).mean()),
        copies_held_out=float((near_held <= limit).mean()),
        count=(len(made), len(trained), len(held)),
        permutations=permutations,
    )


def _events(value: Any, name: str) -> Tensor:
    events = as_tensor(value, name).detach().double()
    if not events.ndim or len(events) < _FEWEST or not events.numel():
        raise ValueError(
            f"Expected at least {_FEWEST} {name}, one a row; got shape {tuple(events.shape)}."
        )
    check_finite(events, name)
    return events.reshape(len(events), -1)


def _unit(scale: Any, events: Tensor) -> Tensor:
    if scale is None:
        spread = events.std(0)
        return torch.where(spread > 0, spread, 1.0)
    unit = as_tensor(scale, "scale", like=events).to(events).reshape(-1)
    if unit.shape != (events.shape[1],) or not bool((unit > 0).all() & unit.isfinite().all()):
        raise ValueError(
            f"Expected scale as {events.shape[1]} positive numbers, one a column; got "
            f"{unit.tolist()}."
        )
    return unit


def _nearest(
    events: Tensor, others: Tensor, trained: int, rng: np.random.Generator, bar: Any
) -> tuple[np.ndarray, np.ndarray]:
    """Distance to the nearest of the first `trained` others, and which is the nearest of all.

    Of equal ones it is that which comes first in a random order.
    """
    order = torch.as_tensor(rng.permutation(len(others)), device=others.device)
    shuffled, of_training = others[order], order < trained
    found = []
    for part in events.split(max(_CHUNK // len(others), 1)):
        # by differences: products lose the distances of near events
        distance = torch.cdist(part, shuffled, compute_mode="donot_use_mm_for_euclid_dist")
        least = distance[:, of_training].min(1).values
        found.append((least.cpu().numpy(), order[distance.argmin(1)].cpu().numpy()))
        bar.update(len(part))
    return np.concatenate([f[0] for f in found]), np.concatenate([f[1] for f in found])


def _shares(
    counts: np.ndarray, trained: int, permutations: int, rng: np.random.Generator
) -> tuple[float, np.ndarray]:
    """Share of the first `trained` neighbours in all counts, and of as many taken by chance."""
    total = counts.sum()
    null = np.array([rng.permutation(counts)[:trained].sum() for _ in range(permutations)])
    return float(counts[:trained].sum() / total), null / total


def _rank_p(found: float, null: np.ndarray, rng: np.random.Generator) -> float:
    """One-sided p-value of a count, its place among equal ones by chance: uniform, not coarser."""
    equal = np.abs(null - found) < 1e-9
    above = int((null[~equal] > found).sum()) + int(rng.integers(1 + equal.sum()))
    return (1 + above) / (1 + len(null))
