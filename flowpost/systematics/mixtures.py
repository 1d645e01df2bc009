r"""Data sets over discrete alternatives k with prior probabilities p_k: sets of events, or weights.

The target is the mixture :math:`\sum_k p_k P_k(x, z)`. Its joint KL is a sum over all events of all
alternatives with weights

.. math:: w_{ki} \to p_k \, w_{ki} \Big/ \sum_j w_{kj},

which is exact and has no noise of its own; drawing one alternative for each event and epoch has
the same mean, and costs no more than training on one of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader, Dataset

from .._checks import as_tensor, check_finite, check_shape
from .._events import Batch, TensorEvents, chosen, joined, to_batch
from .conditioned import at
from .datasets import EpochEvents

__all__ = ["Mixed", "Weighted"]


@dataclass(frozen=True)
class _Rows:
    """Events of a batch: which alternative (M,), which row of it (M,), which weight (M,)."""

    kind: Tensor
    row: Tensor
    weight: Tensor | None


class Mixed(EpochEvents):
    """Alternative simulation sets, mixed with prior probabilities.

    An item owns the rows of the same number in every set (of a larger set, also those a whole
    number of smallest sets further on), so that a validation part shares no event with the training
    part, nor one that was simulated from the same truth.

    Arguments:
        sets: Tensors (x, z) or (x, z, weight), or a dict of those names and `reference`, by the
            name of the alternative. Sets may differ in size, and in the longest of padded events
            if `x` holds their lengths or mask.
        probabilities: Prior probability of each alternative; equal where it is None.
        draw: Draw one event of each item in each epoch, instead of giving all of them with weights.
            An epoch is then as long as the smallest set; otherwise a batch of n items holds the
            events of all sets, about n times their number.
        normalise: Each alternative counts by its probability alone, whatever its size and the sum
            of its weights. Otherwise one that yields more events counts more, as where all sets
            are of the same exposure and nuisances change the efficiency.
        condition: Give the alternative to the encoder too, as `at(x, nu)` with ν one-hot (N, K).
        seed: Of all random numbers.

    Raises:
        ValueError: If the sets do not fit together or the probabilities do not add up to 1.

    Example:
        >>> z = torch.randn(100, 1)
        >>> events = Mixed({"nominal": (z, z), "up": (z + 1, z)}, {"nominal": 0.7, "up": 0.3})
        >>> x, z, weight = events.batch([0, 1])[:3]
        >>> x.shape, weight
        (torch.Size([4, 1]), tensor([1.4000, 1.4000, 0.6000, 0.6000]))
    """

    def __init__(
        self,
        sets: Mapping[str, Any],
        probabilities: Mapping[str, float] | None = None,
        *,
        draw: bool = False,
        normalise: bool = True,
        condition: bool = False,
        seed: int = 0,
    ) -> None:
        self.names = _names(sets, "sets")
        self.sets = [_tensors(value, f"set {name!r}") for name, value in sets.items()]
        _check_alike(self.names, [s.batch for s in self.sets])
        counts = [len(s) for s in self.sets]
        super().__init__(min(counts), seed)
        self.draw, self.condition = draw, condition
        self.probability = _probabilities(self.names, probabilities)
        weights = [
            torch.ones(len(s)) if s.batch.weight is None else s.batch.weight for s in self.sets
        ]
        mean = _means(self.names, weights)
        self._plain = all(s.batch.weight is None for s in self.sets)
        if not normalise:
            total = self.probability * mean * torch.tensor(counts, dtype=torch.float64)
            self.probability = total / total.sum()
        # weights of mean 1 over the events that are given
        every = torch.tensor([1.0 if draw else sum(counts) / n for n in counts])
        share = torch.ones(len(counts)) if draw else self.probability
        self._weights = [
            w / m * p * e for w, m, p, e in zip(weights, mean, share, every, strict=True)
        ]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Events of some items: one of each if drawn, else all of all sets with their weights."""
        items = torch.as_tensor(list(indices))
        kinds, rows = self._drawn(items) if self.draw else self._all(items)
        parts, places = [], []
        for k, events in enumerate(self.sets):
            here = (kinds == k).nonzero()[:, 0]
            if len(here):
                part = events[rows[here]]
                parts.append(part._replace(weight=self._weights[k][rows[here]]))
                places.append(here)
        merged = _merge(parts, torch.cat(places))
        if self.draw and self._plain:
            merged = merged._replace(weight=None)
        if self.condition:
            known = one_hot(kinds, len(self.sets)).to(merged.z.dtype)
            merged = merged._replace(x=at(merged.x, known))
        return merged

    def _all(self, items: Tensor) -> tuple[Tensor, Tensor]:
        kinds, rows = [], []
        for k, events in enumerate(self.sets):
            for start in range(0, len(events), len(self)):
                own = items[items + start < len(events)] + start
                rows.append(own)
                kinds.append(torch.full_like(own, k))
        return torch.cat(kinds), torch.cat(rows)

    def _drawn(self, items: Tensor) -> tuple[Tensor, Tensor]:
        generator = self._generator(items.tolist())
        kinds = torch.multinomial(self.probability, len(items), True, generator=generator)
        size = torch.tensor([len(s) for s in self.sets])[kinds]
        owned = (size - items - 1) // len(self) + 1
        turn = (torch.rand(len(items), generator=generator) * owned).long().clamp_max(owned - 1)
        return kinds, items + turn * len(self)


