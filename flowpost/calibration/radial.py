r"""A map of the base's radius, and what is left of it for some of the coordinates.

With t = ‖u‖² and a rising G, G(0) = 0, the map of the radius r = √t is g(r) = √G(r²), and
:math:`u' = u\, g(r)/r` has

.. math:: \ln \left| \det \frac{\partial u'}{\partial u} \right|
          = \ln g' + (d - 1) \ln \frac gr
          = \ln G'(t) + \Big(\frac d2 - 1\Big) \ln \frac{G(t)}t ,

smooth also at u = 0, and in one dimension the odd map sign(u) g(|u|).

Where u' ~ N(0, I_d), the law of u is the same in all directions, and so is that of its first k
coordinates: these are made N(0, I_k) by a radial map :math:`G_k` of their own,

.. math:: \frac{p_k(t)}{(2\pi)^{-k/2}}
          = \frac{2 \pi^{m/2}}{\Gamma(m/2)\, (2\pi)^{m/2}}
            \int_0^\infty v^{m-1} e^{L(t + v^2)}\, dv, \qquad m = d - k, \quad
          L(t) = \ln G' + \Big(\frac d2 - 1\Big) \ln \frac Gt - \frac G2 ,

    P(\chi^2_k \le G_k(t)) = E_B[P(\chi^2_d \le G(t/B))], \qquad B \sim \mathrm{Beta}(k/2, m/2) .

So a block-triangular flow under a radial map still has an exact density of its first blocks, and
conditional densities of the others: differences of those of all blocks up to one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from .knots import concatenated, only
from .monotone import Knots, Monotone

__all__ = [
    "MARGINAL_KNOTS",
    "each",
    "log_volume",
    "marginal",
    "stretch",
    "uneach",
    "unstretch",
]

# of the map of fewer coordinates, at most
MARGINAL_KNOTS = 384
_NODES = 2000
# knots at even ratios of ‖u‖²
_EVEN = 160
# probability below which the map of fewer coordinates goes on straight; its square above
_RARE = 1e-15
# ‖u‖² of which u/‖u‖ is not needed
_TINY = 1e-30
# densities that matter: e^-80 of the largest
_DEEP = 80.0


def stretch(
    u: Tensor, maps: Monotone, place: Tensor, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Base coordinates (*sample, *batch, d) through the map of their radius, and ladj alike.

    Arguments:
        u: Base coordinates.
        maps: G of the first k coordinates for each k of `ends`, the last of which is d.
        place: Bin of each event (*batch).
        ends: Where blocks of coordinates end. The ladj of those of a block, with the normal
            density of their images, add up to its log density given the earlier blocks.
    """
    t = u.square().cumsum(-1)[..., [k - 1 for k in ends]].clamp_min(_TINY)
    y, log_slope = maps(t, place)
    grown = y / t
    out = u * grown[..., -1:].sqrt()
    dofs = torch.tensor(ends, dtype=u.dtype, device=u.device)
    ladj = log_slope + (dofs / 2 - 1) * grown.log()
    if len(ends) == 1:
        return out, (ladj / ends[-1]).expand_as(u)
    joint = ladj - y / 2
    own = torch.cat([joint[..., :1], joint.diff(dim=-1)], -1)
    sizes = [k - j for j, k in zip((0, *ends[:-1]), ends, strict=True)]
    normal = [part.square().sum(-1) / 2 for part in out.split(sizes, -1)]
    each = [
        ((own[..., i] + normal[i]) / size).unsqueeze(-1).expand(*u.shape[:-1], size)
        for i, size in enumerate(sizes)
    ]
    return out, torch.cat(each, -1)


