"""Checks of labels, images and hits of the telescope, at its public boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import as_tensor, check_finite, check_shape

__all__ = ["check_hits", "check_images", "check_labels"]


def check_labels(z: Any, angle: Any) -> tuple[Tensor, Tensor]:
    """Return labels (N, 3) and angles (N,) as floating tensors of one dtype.

    Raises:
        ValueError: If they have other shapes, are not finite, or an energy is not positive.
    """
    z = as_tensor(z, "z")
    check_shape(z, ("N", 3), "z", "The columns are x, y (metres) and energy (TeV).")
    check_finite(z, "z")
    if bool((z[:, 2] <= 0).any()):
        row = int((z[:, 2] <= 0).nonzero()[0])
        raise ValueError(
            f"Expected positive energies in column 2 of z; got {z[row, 2].item()} in row "
            f"{row}. Labels are in TeV, not their logarithm."
        )
    angle = as_tensor(angle, "angle", like=z).to(z.dtype)
    check_shape(angle, (len(z),), "angle", "Give one direction in radians per event.")
    check_finite(angle, "angle")
    return z, angle


def check_images(images: Any, shape: tuple[int, int, int], like: Tensor | None) -> Tensor:
    """Return images (N, T, H, W) as a floating tensor.

    Arguments:
        images: Photon counts.
        shape: (T, H, W).
        like: A tensor whose device they are put on.

    Raises:
        ValueError: If the shape differs from this, or a value is no count.
    """
    images = as_tensor(images, "images", like=like)
    check_shape(images, ("N", *shape), "images", "Axes are time bin, y and x.")
    check_finite(images, "images")
    if bool(((images < 0) | (images != images.round())).any()):
        raise ValueError(
            f"Expected images of photon counts (whole numbers, 0 or more); got values between "
            f"{images.min().item():g} and {images.max().item():g}. Pass the counts as "
            "simulated, not their logarithm."
        )
    return images


def check_hits(
    hits: Any,
    lengths: Any,
    counts: tuple[int, int],
    spacing: float,
    window: tuple[float, float],
    like: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return hits (N, M, 3) and lengths (N,) as tensors.

    Arguments:
        hits: Sensor x, sensor y (metres) and time (ns), padded.
        lengths: Numbers of hits.
        counts: Numbers of sensors along x and y.
        spacing: Their distance, metres.
        window: First and last time, ns.
        like: A tensor whose device they are put on.

    Raises:
        ValueError: If shapes differ from these, or a hit is at no sensor or outside the window.
    """
    hits = as_tensor(hits, "hits", like=like)
    check_shape(hits, ("N", "M", 3), "hits", "A hit is (sensor x, sensor y, time).")
    lengths = torch.as_tensor(lengths, device=hits.device).long()
    check_shape(lengths, (len(hits),), "lengths", "Give the number of hits per event.")
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= hits.shape[1]:
        raise ValueError(
            f"Expected lengths between 0 and {hits.shape[1]}; got {int(lengths.min())} to "
            f"{int(lengths.max())}. Pass the lengths that came with these hits."
        )
    real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
    check_finite(torch.where(real[..., None], hits, 0.0), "hits")
    bad = (hits[..., 2] < window[0]) | (hits[..., 2] > window[1])
    for axis, count in enumerate(counts):
        index = hits[..., axis] / spacing + (count - 1) / 2
        bad |= (index - index.round()).abs() > 1e-3
        bad |= (index < -0.5) | (index > count - 0.5)
    if bool((bad & real).any()):
        event, hit = (int(i) for i in (bad & real).nonzero()[0])
        raise ValueError(
            f"Expected hits at a sensor and within {window[0]:g} to {window[1]:g} ns; got "
            f"{hits[event, hit].tolist()} in row {event}, hit {hit}. Pass hits in metres and ns, "
            "not scaled."
        )
    return hits, lengths
