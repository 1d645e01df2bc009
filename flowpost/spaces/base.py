r"""Label spaces: which values a label may take, and its chart to the plane of the flow.

A space of :math:`D` label columns and :math:`d` degrees of freedom maps labels :math:`z` onto
:math:`y \in \mathbb{R}^d` by a fixed chart, whitened by buffers that :meth:`Space.fit_scale` finds:

.. math:: r = (\mathrm{chart}^{-1}(z) - \mathrm{loc}) / \mathrm{scale}, \qquad
          v = (r - m(c)) / s(c),

and the density of the label carries :math:`\ln |\mathrm{d}v / \mathrm{d}z|` (``ladj``), given for
each base coordinate so that a block-triangular flow knows the density of every block.

A circle and a sphere have no such plane: they place a label by an axis and a width of their own.

Spaces are immutable descriptions: what is fitted to data lives in the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import as_tensor

__all__ = [
    "Block",
    "Placement",
    "Scale",
    "Space",
    "SpaceConstraint",
    "indexed",
    "space_from_config",
]


_GUESS = "Every event needs a first guess: give those without one a plain one, such as the mean."


class Scale(NamedTuple):
    """Whitening of a chart: label unit, location and scale, each of shape (d,)."""

    unit: Tensor
    loc: Tensor
    scale: Tensor


@dataclass(frozen=True)
class Placement:
    """Where a head puts the label of a leaf space, event by event.

    Attributes:
        location: Predicted location, of shape (..., location_size).
        log_width: Predicted log width, of shape (..., width_size).
        scale: Whitening of the chart.
        shape: Predicted shape, of shape (..., shape_size), or None.
        profile: Predicted spline of the radial profile, of shape (..., P), or None.
        reference: First guess of the label, of shape (..., D), to which the location is relative,
            in units of the width; or None.
    """

    location: Tensor
    log_width: Tensor
    scale: Scale
    shape: Tensor | None = None
    profile: Tensor | None = None
    reference: Tensor | None = None

    def label_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """Floating type of labels of residuals of a type: a double reference keeps its digits."""
        if self.reference is None:
            return dtype
        return torch.promote_types(dtype, self.reference.dtype)


@dataclass(frozen=True)
class Block:
    """A leaf of a space: its name, its label columns and its base coordinates.

    Attributes:
        name: Dotted name within the product; empty for a space that is no product.
        space: The leaf space.
        columns: Label columns, in the declared order.
        base: Base coordinates, in the order of the flow (compact blocks first).
    """

    name: str
    space: Space
    columns: slice
    base: slice

    def within(self, name: str) -> bool:
        """Whether the leaf is the block of a (dotted) name, or a part of it."""
        return self.name == name or self.name.startswith(f"{name}.")


class SpaceConstraint(constraints.Constraint):
    """The support of a posterior as a torch constraint on the last dimension of a label."""

    event_dim = 1

    def __init__(self, space: Space) -> None:
        self.space = space

    def check(self, value: Tensor) -> Tensor:
        """Whether labels of shape (..., D) lie in the space, of shape (...)."""
        return self.space.contains(value)

    def __repr__(self) -> str:
        return f"SpaceConstraint({self.space!r})"


class Space(ABC):
    """A label space.

    Attributes:
        label_size: Columns D of a label.
        dof: Intrinsic dimensions d (degrees of freedom of the base).
        location_size: Location parameters that a head predicts.
        width_size: Log-width parameters that a head predicts.
        shape_size: Shape parameters that an `"affine"` head predicts beside those.
        directional: Whether labels are directions on the sphere.
        has_profile: Whether a `"spline"` head predicts a radial profile.
        feature_size: Features by which the base coordinates condition others.
        own_size: How many of them, the first ones, are for the same block alone; the others are
            then for other blocks alone.
        compact: Whether the base must keep its far field (circles and spheres).
    """

    label_size: int
    dof: int
    compact: bool = False
    shape_size: int = 0
    has_profile: bool = False
    directional: bool = False
    own_size: int = 0

    @property
    def location_size(self) -> int:
        """Location parameters that a head predicts."""
        return self.dof

    @property
    def width_size(self) -> int:
        """Log-width parameters that a head predicts."""
        return self.dof

    @property
    def feature_size(self) -> int:
        """Features by which base coordinates condition others."""
        return self.dof

    @property
    def names(self) -> tuple[str, ...]:
        """Name of each label column."""
        return indexed("z", self.label_size)

    @property
    def base_names(self) -> tuple[str, ...]:
        """Name of each base coordinate, in the order of the flow, as `coverage` takes them.

        A block's coordinates are called as its columns, but those of a direction, which has two of
        three columns, `name.u0` and `name.u1`, and of a space that is no product u0, u1, …
        """
        return tuple(name for b in self.blocks for name in _base_names(b))

    @property
    def blocks(self) -> tuple[Block, ...]:
        """The leaves in the order of the flow."""
        return (Block("", self, slice(0, self.label_size), slice(0, self.dof)),)

    @property
    def compact_dof(self) -> int:
        """Base coordinates of circles and spheres, the first ones."""
        return sum(b.space.dof for b in self.blocks if b.space.compact)

    @property
    def support(self) -> SpaceConstraint:
        """The space as a torch constraint."""
        return SpaceConstraint(self)

    @abstractmethod
    def to_residual(self, z: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Residual coordinates (..., d) of labels (..., D) about their placement, and ladj alike.

        The residual is in the floating type of the location, whatever that of the labels.
        """

    @abstractmethod
    def from_residual(self, v: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Inverse of `to_residual`: labels (..., D) with the ladj (..., d) of that direction."""

    @abstractmethod
    def centre(self, scale: Scale) -> Tensor:
        """The label (D,) from which an unconditional head starts."""

    @abstractmethod
    def step(self, z: Tensor, move: Tensor, scale: Scale) -> Tensor:
        """Labels (..., D) reached from z by small moves (..., d) in local coordinates."""

    @abstractmethod
    def spread(self, z: Tensor, scale: Scale) -> Tensor:
        """Width (..., d) of draws (S, ..., D) in the local coordinates of `step`."""

    def mean(self, z: Tensor) -> Tensor:
        """Mean (..., D) of draws (S, ..., D) in the sense of the space."""
        return z.mean(0)

    def stddev(self, z: Tensor) -> Tensor:
        """Standard deviation (..., D) of draws (S, ..., D) in the sense of the space."""
        return z.std(0)

    @abstractmethod
    def contains(self, z: Tensor) -> Tensor:
        """Whether labels (..., D) lie strictly inside the space, of shape (...)."""

    @abstractmethod
    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Whitening of the chart from validated labels (N, D) with weights (N,).

        With references (N, D) it is that of the labels relative to them.
        """

    def fit_blocks(
        self,
        z: Tensor,
        weight: Tensor | None,
        reference: Tensor | None,
        referenced: Sequence[bool],
    ) -> Scale:
        """Whitening of every leaf, in base order, relative to its reference where it has one."""
        scales = [
            b.space.fit_scale(
                z[..., b.columns],
                weight,
                reference[..., b.columns] if reference is not None and own else None,
            )
            for b, own in zip(self.blocks, referenced, strict=True)
        ]
        return Scale(*(torch.cat(parts) for parts in zip(*scales, strict=True)))

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON description from which `space_from_config` builds the space again."""

    @abstractmethod
    def _clip(self, z: Tensor) -> Tensor:
        """Labels within the clip margin of a bound, moved inside."""

    @abstractmethod
    def _requirement(self) -> str:
        """What a label must fulfil, for errors."""

    def _remedy(self) -> str:
        """What to do about a finite label that is refused, for errors; empty for the usual."""
        return ""

    def _hint(self, columns: int) -> str:
        """What labels of so many columns may be meant as, for errors."""
        return ""

    def _inside(self, z: Tensor) -> Tensor:
        """Whether each label column is inside, of shape (..., D)."""
        return torch.isfinite(z)

    def features(self, z: Tensor) -> Tensor:
        """Labels (..., D) as a network reads them, without seams, of shape (..., F)."""
        return z

    def condition(self, u: Tensor) -> Tensor:
        """Features (..., feature_size) by which base coordinates (..., d) condition others."""
        return u

    def lean(self, v: Tensor) -> Tensor:
        """Coordinates (..., d) as those of other labels lean on them linearly."""
        return v

    def widen(self, v: Tensor) -> Tensor:
        """Coordinates (..., d) as the splines see them."""
        return v

    def narrow(self, v: Tensor, start: Tensor, end: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates of what splines made of `start`, the wide v, and ladj (..., d) of the way."""
        return end, ladj

    def canonical(self, z: Tensor) -> Tensor:
        """Labels (..., D) as draws have them, of several that mean the same."""
        return z

    def unwrap(self, z: Tensor) -> Tensor:
        """Draws (S, ..., D) on one branch, so that quantiles of their columns have a meaning."""
        return z

    def validate(self, z: Any, name: str = "labels") -> Tensor:
        """Return labels as a tensor of shape (..., D), clipped where the space has a margin.

        Raises:
            ValueError: If the shape is wrong, or a label is not finite or not in the space; the
                error names row and column.
        """
        z = as_tensor(z, name)
        if z.ndim == 0 or z.shape[-1] != self.label_size:
            hint = self._hint(z.shape[-1]) if z.ndim else ""
            raise ValueError(
                f"Expected {name} of shape (..., {self.label_size}) for {self!r}; got "
                f"{tuple(z.shape)}. Its columns are {', '.join(self.names)}. {hint}".rstrip()
            )
        clipped = self._clip(z)
        inside = self._inside(clipped)
        if not bool(inside.all()):
            self._refuse(z, inside, name)
        return clipped

    def _refuse(self, z: Tensor, inside: Tensor, name: str) -> None:
        bad = (~inside).nonzero()
        *rows, column = (int(i) for i in bad[0])
        where = f"row {', '.join(map(str, rows))}, " if rows else ""
        where += f"column {self.names[column]!r}"
        leaf = next(b for b in self.blocks if b.columns.start <= column < b.columns.stop)
        value = z[(*rows, column)].item()
        finite = math.isfinite(value)
        remedy = leaf.space._remedy() if finite else ""
        if not remedy:
            remedy = _GUESS if name.startswith("reference") else self._correction(leaf, finite)
        need = leaf.space._requirement() if finite else "finite labels"
        found = (
            leaf.space._describe(z[tuple(rows)][leaf.columns], value) if finite else f"{value:g}"
        )
        raise ValueError(
            f"Expected {need}; got {found} in {name}, {where} ({int((~inside).any(-1).sum())} such "
            f"of {inside[..., 0].numel()} events). {remedy}"
        )

    def _correction(self, leaf: Block, finite: bool) -> str:
        """What to do about events with a refused label of a leaf, for errors."""
        if leaf.space.compact and leaf != self.blocks[-1]:
            what = "direction" if leaf.space.directional else "angle"
            return (
                f"Correct or remove such events: a missing {what} cannot be masked while other "
                "labels are known."
            )
        if finite and hasattr(leaf.space, "clip"):
            return (
                "Correct or remove such events, give missing labels a mask, or set `clip` where "
                "a bound may be touched."
            )
        return "Correct or remove such events, or give missing labels a mask."

    def _describe(self, z: Tensor, value: float) -> str:
        """What a refused label is, for errors, where one of its columns has the value."""
        return f"{value:g}"

    def default_scale(self) -> Scale:
        """Whitening that changes nothing."""
        return Scale(torch.ones(self.dof), torch.zeros(self.dof), torch.ones(self.dof))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Space) and self.config() == other.config()

    def __hash__(self) -> int:
        return hash(repr(self.config()))

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        _REGISTRY[cls.__name__] = cls

    @classmethod
    def _build(cls, options: dict[str, Any]) -> Space:
        return cls(**options)


_REGISTRY: dict[str, type[Space]] = {}


def space_from_config(config: Mapping[str, Any]) -> Space:
    """Build a space from what `Space.config` gave.

    Raises:
        ValueError: If the type is unknown or its options do not fit.
    """
    options = dict(config)
    kind = options.pop("type", None)
    if kind not in _REGISTRY:
        raise ValueError(
            f"Expected a space of type {', '.join(_REGISTRY)}; got {kind!r}. The file may come "
            "from a later flowpost."
        )
    try:
        return _REGISTRY[kind]._build(options)
    except TypeError as error:
        raise ValueError(f"Expected the options of a {kind}; got {options}.") from error


def _base_names(block: Block) -> tuple[str, ...]:
    dof = block.space.dof
    if not block.name:
        return tuple(f"u{i}" for i in range(dof))
    if dof in (1, block.space.label_size):
        return indexed(block.name, dof)
    return tuple(f"{block.name}.u{i}" for i in range(dof))


def indexed(name: str, size: int) -> tuple[str, ...]:
    """Column names of a block: `name`, or `name[0]`, `name[1]`, … of a vector."""
    return (name,) if size == 1 else tuple(f"{name}[{i}]" for i in range(size))
