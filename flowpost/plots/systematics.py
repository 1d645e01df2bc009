"""Coverage against the shift of each nuisance. matplotlib is imported when something is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowpost.systematics.results import Point, SystematicsReport

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_systematics"]

# Okabe and Ito's colours, told apart by colour-blind readers; the markers help in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
_MARKERS = "osD^vP*X"


def plot_systematics(
    report: SystematicsReport, ax: Axes | None = None, *, level: float | None = None
) -> Axes:
    """Draw how coverage depends on the shift of each nuisance, and what it is on average.

    Full symbols are the model, open ones the model trained without systematics; the bars are
    binomial errors, and the grey band those of a calibrated posterior at 3 σ. Shifts are quantiles
    of the prior: where the nominal value lies at its edge, no line goes through the nominal point,
    and the legend says so.

    Arguments:
        report: What `systematics.report` returned.
        ax: Where to draw one level; by default a new figure with a panel for each.
        level: A level of the report, the first by default; or all of them where `ax` is None.

    Returns:
        The axes; the first of several.

    Raises:
        ValueError: If the report has no such level.
    """
    if level is not None and level not in report.levels:
        known = ", ".join(f"{c:g}" for c in report.levels)
        raise ValueError(f"Expected one of the levels {known}; got {level!r}.")
    if ax is not None:
        _panel(report, ax, report.levels[0] if level is None else level)
        ax.legend(frameon=False, fontsize="small")
        return ax
    import matplotlib.pyplot as plt

    levels = report.levels if level is None else (level,)
    figure, panels = plt.subplots(
        1, len(levels), figsize=(4.4 * len(levels), 4.4), layout="constrained", squeeze=False
    )
    for panel, one in zip(panels[0], levels, strict=True):
        _panel(report, panel, one)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=3, frameon=False, fontsize="small"
    )
    return panels[0, 0]


def _panel(report: SystematicsReport, ax: Any, level: float) -> None:
    shifts = sorted({p.sigmas for p in report.points if p.sigmas is not None})
    # the average has a place of its own on the right
    end = (shifts[-1] if shifts else 0.0) + 1.0
    band = 300 * report.averaged.error(level)
    ax.axhspan(100 * level - band, 100 * level + band, color="#E3E3E3", lw=0, zorder=0)
    ax.axhline(100 * level, color="#444444", lw=0.8, ls="--", zorder=1)
    other = report.averaged.without is not None
    for k, name in enumerate(report.names):
        colour, marker = _COLOURS[k % len(_COLOURS)], _MARKERS[k % len(_MARKERS)]
        style = {"color": colour, "marker": marker, "ms": 5, "capsize": 2}
        # beside each other where they share a shift
        aside = 0.06 * (k - (len(report.names) - 1) / 2)
        edge = " (nominal at the edge of its prior)" if name in report.at_edge else ""
        for n, own in enumerate(_curves(report, name)):
            x = [(p.sigmas or 0.0) + aside for p in own]
            y = [100 * p.coverage.coverage_at(level) for p in own]
            bars = [_error(p, level, without=False) for p in own]
            ax.errorbar(x, y, bars, lw=1.4, label=None if n else f"{name}{edge}", **style)
            if other:
                y = [_held(p, level) for p in own]
                bars = [_error(p, level, without=True) for p in own]
                label = None if k or n else "trained without systematics"
                ax.errorbar(x, y, bars, lw=0.8, ls=":", mfc="white", label=label, **style)
    mean = report.averaged
    style = {"color": "#000000", "marker": "*", "ms": 9, "capsize": 2, "ls": ""}
    y = [100 * mean.coverage.coverage_at(level)]
    ax.errorbar([end], y, [_error(mean, level, False)], label="averaged over the prior", **style)
    if other:
        bars = [_error(mean, level, without=True)]
        ax.errorbar([end], [_held(mean, level)], bars, mfc="white", **style)
    ax.axvline(end - 0.5, color="#BBBBBB", lw=0.8)
    ax.set_xticks([*shifts, end], [*(_signed(s) for s in shifts), "prior"])
    ax.set(
        xlabel="shift of the nuisance [σ]"
        + ("; ±σ are quantiles of the prior" if report.at_edge else ""),
        ylabel="coverage [%]",
        title=f"{report.averaged.coverage.kind} regions of {100 * level:.4g} %",
    )
    ax.title.set_fontsize("medium")


def _curves(report: SystematicsReport, name: str) -> list[list[Point]]:
    """Points of a nuisance that a line may join, by rising shift.

    The nominal point stands alone, between two lines, where its value is not between those of its
    neighbours, as at the edge of a prior.
    """
    moved = sorted((p for p in report.points if p.name == name), key=lambda p: p.sigmas or 0.0)
    low = [p for p in moved if (p.sigmas or 0.0) < 0]
    high = [p for p in moved if (p.sigmas or 0.0) > 0]
    if name not in report.at_edge:
        return [[*low, report.nominal, *high]]
    return [part for part in (low, [report.nominal], high) if part]


def _signed(shift: float) -> str:
    return f"{shift:+g}".replace("-", "\N{MINUS SIGN}") if shift else "0"


def _held(point: Point, level: float) -> float:
    assert point.without is not None
    return 100 * point.without.coverage_at(level)


def _error(point: Point, level: float, without: bool) -> float:
    """Binomial error in per cent of the coverage as it was found."""
    found = _held(point, level) / 100 if without else point.coverage.coverage_at(level)
    return 100 * (found * (1 - found) / point.coverage.effective_count) ** 0.5
