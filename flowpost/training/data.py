"""What `fit` takes: tensors, a Dataset or a DataLoader, as batches of inputs and labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset, Sampler, random_split

from .._checks import as_tensor, check_finite
from ..encoders import Encoder
from ..head import PosteriorModel
from ..masks import known_coordinates, read_mask

__all__ = [
    "Batch",
    "apply",
    "check_events",
    "chosen",
    "loader",
    "sample_of",
    "split",
    "to_batch",
]

_SCALE_EVENTS = 50_000
_FORMS = (
    "Give labels alone (context=0), a tuple (x, z), (x, z, weight) or (x, z, weight, mask), or a "
    "dict with keys x, z, weight, mask, reference; x, mask and reference may be dicts of tensors, "
    "x a tuple."
)


class Batch(NamedTuple):
    """Inputs, labels, and optional weights, masks and references of N events."""

    x: Any
    z: Any
    weight: Any = None
    mask: Any = None
    reference: Any = None


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
            keys = ", ".join(Batch._fields)
            raise ValueError(f"Expected keys {keys}; got {', '.join(data)}. {_FORMS}")
        return Batch(**{"x": None, **data})
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


def chosen(value: Any, events: Tensor) -> Any:
    """Rows of tensors, or of tuples and dicts of them, at indices or where a mask is True."""
    return _map(value, lambda t: torch.as_tensor(t)[events])


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
        return Batch(*(chosen(v, at) for v in self.batch))


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
        apply(encoder.check, x)


def apply(function: Callable[..., Any], x: Any) -> None:
    """Call a function with inputs as an encoder takes them."""
    if isinstance(x, dict):
        function(**x)
    elif isinstance(x, (tuple, list)) and not hasattr(x, "batch_sizes"):
        function(*x)
    else:
        function(x)


def _nested(value: Any) -> bool:
    if isinstance(value, (tuple, list)):
        return not all(isinstance(v, Number) for v in value)
    return isinstance(value, Mapping)


def _tells_padding(value: Any) -> bool:
    """Whether it can be lengths (N,) or a mask (N, M): whole numbers or booleans."""
    if value is None or _nested(value):
        return False
    tensor = torch.as_tensor(value)
    return tensor.ndim <= 2 and not tensor.is_floating_point()


def _joined(values: list[Any], sizes: list[int], padded: bool = False) -> Any:
    """Inputs of several batches as those of one.

    Tensors (N, M, …) are padded with zeros to the longest M, beside what tells it from elements.

    Raises:
        RuntimeError, TypeError, ValueError: If they do not fit together.
    """
    first = values[0]
    if first is None and all(v is None for v in values):
        return None
    if isinstance(first, PackedSequence):
        events: list[Tensor] = []
        for value in values:
            data, lengths = pad_packed_sequence(value, batch_first=True)
            events += [event[:n] for event, n in zip(data, lengths.tolist(), strict=True)]
        if len(events) != sum(sizes):
            raise ValueError("Expected as many sequences as labels.")
        return pack_sequence(events, enforce_sorted=False)
    if isinstance(first, Mapping):
        if any(set(v) != set(first) for v in values):
            raise ValueError("Expected the same keys in all batches.")
        told = any(_tells_padding(v) for v in first.values())
        return {k: _joined([v[k] for v in values], sizes, told) for k in first}
    if _nested(first):
        told = any(_tells_padding(v) for v in first)
        return tuple(_joined(list(v), sizes, told) for v in zip(*values, strict=True))
    tensors = [torch.as_tensor(v) for v in values]
    if any(not t.ndim or len(t) != n for t, n in zip(tensors, sizes, strict=True)):
        raise ValueError("Expected as many inputs as labels.")
    if padded and tensors[0].ndim > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) for t in tensors]
    return torch.cat(tensors)


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
            inputs = _joined([b.x for b in found], sizes)
    mask, reference = (_joined([b[k] for b in found], sizes) for k in (3, 4))
    return Batch(inputs, labels, weights, mask, reference)
