"""What a comparison of tails returns: a line for each generator and threshold, and a report."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["TailReport", "TailRow"]

_ALARM = 0.01
# of the share: a truth that is less well known than this limits the comparison
_RELATIVE = 0.1


@dataclass(frozen=True)
class TailRow:
    """Share of events beyond a threshold, of one generator.

    Attributes:
        generator: Its name.
        threshold: s.
        share: P(S > s), the mean over training sets.
        error: Standard deviation of `share`, from bootstraps over training sets.
        spread: Standard deviation of the share of one training set.
        counting_error: What counting the generated events alone would give for `error`.
        true_share: The same of the truth.
        true_error: Its standard deviation; 0 where it is exact.
        p_value: P-value of the difference at this threshold alone, 1 where nothing can be said.
        p_adjusted: The same, corrected for the number of thresholds of the generator.
        judged: Whether at least ten true events are beyond the threshold.
    """

    generator: str
    threshold: float
    share: float
    error: float
    spread: float
    counting_error: float
    true_share: float
    true_error: float
    p_value: float
    p_adjusted: float
    judged: bool

    @property
    def ratio(self) -> float:
        """`share` in units of the true one."""
        return self.share / self.true_share if self.true_share > 0 else math.nan

    @property
    def ratio_error(self) -> float:
        """Error of `ratio` from generator and truth, in quadrature."""
        if not self.true_share > 0:
            return math.nan
        return math.hypot(self.error, self.ratio * self.true_error) / self.true_share

    @property
    def flag(self) -> str:
        """What is off: "none", "too few", "too many", "truth too small" or nothing, ""."""
        if not self.judged:
            return "truth too small"
        if self.p_adjusted > _ALARM:
            return ""
        if self.share == 0:
            return "none"
        return "too few" if self.share < self.true_share else "too many"


@dataclass(frozen=True, repr=False)
class TailReport:
    """Result of `tails` and `bootstrap_tails`.

    Attributes:
        table: One entry for each generator and threshold.
        true_count: True events; 0 where the truth is exact.
        exact: Whether it is.
        source: What was resampled for the errors.
        training_size: Events of a training set; None where they were not given.
    """

    table: tuple[TailRow, ...]
    true_count: int
    exact: bool
    source: str
    training_size: int | None

    def __getitem__(self, key: tuple[str, float]) -> TailRow:
        """Return the entry of (generator, threshold).

        Raises:
            KeyError: If there is none.
        """
        for row in self.table:
            if row.generator == key[0] and math.isclose(row.threshold, key[1], rel_tol=1e-6):
                return row
        raise KeyError(f"Expected one of {', '.join(self.generators)} at a threshold; got {key}.")

    @property
    def generators(self) -> tuple[str, ...]:
        """Names of the generators."""
        return tuple(dict.fromkeys(row.generator for row in self.table))

    @property
    def flagged(self) -> tuple[str, ...]:
        """Names of the generators whose tail is off, at p ≤ 0.01."""
        return tuple(dict.fromkeys(r.generator for r in self.table if r.judged and r.flag))

    def verdict(self) -> str:
        """Return what is off, a sentence for each generator, and where the truth is too small."""
        text = []
        for name in self.flagged:
            off = [r for r in self.table if r.generator == name and r.judged and r.flag]
            parts = [f"{r.flag} beyond {r.threshold:.4g}" for r in off]
            text.append(f"{name} is off: {'; '.join(parts)}")
        small = dict.fromkeys(r.threshold for r in self.table if not r.judged)
        if small:
            text.append(
                f"nothing can be said beyond {', '.join(f'{s:.4g}' for s in small)}: fewer than "
                "ten true events"
            )
        if self.training_size is None:
            text += [
                f"{r.generator} has no event beyond {r.threshold:.4g}: give training_size, the "
                "events of a training set, to know whether it must have some"
                for r in self.table
                if r.judged and r.share == 0
            ]
        limited = {
            r.threshold
            for r in self.table
            if r.judged and r.true_error > max(_RELATIVE * r.true_share, r.error)
        }
        if limited:
            text.append(
                f"limited by the number of true events beyond "
                f"{', '.join(f'{s:.4g}' for s in sorted(limited))}"
            )
        if not self.flagged and any(r.judged for r in self.table):
            text.insert(0, "no difference seen in the tails")
        return "\n  => ".join(text)

    def __str__(self) -> str:
        wide = max(10, *(len(r.generator) for r in self.table))
        lines = [
            f"Shares beyond thresholds, errors by bootstrap over {self.source}",
            "  truth exact" if self.exact else f"  truth of {self.true_count} events",
            f"  {'generator':{wide}}  {'beyond':>10} {'share':>10}  / truth  ± error  Poisson  "
            f"{'p':>8}  for all",
        ]
        for r in self.table:
            unit = r.true_share if r.true_share > 0 else math.nan
            # without any event there is no spread to go by
            error = f"{r.ratio_error:6.3f}" if r.share > 0 else "     -"
            counting = f"{r.counting_error / unit:7.3f}" if r.share > 0 else "      -"
            lines.append(
                f"  {r.generator:{wide}}  {r.threshold:10.4g} {r.share:10.4g}  {r.ratio:6.3f}  "
                f"{error}  {counting}  {_p(r.p_value, r.judged)}  "
                f"{_p(r.p_adjusted, r.judged)}  {r.flag}".rstrip()
            )
        lines.append(f"  => {self.verdict()}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"TailReport(generators={list(self.generators)}, flagged={list(self.flagged)})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the shares over those of the truth, with errors over training sets."""
        from ..plots.generative import plot_tails

        return plot_tails(self, ax)


def _p(value: float, judged: bool) -> str:
    return f"{value:9.3g}" if judged else "        -"
