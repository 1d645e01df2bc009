"""Templates, profiles, pulls and impacts of binned fits. matplotlib is imported when it draws."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowpost._checks import as_tensor, check_shape
from flowpost.inferno.profile import FitResult, Impacts, Scan
from flowpost.inferno.templates import Templates
from flowpost.plots.coverage import _COLOURS, _GREYS, _closed, _new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_impacts", "plot_nuisances", "plot_scan", "plot_templates"]

_MOST = 4  # panels of nuisances
_ROW = 0.32  # height in inches of a line of names
_UP, _DOWN = "#D55E00", "#0072B2"
# of processes: told apart from each other and from the lines of variations
_FILLS = ("#56B4E9", "#F0E442", "#009E73", "#CC79A7", "#999999", "#E69F00")
_SIGNAL = "#D55E00"


def plot_templates(
    templates: Templates,
    ax: Axes | None = None,
    *,
    data: Any = None,
    nuisances: Sequence[str] | None = None,
    ordered: bool = True,
    log: bool = True,
) -> Axes:
    """Draw the expected counts of all processes, stacked, and below how nuisances change the total.

    Arguments:
        templates: What is drawn.
        ax: Where to draw; by default a new figure. The nuisances take strips below it.
        data: Counts (K,) to draw as points, in the order of the templates.
        nuisances: Which nuisances to draw; by default the four of the largest effect. None of them
            for an empty list.
        ordered: Order the bins by rising signal over background.
        log: Draw counts on a logarithmic axis.

    Returns:
        The axes of the counts; those of the nuisances are the next ones of its figure.

    Raises:
        ValueError: If there is no such nuisance, or data have another shape.
    """
    order = templates.order if ordered else torch.arange(templates.bins)
    changes = _changes(templates, nuisances)
    top, strips = _strips(ax, len(changes))
    edges = torch.arange(templates.bins + 1) - 0.5
    highest = _stack(top, templates, order, edges)
    if data is not None:
        counts = as_tensor(data, "data").detach().double().cpu()
        check_shape(counts, (templates.bins,), "data", "One count a bin.")
        points = counts[order].numpy()
        style = {"color": "black", "ls": "", "marker": "o", "ms": 4, "label": "data"}
        top.errorbar(torch.arange(templates.bins).numpy(), points, points**0.5, **style)
    for strip, (name, sides) in zip(strips, changes.items(), strict=True):
        _strip(strip, name, sides[:, order], edges)
    rows = -(-len(top.get_legend_handles_labels()[0]) // 3)
    # room for the legend above the counts
    room, most = 0.13 * rows + 0.08, float(highest.max())
    # so low that what lies under the signal shows, unless it is next to nothing
    below = (templates.total - templates.signal)[order]
    low = torch.maximum(below, 0.01 * highest)
    bottom = 0.3 * float(low[highest > 0].min()) if log else 0.0
    top.set(xlim=(-0.5, templates.bins - 0.5), ylabel="expected counts")
    top.set_yscale("log" if log else "linear")
    top.set_ylim(bottom, most * (most / bottom) ** room if log else most * (1 + room))
    top.legend(loc="upper left", frameon=False, fontsize="small", ncols=3)
    last = [top, *strips][-1]
    last.set_xlabel("bin, by rising signal over background" if ordered else "bin")
    last.xaxis.get_major_locator().set_params(integer=True)
    for panel in [top, *strips][:-1]:
        panel.tick_params(labelbottom=False)
    top.figure.align_ylabels([top, *strips])
    return top


def _stack(ax: Any, templates: Templates, order: Tensor, edges: Tensor) -> Tensor:
    """Draw the processes on each other, signals on top; return the total (K,) in its order."""
    below = torch.zeros(templates.bins, dtype=torch.float64)
    processes = sorted(templates.model.processes, key=lambda p: p.signal)
    fills = iter(_FILLS * len(processes))
    for process in processes:
        above = below + templates.counts[process.name][order]
        colour = _SIGNAL if process.signal else next(fills)
        style = {"step": "post", "lw": 0, "alpha": 0.85, "label": process.name}
        ax.fill_between(edges.numpy(), *_closed(below, above), color=colour, **style)
        below = above
    ax.stairs(below.numpy(), edges.numpy(), color="#333333", lw=1, baseline=None)
    if templates.variances is not None:
        error = (templates.errors * templates.total)[order]
        ends = _closed(below - error, below + error)
        style = {"step": "post", "lw": 0, "hatch": "////", "facecolor": "none"}
        label = "simulation ± 1 σ"
        ax.fill_between(edges.numpy(), *ends, edgecolor="#555555", label=label, **style)
    return below


def _changes(templates: Templates, names: Sequence[str] | None) -> dict[str, Tensor]:
    """Per cent of the total (2, K) by which nuisances change it, down and up."""
    total = templates.total
    found = {}
    for nuisance in templates.model.nuisances if names is None else map(templates.nuisance, names):
        shift = (templates.shifts or {}).get(nuisance.name, nuisance.shift or 0.0)
        at = [float(nuisance.nominal or 0.0) + side * shift for side in (-1, 1)]
        values = torch.stack([templates.point({nuisance.name: v}) for v in at])
        ratio = templates.expected(values) / torch.where(total > 0, total, 1.0)
        found[f"{nuisance.name} ± {shift:.3g}"] = 100 * torch.where(total > 0, ratio - 1, 0.0)
    if names is not None:
        return found
    largest = sorted(found, key=lambda n: -float(found[n].abs().max()))[:_MOST]
    return {n: v for n, v in found.items() if n in largest}


def _strips(ax: Axes | None, count: int) -> tuple[Any, list[Any]]:
    import matplotlib.pyplot as plt

    ratios = (3.2, *[1.0] * count)
    if ax is None:
        figure = plt.figure(figsize=(6, 3.4 + 1.0 * count), layout="constrained")
        grid = figure.add_gridspec(count + 1, 1, height_ratios=ratios)
        top = figure.add_subplot(grid[0])
    elif not count:
        return ax, []
    else:
        place, figure, top = ax.get_subplotspec(), ax.figure, ax
        if place is None:  # axes put down by hand
            boxes = [(0, -0.05 - 0.3 * (k + 1), 1, 0.25) for k in range(count)]
            return ax, [ax.inset_axes(box, sharex=ax) for box in boxes]
        grid = place.subgridspec(count + 1, 1, height_ratios=ratios)
        ax.set_subplotspec(grid[0])
    return top, [figure.add_subplot(grid[k + 1], sharex=top) for k in range(count)]


def _strip(ax: Any, name: str, sides: Tensor, edges: Tensor) -> None:
    ax.axhline(0, color="#444444", lw=0.8)
    for values, colour, label, dash in (
        (sides[0], _DOWN, "down", "--"),
        (sides[1], _UP, "up", "-"),
    ):
        ax.stairs(
            values.numpy(), edges.numpy(), color=colour, lw=1.4, ls=dash, label=label, baseline=None
        )
    reach = max(1e-3, 1.2 * float(sides.abs().max()))
    ax.set(ylim=(-reach, 1.7 * reach), ylabel="change [%]")
    ax.text(0.01, 0.93, name, transform=ax.transAxes, va="top", fontsize="small")
    ax.legend(loc="upper right", frameon=False, fontsize="small", ncols=2, borderaxespad=0.2)


def plot_scan(scan: Scan, ax: Axes | None = None) -> Axes:
    """Draw 2Δnll along a parameter, the parabola of the Hessian, and the half widths at 1.

    Arguments:
        scan: What `Templates.profile` returned.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    good = torch.isfinite(scan.curve)
    x, y = scan.values[good], scan.curve[good]
    best, width = scan.best, scan.width
    ax.plot(x.numpy(), y.numpy(), color=_COLOURS[0], lw=1.6, label="profile")
    line = torch.linspace(float(x.min()), float(x.max()), 201, dtype=torch.float64)
    parabola = ((line - best) / width).square()
    label = f"parabola of the Hessian, ± {width:.4g}"
    ax.plot(line.numpy(), parabola.numpy(), color="#777777", lw=1, ls="--", label=label)
    for level in (1, 4):
        ax.axhline(level, color=_GREYS[0], lw=0.8, zorder=0)
    ax.axvspan(scan.low, scan.high, color=_GREYS[2], lw=0, zorder=-1)
    for end in (scan.low, best, scan.high):
        ax.axvline(end, color="#444444", lw=0.8, ls=":")
    top = max(float(y.max()), 1.5)
    ax.set(xlim=(float(x.min()), float(x.max())), xlabel=scan.parameter, ylabel="2 Δnll")
    ax.set_ylim(0, 1.3 * top)
    low, high = best - scan.low, scan.high - best
    title = f"{scan.parameter} = {best:.4g}  +{high:.3g}  \N{MINUS SIGN}{low:.3g}"
    title += f"  (half width {scan.half_width:.4g})"
    style = {"facecolor": "white", "edgecolor": "none", "framealpha": 1}
    ax.legend(loc="upper center", fontsize="small", title=title, **style)
    return ax


