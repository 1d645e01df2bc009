r"""Masked autoregressive layers over many columns, fast in one direction.

A layer bends each column by a monotone map whose parameters a masked network reads off the columns
before it, on one side of the layer, and off the context,

.. math:: u_i = S\big((x_i - m_i)\, e^{-a_i};\, \theta_i\big), \qquad
          (m_i, a_i, \theta_i) = \mathrm{net}(x_{<i}, c) \quad \text{or} \quad
          \mathrm{net}(u_{<i}, c),

with a rational-quadratic spline S; the layer next to the data puts the inverse of the tail of
`flowpost.flows` before it, which bounds what an outlier costs. One that reads x goes from x
to u in one pass of the network, and back in as many as there are columns; one that reads u the
other way round. The context is projected once for all these passes.

Sources: *Masked autoregressive flow for density estimation*, G. Papamakarios, T. Pavlakou,
I. Murray, 2017, https://arxiv.org/abs/1705.07057; *Improving variational inference with inverse
autoregressive flow*, D. Kingma et al., 2016, https://arxiv.org/abs/1606.04934; *MADE: masked
autoencoder for distribution estimation*, M. Germain et al., 2015,
https://arxiv.org/abs/1502.03509.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_positive_int
from ..flows.tail import tail, tail_inverse
from .splines import bend

__all__ = ["MaskedFlow", "MaskedLayer", "Path"]

_BOUND = 5.0
_LARGEST_LOG_WIDTH = 7.0
_SQUASH = 4.0


class Path(NamedTuple):
    """Columns on their way through a flow.

    Attributes:
        states: Columns (..., F) from the data's side to the base, before and after each layer.
        ladj: ln |det| of the direction taken, shape (...).
        parameters: Those of each layer's maps, (..., F, P) each, from the data's side.
    """

    states: tuple[Tensor, ...]
    ladj: Tensor
    parameters: tuple[Tensor, ...]


class MaskedLayer(nn.Module):
    """Monotone maps of all columns, with a masked network for their parameters.

    Arguments:
        columns: F.
        context: Features L of the context.
        bins: Bins K of a spline.
        hidden: Units of a hidden layer.
        depth: Hidden layers.
        reverse: Take the columns from the last to the first.
        inverse: Let the network read the base's side, so that the fast direction is from it.
        tailed: Begin with the tail; one layer has it, for tails of tails would overflow.
    """

    input_mask: Tensor
    inner_mask: Tensor
    output_mask: Tensor

    def __init__(
        self,
        columns: int,
        context: int,
        *,
        bins: int,
        hidden: int,
        depth: int,
        reverse: bool,
        inverse: bool,
        tailed: bool,
    ) -> None:
        super().__init__()
        self.columns, self.size = columns, 3 * bins + 1
        self.inverse, self.tailed = inverse, tailed
        rank = torch.arange(columns)
        self.order = list(reversed(range(columns))) if reverse else list(range(columns))
        rank = rank.flip(0) if reverse else rank
        # a unit of degree k has seen the first k columns; in whole numbers, as no file holds masks
        # and machines may differ in how they round halves
        degree = (2 * (columns - 1) * torch.arange(hidden) + hidden - 1) // (2 * (hidden - 1))
        for name, mask in (
            ("input_mask", degree[:, None] > rank),
            # without inner layers there is nothing to mask
            ("inner_mask", degree[: hidden * (depth > 1), None] >= degree),
            ("output_mask", rank.repeat_interleave(self.size)[:, None] >= degree),
        ):
            self.register_buffer(name, mask.float(), persistent=False)
        self.input = nn.Linear(columns, hidden, bias=False)
        self.inner = nn.ModuleList(nn.Linear(hidden, hidden) for _ in range(depth - 1))
        self.output = nn.Linear(hidden, columns * self.size, bias=False)
        self.shown = nn.Linear(context, hidden)
        self.skip = nn.Linear(context, columns * self.size)
        for zero in (self.output.weight, self.skip.weight, self.skip.bias):
            nn.init.zeros_(zero)

    def project(self, context: Tensor) -> tuple[Tensor, Tensor]:
        """What the layer takes of contexts (..., L), for any number of passes."""
        return self.shown(context), self.skip(context)

    def parameters_of(self, seen: Tensor, projected: tuple[Tensor, Tensor]) -> Tensor:
        """Parameters (..., F, P) of the maps, from columns (..., F) of the side that is read."""
        shown, skip = projected
        inner = seen.clamp(-_SQUASH, _SQUASH)
        seen = inner + torch.asinh(seen - inner)
        h = F.silu(shown + F.linear(seen, self.input.weight * self.input_mask))
        for layer in self.inner:
            assert isinstance(layer, nn.Linear)
            h = h + F.silu(F.linear(h, layer.weight * self.inner_mask, layer.bias))
        out = skip + F.linear(h, self.output.weight * self.output_mask)
        return out.unflatten(-1, (self.columns, self.size))

    def fast(
        self, columns: Tensor, projected: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One pass: columns (..., F) on the other side, ladj (...), parameters (..., F, P)."""
        parameters = self.parameters_of(columns, projected)
        out, ladj = (_from_base if self.inverse else _to_base)(columns, parameters, self.tailed)
        return out, ladj.sum(-1), parameters

    def slow(self, columns: Tensor, projected: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """As many passes as there are columns: the inverse of `fast`, with its ladj (...)."""
        change = _to_base if self.inverse else _from_base
        found = torch.zeros_like(columns)
        ladj = torch.zeros_like(columns[..., 0])
        for i in self.order:
            parameters = self.parameters_of(found, projected)[..., i, :]
            value, step = change(columns[..., i], parameters, self.tailed)
            found = torch.cat([found[..., :i], value[..., None], found[..., i + 1 :]], -1)
            ladj = ladj + step
        return found, ladj


class MaskedFlow(nn.Module):
    """Masked autoregressive layers, every other one with the columns the other way round.

    Arguments:
        columns: F.
        context: Features L of the context.
        layers: Number of layers.
        bins: Bins K of a spline.
        hidden: Units of a hidden layer of each layer's network.
        depth: Hidden layers of it.
        inverse: Fast from the base to the data instead of the other way.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        columns: int,
        context: int,
        *,
        layers: int,
        bins: int,
        hidden: int,
        depth: int,
        inverse: bool = False,
    ) -> None:
        super().__init__()
        self.columns = check_positive_int(columns, "columns")
        check_positive_int(bins, "bins", minimum=2)
        check_positive_int(hidden, "hidden", minimum=2)
        check_positive_int(depth, "depth")
        self.inverse = inverse
        self.layers = nn.ModuleList(
            MaskedLayer(
                columns,
                context,
                bins=bins,
                hidden=hidden,
                depth=depth,
                reverse=bool(i % 2),
                inverse=inverse,
                tailed=i == 0,
            )
            for i in range(check_positive_int(layers, "layers"))
        )

    def project(self, context: Tensor) -> list[tuple[Tensor, Tensor]]:
        """What the layers take of contexts (..., L)."""
        return [layer.project(context) for layer in self._masked]

    @property
    def _masked(self) -> list[MaskedLayer]:
        return [layer for layer in self.layers if isinstance(layer, MaskedLayer)]

    def fast(self, columns: Tensor, projected: list[tuple[Tensor, Tensor]]) -> Path:
        """One pass through each layer: to the base, or from it if the flow is inverse."""
        states, parameters = [columns], []
        ladj = torch.zeros_like(columns[..., 0])
        pairs = list(zip(self._masked, projected, strict=True))
        for layer, shown in reversed(pairs) if self.inverse else pairs:
            columns, step, own = layer.fast(columns, shown)
            ladj = ladj + step
            states.append(columns)
            parameters.append(own)
        if self.inverse:
            states.reverse()
            parameters.reverse()
        return Path(tuple(states), ladj, tuple(parameters))

    def slow(
        self, columns: Tensor, projected: list[tuple[Tensor, Tensor]]
    ) -> tuple[Tensor, Tensor]:
        """The inverse of `fast`, F passes through each layer, with its ladj (...)."""
        ladj = torch.zeros_like(columns[..., 0])
        pairs = list(zip(self._masked, projected, strict=True))
        for layer, shown in pairs if self.inverse else reversed(pairs):
            columns, step = layer.slow(columns, shown)
            ladj = ladj + step
        return columns, ladj

    def log_base(self, u: Tensor) -> Tensor:
        """ln N(u; 0, I), shape (...)."""
        return -0.5 * (u.square().sum(-1) + self.columns * math.log(2 * math.pi))


def _log_width(parameters: Tensor) -> Tensor:
    return _LARGEST_LOG_WIDTH * torch.tanh(parameters[..., 1] / _LARGEST_LOG_WIDTH)


def _to_base(x: Tensor, parameters: Tensor, tailed: bool) -> tuple[Tensor, Tensor]:
    """Columns (...) towards the base, with parameters (..., P), and ladj (...)."""
    log_width = _log_width(parameters)
    v, stretch = (x - parameters[..., 0]) * torch.exp(-log_width), -log_width
    if tailed:
        v, step = tail_inverse(v, _BOUND)
        stretch = stretch + step
    u, ladj = bend(v, parameters[..., 2:], _BOUND)
    return u, ladj + stretch


def _from_base(u: Tensor, parameters: Tensor, tailed: bool) -> tuple[Tensor, Tensor]:
    """Inverse of `_to_base`, with the ladj of that direction."""
    log_width = _log_width(parameters)
    v, ladj = bend(u, parameters[..., 2:], _BOUND, inverse=True)
    if tailed:
        v, stretch = tail(v, _BOUND)
        ladj = ladj + stretch
    return parameters[..., 0] + v * torch.exp(log_width), ladj + log_width
