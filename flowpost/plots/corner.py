"""Corner plots: one event's posterior, label by label and pair by pair."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from flowpost._checks import as_tensor, check_finite, check_positive_int
from flowpost.plots.coverage import _COLOURS
from flowpost.plots.regions import FEWEST, check_levels, draws_region
from flowpost.plots.tangent import middles, offsets
from flowpost.spaces import Circle

if TYPE_CHECKING:
    from flowpost.posterior import Posterior
    from flowpost.spaces import Space

__all__ = ["event_draws", "plot_corner"]

_DARK = "#222222"


def plot_corner(
    posterior: Posterior | Tensor,
    truth: Any = None,
    *,
    event: int = 0,
    names: Sequence[str] | None = None,
    draws: int = 20_000,
    generator: torch.Generator | None = None,
    levels: Sequence[float] = (0.68, 0.9),
    axes: Any = None,
    label: str | None = None,
    color: str | None = None,
) -> np.ndarray:
    """Draw one event's posterior: each label's marginal, and each pair's highest-density regions.

    The marginals have the median and the central 68 % interval, whose numbers stand above them. The
    first of `levels` is filled. Several posteriors overlay: pass the axes that the first call gave.

    The three columns of a direction are drawn as two: offsets in degrees from the mean direction
    of the first posterior on these axes, along azimuth (or right ascension) and altitude (or
    declination). `SkyMap.plot_zoom` shows one on the sky. Angles are in radians.

    Arguments:
        posterior: A posterior of a batch (N,) of events or of one, or draws of one of shape (S, D).
        truth: The true label, of shape (D,), or of all events, (N, D).
        event: Which event of the batch.
        names: What to call the D columns, with units if you like, two of each direction; by default
            the space's names, on given axes those that are there.
        draws: Draws S.
        generator: Their source; by default one of a fixed seed.
        levels: Credible levels of the regions, in (0, 1).
        axes: Axes of shape (D, D) to draw on, one less of each for a direction; by default a new
            figure.
        label: The posterior's entry in the legend.
        color: Its colour; by default the next of the palette.

    Returns:
        Axes of shape (D, D), one less of each for a direction; those above the diagonal are empty.

    Raises:
        ValueError: If shapes, names or levels do not fit, or there is no such event.
    """
    levels = check_levels(levels)
    z = event_draws(posterior, event, draws, generator)
    true = None if truth is None else _truth(truth, event, z.shape[1])
    z, true, known, about = _shown(getattr(posterior, "space", None), z, true, axes)
    size = z.shape[1]
    named = _names(known, names) if axes is None or names is not None else None
    grid = _corner_axes(axes, size)
    grid[0, 0]._flowpost_about = about
    count = sum(line.get_gid() == "median" for line in grid[0, 0].lines)
    color = _COLOURS[count % len(_COLOURS)] if color is None else color
    spans = [_span(z[:, j], None if true is None else true[j]) for j in range(size)]
    for i in range(size):
        _marginal(grid[i, i], z[:, i], color, count, top=i == 0)
        for j in range(i):
            region = draws_region(z[:, [j, i]], levels)
            region.fill(grid[i, j], levels[0], colors=[color], alpha=0.18)
            for k, level in enumerate(levels):
                region.contour(grid[i, j], level, colors=[color], linewidths=1.4 / (1 + 0.5 * k))
    for i in range(size):
        for j in range(i + 1):
            ax = grid[i, j]
            _widen(ax, spans[j], spans[i] if j < i else None, count > 0)
            if true is not None:
                _mark(ax, true[j], true[i] if j < i else None)
            if named is not None and i == size - 1:
                ax.set_xlabel(named[j])
            if named is not None and j == 0 and i:
                ax.set_ylabel(named[i])
    _legend(grid, label, color, true is not None)
    return grid


def event_draws(
    posterior: Any, event: Any, draws: int, generator: torch.Generator | None
) -> Tensor:
    """Draws (S, D) of one event, or (S, E, D) of a list of events, in double precision."""
    if isinstance(posterior, Tensor) or not hasattr(posterior, "sample"):
        z = as_tensor(posterior, "posterior")
        wanted = "(S, D)" if isinstance(event, int) else "(S, N, D)"
        if z.ndim != len(wanted.split(",")) or len(z) < FEWEST:
            raise ValueError(
                f"Expected a Posterior, or draws of shape {wanted} with S of at least {FEWEST}; "
                f"got {tuple(z.shape)}."
            )
        z = z if isinstance(event, int) else z[:, _check_events(event, z.shape[1])]
    else:
        draws = check_positive_int(draws, "draws", minimum=FEWEST)
        if len(posterior.batch_shape) > 1 or (
            not posterior.batch_shape and not isinstance(event, int)
        ):
            raise ValueError(
                f"Expected a posterior of a batch (N,); got {tuple(posterior.batch_shape)}. "
                "Index it first."
            )
        if posterior.batch_shape:
            one = [event] if isinstance(event, int) else event
            checked = _check_events(one, posterior.batch_shape[0])
            posterior = posterior[checked[0] if isinstance(event, int) else checked]
        generator = torch.Generator().manual_seed(0) if generator is None else generator
        z = posterior.sample((draws,), generator=generator)
    z = z.detach().double().cpu()
    check_finite(z, "draws", "Look for a diverged network.")
    return z


def _check_events(events: Sequence[int], count: int) -> list[int]:
    for e in events:
        if not -count <= e < count:
            raise ValueError(f"Expected event from 0 to {count - 1}; got {e}.")
    return [int(e) for e in events]


def _shown(
    space: Space | None, z: Tensor, true: list[float] | None, axes: Any
) -> tuple[Tensor, list[float] | None, tuple[str, ...], dict[str, Tensor]]:
    """Draws and truth as they are drawn, the names of their columns, and the middles of directions.

    An angle's draws and truth are on one branch, directions are offsets from a middle.
    """
    if space is None:
        return z, true, tuple(f"z{j}" for j in range(z.shape[1])), {}
    count = len(z)
    both = space.unwrap(z if true is None else torch.cat([z, z.new_tensor([true])]))
    about = middles(space, both[:count])
    if axes is not None:
        about |= getattr(np.asarray(axes, dtype=object).flat[0], "_flowpost_about", {})
    both, names = offsets(space, both, about)
    names = tuple(f"{n} [rad]" if n in _angles(space) else n for n in names)
    return both[:count], None if true is None else both[-1].tolist(), names, about


def _angles(space: Space) -> set[str]:
    """Columns that are angles in radians."""
    return {
        space.names[b.columns.start]
        for b in space.blocks
        if isinstance(b.space, Circle) and not b.space.vector
    }


def _names(known: tuple[str, ...], names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return known
    if isinstance(names, str) or len(names) != len(known):
        raise ValueError(f"Expected {len(known)} names, one per label column; got {names!r}.")
    return tuple(names)


def _truth(truth: Any, event: int, size: int) -> list[float]:
    true = as_tensor(truth, "truth").detach().double().cpu()
    true = true.reshape(1) if true.ndim == 0 else true
    if true.ndim == 2 and -len(true) <= event < len(true):
        true = true[event]
    if true.shape != (size,):
        raise ValueError(
            f"Expected truth of shape ({size},), or (N, {size}) with event {event}; got "
            f"{tuple(true.shape)}."
        )
    check_finite(true, "truth")
    return cast("list[float]", true.tolist())


def _corner_axes(axes: Any, size: int) -> np.ndarray:
    if axes is not None:
        grid = np.asarray(axes, dtype=object)
        grid = grid.reshape(1, 1) if grid.shape in ((), (1,)) else grid
        if grid.shape != (size, size):
            raise ValueError(
                f"Expected axes of shape ({size}, {size}) for {size} labels; got {grid.shape}. "
                "Pass what plot_corner returned for the same labels."
            )
        return grid
    import matplotlib.pyplot as plt

    side = 3.8 if size == 1 else max(1.9 * size + 0.6, 4.6) if size < 5 else 1.7 * size
    figure, grid = plt.subplots(
        size, size, figsize=(side, side), layout="constrained", squeeze=False
    )
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0.02, hspace=0.02)
    for i in range(size):
        for j in range(size):
            _dress(grid[i, j], i, j, size)
    figure.align_xlabels(grid[-1])
    if size > 2:
        figure.align_ylabels(grid[1:, 0])
    return cast("np.ndarray", grid)


def _dress(ax: Any, i: int, j: int, size: int) -> None:
    from matplotlib.ticker import MaxNLocator

    if j > i:
        ax.set_axis_off()
        return
    ax.xaxis.set_major_locator(MaxNLocator(4, prune="both"))
    ax.tick_params(labelsize="small", labelbottom=i == size - 1, labelleft=j == 0 and i > 0)
    for tick in ("x", "y"):
        ax.tick_params(axis=tick, direction="in")
    ax.tick_params(axis="x", labelrotation=35 if size > 2 else 0)
    if i == j:
        ax.set_yticks([])
        ax.spines[["left", "right", "top"]].set_visible(False)
    else:
        ax.yaxis.set_major_locator(MaxNLocator(4, prune="both"))


def _marginal(ax: Any, z: Tensor, color: str, count: int, top: bool) -> None:
    values = z.numpy()
    low, mid, high = np.quantile(values, [0.158655, 0.5, 0.841345])
    start, stop = _span(z, None)
    bins = int(np.clip(2 * len(values) ** (1 / 3), 20, 80))
    heights, edges = np.histogram(values, bins, (start, stop))
    heights = heights / (len(values) * (edges[1] - edges[0]))
    ax.stairs(heights, edges, color=color, lw=1.3)
    inside = (edges[1:] > low) & (edges[:-1] < high)
    ends = np.concatenate([[low], edges[1:-1][inside[:-1] & inside[1:]], [high]])
    ax.stairs(heights[inside], ends, color=color, alpha=0.18, fill=True, lw=0)
    at = heights[min(np.searchsorted(edges, mid) - 1, bins - 1)]
    ax.plot([mid, mid], [0, at], color=color, lw=1.3, gid="median")
    peak = 1.08 * heights.max()
    ax.set_ylim(0, max(peak, ax.get_ylim()[1]) if count else peak)
    number = ax.annotate(
        _quoted(low, mid, high),
        (0.5, 1),
        (0, 3 + 13 * count),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        va="bottom",
        color=color,
        fontsize="small",
        gid="median",
    )
    number.set_in_layout(top)  # below the first row there is an empty panel to write on


def _quoted(low: float, mid: float, high: float) -> str:
    """Median with its 68 % interval, two digits of the smaller error."""
    down, up = mid - low, high - mid
    smaller = min((e for e in (down, up) if e > 0), default=1.0)
    largest = max(abs(mid), up, down)
    digits = 1 - int(np.floor(np.log10(smaller)))
    power, factor = 0, ""
    if largest >= 1e5 or digits > 5:
        power = int(np.floor(np.log10(largest) + 1e-3))
        factor = rf" \times 10^{{{power}}}"
    d = max(digits + power, 0)
    # adding zero removes the sign of a rounded −0.0
    m, a, b = (round(float(t) / 10.0**power, d) + 0.0 for t in (mid, down, up))
    return f"${m:.{d}f}_{{-{a:.{d}f}}}^{{+{b:.{d}f}}}{factor}$"


def _span(z: Tensor, true: float | None) -> tuple[float, float]:
    """Range that shows all but 0.5 % of the draws at either end, and the truth."""
    values = z.numpy()
    low, high = np.quantile(values, [0.005, 0.995])
    margin = 0.15 * (high - low)
    low, high = max(low - margin, values.min()), min(high + margin, values.max())
    if true is not None and not low < true < high:
        edge = 0.05 * (max(high, true) - min(low, true))
        low, high = min(low, true - edge), max(high, true + edge)
    if high <= low:
        raise ValueError(
            f"Expected draws that vary; got {values[0]:g} throughout. Use double precision if the "
            "posterior is narrower than its labels' rounding."
        )
    return float(low), float(high)


def _widen(ax: Any, x: tuple[float, float], y: tuple[float, float] | None, overlay: bool) -> None:
    """Set the limits, on an overlay to hold the earlier ones too."""
    for span, get, put in ((x, ax.get_xlim, ax.set_xlim), (y, ax.get_ylim, ax.set_ylim)):
        if span is not None:
            low, high = get() if overlay else span
            put(min(low, span[0]), max(high, span[1]))


def _mark(ax: Any, x: float, y: float | None) -> None:
    style = {"color": _DARK, "lw": 0.9, "ls": "--", "gid": "truth"}
    ax.axvline(x, **style)
    if y is not None:
        ax.axhline(y, **style)
        ax.plot([x], [y], marker="s", ms=4, color=_DARK, mew=0, ls="")


def _legend(grid: np.ndarray, label: str | None, color: str, truth: bool) -> None:
    from matplotlib.lines import Line2D

    corner = grid[0, -1]
    old = corner.get_legend()
    entries: dict[str, Any] = {}
    if old is not None:
        texts = (t.get_text() for t in old.get_texts())
        entries = dict(zip(texts, old.legend_handles, strict=True))
    true = entries.pop("truth", None)
    if label is not None:
        entries[label] = Line2D([], [], color=color, lw=1.6)
    if truth or true is not None:
        dot = "s" if len(grid) > 1 else None
        entries["truth"] = Line2D([], [], color=_DARK, lw=0.9, ls="--", marker=dot, ms=4)
    if entries:
        corner.legend(
            list(entries.values()),
            list(entries),
            frameon=False,
            fontsize="small",
            loc="best" if len(grid) == 1 else "upper right",
        )
