r"""The residual flow: the ladder of heads, from a mean to a spline posterior.

From the base to the label,

.. math:: z = \mathrm{chart}\big( m(c) + s(c) \odot L(c)\, t(\mathrm{splines}(u; c)) \big),
          \qquad u \sim N(0, I_d).

Splines work on residuals of order one whatever the ratio of posterior width to prior width, for
location and scale are predicted. ``"affine"`` has no splines and no tail, ``"diagonal"`` also L = 1
and ``"mse"`` a width that does not depend on the context; each rung contains the one below it.

One matrix product takes the context to all parameters of an event: `ResidualFlow.forward` gives a
`BoundFlow`, and evaluating or drawing never touches the context again.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import check_positive_int
from ..spaces import Scale, Space
from .bound import BoundFlow, BoundLayer
from .spline import Conditioner, groups_of, hidden_init
from .warps import warp_size

__all__ = ["ResidualFlow", "RUNGS"]

RUNGS = ("mse", "diagonal", "affine", "spline")
_LARGEST_LOG_WIDTH = 14.0
# Training steps for which the splines of circles and spheres wait, and then grow in as many. They
# reach everywhere: begun at once they take what should be the location's, and the training stays
# where no axis points at the data (measured by benchmarks/directions.py widths). `fit` has them
# wait a tenth of the training: of a long one the rate is still low so early, and axes stayed 20°
# off the centre of a ring (benchmarks/directions.py shapes --conditional --only ring).
_WAIT = 300


class ResidualFlow(nn.Module):
    """All parameters of a flow from one matrix product with the context.

    Arguments:
        space: The label space.
        context: Features L of the context; 0 for an unconditional density.
        rung: `"mse"`, `"diagonal"`, `"affine"` or `"spline"`.
        layers: Spline layers.
        bins: Bins K of a spline.
        hidden: Hidden units H of each coordinate's conditioner.
        coupling: Condition half a block on the other half instead of each coordinate on the
            earlier ones: faster draws at many labels.
        dropout: Share of conditioner units dropped in training, drawn once per event.
        bound: Splines are the identity beyond it.
        tail_bound: The tail begins here.
        warps: Zonal warps of each sphere, for fine structure all over the sky.

    Raises:
        ValueError: If an option is out of its range.
    """

    waited: Tensor | None

    def __init__(
        self,
        space: Space,
        context: int,
        rung: str,
        *,
        layers: int,
        bins: int,
        hidden: int,
        coupling: bool = False,
        dropout: float = 0.0,
        bound: float = 5.0,
        tail_bound: float = 5.0,
        warps: int = 0,
        wait: int | None = None,
    ) -> None:
        super().__init__()
        if rung not in RUNGS:
            raise ValueError(f"Expected flow as one of {', '.join(RUNGS)}; got {rung!r}.")
        self.space, self.rung = space, rung
        self.context = check_positive_int(context, "context", minimum=0)
        self.bins = check_positive_int(bins, "bins", minimum=2)
        self.hidden = check_positive_int(hidden, "hidden")
        self.bound, self.tail_bound = bound, tail_bound
        self.dropout = dropout
        self.warps = check_positive_int(warps, "warps", minimum=0)
        self._spheres = sum(b.space.directional for b in space.blocks)
        if self.warps and (rung != "spline" or not self._spheres):
            raise ValueError(
                f"Expected warps=0 unless the flow is 'spline' and a label is a Sphere; got "
                f"{warps} for {rung!r} on {space!r}."
            )
        d, spline_size = space.dof, 3 * bins - 1
        count = (
            check_positive_int(layers, "layers", minimum=int(not warps)) if rung == "spline" else 0
        )
        self.conditioners = nn.ModuleList(
            Conditioner(space, groups_of(space, coupling, bool(i % 2)), hidden, spline_size)
            for i in range(count)
        )
        pairs = [(i, j) for i in range(space.compact_dof, d) for j in range(i)]
        self._pairs = pairs if rung in ("affine", "spline") else []
        shapes = sum(b.space.shape_size for b in space.blocks) * (rung in ("affine", "spline"))
        profiles = sum(b.space.has_profile for b in space.blocks) * (rung == "spline")
        self._sections = [space.location_size, space.width_size * (rung != "mse")]
        self._sections += [len(self._pairs), shapes, *[d * spline_size, d * hidden] * count]
        warped = warp_size(self.warps, bins) if self.warps else 0
        self._sections += [profiles * (3 * bins + 1), self._spheres * warped]
        size = sum(self._sections)
        first = sum(self._sections[:4])
        self.weight = nn.Parameter(torch.zeros(first, context)) if context else None
        # apart from the others, for a training that lets them decay faster
        self.spline_weight = (
            nn.Parameter(torch.zeros(size - first, context)) if context and size > first else None
        )
        self.bias = nn.Parameter(torch.zeros(size))
        self.log_width = nn.Parameter(torch.zeros(space.width_size)) if rung == "mse" else None
        # steps of training done, in units of those for which splines wait
        late = bool(context and count and space.compact_dof)
        self.register_buffer("waited", torch.zeros(()) if late else None)
        self.wait = _WAIT if wait is None else wait
        with torch.no_grad():
            start = 0
            for _ in range(count):
                start += d * spline_size
                rows = slice(start, start + d * hidden)
                if self.spline_weight is not None:
                    hidden_init(self.spline_weight[rows], context)
                self.bias[first:][rows].uniform_(-1, 1)
                start += d * hidden
            if self.warps:
                axes = self.bias[size - self._spheres * warped :].view(self._spheres, warped)
                axes[:, warped - 3 * self.warps :].normal_()

    def forward(
        self,
        context: Tensor | None,
        scale: Scale,
        reference: Tensor | None = None,
        referenced: tuple[bool, ...] = (),
    ) -> BoundFlow:
        """Bind the flow to contexts of shape (*batch, L), or to none, and to their references."""
        if self.weight is None or context is None:
            theta = self.bias.clone()
            if context is not None:
                theta = theta.expand(*context.shape[:-1], -1)
        else:
            with torch.autocast(device_type=context.device.type, enabled=False):
                weight: Tensor = self.weight
                if self.spline_weight is not None:
                    weight = torch.cat([weight, self.spline_weight])
                theta = F.linear(context.to(weight.dtype), weight, self.bias)
        if reference is not None:
            theta = theta.expand(*reference.shape[:-1], -1)
        location, width, triangle, shape, *rest, profile, warps = theta.split(
            self._sections, dim=-1
        )
        if self.log_width is not None:
            width = self.log_width.expand(*theta.shape[:-1], -1)
        log_width = _LARGEST_LOG_WIDTH * torch.tanh(width / _LARGEST_LOG_WIDTH)
        share = self._share()
        if share is not None:
            profile = profile * share
        layers = []
        for i, module in enumerate(self.conditioners):
            assert isinstance(module, Conditioner)
            inner, outer = module.weights()
            skip = rest[2 * i].unflatten(-1, (self.space.dof, -1))
            if share is not None:
                outer, skip = outer * share, skip * share
            hidden = rest[2 * i + 1].unflatten(-1, (self.space.dof, -1))
            keep = None
            if self.training and self.dropout:
                # one mask for all coordinates of an event: a d-th of the random numbers
                keep = F.dropout(torch.ones_like(hidden[..., :1, :]), self.dropout)
                keep = keep.expand_as(hidden)
            layers.append(BoundLayer(module.groups, skip, hidden, inner, outer, self.bound, keep))
        return BoundFlow(
            self.space,
            scale,
            location,
            log_width,
            self._triangle(triangle) if self._pairs else None,
            tuple(layers),
            shape=shape if shape.shape[-1] else None,
            profile=profile if profile.shape[-1] else None,
            warps=warps.unflatten(-1, (self._spheres, -1)) if self.warps else None,
            warp_count=self.warps,
            reference=reference,
            referenced=referenced,
            tail_bound=self.tail_bound if self.rung == "spline" else None,
        )

    def _share(self) -> Tensor | None:
        """How much of the splines there is yet, or None for all of them; training goes on a step.

        The count is kept as `BatchNorm` keeps its own, so that it works in any training loop.
        """
        if self.waited is None:
            return None
        if self.training and torch.is_grad_enabled():
            self.waited += 1 / self.wait
        return (self.waited - 1).clamp(0, 1)

    def _triangle(self, entries: Tensor) -> Tensor:
        d = self.space.dof
        lower = entries.new_zeros(*entries.shape[:-1], d * d)
        index = torch.tensor([i * d + j for i, j in self._pairs], device=entries.device)
        return lower.index_copy(-1, index, entries).unflatten(-1, (d, d))

    def extra_repr(self) -> str:
        """Rung and sizes for `print(model)`."""
        parts = f"{self.rung}, context={self.context}, space={self.space!r}"
        if self.rung == "spline":
            parts += f", layers={len(self.conditioners)}, bins={self.bins}, hidden={self.hidden}"
        return parts
