r"""Highest-density regions of two labels, from a grid or from draws, as the plots show them.

The region of credible level p is :math:`\{z : q(z) \ge t_p\}` with the threshold :math:`t_p` found
from

.. math:: \int q(z) \, 1[q(z) \ge t_p] \, \mathrm{d}z = p .

On a grid that is a cumulative sum over sorted cells. From draws, q is a smoothed histogram
:math:`\hat q` and :math:`t_p` the (1 − p) quantile of :math:`\hat q` at the draws themselves, each
left out of its own density: the region then holds the share p of the *unsmoothed* posterior, so
smoothing does not inflate it. Its bandwidth is the widest of (nearly) the highest leave-one-out
likelihood, and wider where draws are sparse, on a grid sheared along the correlation; densities are
renormalised at the ends of the draws. So neither narrow nor curved nor bounded posteriors leak out.

Sources: R. J. Hyndman, *Computing and graphing highest density regions*, 1996,
https://doi.org/10.1080/00031305.1996.10474359 (threshold from draws); I. S. Abramson, *On bandwidth
variation in kernel estimates*, 1982, https://doi.org/10.1214/aos/1176345986; M. C. Jones, *Simple
boundary correction for kernel density estimation*, 1993, https://doi.org/10.1007/BF00147776.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor

from flowpost._checks import as_tensor, check_finite

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "FEWEST",
    "Region",
    "check_levels",
    "draws_region",
    "grid_region",
    "mass_threshold",
]

_CELLS = (192, 576)  # the finer grid where the coarse one cannot resolve the best bandwidth
_BANDWIDTHS = (3.0, 2.0, 1.5, 1.0, 0.7, 0.5, 0.35, 0.25, 0.17, 0.12, 0.08, 0.05, 0.03)  # × Scott's
_LOSS = 0.01  # nats of likelihood given up for a smoother density
_WIDER = 2  # doublings of a kernel where draws are sparse
_TAIL = 0.02  # of the mass outside the largest region, cut from the grid at either end
_MARGIN = 0.1  # of the range, beyond that
_SHEAR = 0.5  # correlation from which the grid follows it
FEWEST = 100


@dataclass(frozen=True)
class Region:
    """A density on a grid, as a share of its maximum, with the thresholds of credible levels.

    Attributes:
        x: Cell centres of the first label, of shape (Y, X).
        y: Cell centres of the second label, of shape (Y, X).
        density: Density over its maximum, of shape (Y, X), zero around its rim.
        levels: Credible levels.
        thresholds: Density over its maximum at the rim of each level's region.
    """

    x: np.ndarray
    y: np.ndarray
    density: np.ndarray
    levels: tuple[float, ...]
    thresholds: tuple[float, ...]

    def window(self, level: float | None = None) -> tuple[float, float, float, float]:
        """Lower and upper x, lower and upper y of a level's region, by default the largest."""
        level = max(self.levels) if level is None else level
        inside = self.density >= self.thresholds[self.levels.index(level)]
        x, y = self.x[inside], self.y[inside]
        return float(x.min()), float(x.max()), float(y.min()), float(y.max())

    def contour(self, ax: Axes, level: float, **style: Any) -> Any:
        """Draw the rim of the region of one of the levels; style as of `Axes.contour`."""
        threshold = self.thresholds[self.levels.index(level)]
        return ax.contour(self.x, self.y, self.density, levels=[threshold], **style)

    def fill(self, ax: Axes, level: float, **style: Any) -> Any:
        """Fill the region of one of the levels; style as of `Axes.contourf`."""
        threshold = self.thresholds[self.levels.index(level)]
        return ax.contourf(self.x, self.y, self.density, levels=[threshold, 1.1], **style)


