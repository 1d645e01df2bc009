r"""The nuisances of a conditioned head integrated out.

With draws :math:`\nu_s \sim p(\nu|x)`

.. math:: q(z|x) = \frac{1}{S} \sum_s q(z \,|\, x, \nu_s) \;\to\;
          \int q(z|x, \nu)\, p(\nu|x)\, \mathrm{d}\nu .

The draws must be those of :math:`p(\nu|x)`, not of the prior: an event may say something of ν. A
second head learns it, on the same simulated events with ν as the label. Draws of the prior are
right only where x says nothing of ν.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .._checks import as_tensor, central_levels, check_finite, check_levels, check_positive_int
from .._events import chosen, mapped, sizes
from .._normal import ndtr
from ..model import PosteriorModel
from ..posterior import Posterior
from ..spaces import Space
from .conditioned import ConditionedEncoder

__all__ = ["Marginal", "MarginalModel", "marginal"]

_DRAWS = 1024
# numbers of contexts and labels that one pass holds
_CHUNK = 2**18


class Marginal(Distribution):
    """A mixture of the posteriors of N events over draws of the nuisances.

    That of a single label on a line has a base coordinate, the normal quantile of its distribution
    function. Others have none: their coverage is that of highest-density regions,
    `diagnostics.hpd_coverage`.

    Arguments:
        model: A model whose encoder is a `ConditionedEncoder`.
        context: Contexts (N, L) of the encoder inside it.
        nu: Draws of the nuisances, of shape (S, N, k).
        reference: First guesses of the labels, as the head wants them.

    Attributes:
        batch_shape: (N,).
        event_shape: (D,).
    """

    arg_constraints = {}  # noqa: RUF012 (torch's interface)

    def __init__(
        self, model: PosteriorModel, context: Tensor, nu: Tensor, reference: Any = None
    ) -> None:
        self._model, self._context, self._nu, self._reference = model, context, nu, reference
        columns = model.head.space.label_size
        super().__init__(Size([len(context)]), Size([columns]), validate_args=False)

    @property
    def space(self) -> Space:
        """The label space."""
        return self._model.head.space

    @property
    def device(self) -> torch.device:
        """Device of the contexts."""
        return self._context.device

    def __len__(self) -> int:
        return len(self._context)

    def __getitem__(self, index: Any) -> Marginal:
        """The posteriors of some events: a slice, a mask or indices."""
        index = index.cpu() if isinstance(index, Tensor) else index
        rows = torch.arange(len(self))[index].reshape(-1).to(self.device)
        reference = chosen(self._reference, rows)
        return Marginal(self._model, self._context[rows], self._nu[:, rows], reference)

    def _bind(self, rows: Tensor, nu: Tensor) -> Posterior:
        """Posteriors of events (M,) at nuisances (M, k)."""
        encoder: Any = self._model.encoder
        context = encoder.append(self._context[rows], nu)
        return self._model.head(context, reference=chosen(self._reference, rows))

    def log_prob(self, value: Any) -> Tensor:
        """Log density (*sample, N) in nats of labels (*sample, N, D).

        Raises:
            ValueError: If a label is not in the space or the shape does not fit.
        """
        (total,) = self._mix(lambda q, z: (q.log_prob(z),), value)
        return total

    def _mix(self, function: Callable[[Posterior, Tensor], tuple[Tensor, ...]], value: Any) -> Any:
        """Logarithms of means over the components of what has logarithms (*sample, N)."""
        z = as_tensor(value, "labels", like=self._context).to(self.device)
        if self.event_shape[0] == 1 and z.shape[-1:] != (1,):
            z = z.unsqueeze(-1)
        z = z.expand(*torch.broadcast_shapes(z.shape[:-1], self.batch_shape), z.shape[-1])
        lead, flat = z.shape[:-1], z.reshape(-1, len(self), z.shape[-1])
        step = max(1, _CHUNK // (max(1, len(flat)) * self.event_shape[0] + self._width))
        columns = []
        for part in torch.arange(len(self), device=self.device).split(step):
            total: tuple[Tensor, ...] = ()
            for nu in self._nu:
                terms = function(self._bind(part, nu[part]), flat[:, part])
                total = tuple(map(torch.logaddexp, total, terms)) if total else terms
            columns.append(total)
        whole = (torch.cat(c, 1).reshape(lead) for c in zip(*columns, strict=True))
        return tuple(t - math.log(len(self._nu)) for t in whole)

    @property
    def has_base(self) -> bool:
        """Whether labels have base coordinates: those of a single one on a line do."""
        return self.space.dof == 1 and not self.space.compact_dof

    def to_base_and_log_prob(self, value: Any) -> tuple[Tensor, Tensor]:
        """Base coordinate (*sample, N, 1) and log density (*sample, N) of a single label.

        Raises:
            ValueError: If there is more than one label, or it is an angle.
        """
        if not self.has_base:
            raise ValueError(
                f"Expected a single label on a line; this is {self.space!r}. Use "
                "diagnostics.hpd_coverage."
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

    def cdf(self, value: Any) -> Tensor:
        """Distribution function of a single label, of shape (*sample, N).

        Raises:
            ValueError: If there is more than one label, or it is an angle.
        """
        return ndtr(self.to_base_and_log_prob(value)[0][..., 0])

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of shape (*sample_shape, N, D), each at a draw of the nuisances at random."""
        count = Size(sample_shape).numel()
        size = max(1, _CHUNK // (max(1, len(self)) * self._width))
        rows = torch.arange(len(self), device=self.device)
        parts = []
        with torch.no_grad():
            for start in range(0, count, size):
                n = min(size, count - start)
                source = generator.device if generator is not None else self.device
                which = torch.randint(
                    len(self._nu), (n, len(self)), generator=generator, device=source
                ).to(self.device)
                repeated = rows.repeat(n)
                q = self._bind(repeated, self._nu[which.reshape(-1), repeated])
                parts.append(q.sample((), generator=generator).unflatten(0, (n, len(self))))
        return torch.cat(parts).reshape(*sample_shape, len(self), -1)

    def sample_and_log_prob(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws (*sample_shape, N, D) and their log density (*sample_shape, N)."""
        z = self.sample(sample_shape, generator)
        with torch.no_grad():
            return z, self.log_prob(z)

    @property
    def mean(self) -> Tensor:
        """Mean (N, D) in the sense of the space, from a fixed number of seeded draws."""
        return self._moment(self.space.mean)

    @property
    def stddev(self) -> Tensor:
        """Standard deviation (N, D) in the sense of the space; see `mean`."""
        return self._moment(self.space.stddev)

    @property
    def variance(self) -> Tensor:
        """Variance (N, D); see `mean`."""
        return self.stddev**2

    def quantile(
        self,
        levels: float | Sequence[float] | Tensor,
        draws: int = _DRAWS,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Quantiles (Q, N, D) of each column at levels (Q,), from draws; seeded without generator.

        Raises:
            ValueError: If a level is not in (0, 1).
        """
        p = check_levels(levels, self._context.device, self._context.dtype)
        draws = check_positive_int(draws, "draws", minimum=2)
        return self._moment(
            lambda z: torch.quantile(self.space.unwrap(z), p.to(z), 0).movedim(0, 1),
            draws,
            generator,
        ).movedim(1, 0)

    def interval(
        self, level: float = 0.6827, draws: int = _DRAWS, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Central interval of each column: lower and upper ends, each (N, D).

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        low, high = self.quantile(central_levels(level), draws, generator)
        return low, high

    @property
    def _width(self) -> int:
        """Parameters of a bound flow, about."""
        return self._model.head.flow.bias.numel()

    def _moment(
        self, function: Any, draws: int = _DRAWS, generator: torch.Generator | None = None
    ) -> Tensor:
        """A function of draws (S, n, D), in chunks of events."""
        generator = generator or torch.Generator().manual_seed(0)
        step = max(1, 8 * _CHUNK // (draws * self._width))
        rows = torch.arange(len(self)).split(step)
        return torch.cat([function(self[part].sample((draws,), generator)) for part in rows])

    def __repr__(self) -> str:
        return (
            f"Marginal(batch_shape={tuple(self.batch_shape)}, space={self.space!r}, "
            f"draws={len(self._nu)})"
        )


def marginal(
    model: PosteriorModel,
    x: Any,
    nu: Any,
    *,
    draws: int = 128,
    reference: Any = None,
    generator: torch.Generator | None = None,
) -> Marginal:
    """Integrate the nuisances of a conditioned model out.

    Arguments:
        model: A model whose encoder is a `ConditionedEncoder`.
        x: Inputs of N events, without nuisances.
        nu: A model of p(ν|x): a `PosteriorModel` trained on (x, ν), as `Simulated(…,
            target="nuisances")` gives them. Or draws of it, of shape (S, N, k), or (S, k) for all
            events alike; draws of the prior are right only where x says nothing of ν.
        draws: Draws S from such a model.
        reference: First guesses of the labels, as in `PosteriorHead.forward`.
        generator: Source of those draws; seeded where it is None.

    Raises:
        ValueError: If the model is not conditioned, or shapes do not fit.

    Example:
        >>> from torch.distributions import Normal
        >>> import flowpost as fp
        >>> from flowpost.systematics import ConditionedEncoder, Nuisances, marginal
        >>> prior = Nuisances(shift=Normal(0.0, 1.0))
        >>> encoder = ConditionedEncoder(fp.encoders.Tabular(3, 8), prior, context=8)
        >>> model = fp.PosteriorModel(encoder, fp.PosteriorHead(9, fp.Real(1)))
        >>> infer = fp.PosteriorModel(fp.encoders.Tabular(3, 8), fp.PosteriorHead(8, prior.space))
        >>> q = marginal(model.eval(), torch.zeros(5, 3), infer.eval())
        >>> q.log_prob(torch.zeros(5, 1)).shape
        torch.Size([5])
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, ConditionedEncoder):
        raise ValueError(
            f"Expected a model with a ConditionedEncoder; got {type(encoder).__name__}. A model "
            "that was trained on events of many nuisances is marginalised already."
        )
    count = len(encoder.loc)
    found = set(sizes(x))
    if len(found) != 1:
        raise ValueError(f"Expected inputs of as many events each; got {sorted(found)} events.")
    events = found.pop()
    if isinstance(nu, torch.nn.Module):
        generator = generator or torch.Generator().manual_seed(0)
        with torch.no_grad():
            nu = nu(x).sample((check_positive_int(draws, "draws"),), generator)
    nu = as_tensor(nu, "nu", like=encoder.loc).to(encoder.loc)
    if nu.ndim == 2:
        nu = nu.unsqueeze(1).expand(-1, events, -1)
    if nu.ndim != 3 or nu.shape[1:] != (events, count) or not len(nu):
        raise ValueError(
            f"Expected nu of shape (S, {events}, {count}), or (S, {count}) for all events alike; "
            f"got {tuple(nu.shape)}."
        )
    check_finite(nu, "nu")
    context = _context(encoder, x)
    reference = mapped(reference, lambda t: torch.as_tensor(t, device=context.device))
    return Marginal(model, context, nu.to(context), reference)


class MarginalModel(torch.nn.Module):
    """A conditioned model and one of its nuisances, as one: `model(x)` is their `marginal`.

    `systematics.report` takes it like any other model.

    Arguments:
        model: A model whose encoder is a `ConditionedEncoder`.
        nuisances: A model of p(ν|x), or draws of ν for all events alike (S, k).
        draws: Draws S from such a model, the same random numbers in every call.
    """

    def __init__(self, model: PosteriorModel, nuisances: Any, draws: int = 128) -> None:
        super().__init__()
        self.model, self.nuisances = model, nuisances
        self.draws = check_positive_int(draws, "draws")

    def forward(self, x: Any, *, reference: Any = None) -> Marginal:
        """The posterior of each event with the nuisances integrated out."""
        return marginal(self.model, x, self.nuisances, draws=self.draws, reference=reference)


def _context(encoder: ConditionedEncoder, x: Any) -> Tensor:
    """Contexts (N, L) of the encoder inside, of inputs in the precision of its parameters."""
    kind = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), encoder.loc.dtype)

    def cast(value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    x = mapped(x, cast)
    if isinstance(x, dict):
        return encoder.inner(**x)
    return encoder.inner(*x) if isinstance(x, tuple) else encoder.inner(x)
