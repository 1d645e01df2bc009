"""The width of every label of a posterior, in the sense of its space."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..spaces import Circle, Space

__all__ = ["label_widths"]

_LEVEL = 0.682689
_CHUNK = 2**20


def label_widths(posterior: Any, draws: int) -> dict[str, Tensor]:
    """Width of each label of N events by name, each of shape (N,).

    It is the length of the central 68.27 % interval of a column or an angle, and the opening angle
    about the mean that holds 68.27 % of a direction, in radians.

    Arguments:
        posterior: Posteriors of N events, with a label space.
        draws: Draws S of each event, from a fixed seed.
    """
    if getattr(posterior, "_exact_line", bool)():
        low, high = posterior.interval(_LEVEL)
        return {posterior.space.names[0]: (high - low)[:, 0]}
    generator = torch.Generator().manual_seed(0)
    columns = posterior.event_shape.numel()
    events = posterior.batch_shape[0]
    step = max(1, _CHUNK // (draws * columns))
    parts = []
    for start in range(0, events, step):
        some = posterior if step >= events else posterior[slice(start, start + step)]
        parts.append(_widths(some.space, some.sample((draws,), generator=generator)))
    return {name: torch.cat([p[name] for p in parts]) for name in parts[0]}


def _widths(space: Space, z: Tensor) -> dict[str, Tensor]:
    """Widths by name, each (n,), of draws (S, n, D)."""
    found: dict[str, Tensor] = {}
    edges = z.new_tensor([(1 - _LEVEL) / 2, (1 + _LEVEL) / 2])
    for block in sorted(space.blocks, key=lambda b: b.columns.start):
        own, kind = z[..., block.columns], block.space
        names = space.names[block.columns]
        if kind.directional:
            mean = kind.mean(own)
            angle = 2 * torch.atan2((own - mean).norm(dim=-1), (own + mean).norm(dim=-1))
            found[f"angle of {block.name or 'direction'}"] = torch.quantile(angle, _LEVEL, 0)
            continue
        if isinstance(kind, Circle) and kind.vector:
            own = torch.atan2(own[..., 1], own[..., 0])[..., None]
            kind, names = Circle(), (f"angle of {block.name or 'direction'}",)
        low, high = torch.quantile(kind.unwrap(own), edges, dim=0)
        for i, name in enumerate(names):
            found[name] = (high - low)[..., i]
    return found
