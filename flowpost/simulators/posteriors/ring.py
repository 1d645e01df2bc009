"""A measured radius whose precision is itself a label: arcs and rings from 1e-3 to 0.5 wide."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import TractableSimulator
from ._grid import GridDensity

__all__ = ["Ring"]

_NOISE = 0.3
_LOG_WIDTH, _SLOPE = -4.0, 1.2
_BATCH = 20_000


class Ring(TractableSimulator):
    r"""Three labels, three data: a noise level, and a point of which mostly the radius is known.

    All labels are standard normal a priori, and with :math:`r = \sqrt{z_2^2 + z_3^2}`

    .. math:: x_1 = z_1 + 0.3\,\epsilon_1,\quad x_2 = r + e^{-4 + 1.2 z_1} \epsilon_2,\quad
              x_3 = z_2 + 0.3\,\epsilon_3.

    The posterior of :math:`(z_2, z_3)` is a ring, a pair of arcs or a blob, mirrored at z₃ = 0,
    whose width is between 1e-3 and one of the prior's and correlated with z₁.

    *The posterior* is drawn in :math:`(z_1, \epsilon_2, \varphi)`, where the density is smooth
    whatever the width, by `GridDensity`.
    """

    dim = 3
    features = 3

    def _prior(self, n: int, generator: torch.Generator | None) -> Tensor:
        return torch.randn(n, 3, generator=generator, dtype=torch.float64)

    def _simulate(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        radius = torch.hypot(z[:, 1], z[:, 2])
        return torch.stack(
            (
                z[:, 0] + _NOISE * noise[:, 0],
                radius + (_LOG_WIDTH + _SLOPE * z[:, 0]).exp() * noise[:, 1],
                z[:, 1] + _NOISE * noise[:, 2],
            ),
            -1,
        )

    def _posterior(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        grid = _density(x)
        kept: list[Tensor] = []
        count = 0
        while count < n:
            kept.append(grid.sample(min(4 * n, _BATCH), generator))
            count += len(kept[-1])
        level, epsilon, angle = torch.cat(kept)[:n].unbind(-1)
        radius = x[1] - (_LOG_WIDTH + _SLOPE * level).exp() * epsilon
        return torch.stack((level, radius * angle.cos(), radius * angle.sin()), -1)

    def _log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        log_width = _LOG_WIDTH + _SLOPE * z[:, 0]
        residual = (x[:, 1] - torch.hypot(z[:, 1], z[:, 2])) / log_width.exp()
        log_prior = _log_normal(z).sum(-1)
        noise = _log_normal((x[:, [0, 2]] - z[:, :2]) / _NOISE).sum(-1) - 2 * math.log(_NOISE)
        return log_prior + noise + _log_normal(residual) - log_width

    def _log_evidence(self, x: Tensor) -> Tensor:
        return torch.stack([_density(event).log_integral for event in x])


def _log_normal(value: Tensor) -> Tensor:
    return -0.5 * value.square() - 0.5 * math.log(2 * math.pi)


def _density(x: Tensor) -> GridDensity:
    """Return p(x, z) in the coordinates (z₁, ε₂, φ), the Jacobian included."""

    def log_density(p: Tensor) -> Tensor:
        level, epsilon, angle = p.unbind(-1)
        radius = x[1] - (_LOG_WIDTH + _SLOPE * level).exp() * epsilon
        log_radius = radius.clamp(min=1e-300).log().where(radius > 0, -math.inf)
        noise = _log_normal((x[0] - level) / _NOISE) + _log_normal(
            (x[2] - radius * angle.cos()) / _NOISE
        )
        prior = _log_normal(level) - 0.5 * radius.square() - math.log(2 * math.pi) + log_radius
        return prior + _log_normal(epsilon) + noise - 2 * math.log(_NOISE)

    variance = 1 / (1 + _NOISE**-2)
    centre, reach = float(x[0]) * variance / _NOISE**2, 8 * math.sqrt(variance)
    box = (centre - reach, -8.0, -math.pi), (centre + reach, 8.0, math.pi)
    return GridDensity(log_density, *box, cells=(48, 48, 72))
