"""What a test of local coverage found: regions of the context, and how the posterior does there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from .results import CONSISTENT, Coverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["LocalCoverage", "LocalRegion", "told_apart"]

_ALARM = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class LocalRegion:
    """A region of the context, and how the posterior does in it.

    Attributes:
        bounds: Lower and upper end of each feature that is bounded, by name; none for all events.
        count: Events of the second half in it.
        share: Their share of that half.
        p_value: That the posterior is exact there, for all regions together.
        difference: Mean difference of the log-odds within pairs, in nats; 0 if exact.
        error: Its standard error.
        coverage: Base-ordered coverage of these events.
        digits: Significant digits of the ends in words, by name; 4 where there are none.
    """

    bounds: dict[str, tuple[float, float]]
    count: int
    share: float
    p_value: float
    difference: float
    error: float
    coverage: Coverage
    digits: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The region in words: `"x0 > 1.02 and x1 ≤ 0.3"`."""
        parts = [
            _range(name, *ends, self.digits.get(name, 4)) for name, ends in self.bounds.items()
        ]
        return " and ".join(parts) or "all events"

    def __str__(self) -> str:
        found = self.coverage.verdict()
        held = ", ".join(
            f"{100 * self.coverage.coverage_at(p):.1f} % of {100 * p:.0f} %" for p in (0.68, 0.9)
        )
        return f"{self.name}: p = {self.p_value:.3g}, {self.count} events, holds {held}; {found}"

    def __repr__(self) -> str:
        return f"LocalRegion({self.name!r}, count={self.count}, p_value={self.p_value:.3g})"


@dataclass(frozen=True, eq=False, repr=False)
class LocalCoverage:
    """Whether a posterior is exact for every event, and where it is not.

    Attributes:
        count: Events N.
        names: What the features of the context are called.
        classifier: What told labels from draws.
        statistic: T in nats: labels and draws are at least so far from each other, on average.
        null: T of trials with swapped pairs (B,).
        p_value: That of T.
        regions: Regions of the context, the worst first.
    """

    count: int
    names: tuple[str, ...]
    classifier: str
    statistic: float
    null: Tensor
    p_value: float
    regions: tuple[LocalRegion, ...]

    @property
    def failing(self) -> tuple[LocalRegion, ...]:
        """Regions of which the p-value is below 0.01."""
        return tuple(r for r in self.regions if r.p_value < _ALARM)

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 % per question."""
        if self.failing:
            parts = [r for r in self.failing if r.bounds]
            worst = parts[0] if parts else self.failing[0]
            where = f"at {worst.name}" if parts else "on average"
            if len(self.regions) == 1:
                where = "on average, nowhere more than elsewhere"
            if len(self.failing) == len(self.regions) > 1:
                worst = self.failing[0]
                if worst.coverage.verdict() == CONSISTENT and parts:
                    worst = parts[0]
                where = f"everywhere, most at {worst.name}" if worst.bounds else "everywhere"
            found = worst.coverage.verdict()
            if found == CONSISTENT:
                found = "coverage is right there, and the shape or correlation is not"
            return f"fails {where}: {found}"
        if self.p_value < _ALARM:
            return "not exact for every event, in no region that could be named"
        return "no failure found at any context"

    def __str__(self) -> str:
        lines = [
            f"local coverage of {self.count} events by {self.classifier} on "
            f"{len(self.names)} features",
            f"  T = {self.statistic:.5f} nats, p = {self.p_value:.3g} ({len(self.null)} trials)",
            *(f"  {region}" for region in self.regions[:4]),
            f"  => {self.verdict()}",
        ]
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"LocalCoverage(count={self.count}, statistic={self.statistic:.4g}, "
            f"p_value={self.p_value:.3g}, regions={len(self.regions)})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the coverage in each region; see `flowpost.plots.local`."""
        from ..plots.local import plot_local_coverage

        return plot_local_coverage(self, ax=ax)


def told_apart(values: Sequence[float], digits: int = 4) -> list[str]:
    """Numbers with so many significant digits, or as many more as tell different ones apart."""
    for count in range(digits, 18):
        found = [f"{v:.{count}g}" for v in values]
        if len(set(found)) == len(set(values)):
            break
    return found


def _range(name: str, low: float, high: float, digits: int) -> str:
    bottom, top = told_apart([low, high], digits)
    if math.isinf(low):
        return f"{name} ≤ {top}"
    return f"{name} > {bottom}" if math.isinf(high) else f"{bottom} < {name} ≤ {top}"
