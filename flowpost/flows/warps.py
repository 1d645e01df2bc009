r"""Warps of the whole sphere in ambient 3-vectors, for densities with fine structure all over it.

A zonal warp moves points along the meridians of an axis a. With :math:`h = |x - a|^2 / 4` and a
rational-quadratic f from [0, 1] onto itself,

.. math:: y = a (1 - 2 f(h)) + x_\perp \sqrt{\frac{f}{h} \frac{1 - f}{1 - h}},
          \qquad \mathrm{ladj} = \ln f'(h),

and a linear one maps x to A x / |A x|, A = exp(S) of determinant 1, with ladj
−3 ln |A x|. Neither needs a
frame, so neither has a pole or a seam.

Source of such maps of spheres: *Normalizing Flows on Tori and Spheres*, D. J. Rezende et al., 2020,
https://arxiv.org/abs/2002.02428.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..spaces._polar import rational_quadratic

__all__ = ["warp", "warp_inverse", "warp_size"]

_LINEAR, _LARGEST = 6, 2.0
_CLOSEST = 1e-12


def warp_size(count: int, bins: int) -> int:
    """Parameters of so many zonal warps of K bins and the linear one: those first, axes last."""
    return _LINEAR + count * (3 * bins + 1) + 3 * count


def _parts(parameters: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """A symmetric matrix (..., 3, 3), splines (..., W, 3K + 1) and unit axes (..., W, 3)."""
    linear, splines, axes = parameters.split(
        [_LINEAR, parameters.shape[-1] - _LINEAR - 3 * count, 3 * count], dim=-1
    )
    linear = _LARGEST * torch.tanh(linear / _LARGEST)
    xx, yy, zz, xy, xz, yz = linear.unbind(-1)
    mean = (xx + yy + zz) / 3
    xx, yy, zz = xx - mean, yy - mean, zz - mean
    matrix = torch.stack([xx, xy, xz, xy, yy, yz, xz, yz, zz], -1).unflatten(-1, (3, 3))
    return (
        matrix,
        splines.unflatten(-1, (count, -1)),
        F.normalize(axes.unflatten(-1, (count, 3)), dim=-1),
    )


def _linear(x: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    y = (torch.linalg.matrix_exp(matrix) @ x[..., None])[..., 0]
    length = y.norm(dim=-1)
    return y / length[..., None], -3 * torch.log(length)


def _zonal(x: Tensor, axis: Tensor, spline: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    h = (((x - axis) ** 2).sum(-1) / 4).clamp(_CLOSEST, 1)
    rest = (((x + axis) ** 2).sum(-1) / 4).clamp(_CLOSEST, 1)
    f, missing, ladj = rational_quadratic(h, rest, spline, inverse)
    across = x - (rest - h)[..., None] * axis
    stretch = torch.sqrt(f / h * (missing / rest))
    y = (missing - f)[..., None] * axis + stretch[..., None] * across
    return F.normalize(y, dim=-1), ladj


def warp(x: Tensor, parameters: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Directions (..., 3) towards the base, and ladj (...).

    Arguments:
        x: Unit vectors, of shape (..., 3).
        parameters: Of shape (..., P), see `warp_size`.
        count: Zonal warps W.
    """
    matrix, splines, axes = _parts(parameters.to(x.dtype), count)
    x, ladj = _linear(x, matrix)
    for i in range(count):
        x, step = _zonal(x, axes[..., i, :], splines[..., i, :], inverse=False)
        ladj = ladj + step
    return x, ladj


def warp_inverse(x: Tensor, parameters: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Inverse of `warp`, with the ladj of that direction."""
    matrix, splines, axes = _parts(parameters.to(x.dtype), count)
    ladj = torch.zeros_like(x[..., 0])
    for i in reversed(range(count)):
        x, step = _zonal(x, axes[..., i, :], splines[..., i, :], inverse=True)
        ladj = ladj + step
    x, step = _linear(x, -matrix)
    return x, ladj + step
