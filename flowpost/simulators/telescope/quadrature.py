r"""The exact posterior of position and energy, by adaptive quadrature with the angle summed over.

.. math::

    p(z|x) = \frac{p(z) \int p(x|z, \alpha) \frac{d\alpha}{2\pi}}{p(x)}, \qquad
    p(x) = \int p(z)\, p(x|z, \alpha)\, dz \frac{d\alpha}{2\pi} .

Only the evidence p(x) needs a grid; the density at a label is then computed at that very point.
The grid over the position is a quadtree of cells with 2 × 2 Gauss–Legendre points each. It starts
from a fixed partition of the box, keeps the cells that matter, and splits those whose integral
changes when split. At every position the energy is integrated by Gauss–Legendre in ln E over the
range that holds the mass (about n^(−1/2) wide for n photons), the angle by equal steps, more of
them the more photons an event has.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from .response import Channels, Response

__all__ = ["Cells", "angle_grid", "integrate_position", "log_likelihood", "marginal"]

_CELL = 16.0  # metres, side of the starting cells
_TOLERANCE = 2e-5  # of the evidence, per group of four cells
_MAX_LEVEL = 10
_MARGIN = 12.0  # nats below the evidence that are kept
_PER_PHOTON = 4.0  # nats per photon more in the starting cells
_FAR = 3.0  # nats from the maximum over the energy to the integral where it does not matter
_ENERGIES = 14
_BLOCK = 2**19  # numbers held at once
GAUSS = 1 / math.sqrt(3)
_CORNERS = ((-1.0, -1.0), (-1.0, 1.0), (1.0, -1.0), (1.0, 1.0))


@dataclass(frozen=True)
class Cells:
    """The quadtree of one event: P square cells that do not overlap.

    Attributes:
        index: Column and row of each cell in the regular grid of its level, shape (P, 2), int64.
        level: 0 for the starting cells; their side is halved at every level; shape (P,).
        log_density: ln p(x, position) at the four Gauss–Legendre points, nats, shape (P, 4).
        side: Side of the starting cells, metres.
        origin: Lower bound of both coordinates, metres.
    """

    index: Tensor
    level: Tensor
    log_density: Tensor
    side: float
    origin: float

    @property
    def log_mass(self) -> Tensor:
        """ln of the integral over each cell, shape (P,)."""
        area = 2 * (math.log(self.side) - self.level * math.log(2))
        return self.log_density.logsumexp(1) + area - math.log(4)

    @property
    def points(self) -> Tensor:
        """The Gauss–Legendre points, metres, shape (P, 4, 2)."""
        width = self.side * 0.5 ** self.level.double()[:, None]
        centre = self.origin + (self.index.double() + 0.5) * width
        corners = torch.tensor(_CORNERS, dtype=torch.float64, device=centre.device)
        return centre[:, None] + 0.5 * GAUSS * width[:, None] * corners


def log_likelihood(
    response: Response, channels: Channels, points: Tensor, angles: Tensor, energies: Tensor
) -> Tensor:
    """Return ln p(x | position, angle, energy) on a grid.

    Arguments:
        response: The telescope.
        channels: What was seen of the event.
        points: Positions, metres, shape (P, 2); the result has their dtype.
        angles: Radians, shape (A,).
        energies: TeV, shape (E,).

    Returns:
        Log-likelihoods in nats, shape (P, A, E).
    """
    channels = channels.to(points.dtype)
    ratio = _signal(response, channels, points, angles) / _background(response, channels)
    light = (ratio[:, :, None] * energies[:, None]).log1p() @ channels.photons
    dark = _brightness_total(response, points, angles)[..., None] * energies
    return light - dark + _constant(response, channels)


def _signal(response: Response, channels: Channels, points: Tensor, angles: Tensor) -> Tensor:
    """Return the expected photons per TeV of each channel, shape (P, A, C)."""
    offset = response.sensors.to(points)[channels.sensor] - points[:, None]
    distance = response.distance(offset)
    if channels.stop is None:
        share = response.arrival_density(channels.start, distance)
    else:
        share = response.arrival_cdf(channels.stop, distance)
        share = share - response.arrival_cdf(channels.start, distance)
    return response.brightness(offset[:, None], distance[:, None], angles[:, None]) * share[:, None]


def _background(response: Response, channels: Channels) -> Tensor:
    """Return the expected noise of each channel, shape (C,)."""
    if channels.stop is None:
        return torch.full_like(channels.start, response.noise)
    return response.noise * (channels.stop - channels.start)


def _noise_total(response: Response) -> float:
    """Return the expected noise hits of all sensors together."""
    window = response.time_edges[-1] - response.time_edges[0]
    return response.noise * window * response.rows * response.columns


def _brightness_total(response: Response, points: Tensor, angles: Tensor) -> Tensor:
    """Return the expected photons per TeV of all sensors, shape (P, A).

    The beam (1 + g n·u)² is a polynomial of the direction u, so moments of n over sensors do.
    """
    offset = response.sensors.to(points) - points[:, None]
    distance = response.distance(offset)
    edges = (response.time_edges[0], response.time_edges[-1])
    first, last = (torch.tensor(t, dtype=points.dtype, device=points.device) for t in edges)
    share = response.arrival_cdf(last, distance) - response.arrival_cdf(first, distance)
    weight = response.falloff(distance) * share
    nx, ny = (response.beaming * offset / distance[..., None]).unbind(-1)
    moments = torch.stack([weight, weight * nx, weight * ny], -1)
    total = moments.sum(1)
    square = torch.stack([weight * nx * nx, weight * nx * ny, weight * ny * ny], -1).sum(1)
    c, s = angles.cos(), angles.sin()
    first_order = total[:, 1:2] * c + total[:, 2:3] * s
    second_order = square[:, :1] * c * c + 2 * square[:, 1:2] * c * s + square[:, 2:] * s * s
    return total[:, :1] + 2 * first_order + second_order


def marginal(
    response: Response,
    channels: Channels,
    points: Tensor,
    angles: Tensor,
    depth: float,
    energies: int = 28,
) -> tuple[Tensor, Tensor]:
    """Integrate the likelihood over energy and angle at each position.

    Arguments:
        response: The telescope.
        channels: What was seen of the event.
        points: Positions, metres, shape (P, 2); the computation is in their dtype.
        angles: Radians, shape (A,).
        depth: Positions and angles whose best likelihood over the energy lies this many nats below
            the best one are given that likelihood instead of an integral.
        energies: The number of Gauss–Legendre nodes of the energy.

    Returns:
        The ln of the integral over energy, angle by angle, shape (P, A), and its sum over angles,
        shape (P,) (to be divided by the number of angles of the full circle), float64.
    """
    channels = channels.to(points.dtype)
    parts = []
    step = max(1, _BLOCK // max(1, len(angles) * len(channels.photons)))
    for chunk in points.split(step):
        ratio, total, energy, signal, profile = _profile(response, channels, chunk, angles)
        by_angle = profile - _FAR
        near = profile > profile.max() - depth
        pairs = (ratio[near], total[near], energy[near], signal[near])
        by_angle[near] = _integrate_energy(response, channels, *pairs, energies)
        parts.append(by_angle.double())
    table = torch.cat(parts) + _constant(response, channels)
    return table, table.logsumexp(1)


def _profile(
    response: Response, channels: Channels, points: Tensor, angles: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Find the best energy at each position and angle.

    Returns:
        Photons per TeV over noise of each channel (P, A, C) and of all sensors (P, A), the energy
        (P, A), the number of photons that are signal (P, A), and the log-likelihood there (P, A).
    """
    ratio = _signal(response, channels, points, angles) / _background(response, channels)
    total = _brightness_total(response, points, angles).clamp(min=1e-20)
    low, high = response.energy_range
    energy = (channels.photons.sum() / total).clamp(low, high)
    signal = energy
    # Expectation-maximisation: photons of signal over expected photons per TeV. It need not end at
    # the maximum: the range of the integral is far wider than what is left.
    for _ in range(2):
        light = energy[..., None] * ratio
        signal = (light / (1 + light)) @ channels.photons
        energy = (signal / total).clamp(low, high)
    profile = (energy[..., None] * ratio).log1p_() @ channels.photons - energy * total
    return ratio, total, energy, signal, profile


