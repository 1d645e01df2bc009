"""A gallery of events: true regions, predictions, and predictions at stages of the training."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from flowpost._checks import as_tensor, check_finite
from flowpost.plots.corner import event_draws
from flowpost.plots.coverage import _COLOURS
from flowpost.plots.regions import Region, draws_region, grid_region

if TYPE_CHECKING:
    from flowpost.posterior import Posterior

__all__ = ["Grid", "plot_gallery"]

Grid = tuple[Any, Any, Any]  # x (X,), y (Y,), density (Y, X)

_TRUE = ("#B5B5B5", "#DEDEDE")
_DASHES = ((0, (4, 1.6)), (0, (1.2, 1.2)), (0, (5, 1.5, 1, 1.5)))
_MOST = 6
_MARGIN = 0.12


def plot_gallery(
    events: Sequence[int],
    posteriors: Mapping[str, Posterior | Tensor],
    truth: Any = None,
    *,
    true_regions: Callable[[int], Grid] | Sequence[Grid] | Mapping[int, Grid] | None = None,
    stages: Mapping[str, Posterior | Tensor] | None = None,
    columns: tuple[int | str, int | str] = (0, 1),
    names: tuple[str, str] | None = None,
    titles: Sequence[str] | None = None,
    levels: tuple[float, float] = (0.68, 0.9),
    draws: int = 20_000,
    generator: torch.Generator | None = None,
    equal: bool = False,
    axes: Any = None,
) -> np.ndarray:
    """Draw two label columns of some events: one column of panels per event.

    The first row has the true highest-density regions at both levels (filled), the region of each
    posterior at the first level (lines) and the true label (star). Each stage has a row below, with
    the region of the first level in the colour of the last of `posteriors`; these rows share one
    window per event, so that regions are seen to shrink.

    Two Cartesian columns of a direction make ragged islands: `SkyMap.plot_zoom` shows it on the
    sky, `plot_corner` as offsets from its mean.

    Arguments:
        events: Which events of the batch, E of them.
        posteriors: By name, posteriors of the batch (N,), or their draws (S, N, D).
        truth: True labels of the batch, of shape (N, D).
        true_regions: The true density of the two columns as (x, y, density): cell centres (X,) and
            (Y,) and density (Y, X), rows of equal y. Either a function of the event, such as
            `TelescopePosterior.position_map`, or a mapping by event, or one for each of `events`.
        stages: By label, posteriors of the batch at stages of the training, or their draws.
        columns: The two label columns, by number or name.
        names: What to call them, with units if you like; by default the space's names.
        titles: What to write above each event.
        levels: Credible levels of the inner and the outer true region.
        draws: Draws S of each posterior.
        generator: Their source; by default one of a fixed seed.
        equal: One scale for both columns, as positions need it.
        axes: Axes of shape (1 + stages, E) to draw on; by default a new figure.

    Returns:
        Axes of shape (1 + stages, E).

    Raises:
        ValueError: If there is nothing to draw, or shapes, names or events do not fit.
    """
    events = [int(e) for e in events]
    stages = {} if stages is None else stages
    if not events or not 1 <= len(posteriors) <= _MOST:
        raise ValueError(
            f"Expected at least one event and 1 to {_MOST} posteriors; got {len(events)} and "
            f"{len(posteriors)}."
        )
    if titles is not None and len(titles) != len(events):
        raise ValueError(f"Expected {len(events)} titles, one per event; got {len(titles)}.")
    if len(levels) != 2 or not 0 < levels[0] < levels[1] < 1:
        raise ValueError(f"Expected two increasing levels in (0, 1); got {levels!r}.")
    pair, called = _columns(next(iter(posteriors.values())), columns, names)
    labels = _labels(truth, events, pair)
    true = _true_regions(true_regions, events, levels)
    predicted = _regions(posteriors, events, pair, levels, draws, generator)
    staged = _regions(stages, events, pair, levels, draws, generator)
    grid = _axes(axes, 1 + len(stages), len(events))
    colours = {name: _COLOURS[k] for k, name in enumerate(posteriors)}
    dashes: dict[str, Any] = {name: _DASHES[k % 3] for k, name in enumerate(posteriors)}
    last = list(posteriors)[-1]
    dashes[last] = (0, ())
    for e in range(len(events)):
        final = [predicted[name][e] for name in posteriors]
        _cell(grid[0, e], true[e], labels[e], levels)
        for name, region in zip(posteriors, final, strict=True):
            style = {"colors": [colours[name]], "linestyles": [dashes[name]], "linewidths": 1.6}
            region.contour(grid[0, e], levels[0], **style)
        _window(grid[0, e], [true[e], *final], labels[e], levels, equal)
        course = [staged[name][e] for name in stages]
        for row, region in enumerate(course, 1):
            ax = grid[row, e]
            _cell(ax, true[e], labels[e], levels)
            region.fill(ax, levels[0], colors=[colours[last]], alpha=0.13)
            region.contour(ax, levels[0], colors=[colours[last]], linewidths=1.6)
            _window(ax, [true[e], *course], labels[e], levels, equal)
        if titles is not None:
            grid[0, e].set_title(titles[e], fontsize="medium")
    _write(grid, called, list(stages))
    _legend(grid, colours, dashes, levels, true_regions is not None, truth is not None, axes)
    return grid


def _columns(
    first: Any, columns: tuple[int | str, int | str], names: tuple[str, str] | None
) -> tuple[list[int], tuple[str, str]]:
    space = getattr(first, "space", None)
    size = first.shape[-1] if space is None else space.label_size
    known = tuple(f"z{j}" for j in range(size)) if space is None else tuple(space.names)
    pair = [known.index(c) if c in known else c for c in columns]
    bad = [c for c in pair if not (isinstance(c, int) and 0 <= c < size)]
    if bad or len(pair) != 2 or pair[0] == pair[1]:
        raise ValueError(
            f"Expected two different label columns, of {', '.join(known)} or by number; got "
            f"{columns!r}."
        )
    if names is not None and (isinstance(names, str) or len(names) != 2):
        raise ValueError(f"Expected two names; got {names!r}.")
    index = [int(c) for c in pair]
    return index, (known[index[0]], known[index[1]]) if names is None else (names[0], names[1])


def _regions(
    posteriors: Mapping[str, Any],
    events: list[int],
    pair: list[int],
    levels: tuple[float, float],
    draws: int,
    generator: torch.Generator | None,
) -> dict[str, list[Region]]:
    """Regions of each posterior and event."""
    found = {}
    for name, posterior in posteriors.items():
        z = event_draws(posterior, events, draws, generator)
        if z.shape[-1] <= max(pair):
            raise ValueError(
                f"Expected posteriors of the same labels; {name!r} has {z.shape[-1]} columns."
            )
        found[name] = [draws_region(z[:, e, pair], levels) for e in range(len(events))]
    return found


def _true_regions(
    given: Any, events: list[int], levels: tuple[float, float]
) -> list[Region | None]:
    if given is None:
        return [None] * len(events)
    if callable(given):
        grids = [given(e) for e in events]
    elif isinstance(given, Mapping):
        missing = [e for e in events if e not in given]
        if missing:
            raise ValueError(f"Expected a true region of each event; {missing} have none.")
        grids = [given[e] for e in events]
    else:
        grids = list(given)
    if len(grids) != len(events) or any(len(g) != 3 for g in grids):
        raise ValueError(
            f"Expected {len(events)} true regions (x, y, density), one per event; got "
            f"{len(grids)}. A function of the event, such as position_map, does too."
        )
    return [grid_region(x, y, density, levels) for x, y, density in grids]


def _labels(truth: Any, events: list[int], pair: list[int]) -> list[list[float] | None]:
    if truth is None:
        return [None] * len(events)
    z = as_tensor(truth, "truth").detach().double().cpu()
    if z.ndim != 2 or z.shape[1] <= max(pair) or max(events) >= len(z):
        raise ValueError(
            f"Expected truth of all events of the batch, (N, D); got {tuple(z.shape)} for events "
            f"{events}."
        )
    check_finite(z[events][:, pair], "truth")
    return [z[e, pair].tolist() for e in events]


def _cell(
    ax: Any, true: Region | None, label: list[float] | None, levels: tuple[float, float]
) -> None:
    if true is not None:
        for level, shade in zip(levels[::-1], _TRUE[::-1], strict=True):
            true.fill(ax, level, colors=[shade])
    if label is not None:
        ax.plot(
            *([c] for c in label),
            marker="*",
            ms=11,
            color="black",
            mec="white",
            mew=0.9,
            ls="",
            zorder=5,
            gid="truth",
        )


def _window(
    ax: Any,
    regions: Sequence[Region | None],
    label: list[float] | None,
    levels: tuple[float, float],
    equal: bool,
) -> None:
    """Limits that hold the regions and the label."""
    ends = [r.window(levels[1] if k == 0 else levels[0]) for k, r in enumerate(regions) if r]
    if label is not None:
        ends.append((label[0], label[0], label[1], label[1]))
    table = np.array(ends)
    low, high = table[:, [0, 2]].min(0), table[:, [1, 3]].max(0)
    half = (high - low) / 2
    if equal:
        half[:] = half.max()
        ax.set_aspect("equal", adjustable="box")
    centre, half = (low + high) / 2, half * (1 + _MARGIN)
    ax.set_xlim(centre[0] - half[0], centre[0] + half[0])
    ax.set_ylim(centre[1] - half[1], centre[1] + half[1])


def _axes(axes: Any, rows: int, events: int) -> np.ndarray:
    from matplotlib.ticker import MaxNLocator

    if axes is not None:
        grid = np.asarray(axes, dtype=object)
        if grid.size != rows * events:
            raise ValueError(
                f"Expected axes of shape ({rows}, {events}), a row for the final state and each "
                f"stage and a column per event; got {grid.shape}."
            )
        return grid.reshape(rows, events)
    import matplotlib.pyplot as plt

    size = (0.9 + 2.15 * events, 0.9 + 2.1 * rows)
    _, grid = plt.subplots(rows, events, figsize=size, layout="constrained", squeeze=False)
    for ax in grid.flat:
        ax.tick_params(labelsize="x-small", length=2.5, direction="in")
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_major_locator(MaxNLocator(4, prune="both"))
    return cast("np.ndarray", grid)


def _write(grid: np.ndarray, names: tuple[str, str], stages: list[str]) -> None:
    for ax in grid[-1]:
        ax.set_xlabel(names[0])
    for ax in grid[:, 0]:
        ax.set_ylabel(names[1])
    if stages:
        for ax, text in zip(grid[:, 0], ["final", *stages], strict=True):
            ax.annotate(
                text,
                (0, 0.5),
                (-6, 0),
                xycoords=ax.yaxis.label,
                textcoords="offset points",
                rotation=90,
                ha="right",
                va="center",
                weight="bold",
            )


def _legend(
    grid: np.ndarray,
    colours: Mapping[str, str],
    dashes: Mapping[str, Any],
    levels: tuple[float, float],
    regions: bool,
    truth: bool,
    axes: Any,
) -> None:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    inner, outer = (f"{100 * p:g} %" for p in levels)
    if regions:
        handles += [Patch(color=_TRUE[0], label=f"true {inner}")]
        handles += [Patch(color=_TRUE[1], label=f"true {outer}")]
    for name, colour in colours.items():
        handles.append(
            Line2D([], [], color=colour, ls=dashes[name], lw=1.6, label=f"{name} {inner}")
        )
    if truth:
        handles.append(
            Line2D([], [], marker="*", ms=10, color="black", mec="white", ls="", label="true label")
        )
    if axes is None:
        width = grid[0, 0].figure.get_size_inches()[0]
        ncols = max(1, min(len(handles), int(width / 1.35)))
        grid[0, 0].figure.legend(
            handles=handles, loc="outside upper center", ncols=ncols, frameon=False
        )
    else:
        grid[0, 0].legend(handles=handles, fontsize="x-small", framealpha=0.8)
