"""Data sets whose events have nuisances drawn from their prior, anew in each epoch.

They feed `flowpost.fit` and a plain loop over a `DataLoader` alike. All random numbers are a
function of the seed, the epoch and the events of the batch, so that epochs differ, runs repeat,
and worker processes change nothing. `fit` tells the epoch; a plain loop calls `set_epoch`.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from .._checks import check_positive_int
from .._events import Batch, TensorEvents, sizes, to_batch
from .conditioned import at
from .nuisances import Nuisances
from .priors import seeded

__all__ = [
    "EpochEvents",
    "Perturbed",
    "Simulated",
    "check_function",
    "check_labelled",
    "check_prior",
]

_Self = TypeVar("_Self", bound="EpochEvents")
_VALIDATION = -1


class EpochEvents(Dataset):
    """Events that are drawn anew in each epoch, a batch at a time.

    Arguments:
        size: Number of items of an epoch.
        seed: Of all random numbers.

    Attributes:
        epoch: The epoch whose events it gives.
    """

    def __init__(self, size: int, seed: int) -> None:
        self._size = check_positive_int(size, "size")
        if isinstance(seed, bool) or int(seed) != seed:
            raise ValueError(f"Expected seed as a whole number; got {seed!r}.")
        self.seed = int(seed)
        # in shared memory, so that worker processes that outlive an epoch are told too
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()
        self._held = False

    @property
    def epoch(self) -> int:
        """The epoch whose events it gives."""
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, counted from 0; `flowpost.fit` does. Nothing changes one that is fixed.

        Call it before the loader is iterated.
        """
        if not self._held:
            self._epoch.fill_(int(epoch))

    def fixed(self: _Self, epoch: int = _VALIDATION) -> _Self:
        """The same with the random numbers of one epoch for good, as for validation."""
        new = copy.copy(self)
        new._epoch, new._held = torch.tensor(int(epoch)), True
        return new

    @abstractmethod
    def batch(self, indices: Sequence[int]) -> Batch:
        """The events of some items of the epoch, as tensors (N, …)."""

    def __len__(self) -> int:
        return self._size

    def __repr__(self) -> str:
        prior: Any = getattr(self, "prior", None)
        names: Any = getattr(self, "names", None) or getattr(prior, "names", ())
        of = f" of {', '.join(names)}" if names else ""
        told = ", condition=True" if getattr(self, "condition", False) else ""
        fixed = " for good" if self._held else ""
        return (
            f"{type(self).__name__}({self._size} items{of}{told}, "
            f"seed={self.seed}, epoch {self.epoch}{fixed})"
        )

    def __getitem__(self, index: int) -> Any:
        if not -self._size <= index < self._size:
            raise IndexError(f"Expected an index below {self._size}; got {index}.")
        return self.__getitems__([index % self._size])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Samples of some items, from one call; this is what a `DataLoader` asks for."""
        return _samples(self.batch([int(i) for i in indices]))

    def _generator(self, indices: Sequence[int]) -> torch.Generator:
        """Random numbers of a batch of this epoch."""
        words = np.asarray([self.seed, self.epoch, *indices], dtype=np.int64)
        digest = hashlib.blake2b(words.tobytes(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Simulated(EpochEvents):
    """Events of a simulator, new ones in every epoch; each has its own ν from the prior.

    Arguments:
        simulate: A function of nuisances (n, k) and a `torch.Generator` that returns n events in a
            form of `flowpost.fit`: (x, z), (x, z, weight), or a dict of those names and
            `reference`; x may be a tuple or dict of tensors. It draws from the generator, or from
            torch's global one, which is seeded by it for the call. Without a prior it is called
            with n in place of the nuisances.
        prior: The joint prior of the nuisances, or None where there are none.
        size: Events of an epoch. Every epoch simulates new ones, so none is seen twice.
        seed: Of all random numbers.
        condition: Give ν to the encoder too, as `at(x, nu)` for a `ConditionedEncoder`.
        target: `"labels"`, or `"nuisances"` for events (x, ν), on which a head learns p(ν|x).

    Raises:
        ValueError: If an option is wrong, or when `simulate` returns something else.

    Example:
        >>> from torch.distributions import Normal
        >>> def simulate(nu, generator):
        ...     z = torch.randn(len(nu), 1, generator=generator)
        ...     return z + nu, z
        >>> events = Simulated(simulate, Nuisances(shift=Normal(0.0, 0.5)), size=1000)
        >>> x, z = events.batch([0, 1, 2])[:2]
        >>> x.shape, z.shape
        (torch.Size([3, 1]), torch.Size([3, 1]))
    """

    def __init__(
        self,
        simulate: Callable[[Tensor, torch.Generator], Any],
        prior: Nuisances | None,
        size: int,
        *,
        seed: int = 0,
        condition: bool = False,
        target: str = "labels",
    ) -> None:
        super().__init__(size, seed)
        first = "n" if prior is None else "nu"
        self.simulate = check_function(simulate, "simulate", (first, "generator"))
        self.prior = None if prior is None else check_prior(prior)
        self.condition, self.target = condition, _target(target, condition)
        if prior is None and (condition or target == "nuisances"):
            raise ValueError(
                "Expected a prior of nuisances where the network is told or asked for them; got "
                "None. Name them: Nuisances(light_yield=Normal(1.0, 0.1))."
            )

    def batch(self, indices: Sequence[int]) -> Batch:
        """Simulate the events of some items of the epoch."""
        generator = self._generator(indices)
        nu = None if self.prior is None else self.prior.sample(len(indices), generator)
        with torch.no_grad(), seeded(generator):
            events = to_batch(self.simulate(len(indices) if nu is None else nu, generator))
        check_labelled(events, "simulate")
        _check_size(events, len(indices), "simulate")
        return _seen(events, nu, self.condition, self.target)


class Perturbed(EpochEvents):
    """Events that exist, changed on the fly as nuisances from the prior would change them.

    Arguments:
        data: Nominal events: tensors in a form of `flowpost.fit`, or a `Dataset` of them.
        perturb: A function of inputs x (as the data have them, of n events), nuisances (n, k) and
            a `torch.Generator`, that returns x(ν). Labels stay.
        prior: The joint prior of the nuisances.
        seed: Of all random numbers.
        condition: Give ν to the encoder too, as `at(x, nu)` for a `ConditionedEncoder`.
        target: `"labels"`, or `"nuisances"` for events (x, ν), on which a head learns p(ν|x).
        collate: Makes a batch of the samples of a `Dataset`; torch's own where it is None.

    Raises:
        ValueError: If an option is wrong, or when `perturb` returns something else.
    """

    def __init__(
        self,
        data: Any,
        perturb: Callable[[Any, Tensor, torch.Generator], Any],
        prior: Nuisances,
        *,
        seed: int = 0,
        condition: bool = False,
        target: str = "labels",
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        if isinstance(data, (DataLoader, IterableDataset)):
            raise ValueError(
                f"Expected data as tensors or a Dataset with a length; got a {type(data).__name__}."
                " Give the Dataset inside."
            )
        self.data = data if isinstance(data, Dataset) else TensorEvents(to_batch(data))
        super().__init__(len(self.data), seed)  # type: ignore[arg-type]
        self.perturb = check_function(perturb, "perturb", ("x", "nu", "generator"))
        self.prior = check_prior(prior)
        self.condition, self.target = condition, _target(target, condition)
        self.collate = collate or default_collate

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch, also of the data where they follow one."""
        super().set_epoch(epoch)
        if not self._held and hasattr(self.data, "set_epoch"):
            self.data.set_epoch(epoch)

    def fixed(self, epoch: int = _VALIDATION) -> Perturbed:
        """The same with the random numbers of one epoch for good, as for validation."""
        new = super().fixed(epoch)
        if hasattr(new.data, "fixed"):
            new.data = new.data.fixed(epoch)
        return new

    def batch(self, indices: Sequence[int]) -> Batch:
        """Perturbed events of some items."""
        events = self._events(list(indices))
        generator = self._generator(indices)
        nu = self.prior.sample(len(indices), generator)
        with torch.no_grad(), seeded(generator):
            events = events._replace(x=self.perturb(events.x, nu, generator))
        _check_size(events, len(indices), "perturb")
        return _seen(events, nu, self.condition, self.target)

    def _events(self, indices: list[int]) -> Batch:
        if isinstance(self.data, TensorEvents):
            return self.data[indices]
        many = getattr(self.data, "__getitems__", None)
        samples = many(indices) if callable(many) else [self.data[i] for i in indices]
        return to_batch(self.collate(samples))


