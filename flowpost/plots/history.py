"""The course of a training: its loss, and coverage beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from flowpost._checks import check_positive_int
from flowpost.diagnostics.nulls import binomial_interval
from flowpost.plots.coverage import _COLOURS, _GREYS, _thousands
from flowpost.training.history import History

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_history"]

_LEVELS = (
    ("coverage90", 0.9, "90 %"),
    ("coverage68", 0.682689, "68 %"),
    ("coverage50", 0.5, "50 %"),
)
_HEADROOM = 6.0  # of the NLL's range after the start, from which the start is cut


def plot_history(
    history: History, ax: Axes | tuple[Axes, Axes] | None = None, *, events: int | None = None
) -> np.ndarray:
    """Draw NLL against epoch, and below it the share of validation events in three regions.

    Of an `ExtendedModel` it is the loss that was minimised, as the label says: the sum of both
    parts, or that of one of them. Coverage is that of the posterior whichever it was.

    Coverage reaches its nominal values early; from then on the NLL falls because the regions
    shrink while coverage holds. The first epochs are cut from the NLL panel where they would
    flatten the rest; an arrow at its upper edge says so.

    Arguments:
        history: What `flowpost.fit` returned.
        ax: Where to draw: two axes, for NLL and coverage, or one, which is divided; by default a
            new figure.
        events: Validation events, for the 2 σ binomial band around the nominal levels.

    Returns:
        Axes of the NLL and of the coverage, of shape (2,).

    Raises:
        ValueError: If there is no epoch, or `ax` is neither one nor two axes.
    """
    if not history.epochs:
        raise ValueError("Expected a history of at least one epoch; got none. Train first.")
    upper, lower = _pair(ax)
    epoch = np.array(history["epoch"])
    _nll(upper, history, epoch)
    _coverage(lower, history, epoch, events)
    for panel in (upper, lower):
        panel.axvline(history.best.epoch, color="#444444", lw=0.8, ls=":", zorder=0.5, gid="best")
        panel.set_xlim(epoch[0] - 0.02 * len(epoch) - 0.1, epoch[-1] + 0.02 * len(epoch) + 0.1)
        panel.xaxis.get_major_locator().set_params(integer=True)
    upper.tick_params(labelbottom=False)
    lower.set_xlabel("epoch")
    upper.figure.align_ylabels([upper, lower])
    return np.array([upper, lower], dtype=object)


def _nll(ax: Any, history: History, epoch: np.ndarray) -> None:
    train, val = np.array(history["train_nll"]), np.array(history["val_nll"])
    best = history.best
    dot = {"marker": "o", "ms": 3.5} if len(epoch) < 3 else {}
    ax.plot(epoch, train, color=_COLOURS[0], lw=1.3, ls="--", label="train", **dot)
    ax.plot(epoch, val, color=_COLOURS[1], lw=1.5, label="validation", **dot)
    ax.plot(
        [best.epoch],
        [best.val_nll],
        ls="",
        marker="*",
        ms=11,
        color=_COLOURS[1],
        mec="white",
        mew=0.6,
        zorder=4,
        label=f"kept: epoch {best.epoch}, {best.val_nll:.3f} nats".replace("-", "−"),
    )
    both = np.stack([train, val])
    late = both[:, len(epoch) // 10 :]
    late = late[np.isfinite(late)]
    if len(late) and np.nanmax(both) - late.min() > _HEADROOM * (
        np.quantile(late, 0.75) - late.min()
    ):
        low, high = late.min(), np.quantile(late, 0.75)
        top = low + _HEADROOM / 2 * (high - low)
        if top > low:
            ax.set_ylim(low - 0.08 * (top - low), top)
            _cut(ax, both, top)
    ax.set_ylabel(f"{history.loss_name} [nats]")
    ax.legend(loc="upper right", frameon=False, fontsize="small")


def _cut(ax: Any, both: np.ndarray, top: float) -> None:
    """Say how high the curves are beyond the upper edge."""
    beyond = np.nanmax(both)
    if beyond > top:
        ax.annotate(
            f"↑ to {beyond:.3g}",
            (0.0, 1.01),
            xycoords="axes fraction",
            va="bottom",
            fontsize="small",
            color="#444444",
        )


def _coverage(ax: Any, history: History, epoch: np.ndarray, events: int | None) -> None:
    shown = [100 * np.array(history[name]) for name, _, _ in _LEVELS]
    ends = [0.0, 100.0]
    if events is not None:
        nominal = torch.tensor([p for _, p, _ in _LEVELS], dtype=torch.float64)
        count = check_positive_int(events, "events")
        bands = 100 * binomial_interval(nominal, count, (2.0,))[0].T.numpy()
        for k, (low, high) in enumerate(bands):
            name = f"2 σ ({_thousands(count)} events)" if k == 0 else None
            ax.axhspan(low, high, color=_GREYS[1], lw=0, zorder=0.3, label=name, gid="band")
    for k, (values, (_, level, name)) in enumerate(zip(shown, _LEVELS, strict=True)):
        ax.axhline(100 * level, color="#444444", lw=0.8, ls="--", zorder=0.6, gid="nominal")
        ax.plot(
            epoch,
            values,
            color=_COLOURS[(2, 0, 4)[k]],
            marker="osD"[k],
            ms=3 if len(epoch) <= 60 else 0,
            lw=1.4,
            mew=0,
            label=name,
        )
    finite = np.concatenate(shown)
    finite = finite[np.isfinite(finite)]
    if len(finite):
        ends = [max(0.0, min(40.0, finite.min() - 4)), min(100.0, max(96.0, finite.max() + 2))]
    else:
        ax.text(
            0.5,
            0.25,
            "no coverage recorded: no event had all labels",
            transform=ax.transAxes,
            ha="center",
            fontsize="small",
        )
    # room for the legend below the lowest curve
    ax.set_ylim(ends[0] - 0.24 * (ends[1] - ends[0]), ends[1])
    ax.set_ylabel("coverage [%]")
    ax.set_yticks([p for p in range(0, 101, 10) if p >= ends[0]])
    ax.legend(loc="lower right", frameon=False, fontsize="small", ncols=4, columnspacing=1.2)


def _pair(ax: Any) -> tuple[Any, Any]:
    import matplotlib.pyplot as plt
    from matplotlib.axes import Axes

    if ax is None:
        _, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(6, 5.6), layout="constrained")
        return top, bottom
    if not isinstance(ax, Axes):
        pair = np.asarray(ax, dtype=object).reshape(-1)
        if len(pair) != 2 or not all(isinstance(a, Axes) for a in pair):
            raise ValueError(
                f"Expected ax as one or two matplotlib axes; got {ax!r}. Take them from "
                "plt.subplots(2)."
            )
        return cast("tuple[Any, Any]", tuple(pair))
    place = ax.get_subplotspec()
    if place is None:  # axes put down by hand
        return ax, ax.inset_axes((0, -1.1, 1, 1), sharex=ax)
    grid = place.subgridspec(2, 1)
    ax.set_subplotspec(grid[0])
    return ax, ax.figure.add_subplot(grid[1], sharex=ax)
