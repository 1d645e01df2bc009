"""What coverage returns: numbers as fields, a table to read, plots."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Coverage", "LevelCoverage"]

_TABLE = (0.5, 0.68, 0.9, 0.95, 0.99)
CONSISTENT = "consistent with the nominal coverage"
_ALARM = 0.01
# events expected beyond a credibility, and σ of excess and lack, that tell the shape of coverage;
# the largest of all credibilities is often 2.5 σ by chance
_FEWEST, _CROSSING, _NOISE = 5, 4.0, 3.0


@dataclass(frozen=True, eq=False, repr=False)
class LevelCoverage:
    """Empirical against nominal coverage of credible levels, with tests of their uniformity.

    All tensors are float64 on the CPU. Events carry weights where `effective_count` differs from
    `count`; the band and the p-values are then those of that many unweighted events, which holds
    for large samples and weights that do not depend on the levels.

    Attributes:
        kind: What the levels are: "base χ²", "HPD", "TARP".
        count: Events N.
        effective_count: (Σw)²/Σw², equal to N without weights.
        nominal: Nominal credibilities (K,).
        empirical: Fraction of the events whose truth lies within them (K,).
        band: Exact binomial bands of the empirical coverage of a calibrated posterior at 1, 2 and
            3 σ, lower and upper end (3, 2, K).
        ks_statistic: Kolmogorov–Smirnov distance of the levels from uniform, to 1/B.
        ks_pvalue: Its exact p-value.
        ad_statistic: Anderson–Darling A² of the levels.
        ad_pvalue: Its p-value, for a fully specified distribution.
        cumulative: Fraction of the events below each of the edges k/B (B + 1,).
        nll: Mean −log q(z_true|x) in nats, or None where no log_prob was given.
        nll_error: Its standard error.
    """

    kind: str
    count: int
    effective_count: float
    nominal: Tensor
    empirical: Tensor
    band: Tensor
    ks_statistic: float
    ks_pvalue: float
    ad_statistic: float
    ad_pvalue: float
    cumulative: Tensor
    nll: float | None = None
    nll_error: float | None = None

    def coverage_at(self, level: float) -> float:
        """Return the empirical coverage at one nominal credibility in [0, 1].

        Raises:
            ValueError: If `level` is outside [0, 1].
        """
        if not 0 <= level <= 1:
            raise ValueError(
                f"Expected a credible level in [0, 1]; got {level}. 68 % is written 0.68."
            )
        return float(interpolate(self.cumulative, torch.tensor([level], dtype=torch.float64)))

    @property
    def mean_level(self) -> float:
        """Mean credible level: 1/2 if calibrated, more where regions are too small."""
        return float(1 - torch.trapezoid(self.cumulative) / (len(self.cumulative) - 1))

    @property
    def max_gap(self) -> float:
        """Largest |empirical − nominal| at the nominal levels."""
        return float((self.empirical - self.nominal).abs().max())

    @property
    def within_band(self) -> float:
        """Share of the nominal levels at which the empirical coverage lies in its 3σ band."""
        low, high = self.band[2]
        return float(((self.empirical >= low) & (self.empirical <= high)).double().mean())

    def verdict(self) -> str:
        """Return what the numbers say in one sentence.

        The alarm is raised at 1 % for the two tests together, 0.5 % for each.
        """
        if min(1.0, 2 * min(self.ks_pvalue, self.ad_pvalue)) >= _ALARM:
            return CONSISTENT
        if min(size for _, size in _extremes(self)) > _CROSSING:
            return _shape(self)
        excess = (self.mean_level - 0.5) * math.sqrt(12 * self.effective_count)
        if excess > 3:
            return "under-covers (too narrow or biased)"
        if excess < -3:
            return "over-covers (too wide)"
        return _shape(self)

    def _head(self) -> list[str]:
        events = f"{self.count} events"
        if not math.isclose(self.effective_count, self.count, rel_tol=1e-9):
            events += f" (effective {self.effective_count:.0f})"
        error = [math.sqrt(p * (1 - p) / self.effective_count) for p in _TABLE]
        return [
            f"{self.kind} coverage of {events}",
            "  nominal   " + "".join(f"{100 * p:9.1f} %" for p in _TABLE),
            "  empirical " + "".join(f"{100 * self.coverage_at(p):9.2f} %" for p in _TABLE),
            "  1σ        " + "".join(f"{100 * e:9.2f} %" for e in error),
            f"  KS  D  = {self.ks_statistic:.4f}, p = {self.ks_pvalue:.3g}",
            f"  AD  A² = {self.ad_statistic:.3f}, p = {self.ad_pvalue:.3g}",
        ]

    def _foot(self) -> list[str]:
        if self.nll is None:
            note = "no log_prob given: coverage alone says nothing about sharpness"
            return [f"  NLL not known ({note})", f"  => {self.verdict()}"]
        return [f"  NLL {self.nll:.4f} ± {self.nll_error:.4f} nats", f"  => {self.verdict()}"]

    def __str__(self) -> str:
        return "\n".join(self._head() + self._foot())

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(kind={self.kind!r}, count={self.count}, "
            f"ks_pvalue={self.ks_pvalue:.3g}, ad_pvalue={self.ad_pvalue:.3g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw empirical against nominal coverage with its band, residuals below."""
        from ..plots.coverage import plot_coverage

        return plot_coverage(self, ax=ax)


