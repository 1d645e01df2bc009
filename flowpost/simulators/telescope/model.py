"""The telescope: labels from the prior, simulated events, and their exact posterior."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._checks import check_positive_int
from .._nuisance import check_nuisance, telescope_nuisances
from .._random import resolve_generator
from .checks import check_labels
from .events import TelescopeEvents, draw_events
from .posterior import TelescopePosterior, integrate
from .response import Response

__all__ = ["Telescope"]


@dataclass(frozen=True)
class Telescope(Response):
    """A two-dimensional neutrino telescope with coarse light sensors (`Response`'s fields).

    The labels are position and energy, z = (x, y, energy). The direction angle is a nuisance: it
    is returned with the events, and summed over in the true posterior. Positions are uniform in
    [−box, box]², energies uniform in the logarithm within `energy_range`, angles uniform.

    Light yield, scattering and noise can differ from event to event (`nuisances`). The true
    posterior is that of the nominal response.

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

    @staticmethod
    def nuisances() -> dict[str, tuple[Distribution, float]]:
        """Return priors and nominal values of the nuisances, by name.

        They are factors on the response of an event, 1 for the nominal one:

        - "light_yield": y, with A → y·A; normal, 1 ± 0.10.
        - "scattering": s, the amount of scattering per metre, with τ₁ → s·τ₁ and ℓ → ℓ/√s; normal,
          1 ± 0.15.
        - "noise": β, with b → β·b; uniform between 1 and 3.

        The symbols are those of `Response`.
        """
        return telescope_nuisances()

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        nuisance: Mapping[str, Any] | None = None,
    ) -> TelescopeEvents:
        """Draw events from the prior.

        Arguments:
            n: N, the number of events.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.
            nuisance: Factors on "light_yield", "scattering" and "noise", each a number or of shape
                (N,); 1 where left out.

        Returns:
            The events, in torch's default dtype.

        Raises:
            ValueError: If `n` is no positive whole number, both `generator` and `seed` are set, or
                a factor has another shape or is not positive.
        """
        generator = resolve_generator(generator, seed)
        return self.simulate(*self.sample_prior(n, generator), generator, nuisance=nuisance)

    def simulate(
        self,
        z: Tensor,
        angle: Tensor,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        nuisance: Mapping[str, Any] | None = None,
    ) -> TelescopeEvents:
        """Simulate events of given labels.

        Arguments:
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).
            angle: Direction angles in radians, shape (N,).
            generator: The source of randomness, on the device of `z`.
            seed: A seed, in place of a generator.
            nuisance: Factors on "light_yield", "scattering" and "noise", each a number or of shape
                (N,); 1 where left out.

        Returns:
            The events, in the dtype of `z`.

        Raises:
            ValueError: If shapes differ from these, an energy or a factor is not positive, or both
                `generator` and `seed` are set.
        """
        z, angle = check_labels(z, angle)
        if not len(z):
            raise ValueError("Expected at least one row in z; got none. Give labels to simulate.")
        generator = resolve_generator(generator, seed)
        seen = draw_events(self, z, angle, check_nuisance(nuisance, z), generator)
        return TelescopeEvents(z, angle, *seen)

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
        images = self.check_images(images)
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
        hits, lengths = self.check_hits(hits, lengths)
        pairs: Iterator[tuple[Tensor, int]] = zip(hits, lengths.tolist(), strict=True)
        channels = [self.hit_channels(event[:length]) for event, length in pairs]
        return integrate(self, channels, check_positive_int(resolution, "resolution"))
