"""Classifier two-sample tests: ROC curves, calibration, and the tails of density-ratio weights."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowpost.metrics.classifier_result import ClassifierScore, ClassifierTest
from flowpost.metrics.ratio import DensityRatio
from flowpost.plots.coverage import _COLOURS, _new_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_ratio", "plot_reliability", "plot_roc"]

_LINE = "#444444"


def plot_roc(result: ClassifierTest, ax: Axes | None = None) -> Axes:
    """Draw the ROC curve of each classifier and set of features on the test events.

    Arguments:
        result: A classifier test.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes(8) if ax is None else ax
    ax.plot([0, 1], [0, 1], color=_LINE, lw=0.8, ls="--")
    for k, row in enumerate(result.table):
        second, first = _roc(row, result)
        best = row is result.best
        ax.plot(
            second.numpy(),
            first.numpy(),
            color=_COLOURS[k % len(_COLOURS)],
            ls=("-", ":", "-.")[k // len(_COLOURS) % 3],
            lw=1.8 if best else 1.0,
            label=f"{row.name}: AUC {row.auc:.3f} ± {row.auc_error:.3f}" + " (best)" * best,
        )
    ax.set(
        xlim=(0, 1),
        ylim=(0, 1),
        xlabel="share of the second sample above the cut",
        ylabel="share of the first sample above the cut",
        title=f"p = {result.p_value:.3g}",
    )
    ax.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False, fontsize="small")
    return ax


def plot_reliability(result: ClassifierTest, ax: Axes | None = None, *, bins: int = 12) -> Axes:
    """Draw the share of the first sample against the best classifier's calibrated probability.

    The bins hold equally many test events; the bars are one standard error.

    Arguments:
        result: A classifier test.
        ax: Where to draw; by default a new figure.
        bins: Number of bins.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    row = result.best
    probability = torch.cat([row.probability_x, row.probability_y])
    first = torch.cat([torch.ones_like(row.probability_x), torch.zeros_like(row.probability_y)])
    share = torch.cat([w / w.sum() for w in (result.weight_x, result.weight_y)])
    points = []
    for part in probability.argsort().tensor_split(bins):
        total = share[part].sum()
        if len(part) and float(total) > 0:
            a = share[part] / total
            value = (a * first[part]).sum()
            error = (a * (first[part] - value)).norm()
            points.append([(a * probability[part]).sum(), value, error])
    at, value, error = torch.tensor(points).T.numpy()
    low, high = min(at.min(), value.min()), max(at.max(), value.max())
    ax.plot([low, high], [low, high], color=_LINE, lw=0.8, ls="--")
    ax.errorbar(at, value, error, fmt="o", ms=4, color=_COLOURS[0], lw=1.2)
    ax.set(
        xlabel=f"probability of the first sample ({row.calibration} calibration)",
        ylabel="share of the first sample",
        title=row.name,
    )
    return ax


def plot_ratio(ratio: DensityRatio, ax: Axes | None = None) -> Axes:
    """Draw the share of events above a density-ratio weight, and the share of weight they carry.

    Where the second curve stays high as the first has fallen to a few events, those events decide.

    Arguments:
        ratio: Density-ratio weights.
        ax: Where to draw; by default a new figure.

    Returns:
        The axes.
    """
    ax = _new_axes() if ax is None else ax
    w = ratio.weights.sort(descending=True).values
    w = w[w > 0]
    count = torch.arange(1, len(w) + 1, dtype=torch.float64) / len(ratio.weights)
    carried = w.cumsum(0) / w.sum()
    at = (w / w.mean()).numpy()
    ax.plot(at, count.numpy(), color=_COLOURS[0], label="events")
    ax.plot(at, carried.numpy(), color=_COLOURS[1], label="sum of weights")
    shape = "not known" if math.isnan(ratio.shape) else f"{ratio.shape:.2f}"
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="weight / mean weight",
        ylabel="share above",
        title=f"{ratio.effective_count:.0f} of {len(ratio.weights)} events effective, "
        f"tail shape {shape}",
    )
    ax.legend(loc="lower left", frameon=False, fontsize="small")
    return ax


def _roc(row: ClassifierScore, result: ClassifierTest) -> tuple[Tensor, Tensor]:
    # shares of the second and first sample above each score, at the ends of equal ones
    scores, order = torch.cat([row.score_x, row.score_y]).sort(descending=True)
    a, b = (w / w.sum() for w in (result.weight_x, result.weight_y))
    shares = []
    for part in (torch.cat([torch.zeros_like(a), b]), torch.cat([a, torch.zeros_like(b)])):
        shares.append(part[order].cumsum(0))
    end = torch.cat([scores[1:] != scores[:-1], torch.ones(1, dtype=torch.bool)])
    zero = torch.zeros(1, dtype=torch.float64)
    return torch.cat([zero, shares[0][end]]), torch.cat([zero, shares[1][end]])
