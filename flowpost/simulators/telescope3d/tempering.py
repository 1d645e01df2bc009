r"""Draws from posteriors of many events at once: sequential Monte Carlo from prior to posterior.

Particles of the prior are carried through the densities

.. math:: \pi_k(\theta) \propto p(\theta)\, p(x|\theta)^{\beta_k}, \qquad
    0 = \beta_0 < \beta_1 < \dots < 1 ,

each step as long as half of the particles stay effective. A step reweights by
:math:`p(x|\theta)^{\beta_{k+1} - \beta_k}`, resamples, and moves every particle by differential
evolution, :math:`\theta' = \theta + \gamma (\theta_a - \theta_b) + \epsilon` with a and b from the
other half of the particles, which takes scale, correlations and the distances of modes from the
particles themselves.

Sources: *Sequential Monte Carlo samplers*, P. Del Moral, A. Doucet, A. Jasra, 2006,
https://arxiv.org/abs/cond-mat/0212648; *A Markov Chain Monte Carlo version of the genetic algorithm
Differential Evolution*, C. ter Braak, 2006, https://doi.org/10.1007/s11222-006-8769-1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

__all__ = ["temper"]

Density = Callable[[Tensor], Tensor]

_MAX_STAGES = 200


def temper(
    start: Tensor,
    log_likelihood: Density,
    log_prior: Density,
    particles: int,
    moves: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Return draws of the posteriors of N events, shape (N, S, k), in random order.

    Arguments:
        start: Draws of the prior, shape (N, P, k); P can be larger than `particles`.
        log_likelihood: (N, S, k) -> (N, S), in nats.
        log_prior: (N, S, k) -> (N, S), up to a constant; −inf outside.
        particles: S, an even number.
        moves: Moves of every particle per step; twice as many after the last.
        generator: The source of randomness.

    Raises:
        RuntimeError: If 200 steps do not lead to the posterior.
    """
    theta, seen = start, log_likelihood(start)
    beta = torch.zeros(len(start), dtype=torch.float64, device=start.device)
    scale = start.new_full((len(start),), 2.38 / math.sqrt(2 * start.shape[-1]))
    for _ in range(_MAX_STAGES):
        step = _next_step(seen.double(), beta, particles / 2)
        log_weight = step[:, None] * seen.double()
        beta = beta + step
        chosen = _resample(log_weight.softmax(1), particles, generator)
        theta = theta.gather(1, chosen[..., None].expand(-1, -1, theta.shape[-1]))
        seen = seen.gather(1, chosen)
        done = bool((beta >= 1).all())
        for _ in range(2 * moves if done else moves):
            theta, seen, rate = _move(
                theta, seen, beta, scale, log_likelihood, log_prior, generator
            )
            scale = (scale * (rate - 0.25).exp()).clamp(0.02, 2.0)
        if done:
            return theta
    raise RuntimeError(f"The posterior was not reached in {_MAX_STAGES} tempering steps.")


def _next_step(seen: Tensor, beta: Tensor, effective: float) -> Tensor:
    """Return the largest step of β that leaves `effective` particles, shape (N,), by bisection."""
    low, high = torch.zeros_like(beta), 1 - beta
    trial = high
    for _ in range(30):
        weight = (trial[:, None] * (seen - seen.amax(1, keepdim=True))).exp()
        fits = weight.sum(1).square() >= effective * weight.square().sum(1)
        low, high = torch.where(fits, trial, low), torch.where(fits, high, trial)
        trial = (low + high) / 2
    # the first trial was the whole rest
    return torch.where(low > 0.999999 * (1 - beta), 1 - beta, low)


def _resample(weight: Tensor, count: int, generator: torch.Generator | None) -> Tensor:
    """Return indices of systematic resampling in random order, shape (N, P) -> (N, count)."""
    offset = _rand((len(weight), 1), weight, generator)
    wanted = (torch.arange(count, device=weight.device) + offset) / count
    index = torch.searchsorted(weight.cumsum(1), wanted).clamp(max=weight.shape[1] - 1)
    return index.gather(1, _rand((len(weight), count), weight, generator).argsort(1))


def _move(
    theta: Tensor,
    seen: Tensor,
    beta: Tensor,
    scale: Tensor,
    log_likelihood: Density,
    log_prior: Density,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Move each half of the particles by differences of the other; also the acceptance (N,)."""
    halves, values, rates = list(theta.chunk(2, 1)), list(seen.chunk(2, 1)), []
    for i in (0, 1):
        now, other = halves[i], halves[1 - i]
        shape = now.shape[:2]
        pair = [
            (_rand(shape, now, generator) * other.shape[1]).long().clamp(max=other.shape[1] - 1)
            for _ in range(2)
        ]
        a, b = (other.gather(1, j[..., None].expand_as(now)) for j in pair)
        gamma = scale[:, None] * (0.5 * _randn(shape, now, generator)).exp()
        # full differences reach other modes
        gamma = torch.where(_rand(shape, now, generator) < 0.1, 1.0, gamma)
        jitter = 1e-3 * _randn(now.shape, now, generator)
        proposal = now + gamma[..., None] * (a - b) + jitter * other.std(1, keepdim=True)
        value = log_likelihood(proposal)
        gain = beta[:, None] * (value - values[i]).double()
        gain = gain + (log_prior(proposal) - log_prior(now)).double()
        accepted = _rand(shape, gain, generator).log() < gain
        halves[i] = torch.where(accepted[..., None], proposal, now)
        values[i] = torch.where(accepted, value, values[i])
        rates.append(accepted.to(theta.dtype).mean(1))
    return torch.cat(halves, 1), torch.cat(values, 1), (rates[0] + rates[1]) / 2


def _rand(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)


def _randn(shape: tuple[int, ...], like: Tensor, generator: torch.Generator | None) -> Tensor:
    device = like.device if generator is None else generator.device
    return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like.device)
