r"""Losses of a posterior, and of the likelihood beside it.

.. math:: \mathcal{L}_{\mathrm{joint\,KL}} = \frac{1}{\sum_i w_i} \sum_i w_i
          \cdot \big(-\ln q_\phi(z_i|x_i)\big)

The extended supervised loss adds the likelihood of the data, with unlabelled latents z_u if an
event varies by more than its labels z_o,

.. math:: \mathcal{L}_{\mathrm{extended}} = \mathbb{E}\Big[ -\ln q_\phi(z_o|x)
          + \mathbb{E}_{z_u \sim q_\phi(z_u|x, z_o)} \big( -\ln p_\theta(x|z_o, z_u)
          - \ln p(z_u|z_o) + \ln q_\phi(z_u|x, z_o) \big) \Big],

which without latents is joint KL plus conditional likelihood, and without labels the negative
evidence lower bound of a variational autoencoder.

Source: T. Glüsenkamp, *Unifying supervised learning and VAEs*, 2020,
https://arxiv.org/abs/2008.05825, eqs. 8 and 17.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ._weights import weighted_mean
from .posterior import Posterior

if TYPE_CHECKING:
    from .likelihood import Latent, Likelihood

__all__ = ["extended", "joint_kl", "likelihood_loss", "weighted_mean"]


def joint_kl(
    posterior: Posterior, z: Any, weight: Any = None, *, signed_weights: bool = False
) -> Tensor:
    """Joint KL of a posterior in nats: the weighted mean of −ln q(z|x), a scalar.

    Arguments:
        posterior: Posterior of N events.
        z: Labels of shape (N, D).
        weight: Event weights of shape (N,).
        signed_weights: Allow negative weights.

    Raises:
        ValueError: If labels or weights do not fit.
    """
    return weighted_mean(-posterior.log_prob(z), weight, signed_weights)


def extended(
    posterior: Posterior | None,
    likelihood: Likelihood,
    x: Any,
    z: Tensor | None,
    weight: Any = None,
    *,
    latent: Latent | None = None,
    context: Tensor | None = None,
    signed_weights: bool = False,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Extended supervised loss in nats, a scalar; see the module's docstring.

    Arguments:
        posterior: q(z_o|x) of N events; None where there are no labels.
        likelihood: p(x|z_o), or p(x|z_o, z_u) over labels and latents.
        x: Data of N events, as the likelihood takes them.
        z: Labels z_o of shape (N, D); None where there are none.
        weight: Event weights of shape (N,).
        latent: Posterior and prior of latents z_u.
        context: Context (N, L) of the events, for the posterior of the latents.
        signed_weights: Allow negative weights.
        generator: Of the latents' draws.

    Raises:
        ValueError: If data, labels or weights do not fit, or neither labels nor latents are given.
    """
    loss = likelihood_loss(likelihood, x, z, latent=latent, context=context, generator=generator)
    if posterior is not None:
        loss = loss - posterior.log_prob(z)
    return weighted_mean(loss, weight, signed_weights)


def likelihood_loss(
    likelihood: Likelihood,
    x: Any,
    z: Tensor | None,
    *,
    latent: Latent | None = None,
    context: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The part of the extended loss beside −ln q(z_o|x), of each event (N,); see `extended`."""
    if latent is None:
        if z is None:
            raise ValueError("Expected labels, latents or both; got neither.")
        return -likelihood.log_prob(x, z)
    q = latent.posterior(context, z)
    draw, log_q = q.sample_and_log_prob((), generator=generator)
    both = draw if z is None else torch.cat([z.to(draw), draw], -1)
    return log_q - latent.prior_log_prob(draw, z) - likelihood.log_prob(x, both)