def _integrate_energy(
    response: Response,
    channels: Channels,
    ratio: Tensor,
    total: Tensor,
    energy: Tensor,
    signal: Tensor,
    count: int,
) -> Tensor:
    """Return ln of the integral of the likelihood over ln E for Q positions and angles, (Q,).

    In ln E the likelihood of n signal photons falls like n (e^x − 1 − x) nats from its maximum:
    16 nats within x = −√(32/n) − 12/n and √(32/n).
    """
    low, high = (math.log(e) for e in response.energy_range)
    peak = energy.log()
    photons = signal.clamp(min=1e-3)
    start = (peak - (32 / photons).sqrt() - 12 / photons).clamp(min=low)
    stop = (peak + (32 / torch.maximum(photons, energy * total)).sqrt()).clamp(max=high)
    nodes, weights = (t.to(ratio) for t in _legendre(count))
    half = (stop - start) / 2
    energies = ((start + stop)[:, None] / 2 + half[:, None] * nodes).exp()
    logs = torch.empty_like(energies)
    step = max(1, _BLOCK // max(1, count * len(channels.photons)))
    for at in range(0, len(ratio), step):
        part = energies[at : at + step, :, None] * ratio[at : at + step, None]
        logs[at : at + step] = part.log1p_() @ channels.photons
    logs += weights.log() - energies * total[:, None]
    return logs.logsumexp(1) + (half / (high - low)).log()


def _constant(response: Response, channels: Channels) -> Tensor:
    """Return the part of the log-likelihood that depends on no label."""
    constant = channels.photons @ _background(response, channels).log() - _noise_total(response)
    if channels.stop is not None:
        constant = constant - torch.lgamma(channels.photons + 1).sum()
    return constant


def integrate_position(response: Response, channels: Channels, resolution: int) -> Cells:
    """Return the position grid of one event, refined where its integral needs it."""
    photons = float(channels.photons.sum())
    per_axis = resolution * math.ceil(2 * response.box / _CELL)
    side = 2 * response.box / per_axis
    device = channels.sensor.device
    ticks = torch.arange(per_axis, device=device)
    index = torch.stack(torch.meshgrid(ticks, ticks, indexing="ij"), -1).reshape(-1, 2)
    angles = angle_grid(photons, torch.empty(0, device=device), resolution)
    count = len(angles)
    done: list[Cells] = []
    reach = torch.full((), -math.inf, dtype=torch.float64, device=index.device)
    parents: Tensor | None = None
    for level in range(_MAX_LEVEL + 1):
        # The peak in a cell exceeds its points by some nats per photon, by fewer in small cells.
        margin = _MARGIN + _PER_PHOTON * photons / 4**level
        table, cells = _evaluate(
            response, channels, index, level, side, angles, margin, count, resolution * _ENERGIES
        )
        mass = cells.log_mass
        total = torch.logsumexp(torch.stack([reach, mass.logsumexp(0)]), 0)
        if parents is None:
            split = _dilate(index, mass > total - margin, per_axis)
        else:
            split = (mass > total - margin) & (margin > _MARGIN + 5)
            group = mass.reshape(-1, 4).logsumexp(1)
            change = ((parents - total).exp() - (group - total).exp()).abs() / 16
            split |= (change > _TOLERANCE).repeat_interleave(4)
        if level == _MAX_LEVEL or not bool(split.any()):
            done.append(cells)
            break
        done.append(_select(cells, ~split))
        if not bool(split.all()):
            reach = torch.logsumexp(torch.stack([reach, done[-1].log_mass.logsumexp(0)]), 0)
        parents = mass[split]
        weights = table.logsumexp(0)
        angles = angles[weights > weights.logsumexp(0) - _MARGIN - margin]
        corners = torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]], device=index.device)
        index = (2 * index[split][:, None] + corners).reshape(-1, 2)
    return Cells(
        torch.cat([cells.index for cells in done]),
        torch.cat([cells.level for cells in done]),
        torch.cat([cells.log_density for cells in done]),
        side,
        -response.box,
    )


