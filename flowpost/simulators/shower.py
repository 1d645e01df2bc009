r"""Electromagnetic showers in a calorimeter of three layers, with their exact likelihood.

A particle of energy E begins to shower at the depth :math:`t_0`, in radiation lengths :math:`X_0`.
Layer k between the depths :math:`e_k` and :math:`e_{k+1}` gets a share of a gamma profile, and cell
(i, j) of it a share of a round Gaussian about the axis,

.. math::

    \ln E \sim U, \quad t_0 \sim \mathrm{Exp}(9/7), \qquad
    f_{kij} = \big[P(a, b\,(e_{k+1} - t_0)_+) - P(a, b\,(e_k - t_0)_+)\big]\, g_{ki}\, h_{kj},
    \quad a = 1 + b\,(\ln(E / 7.3\,\mathrm{MeV}) - 0.5),

with P the regularised lower incomplete gamma function, b = 0.5, and g, h integrals of the normal
density of width :math:`\sigma_k` over the sides of the cell. What falls outside the cells is lost.
A voxel's energy is gamma distributed about its mean, and set to zero below a threshold τ,

.. math::

    x_v \sim \Gamma(\alpha_v = E f_v / w, \text{scale } w), \qquad
    \ln p(x|E, t_0) = \sum_{x_v > 0} \ln \Gamma(x_v; \alpha_v, w)
    + \sum_{x_v = 0} \ln P(\alpha_v, \tau / w),

a density (per GeV) in the values above the threshold and a probability for the zeros. Without
:math:`t_0` it is an integral over one number, and is done by quadrature.

The profile is that of *Monte Carlo calculation of photon-initiated electromagnetic showers in lead
glass*, E. Longo, I. Sestili, Nucl. Instrum. Methods 128 (1975) 283,
https://doi.org/10.1016/0029-554X(75)90679-5, as the Particle Data Group gives it (*Passage of
particles through matter*, section *Electromagnetic cascades*, https://pdg.lbl.gov). The critical
energy of 7.3 MeV is about that of lead; photons travel 9/7 radiation lengths on average before they
convert. The layout is that of *CaloGAN*, M. Paganini, L. de Oliveira, B. Nachman, 2018,
https://arxiv.org/abs/1712.10321, on a coarser grid.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ._cells import cells, kinds, legendre, log_gammainc
from ._random import resolve_generator

__all__ = ["Shower"]

_PROFILE = 0.5  # b
_CRITICAL = 0.0073  # GeV
_LEAST = 0.05  # GeV; the profile has no shape a > 0 below 1.63 MeV
_START = 9 / 7  # X0
_SHAPE = ((3, 8), (6, 6), (6, 3))
_EDGES = (0.0, 4.0, 15.0, 22.0)
_WIDTHS = (0.35, 0.6, 0.9)
# events times nodes times voxels that are held at once
_CHUNK = 4_000_000


class Shower:
    """Calorimeter showers of known law: 78 voxels in layers of 3 × 8, 6 × 6 and 6 × 3 cells.

    Labels are z = (E, t0): the energy in GeV, uniform in the logarithm, and the start of the shower
    in radiation lengths. Data are visible energies of voxels in GeV, layer after layer, each
    row by row. All layers cover the same square of the side 2·`half_width`, so that their cells are
    4/3 × 1/2, 2/3 × 2/3 and 2/3 × 4/3 Molière radii for the default of 2; in these units the
    Gaussian widths of the layers are 0.35, 0.6 and 0.9. Energy beyond the square, before the first
    or behind the last layer is lost.

    Arguments:
        half_width: Half the side of the calorimeter's face, in Molière radii.
        energy_range: Least and largest energy in GeV, from 0.05.
        scale: w, GeV; a voxel of mean m has the variance w·m.
        threshold: Energy in GeV below which a voxel reads zero.

    Attributes:
        features: The number of voxels, 78.
        dim: The number of label columns, 2.
        shape: Rows and columns of cells of each layer.
        layers: The columns of x of each layer, as slices.
        edges: Depths between which the layers lie, in radiation lengths.

    Raises:
        ValueError: If a number is not positive or the energies are not in order.

    Example:
        >>> simulator = Shower()
        >>> x, z = simulator.sample(100, seed=0)
        >>> x.shape, z.shape
        (torch.Size([100, 78]), torch.Size([100, 2]))
        >>> simulator.layer_energies(x).shape
        torch.Size([100, 3])
        >>> bool(simulator.log_prob(x, z).mean() > simulator.log_prob(x, z.flip(0)).mean())
        True
    """

    dim = 2
    shape = _SHAPE
    edges = _EDGES
    features = sum(rows * columns for rows, columns in _SHAPE)

    def __init__(
        self,
        half_width: float = 2.0,
        energy_range: tuple[float, float] = (1.0, 100.0),
        scale: float = 0.02,
        threshold: float = 0.002,
    ) -> None:
        for name, value in (
            ("half_width", half_width),
            ("scale", scale),
            ("threshold", threshold),
        ):
            if not 0 < value < math.inf:
                raise ValueError(f"Expected {name} as a positive number; got {value!r}.")
        pair = isinstance(energy_range, Sequence) and len(energy_range) == 2
        low, high = energy_range if pair else (math.nan, math.nan)
        if not _LEAST <= low < high < math.inf:
            raise ValueError(
                f"Expected energies {_LEAST:g} <= low < high; got {energy_range!r}. Give them in "
                "GeV; the profile holds for showers of many critical energies."
            )
        self.half_width = float(half_width)
        self.energy_range = (float(low), float(high))
        self.scale, self.threshold = float(scale), float(threshold)
        stops = [0]
        lateral = []
        for (rows, columns), width in zip(_SHAPE, _WIDTHS, strict=True):
            stops.append(stops[-1] + rows * columns)
            sides = [cells(n, self.half_width / width) for n in (rows, columns)]
            lateral.append(torch.outer(*sides).flatten())
        self.layers = tuple(slice(a, b) for a, b in pairwise(stops))
        self._lateral = torch.cat(lateral)
        counts = torch.tensor([rows * columns for rows, columns in _SHAPE])
        self._layer_of = torch.arange(len(_SHAPE)).repeat_interleave(counts)
        # cells that mirror each other have one mean: kinds of cells, and a cell of each
        self._kind = kinds(_SHAPE)
        self._first = torch.stack([(self._kind == k).nonzero()[0, 0] for k in self._kind.unique()])

    def __repr__(self) -> str:
        return (
            f"Shower(half_width={self.half_width:g}, energy_range={self.energy_range}, "
            f"scale={self.scale:g}, threshold={self.threshold:g})"
        )

    # Draws

    def sample_prior(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw labels z = (E, t0), shape (N, 2), in GeV and X0, on the generator's device.

        Raises:
            ValueError: If `n` is no positive whole number, or both `generator` and `seed` are set.
        """
        n = check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        device = generator.device if generator is not None else None
        uniform = torch.rand(n, 2, generator=generator, device=device)
        low, high = self.energy_range
        energy = (low * (high / low) ** uniform[:, 0]).clamp(low, high)
        return torch.stack([energy, -_START * torch.log1p(-uniform[:, 1])], 1)

    def sample(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw events.

        Arguments:
            n: N, the number of events.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.

        Returns:
            x of shape (N, 78) in GeV and z = (E, t0) of shape (N, 2), in torch's default dtype.

        Raises:
            ValueError: If `n` is no positive whole number, or both `generator` and `seed` are set.
        """
        generator = resolve_generator(generator, seed)
        z = self.sample_prior(n, generator)
        return self.simulate(z, generator), z

    def simulate(
        self, z: Tensor, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Simulate showers of given labels.

        Arguments:
            z: Energies in GeV and starts in X0, shape (N, 2).
            generator: The source of randomness, on the device of `z`.
            seed: A seed, in place of a generator.

        Returns:
            Visible energies in GeV, shape (N, 78), in the dtype of `z`.

        Raises:
            ValueError: If `z` has another shape, an energy is below 0.05, a start negative, or
                both `generator` and `seed` are set.
        """
        z = self._labels(z)
        generator = resolve_generator(generator, seed)
        alpha = self._alpha(z)
        drawn = torch._standard_gamma(alpha.clamp_min(1e-30), generator=generator)
        x = (self.scale * torch.where(alpha > 0, drawn, 0.0)).to(z)
        return torch.where(x >= self.threshold, x, 0.0)

    # The law

    def fractions(self, z: Tensor) -> Tensor:
        """Mean share of the energy in each voxel, before the threshold.

        Arguments:
            z: Energies in GeV and starts in X0, shape (N, 2).

        Returns:
            Shares, shape (N, 78), in the dtype of `z`; the rest to one is lost.

        Raises:
            ValueError: If `z` has another shape, an energy is below 0.05 or a start negative.
        """
        z = self._labels(z)
        return self._fractions(z).to(z)

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Return ln p(x|E, t0): density of values above the threshold, probability of zeros.

        Arguments:
            x: Visible energies in GeV, shape (N, 78): zero, or at least the threshold.
            z: Energies in GeV and starts in X0, shape (N, 2).

        Returns:
            In nats, densities per GeV, shape (N,), float64; minus infinity where a voxel behind
            which the shower starts has seen energy.

        Raises:
            ValueError: If shapes differ from these, a value lies between zero and the threshold,
                an energy is below 0.05 or a start negative.
        """
        x, z = self._data(x), self._labels(z)
        check_shape(z, (len(x), 2), "z", "Give one row of labels per event of x.")
        rows = _CHUNK // self.features
        parts = zip(x.split(rows), z.split(rows), strict=True)
        return torch.cat([self._log_prob(self._statistics(a), self._alpha(b)) for a, b in parts])

    def marginal_log_prob(self, x: Tensor, energy: Tensor, nodes: int = 64) -> Tensor:
        """Return ln p(x|E), the start integrated over its prior.

        The integral is done where the integrand is: by two passes of refinement, and Gauss–Legendre
        nodes in the last.

        Arguments:
            x: Visible energies in GeV, shape (N, 78).
            energy: Energies in GeV, shape (N,).
            nodes: Nodes of each pass; with 64 the error is of the order 1e-8 nats.

        Returns:
            In nats, densities per GeV, shape (N,), float64.

        Raises:
            ValueError: As `log_prob`.
        """
        x = self._data(x)
        energy = as_tensor(energy, "energy", like=x)
        check_shape(energy, (len(x),), "energy", "Give one energy per event of x.")
        self._labels(torch.stack([energy, torch.zeros_like(energy)], 1))
        nodes = check_positive_int(nodes, "nodes", minimum=16)
        rows = max(1, _CHUNK // (self.features * nodes))
        parts = zip(x.split(rows), energy.double().split(rows), strict=True)
        return torch.cat([self._integrate(a, b, nodes) for a, b in parts])

    # Layers

    def layer_energies(self, x: Tensor) -> Tensor:
        """Return the sums of the layers, shape (N, 3) in GeV, of x of shape (N, 78)."""
        x = as_tensor(x, "x")
        check_shape(x, ("N", self.features), "x", "Give one row of voxels per event.")
        return torch.stack([x[:, part].sum(1) for part in self.layers], 1)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return sums of layers and the shares of the voxels in them, zero in an empty layer.

        Arguments:
            x: Visible energies in GeV, shape (N, 78).

        Returns:
            Layer energies, shape (N, 3), and shares, shape (N, 78), that sum to one in a layer.
        """
        energies = self.layer_energies(x)
        sums = energies[:, self._layer_of.to(energies.device)]
        shares = torch.where(sums > 0, as_tensor(x, "x") / torch.where(sums > 0, sums, 1.0), 0.0)
        return energies, shares

    def join(self, energies: Tensor, shares: Tensor) -> Tensor:
        """Return voxels of layer energies (N, 3) and of shares (N, 78), brought to the sum one.

        Values that come out below the threshold are set to zero.

        Raises:
            ValueError: If shapes differ from these.
        """
        shares = as_tensor(shares, "shares")
        energies = as_tensor(energies, "energies", like=shares)
        check_shape(energies, ("N", len(self.shape)), "energies", "Give the sum of each layer.")
        sums = self.layer_energies(shares)
        check_shape(energies, tuple(sums.shape), "energies", "Give as many events as shares.")
        factor = torch.where(sums > 0, energies / torch.where(sums > 0, sums, 1.0), 0.0)
        x = shares * factor[:, self._layer_of.to(shares.device)]
        return torch.where(x >= self.threshold, x, 0.0)

    # Inside

    def _labels(self, z: Any) -> Tensor:
        z = as_tensor(z, "z")
        check_shape(z, ("N", 2), "z", "The columns are the energy in GeV and the start in X0.")
        check_finite(z, "z")
        # single precision rounds the least energy
        bad = (z[:, 0] < _LEAST * (1 - 1e-6)) | (z[:, 1] < 0)
        if bool(bad.any()):
            row = int(bad.nonzero()[0])
            raise ValueError(
                f"Expected energies of at least {_LEAST:g} GeV and a start of at least 0; got "
                f"{z[row].tolist()} in row {row}. The profile holds for showers of many critical "
                "energies."
            )
        return z

    def _data(self, x: Any) -> Tensor:
        x = as_tensor(x, "x").double()
        check_shape(x, ("N", self.features), "x", "Give one row of voxels per event.")
        check_finite(x, "x")
        # single precision rounds the threshold
        bad = (x != 0) & (x < self.threshold * (1 - 1e-6))
        if bool(bad.any()):
            row, column = (int(i) for i in bad.nonzero()[0])
            raise ValueError(
                f"Expected voxels of zero or at least {self.threshold:g} GeV; got "
                f"{x[row, column].item():g} in row {row}, column {column}. Set what is below the "
                "threshold to zero."
            )
        return x

    def _fractions(self, z: Tensor) -> Tensor:
        """Shares (..., 78) of labels (..., 2), float64."""
        z = z.double()
        a = 1 + _PROFILE * ((z[..., :1] / _CRITICAL).log() - 0.5)
        depth = _PROFILE * (z.new_tensor(self.edges) - z[..., 1:]).clamp_min(0)
        share = torch.special.gammainc(a.expand_as(depth).contiguous(), depth).diff(dim=-1)
        return share[..., self._layer_of.to(z.device)] * self._lateral.to(z.device)

    def _alpha(self, z: Tensor) -> Tensor:
        return self._fractions(z) * z[..., :1].double() / self.scale

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """All that the law needs of voxels (N, 78).

        Lit and empty cells of each kind and the sums of their ln(x / w), shape (N, kinds) each, and
        the terms without labels, shape (N,).
        """
        kind = self._kind.to(x.device)
        groups = torch.nn.functional.one_hot(kind).to(x)
        lit = (x > 0).to(x)
        log = torch.where(x > 0, x / self.scale, 1.0).log()
        rest = -(log + lit * math.log(self.scale) + x / self.scale).sum(1)
        return lit @ groups, (1 - lit) @ groups, log @ groups, rest

    def _log_prob(self, statistics: tuple[Tensor, ...], alpha: Tensor) -> Tensor:
        """ln p (...) of statistics (..., kinds) at shapes (..., 78) of the voxels."""
        lit, empty, log, rest = statistics
        alpha = alpha[..., self._first.to(alpha.device)]
        safe = alpha.clamp_min(1e-300)
        density = safe * log - lit * torch.lgamma(safe)
        density = torch.where((alpha > 0) | (lit == 0), density, -math.inf)
        zeros = empty * log_gammainc(safe, self.threshold / self.scale)
        return (density + torch.where(alpha > 0, zeros, 0.0)).sum(-1) + rest

    def _integrate(self, x: Tensor, energy: Tensor, nodes: int) -> Tensor:
        """ln of the integral over the start, shape (N,), of x (N, 78) and energies (N,)."""

        def integrand(start: Tensor) -> Tensor:
            z = torch.stack([energy[:, None].expand_as(start), start], -1)
            prior = -start / _START - math.log(_START)
            return self._log_prob(statistics, self._alpha(z)) + prior

        statistics = tuple(t[:, None] for t in self._statistics(x))

        # behind the last layer all voxels are empty, and the rest of the prior is known
        low, high = torch.zeros_like(energy), torch.full_like(energy, self.edges[-1])
        steps = torch.linspace(0, 1, nodes, dtype=x.dtype, device=x.device)
        for _ in range(2):
            grid = low[:, None] + (high - low)[:, None] * steps
            value = integrand(grid)
            near = value > value.max(1, keepdim=True).values - 40
            index = torch.arange(nodes, device=x.device)
            first = torch.where(near, index, nodes).min(1).values - 1
            last = torch.where(near, index, -1).max(1).values + 1
            low = grid.gather(1, first.clamp_min(0)[:, None])[:, 0]
            high = grid.gather(1, last.clamp_max(nodes - 1)[:, None])[:, 0]
        grid, weight = legendre(low, high, nodes, self.edges[1:-1])
        inside = torch.logsumexp(integrand(grid) + weight.log(), 1)
        empty = (x == 0).all(1)
        behind = torch.where(empty, -self.edges[-1] / _START, -math.inf)
        return torch.logaddexp(inside, behind)
