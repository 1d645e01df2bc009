"""The course of the training of a summary."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowpost.inferno.history import SummaryHistory
from flowpost.plots.coverage import _COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_summary_history"]


def plot_summary_history(history: SummaryHistory, ax: Axes | None = None) -> Axes:
    """Draw the losses of a summary against the epoch; small batches read theirs too low.

    Arguments:
        history: What `flowpost.inferno.fit` returned.
        ax: Where to draw; by default a new figure.
    """
    if ax is None:
        from matplotlib import pyplot as plt

        ax = plt.subplots(figsize=(5.5, 3.5), layout="constrained")[1]
    epoch = [row.epoch for row in history.epochs]
    ax.plot(epoch, [row.train for row in history.epochs], color=_COLOURS[1], label="batches")
    ax.plot(epoch, [row.val for row in history.epochs], color=_COLOURS[0], label="validation")
    ax.axvline(history.best.epoch, color="#444444", lw=0.8, ls=":", zorder=0.5)
    ax.set(xlabel="epoch", ylabel="loss")
    ax.xaxis.get_major_locator().set_params(integer=True)  # type: ignore[call-arg]
    ax.legend(frameon=False)
    return ax