def mass_threshold(density: Any, levels: float | Sequence[float], cell: Any = 1.0) -> Tensor:
    """Density from which upward cells hold the share `level` of all mass.

    Arguments:
        density: Non-negative density of each cell, of any shape; its normalisation is free.
        levels: Credible levels in (0, 1), m of them.
        cell: Area of each cell, broadcast to `density`, where they differ.

    Returns:
        Thresholds of shape (m,), float64.

    Raises:
        ValueError: If a level is not in (0, 1), or the density is negative, not finite or zero.

    Example:
        >>> mass_threshold([0.1, 0.2, 0.4, 0.2, 0.1], 0.5)
        tensor([0.2000], dtype=torch.float64)
    """
    wanted = torch.tensor(check_levels(levels), dtype=torch.float64)
    values = as_tensor(density, "density").detach().double().cpu()
    check_finite(values, "density")
    area = as_tensor(cell, "cell").double().cpu().expand(values.shape).reshape(-1)
    values = values.reshape(-1)
    if not len(values) or float(values.min()) < 0 or float(values.max()) == 0:
        raise ValueError(
            "Expected a density of 0 or more in each cell and more in some; got "
            + (
                f"values from {float(values.min()):g} to {float(values.max()):g}."
                if len(values)
                else "no cells."
            )
            + " Pass the density, not its logarithm, on a grid that holds the posterior."
        )
    ranked, order = values.sort(descending=True, stable=True)
    mass = ranked * area[order]
    # a cell's own density stands for the middle of its mass
    inside = (mass.cumsum(0) - mass / 2) / mass.sum()
    return torch.as_tensor(np.interp(wanted.numpy(), inside.numpy(), ranked.numpy()))


def grid_region(x: Any, y: Any, density: Any, levels: Sequence[float] = (0.68, 0.9)) -> Region:
    """Regions of a density that is known on a grid.

    Arguments:
        x: Cell centres of the first label, increasing, of shape (X,).
        y: Cell centres of the second label, increasing, of shape (Y,).
        density: Density of shape (Y, X), rows of equal y; its normalisation is free.
        levels: Credible levels in (0, 1).

    Raises:
        ValueError: If shapes do not fit, centres do not increase or the density is no density.
    """
    axes = [as_tensor(t, name).detach().double().cpu() for t, name in ((x, "x"), (y, "y"))]
    density = as_tensor(density, "density").detach().double().cpu()
    for t, name in zip(axes, "xy", strict=True):
        if t.ndim != 1 or len(t) < 3 or not bool((t.diff() > 0).all()):
            raise ValueError(
                f"Expected {name} as at least 3 increasing cell centres; got shape "
                f"{tuple(t.shape)}. Pass the axis of the grid, not a mesh."
            )
    if density.shape != (len(axes[1]), len(axes[0])):
        raise ValueError(
            f"Expected density of shape ({len(axes[1])}, {len(axes[0])}), rows of equal y; got "
            f"{tuple(density.shape)}. Transpose it if its rows are of equal x."
        )
    width, height = (torch.as_tensor(np.gradient(t.numpy())) for t in axes)
    thresholds = mass_threshold(density, levels, height[:, None] * width)
    x, y = np.meshgrid(_rim(axes[0].numpy()), _rim(axes[1].numpy()))
    return _region(x, y, density.numpy(), levels, thresholds.numpy())


def draws_region(draws: Any, levels: Sequence[float] = (0.68, 0.9)) -> Region:
    """Regions of a density that is known by its draws; see the module for how they are smoothed.

    Modes narrower than about a hundredth of the distance between them are below the grid and come
    out too wide.

    Arguments:
        draws: Draws of two labels, of shape (S, 2), at least 100.
        levels: Credible levels in (0, 1).

    Raises:
        ValueError: If there are too few draws, they are not finite or do not vary.
    """
    z = as_tensor(draws, "draws").detach().double().cpu()
    if z.ndim != 2 or z.shape[1] != 2 or len(z) < FEWEST:
        raise ValueError(
            f"Expected draws of shape (S, 2) with S of at least {FEWEST}; got {tuple(z.shape)}."
        )
    check_finite(z, "draws")
    levels = check_levels(levels)
    frame = _frame(z.numpy(), max(levels))
    grid = _Histogram.of(frame, _CELLS[0])
    field, at_draws, width, resolved = grid.smooth()
    if not resolved:
        grid = _Histogram.of(frame, _CELLS[1])
        field, at_draws, *_ = grid.smooth(width)
    thresholds = np.quantile(at_draws, [1 - p for p in levels])
    x, y = frame.back(*np.meshgrid(_rim(grid.v), _rim(grid.w)))
    return _region(x, y, field, levels, thresholds)


