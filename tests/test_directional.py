"""What is quoted of directions and angles: resolutions, areas, moments, modes, quantiles."""

import math
import re

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from spherical import (
    SKY,
    THREE,
    at_angle,
    basis,
    directions,
    frame_axis,
    nodes,
    perturbed,
    perturbed_posterior,
    posterior,
    vmf_quantile,
    vmf_resultant,
    width_numbers,
)

from flowpost.directions import separation
from flowpost.posterior import Posterior, directional, statistics
from flowpost.spaces import Circle, Product, Real, Sphere

LEVELS = (0.1, 0.5, 0.68, 0.9, 0.99)
WIDTHS = {1.0: 2e-3, 0.999: 1.0, 0.1: 6.0, 1e-6: 11.0, 0.5: 3.0}


def round_posterior(t, kappa, batch=(), dtype=torch.float64):
    """A von Mises–Fisher of κ about z, zoomed by t."""
    numbers = torch.tensor(width_numbers(t, kappa), dtype=dtype)
    return posterior(Sphere(), numbers.expand(*batch, 2), dtype=dtype)


def exact_angle(p, t, kappa):
    """Angle that holds a share p of it."""
    theta = 2 * np.arcsin(np.sqrt(vmf_quantile(p, kappa) / 2))
    return 2 * np.arctan(t * np.tan(theta / 2))


def cap(angle):
    """Area of a cap in square degrees."""
    return 4 * math.pi * np.sin(np.asarray(angle) / 2) ** 2 * (180 / math.pi) ** 2


# ------------------------------------------------------------------------------ closed forms


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("t", WIDTHS)
class TestRoundPosteriors:
    def test_angular_resolution(self, t, dtype):
        q = round_posterior(t, WIDTHS[t], dtype=dtype)
        about = torch.tensor([0.0, 0.0, 1.0], dtype=dtype)
        exact = exact_angle(LEVELS, t, WIDTHS[t])
        found = q.angular_resolution(LEVELS, about=about)
        assert found.shape == (5,)
        np.testing.assert_allclose(found, exact, rtol=0.015)
        if t < 1:
            np.testing.assert_allclose(q.angular_resolution(LEVELS), exact, rtol=0.03)
        generator = torch.Generator().manual_seed(0)
        random = q.angular_resolution((0.5,), about=about, draws=20_000, generator=generator)
        assert random.item() == pytest.approx(exact[1], rel=0.02)
        assert not torch.equal(random, q.angular_resolution((0.5,), about=about, draws=20_000))

    def test_hpd_area(self, t, dtype):
        q = round_posterior(t, WIDTHS[t], dtype=dtype)
        if t > 1:
            # denser away from the axis: the region is what the densities on a grid say
            z, omega = nodes(n=600, m=4)
            p = q.log_prob(z).double().exp()
            falling = p.argsort(descending=True)
            share, area = (p * omega)[falling].cumsum(0), omega[falling].cumsum(0)
            at = torch.searchsorted(share, torch.tensor(LEVELS).double())
            exact = area[at].numpy() * (180 / math.pi) ** 2
        else:
            exact = cap(exact_angle(LEVELS, t, WIDTHS[t]))
        found = q.hpd_area(LEVELS)
        assert found.shape == (5,)
        np.testing.assert_allclose(found, exact, rtol=0.02 if t != 1.0 else 0.05)

    def test_entropy_per_steradian(self, t, dtype):
        q = round_posterior(t, WIDTHS[t], dtype=dtype)
        p = (np.arange(200_000) + 0.5) / 200_000
        z = at_angle(torch.tensor([0.0, 0.0, 1.0]), torch.tensor(exact_angle(p, t, WIDTHS[t])), 0.3)
        wide = round_posterior(t, WIDTHS[t])
        exact = -wide.log_prob(z).mean().item()
        if t == 1.0:
            assert exact == pytest.approx(math.log(4 * math.pi), abs=1e-5)
        assert q.entropy(4096).item() == pytest.approx(exact, abs=0.01)

    def test_vmf_kappa(self, t, dtype):
        q = round_posterior(t, WIDTHS[t], dtype=dtype)
        p = (np.arange(200_000) + 0.5) / 200_000
        missing = float((2 * np.sin(exact_angle(p, t, WIDTHS[t]) / 2) ** 2).mean())
        moments = q.direction_moments(draws=8192)
        if missing > 0.9:
            # nearly uniform: R is the noise of the draws
            assert moments.resultant.item() < 0.1 + abs(1 - missing)
            return
        exact = optimize.brentq(
            lambda log_k: math.log(vmf_resultant(math.exp(log_k)) / missing), -6, 40
        )
        assert moments.vmf_kappa.item() == pytest.approx(math.exp(exact), rel=0.01)
        assert 1 - moments.resultant.item() == pytest.approx(missing, rel=0.01, abs=3e-7)
        assert separation(moments.mean, [0.0, 0.0, 1.0]).item() < 0.05 * math.sqrt(2 * missing)


