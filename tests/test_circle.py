"""Angles as labels: charts against autodiff, quadrature and exact densities; no seam at ±π."""

import itertools
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats
from spherical import (
    ARCSEC,
    RUNGS,
    circle_nodes,
    perturbed,
    perturbed_posterior,
    posterior,
    von_mises_log_prob,
    width_number,
    wrapped_normal_log_prob,
)

import flowpost as fp
from flowpost.head import PosteriorHead
from flowpost.posterior import Posterior
from flowpost.spaces import Circle, Positive, Product, Real, space_from_config

WIDTHS = [1e-5, 0.3, 3.0]
KINDS = {"angle": Circle(), "vector": Circle(vector=True)}


def label(space, angle):
    angle = torch.as_tensor(angle)
    return torch.stack([angle.cos(), angle.sin()], -1) if space.vector else angle[..., None]


def angle_of(space, z):
    return torch.atan2(z[..., 1], z[..., 0]) if space.vector else z[..., 0]


def wrapped(angle):
    """Signed difference of angles in [−π, π], found without the space's arithmetic."""
    return torch.atan2(angle.sin(), angle.cos())


def uniform(*shape):
    return 2 * math.pi * torch.rand(*shape, dtype=torch.float64) - math.pi


def random_posterior(space, t, reference, dtype=torch.float64, events=80):
    log_width = torch.stack([torch.full((events,), math.log(t)), 2 * torch.randn(events)], -1)
    return posterior(
        space,
        log_width.to(dtype),
        location=0.7 * torch.randn(events, 2),
        reference=label(space, uniform(events)).to(dtype) if reference else None,
        dtype=dtype,
    )


# ------------------------------------------------------------------------------------- bijection


