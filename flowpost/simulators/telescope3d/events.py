"""Simulated events of the three-dimensional telescope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._nuisance import Factors
from .labels import unpack
from .response import Response3D

__all__ = ["Telescope3DEvents", "draw_hits"]


@dataclass(frozen=True)
class Telescope3DEvents:
    """Simulated events.

    Attributes:
        z: Energy (TeV), position x, y, z (metres) and direction of travel (unit vector), shape
            (N, 7).
        hits: Sensor x, y, z (metres) and time (ns), in time order, padded with zeros, shape
            (N, M, 4).
        lengths: The number of hits, shape (N,), int64.
    """

    z: Tensor
    hits: Tensor
    lengths: Tensor

    @property
    def labels(self) -> dict[str, Tensor]:
        """Views of z: energy of shape (N,), position and direction of shape (N, 3)."""
        return unpack(self.z)

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: slice | Tensor) -> Telescope3DEvents:
        """Return a selection of events (a slice, a mask or indices)."""
        return Telescope3DEvents(self.z[index], self.hits[index], self.lengths[index])

    def to(self, *args: Any, **kwargs: Any) -> Telescope3DEvents:
        """Return the events with every tensor moved as by `torch.Tensor.to` (lengths stay int)."""
        moved = (t.to(*args, **kwargs) for t in (self.z, self.hits, self.lengths))
        z, hits, lengths = moved
        return Telescope3DEvents(z, hits, lengths.long())

    def __repr__(self) -> str:
        mean = self.lengths.double().mean()
        return f"Telescope3DEvents(N={len(self)}, hits up to {self.hits.shape[1]}, mean {mean:.1f})"


def draw_hits(
    response: Response3D, z: Tensor, factors: Factors, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draw the hits of N events.

    Arguments:
        response: The telescope.
        z: Labels, shape (N, 7).
        factors: Nuisances, each of shape (N,).
        generator: The source of randomness, on the device of `z`.

    Returns:
        The hits of all events, in the order of events and times, shape (hits, 4), and their number
        in each event, shape (N,).
    """
    first, last = response.window
    sensors = response.sensors.to(z)
    light = response.light(z, sensors, factors)
    signal = torch.poisson(light.photons, generator=generator).long().flatten()
    rate = z.new_full((len(z),), response.noise * (last - first) * len(sensors))
    dark = torch.poisson(rate * factors.noise, generator=generator).long()

    lit = torch.arange(signal.numel(), device=z.device).repeat_interleave(signal)
    unlit = torch.arange(len(z), device=z.device).repeat_interleave(dark)
    limits = torch.finfo(z.dtype)
    uniform = torch.rand(
        2, len(lit) + len(unlit), generator=generator, dtype=z.dtype, device=z.device
    ).clamp(min=limits.tiny, max=1 - limits.eps)
    gumbel = -(-uniform[0, : len(lit)].log()).log()
    time = light.time.flatten()[lit] + light.spread.flatten()[lit] * gumbel
    time = torch.cat([time, first + (last - first) * uniform[0, len(lit) :]])
    anywhere = (uniform[1, len(lit) :] * len(sensors)).long().clamp(max=len(sensors) - 1)
    event = torch.cat([lit // len(sensors), unlit])
    sensor = torch.cat([lit % len(sensors), anywhere])

    kept = ((time > first) & (time < last)).nonzero().flatten()
    # one key for both: event and time within it
    key = event[kept].double() * 2 + (time[kept].double() - first) / (last - first)
    kept = kept[key.argsort()]
    hits = torch.cat([sensors[sensor[kept]], time[kept, None]], 1)
    return hits, torch.bincount(event[kept], minlength=len(z))
