"""Statistics of each event from draws, streamed over events: moments, mode, quantiles, entropy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from .._checks import central_levels, check_levels, check_positive_int
from .summary import Summary, summarise

if TYPE_CHECKING:
    from .base import Posterior

__all__ = ["CHUNK", "Statistics"]

# base coordinates that one pass holds: some 200 MB of spline parameters in float32
CHUNK = 2**17
_DRAWS = 1024
_CENTRAL = 1 - 1e-4
_CLIMBS = 4
_ASCENT_STEPS = 60


class Statistics:
    """What a posterior says of each event; a part of `Posterior`, on its decoding of base draws."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _base_draws(self, draws: int, generator: torch.Generator | None, central: bool) -> Tensor:
        """Draws (S, 1 or N, d): a seeded Sobol sequence for all events, or a generator's."""
        d = self._flow.dof
        if generator is None:
            sobol = torch.quasirandom.SobolEngine(d, scramble=True, seed=0)
            p = sobol.draw(draws, dtype=torch.float64).clamp(1e-12, 1 - 1e-12)
            u = torch.special.ndtri(p)
        else:
            events = self.batch_shape.numel()
            u = torch.randn(
                (draws, events, d),
                generator=generator,
                device=generator.device,
                dtype=self.dtype,
            )
        if central:
            edge = math.sqrt(_chi2_edge(d))
            u = u * (edge / u.norm(dim=-1, keepdim=True)).clamp_max(1)
        u = u.to(self.device, self.dtype)
        return u.unsqueeze(1) if generator is None else u

    def _reduce(
        self,
        function: Callable[[Tensor, Tensor], Sequence[Tensor]],
        draws: int,
        generator: torch.Generator | None,
        central: bool = False,
        density: bool = False,
    ) -> list[Tensor]:
        """Reduce draws (S, n, D) of chunks of events to (n, …).

        The function is given their log density (S, n) too where `density` is set.
        """
        draws = check_positive_int(draws, "draws", minimum=2)
        events = self.batch_shape.numel()
        u = self._base_draws(draws, generator, central)
        flow = self._flow.flatten()
        if not events:
            # one row of zeros gives the shapes, and is left out
            flow = flow._map(lambda t, _: t.new_zeros(1, *t.shape[1:]))
            u = u[:, :1] if u.shape[1] else u.new_zeros(draws, 1, u.shape[-1])
        flat = self._with(flow)
        n = max(1, CHUNK // (draws * self._flow.dof))
        parts = []
        with torch.no_grad():
            for i in range(0, max(1, events), n):
                some = flat if n >= events else flat[i : i + n]
                base = u if u.shape[1] == 1 else u[:, i : i + n]
                base = base.expand(draws, *some.batch_shape, base.shape[-1])
                z, log_prob = some._decode(base) if density else (some._decode_labels(base), base)
                parts.append(function(z, log_prob))
        merged = [torch.cat(p, 0)[:events] for p in zip(*parts, strict=True)]
        return [t.reshape((*self.batch_shape, *t.shape[1:])) for t in merged]

    @property
    def mean(self) -> Tensor:
        """Mean of each label, of shape (*batch_shape, D), from a fixed set of draws.

        It is the spherical mean of a direction and the circular mean of an angle.
        The base draws are held inside the central 1 − 10⁻⁴ of the base, for the moments of
        `Positive` labels can be infinite; median and quantiles need no such cut.
        """
        return self._reduce(lambda z, _: (self.space.mean(z),), _DRAWS, None, central=True)[0]

    @property
    def variance(self) -> Tensor:
        """Variance of each column, of shape (*batch_shape, D); see `mean`."""
        return self.stddev**2

    @property
    def stddev(self) -> Tensor:
        """Standard deviation of each column, of shape (*batch_shape, D); see `mean`.

        It is the circular standard deviation of an angle, and that of the Cartesian components of a
        direction, for which `angular_resolution` says more.
        """
        return self._reduce(lambda z, _: (self.space.stddev(z),), _DRAWS, None, central=True)[0]

    @property
    def median(self) -> Tensor:
        """Median of each column, of shape (*batch_shape, D)."""
        return self.quantile([0.5])[0]

    @property
    def mode(self) -> Tensor:
        """Label of highest density, of shape (*batch_shape, D).

        The best of a fixed set of draws, polished by gradient ascent on the label's manifold; each
        event climbs from its few best draws, and the highest end counts.
        """

        def best(z: Tensor, log_prob: Tensor) -> tuple[Tensor, ...]:
            top = log_prob.topk(_CLIMBS, 0).indices[..., None].expand(-1, *z.shape[1:])
            return (*z.gather(0, top).unbind(0), self.space.spread(z, self._scale))

        *starts, width = self._reduce(best, _DRAWS, None, density=True)
        ends = [self._ascend(z, width) for z in starts]
        z, value = ends[0]
        for other, height in ends[1:]:
            z = torch.where(height > value, other, z)
            value = torch.maximum(height, value)
        return z

    def _ascend(self, z: Tensor, width: Tensor) -> tuple[Tensor, Tensor]:
        """Climb from labels (*batch, D) in steps of each event's width.

        Returns the ends and their ln q, of shape (*batch, 1).
        """
        scale, fixed = self._scale, self.detach()
        step = torch.full_like(width[..., :1], 0.1)
        tiny = torch.finfo(width.dtype).tiny

        def climb(at: Tensor) -> tuple[Tensor, Tensor]:
            with torch.enable_grad():
                move = torch.zeros_like(width).requires_grad_()
                label = self.space.step(at, move, scale)
                value = fixed._evaluate(fixed._broadcast(label, "z"))
                (slope,) = torch.autograd.grad(value.sum(), move)
            return value.detach().unsqueeze(-1), slope

        value, slope = climb(z)
        for _ in range(_ASCENT_STEPS):
            move = slope * width**2
            size = (move / width.clamp_min(tiny)).norm(dim=-1, keepdim=True)
            trial = self.space.step(z, step * move / size.clamp_min(1), scale).detach()
            trial_value, trial_slope = climb(trial)
            better = trial_value > value
            z, slope = torch.where(better, trial, z), torch.where(better, trial_slope, slope)
            value = torch.where(better, trial_value, value)
            step = torch.where(better, step * 1.5, step * 0.3)
        return z, value

    def quantile(
        self,
        levels: float | Sequence[float] | Tensor,
        draws: int = _DRAWS,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Quantiles of each column's marginal: exact for one label on a line, else from draws.

        Those of an angle are on the branch of its circular mean, and may lie beyond ±π; those of a
        direction are of its Cartesian components, and no direction themselves.

        Arguments:
            levels: Q levels in (0, 1).
            draws: Draws S; a fixed set where `generator` is None.
            generator: Source of other draws.

        Returns:
            Quantiles of shape (Q, *batch_shape, D).

        Raises:
            ValueError: If a level is not in (0, 1).
        """
        p = check_levels(levels, self.device, self.dtype)
        if self._exact_line():
            with torch.no_grad():
                return self.icdf(p.reshape(-1, *[1] * len(self.batch_shape)))
        (values,) = self._reduce(
            lambda z, _: (torch.quantile(self.space.unwrap(z), p.to(z), dim=0).transpose(0, 1),),
            draws,
            generator,
        )
        return values.movedim(-2, 0)

    def _exact_line(self) -> bool:
        return self.dof == 1 and not self.space.blocks[0].space.compact

    def interval(
        self,
        level: float = 0.6827,
        draws: int = _DRAWS,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Central (equal-tailed) credible interval of each column.

        That of an angle is on the branch of its circular mean and may end beyond ±π: an angle z on
        any branch is inside where `torch.remainder(z - low, 2 * torch.pi) <= high - low`.

        Returns:
            Lower and upper ends, each of shape (*batch_shape, D).

        Raises:
            ValueError: If the level is not in (0, 1).
        """
        low, high = self.quantile(central_levels(level), draws, generator)
        return low, high

    def entropy(self, draws: int = _DRAWS, generator: torch.Generator | None = None) -> Tensor:
        """Differential entropy in nats, of shape `batch_shape`, from draws."""
        return self._reduce(
            lambda _, log_prob: (-log_prob.mean(0),), draws, generator, density=True
        )[0]

    def summary(self, draws: int = _DRAWS, generator: torch.Generator | None = None) -> Summary:
        """Mean, standard deviation, median, 68 % and 90 % intervals of each column, and entropy.

        Arguments:
            draws: Draws S; a fixed set where `generator` is None.
            generator: Source of other draws.
        """
        return summarise(cast("Posterior", self), draws, generator)


def _chi2_edge(dof: int) -> float:
    """‖u‖² that holds the central 1 − 10⁻⁴ of the base."""
    from scipy.special import chdtri

    return float(chdtri(dof, 1 - _CENTRAL))
