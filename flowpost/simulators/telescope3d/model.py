"""The telescope in three dimensions: labels, simulated events, true posterior and first guess."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution

from ..._checks import check_positive_int
from .._nuisance import Factors, check_nuisance, telescope_nuisances
from .._random import resolve_generator
from .checks import check_labels
from .events import Telescope3DEvents, draw_hits
from .guess import centre_and_dipole, line_fit
from .labels import pack, unpack
from .posterior import Telescope3DPosterior, draw_prior, log_prior, sample_posterior
from .refine import Refined
from .response import Response3D

__all__ = ["Telescope3D"]

_CHUNK = 2048


@dataclass(frozen=True)
class Telescope3D(Response3D):
    """A three-dimensional neutrino telescope: strings of light sensors (`Response3D`'s fields).

    The labels are energy (TeV), position (metres) and direction of travel (a unit vector), in
    columns z = (energy, x, y, z, dx, dy, dz): six degrees of freedom. Positions are uniform in
    [−box, box]³, energies uniform in the logarithm within `energy_range`, directions uniform on the
    sphere. An event is the list of its hits. The position of a track is where it is at t = 0.

    Light yield, scattering and noise can differ from event to event (`nuisances`). The true
    posterior is that of the nominal response; another one for all events is a field, such as
    `dataclasses.replace(telescope, noise=2e-5)`.

    Example:
        >>> telescope = Telescope3D(kind="track")
        >>> events = telescope.sample(100, seed=0)
        >>> events.z.shape, events.labels["direction"].shape
        (torch.Size([100, 7]), torch.Size([100, 3]))
        >>> telescope.log_prob_hits(events.hits, events.lengths, events.z).shape
        torch.Size([100])
    """

    def sample_prior(
        self,
        n: int,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw labels, shape (N, 7), on the generator's device; arguments as in `sample`."""
        n = check_positive_int(n, "n")
        return draw_prior(self, n, resolve_generator(generator, seed), dtype)

    @staticmethod
    def nuisances() -> dict[str, tuple[Distribution, float]]:
        """Return priors and nominal values of the nuisances, by name.

        They are factors on the response of an event, 1 for the nominal one:

        - "light_yield": y, with A → y·A; normal, 1 ± 0.10.
        - "scattering": s, the amount of scattering per metre, with λ → λ/s and ℓ → ℓ/√s; normal,
          1 ± 0.15.
        - "noise": β, with b → β·b; uniform between 1 and 3.

        The symbols are those of `Response3D`.
        """
        return telescope_nuisances()

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
        nuisance: Mapping[str, Any] | None = None,
    ) -> Telescope3DEvents:
        """Draw events from the prior.

        Arguments:
            n: N, the number of events.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.
            dtype: Of the events; by default torch's default dtype.
            nuisance: Factors on "light_yield", "scattering" and "noise", each a number or of shape
                (N,); 1 where left out.

        Returns:
            The events.

        Raises:
            ValueError: If `n` is no positive whole number, both `generator` and `seed` are set, or
                a factor has another shape or is not positive.
        """
        generator = resolve_generator(generator, seed)
        z = self.sample_prior(n, generator, dtype=dtype)
        return self.simulate(z, generator, nuisance=nuisance)

    def simulate(
        self,
        z: Tensor,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        nuisance: Mapping[str, Any] | None = None,
    ) -> Telescope3DEvents:
        """Simulate events of given labels.

        Arguments:
            z: Energy (TeV), position (metres) and direction of travel, shape (N, 7).
            generator: The source of randomness, on the device of `z`.
            seed: A seed, in place of a generator.
            nuisance: Factors on "light_yield", "scattering" and "noise", each a number or of shape
                (N,); 1 where left out.

        Returns:
            The events, in the dtype of `z`.

        Raises:
            ValueError: If `z` has another shape or no row, an energy or a factor is not positive, a
                direction no unit vector, or both `generator` and `seed` are set.
        """
        z = check_labels(z)
        if not len(z):
            raise ValueError("Expected at least one row in z; got none. Give labels to simulate.")
        generator = resolve_generator(generator, seed)
        factors = check_nuisance(nuisance, z)
        chunks = zip(*(column.split(_CHUNK) for column in (z, *factors)), strict=True)
        parts = [draw_hits(self, rows, Factors(*some), generator) for rows, *some in chunks]
        lengths = torch.cat([count for _, count in parts])
        longest = max(1, int(lengths.max()))
        hits = z.new_zeros(len(z), longest, 4)
        real = torch.arange(longest, device=z.device) < lengths[:, None]
        hits[real] = torch.cat([flat for flat, _ in parts])
        return Telescope3DEvents(z, hits, lengths)

    @staticmethod
    def pack(labels: Mapping[str, Any]) -> Tensor:
        """Return labels by name (energy, position, direction) as columns, shape (N, 7)."""
        return pack(labels)

    @staticmethod
    def unpack(z: Tensor) -> dict[str, Tensor]:
        """Return columns (..., 7) by name: energy (...,), position and direction (..., 3)."""
        return unpack(z)

    def log_prior(self, z: Tensor) -> Tensor:
        """Return ln p(z) in nats (per TeV, m³ and steradian), shape (N, 7) -> (N,)."""
        return log_prior(self, check_labels(z))

    def log_joint(
        self,
        hits: Tensor,
        lengths: Tensor,
        z: Tensor,
        nuisance: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return ln p(hits, z), the posterior up to a constant; arguments as in `log_prob_hits`."""
        return self.log_prob_hits(hits, lengths, z, nuisance) + self.log_prior(z)

    def true_posterior(
        self,
        hits: Tensor,
        lengths: Tensor,
        particles: int = 512,
        moves: int = 10,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Telescope3DPosterior:
        """Return the true posterior as draws with an evidence, by Monte Carlo.

        Draws of the prior are tempered into the posterior, and then replaced by draws of known
        weights from a mixture about them. Events with few effective draws are run again with four
        times as many. The densities have an error of some 0.02 nats.

        Arguments:
            hits: Sensor x, y, z (metres) and time (ns), padded, shape (N, M, 4).
            lengths: The number of hits, shape (N,).
            particles: S, the number of draws per event, even.
            moves: Metropolis moves of every draw per tempering step.
            generator: The source of randomness.
            seed: A seed, in place of a generator.

        Returns:
            The posteriors of the events.

        Raises:
            ValueError: If shapes differ from these, a hit is at no sensor or outside the window,
                there is no event, `particles` is odd or less than 64, or both `generator` and
                `seed` are set.
        """
        hits, lengths = self.check_hits(hits, lengths)
        if not len(hits):
            raise ValueError("Expected at least one event in hits; got none. Give hits of events.")
        if check_positive_int(particles, "particles", 64) % 2:
            raise ValueError(f"Expected particles as an even number; got {particles}. Add one.")
        moves = check_positive_int(moves, "moves")
        generator = resolve_generator(generator, seed)
        fields = self._refined(hits, lengths, particles, moves, generator)
        hard = (fields.effective < _LEAST * particles).nonzero().flatten()
        if len(hard):
            more = self._refined(hits[hard], lengths[hard], 4 * particles, 2 * moves, generator)
            for old, new in zip(fields, more, strict=True):
                old[hard] = new[:, :particles] if new.ndim > 1 else new
        return Telescope3DPosterior(self, hits, lengths, *fields)

    def _refined(
        self,
        hits: Tensor,
        lengths: Tensor,
        particles: int,
        moves: int,
        generator: torch.Generator | None,
    ) -> Refined:
        """Return draws for all events, in groups of like lengths so that little is padded."""
        size = max(1, _GROUP // (8 * particles * (len(self.sensors) + hits.shape[1])))
        order = lengths.argsort(stable=True)
        parts = []
        for rows in order.split(size):
            part = hits[rows, : max(1, int(lengths[rows].max()))]
            parts.append(sample_posterior(self, part, lengths[rows], particles, moves, generator))
        back = order.argsort()
        return Refined(*(torch.cat(column)[back] for column in zip(*parts, strict=True)))

    def hits_per_tev(self) -> float:
        """Return the expected signal hits per TeV, averaged over positions and directions."""
        z = draw_prior(self, 1024, torch.Generator().manual_seed(0), torch.float64)
        signal = self.expected_counts(z).sum(1) - self._noise_hits
        return float((signal / z[:, 0]).mean())

    @property
    def _noise_hits(self) -> float:
        return self.noise * (self.window[1] - self.window[0]) * len(self.sensors)

    def first_guess(self, hits: Tensor, lengths: Tensor) -> dict[str, Tensor]:
        """Return a fast reconstruction, such as a network can refine.

        Position and direction of a track are from a straight line fitted to hit positions over
        times; of a cascade, the centre of the early hits and the direction in which the light lies
        from there. The energy is the number of hits less the expected noise, over `hits_per_tev`,
        within `energy_range`. Events that do not tell have the direction (0, 0, −1), downwards.

        Arguments:
            hits: Sensor x, y, z (metres) and time (ns), padded, shape (N, M, 4).
            lengths: The number of hits, shape (N,).

        Returns:
            "energy" of shape (N,), "position" and "direction" of shape (N, 3).

        Raises:
            ValueError: If shapes differ from these, or a hit is at no sensor or outside the window.
        """
        hits, lengths = self.check_hits(hits, lengths)
        fit = line_fit if self.kind == "track" else centre_and_dipole
        position, direction = fit(hits, lengths)
        signal = lengths.to(hits.dtype) - self._noise_hits
        energy = (signal / self.hits_per_tev()).clamp(*self.energy_range)
        return {"energy": energy, "position": position, "direction": direction}


_GROUP = 2**22
"""Likelihoods of prior draws per group of events that is tempered together."""

_LEAST = 0.25
"""Effective proposals per draw below which an event is run again."""
