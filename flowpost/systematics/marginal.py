"""A mixture of posteriors over draws of the nuisances, as a distribution."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .._checks import as_tensor, central_levels, check_levels, check_positive_int
from .._events import chosen
from .._normal import ndtr
from ..model import PosteriorModel
from ..posterior import BlockPosterior, Posterior
from ..spaces import Space, SpaceConstraint

__all__ = ["Marginal", "on_a_line"]

_DRAWS = 1024
# numbers of contexts and labels that one pass holds
_CHUNK = 2**18
_HAS_NO = (
    "A Marginal is a mixture over nuisances and has no {}. It has log_prob, sample, mean, stddev, "
    "median, quantile, interval and entropy; draws q.sample((1000,)) have everything else."
)


class Marginal(Distribution):
    """A mixture of the posteriors of N events over draws of the nuisances.

    It has `log_prob`, `sample`, `sample_and_log_prob`, and from draws `mean`, `stddev`, `variance`,
    `median`, `quantile`, `interval` and `entropy`. As with a `Posterior`, `q[0]` or a slice is that
    of some events, and `q["energy"]` that of a block. There is no mode, and no gradient to draws.

    That of a single label on a line has a base coordinate, the normal quantile of its distribution
    function. Others have none: their coverage is that of highest-density regions,
    `diagnostics.hpd_coverage`.

    Arguments:
        model: A model whose encoder is a `ConditionedEncoder`.
        context: Contexts (N, L) of the encoder inside it.
        nu: Draws of the nuisances, of shape (S, N, k).
        reference: First guesses of the labels, as the head wants them.

    Attributes:
        batch_shape: (N,), or () of one event.
        event_shape: (D,).
    """

    arg_constraints = {}  # noqa: RUF012 (torch's interface)

    def __init__(
        self, model: PosteriorModel, context: Tensor, nu: Tensor, reference: Any = None
    ) -> None:
        self._model, self._context, self._nu, self._reference = model, context, nu, reference
        self._space, self._leading = model.head.space, True
        self._blocks: tuple[str, ...] = ()
        super().__init__(Size([len(context)]), Size([self._space.label_size]), validate_args=False)

    @property
    def space(self) -> Space:
        """The label space."""
        return self._space

    @property
    def support(self) -> SpaceConstraint:
        """The label space as a torch constraint."""
        return self.space.support

    @property
    def device(self) -> torch.device:
        """Device of the contexts."""
        return self._context.device

    @property
    def _rows(self) -> Tensor:
        """Indices of the events; one where there is no batch."""
        return torch.arange(len(self._context), device=self.device)

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("A posterior without batch dimensions has no length.")
        return len(self._context)

    def __getitem__(self, index: Any) -> Marginal:
        """The posteriors of a block (a name), or of some events: an index, a slice or a mask.

        That of a block is the mixture of the blocks of the components: those of the leading blocks
        of the flow have an exact density, a later one is a mixture itself, whose density is slow.

        Raises:
            ValueError: If no block has this name.
            IndexError: If there are no events to index.
        """
        if isinstance(index, str):
            one = self._rows[:1]
            block = self._bind(one, self._nu[0, :1])[index]
            new = copy.copy(self)
            new._space, new._blocks = block.space, (*self._blocks, index)
            new._leading = not isinstance(block, BlockPosterior)
            new._event_shape = block.event_shape
            return new
        if not self.batch_shape:
            raise IndexError(f"This posterior has no batch to index with {index!r}.")
        index = index.cpu() if isinstance(index, Tensor) else index
        rows = self._rows.cpu()[index]
        return self._taken(rows.reshape(-1), Size([rows.numel()] if rows.ndim else []))

    def _taken(self, rows: Tensor, batch_shape: Size) -> Marginal:
        """The same of other rows."""
        rows = rows.to(self.device)
        new = copy.copy(self)
        new._context, new._nu = self._context[rows], self._nu[:, rows]
        new._reference, new._batch_shape = chosen(self._reference, rows), batch_shape
        return new

    def expand(self, batch_shape: Sequence[int], _instance: object = None) -> Marginal:
        """The posterior of one event for as many events, (N,).

        Raises:
            ValueError: If it is of several events, or the shape is not (N,).
        """
        shape = Size(batch_shape)
        if shape == self.batch_shape:
            return self
        if len(shape) != 1 or len(self._context) != 1:
            raise ValueError(
                f"Expected one event and a shape (N,) to expand to; got {tuple(self.batch_shape)} "
                f"and {tuple(shape)}."
            )
        return self._taken(torch.zeros(shape, dtype=torch.int64), shape)

    def _bind(self, rows: Tensor, nu: Tensor) -> Posterior:
        """Posteriors of events (M,) at nuisances (M, k); labels are not checked again."""
        encoder: Any = self._model.encoder
        context = encoder.append(self._context[rows], nu)
        reference = chosen(self._reference, rows)
        q = self._model.head(context, reference=reference, validate_args=False)
        for name in self._blocks:
            q = q[name]
        return q

    def log_prob(self, value: Any) -> Tensor:
        """Log density (*sample, *batch_shape) in nats of labels (*sample, *batch_shape, D).

        Raises:
            ValueError: If a label is not in the space or the shape does not fit.
        """
        (total,) = self._mix(lambda q, z: (q.log_prob(z),), value)
        return total

    def _labels(self, value: Any) -> Tensor:
        """Checked labels (*sample, N, D)."""
        z = as_tensor(value, "labels", like=self._context).to(self.device)
        if self.event_shape[0] == 1 and z.shape[-1:] != (1,):
            z = z.unsqueeze(-1)
        z = self.space.validate(z)
        z = z if self.batch_shape else z.unsqueeze(-2)
        events = len(self._context)
        try:
            shape = torch.broadcast_shapes(z.shape[:-1], (events,))
        except RuntimeError:
            shape = Size()
        if shape[-1:] != (events,):
            raise ValueError(
                f"Expected labels of shape (..., {events}, {self.event_shape[0]}) for {self!r}; "
                f"got {tuple(torch.as_tensor(value).shape)}."
            )
        return z.expand(*shape, z.shape[-1])

    def _mix(self, function: Callable[[Posterior, Tensor], tuple[Tensor, ...]], value: Any) -> Any:
        """Logarithms of means over the components of what has logarithms (*sample, *batch)."""
        z = self._labels(value)
        lead = z.shape[:-1]
        flat = z.reshape(lead[:-1].numel(), *z.shape[-2:])
        step = max(1, _CHUNK // (max(1, len(flat)) * self.event_shape[0] + self._width))
        columns = []
        for part in self._rows.split(step):
            total: tuple[Tensor, ...] = ()
            for nu in self._nu:
                terms = function(self._bind(part, nu[part]), flat[:, part])
                total = tuple(map(torch.logaddexp, total, terms)) if total else terms
            columns.append(total)
        shape = lead if self.batch_shape else lead[:-1]
        whole = (torch.cat(c, 1).reshape(shape) for c in zip(*columns, strict=True))
        return tuple(t - math.log(len(self._nu)) for t in whole)

    @property
    def has_base(self) -> bool:
        """Whether labels have base coordinates: those of a single one on a line do."""
        return self._leading and on_a_line(self.space)

    def to_base_and_log_prob(self, value: Any) -> tuple[Tensor, Tensor]:
        """Base coordinate (*sample, *batch_shape, 1) and log density of a single label.

        Raises:
            ValueError: If there is more than one label, or it is an angle or of a later block.
        """
        if not self.has_base:
            raise ValueError(
                f"Expected a single label on a line; this is {self.space!r}"
                + (", a later block. " if not self._leading else ". ")
                + "A mixture of others has no base coordinates: use diagnostics.hpd_coverage."
            )

        def terms(q: Posterior, z: Tensor) -> tuple[Tensor, ...]:
            u, log_prob = q.to_base_and_log_prob(z)
            tails = (torch.special.log_ndtr(sign * u[..., 0]) for sign in (1, -1))
            return (log_prob, *tails)

        log_prob, below, above = self._mix(terms, value)
        # from the smaller tail, which keeps its digits
        tiny = torch.finfo(below.dtype).tiny
        u = torch.special.ndtri(torch.minimum(below, above).exp().clamp_min(tiny))
        return torch.where(below < above, u, -u).unsqueeze(-1), log_prob

    def to_base(self, value: Any) -> Tensor:
        """Base coordinate (*sample, *batch_shape, 1) of a single label.

        Raises:
            ValueError: If there is more than one label, or it is an angle or of a later block.
        """
        return self.to_base_and_log_prob(value)[0]

    def cdf(self, value: Any) -> Tensor:
        """Distribution function of a single label, of shape (*sample, *batch_shape).

        Raises:
            ValueError: If there is more than one label, or it is an angle.
        """
        return ndtr(self.to_base_and_log_prob(value)[0][..., 0])

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, *batch_shape, D), each at a draw of the nuisances at random."""
        count, events = Size(sample_shape).numel(), len(self._context)
        size = max(1, _CHUNK // (max(1, events) * self._width))
        rows = self._rows
        parts = []
        with torch.no_grad():
            for start in range(0, count, size):
                n = min(size, count - start)
                source = generator.device if generator is not None else self.device
                which = torch.randint(
                    len(self._nu), (n, events), generator=generator, device=source
                ).to(self.device)
                repeated = rows.repeat(n)
                q = self._bind(repeated, self._nu[which.reshape(-1), repeated])
                parts.append(q.sample((), generator=generator).unflatten(0, (n, events)))
        return torch.cat(parts).reshape(*sample_shape, *self.batch_shape, *self.event_shape)

    def sample_and_log_prob(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws (*sample_shape, *batch_shape, D) and their log density."""
        z = self.sample(sample_shape, generator)
        with torch.no_grad():
            return z, self.log_prob(z)

    @property
    def mean(self) -> Tensor:
        """Mean (*batch_shape, D) in the sense of the space, from 1024 seeded draws."""
        return self._moment(self.space.mean)

    @property
    def stddev(self) -> Tensor:
        """Standard deviation (*batch_shape, D) in the sense of the space; see `mean`."""
        return self._moment(self.space.stddev)

    @property
    def variance(self) -> Tensor:
        """Variance (*batch_shape, D); see `mean`."""
        return self.stddev**2

    @property
    def median(self) -> Tensor:
        """Median of each column (*batch_shape, D); see `mean`."""
        return self.quantile([0.5])[0]

    def quantile(
        self,
        levels: float | Sequence[float] | Tensor,
        draws: int = _DRAWS,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Quantiles (Q, *batch_shape, D) of each column at levels (Q,), from draws.

        They are seeded without a generator.

        Raises:
            ValueError: If a level is not in (0, 1).
        """
        p = check_levels(levels, self._context.device, self._context.dtype)
        draws = check_positive_int(draws, "draws", minimum=2)
        return self._moment(
            lambda z: torch.quantile(self.space.unwrap(z), p.to(z), 0).movedim(0, 1),
            draws,
            generator,
        ).movedim(-2, 0)

    def interval(
        self, level: float = 0.6827, draws: int = _DRAWS, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Central interval of each column: lower and upper ends, each (*batch_shape, D).

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        low, high = self.quantile(central_levels(level), draws, generator)
        return low, high

    def entropy(self, draws: int = 128, generator: torch.Generator | None = None) -> Tensor:
        """Differential entropy (*batch_shape) in nats, from draws, each under all components."""
        generator = generator or torch.Generator().manual_seed(0)
        draws = check_positive_int(draws, "draws", minimum=2)
        return -self.sample_and_log_prob((draws,), generator)[1].mean(0)

    @property
    def mode(self) -> Tensor:
        """Refused: it would have to be searched for.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise ValueError(_HAS_NO.format("mode"))

    def icdf(self, value: Any) -> Tensor:
        """Refused: see `quantile`.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise ValueError(_HAS_NO.format("closed icdf"))

    def rsample(self, *args: Any, **options: Any) -> Tensor:
        """Refused: draws choose a component, which has no gradient.

        Raises:
            ValueError: Always, with what to use instead.
        """
        raise ValueError(_HAS_NO.format("rsample"))

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("_") and hasattr(Posterior, name):
            raise AttributeError(_HAS_NO.format(name))
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def _width(self) -> int:
        """Parameters of a bound flow, about."""
        return self._model.head.flow.bias.numel()

    def _moment(
        self, function: Any, draws: int = _DRAWS, generator: torch.Generator | None = None
    ) -> Tensor:
        """A function of draws (S, n, D) that gives (n, …), in chunks of events."""
        generator = generator or torch.Generator().manual_seed(0)
        if not len(self._context):
            # any label gives the shape
            z = self.space.centre(self.space.default_scale()).to(self._context)
            return function(z.expand(2, 1, -1))[:0]
        step = max(1, 8 * _CHUNK // (draws * self._width))
        parts = [self._taken(part, part.shape) for part in self._rows.split(step)]
        whole = torch.cat([function(part.sample((draws,), generator)) for part in parts])
        return whole.reshape(*self.batch_shape, *whole.shape[1:])

    def __repr__(self) -> str:
        return (
            f"Marginal(batch_shape={tuple(self.batch_shape)}, space={self.space!r}, "
            f"draws={len(self._nu)})"
        )


def on_a_line(space: Space) -> bool:
    """Whether labels are a single one on a line, with a distribution function."""
    return space.dof == 1 and not space.compact_dof
