r"""Rotations between the frame of a posterior's labels and the equatorial frame of the sky.

A rotation R (3, 3) takes vectors of the labels' frame to equatorial ones, n = R z. It must be
proper, det R = +1. Azimuth of the horizontal system runs from north through east, clockwise as seen
from above; together with the zenith that is a *left-handed* system, so a matrix built from
(cos az cos alt, sin az cos alt, sin alt) has determinant −1 and mirrors the sky. Labels here are
right-handed: azimuth φ = atan2(y, x) runs counter-clockwise seen from above.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from .._checks import require
from .cells import directions

__all__ = [
    "FRAMES",
    "check_rotation",
    "detector_rotation",
    "galactic_rotation",
    "show_area",
    "show_direction",
]

FRAMES = {"C": "equatorial (ICRS)", "G": "Galactic", "local": "local"}

_ORTHOGONAL = 1e-6


def check_rotation(rotation: Any) -> np.ndarray:
    """Return `rotation` as float64 (3, 3), made orthogonal to rounding.

    Raises:
        ValueError: If it is not orthogonal within 1e-6, or of determinant −1.
    """
    rotation = rotation.detach().cpu().numpy() if hasattr(rotation, "detach") else rotation
    matrix = np.asarray(rotation, dtype=np.float64)
    if matrix.shape != (3, 3):
        raise ValueError(f"Expected rotation of shape (3, 3); got {matrix.shape}.")
    error = float(np.abs(matrix @ matrix.T - np.eye(3)).max())
    if not error <= _ORTHOGONAL:
        raise ValueError(
            f"Expected rotation as an orthogonal matrix; got R Rᵀ that differs from 1 by {error:g}."
        )
    if np.linalg.det(matrix) < 0:
        raise ValueError(
            "Expected rotation of determinant +1; got −1, which mirrors the sky. Azimuth from "
            "north through east is left-handed: use detector_rotation. Labels that point where a "
            "particle flies to have to be negated before training."
        )
    left, _, right = np.linalg.svd(matrix)
    return cast("np.ndarray", left @ right)


def galactic_rotation() -> np.ndarray:
    """Rotation (3, 3) from Galactic to equatorial (ICRS) vectors, as astropy defines them.

    Source:
        The new I.A.U. system of galactic coordinates (A. Blaauw et al., 1960)
        https://doi.org/10.1093/mnras/121.2.123
    """
    coordinates = require("astropy.coordinates", "sky")
    axes = coordinates.SkyCoord([0, 90, 0], [0, 0, 90], unit="deg", frame="galactic")
    return check_rotation(axes.icrs.cartesian.xyz.value)


def detector_rotation(
    location: Any, time: Any, *, x_azimuth: float = 90.0, direction: Any = None
) -> np.ndarray:
    """Rotation (3, 3) from a detector's local frame to equatorial (ICRS) vectors.

    The local frame is right-handed: z points to the zenith, x to the horizon at compass azimuth
    `x_azimuth`, and y a quarter turn counter-clockwise from x seen from above, that is at
    `x_azimuth` − 90°. With the default x points east and y north. Labels point to where the
    particle or signal comes from.

    Aberration by the Earth's motion is not a rotation: with the default the result is exact at the
    zenith, up to 21″ off at the horizon and up to 41″ at the nadir. Give `direction` for a result
    that is exact there (0.4″ per degree away from it).

    Arguments:
        location: The detector, an `astropy.coordinates.EarthLocation`.
        time: The time of the event, an `astropy.time.Time` or what it takes (UTC).
        x_azimuth: Azimuth of the x axis in degrees, from north through east.
        direction: Unit vector (3,) of the local frame, such as the posterior's mode.

    Returns:
        R of determinant +1, float64 (3, 3), from the Earth orientation data that come with astropy
        (nothing is downloaded).

    Raises:
        ValueError: If `location`, `time`, `x_azimuth` or `direction` is no such thing.
    """
    coordinates = require("astropy.coordinates", "sky")
    times = require("astropy.time", "sky")
    iers = require("astropy.utils.iers", "sky")
    if not isinstance(location, coordinates.EarthLocation) or not location.isscalar:
        raise ValueError(
            f"Expected location as one EarthLocation; got {type(location).__name__}. Make it by "
            "astropy.coordinates.EarthLocation.from_geodetic(lon, lat, height)."
        )
    if not np.isfinite(x_azimuth):
        raise ValueError(f"Expected x_azimuth in degrees; got {x_azimuth}.")
    centre = np.array([0.0, 0.0, 1.0]) if direction is None else directions(direction)
    if centre.shape != (3,):
        raise ValueError(f"Expected one direction of shape (3,); got {centre.shape}.")
    with iers.conf.set_temp("auto_download", False), iers.conf.set_temp("auto_max_age", None):
        try:
            when = times.Time(time)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected time as an astropy Time; got {time!r}. A number needs its format: "
                'astropy.time.Time(…, format="mjd").'
            ) from error
        if not when.isscalar:
            raise ValueError(f"Expected one time; got shape {when.shape}.")
        frame = coordinates.AltAz(obstime=when, location=location)

        tangent = np.cross(centre, np.eye(3)[np.argmin(np.abs(centre))])
        tangent /= np.linalg.norm(tangent)
        step = 1e-3  # radians either way: far above rounding, far below the 1 rad of aberration
        ends = np.stack([centre, centre + step * tangent, centre - step * tangent])
        at, ahead, behind = _to_icrs(ends, frame, x_azimuth)
    return _frame(at, ahead - behind) @ _frame(centre, tangent).T


def _to_icrs(vectors: np.ndarray, frame: Any, x_azimuth: float) -> np.ndarray:
    """ICRS vectors of local ones (M, 3), by azimuth and altitude in an AltAz frame."""
    azimuth = x_azimuth - np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0]))
    altitude = np.degrees(np.arctan2(vectors[:, 2], np.hypot(*vectors[:, :2].T)))
    coordinates = require("astropy.coordinates", "sky")
    local = coordinates.SkyCoord(azimuth, altitude, unit="deg", frame=frame)
    return cast("np.ndarray", local.icrs.cartesian.xyz.value.T)


def _frame(axis: np.ndarray, towards: np.ndarray) -> np.ndarray:
    """Right-handed orthonormal columns (3, 3): an axis, and the direction of a tangent at it."""
    axis = axis / np.linalg.norm(axis)
    tangent = towards - axis * (axis @ towards)
    tangent /= np.linalg.norm(tangent)
    return np.stack([axis, tangent, np.cross(axis, tangent)], 1)


def show_direction(vector: np.ndarray, frame: str, digits: int = 5) -> str:
    """A unit vector (3,) as longitude and latitude in degrees, by their names in a frame."""
    names = {"C": ("RA", "Dec"), "G": ("l", "b")}.get(frame, ("azimuth", "altitude"))
    x, y, z = vector
    lon, lat = np.degrees([np.arctan2(y, x), np.arctan2(z, np.hypot(x, y))])
    text = f"{names[0]} {lon % 360:.{digits}f}°, {names[1]} {lat:+.{digits}f}°"
    return text.replace("-", "−")


def show_area(square_degrees: float) -> str:
    """An area in the unit that suits it."""
    for unit, per in (("deg²", 1.0), ("arcmin²", 3600.0), ("arcsec²", 3600.0**2)):
        if square_degrees * per >= 0.1 or unit == "arcsec²":
            break
    value = square_degrees * per
    return f"{value:.0f} {unit}" if value >= 1000 else f"{value:.4g} {unit}"
