r"""Energy distance and distance correlation, from the distances of all pairs of events.

.. math:: E(x, y) = 2\, \mathbb{E}|x - y| - \mathbb{E}|x - x'| - \mathbb{E}|y - y'|

is 0 only where the distributions agree, and needs no bandwidth, binning or direction. With
normalised weights :math:`\sum_i w_i = 1` the means over pairs within a sample are

.. math:: V:\ \sum_{i, j} w_i w_j |x_i - x_j| , \qquad
          U:\ \frac{\sum_{i \neq j} w_i w_j |x_i - x_j|}{(\sum_i w_i)^2 - \sum_i w_i^2} .

The U-statistic is unbiased: for two batches of the same distribution it is 0 on average and may be
negative, so that a training gains nothing by shrinking the outputs. The V-statistic is never
negative, and on batches of n events too large by O(1/n).

The distance correlation of columns x and y of the same events is

.. math:: R^2 = \frac{\sum w_i w_j A_{ij} B_{ij}}{\sqrt{\sum w_i w_j A_{ij}^2
          \sum w_i w_j B_{ij}^2}} ,

with A, B the distances of pairs in x and in y, less the means of rows and columns. It is 0 only for
independent x and y. The bias-corrected one centres by n − 2 instead of n, and leaves out i = j.

Pairs are taken `chunk` × `chunk` at a time, and taken again for the gradient: memory does not grow
with N · M.

Sources: G. Székely, M. Rizzo, *Energy statistics*, 2013, https://doi.org/10.1016/j.jspi.2013.03.018;
G. Székely, M. Rizzo, *Partial distance correlation with methods for dissimilarities*, 2014,
https://arxiv.org/abs/1310.2926, eqs. 2.1 and 2.4; G. Kasieczka, D. Shih, *DisCo fever*, 2020,
https://arxiv.org/abs/2001.05310, for the correlation as a loss.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .._checks import check_positive_int
from .divergence import as_sample, as_samples, safe_root, sample_weights

__all__ = ["distance_correlation", "energy_distance"]


def energy_distance(
    x: Any,
    y: Any,
    weight_x: Any = None,
    weight_y: Any = None,
    *,
    unbiased: bool = True,
    signed_weights: bool = False,
    chunk: int = 2048,
) -> Tensor:
    """Energy distance of two samples, a scalar in the units of x; no root is taken.

    Arguments:
        x: Sample of shape (N,) or (N, D).
        y: Sample of shape (M,) or (M, D).
        weight_x: Event weights of shape (N,).
        weight_y: Event weights of shape (M,).
        unbiased: The U-statistic, which may be negative; without it the V-statistic, whose root is
            `scipy.stats.energy_distance` in one dimension.
        signed_weights: Allow negative weights. Sums of weights must be positive nevertheless.
        chunk: Events of each sample whose distances are held at once.

    Raises:
        ValueError: If samples are not finite or do not fit, weights are negative (unless signed) or
            do not sum to a positive number, or a U-statistic has fewer than two events.

    Example:
        >>> x = torch.tensor([0.0, 1.0])
        >>> float(energy_distance(x, x + 1, unbiased=False)), float(energy_distance(x, x + 1))
        (1.0, 0.0)
    """
    check_positive_int(chunk, "chunk")
    x, y, weight_x, weight_y = as_samples(x, y, weight_x, weight_y, signed_weights=signed_weights)
    a, b = _shares(x, weight_x), _shares(y, weight_y)
    within = [
        (s * _row_means(v, v, s, chunk)).sum() / (_off_diagonal(s, name) if unbiased else 1.0)
        for v, s, name in ((x, a, "x"), (y, b, "y"))
    ]
    return 2 * (a * _row_means(x, y, b, chunk)).sum() - within[0] - within[1]


def distance_correlation(
    x: Any, y: Any, weight: Any = None, *, unbiased: bool = False, chunk: int = 2048
) -> Tensor:
    """Distance correlation of x and y over the same events, a scalar without units.

    Arguments:
        x: Values of shape (N,) or (N, D), such as outputs of a network.
        y: Values of shape (N,) or (N, E), such as a continuous nuisance.
        weight: Event weights of shape (N,), not negative.
        unbiased: The bias-corrected *square* of the correlation, which is 0 on average for
            independent x and y and may be negative; without it the correlation, in [0, 1] and of
            order N^(-1/2) for independent ones. Only without weights.
        chunk: Events whose distances to as many others are held at once.

    Returns:
        The correlation, or its square (as `dcor` and `bcdcor` of the R package energy); 0 where x
        or y is constant.

    Raises:
        ValueError: If values are not finite, there is not one y for each x, weights are negative or
            sum to 0, or a bias-corrected one has weights or fewer than four events.

    Example:
        >>> x = torch.linspace(-1, 1, 101)
        >>> round(float(distance_correlation(x, x.square())), 3)
        0.492
    """
    check_positive_int(chunk, "chunk")
    x = as_sample(x, "x")
    y = as_sample(y, "y", like=x)
    weight = sample_weights(weight, x, "weight_x")
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y, n = x.to(dtype), y.to(dtype), len(x)
    if len(y) != n:
        raise ValueError(f"Expected a y of each event of x; got {len(y)} for {n} events.")
    if unbiased and (weight is not None or n < 4):
        raise ValueError(
            "Expected at least four events without weights for the bias-corrected correlation; got "
            f"{n} events{'' if weight is None else ' with weights'}. Set unbiased=False."
        )
    share = _shares(x, weight)
    one, two = (n / (n - 2), n**2 / ((n - 1) * (n - 2))) if unbiased else (1.0, 1.0)
    rows = [_row_means(v, v, share, chunk) for v in (x, y)]
    # centred by rows in the first, by columns in the second
    centred = [(one * r - two * (share * r).sum(), one * r) for r in rows]

    def moments(i: slice, j: slice) -> Tensor:
        a, b = (
            _distances(v[i], v[j]) - row[i, None] - column[j]
            for v, (row, column) in zip((x, y), centred, strict=True)
        )
        if unbiased and i == j:
            a, b = (m - torch.diag(m.diagonal()) for m in (a, b))
        parts = [(share[i] * (m * share[j]).sum(1)).sum() for m in (a * b, a * a, b * b)]
        return torch.stack(parts)

    found = [block for row in _over_blocks(moments, n, n, chunk) for block in row]
    covariance, var_x, var_y = torch.stack(found).sum(0)
    norm = safe_root(var_x) * safe_root(var_y)
    varies = norm > 0
    square = torch.where(varies, covariance / torch.where(varies, norm, 1.0), 0.0)
    return square if unbiased else safe_root(square)


def _shares(sample: Tensor, weight: Tensor | None) -> Tensor:
    """Weights (N,) that sum to one."""
    if weight is None:
        return sample.new_full((len(sample),), 1 / len(sample))
    return weight / weight.sum()


def _off_diagonal(share: Tensor, name: str) -> Tensor:
    """What remains of the sum over pairs without those of an event with itself."""
    remains = 1 - share.square().sum()
    if not bool(remains > 4 * torch.finfo(share.dtype).eps):
        raise ValueError(
            f"Expected at least two events of non-zero weight in {name} for the U-statistic; got "
            f"{int((share != 0).sum())} with (Σw)² − Σw² = {remains.item():.3g} (Σw)². Use larger "
            "batches, or unbiased=False."
        )
    return remains


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances (N, M): by differences, since products of float32 lose those of near events."""
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


def _row_means(x: Tensor, y: Tensor, share: Tensor, chunk: int) -> Tensor:
    """Mean distance (N,) of each x to the y of given shares (M,)."""

    def part(i: slice, j: slice) -> Tensor:
        # elementwise: a matrix product would be rounded under automatic mixed precision
        return (_distances(x[i], y[j]) * share[j]).sum(1)

    rows = _over_blocks(part, len(x), len(y), chunk)
    return torch.cat([torch.stack(row).sum(0) for row in rows])


def _over_blocks(
    part: Callable[[slice, slice], Tensor], n: int, m: int, chunk: int
) -> list[list[Tensor]]:
    """A part of each block of pairs; of several blocks, none is kept for the gradient."""
    rows, columns = (
        [slice(start, start + chunk) for start in range(0, size, chunk)] for size in (n, m)
    )
    if len(rows) == len(columns) == 1 or not torch.is_grad_enabled():
        return [[part(i, j) for j in columns] for i in rows]
    again = partial(checkpoint, part, use_reentrant=False, preserve_rng_state=False)
    return [[again(i, j) for j in columns] for i in rows]