class Weighted(EpochEvents):
    """Events with one weight for each alternative, mixed with prior probabilities.

    The events are the same under every alternative, so the exact mixture is one weighted set: the
    mean of the weights. That is the default; there is no reason to draw but to see the alternatives
    one by one.

    Arguments:
        data: Events (x, z), or a dict of those names and `reference`, without weights.
        weights: Event weights (N,) by the name of the alternative; they may be negative (then
            `fit(signed_weights=True)`).
        probabilities: Prior probability of each alternative; equal where it is None.
        draw: Draw an alternative for each event and epoch.
        normalise: Each alternative counts by its probability alone; otherwise one with a larger sum
            of weights counts more.
        condition: Give the alternative to the encoder too, as `at(x, nu)` with ν one-hot (N, K);
            unless drawn, a batch of n items then holds K·n events.
        seed: Of all random numbers.

    Raises:
        ValueError: If the weights do not fit or the probabilities do not add up to 1.

    Example:
        >>> z = torch.zeros(2, 1)
        >>> weights = {"nominal": torch.ones(2), "up": torch.tensor([0.5, 1.5])}
        >>> Weighted((z, z), weights).batch([0, 1]).weight
        tensor([0.7500, 1.2500])
    """

    def __init__(
        self,
        data: Any,
        weights: Mapping[str, Any],
        probabilities: Mapping[str, float] | None = None,
        *,
        draw: bool = False,
        normalise: bool = True,
        condition: bool = False,
        seed: int = 0,
    ) -> None:
        self.names = _names(weights, "weights")
        self.data = _tensors(data, "data")
        if self.data.batch.weight is not None:
            raise ValueError(
                "Expected events without weights of their own beside those of the alternatives; "
                "got some. Multiply them into each alternative."
            )
        super().__init__(len(self.data), seed)
        self.draw, self.condition = draw, condition
        self.probability = _probabilities(self.names, probabilities)
        columns = []
        for name, value in weights.items():
            weight = as_tensor(value, f"weights of {name!r}", like=self.data.batch.z)
            check_shape(weight, (len(self.data),), f"weights of {name!r}", "One for each event.")
            check_finite(weight, f"weights of {name!r}")
            columns.append(weight)
        mean = _means(self.names, columns)
        if not normalise:
            mean = torch.ones_like(mean) * (self.probability * mean).sum()
        table = torch.stack(columns, 1)
        self._weights = table / mean.to(table)

    def batch(self, indices: Sequence[int]) -> Batch:
        """Events of some items with the mean of their weights, or those of one alternative."""
        items = torch.as_tensor(list(indices))
        count = len(self.names)
        if self.draw:
            generator = self._generator(indices)
            kinds = torch.multinomial(self.probability, len(items), True, generator=generator)
            weight = self._weights[items, kinds]
        elif self.condition:
            kinds, items = torch.arange(count).repeat(len(items)), items.repeat_interleave(count)
            probability = self.probability.to(self._weights)
            weight = self._weights[items, kinds] * probability[kinds] * count
        else:
            weight = self._weights[items] @ self.probability.to(self._weights)
        events = self.data[items]._replace(weight=weight)
        if self.condition:
            known = one_hot(kinds, count).to(events.z.dtype)
            events = events._replace(x=at(events.x, known))
        return events


