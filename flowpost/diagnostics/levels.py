"""Coverage of a stream of credible levels in constant memory, which merges exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .histogram import LevelHistogram
from .nulls import binomial_interval
from .results import LevelCoverage, interpolate

__all__ = ["LevelAccumulator", "nominal_levels"]


def nominal_levels(levels: int | Sequence[float] | Tensor) -> Tensor:
    """Return credibilities (K,): for a number K the midpoints (k − ½)/K, else the given ones.

    Raises:
        ValueError: If a level is outside (0, 1) or there is none.
    """
    if isinstance(levels, int):
        check_positive_int(levels, "levels")
        return (torch.arange(levels, dtype=torch.float64) + 0.5) / levels
    nominal = as_tensor(levels, "levels").double().cpu()
    check_shape(nominal, ("K",), "levels")
    if not len(nominal) or not bool(((nominal > 0) & (nominal < 1)).all()):
        raise ValueError(
            f"Expected levels as a number of them or credibilities inside (0, 1); got "
            f"{nominal.tolist()}. 68 % is written 0.68."
        )
    return nominal.sort().values


class LevelAccumulator:
    """Streaming coverage of credible levels that are uniform on [0, 1] under calibration.

    Counts are integers in fixed bins: merged accumulators hold bit for bit the counts of one pass
    over all events, in any order. Weighted sums agree to rounding.

    Arguments:
        kind: What the levels are, for the table: "HPD", "TARP", …
        bins: Equal bins B of credibility; the Kolmogorov–Smirnov statistic is known to 1/B.
        levels: Number of nominal credibilities, or the credibilities themselves.
    """

    def __init__(
        self,
        kind: str = "credible level",
        bins: int = 65536,
        levels: int | Sequence[float] | Tensor = 20,
    ) -> None:
        self.kind = kind
        self.nominal = nominal_levels(levels)
        self.histogram = LevelHistogram(bins)
        # Σw, Σw², Σw l, Σw² l, Σw² l² with l = log q
        self.scores = torch.zeros(5, dtype=torch.float64)
        self.scored = 0

    @property
    def count(self) -> int:
        """The number of events so far."""
        return self.histogram.count

    def update(
        self, v: Tensor, log_prob: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Add events.

        Arguments:
            v: Credible levels (N,) in [0, 1].
            log_prob: log q(z_true|x) in nats (N,), in all updates or in none.
            weight: Event weights (N,), not negative.

        Raises:
            ValueError: If a shape is wrong or a value is not finite, negative or outside [0, 1].
        """
        v = as_tensor(v, "levels")
        check_shape(v, ("N",), "levels")
        log_prob, weight = self._check(len(v), log_prob, weight, v)
        check_finite(v, "levels")
        if bool(((v < 0) | (v > 1)).any()):
            raise ValueError(
                f"Expected levels in [0, 1]; got {v.min().item():.6g} to {v.max().item():.6g}."
            )
        v = to_double(v)
        above = v >= 0.5
        self.histogram.update(torch.where(above, 1 - v, v), above, weight)
        self._score(log_prob, weight)

    def merge(self, other: LevelAccumulator) -> None:
        """Add the events of another accumulator of the same kind and bins.

        Raises:
            ValueError: If it counts something else, or only one of the two has log_prob.
        """
        if type(other) is not type(self) or other._identity() != self._identity():
            raise ValueError(f"Expected {self._identity()} to merge; got {other._identity()}.")
        if self.count and other.count and bool(self.scored) != bool(other.scored):
            raise ValueError(
                "Expected log_prob in all merged accumulators or in none; got both. "
                "Give it to every update."
            )
        for mine, its in zip(self._histograms(), other._histograms(), strict=True):
            mine.merge(its)
        self.scores = self.scores + other.scores
        self.scored += other.scored

    def compute(self) -> LevelCoverage:
        """Return the coverage of all events so far.

        Raises:
            ValueError: If there are none.
        """
        return LevelCoverage(**self._level_fields())

    def state_dict(self) -> dict[str, Any]:
        """Return everything counted so far as plain numbers and tensors, to stop and resume."""
        return {
            "identity": self._identity(),
            "histograms": [h.state_dict() for h in self._histograms()],
            "scores": self.scores.clone(),
            "scored": self.scored,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; what was counted before is replaced.

        Raises:
            ValueError: If it comes from an accumulator of something else.
        """
        if state["identity"] != self._identity():
            raise ValueError(f"Expected the state of {self._identity()}; got {state['identity']}.")
        for histogram, its in zip(self._histograms(), state["histograms"], strict=True):
            histogram.load_state_dict(its)
        self.scores = state["scores"].clone()
        self.scored = state["scored"]

    def _identity(self) -> str:
        return f"{self.kind} in {self.histogram.bins} bins"

    def _histograms(self) -> list[LevelHistogram]:
        return [self.histogram]

    def _check(
        self, size: int, log_prob: Any, weight: Any, like: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        if log_prob is not None:
            log_prob = as_tensor(log_prob, "log_prob", like)
            check_shape(log_prob, (size,), "log_prob")
            check_finite(log_prob, "log_prob", "Is the label inside the support of the posterior?")
        if size and self.count and bool(self.scored) != (log_prob is not None):
            raise ValueError("Expected log_prob in all updates or in none; got both.")
        if weight is not None:
            weight = as_tensor(weight, "weight", like)
            check_shape(weight, (size,), "weight")
            check_finite(weight, "weight")
            if bool((weight < 0).any()):
                raise ValueError(
                    f"Expected weights that are not negative; got {weight.min().item():.6g}. "
                    "Signed weights have no credible levels; use their absolute values or none."
                )
            weight = to_double(weight)
        return None if log_prob is None else to_double(log_prob), weight

    def _score(self, log_prob: Tensor | None, weight: Tensor | None) -> None:
        if log_prob is None:
            return
        w = torch.ones_like(log_prob) if weight is None else weight
        w2 = w * w
        terms = (w, w2, w * log_prob, w2 * log_prob, w2 * log_prob * log_prob)
        self.scores += torch.stack([t.sum() for t in terms]).cpu()
        self.scored += len(log_prob)

    def _level_fields(self) -> dict[str, Any]:
        if not self.count or not self.histogram.effective_count > 0:
            raise ValueError("Expected at least one event of positive weight; got none.")
        ks, ks_pvalue = self.histogram.ks()
        ad, ad_pvalue = self.histogram.anderson_darling()
        cumulative = self.histogram.cumulative()
        nll = error = None
        if self.scored:
            w, w2, wl, w2l, w2l2 = self.scores.tolist()
            nll = -wl / w
            error = math.sqrt(max(w2l2 + 2 * nll * w2l + nll * nll * w2, 0.0)) / w
        effective = self.histogram.effective_count
        return {
            "kind": self.kind,
            "count": self.count,
            "effective_count": effective,
            "nominal": self.nominal.clone(),
            "empirical": interpolate(cumulative, self.nominal),
            "band": binomial_interval(self.nominal, effective),
            "ks_statistic": ks,
            "ks_pvalue": ks_pvalue,
            "ad_statistic": ad,
            "ad_pvalue": ad_pvalue,
            "cumulative": cumulative,
            "nll": nll,
            "nll_error": error,
        }


def to_double(value: Tensor) -> Tensor:
    # Metal has no float64
    return (value.cpu() if value.device.type == "mps" else value).detach().double()
