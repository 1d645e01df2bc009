"""Several labels under one block-triangular flow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from torch import Tensor

from .._checks import as_tensor
from .base import Block, Placement, Scale, Space, indexed, space_from_config

__all__ = ["Product"]


class Product(Space):
    """Several labels under one flow, each with its own chart.

    Label columns stand in the declared order. The base coordinates stand in the order of the flow:
    directions, angles, then the others as declared; each block is exact given the earlier ones.

    Arguments:
        spaces: A space for each name; products may be nested.

    Raises:
        ValueError: If a space has no name, there is none, or one is no space.

    Example:
        >>> from flowpost.spaces import Positive, Real
        >>> space = Product(energy=Positive(), vertex=Real(3))
        >>> space.names
        ('energy', 'vertex[0]', 'vertex[1]', 'vertex[2]')
        >>> z = space.pack({"energy": torch.ones(2), "vertex": torch.zeros(2, 3)})
        >>> z.shape, space.unpack(z)["energy"].shape
        (torch.Size([2, 4]), torch.Size([2]))
    """

    def __init__(self, *unnamed: NoReturn, **spaces: Space) -> None:
        if unnamed:
            raise ValueError(
                f"Expected a name for each space; got {len(unnamed)} without one. Name the blocks: "
                "Product(energy=Positive(), direction=Sphere())."
            )
        if not spaces:
            raise ValueError("Expected at least one named space; got none. Try Product(z=Real(1)).")
        for name, space in spaces.items():
            if not isinstance(space, Space):
                raise ValueError(
                    f"Expected a space for {name!r}; got {type(space).__name__}. Try {name}=Real()."
                )
        self.spaces = dict(spaces)
        self.label_size = sum(s.label_size for s in spaces.values())
        self.dof = sum(s.dof for s in spaces.values())
        self._blocks = self._order_blocks()

    def _order_blocks(self) -> tuple[Block, ...]:
        leaves, start = [], 0
        for name, space in self.spaces.items():
            for block in space.blocks:
                columns = slice(start + block.columns.start, start + block.columns.stop)
                full = f"{name}.{block.name}" if block.name else name
                leaves.append((columns, full, block.space))
            start += space.label_size
        # directions before angles: the first block has an exact density, and maps want it
        leaves.sort(key=lambda e: (not e[2].compact, not e[2].directional, e[0].start))
        blocks, base = [], 0
        for columns, full, space in leaves:
            blocks.append(Block(full, space, columns, slice(base, base + space.dof)))
            base += space.dof
        return tuple(blocks)

    @property
    def location_size(self) -> int:
        """Location parameters of all blocks."""
        return sum(s.location_size for s in self.spaces.values())

    @property
    def width_size(self) -> int:
        """Log-width parameters of all blocks."""
        return sum(s.width_size for s in self.spaces.values())

    @property
    def feature_size(self) -> int:
        """Features of all blocks."""
        return sum(s.feature_size for s in self.spaces.values())

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each label column."""
        names = [""] * self.label_size
        for block in self.blocks:
            names[block.columns] = indexed(block.name, block.space.label_size)
        return tuple(names)

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The leaves in the order of the flow."""
        return self._blocks

    def pack(self, labels: Mapping[str, Any]) -> Tensor:
        """Concatenate labels (...,) or (..., k) by name into columns (..., D).

        Raises:
            ValueError: If a name is missing or unknown, or a shape does not fit.
        """
        return self._pack(labels, self._batch_ndim(labels))

    def _batch_ndim(self, labels: Mapping[str, Any]) -> int | None:
        """Dimensions of the batch, as the first vector among the labels has them."""
        for name, space in self.spaces.items():
            found = None
            if isinstance(space, Product) and isinstance(labels.get(name), Mapping):
                found = space._batch_ndim(labels[name])
            elif space.label_size > 1 and name in labels:
                found = as_tensor(labels[name], name).ndim - 1
            if found is not None:
                return found
        return None

    def _pack(self, labels: Mapping[str, Any], batch_ndim: int | None) -> Tensor:
        if set(labels) != set(self.spaces):
            raise ValueError(
                f"Expected labels named {', '.join(self.spaces)}; got {', '.join(labels)}."
            )
        parts: list[Tensor] = []
        for name, space in self.spaces.items():
            if isinstance(space, Product) and isinstance(labels[name], Mapping):
                part = space._pack(labels[name], batch_ndim)
            else:
                part = as_tensor(labels[name], name)
                bare = part.ndim < 2 if batch_ndim is None else part.ndim == batch_ndim
                if space.label_size == 1 and (bare or part.shape[-1] != 1):
                    part = part.unsqueeze(-1)
            if part.shape[-1] != space.label_size:
                hint = space._hint(part.shape[-1])
                raise ValueError(
                    f"Expected {name} of shape (..., {space.label_size}) for {space!r}; got "
                    f"{tuple(part.shape)}. {hint}".rstrip()
                )
            if parts and part.shape[:-1] != parts[0].shape[:-1]:
                first = next(iter(self.spaces))
                pair = {n: _as_given(p) for n, p in ((name, part), (first, parts[0]))}
                hints = (self.spaces[n]._hint(s[-1]) for n, s in pair.items() if s)
                raise ValueError(
                    f"Expected as many labels of every name; got {name} of shape {pair[name]} "
                    f"beside {first} of {pair[first]}. {next(filter(None, hints), '')}".rstrip()
                )
            parts.append(part)
        return torch.cat(parts, dim=-1)

    def unpack(self, z: Tensor) -> dict[str, Any]:
        """Split columns (..., D) by name: (...,) for scalars, (..., k) for vectors.

        Raises:
            ValueError: If the number of columns is wrong.
        """
        if z.ndim == 0 or z.shape[-1] != self.label_size:
            raise ValueError(
                f"Expected labels of shape (..., {self.label_size}) for {self!r}; got "
                f"{tuple(z.shape)}."
            )
        parts = z.split([s.label_size for s in self.spaces.values()], dim=-1)
        named: dict[str, Any] = {}
        for (name, space), part in zip(self.spaces.items(), parts, strict=True):
            if isinstance(space, Product):
                named[name] = space.unpack(part)
            else:
                named[name] = part.squeeze(-1) if space.label_size == 1 else part
        return named

    def _scales(self, scale: Scale) -> list[tuple[Block, Scale]]:
        return [(b, Scale(*(t[..., b.base] for t in scale))) for b in self.blocks]

    def to_residual(self, z: Tensor, at: Placement) -> NoReturn:
        """Refused: a flow places each block by itself."""
        raise NotImplementedError("A product is placed block by block.")

    def from_residual(self, v: Tensor, at: Placement) -> NoReturn:
        """Refused: a flow places each block by itself."""
        raise NotImplementedError("A product is placed block by block.")

    def centre(self, scale: Scale) -> Tensor:
        """The centre of every block."""
        return self._by_column([b.space.centre(s) for b, s in self._scales(scale)])

    def step(self, z: Tensor, move: Tensor, scale: Scale) -> Tensor:
        """Labels a step away, block by block."""
        return self._by_column(
            [b.space.step(z[..., b.columns], move[..., b.base], s) for b, s in self._scales(scale)]
        )

    def spread(self, z: Tensor, scale: Scale) -> Tensor:
        """Width of every block, in base order."""
        parts = [b.space.spread(z[..., b.columns], s) for b, s in self._scales(scale)]
        return torch.cat(parts, -1)

    def mean(self, z: Tensor) -> Tensor:
        """Mean of every block."""
        return self._by_column([b.space.mean(z[..., b.columns]) for b in self.blocks])

    def stddev(self, z: Tensor) -> Tensor:
        """Standard deviation of every block."""
        return self._by_column([b.space.stddev(z[..., b.columns]) for b in self.blocks])

    def features(self, z: Tensor) -> Tensor:
        """Features of every block, in the order of the flow."""
        return torch.cat([b.space.features(z[..., b.columns]) for b in self.blocks], -1)

    def canonical(self, z: Tensor) -> Tensor:
        """Labels of every block as draws have them."""
        return self._by_column([b.space.canonical(z[..., b.columns]) for b in self.blocks])

    def unwrap(self, z: Tensor) -> Tensor:
        """Draws of every block on one branch."""
        return self._by_column([b.space.unwrap(z[..., b.columns]) for b in self.blocks])

    def contains(self, z: Tensor) -> Tensor:
        """Whether every block's label lies in its space."""
        return torch.stack([b.space.contains(z[..., b.columns]) for b in self.blocks]).all(0)

    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Whitening of every block, in base order."""
        return self.fit_blocks(z, weight, reference, [True] * len(self.blocks))

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return {"type": "Product", "spaces": [[k, s.config()] for k, s in self.spaces.items()]}

    @classmethod
    def _build(cls, options: dict[str, Any]) -> Space:
        names = [name for name, _ in options["spaces"]]
        if len(set(names)) < len(names):
            raise ValueError(f"Expected each name of a Product once; got {names}. Rename one.")
        return cls(**{name: space_from_config(config) for name, config in options["spaces"]})

    def _by_column(self, parts: list[Tensor]) -> Tensor:
        pairs = sorted(zip(self.blocks, parts, strict=True), key=lambda p: p[0].columns.start)
        return torch.cat([p for _, p in pairs], -1)

    def _inside(self, z: Tensor) -> Tensor:
        return self._by_column([b.space._inside(z[..., b.columns]) for b in self.blocks])

    def _clip(self, z: Tensor) -> Tensor:
        return self._by_column([b.space._clip(z[..., b.columns]) for b in self.blocks])

    def _requirement(self) -> str:
        return "labels of " + repr(self)

    def _hint(self, columns: int) -> str:
        extra = columns - self.label_size
        hints = (b.space._hint(b.space.label_size + extra) for b in self.blocks)
        return next(filter(None, hints), "")

    def __repr__(self) -> str:
        return "Product(" + ", ".join(f"{k}={s!r}" for k, s in self.spaces.items()) + ")"


def _as_given(part: Tensor) -> tuple[int, ...]:
    """Shape of labels, without the axis of a single column."""
    return tuple(part.shape[:-1] if part.shape[-1] == 1 else part.shape)
