"""The true posteriors of events of the three-dimensional telescope, as draws with an evidence."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..._checks import check_shape
from .checks import check_labels
from .refine import Refined, refine
from .response import Response3D
from .tempering import temper

__all__ = ["Telescope3DPosterior", "draw_prior", "log_prior", "sample_posterior"]

_ELEMENTS = 2**18
"""Likelihoods per call: temporary tensors that stay in the cache of a processor core."""


@dataclass(frozen=True)
class Telescope3DPosterior:
    """The posteriors p(energy, position, direction | hits) of N events.

    Attributes:
        response: The telescope that saw the events.
        hits: Their hits, shape (N, M, 4).
        lengths: The numbers of hits, shape (N,).
        samples: Draws, equally weighted, shape (N, S, 7), in the dtype of the hits.
        log_joint: ln p(hits, z) of the draws in nats, shape (N, S), float64.
        log_evidence: ln p(hits) in nats, estimated, shape (N,), float64.
        effective: Effective number of the proposals behind draws and evidence, shape (N,); the
            error of `log_evidence` is about 1/√effective. Do not rely on events below some 50.
    """

    response: Response3D
    hits: Tensor
    lengths: Tensor
    samples: Tensor
    log_joint: Tensor
    log_evidence: Tensor
    effective: Tensor

    def __len__(self) -> int:
        return len(self.samples)

    def __repr__(self) -> str:
        return f"Telescope3DPosterior(N={len(self)}, draws={self.samples.shape[1]})"

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln p(z | hits) at one label per event.

        Arguments:
            z: Energy (TeV), position (metres) and direction of travel, shape (N, 7).

        Returns:
            Log-densities in nats (per TeV, m³ and steradian), shape (N,), float64; −inf outside
            the prior. Their error is that of `log_evidence`.

        Raises:
            ValueError: If `z` has another shape, an energy is not positive or a direction no unit
                vector.
        """
        return self._log_joint(z) - self.log_evidence

    def nll(self, z: Tensor) -> Tensor:
        """Return −ln p(z | hits) in nats, shape (N,): what a perfect posterior scores."""
        return -self.log_prob(z)

    def credibility(self, z: Tensor) -> Tensor:
        """Return the share of the posterior where z is denser than at these labels.

        This is the level of the smallest highest-density region that holds the label; over events
        of the prior it is uniform at the true labels. Shape (N, 7) -> (N,), float64.
        """
        return (self.log_joint > self._log_joint(z)[:, None]).double().mean(1)

    def mean_direction(self) -> Tensor:
        """Return the normalised mean of the directions, shape (N, 3)."""
        mean = self.samples[..., 4:].mean(1)
        return mean / mean.norm(dim=1, keepdim=True).clamp_min(1e-12)

    def direction_radius(self, level: float = 0.5) -> Tensor:
        """Return the angle about the mean direction that holds this share, radians, shape (N,)."""
        if not 0 < level < 1:
            raise ValueError(f"Expected level between 0 and 1; got {level!r}.")
        chord = (self.samples[..., 4:] - self.mean_direction()[:, None]).norm(dim=-1)
        return (2 * (chord / 2).clamp(max=1).asin()).quantile(level, dim=1)

    def _log_joint(self, z: Any) -> Tensor:
        z = check_labels(z).to(self.hits.device)
        check_shape(z, (len(self), 7), "z", "Give one label per event.")
        seen = self.response.log_prob_hits(self.hits, self.lengths, z.double())
        return seen + log_prior(self.response, z.double())


def draw_prior(
    response: Response3D,
    n: int,
    generator: torch.Generator | None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Draw labels, shape (n, 7): energies uniform in the logarithm, the rest uniform."""
    device = generator.device if generator is not None else None
    uniform = torch.rand(n, 4, generator=generator, dtype=dtype, device=device)
    normal = torch.randn(n, 3, generator=generator, dtype=dtype, device=device)
    low, high = response.energy_range
    energy = (low * (high / low) ** uniform[:, :1]).clamp(low, high)
    position = response.box * (2 * uniform[:, 1:] - 1)
    length = normal.norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.cat([energy, position, normal / length], 1)


def log_prior(response: Response3D, z: Tensor) -> Tensor:
    """Return ln p(z) per TeV, m³ and steradian, −inf outside, shape (..., 7) -> (...)."""
    low, high = response.energy_range
    energy, position = z[..., 0], z[..., 1:4]
    # labels that were rounded onto the edge are inside
    inside = (position.abs() <= response.box * (1 + 1e-6)).all(-1)
    inside &= (energy >= low * (1 - 1e-6)) & (energy <= high * (1 + 1e-6))
    volume = 4 * math.pi * (2 * response.box) ** 3 * math.log(high / low)
    return torch.where(inside, -energy.log() - math.log(volume), -math.inf)


def sample_posterior(
    response: Response3D,
    hits: Tensor,
    lengths: Tensor,
    particles: int,
    moves: int,
    generator: torch.Generator | None,
) -> Refined:
    """Return draws of the posteriors: tempered from the prior, then refined.

    For the first part a direction is carried as w ∈ R³ with the prior N(0, I), of which only w/|w|
    is seen: its prior is uniform and every proposal that is symmetric in R⁷ is one of the
    Metropolis rule, without a frame on the sphere.

    Shapes are (N, M, 4) and (N,); in the dtype of the hits, log-densities in float64.
    """
    low, high = (math.log(e) for e in response.energy_range)
    size = max(1, _ELEMENTS // (len(hits) * (len(response.sensors) + hits.shape[1])))

    def likelihood(z: Tensor) -> Tensor:
        parts = z.split(size, 1)
        return torch.cat([response.log_likelihood(hits, lengths, part) for part in parts], 1)

    def prior(theta: Tensor) -> Tensor:
        inside = (theta[..., 1:4].abs() <= response.box).all(-1)
        inside &= (theta[..., 0] >= low) & (theta[..., 0] <= high)
        return torch.where(inside, -theta[..., 4:].square().sum(-1) / 2, -math.inf)

    def joint(z: Tensor) -> Tensor:
        return likelihood(z.to(hits.dtype)).double() + log_prior(response, z)

    start = _start(response, len(hits), 8 * particles, hits, generator)
    theta = temper(start, lambda t: likelihood(_labels(t)), prior, particles, moves, generator)
    samples = _labels(theta).double()
    for proposals in (4 * particles, 4 * particles, 8 * particles):
        refined = refine(samples, joint, proposals, generator)
        samples = refined.samples
    return refined._replace(samples=samples.to(hits.dtype))


def _start(
    response: Response3D, n: int, count: int, like: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Return draws of the prior as ln E, position and w, shape (n, count, 7)."""
    device = like.device if generator is None else generator.device
    z = draw_prior(response, n * count, generator, like.dtype)
    w = torch.randn(n * count, 3, generator=generator, dtype=like.dtype, device=device)
    theta = torch.cat([z[:, :1].log(), z[:, 1:4], w.to(z.device)], 1)
    return theta.reshape(n, count, 7).to(like.device)


def _labels(theta: Tensor) -> Tensor:
    w = theta[..., 4:]
    unit = w / w.norm(dim=-1, keepdim=True).clamp_min(1e-12)
    return torch.cat([theta[..., :1].exp(), theta[..., 1:4], unit], -1)
