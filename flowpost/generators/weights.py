r"""Draws of a fast proposal, weighted to the density that they should have.

.. math:: w = p_T(x|z) / q_S(x|z), \quad x \sim q_S, \qquad
          \mathrm{E}_{q_S}[w f] = \mathrm{E}_{p_T}[f], \qquad
          \mathrm{ESS} = \frac{(\sum w)^2}{S \sum w^2} ,

the last as a share of the draws. Both densities are normalised, so the plain mean of w f is without
bias; the mean divided by Σw has less spread and a bias of order 1/S. Where the effective sample
size is low the target's own, slow draws are taken, with weight one. Were the same draws to decide
whether they are kept, large weights would be thrown away and the mean would be biased: so the draws
come in two halves, and each half is judged by the other.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_positive_int
from ..likelihood import Likelihood

__all__ = ["WeightedDraws", "effective_size", "weighted_draws"]

# events that go through the networks at once
_ROWS = 4096


def effective_size(log_weight: Any, dim: int = 0) -> Tensor:
    """(Σw)² / (S Σw²), the share of S draws that are as good as draws of equal weights.

    Arguments:
        log_weight: ln w of shape (S, ...).
        dim: The dimension of the draws.

    Returns:
        Between 1/S and 1, of the shape that is left; 0 where all weights are.

    Raises:
        ValueError: If there are no draws, or no such dimension.
    """
    log_weight = as_tensor(log_weight, "log_weight")
    if not -log_weight.ndim <= dim < log_weight.ndim or not log_weight.shape[dim]:
        raise ValueError(
            f"Expected log_weight with at least one draw along dimension {dim}; got shape "
            f"{tuple(log_weight.shape)}."
        )
    largest = log_weight.amax(dim, keepdim=True)
    weight = (log_weight - torch.where(largest > -math.inf, largest, 0.0)).exp()
    square = weight.square().sum(dim)
    share = weight.sum(dim).square() / (
        log_weight.shape[dim] * torch.where(square > 0, square, 1.0)
    )
    return share.clamp_max(1.0)


@dataclass(frozen=True)
class WeightedDraws:
    """Draws of a proposal with their weights, some of them replaced by draws of the target.

    Attributes:
        x: Draws, shape (S, *batch, F).
        log_weight: ln w, shape (S, *batch); 0 for the target's own draws.
        ess: Effective sample size of the proposal's draws as a share, shape (*batch), or () where
            they were judged together.
        replaced: Which draws are the target's own, shape (S, *batch).
    """

    x: Tensor
    log_weight: Tensor
    ess: Tensor
    replaced: Tensor

    def __str__(self) -> str:
        return (
            f"{self.log_weight.numel()} draws; effective sample size {float(self.ess.mean()):.1%} "
            f"(lowest {float(self.ess.min()):.1%}), {float(self.replaced.double().mean()):.1%} "
            "of the draws replaced"
        )

    @property
    def weight(self) -> Tensor:
        """Weights of mean one over the draws of each label, shape (S, *batch)."""
        return torch.softmax(self.log_weight, 0) * len(self.log_weight)

    def mean(self, values: Any, *, normalised: bool = True) -> Tensor:
        """Weighted mean over the draws of each label.

        Arguments:
            values: What is averaged, such as f(x), of shape (S, *batch, ...).
            normalised: Divide by the sum of the weights; otherwise the mean is without bias.

        Returns:
            Shape (*batch, ...).

        Raises:
            ValueError: If the values do not begin with the shape of the weights.
        """
        values = as_tensor(values, "values", like=self.log_weight)
        shape = self.log_weight.shape
        if values.shape[: len(shape)] != shape:
            raise ValueError(
                f"Expected values of shape ({', '.join(map(str, shape))}, ...); got "
                f"{tuple(values.shape)}. Give one for each draw."
            )
        weight = self.weight if normalised else self.log_weight.exp()
        return (weight.reshape(*shape, *(1,) * (values.ndim - len(shape))) * values).mean(0)

    def resampled(self, draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Draws of equal weight (draws, *batch, F), taken again from these by their weights.

        The same one may come several times; it does no good to take more than the effective number.
        """
        draws = check_positive_int(draws, "draws")
        flat = self.weight.reshape(len(self.weight), -1).T
        index = torch.multinomial(flat, draws, replacement=True, generator=generator).T
        index = index.reshape(draws, *self.log_weight.shape[1:], 1)
        return self.x.gather(0, index.expand(*index.shape[:-1], self.x.shape[-1]))


def weighted_draws(
    target: Likelihood,
    proposal: Likelihood,
    z: Any,
    draws: int = 256,
    *,
    minimum_ess: float = 0.0,
    together: bool = False,
    generator: torch.Generator | None = None,
) -> WeightedDraws:
    """Draw from a proposal, weight the draws to a target, and fall back to it where they are poor.

    With S draws an effective sample size much below 1/S cannot be seen: where the proposal misses a
    part of the target altogether, no draw and no weight tells. Take enough draws, and check the
    student once by `log_prob` of the teacher's draws, slow as it is.

    Arguments:
        target: p_T: ln p must be fast. Of two steps with a threshold, their `continuous()`.
        proposal: q_S: draws with their ln q must be fast.
        z: Labels (*batch, D).
        draws: S, the draws of each label.
        minimum_ess: Share of effective draws below which the target's own are drawn instead.
        together: Judge all labels together instead of each by its own draws; for a few draws of
            each of many labels, as of a simulation.
        generator: The source of randomness.

    Returns:
        The draws.

    Raises:
        ValueError: If there are too few draws to be judged, or `minimum_ess` is not in [0, 1].
    """
    draws = check_positive_int(draws, "draws")
    if not 0 <= minimum_ess <= 1:
        raise ValueError(f"Expected minimum_ess as a share between 0 and 1; got {minimum_ess!r}.")
    labels = target._labels(z).to(target._like)
    rows = labels.expand(draws, *labels.shape).reshape(-1, labels.shape[-1])
    if minimum_ess > 0 and (len(rows) if together else draws) < 4:
        raise ValueError(
            f"Expected at least four draws to be judged by; got {draws} of each label. Take more, "
            "or set together=True."
        )
    with torch.no_grad():
        x, log_weight = _propose(target, proposal, rows, generator)
        shape = (draws, *labels.shape[:-1])
        table = log_weight.reshape(-1, 1) if together else log_weight.reshape(draws, -1)
        ess = effective_size(table).reshape(() if together else shape[1:])
        poor = torch.zeros_like(log_weight, dtype=torch.bool)
        if minimum_ess > 0:
            half = torch.arange(len(table), device=rows.device) % 2
            judged = torch.stack([effective_size(table[half == 1 - h]) for h in (0, 1)])
            poor = (judged < minimum_ess)[half].reshape(-1)
        if bool(poor.any()):
            own = [target.sample(part, generator) for part in rows[poor].split(_ROWS)]
            x[poor] = torch.cat(own).to(x)
            log_weight = torch.where(poor, 0.0, log_weight)
    return WeightedDraws(
        x.reshape(*shape, x.shape[-1]), log_weight.reshape(shape), ess, poor.reshape(shape)
    )


def _propose(
    target: Likelihood, proposal: Likelihood, rows: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Draws of the proposal at labels (M, D), and ln w (M,)."""
    xs, weights = [], []
    for part in rows.split(_ROWS):
        x, log_q = proposal(part).sample_and_log_prob(generator)
        xs.append(x)
        weights.append(target(part).log_prob(x) - log_q)
    return torch.cat(xs), torch.cat(weights)