def _names(given: Any, what: str) -> tuple[str, ...]:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(
            f'Expected {what} by name, such as {{"nominal": …, "up": …}}; got '
            f"{type(given).__name__ if given or not isinstance(given, Mapping) else 'none'}."
        )
    return tuple(given)


def _tensors(data: Any, what: str) -> TensorEvents:
    if isinstance(data, (Dataset, DataLoader)):
        raise ValueError(
            f"Expected {what} as tensors or arrays (memory-mapped ones do); got a "
            f"{type(data).__name__}."
        )
    events = TensorEvents(to_batch(data))
    if not len(events):
        raise ValueError(f"Expected at least one event in {what}; got none.")
    return events


def _check_alike(names: Sequence[str], sets: Sequence[Batch]) -> None:
    for name, events in zip(names, sets, strict=True):
        given = [k for k, v in events._asdict().items() if v is not None and k != "weight"]
        first = [k for k, v in sets[0]._asdict().items() if v is not None and k != "weight"]
        if given != first:
            raise ValueError(
                f"Expected {', '.join(first)} in every set, as in {names[0]!r}; got "
                f"{', '.join(given)} in {name!r}."
            )
    rows = torch.arange(1)
    ends = [Batch(*(chosen(v, rows) for v in b))._replace(weight=None) for b in sets]
    for name, end in zip(names, ends, strict=True):
        try:
            _merge([ends[0], end], torch.arange(2))
        except (RuntimeError, TypeError, ValueError) as error:
            raise ValueError(
                f"Expected events of one form in every set; those of {name!r} do not fit "
                f"those of {names[0]!r} ({error})."
            ) from error


def _merge(parts: Sequence[Batch], places: Tensor) -> Batch:
    """Events of several batches as one, in the order of their places."""
    counts = [len(p.z) for p in parts]
    order = torch.empty_like(places)
    order[places] = torch.arange(len(places))
    return Batch(*(chosen(joined([p[i] for p in parts], counts), order) for i in range(5)))


def _probabilities(names: Sequence[str], given: Mapping[str, float] | None) -> Tensor:
    if given is None:
        return torch.full((len(names),), 1 / len(names), dtype=torch.float64)
    if not isinstance(given, Mapping) or set(given) != set(names):
        got = ", ".join(given) if isinstance(given, Mapping) else type(given).__name__
        raise ValueError(f"Expected a probability for each of {', '.join(names)}; got {got}.")
    p = as_tensor([float(given[n]) for n in names], "probabilities").double()
    check_finite(p, "probabilities")
    if bool((p < 0).any()) or abs(float(p.sum()) - 1) > 1e-6:
        raise ValueError(
            f"Expected probabilities that are not negative and add up to 1; got {p.tolist()}, "
            f"sum {float(p.sum()):g}."
        )
    return p / p.sum()


def _means(names: Sequence[str], weights: Sequence[Tensor]) -> Tensor:
    mean = torch.stack([w.double().mean() for w in weights])
    if not bool((mean > 0).all()):
        name = names[int((mean <= 0).nonzero()[0, 0])]
        raise ValueError(
            f"Expected weights with a positive sum in every alternative; got "
            f"{float(mean.min()):g} on average for {name!r}."
        )
    return mean