def plot_nuisances(fit: FitResult, ax: Axes | None = None) -> Axes:
    """Draw how far the fit pulled each constrained nuisance, and how much it constrained it.

    Points are pulls, in standard deviations of the constraint, bars the uncertainty after the fit
    over that of the constraint. The bands are 1 and 2 standard deviations.

    Arguments:
        fit: What `Templates.fit` returned.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.

    Raises:
        ValueError: If no nuisance is constrained.
    """
    names = list(fit.constraints)
    if not names:
        raise ValueError(
            "Expected a constrained nuisance; got none. Values of free ones are in print(fit)."
        )
    ax = _rows(names) if ax is None else ax
    for width, colour in ((2, _GREYS[2]), (1, _GREYS[1])):
        ax.axvspan(-width, width, color=colour, lw=0, zorder=-width)
    ax.axvline(0, color="#444444", lw=0.8, ls="--")
    pulls = [fit.pulls[n] for n in names]
    bars = [fit.constraints[n] for n in names]
    place = list(range(len(names)))
    ax.errorbar(pulls, place, xerr=bars, color="black", marker="o", ms=5, ls="", capsize=3)
    reach = max(2.3, *(abs(p) + b + 0.2 for p, b in zip(pulls, bars, strict=True)))
    ax.set(xlim=(-reach, reach), xlabel="(value − nominal) / width of the constraint")
    _name_rows(ax, names)
    return ax


