r"""Closed-form maps between a plane and the sphere, stable from arc-seconds to the whole sky.

Polar angles are carried as :math:`h = \sin^2(\theta/2)` and :math:`1 - h`, each from the side on
which it does not cancel.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "log1mexp",
    "plane_to_vmf",
    "project",
    "radial",
    "radial_inverse",
    "rational_quadratic",
    "vmf_ladj",
    "vmf_to_plane",
    "zoom",
]

_LOG_2 = math.log(2)
_LARGEST_SHAPE = 2.0
# of a spline: ratio of slopes at most 10³, as zuko's
_LOG_STEEPEST = math.log(1e3)
# of |ln g/r| at the end of a radial spline; farther in, what is beyond the end would come among
# the splines of the plane
_FARTHEST_IN, _FARTHEST_OUT = 0.01, 0.5


def log1mexp(a: Tensor) -> Tensor:
    """ln(1 − e^(−a)) for a > 0.

    Source: *Accurately computing log(1 − exp(−|a|))*, M. Mächler, 2012,
    https://cran.r-project.org/web/packages/Rmpfr/vignettes/log1mexp-note.pdf.
    """
    small = a < _LOG_2
    near = torch.log(-torch.expm1(-torch.where(small, a, 1.0)))
    far = torch.log1p(-torch.exp(-torch.where(small, 1.0, a)))
    return torch.where(small, near, far)


def plane_to_vmf(half: Tensor, kappa: Tensor) -> tuple[Tensor, Tensor]:
    """h = sin²(θ/2) and 1 − h of a von Mises–Fisher density, of r²/2 in a standard normal plane.

    Both have the same quantile: 1 − exp(−r²/2) is the share of the vMF within θ of its axis.
    """
    near = half < _LOG_2
    inner, outer = torch.where(near, half, 0.1), torch.where(near, 1.0, half)
    v = -torch.log1p(torch.expm1(-inner) * -torch.expm1(-2 * kappa)) / kappa
    rest = torch.log1p(torch.exp(-outer) * torch.expm1(2 * kappa)) / kappa
    return torch.where(near, v, 2 - rest) / 2, torch.where(near, 2 - v, rest) / 2


def vmf_to_plane(h: Tensor, rest: Tensor, kappa: Tensor) -> Tensor:
    """r²/2 of h = sin²(θ/2) and rest = 1 − h; the inverse of `plane_to_vmf`."""
    share = torch.expm1(-2 * kappa * h) / torch.expm1(-2 * kappa)
    near = share < 0.5
    inner = -torch.log1p(-torch.where(near, share, 0.25))
    edge = torch.where(near, 0.5, rest).clamp_min(torch.finfo(h.dtype).tiny)
    outer = 2 * kappa * h - log1mexp(2 * kappa * edge) + log1mexp(2 * kappa)
    return torch.where(near, inner, outer)


def vmf_ladj(h: Tensor, half: Tensor, kappa: Tensor) -> Tensor:
    """ln |d plane / d steradian|: the vMF's log density less that of the plane."""
    return torch.log(kappa) - log1mexp(2 * kappa) - 2 * kappa * h + half


