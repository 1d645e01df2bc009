r"""An inhomogeneous Poisson point process for lists of hits: rate × normalised time density.

Sensor m expects :math:`\lambda_m(z)` hits, at times of density :math:`f_m(t|z)` on the recorded
window, so that the hits of an event in the order of their times have the density

.. math:: \ln p_\theta(x|z) = \sum_j \big( \ln \lambda_{m_j}(z) + \ln f_{m_j}(t_j|z) \big)
          - \sum_m \lambda_m(z)

per unit of time and hit. A time density is a mixture of Gumbel densities, sharp rises with
exponential tails as light has them, and a uniform one for noise.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from ..spaces import Space
from .base import BoundLikelihood, Likelihood, check_events
from .counts import count_residuals, normal_quantile, poisson
from .sensors import SensorFeatures, SensorNetwork

__all__ = ["PointProcess"]

_LOWEST, _HIGHEST = -20.0, 15.0
# widths of a time density in units of the window
_NARROWEST, _WIDEST = 1e-4, 1.0
_SLACK = 1e-3
_FIT_EVENTS = 2000
# hits expected at most, in units of the most in training: labels far outside would exhaust memory
_BEYOND = 10.0
# hits that the network of times sees at once
_HITS = 2**17


class PointProcess(Likelihood):
    """Lists of hits (position of the sensor, time) of variable length.

    Arguments:
        space: The label space.
        sensors: Positions of the sensors (M, P); a hit is (position (P), time).
        window: First and last recorded time.
        position: Name of a block of the labels that is a point among the sensors: the networks then
            see each sensor from there.
        direction: Name of a block that is a direction (`Sphere`, or `Circle` where P = 2), for
            which they see distances along and across it.
        components: Gumbel densities K of a time density.
        hidden: Units of a hidden layer of the two networks, of rates and of times.
        layers: Their hidden layers.

    Raises:
        ValueError: If sensors or window have the wrong form, or no block has these names.
    """

    log_mean: Tensor
    most: Tensor

    def __init__(
        self,
        space: Space,
        sensors: Any,
        window: tuple[float, float],
        *,
        position: str | None = None,
        direction: str | None = None,
        components: int = 4,
        hidden: int = 32,
        layers: int = 2,
    ) -> None:
        start, stop = (float(t) for t in window)
        if not start < stop:
            raise ValueError(f"Expected window as two increasing times; got {window!r}.")
        features = SensorFeatures(space, sensors, position, direction)
        super().__init__(
            space,
            **features.options,
            window=[start, stop],
            components=check_positive_int(components, "components"),
            hidden=hidden,
            layers=layers,
        )
        self.window, self.components = (start, stop), components
        self.features = features
        self.register_buffer("log_mean", torch.zeros(()))
        # hits of the largest event in training, 0 where it is not known
        self.register_buffer("most", torch.zeros(()))
        self.rates = SensorNetwork(features, 1, hidden, layers)
        self.times = SensorNetwork(features, 3 * components + 1, hidden, layers)

    @property
    def hit_size(self) -> int:
        """Columns of a hit."""
        return self.features.sensors.shape[1] + 1

    def fit_scale(self, x: Any, z: Any) -> PointProcess:
        """Set the scales from hits and labels (N, D) of the training part."""
        index, _, real = self._hits(x)
        self.most = real.sum(1).max().clamp_min(1).to(self.most)
        z = self._labels(z).to(self.log_mean)[:_FIT_EVENTS]
        self.rates.fit_scale(z)
        index, real = index[: len(z)], real[: len(z)]
        if bool(real.any()):
            self.times.fit_scale(z, index, real)
        mean = real.double().sum(1).mean() / len(self.features.sensors)
        self.log_mean = torch.log(mean.clamp_min(0.5 / len(real))).to(self.log_mean)
        self.fitted = torch.ones_like(self.fitted)
        return self

    @property
    def size(self) -> int:
        """Hidden units of all sensors, and hits."""
        return len(self.features.sensors) * self._options["hidden"] + int(self.most)

    def _hits(self, x: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Sensor index, time and whether it is one, of hits (*batch, n)."""
        hits, lengths = _parts(x, self.hit_size, self.log_mean)
        real = torch.arange(hits.shape[-2], device=hits.device) < lengths[..., None]
        position, time = hits[..., :-1], hits[..., -1]
        check_finite(torch.where(real[..., None], hits, 0.0), "hits")
        index = nearest(position.reshape(-1, position.shape[-1]), self.features.sensors.to(hits))
        index = index.reshape(real.shape)
        far = (position - self.features.sensors.to(hits)[index]).norm(dim=-1) > self.features.step
        start, stop = self.window
        slack = _SLACK * (stop - start)
        out = (time < start - slack) | (time > stop + slack)
        for bad, what in ((far, "at a sensor"), (out, f"between {start:g} and {stop:g}")):
            bad = bad & real
            if bool(bad.any()):
                where = tuple(int(i) for i in bad.nonzero()[0])
                raise ValueError(
                    f"Expected hits {what}; got {hits[where].tolist()} in row {where[0]}, hit "
                    f"{where[-1]}. Give the sensors and the window of these events."
                )
        return index, time.clamp(start, stop), real

    def _bind(self, z: Tensor) -> BoundPointProcess:
        return BoundPointProcess(self, z)

    def time_density(self, z: Tensor, index: Tensor) -> TimeDensity:
        """Time densities of labels (*batch, D) at sensors of index (*batch, hits)."""
        out = self.times(z, index)
        weight, place, width = out.split([self.components + 1, *[self.components] * 2], -1)
        # the components start side by side over the window, a tenth of it wide
        steps = torch.arange(1, self.components + 1, device=z.device).to(z) / (self.components + 1)
        location = torch.sigmoid(place + torch.logit(steps))
        scale = (_NARROWEST + torch.exp(width - math.log(10))).clamp_max(_WIDEST)
        return TimeDensity(F.log_softmax(weight, -1), location, scale, self.window)


