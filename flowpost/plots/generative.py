"""Generative checks: statistics, correlations, tails, neighbours, pairings, residuals, areas."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flowpost.metrics.correlations import CorrelationTest
from flowpost.metrics.cross_table import CrossTable
from flowpost.metrics.downstream import DownstreamComparison
from flowpost.metrics.memorisation import MemorisationTest
from flowpost.metrics.recombination_result import Recombination
from flowpost.metrics.statistics_result import StatisticsTest
from flowpost.metrics.tails_result import TailReport
from flowpost.plots.coverage import _COLOURS, _GREYS, _MARKERS, _new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "plot_correlations",
    "plot_cross_table",
    "plot_downstream",
    "plot_memorisation",
    "plot_recombination",
    "plot_statistics",
    "plot_tails",
]

_LINE = "#444444"
_ALARM = 0.01
# of the colour map, in errors
_DARK = 3.5
# areas above it are dark
_PALE = 0.8
# of a picture of a matrix: more cells have no numbers in them
_NUMBERED = 8


def plot_statistics(result: StatisticsTest, ax: Axes | None = None) -> Axes:
    """Draw W1 of each statistic in units of the true spread; red where it differs at 1 %.

    The grey bars reach to what one labelling in 20 exceeds by chance. Statistics that are constant
    over true events are left out.

    Arguments:
        result: A comparison of held-out statistics.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes(6.5) if ax is None else ax
    rows = [row for row in result.table if row.spread > 0]
    at = np.arange(len(rows))
    ax.barh(at, [r.expected / r.spread for r in rows], color=_GREYS[1], label="chance, 95 %")
    for off, colour, label in ((False, _COLOURS[0], "p > 1 %"), (True, _COLOURS[1], "differs")):
        some = [k for k, r in enumerate(rows) if (r.p_adjusted <= _ALARM) == off]
        if some:
            ax.plot([rows[k].w1_scaled for k in some], some, "o", color=colour, label=label)
    ax.set(
        yticks=at,
        yticklabels=[f"{r.name} (p {r.p_adjusted:.2g})" for r in rows],
        xlabel="W1 / true spread",
        title=f"p = {result.p_value:.3g} for all",
    )
    ax.set_xlim(left=0)
    ax.invert_yaxis()
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")
    return ax


def plot_correlations(result: CorrelationTest, ax: Axes | None = None) -> Axes:
    """Draw the differences of the correlations, generated less true, over their errors.

    Up to eight statistics have the difference written in each cell.

    Arguments:
        result: A comparison of correlations.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    size = len(result.names)
    with np.errstate(invalid="ignore", divide="ignore"):
        pull = np.where(np.eye(size, dtype=bool), np.nan, result.difference / result.error)
    image = ax.imshow(pull, cmap="RdBu_r", vmin=-5, vmax=5)
    if size <= _NUMBERED:
        for j in range(size):
            for k in range(size):
                if j != k:
                    text = f"{result.difference[j, k]:+.2f}"
                    ink = "white" if abs(pull[j, k]) > _DARK else "black"
                    ax.text(k, j, text, ha="center", va="center", fontsize="small", color=ink)
    ticks = range(size)
    ax.set(xticks=ticks, yticks=ticks, yticklabels=result.names)
    ax.set_xticks(ticks, result.names, rotation=45, ha="right")
    ax.set_title(f"correlations, generated − true; p = {result.p_value:.3g}")
    ax.figure.colorbar(image, ax=ax, label="difference / error")
    return ax


def plot_tails(result: TailReport, ax: Axes | None = None) -> Axes:
    """Draw the shares beyond each threshold over those of the truth.

    The bars are errors over training sets, the band is that of the truth; open markers are flagged.

    Arguments:
        result: A comparison of tails.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes(6.5) if ax is None else ax
    names = result.generators
    first = [row for row in result.table if row.generator == names[0]]
    at = np.arange(len(first))
    error = np.array([r.true_error / r.true_share if r.true_share > 0 else np.nan for r in first])
    for k in at:
        ax.fill_between(
            [k - 0.4, k + 0.4],
            1 - error[k],
            1 + error[k],
            color=_GREYS[1],
            lw=0,
            label=None if k else "truth",
        )
    ax.axhline(1, color=_LINE, lw=0.8, ls="--")
    offsets = np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else [0.0]
    for i, (name, offset) in enumerate(zip(names, offsets, strict=True)):
        colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
        for j, row in enumerate(r for r in result.table if r.generator == name):
            if row.true_share > 0:
                ax.errorbar(
                    at[j] + offset,
                    row.ratio,
                    row.error / row.true_share,
                    fmt=marker,
                    color=colour,
                    mfc="white" if row.judged and row.flag else colour,
                    label=name if not j else None,
                )
    if any(row.judged and row.flag for row in result.table):
        ax.scatter([], [], facecolors="none", edgecolors=_LINE, label="open: differs")
    ax.set(
        xticks=at,
        xticklabels=[f"{r.threshold:.4g}" for r in first],
        xlabel="threshold",
        ylabel="share beyond / true share",
    )
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")
    return ax


