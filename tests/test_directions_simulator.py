"""The simulator of directions against scipy, quadrature, Bayes' rule and its own ranks."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from flowpost.simulators.directions import Directions

VARIANTS = {
    "one": Directions(),
    "two": Directions(2),
    "three": Directions(3, weights=(0.2, 0.3, 0.5)),
    "near": Directions(3, separation=2.0),
}


def event(simulator, sigma, seed=0):
    """One event of a simulator whose only σ is this one, in radians."""
    fixed = Directions(
        simulator.modes,
        math.degrees(sigma) * (1 - 1e-12),
        math.degrees(sigma),
        simulator.weights,
        simulator.separation,
    )
    return fixed.sample(1, seed=seed, dtype=torch.float64)[0]


def uniform_directions(n, seed=0):
    normal = torch.randn(n, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return normal / normal.norm(dim=1, keepdim=True)


def sphere_grid(n):
    """Directions (n · 2n, 3) and weights, exact for polynomials of degree 2n − 1."""
    nodes, weights = np.polynomial.legendre.leggauss(n)
    phi = np.pi * np.arange(2 * n) / n
    sine = np.sqrt(1 - nodes**2)[:, None]
    height = np.broadcast_to(nodes[:, None], (n, 2 * n))
    grid = np.stack([sine * np.cos(phi), sine * np.sin(phi), height], -1)
    return torch.from_numpy(grid.reshape(-1, 3)), torch.from_numpy(
        np.repeat(weights * np.pi / n, 2 * n)
    )


def at_angle(axis, theta):
    """Directions (K, 3) at angles (K,) from one axis, precise for small ones."""
    side = torch.linalg.cross(axis, torch.tensor([0.6, 0.0, 0.8], dtype=torch.float64))
    side = side / side.norm()
    return axis * theta.cos()[:, None] + side * theta.sin()[:, None]


# The density


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("degrees", [60.0, 15.0, 4.0])
def test_density_integrates_to_one_on_the_sphere(name, degrees):
    grid, weights = sphere_grid(160)
    posterior = VARIANTS[name].posterior(event(VARIANTS[name], math.radians(degrees)))
    density = posterior.log_prob(grid[:, None])[:, 0].exp()
    assert float((density * weights).sum()) == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("sigma", [1 / 3600, 1 / 60, 1.0, 20.0, 60.0, 179.0])
def test_density_integrates_to_one_about_its_axis(sigma):
    """In v = 1 − cos θ the solid angle is 2π dv, at any width."""
    radians = math.radians(sigma)
    posterior = VARIANTS["one"].posterior(event(VARIANTS["one"], radians))

    def density(v):
        theta = torch.tensor([2 * math.asin(math.sqrt(v / 2))], dtype=torch.float64)
        return 2 * math.pi * float(posterior.log_prob(at_angle(posterior.means[0, 0], theta)).exp())

    total = integrate.quad(density, 0, min(2.0, 60 * radians**2), epsabs=1e-10, limit=200)[0]
    assert total == pytest.approx(1, abs=1e-7)


@pytest.mark.parametrize("kappa", [0.3, 1.0, 30.0, 1e4])
def test_density_is_that_of_scipy(kappa):
    x = event(VARIANTS["one"], kappa**-0.5)
    z = uniform_directions(20)
    reference = stats.vonmises_fisher(x[0, :3].numpy(), kappa).logpdf(z.numpy())
    value = VARIANTS["one"].posterior(x).log_prob(z[:, None])[:, 0]
    assert value.numpy() == pytest.approx(reference, rel=1e-10, abs=1e-9)


def test_density_at_one_arc_second_is_the_plane_normal():
    sigma = math.radians(1 / 3600)
    posterior = VARIANTS["one"].posterior(event(VARIANTS["one"], sigma))
    theta = torch.tensor([0.0, 0.5, 1.0, 3.0, 10.0], dtype=torch.float64) * sigma
    value = posterior.log_prob(at_angle(posterior.means[0, 0], theta)[:, None])[:, 0]
    normal = -math.log(2 * math.pi * sigma**2) - (theta / sigma).square() / 2
    assert value.numpy() == pytest.approx(normal.numpy(), abs=1e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_float32_floor_at_one_arc_second(name):
    """Rounding moves directions by a hundredth of σ, and the mean NLL by far less."""
    simulator = Directions(
        VARIANTS[name].modes, 0.9999 / 3600, 1 / 3600, separation=VARIANTS[name].separation
    )
    exact = simulator.true_nll(*simulator.sample(4000, seed=1, dtype=torch.float64))
    x, z = simulator.sample(4000, seed=1, dtype=torch.float32)
    assert x.dtype == z.dtype == torch.float32
    difference = simulator.true_nll(x, z) - exact
    assert difference.abs().max() < 0.1
    assert abs(difference.mean()) < 1e-3
    assert exact.dtype == torch.float64


# Bayes' rule


@pytest.mark.parametrize(("modes", "weights"), [(1, None), (2, None), (3, (0.2, 0.3, 0.5))])
def test_posterior_is_prior_times_likelihood(modes, weights):
    """The likelihood of hiding vMF(z, κ) among uniform decoys, written with scipy."""
    simulator = Directions(modes, weights=weights)
    x = event(simulator, 0.6, seed=4)
    z = uniform_directions(200, seed=1)
    n = x[0, :-1].reshape(modes, 3).numpy()
    likelihood = np.zeros(len(z))
    for m, weight in enumerate(simulator.weights):
        measured = stats.vonmises_fisher(n[m], 1 / 0.36).pdf(z.numpy())
        likelihood += weight * measured * (4 * math.pi) ** (1 - modes)
    log_evidence = -modes * math.log(4 * math.pi)
    expected = np.log(likelihood) - math.log(4 * math.pi) - log_evidence
    value = simulator.posterior(x).log_prob(z[:, None])[:, 0]
    assert value.numpy() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("name", VARIANTS)
def test_posterior_draws_are_the_reweighted_prior(name):
    """First and second moments of draws against those of weighted uniform directions."""
    simulator = VARIANTS[name]
    posterior = simulator.posterior(event(simulator, 0.5, seed=2))
    grid, area = sphere_grid(60)
    weight = posterior.log_prob(grid[:, None])[:, 0].exp() * area
    draws = posterior.sample((40_000,), seed=3)[:, 0]
    for power in (1, 2):
        wanted = (weight[:, None] * grid**power).sum(0)
        error = (draws**power).std(0) / 200
        assert ((draws**power).mean(0) - wanted).abs().max() < 4.5 * error.max()
    product = (weight * grid[:, 0] * grid[:, 1]).sum()
    assert float((draws[:, 0] * draws[:, 1]).mean()) == pytest.approx(float(product), abs=0.01)


def test_prior_first_gives_the_same_events():
    """Draw z, measure it, hide the measurement among decoys: its level is uniform too."""
    rng = np.random.default_rng(5)
    sigma, levels, z = 0.7, [], uniform_directions(400, seed=6)
    simulator = Directions(2)
    x = torch.zeros(400, 7, dtype=torch.float64)
    x[:, -1] = math.log(sigma)
    for i in range(400):
        n = stats.vonmises_fisher(z[i].numpy(), 1 / sigma**2).rvs(1, random_state=rng)[0]
        x[i, :6] = torch.from_numpy(
            np.concatenate(rng.permutation([n, uniform_directions(1, i)[0].numpy()]))
        )
    posterior = simulator.posterior(x)
    draws = posterior.log_prob(posterior.sample((500,), seed=7))
    levels = (draws > posterior.log_prob(z)).double().mean(0)
    assert stats.kstest(levels.numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_labels_and_candidates_are_uniform(name):
    x, z = VARIANTS[name].sample(40_000, seed=8)
    for vectors in (z, VARIANTS[name].reference(x), VARIANTS[name].posterior(x).means[:, -1]):
        assert vectors.norm(dim=1).sub(1).abs().max() < 1e-6
        for column in vectors.double().T:
            assert stats.kstest(column.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4
    log_sigma = stats.uniform(math.log(math.radians(1 / 3600)), math.log(60 * 3600))
    assert stats.kstest(x[:, -1].double().numpy(), log_sigma.cdf).pvalue > 1e-4


# Calibration


def test_levels_are_uniform_in_every_decade():
    simulator = VARIANTS["one"]
    x, z = simulator.sample(60_000, seed=9)
    posterior = simulator.posterior(x)
    level, chi2 = posterior.credibility(z), posterior.chi2(z)
    decade = (x[:, -1] / math.log(10)).floor()
    assert len(decade.unique()) >= 5
    for value in decade.unique():
        part = decade == value
        assert stats.kstest(level[part].numpy(), "uniform").pvalue > 1e-4
        assert stats.kstest(chi2[part].numpy(), stats.chi2(2).cdf).pvalue > 1e-4


def test_chi2_of_outliers_is_finite_and_ordered():
    simulator = VARIANTS["one"]
    for sigma in (math.radians(1 / 3600), 0.01, 1.0):
        posterior = simulator.posterior(event(simulator, sigma))
        theta = torch.tensor([0.0, 1e-7, 1e-3, 1.0, 2.0, 3.0, 3.14], dtype=torch.float64)
        chi2 = posterior.chi2(at_angle(posterior.means[0, 0], theta)[:, None])[:, 0]
        assert torch.isfinite(chi2).all()
        assert (chi2.diff() > 0).all()
        share = integrate.quad(
            lambda v, k=sigma**-2: k * math.exp(-k * v) / -math.expm1(-2 * k), 0, 1 - math.cos(1)
        )[0]
        if sigma == 1.0:
            assert float(1 - (-chi2[3] / 2).exp()) == pytest.approx(share, abs=1e-9)


@pytest.mark.parametrize("name", ["two", "three", "near"])
def test_density_levels_are_uniform(name):
    simulator = VARIANTS[name]
    x, z = simulator.sample(2000, seed=10)
    posterior = simulator.posterior(x)
    levels = (
        posterior.log_prob(posterior.sample((400,), seed=11)) > posterior.log_prob(z)
    ).double()
    assert stats.kstest(levels.mean(0).numpy(), "uniform").pvalue > 1e-3


@pytest.mark.parametrize("name", VARIANTS)
def test_entropy_is_the_mean_nll(name):
    simulator = VARIANTS[name]
    x, z = simulator.sample(40_000, seed=12)
    gain = simulator.true_nll(x, z) - simulator.posterior(x).entropy(8)
    assert abs(float(gain.mean())) < 4 * float(gain.std()) / 200
    grid, area = sphere_grid(80)
    posterior = simulator.posterior(event(simulator, 0.4, seed=3))
    log_density = posterior.log_prob(grid[:, None])[:, 0]
    exact = -float((area * log_density.exp() * log_density).sum())
    tolerance = 1e-9 if simulator.modes == 1 else 0.02
    assert float(posterior.entropy(2048)) == pytest.approx(exact, abs=tolerance)


def test_entropy_of_parted_modes_is_that_of_one_and_of_the_weights():
    three = VARIANTS["three"]
    x = event(three, math.radians(1 / 60))
    one = VARIANTS["one"].posterior(event(VARIANTS["one"], math.radians(1 / 60))).entropy()
    wanted = float(one) + stats.entropy(three.weights)
    assert float(three.posterior(x).entropy(2)) == pytest.approx(wanted, abs=1e-9)


# Randomness, types, errors


def test_near_candidates_keep_their_distance_in_widths():
    simulator = Directions(2, sigma_max=1.0, separation=3.0)
    x, _ = simulator.sample(20_000, seed=13)
    # two coordinates, each a difference of two normals of 3 σ
    square = x[:, 3:6].double().square().sum(1) / 18
    assert stats.kstest(square.numpy(), stats.chi2(2).cdf).pvalue > 1e-3


def test_randomness_and_selection():
    simulator = VARIANTS["three"]
    state = torch.get_rng_state()
    x, z = simulator.sample(50, seed=1)
    posterior = simulator.posterior(x)
    draws = posterior.sample((5, 2), seed=2)
    posterior.entropy()
    assert torch.equal(state, torch.get_rng_state())
    assert draws.shape == (5, 2, 50, 3)
    assert posterior.log_prob(draws).shape == (5, 2, 50)
    again = simulator.sample(50, torch.Generator().manual_seed(1))
    assert torch.equal(x, again[0])
    assert torch.equal(z, again[1])
    assert not torch.equal(z, simulator.sample(50, seed=2)[1])
    assert torch.equal(draws, posterior.sample((5, 2), torch.Generator().manual_seed(2)))
    assert torch.equal(posterior[3:7].log_prob(z[3:7]), posterior.log_prob(z)[3:7])
    assert len(posterior[:4]) == 4
    assert simulator.sigma(x).min() >= math.radians(0.99 / 3600)
    assert "modes=3" in repr(simulator)
    assert "N=50" in repr(posterior)


def test_poles_of_either_sign_are_axes_like_others():
    x = torch.zeros(2, 4, dtype=torch.float64)
    x[0, 2], x[1, 2], x[:, 3] = 1.0, -1.0, math.log(0.01)
    draws = VARIANTS["one"].posterior(x).sample((20_000,), seed=0)
    assert draws.norm(dim=-1).sub(1).abs().max() < 1e-12
    assert (draws[..., :2].std(0) - 0.01).abs().max() < 3e-4
    azimuth = torch.atan2(draws[..., 1], draws[..., 0])
    for column in azimuth.T:
        assert stats.kstest(column.numpy(), stats.uniform(-np.pi, 2 * np.pi).cdf).pvalue > 1e-3


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Directions(0), "modes"),
        (lambda: Directions(1, 2.0, 1.0), "Give them in degrees"),
        (lambda: Directions(1, 1.0, 200.0), "sigma_max <= 180"),
        (lambda: Directions(2, weights=(1.0,)), "Give one per candidate"),
        (lambda: Directions(2, weights=(1.0, -1.0)), "2 positive numbers"),
        (lambda: Directions(2, separation=0.0), "number of widths"),
        (lambda: Directions().sample(0), "n as a whole number"),
        (lambda: Directions().sample(2, torch.Generator(), 1), "Give one of the two"),
        (lambda: Directions(2).posterior(torch.ones(3, 4)), r"x of shape \(N, 7\)"),
        (lambda: Directions().posterior(torch.ones(3, 4)), "the directions in x"),
        (lambda: Directions().posterior(torch.full((1, 4), math.nan)), "row 0, column 0"),
        (
            lambda: Directions().true_nll(event(Directions(), 0.1), torch.ones(1, 3)),
            "Divide by the length",
        ),
        (
            lambda: Directions().true_nll(event(Directions(), 0.1), torch.ones(2, 3)),
            "one unit vector per event",
        ),
        (
            lambda: Directions(2).posterior(event(Directions(2), 0.1)).chi2(torch.ones(1, 3)),
            "posterior of one candidate",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
