r"""Label spaces: which values a label may take, and its chart to the plane of the flow.

A space of :math:`D` label columns and :math:`d` degrees of freedom maps labels :math:`z` onto
:math:`y \in \mathbb{R}^d` by a fixed chart, whitened by buffers that :meth:`Space.fit_scale` finds:

.. math:: r = (\mathrm{chart}^{-1}(z) - \mathrm{loc}) / \mathrm{scale}, \qquad
          v = (r - m(c)) / s(c),

and the density of the label carries :math:`\ln |\mathrm{d}v / \mathrm{d}z|` (``ladj``), given for
each base coordinate so that a block-triangular flow knows the density of every block.

Spaces are immutable descriptions: what is fitted to data lives in the head.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import constraints

from .._checks import as_tensor

__all__ = ["Block", "Scale", "Space", "SpaceConstraint", "indexed", "space_from_config"]


class Scale(NamedTuple):
    """Whitening of a chart: label unit, location and scale, each of shape (d,)."""

    unit: Tensor
    loc: Tensor
    scale: Tensor


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

    Subclasses give the chart. A space whose location and width are not a shift and a factor in the
    plane (a circle, a sphere) overrides `to_residual` and `from_residual` as well, sets `compact`,
    and says with `condition` how its base coordinates are shown to those of other labels.

    Attributes:
        label_size: Columns D of a label.
        dof: Intrinsic dimensions d (degrees of freedom of the base).
        location_size: Location parameters that a head predicts.
        width_size: Log-width parameters that a head predicts.
        feature_size: Features by which the base coordinates condition others.
        compact: Whether the base must keep its far field (circles and spheres).
    """

    label_size: int
    dof: int
    compact: bool = False

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
    def blocks(self) -> tuple[Block, ...]:
        """The leaves in the order of the flow."""
        return (Block("", self, slice(0, self.label_size), slice(0, self.dof)),)

    @property
    def support(self) -> SpaceConstraint:
        """The space as a torch constraint."""
        return SpaceConstraint(self)

    @abstractmethod
    def to_plane(self, z: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Chart labels (..., D) onto whitened coordinates (..., d), with ladj (..., d)."""

    @abstractmethod
    def from_plane(self, r: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Inverse of `to_plane`: labels (..., D) with the ladj (..., d) of that direction."""

    @abstractmethod
    def contains(self, z: Tensor) -> Tensor:
        """Whether labels (..., D) lie strictly inside the space, of shape (...)."""

    @abstractmethod
    def fit_scale(self, z: Tensor, weight: Tensor | None = None) -> Scale:
        """Whitening of the chart from validated labels (N, D) with weights (N,)."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON description from which `space_from_config` builds the space again."""

    @abstractmethod
    def _clip(self, z: Tensor) -> Tensor:
        """Labels within the clip margin of a bound, moved inside."""

    @abstractmethod
    def _requirement(self) -> str:
        """What a label must fulfil, for errors."""

    def _inside(self, z: Tensor) -> Tensor:
        """Whether each label column is inside, of shape (..., D)."""
        return torch.isfinite(z)

    def to_residual(
        self, z: Tensor, location: Tensor, log_width: Tensor, scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """Residual coordinates (..., d) of labels about a location in units of a width, and ladj.

        Arguments:
            z: Labels, of shape (..., D).
            location: Predicted location in the whitened plane, of shape (..., location_size).
            log_width: Predicted log width, of shape (..., width_size).
            scale: Whitening of the chart.
        """
        r, ladj = self.to_plane(z, scale)
        r, ladj = r.to(location.dtype), ladj.to(location.dtype)
        return (r - location) * torch.exp(-log_width), ladj - log_width

    def from_residual(
        self, v: Tensor, location: Tensor, log_width: Tensor, scale: Scale
    ) -> tuple[Tensor, Tensor]:
        """Inverse of `to_residual`: labels (..., D) with the ladj (..., d) of that direction."""
        z, ladj = self.from_plane(location + v * torch.exp(log_width), scale)
        return z, ladj + log_width

    def condition(self, u: Tensor) -> Tensor:
        """Features (..., feature_size) by which base coordinates (..., d) condition others."""
        return u

    def validate(self, z: Any, name: str = "labels") -> Tensor:
        """Return labels as a tensor of shape (..., D), clipped where the space has a margin.

        Raises:
            ValueError: If the shape is wrong, or a label is not finite or not in the space; the
                error names row and column.
        """
        z = as_tensor(z, name)
        if z.ndim == 0 or z.shape[-1] != self.label_size:
            raise ValueError(
                f"Expected {name} of shape (..., {self.label_size}) for {self!r}; got "
                f"{tuple(z.shape)}. Its columns are {', '.join(self.names)}."
            )
        clipped = self._clip(z)
        inside = self._inside(clipped)
        if not bool(inside.all()):
            self._refuse(z, inside, name)
        return clipped

    def _refuse(self, z: Tensor, inside: Tensor, name: str) -> None:
        bad = (~inside).nonzero()
        *rows, column = (int(i) for i in bad[0])
        where = f"row {', '.join(map(str, rows))}, column {self.names[column]!r}"
        leaf = next(b for b in self.blocks if b.columns.start <= column < b.columns.stop)
        value = z[(*rows, column)].item()
        need = leaf.space._requirement() if math.isfinite(value) else "finite labels"
        raise ValueError(
            f"Expected {need}; got {value:g} in {name}, {where} ({len(bad)} such of "
            f"{inside.numel()}). Correct or remove such events, give a missing column a mask, or "
            "set `clip` where a bound may be touched."
        )

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


def indexed(name: str, size: int) -> tuple[str, ...]:
    """Column names of a block: `name`, or `name[0]`, `name[1]`, … of a vector."""
    return (name,) if size == 1 else tuple(f"{name}[{i}]" for i in range(size))
