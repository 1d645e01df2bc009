"""Cells of the sky: nested HEALPix pixels of mixed order, their centres, areas and ranges.

A cell is a pair (order k, pixel p) of int64: one of 12·4^k pixels of equal area 4π/(12·4^k). In the
nested numbering its four children are 4p … 4p + 3, so at the finest order 29 each cell is a
contiguous range of indices; two cells either nest or are disjoint. The unique number of the
multi-order format is 4·4^k + p.

Source:
    HEALPix: a framework for high-resolution discretization and fast analysis of data distributed
    on the sphere (K. M. Górski et al., 2005) https://arxiv.org/abs/astro-ph/0409513;
    MOC: multi-order coverage map (IVOA recommendation 2.0, 2022) https://www.ivoa.net/documents/MOC
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from .._checks import check_positive_int, require

__all__ = [
    "MAX_ORDER",
    "area",
    "centres",
    "check_cover",
    "check_nside",
    "children",
    "directions",
    "first",
    "from_uniq",
    "index_of",
    "neighbours",
    "radius",
    "ring_to_nested",
    "to_uniq",
    "width",
]

MAX_ORDER = 29  # 12·4^29 indices are the most that the unique numbers hold in int64
_WIDEST_PIXEL = (
    1.07  # largest centre-to-corner distance times nside, in radians; 1.0691 as nside → ∞
)


def area(order: Any) -> np.ndarray:
    """Area in steradians of the cells of an order, of the shape of `order`."""
    return np.ldexp(np.pi / 3, -2 * np.asarray(order, dtype=np.int64))


def radius(order: Any) -> np.ndarray:
    """Bound in radians on the distance of a cell's points from its centre."""
    return np.ldexp(_WIDEST_PIXEL, -np.asarray(order, dtype=np.int64))


def centres(order: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Unit vectors of the centres of cells (M,), of shape (M, 3)."""
    nside = np.left_shift(np.int64(1), np.asarray(order, dtype=np.int64))
    xyz = require("healpy", "sky").pix2vec(nside, pixel, nest=True)
    return np.stack(np.broadcast_arrays(*xyz), -1)


def index_of(vectors: np.ndarray) -> np.ndarray:
    """Nested index at order 29 of unit vectors (M, 3), int64 of shape (M,)."""
    pixel = require("healpy", "sky").vec2pix(1 << MAX_ORDER, *vectors.T, nest=True)
    return cast("np.ndarray", np.asarray(pixel, dtype=np.int64))


def first(order: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """First index at order 29 of cells (M,), int64 of shape (M,)."""
    return cast("np.ndarray", pixel * width(order))


def width(order: Any) -> np.ndarray:
    """Number of indices at order 29 in the cells of an order, int64."""
    return np.left_shift(np.int64(1), 2 * (MAX_ORDER - np.asarray(order, dtype=np.int64)))


def children(order: np.ndarray, pixel: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders and pixels of the four children of each cell (M,), each of shape (4 M,)."""
    return np.repeat(order + 1, 4), (4 * pixel[:, None] + np.arange(4)).reshape(-1)


def to_uniq(order: np.ndarray, pixel: np.ndarray) -> np.ndarray:
    """Unique numbers 4·4^order + pixel of cells (M,), int64."""
    return pixel + np.left_shift(np.int64(4), 2 * np.asarray(order, dtype=np.int64))


def from_uniq(uniq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders and pixels of unique numbers (M,).

    Raises:
        ValueError: If a number is that of no cell.
    """
    uniq = np.asarray(uniq, dtype=np.int64)
    # integer comparisons: logarithms of int64 round up just below a power of 4
    steps = np.left_shift(np.int64(4), 2 * np.arange(MAX_ORDER + 1))
    order = np.searchsorted(steps, uniq, side="right") - 1
    pixel = uniq - steps[np.maximum(order, 0)]
    bad = (order < 0) | (pixel >= 3 * steps[order])
    if bad.any():
        raise ValueError(
            f"Expected unique numbers 4·4^order + pixel of orders 0 to {MAX_ORDER}; got "
            f"{uniq[bad][0]}. Is the column another one?"
        )
    return order, pixel


def ring_to_nested(nside: int) -> np.ndarray:
    """Nested pixel of each pixel in ring ordering, int64 of shape (12 nside²,)."""
    pixel = require("healpy", "sky").ring2nest(nside, np.arange(12 * nside**2))
    return cast("np.ndarray", np.asarray(pixel, dtype=np.int64))


def neighbours(order: int, pixel: np.ndarray) -> np.ndarray:
    """Pixels of the same order that touch each of pixels (M,), int64 (8, M); −1 where none is."""
    touching = require("healpy", "sky").get_all_neighbours(1 << order, pixel, nest=True)
    return np.asarray(touching, dtype=np.int64).reshape(8, -1)


def check_cover(order: np.ndarray, start: np.ndarray) -> None:
    """Raise unless cells (M,) that begin at indices `start` are sorted and cover the sky once.

    Raises:
        ValueError: If there are gaps or overlaps.
    """
    ends = np.append(start[1:], np.int64(12) << 2 * MAX_ORDER)
    if start[0] or not (start + width(order) == ends).all():
        raise ValueError(
            "Expected cells that cover the sky exactly once, sorted along the nested curve; got "
            "gaps or overlaps."
        )


def check_nside(nside: Any, most: int = 8192) -> int:
    """Return the order of `nside`.

    Raises:
        ValueError: If it is not a power of two, or above `most`.
    """
    nside = check_positive_int(nside, "nside")
    if nside & (nside - 1) or nside > most:
        raise ValueError(
            f"Expected nside as a power of two up to {most}; got {nside}. A multi-order map holds "
            "finer cells where they are needed."
        )
    return int(nside).bit_length() - 1


def directions(value: Any, name: str = "direction") -> np.ndarray:
    """Unit vectors (3,) or (N, 3) as float64.

    Arguments:
        value: Tensor, array or sequence of vectors (x, y, z) of unit length within 1e-3.
        name: What the value is called in an error.

    Raises:
        ValueError: If the shape or a length is wrong.
    """
    value = value.detach().cpu().numpy() if hasattr(value, "detach") else value
    try:
        vectors = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Expected {name} as unit vectors (x, y, z); got {value!r}.") from error
    if vectors.ndim not in (1, 2) or vectors.shape[-1] != 3:
        raise ValueError(
            f"Expected {name} of shape (3,) or (N, 3), unit vectors (x, y, z); got "
            f"{vectors.shape}. Convert angles to vectors first."
        )
    length = np.linalg.norm(vectors, axis=-1, keepdims=True)
    bad = ~(np.abs(length - 1) < 1e-3)
    if bad.any():
        raise ValueError(
            f"Expected {name} as unit vectors; got length {length[bad][0]:g}. Divide by the length."
        )
    return cast("np.ndarray", vectors / length)
