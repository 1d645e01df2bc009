"""Mean energies of the cells of a layered calorimeter, sample by sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from flowpost._checks import as_tensor, check_finite, check_shape

__all__ = ["plot_showers"]

# decades of the colours below the brightest cell
_DECADES = 4.0


def plot_showers(
    samples: Mapping[str, Any],
    shape: Sequence[tuple[int, int]],
    *,
    extent: float = 1.0,
    unit: str = "GeV",
    axes: Any = None,
) -> np.ndarray:
    """Draw the mean energy of each cell: a row of panels for each sample, a column for each layer.

    The colours are logarithmic, and the same for all samples within a layer.

    Arguments:
        samples: By name, energies of V cells (N, V), layer after layer, each row by row.
        shape: Rows and columns of cells of each layer, K of them.
        extent: Half the side of the layers, which all cover the same square, in what unit you like.
        unit: Of the energies.
        axes: Axes of shape (samples, K) to draw on; by default a new figure.

    Returns:
        Axes of shape (samples, K).

    Raises:
        ValueError: If there is nothing to draw, or shapes do not fit.
    """
    from matplotlib.colors import LogNorm

    if not samples or not shape:
        raise ValueError("Expected at least one sample and one layer; got none.")
    counts = [rows * columns for rows, columns in shape]
    means = {}
    for name, given in samples.items():
        x = as_tensor(given, name).detach().cpu().double()
        check_shape(x, ("N", sum(counts)), name, "One column a cell of the layers' shapes.")
        check_finite(x, name)
        means[name] = x.mean(0).split(counts)
    axes = _new_axes(len(means), len(shape)) if axes is None else np.asarray(axes)
    if axes.shape != (len(means), len(shape)):
        raise ValueError(
            f"Expected axes of shape {(len(means), len(shape))}; got {axes.shape}. One row a "
            "sample, one column a layer."
        )
    for k, cells in enumerate(shape):
        top = max(float(m[k].max()) for m in means.values())
        norm = LogNorm(top * 10**-_DECADES, top) if top > 0 else None
        for i, (name, mean) in enumerate(means.items()):
            ax = axes[i, k]
            image = mean[k].reshape(cells)
            picture = ax.imshow(
                torch.where(image > 0, image, torch.nan).numpy(),
                norm=norm,
                origin="lower",
                cmap="viridis",
                extent=(-extent, extent, -extent, extent),
                aspect="equal",
            )
            ax.set(xticks=[-extent, 0, extent], yticks=[-extent, 0, extent])
            ax.label_outer()
            if i == 0:
                ax.set_title(f"layer {k + 1}: {cells[0]} × {cells[1]}")
            if k == 0:
                ax.set_ylabel(name)
        if norm is not None:
            column = list(axes[:, k])
            share = 0.15 / len(column)
            bar = axes[0, k].figure.colorbar(
                picture, ax=column, location="bottom", fraction=share, pad=share
            )
            bar.set_label(f"mean energy [{unit}]")
    return axes


def _new_axes(rows: int, columns: int) -> np.ndarray:
    import matplotlib.pyplot as plt

    size = (2.6 * columns + 0.6, 2.3 * rows + 0.9)
    _, axes = plt.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False)
    return axes
