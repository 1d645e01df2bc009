r"""Monotone rational-quadratic splines through given knots, many at once, and their inverse.

With knots :math:`(x_k, y_k)` and slopes :math:`d_k > 0`, :math:`w = x_{k+1} - x_k`,
:math:`s = (y_{k+1} - y_k) / w` and :math:`\theta = (x - x_k) / w`,

.. math:: y = y_k + \frac{w s \,[s \theta^2 + d_k \theta (1 - \theta)]}{e}, \qquad
          \ln y' = 2 \ln s + \ln [d_{k+1} \theta^2 + 2 s \theta (1 - \theta) + d_k (1 - \theta)^2]
                   - 2 \ln e, \qquad e = s + (d_{k+1} + d_k - 2 s)\, \theta (1 - \theta),

rising for all positive slopes, with a continuous derivative. Beyond the outer knots it goes on
straight.

Source: *Piecewise rational quadratic interpolation to monotonic data*, J. A. Gregory,
R. Delbourgo, 1982, https://doi.org/10.1093/imanum/2.2.123.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Knots", "Monotone"]


class Knots(NamedTuple):
    """Knots and slopes of rising maps, each of shape (..., M)."""

    x: Tensor
    y: Tensor
    slope: Tensor


class _Piece(NamedTuple):
    """Between which knots a value lies, and the outer slopes and ends; each like the value."""

    start: Tensor
    width: Tensor
    low: Tensor
    height: Tensor
    first: Tensor
    last: Tensor
    inside: Tensor
    outer: Tensor


@dataclass(frozen=True)
class Monotone:
    """Rising maps for K bins of events and C coordinates.

    Attributes:
        knots: Knots of shape (K, C, M), M ≥ 2.
    """

    knots: Knots

    def __call__(self, v: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Maps of values (*sample, *batch, C) of events in bins (*batch), and ln slope alike."""
        return _forward(v, self._piece(v, place, self.knots.x))

    def inverse(self, y: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        """Values that are mapped to y, and ln slope of the map there."""
        p = self._piece(y, place, self.knots.y)
        slope = p.height / p.width
        part = p.inside - p.low
        bend = p.first + p.last - 2 * slope
        a = p.height * (slope - p.first) + part * bend
        b = p.height * p.first - part * bend
        c = -slope * part
        # positive for a rising spline, but for rounding
        root = (b.square() - 4 * a * c).clamp_min(torch.finfo(y.dtype).tiny).sqrt()
        theta = (2 * c / (-b - root)).clamp(0, 1)
        v = p.start + theta * p.width + (y - p.inside) / p.outer
        return v, _log_slope(theta, slope, p)

    def select(self, coordinates: slice) -> Monotone:
        """The maps of some coordinates."""
        return Monotone(Knots(*(t[:, coordinates] for t in self.knots)))

    def apply(self, change: Callable[[Tensor], Tensor]) -> Monotone:
        """The maps with their tensors changed."""
        return Monotone(Knots(*(change(t) for t in self.knots)))

    def _piece(self, v: Tensor, place: Tensor, ladder: Tensor) -> _Piece:
        _, coordinates, count = ladder.shape
        x, y, slope = (t.to(v.dtype).reshape(-1) for t in self.knots)
        steps = x if ladder is self.knots.x else y
        own = torch.arange(coordinates, device=place.device)
        start = (place.unsqueeze(-1) * coordinates + own) * count
        end = start + count - 1
        inside = v.clamp(steps[start], steps[end])
        at = torch.zeros_like(v, dtype=torch.int64)
        step = 1 << (count - 1).bit_length()
        while step := step // 2:
            trial = (at + step).clamp_max(count - 2)
            at = torch.where(inside >= steps[start + trial], trial, at)
        at = at + start
        low, high = (x[at], y[at]), (x[at + 1], y[at + 1])
        return _Piece(
            low[0],
            high[0] - low[0],
            low[1],
            high[1] - low[1],
            slope[at],
            slope[at + 1],
            inside,
            torch.where(v > inside, slope[end], slope[start]),
        )


def _forward(v: Tensor, p: _Piece) -> tuple[Tensor, Tensor]:
    slope = p.height / p.width
    theta = (p.inside - p.start) / p.width
    mixed = theta * (1 - theta)
    bottom = slope + (p.first + p.last - 2 * slope) * mixed
    y = p.low + p.height * (slope * theta.square() + p.first * mixed) / bottom
    return y + p.outer * (v - p.inside), _log_slope(theta, slope, p)


def _log_slope(theta: Tensor, slope: Tensor, p: _Piece) -> Tensor:
    mixed = theta * (1 - theta)
    bottom = slope + (p.first + p.last - 2 * slope) * mixed
    top = p.last * theta.square() + 2 * slope * mixed + p.first * (1 - theta).square()
    return 2 * slope.log() + top.log() - 2 * bottom.log()


def stacked(rows: Sequence[Sequence[Knots]], count: int) -> Knots:
    """Knots (K, C, M) of K bins of C maps each, whose straight ends are filled with M knots."""
    filled = [[_filled(knots, count) for knots in row] for row in rows]
    return Knots(
        *(torch.stack([torch.stack([k[i] for k in row]) for row in filled]) for i in range(3))
    )


def _filled(knots: Knots, count: int) -> Knots:
    missing = count - len(knots.x)
    more = torch.arange(1, missing + 1, dtype=knots.x.dtype)
    # both x and y far enough apart to differ in single precision
    span = torch.maximum(knots.x[-1] - knots.x[0], (knots.y[-1] - knots.y[0]) / knots.slope[-1])
    step = span / len(knots.x)
    x = torch.cat([knots.x, knots.x[-1] + more * step])
    y = torch.cat([knots.y, knots.y[-1] + more * step * knots.slope[-1]])
    return Knots(x, y, torch.cat([knots.slope, knots.slope[-1:].expand(missing)]))
