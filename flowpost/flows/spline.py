r"""Conditional rational-quadratic spline layers at the base of the flow.

A layer takes coordinates :math:`v \in \mathbb{R}^d` one group after another. The spline of
coordinate i is set by the context and by the coordinates of earlier groups,

.. math:: \theta_i = a_i(c) + W_i\, \sigma\big(h_i(c) + V_i\, \phi(v_{<i})\big),

where a and h were projected from the context once per event, so that a posterior draw costs only
the small per-coordinate networks V and W, and an autoregressive inverse the arithmetic of one
forward pass. Zero a and W are the identity.

Source: *Neural Spline Flows*, C. Durkan, A. Bekasov, I. Murray, G. Papamakarios, 2019,
https://arxiv.org/abs/1906.04032.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._zuko import MonotonicRQSTransform
from ..spaces import Block, Space

__all__ = ["Conditioner", "base_features", "groups_of", "spline", "spline_inverse"]


class _Spline(MonotonicRQSTransform):
    """zuko's spline with an inverse that rounding cannot take out of its bin."""

    def _inverse(self, y: Tensor) -> Tensor:
        k = self.searchsorted(self.vertical, y) - 1
        mask, x0, x1, y0, y1, d0, d1, s = self.bin(k)
        y_ = mask * (y - y0)
        curvature = d0 + d1 - 2 * s
        a = (y1 - y0) * (s - d0) + y_ * curvature
        b = (y1 - y0) * d0 - y_ * curvature
        c = -s * y_
        # b² − 4ac is positive for a monotone spline; in float32 it can round to below zero
        root = (b**2 - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        x = x0 + (2 * c / (-b - root)).clamp(0, 1) * (x1 - x0)
        return torch.where(mask, x, y)


def _transform(parameters: Tensor, bins: int, bound: float) -> _Spline:
    widths, heights, slopes = parameters.split([bins, bins, bins - 1], dim=-1)
    return _Spline(widths, heights, slopes, bound=bound)


def spline(v: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Splines of coordinates (..., n) with parameters (..., n, 3K − 1), and ladj (..., n)."""
    return _transform(parameters, (parameters.shape[-1] + 1) // 3, bound).call_and_ladj(v)


def spline_inverse(u: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Inverse of `spline`, with the ladj (..., n) of that direction."""
    transform = _transform(parameters, (parameters.shape[-1] + 1) // 3, bound)
    v = transform.inv(u)
    return v, -transform.call_and_ladj(v)[1]


def base_features(v: Tensor, blocks: Sequence[Block]) -> Tensor:
    """Features by which coordinates (..., d) condition those of later groups."""
    return torch.cat([b.space.condition(v[..., b.base]) for b in blocks], -1)


def groups_of(space: Space, coupling: bool, reverse: bool) -> list[list[int]]:
    """Groups of base coordinates in the order in which a layer takes them.

    Blocks keep their order; within a block the coordinates are taken one by one (autoregressive) or
    as two halves (coupling), from the other end where `reverse` is set.
    """
    groups: list[list[int]] = []
    for block in space.blocks:
        index = list(range(block.base.start, block.base.stop))
        if coupling and len(index) > 1:
            half = (len(index) + 1) // 2
            parts = [index[:half], index[half:]]
        else:
            parts = [[i] for i in index]
        groups += parts[::-1] if reverse else parts
    return groups


class Conditioner(nn.Module):
    """The small networks that show earlier coordinates to the splines of later ones.

    Arguments:
        space: The label space.
        groups: Groups of coordinates, from `groups_of`.
        hidden: Hidden units H of each coordinate.
        size: Spline parameters P of each coordinate.
    """

    mask: Tensor

    def __init__(self, space: Space, groups: list[list[int]], hidden: int, size: int) -> None:
        super().__init__()
        self.groups = groups
        # for each feature the coordinates that it tells of, and the block it is kept to or from
        owner: list[tuple[list[int], int | None, int | None]] = []
        for k, b in enumerate(space.blocks):
            whole, own = list(range(b.base.start, b.base.stop)), b.space.own_size
            for i in range(b.space.feature_size):
                if not b.space.compact:
                    owner.append(([b.base.start + i], None, None))
                elif i < own:
                    owner.append(([b.base.start + i], k, None))
                else:
                    owner.append((whole, None, k))
        block_of = [k for k, b in enumerate(space.blocks) for _ in range(b.space.dof)]
        mask = torch.zeros(space.dof, len(owner), 1)
        rank = {i: r for r, group in enumerate(groups) for i in group}
        for i in range(space.dof):
            for f, (sources, kept_to, kept_from) in enumerate(owner):
                seen = kept_to in (None, block_of[i]) and kept_from != block_of[i]
                mask[i, f] = float(seen and all(rank[j] < rank[i] for j in sources))
        self.register_buffer("mask", mask, persistent=False)
        fan_in = mask.sum(1, keepdim=True).clamp_min(1)
        bound = 1 / fan_in.sqrt()
        self.inner = nn.Parameter((2 * torch.rand(space.dof, len(owner), hidden) - 1) * bound)
        self.outer = nn.Parameter(torch.zeros(space.dof, hidden, size))

    def weights(self) -> tuple[Tensor, Tensor]:
        """Masked inner (d, F, H) and outer (d, H, P) weights."""
        return self.inner * self.mask, self.outer.clone()


def condition(
    skip: Tensor,
    hidden: Tensor,
    features: Tensor,
    inner: Tensor,
    outer: Tensor,
    keep: Tensor | None = None,
) -> Tensor:
    """Spline parameters (..., n, P) of n coordinates.

    Arguments:
        skip: From the context alone, (..., n, P).
        hidden: Pre-activations from the context, (..., n, H).
        features: Features of all coordinates, (..., F); later ones meet zero weights.
        inner: (n, F, H).
        outer: (n, H, P).
        keep: Dropout factors of the hidden units, (..., n, H), drawn once per event.
    """
    n, f, h = inner.shape
    flat = features @ inner.permute(1, 0, 2).reshape(f, n * h)
    active = F.silu(hidden + flat.unflatten(-1, (n, h)))
    if keep is not None:
        active = active * keep
    lead = active.shape[:-2]
    out = torch.bmm(active.reshape(-1, n, h).transpose(0, 1), outer)
    return skip + out.transpose(0, 1).reshape(*lead, n, outer.shape[-1])


def hidden_init(weight: Tensor, features: int) -> None:
    """Initialise the context's weights (…, L) of hidden units in place, as a linear layer's."""
    if features:
        nn.init.uniform_(weight, -1 / math.sqrt(features), 1 / math.sqrt(features))
