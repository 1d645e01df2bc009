r"""Labels on the sphere: directions as unit 3-vectors, with densities per steradian.

The chart takes :math:`N(0, I_2)` to a von Mises–Fisher density of bounded :math:`\kappa` about
the first axis of a predicted frame, bends it to an ellipse by :math:`w \to A w / |A w|`, and
brings it to the predicted width by a conformal zoom:

.. math:: 1 - \cos\theta = -\ln\big(s + (1 - s) e^{-2\kappa}\big)/\kappa, \quad s = e^{-r^2/2},
          \qquad \tan(\theta'/2) = t \tan(\theta/2).

All are closed-form diffeomorphisms of the sphere, so nothing happens at a pole or at the antipode,
and a label far out costs tens of nats. Angles are kept as :math:`h = \sin^2(\theta/2)` and
:math:`1 - h`, each from the side on which it does not cancel, so that arc-seconds fit in float32.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ._polar import plane_to_vmf, project, radial, radial_inverse, vmf_ladj, vmf_to_plane, zoom
from .base import Placement, Scale, Space

__all__ = ["Sphere", "unit_columns", "unit_vectors", "within_tolerance"]

_TOLERANCE = 1e-3
_SMALLEST_KAPPA, _LARGEST_KAPPA, _UNIFORM = 1e-3, 12.0, 0.05
# how sharply κ turns over at its bound
_SHARP = 4.0
# where splines end, and between which a base coordinate tells others ever less
BOUND, NEAR, FAR = 5.0, 4.0, 5.0
# the radial spline ends sooner, beyond all but 0.03 % of the base and degrees away from the
# antipode, about which the density is that of the bare chart times a factor
_RADIAL_BOUND = 4.0
_TINY = 1e-30
NORMALISE = "Normalise them: torch.nn.functional.normalize(v, dim=-1)."
ANGLES = "flowpost.directions.from_ra_dec and from_zenith_azimuth make vectors (x, y, z) of angles."
# no spline of single coordinates reaches beyond this radius, where 0.1 % of the base lie and the
# radial one acts alone; the disc within is the plane of the splines, alike but close to the rim
_RIM, _STEEP, _OUTSIDE = 3.7, 8, 1e3


class Sphere(Space):
    """Directions as unit vectors (x, y, z); `flowpost.directions` takes angles there and back.

    Vectors whose length is within 10⁻³ of 1 are normalised, others are refused.

    Example:
        >>> import flowpost as fp
        >>> head = fp.PosteriorHead(16, fp.Product(energy=fp.Positive(), direction=fp.Sphere()))
        >>> q = head(torch.zeros(5, 16))["direction"]
        >>> q.sample((100,)).shape
        torch.Size([100, 5, 3])
    """

    label_size, dof, compact, directional = 3, 2, True, True
    location_size, width_size, shape_size, has_profile = 6, 2, 2, True
    feature_size, own_size = 5, 2

    def to_residual(self, z: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Coordinates (..., 2) of directions in the plane of a standard normal."""
        axis, first, second = self._frame(at, z.dtype)
        cosine = (axis * z).sum(-1)
        # z − μ near the axis and z + μ near the antipode are exact where cos θ is rounded
        offset = z - torch.copysign(torch.ones_like(cosine), cosine)[..., None] * axis
        across = torch.stack([(first * offset).sum(-1), (second * offset).sum(-1)], -1)
        square = (across**2).sum(-1).clamp_min(_TINY)
        small = square / (2 * (1 + cosine.abs()))
        h, rest = (
            torch.where(cosine >= 0, small, 1 - small),
            torch.where(cosine >= 0, 1 - small, small),
        )
        log_t, kappa = self._widths(at)
        h, rest, ladj = zoom(h, rest, -log_t.to(z.dtype))
        a = _direction(across, square)
        a, h, rest, ladj = (t.to(log_t.dtype) for t in (a, h, rest, ladj))
        if at.shape is not None:
            a, h, rest, growth = project(a, h, rest, -at.shape)
            ladj = ladj + growth
        half = vmf_to_plane(h, rest, kappa)
        ladj = ladj + vmf_ladj(h, half, kappa)
        r = (2 * half).clamp_min(_TINY).sqrt()
        if at.profile is not None:
            r, growth = radial(r, at.profile, _RADIAL_BOUND)
            ladj = ladj + growth
        return r[..., None] * a, (ladj / 2)[..., None].expand(*ladj.shape, 2)

    def from_residual(self, v: Tensor, at: Placement) -> tuple[Tensor, Tensor]:
        """Directions of coordinates in the plane."""
        log_t, kappa = self._widths(at)
        r = (v**2).sum(-1).clamp_min(_TINY).sqrt()
        a, ladj = _direction(v, r**2), torch.zeros_like(r)
        if at.profile is not None:
            r, ladj = radial_inverse(r, at.profile, _RADIAL_BOUND)
        half = r**2 / 2
        h, rest = plane_to_vmf(half, kappa)
        ladj = ladj - vmf_ladj(h, half, kappa)
        if at.shape is not None:
            a, h, rest, growth = project(a, h, rest, at.shape)
            ladj = ladj + growth
        h, rest, growth = zoom(h, rest, log_t)
        ladj = ladj + growth
        kind = at.label_dtype(v.dtype)
        axis, first, second = self._frame(at, kind)
        a, h, rest = a.to(kind), h.to(kind), rest.to(kind)
        across = 2 * (h * rest).clamp_min(_TINY).sqrt()[..., None] * a
        z = (rest - h)[..., None] * axis + across[..., :1] * first + across[..., 1:] * second
        return F.normalize(z, dim=-1), (ladj / 2)[..., None].expand(*ladj.shape, 2)

    def _sigma(self, at: Placement) -> Tensor:
        """Width of the core in radians; beyond 1 the density is about uniform."""
        return torch.exp(at.log_width[..., 0] + torch.log(at.scale.scale[..., 0]))

    def _widths(self, at: Placement) -> tuple[Tensor, Tensor]:
        """ln t and κ.

        The core has κ/t² = 1/σ², with κ at most the bound, so that a wide σ alone is the uniform
        density and a narrow one a zoomed von Mises–Fisher density; the second number lowers the
        bound, for longer tails.
        """
        log_core = -2 * torch.log(self._sigma(at))
        log_top = math.log(_LARGEST_KAPPA) + F.logsigmoid(at.log_width[..., 1] + 1)
        over = F.softplus(_SHARP * (log_core - log_top)) / _SHARP
        return -over / 2, torch.exp(log_core - over) + _SMALLEST_KAPPA

    def _frame(self, at: Placement, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """A right-handed frame whose first axis is the location μ."""
        delta, turn = at.location.to(dtype).split(3, dim=-1)
        if at.reference is None:
            zenith, azimuth = at.scale.loc.to(dtype).unbind(-1)
            frame = _frame_at(zenith, azimuth)
            reach = at.scale.scale[..., :1].clamp_max(1.0).to(dtype)
            axis = frame[2] + reach * (delta @ frame)
            turn = frame[0] + turn @ frame
        else:
            # in units of the width: no network gives an arc-second by itself
            sigma = self._sigma(at).to(dtype)[..., None]
            width = sigma / (1 + sigma)
            axis = at.reference.to(dtype) + width * delta
            turn = turn + F.pad(torch.ones_like(turn[..., :1]), (0, 2))
        axis = F.normalize(axis, dim=-1)
        first = _perpendicular(turn, axis)
        return axis, first, torch.linalg.cross(axis, first)

    def widen(self, v: Tensor) -> Tensor:
        """The disc within the rim as a whole plane: beyond it no spline can reach.

        Splines of single coordinates leave the identity along their axes however far out, and the
        density at the antipode would depend on the direction from which one comes.
        """
        r = (v**2).sum(-1, keepdim=True).clamp_min(_TINY).sqrt()
        share = 1 - (r / _RIM) ** _STEEP
        wide = share.clamp_min(1e-9) ** (-1 / _STEEP)
        return v * torch.where(share > 0, wide, _OUTSIDE / r)

    def narrow(self, v: Tensor, start: Tensor, end: Tensor, ladj: Tensor) -> tuple[Tensor, Tensor]:
        """Back from the plane to the disc; what was beyond the rim stays as it was."""
        logs = []
        for w in (start, end):
            square = (w**2).sum(-1, keepdim=True) / _RIM**2
            logs.append(torch.log1p(square ** (_STEEP / 2)))
        inside = (v**2).sum(-1, keepdim=True) < _RIM**2
        out = torch.where(inside, end * torch.exp(-logs[1] / _STEEP), v)
        ladj = ladj + (logs[0] - logs[1]) * (2 / _STEEP + 1) / 2
        return out, torch.where(inside, ladj, 0.0)

    def condition(self, u: Tensor) -> Tensor:
        """The coordinates for each other, and the 3-vector of a uniform chart for other labels."""
        half = (u**2).sum(-1, keepdim=True).clamp_min(_TINY) / 2
        # far out rest is 0, where its square root has no derivative
        rest, h = torch.exp(-half.clamp_max(60.0)), -torch.expm1(-half)
        across = u * torch.sqrt(2 * h * rest / half)
        return torch.cat([u.clamp(-BOUND, BOUND), across, rest - h], -1)

    def lean(self, v: Tensor) -> Tensor:
        """Coordinates that vanish at the antipode, where they have no direction."""
        square = (v**2).sum(-1, keepdim=True)
        return v * ((FAR**2 - square) / (FAR**2 - NEAR**2)).clamp(0, 1)

    def centre(self, scale: Scale) -> Tensor:
        """The mean direction."""
        return _frame_at(*scale.loc.unbind(-1))[2]

    def step(self, z: Tensor, move: Tensor, scale: Scale) -> Tensor:
        """Directions a step away, in radians along two axes of the tangent plane."""
        first = _perpendicular(torch.ones_like(z), z)
        across = move[..., :1] * first + move[..., 1:] * torch.linalg.cross(z, first)
        return F.normalize(z + across, dim=-1)

    def spread(self, z: Tensor, scale: Scale) -> Tensor:
        """Root mean square of the chord to the mean direction, for each of two axes, in radians."""
        chord = ((z - self.mean(z)) ** 2).sum(-1).mean(0)
        return (chord / 2).sqrt()[..., None].expand(*chord.shape, 2)

    def mean(self, z: Tensor) -> Tensor:
        """Spherical mean: the direction of the mean vector."""
        return F.normalize(z.mean(0), dim=-1)

    def contains(self, z: Tensor) -> Tensor:
        """Whether labels are unit vectors within the tolerance."""
        return within_tolerance(z)

    def fit_scale(
        self, z: Tensor, weight: Tensor | None = None, reference: Tensor | None = None
    ) -> Scale:
        """Mean direction as zenith and azimuth, and the width of a head without context."""
        z = z.double()
        w = torch.ones_like(z[:, 0]) if weight is None else weight.to(z)
        w = w / w.sum()
        centre = F.normalize((w[:, None] * z).sum(0), dim=0)
        about = centre if reference is None else reference.double()
        h = (((z - about) ** 2).sum(-1) / 4).sort()
        at = torch.searchsorted(w[h.indices].cumsum(0), torch.tensor(0.5, dtype=w.dtype))
        median = h.values[at.clamp_max(len(z) - 1)]
        # half of a von Mises–Fisher density lies within h = ln 2 / 2κ, and of a uniform one 1/2
        kappa = math.log(2) / (2 * median.clamp_min(1e-30)) * (1 - 2 * median)
        sigma = kappa.clamp_min(_UNIFORM).rsqrt().clamp_min(1e-8)
        zenith = torch.atan2(centre[:2].norm(), centre[2])
        azimuth = torch.atan2(centre[1], centre[0])
        ones = torch.ones(2, dtype=torch.float64, device=z.device)
        return Scale(ones, torch.stack([zenith, azimuth]), sigma * ones)

    def config(self) -> dict[str, Any]:
        """JSON description."""
        return {"type": "Sphere"}

    def _inside(self, z: Tensor) -> Tensor:
        return unit_columns(z)

    def _clip(self, z: Tensor) -> Tensor:
        return unit_vectors(z)

    def _requirement(self) -> str:
        return "unit vectors (x, y, z) as labels of Sphere, of a length within 1e-3 of 1"

    def _remedy(self) -> str:
        return NORMALISE

    def _hint(self, columns: int) -> str:
        return ANGLES if columns == 2 else ""

    def _describe(self, z: Tensor, value: float) -> str:
        return f"{z.tolist()} of length {float(z.norm()):g}"

    def __repr__(self) -> str:
        return "Sphere()"


def within_tolerance(z: Tensor) -> Tensor:
    """Whether vectors (..., k) are of unit length, of shape (...)."""
    return (z.norm(dim=-1) - 1).abs() <= _TOLERANCE


def unit_columns(z: Tensor) -> Tensor:
    """Whether each column of vectors (..., k) is part of a unit vector; of NaN, those alone."""
    finite = torch.isfinite(z)
    return finite & (within_tolerance(z)[..., None] | ~finite.all(-1, keepdim=True))


def unit_vectors(z: Tensor) -> Tensor:
    """Vectors (..., k) with those of unit length within the tolerance normalised."""
    length = z.norm(dim=-1, keepdim=True)
    return torch.where(within_tolerance(z)[..., None], z / length, z)


def _direction(across: Tensor, square: Tensor) -> Tensor:
    """Unit vectors (..., 2) of vectors of given square, the first axis where there is none."""
    first = F.pad(torch.ones_like(square[..., None]), (0, 1))
    return torch.where(square[..., None] <= _TINY, first, across / square.sqrt()[..., None])


def _frame_at(zenith: Tensor, azimuth: Tensor) -> Tensor:
    """Rows: towards growing zenith, towards growing azimuth, outwards; the identity at (0, 0)."""
    ct, st, cp, sp = zenith.cos(), zenith.sin(), azimuth.cos(), azimuth.sin()
    zero = torch.zeros_like(ct)
    rows = [ct * cp, ct * sp, -st, -sp, cp, zero, st * cp, st * sp, ct]
    return torch.stack(rows, -1).unflatten(-1, (3, 3))


def _perpendicular(vector: Tensor, axis: Tensor) -> Tensor:
    """The unit vector in the plane of both that is perpendicular to the axis (Gram–Schmidt)."""
    across = vector - (vector * axis).sum(-1, keepdim=True) * axis
    along = (across**2).sum(-1, keepdim=True) < 1e-6 * (vector**2).sum(-1, keepdim=True)
    other = F.one_hot(axis.abs().argmin(-1), 3).to(axis)
    other = other - (other * axis).sum(-1, keepdim=True) * axis
    return F.normalize(torch.where(along, other, across), dim=-1)
