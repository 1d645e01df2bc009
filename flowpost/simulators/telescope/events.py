"""Simulated events of the telescope."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._nuisance import Factors
from .response import Response

__all__ = ["TelescopeEvents", "draw_events"]

_CHUNK = 4096


@dataclass(frozen=True)
class TelescopeEvents:
    """Simulated events. The image of an event is the histogram of its hits.

    Attributes:
        z: Position (x, y) in metres and energy in TeV, shape (N, 3).
        angle: Direction angle in radians, in [−π, π), shape (N,).
        images: Photon counts per time bin and sensor, shape (N, T, H, W), floating.
        hits: Sensor x, sensor y (metres) and time (ns), in time order, padded with zeros, shape
            (N, M, 3).
        lengths: The number of hits, shape (N,), int64.
    """

    z: Tensor
    angle: Tensor
    images: Tensor
    hits: Tensor
    lengths: Tensor

    def __len__(self) -> int:
        return len(self.z)

    def __getitem__(self, index: slice | Tensor) -> TelescopeEvents:
        """Return a selection of events (a slice, a mask or indices)."""
        return TelescopeEvents(*(getattr(self, name)[index] for name in self.__dataclass_fields__))

    def to(self, *args: Any, **kwargs: Any) -> TelescopeEvents:
        """Return the events with every tensor moved as by `torch.Tensor.to` (lengths stay int)."""
        moved = {n: getattr(self, n).to(*args, **kwargs) for n in self.__dataclass_fields__}
        moved["lengths"] = moved["lengths"].long()
        return TelescopeEvents(**moved)

    def __repr__(self) -> str:
        return (
            f"TelescopeEvents(N={len(self)}, images={tuple(self.images.shape[1:])}, "
            f"hits up to {self.hits.shape[1]}, mean {self.lengths.double().mean():.1f})"
        )


def draw_events(
    response: Response,
    z: Tensor,
    angle: Tensor,
    factors: Factors,
    generator: torch.Generator | None,
    delay: Tensor | None = None,
    parts: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw N events, each of one or several flashes of light.

    Arguments:
        response: The telescope.
        z: Labels of the flashes, those of an event together, shape (N·parts, 3).
        angle: Their direction angles, radians, shape (N·parts,).
        factors: Their nuisances; the noise of an event is the sum over its flashes.
        generator: The source of randomness, on the device of `z`.
        delay: Times of the flashes, ns, shape (N·parts,); by default 0.
        parts: The number of flashes per event.

    Returns:
        Images (N, T, H, W), hits (N, M, 3) and lengths (N,), as in `TelescopeEvents`.
    """
    n = len(z) // parts
    images = z.new_zeros(n, *response.image_shape)
    lengths = torch.zeros(n, dtype=torch.int64, device=z.device)
    flat = []
    size = max(1, _CHUNK // parts)
    for start in range(0, n, size):
        rows, lit = slice(start, start + size), slice(start * parts, (start + size) * parts)
        some = Factors(*(factor[lit] for factor in factors))
        wait = None if delay is None else delay[lit]
        pixel, time = _draw_hits(response, z[lit], angle[lit], some, wait, generator)
        event, sensor, time = _in_order(pixel, time, len(response.sensors), parts)
        count = len(images[rows])
        images[rows] = _histogram(response, event, sensor, time, count)
        lengths[rows] = torch.bincount(event, minlength=count)
        flat.append(torch.cat([response.sensors.to(z)[sensor], time[:, None]], 1))
    longest = max(1, int(lengths.max()))
    hits = z.new_zeros(n, longest, 3)
    hits[torch.arange(longest, device=z.device) < lengths[:, None]] = torch.cat(flat)
    return images, hits, lengths


def _draw_hits(
    response: Response,
    z: Tensor,
    angle: Tensor,
    factors: Factors,
    delay: Tensor | None,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return flash·(H·W) + sensor and time of all hits, shape (hits,), in no order."""
    offset = response.sensors.to(z) - z[:, None, :2]
    distance = response.distance(offset)
    spread = response.spread(distance, factors.scattering[:, None])
    arrival = distance / response.speed
    if delay is not None:
        arrival = arrival + delay[:, None]
    expected = response.photons(offset, z, angle, factors)
    signal = torch.poisson(expected, generator=generator).long().flatten()
    first, last = response.time_edges[0], response.time_edges[-1]
    noise = torch.full_like(expected, response.noise * (last - first)) * factors.noise[:, None]
    dark = torch.poisson(noise, generator=generator).long().flatten()

    pixel = torch.arange(expected.numel(), device=z.device)
    lit, unlit = pixel.repeat_interleave(signal), pixel.repeat_interleave(dark)
    uniform = torch.rand(
        len(lit) + len(unlit), generator=generator, dtype=z.dtype, device=z.device
    ).clamp(min=torch.finfo(z.dtype).tiny, max=1 - torch.finfo(z.dtype).eps)
    gumbel = -(-uniform[: len(lit)].log()).log()
    time = arrival.flatten()[lit] + spread.flatten()[lit] * gumbel
    time = torch.cat([time, first + (last - first) * uniform[len(lit) :]])
    kept = (time > first) & (time < last)
    return torch.cat([lit, unlit])[kept], time[kept]


def _in_order(
    pixel: Tensor, time: Tensor, sensors: int, parts: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return event, sensor and time of all hits, shape (hits,), by event and time."""
    order = time.argsort()
    order = order[(pixel[order] // (sensors * parts)).argsort(stable=True)]
    pixel, time = pixel[order], time[order]
    return pixel // (sensors * parts), pixel % sensors, time


def _histogram(response: Response, event: Tensor, sensor: Tensor, time: Tensor, n: int) -> Tensor:
    """Return the counts of n events per time bin and sensor, shape (n, T, H, W)."""
    bins, rows, columns = response.image_shape
    edges = torch.tensor(response.time_edges[1:-1], dtype=time.dtype, device=time.device)
    index = (event * bins + torch.bucketize(time, edges)) * rows * columns + sensor
    counts = torch.bincount(index, minlength=n * bins * rows * columns)
    return counts.reshape(n, bins, rows, columns).to(time.dtype)
