"""Labels on the line and its parts: real, positive, bounded."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from .._normal import ndtr
from .base import Placement, Scale, Space

__all__ = ["Interval", "Line", "Positive", "Real"]

_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)
_OUTLIER_RATIO = 10.0


def _moments(y: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weighted mean and standard deviation of each column; robust ones where outliers rule.

    A single label at 10⁴ standard deviations would set mean and standard deviation of a column by
    itself; where the standard deviation exceeds ten times the one of the central 68 %, median and
    that width are used.
    """
    w = torch.ones_like(y[:, 0]) if weight is None else weight.to(y)
    w = w / w.sum()
    mean = (w[:, None] * y).sum(0)
    std = (w[:, None] * (y - mean) ** 2).sum(0).clamp_min(0).sqrt()
    order = y.argsort(0)
    ranks = w[order].cumsum(0)
    levels = ranks.new_tensor([0.158655, 0.5, 0.841345])
    index = torch.searchsorted(ranks.T.contiguous(), levels.expand(y.shape[1], 3).contiguous())
    low, median, high = y.gather(0, order).gather(0, index.T.clamp_max(len(y) - 1))
    width = (high - low) / 2
    robust = (width > 0) & (std > _OUTLIER_RATIO * width)
    mean, std = torch.where(robust, median, mean), torch.where(robust, width, std)
    # a constant column has no scale of its own: take its size, so that nothing overflows
    size = torch.where(mean.abs() > 0, mean.abs(), torch.ones_like(mean))
    return mean, torch.where(std > 1e-12 * size, std, size)


