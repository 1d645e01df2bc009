"""Coverage curves, pulls and rank histograms. matplotlib is imported when something is drawn."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowpost.diagnostics.nulls import binomial_interval
from flowpost.diagnostics.results import Coverage, LevelCoverage
from flowpost.diagnostics.sbc import SBC

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_coverage", "plot_pulls", "plot_ranks"]

# Okabe and Ito's colours, told apart by colour-blind readers; the markers help in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C564B")
_MARKERS = "osD^vP*X"
_GREYS = ("#BDBDBD", "#D6D6D6", "#EBEBEB")
_MOST = len(_COLOURS)


def plot_coverage(
    results: LevelCoverage | Mapping[str, LevelCoverage],
    ax: Axes | None = None,
    *,
    residual: bool = True,
) -> Axes:
    """Draw empirical coverage against nominal credibility, with the residuals below.

    The bands are the exact binomial ones at 1, 2 and 3 σ of a calibrated posterior, for the
    smallest number of events among the results.

    Arguments:
        results: One coverage, or several by label (at most 8).
        ax: Where to draw; by default a new figure. The residuals take a strip below it.
        residual: Whether to draw the residuals.

    Returns:
        The axes of the curve; those of the residuals are the next ones of its figure.

    Raises:
        ValueError: If there is none, or more than 8.
    """
    named = {"": results} if isinstance(results, LevelCoverage) else dict(results)
    if not 1 <= len(named) <= _MOST:
        raise ValueError(f"Expected 1 to {_MOST} coverages in one plot; got {len(named)}.")
    curve, below = _panels(ax, residual)
    fewest = min(r.effective_count for r in named.values())
    grid = torch.linspace(0.001, 0.999, 400, dtype=torch.float64)
    band = binomial_interval(grid, fewest)
    shades = []
    for panel, offset, unit in ((below, grid, 100.0), (curve, 0.0, 1.0)):
        if panel is None:
            continue
        edges = ((band - offset) * unit).numpy()
        shades = [
            panel.fill_between(grid.numpy(), *edges[k], color=_GREYS[k], lw=0, zorder=1 - 0.1 * k)
            for k in range(3)
        ]
    curve.plot([0, 1], [0, 1], color="#444444", lw=0.8, ls="--")
    if below is not None:
        below.axhline(0, color="#444444", lw=0.8, ls="--")
    handles = []
    for k, (label, result) in enumerate(named.items()):
        style = {"color": _COLOURS[k], "marker": _MARKERS[k], "ms": 4, "lw": 1.4, "mew": 0}
        x = result.nominal.numpy()
        text = f"{label or result.kind} (KS p {_pvalue(result.ks_pvalue)})"
        handles += curve.plot(x, result.empirical.numpy(), label=text, **style)
        if below is not None:
            below.plot(x, 100 * (result.empirical - result.nominal).numpy(), **style)
    gaps = torch.cat([r.empirical - r.nominal for r in named.values()])
    over = float(gaps.max()) > -float(gaps.min())  # the legend goes to the empty corner
    curve.set(xlim=(0, 1), ylim=(0, 1), ylabel="empirical coverage")
    curve.legend(
        [*handles, tuple(shades)],
        [*(h.get_label() for h in handles), f"1, 2, 3 σ ({_thousands(fewest)} events)"],
        handler_map={tuple: _tuple_handler()},
        loc="lower right" if over else "upper left",
        frameon=False,
        fontsize="small",
    )
    if below is None:
        curve.set_xlabel("nominal credibility")
        return curve
    below.set(xlabel="nominal credibility", ylabel="difference [%]")
    curve.tick_params(labelbottom=False)
    curve.figure.align_ylabels([curve, below])
    _limits(below, 100 * gaps, fewest)
    return curve


def plot_pulls(result: Coverage, ax: Axes | None = None) -> Axes:
    """Draw the distribution of each base coordinate u_j against N(0, 1).

    The grey band is the 2 σ statistical range of a calibrated posterior. Of more than 8
    coordinates the 8 of the smallest Kolmogorov–Smirnov p-values are drawn.

    Arguments:
        result: What `coverage` returned.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    merge = 2 if result.effective_count > 5000 else 4
    edges = result.pull_edges[::merge]
    centre = ((edges[1:] + edges[:-1]) / 2).numpy()
    width = float(edges[1] - edges[0])
    expected = torch.special.ndtr(edges).diff()
    error = (expected * (1 - expected) / result.effective_count).sqrt()
    low, high = (expected - 2 * error).clamp(min=0) / width, (expected + 2 * error) / width
    ax.fill_between(
        centre, low.numpy(), high.numpy(), color=_GREYS[1], lw=0, step="mid", label="N(0, 1) ± 2 σ"
    )
    fine = torch.linspace(-4, 4, 200, dtype=torch.float64)
    normal = torch.exp(-fine.square() / 2) / (2 * torch.pi) ** 0.5
    ax.plot(fine.numpy(), normal.numpy(), color="#444444", lw=1, ls="--")
    shown = result.pull_ks_pvalue.argsort(stable=True)[:_MOST].sort().values.tolist()
    pad = max(len(name) for name in result.names)
    for k, j in enumerate(shown):
        density = result.pull_histogram[j].reshape(-1, merge).sum(-1) / width
        mean, spread = float(result.pull_mean[j]), float(result.pull_width[j])
        label = f"{result.names[j]:<{pad}}  mean {mean:+.3f}, width {spread:.3f}"
        ax.step(centre, density.numpy(), where="mid", color=_COLOURS[k], lw=1.3, label=label)
    more = result.dof - len(shown)
    title = f"{len(shown)} of {result.dof}, worst by KS" if more else None
    # room for one line of the legend per coordinate above the curves
    ax.set(xlim=(-4, 4), xlabel="base coordinate u", ylabel="density")
    top = max(
        0.42, float(result.pull_histogram.reshape(result.dof, -1, merge).sum(-1).max()) / width
    )
    ax.set_ylim(0, top * (1.15 + 0.09 * (len(shown) + 1 + bool(more))))
    ax.legend(loc="upper left", frameon=False, fontsize="small", title=title)
    return ax


