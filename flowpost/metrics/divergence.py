r"""Divergence of the mean predicted class probabilities of two samples; and what samples may be.

The mean probability of class k is a mean of probabilities, in log space

.. math:: a_k = \ln \bar p_k = \operatorname{logsumexp}_i \big( \ln w_i
          + (\operatorname{log\,softmax} l_i)_k \big) - \ln \sum_i w_i ,

and the symmetric divergence of two such means (Jeffreys', halved), in nats, is

.. math:: J = \frac{1}{2} \sum_k (e^{a_k} - e^{b_k}) (a_k - b_k) .

The mean of the log-softmax in its place is a geometric mean: it does not sum to one, and of
confident predictions it sees next to nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .._checks import as_tensor, check_finite, check_shape

__all__ = [
    "as_sample",
    "as_samples",
    "checked_weights",
    "safe_root",
    "sample_weights",
    "symmetric_kl",
]


def symmetric_kl(x: Any, y: Any, weight_x: Any = None, weight_y: Any = None) -> Tensor:
    """Symmetric KL divergence of mean predicted class probabilities in nats, a scalar.

    Arguments:
        x: Logits of shape (N, K), not probabilities.
        y: Logits of shape (M, K).
        weight_x: Event weights of shape (N,), not negative.
        weight_y: Event weights of shape (M,), not negative.

    Returns:
        ½ Σ_k (p_k − q_k)(ln p_k − ln q_k), at least 0. It is 0 wherever the means agree, whatever
        the distributions about them.

    Raises:
        ValueError: If logits are not finite, do not fit or have one class, or weights are negative
            or sum to 0.

    Example:
        >>> x = torch.tensor([[3.0, 0.0], [0.0, 3.0]])
        >>> float(symmetric_kl(x, x.flip(0)))
        0.0
    """
    x, y, weight_x, weight_y = as_samples(x, y, weight_x, weight_y)
    if x.shape[1] < 2:
        raise ValueError(
            "Expected logits of at least two classes; got one column. Put zeros beside the logit "
            "of a binary classifier: torch.stack([torch.zeros_like(l), l], 1)."
        )
    a, b = _log_mean(x, weight_x), _log_mean(y, weight_y)
    return ((a.exp() - b.exp()) * (a - b)).sum() / 2


def _log_mean(logits: Tensor, weight: Tensor | None) -> Tensor:
    """Logarithm (K,) of the weighted mean of class probabilities."""
    log_p = F.log_softmax(logits, -1)
    if weight is None:
        return torch.logsumexp(log_p, 0) - math.log(len(logits))
    share = weight / weight.sum()
    seen = share > 0
    # both branches of a where are differentiated: the logarithm never meets a zero
    log_share = torch.where(seen, share, 1.0).log().masked_fill(~seen, -torch.inf)
    return torch.logsumexp(log_p + log_share[:, None], 0)


def as_samples(
    x: Any,
    y: Any,
    weight_x: Any = None,
    weight_y: Any = None,
    *,
    signed_weights: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Two samples (N, D) and (M, D) of one dtype and device, and their weights (N,) and (M,).

    Arguments:
        x: Shape (N,) or (N, D); half precision becomes float32.
        y: Shape (M,) or (M, D).
        weight_x: Shape (N,), or None.
        weight_y: Shape (M,), or None.
        signed_weights: Allow negative weights; None where there is no such choice.

    Raises:
        ValueError: If a sample is empty, not finite or of another shape, or weights do not fit, are
            negative (unless signed) or do not sum to a positive number.
    """
    x = as_sample(x, "x")
    y = as_sample(y, "y", like=x)
    dtype = torch.promote_types(x.dtype, y.dtype)
    x, y = x.to(dtype), y.to(dtype)
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Expected x and y with the same columns; got {x.shape[1]} and {y.shape[1]}. Both are "
            "to come from the same layer of the same network."
        )
    return (
        x,
        y,
        sample_weights(weight_x, x, "weight_x", signed_weights),
        sample_weights(weight_y, y, "weight_y", signed_weights),
    )


def as_sample(value: Any, name: str, like: Tensor | None = None) -> Tensor:
    """A sample (N, D), of shape (N,) or (N, D); half precision becomes float32.

    Arguments:
        value: The sample.
        name: What it is called in an error.
        like: A tensor whose device it is put on; integers take its dtype.

    Raises:
        ValueError: If it is empty, not finite or of another shape.
    """
    value = as_tensor(value, name, like=like)
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if value.ndim not in (1, 2):
        raise ValueError(
            f"Expected {name} of shape (N,) or (N, D); got {tuple(value.shape)}. "
            "Flatten what one event has: x.flatten(1)."
        )
    value = value[:, None] if value.ndim == 1 else value
    if not value.numel():
        raise ValueError(f"Expected at least one event in {name}; got {tuple(value.shape)}.")
    check_finite(value, name)
    return value


def sample_weights(
    weight: Any, sample: Tensor, name: str, signed: bool | None = None
) -> Tensor | None:
    """Event weights (N,) of a sample like it; see `as_samples`."""
    if weight is None:
        return None
    weight = as_tensor(weight, name, like=sample).to(sample)
    remedy = (
        "Only energy_distance takes negative weights."
        if signed is None
        else "Set signed_weights=True where negative weights are meant."
    )
    return checked_weights(weight, len(sample), name, remedy, signed=bool(signed))


def checked_weights(
    weight: Tensor, count: int, name: str, remedy: str, *, signed: bool = False
) -> Tensor:
    """Return event weights (N,) as they are.

    Arguments:
        weight: Weights.
        count: N.
        name: What they are called in an error.
        remedy: What to do about negative weights.
        signed: Allow them.

    Raises:
        ValueError: If the shape differs, one is not finite or negative (unless signed), or their
            sum is not positive.
    """
    check_shape(weight, (count,), name, "One weight an event.")
    check_finite(weight, name)
    if not signed and bool((weight < 0).any()):
        row = int((weight < 0).nonzero()[0, 0])
        raise ValueError(
            f"Expected {name} of at least 0; got {weight[row].item():g} in row {row}. {remedy}"
        )
    if not bool(weight.sum() > 0):
        raise ValueError(
            f"Expected {name} with a positive sum; got {weight.sum().item():g}. Use larger batches "
            "or leave out samples of zero weight."
        )
    return weight


def safe_root(value: Tensor, power: float = 2.0) -> Tensor:
    """value^(1/power), 0 with zero gradient where the value is 0 or below by rounding."""
    positive = value > 0
    return torch.where(positive, torch.where(positive, value, 1.0) ** (1 / power), 0.0)
