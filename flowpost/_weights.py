"""Event weights: their checks and the weighted mean, the form of every loss."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ._checks import as_tensor, check_finite, check_shape

__all__ = ["check_weights", "weighted_mean"]


def check_weights(weight: Any, value: Tensor, signed_weights: bool = False) -> Tensor:
    """Return event weights (N,) like values (N,).

    Raises:
        ValueError: If the shape differs, or a weight is not finite or negative (unless signed).
    """
    weight = as_tensor(weight, "weight", like=value).to(value)
    check_shape(weight, tuple(value.shape), "weight", "One weight an event.")
    check_finite(weight, "weight")
    if not signed_weights and bool((weight < 0).any()):
        row = int((weight < 0).nonzero()[0, 0])
        raise ValueError(
            f"Expected weights of at least 0; got {weight[row].item():g} in row {row}. Set "
            "signed_weights=True where negative weights are meant."
        )
    return weight


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
    weight = check_weights(weight, value, signed_weights)
    total = weight.sum()
    if not bool(total > 0):
        raise ValueError(
            f"Expected weights with a positive sum; got {total.item():g}. Use larger batches or "
            "remove events of zero weight."
        )
    return (weight * value).sum() / total
