r"""The marginal posterior of some labels of a product.

The flow is block-triangular, so the leading blocks have an exact density. A later block B has

.. math:: q(z_B|x) = \frac{1}{S} \sum_s q(z_B \,|\, z_{<B}^{(s)}, x), \qquad
          z_{<B}^{(s)} \sim q(z_{<B}|x),

a normalised mixture over a fixed set of draws of the earlier blocks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .._checks import check_positive_int
from ..flows import BoundFlow
from ..spaces import Product, Scale, Space
from .base import Posterior, log_density
from .statistics import CHUNK

__all__ = ["BlockPosterior", "block_posterior"]


def block_posterior(posterior: Posterior, name: str, draws: int) -> Posterior:
    """The marginal of a block; see `Posterior.block`."""
    blocks = posterior.space.blocks
    offset = posterior._first if isinstance(posterior, BlockPosterior) else 0
    chosen = [i for i, b in enumerate(blocks) if b.within(name)]
    if not chosen or not isinstance(posterior.space, Product):
        known = ", ".join(b.name for b in blocks if b.name) or "none: the space is no Product"
        raise ValueError(f"Expected the name of a block; got {name!r}. Blocks are {known}.")
    first, last = chosen[0], chosen[-1] + 1
    if len(chosen) != last - first:
        raise ValueError(
            f"Expected the parts of {name!r} to stand together in the flow; its order is "
            f"{', '.join(b.name for b in blocks)}. Ask for its parts one by one."
        )
    own = blocks[first:last]
    declared = sorted(own, key=lambda b: b.columns.start)
    space: Space = (
        own[0].space
        if own[0].name == name
        else Product(**{b.name.removeprefix(f"{name}."): b.space for b in declared})
    )
    flow = posterior._flow.leading(offset + last)
    if offset + first == 0:
        return Posterior(flow.relabelled(space), validate_args=posterior._validate_args)
    draws = check_positive_int(draws, "draws")
    return BlockPosterior(flow, offset + first, space, draws, posterior._validate_args)


class BlockPosterior(Posterior):
    """The marginal of a block that is not the flow's first: a mixture of exact conditionals.

    Arguments:
        flow: The flow of this block and all earlier ones.
        first: Index of the first leaf of the block.
        space: The label space of the block.
        draws: Draws S of the earlier blocks.
        validate_args: Whether labels are checked.
    """

    def __init__(
        self,
        flow: BoundFlow,
        first: int,
        space: Space,
        draws: int,
        validate_args: bool | None = None,
    ) -> None:
        blocks = flow.space.blocks
        self._flow, self._first, self._draws = flow, first, draws
        self._skip = slice(blocks[first].base.start, blocks[-1].base.stop)
        own = blocks[first:]
        self._own = space
        # the flow's columns stand in its own order, those of the block as declared
        columns = range(own[0].columns.start, own[-1].columns.stop)
        order = [c for b in space.blocks for c in range(b.columns.start, b.columns.stop)]
        self._order = order
        self._columns = [columns[order.index(c)] for c in range(len(order))]
        Distribution.__init__(
            self, flow.batch_shape, Size([self._own.label_size]), validate_args=validate_args
        )

    @property
    def space(self) -> Space:
        """The label space of the block."""
        return self._own

    @property
    def _scale(self) -> Scale:
        return Scale(*(t[self._skip] for t in self._flow.scale))

    def _evaluate(self, z: Tensor) -> Tensor:
        lead = z.shape[:-1]
        batch = lead[len(lead) - len(self.batch_shape) :]
        events = batch.numel()
        flow, z = (
            self._flow.expand(batch).flatten(),
            z.reshape(lead[: len(lead) - len(batch)].numel(), events, z.shape[-1]),
        )
        earlier = Posterior(flow.leading(self._first), validate_args=False)
        u = earlier._base_draws(self._draws, None, central=False)
        columns = []
        n = max(1, min(events, CHUNK // (self._draws * flow.dof)))
        m = max(1, CHUNK // (self._draws * flow.dof * n))
        for i in range(0, max(1, events), n):
            part = flow if n == events else flow[i : i + n]
            size = part.batch_shape[0]
            before, _ = part.leading(self._first).from_base(u.expand(-1, size, -1))
            before = before.unsqueeze(1)
            pieces = []
            for j in range(0, max(1, len(z)), m):
                own = z[None, j : j + m, i : i + n][..., self._order].expand(
                    self._draws, -1, -1, -1
                )
                whole = torch.cat([before.expand(-1, own.shape[1], -1, -1), own], -1)
                terms = log_density(*part.to_base(whole))[..., self._skip].sum(-1)
                pieces.append(torch.logsumexp(terms, 0) - math.log(self._draws))
            columns.append(torch.cat(pieces, 0))
        return torch.cat(columns, 1).reshape(lead)

    def _decode_labels(self, u: Tensor) -> Tensor:
        return super()._decode_labels(u)[..., self._columns]

    def _decode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        z = self._decode_labels(u)
        return z, self._evaluate(z)

    def _refuse(self, what: str) -> ValueError:
        return ValueError(
            f"The marginal of a later block is a mixture and has no {what}. Use that of the whole "
            "posterior, whose columns of the block are exact given the earlier blocks, or "
            "diagnostics.hpd_coverage of the block."
        )

    def to_base(self, value: Any) -> Tensor:
        """Refused: a mixture has no base coordinates.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise self._refuse("base coordinates")

    def to_base_and_log_prob(self, value: Any) -> tuple[Tensor, Tensor]:
        """Refused: a mixture has no base coordinates.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise self._refuse("base coordinates")

    def from_base(self, u: Any) -> Tensor:
        """Refused: a mixture has no base coordinates.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise self._refuse("base coordinates")

    def cdf(self, value: Any) -> Tensor:
        """Refused: see `to_base`.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise self._refuse("closed distribution function")

    icdf = cdf

    def _exact_line(self) -> bool:
        return False