def plot_impacts(impacts: Impacts, ax: Axes | None = None, *, most: int = 20) -> Axes:
    """Draw what each nuisance does to the parameter of interest, the largest on top.

    Arguments:
        impacts: What `Templates.impacts` returned.
        ax: Where to draw; by default a new figure.
        most: Nuisances that are drawn.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no nuisance.
    """
    if not impacts.names:
        raise ValueError("Expected impacts of at least one nuisance; got none.")
    order = impacts.order[:most]
    names = [impacts.names[j] for j in order]
    ax = _rows(names) if ax is None else ax
    place = list(range(len(order)))
    for values, colour, label, height in (
        (impacts.down, _DOWN, "nuisance \N{MINUS SIGN}1 σ", 0.7),
        (impacts.up, _UP, "nuisance +1 σ", 0.35),
    ):
        ax.barh(place, values[order].tolist(), height, color=colour, lw=0, label=label)
    ax.axvline(0, color="#444444", lw=0.8)
    reach = 1.15 * float(torch.cat([impacts.down, impacts.up]).abs().max())
    poi = impacts.fit.names[0]
    ax.set(
        xlim=(-reach, reach), xlabel=f"change of {poi} (its uncertainty: {impacts.fit.width:.4g})"
    )
    _name_rows(ax, names)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, 1), frameon=False, fontsize="small", ncols=2)
    return ax


def _rows(names: Sequence[str]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(5, 1.3 + _ROW * len(names)), layout="constrained")[1]


def _name_rows(ax: Any, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.tick_params(axis="y", length=0)
