r"""Other scores of an event, to compare with: typicality at the base, and density of the context.

*Typicality*: the residuals of the data at labels of the posterior are standard normals, so their
sum of squares follows χ² with as many degrees of freedom as there are values. An event is untypical
where it is far in either tail,

.. math:: t = \frac{1}{S} \sum_s 2 \min(F_{\chi^2}, 1 - F_{\chi^2}), \qquad
          F = F_{\chi^2_R}\Big(\sum_k r_k(x, z_s)^2\Big) .

It is one number of the whole event. Residuals that are wrong in a pattern, too high here and too
low there, can add up to what is typical: it does not replace a statistic of the residuals.

*Density of the context*: a normal density of what the encoder gives, with the mean and covariance
of good events. It needs no likelihood, and sees only what the encoder passes on.
Source: K. Lee et al., *A simple unified framework for detecting out-of-distribution samples and
adversarial attacks*, 2018, https://arxiv.org/abs/1807.03888.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_positive_int, check_shape
from .._events import chosen
from .._modes import evaluating
from ..likelihood import ExtendedModel
from ..model import PosteriorModel
from ..posterior import Posterior
from .predictive import (
    check_model,
    count_of,
    encoded,
    over_events,
    replicas,
    seeded,
)

__all__ = ["ContextDensity", "contexts", "typicality"]

_SHRINK = 1e-4
_ROWS = 4096


def typicality(
    model: ExtendedModel,
    x: Any,
    draws: int = 16,
    *,
    reference: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> Tensor:
    """Typicality of events under their posterior-averaged likelihood, of shape (N,).

    Arguments:
        model: A trained posterior with its likelihood.
        x: Inputs of N events; there may be none.
        draws: Posterior draws S of each event.
        reference: First guesses, for a head that wants them.
        seed: Of all draws.
        progress: Show a progress bar.

    Returns:
        A number in [0, 1], low for an event with too much or too little scatter; not uniform.

    Raises:
        ValueError: If the model has no likelihood, or inputs do not fit.
    """
    check_model(model)
    check_positive_int(draws, "draws")
    if not count_of(x):
        return torch.zeros(0, dtype=torch.float64)
    generator = seeded(seed)

    def mean(q: Posterior, context: Tensor | None, data: Any) -> tuple[Tensor, ...]:
        sums = torch.zeros(q.batch_shape, dtype=torch.float64, device=q.device)
        for _, bound in replicas(model, q, context, draws, generator):
            value, known = bound.residuals(data, generator)
            square = value.double().square()
            if known is not None:
                square = torch.where(known, square, 0.0)
            size = torch.full_like(square, 1.0) if known is None else known.to(square)
            level = torch.special.gammainc(size.sum(-1) / 2, square.sum(-1) / 2)
            sums += (2 * torch.minimum(level, 1 - level)).sum(0)
        return ((sums / draws).cpu(),)

    return over_events(model, x, reference, draws, mean, "typicality", progress)[0]


def contexts(model: PosteriorModel, x: Any) -> Tensor:
    """Contexts (N, L) of inputs of N events, in portions, on the CPU."""
    total = count_of(x)
    if not total:
        return torch.zeros(0, model.head.context, dtype=torch.float64)
    rows = torch.arange(total).split(_ROWS)
    device = next(model.parameters()).device
    with evaluating(model):
        parts = [encoded(model, chosen(x, r, device)) for r in rows]
    if any(p is None for p in parts):
        raise ValueError("Expected a model with a context; this one is an unconditional density.")
    return torch.cat([p.double().cpu() for p in parts if p is not None])


class ContextDensity(nn.Module):
    """A normal density of contexts: `fit` on good events, then `log_prob`.

    Arguments:
        size: Features L of a context.
    """

    mean: Tensor
    whiten: Tensor

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = check_positive_int(size, "size")
        self.register_buffer("mean", torch.zeros(size, dtype=torch.float64))
        self.register_buffer("whiten", torch.eye(size, dtype=torch.float64))

    def fit(self, context: Any) -> ContextDensity:
        """Set mean and covariance from contexts (N, L) of good events.

        Raises:
            ValueError: If the shape differs or there are too few events.
        """
        c = as_tensor(context, "context").detach().double()
        check_shape(c, ("N", self.size), "context")
        if len(c) <= self.size:
            raise ValueError(
                f"Expected more events than features of the context ({self.size}); got {len(c)}."
            )
        self.mean = c.mean(0)
        covariance = torch.cov(c.T).reshape(self.size, self.size)
        # a feature that never varies, or repeats another, must not decide
        typical = covariance.diagonal().mean().clamp_min(torch.finfo(c.dtype).tiny)
        covariance = covariance + _SHRINK * typical * torch.eye(self.size).to(c)
        values, vectors = torch.linalg.eigh(covariance)
        self.whiten = vectors / values.sqrt()
        return self

    def log_prob(self, context: Any) -> Tensor:
        """−½·(squared Mahalanobis distance) of contexts (N, L), of shape (N,)."""
        c = as_tensor(context, "context").double()
        check_shape(c, ("N", self.size), "context")
        return -((c - self.mean.to(c)) @ self.whiten.to(c)).square().sum(-1) / 2
