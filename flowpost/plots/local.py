"""Coverage in the regions where a posterior may fail."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from flowpost.diagnostics.local_result import LocalCoverage
from flowpost.plots.coverage import _COLOURS, _MARKERS, _new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_local_coverage"]

_LEVELS = (0.5, 0.68, 0.9)


def plot_local_coverage(result: LocalCoverage, ax: Axes | None = None) -> Axes:
    """Draw how often the base-ordered regions hold the truth, region by region of the context.

    The worst region is at the top. Bars are binomial standard errors of a calibrated posterior;
    dashed lines are the nominal credibilities. p-values hold for all regions together.

    Arguments:
        result: What `local_coverage` returned.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    rows = range(len(result.regions))
    for k, level in enumerate(_LEVELS):
        ax.axvline(level, color=_COLOURS[k], lw=0.8, ls="--")
        errors = [math.sqrt(level * (1 - level) / r.count) for r in result.regions]
        held = [r.coverage.coverage_at(level) for r in result.regions]
        label = f"{100 * level:.0f} %"
        ax.errorbar(
            held,
            list(rows),
            xerr=errors,
            label=label,
            color=_COLOURS[k],
            marker=_MARKERS[k],
            ms=5,
            ls="none",
        )
    ax.set_yticks(
        list(rows),
        [f"{r.name}\n{r.count} events, {_pvalue(r.p_value)}" for r in result.regions],
        fontsize="small",
    )
    ax.set(
        xlim=(0, 1),
        ylim=(len(result.regions) - 0.5, -0.5),
        xlabel="empirical coverage (nominal: dashed)",
    )
    ax.set_title(f"all contexts: {_pvalue(result.p_value)}", fontsize="medium")
    ax.legend(
        loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=3, frameon=False, fontsize="small"
    )
    return ax


def _pvalue(p: float) -> str:
    return f"p = {p:.2g}"
