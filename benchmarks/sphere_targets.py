"""Densities on the sphere of which everything is known, to train on and to compare with.

Draws are exact (rejection where there is no inverse), norms closed or by quadrature, all in
double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

DOUBLE = torch.float64
DEGREE = math.pi / 180


@dataclass(frozen=True)
class Target:
    """A density: `sample(n, generator)` gives (n, 3), `log_prob(z)` nats per steradian."""

    sample: Callable[[int, torch.Generator], Tensor]
    log_prob: Callable[[Tensor], Tensor]


def uniform(n: int, generator: torch.Generator) -> Tensor:
    return torch.rand(n, generator=generator, dtype=DOUBLE)


def place(axis: Tensor, v: Tensor, azimuth: Tensor) -> Tensor:
    """Directions at 1 − cos θ = v and an azimuth about axes (n, 3), whatever their zero."""
    other = torch.nn.functional.one_hot(axis.abs().argmin(-1), 3).to(axis)
    first = normalize(torch.linalg.cross(axis, other), dim=-1)
    second = torch.linalg.cross(axis, first)
    across = azimuth.cos()[:, None] * first + azimuth.sin()[:, None] * second
    return (1 - v)[:, None] * axis + (v * (2 - v)).sqrt()[:, None] * across


def vmf_deficit(kappa: Tensor, generator: torch.Generator) -> Tensor:
    """1 − cos θ of von Mises–Fisher densities."""
    share = uniform(len(kappa), generator)
    return -torch.log1p(share * torch.expm1(-2 * kappa)) / kappa


def mixture(axes: Tensor, kappas: Tensor, weights: Tensor) -> Target:
    """Von Mises–Fisher densities with axes (M, 3), concentrations (M,) and weights (M,)."""
    axes, weights = normalize(axes.to(DOUBLE), dim=-1), weights.to(DOUBLE) / weights.sum()
    kappas = kappas.to(DOUBLE)
    log_norm = torch.log(weights * kappas / (2 * math.pi)) - torch.log(-torch.expm1(-2 * kappas))

    def sample(n: int, generator: torch.Generator) -> Tensor:
        part = torch.multinomial(weights, n, True, generator=generator)
        azimuth = 2 * math.pi * uniform(n, generator)
        return place(axes[part], vmf_deficit(kappas[part], generator), azimuth)

    def log_prob(z: Tensor) -> Tensor:
        found = []
        for some in z.to(DOUBLE).split(4096):
            v = ((some[:, None] - axes) ** 2).sum(-1) / 2
            found.append(torch.logsumexp(log_norm - kappas * v, -1))
        return torch.cat(found)

    return Target(sample, log_prob)


def one(axis: list[float], kappa: float) -> Target:
    """A von Mises–Fisher density."""
    return mixture(torch.tensor([axis]), torch.tensor([kappa]), torch.ones(1))


def several(axes: list[list[float]], kappa: float, weights: list[float]) -> Target:
    """Von Mises–Fisher densities of one concentration."""
    return mixture(torch.tensor(axes), torch.full((len(axes),), kappa), torch.tensor(weights))


def kent(kappa: float, ovalness: float = 0.6) -> Target:
    """A Kent density about +z with β = ovalness · κ / 2, its longer axis along x."""
    beta = ovalness * kappa / 2

    def log_shape(v: Tensor, azimuth: Tensor) -> Tensor:
        return -kappa * v + beta * v * (2 - v) * (2 * azimuth).cos()

    nodes = torch.linspace(0, 1, 20_001, dtype=DOUBLE) * min(2.0, 60 / (kappa - 2 * beta))
    azimuths = (torch.arange(128, dtype=DOUBLE) + 0.5) / 128 * 2 * math.pi
    values = torch.exp(log_shape(nodes[:, None], azimuths)).mean(1) * 2 * math.pi
    log_norm = math.log(float(torch.trapezoid(values, nodes)))

    def sample(n: int, generator: torch.Generator) -> Tensor:
        found: list[Tensor] = []
        while sum(map(len, found)) < n:
            v = vmf_deficit(torch.full((2 * n,), kappa - 2 * beta, dtype=DOUBLE), generator)
            azimuth = 2 * math.pi * uniform(2 * n, generator)
            log_keep = log_shape(v, azimuth) + (kappa - 2 * beta) * v
            keep = uniform(2 * n, generator).log() < log_keep
            found.append(polar(v[keep], azimuth[keep]))
        return torch.cat(found)[:n]

    def log_prob(z: Tensor) -> Tensor:
        z = z.to(DOUBLE)
        square = z[:, 0] ** 2 + z[:, 1] ** 2
        v = torch.where(z[:, 2] > 0, square / (1 + z[:, 2]), 1 - z[:, 2])
        return -kappa * v + beta * (z[:, 0] ** 2 - z[:, 1] ** 2) - log_norm

    return Target(sample, log_prob)


def ring(radius: float, width: float) -> Target:
    """A ring about +z, of normal profile; radius and width in degrees."""
    radius, width = radius * DEGREE, width * DEGREE
    theta = torch.linspace(max(0.0, radius - 9 * width), radius + 9 * width, 20_001, dtype=DOUBLE)
    values = torch.exp(-(((theta - radius) / width) ** 2) / 2) * theta.sin()
    log_norm = math.log(2 * math.pi * float(torch.trapezoid(values, theta)))

    def sample(n: int, generator: torch.Generator) -> Tensor:
        found: list[Tensor] = []
        while sum(map(len, found)) < n:
            noise = torch.randn(4 * n, generator=generator, dtype=DOUBLE)
            theta = (radius + width * noise).clamp_min(0)
            keep = uniform(4 * n, generator) < theta.sin()
            theta = theta[keep]
            found.append(
                polar(2 * (theta / 2).sin() ** 2, 2 * math.pi * uniform(len(theta), generator))
            )
        return torch.cat(found)[:n]

    def log_prob(z: Tensor) -> Tensor:
        z = z.to(DOUBLE)
        theta = torch.atan2(torch.hypot(z[:, 0], z[:, 1]), z[:, 2])
        return -(((theta - radius) / width) ** 2) / 2 - log_norm

    return Target(sample, log_prob)


def polar(v: Tensor, azimuth: Tensor) -> Tensor:
    """Directions about +z, with the azimuth counted from x."""
    across = (v * (2 - v)).sqrt()
    return torch.stack([across * azimuth.cos(), across * azimuth.sin(), 1 - v], -1)


def turned(target: Target, rotation: Tensor) -> Target:
    """A target turned by a rotation (3, 3)."""
    rotation = rotation.to(DOUBLE)
    return Target(
        lambda n, generator: target.sample(n, generator) @ rotation.T,
        lambda z: target.log_prob(z.to(DOUBLE) @ rotation),
    )


def places(seed: int, count: int = 300) -> Target:
    """A stand-in for catalogues of places of the world: 300 peaks of 1° to 8°."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.randn(count, 3, generator=generator, dtype=DOUBLE)
    kappas = 50 * 40 ** uniform(count, generator)
    # Dirichlet(1): normalised exponentials
    return mixture(axes, kappas, -torch.log(uniform(count, generator)))


THREE = [[1.0, 0.0, 0.2], [0.0, 1.0, 0.3], [-0.5, 0.2, 1.0]]
SHAPES: dict[str, Target] = {
    "uniform": one([0.0, 0.0, 1.0], 1e-6),
    "vMF, κ = 20": one([0.0, 0.0, 1.0], 20.0),
    "vMF, κ = 2000": one([0.0, 0.0, 1.0], 2000.0),
    "Kent, κ = 20": kent(20.0),
    "Kent, κ = 2000": kent(2000.0),
    "ring, 30° ± 1°": ring(30, 1),
    "antipodal, κ = 20": several([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], 20.0, [0.5, 0.5]),
    "antipodal, κ = 200": several([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]], 200.0, [0.5, 0.5]),
    "three modes, κ = 20": several(THREE, 20.0, [0.5, 0.3, 0.2]),
    "three modes, κ = 200": several(THREE, 200.0, [0.5, 0.3, 0.2]),
}
