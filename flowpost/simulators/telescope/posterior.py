"""The true posteriors of telescope events: densities, levels, maps and the number of modes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..._checks import as_tensor, check_shape
from .quadrature import GAUSS, Cells, angle_grid, integrate_position, log_likelihood, marginal
from .response import Channels, Response

__all__ = ["TelescopePosterior", "integrate"]


@dataclass(frozen=True)
class TelescopePosterior:
    """The exact posteriors p(x, y, energy | event) of N events.

    Attributes:
        response: The telescope that saw the events.
        log_evidence: ln p(event) in nats, shape (N,), float64.
        channels: What was seen, one entry per event.
        cells: The position grid of every event.
    """

    response: Response
    log_evidence: Tensor
    channels: tuple[Channels, ...]
    cells: tuple[Cells, ...]

    def __len__(self) -> int:
        return len(self.cells)

    def __repr__(self) -> str:
        return f"TelescopePosterior(N={len(self)})"

    def __getitem__(self, events: slice) -> TelescopePosterior:
        """Return the posteriors of a slice of the events."""
        evidence, channels, cells = (
            self.log_evidence[events],
            self.channels[events],
            self.cells[events],
        )
        return TelescopePosterior(self.response, evidence, channels, cells)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln p(x, y, energy | event) at one label per event.

        Arguments:
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).

        Returns:
            Log-densities in nats (per m² and TeV), shape (N,), float64; −inf outside the prior.

        Raises:
            ValueError: If `z` has another shape.
        """
        z = as_tensor(z, "z").double()
        check_shape(z, (len(self), 3), "z", "Give one label (x, y, energy) per event.")
        low, high = self.response.energy_range
        slack = 1e-6 * high
        inside = (z[:, :2].abs() <= self.response.box * (1 + 1e-6)).all(1)
        inside &= (z[:, 2] >= low - slack) & (z[:, 2] <= high + slack)
        prior = (
            -2 * math.log(2 * self.response.box) - z[:, 2].log() - math.log(math.log(high / low))
        )
        joint = torch.stack(
            [self._log_likelihood(i, z[i : i + 1, :2], z[i, 2:])[0] for i in range(len(self))]
        )
        density = prior + joint - self.log_evidence
        return torch.where(inside, density, torch.full_like(density, -math.inf))

    def nll(self, z: Tensor) -> Tensor:
        """Return −ln p(z | event) in nats, shape (N,): what a perfect posterior scores."""
        return -self.log_prob(z)

    def position_log_prob(self, position: Tensor) -> Tensor:
        """Return ln p(x, y | event), the energy integrated, at one position (N, 2) per event."""
        position = as_tensor(position, "position").double()
        check_shape(position, (len(self), 2), "position", "Give one position (x, y) per event.")
        prior = -2 * math.log(2 * self.response.box)
        values = []
        for i, channels in enumerate(self.channels):
            at = position[i : i + 1]
            angles = angle_grid(float(channels.photons.sum()), at, 2)
            value = marginal(self.response, channels, at, angles, 60.0)[1][0]
            values.append(value - math.log(len(angles)))
        return prior + torch.stack(values) - self.log_evidence

    def position_credibility(self, position: Tensor) -> Tensor:
        """Return the posterior mass where the position is more probable than at `position`.

        This is the level of the smallest highest-density region that holds the position; over
        events of the prior it is uniform at the true positions. Shape (N, 2) -> (N,).
        """
        at = self.position_log_prob(position)
        prior = -2 * math.log(2 * self.response.box)
        levels = []
        for i, cells in enumerate(self.cells):
            log_density = cells.log_density + prior - self.log_evidence[i]
            mass = (
                log_density + cells.log_mass[:, None] - cells.log_density.logsumexp(1)[:, None]
            ).exp()
            levels.append((mass * (log_density > at[i])).sum() / mass.sum())
        return torch.stack(levels)

    def position_mean(self) -> Tensor:
        """Return the posterior mean of the position in metres, shape (N, 2)."""
        means = []
        for cells in self.cells:
            weight = (
                (cells.log_density - 2 * math.log(2) * cells.level[:, None]).flatten().softmax(0)
            )
            means.append(weight @ cells.points.flatten(0, 1))
        return torch.stack(means)

    def position_map(
        self, event: int, pixels: int = 128, window: tuple[float, float, float] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the position marginal of one event on a regular grid, for plots.

        Arguments:
            event: Its index.
            pixels: Pixels per axis.
            window: Centre x, centre y and side in metres; by default the square that holds all but
                10⁻⁴ of the mass.

        Returns:
            Pixel centres in x and in y, shape (pixels,), and the density per m², shape
            (pixels, pixels) with rows of equal y.
        """
        cells = self.cells[event]
        x0, y0, side = window if window is not None else _window(cells)
        steps = (torch.arange(pixels, dtype=torch.float64) + 0.5) / pixels - 0.5
        x, y = (steps * side + c for c in (x0, y0))
        x, y = x.to(cells.index.device), y.to(cells.index.device)
        grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)
        prior = -2 * math.log(2 * self.response.box)
        log_density = _interpolate(cells, grid) + prior - self.log_evidence[event]
        return x, y, log_density.exp().reshape(pixels, pixels)

    def n_modes(self, min_mass: float = 0.1, depth: float = 1.0, pixels: int = 96) -> Tensor:
        """Count the separate modes of every position marginal.

        A mode is a connected piece of a region {density > t} that holds at least `min_mass` of the
        posterior and whose peak is at least e^`depth` times t, so that it is parted from the others
        by a valley at least that deep. The number of modes is the largest number of such pieces
        over all thresholds t. Pieces that touch at a corner are connected. A ring is one mode.

        Arguments:
            min_mass: Least share of the posterior in a mode.
            depth: Least depth of the valley between modes in nats.
            pixels: Pixels per axis of the map that is searched.

        Returns:
            The number of modes (at least 1), shape (N,), int64.
        """
        maps = (self.position_map(i, pixels)[2] for i in range(len(self)))
        counts = [_count_modes(density.cpu().numpy(), min_mass, depth) for density in maps]
        return torch.tensor(counts, dtype=torch.int64, device=self.log_evidence.device)

    def _log_likelihood(self, event: int, position: Tensor, energy: Tensor) -> Tensor:
        """Return ln p(x | position, energy), the angle averaged, in float64."""
        channels = self.channels[event]
        angles = angle_grid(float(channels.photons.sum()), position, 4)
        table = log_likelihood(self.response, channels, position, angles, energy)
        return table.logsumexp(1)[:, 0] - math.log(len(angles))


def integrate(
    response: Response, channels: Sequence[Channels], resolution: int = 1
) -> TelescopePosterior:
    """Return the posteriors of events from what was seen of each."""
    cells = tuple(integrate_position(response, event, resolution) for event in channels)
    masses = [c.log_mass.logsumexp(0) for c in cells]
    evidence = torch.stack(masses) if masses else torch.zeros(0, dtype=torch.float64)
    evidence = evidence - 2 * math.log(2 * response.box)
    return TelescopePosterior(response, evidence, tuple(channels), cells)


def _window(cells: Cells) -> tuple[float, float, float]:
    """Return centre and side of the square that holds the cells of all but 10⁻⁴ of the mass."""
    mass = cells.log_mass
    ranked, order = mass.sort()
    below = (ranked - mass.logsumexp(0)).exp().cumsum(0)
    kept = order[below > 1e-4]
    width = cells.side * 0.5 ** cells.level.double()[kept, None]
    low = (cells.origin + cells.index[kept] * width).amin(0)
    high = (cells.origin + (cells.index[kept] + 1) * width).amax(0)
    centre = (low + high) / 2
    return float(centre[0]), float(centre[1]), float((high - low).max())


def _interpolate(cells: Cells, grid: Tensor) -> Tensor:
    """Return ln of the density at positions, bilinear in each cell; −inf where no cell lies."""
    out = torch.full((len(grid),), -math.inf, dtype=torch.float64, device=grid.device)
    for level in cells.level.unique().tolist():
        here = (cells.level == level).nonzero().flatten()
        width = cells.side * 0.5**level
        scaled = (grid - cells.origin) / width
        corner = scaled.floor()
        stride = 2**40
        keys, order = (cells.index[here, 0] * stride + cells.index[here, 1]).sort()
        wanted = corner[:, 0].long() * stride + corner[:, 1].long()
        found = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
        hit = keys[found] == wanted
        values = cells.log_density[here[order[found[hit]]]].reshape(-1, 2, 2)
        u, v = ((scaled - corner)[hit] * 2 - 1).div(GAUSS).add(1).div(2).unbind(1)
        in_y = values[:, :, 0] * (1 - v)[:, None] + values[:, :, 1] * v[:, None]
        out[hit] = in_y[:, 0] * (1 - u) + in_y[:, 1] * u
    return out


def _count_modes(density: Any, min_mass: float, depth: float) -> int:
    """Return the number of modes of a density on a grid (see `TelescopePosterior.n_modes`)."""
    from scipy import ndimage

    mass = density / density.sum()
    top = float(mass.max())
    best = 1
    for threshold in top * np.exp(-np.linspace(depth, 9.0, 18)):
        pieces, count = ndimage.label(mass > threshold, structure=np.ones((3, 3)))
        if count > best:
            labels = np.arange(1, count + 1)
            heavy = ndimage.sum_labels(mass, pieces, labels) >= min_mass
            deep = ndimage.maximum(mass, pieces, labels) >= threshold * math.exp(depth)
            best = max(best, int((heavy & deep).sum()))
    return best
