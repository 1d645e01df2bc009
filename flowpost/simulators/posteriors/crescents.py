"""Two crescents: a sharp, curved posterior with two modes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import TractableSimulator

__all__ = ["Crescents"]

_RADIUS, _WIDTH, _CENTRE = 0.1, 0.01, 0.25
_CHUNK = 2048


class Crescents(TractableSimulator):
    r"""Two labels, two data: :math:`x = p - (|z_1 + z_2|,\ z_1 - z_2)/\sqrt2`.

    The point :math:`p = (r \cos a + 0.25,\ r \sin a)` has :math:`a \sim U(-\pi/2, \pi/2)` and
    :math:`r \sim N(0.1, 0.01^2)`; the prior is uniform on [−1, 1]². The posterior is a crescent and
    its mirror image at :math:`z_1 + z_2 = 0`, cut by the box.

    Since :math:`z \to p` is a rotation on either side of the mirror, the posterior is that of p
    itself, where it gives labels inside the box: draw p, solve for the labels, reject.

    Source: J.-M. Lueckmann et al., *Benchmarking simulation-based inference*, 2021,
    https://arxiv.org/abs/2101.04653, task T.8 (two moons).

    >>> x, z = Crescents().sample(5, seed=0)
    >>> Crescents().posterior_sample(x[0], 100, seed=1).shape
    torch.Size([100, 2])
    """

    dim = 2
    features = 2

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Ends of the prior's box [−1, 1]², each of shape (2,)."""
        return -torch.ones(2), torch.ones(2)

    def _prior(self, n: int, generator: torch.Generator | None) -> Tensor:
        return 2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1

    def _simulate(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return _noise(len(z), generator) + _shift(z)

    def _posterior(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        kept: list[Tensor] = []
        count = 0
        for _ in range(1000):
            p = _noise(2 * n, generator)
            side = torch.randint(0, 2, (2 * n,), generator=generator) * 2 - 1
            z, valid = _solve(p, x, side)
            kept.append(z[valid])
            count += int(valid.sum())
            if count >= n:
                return torch.cat(kept)[:n]
        raise ValueError(f"Expected x that the simulator can produce; got {x.tolist()}.")

    def _log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        p = x - _shift(z)
        u, v = p[:, 0] - _CENTRE, p[:, 1]
        r = torch.hypot(u, v)
        log_r = -0.5 * ((r - _RADIUS) / _WIDTH) ** 2 - math.log(_WIDTH * math.sqrt(2 * math.pi))
        return (log_r - (math.pi * r).log() - math.log(4)).where(u > 0, -math.inf)

    def _log_evidence(self, x: Tensor) -> Tensor:
        """Return ln of ¼ · 2 · the fraction of half circles that give labels inside the box."""
        quantiles = (torch.arange(24, dtype=torch.float64) + 0.5) / 24
        radius = _RADIUS + _WIDTH * torch.special.ndtri(quantiles)
        angle = math.pi * ((torch.arange(512, dtype=torch.float64) + 0.5) / 512 - 0.5)
        grid = torch.cartesian_prod(radius, angle)
        p = _half_circle(grid[:, 0], grid[:, 1])
        # the label's box is |t| + |s| ≤ √2 in rotated coordinates, with s ≥ 0
        inside = torch.ones(len(x), dtype=torch.float64)
        s, t = _CENTRE - x[:, 0], x[:, 1]
        edge = (s < 0.2) | (s + t.abs() > math.sqrt(2) - 0.3)
        for rows in edge.nonzero()[:, 0].split(_CHUNK):
            s = p[:, 0] - x[rows, :1]
            t = x[rows, 1:] - p[:, 1]
            inside[rows] = ((s >= 0) & (s + t.abs() <= math.sqrt(2))).double().mean(-1)
        return (inside / 2).log()


def _half_circle(radius: Tensor, angle: Tensor) -> Tensor:
    return torch.stack((radius * angle.cos() + _CENTRE, radius * angle.sin()), -1)


def _noise(n: int, generator: torch.Generator | None) -> Tensor:
    angle = math.pi * (torch.rand(n, generator=generator, dtype=torch.float64) - 0.5)
    radius = _RADIUS + _WIDTH * torch.randn(n, generator=generator, dtype=torch.float64)
    return _half_circle(radius, angle)


def _shift(z: Tensor) -> Tensor:
    return torch.stack((-(z[:, 0] + z[:, 1]).abs(), z[:, 1] - z[:, 0]), -1) / math.sqrt(2)


def _solve(p: Tensor, x: Tensor, side: Tensor) -> tuple[Tensor, Tensor]:
    """Return the labels for half-circle points and a side of the mirror, and which are valid."""
    s, t = p[:, 0] - x[0], x[1] - p[:, 1]
    z = torch.stack((side * s - t, side * s + t), -1) / math.sqrt(2)
    return z, (s >= 0) & (z.abs() <= 1).all(-1)