def test_entropy_of_a_vmf_in_closed_form():
    for kappa in (0.01, 1.0, 5.0):
        q = round_posterior(1.0, kappa)
        exact = stats.vonmises_fisher([0.0, 0.0, 1.0], kappa).entropy()
        assert q.entropy(4096).item() == pytest.approx(float(exact), abs=0.005)


@pytest.mark.parametrize("kappa", [0.1, 0.5, 1.0, 3.0, 12.0, 100.0, 1e4, 1e6, 1e8])
def test_kappa_of_a_resultant(kappa):
    missing = torch.tensor([vmf_resultant(kappa)], dtype=torch.float64)
    assert directional._vmf_kappa(missing).item() == pytest.approx(kappa, rel=1e-7)


def test_kappa_of_no_resultant_at_all():
    found = directional._vmf_kappa(torch.tensor([1.0, 1 - 1e-9, 1e-30], dtype=torch.float64))
    assert torch.isfinite(found).all()
    assert (found[:2] < 1e-6).all()


def kent_draws(kappa, beta, axis, turn, n=20_000):
    """Draws (n, 3) of a narrow Kent density, which is a normal across its axis, and its frame."""
    plane = basis(axis)
    cosine, sine = math.cos(turn), math.sin(turn)
    major, minor = cosine * plane[0] + sine * plane[1], cosine * plane[1] - sine * plane[0]
    sobol = torch.quasirandom.SobolEngine(2, scramble=True, seed=1).draw(n).double()
    u = torch.special.ndtri(sobol.clamp(1e-9, 1 - 1e-9))
    across = u[:, :1] * major / math.sqrt(kappa - 2 * beta)
    across = across + u[:, 1:] * minor / math.sqrt(kappa + 2 * beta)
    along = (1 - (across**2).sum(-1, keepdim=True)).sqrt()
    return across + along * axis, major, minor


