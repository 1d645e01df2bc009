r"""Labels on the circle: angles in radians or unit 2-vectors, with densities per radian.

The chart takes N(0, 1) to a normal of bounded width :math:`\sigma` cut off at the antipode, and
brings it to the predicted width by a zoom:

.. math:: \delta = \sigma \Phi^{-1}\big(\tfrac12 + (\Phi(y) - \tfrac12)(2\Phi(\pi/\sigma) - 1)\big),
          \qquad \tan(\delta'/2) = t \tan(\delta/2).

Both are smooth maps of the circle onto itself, so there is no seam.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._normal import ndtr
from .base import Placement, Scale, Space
from .sphere import FAR, NEAR, NORMALISE, unit_columns, unit_vectors, within_tolerance

__all__ = ["Circle"]

_SMALLEST_SIGMA, _SMALLEST_PRECISION = 0.3, 1e-3
# how sharply σ turns over at its bound
_SHARP = 4.0
_FULL_TURN = 2 * math.pi * 1.01
_SQRT_2, _INV_SQRT_2PI = math.sqrt(2), 1 / math.sqrt(2 * math.pi)


class Circle(Space):
    """Angles in radians on any branch, or unit vectors (cos, sin); draws lie in [−π, π).

    Arguments:
        vector: Labels are unit 2-vectors (cos, sin) instead of angles. Those whose length is within
            10⁻³ of 1 are normalised, others are refused.

    Example:
        >>> import flowpost as fp
        >>> q = fp.PosteriorHead(16, fp.Circle())(torch.zeros(5, 16))
        >>> q.sample((100,)).shape
        torch.Size([100, 5, 1])

    Ends of intervals lie on the branch of the posterior's circular mean. An angle z on any branch
    is inside where it is no further counter-clockwise from the lower end than the upper one:

        >>> low, high = q.interval(0.9)
        >>> inside = torch.remainder(torch.zeros(5, 1) - low, 2 * torch.pi) <= high - low
        >>> inside.shape
        torch.Size([5, 1])
    """

    dof, compact = 1, True
    location_size, width_size = 2, 2
    feature_size = 2

    def __init__(self, *, vector: bool = False) -> None:
        self.vector = bool(vector)
        self.label_size = 2 if self.vector else 1

    def _angle(self, z: Tensor) -> Tensor:
        return torch.atan2(z[..., 1], z[..., 0]) if self.vector else z[..., 0]

    def _label(self, angle: Tensor) -> Tensor:
        if self.vector:
            return torch.stack([angle.cos(), angle.sin()], -1)
        return _wrap(angle)[..., None]

    def features(self, z: Tensor) -> Tensor:
        """Cosine and sine of angles, (..., 2)."""
        angle = self._angle(z)
        return torch.stack([angle.cos(), angle.sin()], -1)

    def to_residual(self, z: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Coordinate (..., 1) of angles on the line of a standard normal."""
        log_t, sigma = self._widths(at)
        angle = self._angle(z)
        delta, growth = _zoom(_wrap(angle - self._location(at, angle.dtype)), -log_t)
        delta, growth = delta.to(log_t.dtype), growth.to(log_t.dtype)
        size = delta.abs()
        y = _to_normal(size, sigma)
        ladj = growth + (y**2 - (size / sigma) ** 2) / 2 - torch.log(sigma * _share(sigma))
        return torch.copysign(y, delta)[..., None], ladj[..., None]

    def from_residual(self, v: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Angles of a coordinate on the line."""
        log_t, sigma = self._widths(at)
        y = v[..., 0].abs()
        size = _from_normal(y, sigma)
        ladj = torch.log(sigma * _share(sigma)) + ((size / sigma) ** 2 - y**2) / 2
        delta, growth = _zoom(torch.copysign(size, v[..., 0]), log_t)
        kind = at.label_dtype(v.dtype)
        return self._label(self._location(at, kind) + delta), (ladj + growth)[..., None]

    def _core(self, at: Placement) -> Tensor:
        """Width of the core in radians; far beyond π the density is uniform."""
        return torch.exp(at.log_width[..., 0] + torch.log(at.scale.scale[..., 0]))

    def _widths(self, at: Placement) -> tuple[Tensor, Tensor]:
        """ln t and σ.

        The core has width t σ, with σ at least the bound: a wide core is the uniform density, a
        narrow one a zoomed normal; the second number raises the bound, for longer tails.
        """
        log_core = torch.log(self._core(at))
        log_least = math.log(_SMALLEST_SIGMA) - F.logsigmoid(at.log_width[..., 1] + 1)
        over = F.softplus(_SHARP * (log_least - log_core)) / _SHARP
        sigma = (torch.exp(-2 * (log_core + over)) + _SMALLEST_PRECISION).rsqrt()
        return -over, sigma

    def _location(self, at: Placement, dtype: torch.dtype) -> Tensor:
        location = at.location.to(dtype)
        if at.reference is None:
            scale = at.scale.scale.clamp_max(1.0).to(dtype)
            base = at.scale.loc[..., 0].to(dtype)
        else:
            # in units of the width
            core = self._core(at).to(dtype)[..., None]
            scale = core / (1 + core)
            base = self._angle(at.reference).to(dtype)
        x, y = (scale * location).unbind(-1)
        return base + torch.atan2(y, 1 + x)

    def condition(self, u: Tensor) -> Tensor:
        """(cos, sin) of a uniform chart."""
        angle = 2 * math.pi * ndtr(u)
        return torch.cat([angle.cos(), angle.sin()], -1)

    def lean(self, v: Tensor) -> Tensor:
        """A coordinate that vanishes at the antipode, where it has no sign."""
        return v * ((FAR**2 - v**2) / (FAR**2 - NEAR**2)).clamp(0, 1)

    def centre(self, scale: Scale) -> Tensor:
        """The mean angle."""
        return self._label(scale.loc[..., 0])

    def step(self, z: Tensor, move: Tensor, scale: Scale) -> Tensor:
        """Angles a step away, in radians."""
        return self._label(self._angle(z) + move[..., 0])

    def spread(self, z: Tensor, scale: Scale) -> Tensor:
        """Root mean square of the distance to the mean angle, in radians."""
        angle = self._angle(z)
        return (_wrap(angle - _mean_angle(angle)) ** 2).mean(0).sqrt()[..., None]

    def mean(self, z: Tensor) -> Tensor:
        """Circular mean: the angle of the mean unit vector."""
        return self._label(_mean_angle(self._angle(z)))

    def stddev(self, z: Tensor) -> Tensor:
        """Circular standard deviation √(−2 ln R) in radians, R the length of the mean unit vector.

        Source: *Directional Statistics*, K. V. Mardia, P. E. Jupp, 2000, eq. 2.3.11,
        https://doi.org/10.1002/9780470316979.
        """
        angle = self._angle(z)
        length = torch.hypot(angle.cos().mean(0), angle.sin().mean(0))
        # 1 − R without cancellation, for R close to 1
        missing = (2 * (_wrap(angle - _mean_angle(angle)) / 2).sin() ** 2).mean(0)
        small = torch.log1p(-missing.clamp_max(0.5))
        log_length = torch.where(missing < 0.5, small, torch.log(length.clamp_min(1e-12)))
        return (-2 * log_length).clamp_min(0).sqrt()[..., None].expand(*z.shape[1:])

    def canonical(self, z: Tensor) -> Tensor:
        """Angles in [−π, π)."""
        return z if self.vector else _wrap(z)

    def unwrap(self, z: Tensor) -> Tensor:
        """Angles on the branch of their circular mean, for quantiles; vectors as they are."""
        if self.vector:
            return z
        centre = _mean_angle(z[..., 0])
        return (centre + _wrap(z[..., 0] - centre))[..., None]

    def contains(self, z: Tensor) -> Tensor:
        """Whether angles are finite, or vectors of unit length within the tolerance."""
        return within_tolerance(z) if self.vector else torch.isfinite(z[..., 0])

    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Mean angle, and the width of a head without context.

        Warns:
            UserWarning: If most angles are beyond ±2π, as in degrees.
        """
        angle = self._angle(z.double())
        if not self.vector:
            _warn_of_degrees(angle)
        if reference is not None:
            angle = angle - self._angle(reference.double())
        w = torch.ones_like(angle) if weight is None else weight.to(angle)
        w = w / w.sum()
        centre = torch.atan2((w * angle.sin()).sum(), (w * angle.cos()).sum())
        about = centre if reference is None else torch.zeros_like(centre)
        size = _wrap(angle - about).abs().sort()
        at = torch.searchsorted(w[size.indices].cumsum(0), torch.tensor(0.5, dtype=w.dtype))
        median = size.values[at.clamp_max(len(z) - 1)]
        # half of a normal lies within 0.674 σ, and of a uniform density π/2
        core = median / 0.674 / (1 - 2 * median / math.pi).clamp_min(0.05)
        core = core.clamp(1e-8, 30.0)
        return Scale(torch.ones_like(core)[None], centre[None], core[None])

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return {"type": "Circle", "vector": self.vector}

    def _inside(self, z: Tensor) -> Tensor:
        return unit_columns(z) if self.vector else torch.isfinite(z)

    def _clip(self, z: Tensor) -> Tensor:
        return unit_vectors(z) if self.vector else z

    def _requirement(self) -> str:
        if self.vector:
            return "unit vectors (cos, sin) as labels of Circle, of a length within 1e-3 of 1"
        return "finite angles in radians"

    def _remedy(self) -> str:
        return NORMALISE if self.vector else ""

    def _hint(self, columns: int) -> str:
        if self.vector:
            return "Circle() takes angles in radians." if columns == 1 else ""
        return "Circle(vector=True) takes unit vectors (cos, sin)." if columns == 2 else ""

    def _describe(self, z: Tensor, value: float) -> str:
        return f"{z.tolist()} of length {float(z.norm()):g}"

    def __repr__(self) -> str:
        return "Circle(vector=True)" if self.vector else "Circle()"


def _warn_of_degrees(angle: Tensor) -> None:
    size = angle.abs()
    if float((size > _FULL_TURN).double().mean()) > 0.5:
        warnings.warn(
            f"Expected angles in radians; got labels of Circle of which most are beyond 2π (median "
            f"size {float(size.median()):.4g}). If they are degrees, use torch.deg2rad(z); angles "
            "on other branches mean the same modulo 2π.",
            stacklevel=2,
        )


def _wrap(angle: Tensor) -> Tensor:
    """Angles in [−π, π)."""
    wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    # small angles keep their digits
    return torch.where((angle >= -math.pi) & (angle < math.pi), angle, wrapped)


def _zoom(delta: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor]:
    """tan(δ'/2) = t tan(δ/2), with ln dδ'/dδ."""
    t, sine, cosine = torch.exp(log_t.to(delta)), (delta / 2).sin(), (delta / 2).cos()
    total = cosine**2 + (t * sine) ** 2
    return 2 * torch.atan2(t * sine, cosine), log_t - torch.log(total)


def _mean_angle(angle: Tensor) -> Tensor:
    return torch.atan2(angle.sin().mean(0), angle.cos().mean(0))


def _share(sigma: Tensor) -> Tensor:
    """Share of a normal within ±π."""
    return torch.erf(math.pi / (_SQRT_2 * sigma))


def _to_normal(size: Tensor, sigma: Tensor) -> Tensor:
    """|y| of |δ| in [0, π]: equal shares of the normal and of the cut one."""
    share, x = _share(sigma), size / sigma
    inner = torch.erf(x / _SQRT_2) / share
    near = inner < 0.5
    # beyond, from the antipode: the mass between x and π/σ
    edge = math.pi / sigma
    gap, middle = edge - x, (edge + x) / 2
    short = torch.exp(-(middle**2) / 2) * gap * (1 + (middle**2 - 1) * gap**2 / 24) * _INV_SQRT_2PI
    outer = torch.where(gap < 0.03, short, ndtr(-x) - ndtr(-edge)) / share
    tiny = torch.finfo(size.dtype).tiny
    y_near = _SQRT_2 * torch.erfinv(torch.where(near, inner, 0.25))
    y_far = -torch.special.ndtri(torch.where(near, 0.1, outer.clamp(tiny, 0.5)))
    return torch.where(near, y_near, y_far)


def _from_normal(y: Tensor, sigma: Tensor) -> Tensor:
    """|δ| of |y|; the inverse of `_to_normal`."""
    share = _share(sigma)
    near = y < 0.6744897501960817
    inner = share * torch.erf(torch.where(near, y, 0.1) / _SQRT_2)
    outer = share * ndtr(-torch.where(near, 1.0, y)) + ndtr(-math.pi / sigma)
    x = torch.where(near, _SQRT_2 * torch.erfinv(inner), -torch.special.ndtri(outer))
    return (sigma * x).clamp_max(math.pi)