def check_prior(prior: Any) -> Nuisances:
    """Return a prior of nuisances.

    Raises:
        ValueError: If it is something else.
    """
    if not isinstance(prior, Nuisances):
        raise ValueError(
            f"Expected the prior as systematics.Nuisances; got {type(prior).__name__}. Name the "
            "nuisances: Nuisances(light_yield=Normal(1.0, 0.1))."
        )
    return prior


def check_function(function: Any, name: str, arguments: Sequence[str]) -> Any:
    """Return a function that takes so many arguments.

    Raises:
        ValueError: If it is none, or takes others.
    """
    wanted = f"{name}({', '.join(arguments)})"
    if not callable(function):
        raise ValueError(
            f"Expected {name} as a function; got {type(function).__name__}. It is called as "
            f"{wanted}."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        # of compiled functions, which have none
        return function
    try:
        signature.bind(*arguments)
    except TypeError as error:
        raise ValueError(
            f"Expected {name} as a function that is called as {wanted}; got one of the arguments "
            f"{signature} ({error})."
        ) from error
    return function


def check_labelled(events: Batch, name: str) -> None:
    """Refuse labels alone.

    Raises:
        ValueError: If there are no inputs.
    """
    if events.x is None:
        raise ValueError(
            f"Expected {name} to return inputs and labels, (x, z); got one of them alone."
        )


def _target(target: str, condition: bool) -> str:
    if target not in ("labels", "nuisances"):
        raise ValueError(f"Expected target as 'labels' or 'nuisances'; got {target!r}.")
    if target == "nuisances" and condition:
        raise ValueError(
            "Expected condition=False where nuisances are the target; got True: the encoder would "
            "be told what it has to find."
        )
    return target


def _seen(events: Batch, nu: Tensor | None, condition: bool, target: str) -> Batch:
    """Events as the network sees them: with ν beside x, or as the label."""
    if nu is None:
        return events
    if target == "nuisances":
        return Batch(events.x, nu, events.weight)
    return events._replace(x=at(events.x, nu)) if condition else events


def _check_size(events: Batch, expected: int, name: str) -> None:
    if isinstance(events.x, PackedSequence):
        raise ValueError(
            f"Expected {name} to return tensors; got a PackedSequence. Return padded events and "
            "their lengths: x = (hits, lengths)."
        )
    found = set(sizes(tuple(events)))
    if found != {expected}:
        raise ValueError(
            f"Expected {name} to return {expected} events, as many as asked for; got tensors of "
            f"{sorted(found)}."
        )


def _samples(events: Batch) -> list[Any]:
    """A batch as a list of samples, which torch's collation makes a batch again."""
    given = {k: v for k, v in events._asdict().items() if v is not None}
    columns = {k: _split(v) for k, v in given.items()}
    rows = list(zip(*columns.values(), strict=True))
    if list(columns) in (["x", "z"], ["x", "z", "weight"]):
        return rows
    return [dict(zip(columns, row, strict=True)) for row in rows]


def _split(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        rows = zip(*(_split(v) for v in value.values()), strict=True)
        return [dict(zip(value, row, strict=True)) for row in rows]
    if isinstance(value, (tuple, list)):
        return list(zip(*(_split(v) for v in value), strict=True))
    return list(torch.as_tensor(value).unbind(0))
