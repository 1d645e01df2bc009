"""Which labels of an event are known: masks by column or by name, and what can be marginalised."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .references import by_name, columns_of
from .spaces import Space

__all__ = ["known_coordinates", "read_mask"]


def read_mask(space: Space, mask: Any, z: Tensor) -> Tensor:
    """Which label columns are known, booleans of the shape (..., D) of the labels.

    Arguments:
        space: The label space.
        mask: True where a label is known, of shape (..., D), or a mapping of those of blocks by
            name, (...,) or (..., k); blocks that are not named are known.
        z: Labels of shape (..., D).

    Raises:
        ValueError: If it is no booleans of that shape, or no block has such a name.
    """
    if not isinstance(mask, Mapping):
        return _booleans(mask, "mask", z, bare=space.label_size == 1)
    known = torch.ones(z.shape, dtype=torch.bool, device=z.device)
    for name, value in by_name(mask).items():
        columns = columns_of(space, name, "a mask")
        known[..., columns] = _booleans(value, f"mask[{name!r}]", z[..., columns], bare=True)
    return known


def _booleans(value: Any, name: str, z: Tensor, bare: bool) -> Tensor:
    """Booleans (..., k) as the labels z; with `bare` also (...,) for all columns at once."""
    known = torch.as_tensor(value, device=z.device)
    if bare and known.shape == z.shape[:-1]:
        known = known.unsqueeze(-1).expand(z.shape)
    if known.dtype != torch.bool or known.shape != z.shape:
        wanted = tuple(z.shape[:-1]) if bare and z.shape[-1] == 1 else tuple(z.shape)
        raise ValueError(
            f"Expected {name} as booleans of shape {wanted}; got {known.dtype} of shape "
            f"{tuple(known.shape)}. True is a known label."
        )
    return known


def known_coordinates(space: Space, known: Tensor) -> Tensor:
    """Base coordinates (..., d) whose density counts where label columns (..., D) are known.

    Raises:
        ValueError: If an event misses labels other than whole trailing blocks of the flow, which
            alone are marginalised exactly.
    """
    parts: list[Tensor] = []
    earlier = known.new_ones(known.shape[:-1])
    for block in space.blocks:
        columns = known[..., block.columns]
        whole, none = columns.all(-1), ~columns.any(-1)
        bad = ~(whole | none) | (whole & ~earlier)
        if bool(bad.any()):
            row = int(bad.nonzero()[0, 0])
            _refuse(space, known[row], row)
        earlier = whole
        parts.append(whole.unsqueeze(-1).expand(*whole.shape, block.space.dof))
    return torch.cat(parts, -1)


def _refuse(space: Space, known: Tensor, row: int) -> NoReturn:
    """Say what is wrong with the mask (D,) of an event."""
    missing = next(b for b in space.blocks if not bool(known[..., b.columns].all()))
    part = bool(known[..., missing.columns].any())
    name = repr(missing.name) if missing.name else "the label"
    if part and missing.space.compact:
        remedy = f"The mask divides {name}: mask all columns of a vector or none."
    elif missing.space.compact:
        remedy = (
            "Directions and angles come first in the flow, wherever they are declared: leave out "
            f"events without {name}, or train a head of the other labels for them."
        )
    else:
        remedy = (
            "Declare labels that may be missing last, each under its own name in a Product "
            "(directions and angles come first wherever they are declared)."
        )
    order = ", ".join(repr(b.name) for b in space.blocks)
    raise ValueError(
        f"Expected missing labels to be whole trailing blocks of the flow (order: {order}), for "
        f"only those are marginalised exactly; mask row {row} has {known.tolist()}. {remedy}"
    )
