r"""The rational-quadratic spline of `flowpost.flows`, for many columns at once.

The same map of the same parameters as `flowpost.flows.spline`, but the bin is found before anything
else is computed, so that most of the arithmetic is done for one bin of each column instead of all;
and its inverse brings its log-derivative along. A draw of a student spends most of its time here.

Source: *Neural Spline Flows*, C. Durkan, A. Bekasov, I. Murray, G. Papamakarios, 2019,
https://arxiv.org/abs/1906.04032.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["bend"]

# the least slope between knots and at them, of its logarithm
_SLOPE = math.log(1e-3)


def bend(
    v: Tensor, parameters: Tensor, bound: float, inverse: bool = False
) -> tuple[Tensor, Tensor]:
    """Bend values, the identity beyond the bound.

    Arguments:
        v: Values of any shape (...).
        parameters: Widths, heights and slopes, shape (..., 3K − 1).
        bound: The spline maps [−bound, bound] onto itself.
        inverse: Take the other direction.

    Returns:
        Values and log-derivatives of the direction taken, shape (...) each.
    """
    bins = (parameters.shape[-1] + 1) // 3
    # bounded, so that the exponentials need no largest value taken out
    sizes = parameters[..., : 2 * bins]
    sizes = (sizes / (1 + (sizes * (2 / _SLOPE)).abs())).exp()
    widths, heights = sizes[..., :bins], sizes[..., bins:]
    right, upper = widths.cumsum(-1), heights.cumsum(-1)
    knots = upper if inverse else right
    inside = v.abs() < bound
    target = (v.clamp(-bound, bound) / (2 * bound) + 0.5) * knots[..., -1]
    k = (knots[..., :-1] < target[..., None]).sum(-1, keepdim=True)

    def pick(t: Tensor) -> Tensor:
        return t.gather(-1, k)[..., 0]

    slopes = F.pad(parameters[..., 2 * bins :], (1, 1))
    left, end = pick(slopes), slopes.gather(-1, k + 1)[..., 0]
    left = (left / (1 + (left / _SLOPE).abs())).exp()
    end = (end / (1 + (end / _SLOPE).abs())).exp()
    wide, high = 2 * bound / right[..., -1], 2 * bound / upper[..., -1]
    dx, dy = pick(widths) * wide, pick(heights) * high
    x0, y0 = pick(right) * wide - dx - bound, pick(upper) * high - dy - bound
    s = dy / dx
    curvature = left + end - 2 * s
    if inverse:
        y = torch.where(inside, v - y0, 0.0)
        a = dy * (s - left) + y * curvature
        b = dy * left - y * curvature
        # b² − 4ac is positive for a monotone spline; in float32 it can round to below zero
        root = (b * b + 4 * a * s * y).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        t = (2 * s * y / (b + root)).clamp(0, 1)
        out = x0 + t * dx
    else:
        t = torch.where(inside, (v - x0) / dx, 0.0)
    between = t * (1 - t)
    below = s + curvature * between
    if not inverse:
        out = y0 + dy * (s * t * t + left * between) / below
    slope = s * s * (2 * s * between + left * (1 - t) ** 2 + end * t * t) / (below * below)
    ladj = torch.where(inside, slope, 1.0).log()
    return torch.where(inside, out, v), -ladj if inverse else ladj
