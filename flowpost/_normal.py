"""Distribution functions of the normal base: one coordinate's, and that of ‖u‖²."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["chi2_level", "ndtr"]


def chi2_level(u: Tensor) -> Tensor:
    """Credible level F_χ²_d(‖u‖²) of base coordinates (..., d), of shape (...)."""
    return torch.special.gammainc(u.new_tensor(u.shape[-1] / 2), u.square().sum(-1) / 2)


def ndtr(y: Tensor) -> Tensor:
    """Φ(y), precise to some units of rounding in the lower tail too.

    `torch.special.ndtr` has only absolute precision there: in float32 it is 0 from −6 on.
    """
    return 0.5 * torch.erfc(-y * math.sqrt(0.5))
