"""Checks of labels of the three-dimensional telescope, at its public boundary."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..._checks import as_tensor, check_finite, check_shape
from .labels import COLUMNS

__all__ = ["check_labels"]


def check_labels(z: Any) -> Tensor:
    """Return labels (N, 7) as a floating tensor.

    Raises:
        ValueError: If they have another shape, an energy is not positive or a direction no unit
            vector.
    """
    z = as_tensor(z, "z")
    check_shape(z, ("N", len(COLUMNS)), "z", f"The columns are {', '.join(COLUMNS)}.")
    check_finite(z, "z")
    bad = z[:, 0] <= 0
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected positive energies in column 0 of z; got {z[row, 0].item()} in row {row}. "
            "Labels are in TeV, not their logarithm."
        )
    norm = z[:, 4:].norm(dim=1)
    bad = (norm - 1).abs() > 1e-3
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected unit vectors in columns 4 to 6 of z; got one of length {norm[row].item():g} "
            f"in row {row}. Divide the direction by its length."
        )
    return z