@pytest.mark.parametrize("ovality", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("kappa", [1e4, 1e8, 1e11])
def test_kent_parameters_of_narrow_draws(kappa, ovality):
    beta = ovality * kappa / 2
    axis = directions(1)[0]
    z, major, minor = kent_draws(kappa, beta, axis, 0.6)
    fields = directional._moments(torch.nn.functional.normalize(z.mean(0), dim=0)[None], z[:, None])
    moments = directional.DirectionMoments(*(f[0] for f in fields))
    assert moments.kent_kappa.item() == pytest.approx(kappa, rel=0.02)
    assert moments.kent_beta.item() == pytest.approx(beta, rel=0.02, abs=0.01 * kappa)
    assert moments.sigma_major.item() == pytest.approx((kappa - 2 * beta) ** -0.5, rel=0.01)
    assert moments.sigma_minor.item() == pytest.approx((kappa + 2 * beta) ** -0.5, rel=0.01)
    frame = torch.stack([moments.mean, moments.major, moments.minor])
    torch.testing.assert_close(frame @ frame.T, torch.eye(3).double(), rtol=0, atol=1e-9)
    if ovality:
        assert (moments.major @ major).abs() > 0.999
        assert (moments.minor @ minor).abs() > 0.999


def test_moments_of_an_elliptic_posterior_follow_its_axes():
    shape = torch.tensor([[0.6, 0.0], [-0.6, 0.0], [0.0, 0.0]])
    numbers = torch.tensor([[math.log(1e-3), 8.0]] * 3)
    q = posterior(Sphere(), numbers, shape=shape)
    moments = q.direction_moments(draws=8192)
    ratio = moments.sigma_major / moments.sigma_minor
    # A = exp(S) stretches one axis by e^0.6 and shrinks the other as much
    assert ratio[:2].numpy() == pytest.approx(math.exp(1.2), rel=0.15)
    assert ratio[2].item() == pytest.approx(1.0, abs=0.02)
    assert moments.major[0, 0].abs() > 0.99
    assert moments.major[1, 1].abs() > 0.99
    assert (moments.kent_beta[:2] > 0.2 * moments.kent_kappa[:2]).all()
    assert moments.kent_beta[2] < 0.02 * moments.kent_kappa[2]


# ------------------------------------------------------------------------------- mean and mode


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("t", [0.5, 1e-6])
def test_mean_and_mode_of_a_round_posterior(t, dtype):
    location = torch.randn(6, 6)
    numbers = torch.tensor([math.log(t), 1.0]).expand(6, 2)
    q = posterior(Sphere(), numbers, location=location, dtype=dtype)
    axis, sigma = frame_axis(q), t * 0.4
    rounding = 4 * torch.finfo(dtype).eps
    assert q.mean.shape == (6, 3)
    torch.testing.assert_close(q.mean.norm(dim=-1), torch.ones(6, dtype=dtype))
    assert (separation(q.mean, axis) < 0.03 * sigma + rounding).all()
    # an ascent ends where the density no longer grows by a rounding of it
    flat = math.sqrt(2 * 100 * torch.finfo(dtype).eps)
    assert (separation(q.mode, axis) < flat * sigma + rounding).all()


def test_mode_is_the_best_of_a_dense_grid():
    q = perturbed_posterior(Sphere(), "spline", size=0.12, layers=1, events=3)
    mode = q.mode
    z, _ = nodes(n=100, m=100)
    grid = q.log_prob(z[:, None])
    assert (q.log_prob(mode) > grid.max(0).values - 0.02).all()
    draws = q.sample((20_000,), torch.Generator().manual_seed(0))
    assert (q.log_prob(mode) >= q.log_prob(draws).max(0).values - 0.1).all()
    torch.testing.assert_close(mode.norm(dim=-1), torch.ones(3).double())


def test_mode_of_a_product():
    q = perturbed_posterior(THREE, "affine", size=0.2, events=3)
    draws = q.sample((20_000,), torch.Generator().manual_seed(0))
    mode = q.mode
    assert THREE.contains(mode).all()
    assert (q.log_prob(mode) > q.log_prob(draws).max(0).values - 0.05).all()


def test_stddev_of_a_direction_is_that_of_its_components():
    q = perturbed_posterior(Sphere(), "affine", size=0.2, events=4)
    draws = q.sample((20_000,), torch.Generator().manual_seed(0))
    torch.testing.assert_close(q.stddev, draws.std(0), rtol=0.03, atol=1e-3)


# --------------------------------------------------------------------------------------- circle


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
@pytest.mark.parametrize("centre", [math.pi, -2.0])
@pytest.mark.parametrize("t", [1.0, 1e-4])
def test_circular_statistics_are_those_of_scipy(t, centre, dtype):
    numbers = torch.tensor([math.log(t), 0.5], dtype=dtype)
    reference = torch.tensor([centre], dtype=dtype)
    q = posterior(Circle(), numbers, reference=reference, dtype=dtype)
    z = q.sample((20_000,), torch.Generator().manual_seed(0)).double().numpy()[:, 0]
    mean = stats.circmean(z, math.pi, -math.pi)
    std = stats.circstd(z, math.pi, -math.pi)
    rounding = 10 * torch.finfo(dtype).eps
    assert abs(math.remainder(q.mean.item() - mean, 2 * math.pi)) < 0.02 * std + rounding
    assert q.stddev.item() == pytest.approx(std, rel=0.02)
    assert q.variance.item() == pytest.approx(std**2, rel=0.04)
    assert abs(math.remainder(q.mode.item() - centre, 2 * math.pi)) < 0.02 * std + rounding


def test_mean_and_stddev_of_given_draws():
    z = 6 * torch.rand(100, 7, 1).double() * torch.linspace(0.01, 1, 7)[:, None] + 2
    np.testing.assert_allclose(
        Circle().stddev(z)[:, 0], stats.circstd(z.numpy()[..., 0], axis=0), rtol=1e-9
    )
    expected = stats.circmean(z.numpy()[..., 0], math.pi, -math.pi, axis=0)
    np.testing.assert_allclose(Circle().mean(z)[:, 0], expected, rtol=1e-9)
    vectors = torch.cat([z.cos(), z.sin()], -1)
    space = Circle(vector=True)
    np.testing.assert_allclose(space.mean(vectors)[:, 0], np.cos(expected), rtol=1e-9)
    assert space.stddev(vectors).shape == (7, 2)


def test_stddev_of_nearly_uniform_angles_is_finite():
    z = torch.linspace(-math.pi, math.pi, 1001)[:-1, None].double()
    assert torch.isfinite(Circle().stddev(z)).all()
    assert Circle().stddev(z).item() > 3
    assert Circle().stddev(torch.ones(50, 1)).item() < 1e-6


@pytest.mark.parametrize("centre", [math.pi, 3.0, -3.0, 0.3])
def test_quantiles_of_an_angle_lie_on_one_branch(centre):
    numbers = torch.tensor([math.log(0.5), 0.5], dtype=torch.float64)
    plain = posterior(Circle(), numbers, reference=torch.tensor([0.0]).double())
    q = posterior(Circle(), numbers, reference=torch.tensor([centre]).double())
    levels = [0.05, 0.5, 0.95]
    found, about = q.quantile(levels, draws=4096)[:, 0], plain.quantile(levels, draws=4096)[:, 0]
    shift = found - about
    assert (found[1:] > found[:-1]).all()
    assert abs(math.remainder(shift[1].item() - centre, 2 * math.pi)) < 1e-3
    torch.testing.assert_close(shift, shift[1].expand(3), rtol=0, atol=1e-3)
    exact = plain.from_base(torch.tensor([[-1.644854], [0.0], [1.644854]]).double())[:, 0]
    torch.testing.assert_close(about, exact, rtol=0, atol=5e-3)
    low, high = q.interval(0.9, draws=4096)
    torch.testing.assert_close(high - low, (found[2] - found[0]).expand(1))
    assert abs(math.remainder(q.median.item() - centre, 2 * math.pi)) < 2e-3


def test_no_exact_quantiles_of_an_angle():
    q = perturbed_posterior(Circle(), "spline", size=0.1)
    with pytest.raises(NotImplementedError, match="one label on a line; this is Circle"):
        q.cdf(torch.zeros(4))


def test_summary_of_a_product():
    q = perturbed_posterior(THREE, "spline", size=0.1, events=3)
    s = q.summary()
    assert s.names == THREE.names
    assert s.mean.shape == (3, 5)
    torch.testing.assert_close(s.mean[:, 1:4].norm(dim=-1), torch.ones(3).double())
    low, high = s.interval68
    assert (low < high).all()
    assert "direction[2]" in str(s)


# ---------------------------------------------------------------------------------- batches


def methods(q, **options):
    moments = q.direction_moments()
    return {
        "mean": q.mean,
        "mode": q.mode,
        "stddev": q.stddev,
        "entropy": q.entropy(256),
        "resolution": q.angular_resolution(**options),
        "area": q.hpd_area(draws=1024),
        "kappa": moments.vmf_kappa,
        "major": moments.major,
    }


SHAPES = {"mean": (3,), "mode": (3,), "stddev": (3,), "entropy": (), "kappa": (), "major": (3,)}


@pytest.mark.parametrize("batch", [(), (4,), (2, 3), (0,)], ids=str)
def test_shapes(batch):
    head = perturbed(Sphere(), "affine", size=0.2)
    q = head(torch.randn(*batch, 3).double()).detach()
    for name, value in methods(q).items():
        if name == "resolution":
            assert value.shape == (3, *batch)
        elif name == "area":
            assert value.shape == (2, *batch)
        else:
            assert value.shape == (*batch, *SHAPES[name]), name
        assert torch.isfinite(value).all()
    about = directions(math.prod(batch)).reshape(*batch, 3)
    assert q.angular_resolution(0.9, about=about).shape == (1, *batch)
    flat = q.expand(batch)._with(q._flow.flatten())
    torch.testing.assert_close(
        q.angular_resolution(0.9, about=about).reshape(1, -1),
        flat.angular_resolution(0.9, about=about.reshape(-1, 3)),
    )


@pytest.mark.parametrize("chunk", [4096])
def test_many_events_are_as_one_by_one(monkeypatch, chunk):
    q = perturbed_posterior(Sphere(), "affine", size=0.2, events=3)
    about = directions(3)
    expected = methods(q, about=about)
    single = [methods(q[i], about=about[i]) for i in range(3)]
    monkeypatch.setattr(statistics, "CHUNK", chunk)
    found = methods(q, about=about)
    for name, value in found.items():
        along = 1 if name in ("resolution", "area") else 0
        one = torch.stack([s[name] for s in single], along)
        if name == "major":
            one, value = (t.abs() for t in (one, value))
            expected[name] = expected[name].abs()
        torch.testing.assert_close(value, expected[name], rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(value, one, rtol=1e-6, atol=1e-8)


def test_draws_are_decoded_once(monkeypatch):
    """About the mean of the same draws, and at the cost of one pass."""
    q = perturbed(Sphere(), "affine", size=0.2)(torch.randn(7, 3).double())
    calls, decode = [], Posterior._decode_labels

    def counted(self, u):
        calls.append(u.shape)
        return decode(self, u)

    monkeypatch.setattr(Posterior, "_decode_labels", counted)
    found = q.angular_resolution([0.5, 0.9], draws=500)
    assert [s[0] for s in calls] == [500]
    (mean,) = q._reduce(lambda z, _: (q.space.mean(z),), 500, None)
    torch.testing.assert_close(q.angular_resolution([0.5, 0.9], about=mean, draws=500), found)
    generator = torch.Generator().manual_seed(0)
    other = q.angular_resolution([0.5, 0.9], draws=500, generator=generator)
    torch.testing.assert_close(other, found, rtol=0.15, atol=0)


def test_about_is_broadcast_and_checked():
    q = perturbed_posterior(Sphere(), "diagonal", events=4)
    one = directions(1)[0]
    torch.testing.assert_close(
        q.angular_resolution(about=one), q.angular_resolution(about=one.expand(4, 3))
    )
    with pytest.raises(ValueError, match=r"Expected unit vectors .* in about, row 2"):
        q.angular_resolution(about=one * torch.tensor([1.0, 1.0, 2.0, 1.0])[:, None])
    with pytest.raises(ValueError, match=r"Expected about of shape \(..., 3\)"):
        q.angular_resolution(about=torch.ones(4, 2))


def test_error_of_a_calibrated_model_is_its_resolution():
    """About the truth, half of the draws lie as near as the truth does on average."""
    q = posterior(Sphere(), torch.tensor([math.log(0.05), 1.0]).expand(200, 2),
                  location=torch.randn(200, 6))  # fmt: skip
    truth = q.sample(generator=torch.Generator().manual_seed(2))
    off = separation(truth, frame_axis(q))
    share = (off[None] < q.angular_resolution((0.5, 0.9))).double().mean(1)
    assert share[0].item() == pytest.approx(0.5, abs=0.11)
    assert share[1].item() == pytest.approx(0.9, abs=0.065)
    about = q.angular_resolution(0.5, about=truth)[0]
    assert (about > 0.9 * q.angular_resolution(0.5)[0]).all()


@pytest.mark.parametrize("name", ["angular_resolution", "hpd_area", "direction_moments"])
def test_refused_for_what_is_no_direction(name):
    q = perturbed_posterior(SKY, "diagonal")
    with pytest.raises(ValueError, match=re.escape("Ask q['direction'].")):
        getattr(q, name)()
    assert getattr(q["direction"], name)() is not None
    for space in (Real(3), Circle(), Product(a=Real(), b=Circle())):
        with pytest.raises(ValueError, match=r"Expected a posterior of one direction; got .* Its"):
            getattr(perturbed_posterior(space, "diagonal"), name)()


@pytest.mark.parametrize("level", [0.0, 1.0, -0.1, 68.0])
def test_levels_out_of_range(level):
    q = perturbed_posterior(Sphere(), "diagonal")
    for method in (q.angular_resolution, q.hpd_area):
        with pytest.raises(ValueError, match="Expected levels between 0 and 1; got"):
            method((0.5, level))


def test_a_later_direction_block_has_them_too():
    q = perturbed_posterior(Product(a=Sphere(), b=Sphere()), "affine", size=0.2, events=2)
    part = q["b"]
    z = q.sample((20_000,), torch.Generator().manual_seed(0))[..., 3:]
    mean = torch.nn.functional.normalize(z.mean(0), dim=-1)
    angle = separation(z, mean)
    found = part.angular_resolution((0.5, 0.9), about=mean)
    torch.testing.assert_close(
        found, torch.quantile(angle, torch.tensor([0.5, 0.9]).double(), dim=0), rtol=0.03, atol=0
    )
    area = part.hpd_area((0.5,), draws=512)
    whole = posterior_area(part, 0.5)
    np.testing.assert_allclose(area[0], whole, rtol=0.1)


def posterior_area(q, level):
    z, omega = nodes(n=40, m=40)
    p = q.log_prob(z[:, None]).exp()
    areas = []
    for column in p.T:
        falling = column.argsort(descending=True)
        at = torch.searchsorted((column * omega)[falling].cumsum(0), level)
        areas.append(float(omega[falling].cumsum(0)[at]) * (180 / math.pi) ** 2)
    return areas


@pytest.mark.parametrize("t", [1e-4, 0.3])
def test_area_of_a_spline_is_that_of_a_grid(t):
    q = perturbed_posterior(Sphere(), "spline", size=0.05, events=3)
    q._flow.log_width[:, 0] = math.log(t)
    for i, axis in enumerate(frame_axis(q)):
        z, omega = nodes(axis.tolist(), t, n=120, m=120)
        p = q[i].log_prob(z).exp()
        falling = p.argsort(descending=True)
        share, area = (p * omega)[falling].cumsum(0), omega[falling].cumsum(0)
        exact = area[torch.searchsorted(share, torch.tensor([0.5, 0.9]).double())]
        found = q[i].hpd_area((0.5, 0.9))
        np.testing.assert_allclose(found, exact * (180 / math.pi) ** 2, rtol=0.03)
