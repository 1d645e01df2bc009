r"""Importance sampling from a mixture of kernels about draws of a posterior.

Draws of a Markov chain can hold the modes of a posterior in wrong shares. A mixture q of kernels
about some of them, each with the covariance of its neighbours, is a proposal from which

.. math:: p(x) = E_q\!\left[\frac{p(x, z)}{q(z)}\right]

and new draws follow with known errors; the number of effective draws tells how good q was. The
kernels are Student's t of 8 degrees of freedom in ln E, the position and the tangent plane of the
direction, mapped to the sphere by Lambert's equal-area projection. A step that leaves the disc of
the projection meets no label, and has weight zero.

Source: *Population Monte Carlo*, O. Cappé et al., 2004, https://doi.org/10.1198/106186004X12803.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..directions import tangent_frame

__all__ = ["Refined", "refine"]

_DOF = 8
_KERNELS = 256
_NEIGHBOURS = 0.125
_WIDTH = 1.0
_WIDE = 2.0
_EVERY = 8


class Refined(NamedTuple):
    """Draws of N posteriors, S of each.

    Attributes:
        samples: Labels, shape (N, S, 7).
        log_joint: ln p(x, z) of them, shape (N, S).
        log_evidence: ln p(x), shape (N,).
        effective: Effective number of proposals that the draws were chosen from, shape (N,).
            The error of `log_evidence` is about the inverse of its root.
    """

    samples: Tensor
    log_joint: Tensor
    log_evidence: Tensor
    effective: Tensor


def refine(
    samples: Tensor,
    log_joint: Callable[[Tensor], Tensor],
    proposals: int,
    generator: torch.Generator | None,
) -> Refined:
    """Return better draws, chosen among proposals of a mixture about the given ones.

    Arguments:
        samples: Labels in random order, shape (N, S, 7), float64.
        log_joint: ln p(x, z), (N, P, 7) -> (N, P), float64, −inf outside the prior.
        proposals: P, the number of proposals of every event.
        generator: The source of randomness.
    """
    mixture = _Mixture.fit(samples)
    each = -(-proposals // mixture.centres.shape[1])
    z, inside = mixture.draw(each, generator)
    joint = torch.where(inside, log_joint(z), -math.inf)
    log_weight = joint - mixture.log_prob(z)
    total = log_weight.logsumexp(1)
    weight = (log_weight - total[:, None]).exp()
    device = samples.device if generator is None else generator.device
    shape = samples.shape[:2]
    offset = torch.rand(len(z), 1, generator=generator, dtype=z.dtype, device=device)
    wanted = (torch.arange(shape[1], device=z.device) + offset.to(z.device)) / shape[1]
    chosen = torch.searchsorted(weight.cumsum(1), wanted).clamp(max=z.shape[1] - 1)
    order = torch.rand(shape, generator=generator, device=device).to(z.device).argsort(1)
    chosen = chosen.gather(1, order)
    return Refined(
        z.gather(1, chosen[..., None].expand(-1, -1, 7)),
        joint.gather(1, chosen),
        total - math.log(z.shape[1]),
        1 / weight.square().sum(1),
    )


class _Mixture(NamedTuple):
    """Kernels at `centres` (N, K, 7), `frames` (N, K, 2, 3) and covariances L Lᵀ (N, K, 6, 6)."""

    centres: Tensor
    frames: Tensor
    tril: Tensor

    @classmethod
    def fit(cls, samples: Tensor) -> _Mixture:
        centres = samples[:, :_KERNELS]
        frames = tangent_frame(centres[..., 4:])
        step = _coordinates(samples, centres, frames)
        mean = samples[..., 4:].mean(1, keepdim=True)
        angle = ((samples[..., 4:] - mean).square().sum((1, 2)) / samples.shape[1] / 2).sqrt()
        flat = torch.cat([samples[..., :1].log(), samples[..., 1:4]], -1)
        scale = torch.cat([flat.std(1), angle[:, None].expand(-1, 2)], 1).clamp_min(1e-6)
        step = step / scale[:, None, None]

        count = max(16, int(_NEIGHBOURS * samples.shape[1]))
        near = step.square().sum(-1).topk(count, dim=1, largest=False).indices
        near_step = step.gather(1, near[..., None].expand(-1, -1, -1, 6))
        offset = near_step - near_step.mean(1, keepdim=True)
        covariance = torch.einsum("nski,nskj->nkij", offset, offset) / (count - 1)
        floor = 1e-6 * torch.eye(6, dtype=samples.dtype, device=samples.device)
        tril = torch.linalg.cholesky(covariance + floor)
        width = torch.full_like(tril[0, :, :1, :1], _WIDTH)
        width[::_EVERY] = _WIDE  # for what lies between the draws
        return cls(centres, frames, width * scale[:, None, :, None] * tril)

    def draw(self, each: int, generator: torch.Generator | None) -> tuple[Tensor, Tensor]:
        """Return labels (N, K·each, 7), and whether they are any."""
        shape = (len(self.centres), each, self.centres.shape[1])
        device = self.centres.device if generator is None else generator.device
        normal = torch.randn(
            *shape, 6 + _DOF, generator=generator, dtype=torch.float64, device=device
        ).to(self.centres)
        chi2 = normal[..., 6:].square().sum(-1, keepdim=True)
        step = torch.einsum("nkij,nskj->nski", self.tril, normal[..., :6])
        step = step * (_DOF / chi2).sqrt()
        tangent, square = step[..., 4:], step[..., 4:].square().sum(-1, keepdim=True)
        inside = square[..., 0] < 4
        sideways = torch.einsum("nski,nkij->nskj", tangent, self.frames)
        direction = self.centres[:, None, :, 4:] * (1 - square / 2)
        direction = direction + sideways * (1 - square / 4).clamp_min(0).sqrt()
        direction = direction / direction.norm(dim=-1, keepdim=True).clamp_min(1e-12)
        energy = self.centres[:, None, :, :1] * step[..., :1].clamp(-50, 50).exp()
        position = self.centres[:, None, :, 1:4] + step[..., 1:4]
        z = torch.cat([energy, position, direction], -1)
        return z.flatten(1, 2), inside.flatten(1, 2)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln q(z) per TeV, m³ and steradian, shape (N, P, 7) -> (N, P)."""
        inverse = torch.linalg.inv(self.tril)
        log_norm = math.lgamma((_DOF + 6) / 2) - math.lgamma(_DOF / 2)
        log_norm = log_norm - 3 * math.log(_DOF * math.pi) - math.log(self.centres.shape[1])
        norm = log_norm + inverse.diagonal(dim1=-2, dim2=-1).log().sum(-1)
        parts = []
        for part in z.split(512, 1):
            step = _coordinates(part, self.centres, self.frames)
            square = torch.einsum("nkij,nskj->nski", inverse, step).square().sum(-1)
            kernel = norm[:, None] - (_DOF + 6) / 2 * torch.log1p(square / _DOF)
            parts.append(kernel.logsumexp(-1) - part[..., 0].log())
        return torch.cat(parts, 1)


def _coordinates(z: Tensor, centres: Tensor, frames: Tensor) -> Tensor:
    """Return ln E, position and tangent coordinates about centres, (N, P, 7) -> (N, P, K, 6)."""
    energy = z[:, :, None, :1].log() - centres[:, None, :, :1].log()
    position = z[:, :, None, 1:4] - centres[:, None, :, 1:4]
    cosine = torch.einsum("nsi,nki->nsk", z[..., 4:], centres[..., 4:])
    # Lambert's projection; its radius is at most 2
    tangent = torch.einsum("nsj,nkij->nski", z[..., 4:], frames)
    tangent = tangent * (2 / (1 + cosine).clamp_min(1e-12)).sqrt()[..., None]
    return torch.cat([energy, position, tangent], -1)
