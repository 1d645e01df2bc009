r"""Newton's method with a line search, for many minimisations of one function at once.

A step is

.. math:: \Delta = - |H|^{-1} g, \qquad |H| = V |\Lambda| V^T \text{ of } H = V \Lambda V^T ,

which goes down also where the Hessian is not positive definite, and is halved until the function
falls by a part of what the slope promises (Armijo). The search ends where the Newton decrement
:math:`g^T H^{-1} g`, twice what a parabola still has to fall, is small.

Source: J. Nocedal, S. Wright, *Numerical Optimization*, 2006, sections 3.1 and 3.4.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Minimum", "derivatives", "minimise"]

_ENOUGH, _HALVINGS = 1e-4, 50
# of the decrement, before the last step and behind it
_TOLERANCE, _ACCEPTED = 1e-9, 1e-6
# smallest eigenvalue over the largest
_SINGULAR = 1e-13


class Minimum(NamedTuple):
    """Where M minimisations ended.

    Attributes:
        at: Parameters (M, P).
        value: Values of the function (M,).
        slope: Its gradient (M, P).
        curve: Its Hessian (M, P, P).
        converged: Whether it is a minimum (M,).
    """

    at: Tensor
    value: Tensor
    slope: Tensor
    curve: Tensor
    converged: Tensor


def derivatives(function: Callable[[Tensor], Tensor], at: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values (M,), gradients (M, P) and Hessians (M, P, P) at points (M, P).

    Arguments:
        function: Points (M, P) to values (M,), each of its own point alone.
        at: The points.
    """
    at = at.detach().requires_grad_()
    with torch.enable_grad():
        value = function(at)
        (slope,) = torch.autograd.grad(value.sum(), at, create_graph=True)
        size = at.shape[1]
        if not slope.requires_grad:
            return value.detach(), slope, at.new_zeros(*at.shape, size)
        basis = torch.eye(size, dtype=at.dtype)[:, None].expand(size, *at.shape)
        (curve,) = torch.autograd.grad(slope, at, basis, is_grads_batched=True)
    return value.detach(), slope.detach(), curve.transpose(0, 1)


def minimise(
    function: Callable[[Tensor], Tensor],
    start: Tensor,
    unit: Tensor,
    free: Tensor | None = None,
    *,
    steps: int = 100,
) -> Minimum:
    """Minimise from M starting points at once.

    Arguments:
        function: Points (M, P) to values (M,), each of its own point alone; infinite where it is
            not defined.
        start: The starting points (M, P). One where the function is infinite stays where it is.
        unit: The scale of every parameter (P,).
        free: Which parameters (M, P) move; by default all.
        steps: Most steps.
    """
    at = start.detach().clone()
    moves = torch.ones_like(at, dtype=torch.bool) if free is None else free.expand_as(at)
    with torch.no_grad():
        rows = torch.isfinite(function(at)).nonzero()[:, 0]
    for _ in range(steps):
        if not len(rows):
            break
        value, slope, curve = derivatives(function, at[rows])
        step, decrement, _ = _direction(slope * unit, curve * unit[:, None] * unit, moves[rows])
        moved, stuck = _search(function, at[rows], value, step * unit, decrement)
        at[rows] = moved
        # below what is accepted, short steps are those of a function of few digits
        noise = (decrement < _ACCEPTED) & ((value - function(moved)) < 0.1 * decrement)
        rows = rows[(decrement > _TOLERANCE) & ~stuck & ~noise]
    value, slope, curve = derivatives(function, at)
    _, decrement, convex = _direction(slope * unit, curve * unit[:, None] * unit, moves)
    converged = torch.isfinite(value) & convex & (decrement < _ACCEPTED)
    return Minimum(at, value, slope, curve, converged)


def _direction(slope: Tensor, curve: Tensor, free: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Steps (M, P), Newton decrements (M,), and whether the free Hessian is positive (M,)."""
    g = torch.where(free, slope, 0.0).nan_to_num(0.0, 0.0, 0.0)
    both = free[:, :, None] & free[:, None, :]
    fixed = torch.diag_embed((~free).to(curve))
    h = (torch.where(both, curve, 0.0) + fixed).nan_to_num(0.0, 0.0, 0.0)
    values, vectors = torch.linalg.eigh(h)
    size = values.abs()
    least = _SINGULAR * size.amax(-1, keepdim=True).clamp_min(1e-300)
    along = (vectors.transpose(-1, -2) @ g[..., None])[..., 0]
    step = -(vectors @ (along / size.clamp_min(least))[..., None])[..., 0]
    return step, -(g * step).sum(-1), values[:, 0] > least[:, 0]


def _search(
    function: Callable[[Tensor], Tensor],
    at: Tensor,
    value: Tensor,
    step: Tensor,
    decrement: Tensor,
) -> tuple[Tensor, Tensor]:
    """The points (M, P) after the longest step that falls enough; whether there is none (M,)."""
    found, length = at.clone(), torch.ones_like(value)
    rows = torch.arange(len(at))
    slack = 1e-13 * (1 + value.abs())
    with torch.no_grad():
        for _ in range(_HALVINGS):
            there = at[rows] + length[rows, None] * step[rows]
            falls = value[rows] - function(there)
            good = falls + slack[rows] >= _ENOUGH * length[rows] * decrement[rows]
            found[rows[good]] = there[good]
            rows = rows[~good]
            length[rows] /= 2
            if not len(rows):
                break
    stuck = torch.zeros_like(value, dtype=torch.bool)
    stuck[rows] = True
    return found, stuck
