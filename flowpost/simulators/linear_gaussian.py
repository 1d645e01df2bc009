r"""A linear model with Gaussian noise, whose posterior is known in any dimension.

.. math::

    z \sim N(0, \sigma_0^2 I_d), \quad x = A z + n, \quad n \sim N(0, \Sigma), \qquad
    p(z|x) = N(m, C), \quad C^{-1} = I_d / \sigma_0^2 + A^T \Sigma^{-1} A, \quad
    m = C A^T \Sigma^{-1} x .

With the Cholesky factor :math:`C = L L^T`, the exact base coordinates of a label are

.. math:: u = L^{-1} (z - m) \sim N(0, I_d) .
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributions import MultivariateNormal

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ._random import resolve_generator

__all__ = ["LinearGaussian"]


class LinearGaussian:
    """Labels of a Gaussian prior, seen through a fixed matrix and correlated noise.

    Matrix and noise are drawn once from `seed`: the singular values of A lie between 0.5 and 2,
    the noise is correlated and its standard deviations along the principal axes lie between 0.3
    and 1, so every label is measured, none of them perfectly.

    Arguments:
        dim: d, the number of label columns.
        features: The number of measured values; by default as many as labels.
        seed: What A and the noise covariance are drawn from.
        prior_std: Standard deviation of every label before the measurement.

    Attributes:
        matrix: A, shape (features, d), float64.
        noise_covariance: Σ, shape (features, features), float64.
        posterior_covariance: C, shape (d, d), float64; the same for every event.

    Raises:
        ValueError: If `dim` or `features` is no positive whole number or `prior_std` not positive.

    Example:
        >>> simulator = LinearGaussian(3, seed=0)
        >>> x, z = simulator.sample(1000, seed=1)
        >>> simulator.posterior(x).log_prob(z).shape
        torch.Size([1000])
    """

    def __init__(
        self, dim: int, features: int | None = None, seed: int = 0, prior_std: float = 1.0
    ) -> None:
        self.dim = check_positive_int(dim, "dim")
        self.features = self.dim if features is None else check_positive_int(features, "features")
        self.seed = seed
        if not 0 < prior_std < float("inf"):
            raise ValueError(f"Expected prior_std as a positive number; got {prior_std!r}.")
        self.prior_std = float(prior_std)

        generator = torch.Generator().manual_seed(seed)
        rank = min(self.dim, self.features)
        left = _orthogonal(self.features, generator)[:, :rank]
        right = _orthogonal(self.dim, generator)[:, :rank]
        singular = 0.5 * 4 ** torch.rand(rank, generator=generator, dtype=torch.float64)
        self.matrix = left * singular @ right.T
        axes = _orthogonal(self.features, generator)
        widths = 0.3 + 0.7 * torch.rand(self.features, generator=generator, dtype=torch.float64)
        self.noise_covariance = axes * widths.square() @ axes.T
        self._noise_tril = torch.linalg.cholesky(self.noise_covariance)

        weighted = torch.linalg.solve(self.noise_covariance, self.matrix)
        precision = self.matrix.T @ weighted
        precision = precision + torch.eye(self.dim, dtype=torch.float64) / self.prior_std**2
        self.posterior_covariance = torch.linalg.inv(precision)
        self._gain = self.posterior_covariance @ weighted.T
        self._tril = torch.linalg.cholesky(self.posterior_covariance)

    def __repr__(self) -> str:
        return (
            f"LinearGaussian(dim={self.dim}, features={self.features}, seed={self.seed}, "
            f"prior_std={self.prior_std:g})"
        )

    def sample(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw events.

        Arguments:
            n: N, the number of events.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.

        Returns:
            x of shape (N, features) and z of shape (N, d), in torch's default dtype.

        Raises:
            ValueError: If `n` is no positive whole number, or both `generator` and `seed` are set.
        """
        n = check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        device = generator.device if generator is not None else None
        z = self.prior_std * torch.randn(n, self.dim, generator=generator, device=device)
        noise = torch.randn(n, self.features, generator=generator, device=device)
        return z @ self.matrix.T.to(z) + noise @ self._noise_tril.T.to(z), z

    def posterior(self, x: Tensor) -> MultivariateNormal:
        """Return the exact posterior of the labels.

        Arguments:
            x: Measured values, shape (N, features).

        Returns:
            A normal distribution of batch shape (N,) and event shape (d,).

        Raises:
            ValueError: If `x` has another shape or is not finite.
        """
        mean = self._mean(x)
        tril = self._tril.to(mean).expand(len(mean), -1, -1)
        return MultivariateNormal(mean, scale_tril=tril, validate_args=False)

    def true_nll(self, x: Tensor, z: Tensor) -> Tensor:
        """Return −ln p(z|x) of the exact posterior in nats, shape (N,)."""
        return -self.posterior(x).log_prob(self._labels(z, x))

    def to_base(self, x: Tensor, z: Tensor) -> Tensor:
        """Return the exact base coordinates u = L⁻¹(z − m), shape (N, d), N(0, I) over events."""
        residual = self._labels(z, x) - self._mean(x)
        return torch.linalg.solve_triangular(self._tril.to(residual), residual.T, upper=False).T

    def _mean(self, x: Any) -> Tensor:
        x = as_tensor(x, "x")
        check_shape(x, ("N", self.features), "x", "Give one row of measured values per event.")
        check_finite(x, "x")
        return x @ self._gain.T.to(x)

    def _labels(self, z: Any, x: Any) -> Tensor:
        z = as_tensor(z, "z")
        check_shape(z, (len(x), self.dim), "z", "Give one row of labels per event of x.")
        return z


def _orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """Return a random orthogonal matrix of shape (size, size)."""
    normal = torch.randn(size, size, generator=generator, dtype=torch.float64)
    return torch.linalg.qr(normal)[0]
