"""A mixture of two normals of very different widths."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import TractableSimulator, truncated_normal, truncated_normal_log_mass

__all__ = ["WidthMixture"]

_HALF_WIDTH = 10.0
_SDS = (1.0, 0.1)


class WidthMixture(TractableSimulator):
    r"""Two labels, two data: :math:`x \mid z \sim \tfrac12 N(z, I) + \tfrac12 N(z, 0.01\,I)`.

    The prior is uniform on [−10, 10]²; the posterior is the same mixture about x, cut by the box,
    each component with the mass that it has inside.

    Source: J.-M. Lueckmann et al., *Benchmarking simulation-based inference*, 2021,
    https://arxiv.org/abs/2101.04653, task T.7 (Gaussian mixture), after S. Sisson et al., 2007.
    """

    dim = 2
    features = 2

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Ends of the prior's box [−10, 10]², each of shape (2,)."""
        return torch.full((2,), -_HALF_WIDTH), torch.full((2,), _HALF_WIDTH)

    def _prior(self, n: int, generator: torch.Generator | None) -> Tensor:
        return _HALF_WIDTH * (2 * torch.rand(n, 2, generator=generator, dtype=torch.float64) - 1)

    def _simulate(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        component = torch.randint(0, 2, (len(z), 1), generator=generator)
        noise = torch.randn(z.shape, generator=generator, dtype=z.dtype)
        return z + torch.tensor(_SDS, dtype=z.dtype)[component] * noise

    def _log_masses(self, x: Tensor) -> Tensor:
        """Return ln of the mass inside the box of each component about x, shape (N, 2)."""
        lower, upper = (b.double() for b in self.bounds)
        return torch.stack(
            [truncated_normal_log_mass(x, sd, lower, upper).sum(-1) for sd in _SDS], -1
        )

    def _posterior(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        narrow = torch.softmax(self._log_masses(x[None])[0], 0)[1]
        is_narrow = torch.rand(n, 1, generator=generator, dtype=torch.float64) < narrow
        lower, upper = (b.double().expand(n, 2) for b in self.bounds)
        mean = x.expand(n, 2)
        wide_draws, narrow_draws = (
            truncated_normal(mean, sd, lower, upper, generator) for sd in _SDS
        )
        return torch.where(is_narrow, narrow_draws, wide_draws)

    def _log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        square = (x - z).square().sum(-1)
        components = [-0.5 * square / sd**2 - math.log(2 * math.pi * sd**2) for sd in _SDS]
        return torch.stack(components).logsumexp(0) + self._log_weight

    def _log_evidence(self, x: Tensor) -> Tensor:
        return self._log_masses(x).logsumexp(-1) + self._log_weight

    # equal weights times the prior's density
    _log_weight = -math.log(2) - 2 * math.log(2 * _HALF_WIDTH)
