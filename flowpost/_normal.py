"""The normal distribution in the tails, where torch's float32 functions lose it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["ndtr"]


def ndtr(y: Tensor) -> Tensor:
    """Φ(y), precise to some units of rounding in the lower tail too.

    `torch.special.ndtr` has only absolute precision there: in float32 it is 0 from −6 on.
    """
    return 0.5 * torch.erfc(-y * math.sqrt(0.5))
