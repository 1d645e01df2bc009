"""What the report of systematics returns: numbers as fields, a table to read, a plot."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from ..diagnostics import LevelCoverage

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Point", "Price", "SystematicsReport"]

_ALARM = 3.0


@dataclass(frozen=True, eq=False)
class Point:
    """Events at one value of the nuisances, or averaged over their prior.

    Attributes:
        name: `"averaged"`, `"nominal"`, or the nuisance that was moved.
        sigmas: By how many σ it was moved; 0 at nominal, None where averaged.
        nu: The nuisances of all events (k,), or None where averaged.
        coverage: Coverage and NLL of the model.
        without: Those of the model trained without systematics, or None.
        nats: Mean NLL of the model minus that of the other on the same events, or None.
        nats_error: Its standard error.
        width: Geometric mean over events of the width of each label, central 68.27 % interval or
            opening angle, of shape (C,); at nominal and averaged.
        width_ratio: That of the width of the model over the width of the other (C,), or None.
    """

    name: str
    sigmas: float | None
    nu: Tensor | None
    coverage: LevelCoverage
    without: LevelCoverage | None = None
    nats: float | None = None
    nats_error: float | None = None
    width: Tensor | None = None
    width_ratio: Tensor | None = None

    @property
    def label(self) -> str:
        """Name and shift: `"light_yield −2σ"`."""
        if self.sigmas is None or not self.sigmas:
            return self.name
        return f"{self.name} {'+' if self.sigmas > 0 else '−'}{abs(self.sigmas):g}σ"

    def error(self, level: float) -> float:
        """Binomial standard error of the coverage of a calibrated posterior at a level."""
        return math.sqrt(level * (1 - level) / self.coverage.effective_count)

    def worst(self) -> float:
        """The deviation from the nominal coverage, with its sign, that is largest in size."""
        gap = self.coverage.empirical - self.coverage.nominal
        return float(gap[gap.abs().argmax()])

    def deviation(self, level: float) -> float:
        """Deviation of the coverage at a level, in binomial standard errors."""
        return (self.coverage.coverage_at(level) - level) / self.error(level)


@dataclass(frozen=True, eq=False)
class Price:
    """What the systematics cost, against the model that was trained without them.

    Attributes:
        nominal_nats: Mean NLL minus the other's where the nuisances are nominal: what is paid.
        nominal_error: Its standard error.
        averaged_nats: The same averaged over the prior: negative, what is gained.
        averaged_error: Its standard error.
        columns: What the widths are of.
        nominal_width: Width over the other's at nominal, (C,).
        averaged_width: The same averaged over the prior, (C,).
    """

    nominal_nats: float
    nominal_error: float
    averaged_nats: float
    averaged_error: float
    columns: tuple[str, ...]
    nominal_width: Tensor
    averaged_width: Tensor

    def __str__(self) -> str:
        def widths(ratio: Tensor) -> str:
            pairs = zip(self.columns, ratio.tolist(), strict=True)
            return ", ".join(f"{name} × {value:.3f}" for name, value in pairs)

        return "\n".join(
            [
                f"  price at nominal: {self.nominal_nats:+.4f} ± {self.nominal_error:.4f} nats; "
                f"width {widths(self.nominal_width)}",
                f"  over the prior:   {self.averaged_nats:+.4f} ± {self.averaged_error:.4f} nats; "
                f"width {widths(self.averaged_width)}",
            ]
        )


@dataclass(frozen=True, eq=False, repr=False)
class SystematicsReport:
    """Coverage where the nuisances are averaged over, nominal, and off by so many σ.

    Coverage is exact on average over the prior only: a model of marginalised systematics has to
    over-cover at nominal and to under-cover far from it.

    Attributes:
        names: The nuisances.
        levels: Credible levels of the table.
        points: Averaged, nominal, then each nuisance at each shift.
        columns: Names of the widths (C,): label columns, `"angle of …"` for directions.
        note: What to know of how it was measured, if anything.
    """

    names: tuple[str, ...]
    levels: tuple[float, ...]
    points: tuple[Point, ...]
    columns: tuple[str, ...]
    note: str = ""

    @property
    def averaged(self) -> Point:
        """Events of nuisances from the prior."""
        return self.points[0]

    @property
    def nominal(self) -> Point:
        """Events of nominal nuisances."""
        return self.points[1]

    def point(self, name: str, sigmas: float = 0.0) -> Point:
        """The point of a nuisance at a shift, or that named `"averaged"` or `"nominal"`.

        Raises:
            ValueError: If the report has no such point.
        """
        for point in self.points:
            if point.name == name and (point.sigmas is None or point.sigmas == sigmas):
                return point
        if name in self.names and sigmas == 0:
            return self.nominal
        known = ", ".join(p.label for p in self.points)
        raise ValueError(f"Expected one of {known}; got {name!r} at {sigmas:+g} σ.")

    @property
    def at_edge(self) -> tuple[str, ...]:
        """Nuisances whose nominal value is not between those of the negative and positive shifts.

        Shifts are quantiles of the prior, and the nominal value may lie at its edge.
        """
        found = []
        for i, name in enumerate(self.names):
            own = [self.nominal, *(p for p in self.points if p.name == name)]
            values = [float(p.nu[i]) for p in sorted(own, key=_shift) if p.nu is not None]
            if values != sorted(values):
                found.append(name)
        return tuple(found)

    def under_covered(self, significance: float = _ALARM) -> tuple[Point, ...]:
        """Points where the coverage at some level is too low by so many binomial errors."""
        return tuple(
            p for p in self.points if min(p.deviation(c) for c in self.levels) < -significance
        )

    @property
    def price(self) -> Price | None:
        """Nats and width against the model trained without systematics, if there is one."""
        here, all_ = self.nominal, self.averaged
        if here.nats is None or all_.nats is None:
            return None
        assert here.nats_error is not None
        assert all_.nats_error is not None
        assert here.width_ratio is not None
        assert all_.width_ratio is not None
        return Price(
            here.nats,
            here.nats_error,
            all_.nats,
            all_.nats_error,
            self.columns,
            here.width_ratio,
            all_.width_ratio,
        )

    def verdict(self) -> str:
        """What the numbers say, in one sentence for each question."""
        at = self.levels[0]
        found = []
        off = max((self.averaged.deviation(c) for c in self.levels), key=abs)
        if abs(off) > _ALARM:
            mean = f"{100 * self.averaged.coverage.coverage_at(at):.1f} % at {100 * at:.4g} %"
            found.append(
                f"MISCALIBRATED on average over the prior: {'over' if off > 0 else 'under'}-covers "
                f"({mean})"
            )
        else:
            found.append("covered on average over the prior")
        deviation = self.nominal.deviation(at)
        if abs(deviation) > _ALARM:
            found.append(
                f"{'over' if deviation > 0 else 'UNDER'}-covers at nominal "
                f"({100 * self.nominal.coverage.coverage_at(at):.1f} %)"
            )
        under = [p for p in self.under_covered() if p.name in self.names]
        if under:
            shown = [f"{p.label} ({100 * p.coverage.coverage_at(at):.1f} %)" for p in under]
            found.append("UNDER-COVERS at " + ", ".join(shown))
        return "; ".join(found)

    def _head(self) -> list[str]:
        first = self.averaged.coverage
        shown = [f"{100 * c:.4g} %" for c in self.levels]
        title = " " * 28 + "".join(f"{s:>13}{'':8}" for s in shown) + f"{'worst':>7}{'NLL':>10}"
        lines = [f"{first.kind} coverage under systematics, {first.count} events at each point"]
        if self.averaged.without is not None:
            lines.append(" " * len(title) + "  | trained without systematics")
            title += "  | " + "".join(f"{s:>8}" for s in shown) + f"{'ΔNLL':>10}"
        return [*lines, title]

    def _row(self, point: Point) -> str:
        value = ""
        if point.nu is not None and point.name in self.names:
            value = f"{float(point.nu[self.names.index(point.name)]):.4g}"
        row = f"  {point.label:<17} {value:>8}"
        for level in self.levels:
            held, deviation = 100 * point.coverage.coverage_at(level), point.deviation(level)
            flag = "UNDER" if deviation < -_ALARM else "over" if deviation > _ALARM else ""
            row += f"{held:8.2f} ± {100 * point.error(level):4.2f} {flag:<5}"
        row += f"{100 * point.worst():+7.2f}{point.coverage.nll or 0.0:10.4f}"
        if point.without is not None and point.nats is not None:
            shown = [f"{100 * point.without.coverage_at(c):8.2f}" for c in self.levels]
            row += "  | " + "".join(shown) + f"{point.nats:+10.4f}"
        return row

    def __str__(self) -> str:
        lines = [*self._head(), *(self._row(p) for p in self.points)]
        lines.append(f"  flags: {_ALARM:g} binomial errors; worst: largest deviation of any level")
        lines += [
            f"  {name}: nominal at the edge of its prior; ±σ are quantiles of the prior, not steps "
            "from there"
            for name in self.at_edge
        ]
        if self.note:
            lines.append(f"  {self.note}")
        if self.averaged.without is not None:
            lines.append("  ΔNLL: of the model minus of the one without, in nats: less is better")
        price = self.price
        return "\n".join([*lines, *([str(price)] if price else []), f"  => {self.verdict()}"])

    def __repr__(self) -> str:
        return (
            f"SystematicsReport({', '.join(self.names)}; {len(self.points)} points, "
            f"{len(self.under_covered())} under-covered)"
        )

    def plot(self, ax: Axes | None = None, level: float | None = None) -> Axes:
        """Draw the coverage against the shift of each nuisance; return the (first) axes."""
        from ..plots.systematics import plot_systematics

        return plot_systematics(self, ax=ax, level=level)


def _shift(point: Point) -> float:
    return point.sigmas or 0.0
