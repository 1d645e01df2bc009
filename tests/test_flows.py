"""Conditional flows: every rung on every space, against autodiff, quadrature and one another."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from quadrature import grid
from scipy import stats

from flowpost.flows import RUNGS, ResidualFlow
from flowpost.flows.spline import groups_of
from flowpost.flows.tail import tail, tail_inverse
from flowpost.head import PosteriorHead
from flowpost.posterior.base import log_density
from flowpost.spaces import Interval, Positive, Product, Real, Scale

CONTEXT = 3
SPACES = {
    "real": Real(1),
    "real3": Real(3),
    "positive": Positive(2),
    "interval": Interval([-1.0, 0.0], [2.0, 1.0]),
    "product": Product(e=Positive(), x=Real(2), y=Interval(-1.0, 2.0)),
    "nested": Product(a=Product(x=Real(), e=Positive(2)), b=Real(2)),
}


def build(space, rung, *, coupling=False, context=CONTEXT, size=0.5, dtype=torch.float64):
    """A flow with random parameters everywhere."""
    torch.manual_seed(1)
    flow = ResidualFlow(
        space, context, rung, layers=2, bins=6, hidden=8, coupling=coupling
    ).double()
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(size * torch.randn_like(p))
    return flow.to(dtype)


def whitening(space, dtype=torch.float64):
    """Some whitening; narrow on an interval, so that draws keep off bounds that round."""
    unit = space.default_scale().unit.to(dtype)
    loc = torch.linspace(-0.5, 0.5, space.dof, dtype=dtype)
    width = torch.linspace(0.7, 1.4, space.dof, dtype=dtype)
    for b in space.blocks:
        if isinstance(b.space, Interval):
            loc[b.base], width[b.base] = 0.2, 0.15
    return Scale(unit, loc, width)


def log_prob(bound, z):
    return log_density(*bound.to_base(z)).sum(-1)


@pytest.fixture(params=SPACES)
def space(request):
    return SPACES[request.param]


@pytest.mark.parametrize("coupling", [False, True], ids=["autoregressive", "coupling"])
@pytest.mark.parametrize("rung", RUNGS)
class TestEveryRungOnEverySpace:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["f64", "f32"]
    )
    def test_inverse(self, space, rung, coupling, dtype, tolerance):
        flow = build(space, rung, coupling=coupling, size=0.3, dtype=dtype)
        bound = flow(torch.randn(50, CONTEXT, dtype=dtype), whitening(space, dtype))
        u = torch.randn(50, space.dof, dtype=dtype)
        with torch.no_grad():
            z, forward = bound.from_base(u)
            again, ladj = bound.to_base(z)
        assert z.dtype == again.dtype == dtype
        # of labels, for a label next to a bound cannot carry all digits of u
        z_again, _ = bound.from_base(again)
        torch.testing.assert_close(z_again, z, rtol=tolerance, atol=tolerance)
        if dtype is torch.float64:
            torch.testing.assert_close(again, u, rtol=1e-6, atol=1e-6)
            torch.testing.assert_close(ladj, -forward, rtol=1e-5, atol=1e-5)

    def test_autodiff_log_determinant_and_triangularity(self, space, rung, coupling):
        flow = build(space, rung, coupling=coupling)
        scale = whitening(space)
        for seed in range(4):
            torch.manual_seed(seed)
            bound = flow(torch.randn(CONTEXT, dtype=torch.float64), scale)
            u = torch.randn(space.dof, dtype=torch.float64)
            z = bound.from_base(u)[0].detach()
            _, ladj = bound.to_base(z)
            jacobian = torch.autograd.functional.jacobian(lambda x, f=bound: f.to_base(x)[0], z)
            torch.testing.assert_close(jacobian.det().abs().log(), ladj.sum())
            for b in space.blocks:
                own = jacobian[b.base, b.columns]
                torch.testing.assert_close(own.det().abs().log(), ladj[b.base].sum())
                later = jacobian[b.base, b.columns.stop :]
                assert torch.equal(later, torch.zeros_like(later))
            jacobian = torch.autograd.functional.jacobian(lambda x, f=bound: f.from_base(x)[0], u)
            torch.testing.assert_close(
                jacobian.det().abs().log(), bound.from_base(u)[1].sum(), rtol=1e-6, atol=1e-6
            )


def test_later_coordinates_do_depend_on_earlier_ones():
    """Without this a flow of independent blocks would pass for block-triangular."""
    space = SPACES["product"]
    for rung, coupling in (("affine", False), ("spline", False), ("spline", True)):
        bound = build(space, rung, coupling=coupling)(
            torch.randn(CONTEXT, dtype=torch.float64), whitening(space)
        )
        z = bound.from_base(torch.full((4,), 0.3, dtype=torch.float64))[0].detach()
        jacobian = torch.autograd.functional.jacobian(lambda x, f=bound: f.to_base(x)[0], z)
        assert (jacobian[1:, 0].abs() > 1e-3).all()
        assert jacobian[3, 1:3].abs().max() > 1e-3
        # within the block of two, spline layers of opposite order couple both ways
        if rung == "spline":
            assert jacobian[1, 2].abs() > 1e-4
            assert jacobian[2, 1].abs() > 1e-4


# ------------------------------------------------------------------------------ normalisation


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("leaf", [Real(), Positive(), Interval(-1.0, 2.0)], ids=repr)
def test_normalised_in_one_dimension(leaf, rung):
    flow = build(leaf, rung, size=0.4)
    bound = flow(torch.randn(5, CONTEXT, dtype=torch.float64), whitening(leaf))
    draws = bound.from_base(torch.randn(2000, 5, 1, dtype=torch.float64))[0].detach()
    for i in range(5):
        z = grid(leaf, draws[:, i], 6001)
        with torch.no_grad():
            p = log_prob(bound[i], torch.tensor(z).unsqueeze(-1)).exp().numpy()
        assert np.trapezoid(p, z) == pytest.approx(1, abs=2e-3)


@pytest.mark.parametrize("coupling", [False, True], ids=["autoregressive", "coupling"])
@pytest.mark.parametrize("rung", ["affine", "spline"])
@pytest.mark.parametrize(
    "leaves",
    [(Real(), Real()), (Positive(), Real()), (Interval(-1.0, 2.0), Positive())],
    ids=str,
)
def test_normalised_in_two_dimensions(leaves, rung, coupling):
    space = Real(2) if leaves == (Real(), Real()) else Product(a=leaves[0], b=leaves[1])
    flow = build(space, rung, coupling=coupling, size=0.3)
    bound = flow(torch.randn(CONTEXT, dtype=torch.float64), whitening(space))
    draws = bound.from_base(torch.randn(2000, 2, dtype=torch.float64))[0].detach()
    a, b = grid(leaves[0], draws[:, 0], 501), grid(leaves[1], draws[:, 1], 501)
    z = torch.tensor(np.stack(np.meshgrid(a, b, indexing="ij"), -1))
    with torch.no_grad():
        p = log_prob(bound, z.reshape(-1, 2)).exp().reshape(501, 501).numpy()
    assert np.trapezoid(np.trapezoid(p, b, axis=1), a) == pytest.approx(1, abs=5e-3)


# -------------------------------------------------------------------------------------- ladder


def copy_lower_rung(lower, upper):
    """Give `upper` the location, widths and triangle of `lower`; all its other parameters zero."""
    with torch.no_grad():
        for p in upper.parameters():
            p.zero_()
        n = len(lower.bias)
        upper.bias[:n] = lower.bias
        upper.weight[:n] = lower.weight
        if lower.log_width is not None:
            d = len(lower.log_width)
            upper.bias[n : n + d] = lower.log_width


@pytest.mark.parametrize(
    ("low", "high"), [("mse", "diagonal"), ("diagonal", "affine"), ("affine", "spline")]
)
def test_each_rung_contains_the_one_below(space, low, high):
    lower, upper = build(space, low, size=0.25), build(space, high, size=0.25)
    copy_lower_rung(lower, upper)
    context, scale = torch.randn(40, CONTEXT, dtype=torch.float64), whitening(space)
    u = torch.randn(40, space.dof, dtype=torch.float64).clamp(-4.9, 4.9)
    z, _ = lower(context, scale).from_base(u)
    torch.testing.assert_close(upper(context, scale).from_base(u)[0], z)
    torch.testing.assert_close(
        log_prob(upper(context, scale), z), log_prob(lower(context, scale), z)
    )


def test_affine_is_the_full_covariance_gaussian():
    flow = build(Real(3), "affine")
    context = torch.randn(7, CONTEXT, dtype=torch.float64)
    bound = flow(context, whitening(Real(3)))
    zero = torch.zeros(7, 3, dtype=torch.float64)
    mean = bound.from_base(zero)[0]
    matrix = torch.stack([bound.from_base(zero + e)[0] - mean for e in torch.eye(3).double()], -1)
    assert matrix.diagonal(dim1=-2, dim2=-1).min() > 0
    assert matrix[:, [1, 2, 2], [0, 0, 1]].abs().min() > 1e-4
    assert matrix.triu(1).abs().max() < 1e-12
    z = torch.randn(7, 3, dtype=torch.float64)
    normal = torch.distributions.MultivariateNormal(mean, scale_tril=matrix)
    torch.testing.assert_close(log_prob(bound, z), normal.log_prob(z))


@pytest.mark.parametrize("coupling", [False, True], ids=["autoregressive", "coupling"])
def test_untrained_spline_is_the_diagonal(space, coupling):
    options = {"layers": 3, "bins": 16, "hidden": 32}
    spline = ResidualFlow(space, CONTEXT, "spline", coupling=coupling, **options)
    diagonal = ResidualFlow(space, CONTEXT, "diagonal", **options)
    context, scale = torch.randn(200, CONTEXT), whitening(space, torch.float32)
    u = torch.randn(200, space.dof).clamp(-4.99, 4.99)
    z, _ = diagonal(context, scale).from_base(u)
    torch.testing.assert_close(spline(context, scale).from_base(u)[0], z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(
        log_prob(spline(context, scale), z),
        log_prob(diagonal(context, scale), z),
        rtol=1e-5,
        atol=2e-5,
    )


def test_width_of_mse_ignores_the_context_and_learns():
    flow = build(Real(2), "mse")
    bound = flow(100 * torch.randn(6, CONTEXT, dtype=torch.float64), whitening(Real(2)))
    assert torch.equal(bound.log_width, bound.log_width[:1].expand(6, 2))
    log_prob(bound, torch.zeros(6, 2).double()).sum().backward()
    assert (flow.log_width.grad.abs() > 0).all()


def test_mse_gradient_is_that_of_mean_squared_error():
    """Whitened labels, width 1: d NLL / d mean = (d / 2) · d MSE / d mean."""
    torch.manual_seed(0)
    n, d = 64, 3
    z = torch.randn(n, d, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 50.0]).double() + 7
    head = PosteriorHead(5, Real(d), flow="mse").double()
    head.fit_scale(z)
    with torch.no_grad():
        head.flow.weight.normal_()
    context = torch.randn(n, 5, dtype=torch.float64)
    head.loss(context, z).backward()
    weight = head.flow.weight.detach().clone().requires_grad_()
    bias = head.flow.bias.detach().clone().requires_grad_()
    whitened = (z - z.mean(0)) / z.std(0, correction=0)
    F.mse_loss(F.linear(context, weight, bias), whitened).backward()
    torch.testing.assert_close(head.flow.weight.grad, d / 2 * weight.grad)
    torch.testing.assert_close(head.flow.bias.grad, d / 2 * bias.grad)


# -------------------------------------------------------------------------------- tail, outliers


def test_tail_closed_form_and_derivative():
    u = torch.tensor([-9.0, -5.5, -5.0, -1.0, 0.0, 0.3, 4.999, 5.0, 6.0, 12.0]).double()
    t, ladj = tail(u, 5.0)
    size = u.abs().numpy()
    expected = np.where(size <= 5, size, 5 + np.expm1(size - 5)) * np.sign(u.numpy())
    np.testing.assert_allclose(t, expected, rtol=1e-12)
    again, inverse = tail_inverse(t, 5.0)
    torch.testing.assert_close(again, u)
    torch.testing.assert_close(inverse, -ladj)


@pytest.mark.parametrize("function", [tail, tail_inverse])
@pytest.mark.parametrize("at", [-30.0, -5.1, -1.0, 0.0, 0.3, 4.9, 5.2, 9.0])
def test_tail_derivative_exists_also_at_zero(function, at):
    x = torch.tensor([at], dtype=torch.float64, requires_grad=True)
    value, ladj = function(x, 5.0)
    (slope,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(slope, ladj.detach().exp())


@pytest.mark.parametrize("space", [Real(1), Real(3), Positive(1)], ids=repr)
def test_an_outlier_of_ten_thousand_sigma_costs_little(space):
    flow = ResidualFlow(space, 0, "spline", layers=2, bins=16, hidden=16)
    bound = flow(None, whitening(space, torch.float32))
    usual, _ = bound.from_base(torch.zeros(space.dof))
    location, width = whitening(space)[1:]
    far = location[0] + 1e4 * width[0]
    z = usual.double().clone()
    z[0] = far.exp() if isinstance(space, Positive) else far
    if isinstance(space, Positive):
        z = z.clamp_max(1e300)  # exp of 10⁴ is no number: stay at the largest, 690 sigma
    cost = log_prob(bound, usual) - log_prob(bound, z)
    chart = math.log(z[0].item()) if isinstance(space, Positive) else 0.0
    assert 10 < cost.item() - chart < 130
    gaussian = ResidualFlow(space, 0, "diagonal", layers=2, bins=16, hidden=16)
    assert (log_prob(gaussian(None, whitening(space)), usual.double()) - log_prob(
        gaussian(None, whitening(space)), z
    )).item() - chart > 1e5  # fmt: skip


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_outliers_of_the_context_give_finite_numbers(space, rung, dtype):
    flow = build(space, rung, dtype=dtype)
    context = torch.tensor([[1e6, -1e6, 1e6], [0, 1e6, 0], [0, 0, 0]], dtype=dtype)
    z, _ = flow(torch.zeros(1, CONTEXT, dtype=dtype), whitening(space, dtype)).from_base(
        torch.zeros(1, space.dof, dtype=dtype)
    )
    value = log_prob(flow(context, whitening(space, dtype)), z.detach().expand(3, -1))
    assert torch.isfinite(value).all()
    gradients = torch.autograd.grad(value.sum(), list(flow.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)
    draws, _ = flow(context, whitening(space, dtype)).from_base(
        torch.randn(3, space.dof, dtype=dtype)
    )
    assert space.contains(draws).all()


# ------------------------------------------------------------------------------------- the rest


@pytest.mark.parametrize("rung", RUNGS)
def test_unconditional(space, rung):
    flow = build(space, rung, context=0)
    bound = flow(None, whitening(space))
    assert bound.batch_shape == ()
    z, _ = bound.from_base(torch.randn(30, space.dof, dtype=torch.float64))
    assert z.shape == (30, space.label_size)
    conditional = build(space, rung)
    with torch.no_grad():
        for p in conditional.parameters():
            p.zero_()
        own = dict(conditional.named_parameters())
        for name, p in flow.named_parameters():
            own[name].copy_(p)
    repeated = conditional(torch.randn(30, CONTEXT, dtype=torch.float64), whitening(space))
    torch.testing.assert_close(log_prob(repeated, z), log_prob(bound, z))


def test_float32_agrees_with_float64(space):
    flow = build(space, "spline", size=0.3)
    context = torch.randn(300, CONTEXT, dtype=torch.float64)
    z, _ = flow(context, whitening(space)).from_base(torch.randn(300, space.dof).double())
    # the label that float32 can hold, in both
    z = z.detach().float().double()
    kept = space.contains(z.float())
    assert kept.sum() > 280
    context, z = context[kept], z[kept]
    exact = log_prob(flow(context, whitening(space)), z)
    single = flow.float()(context.float(), whitening(space, torch.float32))
    assert (log_prob(single, z).double() - exact).abs().max() < 2e-3


def test_leading_blocks_have_the_density_of_their_coordinates():
    space = SPACES["product"]
    for coupling in (False, True):
        flow = build(space, "spline", coupling=coupling)
        bound = flow(torch.randn(20, CONTEXT, dtype=torch.float64), whitening(space))
        z, _ = bound.from_base(torch.randn(20, 4, dtype=torch.float64))
        terms = log_density(*bound.to_base(z))
        for count, d in ((1, 1), (2, 3), (3, 4)):
            torch.testing.assert_close(
                log_prob(bound.leading(count), z[:, :d]), terms[:, :d].sum(-1)
            )
            u = torch.randn(20, d, dtype=torch.float64)
            torch.testing.assert_close(
                bound.leading(count).from_base(u)[0],
                bound.from_base(F.pad(u, (0, 4 - d)))[0][:, :d],
            )


def test_groups_keep_the_order_of_blocks():
    space = Product(a=Real(3), b=Positive(), c=Real(2))
    assert groups_of(space, coupling=False, reverse=False) == [[0], [1], [2], [3], [4], [5]]
    assert groups_of(space, coupling=False, reverse=True) == [[2], [1], [0], [3], [5], [4]]
    assert groups_of(space, coupling=True, reverse=False) == [[0, 1], [2], [3], [4], [5]]
    assert groups_of(space, coupling=True, reverse=True) == [[2], [0, 1], [3], [5], [4]]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rung": "gaussian"}, "Expected flow as one of mse, diagonal, affine, spline; got 'gaus"),
        ({"bins": 1}, "Expected bins as a whole number of at least 2; got 1"),
        ({"layers": 0}, "Expected layers as a whole number of at least 1; got 0"),
        ({"hidden": 0}, "Expected hidden"),
        ({"context": -1}, "Expected context"),
    ],
)
def test_options_out_of_range(options, text):
    kwargs = {"context": 2, "rung": "spline", "layers": 2, "bins": 4, "hidden": 4, **options}
    with pytest.raises(ValueError, match=text):
        ResidualFlow(Real(1), kwargs.pop("context"), kwargs.pop("rung"), **kwargs)


def test_spline_reaches_a_mixture_that_no_gaussian_does():
    """A density fit in closed reach: 1-D mixture of normals, optimised on quadrature points."""
    torch.manual_seed(0)
    flow = ResidualFlow(Real(1), 0, "spline", layers=2, bins=16, hidden=8)
    z = torch.linspace(-6, 6, 601).unsqueeze(1)
    p = 0.5 * stats.norm.pdf(z, -2, 0.5) + 0.5 * stats.norm.pdf(z, 1.5, 1)
    p = torch.tensor(p[:, 0], dtype=torch.float32)
    p /= p.sum()
    entropy = -(p * (p / 0.02).clamp_min(1e-30).log()).sum()
    optimizer = torch.optim.Adam(flow.parameters(), 0.03)
    for _ in range(200):
        optimizer.zero_grad()
        loss = -(p * log_prob(flow(None, Real(1).default_scale()), z)).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() - entropy.item() < 0.02
