"""What is asked of a map: credible levels, the mass of a cone, fixed pixels. Arrays in and out.

Cells are sorted along the nested curve and cover the sky once; their density is constant inside.
"""

from __future__ import annotations

from typing import cast

import numpy as np

from .cells import MAX_ORDER, area, centres, children, first, radius, width

__all__ = ["credible_levels", "fixed_pixels", "mass_in_cone", "region_areas"]

_BOUNDARY = 1e-7  # probability of a cell on the rim of a cone that is not divided further


def region_areas(density: np.ndarray, cell_area: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Areas in steradians of the smallest regions that hold probabilities `levels`.

    The last cell counts by the share of it that the level needs.

    Arguments:
        density: Per steradian, of the cells (M,).
        cell_area: In steradians (M,).
        levels: In [0, 1], of any shape.
    """
    rank = np.argsort(-density, kind="stable")
    mass = np.cumsum(density[rank] * cell_area[rank])
    total = np.cumsum(cell_area[rank])
    return np.interp(levels, np.append(0.0, mass / mass[-1]), np.append(0.0, total))


def credible_levels(
    density: np.ndarray, cell_area: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Probability and area in steradians of what is denser than each cell, half the ties included.

    Returns:
        Levels (M,), searched areas (M,), and the number of cells of equal density (M,).
    """
    values, at, count = np.unique(density, return_inverse=True, return_counts=True)
    own = np.stack([np.bincount(at, w, len(values)) for w in (density * cell_area, cell_area)])
    # from the densest down, so that small regions keep their digits
    denser = np.cumsum(own[:, ::-1], 1)[:, ::-1] - own / 2
    return denser[0, at], denser[1, at], count[at]


def mass_in_cone(
    start: np.ndarray, order: np.ndarray, density: np.ndarray, axis: np.ndarray, angle: float
) -> float:
    """Probability within `angle` radians of `axis`, from cells that begin at indices `start` (M,).

    Cells are taken whole inside the rim and divided on it, down to a probability of 1e-7 or
    order 29, from where the centre decides.
    """
    cumulative = np.append(0.0, np.cumsum(density * area(order)))
    finest = float(area(MAX_ORDER))

    def below(index: np.ndarray) -> np.ndarray:
        cell = np.searchsorted(start, index, side="right") - 1
        return cast("np.ndarray", cumulative[cell] + density[cell] * (index - start[cell]) * finest)

    k, pixel = np.zeros(12, dtype=np.int64), np.arange(12)
    total = 0.0
    while len(k):
        begin = first(k, pixel)
        mass = below(begin + width(k)) - below(begin)
        # chords: the arc cosine loses small angles
        chord = np.linalg.norm(centres(k, pixel) - axis, axis=1)
        distance = 2 * np.arcsin(np.clip(chord / 2, 0, 1))
        reach = radius(k)
        last = (mass <= _BOUNDARY) | (k == MAX_ORDER)
        inside = distance + np.where(last, 0.0, reach) <= angle
        total += float(mass[inside].sum())
        split = ~inside & ~last & (distance - reach <= angle)
        k, pixel = children(k[split], pixel[split])
    return min(max(total, 0.0), 1.0)


def fixed_pixels(
    order: np.ndarray, pixel: np.ndarray, mass: np.ndarray, level: int
) -> tuple[np.ndarray, np.ndarray]:
    """Mass of the cells in pixels of order `level`, and which of these lie in a coarser cell.

    Returns:
        Mass (12·4^level,), nested, that of coarser cells shared out equally; and bools likewise.
    """
    fine = order >= level
    target = np.right_shift(pixel[fine], 2 * (order[fine] - level))
    out = np.bincount(target, mass[fine], minlength=12 * 4**level)
    depth = level - order[~fine]
    count = np.left_shift(np.int64(1), 2 * depth)
    begin = np.left_shift(pixel[~fine], 2 * depth)
    offset = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    where = np.repeat(begin, count) + offset
    out[where] = np.repeat(np.ldexp(mass[~fine], -2 * depth), count)
    coarse = np.zeros(len(out), dtype=bool)
    coarse[where] = True
    return out, coarse
