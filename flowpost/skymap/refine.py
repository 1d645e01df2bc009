r"""Cells that resolve a density on the sphere, however narrow: seeded by draws, refined by value.

With P(c) = q(centre of c) · area(c), the children of a cell c are split further where the larger of

.. math:: \tfrac13 \Big| P(c) - \sum_i P(c_i) \Big|, \qquad
   \max_i P(c_i) \Big( \frac{\sinh a}{a} - 1 \Big), \quad
   a = \tfrac12 \ln \frac{\max_i q(c_i)}{\min_i q(c_i)}

exceeds the tolerance, or three times it beyond 80 000 densities. The first is Richardson's estimate
of the children's midpoint error, which falls with the square of the cell size; the second is that
error in a tail, where the density falls exponentially across a cell and all five midpoints may see
next to nothing.

From a fixed grid either rule misses what is narrower than the grid: every term is zero. So the tree
first follows S of the posterior's own draws s, down to cells that hold n of them, at most 8, and
where q(s) · area(c) ≤ 4 n/S for each: the densities of the draws promise no more than a few times
the probability that their number does. A mode that a single draw has hit, in whatever cell of
others, is then about five of its widths across, and the rules above take over. Last, a cell of more
than the tolerance makes a neighbour split that is at least four times as large and less than half
as dense: a peak beside the edge of a large empty cell goes on inside it.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np

from .cells import MAX_ORDER, area, centres, children, first, index_of, neighbours, width

__all__ = ["Cells", "refine"]

_PER_CELL = 8  # draws
_STEEPEST = 6.0  # nats per half cell; beyond, the Gaussian tail bends away from the exponential
_PROMISE = 4.0
# densities beyond which the tolerance is larger, and how much: a ring of 3′ about a pole took
# 155 000 without, and its integral is 0.9994 with it
_MANY, _LAX = 80_000, 3.0

Density = Callable[[np.ndarray], np.ndarray]
_Three = tuple[np.ndarray, np.ndarray, np.ndarray]


@dataclass(frozen=True)
class Cells:
    """Cells that cover the sky once, sorted along the nested curve, with their mass.

    Attributes:
        order: Orders (M,), int64.
        pixel: Nested pixels (M,), int64.
        mass: Density at the centre times area, before normalisation (M,).
        evaluations: How many densities were evaluated.
    """

    order: np.ndarray
    pixel: np.ndarray
    mass: np.ndarray
    evaluations: int


class _Counted:
    """Mass of cells under a density, counting its evaluations."""

    def __init__(self, density: Density, most: int) -> None:
        self.density, self.evaluations, self.most = density, 0, most
        self.stopped = False

    def __call__(self, order: np.ndarray, pixel: np.ndarray) -> np.ndarray:
        return self.at(centres(order, pixel)) * area(order)

    def room(self, count: int) -> bool:
        """Whether so many more are allowed."""
        self.stopped |= self.evaluations + count > self.most
        return not self.stopped

    def at(self, vectors: np.ndarray) -> np.ndarray:
        self.evaluations += len(vectors)
        return self.density(vectors)


def refine(
    density: Density, draws: np.ndarray, tolerance: float = 5e-6, max_evaluations: int = 1_000_000
) -> Cells:
    """Return cells that resolve a density.

    Arguments:
        density: From unit vectors (P, 3) to density per steradian (P,).
        draws: Unit vectors (S, 3) that follow the density.
        tolerance: Estimated error of the probability of four children that splits these.
        max_evaluations: Where to stop.

    Warns:
        UserWarning: If refinement stopped at `max_evaluations`.
    """
    mass = _Counted(density, max_evaluations)
    order, pixel = _seed(mass, draws)
    found = _divide(mass, order, pixel, mass(order, pixel), tolerance)
    asks = found[2] > tolerance
    while True:
        rank = np.argsort(first(found[0], found[1]))
        found, asks = (found[0][rank], found[1][rank], found[2][rank]), asks[rank]
        asking, coarse = _beside(*found, np.flatnonzero(asks))
        if not len(coarse) or mass.stopped:
            break
        order, pixel, value = (a[coarse] for a in found)
        parts = _divide(mass, order, pixel, value, tolerance)
        # cells whose neighbours satisfy them stay satisfied: others only get finer
        asks = np.isin(np.arange(len(asks)), asking)
        keep = ~np.isin(np.arange(len(asks)), coarse)
        asks = np.concatenate([asks[keep], parts[2] > tolerance])
        order, pixel, value = (
            np.concatenate([old[keep], new]) for old, new in zip(found, parts, strict=True)
        )
        found = (order, pixel, value)
    if mass.stopped:
        warnings.warn(
            f"The sky map stopped refining at {mass.evaluations} density evaluations and may be "
            "coarse. Raise max_evaluations or tolerance.",
            stacklevel=4,
        )
    return Cells(*found, mass.evaluations)


def _divide(
    mass: _Counted, order: np.ndarray, pixel: np.ndarray, value: np.ndarray, tolerance: float
) -> _Three:
    """Descendants of cells (M,) that the tolerance asks for, their children at least."""
    done = []
    while len(order):
        if not mass.room(4 * len(order)):
            break
        finest = order == MAX_ORDER
        done.append((order[finest], pixel[finest], value[finest]))
        parent, order, pixel = value[~finest], *children(order[~finest], pixel[~finest])
        value = mass(order, pixel)
        most = tolerance * (_LAX if mass.evaluations > _MANY else 1.0)
        split = np.repeat(_error(parent, value.reshape(-1, 4)) > most, 4)
        done.append((order[~split], pixel[~split], value[~split]))
        order, pixel, value = order[split], pixel[split], value[split]
    done.append((order, pixel, value))
    order, pixel, value = (np.concatenate(column) for column in zip(*done, strict=True))
    return order, pixel, value


def _beside(
    order: np.ndarray, pixel: np.ndarray, value: np.ndarray, wanting: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Which of the cells `wanting` touch a much larger and emptier cell, and those cells."""
    start, density = first(order, pixel), value / area(order)
    asking, coarse = [wanting[:0]], [wanting[:0]]
    for k in np.unique(order[wanting]):
        cell = wanting[order[wanting] == k]
        touching = neighbours(int(k), pixel[cell])
        at = np.searchsorted(start, touching * width(k), side="right") - 1
        larger = (touching >= 0) & (order[at] <= k - 2) & (density[at] < density[cell] / 2)
        asking.append(cell[larger.any(0)])
        coarse.append(at[larger])
    return np.concatenate(asking), np.unique(np.concatenate(coarse))


