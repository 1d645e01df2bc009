"""Geometry of pictures of the sky: Mollweide's projection, tangent planes, where a map has parts.

The sky is seen from inside the sphere: longitude increases to the left.
"""

from __future__ import annotations

import numpy as np

from .result import SkyMap

__all__ = [
    "field_of",
    "mollweide_pixels",
    "mollweide_place",
    "small_parts",
    "tangent_frame",
    "tangent_pixels",
]

_MARGIN = 1.5  # of a field, beyond its region: a round one leaves its corners to the legend
_STRAY = 0.01  # of a region's probability, which a field may leave out
_MOST, _TRIED = 12, 100  # small parts, and all parts from the densest down


def mollweide_pixels(
    width: int, center: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    r"""Pixels of an image of the whole sky in Mollweide's equal-area projection.

    With :math:`2\theta + \sin 2\theta = \pi \sin b`, longitude l and latitude b are at
    :math:`x = -\tfrac{1}{\pi} (l - l_0) \cos\theta` and :math:`y = \sin\theta`, both in [−1, 1].

    Arguments:
        width: Pixels across, twice those up.
        center: Longitude l₀ in the middle, in degrees.

    Returns:
        Pixel centres x and y as shares of the image (width/2, width); which of them are on the sky,
        bools likewise; and the directions there, (P, 3).
    """
    side = (np.arange(width) + 0.5) / width
    x, y = np.meshgrid(side, side[::2] + 0.5 / width)
    inside = (2 * x - 1) ** 2 + (2 * y - 1) ** 2 < 1
    theta = np.arcsin(2 * y[inside] - 1)
    lon = np.radians(center) - np.pi * (2 * x[inside] - 1) / np.cos(theta)
    z = (2 * theta + np.sin(2 * theta)) / np.pi
    flat = np.sqrt(1 - z**2)
    return x, y, inside, np.stack([flat * np.cos(lon), flat * np.sin(lon), z], -1)


def mollweide_place(vector: np.ndarray, center: float) -> tuple[float, float]:
    """Longitude left of `center` (degrees) times −1, in [−π, π), and latitude, in radians."""
    x, y, z = vector
    lon = np.degrees(np.arctan2(y, x))
    return float(np.radians((center - lon + 180) % 360 - 180)), float(np.arctan2(z, np.hypot(x, y)))


def tangent_frame(middle: np.ndarray) -> np.ndarray:
    """Rows east, north and outward (3, 3) of the plane that touches the sky at a direction (3,).

    At the poles, where east is anywhere, it is that of longitude 0.
    """
    x, y, _ = middle
    across = np.hypot(x, y)
    east = np.array([-y, x, 0.0]) / across if across > 1e-12 else np.array([0.0, 1.0, 0.0])
    return np.stack([east, np.cross(middle, east), middle])


def tangent_pixels(
    frame: np.ndarray, half: float, count: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pixels of a gnomonic image, a square of the plane that touches the sky.

    Arguments:
        frame: East, north and outward (3, 3).
        half: Tangent of the half-width.
        count: Pixels across and up.

    Returns:
        Offsets east and north in the plane (count, count), and the directions (count², 3).
    """
    side = np.linspace(-half, half, count)
    x, y = np.meshgrid(side, side)
    vectors = np.stack([x, y, np.ones_like(x)], -1).reshape(-1, 3) @ frame
    return x, y, vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def field_of(
    sky: SkyMap, level: float, widest: float, middle: np.ndarray | None = None
) -> tuple[np.ndarray, float]:
    """Centre (3,) and half-width in degrees of a field for the region of a level.

    Without `middle` it is that part of the region that hangs together with the maximum: sorted by
    distance from it, up to the first gap that is wider than all before it. The field holds 99 % of
    the probability of that, so that a few cells far out do not open it.

    Arguments:
        sky: The map.
        level: Credibility of the region.
        widest: Largest half-width in degrees; fields that need more are around the maximum.
        middle: Centre, where it is given.
    """
    members = sky.levels <= level
    members[sky.density.argmax()] = True
    vectors, size = sky.centres()[members], np.sqrt(sky.cell_area[members])
    mass = sky.probability[members]
    away = _distance(vectors, sky.maximum if middle is None else middle)
    if middle is None:
        rank = away.argsort()
        gap = np.diff(away[rank]) > away[rank][:-1] + 2 * size[rank][1:]
        near = rank[: int(gap.argmax()) + 1] if gap.any() else rank
        vectors, size, mass = vectors[near], size[near], mass[near]
        mean = (vectors * mass[:, None]).sum(0)
        length = np.linalg.norm(mean)
        middle = mean / length if length > 0 else sky.maximum
        away = _distance(vectors, middle)
        if _extent(away + size, mass) * _MARGIN > widest:
            middle = sky.maximum
    return middle, min(_MARGIN * _extent(away + size, mass), widest)


def _extent(away: np.ndarray, mass: np.ndarray) -> float:
    """Degrees within which all but a hundredth of the mass lies, of cells that reach so far."""
    rank = away.argsort()
    held = mass[rank].cumsum()
    inside = np.searchsorted(held, (1 - _STRAY) * held[-1])
    return float(np.degrees(away[rank][min(inside, len(rank) - 1)]))


def small_parts(sky: SkyMap, level: float, size: float) -> list[tuple[np.ndarray, float]]:
    """Parts of a level's region within `size` degrees of their densest direction, at most 12.

    Around each lies an empty ring, up to twice as far. Where two are close, half of `size` is tried
    too, so that each is found by itself.

    Returns:
        The densest direction (3,) of each, and within how many degrees of it the part lies.
    """
    members = np.flatnonzero(sky.levels <= level)
    members = members if len(members) else np.array([sky.density.argmax()])
    vectors = sky.centres()[members[np.argsort(-sky.density[members], kind="stable")]]
    parts: list[tuple[np.ndarray, float]] = []
    left = np.ones(len(vectors), dtype=bool)
    for _ in range(_TRIED):
        if not left.any() or len(parts) == _MOST:
            break
        one = vectors[left.argmax()]
        away = np.degrees(_distance(vectors, one))
        for reach in (size, size / 2):
            if not ((away > reach) & (away < 2 * reach)).any():
                parts.append((one, reach))
                left &= away > 2 * reach
                break
        else:
            left &= away > size
    return parts


def _distance(vectors: np.ndarray, to: np.ndarray) -> np.ndarray:
    """Angles in radians of vectors (M, 3) from another (3,); chords keep small ones exact."""
    return 2 * np.arcsin(np.clip(np.linalg.norm(vectors - to, axis=1) / 2, 0, 1))
