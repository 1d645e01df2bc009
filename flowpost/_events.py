"""Events as users have them: forms of a batch, rows of it, and batches joined."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from numbers import Number
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import PackedSequence, pack_sequence, pad_packed_sequence
from torch.utils.data import Dataset

from ._checks import as_tensor

__all__ = [
    "Batch",
    "TensorEvents",
    "called",
    "chosen",
    "joined",
    "leaves",
    "mapped",
    "sizes",
    "to_batch",
]

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


def mapped(value: Any, change: Callable[[Any], Any]) -> Any:
    """A value, or each of a tuple or dict of values, changed; None stays."""
    if value is None:
        return None
    if isinstance(value, Mapping):
        return {k: mapped(v, change) for k, v in value.items()}
    if isinstance(value, (tuple, list)):
        return tuple(mapped(v, change) for v in value)
    return change(value)


def chosen(value: Any, events: Tensor, device: torch.device | None = None) -> Any:
    """Rows of tensors, or of tuples and dicts of them, at indices or where a mask is True.

    They are put on a device; by default they stay where they are.
    """
    return mapped(value, lambda t: torch.as_tensor(t)[events].to(device))


def called(function: Callable[..., Any], x: Any) -> Any:
    """What a function makes of inputs: tuples and dicts of them are its arguments."""
    if isinstance(x, (tuple, list)) and not isinstance(x, PackedSequence):
        return function(*x)
    return function(**x) if isinstance(x, dict) else function(x)


def leaves(value: Any) -> Iterator[Any]:
    """A value, or each one in a tuple or dict of values, in their order; None is none."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for v in value:
            yield from leaves(v)
    elif value is not None:
        yield value


def sizes(value: Any) -> Iterator[int]:
    """Events of each tensor in a value, or in a tuple or dict of values."""
    return map(len, leaves(value))


class TensorEvents(Dataset):
    """Events held in tensors, taken many at once by a list of indices."""

    def __init__(self, batch: Batch) -> None:
        x = mapped(batch.x, torch.as_tensor)
        z = as_tensor(batch.z, "labels")
        rest = [mapped(v, torch.as_tensor) for v in batch[2:]]
        self.batch = Batch(x, z, *rest)
        found = set(sizes(tuple(self.batch)))
        if len(found) != 1:
            raise ValueError(
                f"Expected as many inputs as labels; got {sorted(found)} events. {_FORMS}"
            )
        self.size = found.pop()

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: Any) -> Batch:
        at = torch.as_tensor(index)
        return Batch(*(chosen(v, at) for v in self.batch))


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


def joined(values: list[Any], counts: list[int], padded: bool = False) -> Any:
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
        if len(events) != sum(counts):
            raise ValueError("Expected as many sequences as labels.")
        return pack_sequence(events, enforce_sorted=False)
    if isinstance(first, Mapping):
        if any(set(v) != set(first) for v in values):
            raise ValueError("Expected the same keys in all batches.")
        told = any(_tells_padding(v) for v in first.values())
        return {k: joined([v[k] for v in values], counts, told) for k in first}
    if _nested(first):
        told = any(_tells_padding(v) for v in first)
        return tuple(joined(list(v), counts, told) for v in zip(*values, strict=True))
    tensors = [torch.as_tensor(v) for v in values]
    if any(not t.ndim or len(t) != n for t, n in zip(tensors, counts, strict=True)):
        raise ValueError("Expected as many inputs as labels.")
    if padded and tensors[0].ndim > 1:
        longest = max(t.shape[1] for t in tensors)
        tensors = [pad(t, [0, 0] * (t.ndim - 2) + [0, longest - t.shape[1]]) for t in tensors]
    return torch.cat(tensors)
