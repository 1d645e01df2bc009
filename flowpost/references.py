"""First guesses of labels, which a head predicts relative to: by column or by name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ._checks import as_tensor
from .spaces import Space

__all__ = ["blocks_named", "by_name", "columns_of", "listed", "named_blocks", "read_reference"]


def blocks_named(space: Space, given: bool | str | Sequence[str]) -> list[str]:
    """Names of the leaf blocks that a choice stands for: all, none, or those named.

    Raises:
        ValueError: If no block has such a name.
    """
    blocks = space.blocks
    if isinstance(given, bool):
        return [b.name for b in blocks] if given else []
    names = [given] if isinstance(given, str) else list(given)
    for name in names:
        columns_of(space, name, "references")
    return [b.name for b in blocks if any(b.within(n) for n in names)]


def columns_of(space: Space, name: str, what: str) -> slice:
    """Label columns of the block of a name, of which there is `what`.

    Raises:
        ValueError: If no block has such a name.
    """
    of = [b for b in space.blocks if b.within(name)]
    if not of:
        known = ", ".join(b.name for b in space.blocks if b.name) or "none: it is no Product"
        raise ValueError(
            f"Expected {what} of blocks of the label space; got {name!r}. Blocks are {known}."
        )
    return slice(min(b.columns.start for b in of), max(b.columns.stop for b in of))


def named_blocks(space: Space, reference: Any) -> list[str]:
    """Names of the leaf blocks that have a reference."""
    if isinstance(reference, Mapping):
        return blocks_named(space, list(by_name(reference)))
    return blocks_named(space, reference is not None)


def listed(names: Sequence[str]) -> str:
    """Names of blocks for an error."""
    return ", ".join(n or "the label" for n in names) or "nothing"


def read_reference(
    space: Space, reference: Any, centre: Tensor, like: Tensor, ndim: int | None
) -> Tensor:
    """References as label columns (..., D), not yet checked against the space.

    Arguments:
        space: The label space.
        reference: Of shape (..., D), or a mapping of those of blocks by name.
        centre: The label (D,) that stands for blocks without a reference.
        like: A parameter of the head, for device and type of whole numbers.
        ndim: Dimensions of the result, where they are known.

    Raises:
        ValueError: If shapes do not fit.
    """
    if not isinstance(reference, Mapping):
        z = as_tensor(reference, "reference", like=like)
        return _column(z, ndim) if space.label_size == 1 else z
    parts: dict[str, tuple[slice, Tensor]] = {}
    for name, value in by_name(reference).items():
        columns = columns_of(space, name, "references")
        value = as_tensor(value, f"reference[{name!r}]", like=like)
        parts[name] = columns, value
        if columns.stop - columns.start > 1:
            ndim = value.ndim
    for name, (columns, value) in parts.items():
        size = columns.stop - columns.start
        value = _column(value, ndim) if size == 1 else value
        if value.shape[-1:] != (size,):
            hints = (b.space._hint(value.shape[-1]) for b in space.blocks if b.name == name)
            raise ValueError(
                f"Expected reference[{name!r}] of shape (N, {size}); got {tuple(value.shape)}. "
                f"{next(hints, '')}".rstrip()
            )
        parts[name] = columns, value
    shapes = {tuple(v.shape[:-1]) for _, v in parts.values()}
    if len(shapes) != 1:
        raise ValueError(f"Expected references of as many events each; got {sorted(shapes)}.")
    kind = centre.dtype
    for _, value in parts.values():
        kind = torch.promote_types(kind, value.dtype)
    z = centre.to(kind).expand(*shapes.pop(), -1).clone()
    for columns, value in parts.values():
        z[..., columns] = value.to(z)
    return z


def by_name(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A nested mapping with dotted names."""
    found: dict[str, Any] = {}
    for name, value in nested.items():
        if isinstance(value, Mapping):
            found |= by_name(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def _column(value: Tensor, ndim: int | None) -> Tensor:
    """Values (N,) of one column as (N, 1); `ndim` tells one event from one column."""
    bare = value.ndim < ndim if ndim is not None else value.ndim < 2 or value.shape[-1:] != (1,)
    return value.unsqueeze(-1) if bare else value
