"""What recombination returns: the test before it, the combinations, and what they gain."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Independence", "Recombination", "TailGain"]

_ALARM = 0.05


@dataclass(frozen=True)
class Independence:
    """Result of `independence_test`: each component but the first against all before it.

    Attributes:
        correlation: Distance correlations (k − 1,), of the order of N^(-1/2) for independent ones.
        p_values: P-values (k − 1,) of each alone.
        p_adjusted: The same, corrected for their number by Holm's method.
        components: Columns of each component.
        count: Events taken.
        permutations: B.
    """

    correlation: tuple[float, ...]
    p_values: tuple[float, ...]
    p_adjusted: tuple[float, ...]
    components: tuple[tuple[int, ...], ...]
    count: int
    permutations: int

    @property
    def p_value(self) -> float:
        """P-value of mutual independence: the smallest corrected one."""
        return min(self.p_adjusted)

    @property
    def dependent(self) -> bool:
        """Whether a dependence is seen, at 5 %: what recombination would destroy."""
        return self.p_value <= _ALARM

    def __str__(self) -> str:
        lines = [f"Independence of {len(self.components)} components of {self.count} events"]
        for k, (r, p) in enumerate(zip(self.correlation, self.p_values, strict=True), 1):
            lines.append(
                f"  columns {list(self.components[k])} against "
                f"{[c for g in self.components[:k] for c in g]}: distance correlation {r:.4f}, "
                f"p {p:.3g}"
            )
        seen = "dependent: do not recombine" if self.dependent else "no dependence seen"
        lines.append(f"  => {seen} (p = {self.p_value:.3g})")
        return "\n".join(lines)


@dataclass(frozen=True)
class TailGain:
    """Share of events beyond a threshold, of the events and of their combinations.

    Attributes:
        threshold: s.
        share: P(S > s) of the events.
        error: Its standard deviation.
        recombined: P(S > s) of the combinations.
        recombined_error: Its standard deviation, from bootstraps of the events: too small where
            hardly one of them is beyond.
    """

    threshold: float
    share: float
    error: float
    recombined: float
    recombined_error: float

    @property
    def effective_count(self) -> float:
        """Independent events that the combinations are worth at this threshold."""
        if not self.recombined_error > 0:
            return math.nan
        return self.recombined * (1 - self.recombined) / self.recombined_error**2


@dataclass(frozen=True, eq=False, repr=False)
class Recombination:
    """Result of `recombine`.

    Attributes:
        events: Combinations (M, D).
        independence: The test of what was assumed.
        gains: At each threshold.
        components: Columns of each component.
        count: Events N.
        possible: Combinations N^k.
    """

    events: Tensor
    independence: Independence
    gains: tuple[TailGain, ...]
    components: tuple[tuple[int, ...], ...]
    count: int
    possible: float

    def __str__(self) -> str:
        columns = ", ".join(str(list(g)) for g in self.components)
        lines = [
            f"{len(self.events)} of {self.possible:.4g} combinations of the components {columns} "
            f"of {self.count} events",
            "  kept: every correlation within a component; lost: every one between them",
        ]
        if self.gains:
            lines.append("      beyond      events   ± error  recombined   ± error  worth events")
        for g in self.gains:
            lines.append(
                f"  {g.threshold:10.4g}  {g.share:10.4g}  {g.error:8.2g}  {g.recombined:10.4g}  "
                f"{g.recombined_error:8.2g}  {g.effective_count:12.0f}"
            )
        return "\n".join([*lines, *str(self.independence).splitlines()])

    def __repr__(self) -> str:
        return (
            f"Recombination(events={len(self.events)}, of={self.count}, "
            f"p_value={self.independence.p_value:.3g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw what the combinations are worth at each threshold, in independent events."""
        from ..plots.generative import plot_recombination

        return plot_recombination(self, ax)
