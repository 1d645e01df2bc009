"""A cut on the calibrated p-value, with what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .calibrate import Calibrator

__all__ = ["Efficiency", "Filter"]


@dataclass(frozen=True)
class Efficiency:
    """The share of events that a filter keeps, with its Clopper–Pearson interval.

    The interval is that of the events counted. The calibration is of a finite sample too: the share
    of good events that its cut keeps in the long run is 1 − threshold within `calibration`.

    Attributes:
        kept: Events kept.
        count: Events in all.
        value: Their ratio.
        low: Lower end of the interval.
        high: Upper end.
        level: Its confidence.
        calibration: Standard deviation √(α(1 − α)/n) of the share of good events kept over
            calibrations by n held-out events, with α the threshold; not in the interval.
        held: The number n.
    """

    kept: int
    count: int
    value: float
    low: float
    high: float
    level: float
    calibration: float = 0.0
    held: int = 0

    def __str__(self) -> str:
        text = (
            f"{100 * self.value:.2f} % of {self.count} events kept "
            f"({100 * self.low:.2f} % to {100 * self.high:.2f} % at {100 * self.level:.0f} %"
        )
        if self.held:
            text += (
                f"; beside it ± {100 * self.calibration:.2f} % of the calibration by {self.held} "
                "held-out events"
            )
        return f"{text})"


class Filter(nn.Module):
    """Keeps events whose calibrated p-value is at least a threshold: `filter(x) -> mask`.

    p is an estimate from draws of all events together, so that an event near the cut can pass or
    not with another seed, or where a file is filtered in other portions; good events are lost at
    the same rate. The `max_draws` of the calibrator narrow it, see there. Keep p, or the mask, of a
    file beside it where decisions have to be the same for ever.

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
        """True for events to keep (N,), of inputs of N events; there may be none.

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

        On good events it is that within the interval and the spread of the calibration.

        Arguments:
            x: Inputs of N events.
            level: Confidence of the interval.
            reference: First guesses, for a head that wants them.
            seed: Of all draws.

        Raises:
            ValueError: If the level is not between 0 and 1, there are no events, or inputs do not
                fit.
        """
        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1; got {level!r}.")
        mask = self(x, reference=reference, seed=seed)
        kept, count, held = int(mask.sum()), len(mask), self.calibrator.held
        if not count:
            raise ValueError("Expected at least one event for an efficiency; got none.")
        low, high = clopper_pearson(kept, count, level)
        spread = math.sqrt(self.threshold * (1 - self.threshold) / held)
        return Efficiency(kept, count, kept / count, low, high, level, spread, held)

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
