"""Independent draws from a smooth density on a box of few dimensions: a grid, then rejection."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

__all__ = ["GridDensity"]

# mass left outside at either end of an axis when the grid closes in on the density
_OUTSIDE = 1e-8


class GridDensity:
    """A density known up to a factor on a box in k dimensions.

    A first grid of half as many cells along each axis finds where in the box the density is, a
    second one covers that part.
    Cells are then drawn with the largest density of a cell and its neighbours and a point
    uniformly within; rejection at the density itself makes the draws exact as long as the cells
    are fine enough for this to be an upper bound.

    Arguments:
        log_density: Takes points, shape (M, k), double precision, returns ln f, shape (M,).
        lower: Lower ends of the box, k numbers.
        upper: Upper ends of the box, k numbers.
        cells: Number of cells along each axis, k = 2 or 3 numbers.
    """

    def __init__(
        self,
        log_density: Callable[[Tensor], Tensor],
        lower: Sequence[float],
        upper: Sequence[float],
        cells: Sequence[int],
    ):
        self._log_density = log_density
        self.lower = torch.tensor(lower, dtype=torch.float64)
        self.upper = torch.tensor(upper, dtype=torch.float64)
        self._cells = tuple(k // 2 for k in cells)
        self._zoom(self._evaluate())
        self._cells = tuple(cells)
        log_f = self._evaluate()
        volume = ((self.upper - self.lower) / torch.tensor(self._cells)).prod()
        self.log_integral = log_f.flatten().logsumexp(0) + volume.log()
        pool = (torch.nn.functional.max_pool3d, torch.nn.functional.max_pool2d)[len(cells) == 2]
        envelope = pool(log_f[None, None], 3, stride=1, padding=1)[0, 0].flatten()
        self._envelope = envelope
        self._cumulative = (envelope - envelope.max()).exp().cumsum(0)

    def _evaluate(self) -> Tensor:
        widths = (self.upper - self.lower) / torch.tensor(self._cells)
        axes = [
            low + (torch.arange(k, dtype=torch.float64) + 0.5) * width
            for low, width, k in zip(self.lower, widths, self._cells, strict=True)
        ]
        points = torch.cartesian_prod(*axes)
        return self._log_density(points).reshape(self._cells)

    def _zoom(self, log_f: Tensor) -> None:
        mass = (log_f - log_f.max()).exp()
        widths = (self.upper - self.lower) / torch.tensor(self._cells)
        lower, upper = self.lower.clone(), self.upper.clone()
        for axis, k in enumerate(self._cells):
            cdf = mass.sum([a for a in range(mass.dim()) if a != axis]).cumsum(0)
            cdf = cdf / cdf[-1]
            first = int((cdf < _OUTSIDE).sum()) - 1
            last = int((cdf < 1 - _OUTSIDE).sum()) + 2
            lower[axis] = self.lower[axis] + max(first, 0) * widths[axis]
            upper[axis] = self.lower[axis] + min(last, k) * widths[axis]
        self.lower, self.upper = lower, upper

    def sample(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw about n points or fewer, shape (≤ n, k): those of n proposals that were accepted."""
        u = torch.rand(n, generator=generator, dtype=torch.float64) * self._cumulative[-1]
        cell = torch.searchsorted(self._cumulative, u, right=True)
        cell = cell.clamp(max=len(self._cumulative) - 1)
        index = torch.stack(torch.unravel_index(cell, self._cells), -1)
        jitter = torch.rand(index.shape, generator=generator, dtype=torch.float64)
        widths = (self.upper - self.lower) / torch.tensor(self._cells)
        points = self.lower + (index + jitter) * widths
        log_ratio = self._log_density(points) - self._envelope[cell]
        accept = torch.rand(n, generator=generator, dtype=torch.float64).log() < log_ratio
        return points[accept]
