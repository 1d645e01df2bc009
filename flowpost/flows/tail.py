r"""The tail: what a far outlier costs.

.. math:: t(u) = u \;\text{for}\; |u| \le B, \qquad
          t(u) = \pm\,(B + \mathrm{expm1}(|u| - B)) \;\text{beyond.}

Gaussians are contained within the bound, the inverse is closed (``log1p``), and a residual of 10⁴
standard deviations costs about 110 nats where the Gaussian takes 5·10⁷.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["tail", "tail_inverse"]

# expm1 of more than this overflows float32; normal draws never come near
_LARGEST_EXCESS = 80.0


def tail(u: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Stretch base coordinates (..., d) beyond the bound, with ladj (..., d)."""
    excess = (u.abs() - bound).clamp(0, _LARGEST_EXCESS)
    return u.clamp(-bound, bound) + torch.copysign(torch.expm1(excess), u), excess


def tail_inverse(t: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Inverse of `tail`, with the ladj (..., d) of that direction."""
    excess = torch.log1p((t.abs() - bound).clamp_min(0))
    return t.clamp(-bound, bound) + torch.copysign(excess, t), -excess
