r"""What the simulators with exact posteriors share: one interface, random state, truncated normals.

Each simulator draws pairs :math:`z \sim p(z)`, :math:`x \sim p(x \mid z)` and knows

.. math:: \ln p(z \mid x) = \ln p(x, z) - \ln \int p(x, z)\, \mathrm{d}z,

so that `log_posterior` is `log_joint` minus `log_evidence`, and `posterior_sample` draws from it
without a Markov chain.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from ..._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._random import resolve_generator

__all__ = ["TractableSimulator", "truncated_normal", "truncated_normal_log_mass"]


class TractableSimulator(ABC):
    """Pairs of data and labels whose posterior is known.

    Computations are in double precision on the CPU; what is returned has torch's default dtype.
    """

    dim: int
    """Number of label columns D."""
    features: int
    """Number of data columns F."""

    @property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Lower and upper ends of the prior's box, each of shape (D,); `None` if it has none."""
        return None

    @abstractmethod
    def _prior(self, n: int, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _simulate(self, z: Tensor, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _posterior(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor: ...

    @abstractmethod
    def _log_joint(self, z: Tensor, x: Tensor) -> Tensor: ...

    @abstractmethod
    def _log_evidence(self, x: Tensor) -> Tensor: ...

    def sample(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw events.

        Arguments:
            n: Number of events N.
            generator: Source of randomness; without it and a seed, torch's global one.
            seed: Seed of a generator of its own, instead of `generator`.

        Returns:
            The data, shape (N, F), and the labels, shape (N, D), strictly inside the bounds.

        Raises:
            ValueError: If `n` is not a positive whole number, or both `generator` and `seed` are
                given.
        """
        n = check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        z = self._inside(self._prior(n, generator))
        x = self._simulate(z.double(), generator)
        return x.to(z.dtype), z

    def posterior_sample(
        self,
        x: Tensor,
        n: int,
        generator: torch.Generator | None = None,
        seed: int | None = None,
    ) -> Tensor:
        """Draw labels from the exact posterior of one event.

        Arguments:
            x: Data of one event, shape (F,) or (1, F).
            n: Number of draws S.
            generator: Source of randomness; without it and a seed, torch's global one.
            seed: Seed of a generator of its own, instead of `generator`.

        Returns:
            Independent draws, shape (S, D).

        Raises:
            ValueError: If `x` is not one event of finite numbers, or `n` not positive.
        """
        n = check_positive_int(n, "n")
        x = as_tensor(x, "x")
        if x.dim() == 2 and len(x) == 1:
            x = x[0]
        check_shape(x, (self.features,), "x", "Draw for one event at a time.")
        check_finite(x, "x")
        return self._inside(self._posterior(x.double(), n, resolve_generator(generator, seed)))

    def log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        """Return ln p(x, z) = ln p(x|z) + ln p(z), −∞ outside the prior's box.

        Arguments:
            z: Labels, shape (N, D).
            x: Data, shape (N, F), or one event of shape (F,) for all labels.

        Returns:
            In nats, shape (N,), double precision.

        Raises:
            ValueError: If shapes do not fit.
        """
        z, x = self._pairs(z, x)
        joint = self._log_joint(z, x)
        if self.bounds is None:
            return joint
        lower, upper = self.bounds
        return joint.where(((z >= lower) & (z <= upper)).all(-1), -math.inf)

    def log_evidence(self, x: Tensor) -> Tensor:
        """Return ln p(x) in nats, shape (N,), double precision, of data of shape (N, F).

        Raises:
            ValueError: If `x` does not have that shape or is not finite.
        """
        x = as_tensor(x, "x")
        check_shape(x, ("N", self.features), "x")
        check_finite(x, "x")
        return self._log_evidence(x.double())

    def log_posterior(self, z: Tensor, x: Tensor) -> Tensor:
        """Return the normalised ln p(z|x).

        Arguments:
            z: Labels, shape (N, D).
            x: Data, shape (N, F), or one event of shape (F,) for all labels.

        Returns:
            In nats, shape (N,), double precision.

        Raises:
            ValueError: If shapes do not fit or the data are not finite.
        """
        x = as_tensor(x, "x")
        return self.log_joint(z, x) - self.log_evidence(x if x.dim() == 2 else x[None])

    def _pairs(self, z: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        z, x = as_tensor(z, "z"), as_tensor(x, "x")
        check_shape(z, ("N", self.dim), "z")
        if x.dim() == 1:
            x = x.expand(len(z), -1)
        check_shape(x, (len(z), self.features), "x", "Give one row per label, or a single event.")
        return z.double(), x.double()

    def _inside(self, z: Tensor) -> Tensor:
        """Return labels in the default dtype, strictly between the bounds after rounding."""
        z = z.to(torch.get_default_dtype())
        if self.bounds is None:
            return z
        lower, upper = (b.to(z.dtype) for b in self.bounds)
        return z.clamp(torch.nextafter(lower, upper), torch.nextafter(upper, lower))

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"


def _tail_cdfs(mean: Tensor, sd: float, lower: Tensor, upper: Tensor) -> tuple[Tensor, ...]:
    """Return the sign and the two Φ of the standardised interval, mirrored into the lower tail."""
    a, b = (lower - mean) / sd, (upper - mean) / sd
    sign = torch.where(a + b > 0, -1.0, 1.0).to(mean)
    low = torch.where(sign > 0, a, -b)
    high = torch.where(sign > 0, b, -a)
    return sign, torch.special.ndtr(low), torch.special.ndtr(high)


def truncated_normal(
    mean: Tensor, sd: float, lower: Tensor, upper: Tensor, generator: torch.Generator | None
) -> Tensor:
    """Draw from N(mean, sd²) between `lower` and `upper`, all of one shape, by inversion."""
    sign, low, high = _tail_cdfs(mean, sd, lower, upper)
    u = torch.rand(mean.shape, generator=generator, dtype=mean.dtype)
    draws = mean + sd * sign * torch.special.ndtri(low + u * (high - low))
    return torch.minimum(torch.maximum(draws, lower), upper)


def truncated_normal_log_mass(mean: Tensor, sd: float, lower: Tensor, upper: Tensor) -> Tensor:
    """Return ln P(lower < N(mean, sd²) < upper)."""
    _, low, high = _tail_cdfs(mean, sd, lower, upper)
    return (high - low).log()
