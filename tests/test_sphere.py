"""Directions as labels: charts against autodiff, quadrature, exact densities; no pole, no seam."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from spherical import (
    ARCSEC,
    DEGREE,
    RUNGS,
    THREE,
    at_angle,
    basis,
    directions,
    frame_axis,
    kent_log_prob,
    nodes,
    perturbed,
    perturbed_posterior,
    posterior,
    ring,
    rotation,
    vmf_log_prob,
    vmf_quantile,
    width_number,
    width_numbers,
)

import flowpost as fp
from flowpost.directions import separation
from flowpost.head import PosteriorHead
from flowpost.posterior import BlockPosterior, Posterior
from flowpost.spaces import Circle, Positive, Product, Real, Sphere

WIDTHS = [1e-5, 0.3, 3.0]
PARTS = list(itertools.product(["round", "elliptic"], ["plain", "profile"], ["free", "reference"]))


def random_posterior(t, parts, dtype=torch.float64, events=60):
    """Posteriors of one zoom t about random axes, each with its own κ, frame and warps."""
    shape, profile, reference = (w in parts for w in ("elliptic", "profile", "reference"))
    log_width = torch.stack([torch.full((events,), math.log(t)), 2 * torch.randn(events)], -1)
    return posterior(
        Sphere(),
        log_width.to(dtype),
        location=torch.randn(events, 6),
        shape=torch.randn(events, 2) if shape else None,
        profile=0.5 * torch.randn(events, 19) if profile else None,
        reference=directions(events, dtype) if reference else None,
        dtype=dtype,
    )


# ------------------------------------------------------------------------------------- bijection


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("t", WIDTHS)
class TestBijection:
    @pytest.mark.parametrize(
        ("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)], ids=["f64", "f32"]
    )
    def test_round_trip(self, t, parts, dtype, tolerance):
        q = random_posterior(t, parts, dtype)
        u = torch.randn(60, 2, dtype=torch.float64).to(dtype)
        z = q.from_base(u)
        assert z.dtype == dtype
        torch.testing.assert_close(z.norm(dim=-1), torch.ones_like(z[:, 0]))
        # the label itself is rounded, which a narrow posterior sees
        rounding = 4 * torch.finfo(dtype).eps / min(t, 1.0)
        torch.testing.assert_close(q.to_base(z), u, rtol=0, atol=20 * (tolerance + 10 * rounding))
        again = q.from_base(q.to_base(z))
        assert separation(again, z).max() < tolerance * min(t, 1.0) + torch.finfo(dtype).eps * 4

    def test_all_directions_come_back(self, t, parts):
        q = random_posterior(t, parts)
        z = directions(60)
        again = q.from_base(q.to_base(z))
        assert separation(again, z).max() < 1e-7

    def test_ladj_against_autodiff_on_the_tangent_plane(self, t, parts):
        q = random_posterior(t, parts)
        for z in (q.from_base(torch.randn(60, 2).double()), directions(60)):
            z = z.detach().requires_grad_()
            u, ladj = q._flow.to_base(z)
            rows = [torch.autograd.grad(u[:, i].sum(), z, retain_graph=True)[0] for i in (0, 1)]
            jacobian = torch.stack(rows, -2)
            tangent = torch.stack([basis(a)[:2] for a in z.detach()])
            within = jacobian @ tangent.mT
            torch.testing.assert_close(
                within.det().abs().log(), ladj.sum(-1).detach(), rtol=1e-6, atol=1e-6
            )

    def test_ladj_of_both_directions(self, t, parts):
        q = random_posterior(t, parts)
        z, forward = q._flow.from_base(torch.randn(60, 2).double())
        _, back = q._flow.to_base(z)
        torch.testing.assert_close(back.sum(-1), -forward.sum(-1), rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(q.log_prob(z), q._decode(q.to_base(z))[1], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("log_t", [math.log(1e-5), -2.0, 0.0])
def test_gradients_of_draws(rung, log_t):
    for dtype in (torch.float32, torch.float64):
        head = perturbed(Sphere(), rung, dtype=dtype, size=0.3)
        with torch.no_grad():
            (head.flow.bias[6:7] if rung != "mse" else head.flow.log_width[:1]).fill_(log_t)
        z = head(torch.randn(30, 3, dtype=dtype)).rsample((20,))
        target = directions(1, dtype)[0]
        gradients = torch.autograd.grad((z @ target).sum(), list(head.parameters()))
        assert all(torch.isfinite(g).all() for g in gradients)
        assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("rung", RUNGS)
def test_gradient_of_draws_is_that_of_differences(rung):
    head = perturbed(Sphere(), rung, size=0.3)
    context, u = torch.randn(5, 3).double(), torch.randn(7, 5, 2).double()
    direction = directions(1)[0]
    parameters = [head.flow.bias, head.flow.weight]
    gradients = torch.autograd.grad((head(context).from_base(u) @ direction).sum(), parameters)
    for p, g in zip(parameters, gradients, strict=True):
        step = torch.randn_like(p)
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                p.add_(sign * 1e-6 * step)
                ends.append((head(context).from_base(u) @ direction).sum().item())
                p.sub_(sign * 1e-6 * step)
        found = (g * step).sum().item()
        assert found == pytest.approx((ends[0] - ends[1]) / 2e-6, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rung", RUNGS)
def test_float32_agrees_with_float64(rung):
    head = perturbed(Sphere(), rung, size=0.2)
    context = torch.randn(400, 3).double()
    z = torch.cat([head(context).sample()[:200], directions(200)])
    exact = head(context).log_prob(z)
    single = head.float()(context.float()).log_prob(z)
    assert single.dtype == torch.float32
    assert (single.double() - exact).abs().max() < 3e-3


# --------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_normalised(rung, dtype):
    q = perturbed_posterior(Sphere(), rung, dtype=dtype, size=0.12)
    z, omega = nodes(n=160, m=160)
    p = q.log_prob(z.to(dtype)[:, None]).double().exp()
    np.testing.assert_allclose((p * omega[:, None]).sum(0), 1.0, rtol=2e-3)
    # and it is a density of some structure
    assert (p.max(0).values > 1.5 / (4 * math.pi)).all()


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
@pytest.mark.parametrize("t", WIDTHS)
def test_normalised_at_every_width(t, parts):
    q = random_posterior(t, parts, events=3)
    for i, centre in enumerate(frame_axis(q)):
        z, omega = nodes(centre.tolist(), t, n=300, m=80 if "elliptic" in parts else 8)
        assert float((q[i].log_prob(z).exp() * omega).sum()) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize("rung", RUNGS)
def test_draws_have_the_density(rung):
    """Moments of draws against those of the density on quadrature nodes."""
    q = perturbed_posterior(Sphere(), rung, size=0.25, events=1)[0]
    z, omega = nodes(n=250, m=250)
    p = q.log_prob(z).exp() * omega
    draws = q.sample((40_000,), torch.Generator().manual_seed(0))
    error = draws.std(0) / 200
    assert ((draws.mean(0) - p @ z).abs() < 5 * error).all()
    for a in directions(3):
        share = (draws @ a > 0.3).double().mean()
        assert share.item() == pytest.approx(float(p[z @ a > 0.3].sum()), abs=0.015)


@pytest.mark.parametrize("rung", RUNGS)
def test_first_block_of_a_product_is_normalised(rung):
    q = perturbed_posterior(THREE, rung, size=0.2)["direction"]
    assert type(q) is Posterior
    assert q.space == Sphere()
    z, omega = nodes(n=400, m=400)
    p = q.log_prob(z[:, None]).exp()
    np.testing.assert_allclose((p * omega[:, None]).sum(0), 1.0, rtol=2e-3)


@pytest.mark.parametrize("rung", RUNGS)
def test_other_blocks_are_normalised_given_the_direction(rung):
    q = perturbed_posterior(THREE, rung, size=0.2, events=1)[0]
    phi = (torch.arange(120) + 0.5) * 2 * math.pi / 120
    log_e = torch.linspace(-10, 10, 200)
    for z in directions(2):
        grid = torch.cat(
            [
                log_e.exp().double()[:, None, None].expand(200, 120, 1),
                z.expand(200, 120, 3),
                phi.double()[None, :, None].expand(200, 120, 1),
            ],
            -1,
        )
        joint = (q.log_prob(grid) + log_e[:, None]).exp()
        total = torch.trapezoid(joint, log_e.double(), dim=0).sum() * 2 * math.pi / 120
        expected = q["direction"].log_prob(z).exp()
        assert total.item() == pytest.approx(expected.item(), rel=0.01)


# ------------------------------------------------------------------------------------ validation


def test_unit_vectors_within_the_tolerance_are_normalised():
    z = directions(5) * torch.tensor([1.0, 0.9992, 1.0009, 1.0, 0.9995])[:, None]
    kept = Sphere().validate(z)
    torch.testing.assert_close(kept.norm(dim=-1), torch.ones(5).double(), rtol=0, atol=1e-15)
    torch.testing.assert_close(kept, torch.nn.functional.normalize(z, dim=-1))
    q = PosteriorHead(0, Sphere(), "diagonal").double()(None)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(kept))
    assert Sphere().contains(z).all()
    assert q.support.check(z).all()


@pytest.mark.parametrize("length", [0.998, 1.002, 0.0, 17.0])
def test_other_lengths_are_refused_with_row_and_length(length):
    z = directions(4)
    z[2] *= length
    with pytest.raises(ValueError, match="Expected unit vectors") as error:
        Sphere().validate(z)
    text = str(error.value)
    assert "in labels, row 2" in text
    assert f"of length {length:g} in labels" in text
    assert "(x, y, z) as labels of Sphere, of a length within 1e-3 of 1" in text
    assert "(1 such of 4 events). Normalise them: torch.nn.functional.normalize(v, dim=-1)." in text
    assert Sphere().contains(z).tolist() == [True, True, False, True]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("column", [0, 2])
def test_directions_that_are_not_finite(value, column):
    z = directions(4)
    z[1, column] = value
    with pytest.raises(ValueError, match=rf"^Expected .*; got .*{value:g}.* in labels, row 1"):
        Sphere().validate(z)
    assert not Sphere().contains(z)[1]


def test_wrong_shapes():
    with pytest.raises(ValueError, match=re.escape("shape (..., 3) for Sphere(); got (5, 2)")):
        Sphere().validate(torch.ones(5, 2))
    with pytest.raises(ValueError, match=re.escape("got ()")):
        Sphere().validate(torch.tensor(1.0))
    angles = "flowpost.directions.from_ra_dec and from_zenith_azimuth make vectors"
    for call in (Sphere().validate, PosteriorHead(0, Sphere()).fit_scale):
        with pytest.raises(ValueError, match=rf"got \(5, 2\).*{re.escape(angles)}"):
            call(torch.ones(5, 2))
    with pytest.raises(ValueError, match=angles):
        THREE.validate(torch.ones(5, 4))
    head = PosteriorHead(2, Sphere())
    with pytest.raises(ValueError, match=r"Expected one label for each context; got contexts"):
        head.log_prob(torch.zeros(4, 2), directions(5))


def test_error_inside_a_product_names_the_block():
    z = torch.cat([torch.ones(3, 1), 2 * directions(3, torch.float32), torch.zeros(3, 1)], -1)
    with pytest.raises(ValueError, match=r"row 0, column 'direction\[0\]'"):
        THREE.validate(z)


# ---------------------------------------------------------------------------- no seam and no pole


AXES = torch.cat([torch.eye(3), -torch.eye(3)]).double()


@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_density_on_small_rings_about_every_axis(parts):
    q = random_posterior(0.4, parts, events=6)
    for i in range(6):
        for axis in AXES:
            p = q[i].log_prob(ring(axis, 1e-4))
            assert (p.max() - p.min()).item() < 0.02


@pytest.mark.parametrize("t", [1e-3, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("rung", ["diagonal", "affine"])
def test_density_on_small_rings_about_axis_and_antipode(rung, t):
    parts = ("elliptic",) if rung == "affine" else ()
    q = random_posterior(t, parts, events=10)
    for i, axis in enumerate(frame_axis(q)):
        for centre in (axis, -axis):
            # a ring small in units of the width at both ends
            p = q[i].log_prob(ring(centre, 1e-4 * min(t, 1 / t)))
            assert (p.max() - p.min()).item() < 1e-3
            at = q[i].log_prob(centre)
            assert (p - at).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("parts", PARTS, ids="-".join)
def test_density_at_the_very_axis_and_antipode_is_that_beside_it(parts, dtype):
    q = random_posterior(0.5, parts, dtype, events=20)
    axis = frame_axis(q)
    for sign in (1, -1):
        z = sign * axis
        beside = torch.stack([ring(a, 1e-5, 8) for a in z.double()], 1).to(dtype)
        here, there = q.log_prob(z).double(), q.log_prob(beside).double()
        # a profile may have a cone at the axis
        assert (there - here).abs().max() < (0.2 if "profile" in parts and sign > 0 else 0.01)


@pytest.mark.parametrize("size", [0.02, 0.05])
def test_a_spline_gains_no_structure_towards_the_antipode(size):
    q = perturbed_posterior(Sphere(), "spline", size=size, events=8)
    for i, axis in enumerate(frame_axis(q)):
        p = q[i].log_prob(torch.stack([ring(-axis, a * DEGREE, 48) for a in (3, 5)]))
        assert p[0].max() - p[0].min() < math.log(2)
        # random splines are steep before the rim; trained ones are held to a factor of two
        assert (p[0].logsumexp(0) - p[1].logsumexp(0)).abs() < 2


def test_energy_leans_on_the_direction_without_a_seam():
    """The triangle of "affine" across the antipode, where the base coordinates jump."""
    space = Product(energy=Positive(), direction=Sphere())
    q = perturbed_posterior(space, "affine", size=0.4, events=6)
    assert q._flow.lower[:, 2, :2].abs().max(-1).values.min() > 0.1
    for i, axis in enumerate(frame_axis(q)):
        for energy in (0.2, 1.0, 6.0):
            for centre in (axis, -axis, *AXES):
                z = ring(centre, 1e-5)
                z = torch.cat([torch.full((len(z), 1), energy).double(), z], -1)
                p = q[i].log_prob(z)
                assert (p.max() - p.min()).item() < 0.02
    # and it does lean: the conditional of the energy differs between directions
    u = torch.tensor([[-1.5, 0.0, 0.0], [1.5, 0.0, 0.0]]).double()
    energy = q[0].from_base(u)[:, 0]
    assert (energy.log().diff().abs() > 0.05).all()


@pytest.mark.parametrize("rung", ["diagonal", "affine"])
def test_density_turns_with_axis_and_frame(rung):
    parts = ("elliptic", "reference") if rung == "affine" else ("reference",)
    q = random_posterior(0.2, parts, events=40)
    turn = rotation(3)
    flow = q._flow
    delta, second = flow.location.split(3, -1)
    first = torch.tensor([1.0, 0.0, 0.0]).double()
    location = torch.cat([delta @ turn.T, (second + first) @ turn.T - first], -1)
    turned = posterior(
        Sphere(), flow.log_width, location=location, shape=flow.shape,
        reference=flow.reference @ turn.T,
    )  # fmt: skip
    z = directions(40)
    torch.testing.assert_close(turned.log_prob(z @ turn.T), q.log_prob(z))


@pytest.mark.parametrize("rung", ["affine", "spline"])
def test_training_is_the_same_for_rotated_labels(rung):
    """Splines know the azimuth of the frame and fit the noise of the draws differently."""
    torch.manual_seed(5)
    h = torch.tensor(vmf_quantile(torch.rand(2000).numpy(), 30.0)) / 2
    z = at_angle(torch.eye(3).double()[2], 2 * h.sqrt().asin(), 2 * math.pi * torch.rand(2000))
    best = []
    for seed in (None, 1):
        turned = z if seed is None else z @ rotation(seed).T
        torch.manual_seed(0)
        model = fp.PosteriorModel(None, PosteriorHead(0, Sphere(), rung, layers=1, hidden=8))
        fp.fit(model, turned, turned, epochs=5, batch_size=250, progress=False, lr=3e-3)
        best.append(model.loss(None, turned).item())
    exact = -vmf_log_prob(z, torch.eye(3).double()[2], 30.0).mean().item()
    assert max(best) - min(best) < (1e-3 if rung == "affine" else 0.01)
    assert exact - 0.03 < best[0] < exact


def test_scale_turns_with_the_labels():
    z = torch.nn.functional.normalize(directions(500) * 0.2 + directions(1), dim=-1)
    for seed in range(4):
        turn = rotation(seed)
        scale, turned = Sphere().fit_scale(z), Sphere().fit_scale(z @ turn.T)
        torch.testing.assert_close(turned.scale, scale.scale)
        centre = Sphere().centre(turned)
        torch.testing.assert_close(centre, Sphere().centre(scale) @ turn.T)
        torch.testing.assert_close(
            centre, torch.nn.functional.normalize((z @ turn.T).mean(0), dim=0)
        )
    # of a cloud about a pole as well
    pole = torch.nn.functional.normalize(0.1 * directions(500) - AXES[2], dim=-1)
    assert separation(Sphere().centre(Sphere().fit_scale(pole)), -AXES[2]) < 0.02


def test_scale_finds_the_width():
    """A head that knows the scale alone is within some tenths of a nat of an arc-second."""
    h = torch.tensor(vmf_quantile(np.random.default_rng(0).random(2000), 1 / ARCSEC**2)) / 2
    z = at_angle(directions(1)[0], 2 * h.sqrt().asin(), 2 * math.pi * torch.rand(2000))
    head = PosteriorHead(0, Sphere(), "diagonal").double().fit_scale(z)
    exact = math.log(1 / ARCSEC**2 / (2 * math.pi)) - 1
    assert head.loss(None, z).item() == pytest.approx(-exact, abs=0.1)


def test_weights_of_the_whitening_are_counts():
    z, count = directions(60) * 0.3 + AXES[0], torch.randint(1, 4, (60,))
    z = torch.nn.functional.normalize(z, dim=-1)
    weighted = Sphere().fit_scale(z, count.double())
    repeated = Sphere().fit_scale(z.repeat_interleave(count, dim=0))
    for a, b in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(a, b)


# ----------------------------------------------------------------------------- exact densities


KAPPAS = [0.0, 1e-2, 0.3, 1.0, 5.0, 12.0, 20.0, 50.0, 200.0, 1e3, 1e4, 1e6, 1e8, 1e10]


@pytest.mark.parametrize("kappa", [2e-3, 0.1, 0.5])
def test_exactly_a_vmf_where_nothing_zooms(kappa):
    q = posterior(Sphere(), width_numbers(1.0, kappa))
    z = torch.cat([directions(300), AXES])
    exact = stats.vonmises_fisher(np.array([0.0, 0.0, 1.0]), kappa).logpdf(z.numpy())
    np.testing.assert_allclose(q.log_prob(z), exact, rtol=0, atol=1e-6)
    single = posterior(Sphere(), width_numbers(1.0, kappa), dtype=torch.float32)
    np.testing.assert_allclose(single.log_prob(z.float()), exact, rtol=0, atol=1e-5)


def test_two_numbers_reach_every_vmf():
    """KL of the best (ln t, κ) from κ = 0 to an arc-second of an arc-second."""
    p, weight = np.polynomial.legendre.leggauss(160)
    # substitution s² crowds nodes at the antipodal end
    share, weight = 1 - ((1 - p) / 2) ** 3, 3 * ((1 - p) / 2) ** 2 * weight / 2
    one_minus = np.stack([vmf_quantile(share, k) for k in KAPPAS], 1)
    theta = torch.tensor(2 * np.arcsin(np.sqrt(np.clip(one_minus / 2, 0, 1))))
    z = torch.stack([theta.sin(), torch.zeros_like(theta), theta.cos()], -1)
    pole = AXES[2]
    log_p = torch.stack([vmf_log_prob(z[:, i], pole, k) for i, k in enumerate(KAPPAS)], 1)
    start = [-0.5 * math.log(max(k, 1e-4)) for k in KAPPAS]
    raw = torch.tensor([[s, 0.0] for s in start], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=300, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9, tolerance_change=1e-13)  # fmt: skip

    def kl():
        q = posterior(Sphere(), raw)
        return (torch.tensor(weight)[:, None] * (log_p - q.log_prob(z))).sum(0)

    def closure():
        optimizer.zero_grad()
        loss = kl().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = kl().detach()
    assert (found > -1e-4).all()
    assert (found < 0.005).all(), dict(zip(KAPPAS, found.tolist(), strict=True))


@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_affine_reaches_a_kent_density(turn):
    kappa, beta = 2000.0, 0.3 * 2000
    cosine, sine = math.cos(turn), math.sin(turn)
    frame = torch.tensor([[cosine, sine, 0.0], [-sine, cosine, 0.0], [0.0, 0.0, 1.0]]).double()
    z, omega = nodes(t=0.025, n=80, m=80)
    log_p = kent_log_prob(z, frame, kappa, beta, omega)
    p = log_p.exp() * omega
    numbers = torch.zeros(4, dtype=torch.float64)
    numbers[0] = -0.5 * math.log(kappa)
    numbers.requires_grad_()
    optimizer = torch.optim.LBFGS([numbers], max_iter=100, line_search_fn="strong_wolfe")

    def kl(round_too=False):
        shape = torch.zeros(2) if round_too else numbers[2:]
        flow = posterior(Sphere(), numbers[:2].detach() * 0)._flow
        flow = type(flow)(flow.space, flow.scale, flow.location, numbers[:2], shape=shape)
        return (p * (log_p - Posterior(flow).log_prob(z))).sum()

    def closure():
        optimizer.zero_grad()
        loss = kl()
        loss.backward()
        return loss

    optimizer.step(closure)
    found = kl().item()
    assert -1e-4 < found < 0.006
    # a round density of the same widths is far
    assert kl(round_too=True).item() > 0.05


def test_mse_and_diagonal_are_round():
    for rung in ("mse", "diagonal"):
        q = perturbed_posterior(Sphere(), rung, size=0.4)
        for i, axis in enumerate(frame_axis(q)):
            for theta in (0.1, 1.0, 3.0):
                p = q[i].log_prob(ring(axis, theta))
                assert (p.max() - p.min()).item() < 1e-6


@pytest.mark.parametrize(
    ("low", "high"), [("mse", "diagonal"), ("diagonal", "affine"), ("affine", "spline")]
)
def test_each_rung_contains_the_one_below(low, high):
    lower, upper = (perturbed(Sphere(), rung, size=0.4).flow for rung in (low, high))
    with torch.no_grad():
        for p in upper.parameters():
            p.zero_()
        n = len(lower.bias)
        upper.bias[:n], upper.weight[:n] = lower.bias, lower.weight
        if lower.log_width is not None:
            upper.bias[n : n + 2] = lower.log_width
    context, z = torch.randn(50, 3).double(), directions(50)
    scale = Sphere().fit_scale(directions(20))
    torch.testing.assert_close(
        Posterior(upper(context, scale)).log_prob(z), Posterior(lower(context, scale)).log_prob(z)
    )


# ----------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("rung", RUNGS)
class TestOutliersOfAnArcSecond:
    def build(self, rung, dtype):
        head = perturbed(Sphere(), rung, size=0.15, dtype=dtype)
        with torch.no_grad():
            width = head.flow.log_width if rung == "mse" else head.flow.bias[6:8]
            # κ = 6 and t = σ √6
            width[0], width[1] = width_number(math.log(ARCSEC)), 0.0
            if rung != "mse":
                head.flow.weight[6:8] = 0
        context = torch.randn(12, 3, dtype=torch.float64).to(dtype)
        return head, context, frame_axis(head(context))

    @pytest.mark.parametrize("place", ["axis", "antipode", "equator", "1e5 sigma"])
    def test_cost_and_gradients(self, rung, dtype, place):
        head, context, axis = self.build(rung, dtype)
        angle = {"axis": 0.0, "antipode": math.pi, "equator": math.pi / 2}.get(place, 1e5 * ARCSEC)
        if place == "axis":
            z = axis
        elif place == "antipode":
            z = -axis
        else:
            z = torch.stack([at_angle(a, angle, 0.4) for a in axis.double()]).to(dtype)
        value = head.log_prob(context, z)
        peak = math.log(1 / ARCSEC**2 / (2 * math.pi))
        cost = peak - value.detach().double()
        assert torch.isfinite(cost).all()
        if place == "axis":
            assert (cost.abs() < 6).all()
        else:
            assert ((cost > 25) & (cost < 80)).all()
        gradients = torch.autograd.grad(value.sum(), list(head.parameters()))
        assert all(torch.isfinite(g).all() for g in gradients)
        if place in ("equator", "1e5 sigma"):
            assert max(g.abs().max() for g in gradients) < 1e3

    def test_base_coordinates_of_the_antipode_are_far_out(self, rung, dtype):
        head, context, axis = self.build(rung, dtype)
        radius = head(context).to_base(-axis).norm(dim=-1)
        assert torch.isfinite(radius).all()
        assert (radius > 5).all()
        assert (head(context).credibility(-axis) > 0.999).all()

    def test_base_origin_is_a_direction(self, rung, dtype):
        head, context, axis = self.build(rung, dtype)
        z = head(context).from_base(torch.zeros(12, 2, dtype=dtype))
        assert torch.isfinite(z).all()
        # splines move the origin by some widths
        assert (separation(z, axis) < 100 * ARCSEC).all()
        value = head.log_prob(context, z)
        assert torch.isfinite(torch.autograd.grad(value.sum(), head.flow.bias)[0]).all()


def test_cost_of_a_deviation_grows_slowly():
    q = posterior(Sphere(), [math.log(ARCSEC), 0.0], dtype=torch.float32)
    sigmas = torch.tensor([0.0, 1.0, 3.0, 10.0, 100.0, 1e3, 1e4, 1e5])
    z = at_angle(AXES[2], sigmas * ARCSEC, 0.2)
    cost = (q.log_prob(z[0]) - q.log_prob(z)).tolist()
    assert cost == sorted(cost)
    assert cost[1] == pytest.approx(0.5, abs=0.08)
    assert cost[4] < 30
    assert cost[-1] < 60


# --------------------------------------------------------------------------------- block features


ENERGY = Product(energy=Positive(), direction=Sphere())


@pytest.mark.parametrize("rung", ["affine", "spline"])
class TestAnEnergyThatDependsOnTheDirection:
    def test_mixture_is_normalised_and_the_marginal(self, rung):
        q = perturbed_posterior(ENERGY, rung, size=0.06, events=1)[0]
        part = q["energy"]
        assert isinstance(part, BlockPosterior)
        log_e = torch.linspace(-12, 12, 401).double()
        p = (part.log_prob(log_e.exp()[:, None]) + log_e).exp()
        assert torch.trapezoid(p, log_e).item() == pytest.approx(1, abs=2e-3)
        # against the integral of the joint density over directions
        z, omega = nodes(n=60, m=60)
        some = torch.linspace(-3, 3, 9).double()
        grid = torch.cat(
            [
                some.exp()[:, None, None].expand(-1, len(z), 1),
                z.expand(len(some), -1, -1),
            ],
            -1,
        )
        expected = (q.log_prob(grid).exp() * omega).sum(-1)
        found = q.block("energy", draws=2048).log_prob(some.exp()[:, None]).exp()
        keep = expected * some.exp() > 0.02
        assert keep.sum() >= 3
        torch.testing.assert_close(found[keep], expected[keep], rtol=0.03, atol=0)

    def test_depends_on_the_direction(self, rung):
        q = perturbed_posterior(ENERGY, rung, size=0.6, events=1)[0]
        u = torch.randn(2000, 3).double()
        z = q.from_base(u)
        other = q.from_base(torch.cat([torch.zeros(2000, 2).double(), u[:, 2:]], -1))
        assert (z[:, 0].log() - other[:, 0].log()).std() > 0.05


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("space", [THREE, ENERGY], ids=["three", "energy"])
def test_base_of_draws_is_standard_normal(space, rung):
    q = perturbed_posterior(space, rung, size=0.4, events=3000)
    u, log_prob = q.to_base_and_log_prob(q.sample(generator=torch.Generator().manual_seed(1)))
    for column in u.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    level = stats.chi2(space.dof).cdf((u**2).sum(-1).numpy())
    assert stats.kstest(level, "uniform").pvalue > 1e-3
    off = u.T.corrcoef().numpy()[np.triu_indices(space.dof, 1)]
    assert np.abs(off).max() < 0.08
    assert torch.isfinite(log_prob).all()


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_product_round_trip(rung, dtype):
    q = perturbed_posterior(THREE, rung, size=0.2, events=200, dtype=dtype)
    u = torch.randn(200, 4, dtype=torch.float64).to(dtype)
    z = q.from_base(u)
    tolerance = 1e-5 if dtype is torch.float64 else 5e-3
    torch.testing.assert_close(q.to_base(z), u, rtol=tolerance, atol=tolerance)


def test_order_of_a_product():
    assert [b.name for b in THREE.blocks] == ["direction", "phi", "energy"]
    assert THREE.names == ("energy", "direction[0]", "direction[1]", "direction[2]", "phi")
    assert THREE.dof == 4
    space = Product(a=Product(x=Real(), d=Sphere()), b=Circle(), c=Sphere())
    assert [b.name for b in space.blocks] == ["a.d", "c", "b", "a.x"]
    q = perturbed_posterior(space, "spline", size=0.3)
    z = q.sample((5,))
    assert space.contains(z).all()
    assert q["b"].sample().shape == (4, 1)
    assert torch.isfinite(q["c"].log_prob(z[..., 5:8])).all()
    assert fp.spaces.space_from_config(space.config()) == space


def test_two_directions_condition_each_other():
    q = perturbed_posterior(Product(a=Sphere(), b=Sphere()), "spline", size=0.08, events=1)[0]
    z, omega = nodes(n=300, m=300)
    for a in q.sample((3,))[:, :3]:
        joint = q.log_prob(torch.cat([a.expand(len(z), 3), z], -1)).exp()
        expected = q["a"].log_prob(a).exp().item()
        assert float((joint * omega).sum()) == pytest.approx(expected, rel=5e-3)
    u = torch.randn(2000, 4).double()
    fixed = torch.cat([torch.zeros(2000, 2).double(), u[:, 2:]], -1)
    assert separation(q.from_base(u)[:, 3:], q.from_base(fixed)[:, 3:]).mean() > 1e-3
