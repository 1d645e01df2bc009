"""The closed-form maps between plane and sphere: inverse, exact density, arc-seconds in float32."""

import math

import pytest
import torch

from flowpost.spaces._polar import (
    log1mexp,
    plane_to_vmf,
    radial,
    radial_inverse,
    vmf_ladj,
    vmf_to_plane,
    zoom,
)

KAPPAS = [1e-3, 0.1, 1.0, 12.0]
DTYPES = {torch.float32: 2e-6, torch.float64: 1e-14}


def halves(dtype):
    return torch.logspace(-9, 1.8, 200, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kappa", KAPPAS)
def test_vmf_step_is_inverted_to_rounding(dtype, kappa):
    half, kappa = halves(dtype), torch.tensor(kappa, dtype=dtype)
    h, rest = plane_to_vmf(half, kappa)
    assert ((h > 0) & (rest > 0)).all()
    torch.testing.assert_close(h + rest, torch.ones_like(h))
    torch.testing.assert_close(vmf_to_plane(h, rest, kappa), half, rtol=DTYPES[dtype], atol=0)


@pytest.mark.parametrize("kappa", KAPPAS)
def test_vmf_step_gives_exactly_the_vmf(kappa):
    half, k = halves(torch.float64), torch.tensor(kappa, dtype=torch.float64)
    h, rest = plane_to_vmf(half, k)
    log_p = vmf_ladj(h, vmf_to_plane(h, rest, k), k) - half - math.log(2 * math.pi)
    exact = math.log(kappa / (2 * math.pi * -math.expm1(-2 * kappa))) - 2 * kappa * h
    torch.testing.assert_close(log_p, exact, rtol=0, atol=1e-12)
    # and its distribution function: the share within the polar angle is that within the radius
    share = torch.expm1(-2 * k * h) / torch.expm1(-2 * k)
    torch.testing.assert_close(share, -torch.expm1(-half), rtol=1e-12, atol=0)


@pytest.mark.parametrize("log_t", [-13.0, -3.0, 0.0, 2.0, 10.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zoom_is_inverted_by_its_reciprocal(dtype, log_t):
    h, rest = plane_to_vmf(halves(dtype), torch.tensor(1.0, dtype=dtype))
    log_t = torch.tensor(log_t, dtype=dtype)
    far, near, growth = zoom(h, rest, log_t)
    again, other, shrink = zoom(far, near, -log_t)
    torch.testing.assert_close(again, h, rtol=DTYPES[dtype], atol=0)
    torch.testing.assert_close(other, rest, rtol=DTYPES[dtype], atol=0)
    torch.testing.assert_close(growth + shrink, torch.zeros_like(h), rtol=0, atol=1e-5)


def test_zoom_is_the_tangent_of_the_half_angle_with_its_solid_angle():
    theta = torch.linspace(0.01, 3.13, 300, dtype=torch.float64)
    h = torch.sin(theta / 2).square().requires_grad_()
    log_t = torch.tensor(-1.3, dtype=torch.float64)
    far, near, growth = zoom(h, 1 - h, log_t)
    tangent = (far / near).sqrt()
    torch.testing.assert_close(tangent, log_t.exp() * torch.tan(theta / 2))
    # dω is proportional to dh
    (slope,) = torch.autograd.grad(far.sum(), h)
    torch.testing.assert_close(growth, slope.log())


def test_gradients_are_finite_at_both_poles():
    half = torch.tensor([0.0, 1e-30, 40.0, 80.0], requires_grad=True)
    kappa = torch.tensor(5.0, requires_grad=True)
    h, rest = plane_to_vmf(half, kappa)
    out = vmf_to_plane(h, rest, kappa) + vmf_ladj(h, half, kappa)
    gradients = torch.autograd.grad(out.sum(), [half, kappa])
    assert all(torch.isfinite(g).all() for g in gradients)


def test_log1mexp():
    a = torch.tensor([1e-10, 0.1, 0.7, 3.0, 50.0], dtype=torch.float64)
    expected = [math.log(-math.expm1(-v)) for v in a.tolist()]
    torch.testing.assert_close(log1mexp(a), torch.tensor(expected, dtype=torch.float64))


# ------------------------------------------------------------------------------------ the radius


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("end", [-50.0, -0.3, 0.0, 0.2, 50.0])
def test_radial_spline_is_inverted_and_its_growth_is_that_of_the_area(dtype, end):
    parameters = 0.7 * torch.randn(40, 1, 19, dtype=torch.float64)
    parameters[..., -1] = end
    r = torch.cat([torch.logspace(-3, 0.59, 200), torch.linspace(3.9, 12, 200)]).double()
    g, growth = radial(r.to(dtype).expand(40, -1), parameters.to(dtype), 4.0)
    assert (g.diff(dim=-1) > 0).all()
    back, shrinkage = radial_inverse(g, parameters.to(dtype), 4.0)
    rounding = 1e-9 if dtype is torch.float64 else 2e-3
    torch.testing.assert_close(back, r.to(dtype).expand_as(g), rtol=rounding, atol=0)
    torch.testing.assert_close(shrinkage, -growth, rtol=0, atol=10 * rounding)
    if dtype is torch.float64:
        step = 1e-6 * r
        ends = [radial((r + s * step).expand(40, -1), parameters, 4.0)[0] ** 2 for s in (1, -1)]
        slope = (ends[0] - ends[1]) / ((r + step) ** 2 - (r - step) ** 2)
        torch.testing.assert_close(growth, slope.log(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("end", [-50.0, -0.3, 0.0, 0.2, 50.0])
def test_radial_spline_goes_on_with_the_area_it_has(end):
    """Beyond the end the density is that of the chart times one factor, met without a step."""
    parameters = 0.7 * torch.randn(20, 1, 19, dtype=torch.float64)
    parameters[..., -1] = end
    r = torch.tensor([4 - 1e-9, 4.0, 4.5, 7.0, 30.0]).double()
    g, growth = radial(r.expand(20, -1), parameters, 4.0)
    constant = (g**2 - r**2)[:, 1:]
    torch.testing.assert_close(constant, constant[:, :1].expand_as(constant))
    assert ((constant >= -0.32) & (constant <= 27.5)).all()
    assert (growth[:, 1:] == 0).all()
    assert (growth[:, 0].abs() < 1e-6).all()
    assert (torch.sign(constant[:, 0]) == math.copysign(1, -end) * (end != 0)).all()
    if not end:
        assert constant.abs().max() < 1e-12


def test_zero_parameters_leave_the_radius_as_it_is():
    r = torch.linspace(0.01, 9, 100).double()
    g, growth = radial(r, torch.zeros(19, dtype=torch.float64), 4.0)
    torch.testing.assert_close(g, r, rtol=1e-12, atol=0)
    assert growth.abs().max() < 1e-12
