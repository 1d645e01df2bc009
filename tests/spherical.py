"""Directions for tests: quadrature on the sphere, rings, rotations, exact densities, heads."""

import math

import numpy as np
import torch
from scipy import special
from scipy.spatial.transform import Rotation

from flowpost.flows import BoundFlow
from flowpost.head import PosteriorHead
from flowpost.posterior import Posterior
from flowpost.spaces import Circle, Positive, Product, Real, Scale, Sphere

ARCSEC = math.pi / 180 / 3600
DEGREE = math.pi / 180
RUNGS = ("mse", "diagonal", "affine", "spline")


def directions(n, dtype=torch.float64):
    """Uniform directions (n, 3)."""
    return torch.nn.functional.normalize(torch.randn(n, 3, dtype=torch.float64), dim=-1).to(dtype)


def rotation(seed):
    """A random rotation (3, 3)."""
    return torch.tensor(Rotation.random(random_state=seed).as_matrix())


def basis(axis):
    """Rows e1, e2, axis of a right-handed frame, of shape (..., 3, 3)."""
    axis = torch.as_tensor(axis, dtype=torch.float64)
    other = torch.eye(3, dtype=torch.float64)[axis.abs().argmin(-1)]
    first = torch.nn.functional.normalize(torch.linalg.cross(axis, other), dim=-1)
    return torch.stack([first, torch.linalg.cross(axis, first), axis], -2)


def at_angle(axis, theta, phi):
    """Unit vectors at polar angles theta and azimuths phi about one axis (3,)."""
    angles = [torch.as_tensor(t, dtype=torch.float64) for t in (theta, phi)]
    theta, phi = torch.broadcast_tensors(*angles)
    local = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos()], -1)
    return local @ basis(axis)


def ring(axis, theta, n=24):
    """Directions (n, 3) on a small circle of opening angle theta about an axis (3,)."""
    return at_angle(axis, theta, torch.arange(n) * (2 * math.pi / n) + 0.1)


def nodes(axis=(0.0, 0.0, 1.0), t=1.0, n=160, m=160):
    """Directions (n·m, 3) and solid angles (n·m,), crowded about an axis by tan(θ'/2) = t tan(θ/2).

    Gauss-Legendre nodes in cos θ and even ones in azimuth.
    """
    x, w = np.polynomial.legendre.leggauss(n)
    theta = np.arccos(x)
    zoomed = 2 * np.arctan2(t * np.sin(theta / 2), np.cos(theta / 2))
    # dcos θ' / dcos θ
    growth = (t / (np.cos(theta / 2) ** 2 + (t * np.sin(theta / 2)) ** 2)) ** 2
    phi = np.arange(m) * 2 * np.pi / m
    z = at_angle(torch.tensor(axis), torch.tensor(zoomed)[:, None], torch.tensor(phi)[None])
    omega = np.repeat(w * growth * 2 * np.pi / m, m)
    return z.reshape(-1, 3), torch.tensor(omega)


def chord_h(z, axis):
    """sin²(θ/2) from the chord, exact at small angles."""
    return ((z - axis) ** 2).sum(-1) / 4


def vmf_log_prob(z, axis, kappa):
    """ln of the von Mises–Fisher density per steradian, from the chord."""
    if kappa == 0:
        return torch.full(z.shape[:-1], -math.log(4 * math.pi), dtype=torch.float64)
    norm = math.log(kappa / (2 * math.pi)) - math.log(-math.expm1(-2 * kappa))
    return norm - 2 * kappa * chord_h(z, axis)


def vmf_resultant(kappa):
    """1 − R = 1 + 1/κ − coth κ without cancellation."""
    return 1 - kappa / 3 if kappa < 1e-4 else 1 / kappa - 2 / np.expm1(min(2 * kappa, 700.0))


def vmf_quantile(p, kappa):
    """1 − cos θ within which a share p of a von Mises–Fisher density lies."""
    p = np.asarray(p, dtype=float)
    return 2 * p if kappa == 0 else -np.log1p(p * np.expm1(-2 * kappa)) / kappa