def plot_ranks(result: SBC, ax: Axes | None = None, *, bins: int = 20) -> Axes:
    """Draw the rank of the true label among the draws, per label column.

    The grey band is the exact 2 σ binomial range of a calibrated posterior.

    Arguments:
        result: What `sbc` returned.
        ax: Where to draw; by default a new figure.
        bins: Groups of neighbouring ranks.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    ranks, count = result.ranks.cpu(), len(result.ranks)
    bins = min(bins, result.draws + 1)
    every = torch.arange(result.draws + 1)
    share = torch.bincount(every * bins // (result.draws + 1)).double() / (result.draws + 1)
    edges = torch.cat([share.new_zeros(1), share.cumsum(0)])
    low, high = binomial_interval(share, count, (2.0,))[0] / share
    ax.fill_between(
        edges.numpy(), *_closed(low, high), color=_GREYS[1], lw=0, step="post", label="2 σ"
    )
    ax.axhline(1, color="#444444", lw=1, ls="--")
    shown = result.ks_pvalue.argsort(stable=True)[:_MOST].sort().values.tolist()
    for k, j in enumerate(shown):
        groups = torch.bincount(ranks[:, j] * bins // (result.draws + 1), minlength=bins)
        height = groups.double() / count / share
        label = f"{result.names[j]} (KS p {_pvalue(float(result.ks_pvalue[j]))})"
        steps = ax.stairs(height.numpy(), edges.numpy(), baseline=None, label=label)
        steps.set(edgecolor=_COLOURS[k], linewidth=1.3)
    bottom, top = ax.get_ylim()
    ax.set(xlim=(0, 1), xlabel="rank of the truth / draws", ylabel="events / expected")
    ax.set_ylim(max(bottom, 0), top + 0.1 * (len(shown) + 1) * (top - max(bottom, 0)))
    more = len(result.names) - len(shown)
    title = f"{len(shown)} of {len(result.names)}, worst by KS" if more else None
    ax.legend(loc="upper left", frameon=False, fontsize="small", title=title)
    return ax


def _new_axes(width: float = 5) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=(width, 4), layout="constrained")[1]


def _panels(ax: Axes | None, residual: bool) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt

    if not residual:
        return (_new_axes() if ax is None else ax), None
    if ax is None:
        _, (top, bottom) = plt.subplots(
            2, 1, sharex=True, figsize=(5, 5.6), layout="constrained", height_ratios=(3, 1)
        )
        return top, bottom
    place = ax.get_subplotspec()
    if place is None:  # axes put down by hand
        return ax, ax.inset_axes((0, -0.42, 1, 0.38), sharex=ax)
    grid = place.subgridspec(2, 1, height_ratios=(2.6, 1))
    ax.set_subplotspec(grid[0])
    return ax, ax.figure.add_subplot(grid[1], sharex=ax)


def _tuple_handler() -> Any:
    from matplotlib.legend_handler import HandlerTuple

    return HandlerTuple(ndivide=None, pad=0)


def _limits(ax: Any, gaps: Tensor, count: float) -> None:
    band = 100 * 3 * (0.25 / count) ** 0.5
    low, high = min(-band, float(gaps.min())), max(band, float(gaps.max()))
    ax.set_ylim(low - 0.1 * (high - low), high + 0.1 * (high - low))


def _pvalue(value: float) -> str:
    return "< 1e-6" if value < 1e-6 else f"= {value:.2g}"


def _thousands(value: float) -> str:
    return f"{value:,.0f}".replace(",", "\u2009")


def _closed(low: Tensor, high: Tensor) -> tuple[Any, Any]:
    # A step "post" needs its last value twice.
    return torch.cat([low, low[-1:]]).numpy(), torch.cat([high, high[-1:]]).numpy()
