"""What `fit` takes: tensors, a Dataset or a DataLoader, as batches of inputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, random_split

from .._checks import as_tensor

__all__ = ["Batch", "loader", "sample_of", "split", "to_batch"]

_SCALE_EVENTS = 50_000
_FORMS = (
    "Give labels alone (context=0), a tuple (x, z), (x, z, weight) or (x, z, weight, mask), or a "
    "dict with keys x, z, weight, mask; x may itself be a tuple or dict of tensors."
)


class Batch(NamedTuple):
    """Inputs, labels, and optional weights and masks of N events."""

    x: Any
    z: Any
    weight: Any = None
    mask: Any = None


def to_batch(data: Any) -> Batch:
    """Read a batch, or whole tensors, in one of the forms that users have.

    Raises:
        ValueError: If the form is unknown.
    """
    if isinstance(data, Batch):
        return data
    if isinstance(data, Mapping):
        unknown = set(data) - set(Batch._fields)
        if "z" not in data or unknown:
            raise ValueError(f"Expected keys x, z, weight, mask; got {', '.join(data)}. {_FORMS}")
        return Batch(data.get("x"), data["z"], data.get("weight"), data.get("mask"))
    if isinstance(data, (tuple, list)):
        if not 1 <= len(data) <= 4:
            raise ValueError(f"Expected one to four parts; got {len(data)}. {_FORMS}")
        return Batch(None, data[0]) if len(data) == 1 else Batch(*data)
    return Batch(None, data)


def _map(value: Any, change: Callable[[Any], Any]) -> Any:
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {k: _map(v, change) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(_map(v, change) for v in value)
    return change(value)


def _sizes(value: Any) -> Iterator[int]:
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from _sizes(v)
    elif value is not None:
        yield len(value)


class TensorEvents(Dataset):
    """Events held in tensors, taken many at once by a list of indices."""

    def __init__(self, batch: Batch) -> None:
        x = _map(batch.x, torch.as_tensor)
        z = as_tensor(batch.z, "labels")
        rest = [_map(v, torch.as_tensor) for v in batch[2:]]
        self.batch = Batch(x, z, *rest)
        sizes = set(_sizes(tuple(self.batch)))
        if len(sizes) != 1:
            raise ValueError(
                f"Expected as many inputs as labels; got {sorted(sizes)} events. {_FORMS}"
            )
        self.size = sizes.pop()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Batch:
        at = torch.as_tensor(index)
        return Batch(*(_map(v, lambda t: t[at]) for v in self.batch))


class EpochBatches(Sampler[list[int]]):
    """Batches of indices in an order that depends on seed and epoch only."""

    def __init__(self, size: int, batch_size: int, seed: int, shuffle: bool) -> None:
        self.size, self.batch_size, self.seed, self.shuffle = size, batch_size, seed, shuffle
        self.epoch = 0
        # where Lightning looks for set_epoch when this is a batch sampler
        self.sampler = self

    def set_epoch(self, epoch: int) -> None:
        """Called by Lightning at the start of an epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return -(-self.size // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        if self.shuffle:
            generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
            order = torch.randperm(self.size, generator=generator)
        else:
            order = torch.arange(self.size)
        yield from (part.tolist() for part in order.split(self.batch_size))


def loader(data: Any, batch_size: int, seed: int, shuffle: bool, workers: int = 0) -> DataLoader:
    """A DataLoader of batches.

    Raises:
        ValueError: If there are no events or the form is unknown.
    """
    if isinstance(data, DataLoader):
        return data
    events = data if isinstance(data, Dataset) else TensorEvents(to_batch(data))
    if isinstance(events, IterableDataset):
        return DataLoader(events, batch_size=batch_size, num_workers=workers)
    size = len(events)  # type: ignore[arg-type]
    if not size:
        raise ValueError("Expected at least one event; got an empty data set.")
    order = EpochBatches(size, batch_size, seed, shuffle)
    if isinstance(events, TensorEvents):
        return DataLoader(events, sampler=order, batch_size=None)
    return DataLoader(events, batch_sampler=order, num_workers=workers)


def split(data: Any, val: Any, seed: int) -> tuple[Any, Any]:
    """Training and validation part; `val` is a fraction of the events, or data of its own.

    Raises:
        ValueError: If the fraction leaves either part empty, or the data cannot be divided.
    """
    if not isinstance(val, (int, float)) or isinstance(val, bool):
        return data, val
    if not 0 < val < 1:
        raise ValueError(f"Expected val as a fraction between 0 and 1; got {val!r}.")
    if isinstance(data, (DataLoader, IterableDataset)):
        raise ValueError(
            f"Expected val as a DataLoader or tensors beside a {type(data).__name__}, which cannot "
            f"be divided; got the fraction {val!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    events = data if isinstance(data, Dataset) else TensorEvents(to_batch(data))
    size = len(events)  # type: ignore[arg-type]
    held = round(val * size)
    if not 0 < held < size:
        raise ValueError(
            f"Expected events for training and validation; got {size} in all with val={val!r}."
        )
    if isinstance(events, TensorEvents):
        order = torch.randperm(size, generator=generator)
        return events[order[held:]], events[order[:held]]
    part = random_split(events, [size - held, held], generator)
    return part[0], part[1]


def sample_of(data: Any, batches: DataLoader) -> Batch:
    """Events from which scales are found: all of the tensors, or the first 50 000 of a loader."""
    if isinstance(data, Batch) or not isinstance(data, (Dataset, DataLoader)):
        return TensorEvents(to_batch(data)).batch
    found: list[Batch] = []
    count = 0
    for item in batches:
        batch = to_batch(item)
        found.append(batch)
        count += len(batch.z)
        if count >= _SCALE_EVENTS:
            break
    if not found:
        raise ValueError("Expected at least one batch of events; got an empty loader.")
    labels = torch.cat([as_tensor(b.z, "labels") for b in found])
    weights = None
    if found[0].weight is not None:
        weights = torch.cat([as_tensor(b.weight, "weight") for b in found])
    mask = None
    if found[0].mask is not None:
        mask = torch.cat([torch.as_tensor(b.mask) for b in found])
    inputs = found[0].x
    if isinstance(inputs, Tensor) and all(b.x.shape[1:] == inputs.shape[1:] for b in found):
        inputs = torch.cat([b.x for b in found])
    return Batch(inputs, labels, weights, mask)
