"""p-values of events, good and bad, against the uniform."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowpost._checks import as_tensor, check_positive_int, check_shape
from flowpost.diagnostics.nulls import binomial_interval
from flowpost.plots.coverage import _COLOURS, _GREYS, _closed, _new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_p_values"]


def plot_p_values(
    p: Any, ax: Axes | None = None, *, bins: int = 20, threshold: float | None = None
) -> Axes:
    """Draw the distribution of p-values, one or several by name, on a logarithmic axis.

    The grey band is the exact 2 σ binomial range of uniform values, of as many events as the first.
    With a cut the axis of p is logarithmic too: it begins at a tenth of the cut, in a bin of all
    that is below, and the cut is an edge of bins.

    Arguments:
        p: p-values (N,), something with such a `p` (`PredictiveP`, `CalibratedP`), or a dict of
            either by name.
        ax: Where to draw; by default a new figure.
        bins: Bins of equal width between 0 and 1, about as many where there is a cut.
        threshold: Where to mark a cut.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no event, a value is not in [0, 1], or the cut not between them.
    """
    bins = check_positive_int(bins, "bins")
    parts = {k: _values(v, k) for k, v in (p if isinstance(p, Mapping) else {"": p}).items()}
    if not parts:
        raise ValueError("Expected p-values of at least one set of events; got none.")
    ax = _new_axes() if ax is None else ax
    if threshold is None:
        edges = drawn = torch.linspace(0, 1, bins + 1, dtype=torch.float64)
    else:
        edges, drawn = _cut_edges(threshold, bins)
    share = edges.diff()
    low, high = binomial_interval(share, len(next(iter(parts.values()))), (2.0,))[0] / share
    ax.fill_between(
        drawn.numpy(), *_closed(low, high), color=_GREYS[1], lw=0, step="post", label="2 σ"
    )
    ax.axhline(1, color="#444444", lw=1, ls="--")
    for k, (name, values) in enumerate(parts.items()):
        place = torch.bucketize(values, edges[1:-1], right=True)
        counts = place.bincount(minlength=len(share))
        label = f"{name}: {len(values)} events" if name else f"{len(values)} events"
        heights = counts / len(values) / share
        steps = ax.stairs(heights.numpy(), drawn.numpy(), baseline=None)
        steps.set(edgecolor=_COLOURS[k % len(_COLOURS)], linewidth=1.3, label=label)
    if threshold is not None:
        ax.axvline(threshold, color="#444444", lw=1, ls=":", label=f"cut at {threshold:g}")
    ax.set(yscale="log", xlabel="p-value", ylabel="events / expected of uniform")
    if threshold is None:
        ax.set_xlim(0, 1)
    else:
        ax.set(xscale="log", xlim=(float(drawn[0]), 1))
    bottom, top = ax.get_ylim()
    # room for the legend above the curves
    ax.set_ylim(bottom, top * (top / bottom) ** (0.1 * (len(parts) + 1)))
    ax.legend(loc="upper right", frameon=False, fontsize="small")
    return ax


def _cut_edges(threshold: float, bins: int) -> tuple[Tensor, Tensor]:
    """Edges of bins, and where they are drawn: equal in ln p, one on the cut, all below in one."""
    if not 0 < threshold < 1:
        raise ValueError(f"Expected threshold between 0 and 1; got {threshold!r}.")
    above = max(1, round(bins * -math.log10(threshold) / (1 - math.log10(threshold))))
    below = max(1, bins - above)
    high = torch.logspace(math.log10(threshold), 0, above + 1, dtype=torch.float64)
    high[0] = threshold
    low = threshold * torch.logspace(-1, 0, below, dtype=torch.float64)[: below - 1]
    inner = torch.cat([low, high])
    # so that all below is drawn as wide as the next bin
    first = inner[:1] * (inner[0] / inner[1])
    return torch.cat([torch.zeros_like(first), inner]), torch.cat([first, inner])


def _values(value: Any, name: str) -> Tensor:
    values = as_tensor(getattr(value, "p", value), "p").detach().double().cpu()
    check_shape(values, ("N",), f"p-values {name}".strip())
    if not len(values) or not bool(((values >= 0) & (values <= 1)).all()):
        raise ValueError(
            f"Expected p-values between 0 and 1 of at least one event; got {len(values)} from "
            f"{float(values.min()) if len(values) else float('nan'):g} to "
            f"{float(values.max()) if len(values) else float('nan'):g}."
        )
    return values
