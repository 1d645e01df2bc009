"""What a comparison of held-out statistics returns: a line for each of them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["StatisticScore", "StatisticsTest"]

_ALARM = 0.01


@dataclass(frozen=True)
class StatisticScore:
    """How the distribution of one statistic of generated events differs from that of true ones.

    Attributes:
        name: Name of the statistic.
        w1: Wasserstein distance W1 in units of the statistic.
        spread: Standard deviation of the statistic over true events.
        expected: W1 that one labelling in 20 exceeds under the null.
        mean_true: Mean over true events.
        mean_generated: Mean over generated events.
        p_value: P-value of this statistic alone.
        p_adjusted: The same, corrected for there being others.
    """

    name: str
    w1: float
    spread: float
    expected: float
    mean_true: float
    mean_generated: float
    p_value: float
    p_adjusted: float

    @property
    def w1_scaled(self) -> float:
        """W1 in units of the true spread; NaN where the statistic is constant over true events."""
        return self.w1 / self.spread if self.spread > 0 else math.nan


@dataclass(frozen=True, repr=False)
class StatisticsTest:
    """Result of `held_out_statistics` and `leave_one_out`.

    Attributes:
        table: One entry a statistic.
        count: True and generated events (of the first training, if each statistic has its own).
        effective_count: (Σw)²/Σw² of their weights.
        null: "permutation" or "multiplier".
        permutations: Labellings B.
        correction: "largest statistic" or "Holm".
        left_out: Whether each statistic is judged by a training without it.
    """

    table: tuple[StatisticScore, ...]
    count: tuple[int, int]
    effective_count: tuple[float, float]
    null: str
    permutations: int
    correction: str
    left_out: bool

    @property
    def p_value(self) -> float:
        """P-value of all statistics: the smallest corrected one."""
        return min(row.p_adjusted for row in self.table)

    def __getitem__(self, name: str) -> StatisticScore:
        """Return the entry of a statistic.

        Raises:
            KeyError: If there is none.
        """
        for row in self.table:
            if row.name == name:
                return row
        raise KeyError(f"Expected one of {', '.join(r.name for r in self.table)}; got {name!r}.")

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 %."""
        off = [row.name for row in self.table if row.p_adjusted <= _ALARM]
        if not off:
            return f"no statistic differs at 1 % (p = {self.p_value:.3g} for all)"
        return f"{', '.join(off)} differ{'s' * (len(off) == 1)} (p = {self.p_value:.3g} for all)"

    def __str__(self) -> str:
        (n, m), (a, b) = self.count, self.effective_count
        lines = [f"Held-out statistics of {n} true and {m} generated events"]
        if not (math.isclose(a, n) and math.isclose(b, m)):
            lines.append(f"  effective by weights: {a:.0f} and {b:.0f}")
        if self.left_out:
            lines.append("  each is judged by a training that left it out")
        wide = max(9, *(len(row.name) for row in self.table))
        lines.append(
            f"  {'':{wide}}  true mean  generated         W1  W1/spread  chance 5 %        p   "
            "for all"
        )
        for row in self.table:
            chance = row.expected / row.spread if row.spread > 0 else math.nan
            lines.append(
                f"  {row.name:{wide}}  {row.mean_true:9.4g}  {row.mean_generated:9.4g}  "
                f"{row.w1:9.4g}  {row.w1_scaled:9.4f}  {chance:10.4f}  {row.p_value:7.3g}   "
                f"{row.p_adjusted:7.3g}"
            )
        lines.append(
            f"  p by {self.permutations} draws ({self.null}), for all corrected by "
            f"{'Holm' if self.correction == 'Holm' else 'the largest of them'}"
        )
        lines.append(f"  => {self.verdict()}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"StatisticsTest(statistics={len(self.table)}, p_value={self.p_value:.3g})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw W1 in units of the true spread, beside what chance makes of it."""
        from ..plots.generative import plot_statistics

        return plot_statistics(self, ax)
