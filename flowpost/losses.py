r"""Losses of a posterior.

.. math:: \mathcal{L}_{\mathrm{joint\,KL}} = \frac{1}{\sum_i w_i} \sum_i w_i
          \cdot \big(-\ln q_\phi(z_i|x_i)\big)

Source: T. Glüsenkamp, *Unifying supervised learning and VAEs*, 2020,
https://arxiv.org/abs/2008.05825, eq. 8.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import as_tensor, check_finite, check_shape
from .posterior import Posterior

__all__ = ["joint_kl", "weighted_mean"]


def weighted_mean(value: Tensor, weight: Any = None, signed_weights: bool = False) -> Tensor:
    """Mean of values (N,) with event weights (N,), normalised by the sum of weights.

    Arguments:
        value: Values of shape (N,).
        weight: Weights of shape (N,), or None.
        signed_weights: Allow negative weights.

    Raises:
        ValueError: If there are no events, a weight is not finite, negative (unless signed), or
            the weights do not sum to a positive number.
    """
    if not value.numel():
        raise ValueError("Expected at least one event; got an empty batch.")
    if weight is None:
        return value.mean()
    weight = as_tensor(weight, "weight", like=value).to(value)
    check_shape(weight, tuple(value.shape), "weight", "One weight an event.")
    check_finite(weight, "weight")
    if not signed_weights and bool((weight < 0).any()):
        row = int((weight < 0).nonzero()[0, 0])
        raise ValueError(
            f"Expected weights of at least 0; got {weight[row].item():g} in row {row}. Set "
            "signed_weights=True where negative weights are meant."
        )
    total = weight.sum()
    if not bool(total > 0):
        raise ValueError(
            f"Expected weights with a positive sum; got {total.item():g}. Use larger batches or "
            "remove events of zero weight."
        )
    return (weight * value).sum() / total


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