def unstretch(
    v: Tensor, maps: Monotone, place: Tensor, ends: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """Inverse of `stretch`, with the ladj of that direction."""
    y = v.square().sum(-1, keepdim=True).clamp_min(_TINY)
    t, _ = maps.select(slice(len(ends) - 1, None)).inverse(y, place)
    u = v * (t / y).sqrt()
    return u, -stretch(u, maps, place, ends)[1]


def each(u: Tensor, maps: Monotone, place: Tensor, rings: Sequence[slice]) -> tuple[Tensor, Tensor]:
    """Base coordinates (*sample, *batch, d) each through its map, and ladj alike.

    Arguments:
        u: Base coordinates.
        maps: Of all d coordinates; that of the first of a ring is G of the ring's ‖u‖².
        place: Bin of each event (*batch).
        rings: Coordinates that share a radial map, from the first coordinate on.
    """
    found = [stretch(u[..., r], _first(maps, r), place, (r.stop - r.start,)) for r in rings]
    rest = slice(rings[-1].stop if rings else 0, None)
    return _joined([*found, maps.select(rest)(u[..., rest], place)])


def uneach(
    v: Tensor, maps: Monotone, place: Tensor, rings: Sequence[slice]
) -> tuple[Tensor, Tensor]:
    """Inverse of `each`, with the ladj of that direction."""
    found = [unstretch(v[..., r], _first(maps, r), place, (r.stop - r.start,)) for r in rings]
    rest = slice(rings[-1].stop if rings else 0, None)
    u, log_slope = maps.select(rest).inverse(v[..., rest], place)
    return _joined([*found, (u, -log_slope)])


def _first(maps: Monotone, ring: slice) -> Monotone:
    return maps.select(slice(ring.start, ring.start + 1))


def _joined(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    u, ladj = (torch.cat(values, -1) for values in zip(*parts, strict=True))
    return u, ladj


def log_volume(maps: Monotone, t: Tensor, dof: int) -> Tensor:
    """L(t) of one map at ‖u‖² of any shape: ln density, but for −(d/2) ln 2π."""
    flat = t.reshape(-1, 1).clamp_min(_TINY)
    y, log_slope = maps(flat, torch.zeros(len(flat), dtype=torch.int64))
    return (log_slope + (dof / 2 - 1) * (y / flat).log() - y / 2).reshape(t.shape)


def marginal(knots: Knots, dof: int, leading: int, compact: bool) -> Knots:
    """The radial map of the first `leading` of `dof` coordinates.

    Arguments:
        knots: G of all coordinates.
        dof: d.
        leading: k < d.
        compact: Whether the slope of G is 1 from its last knot on; that of the result is so too.
    """
    from scipy.special import gammainccinv, gammaincinv

    if torch.equal(knots.x, knots.y):
        return knots
    whole = only(knots)
    t = _grid(whole, dof, leading)
    below, above = _distribution(whole, torch.as_tensor(t), dof, leading)
    known = (below > _RARE) & (above > _RARE**2)
    t, below, above = t[known], below[known], above[known]
    y = np.where(
        below < 0.5,
        2 * gammaincinv(leading / 2, np.minimum(below, 0.5)),
        2 * gammainccinv(leading / 2, np.minimum(above, 0.5)),
    )
    ratio = _density_ratio(whole, torch.as_tensor(np.append(0.0, t)), dof, leading)
    slope = ratio[1:] / np.exp(-y / 2) * (t / y) ** (leading / 2 - 1)
    found = np.stack([np.append(0.0, t), np.append(0.0, y), np.append(0.0, slope)])
    found[2, 0] = ratio[0] ** (2 / leading)
    if compact:
        found[2, -1] = 1.0
    return concatenated(tuple(found[:, _apart(found)]))


def _grid(whole: Monotone, dof: int, leading: int) -> np.ndarray:
    """‖u_k‖² at which a map of fewer coordinates has knots: also where that of all bends."""
    from scipy.special import chdtri

    x = whole.knots.x[0, 0].numpy()
    levels = torch.as_tensor(np.array([chdtri(dof, 0.5), chdtri(leading, _RARE**2)]))
    middle, top = whole.inverse(levels[:, None], torch.zeros(2, dtype=torch.int64))[0][:, 0].numpy()
    bends = [np.linspace(a, b, 4)[1:] ** 2 for a, b in pairwise(np.sqrt(x))]
    even = np.geomspace(1e-6 * middle, max(top, 10 * middle), _EVEN)
    return np.unique(np.concatenate([even, *bends]))


def _apart(found: np.ndarray) -> np.ndarray:
    """Indices of knots that still rise in single precision, the first and the last among them."""
    keep = [0]
    last = found.shape[1] - 1
    for i in range(1, last + 1):
        near = found[:2, i] <= (1 + 1e-5) * found[:2, keep[-1]]
        if not near.any():
            keep.append(i)
        elif i == last:
            keep[-1] = i
    return np.array(keep)


def _distribution(
    whole: Monotone, t: Tensor, dof: int, leading: int
) -> tuple[np.ndarray, np.ndarray]:
    """Probability that ‖u_k‖² is below t (n,), and that it is above."""
    # B = sin²φ with φ = (π/2) x⁴: smooth, and fine where t is small and so is B
    x = (torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES
    phi = math.pi / 2 * x**4
    log_weight = (leading - 1) * phi.sin().log() + (dof - leading - 1) * phi.cos().log()
    log_weight = log_weight + 3 * x.log()
    weight = (log_weight - log_weight.max()).exp()
    weight = weight / weight.sum()
    at = (t[:, None] / phi.sin().square()).reshape(-1, 1)
    y = whole(at, torch.zeros(len(at), dtype=torch.int64))[0].reshape(len(t), -1) / 2
    half = y.new_tensor(dof / 2)
    below = torch.special.gammainc(half, y) @ weight
    above = torch.special.gammaincc(half, y) @ weight
    return below.numpy(), above.numpy()


def _density_ratio(whole: Monotone, t: Tensor, dof: int, leading: int) -> np.ndarray:
    """(2π)^(k/2) times the density of the first k coordinates, at ‖u_k‖² = t (n,)."""
    m = dof - leading
    zero = torch.zeros(len(t), dtype=torch.int64)
    deep = whole(t[:, None], zero)[0] + _DEEP + 2 * dof
    span = (whole.inverse(deep, zero)[0] - t[:, None]).sqrt()
    v = span * (torch.arange(_NODES, dtype=torch.float64) + 0.5) / _NODES
    log_area = math.log(2) - math.lgamma(m / 2) - m / 2 * math.log(2)
    terms = log_volume(whole, t[:, None] + v.square(), dof) + (m - 1) * v.log()
    return ((terms + log_area).exp().sum(-1) * span[:, 0] / _NODES).numpy()
