"""Legends that cover nothing: in a free corner of the axes, or below them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

__all__ = ["LEGEND", "free_legend"]

LEGEND: dict[str, Any] = {
    "fontsize": "small",
    "framealpha": 0.8,
    "edgecolor": "#BBBBBB",
    "handlelength": 1.6,
    "labelspacing": 0.3,
    "borderaxespad": 0.3,
}
_GAP = 0.015  # share of the axes between a legend and their edges
_HALF = 0.6  # share of the axes up to which entries stand in two columns below them
_BELOW = -34  # points under the axes, past their ticks and label


def free_legend(ax: Any, handles: Sequence[Any], taken: np.ndarray) -> None:
    """Put a legend into the first corner where nothing is taken, or below the axes.

    Arguments:
        ax: The axes.
        handles: Entries.
        taken: What must stay visible: a grid of bools (rows, columns) over the axes, rows from the
            bottom up and columns from left to right.
    """
    from matplotlib.transforms import offset_copy

    figure = ax.figure.canvas.figure
    legend = ax.legend(handles=handles, loc="upper right", **LEGEND)
    figure.draw_without_rendering()  # sizes are known once it is laid out
    share = legend.get_window_extent().size / ax.get_window_extent().size + _GAP
    size = np.array(taken.shape[::-1])
    width, height = np.minimum(np.ceil(share * size), size).astype(int).tolist()
    corners = {
        "upper right": np.s_[-height:, -width:],
        "upper left": np.s_[-height:, :width],
        "lower right": np.s_[:height, -width:],
        "lower left": np.s_[:height, :width],
    }
    for place, part in corners.items():
        if not taken[part].any():
            legend.set_loc(place)
            return
    ax.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(0.5, 0),
        bbox_transform=offset_copy(ax.transAxes, ax.figure, y=_BELOW, units="points"),
        ncols=2 if share[0] < _HALF else 1,
        columnspacing=1.0,
        **LEGEND,
    )
    figure.draw_without_rendering()  # a layout of axes of fixed aspect takes two passes
