r"""Alignment of what a network gives for nominal events and for variations of a nuisance.

A network that is trained on nominal simulation reacts to a nuisance as it likes. A term beside the
primary loss asks that its outputs be distributed alike for all variations v,

.. math:: L = L_{\mathrm{primary}} + \lambda \cdot \frac{1}{V} \sum_v \frac{1}{C} \sum_c
          d\big( f(x_0) \,|\, c_0 = c ;\; f(x_v) \,|\, c_v = c \big) ,

with a distance d of samples from `flowpost.metrics`. Classes c are compared each with itself, and
count alike: a scale factor is asked of each of them, and a rare one is often the signal. Without
that condition, a variation with another class mix than the nominal one has another distribution of
the outputs *of a network that is right*; the term then distorts the outputs to make up for it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ..metrics.energy import distance_correlation, energy_distance

__all__ = ["Align"]


@dataclass(frozen=True)
class Align:
    """A loss that aligns outputs across the variations of a nuisance, to add to a primary loss.

    Arguments:
        metric: Distance of two samples, called as metric(x, y) or, where there are event weights,
            metric(x, y, weight_x, weight_y): one of `flowpost.metrics` or a function of yours.
            Not `distance_correlation`, which is of two columns of the same events.
            `symmetric_kl` takes logits (N, K), the others outputs of any kind, (N,) or (N, D):
            class probabilities, contexts, posterior parameters. Options by `functools.partial`.
        per_class: Compare each class with itself. Without it the distributions of all events, which
            is right only where every sample has the same class mix.
        weight: Factor λ of the term.
        min_events: Classes with fewer events of non-zero weight on either side are left out. A
            U-statistic needs two.

    Example:
        >>> logits, shifted = torch.randn(60, 3), torch.randn(60, 3) + 1
        >>> labels = torch.arange(60) % 3
        >>> align = Align(weight=5.0)
        >>> align
        Align(energy_distance, per_class=True, weight=5, min_events=2)
        >>> loss = torch.nn.functional.cross_entropy(logits, labels)
        >>> loss = loss + align(logits.softmax(1), {"up": shifted.softmax(1)}, labels, labels)
    """

    metric: Callable[..., Tensor] = energy_distance
    per_class: bool = True
    weight: float = 1.0
    min_events: int = 2

    def __post_init__(self) -> None:
        if not callable(self.metric):
            raise ValueError(
                f"Expected metric as a function of two samples; got {self.metric!r}. "
                "Take one of flowpost.metrics, such as energy_distance."
            )
        if _innermost(self.metric) is distance_correlation:
            raise ValueError(
                "Expected metric as a distance of two samples; got distance_correlation, which "
                "takes two columns of the same events. For a continuous nuisance nu add "
                "distance_correlation(outputs[c == k], nu[c == k]) of each class k to the loss."
            )
        if not isinstance(self.weight, Real) or not 0 <= self.weight < math.inf:
            raise ValueError(f"Expected weight as a number of at least 0; got {self.weight!r}.")
        check_positive_int(self.min_events, "min_events")

    def __repr__(self) -> str:
        return (
            f"Align({_named(self.metric)}, per_class={self.per_class}, weight={self.weight:g}, "
            f"min_events={self.min_events})"
        )

    def __call__(
        self,
        nominal: Tensor,
        varied: Tensor | Mapping[str, Tensor],
        labels: Any = None,
        varied_labels: Any = None,
        event_weight: Any = None,
        varied_event_weight: Any = None,
    ) -> Tensor:
        """λ times the mean distance over variations and, with equal shares, their classes.

        Arguments:
            nominal: Outputs of nominal events, of shape (N,) or (N, D).
            varied: Outputs (M,) or (M, D) of events of a variation, or of several by name; M may
                differ between them.
            labels: Classes of the nominal events, whole numbers of shape (N,).
            varied_labels: Classes (M,) of the variation, or of each by name; one tensor serves
                several of the same events.
            event_weight: Weights of the nominal events, of shape (N,).
            varied_event_weight: Weights (M,) of the variation, or of each by name.

        Returns:
            A scalar, of which gradients reach nominal and varied outputs. It may be negative with
            a U-statistic.

        Raises:
            ValueError: If outputs, labels or weights do not fit or are missing, or no class has
                `min_events` events on both sides.
        """
        found = self.distances(
            nominal, varied, labels, varied_labels, event_weight, varied_event_weight
        )
        means = [torch.stack(list(of.values())).mean() for of in found.values()]
        return self.weight * torch.stack(means).mean()

    def distances(
        self,
        nominal: Tensor,
        varied: Tensor | Mapping[str, Tensor],
        labels: Any = None,
        varied_labels: Any = None,
        event_weight: Any = None,
        varied_event_weight: Any = None,
    ) -> dict[str, dict[int | str, Tensor]]:
        """The distances that a call averages, without λ: {variation: {class, or "all": scalar}}.

        Arguments and errors are those of a call; a variation without a name is "variation".
        """
        first = _side(nominal, "nominal outputs", labels, event_weight, self.per_class)
        if not isinstance(varied, Mapping):
            varied = {"variation": varied}
        if not varied:
            raise ValueError("Expected outputs of at least one variation; got none.")
        found: dict[str, dict[int | str, Tensor]] = {}
        for name, outputs in varied.items():
            second = _side(
                outputs,
                f"outputs of {name!r}",
                _of(varied_labels, name, "varied_labels"),
                _of(varied_event_weight, name, "varied_event_weight"),
                self.per_class,
            )
            found[name] = self._compare(first, second, name)
        return found

    def _compare(self, first: _Side, second: _Side, name: str) -> dict[int | str, Tensor]:
        if first.labels is None or second.labels is None:
            return {"all": self._distance(first, second)}
        found: dict[int | str, Tensor] = {}
        for label in first.labels.unique().tolist():
            pair = first.of_class(label), second.of_class(label)
            if min(side.size for side in pair) >= self.min_events:
                found[label] = self._distance(*pair)
        if not found:
            raise ValueError(
                f"Expected a class with at least {self.min_events} events of non-zero weight in "
                f"the nominal outputs and in {name!r}; got none. Use larger batches, and check "
                "that both number the classes alike."
            )
        return found

    def _distance(self, first: _Side, second: _Side) -> Tensor:
        if first.weight is None and second.weight is None:
            return self.metric(first.outputs, second.outputs)
        return self.metric(first.outputs, second.outputs, first.weight, second.weight)


def _innermost(function: Any) -> Any:
    while isinstance(function, partial):
        function = function.func
    return function


def _named(function: Any) -> str:
    """Name of a function, with the options of a partial one that are numbers."""
    name = getattr(_innermost(function), "__name__", repr(function))
    options = function.keywords if isinstance(function, partial) else {}
    numbers = [f"{k}={v}" for k, v in options.items() if isinstance(v, Real)]
    return f"{name}({', '.join(numbers)})" if numbers else name


@dataclass(frozen=True)
class _Side:
    outputs: Tensor
    labels: Tensor | None
    weight: Tensor | None

    @property
    def size(self) -> int:
        """Events of non-zero weight."""
        return len(self.outputs) if self.weight is None else int((self.weight != 0).sum())

    def of_class(self, label: int) -> _Side:
        assert self.labels is not None
        of = self.labels == label
        return _Side(self.outputs[of], None, None if self.weight is None else self.weight[of])


def _side(outputs: Any, name: str, labels: Any, weight: Any, per_class: bool) -> _Side:
    outputs = as_tensor(outputs, name)
    if outputs.ndim not in (1, 2) or not outputs.numel():
        raise ValueError(
            f"Expected {name} of shape (N,) or (N, D), not empty; got {tuple(outputs.shape)}. "
            "Flatten what one event has: outputs.flatten(1)."
        )
    check_finite(outputs, name)
    n = len(outputs)
    if weight is not None:
        weight = as_tensor(weight, f"weights of the {name}", like=outputs)
        check_shape(weight, (n,), f"weights of the {name}", "One weight an event.")
    return _Side(outputs, _classes(labels, name, outputs) if per_class else None, weight)


def _classes(labels: Any, name: str, outputs: Tensor) -> Tensor:
    if labels is None:
        raise ValueError(
            f"Expected labels of the {name}, to compare each class with itself; got None. Give "
            "labels and varied_labels, or set per_class=False where all samples have the same "
            "class mix."
        )
    labels = torch.as_tensor(labels, device=outputs.device)
    if labels.is_floating_point() or labels.is_complex():
        raise ValueError(
            f"Expected labels of the {name} as whole numbers; got {labels.dtype}. Bin a continuous "
            "label first: torch.bucketize(z, edges)."
        )
    check_shape(labels, (len(outputs),), f"labels of the {name}", "One class an event.")
    return labels


def _of(value: Any, name: str, what: str) -> Any:
    """What belongs to a variation, of one value for all or a mapping by name."""
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(f"Expected {what} of {name!r}; got those of {sorted(value)}.")
    return value[name]
