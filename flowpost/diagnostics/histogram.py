r"""Fixed bins of credibility, from which every test of uniformity follows and which add exactly.

The unit interval is cut into B equal bins; the first and the last one are halved again 64 times
(edges 2⁻ʲ/B from 0 and from 1), so that outliers keep their weight in the Anderson–Darling
integral. Counts are integers: the sum of two histograms is bit for bit the histogram of all events.

Within a bin the levels of a calibrated posterior are uniform, so the statistic is the expectation
of A² given the counts: with c events below a bin [a, a + h] that holds m,

.. math::
    E[A^2 \mid \text{counts}] = N \sum_{\text{bins}} \int_0^1
    \frac{\left(\frac{c + m t}{N} - a - h t\right)^2 + \frac{m}{N^2} t (1 - t)}
         {(a + h t)(1 - a - h t)} \, h \, dt ,

whose second term is what a straight line through the bin would lose. D is read at the edges.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .nulls import anderson_darling_pvalue, ks_pvalue

__all__ = ["LevelHistogram"]

_OCTAVES = 64
# Gauss–Legendre on [0, 1], 8 points: relative error below 1e-11 for 1/v over a factor of two.
_NODES = (0.0198550717512319, 0.1016667612931866, 0.2372337950418355, 0.4082826787521751)
_WEIGHTS = (0.0506142681451881, 0.1111905172266872, 0.1568533229389437, 0.1813418916891810)


class LevelHistogram:
    """Counts of credible levels in fixed bins, on the CPU.

    Arguments:
        bins: The number B of equal bins, even, at least 16.

    Attributes:
        counts: Events per bin, int64 (B + 128,).
        weights: Sum of weights per bin, float64, or None while every event has had weight one.
        squares: Sum of squared weights per bin, likewise.
    """

    def __init__(self, bins: int = 65536) -> None:
        if isinstance(bins, bool) or int(bins) != bins or bins < 16 or bins % 2:
            raise ValueError(f"Expected bins as an even whole number of at least 16; got {bins!r}.")
        self.bins = int(bins)
        self.counts = torch.zeros(self.bins + 2 * _OCTAVES, dtype=torch.int64)
        self.weights: Tensor | None = None
        self.squares: Tensor | None = None

    def update(self, tail: Tensor, above: Tensor, weight: Tensor | None = None) -> None:
        """Add N levels v, each given by its distance to the nearer end of [0, 1].

        Arguments:
            tail: min(v, 1 − v), float64 (N,): from the survival function above one half, so that
                levels within rounding of one keep their place.
            above: Whether v is in the upper half, bool (N,).
            weight: Event weights (N,), or None for one each.
        """
        size = len(self.counts)
        scaled = tail * self.bins
        index = scaled.long().clamp_(max=self.bins // 2 - 1).add_(_OCTAVES)
        outer = (scaled < 1).nonzero().squeeze(-1)
        octave = torch.frexp(scaled[outer]).exponent.long() + _OCTAVES
        # frexp gives 0 the exponent of [½, 1)
        index[outer] = torch.where(tail[outer] > 0, octave.clamp_(min=0), 0)
        index = torch.where(above, size - 1 - index, index)
        if weight is not None and self.weights is None:
            self.weights, self.squares = self.counts.double(), self.counts.double()
        self.counts += torch.bincount(index, minlength=size).cpu()
        if self.weights is not None and self.squares is not None:
            w = torch.ones_like(tail) if weight is None else weight.to(tail)
            self.weights += torch.bincount(index, w, minlength=size).cpu()
            self.squares += torch.bincount(index, w * w, minlength=size).cpu()

    def merge(self, other: LevelHistogram) -> None:
        """Add the events of `other`, exactly (weights: to rounding)."""
        if other.bins != self.bins:
            raise ValueError(f"Expected the same bins to merge; got {self.bins} and {other.bins}.")
        if self.weights is None and other.weights is not None:
            self.weights, self.squares = self.counts.double(), self.counts.double()
        if self.weights is not None and self.squares is not None:
            self.weights += other.counts if other.weights is None else other.weights
            self.squares += other.counts if other.squares is None else other.squares
        self.counts += other.counts

    @property
    def count(self) -> int:
        """The number of events."""
        return int(self.counts.sum())

    @property
    def effective_count(self) -> float:
        """Kish's effective sample size (Σw)²/Σw²; the number of events without weights."""
        if self.weights is None or self.squares is None:
            return float(self.count)
        return float(self.weights.sum() ** 2 / self.squares.sum())

    def cumulative(self) -> Tensor:
        """Return the fraction of events below each edge k/B of the equal bins, (B + 1,)."""
        mass = self.counts if self.weights is None else self.weights
        whole = mass[_OCTAVES:-_OCTAVES].clone()
        whole[0] += mass[:_OCTAVES].sum()
        whole[-1] += mass[-_OCTAVES:].sum()
        below = torch.cat([whole.new_zeros(1), whole.cumsum(0)])
        return below.double() / below[-1].double()

    def ks(self) -> tuple[float, float]:
        """Return D to 1/B, and its p-value (with weights: at the effective sample size)."""
        below = self.cumulative()
        edges = torch.arange(self.bins + 1, dtype=torch.float64) / self.bins
        statistic = float((below - edges).abs().max())
        return statistic, ks_pvalue(statistic, self.effective_count)

    def anderson_darling(self) -> tuple[float, float]:
        """Return E[A² | counts] and its p-value (with weights: at the effective sample size)."""
        mass = (self.counts if self.weights is None else self.weights).double()
        spread = mass if self.squares is None else self.squares
        total = mass.sum()
        half = len(mass) // 2
        steps = torch.arange(_OCTAVES + 1, dtype=torch.float64) - _OCTAVES
        inner = torch.arange(2, self.bins // 2 + 1, dtype=torch.float64)
        edges = torch.cat([torch.zeros(1, dtype=torch.float64), torch.exp2(steps), inner])
        edges = edges / self.bins
        integral = 0.0
        for m, s in ((mass, spread), (mass.flip(0), spread.flip(0))):
            m, s = m[:half] / total, s[:half] / total**2
            below = torch.cat([m.new_zeros(1), m.cumsum(0)])[:-1]
            width = edges.diff()
            for x, weight in zip(_NODES, _WEIGHTS, strict=True):
                for t in (x, 1 - x):
                    v = edges[:-1] + width * t
                    square = (below + m * t - v).square() + s * (t * (1 - t))
                    integral += weight * float((square / (v * (1 - v)) * width).sum())
        statistic = self.effective_count * integral
        return statistic, anderson_darling_pvalue(statistic, self.effective_count)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts and weights as copies."""
        state: dict[str, Any] = {"bins": self.bins, "counts": self.counts.clone()}
        if self.weights is not None and self.squares is not None:
            state |= {"weights": self.weights.clone(), "squares": self.squares.clone()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Replace the contents by those of a `state_dict`.

        Raises:
            ValueError: If it comes from a histogram of other bins.
        """
        if state["bins"] != self.bins or len(state["counts"]) != len(self.counts):
            raise ValueError(f"Expected a state of {self.bins} bins; got {state['bins']}.")
        self.counts = state["counts"].clone()
        self.weights = state["weights"].clone() if "weights" in state else None
        self.squares = state["squares"].clone() if "squares" in state else None
