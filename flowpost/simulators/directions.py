r"""Directions on the sphere, measured between one arc second and sixty degrees.

An event is a list of M candidate directions n_1 … n_M and the accuracy σ of the measurement. One
of the candidates, nobody knows which, is the measured direction of the label z, a unit vector:

.. math::

    \ln\sigma \sim U, \quad n_1, \dots, n_M \sim p(n|\sigma), \quad m \sim w, \qquad
    z \sim \mathrm{vMF}(n_m, \kappa), \quad \kappa = 1/\sigma^2 ,

so that the posterior is a mixture of von Mises–Fisher densities by construction,

.. math::

    p(z|x) = \sum_m w_m\, \frac{\kappa\, e^{-\kappa |z - n_m|^2 / 2}}{2\pi (1 - e^{-2\kappa})} .

The candidates are spread evenly about a centre that is uniform on the sphere, so each of them is
uniform, and so is z: the prior is uniform. With independent candidates (`separation` infinite)
this is the same as to draw z from the prior, to measure it, :math:`n_m \sim \mathrm{vMF}(z,
\kappa)`, and to hide the measurement among M − 1 uniform decoys: both joint densities are
:math:`(4\pi)^{-M} \sum_m w_m \mathrm{vMF}(z; n_m, \kappa)`, as a vMF is symmetric in its arguments.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ._random import resolve_generator

__all__ = ["Directions", "DirectionsPosterior", "tangent_frame"]


class Directions:
    r"""Noisy directions of widths over five decades, with one to many candidates for the truth.

    The label is a unit vector, uniform on the sphere. The data are x = (n_1, …, n_M, ln σ), with σ
    in radians; if `separation` is finite, the later candidates are given relative to the first,
    (n_m − n_1) / σ, so that single precision shows how they lie to each other.

    For σ below some 20° it is the standard deviation of each of the two coordinates of the error;
    for larger ones the sphere ends before the normal density does, and σ is defined by κ = 1/σ²
    alone (σ = 60°: κ = 0.91, half of the posterior lies within 66°).

    Draws are made in double precision. Rounded to single precision, a unit vector is accurate to
    0.01″ (6·10⁻⁸ rad), a hundredth of the narrowest default σ: ask for `dtype=torch.float64` below.

    Arguments:
        modes: M, the number of candidates.
        sigma_min: Least σ in degrees.
        sigma_max: Largest σ in degrees; σ is uniform in the logarithm.
        weights: The probabilities w_m of the candidates, M numbers; by default all equal.
        separation: Distance of the candidates from their common centre, in units of σ (their
            vMF has κ / separation²). By default infinite: candidates anywhere on the sphere.

    Attributes:
        features: The number of data columns, 3·M + 1.
        dim: The number of label columns, 3.

    Raises:
        ValueError: If `modes` is no positive whole number, the σ are not 0 < min < max ≤ 180,
            weights are no M positive numbers, or `separation` is not positive.

    Example:
        >>> simulator = Directions()
        >>> x, z = simulator.sample(1000, seed=0)
        >>> x.shape, z.shape
        (torch.Size([1000, 4]), torch.Size([1000, 3]))
        >>> simulator.posterior(x).log_prob(z).shape
        torch.Size([1000])
    """

    dim = 3

    def __init__(
        self,
        modes: int = 1,
        sigma_min: float = 1 / 3600,
        sigma_max: float = 60.0,
        weights: Sequence[float] | None = None,
        separation: float = math.inf,
    ) -> None:
        self.modes = check_positive_int(modes, "modes")
        self.features = 3 * self.modes + 1
        if not 0 < sigma_min < sigma_max <= 180:
            raise ValueError(
                f"Expected 0 < sigma_min < sigma_max <= 180; got {sigma_min!r} and {sigma_max!r}. "
                "Give them in degrees."
            )
        self.sigma_min, self.sigma_max = float(sigma_min), float(sigma_max)
        if not separation > 0:
            raise ValueError(
                f"Expected separation as a positive number of widths; got {separation!r}. "
                "Leave it out for candidates anywhere on the sphere."
            )
        self.separation = float(separation)
        given = [1.0] * self.modes if weights is None else [float(w) for w in weights]
        if len(given) != self.modes or not all(0 < w < math.inf for w in given):
            raise ValueError(
                f"Expected weights as {self.modes} positive numbers; got {given}. "
                "Give one per candidate."
            )
        self.weights = tuple(w / sum(given) for w in given)

    def __repr__(self) -> str:
        return (
            f"Directions(modes={self.modes}, sigma_min={self.sigma_min:g}, "
            f"sigma_max={self.sigma_max:g}, weights={self.weights}, separation={self.separation:g})"
        )

    def sample(
        self,
        n: int,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw events.

        Arguments:
            n: N, the number of events.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.
            dtype: What the events are rounded to; by default torch's default dtype.

        Returns:
            x of shape (N, 3·M + 1) and z of shape (N, 3).

        Raises:
            ValueError: If `n` is no positive whole number, or both `generator` and `seed` are set.
        """
        n = check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        dtype = torch.get_default_dtype() if dtype is None else dtype
        low, high = math.radians(self.sigma_min), math.radians(self.sigma_max)
        log_sigma = math.log(low) + math.log(high / low) * _uniform((n,), generator)
        kappa = (-2 * log_sigma).exp()
        pole = kappa.new_tensor([0.0, 0.0, 1.0]).expand(n, 3)
        centre = _vmf_noise(pole, torch.zeros_like(kappa), generator)
        apart = (kappa / self.separation**2)[:, None].expand(-1, self.modes)
        means = _vmf_noise(centre[:, None].expand(-1, self.modes, -1), apart, generator)
        posterior = DirectionsPosterior(means, kappa, self._log_weights(means))
        z = posterior._draw((), generator)
        shown = means
        if self.separation < math.inf:
            later = (means[:, 1:] - means[:, :1]) * (-log_sigma[:, None, None]).exp()
            shown = torch.cat([means[:, :1], later], 1)
        x = torch.cat([shown.flatten(1), log_sigma[:, None]], 1)
        return x.to(dtype), z.to(dtype)

    def reference(self, x: Tensor) -> Tensor:
        """Return the first candidate, shape (N, 3), in the dtype of x, shape (N, 3·M + 1)."""
        return self._data(x)[:, :3]

    def sigma(self, x: Tensor) -> Tensor:
        """Return σ in radians, shape (N,), of x, shape (N, 3·M + 1)."""
        return self._data(x)[:, -1].exp()

    def posterior(self, x: Tensor) -> DirectionsPosterior:
        """Return the exact posterior of the direction.

        Arguments:
            x: Data, shape (N, 3·M + 1).

        Returns:
            The posteriors of the N events, computed in double precision.

        Raises:
            ValueError: If `x` has another shape, is not finite, or holds no unit vectors.
        """
        data = self._data(x).double()
        means = data[:, :-1].reshape(len(data), self.modes, 3)
        if self.separation < math.inf:
            first, later = means[:, :1], means[:, 1:]
            means = torch.cat([first, first + later * data[:, -1, None, None].exp()], 1)
        means = _unit(means, "the directions in x")
        return DirectionsPosterior(means, (-2 * data[:, -1]).exp(), self._log_weights(means))

    def true_nll(self, x: Tensor, z: Tensor) -> Tensor:
        """Return −ln p(z|x) of the exact posterior in nats (per steradian), shape (N,), float64."""
        return -self.posterior(x).log_prob(z)

    def _log_weights(self, like: Tensor) -> Tensor:
        return torch.tensor(self.weights, dtype=torch.float64, device=like.device).log()

    def _data(self, x: Any) -> Tensor:
        x = as_tensor(x, "x")
        check_shape(x, ("N", self.features), "x", "The columns are the candidates and ln σ.")
        check_finite(x, "x")
        return x


