"""Checks of labels and images of the telescope, at its public boundary."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._checks import as_tensor, check_finite, check_shape

__all__ = ["check_images", "check_labels"]


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
