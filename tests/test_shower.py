"""Calorimeter showers against scipy, quadrature and their own frequencies."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, special, stats

from flowpost.simulators import Shower

SHOWER = Shower()
SIGMAS = (0.35, 0.6, 0.9)


@pytest.fixture(scope="module")
def events():
    return SHOWER.sample(4000, seed=3)


def profile(energy, depth):
    """Density of the deposited energy at a depth behind the start, per radiation length."""
    a = 1 + 0.5 * (math.log(energy / 0.0073) - 0.5)
    return stats.gamma.pdf(depth, a, scale=2.0)


def test_shares_are_integrals_of_the_profile_and_the_gaussian():
    for energy, start in [(1.0, 0.0), (20.0, 2.5), (100.0, 6.0)]:
        z = torch.tensor([[energy, start]], dtype=torch.float64)
        shares = SHOWER.fractions(z)[0]
        for k, part in enumerate(SHOWER.layers):
            low, high = (max(e - start, 0.0) for e in SHOWER.edges[k : k + 2])
            along = integrate.quad(lambda t, e=energy: profile(e, t), low, high, epsabs=1e-13)[0]
            rows, columns = SHOWER.shape[k]
            own = shares[part].reshape(rows, columns)

            def cell(i, n, width):
                edges = np.linspace(-2, 2, n + 1)
                return integrate.quad(stats.norm(scale=width).pdf, edges[i], edges[i + 1])[0]

            for i, j in [(0, 0), (rows // 2, columns // 2), (rows - 1, 1)]:
                wanted = along * cell(i, rows, SIGMAS[k]) * cell(j, columns, SIGMAS[k])
                assert float(own[i, j]) == pytest.approx(wanted, rel=1e-7, abs=1e-15)
            inside = math.erf(2 / SIGMAS[k] / math.sqrt(2)) ** 2
            assert float(own.sum()) == pytest.approx(along * inside, rel=1e-9, abs=1e-15)
        assert shares.sum() < 1
        torch.testing.assert_close(shares[:24].reshape(3, 8), shares[:24].reshape(3, 8).flip(0, 1))


def test_a_wide_face_and_a_deep_start_lose_what_they_should():
    z = torch.tensor([[10.0, 0.0], [10.0, 5.0], [10.0, 30.0]], dtype=torch.float64)
    wide = Shower(half_width=20.0).fractions(z)
    a = 1 + 0.5 * (math.log(10 / 0.0073) - 0.5)
    assert float(wide[0].sum()) == pytest.approx(special.gammainc(a, 11.0), rel=1e-9)
    assert float(wide[1].sum()) == pytest.approx(special.gammainc(a, 8.5), rel=1e-9)
    assert float(wide[1, SHOWER.layers[0]].sum()) == 0
    assert float(wide[2].sum()) == 0
    assert bool((SHOWER.simulate(z[2:], seed=0) == 0).all())


def test_voxels_have_the_mean_and_variance_and_zeros_of_the_law():
    z = torch.tensor([[40.0, 1.3]], dtype=torch.float64).expand(20_000, 2)
    x = SHOWER.simulate(z, seed=1)
    alpha = (SHOWER.fractions(z[:1])[0] * 40.0 / 0.02).numpy()
    zeros = special.gammainc(alpha, 0.1)
    assert 10 < (zeros > 0.3).sum() < 70
    seen = (x == 0).double().mean(0).numpy()
    error = np.sqrt(zeros * (1 - zeros) / len(x)) + 1e-9
    assert (np.abs(seen - zeros) / error).max() < 4.5
    # moments of what is above the threshold
    mean = alpha * 0.02 * special.gammaincc(alpha + 1, 0.1)
    square = alpha * (alpha + 1) * 0.02**2 * special.gammaincc(alpha + 2, 0.1)
    error = np.sqrt((square - mean**2) / len(x))
    pull = (x.mean(0).numpy() - mean) / error
    assert np.abs(pull[alpha > 0.01]).max() < 4.5
    bright = alpha > 30
    assert bright.sum() > 10
    np.testing.assert_allclose(x.mean(0).numpy()[bright], 40 * alpha[bright] * 0.0005, rtol=0.01)


def test_log_prob_is_that_of_scipy(events):
    x, z = events
    x, z = x[:50].double(), z[:50].double()
    alpha = (SHOWER.fractions(z) * z[:, :1] / 0.02).numpy()
    with np.errstate(divide="ignore"):
        lit = stats.gamma.logpdf(x.numpy(), np.maximum(alpha, 1e-300), scale=0.02)
        dark = stats.gamma.logcdf(0.002, np.maximum(alpha, 1e-300), scale=0.02)
    wanted = np.where(x.numpy() > 0, lit, np.where(alpha > 0, dark, 0.0)).sum(1)
    np.testing.assert_allclose(SHOWER.log_prob(x, z).numpy(), wanted, rtol=1e-10, atol=1e-8)


def test_improbable_zeros_do_not_underflow():
    z = torch.tensor([[100.0, 0.5]], dtype=torch.float64)
    value = SHOWER.log_prob(torch.zeros(1, 78, dtype=torch.float64), z)
    alpha = (SHOWER.fractions(z)[0] * 5000).numpy()
    # P(α, x) = x^α e^−x / Γ(α + 1) · ₁F₁(1; α + 1; x)
    wanted = alpha * math.log(0.1) - 0.1 - special.gammaln(alpha + 1)
    wanted = wanted + np.log(special.hyp1f1(1, alpha + 1, 0.1))
    assert wanted.min() < -800
    assert float(value[0]) == pytest.approx(wanted.sum(), rel=1e-10)


def test_light_before_the_start_is_impossible():
    x = torch.full((1, 78), 0.01)
    assert SHOWER.log_prob(x, torch.tensor([[10.0, 4.5]])).item() == -math.inf
    x[:, SHOWER.layers[0]] = 0
    assert math.isfinite(SHOWER.log_prob(x, torch.tensor([[10.0, 4.5]])).item())


@pytest.mark.parametrize("column", [0, 12, 38, 65])
def test_the_law_of_one_voxel_is_normalised(column):
    """Density over all values above the threshold and the probability of a zero."""
    z = torch.tensor([[5.0, 0.7]], dtype=torch.float64)
    x = torch.zeros(1, 78, dtype=torch.float64)
    x[:, 30:34] = 0.3
    x[:, column] = 0

    def density(log):
        y = x.clone()
        y[:, column] = math.exp(log)
        return math.exp(float(SHOWER.log_prob(y, z) - dark) + log)

    dark = SHOWER.log_prob(x, z)
    alpha = float(SHOWER.fractions(z)[0, column]) * 250
    # given that it is zero with probability P, the rest is (1 − P) / P times as likely
    rest = integrate.quad(density, math.log(0.002), math.log(5.0), limit=200)[0]
    zero = special.gammainc(alpha, 0.1)
    assert rest == pytest.approx((1 - zero) / zero, rel=1e-6)


def test_marginal_is_the_quadrature_over_the_start(events):
    x, z = events
    worst = 0.0
    for row in range(12):
        one, energy = x[row : row + 1].double(), float(z[row, 0])
        centre = float(SHOWER.log_prob(one, z[row : row + 1]))

        def integrand(t, one=one, energy=energy, centre=centre):
            label = torch.tensor([[energy, t]], dtype=torch.float64)
            return math.exp(float(SHOWER.log_prob(one, label)) - centre - t * 7 / 9) * 7 / 9

        start = float(z[row, 1])
        near = [start - 0.5, start - 0.1, start, start + 0.1, start + 0.5, 4.0]
        points = sorted(p for p in near if 0 < p < 22)
        value = integrate.quad(integrand, 0, 22, points=points, limit=400, epsabs=0)[0]
        exact = centre + math.log(value)
        worst = max(worst, abs(float(SHOWER.marginal_log_prob(one, z[row : row + 1, 0])) - exact))
    assert worst < 1e-5


def test_marginal_of_an_empty_event_has_the_rest_of_the_prior():
    x = torch.zeros(1, 78, dtype=torch.float64)
    value = float(SHOWER.marginal_log_prob(x, torch.tensor([1.0])))
    assert math.exp(value) > math.exp(-22 * 7 / 9)
    assert math.exp(value) < 1e-3


def test_marginal_is_calibrated(events):
    """Were energies and data independent, ln p(x|E) would not prefer the true energies."""
    x, z = (t[:800] for t in events)
    right = SHOWER.marginal_log_prob(x[:300], z[:300, 0])
    wrong = SHOWER.marginal_log_prob(x[:300], 1.3 * z[:300, 0])
    assert (right - wrong).mean() > 1
    # the mean of p(x|E') / p(x|E) over x of E is one
    near = SHOWER.marginal_log_prob(x, 1.005 * z[:, 0])
    ratio = (near - SHOWER.marginal_log_prob(x, z[:, 0])).exp()
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / len(x) ** 0.5


def test_the_least_energy_is_that_of_the_prior():
    z = Shower(energy_range=(0.05, 0.06)).sample_prior(10, seed=0)
    z[0, 0] = 0.05
    assert bool(torch.isfinite(SHOWER.log_prob(torch.zeros(10, 78), z)).all())


def test_prior():
    z = SHOWER.sample_prior(20_000, seed=0).double().numpy()
    assert stats.kstest(np.log(z[:, 0]) / np.log(100), stats.uniform.cdf).pvalue > 1e-3
    assert stats.kstest(z[:, 1], stats.expon(scale=9 / 7).cdf).pvalue > 1e-3
    low = Shower(energy_range=(10.0, 20.0)).sample_prior(1000, seed=0)
    assert 10 <= low[:, 0].min() < 10.1
    assert 19.9 < low[:, 0].max() <= 20


def test_layers_split_and_join(events):
    x, _ = events
    assert [s.stop - s.start for s in SHOWER.layers] == [r * c for r, c in SHOWER.shape]
    assert SHOWER.layers[-1].stop == SHOWER.features == 78
    energies, shares = SHOWER.split(x)
    torch.testing.assert_close(energies, SHOWER.layer_energies(x))
    torch.testing.assert_close(energies.sum(1), x.sum(1))
    sums = SHOWER.layer_energies(shares)
    assert bool(((sums - 1).abs() < 1e-5).logical_or(energies == 0).all())
    assert bool((energies == 0).any())
    assert bool((shares[energies[:, 0] == 0][:, :24] == 0).all())
    again = SHOWER.join(energies, shares)
    torch.testing.assert_close(again, x, rtol=1e-5, atol=0.0021)
    torch.testing.assert_close(SHOWER.join(energies, 3 * shares), again)
    assert bool(((again == 0) | (again >= 0.002)).all())


def test_randomness_and_types():
    state = torch.get_rng_state()
    x, z = SHOWER.sample(20, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    again = SHOWER.sample(20, torch.Generator().manual_seed(1))
    assert torch.equal(x, again[0])
    assert torch.equal(z, again[1])
    assert not torch.equal(x, SHOWER.sample(20, seed=2)[0])
    assert x.dtype == z.dtype == torch.float32
    assert SHOWER.simulate(z.double(), seed=0).dtype == torch.float64
    assert SHOWER.fractions(z).dtype == torch.float32
    assert SHOWER.log_prob(x, z).dtype == torch.float64
    assert bool(((x == 0) | (x >= 0.002)).all())
    torch.testing.assert_close(
        SHOWER.log_prob(x, z), SHOWER.log_prob(x.double(), z.double()), rtol=0, atol=1e-9
    )
    assert repr(Shower(threshold=0.01)).endswith("threshold=0.01)")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Shower(half_width=0.0), "half_width as a positive number"),
        (lambda: Shower(scale=math.nan), "scale as a positive number"),
        (lambda: Shower(energy_range=(5.0, 1.0)), "Give them in GeV"),
        (lambda: Shower(energy_range=5), "low < high; got 5"),
        (lambda: Shower(energy_range=(1.0, 2.0, 3.0)), "low < high; got"),
        (lambda: SHOWER.sample(0), "n as a whole number"),
        (lambda: SHOWER.sample(2, torch.Generator(), 1), "Give one of the two"),
        (lambda: SHOWER.simulate(torch.zeros(3)), r"z of shape \(N, 2\)"),
        (lambda: SHOWER.simulate(torch.tensor([[1.0, -0.1]])), "a start of at least 0; got .* row"),
        (lambda: SHOWER.fractions(torch.tensor([[math.nan, 0.0]])), "finite z"),
        (lambda: SHOWER.log_prob(torch.zeros(2, 77), torch.ones(2, 2)), r"\(N, 78\)"),
        (lambda: SHOWER.log_prob(torch.zeros(2, 78), torch.ones(3, 2)), r"z of shape \(2, 2\)"),
        (lambda: SHOWER.log_prob(torch.full((1, 78), 1e-3), torch.ones(1, 2)), "to zero"),
        (lambda: SHOWER.log_prob(torch.full((1, 78), -1.0), torch.ones(1, 2)), "row 0, column 0"),
        (lambda: SHOWER.marginal_log_prob(torch.zeros(2, 78), torch.ones(3)), r"shape \(2,\)"),
        (
            lambda: SHOWER.marginal_log_prob(torch.zeros(1, 78), torch.zeros(1)),
            "energies of at least",
        ),
        (lambda: SHOWER.fractions(torch.tensor([[0.0015, 0.0]])), "at least 0.05 GeV .* row 0"),
        (lambda: SHOWER.log_prob(torch.zeros(1, 78), torch.tensor([[0.001, 0.0]])), "0.05 GeV"),
        (lambda: SHOWER.layer_energies(torch.zeros(78)), r"\(N, 78\)"),
        (lambda: SHOWER.join(torch.zeros(2, 2), torch.zeros(2, 78)), r"\(N, 3\)"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
