"""What `fit` takes: tensors, a Dataset or a DataLoader, as batches of inputs and labels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import torch
from torch.utils.data import (
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    Sampler,
    Subset,
    random_split,
)

from .._checks import as_tensor, check_finite
from .._events import Batch, TensorEvents, called, chosen, joined, to_batch
from ..encoders import Encoder
from ..masks import known_coordinates, read_mask
from ..model import PosteriorModel

__all__ = [
    "Batch",
    "check_events",
    "chosen",
    "fixed",
    "followers",
    "loader",
    "sample_of",
    "split",
    "to_batch",
]

_SCALE_EVENTS = 50_000


class EpochBatches(Sampler[list[int]]):
    """Batches of indices in an order that depends on seed and epoch only.

    Their sizes differ by one at most, so that no epoch ends in a tiny batch.
    """

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
        yield from (part.tolist() for part in order.tensor_split(len(self)))


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


def followers(data: Any) -> list[Any]:
    """The data sets in loaders and subsets that draw anew in each epoch: they have `set_epoch`."""
    if isinstance(data, Dataset) and callable(getattr(data, "set_epoch", None)):
        return [data]
    parts = getattr(data, "datasets", None) or [getattr(data, "dataset", None)]
    return [found for part in parts if part is not None for found in followers(part)]


def check_events(model: PosteriorModel, train: Any) -> None:
    """Refuse events before they are divided and shuffled, for the error names their row."""
    if isinstance(train, (Dataset, DataLoader)):
        return
    head, batch = model.head, to_batch(train)
    z, known = head._columns(as_tensor(batch.z, "labels")), None
    if batch.mask is None:
        head.space.validate(z)
    else:
        known = read_mask(head.space, batch.mask, z)
        known_coordinates(head.space, known)
    if batch.reference is not None:
        head._reference(batch.reference, 2, known)
    _check_inputs(model.encoder, batch.x)


def _check_inputs(encoder: Any, x: Any) -> None:
    """Refuse inputs that are not finite; networks of others may take them."""
    if encoder is None and x is not None:
        check_finite(as_tensor(x, "x"), "x", "Correct or remove such events.")
    elif isinstance(encoder, Encoder):
        called(encoder.check, x)


def fixed(data: Any) -> Any:
    """Data for validation: sets that draw anew in each epoch keep the numbers of one.

    Those in a `DataLoader` are as the user has them.
    """
    if isinstance(data, Subset):
        return Subset(fixed(data.dataset), data.indices)
    if isinstance(data, ConcatDataset):
        return ConcatDataset([fixed(part) for part in data.datasets])
    held = getattr(data, "fixed", None)
    return held() if isinstance(data, Dataset) and callable(held) else data


def sample_of(data: Any, batches: DataLoader) -> Batch:
    """Events from which scales are found: all of the tensors, or the first 50 000 of a loader.

    Inputs that cannot be joined over batches are those of the first batch.

    Raises:
        ValueError: If the loader is empty.
    """
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
    inputs, sizes = found[0].x, [len(b.z) for b in found]
    if len(found) > 1:
        # a form that only the encoder knows stays its first batch
        with suppress(RuntimeError, TypeError, ValueError):
            inputs = joined([b.x for b in found], sizes)
    mask, reference = (joined([b[k] for b in found], sizes) for k in (3, 4))
    return Batch(inputs, labels, weights, mask, reference)
