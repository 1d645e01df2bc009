"""Checks of labels and hits of the three-dimensional telescope, at its public boundary."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._checks import as_tensor, check_finite, check_shape
from .labels import COLUMNS

__all__ = ["check_hits", "check_labels"]


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


def check_hits(
    hits: Any,
    lengths: Any,
    counts: tuple[int, ...],
    spacings: tuple[float, ...],
    window: tuple[float, float],
    like: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return hits (N, M, 4) and lengths (N,) as tensors.

    Arguments:
        hits: Sensor x, y, z (metres) and time (ns), padded.
        lengths: Numbers of hits.
        counts: Numbers of sensors along x, y and z.
        spacings: Their distances along x, y and z, metres.
        window: First and last time, ns.
        like: A tensor whose device they are put on.

    Raises:
        ValueError: If shapes differ from these, or a hit is at no sensor or outside the window.
    """
    hits = as_tensor(hits, "hits", like=like)
    check_shape(hits, ("N", "M", 4), "hits", "A hit is (sensor x, y, z, time).")
    lengths = torch.as_tensor(lengths, device=hits.device).long()
    check_shape(lengths, (len(hits),), "lengths", "Give the number of hits per event.")
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= hits.shape[1]:
        raise ValueError(
            f"Expected lengths between 0 and {hits.shape[1]}; got {int(lengths.min())} to "
            f"{int(lengths.max())}. Pass the lengths that came with these hits."
        )
    real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
    check_finite(torch.where(real[..., None], hits, 0.0), "hits")
    bad = (hits[..., 3] < window[0]) | (hits[..., 3] > window[1])
    for axis, (count, spacing) in enumerate(zip(counts, spacings, strict=True)):
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
