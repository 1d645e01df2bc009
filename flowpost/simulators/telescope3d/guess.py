"""Fast reconstructions of hit lists, the starting points that many analyses have."""

from __future__ import annotations

import torch
from torch import Tensor

from .response import LIGHT_SPEED

__all__ = ["centre_and_dipole", "line_fit"]

_EARLY = 40.0
_LATE = 200.0
_CORE = 200.0


def line_fit(hits: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Fit a straight line to the hits of tracks, by weighted least squares.

    Hits weigh 1 / (1 + (Δt / 200 ns)²)² with Δt from the median time, as noise is off in time.

    Arguments:
        hits: Sensor x, y, z (metres) and time (ns), padded, shape (N, M, 4).
        lengths: The number of hits, shape (N,).

    Returns:
        Position at t = 0 for the speed of light along the line, and direction, each of shape
        (N, 3); events without two different times go downwards.
    """
    real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
    time = torch.where(real, hits[..., 3], torch.nan)
    middle = time.nanmedian(1, keepdim=True).values if hits.shape[1] else hits.new_zeros(1)
    weight = (1 + ((hits[..., 3] - middle) / _CORE).square()).pow(-2)
    weight = torch.where(real, weight, 0.0)[..., None]
    mean = (weight * hits).sum(1) / weight.sum(1).clamp_min(1e-12)
    offset = hits - mean[:, None]
    direction = _unit((weight * offset[..., :3] * offset[..., 3:]).sum(1))
    return mean[:, :3] - LIGHT_SPEED * mean[:, 3:] * direction, direction


def centre_and_dipole(hits: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Return the centre of the early hits of cascades, and where the others lie from there.

    Hits weigh exp(−t / 40 ns) for the centre; the direction is that of the mean unit vector from
    the centre to the sensors that were hit in the first 200 ns.

    Arguments:
        hits: Sensor x, y, z (metres) and time (ns), padded, shape (N, M, 4).
        lengths: The number of hits, shape (N,).

    Returns:
        Position and direction, each of shape (N, 3); position 0 and downwards without such hits.
    """
    real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
    time = hits[..., 3]
    weight = torch.where(real & (time > -_EARLY / 2), (-time.clamp_min(0) / _EARLY).exp(), 0.0)
    position = (weight[..., None] * hits[..., :3]).sum(1)
    # a smaller sum is of hits so late that they are noise
    position = position / weight.sum(1, keepdim=True).clamp_min(1e-6)
    offset = hits[..., :3] - position[:, None]
    # 5 m, so that the sensor at the centre points nowhere
    toward = offset / (offset.norm(dim=-1, keepdim=True) + 5.0)
    near = real & (time > -_EARLY / 2) & (time < _LATE)
    return position, _unit(torch.where(near[..., None], toward, 0.0).sum(1))


def _unit(vectors: Tensor) -> Tensor:
    """Return vectors of length one; (0, 0, −1) for those of none."""
    length = vectors.norm(dim=1, keepdim=True)
    down = vectors.new_tensor([0.0, 0.0, -1.0])
    return torch.where(length > 1e-4, vectors / length.clamp_min(1e-4), down)
