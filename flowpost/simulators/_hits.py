"""Checks of lists of hits, the same for the telescopes of two and three dimensions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_shape

__all__ = ["check_hits"]


def check_hits(
    hits: Any,
    lengths: Any,
    counts: tuple[int, ...],
    spacings: tuple[float, ...],
    window: tuple[float, float],
    columns: str,
    like: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return hits (N, M, P + 1) and lengths (N,) as tensors.

    Arguments:
        hits: Positions of sensors (P, metres) and times (ns), padded.
        lengths: Numbers of hits.
        counts: Numbers of sensors along each of P axes.
        spacings: Their distances along them, metres.
        columns: What a hit is, for the error.
        window: First and last time, ns.
        like: A tensor whose device they are put on.

    Raises:
        ValueError: If shapes differ from these, or a hit is at no sensor or outside the window.
    """
    hits = as_tensor(hits, "hits", like=like)
    check_shape(hits, ("N", "M", len(counts) + 1), "hits", f"A hit is ({columns}).")
    lengths = torch.as_tensor(lengths, device=hits.device).long()
    check_shape(lengths, (len(hits),), "lengths", "Give the number of hits per event.")
    if len(lengths) and not 0 <= int(lengths.min()) <= int(lengths.max()) <= hits.shape[1]:
        raise ValueError(
            f"Expected lengths between 0 and {hits.shape[1]}; got {int(lengths.min())} to "
            f"{int(lengths.max())}. Pass the lengths that came with these hits."
        )
    real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
    check_finite(torch.where(real[..., None], hits, 0.0), "hits")
    bad = (hits[..., -1] < window[0]) | (hits[..., -1] > window[1])
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
