r"""Closed-form maps between a plane and the sphere, stable from arc-seconds to the whole sky.

Polar angles are carried as :math:`h = \sin^2(\theta/2)` and :math:`1 - h`, each from the side on
which it does not cancel.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["log1mexp", "plane_to_vmf", "vmf_ladj", "vmf_to_plane", "zoom"]

_LOG_2 = math.log(2)


def log1mexp(a: Tensor) -> Tensor:
    """ln(1 − e^(−a)) for a > 0.

    Source: *Accurately computing log(1 − exp(−|a|))*, M. Mächler, 2012,
    https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf.
    """
    small = a < _LOG_2
    near = torch.log(-torch.expm1(-torch.where(small, a, 1.0)))
    far = torch.log1p(-torch.exp(-torch.where(small, 1.0, a)))
    return torch.where(small, near, far)


def plane_to_vmf(half: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """h = sin²(θ/2) and 1 − h of a von Mises–Fisher density, of r²/2 in a standard normal plane.

    Both have the same quantile: 1 − exp(−r²/2) is the share of the vMF within θ of its axis.
    """
    near = half < _LOG_2
    inner, outer = torch.where(near, half, 0.1), torch.where(near, 1.0, half)
    v = -torch.log1p(torch.expm1(-inner) * -torch.expm1(-2 * kappa)) / kappa
    rest = torch.log1p(torch.exp(-outer) * torch.expm1(2 * kappa)) / kappa
    return torch.where(near, v, 2 - rest) / 2, torch.where(near, 2 - v, rest) / 2


def vmf_to_plane(h: Tensor, rest: Tensor, kappa: Tensor) -> Tensor:
    """r²/2 of h = sin²(θ/2) and rest = 1 − h; the inverse of `plane_to_vmf`."""
    share = torch.expm1(-2 * kappa * h) / torch.expm1(-2 * kappa)
    near = share < 0.5
    inner = -torch.log1p(-torch.where(near, share, 0.25))
    edge = torch.where(near, 0.5, rest).clamp_min(torch.finfo(h.dtype).tiny)
    outer = 2 * kappa * h - log1mexp(2 * kappa * edge) + log1mexp(2 * kappa)
    return torch.where(near, inner, outer)


def vmf_ladj(h: Tensor, half: Tensor, kappa: Tensor) -> Tensor:
    """ln |d plane / d steradian|: the vMF's log density less that of the plane."""
    return torch.log(kappa) - log1mexp(2 * kappa) - 2 * kappa * h + half


def zoom(h: Tensor, rest: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tan(θ'/2) = t tan(θ/2) on h and 1 − h, with ln of the growth of the solid angle."""
    t = torch.exp(log_t)
    # for a large t both terms are divided by t², which would overflow float32
    large = log_t > 0
    a = torch.where(large, rest / torch.where(large, t, 1.0) ** 2, rest)
    b = torch.where(large, h, h * torch.where(large, 1.0, t) ** 2)
    total = a + b
    growth = torch.where(large, -2 * log_t, 2 * log_t) - 2 * torch.log(total)
    return b / total, a / total, growth
