"""Cells of a calorimeter's layers, and the special functions of their law."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

__all__ = ["cells", "kinds", "legendre", "log_gammainc"]


def cells(count: int, half: float) -> Tensor:
    """Integrals of the normal density over `count` equal cells between −half and half."""
    edges = torch.linspace(-half, half, count + 1, dtype=torch.float64)
    low, high = edges[:-1], edges[1:]
    # where both ends are positive, the difference of the upper tails is the accurate one
    mirrored = low > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    return torch.special.ndtr(high) - torch.special.ndtr(low)


def kinds(shape: tuple[tuple[int, int], ...]) -> Tensor:
    """A number for each voxel, the same for cells of a layer that mirror each other."""
    numbers: list[Tensor] = []
    for layer, (rows, columns) in enumerate(shape):
        i, j = (torch.arange(n) for n in (rows, columns))
        i, j = torch.minimum(i, i.flip(0)), torch.minimum(j, j.flip(0))
        numbers.append((1000 * layer + 30 * i[:, None] + j).flatten())
    return torch.cat(numbers).unique(return_inverse=True)[1]


def log_gammainc(alpha: Tensor, x: float) -> Tensor:
    """ln P(α, x) by the series of positive terms, also where P is below the smallest number."""
    term, total = torch.ones_like(alpha), torch.ones_like(alpha)
    largest, k = 1.0, 0
    while largest > 1e-17 or k < x:
        k += 1
        largest *= x / k
        term = term * x / (alpha + k)
        total = total + term
    return alpha * math.log(x) - x - torch.lgamma(alpha + 1) + total.log()


def legendre(
    low: Tensor, high: Tensor, nodes: int, cuts: tuple[float, ...]
) -> tuple[Tensor, Tensor]:
    """Nodes and weights (N, nodes) between low and high, in panels that end at the cuts.

    Panels of no length get nodes of no weight.
    """
    ends = [low, *(low.new_tensor(c).clamp(low, high) for c in cuts), high]
    count = nodes // 2
    t, w = (low.new_tensor(v) for v in np.polynomial.legendre.leggauss(count))
    grid, weight = [], []
    for a, b in pairwise(ends):
        half = (b - a)[:, None] / 2
        grid.append(a[:, None] + half * (1 + t))
        weight.append((half * w).clamp_min(0))
    return torch.cat(grid, 1), torch.cat(weight, 1)