@dataclass(frozen=True, eq=False, repr=False)
class Coverage(LevelCoverage):
    """Base-ordered coverage: the credible level of an event is F_χ²_d(‖u‖²).

    Attributes:
        dof: d.
        names: What the base coordinates are called, d of them.
        pull_mean: Mean of each u_j (d,); 0 if calibrated.
        pull_width: Standard deviation of each u_j (d,); 1 if calibrated, more where too narrow.
        pull_ks_pvalue: Kolmogorov–Smirnov p-value of each u_j against N(0, 1), (d,).
        pull_edges: Edges of the pull histograms (81,), −4 to 4.
        pull_histogram: Fraction of the events in each of their bins (d, 80).
        correlation: Correlation matrix of u (d, d).
        chi2_mean: Mean of ‖u‖²/d; 1 if calibrated.
        binned: (low, high, Coverage) per bin of an event property; empty bins are left out.
    """

    dof: int = field(kw_only=True)
    names: tuple[str, ...] = field(kw_only=True)
    pull_mean: Tensor = field(kw_only=True)
    pull_width: Tensor = field(kw_only=True)
    pull_ks_pvalue: Tensor = field(kw_only=True)
    pull_edges: Tensor = field(kw_only=True)
    pull_histogram: Tensor = field(kw_only=True)
    correlation: Tensor = field(kw_only=True)
    chi2_mean: float = field(kw_only=True)
    binned: tuple[tuple[float, float, Coverage], ...] = field(kw_only=True, default=())

    def largest_correlation(self) -> tuple[int, int, float]:
        """Return (i, j, r) of the pair of base coordinates with the largest |r|, d ≥ 2.

        Raises:
            ValueError: If d = 1.
        """
        if self.dof < 2:
            raise ValueError("Expected at least two base coordinates; got d = 1.")
        flat = int(self.correlation.abs().triu(1).argmax())
        i, j = divmod(flat, self.dof)
        return i, j, float(self.correlation[i, j])

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; alarms are raised at 1 % per question."""
        found = [super().verdict()]
        root = math.sqrt(self.effective_count)
        for j, name in enumerate(self.names):
            mean, width = float(self.pull_mean[j]), float(self.pull_width[j])
            wrong = []
            if abs(mean) * root > 4:
                wrong.append(f"{name} is off by {mean:+.3f} σ")
            if abs(width - 1) * root * math.sqrt(2) > 5:
                wrong.append(f"{name} too {'narrow' if width > 1 else 'wide'} (width {width:.3f})")
            if not wrong and float(self.pull_ks_pvalue[j]) < _ALARM / self.dof:
                wrong.append(f"{name} is not normal (KS p = {float(self.pull_ks_pvalue[j]):.2g})")
            found += wrong
        if self.dof > 1:
            i, j, r = self.largest_correlation()
            if abs(r) * root > 5:
                found.append(f"{self.names[i]} and {self.names[j]} are correlated ({r:+.3f})")
        wrong_bins = [
            f"{low:.4g} to {high:.4g} {LevelCoverage.verdict(part).split(' (')[0]}"
            for low, high, part in self.binned
            if 2 * min(part.ks_pvalue, part.ad_pvalue) < _ALARM / len(self.binned)
        ]
        if wrong_bins:
            more = f" and {len(wrong_bins) - 2} more" if len(wrong_bins) > 2 else ""
            found.append("in bins: " + ", ".join(wrong_bins[:2]) + more)
        if len(found) > 1 and found[0].startswith("consistent"):
            found[0] += " in ‖u‖², but"
            return found[0] + " " + "; ".join(found[1:])
        return "; ".join(found)

    def _head(self) -> list[str]:
        lines = super()._head()
        lines[0] += f", d = {self.dof}"
        error = math.sqrt(2 / self.dof / self.effective_count)
        lines.append(f"  mean ‖u‖²/d = {self.chi2_mean:.4f} (calibrated: 1 ± {error:.4f})")
        pad = max(4, *(len(n) for n in self.names))
        lines.append(f"  pulls  {'':{pad}}     mean    width     KS p")
        for j, name in enumerate(self.names):
            lines.append(
                f"         {name:{pad}} {self.pull_mean[j]:+8.4f} {self.pull_width[j]:8.4f} "
                f"{self.pull_ks_pvalue[j]:8.3g}"
            )
        if self.dof > 1:
            i, j, r = self.largest_correlation()
            sigma = 1 / math.sqrt(self.effective_count)
            pair = f"{self.names[i]}, {self.names[j]}"
            lines.append(f"  largest correlation: {pair}: {r:+.4f} (1σ {sigma:.4f})")
        return lines

    def _foot(self) -> list[str]:
        if not self.binned:
            return super()._foot()
        lines = ["  in bins       low         high        N     68 %     90 %     KS p      NLL"]
        for low, high, part in self.binned:
            nll = "-" if part.nll is None else f"{part.nll:.3f}"
            held = "".join(f"{100 * part.coverage_at(p):9.2f}" for p in (0.68, 0.9))
            lines.append(
                f"      {low:11.4g}  {high:11.4g} {part.count:8d}{held} {part.ks_pvalue:8.3g}"
                f" {nll:>8}"
            )
        return lines + super()._foot()

    def plot_pulls(self, ax: Axes | None = None) -> Axes:
        """Draw the histogram of each u_j against N(0, 1); return the axes."""
        from ..plots.coverage import plot_pulls

        return plot_pulls(self, ax=ax)


def interpolate(cumulative: Tensor, at: Tensor) -> Tensor:
    # Linear in `cumulative` (..., B + 1) over equal bins of [0, 1], at the points `at` (K,).
    bins = cumulative.shape[-1] - 1
    place = at.to(cumulative) * bins
    left = place.long().clamp(0, bins - 1)
    part = place - left
    return cumulative[..., left] * (1 - part) + cumulative[..., left + 1] * part


def _extremes(result: LevelCoverage) -> tuple[tuple[float, float], tuple[float, float]]:
    """Credibility and size in σ of the largest excess of coverage, and of the largest lack."""
    bins = len(result.cumulative) - 1
    p = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    sigma = (p * (1 - p) / result.effective_count).sqrt()
    # where fewer events are expected beyond p, counts are far from normal
    inside = p * (1 - p) * result.effective_count >= _FEWEST
    gap = torch.where(inside, (result.cumulative - p) / sigma, 0.0)
    most, least = int(gap.argmax()), int(gap.argmin())
    return (float(p[most]), float(gap[most])), (float(p[least]), float(-gap[least]))


def _shape(result: LevelCoverage) -> str:
    (over, excess), (under, lack) = _extremes(result)
    if result.kind == "TARP":  # a too narrow posterior puts its levels at both ends
        return "too narrow" if over < under else "too wide"
    if min(excess, lack) < min(_NOISE, max(excess, lack) / 2):
        word, at = ("over", over) if excess > lack else ("under", under)
        return f"{word}-covers around {100 * at:.3g} % credibility"
    if over < under:
        return "over-covers at low and under-covers at high credibility (tails too light)"
    return "under-covers at low and over-covers at high credibility (tails too heavy)"