def _error(parent: np.ndarray, value: np.ndarray) -> np.ndarray:
    """Estimated error (M,) of the mass of children (M, 4), given their parents' (M,)."""
    high, low = value.max(1), value.min(1)
    seen = high > 0
    ratio = np.divide(low, high, out=np.ones_like(high), where=seen)
    slope = np.clip(-0.5 * np.log(np.maximum(ratio, 1e-300)), 1e-6, _STEEPEST)
    tail = high * (np.sinh(slope) / slope - 1)
    return cast("np.ndarray", np.maximum(np.abs(parent - value.sum(1)) / 3, tail))


def _seed(mass: _Counted, draws: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cells that follow the draws, in number and in density."""
    index, at = np.unique(index_of(draws), return_index=True)
    density = np.append(mass.at(draws[at]), 0.0)
    order, pixel = np.zeros(12, dtype=np.int64), np.arange(12)
    done = []
    while len(order):
        begin = first(order, pixel)
        start, end = np.searchsorted(index, [begin, begin + width(order)])
        count = end - start
        # the last of each pair is where the next cell's draws begin, and 0 after all
        peak = np.maximum.reduceat(density, np.stack([start, end], 1).reshape(-1))[::2]
        crowded = (count > _PER_CELL) | (peak * area(order) > _PROMISE * count / len(index))
        split = (count > 0) & crowded & (order < MAX_ORDER)
        done.append((order[~split], pixel[~split]))
        order, pixel = children(order[split], pixel[split])
    order, pixel = (np.concatenate(column) for column in zip(*done, strict=True))
    return order, pixel