def plot_memorisation(result: MemorisationTest, ax: Axes | None = None) -> Axes:
    """Draw the distribution functions of the distances to the nearest training event.

    Arguments:
        result: A test of memorisation.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    for k, (name, distance) in enumerate(
        (("generated", result.distance_generated), ("held-out", result.distance_held_out))
    ):
        ordered = distance.sort().values
        level = torch.arange(1, len(ordered) + 1, dtype=torch.float64) / len(ordered)
        ax.step(ordered.numpy(), level.numpy(), where="post", color=_COLOURS[k], label=name)
    ax.set(
        ylim=(0, 1),
        xlabel="distance to the nearest training event",
        ylabel="share of events",
        title=f"copies {100 * result.copies:.3g} %, p = {result.p_value:.3g}",
    )
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_recombination(result: Recombination, ax: Axes | None = None) -> Axes:
    """Draw how many independent events the combinations are worth at each threshold.

    The dashed line is the number of events; thresholds without a combination beyond have no bar.

    Arguments:
        result: A recombination with thresholds.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If it was made without thresholds.
    """
    if not result.gains:
        raise ValueError(
            "Expected a recombination with gains at thresholds; got none. Give recombine "
            "thresholds and a statistic."
        )
    ax = _new_axes() if ax is None else ax
    worth = [g.effective_count for g in result.gains]
    at = np.arange(len(worth))
    ax.bar(at, np.nan_to_num(worth), width=0.6, color=_COLOURS[0])
    for k, value in enumerate(worth):
        if np.isfinite(value):
            text = f"× {value / result.count:.2g}"
            ax.text(k, value, text, ha="center", va="bottom", fontsize="small")
    ax.axhline(result.count, color=_LINE, lw=0.8, ls="--", label=f"{result.count} events")
    ax.set(
        xticks=at,
        xticklabels=[f"{g.threshold:.4g}" for g in result.gains],
        xlabel="threshold",
        ylabel="combinations are worth events",
        title=f"independence p = {result.independence.p_value:.2g}",
    )
    ax.margins(y=0.12)
    ax.legend(frameon=False, fontsize="small")
    return ax


def plot_cross_table(result: CrossTable, ax: Axes | None = None) -> Axes:
    """Draw the four areas under the ROC curve with their errors, as a table of colours.

    Arguments:
        result: A cross table.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    image = ax.imshow(result.auc, cmap="Blues", vmin=0.5, vmax=1)
    for j in range(2):
        for k in range(2):
            text = f"{result.auc[j, k]:.3f}\n± {result.error[j, k]:.3f}"
            ink = "white" if result.auc[j, k] > _PALE else "black"
            ax.text(k, j, text, ha="center", va="center", color=ink)
    kinds = ["true", "generated"]
    ax.set(xticks=[0, 1], xticklabels=kinds, yticks=[0, 1], yticklabels=kinds)
    ax.set(xlabel="tested on", ylabel="trained on")
    p = "" if np.isnan(result.p_value) else f", p = {result.p_value:.2g}"
    ax.set_title(f"{result.classifier}: loss {result.loss:+.3f} ± {result.loss_error:.3f}{p}")
    ax.figure.colorbar(image, ax=ax, label="AUC of the two types")
    return ax


def plot_downstream(
    result: DownstreamComparison, ax: Axes | None = None, *, name: str | None = None, bins: int = 30
) -> Axes:
    """Draw the residuals of an estimate on true and on generated events, at equal areas.

    Arguments:
        result: A downstream comparison.
        ax: Where to draw; by default a new figure.
        name: Of the estimate; by default the first.
        bins: Number of bins; they hold the central 99 % of both kinds of events.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no estimate of that name.
    """
    name = result.names[0] if name is None else name
    if name not in result.names:
        raise ValueError(f"Expected name as one of {', '.join(result.names)}; got {name!r}.")
    ax = _new_axes() if ax is None else ax
    column = result.names.index(name)
    parts = [r[:, column] for r in (result.residual_true, result.residual_generated)]
    ends = torch.stack([_central(p) for p in parts])
    low, high = float(ends[:, 0].min()), float(ends[:, 1].max())
    edges = np.linspace(low, high if high > low else low + 1, bins + 1)
    weights = result.weight_true, result.weight_generated
    for k, (kind, part, weight) in enumerate(
        zip(("true", "generated"), parts, weights, strict=True)
    ):
        share = (weight / weight.sum()).numpy()
        counts = np.histogram(part.numpy(), edges, weights=share)[0] / np.diff(edges)
        ax.stairs(counts, edges, color=_COLOURS[k], label=kind)
    bias, width = (result[name, q] for q in ("bias", "resolution"))
    ax.set(
        xlabel=f"residual of {name}",
        ylabel="density",
        title=f"bias p = {bias.p_adjusted:.2g}, resolution p = {width.p_adjusted:.2g}",
    )
    ax.legend(frameon=False, fontsize="small")
    return ax


def _central(values: Tensor) -> Tensor:
    ordered = values.sort().values
    edge = len(ordered) // 200
    return torch.stack([ordered[edge], ordered[-1 - edge]])