class Line(Space):
    """A space with a chart to the plane, in which location and width are a shift and a factor.

    With a reference the chart is whitened about it, and the location is in units of the width.
    """

    @abstractmethod
    def to_plane(self, z: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Chart labels (..., k) onto whitened coordinates (..., k), with ladj (..., k)."""

    @abstractmethod
    def from_plane(self, r: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Inverse of `to_plane`: labels (..., k) with the ladj (..., k) of that direction."""

    @abstractmethod
    def about(self, scale: Scale, reference: Tensor) -> Scale:
        """Whitening relative to references (..., k)."""

    def to_residual(self, z: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Residuals of labels about their location in units of the width."""
        scale = at.scale if at.reference is None else self.about(at.scale, at.reference)
        r, ladj = self.to_plane(z, scale)
        r, ladj = r.to(at.location.dtype), ladj.to(at.location.dtype)
        if at.reference is None:
            v = (r - at.location) * torch.exp(-at.log_width)
        else:
            v = r * torch.exp(-at.log_width) - at.location
        return v, ladj - at.log_width

    def from_residual(self, v: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Labels of residuals."""
        width = torch.exp(at.log_width)
        if at.reference is None:
            z, ladj = self.from_plane(at.location + v * width, at.scale)
        else:
            scale = self.about(at.scale, at.reference)
            r = ((at.location + v) * width).to(at.label_dtype(v.dtype))
            z, ladj = self.from_plane(r, scale)
        return z, ladj.to(v.dtype) + at.log_width

    def centre(self, scale: Scale) -> Tensor:
        """The label at the middle of the whitened chart."""
        return self.from_plane(torch.zeros_like(scale.loc), scale)[0]

    def step(self, z: Tensor, move: Tensor, scale: Scale) -> Tensor:
        """Labels a step away in the whitened chart."""
        return self.from_plane(self.to_plane(z, scale)[0] + move, scale)[0]

    def spread(self, z: Tensor, scale: Scale) -> Tensor:
        """Standard deviation of draws in the whitened chart."""
        return self.to_plane(z, scale)[0].std(0)


class Real(Line):
    """Real labels, whitened column by column.

    Arguments:
        size: Columns k.
    """

    def __init__(self, size: int = 1) -> None:
        self.label_size = self.dof = check_positive_int(size, "size")

    def to_plane(self, z: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Whiten labels (..., k)."""
        r = (z - scale.loc) / scale.scale
        return r, -torch.log(scale.scale).expand(r.shape)

    def from_plane(self, r: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Labels (..., k) of whitened coordinates."""
        return scale.loc + r * scale.scale, torch.log(scale.scale).expand(r.shape)

    def contains(self, z: Tensor) -> Tensor:
        """Whether labels are finite."""
        return torch.isfinite(z).all(-1)

    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Mean and standard deviation of each column."""
        y = z.double() if reference is None else z.double() - reference.double()
        loc, scale = _moments(y, weight)
        return Scale(torch.ones_like(loc), loc, scale)

    def about(self, scale: Scale, reference: Tensor) -> Scale:
        """Whitening of the offset from references."""
        return Scale(scale.unit, scale.loc + reference, scale.scale)

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return {"type": "Real", "size": self.label_size}

    def _clip(self, z: Tensor) -> Tensor:
        return z

    def _requirement(self) -> str:
        return "finite labels"

    def __repr__(self) -> str:
        return f"Real({self.label_size})"


class Positive(Line):
    """Labels above zero: energies, fluxes, times, redshifts; the chart is the exponential.

    Mean and standard deviation of a posterior of heavy tail in log z can be infinite; median and
    quantiles always exist.

    Arguments:
        size: Columns k.
        clip: Labels within this margin of zero, on either side, are moved to the margin; in label
            units. Zero refuses labels on and below the bound.
    """

    def __init__(self, size: int = 1, *, clip: float = 0.0) -> None:
        self.label_size = self.dof = check_positive_int(size, "size")
        self.clip = _check_clip(clip, math.inf)

    def to_plane(self, z: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Whitened log labels (..., k)."""
        y = torch.log(z / scale.unit)
        return (y - scale.loc) / scale.scale, -y - torch.log(scale.scale) - torch.log(scale.unit)

    def from_plane(self, r: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Labels (..., k) of whitened coordinates, kept within the numbers of their dtype."""
        y = scale.loc + r * scale.scale
        info = torch.finfo(r.dtype)
        z = (torch.exp(y) * scale.unit).clamp(info.tiny, info.max)
        return z, y + torch.log(scale.scale) + torch.log(scale.unit)

    def features(self, z: Tensor) -> Tensor:
        """Logarithms of labels (..., k)."""
        return torch.log(z)

    def contains(self, z: Tensor) -> Tensor:
        """Whether labels are finite and above zero."""
        return self._inside(z).all(-1)

    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Mean and standard deviation of log z, about a power of two as the unit.

        The power of two makes the chart exactly the same for labels in units that differ by one.
        """
        z = z.double() if reference is None else z.double() / reference.double()
        unit = torch.exp2(torch.log2(z).median(0).values.round())
        loc, scale = _moments(torch.log(z / unit), weight)
        return Scale(unit, loc, scale)

    def about(self, scale: Scale, reference: Tensor) -> Scale:
        """Whitening of the factor over references."""
        return Scale(scale.unit * reference, scale.loc, scale.scale)

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return {"type": "Positive", "size": self.label_size, "clip": self.clip}

    def _inside(self, z: Tensor) -> Tensor:
        return (z > 0) & torch.isfinite(z)

    def _clip(self, z: Tensor) -> Tensor:
        if not self.clip:
            return z
        return torch.where(z.abs() < self.clip, torch.full_like(z, self.clip), z)

    def _requirement(self) -> str:
        return "labels above 0 (Positive)"

    def __repr__(self) -> str:
        clip = f", clip={self.clip:g}" if self.clip else ""
        return f"Positive({self.label_size}{clip})"


class Interval(Line):
    """Labels between two bounds: z = a + (b − a) Φ(y), which makes uniform labels standard normal.

    Arguments:
        low: Lower bound a, or one for each column.
        high: Upper bound b, or one for each column.
        size: Columns k where both bounds are scalars.
        clip: Labels within this margin of a bound, on either side, are moved to the margin; in
            label units. Zero refuses labels on and outside the bounds.
    """

    def __init__(
        self,
        low: float | Sequence[float],
        high: float | Sequence[float],
        size: int | None = None,
        *,
        clip: float = 0.0,
    ) -> None:
        lows, highs = as_tensor(low, "low").double(), as_tensor(high, "high").double()
        try:
            lows, highs = torch.broadcast_tensors(lows.reshape(-1), highs.reshape(-1))
            if size is not None and len(lows) != check_positive_int(size, "size"):
                lows, highs = lows.expand(size), highs.expand(size)
        except RuntimeError as error:
            raise ValueError(
                f"Expected low, high and size of one length; got {low!r}, {high!r}, {size!r}."
            ) from error
        check_finite(lows, "low")
        check_finite(highs, "high")
        if not bool((lows < highs).all()):
            raise ValueError(f"Expected low < high in every column; got {low!r} and {high!r}.")
        self.label_size = self.dof = len(lows)
        self.low, self.high = tuple(lows.tolist()), tuple(highs.tolist())
        self.clip = _check_clip(clip, float((highs - lows).min()) / 2)

    def _bounds(self, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_tensor(self.low), like.new_tensor(self.high)

    def to_plane(self, z: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Whitened normal quantiles (..., k), from the nearer bound so that none is lost."""
        a, b = self._bounds(z)
        from_low, from_high = (z - a) / (b - a), (b - z) / (b - a)
        upper = from_low > 0.5
        y = torch.special.ndtri(torch.where(upper, from_high, from_low))
        y = torch.where(upper, -y, y)
        ladj = y**2 / 2 + _HALF_LOG_2PI - torch.log(b - a) - torch.log(scale.scale)
        return (y - scale.loc) / scale.scale, ladj

    def from_plane(self, r: Tensor, scale: Scale) -> tuple[Tensor, Tensor]:
        """Labels (..., k) of whitened coordinates, kept strictly inside the bounds."""
        y = scale.loc + r * scale.scale
        a, b = self._bounds(r)
        upper = y > 0
        tail = ndtr(torch.where(upper, -y, y)) * (b - a)
        z = torch.where(upper, b - tail, a + tail)
        z = torch.maximum(torch.minimum(z, torch.nextafter(b, a)), torch.nextafter(a, b))
        return z, torch.log(b - a) + torch.log(scale.scale) - y**2 / 2 - _HALF_LOG_2PI

    def contains(self, z: Tensor) -> Tensor:
        """Whether labels lie strictly between the bounds."""
        return self._inside(z).all(-1)

    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Mean and standard deviation of the normal quantiles."""
        y = self._quantile(z.double())
        if reference is not None:
            y = y - self._quantile(reference.double())
        loc, scale = _moments(y, weight)
        return Scale(torch.ones_like(loc), loc, scale)

    def _quantile(self, z: Tensor) -> Tensor:
        unit = self.default_scale()
        return self.to_plane(z, Scale(*(t.to(z) for t in unit)))[0]

    def about(self, scale: Scale, reference: Tensor) -> Scale:
        """Whitening of the offset from the normal quantiles of references."""
        return Scale(scale.unit, scale.loc + self._quantile(reference), scale.scale)

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return {
            "type": "Interval",
            "low": list(self.low),
            "high": list(self.high),
            "clip": self.clip,
        }

    def _inside(self, z: Tensor) -> Tensor:
        a, b = self._bounds(z)
        return (z > a) & (z < b)

    def _clip(self, z: Tensor) -> Tensor:
        if not self.clip:
            return z
        a, b = self._bounds(z)
        z = torch.where((z - a).abs() < self.clip, a + self.clip, z)
        return torch.where((z - b).abs() < self.clip, b - self.clip, z)

    def _requirement(self) -> str:
        return f"labels strictly inside {self!r}"

    def __repr__(self) -> str:
        def show(bounds: tuple[float, ...]) -> str:
            if len(set(bounds)) == 1:
                return f"{bounds[0]:g}"
            return "[" + ", ".join(f"{b:g}" for b in bounds) + "]"

        size = f", size={self.label_size}" if self.label_size > 1 else ""
        return f"Interval({show(self.low)}, {show(self.high)}{size})"


def _check_clip(clip: float, limit: float) -> float:
    if not 0 <= clip < limit:
        raise ValueError(f"Expected clip between 0 and {limit:g}; got {clip!r}.")
    return float(clip)