class TimeDensity:
    """Mixtures of truncated Gumbel densities and a uniform one, each of shape (..., K)."""

    def __init__(
        self, log_weight: Tensor, location: Tensor, scale: Tensor, window: tuple[float, float]
    ) -> None:
        self.log_weight, self.location, self.scale = log_weight, location, scale
        self.start, self.width = window[0], window[1] - window[0]
        # e^(−y) of the standardised ends: the Gumbel distribution function is exp(−e^(−y))
        self.low = torch.exp((location / scale).clamp_max(80.0))
        self.high = torch.exp((location - 1) / scale)
        self.mass = torch.exp(-self.high) - torch.exp(-self.low)

    def log_prob(self, time: Tensor) -> Tensor:
        """Log density of times (...) per unit of time."""
        t = ((time - self.start) / self.width)[..., None]
        y = (t - self.location) / self.scale
        gumbel = -y - torch.exp((-y).clamp_max(80.0)) - torch.log(self.scale)
        gumbel = gumbel - torch.log(self.mass)
        parts = torch.cat([gumbel, torch.zeros_like(gumbel[..., :1])], -1)
        return torch.logsumexp(self.log_weight + parts, -1) - math.log(self.width)

    def cdf(self, time: Tensor) -> Tensor:
        """Distribution function at times (...)."""
        t = ((time - self.start) / self.width)[..., None]
        y = (t - self.location) / self.scale
        gumbel = torch.exp(-torch.exp((-y).clamp_max(80.0))) - torch.exp(-self.low)
        parts = torch.cat([gumbel / self.mass, t.expand_as(gumbel[..., :1])], -1)
        return (torch.exp(self.log_weight) * parts).sum(-1).clamp(0, 1)

    def sample(self, uniform: Tensor) -> Tensor:
        """Times (...) of two uniform numbers (..., 2) each."""
        weight = torch.exp(self.log_weight).cumsum(-1)
        part = (uniform[..., :1] > weight).sum(-1).clamp_max(weight.shape[-1] - 1)
        own = part.clamp_max(self.location.shape[-1] - 1)[..., None]
        location, scale, mass, low = (
            t.gather(-1, own)[..., 0] for t in (self.location, self.scale, self.mass, self.low)
        )
        info = torch.finfo(uniform.dtype)
        level = (torch.exp(-low) + uniform[..., 1] * mass).clamp(info.tiny, 1 - info.eps)
        gumbel = location - scale * torch.log(-torch.log(level))
        flat = part == self.location.shape[-1]
        return self.start + self.width * torch.where(flat, uniform[..., 1], gumbel).clamp(0, 1)