@dataclass(frozen=True)
class DirectionsPosterior:
    """Mixtures of von Mises–Fisher densities per steradian, one for each of N events.

    Attributes:
        means: Axes of the components, unit vectors, shape (N, M, 3), float64.
        kappa: Concentration, the same for all components of an event, shape (N,), float64.
        log_weights: Logarithms of the weights, shape (M,), float64.
    """

    means: Tensor
    kappa: Tensor
    log_weights: Tensor

    def __len__(self) -> int:
        return len(self.means)

    def __repr__(self) -> str:
        return f"DirectionsPosterior(N={len(self)}, modes={self.means.shape[1]})"

    def __getitem__(self, events: slice | Tensor) -> DirectionsPosterior:
        """Return the posteriors of a selection of events (a slice, a mask or indices)."""
        return DirectionsPosterior(self.means[events], self.kappa[events], self.log_weights)

    def log_prob(self, z: Tensor) -> Tensor:
        """Return ln p(z|x).

        Arguments:
            z: Unit vectors, shape (N, 3), or any number per event, shape (..., N, 3).

        Returns:
            Log-densities in nats per steradian, shape (N,) or (..., N), float64.

        Raises:
            ValueError: If `z` has another shape or holds no unit vectors.
        """
        return self._mixture(_versine(self._labels(z)[..., None, :], self.means))

    def sample(
        self,
        sample_shape: Sequence[int] = (),
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw directions.

        Arguments:
            sample_shape: The shape of the draws of each event, such as (S,).
            generator: The source of randomness.
            seed: A seed, in place of a generator.

        Returns:
            Unit vectors, shape (*sample_shape, N, 3), float64.

        Raises:
            ValueError: If both `generator` and `seed` are set.
        """
        return self._draw(tuple(sample_shape), resolve_generator(generator, seed))

    def chi2(self, z: Tensor) -> Tensor:
        """Return the squared length of the exact base coordinates, χ² with 2 degrees of freedom.

        It is −2 ln of the posterior's share that lies further from the axis than z: finite for an
        outlier in the opposite hemisphere of a posterior one arc second wide.

        Arguments:
            z: Unit vectors, shape (N, 3) or (..., N, 3).

        Returns:
            Shape (N,) or (..., N), float64.

        Raises:
            ValueError: If there is more than one candidate, or `z` has another shape.
        """
        if self.means.shape[1] > 1:
            raise ValueError(
                f"Expected the posterior of one candidate; got {self.means.shape[1]}. Compare "
                "log_prob(z) with log_prob of samples for the level of a mixture."
            )
        z, axis, kappa = self._labels(z), self.means[:, 0], self.kappa
        tail = _log1mexp(2 * kappa) - _log1mexp(kappa * _versine(z, -axis))
        return 2 * (kappa * _versine(z, axis) + tail).clamp_min(0)

    def credibility(self, z: Tensor) -> Tensor:
        """Return the posterior's share nearer to the axis than z, uniform over events.

        Arguments, errors and shapes are those of `chi2`; −2 ln(1 − share) is `chi2`.
        """
        return -torch.expm1(-self.chi2(z) / 2)

    def entropy(self, draws: int = 256, seed: int = 0) -> Tensor:
        """Return the expected −ln p(z|x) under the posterior, in nats, shape (N,), float64.

        It is exact for one candidate. For more, the overlap of the components is averaged over
        `draws` from each of them (and is exact where they do not overlap).
        """
        log_norm, kappa = self._log_norm(), self.kappa
        single = 1 - 2 * kappa / torch.expm1(2 * kappa) - log_norm
        if self.means.shape[1] == 1:
            return single
        draws = check_positive_int(draws, "draws")
        generator = torch.Generator().manual_seed(seed)
        overlap = torch.zeros_like(kappa)
        for m, log_weight in enumerate(self.log_weights):
            axis = self.means[:, m].expand(draws, -1, -1)
            z = _vmf_noise(axis, kappa.expand(draws, -1), generator)
            own = log_norm - kappa * _versine(z, axis)
            excess = self._mixture(_versine(z[..., None, :], self.means)) - own
            overlap = overlap + log_weight.exp() * excess.mean(0)
        return single - overlap

    def _mixture(self, v: Tensor) -> Tensor:
        """Return ln p at 1 − cos of the angles to the axes, shape (..., N, M) -> (..., N)."""
        terms = self.log_weights - self.kappa[:, None] * v
        return terms.logsumexp(-1) + self._log_norm()

    def _log_norm(self) -> Tensor:
        return self.kappa.log() - math.log(2 * math.pi) - _log1mexp(2 * self.kappa)

    def _draw(self, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        shape = (*shape, len(self))
        u = _uniform(shape, generator).to(self.kappa.device)
        edges = self.log_weights.exp().cumsum(0)[:-1]
        component = torch.bucketize(u, edges, right=True)[..., None, None].expand(*shape, 1, 3)
        means = self.means.expand(*shape, -1, -1).gather(-2, component).squeeze(-2)
        return _vmf_noise(means, self.kappa.expand(shape), generator)

    def _labels(self, z: Any) -> Tensor:
        z = as_tensor(z, "z", like=self.means)
        if z.shape[-2:] != (len(self), 3):
            raise ValueError(
                f"Expected z of shape (..., {len(self)}, 3); got {tuple(z.shape)}. Give one unit "
                "vector per event."
            )
        check_finite(z, "z")
        return _unit(z.double(), "z")


def _unit(vectors: Tensor, name: str) -> Tensor:
    """Return vectors of length one to double precision, from ones rounded to single."""
    norm = vectors.norm(dim=-1, keepdim=True)
    off = (norm - 1).abs() > 1e-3
    if bool(off.any()):
        raise ValueError(
            f"Expected unit vectors for {name}; got one of length {norm[off][0].item():g}. "
            "Divide by the length first."
        )
    return vectors / norm


def _versine(a: Tensor, b: Tensor) -> Tensor:
    """Return 1 − cos of the angle between unit vectors; no cancellation at small angles."""
    return (a - b).square().sum(-1) / 2


def _log1mexp(a: Tensor) -> Tensor:
    """ln(1 − e^(−a)) for a > 0 in double precision, each side in its stable form."""
    small = a < math.log(2)
    near = (-torch.expm1(-torch.where(small, a, 1.0))).log()
    return torch.where(small, near, torch.log1p(-(-torch.where(small, 1.0, a)).exp()))


def _uniform(shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    device = None if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device)


def tangent_frame(axis: Tensor) -> Tensor:
    """Return two unit vectors across each axis, shape (..., 3) -> (..., 2, 3); no singular axis.

    Source: *Building an Orthonormal Basis, Revisited*, T. Duff et al., 2017, JCGT 6(1),
    https://jcgt.org/published/0006/01/01/.
    """
    x, y, z = axis.unbind(-1)
    sign = torch.where(z < 0, -1.0, 1.0).to(z)
    a = -1 / (sign + z)
    first = torch.stack([1 + sign * x * x * a, sign * x * y * a, -sign * x], -1)
    second = torch.stack([x * y * a, sign + y * y * a, -y], -1)
    return torch.stack([first, second], -2)


def _vmf_noise(axis: Tensor, kappa: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw from vMF(axis, κ): unit vectors (..., 3) and (...) -> (..., 3); κ = 0 is uniform.

    By inversion of the cdf of v = 1 − cos θ.
    """
    u = _uniform((2, *kappa.shape), generator).to(axis.device)
    kappa = kappa.clamp_min(1e-12)  # the limit κ -> 0 to double precision
    v = -torch.log1p(u[0] * torch.expm1(-2 * kappa)) / kappa
    sine, azimuth = (v * (2 - v)).clamp_min(0).sqrt(), 2 * math.pi * u[1]
    first, second = tangent_frame(axis).unbind(-2)
    around = first * azimuth.cos()[..., None] + second * azimuth.sin()[..., None]
    drawn = axis * (1 - v)[..., None] + around * sine[..., None]
    return drawn / drawn.norm(dim=-1, keepdim=True)