def _evaluate(
    response: Response,
    channels: Channels,
    index: Tensor,
    level: int,
    side: float,
    angles: Tensor,
    margin: float,
    count: int,
    energies: int,
) -> tuple[Tensor, Cells]:
    """Return the ln-likelihood by point and angle, and the cells with their densities."""
    empty = torch.empty(len(index), 4, dtype=torch.float64, device=index.device)
    levels = torch.full((len(index),), level, device=index.device)
    points = Cells(index, levels, empty, side, -response.box).points.flatten(0, 1).float()
    table, log_density = marginal(response, channels, points, angles, margin, energies)
    log_density = log_density.reshape(-1, 4) - math.log(count)
    return table, Cells(index, levels, log_density, side, -response.box)


def _dilate(index: Tensor, mask: Tensor, per_axis: int) -> Tensor:
    """Return the mask extended to the neighbours, of cells at `index` of a square grid."""
    grid = torch.zeros(1, 1, per_axis, per_axis, device=index.device)
    grid[0, 0, index[mask, 0], index[mask, 1]] = 1
    grid = torch.nn.functional.max_pool2d(grid, 3, stride=1, padding=1)
    return grid[0, 0, index[:, 0], index[:, 1]] > 0


def _select(cells: Cells, mask: Tensor) -> Cells:
    """Return some of the cells."""
    kept = (cells.index[mask], cells.level[mask], cells.log_density[mask])
    return Cells(*kept, cells.side, cells.origin)


def angle_grid(photons: float, like: Tensor, resolution: int = 1) -> Tensor:
    """Return equal steps of the full circle that resolve an event of that many photons.

    Arguments:
        photons: The number of photons.
        like: A tensor of the wanted dtype and device.
        resolution: Multiplies the number of steps.

    Returns:
        Angles in [−π, π), shape (A,).
    """
    count = resolution * min(math.ceil(16 + 5 * math.sqrt(photons)), 160)
    steps = torch.arange(count, dtype=like.dtype, device=like.device)
    return (steps / count - 0.5) * 2 * math.pi


@cache
def _legendre(count: int) -> tuple[Tensor, Tensor]:
    """Return Gauss–Legendre nodes and weights on [−1, 1], float64."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)