_Question = Callable[[TimeDensity, Tensor], Tensor]


class BoundPointProcess(BoundLikelihood):
    """A point process bound to labels."""

    def __init__(self, process: PointProcess, z: Tensor) -> None:
        self.process, self.z = process, z
        self.batch_shape = z.shape[:-1]
        out = process.rates(z)[..., 0]
        self.log_rate = (out + process.log_mean).clamp(_LOWEST, _HIGHEST)
        self.rate = torch.exp(self.log_rate)
        total = self.rate.sum(-1, keepdim=True)
        check_finite(total.detach(), "expected hits", "Look for diverged networks.")
        most = _BEYOND * process.most
        if bool(most > 0) and bool((total > most).any()):
            self.log_rate = self.log_rate - torch.log(total / most).clamp_min(0.0)
            self.rate = torch.exp(self.log_rate)

    def log_prob(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x|z) of (hits (*batch, n, P + 1), lengths (*batch))."""
        index, time, real = self.process._hits(x)
        check_events(real.shape[:-1], self.batch_shape, "hits")
        return self._log_prob(*self._spread(index, time, real))

    def _spread(self, *parts: Tensor) -> list[Tensor]:
        return [t.expand(*self.batch_shape, t.shape[-1]) for t in parts]

    def _log_prob(self, index: Tensor, time: Tensor, real: Tensor) -> Tensor:
        row, sensor, density = self._over_hits(index, time, real, TimeDensity.log_prob)
        rates = self.log_rate.reshape(-1, self.log_rate.shape[-1])
        value = density + rates[row, sensor]
        total = value.new_zeros(real.shape).masked_scatter(real, value)
        return total.sum(-1) - self.rate.sum(-1)

    def _over_hits(
        self, index: Tensor, time: Tensor, real: Tensor, ask: _Question
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Label, sensor and an answer of the time density of each hit, not of padding."""
        row = real.reshape(self.batch_shape.numel(), real.shape[-1]).nonzero()[:, 0]
        sensor = index[real]
        return row, sensor, self._ask(row, sensor, time[real], ask)

    def _ask(self, row: Tensor, sensor: Tensor, value: Tensor, ask: _Question) -> Tensor:
        z = self.z.reshape(-1, self.z.shape[-1])
        parts = zip(*(t.split(_HITS) for t in (row, sensor[:, None], value[:, None])), strict=True)
        found = [ask(self.process.time_density(z[r], s), v)[:, 0] for r, s, v in parts]
        return torch.cat(found)

    def sample(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Hits (*batch, n, P + 1) in the order of their times, padded with zeros, and lengths."""
        hits, lengths, _ = self._draw(generator)
        return hits, lengths

    @torch.no_grad()
    def _draw(self, generator: torch.Generator | None) -> tuple[Tensor, Tensor, Tensor]:
        rate = self.rate.reshape(-1, self.rate.shape[-1])
        count = poisson(rate, generator).long()
        flat = torch.arange(count.numel(), device=rate.device).repeat_interleave(count.flatten())
        event, sensor = flat // count.shape[1], flat % count.shape[1]
        z, device = self.z, rate.device if generator is None else generator.device
        uniform = torch.rand(len(flat), 2, generator=generator, device=device, dtype=z.dtype)
        time = self._ask(event, sensor, uniform.to(z.device), TimeDensity.sample)
        order = time.argsort()
        order = order[event[order].argsort(stable=True)]
        lengths = torch.bincount(event, minlength=len(count))
        longest = max(1, int(lengths.max())) if len(count) else 1
        real = torch.arange(longest, device=z.device) < lengths[:, None]
        index = torch.zeros(real.shape, dtype=torch.int64, device=z.device)
        hits = z.new_zeros(*real.shape, self.process.hit_size)
        index[real] = sensor[order]
        at = self.process.features.sensors.to(z)[sensor[order]]
        hits[real] = torch.cat([at, time[order, None]], -1)
        shape = self.batch_shape
        return (
            hits.reshape(*shape, *hits.shape[1:]),
            lengths.reshape(shape),
            index.reshape(*shape, longest),
        )

    def sample_and_log_prob(self, generator: torch.Generator | None = None) -> tuple[Any, Tensor]:
        """Hits with lengths, and ln p of them."""
        hits, lengths, index = self._draw(generator)
        real = torch.arange(hits.shape[-2], device=hits.device) < lengths[..., None]
        return (hits, lengths), self._log_prob(index, hits[..., -1], real)

    def measured(self, x: Any) -> Tensor:
        """The hits."""
        return torch.as_tensor(x[1]).to(self.rate)

    def residuals(
        self, x: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Residuals of the counts of all sensors, then of the times of hits (*batch, M + n)."""
        index, time, real = self.process._hits(x)
        check_events(real.shape[:-1], self.batch_shape, "hits")
        index, time, real = self._spread(index, time, real)
        count = torch.zeros(self.rate.shape, dtype=self.rate.dtype, device=self.rate.device)
        count.scatter_add_(-1, index, real.to(count))
        counts = count_residuals(count, self.rate, generator)
        _, _, level = self._over_hits(index, time, real, TimeDensity.cdf)
        times = counts.new_zeros(real.shape).masked_scatter(real, normal_quantile(level))
        known = torch.cat([torch.ones_like(counts, dtype=torch.bool), real], -1)
        return torch.cat([counts, times], -1), known


def _parts(x: Any, columns: int, like: Tensor) -> tuple[Tensor, Tensor]:
    if not isinstance(x, (tuple, list)) or len(x) != 2:
        raise ValueError(f"Expected x as (hits, lengths); got {type(x).__name__}.")
    hits, lengths = as_tensor(x[0], "hits", like=like).to(like.dtype), torch.as_tensor(x[1])
    lengths = lengths.to(hits.device)
    if hits.ndim < 2 or hits.shape[-1] != columns or lengths.shape != hits.shape[:-2]:
        raise ValueError(
            f"Expected hits of shape (N, n, {columns}) and lengths of shape (N,); got "
            f"{tuple(hits.shape)} and {tuple(lengths.shape)}."
        )
    if lengths.is_floating_point() or bool(((lengths < 0) | (lengths > hits.shape[-2])).any()):
        raise ValueError(
            f"Expected lengths as whole numbers from 0 to {hits.shape[-2]}, the hits that there "
            "is room for."
        )
    return hits, lengths


def nearest(points: Tensor, sensors: Tensor) -> Tensor:
    """Index of the sensor (M, P) that is nearest to each point (rows, P)."""
    step = max(1, 2**22 // len(sensors))
    if not len(points):
        return torch.zeros(0, dtype=torch.int64, device=points.device)
    # not by a product of matrices, which loses small distances to large coordinates
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cat(
        [torch.cdist(p, sensors, compute_mode=mode).argmin(1) for p in points.split(step)]
    )