def _region(
    x: np.ndarray, y: np.ndarray, density: np.ndarray, levels: Sequence[float], cuts: np.ndarray
) -> Region:
    top = density.max()
    # strictly inside (0, 1), so that each level has a contour however coarse the grid
    shares = np.clip(cuts / top, 1e-12, 1 - 1e-9)
    padded = np.pad(density / top, 1)
    return Region(x, y, padded, tuple(levels), tuple(float(t) for t in shares))


def _rim(centres: np.ndarray) -> np.ndarray:
    """Cell centres between the outer edges, where the density is zero and contours close."""
    first, last = centres[1] - centres[0], centres[-1] - centres[-2]
    return np.concatenate([[centres[0] - first / 2], centres, [centres[-1] + last / 2]])


@dataclass(frozen=True)
class _Frame:
    """Draws in units of their spread, (v, w) = ((x − x0)/a, (y − y0 − b (x − x0))/c)."""

    draws: np.ndarray  # (S, 2), in the frame
    centre: np.ndarray
    unit: np.ndarray
    shear: float
    low: np.ndarray  # ends of the draws, as labels
    high: np.ndarray
    window: np.ndarray  # (2, 2), lower and upper ends of v and w on the grid

    def back(self, v: np.ndarray, w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels at points of the frame."""
        x = self.centre[0] + self.unit[0] * v
        return x, self.centre[1] + self.shear * self.unit[0] * v + self.unit[1] * w


def _frame(z: np.ndarray, largest: float) -> _Frame:
    tail = _TAIL * (1 - largest)
    low, high = np.quantile(z, [tail, 1 - tail], axis=0)
    if not ((high > low).all()):
        column = int(np.argmin(high - low))
        raise ValueError(
            f"Expected draws that vary; got {z[0, column]:g} throughout in column {column}. Use "
            "double precision if the posterior is narrower than its labels' rounding."
        )
    bulk = z[((z >= low) & (z <= high)).all(1)]
    centre = bulk.mean(0)
    spread = bulk.std(0)
    slope = float(((bulk - centre) / spread).prod(1).mean())
    shear = slope * spread[1] / spread[0] if abs(slope) > _SHEAR else 0.0
    rest = (bulk - centre)[:, 1] - shear * (bulk - centre)[:, 0]
    unit = np.array([spread[0], max(rest.std(), 1e-6 * spread[1])])
    shifted = z - centre
    draws = np.stack([shifted[:, 0], shifted[:, 1] - shear * shifted[:, 0]], 1) / unit
    start, stop = np.quantile(draws, [tail, 1 - tail], axis=0)
    margin = _MARGIN * (stop - start)
    start = np.maximum(start - margin, draws.min(0))
    stop = np.minimum(stop + margin, draws.max(0))
    window = np.stack([start, stop], 1)
    return _Frame(draws, centre, unit, shear, z.min(0), z.max(0), window)


@dataclass(frozen=True)
class _Histogram:
    """Counts of draws on a grid of the frame, and the part of the grid that labels can reach."""

    v: np.ndarray
    w: np.ndarray
    index: np.ndarray  # cell of each draw on the grid
    outside: int  # draws beyond the grid
    counts: np.ndarray  # (W, V)
    reach: np.ndarray  # (W, V)

    @classmethod
    def of(cls, frame: _Frame, cells: int) -> _Histogram:
        start, stop = frame.window.T
        cell = (stop - start) / cells
        at = np.floor((frame.draws - start) / cell)
        # the largest draw may end the grid
        at = np.where((at == cells) & (frame.draws <= stop), cells - 1, at)
        on = ((at >= 0) & (at < cells)).all(1)
        index = (at[on, 1] * cells + at[on, 0]).astype(np.int64)
        counts = np.bincount(index, minlength=cells**2).reshape(cells, cells).astype(float)
        v, w = (start[i] + cell[i] * (np.arange(cells) + 0.5) for i in range(2))
        x, y = frame.back(*np.meshgrid(v, w))
        reach = (x >= frame.low[0]) & (x <= frame.high[0])
        reach &= (y >= frame.low[1]) & (y <= frame.high[1])
        reach |= counts > 0
        return cls(v, w, index, int((~on).sum()), counts, reach.astype(float))

    def smooth(self, widest: float = np.inf) -> tuple[np.ndarray, np.ndarray, float, bool]:
        """The density of the best bandwidth, on the grid and, left out, at each draw.

        Also that bandwidth, of those up to `widest`, and whether the grid resolves it.
        """
        total = len(self.index) + self.outside
        finest = max(self.w[1] - self.w[0], self.v[1] - self.v[0])
        widths = [f * total ** (-1 / 6) for f in _BANDWIDTHS if f * total ** (-1 / 6) <= widest]
        one = np.ones(len(self.index))
        tried = [self._field(w, one) for w in widths if w > finest] or [self._field(finest, one)]
        scores = np.array([self._score(left) for _, left in tried])
        first = int(np.argmax(scores >= scores.max() - _LOSS))
        field, left = tried[first]
        resolved = first < len(tried) - 2 or len(tried) == len(widths)
        width = widths[first] if widths[first] > finest else finest
        # wider kernels where draws are sparse, unless that blurs the density
        factor = np.exp((np.log(left + 1e-9).mean() - np.log(left + 1e-9)) / 2)
        steps = 2.0 ** np.clip(np.round(np.log2(factor)), 0, _WIDER)
        wider, at_draws = self._field(width, steps)
        if self._score(at_draws) >= scores.max() - _LOSS:
            field, left = wider, at_draws
        return field, np.concatenate([left, np.zeros(self.outside)]), width, resolved

    def _score(self, left: np.ndarray) -> float:
        """Leave-one-out likelihood; the floor bounds what a draw far from all others costs."""
        total = len(self.index) + self.outside
        return float(np.log(left + 1e-3 * total / self.counts.size).mean())

    def _field(self, width: float, factors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Density of kernels of `width` times each draw's factor: on the grid, and left out."""
        from scipy.ndimage import gaussian_filter

        field, own = np.zeros_like(self.counts), np.empty(len(self.index))
        cell = np.array([self.w[1] - self.w[0], self.v[1] - self.v[0]])
        for factor in np.unique(factors):
            some = factors == factor
            sigma = factor * width / cell
            counts = np.bincount(self.index[some], minlength=self.counts.size).astype(float)
            counts = counts.reshape(self.counts.shape)
            part = gaussian_filter(counts, sigma, mode="constant", truncate=3.5)
            norm = np.where(self.reach > 0, self._kernel_mass(sigma), 1)
            field += np.where(self.reach > 0, part / norm, 0)
            own[some] = 1 / (2 * np.pi * sigma.prod() * norm.flat[self.index[some]])
        return field, np.clip(field.flat[self.index] - own, 0, None)

    def _kernel_mass(self, sigma: np.ndarray) -> np.ndarray:
        """Share of each cell's kernel that labels can reach, of shape (W, V)."""
        from scipy.ndimage import gaussian_filter, gaussian_filter1d

        if not self.reach.all():
            return cast(
                "np.ndarray", gaussian_filter(self.reach, sigma, mode="constant", truncate=3.5)
            )
        ones = np.ones(len(self.v))
        w, v = (gaussian_filter1d(ones, s, mode="constant", truncate=3.5) for s in sigma)
        return cast("np.ndarray", np.outer(w, v))


def check_levels(levels: float | Sequence[float]) -> tuple[float, ...]:
    """Credible levels as a tuple, each checked to be in (0, 1)."""
    values = (levels,) if isinstance(levels, (int, float)) else tuple(float(p) for p in levels)
    if not values or not all(0 < p < 1 for p in values):
        raise ValueError(f"Expected levels between 0 and 1; got {list(values)}.")
    return values