def kent_log_prob(z, frame, kappa, beta, omega):
    """ln of the Kent density with rows (major, minor, axis), normalised on nodes of weight omega.

    The Bessel series of its constant overflows at κ of thousands.
    """
    across = (z @ frame[:2].T) ** 2
    log_p = -2 * kappa * chord_h(z, frame[2]) + beta * (across[:, 0] - across[:, 1])
    return log_p - torch.log((omega * log_p.exp()).sum())


def circle_nodes(centre=0.0, t=1.0, n=2000):
    """Angles (n,) and their lengths, crowded about a centre by tan(δ'/2) = t tan(δ/2)."""
    delta = (np.arange(n) + 0.5) * 2 * np.pi / n - np.pi
    zoomed = 2 * np.arctan2(t * np.sin(delta / 2), np.cos(delta / 2))
    growth = t / (np.cos(delta / 2) ** 2 + (t * np.sin(delta / 2)) ** 2)
    return torch.tensor(centre + zoomed), torch.tensor(growth * 2 * np.pi / n)


def von_mises_log_prob(delta, kappa):
    """ln of the von Mises density per radian."""
    return -2 * kappa * torch.sin(delta / 2) ** 2 - math.log(2 * math.pi * special.ive(0, kappa))


def wrapped_normal_log_prob(delta, sigma):
    """ln of the wrapped normal density per radian, of deviations in [−π, π]."""
    turns = torch.arange(-8, 9) * 2 * math.pi
    terms = -(((delta[..., None] + turns) / sigma) ** 2) / 2
    return torch.logsumexp(terms, -1) - math.log(sigma * math.sqrt(2 * math.pi))


def posterior(space, log_width, *, location=None, dtype=torch.float64, **parts):
    """A posterior from the parameters of one leaf; the location is that of the whitening."""
    log_width = torch.as_tensor(log_width, dtype=dtype)
    if location is None:
        location = torch.zeros(*log_width.shape[:-1], space.location_size)
    scale = Scale(*(t.to(dtype) for t in space.default_scale()))
    reference = parts.pop("reference", None)
    tensors = {k: None if t is None else torch.as_tensor(t).to(dtype) for k, t in parts.items()}
    flow = BoundFlow(
        space,
        scale,
        torch.as_tensor(location).to(dtype),
        log_width,
        reference=reference,
        referenced=(reference is not None,),
        **tensors,
    )
    return Posterior(flow)


def width_number(log_width):
    """The number of a head that gives a log width, which heads bound softly at ±14."""
    return 14 * math.atanh(log_width / 14)


def width_numbers(t, kappa):
    """The two numbers of a head on the sphere that give a zoom t of at most 1 and a κ."""
    over = -2 * math.log(t)
    log_core = math.log(kappa - 1e-3) + over
    # κ turns over at a bound of at most 12, as the fourth powers add
    top = math.exp(log_core - math.log(math.expm1(4 * over)) / 4) if over else 12 - 1e-9
    return [-log_core / 2, math.log(top / (12 - top)) - 1]


def frame_axis(q):
    """The axes (*batch, 3) of a posterior of which a direction is the first block."""
    return Sphere()._frame(next(q._flow._placements())[1], q.dtype)[0].detach()


def perturbed(space, flow="spline", *, context=3, size=0.5, dtype=torch.float64, **options):
    """A head with random parameters everywhere."""
    torch.manual_seed(1)
    options = {"layers": 2, "bins": 6, "hidden": 8, **options}
    head = PosteriorHead(context, space, flow, **options).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(size * torch.randn_like(p))
    return grown(head).to(dtype)


def grown(head):
    """The head as after a training that was longer than its splines wait."""
    if head.flow.waited is not None:
        head.flow.waited.fill_(2.0)
    return head


def perturbed_posterior(space, flow="spline", *, events=4, dtype=torch.float64, **options):
    """The detached posterior of a head with random parameters at random contexts."""
    head = perturbed(space, flow, dtype=dtype, **options)
    return head(torch.randn(events, 3, dtype=torch.float64).to(dtype)).detach()


THREE = Product(energy=Positive(), direction=Sphere(), phi=Circle())
SKY = Product(energy=Positive(), vertex=Real(2), direction=Sphere())
