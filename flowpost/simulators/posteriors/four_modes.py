"""Five labels behind a simple likelihood, whose squares give four sharp modes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ._base import TractableSimulator
from ._grid import GridDensity

__all__ = ["FourModes"]

_HALF_WIDTH = 3.0
_POINTS = 4
_BATCH = 20_000


class FourModes(TractableSimulator):
    r"""Five labels, eight data: four points in the plane from a normal that the labels set.

    The points have mean :math:`(z_1, z_2)` and covariance
    :math:`\begin{pmatrix} s_1^2 & \rho s_1 s_2 \\ \rho s_1 s_2 & s_2^2 \end{pmatrix}` with
    :math:`s_1 = z_3^2`, :math:`s_2 = z_4^2`, :math:`\rho = \tanh z_5`; the prior is uniform on
    [−3, 3]⁵. The signs of z₃ and z₄ are not observable: four modes of equal weight.

    *The posterior.* Without the box the mean integrates out, and what is left of
    :math:`(\ln|z_3|, \ln|z_4|, z_5)` is

    .. math:: |\Sigma|^{-3/2} \exp(-\tfrac12 \operatorname{tr} \Sigma^{-1} S)\, |z_3 z_4|

    with the scatter matrix S about the mean of the points; it is drawn by `GridDensity`. Then
    :math:`(z_1, z_2) \sim N(\bar x, \Sigma/4)`, rejected outside the box, and two fair signs.
    `log_evidence` takes the fraction that stays inside from such draws (of a fixed seed): a
    relative error of about 1 %, and some 0.03 s for each event.

    Source: J.-M. Lueckmann et al., *Benchmarking simulation-based inference*, 2021,
    https://arxiv.org/abs/2101.04653, task T.3 (SLCP), after G. Papamakarios et al., 2019.
    """

    dim = 5
    features = 2 * _POINTS

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Ends of the prior's box [−3, 3]⁵, each of shape (5,)."""
        return torch.full((5,), -_HALF_WIDTH), torch.full((5,), _HALF_WIDTH)

    def _prior(self, n: int, generator: torch.Generator | None) -> Tensor:
        return _HALF_WIDTH * (2 * torch.rand(n, 5, generator=generator, dtype=torch.float64) - 1)

    def _simulate(self, z: Tensor, generator: torch.Generator | None) -> Tensor:
        noise = torch.randn(len(z), _POINTS, 2, generator=generator, dtype=z.dtype)
        return (z[:, None, :2] + _correlate(noise, z[:, None, 2:])).flatten(1)

    def _posterior(self, x: Tensor, n: int, generator: torch.Generator | None) -> Tensor:
        grid, mean = _shape_density(x)
        kept: list[Tensor] = []
        count = 0
        while count < n:
            z, inside = _draw(grid, mean, min(4 * n, _BATCH), generator)
            kept.append(z[inside])
            count += len(kept[-1])
        z = torch.cat(kept)[:n]
        signs = torch.randint(0, 2, (n, 2), generator=generator) * 2 - 1
        z[:, 2:4] *= signs
        return z

    def _log_joint(self, z: Tensor, x: Tensor) -> Tensor:
        s1, s2, rho = z[:, 2:3].square(), z[:, 3:4].square(), z[:, 4:].tanh()
        points = x.reshape(-1, _POINTS, 2)
        u = (points[..., 0] - z[:, :1]) / s1
        v = (points[..., 1] - z[:, 1:2]) / s2
        rest = 1 - rho.square()
        square = (u.square() - 2 * rho * u * v + v.square()) / rest
        log_norm = math.log(2 * math.pi) + (s1 * s2).log() + 0.5 * rest.log()
        return (-0.5 * square - log_norm).sum(-1) - 5 * math.log(2 * _HALF_WIDTH)

    def _log_evidence(self, x: Tensor) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        values = []
        for event in x:
            grid, mean = _shape_density(event)
            accepted, proposed = 0, 0
            while accepted < _BATCH // 8:
                _, inside = _draw(grid, mean, _BATCH // 4, generator)
                accepted += int(inside.sum())
                proposed += len(inside)
            values.append(grid.log_integral + math.log(accepted / proposed))
        # four signs; the integral over the mean without the box is 2π |Σ|^½ / 4
        constant = -3 * math.log(2 * math.pi) - 5 * math.log(2 * _HALF_WIDTH)
        return torch.stack(values) + constant


def _correlate(noise: Tensor, shape: Tensor) -> Tensor:
    """Return normal noise, shape (…, 2), with the covariance that (z₃, z₄, z₅) set."""
    s1, s2, rho = shape[..., 0].square(), shape[..., 1].square(), shape[..., 2].tanh()
    second = rho * noise[..., 0] + (1 - rho.square()).sqrt() * noise[..., 1]
    return torch.stack((s1 * noise[..., 0], s2 * second), -1)


def _draw(
    grid: GridDensity, mean: Tensor, n: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return labels of the mode with z₃, z₄ > 0, and which of them are inside the box."""
    points = grid.sample(n, generator)
    shape = torch.cat((points[:, :2].exp(), points[:, 2:]), -1)
    noise = torch.randn(len(shape), 2, generator=generator, dtype=shape.dtype)
    centre = mean + _correlate(noise, shape) / math.sqrt(_POINTS)
    return torch.cat((centre, shape), -1), (centre.abs() <= _HALF_WIDTH).all(-1)


def _shape_density(x: Tensor) -> tuple[GridDensity, Tensor]:
    """Return the density of (ln z₃, ln z₄, z₅) for z₃, z₄ > 0, and the mean of the points."""
    points = x.reshape(_POINTS, 2)
    mean = points.mean(0)
    scatter = (points - mean).T @ (points - mean)
    root = scatter.diagonal().sqrt()
    r = scatter[0, 1] / (root[0] * root[1])

    def log_density(p: Tensor) -> Tensor:
        rho = p[:, 2].tanh()
        t = root * (-2 * p[:, :2]).exp()
        rest = 1 - rho.square()
        square = (t.square().sum(-1) - 2 * rho * r * t.prod(-1)) / rest
        return -0.5 * square - 5 * p[:, :2].sum(-1) - 1.5 * rest.log()

    # exp(−t²/2) closes the side of small widths, z⁻⁵ per ln z that of large ones
    top = math.log(_HALF_WIDTH)
    upper = [min(top, 0.5 * math.log(s) + 4.5) for s in root.tolist()]
    lower = [min(0.5 * math.log(s / 8), u - 0.5) for s, u in zip(root.tolist(), upper, strict=True)]
    box = (*lower, -_HALF_WIDTH), (*upper, _HALF_WIDTH)
    return GridDensity(log_density, *box, cells=(48, 48, 40)), mean
