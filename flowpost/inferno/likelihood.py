r"""The likelihood of binned counts.

With expected counts :math:`\lambda_k(\theta)`, data :math:`n_k` and constraints p, what is
minimised is the negative logarithm of the likelihood over that of :math:`\lambda_k = n_k`,

.. math::

    \ell(\theta) = \sum_k \Bigl( \lambda_k - n_k - n_k \ln \frac{\lambda_k}{n_k} \Bigr)
    - \sum_j \ln \frac{p_j(\theta_j)}{p_j(\theta_{j0})} ,

so that n need not be whole. With `mc_stat`, one factor a bin of mean 1 and the relative
uncertainty e of its simulation (Barlow–Beeston "lite", pyhf's staterror) multiplies λ; the best
one solves :math:`\gamma^2 - (1 - \lambda e^2) \gamma - n e^2 = 0` and is put in, so that ℓ stays a
function of θ alone.

Sources: K. Cranmer et al., *HistFactory*, 2012, CERN-OPEN-2012-016; J. Conway, *Incorporating
nuisance parameters in likelihoods for multisource spectra*, 2011, https://arxiv.org/abs/1103.0354.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_shape
from .model import CountingModel

if TYPE_CHECKING:
    from .templates import Templates

__all__ = ["Likelihood"]


@dataclass(frozen=True, eq=False)
class Likelihood:
    """The function ℓ of the parameters.

    Attributes:
        templates: Expected counts.
        data: Counts (K,).
        mc_stat: Whether the simulation's size limits the templates.
    """

    templates: Templates
    data: Tensor
    mc_stat: bool = False

    @classmethod
    def of(cls, templates: Templates, data: Any, mc_stat: bool) -> Likelihood:
        """Of data (K,), by default those expected at nominal values.

        Raises:
            ValueError: If data have another shape, are negative or not finite, or lie where
                nothing is expected.
        """
        total = templates.total
        if data is None:
            return cls(templates, templates.asimov().clamp_min(0), mc_stat)
        counts = as_tensor(data, "data").detach().double().cpu()
        check_shape(counts, tuple(total.shape), "data", "One count a bin.")
        check_finite(counts, "data")
        lost = (total <= 1e-9 * total.sum()) & (counts > 0)
        if bool((counts < 0).any()) or bool(lost.any()):
            k = int(((counts < 0) | lost).nonzero()[0, 0])
            raise ValueError(
                f"Expected data at or above zero, and zero where nothing is expected; got "
                f"{counts[k]:g} in bin {k}, where {total[k]:.3g} are expected. Merge empty bins "
                "with others: templates.merged(groups)."
            )
        return cls(templates, counts, mc_stat)

    def factors(self, counts: Tensor) -> Tensor:
        """The best factors γ (M, K) on expected counts (M, K)."""
        squares = self.templates.errors.square()
        b = 1 - counts * squares
        root = (b.square() + 4 * self.data * squares + 1e-300).sqrt()
        # the same root of the quadratic without a difference of near numbers
        low = torch.where(b > 0, 1.0, root - b)
        return torch.where(b > 0, (b + root) / 2, 2 * self.data * squares / low)

    def __call__(self, values: Tensor) -> Tensor:
        """ℓ (M,) at values (M, P); infinite where a count or a parameter leaves its range."""
        data = self.data
        used = self.templates.total > 1e-9 * self.templates.total.sum()
        counts = self.templates.expected(values)
        good = ((counts > 0) & torch.isfinite(counts) | ~used).all(-1)
        counts = torch.where(used & good[..., None], counts, 1.0)
        extra: Tensor | float = 0.0
        if self.mc_stat:
            factors, error = self.factors(counts), self.templates.errors
            pulls = (factors - 1) / torch.where(error > 0, error, 1.0)
            extra = torch.where(used, 0.5 * pulls.square(), 0.0).sum(-1)
            counts = counts * factors
        some = data > 0
        excess = torch.where(some, (counts - data) / torch.where(some, data, 1.0), 0.0)
        terms = counts - data - data * torch.log1p(excess)
        terms = torch.where(used, terms, 0.0).sum(-1) + _penalty(self.templates.model, values)
        return torch.where(good & ~torch.isnan(terms), terms + extra, torch.inf)

    def scale(self) -> Tensor:
        """The expected uncertainties (P,) of the parameters."""
        return self.templates.information(mc_stat=self.mc_stat).covariance.diagonal().sqrt()


def _penalty(model: CountingModel, values: Tensor) -> Tensor:
    total = torch.zeros_like(values[..., 0])
    for column, nuisance in enumerate(model.nuisances, 1):
        constraint, value = nuisance.constraint, values[..., column]
        if constraint is None:
            continue
        shape = (*value.shape, *constraint.batch_shape, *constraint.event_shape)
        support: Any = constraint.support
        inside = support.check(value.detach().reshape(shape)).reshape(value.shape)
        nominal = value.new_tensor(nuisance.nominal)
        own = nuisance.penalty(torch.where(inside, value, nominal)) - nuisance.penalty(nominal)
        total = total + torch.where(inside, own, torch.inf)
    return total
