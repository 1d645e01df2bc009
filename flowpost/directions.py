"""Directions as unit vectors, and the angles that people quote: zenith and azimuth, RA and Dec.

All vectors are (x, y, z) in a right-handed frame, all angles in radians unless `degrees` is set. An
arc-second needs double precision in an angle; a float32 vector is good to 0.01″.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ._checks import as_tensor, check_finite

__all__ = ["from_ra_dec", "from_zenith_azimuth", "separation", "to_ra_dec", "to_zenith_azimuth"]

_FULL_TURN = 2 * math.pi * 1.01


def _read(value: Any, name: str, degrees: bool) -> Tensor:
    angle = as_tensor(value, name)
    check_finite(angle, name)
    return torch.deg2rad(angle) if degrees else angle


def _check_range(angle: Tensor, low: float, high: float, name: str, degrees: bool) -> None:
    slack = 1e-6
    bad = (angle < low - slack) | (angle > high + slack)
    if bool(bad.any()):
        unit = "degrees" if degrees else "radians"
        shown = [math.degrees(v) if degrees else v for v in (low, high, float(angle[bad][0]))]
        raise ValueError(
            f"Expected {name} between {shown[0]:.4g} and {shown[1]:.4g} {unit}; got "
            f"{shown[2]:.4g}. "
            f"Set degrees={not degrees} if the angles are in "
            f"{'radians' if degrees else 'degrees'}."
        )


def _warn_of_degrees(angle: Tensor, name: str) -> None:
    size = angle.abs()
    if float((size > _FULL_TURN).double().mean()) > 0.5:
        warnings.warn(
            f"Expected {name} in radians; got angles of which most are beyond 2π (median size "
            f"{float(size.median()):.4g}). If they are degrees, set degrees=True; angles on other "
            "branches mean the same modulo 2π.",
            stacklevel=3,
        )


def _vector(polar: Tensor, azimuth: Tensor) -> Tensor:
    polar, azimuth = torch.broadcast_tensors(polar, azimuth)
    sine = polar.sin()
    return torch.stack([sine * azimuth.cos(), sine * azimuth.sin(), polar.cos()], -1)


def _angles(vector: Any) -> tuple[Tensor, Tensor]:
    """Polar angle in [0, π] and azimuth in [0, 2π)."""
    v = as_tensor(vector, "directions")
    if v.ndim == 0 or v.shape[-1] != 3:
        raise ValueError(f"Expected directions of shape (..., 3); got {tuple(v.shape)}.")
    check_finite(v, "directions")
    if not bool((v.abs().sum(-1) > 0).all()):
        raise ValueError("Expected directions of some length; got a vector of zeros.")
    across = torch.hypot(v[..., 0], v[..., 1])
    azimuth = torch.atan2(v[..., 1], v[..., 0])
    azimuth = torch.where(azimuth < 0, azimuth + 2 * math.pi, azimuth)
    # a tiny negative angle rounds to 2π
    azimuth = torch.where(azimuth >= 2 * math.pi, torch.zeros_like(azimuth), azimuth)
    return torch.atan2(across, v[..., 2]), azimuth


def from_zenith_azimuth(zenith: Any, azimuth: Any, *, degrees: bool = False) -> Tensor:
    """Unit vectors (..., 3) that point to a zenith angle (0 is +z) and an azimuth (x towards y).

    Where the angles say from where a particle came, the direction of travel is the negative.

    Arguments:
        zenith: Zenith angle, of shape (...).
        azimuth: Azimuth, counted from +x towards +y, of shape (...).
        degrees: Whether the angles are in degrees.

    Raises:
        ValueError: If an angle is not finite, or a zenith is not between 0 and π.

    Warns:
        UserWarning: If most azimuths are beyond ±2π where they should be radians.
    """
    zenith, azimuth = _read(zenith, "zenith", degrees), _read(azimuth, "azimuth", degrees)
    _check_range(zenith, 0, math.pi, "zenith", degrees)
    if not degrees:
        _warn_of_degrees(azimuth, "azimuth")
    return _vector(zenith, azimuth)


def to_zenith_azimuth(vector: Any, *, degrees: bool = False) -> tuple[Tensor, Tensor]:
    """Zenith angle in [0, π] and azimuth in [0, 2π) of vectors (..., 3), each of shape (...).

    Raises:
        ValueError: If the shape is wrong, or a vector is zero or not finite.
    """
    zenith, azimuth = _angles(vector)
    return (torch.rad2deg(zenith), torch.rad2deg(azimuth)) if degrees else (zenith, azimuth)


def from_ra_dec(ra: Any, dec: Any, *, degrees: bool = False) -> Tensor:
    """Unit vectors (..., 3) of right ascension and declination: +x at (0, 0), +z at the north pole.

    Arguments:
        ra: Right ascension, of shape (...).
        dec: Declination, of shape (...).
        degrees: Whether the angles are in degrees.

    Raises:
        ValueError: If an angle is not finite, or a declination is not between −π/2 and π/2.

    Warns:
        UserWarning: If most right ascensions are beyond ±2π where they should be radians.
    """
    ra, dec = _read(ra, "ra", degrees), _read(dec, "dec", degrees)
    _check_range(dec, -math.pi / 2, math.pi / 2, "dec", degrees)
    if not degrees:
        _warn_of_degrees(ra, "ra")
    ra, dec = torch.broadcast_tensors(ra, dec)
    across = dec.cos()
    return torch.stack([across * ra.cos(), across * ra.sin(), dec.sin()], -1)


def to_ra_dec(vector: Any, *, degrees: bool = False) -> tuple[Tensor, Tensor]:
    """Right ascension in [0, 2π) and declination in [−π/2, π/2] of vectors (..., 3).

    Raises:
        ValueError: If the shape is wrong, or a vector is zero or not finite.
    """
    _, ra = _angles(vector)
    v = as_tensor(vector, "directions")
    dec = torch.atan2(v[..., 2], torch.hypot(v[..., 0], v[..., 1]))
    return (torch.rad2deg(ra), torch.rad2deg(dec)) if degrees else (ra, dec)


def separation(a: Any, b: Any, *, degrees: bool = False) -> Tensor:
    """Angle between directions (..., 3), of shape (...), without loss at 0 and π.

    Source: *How futile are mindless assessments of roundoff in floating-point computation?*,
    W. Kahan, 2006, §12, https://people.eecs.berkeley.edu/~wkahan/Mindless.pdf.

    Raises:
        ValueError: If a shape is wrong, or a vector is zero or not finite.
    """
    vectors = []
    for v in (a, b):
        _angles(v)
        vectors.append(torch.nn.functional.normalize(as_tensor(v, "directions"), dim=-1))
    a, b = vectors
    angle = 2 * torch.atan2((a - b).norm(dim=-1), (a + b).norm(dim=-1))
    return torch.rad2deg(angle) if degrees else angle
