"""The label columns of the three-dimensional telescope."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..._checks import as_tensor, check_shape

__all__ = ["COLUMNS", "pack", "unpack"]

COLUMNS = ("energy", "x", "y", "z", "dx", "dy", "dz")


def pack(labels: Mapping[str, Any]) -> Tensor:
    """Return labels by name as columns.

    Arguments:
        labels: "energy" in TeV, shape (N,); "position" in metres, shape (N, 3); "direction" of
            travel, unit vectors, shape (N, 3).

    Returns:
        Shape (N, 7), in the order of `COLUMNS`.

    Raises:
        ValueError: If a name is missing or unknown, or a shape does not fit.
    """
    if set(labels) != {"energy", "position", "direction"}:
        raise ValueError(
            "Expected labels named energy, position and direction; got "
            f"{', '.join(map(str, labels)) or 'none'}."
        )
    position = as_tensor(labels["position"], "position")
    check_shape(position, ("N", 3), "position", "Give x, y and z in metres.")
    energy = as_tensor(labels["energy"], "energy", like=position).to(position.dtype)
    check_shape(energy, (len(position),), "energy", "Give one energy in TeV per position.")
    direction = as_tensor(labels["direction"], "direction", like=position).to(position.dtype)
    check_shape(direction, (len(position), 3), "direction", "Give one unit vector per position.")
    return torch.cat([energy[:, None], position, direction], 1)


def unpack(z: Tensor) -> dict[str, Tensor]:
    """Return columns (..., 7) by name: energy (...,), position (..., 3), direction (..., 3).

    Raises:
        ValueError: If the number of columns is not 7.
    """
    if z.ndim == 0 or z.shape[-1] != len(COLUMNS):
        raise ValueError(
            f"Expected z of shape (..., {len(COLUMNS)}); got {tuple(z.shape)}. The columns are "
            f"{', '.join(COLUMNS)}."
        )
    return {"energy": z[..., 0], "position": z[..., 1:4], "direction": z[..., 4:]}
