"""A cut on the calibrated p-value, with what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .calibrate import Calibrator

__all__ = ["Efficiency", "Filter"]


@dataclass(frozen=True)
class Efficiency:
    """The share of events that a filter keeps, with its Clopper–Pearson interval.

    Attributes:
        kept: Events kept.
        count: Events in all.
        value: Their ratio.
        low: Lower end of the interval.
        high: Upper end.
        level: Its confidence.
    """

    kept: int
    count: int
    value: float
    low: float
    high: float
    level: float

    def __str__(self) -> str:
        return (
            f"{100 * self.value:.2f} % of {self.count} events kept "
            f"({100 * self.low:.2f} % to {100 * self.high:.2f} % at {100 * self.level:.0f} %)"
        )


class Filter(nn.Module):
    """Keeps events whose calibrated p-value is at least a threshold: `filter(x) -> mask`.

    Arguments:
        calibrator: A calibrator; fitted before events are filtered.
        threshold: Share of good events that is lost.

    Raises:
        ValueError: If the threshold is not between 0 and 1, or finer than the calibrator resolves.
    """

    def __init__(self, calibrator: Calibrator, threshold: float = 0.01) -> None:
        super().__init__()
        if not 0 < threshold < 1:
            raise ValueError(f"Expected a threshold between 0 and 1; got {threshold!r}.")
        if not isinstance(calibrator, Calibrator):
            raise ValueError(f"Expected a Calibrator; got {type(calibrator).__name__}.")
        self.calibrator, self.threshold = calibrator, float(threshold)
        if calibrator.fitted:
            self._check_resolution()

    def _check_resolution(self) -> None:
        finest = self.calibrator.resolution
        if self.threshold < finest:
            raise ValueError(
                f"Expected a threshold of at least {finest:.2g}, which the held-out events of the "
                f"calibrator resolve; got {self.threshold:g}. Fit it with more events, or fewer "
                "bins."
            )

    def config(self) -> dict[str, Any]:
        """JSON description, without the calibrator."""
        return {"threshold": self.threshold}

    def forward(self, x: Any, *, reference: Any = None, seed: int = 1) -> Tensor:
        """True for events to keep (N,), of inputs of N events.

        Raises:
            ValueError: If the calibrator is not fitted, or does not resolve the threshold, or
                inputs do not fit.
        """
        if self.calibrator.fitted:
            self._check_resolution()
        found = self.calibrator.p_value(x, reference=reference, seed=seed)
        return found.p >= self.threshold

    def efficiency(
        self, x: Any, *, level: float = 0.68, reference: Any = None, seed: int = 1
    ) -> Efficiency:
        """The share of events kept, with its interval: on fresh good events 1 − threshold.

        Arguments:
            x: Inputs of N events.
            level: Confidence of the interval.
            reference: First guesses, for a head that wants them.
            seed: Of all draws.

        Raises:
            ValueError: If the level is not between 0 and 1, or inputs do not fit.
        """
        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1; got {level!r}.")
        mask = self(x, reference=reference, seed=seed)
        low, high = clopper_pearson(int(mask.sum()), len(mask), level)
        return Efficiency(int(mask.sum()), len(mask), float(mask.double().mean()), low, high, level)

    def extra_repr(self) -> str:
        """The threshold, for `print(filter)`."""
        return f"threshold={self.threshold:g}"


def clopper_pearson(kept: int, count: int, level: float) -> tuple[float, float]:
    """Exact binomial interval of a share.

    Source: C. J. Clopper, E. S. Pearson, *The use of confidence or fiducial limits illustrated in
    the case of the binomial*, 1934, https://doi.org/10.1093/biomet/26.4.404.
    """
    from scipy.special import betaincinv

    tail = (1 - level) / 2
    low = float(betaincinv(kept, count - kept + 1, tail)) if kept else 0.0
    high = float(betaincinv(kept + 1, count - kept, 1 - tail)) if kept < count else 1.0
    return low, high
