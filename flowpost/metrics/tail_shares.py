"""Shares of events beyond thresholds: of a sample, of the truth, and what differs from it."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite
from .multiple import holm
from .ranks import effective_count, event_weights
from .tails_result import TailRow

__all__ = ["FEWEST", "Trained", "Truth", "sample_shares", "share_beyond", "tail_values"]

# of true events beyond a threshold, below which nothing is said
FEWEST = 10
_DEFAULT = (0.1, 0.01, 0.001)


@dataclass(frozen=True)
class Trained:
    """Training events that generated ones may show, if they only repeat them.

    Attributes:
        size: Events n of a training set, None if not known.
        made: Generated events M of each, the fewest.
        sets: Training sets R.
    """

    size: int | None
    made: float
    sets: int

    def none_beyond(self, share: float, true_events: float) -> float:
        """Return the p-value of none beyond a threshold that a true share of events is beyond."""
        if self.size is None:
            return 1.0
        seen = -math.expm1(-self.made / self.size)
        total = self.sets * self.size
        if math.isinf(true_events):
            return float((1 - seen * share) ** total)
        return float((true_events / (true_events + seen * total)) ** (share * true_events))


class Truth:
    """Shares of the truth beyond thresholds, with their errors, and what differs from them."""

    def __init__(
        self,
        true: Any,
        weight: Any,
        probabilities: Any,
        thresholds: Any,
        statistic: Callable[[Tensor], Any] | None,
    ) -> None:
        if (true is None) == (probabilities is None):
            raise ValueError(
                "Expected either true events or exact probabilities; got "
                f"{'neither' if true is None else 'both'}."
            )
        self.exact = true is None
        values = None if true is None else tail_values(true, "true events", statistic)
        if thresholds is None:
            if values is None:
                raise ValueError("Expected thresholds beside exact probabilities; got none.")
            kept = [q for q in _DEFAULT if q * len(values) >= FEWEST]
            thresholds = np.quantile(values, [1 - q for q in kept])
        at = as_tensor(thresholds, "thresholds").double().reshape(-1)
        check_finite(at, "thresholds")
        self.at = at.cpu().numpy()
        if not len(self.at):
            raise ValueError("Expected at least one threshold, with ten true events beyond it.")
        if values is None:
            p = as_tensor(probabilities, "probabilities").double().reshape(-1).cpu().numpy()
            if p.shape != self.at.shape or not ((p > 0) & (p < 1)).all():
                raise ValueError(
                    f"Expected a probability between 0 and 1 for each of {len(self.at)} "
                    f"thresholds; got {p.tolist()}."
                )
            self.share, self.variance = p, np.zeros_like(p)
            self.beyond, self.count = np.full(len(p), np.inf), 0
            return
        w = event_weights(weight, len(values), "weight_true")
        self.share, self.variance = share_beyond(values, w, self.at)
        # as many unweighted events would have this error
        with np.errstate(invalid="ignore", divide="ignore"):
            self.beyond = np.square(self.share) * (1 - self.share) / self.variance
        self.beyond = np.where(self.share > 0, np.where(self.share < 1, self.beyond, np.inf), 0.0)
        self.count = len(values)

    def judge(
        self,
        name: str,
        share: np.ndarray,
        error: np.ndarray,
        spread: np.ndarray,
        counting: np.ndarray,
        dof: int,
        trained: Trained,
    ) -> list[TailRow]:
        """Rows of a generator; p-values are corrected for the number of thresholds."""
        judged = self.beyond >= FEWEST
        p = np.ones(len(self.at))
        for k in np.flatnonzero(judged).tolist():
            p[k] = self._p(k, share[k], error[k], counting[k], dof, trained)
        adjusted = np.ones(len(p))
        adjusted[judged] = holm(p[judged])
        return [
            TailRow(
                generator=name,
                threshold=float(self.at[k]),
                share=float(share[k]),
                error=float(error[k]),
                spread=float(spread[k]),
                counting_error=float(np.sqrt(counting[k])),
                true_share=float(self.share[k]),
                true_error=float(np.sqrt(self.variance[k])),
                p_value=float(p[k]),
                p_adjusted=float(adjusted[k]),
                judged=bool(judged[k]),
            )
            for k in range(len(p))
        ]

    def _p(
        self, k: int, share: float, error: float, counting: float, dof: int, trained: Trained
    ) -> float:
        from scipy.stats import t

        if share == 0:
            return trained.none_beyond(self.share[k], self.beyond[k] / self.share[k])
        own, other = (error**2 or counting), self.variance[k]
        degrees = dof * ((own + other) / own) ** 2 if own > 0 else np.inf
        if own + other == 0:
            return float(share == self.share[k])
        return float(2 * t.sf(abs(share - self.share[k]) / np.sqrt(own + other), degrees))


def tail_values(events: Any, name: str, statistic: Callable[[Tensor], Any] | None) -> np.ndarray:
    """Return a statistic of events (N, …), or events that are values already, in double (N,).

    Raises:
        ValueError: If there is not one finite value an event.
    """
    events = as_tensor(events, name)
    if statistic is not None:
        with torch.no_grad():
            events = as_tensor(statistic(events), f"statistic of {name}")
    if events.ndim == 2 and events.shape[1] == 1:
        events = events[:, 0]
    if events.ndim != 1 or not len(events):
        raise ValueError(
            f"Expected {name} as one value an event, shape (N,); got {tuple(events.shape)}. Give "
            "the statistic of an event, such as statistic=lambda x: x.sum(1)."
        )
    check_finite(events, name)
    return np.asarray(events.detach().double().cpu().numpy())


def share_beyond(
    values: np.ndarray, weight: np.ndarray, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Weighted shares beyond thresholds (Q,) and their variances by counting."""
    a = weight / weight.sum()
    above = values[:, None] > at
    share = a @ above
    return share, np.square(a) @ np.square(above - share)


def sample_shares(
    part: Any, name: str, statistic: Callable[[Tensor], Any] | None, at: np.ndarray
) -> tuple[np.ndarray, np.ndarray, float]:
    """Shares beyond thresholds, their variances, and the effective number of generated events."""
    events, weight = part if isinstance(part, tuple) else (part, None)
    values = tail_values(events, name, statistic)
    weight = event_weights(weight, len(values), f"weights of {name}")
    return *share_beyond(values, weight, at), effective_count(weight)