@pytest.mark.parametrize("reference", [False, True], ids=["free", "reference"])
@pytest.mark.parametrize("t", WIDTHS)
@pytest.mark.parametrize("kind", KINDS)
class TestBijection:
    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
    def test_round_trip(self, kind, t, reference, dtype):
        space = KINDS[kind]
        q = random_posterior(space, t, reference, dtype)
        u = torch.randn(80, 1, dtype=torch.float64).to(dtype)
        z = q.from_base(u)
        assert z.dtype == dtype
        assert z.shape == (80, space.label_size)
        if not space.vector:
            assert ((z >= -math.pi) & (z < math.pi + 1e-6)).all()
        rounding = torch.finfo(dtype).eps * 40 / min(t, 1 / t)
        torch.testing.assert_close(q.to_base(z), u, rtol=0, atol=2e-6 + 10 * rounding)
        again = q.from_base(q.to_base(z))
        off = wrapped(angle_of(space, again) - angle_of(space, z)).abs().max()
        assert off < 1e-6 * min(t, 1.0) + 20 * torch.finfo(dtype).eps

    def test_ladj_against_autodiff(self, kind, t, reference):
        space = KINDS[kind]
        q = random_posterior(space, t, reference)
        for angle in (angle_of(space, q.sample()), uniform(80)):
            angle = angle.clone().requires_grad_()
            u, ladj = q._flow.to_base(label(space, angle))
            (slope,) = torch.autograd.grad(u.sum(), angle)
            near = u[:, 0].abs() < 4
            torch.testing.assert_close(
                slope.log()[near], ladj[:, 0].detach()[near], rtol=1e-4, atol=1e-4
            )

    def test_density_of_draws_is_that_of_labels(self, kind, t, reference):
        q = random_posterior(KINDS[kind], t, reference)
        z, log_prob = q.sample_and_log_prob((50,))
        torch.testing.assert_close(q.log_prob(z), log_prob, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("longer", [8.0, 0.0, -2.0])
@pytest.mark.parametrize("core", [0.05, 0.3, 1.0, 3.0, 1000.0])
def test_chart_of_every_width(core, longer):
    q = posterior(Circle(), [math.log(core), longer])
    t, sigma = (v.item() for v in q.space._widths(next(q._flow._placements())[1]))
    t = math.exp(t)
    assert t <= 1
    assert 0.3 <= sigma < 32
    if core < 10:
        assert t * sigma == pytest.approx(core, rel=0.01)
    # a normal cut off at ±π, zoomed by the half angle
    normal = stats.truncnorm(-math.pi / sigma, math.pi / sigma, scale=sigma)
    z = np.linspace(-math.pi + 1e-6, math.pi - 1e-6, 501)
    before = 2 * np.arctan(np.tan(z / 2) / t)
    slope = (1 / np.cos(z / 2) ** 2) / t / (1 + (np.tan(z / 2) / t) ** 2)
    exact = normal.logpdf(before) + np.log(slope)
    np.testing.assert_allclose(q.log_prob(z[:, None]), exact, rtol=0, atol=2e-5)
    p = np.linspace(1e-4, 1 - 1e-4, 201)
    u = torch.tensor(stats.norm.ppf(p))[:, None]
    angle = 2 * np.arctan(t * np.tan(normal.ppf(p) / 2))
    # a series stands in for the share next to ±π
    np.testing.assert_allclose(q.from_base(u)[:, 0], angle, rtol=0, atol=1e-8)
    np.testing.assert_allclose(q.to_base(angle[:, None]), u, rtol=0, atol=5e-6)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kind", KINDS)
def test_gradients_of_draws(rung, kind):
    for dtype in (torch.float32, torch.float64):
        head = perturbed(KINDS[kind], rung, dtype=dtype, size=0.3)
        z = head(torch.randn(30, 3, dtype=dtype)).rsample((20,))
        value = angle_of(KINDS[kind], z).sin().sum()
        gradients = torch.autograd.grad(value, list(head.parameters()))
        assert all(torch.isfinite(g).all() for g in gradients)
        assert gradients[0].abs().max() > 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", RUNGS)
def test_float32_agrees_with_float64(rung, kind):
    space = KINDS[kind]
    head = perturbed(space, rung, size=0.3)
    context, z = torch.randn(400, 3).double(), label(space, uniform(400))
    exact = head(context).log_prob(z)
    single = head.float()(context.float()).log_prob(z)
    assert single.dtype == torch.float32
    assert (single.double() - exact).abs().max() < 3e-3


# --------------------------------------------------------------------------------- normalisation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rung", RUNGS)
def test_normalised(rung, kind, dtype):
    space = KINDS[kind]
    q = perturbed_posterior(space, rung, size=0.3, dtype=dtype)
    angle, length = circle_nodes(n=8000)
    p = q.log_prob(label(space, angle).to(dtype)[:, None]).double().exp()
    np.testing.assert_allclose((p * length[:, None]).sum(0), 1.0, rtol=1e-3)


@pytest.mark.parametrize("reference", [False, True], ids=["free", "reference"])
@pytest.mark.parametrize("t", WIDTHS)
def test_normalised_at_every_width(t, reference):
    q = random_posterior(Circle(), t, reference, events=5)
    centres = q.from_base(torch.zeros(5, 1))[:, 0]
    for i, centre in enumerate(centres.tolist()):
        angle, length = circle_nodes(centre, t, 3000)
        assert (q[i].log_prob(angle).exp() * length).sum().item() == pytest.approx(1, abs=1e-5)


def test_vectors_have_the_density_of_angles():
    angle, vector = (perturbed(KINDS[k], "spline", size=0.3) for k in ("angle", "vector"))
    vector.load_state_dict(angle.state_dict())
    context, z = torch.randn(50, 3).double(), uniform(50)
    torch.testing.assert_close(
        vector(context).log_prob(label(KINDS["vector"], z)), angle(context).log_prob(z)
    )


# ------------------------------------------------------------------------------------ validation


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
def test_every_branch_is_the_same_angle(dtype):
    q = perturbed_posterior(Circle(), "spline", size=0.2, events=50, dtype=dtype)
    z = uniform(50).to(dtype)
    exact = q.log_prob(z)
    for turns in (-3, -1, 1, 2):
        there = z + 2 * math.pi * turns
        assert torch.equal(Circle().validate(there[:, None])[:, 0], there)
        tolerance = 1e-9 if dtype is torch.float64 else 2e-3
        torch.testing.assert_close(q.log_prob(there), exact, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(
            q.to_base(there), q.to_base(z), rtol=10 * tolerance, atol=10 * tolerance
        )


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_angles_that_are_not_finite(value):
    z = torch.zeros(4, 1)
    z[2] = value
    text = f"Expected finite labels; got {value:g} in labels, row 2, column 'z'"
    with pytest.raises(ValueError, match=re.escape(text)):
        Circle().validate(z)
    assert Circle().contains(z).tolist() == [True, True, False, True]


@pytest.mark.parametrize("length", [0.998, 1.002, 0.0])
def test_vectors_of_another_length(length):
    space = Circle(vector=True)
    z = label(space, uniform(4))
    z[1] *= length
    with pytest.raises(ValueError, match=r"Expected unit vectors \(cos, sin\)") as error:
        space.validate(z)
    assert f"of length {length:g} in labels, row 1" in str(error.value)
    assert space.contains(z).tolist() == [True, False, True, True]


def test_vectors_within_the_tolerance_are_normalised():
    space = Circle(vector=True)
    z = label(space, uniform(3)) * torch.tensor([0.9993, 1.0, 1.0008])[:, None]
    torch.testing.assert_close(space.validate(z).norm(dim=-1), torch.ones(3).double())


def test_wrong_shapes():
    with pytest.raises(ValueError, match=re.escape("shape (..., 1) for Circle(); got (4, 2)")):
        Circle().validate(torch.zeros(4, 2))
    with pytest.raises(ValueError, match=re.escape("(..., 2) for Circle(vector=True); got (4, 1)")):
        Circle(vector=True).validate(torch.zeros(4, 1))


def test_wrong_shapes_say_what_they_may_be_meant_as():
    pairs, text = torch.zeros(4, 2), re.escape("(4, 2). Circle(vector=True) takes unit vectors")
    head = PosteriorHead(3, Circle())
    with pytest.raises(ValueError, match=text):
        head.fit_scale(pairs)
    with pytest.raises(ValueError, match=r"Its columns are z\. Circle\(vector=True\) takes"):
        Circle().validate(pairs)
    for call in (head(torch.zeros(4, 3)).log_prob, lambda z: head.loss(torch.zeros(4, 3), z)):
        with pytest.raises(ValueError, match=re.escape("(4, 2, 1). Circle(vector=True) takes")):
            call(pairs)
    with pytest.raises(ValueError, match=re.escape("Circle() takes angles in radians.")):
        Circle(vector=True).validate(torch.zeros(4, 1))
    with pytest.raises(ValueError, match=r"\(4 such of 4 events\)\. Normalise them: torch\.nn\."):
        Circle(vector=True).validate(torch.ones(4, 2))
    with pytest.raises(TypeError):
        Circle(2)


@pytest.mark.parametrize("reference", [False, True])
def test_angles_in_degrees_are_told(reference):
    z = 360 * torch.rand(500, 1)
    space = fp.Product(azimuth=Circle())
    with pytest.warns(UserWarning, match=r"most are beyond 2π \(median size 1\d\d.*torch.deg2rad"):
        PosteriorHead(0, space).fit_scale(z, reference=z + 1 if reference else None)
    head = PosteriorHead(0, space)
    # radians on any branch, and a few far away, are nobody's mistake
    radians = torch.deg2rad(z)
    radians[:200] += 8 * math.pi
    head.fit_scale(radians)
    head.fit_scale(-torch.deg2rad(z))
    PosteriorHead(0, Circle(vector=True)).fit_scale(label(Circle(vector=True), z[:, 0]))


@pytest.mark.parametrize("branch", [-4 * math.pi, 0.0, 2 * math.pi])
def test_membership_of_an_interval_on_any_branch(branch):
    q = perturbed_posterior(Circle(), "affine", size=0.3, events=20)
    low, high = q.interval(0.9)
    assert ((low < -math.pi) | (high > math.pi)).any()
    z = q.sample((4000,)) + branch
    inside = torch.remainder(z - low, 2 * math.pi) <= high - low
    assert inside.double().mean().item() == pytest.approx(0.9, abs=0.01)


def test_description():
    for space in KINDS.values():
        assert space_from_config(space.config()) == space
    assert Circle() != Circle(vector=True)
    assert Circle(vector=True).names == ("z[0]", "z[1]")


# -------------------------------------------------------------------------------------- no seam


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("kind", KINDS)
def test_density_is_continuous_across_the_branch_cut(rung, kind):
    space = KINDS[kind]
    q = perturbed_posterior(space, rung, size=0.3, events=50)
    ends = [q.log_prob(label(space, torch.full((50,), a).double())) for a in
            (math.pi - 1e-7, -math.pi + 1e-7)]  # fmt: skip
    torch.testing.assert_close(*ends, rtol=0, atol=1e-3)


@pytest.mark.parametrize("t", WIDTHS)
@pytest.mark.parametrize("rung", ["diagonal", "spline"])
def test_density_is_continuous_across_the_antipode(rung, t):
    q = perturbed_posterior(Circle(), rung, size=0.1, events=20)
    q._flow.log_width[:, 0] = math.log(t)
    at = next(q._flow._placements())[1]
    antipode = q.space._location(at, torch.float64) + math.pi
    step = 1e-6 * min(1.0, 1 / t)
    left, right = q.log_prob(antipode - step), q.log_prob(antipode + step)
    # splines in one dimension are the identity beyond their bound, on either side
    torch.testing.assert_close(left, right, rtol=0, atol=1e-3)
    torch.testing.assert_close(q.log_prob(antipode), left, rtol=0, atol=1e-3)


@pytest.mark.parametrize("rung", ["affine", "spline"])
def test_other_labels_see_no_seam(rung):
    space = Product(energy=Positive(), phi=Circle())
    q = perturbed_posterior(space, rung, size=0.3, events=20)
    at = next(q._flow._placements())[1]
    antipode = Circle()._location(at, torch.float64) + math.pi
    for where in (antipode, torch.full((20,), math.pi).double()):
        for energy in (0.3, 1.0, 4.0):
            ends = [
                q.log_prob(torch.stack([torch.full((20,), energy).double(), where + d], -1))
                for d in (-1e-7, 1e-7)
            ]
            torch.testing.assert_close(*ends, rtol=0, atol=5e-3)
    lean = [q.from_base(torch.tensor([[u, 0.0]]).double().expand(20, 2))[:, 0].log()
            for u in (-1.5, 1.5)]  # fmt: skip
    assert (lean[0] - lean[1]).abs().max() > 0.1


def test_density_turns_with_label_and_reference():
    q = random_posterior(Circle(), 0.2, True)
    z, turn = uniform(80), uniform(80)
    flow = q._flow
    turned = posterior(
        Circle(), flow.log_width, location=flow.location, reference=flow.reference + turn[:, None]
    )
    torch.testing.assert_close(turned.log_prob(z + turn), q.log_prob(z))


@pytest.mark.parametrize("rung", ["affine", "spline"])
def test_training_is_the_same_for_turned_angles(rung):
    torch.manual_seed(5)
    z = torch.tensor(stats.vonmises(4.0).rvs(2000, random_state=1))
    best = []
    for turn in (0.0, 1.9):
        torch.manual_seed(0)
        model = fp.PosteriorModel(None, PosteriorHead(0, Circle(), rung, layers=1, hidden=8))
        fp.fit(model, z + turn, z + turn, epochs=5, batch_size=250, progress=False, lr=3e-3)
        best.append(model.loss(None, z + turn).item())
    assert max(best) - min(best) < 1e-3
    exact = -von_mises_log_prob(z, 4.0).mean().item()
    assert exact - 0.02 < best[0] < exact + 0.02


# ------------------------------------------------------------------------------- exact densities


def best_kl(log_p, delta, weight, start):
    """KL of the best two numbers, for densities on nodes (M, B)."""
    raw = torch.tensor(start, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([raw], max_iter=300, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9, tolerance_change=1e-13)  # fmt: skip

    def kl():
        q = posterior(Circle(), raw)
        p = log_p.exp() * weight
        return (p * (log_p - q.log_prob(delta[..., None]))).sum(0) / p.sum(0)

    def closure():
        optimizer.zero_grad()
        loss = kl().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return kl().detach()


def test_two_numbers_reach_every_von_mises():
    kappas = [1e-6, 0.1, 0.5, 1.0, 2.0, 5.0, 20.0, 1e2, 1e4, 1e6, 1e8]
    parts = [circle_nodes(0.0, min(1.0, 3 / math.sqrt(max(k, 1e-9))), 500) for k in kappas]
    delta, weight = (torch.stack(p, 1) for p in zip(*parts, strict=True))
    log_p = torch.stack([von_mises_log_prob(delta[:, i], k) for i, k in enumerate(kappas)], 1)
    torch.testing.assert_close((log_p.exp() * weight).sum(0), torch.ones(11).double())
    start = [[-0.5 * math.log(max(k * 0.18, 1.0)), 0.0] for k in kappas]
    found = best_kl(log_p, delta, weight, start)
    assert (found > -1e-5).all()
    assert (found < 0.005).all(), dict(zip(kappas, found.tolist(), strict=True))


def test_two_numbers_reach_every_wrapped_normal():
    sigmas = [1e-8, ARCSEC, 1e-3, 0.05, 0.2, 0.4, 0.8, 1.2, 2.0, 4.0]
    parts = [circle_nodes(0.0, min(1.0, 3 * s), 500) for s in sigmas]
    delta, weight = (torch.stack(p, 1) for p in zip(*parts, strict=True))
    log_p = torch.stack([wrapped_normal_log_prob(delta[:, i], s) for i, s in enumerate(sigmas)], 1)
    start = [[math.log(s), 0.0] for s in sigmas]
    found = best_kl(log_p, delta, weight, start)
    assert (found > -1e-5).all()
    assert (found < 0.005).all(), dict(zip(sigmas, found.tolist(), strict=True))


@pytest.mark.parametrize(
    ("low", "high"), [("mse", "diagonal"), ("diagonal", "affine"), ("affine", "spline")]
)
def test_each_rung_contains_the_one_below(low, high):
    lower, upper = (perturbed(Circle(), rung, size=0.4).flow for rung in (low, high))
    with torch.no_grad():
        for p in upper.parameters():
            p.zero_()
        n = len(lower.bias)
        upper.bias[:n], upper.weight[:n] = lower.bias, lower.weight
        if lower.log_width is not None:
            upper.bias[n : n + 2] = lower.log_width
    context, z = torch.randn(50, 3).double(), uniform(50)[:, None]
    scale = Circle().fit_scale(uniform(20, 1))
    torch.testing.assert_close(
        Posterior(upper(context, scale)).log_prob(z), Posterior(lower(context, scale)).log_prob(z)
    )


def test_spline_reaches_two_peaks():
    angle, length = circle_nodes(n=200)
    p = 0.5 * stats.vonmises(8.0, loc=3.0).pdf(angle) + 0.5 * stats.vonmises(20.0).pdf(angle)
    p = torch.tensor(p) * length
    log_p = (p / length).log()
    torch.manual_seed(0)
    head = PosteriorHead(0, Circle(), "spline", bins=12).double()
    optimizer = torch.optim.Adam(head.parameters(), 0.03)
    for _ in range(120):
        optimizer.zero_grad()
        loss = (p * (log_p - head(None).log_prob(angle))).sum()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.03


# ------------------------------------------------------------------------------------- whitening


def test_scale_turns_with_the_labels():
    z = torch.tensor(stats.vonmises(5.0).rvs(500, random_state=0))[:, None]
    first = Circle().fit_scale(z)
    for turn in (0.5, 3.0, -2.0):
        other = Circle().fit_scale(z + turn)
        torch.testing.assert_close(other.scale, first.scale)
        assert wrapped(other.loc - first.loc - turn).abs() < 1e-12
    assert first.loc.item() == pytest.approx(stats.circmean(z.numpy()[:, 0], math.pi, -math.pi))


@pytest.mark.parametrize("sigma", [1e-6, 1e-2, 0.3])
def test_scale_finds_the_width(sigma):
    z = 3.1 + sigma * torch.randn(4000, dtype=torch.float64)
    head = PosteriorHead(0, Circle(), "diagonal").double().fit_scale(z)
    exact = 0.5 * math.log(2 * math.pi * math.e) + math.log(sigma)
    assert head.loss(None, z).item() == pytest.approx(exact, abs=0.05)


def test_weights_of_the_whitening_are_counts():
    z, count = uniform(60, 1) / 3, torch.randint(1, 4, (60,))
    weighted = Circle().fit_scale(z, count.double())
    repeated = Circle().fit_scale(z.repeat_interleave(count, dim=0))
    for a, b in zip(weighted, repeated, strict=True):
        torch.testing.assert_close(a, b)


# -------------------------------------------------------------------------------------- outliers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize(("rung", "kind"), list(itertools.product(RUNGS, KINDS)))
def test_outliers_of_an_arc_second(rung, kind, dtype):
    space = KINDS[kind]
    head = perturbed(space, rung, size=0.15, dtype=dtype)
    with torch.no_grad():
        width = head.flow.log_width if rung == "mse" else head.flow.bias[2:4]
        width[0], width[1] = width_number(math.log(ARCSEC)), 0.0
        if rung != "mse":
            head.flow.weight[2:4] = 0
    context = torch.randn(20, 3, dtype=torch.float64).to(dtype)
    at = next(head(context)._flow._placements())[1]
    centre = space._location(at, dtype).detach()
    peak = -math.log(ARCSEC * math.sqrt(2 * math.pi))
    for angle in (0.0, 1e5 * ARCSEC, math.pi / 2, math.pi):
        value = head.log_prob(context, label(space, centre + angle))
        cost = peak - value.detach()
        if angle:
            assert ((cost > 12) & (cost < 60)).all()
        else:
            assert (cost.abs() < 8).all()
        gradients = torch.autograd.grad(value.sum(), list(head.parameters()))
        assert all(torch.isfinite(g).all() for g in gradients)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_far_base_coordinates_are_angles(dtype):
    q = perturbed_posterior(Circle(), "spline", size=0.2, events=30, dtype=dtype)
    u = torch.tensor([0.0, 5.0, 8.0, 40.0, 1e4], dtype=dtype)
    for sign in (1, -1):
        z = q.from_base((sign * u)[:, None, None].expand(5, 30, 1))
        assert torch.isfinite(z).all()
        assert torch.isfinite(q.log_prob(z)).all()


# --------------------------------------------------------------------------------- block features


def test_energy_conditions_on_the_angle_and_the_mixture_is_normalised():
    q = perturbed_posterior(
        Product(energy=Positive(), phi=Circle()), "spline", size=0.08, events=1
    )[0]
    log_e = torch.linspace(-12, 12, 401).double()
    p = (q["energy"].log_prob(log_e.exp()[:, None]) + log_e).exp()
    assert torch.trapezoid(p, log_e).item() == pytest.approx(1, abs=2e-3)
    angle, length = circle_nodes(n=500)
    some = torch.linspace(-3, 3, 9).double().exp()
    grid = torch.cartesian_prod(some, angle).reshape(9, 500, 2)
    expected = (q.log_prob(grid).exp() * length).sum(-1)
    found = q.block("energy", draws=2048).log_prob(some[:, None]).exp()
    keep = expected * some > 0.02
    assert keep.sum() >= 2
    torch.testing.assert_close(found[keep], expected[keep], rtol=0.03, atol=0)


@pytest.mark.parametrize("rung", RUNGS)
def test_base_of_draws_is_standard_normal(rung):
    space = Product(x=Real(), phi=Circle(), psi=Circle(vector=True))
    q = perturbed_posterior(space, rung, size=0.3, events=3000)
    u = q.to_base(q.sample(generator=torch.Generator().manual_seed(1)))
    for column in u.T:
        assert stats.kstest(column.numpy(), "norm").pvalue > 1e-3
    level = stats.chi2(3).cdf((u**2).sum(-1).numpy())
    assert stats.kstest(level, "uniform").pvalue > 1e-3
