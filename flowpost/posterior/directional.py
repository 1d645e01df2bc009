r"""What one quotes of a posterior over directions: resolution, areas, moments; all from draws.

With densities q per steradian of S draws, the smallest region of credibility p has the area

.. math:: A_p = \frac{1}{S} \sum_{i=1}^{S} \frac{1[q_i \ge q_p]}{q_i},

where q_p is the (1 − p) quantile of the densities: no map is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_levels

__all__ = ["DirectionMoments", "Directional"]

_SQUARE_DEGREES = (180 / math.pi) ** 2
_NEWTON_STEPS = 30


@dataclass(frozen=True)
class DirectionMoments:
    """Moments of directions, and the von Mises–Fisher and Kent densities that have them.

    Source: *The Fisher–Bingham distribution on the sphere*, J. T. Kent, 1982,
    https://doi.org/10.1111/j.2517-6161.1982.tb01189.x, §4.

    Attributes:
        mean: Spherical mean, of shape (*batch, 3).
        resultant: Length R of the mean vector, of shape (*batch,).
        vmf_kappa: Concentration κ of the von Mises–Fisher density of that R, of shape (*batch,).
        kent_kappa: Concentration κ of the Kent density, of shape (*batch,).
        kent_beta: Ovalness β of the Kent density, 0 where it is round, of shape (*batch,).
        major: Unit vector along the longer axis of the ellipse, of shape (*batch, 3).
        minor: Unit vector along the shorter axis, of shape (*batch, 3).
        sigma_major: Standard deviation along the longer axis in radians, of shape (*batch,).
        sigma_minor: Standard deviation along the shorter axis in radians, of shape (*batch,).
    """

    mean: Tensor
    resultant: Tensor
    vmf_kappa: Tensor
    kent_kappa: Tensor
    kent_beta: Tensor
    major: Tensor
    minor: Tensor
    sigma_major: Tensor
    sigma_minor: Tensor


class Directional:
    """What a posterior of one direction says of each event; a part of `Posterior`."""

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any: ...

    def _direction(self) -> None:
        if not self.space.directional:
            named = [b.name for b in self.space.blocks if b.space.directional]
            hint = f"Ask q[{named[0]!r}]." if named and named[0] else "Its label is no direction."
            raise ValueError(f"Expected a posterior of one direction; got {self.space!r}. {hint}")

    def angular_resolution(
        self,
        levels: float | Sequence[float] | Tensor = (0.5, 0.68, 0.9),
        about: Tensor | None = None,
        draws: int = 4096,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Opening angles about a direction that hold given shares of the posterior, in radians.

        Arguments:
            levels: Q shares in (0, 1).
            about: Directions of shape (*batch_shape, 3); the spherical mean where it is None. With
                the true directions it is the error that an event stands for.
            draws: Draws S; a fixed set where `generator` is None.
            generator: Source of other draws.

        Returns:
            Angles of shape (Q, *batch_shape).

        Raises:
            ValueError: If the label is no direction, or a level is not in (0, 1).
        """
        self._direction()
        p = check_levels(levels, self.device, self.dtype)
        if about is not None:
            about = self.space.validate(about, "about").to(self.device)
            about = about.expand(*self.batch_shape, 3).reshape(-1, 3)
        seen = 0

        def angles(z: Tensor, _: Tensor) -> tuple[Tensor, ...]:
            nonlocal seen
            if about is None:
                centre = self.space.mean(z)
            else:
                centre = about[seen : seen + z.shape[1]].to(z)
                seen += z.shape[1]
                centre = centre if len(centre) else z[0]
            angle = 2 * torch.atan2((z - centre).norm(dim=-1), (z + centre).norm(dim=-1))
            return (torch.quantile(angle, p.to(angle), dim=0).transpose(0, 1),)

        return self._reduce(angles, draws, generator)[0].movedim(-1, 0)

    def hpd_area(
        self,
        levels: float | Sequence[float] | Tensor = (0.5, 0.9),
        draws: int = 8192,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Areas of the highest-density regions in square degrees, from draws.

        Arguments:
            levels: Q credibilities in (0, 1).
            draws: Draws S; a fixed set where `generator` is None.
            generator: Source of other draws.

        Returns:
            Areas of shape (Q, *batch_shape).

        Raises:
            ValueError: If the label is no direction, or a level is not in (0, 1).
        """
        self._direction()
        p = check_levels(levels, self.device, self.dtype)

        def areas(_: Tensor, log_prob: Tensor) -> tuple[Tensor, ...]:
            falling = log_prob.double().sort(dim=0, descending=True).values
            log_area = torch.logcumsumexp(-falling, 0) - math.log(len(falling))
            # between the areas of k and k + 1 draws
            place = (p.double() * len(falling) - 1).clamp(0, len(falling) - 1)
            low = place.floor().long()
            high = (low + 1).clamp_max(len(falling) - 1)
            part = (place - low)[:, None]
            area = torch.exp(log_area[low]) * (1 - part) + torch.exp(log_area[high]) * part
            return (area.transpose(0, 1) * _SQUARE_DEGREES,)

        return self._reduce(areas, draws, generator, density=True)[0].movedim(-1, 0)

    def direction_moments(
        self, draws: int = 4096, generator: torch.Generator | None = None
    ) -> DirectionMoments:
        """Spherical mean, von Mises–Fisher κ, Kent's κ and β, and the axes of the ellipse.

        Arguments:
            draws: Draws S; a fixed set where `generator` is None.
            generator: Source of other draws.

        Raises:
            ValueError: If the label is no direction.
        """
        self._direction()
        parts = self._reduce(lambda z, _: _moments(self.space.mean(z), z), draws, generator)
        return DirectionMoments(*parts)


def _moments(mean: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """The fields of `DirectionMoments` of draws (S, n, 3)."""
    kind = z.dtype
    mean, z = mean.double(), z.double()
    # 1 − R from chords, without cancellation
    missing = (((z - mean) ** 2).sum(-1).mean(0) / 2).clamp(1e-30, 1.0)
    other = torch.nn.functional.one_hot(mean.abs().argmin(-1), 3).to(mean)
    first = torch.linalg.cross(mean, other)
    first = torch.nn.functional.normalize(first, dim=-1)
    second = torch.linalg.cross(mean, first)
    across = torch.stack([(z * first).sum(-1), (z * second).sum(-1)], -1)
    second_moment = torch.einsum("sni,snj->nij", across, across) / len(z)
    values, vectors = torch.linalg.eigh(second_moment)
    low, high = values.unbind(-1)
    minor, major = (
        vectors[..., 0, k, None] * first + vectors[..., 1, k, None] * second for k in (0, 1)
    )
    difference = high - low
    less = 1 / (2 * missing - difference).clamp_min(1e-30)
    more = 1 / (2 * missing + difference)
    fields = (
        mean,
        1 - missing,
        _vmf_kappa(missing),
        less + more,
        (less - more) / 2,
        major,
        minor,
        high.clamp_min(0).sqrt(),
        low.clamp_min(0).sqrt(),
    )
    return tuple(t.to(kind) for t in fields)


def _vmf_kappa(missing: Tensor) -> Tensor:
    """κ with coth κ − 1/κ = R = 1 − missing, by Newton's method from Banerjee's start.

    Source: *Clustering on the unit hypersphere using von Mises–Fisher distributions*, A. Banerjee
    et al., 2005, https://www.jmlr.org/papers/v6/banerjee05a.html, eq. 4.4.
    """
    r = 1 - missing
    kappa = (r * (3 - r**2) / (missing * (1 + r)).clamp_min(1e-30)).clamp_min(1e-6)
    for _ in range(_NEWTON_STEPS):
        # coth κ − 1 = 2/(e^(2κ) − 1), so that R close to 1 keeps its digits
        excess = 2 / torch.expm1(2 * kappa.clamp_max(300.0))
        small = kappa < 1e-2
        miss = torch.where(small, 1 - kappa / 3, 1 / kappa - excess)
        slope = torch.where(small, 1 / 3, 1 / kappa**2 - excess * (2 + excess))
        kappa = (kappa + (miss - missing) / slope).clamp_min(1e-9)
    return kappa
