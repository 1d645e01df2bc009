r"""Losses of a posterior.

.. math:: \mathcal{L}_{\mathrm{joint\,KL}} = \frac{1}{\sum_i w_i} \sum_i w_i
          \cdot \big(-\ln q_\phi(z_i|x_i)\big)

Source: T. Glüsenkamp, *Unifying supervised learning and VAEs*, 2020,
https://arxiv.org/abs/2008.05825, eq. 8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._weights import weighted_mean
from .posterior import Posterior

__all__ = ["joint_kl", "weighted_mean"]


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
