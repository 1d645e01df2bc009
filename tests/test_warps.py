"""Warps of the whole sphere: inverse, density, and what a head does with them."""

import math

import pytest
import torch
from spherical import directions, grown, nodes

import flowpost as fp
from flowpost.flows.warps import warp, warp_inverse, warp_size
from flowpost.spaces._polar import rational_quadratic

COUNT, BINS = 5, 6


def parameters(n, size=0.5, dtype=torch.float64):
    p = size * torch.randn(n, warp_size(COUNT, BINS), dtype=dtype)
    p[:, -3 * COUNT :] = torch.randn(n, 3 * COUNT, dtype=dtype)
    return p


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-3)])
def test_inverse(dtype, tolerance):
    x, p = directions(500).to(dtype), parameters(500, dtype=dtype)
    y, ladj = warp(x, p, COUNT)
    torch.testing.assert_close(y.norm(dim=-1), torch.ones(500, dtype=dtype))
    back, inverse = warp_inverse(y, p, COUNT)
    torch.testing.assert_close(back, x, rtol=0, atol=tolerance)
    torch.testing.assert_close(inverse, -ladj, rtol=0, atol=20 * tolerance)
    assert (y - x).norm(dim=-1).mean() > 0.1


def test_zeros_are_the_identity():
    x, p = directions(50), parameters(50)
    p[:, : -3 * COUNT] = 0
    y, ladj = warp(x, p, COUNT)
    torch.testing.assert_close(y, x, rtol=0, atol=1e-9)
    torch.testing.assert_close(ladj, torch.zeros(50, dtype=torch.float64), rtol=0, atol=1e-9)


def test_ladj_is_the_growth_of_the_solid_angle():
    x, p = directions(30), parameters(30)
    ladj = warp(x, p, COUNT)[1]
    for i in range(30):
        first = torch.linalg.cross(x[i], torch.eye(3, dtype=torch.float64)[x[i].abs().argmin()])
        first = first / first.norm()
        tangent = torch.stack([first, torch.linalg.cross(x[i], first)], -1)

        def moved(v, i=i):
            return warp((v / v.norm())[None], p[i : i + 1], COUNT)[0][0]

        jacobian = torch.autograd.functional.jacobian(moved, x[i]) @ tangent
        growth = torch.linalg.slogdet(jacobian.T @ jacobian)[1] / 2
        torch.testing.assert_close(ladj[i], growth, rtol=0, atol=1e-6)


def test_nothing_happens_at_an_axis():
    """Density ratio on small circles about every axis and its antipode."""
    p = parameters(1, size=0.3)
    for axis in torch.nn.functional.normalize(p[0, -3 * COUNT :].view(COUNT, 3), dim=-1):
        for pole in (axis, -axis):
            around = torch.nn.functional.normalize(pole + 1e-5 * directions(100), dim=-1)
            ladj = warp(around, p, COUNT)[1]
            assert (ladj.max() - ladj.min()) < 1e-2


def test_spline_keeps_both_ends():
    p = torch.randn(400, 3 * BINS + 1, dtype=torch.float64)
    small = torch.logspace(-14, -1, 400, dtype=torch.float64)
    for h, rest in ((small, 1 - small), (1 - small, small)):
        f, missing, _ = rational_quadratic(h, rest, p)
        back, back_rest, _ = rational_quadratic(f, missing, p, inverse=True)
        torch.testing.assert_close(torch.minimum(back, back_rest), small, rtol=1e-8, atol=0)


@pytest.mark.parametrize(
    ("space", "layers"),
    [(fp.Sphere(), None), (fp.Sphere(), 1), (fp.Product(energy=fp.Positive(), n=fp.Sphere()), 1)],
)
def test_density_of_a_head(space, layers, tmp_path):
    torch.manual_seed(1)
    head = fp.PosteriorHead(3, space, warps=COUNT, bins=BINS, layers=layers, hidden=8).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    grown(head)
    context = torch.randn(4, 3, dtype=torch.float64)
    q = head(context)
    direction = q if isinstance(space, fp.Sphere) else q["n"]
    z, omega = nodes(n=200, m=200)
    p, other = (direction[i].detach().log_prob(z).exp() for i in (0, 1))
    assert (p - other).abs().max() > 0.001
    assert float((p * omega).sum()) == pytest.approx(1, abs=5e-3)
    z, log_prob = q.sample_and_log_prob((20,))
    torch.testing.assert_close(q.log_prob(z), log_prob, rtol=0, atol=1e-6)
    fp.save(head, tmp_path / "head")
    torch.testing.assert_close(fp.load(tmp_path / "head")(context).log_prob(z), q.log_prob(z))


def test_unconditional_density_and_a_batch_of_two_spheres():
    space = fp.Product(a=fp.Sphere(), b=fp.Sphere())
    q = fp.PosteriorHead(0, space, warps=2)(None)
    assert q.sample((7,)).shape == (7, 6)
    flat = fp.PosteriorHead(0, fp.Sphere(), warps=3)(None)
    # an untrained head has the density that it would have without warps
    plain = fp.PosteriorHead(0, fp.Sphere())(None)
    z = directions(20).float()
    torch.testing.assert_close(flat.log_prob(z), plain.log_prob(z), rtol=0, atol=1e-3)
    assert math.isfinite(flat.entropy().item())


@pytest.mark.parametrize(("space", "flow"), [(fp.Real(2), "spline"), (fp.Sphere(), "affine")])
def test_warps_need_a_sphere_and_splines(space, flow):
    with pytest.raises(ValueError, match="Expected warps=0 unless the flow is 'spline'"):
        fp.PosteriorHead(3, space, flow, warps=4)
    with pytest.raises(ValueError, match="Expected warps as a whole number of at least 0"):
        fp.PosteriorHead(3, fp.Sphere(), warps=-1)