def zoom(h: Tensor, rest: Tensor, log_t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """tan(θ'/2) = t tan(θ/2) on h and 1 − h, with ln of the growth of the solid angle."""
    t = torch.exp(log_t)
    # for a large t both terms are divided by t², which would overflow float32
    large = log_t > 0
    a = torch.where(large, rest / torch.where(large, t, 1.0) ** 2, rest)
    b = torch.where(large, h, h * torch.where(large, 1.0, t) ** 2)
    total = a + b
    growth = torch.where(large, -2 * log_t, 2 * log_t) - 2 * torch.log(total)
    return b / total, a / total, growth


def project(
    a: Tensor, h: Tensor, rest: Tensor, shape: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """w → A w / |A w| with A = exp(S) across the axis and 1 along it: round becomes elliptic.

    Arguments:
        a: Unit direction across the axis, of shape (..., 2).
        h: sin²(θ/2), of shape (...).
        rest: 1 − h.
        shape: Entries of the symmetric, traceless S, of shape (..., 2); −S is the inverse.

    Returns:
        a, h and 1 − h of the image, and ln of the growth of the solid angle.
    """
    s = _LARGEST_SHAPE * torch.tanh(shape / _LARGEST_SHAPE)
    square = (s**2).sum(-1, keepdim=True)
    # sinh(ρ)/ρ and cosh(ρ); ρ = 0 has no derivative of its own
    rho = torch.where(square > 1e-6, square, 1.0).sqrt()
    ratio = torch.where(square > 1e-6, torch.sinh(rho) / rho, 1 + square / 6)
    cosh = torch.where(square > 1e-6, torch.cosh(rho), 1 + square / 2)
    s0, s1, a0, a1 = s[..., 0], s[..., 1], a[..., 0], a[..., 1]
    turned = torch.stack([s0 * a0 + s1 * a1, s1 * a0 - s0 * a1], -1)
    image = cosh * a + ratio * turned
    stretch = (image**2).sum(-1)
    sine, cosine = 4 * h * rest * stretch, rest - h
    length = sine + cosine**2
    small = sine / length / (2 * (1 + cosine.abs() / length.sqrt()))
    near = cosine >= 0
    out = torch.where(near, small, 1 - small), torch.where(near, 1 - small, small)
    return image / stretch.sqrt()[..., None], *out, -1.5 * torch.log(length)


def _knots(parameters: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges of [0, 1] on both sides and ln slopes, each (..., K + 1), of 3K + 1 parameters."""
    bins = parameters.shape[-1] // 3
    widths, heights, slopes = parameters.split([bins, bins, bins + 1], dim=-1)
    edges = []
    for logits in (widths, heights):
        sizes = torch.softmax(logits / (1 + (2 * logits / _LOG_STEEPEST).abs()), -1)
        edge = torch.nn.functional.pad(sizes.cumsum(-1), (1, 0))
        # the last edge is 1 itself, whatever the rounding of the sum
        edges.append(edge / edge[..., -1:])
    return edges[0], edges[1], slopes / (1 + (slopes / _LOG_STEEPEST).abs())


def _radial_knots(parameters: Tensor, bound: float) -> tuple[Tensor, Tensor, Tensor]:
    """Edges on both sides and slopes of a spline that meets g² = r² + c at the bound."""
    xs, ys, slopes = _knots(parameters)
    end = slopes[..., -1:]
    end = end / (1 + torch.where(end > 0, end / _FARTHEST_IN, -end / _FARTHEST_OUT))
    slopes = torch.cat([slopes[..., :-1], end], -1).exp()
    return bound * xs, bound / slopes[..., -1:] * ys, slopes


@dataclass(frozen=True)
class _Bin:
    """The bin of each value of a rational-quadratic spline: its ends, and slopes there."""

    x0: Tensor
    x1: Tensor
    y0: Tensor
    y1: Tensor
    d0: Tensor
    d1: Tensor
    last: Tensor

    @property
    def s(self) -> Tensor:
        return (self.y1 - self.y0) / (self.x1 - self.x0)

    def value(self, xi: Tensor, eta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Shares of the bin's height below and above, and the slope, at shares ξ and 1 − ξ."""
        s = self.s
        total = s + (self.d0 + self.d1 - 2 * s) * xi * eta
        below = (s * xi**2 + self.d0 * xi * eta) / total
        above = (s * eta**2 + self.d1 * xi * eta) / total
        slope = s**2 * (self.d1 * xi**2 + 2 * s * xi * eta + self.d0 * eta**2) / total**2
        return below, above, slope

    def solve(self, below: Tensor) -> Tensor:
        """Share ξ of the bin's width at a share of its height."""
        bend = self.d0 + self.d1 - 2 * self.s
        a = self.s - self.d0 + below * bend
        b = self.d0 - below * bend
        c = -self.s * below
        # b² − 4ac is positive for a monotone spline; in float32 it can round to below zero
        root = (b**2 - 4 * a * c).clamp_min(torch.finfo(below.dtype).tiny).sqrt()
        return (2 * c / (-b - root)).clamp(0, 1)


def _bin(value: Tensor, knots: tuple[Tensor, Tensor, Tensor], inverse: bool) -> _Bin:
    xs, ys, slopes = (t.expand(*value.shape, t.shape[-1]) for t in knots)
    edges = ys if inverse else xs
    k = torch.searchsorted(edges[..., 1:-1].contiguous(), value[..., None], right=True)
    ends = [t.gather(-1, j)[..., 0] for t in (xs, ys, slopes) for j in (k, k + 1)]
    x0, x1, y0, y1, d0, d1 = ends
    return _Bin(x0, x1, y0, y1, d0, d1, k[..., 0] == xs.shape[-1] - 2)


def radial(r: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Rational-quadratic spline of a radius, with g² = r² + c beyond the bound.

    The last slope is r/g there and so sets c. Beyond the bound the density on the plane is the
    normal one times exp(−c/2), at any radius alike.

    Arguments:
        r: Radii above 0, of shape (...).
        parameters: Widths, heights and slopes of K bins, of shape (..., 3K + 1); all 0 is the
            identity.
        bound: End of the spline.

    Returns:
        The radius g and ln of the growth of the area of the plane, ln g' + ln(g/r).
    """
    knots = _radial_knots(parameters, bound)
    inside = r < bound
    x = torch.where(inside, r, bound / 2)
    at = _bin(x, knots, inverse=False)
    xi = (x - at.x0) / (at.x1 - at.x0)
    below, _, slope = at.value(xi, 1 - xi)
    g = at.y0 + (at.y1 - at.y0) * below
    growth = torch.log(slope) + torch.log(g / x)
    end = knots[1][..., -1]
    outer = (torch.where(inside, bound, r) ** 2 + (end**2 - bound**2)).sqrt()
    return torch.where(inside, g, outer), torch.where(inside, growth, 0.0)


def radial_inverse(g: Tensor, parameters: Tensor, bound: float) -> tuple[Tensor, Tensor]:
    """Inverse of `radial`, with the growth of that direction."""
    knots = _radial_knots(parameters, bound)
    end = knots[1][..., -1]
    inside = g < end
    y = torch.where(inside, g, end / 2)
    at = _bin(y, knots, inverse=True)
    r = at.x0 + at.solve((y - at.y0) / (at.y1 - at.y0)) * (at.x1 - at.x0)
    outer = (torch.where(inside, end, g) ** 2 + (bound**2 - end**2)).sqrt()
    # the smallest radius that is a number, so that g / r is one
    r = torch.where(inside, r.clamp_min(1e-15), outer)
    return r, -radial(r, parameters, bound)[1]


def rational_quadratic(
    h: Tensor, rest: Tensor, parameters: Tensor, inverse: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Spline of [0, 1] onto itself, given a value and 1 − value so that neither end cancels.

    Arguments:
        h: Values, of shape (...).
        rest: 1 − h.
        parameters: Widths, heights and slopes of K bins, of shape (..., 3K + 1); all 0 is the
            identity.
        inverse: Whether to evaluate the inverse.

    Returns:
        The image, 1 − image, and ln of the slope there.
    """
    xs, ys, slopes = _knots(parameters)
    at = _bin(h, (xs, ys, slopes.exp()), inverse)
    if inverse:
        height = at.y1 - at.y0
        below, above = (h - at.y0) / height, torch.where(at.last, rest, at.y1 - h) / height
        lower = below < 0.5
        flipped = _Bin(at.x0, at.x1, at.y0, at.y1, at.d1, at.d0, at.last)
        xi, eta = at.solve(below), flipped.solve(above)
        xi, eta = torch.where(lower, xi, 1 - eta), torch.where(lower, 1 - xi, eta)
        slope = at.value(xi, eta)[2]
        start, end, width = at.x0, at.x1, at.x1 - at.x0
        below, above, ladj = xi, eta, -torch.log(slope)
    else:
        width = at.x1 - at.x0
        xi, eta = (h - at.x0) / width, torch.where(at.last, rest, at.x1 - h) / width
        below, above, slope = at.value(xi, eta)
        start, end, width, ladj = at.y0, at.y1, at.y1 - at.y0, torch.log(slope)
    return start + width * below, (1 - end) + width * above, ladj
