"""The telescope: labels from the prior, simulated events, and their exact posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_positive_int
from .._random import resolve_generator
from .posterior import TelescopePosterior, integrate
from .response import Response

__all__ = ["Telescope", "TelescopeEvents"]

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


@dataclass(frozen=True)
class Telescope(Response):
    """A two-dimensional neutrino telescope with coarse light sensors (`Response`'s fields).

    The labels are position and energy, z = (x, y, energy). The direction angle is a nuisance: it
    is returned with the events, and summed over in the true posterior. Positions are uniform in
    [−box, box]², energies uniform in the logarithm within `energy_range`, angles uniform.

    Example:
        >>> telescope = Telescope()
        >>> events = telescope.sample(100, seed=0)
        >>> events.images.shape
        torch.Size([100, 4, 8, 8])
        >>> true = telescope.true_posterior_images(events.images[:3])
        >>> true.nll(events.z[:3]).shape
        torch.Size([3])
    """

    @property
    def bounds(self) -> tuple[tuple[float, float, float], tuple[float, float, float]]:
        """Lower and upper bounds of the labels (x, y, energy) under the prior."""
        low, high = self.energy_range
        return (-self.box, -self.box, low), (self.box, self.box, high)

    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw labels: z of shape (N, 3) and angle of shape (N,), on the generator's device."""
        n = check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        device = generator.device if generator is not None else None
        uniform = torch.rand(n, 4, generator=generator, device=device)
        low, high = self.energy_range
        energy = (low * (high / low) ** uniform[:, 2:3]).clamp(low, high)
        z = torch.cat([self.box * (2 * uniform[:, :2] - 1), energy], 1)
        return z, math.pi * (2 * uniform[:, 3] - 1)

    def sample(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> TelescopeEvents:
        """Draw events from the prior.

        Arguments:
            n: N, the number of events.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.

        Returns:
            The events, in torch's default dtype.

        Raises:
            ValueError: If `n` is no positive whole number, or both `generator` and `seed` are set.
        """
        generator = resolve_generator(generator, seed)
        return self.simulate(*self.sample_prior(n, generator), generator=generator)

    def simulate(
        self,
        z: Tensor,
        angle: Tensor,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> TelescopeEvents:
        """Simulate events of given labels.

        Arguments:
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).
            angle: Direction angles in radians, shape (N,).
            generator: The source of randomness, on the device of `z`.
            seed: A seed, in place of a generator.

        Returns:
            The events, in the dtype of `z`.

        Raises:
            ValueError: If shapes differ from these, an energy is not positive, or both `generator`
                and `seed` are set.
        """
        z, angle = self._check_labels(z, angle)
        if not len(z):
            raise ValueError("Expected at least one row in z; got none. Give labels to simulate.")
        generator = resolve_generator(generator, seed)
        images = z.new_zeros(len(z), *self.image_shape)
        lengths = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        flat = []
        for start in range(0, len(z), _CHUNK):
            rows = slice(start, start + _CHUNK)
            event, sensor, time = self._draw_hits(z[rows], angle[rows], generator)
            images[rows] = self._histogram(event, sensor, time, len(z[rows]))
            lengths[rows] = torch.bincount(event, minlength=len(z[rows]))
            flat.append(torch.cat([self.sensors.to(z)[sensor], time[:, None]], 1))
        longest = max(1, int(lengths.max()))
        hits = z.new_zeros(len(z), longest, 3)
        hits[torch.arange(longest, device=z.device) < lengths[:, None]] = torch.cat(flat)
        return TelescopeEvents(z, angle, images, hits, lengths)

    def true_posterior_images(self, images: Tensor, resolution: int = 1) -> TelescopePosterior:
        """Return the exact posterior of position and energy given images, on adaptive grids.

        Arguments:
            images: Counts, shape (N, T, H, W).
            resolution: Multiplies the number of cells per axis and of energies and angles.

        Returns:
            The posteriors of the events, the angle summed over.

        Raises:
            ValueError: If `images` has another shape or are no counts.
        """
        images = self._check_images(images)
        channels = [self.image_channels(image) for image in images]
        return integrate(self, channels, check_positive_int(resolution, "resolution"))

    def true_posterior_hits(
        self, hits: Tensor, lengths: Tensor, resolution: int = 1
    ) -> TelescopePosterior:
        """Return the exact posterior of position and energy given hit lists, on adaptive grids.

        Arguments:
            hits: Sensor x, sensor y (metres) and time (ns), padded, shape (N, M, 3).
            lengths: The number of hits, shape (N,).
            resolution: Multiplies the number of cells per axis and of energies and angles.

        Returns:
            The posteriors of the events, the angle summed over.

        Raises:
            ValueError: If shapes differ from these or a hit is at no sensor or outside the times.
        """
        hits, lengths = self._check_hits(hits, lengths)
        pairs: Iterator[tuple[Tensor, int]] = zip(hits, lengths.tolist(), strict=True)
        channels = [self.hit_channels(event[:length]) for event, length in pairs]
        return integrate(self, channels, check_positive_int(resolution, "resolution"))

    def _draw_hits(
        self, z: Tensor, angle: Tensor, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return event, sensor and time of all hits, shape (hits,), by event and time."""
        offset = self.sensors.to(z) - z[:, None, :2]
        distance = self.distance(offset)
        expected = z[:, 2, None] * self.brightness(offset, distance, angle[:, None])
        signal = torch.poisson(expected, generator=generator).long().flatten()
        first, last = self.time_edges[0], self.time_edges[-1]
        noise = torch.full_like(expected, self.noise * (last - first))
        dark = torch.poisson(noise, generator=generator).long().flatten()

        pixel = torch.arange(expected.numel(), device=z.device)
        lit, unlit = pixel.repeat_interleave(signal), pixel.repeat_interleave(dark)
        uniform = torch.rand(
            len(lit) + len(unlit), generator=generator, dtype=z.dtype, device=z.device
        ).clamp(min=torch.finfo(z.dtype).tiny, max=1 - torch.finfo(z.dtype).eps)
        path = distance.flatten()[lit]
        gumbel = -(-uniform[: len(lit)].log()).log()
        spread = self.time_spread + self.time_spread_growth * path
        time = torch.cat(
            [path / self.speed + spread * gumbel, first + (last - first) * uniform[len(lit) :]]
        )
        pixel = torch.cat([lit, unlit])
        kept = (time > first) & (time < last)
        pixel, time = pixel[kept], time[kept]
        order = time.argsort()
        order = order[(pixel[order] // len(self.sensors)).argsort(stable=True)]
        pixel, time = pixel[order], time[order]
        return pixel // len(self.sensors), pixel % len(self.sensors), time

    def _histogram(self, event: Tensor, sensor: Tensor, time: Tensor, n: int) -> Tensor:
        """Return the counts of n events per time bin and sensor, shape (n, T, H, W)."""
        bins, rows, columns = self.image_shape
        edges = torch.tensor(self.time_edges[1:-1], dtype=time.dtype, device=time.device)
        index = (event * bins + torch.bucketize(time, edges)) * rows * columns + sensor
        counts = torch.bincount(index, minlength=n * bins * rows * columns)
        return counts.reshape(n, bins, rows, columns).to(time.dtype)
