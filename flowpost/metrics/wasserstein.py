r"""Wasserstein distances: of one column, and sliced for more.

In one dimension the best transport keeps the order, so that with quantile functions

.. math:: W_p(x, y) = \Big( \int_0^1 \big| F_x^{-1}(t) - F_y^{-1}(t) \big|^p\, dt \Big)^{1/p} .

The quantile functions of weighted samples are steps at the cumulative weights: the integral is a
sum over the steps of both, exact, also for samples of different size. In more dimensions the sliced
distance averages the p-th power over directions :math:`\theta_k` on the unit sphere,

.. math:: SW_p(x, y) = \Big( \frac{1}{P} \sum_k W_p^p(\theta_k \cdot x, \theta_k \cdot y)
          \Big)^{1/p} .

*As a loss on batches it has a price.* Two batches of n events of the same distribution are a
distance apart, for a normal one of width σ

.. math:: \mathbb{E}\, W_1 = 1.82\, \sigma / \sqrt{n} ,

which the network can lower by a smaller σ: it shrinks its outputs. `energy_distance` has no such
term.

Source: N. Bonneel et al., *Sliced and Radon Wasserstein barycenters of measures*, 2015,
https://doi.org/10.1007/s10851-014-0506-3.
"""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .divergence import as_samples, safe_root

__all__ = ["sliced_wasserstein", "wasserstein_1d"]


def wasserstein_1d(
    x: Any, y: Any, weight_x: Any = None, weight_y: Any = None, *, p: float = 1.0
) -> Tensor:
    """Wasserstein distance W_p of two samples of one column, a scalar in the units of x.

    Arguments:
        x: Sample of shape (N,) or (N, 1).
        y: Sample of shape (M,) or (M, 1).
        weight_x: Event weights of shape (N,), not negative.
        weight_y: Event weights of shape (M,), not negative.
        p: Power of the cost, at least 1.

    Raises:
        ValueError: If samples are not finite or have several columns, weights are negative or sum
            to 0, or p is below 1.

    Example:
        >>> x = torch.arange(6.0)
        >>> float(wasserstein_1d(x, x[::2] + 3))
        2.5
    """
    x, y, weight_x, weight_y = as_samples(x, y, weight_x, weight_y)
    if x.shape[1] != 1:
        raise ValueError(
            f"Expected samples of one column; got {x.shape[1]}. Give one column at a time, or use "
            "sliced_wasserstein or energy_distance."
        )
    _check_power(p)
    return safe_root(_power(x.T, y.T, weight_x, weight_y, p)[0], p)


def sliced_wasserstein(
    x: Any,
    y: Any,
    weight_x: Any = None,
    weight_y: Any = None,
    *,
    p: float = 2.0,
    projections: int | Tensor = 50,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Sliced Wasserstein distance of two samples, a scalar in the units of x.

    Arguments:
        x: Sample of shape (N, D).
        y: Sample of shape (M, D).
        weight_x: Event weights of shape (N,), not negative.
        weight_y: Event weights of shape (M,), not negative.
        p: Power of the cost, at least 1.
        projections: How many random directions, or the directions themselves, of shape (P, D);
            they are used as they are. `torch.eye(D)` and p = 1: the mean over the columns.
        generator: Of the random directions; new ones are drawn at every call.

    Raises:
        ValueError: If samples, weights or directions do not fit, weights are negative or sum to 0,
            or p is below 1.
    """
    x, y, weight_x, weight_y = as_samples(x, y, weight_x, weight_y)
    _check_power(p)
    directions = _directions(projections, x, generator)
    # a sum of products instead of a matrix product, which automatic mixed precision would round
    along_x, along_y = ((directions[:, None] * s).sum(-1) for s in (x, y))
    return safe_root(_power(along_x, along_y, weight_x, weight_y, p).mean(), p)


def _check_power(p: float) -> None:
    if not 1 <= p < float("inf"):
        raise ValueError(f"Expected p as a number of at least 1; got {p!r}.")


def _directions(projections: int | Tensor, x: Tensor, generator: torch.Generator | None) -> Tensor:
    if isinstance(projections, Integral):
        projections = check_positive_int(projections, "projections")
        device = x.device if generator is None else generator.device
        shape = (projections, x.shape[1])
        draws = torch.randn(shape, dtype=x.dtype, device=device, generator=generator)
        return torch.nn.functional.normalize(draws, dim=-1).to(x.device)
    directions = as_tensor(projections, "projections", like=x).to(x)
    check_shape(directions, ("P", x.shape[1]), "projections", "One direction a row.")
    check_finite(directions, "projections")
    if not len(directions):
        raise ValueError("Expected at least one direction; got none.")
    return directions


def _power(x: Tensor, y: Tensor, wx: Tensor | None, wy: Tensor | None, p: float) -> Tensor:
    """W_p^p of each row of x (P, N) and y (P, M), of shape (P,)."""
    x, order_x = x.sort(-1)
    y, order_y = y.sort(-1)
    if wx is None and wy is None and x.shape == y.shape:
        return _cost(x - y, p).mean(-1)
    levels_x, levels_y = _levels(x, order_x, wx), _levels(y, order_y, wy)
    ends = torch.cat([levels_x, levels_y], -1).sort(-1).values
    steps = ends.diff(dim=-1, prepend=torch.zeros_like(ends[:, :1]))
    difference = _quantiles(x, levels_x, ends) - _quantiles(y, levels_y, ends)
    return (steps * _cost(difference, p)).sum(-1)


def _cost(difference: Tensor, p: float) -> Tensor:
    if p == 2:
        return difference.square()
    return difference.abs() if p == 1 else difference.abs() ** p


def _levels(ordered: Tensor, order: Tensor, weight: Tensor | None) -> Tensor:
    """Cumulative weights of the ordered events, ending at 1."""
    if weight is None:
        n = ordered.shape[-1]
        steps = torch.arange(1, n + 1, dtype=ordered.dtype, device=ordered.device)
        return (steps / n).expand(ordered.shape).contiguous()
    total = weight[order].cumsum(-1)
    return total / total[:, -1:]


def _quantiles(ordered: Tensor, levels: Tensor, at: Tensor) -> Tensor:
    index = torch.searchsorted(levels.detach().contiguous(), at.detach().contiguous())
    return ordered.gather(-1, index.clamp(max=ordered.shape[-1] - 1))
