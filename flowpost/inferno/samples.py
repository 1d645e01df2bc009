"""Simulated events of the processes, with what the nuisances need, whole and in batches."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._events import chosen, leaves, mapped, sizes
from .model import Alternative, CountingModel, Reweighting, Transform

__all__ = [
    "Batches",
    "Block",
    "Key",
    "Sample",
    "blocks",
    "check_nuisances",
    "check_samples",
    "first_floating",
    "split",
]

# events by which a transform is looked at
_LOOK = 64


@dataclass(frozen=True, eq=False)
class Sample:
    """Simulated events of a process.

    Attributes:
        x: Inputs (N, …), a tensor or a tuple or dict of them, as the encoder takes them.
        weight: Event weights (N,), which may be negative; None where all are one.
        factors: For each `Reweighting`, the factors (down, up) on the weights, each (N,).
        varied: For each `Alternative`, the samples (down, up): each a `Sample` or inputs alone.
        total: The sum of weights of the whole sample of which this is a part; by default its own.

    Raises:
        ValueError: If the numbers of events differ, there are none, or a weight is not finite.
    """

    x: Any
    weight: Any = None
    factors: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    varied: Mapping[str, tuple[Any, Any]] = field(default_factory=dict)
    total: float | None = None

    def __post_init__(self) -> None:
        x = mapped(self.x, torch.as_tensor)
        found = set(sizes(x))
        if len(found) != 1 or not min(found):
            raise ValueError(
                f"Expected inputs of at least one event, all of one number; got {sorted(found)}."
            )
        size = found.pop()
        object.__setattr__(self, "x", x)
        if self.weight is not None:
            object.__setattr__(self, "weight", _column(self.weight, size, "weight"))
        factors = {
            name: tuple(_column(f, size, f"factors of {name!r}") for f in _pair(pair, name))
            for name, pair in self.factors.items()
        }
        object.__setattr__(self, "factors", factors)
        varied = {
            name: tuple(s if isinstance(s, Sample) else Sample(s) for s in _pair(pair, name))
            for name, pair in self.varied.items()
        }
        object.__setattr__(self, "varied", varied)
        object.__setattr__(self, "_stated", self.total is not None or self.weight is not None)
        if self.total is None:
            total = size if self.weight is None else float(self.weight.double().sum())
            object.__setattr__(self, "total", float(total))

    def __len__(self) -> int:
        return next(iter(sizes(self.x)))

    def at(self, rows: Tensor, varied: Mapping[str, tuple[Tensor, Tensor]] | None = None) -> Sample:
        """Events at indices, and those of the varied samples at theirs (by default none)."""
        return Sample(
            chosen(self.x, rows),
            chosen(self.weight, rows),
            {k: tuple(f[rows] for f in pair) for k, pair in self.factors.items()},
            {
                k: tuple(s.at(r) for s, r in zip(self.varied[k], pair, strict=True))
                for k, pair in (varied or {}).items()
            },
            self.total,
        )

    def to(self, device: Any = None, dtype: torch.dtype | None = None) -> Sample:
        """The same on another device, and with floating tensors of another type."""

        def move(value: Any) -> Any:
            def one(t: Tensor) -> Tensor:
                return t.to(device, dtype if t.is_floating_point() else None)

            return mapped(value, one)

        return replace(
            self,
            x=move(self.x),
            weight=move(self.weight),
            factors=move(self.factors),
            varied={k: tuple(s.to(device, dtype) for s in pair) for k, pair in self.varied.items()},
        )


def _pair(value: Any, name: str) -> tuple[Any, Any]:
    if isinstance(value, (tuple, list)) and len(value) == 2:
        return value[0], value[1]
    raise ValueError(f"Expected {name!r} as a pair (down, up); got {type(value).__name__}.")


def _column(value: Any, size: int, name: str) -> Tensor:
    column = as_tensor(value, name)
    check_shape(column, (size,), name, "One number an event.")
    check_finite(column, name)
    return column


def check_samples(model: CountingModel, samples: Any) -> dict[str, Sample]:
    """Samples of all processes, with everything that the nuisances need.

    Raises:
        ValueError: If a process, a factor or a varied sample is missing or unknown, or the weights
            of a sample do not sum to a positive number.
    """
    if not isinstance(samples, Mapping):
        raise ValueError(
            f"Expected samples as a dict by process; got {type(samples).__name__}. Try "
            "{'signal': x_signal, 'background': Sample(x_background, weight)}."
        )
    known = [p.name for p in model.processes]
    if set(samples) != set(known):
        raise ValueError(
            f"Expected samples of {', '.join(known)}; got {', '.join(map(str, samples))}."
        )
    found = {}
    for name in known:
        sample = samples[name] if isinstance(samples[name], Sample) else Sample(samples[name])
        for kind, have, what in (
            (Reweighting, sample.factors, "factors"),
            (Alternative, sample.varied, "varied"),
        ):
            for nuisance in model.of_kind(kind, name):
                if nuisance.name not in have:
                    raise ValueError(
                        f"Expected {what} of {nuisance.name!r} in the sample of {name!r}; got none."
                        f" Give Sample(…, {what}={{{nuisance.name!r}: (down, up)}})."
                    )
        for nuisance in model.of_kind(Alternative, name):
            _check_yields(nuisance, sample, name)
        if not (sample.total or 0.0) > 0:
            raise ValueError(
                f"Expected weights of {name!r} with a positive sum; got {sample.total:g}."
            )
        found[name] = sample
    return found


def _check_yields(nuisance: Alternative, sample: Sample, process: str) -> None:
    """Raise where numbers of events would be read as yields."""
    parts = (sample, *sample.varied[nuisance.name])
    stated = [getattr(s, "_stated", True) for s in parts]
    if not (nuisance.shape_only or any(stated) or len({len(s) for s in parts}) == 1):
        raise ValueError(
            f"Expected samples of {nuisance.name!r} of {process!r} with weights, or all of one "
            f"size; got {', '.join(str(len(s)) for s in parts)} events (nominal, down, up), which "
            "would stand for yields. Give weights or total=…, or set shape_only=True."
        )


def first_floating(x: Any) -> Tensor:
    """A floating tensor of inputs, whose dtype and device the values of nuisances take."""
    return next((t for t in leaves(x) if t.is_floating_point()), torch.zeros(()))


def check_nuisances(model: CountingModel, samples: Mapping[str, Sample]) -> None:
    """Look at what transforms do to some events.

    Raises:
        ValueError: If one works in place, changes events at its nominal value or their shape, or
            has no derivative in its value though it moves events.
    """
    for process, sample in samples.items():
        for move in model.of_kind(Transform, process):
            x = chosen(sample.x, torch.arange(min(len(sample), _LOOK)))
            _check_transform(move, x, process)


def _check_transform(move: Transform, x: Any, process: str) -> None:
    before = [t.clone() for t in leaves(x)]
    at = first_floating(x).new_tensor(float(move.nominal or 0.0))
    moved = list(leaves(move.apply(x, at + float(move.shift or 0.0))))
    if not all(torch.equal(a, b) for a, b in zip(before, leaves(x), strict=True) if _known(a)):
        raise ValueError(
            f"Expected apply of {move.name!r} to return new inputs; it changes those that it is "
            "given. Work on x.clone()."
        )
    after = list(leaves(move.apply(x, at)))
    same = len(before) == len(after) and all(
        a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)
        for a, b in zip(before, after, strict=True)
    )
    if not same:
        raise ValueError(
            f"Expected apply of {move.name!r} to leave events as they are at its nominal "
            f"value {move.nominal:g}; {process!r} changes. Set nominal=…, or mend apply."
        )
    if all(torch.equal(a, b) for a, b in zip(after, moved, strict=True)):
        return
    value = at.clone().requires_grad_()
    with torch.enable_grad(), warnings.catch_warnings():
        # of numbers made of a tensor with a gradient: an error says more
        warnings.simplefilter("ignore")
        parts = [t for t in leaves(move.apply(x, value)) if t.requires_grad]
    if not parts:
        raise ValueError(
            f"Expected apply of {move.name!r} to be differentiable in its value; its result does "
            "not depend on it by torch. Use the tensor that it is given, without float() or numpy."
        )


def _known(t: Tensor) -> bool:
    return not t.is_floating_point() or not bool(t.isnan().any())


class Batches:
    """Batches of samples: of every process, and of every varied sample, as many events.

    The longest sample is gone through once an epoch, the others as often as it takes; varied
    samples of the size of their nominal one go along with it row by row, so that events that were
    simulated in pairs stay together. The same seed and epoch give the same batches.

    Arguments:
        model: The counting model.
        samples: A dict of `Sample` or inputs by process.
        size: Events of each process in a batch.
        seed: Of the order.

    Raises:
        ValueError: If a sample is missing or does not hold what a nuisance needs, or a transform
            changes events at its nominal value.
    """

    def __init__(self, model: CountingModel, samples: Any, size: int = 1000, seed: int = 0) -> None:
        self.model = model
        self.samples = check_samples(model, samples)
        check_nuisances(model, self.samples)
        # of a larger one, events would be there several times
        self.size = min(check_positive_int(size, "size"), max(map(len, self.samples.values())))
        self.seed, self.epoch = seed, 0
        self._names = {p: [n.name for n in model.of_kind(Alternative, p)] for p in self.samples}
        longest = max(
            len(s)
            for p, sample in self.samples.items()
            for s in (sample, *(v for n in self._names[p] for v in sample.varied[n]))
        )
        self._steps = max(1, longest // self.size)

    def __len__(self) -> int:
        return self._steps

    def set_epoch(self, epoch: int) -> None:
        """Choose the order of an epoch, counted from 0."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[dict[str, Sample]]:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.epoch)
        orders = {}
        for process, sample in self.samples.items():
            own = self._order(len(sample), generator)
            rows: dict[str, tuple[Tensor, ...]] = {}
            for name in self._names[process]:
                rows[name] = tuple(
                    own if len(s) == len(sample) else self._order(len(s), generator)
                    for s in sample.varied[name]
                )
            orders[process] = own, rows
        self.epoch += 1
        for step in range(self._steps):
            part = slice(step * self.size, (step + 1) * self.size)
            yield {
                p: self.samples[p].at(
                    own[part], {k: (down[part], up[part]) for k, (down, up) in rows.items()}
                )
                for p, (own, rows) in orders.items()
            }

    def _order(self, events: int, generator: torch.Generator) -> Tensor:
        """Rows of an epoch: permutations one after the other."""
        wanted = self._steps * self.size
        found = [torch.randperm(events, generator=generator) for _ in range(-(-wanted // events))]
        return torch.cat(found)[:wanted]


def split(
    model: CountingModel, samples: Any, fraction: float, seed: int = 0
) -> tuple[dict[str, Sample], dict[str, Sample]]:
    """Divide the events of every sample at random; pairs of nominal and varied events stay.

    Arguments:
        model: The counting experiment.
        samples: `Sample` or inputs of every process, by its name.
        fraction: Share of the second part.
        seed: Of the division.

    Raises:
        ValueError: If a part would be empty, or as `Batches`.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"Expected a fraction between 0 and 1; got {fraction!r}.")
    generator = torch.Generator().manual_seed(seed)
    first: dict[str, Sample] = {}
    second: dict[str, Sample] = {}
    for process, sample in check_samples(model, samples).items():
        own = _division(len(sample), fraction, generator, process)
        pairs = {}
        for nuisance in model.of_kind(Alternative, process):
            pairs[nuisance.name] = [
                own
                if len(s) == len(sample)
                else _division(len(s), fraction, generator, f"{process} ({nuisance.name})")
                for s in sample.varied[nuisance.name]
            ]
        for i, part in enumerate((first, second)):
            part[process] = sample.at(own[i], {k: (d[i], u[i]) for k, (d, u) in pairs.items()})
    return first, second


def _division(
    events: int, fraction: float, generator: torch.Generator, name: str
) -> tuple[Tensor, Tensor]:
    held = round(events * fraction)
    if not 0 < held < events:
        raise ValueError(
            f"Expected events of {name!r} enough for two parts; got {events} at a fraction of "
            f"{fraction:g}. Give more events or a validation sample."
        )
    order = torch.randperm(events, generator=generator)
    return order[held:], order[:held]


class Key(NamedTuple):
    """What a set of weighted events stands for: a process, nominal or at one side of a nuisance."""

    process: str
    nuisance: str = ""
    side: str = ""


@dataclass(frozen=True, eq=False)
class Block:
    """Events that go through the network together.

    Attributes:
        key: What they stand for.
        x: Inputs (N, …).
        weights: Event weights (N,) by what they stand for: the block itself, and its reweightings.
        moves: The transforms that move them.
        total: The sum of weights of the whole sample.
    """

    key: Key
    x: Any
    weights: dict[Key, Tensor]
    moves: tuple[Transform, ...]
    total: float

    def __len__(self) -> int:
        return len(self.weights[self.key])

    def split(self, size: int) -> Iterator[Block]:
        """The same in portions of at most `size` events."""
        for rows in torch.arange(len(self)).split(size):
            weights = {k: w[rows] for k, w in self.weights.items()}
            yield replace(self, x=chosen(self.x, rows), weights=weights)

    def to(self, device: torch.device) -> Block:
        """The same on another device."""
        x = mapped(self.x, lambda t: t.to(device))
        return replace(self, x=x, weights={k: w.to(device) for k, w in self.weights.items()})


def blocks(model: CountingModel, samples: Any) -> list[Block]:
    """The events of all processes, nominal ones first."""
    nominal, varied = [], []
    for process, sample in check_samples(model, samples).items():
        key = Key(process)
        weight = _weights(sample)
        weights = {key: weight}
        for nuisance in model.of_kind(Reweighting, process):
            for side, factor in zip(("down", "up"), sample.factors[nuisance.name], strict=True):
                weights[Key(process, nuisance.name, side)] = weight * factor.to(weight)
        moves = tuple(model.of_kind(Transform, process))
        nominal.append(Block(key, sample.x, weights, moves, float(sample.total or 0.0)))
        for nuisance in model.of_kind(Alternative, process):
            for side, part in zip(("down", "up"), sample.varied[nuisance.name], strict=True):
                key = Key(process, nuisance.name, side)
                varied.append(
                    Block(key, part.x, {key: _weights(part)}, (), float(part.total or 0.0))
                )
    return nominal + varied


def _weights(sample: Sample) -> Tensor:
    if sample.weight is not None:
        return sample.weight
    return torch.ones(len(sample), device=next(leaves(sample.x)).device)
