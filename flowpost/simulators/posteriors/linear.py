"""Many labels, each measured with the same normal noise, under a normal or a uniform prior."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._checks import check_positive_int
from ._base import TractableSimulator, truncated_normal, truncated_normal_log_mass

__all__ = ["NoisyIdentity"]

_VARIANCE = 0.1


class NoisyIdentity(TractableSimulator):
    r"""D labels, D data: :math:`x \mid z \sim N(z, 0.1\,I)`.

    With `prior="normal"`, :math:`z \sim N(0, 0.1\,I)` and the posterior is
    :math:`N(x/2, 0.05\,I)`; with `prior="uniform"`, z is uniform on [−1, 1]^D and the posterior is
    :math:`N(x, 0.1\,I)` cut by the box.

    Source: J.-M. Lueckmann et al., *Benchmarking simulation-based inference*, 2021,
    https://arxiv.org/abs/2101.04653, tasks T.1 and T.2 (Gaussian linear, with uniform prior).

    Arguments:
        dim: Number of labels D.
        prior: `"normal"` or `"uniform"`.

    Raises:
        ValueError: If `dim` is not positive or the prior's name unknown.
    """

    def __init__(self, dim: int = 10, prior: str = "normal"):
        self.dim = self.features = check_positive_int(dim, "dim")
        if prior not in ("normal", "uniform"):
            raise ValueError(f"Expected prior 'normal' or 'uniform'; got {prior!r}.")
        self.prior = prior

    def __repr__(self) -> str:
        return f"NoisyIdentity(dim={self.dim}, prior={self.prior!r})"

    @property
    def bounds(self) -> tuple[Tensor, Tensor] | None:
        """Ends of the uniform prior's box [−1, 1]^D, each of shape (D,); `None` if normal."""
        if self.prior == "normal":
            return None
        return -torch.ones(self.dim), torch.ones(self.dim)

    def _prior(self, n: int, generator: torch.Generator | None) -> Tensor:
        shape = (n, self.dim)
        if self.prior == "normal":
            return math.sqrt(_VARIANCE) * torch.randn(
                shape, generator=generator, dtype=torch.float64
            )
        return 2 * torch.rand(shape, generator=generator, dtype=torch.float64) - 1

    def _simulate(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        return z + math.sqrt(_VARIANCE) * torch.randn(z.shape, generator=generator, dtype=z.dtype)

    def _posterior(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        if self.bounds is None:
            noise = torch.randn(n, self.dim, generator=generator, dtype=x.dtype)
            return x / 2 + math.sqrt(_VARIANCE / 2) * noise
        lower, upper = (b.to(x).expand(n, -1) for b in self.bounds)
        return truncated_normal(x.expand(n, -1), math.sqrt(_VARIANCE), lower, upper, generator)

    def _log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        log_prior = _log_normal(z, _VARIANCE) if self.bounds is None else -self.dim * math.log(2)
        return _log_normal(x - z, _VARIANCE) + log_prior

    def _log_evidence(self, x: Tensor) -> Tensor:
        if self.bounds is None:
            return _log_normal(x, 2 * _VARIANCE)
        lower, upper = (b.to(x) for b in self.bounds)
        masses = truncated_normal_log_mass(x, math.sqrt(_VARIANCE), lower, upper)
        return masses.sum(-1) - self.dim * math.log(2)


def _log_normal(value: Tensor, variance: float) -> Tensor:
    return (-0.5 * value.square() / variance - 0.5 * math.log(2 * math.pi * variance)).sum(-1)
