"""A bound flow whose base was recalibrated: one more step between the base and its splines."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from ..flows import BoundFlow
from ..spaces import Space
from .monotone import Monotone
from .radial import each, stretch, uneach, unstretch

__all__ = ["RecalibratedFlow", "rings_of"]


@dataclass(frozen=True)
class RecalibratedFlow(BoundFlow):
    """A bound flow followed by monotone maps of its base coordinates, then of their radius.

    Attributes:
        place: Bin of each event (*batch), whole numbers.
        coordinates: Map of each base coordinate, d in each bin; or None. The first of a circle or
            sphere is that of ‖u‖² of the block, and any other of it is unused.
        radius: Map of ‖u‖² of the first blocks together, for each number of them; or None.
    """

    place: Tensor | None = None
    coordinates: Monotone | None = None
    radius: Monotone | None = None

    @classmethod
    def of(
        cls,
        flow: BoundFlow,
        place: Tensor,
        coordinates: Monotone | None,
        radius: Monotone | None,
    ) -> RecalibratedFlow:
        """A flow with its base recalibrated."""
        own = {f.name: getattr(flow, f.name) for f in fields(BoundFlow)}
        return cls(**own, place=place, coordinates=coordinates, radius=radius)

    @property
    def _ends(self) -> tuple[int, ...]:
        return tuple(b.base.stop for b in self.space.blocks)

    def _to_base(self, z: Tensor) -> tuple[Tensor, Tensor]:
        u, ladj = super()._to_base(z)
        assert self.place is not None
        if self.coordinates is not None:
            u, step = each(u, self.coordinates, self.place, rings_of(self.space))
            ladj = ladj + step
        if self.radius is not None:
            u, step = stretch(u, self.radius, self.place, self._ends)
            ladj = ladj + step
        return u, ladj

    def _from_base(self, u: Tensor) -> tuple[Tensor, Tensor]:
        total = torch.zeros_like(u)
        assert self.place is not None
        if self.radius is not None:
            u, step = unstretch(u, self.radius, self.place, self._ends)
            total = total + step
        if self.coordinates is not None:
            u, step = uneach(u, self.coordinates, self.place, rings_of(self.space))
            total = total + step
        z, ladj = super()._from_base(u)
        return z, ladj + total

    def _map(self, change: Callable[[Tensor, int], Tensor]) -> RecalibratedFlow:
        assert self.place is not None
        place = change(self.place.unsqueeze(-1), 1).squeeze(-1).long()
        return replace(super()._map(change), place=place)  # type: ignore[return-value, call-arg]

    def apply(self, change: Callable[[Tensor], Tensor]) -> BoundFlow:
        """Change every tensor, those that all events share included."""
        parts: dict[str, Any] = {
            name: None if maps is None else maps.apply(change)
            for name, maps in (("coordinates", self.coordinates), ("radius", self.radius))
        }
        return replace(super().apply(change), **parts)

    def leading(self, count: int) -> BoundFlow:
        """The exact flow of the first blocks alone, whose radius has a map of its own."""
        flow = super().leading(count)
        parts: dict[str, Any] = {}
        if self.coordinates is not None:
            parts["coordinates"] = self.coordinates.select(slice(flow.dof))
        if self.radius is not None:
            parts["radius"] = self.radius.select(slice(count))
        return replace(flow, **parts)


def rings_of(space: Space) -> list[slice]:
    """Base coordinates of each circle and sphere, which come first."""
    return [b.base for b in space.blocks if b.space.compact]
