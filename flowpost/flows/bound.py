"""A flow bound to the contexts of events: a bijection between labels and the Gaussian base."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Size, Tensor

from ..spaces import Block, Placement, Product, Scale, Space
from .spline import base_features, condition, spline, spline_inverse
from .tail import tail, tail_inverse
from .warps import warp, warp_inverse

__all__ = ["BoundFlow", "BoundLayer"]


@dataclass(frozen=True)
class BoundLayer:
    """A spline layer at the context of each event; see `flows.spline.condition` for the shapes."""

    groups: list[list[int]]
    skip: Tensor
    hidden: Tensor
    inner: Tensor
    outer: Tensor
    bound: float
    keep: Tensor | None = None

    def to_base(self, v: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
        """Coordinates (..., d) nearer to the base, and ladj (..., d)."""
        features = base_features(v, blocks)
        parameters = condition(self.skip, self.hidden, features, self.inner, self.outer, self.keep)
        return spline(v, parameters, self.bound)

    def from_base(self, u: Tensor, blocks: tuple[Block, ...]) -> tuple[Tensor, Tensor]:
        """Inverse of `to_base`, one group after another."""
        v, ladj = torch.zeros_like(u), torch.zeros_like(u)
        for group in self.groups:
            g = torch.tensor(group, device=u.device)
            parameters = condition(
                self.skip[..., g, :],
                self.hidden[..., g, :],
                base_features(v, blocks),
                self.inner[g],
                self.outer[g],
                None if self.keep is None else self.keep[..., g, :],
            )
            part, part_ladj = spline_inverse(u[..., g], parameters, self.bound)
            v, ladj = v.index_copy(-1, g, part), ladj.index_copy(-1, g, part_ladj)
        return v, ladj


@dataclass(frozen=True)
class BoundFlow:
    """A flow at the context of each event: a bijection between labels and base, nothing to learn.

    Attributes:
        space: The label space.
        scale: Whitening of the chart.
        location: Predicted location, of shape (*batch, location_size).
        log_width: Predicted log width, of shape (*batch, width_size).
        lower: Strictly lower triangle of L⁻¹, of shape (*batch, d, d), or None.
        layers: Spline layers from the label towards the base.
        tail_bound: Bound of the tail, or None.
        shape: Predicted shapes of the blocks, of shape (*batch, ...), or None.
        profile: Predicted radial profiles of the blocks, of shape (*batch, ...), or None.
        warps: Predicted warps of each sphere, of shape (*batch, spheres, ...), or None.
        warp_count: Zonal warps of each sphere.
        reference: First guesses of the labels, of shape (*batch, D), or None.
        referenced: Which blocks, in the order of the flow, are relative to the reference.
    """

    space: Space
    scale: Scale
    location: Tensor
    log_width: Tensor
    lower: Tensor | None = None
    layers: tuple[BoundLayer, ...] = ()
    shape: Tensor | None = None
    profile: Tensor | None = None
    warps: Tensor | None = None
    warp_count: int = 0
    reference: Tensor | None = None
    referenced: tuple[bool, ...] = ()
    tail_bound: float | None = None

    @property
    def batch_shape(self) -> Size:
        """Shape of the events."""
        return self.location.shape[:-1]

    @property
    def dof(self) -> int:
        """Base coordinates d."""
        return self.space.dof

    def _placements(self) -> Iterator[tuple[Block, Placement]]:
        blocks = self.space.blocks
        profiled = sum(b.space.has_profile for b in blocks)
        starts = [0, 0, 0, 0]
        sections = (self.location, self.log_width, self.shape, self.profile)
        for i, b in enumerate(blocks):
            width = self.profile.shape[-1] // profiled if self.profile is not None else 0
            s = b.space
            sizes = (s.location_size, s.width_size, s.shape_size, width * s.has_profile)
            parts = [
                None if t is None or not n else t[..., k : k + n]
                for t, k, n in zip(sections, starts, sizes, strict=True)
            ]
            starts = [k + n for k, n in zip(starts, sizes, strict=True)]
            location, log_width, shape, profile = parts
            assert location is not None
            assert log_width is not None
            reference = None
            if self.reference is not None and self.referenced[i]:
                reference = self.reference[..., b.columns]
            scale = Scale(*(t[b.base] for t in self.scale))
            yield b, Placement(location, log_width, scale, shape, profile, reference)

    def _warped(self, block: Block, z: Tensor, inverse: bool) -> tuple[Tensor, Tensor | float]:
        """Labels (..., D) through the warps of their block, and ladj for each coordinate."""
        if self.warps is None or not block.space.directional:
            return z, 0.0
        spheres = [b.base for b in self.space.blocks if b.space.directional]
        own = self.warps[..., spheres.index(block.base), :]
        z, ladj = (warp_inverse if inverse else warp)(z, own, self.warp_count)
        return z, ladj[..., None].to(own.dtype) / block.space.dof

    def _lean(self, v: Tensor) -> Tensor:
        if not self.space.compact_dof:
            return v
        return torch.cat([b.space.lean(v[..., b.base]) for b in self.space.blocks], -1)

    def _stretch(self, v: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        assert self.tail_bound is not None
        c = self.space.compact_dof
        out, ladj = (tail_inverse if inverse else tail)(v[..., c:], self.tail_bound)
        if not c:
            return out, ladj
        compact = v[..., :c]
        return torch.cat([compact, out], -1), torch.cat([torch.zeros_like(compact), ladj], -1)

    def _bent(self, v: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        """Coordinates through the spline layers, which see each block as it widens it."""
        blocks, compact = self.space.blocks, self.space.compact_dof
        start = v
        if compact:
            start = torch.cat([b.space.widen(v[..., b.base]) for b in blocks], -1)
        w, ladj = start, torch.zeros_like(v)
        for layer in reversed(self.layers) if inverse else self.layers:
            w, step = (layer.from_base if inverse else layer.to_base)(w, blocks)
            ladj = ladj + step
        if not compact:
            return w, ladj
        parts = [b.space.narrow(*(t[..., b.base] for t in (v, start, w, ladj))) for b in blocks]
        out, ladjs = zip(*parts, strict=True)
        return torch.cat(out, -1), torch.cat(ladjs, -1)

    def to_base(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Base coordinates (*sample, *batch, d) of labels (*sample, *batch, D), and ladj alike."""
        # full precision also under a user's autocast
        with torch.autocast(device_type=z.device.type, enabled=False):
            return self._to_base(z)

    def _to_base(self, z: Tensor) -> tuple[Tensor, Tensor]:
        parts = []
        for b, at in self._placements():
            label, growth = self._warped(b, z[..., b.columns], inverse=False)
            part, step = b.space.to_residual(label, at)
            parts.append((part, step + growth))
        v = torch.cat([v for v, _ in parts], -1)
        ladj = torch.cat([j for _, j in parts], -1)
        if self.lower is not None:
            v = v + _matvec(self.lower, self._lean(v))
        if self.tail_bound is not None:
            v, step = self._stretch(v, inverse=True)
            ladj = ladj + step
        if self.layers:
            v, step = self._bent(v, inverse=False)
            ladj = ladj + step
        return v, ladj

    def from_base(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Labels (*sample, *batch, D) of base coordinates, with the ladj of that direction."""
        with torch.autocast(device_type=u.device.type, enabled=False):
            return self._from_base(u)

    def _from_base(self, u: Tensor) -> tuple[Tensor, Tensor]:
        ladj = torch.zeros_like(u)
        if self.layers:
            u, step = self._bent(u, inverse=True)
            ladj = ladj + step
        if self.tail_bound is not None:
            u, step = self._stretch(u, inverse=False)
            ladj = ladj + step
        if self.lower is not None:
            u = self._solve(u)
        z: list[Any] = []
        steps = []
        for b, at in self._placements():
            part, step = b.space.from_residual(u[..., b.base], at)
            part, growth = self._warped(b, part, inverse=True)
            z.append((b.columns.start, part))
            steps.append(step + growth)
        labels = torch.cat([part for _, part in sorted(z, key=lambda p: p[0])], -1)
        return labels, ladj + torch.cat(steps, -1)

    def _solve(self, t: Tensor) -> Tensor:
        """Solve v + lower · lean(v) = t by forward substitution: d small steps for all draws.

        Compact blocks come first and lean on nothing, so their rows of t are those of v.
        """
        assert self.lower is not None
        columns: list[Tensor] = list(self._lean(t).unbind(-1))
        out = list(t.unbind(-1))
        for i in range(self.space.compact_dof, len(out)):
            for j in range(i):
                out[i] = out[i] - self.lower[..., i, j] * columns[j]
            columns[i] = out[i]
        return torch.stack(out, -1)

    def _map(self, change: Callable[[Tensor, int], Tensor]) -> BoundFlow:
        """Change the tensors of all events; the int counts their trailing event dimensions."""
        return replace(
            self,
            location=change(self.location, 1),
            log_width=change(self.log_width, 1),
            lower=None if self.lower is None else change(self.lower, 2),
            shape=None if self.shape is None else change(self.shape, 1),
            profile=None if self.profile is None else change(self.profile, 1),
            warps=None if self.warps is None else change(self.warps, 2),
            reference=None if self.reference is None else change(self.reference, 1),
            layers=tuple(
                replace(
                    s,
                    skip=change(s.skip, 2),
                    hidden=change(s.hidden, 2),
                    keep=None if s.keep is None else change(s.keep, 2),
                )
                for s in self.layers
            ),
        )

    def apply(self, change: Callable[[Tensor], Tensor]) -> BoundFlow:
        """Change every tensor, those that all events share included."""
        flow = self._map(lambda t, _: change(t))
        return replace(
            flow,
            scale=Scale(*(change(t) for t in self.scale)),
            layers=tuple(
                replace(s, inner=change(s.inner), outer=change(s.outer)) for s in flow.layers
            ),
        )

    def __getitem__(self, index: Any) -> BoundFlow:
        """The flow of the events at an index into the batch."""
        if index is None or index is Ellipsis or isinstance(index, tuple):
            numbers = torch.arange(self.batch_shape.numel(), device=self.location.device)
            chosen = numbers.view(self.batch_shape)[index]
            rows = self.flatten()[chosen.reshape(-1)]
            return rows._map(lambda t, n: t.reshape(*chosen.shape, *t.shape[t.ndim - n :]))
        return self._map(lambda t, _: t[index])

    def expand(self, shape: Size) -> BoundFlow:
        """The flow expanded to another batch shape."""
        return self._map(lambda t, n: t.expand(*shape, *t.shape[t.ndim - n :]))

    def flatten(self) -> BoundFlow:
        """The flow with one batch dimension."""
        return self._map(lambda t, n: t.reshape(-1, *t.shape[t.ndim - n :]))

    def relabelled(self, space: Space) -> BoundFlow:
        """The flow of the same leaves in the same order, whose label columns stand otherwise."""
        reference = self.reference
        if reference is not None:
            old, reference = reference, torch.empty_like(reference)
            for own, other in zip(self.space.blocks, space.blocks, strict=True):
                reference[..., other.columns] = old[..., own.columns]
        return replace(self, space=space, reference=reference)

    def leading(self, count: int) -> BoundFlow:
        """The exact flow of the first blocks alone, with their labels in the order of the flow."""
        blocks = self.space.blocks[:count]
        d = blocks[-1].base.stop
        f = sum(b.space.feature_size for b in blocks)
        layers = tuple(
            replace(
                s,
                groups=[g for g in s.groups if g[0] < d],
                skip=s.skip[..., :d, :],
                hidden=s.hidden[..., :d, :],
                inner=s.inner[:d, :f],
                outer=s.outer[:d],
                keep=None if s.keep is None else s.keep[..., :d, :],
            )
            for s in self.layers
        )
        space = blocks[0].space if count == 1 else Product(**{b.name: b.space for b in blocks})
        shapes = sum(b.space.shape_size for b in blocks)
        profiles = sum(b.space.has_profile for b in blocks)
        profiled = sum(b.space.has_profile for b in self.space.blocks)
        spheres = sum(b.space.directional for b in blocks)
        reference = self.reference
        if reference is not None:
            reference = torch.cat([reference[..., b.columns] for b in blocks], -1)
        return replace(
            self,
            space=space,
            scale=Scale(*(t[:d] for t in self.scale)),
            location=self.location[..., : sum(b.space.location_size for b in blocks)],
            log_width=self.log_width[..., : sum(b.space.width_size for b in blocks)],
            lower=None if self.lower is None else self.lower[..., :d, :d],
            layers=layers,
            shape=None if self.shape is None or not shapes else self.shape[..., :shapes],
            profile=(
                self.profile[..., : self.profile.shape[-1] // profiled * profiles]
                if self.profile is not None and profiles
                else None
            ),
            warps=None if self.warps is None or not spheres else self.warps[..., :spheres, :],
            reference=reference,
            referenced=self.referenced[:count],
        )


def _matvec(lower: Tensor, v: Tensor) -> Tensor:
    if v.ndim == lower.ndim - 1:
        return (lower @ v.unsqueeze(-1)).squeeze(-1)
    return torch.einsum("...ij,...j->...i", lower, v)
