"""Coverage, HPD, SBC, TARP and sharpness on exact, too-wide, too-narrow and biased posteriors."""

import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from scipy import stats

import flowpost as fp
from flowpost import diagnostics as fd
from flowpost.diagnostics.histogram import LevelHistogram
from flowpost.diagnostics.nulls import binomial_interval


class Gaussian:
    """q(z|x) = N(x + bias σ, (width σ)²) per column for truth N(x, σ²), as a torch Distribution."""

    def __init__(self, events, columns, width=1.0, bias=0.0, generator=None):
        self.sigma = 0.5 * (1 + torch.arange(columns, dtype=torch.float64))
        self.x = 3 * torch.randn(events, columns, dtype=torch.float64, generator=generator)
        self.z = self.x + self.sigma * torch.randn(self.x.shape, dtype=torch.float64)
        self.scale, self.shift = width * self.sigma, bias * self.sigma
        self.batch_shape, self.event_shape = torch.Size([events]), torch.Size([columns])

    def log_prob(self, z):
        return torch.distributions.Normal(self.x + self.shift, self.scale).log_prob(z).sum(-1)

    def sample(self, shape, *, generator=None):
        noise = torch.randn(*shape, *self.x.shape, dtype=torch.float64, generator=generator)
        return self.x + self.shift + self.scale * noise

    def sample_and_log_prob(self, shape, *, generator=None):
        z = self.sample(shape, generator=generator)
        return z, self.log_prob(z)

    def to_base(self, z):
        return (z - self.x - self.shift) / self.scale


# (width, bias in σ of every column): what the verdict must say
CASES = {
    "exact": (1.0, 0.0, "consistent"),
    "too wide": (1.1, 0.0, "over-covers"),
    "too narrow": (1 / 1.1, 0.0, "under-covers"),
    "biased": (1.0, 0.25, "under-covers"),
}


def expected_coverage(p, columns, width, bias):
    """P(χ²_d(λ)/w² ≤ F⁻¹(p)), λ = Σ bias²: the closed form for both base-ordered and HPD levels."""
    radius = width**2 * stats.chi2.ppf(p, columns)
    if bias == 0:
        return stats.chi2.cdf(radius, columns)
    return stats.ncx2.cdf(radius, columns, columns * bias**2)


# ---------------------------------------------------------------------------------------- nulls


def anderson_darling_limit(z):
    """P(A² ≥ z) from E exp(sA²) = [−2πs / cos(π√(1 + 8s)/2)]^½, inverted (Gil-Pelaez)."""
    step = 1e-3
    t = (np.arange(200_000) + 0.5) * step
    square = -2j * np.pi * t / np.cos(np.pi / 2 * np.sqrt(1 + 8j * t))
    phi = np.sqrt(np.abs(square)) * np.exp(0.5j * np.unwrap(np.angle(square)))
    return 0.5 + ((phi * np.exp(-1j * t * z)).imag / t).sum() * step / np.pi


@pytest.mark.parametrize("z", [0.3, 0.8, 1.5, 2.5, 4.0, 6.0])
def test_anderson_darling_limit_agrees_with_its_characteristic_function(z):
    assert fd.anderson_darling_pvalue(z) == pytest.approx(anderson_darling_limit(z), abs=2e-5)
    tail = anderson_darling_limit(9.0)
    assert fd.anderson_darling_pvalue(9.0) == pytest.approx(tail, rel=0.01)


@pytest.mark.parametrize(
    ("z", "below"),
    [(1.9329578327, 0.90), (2.492367, 0.95), (3.878125, 0.99)],
)
def test_anderson_darling_limit_at_published_points(z, below):
    assert fd.anderson_darling_pvalue(z) == pytest.approx(1 - below, abs=2e-5)


def test_anderson_darling_of_one_event_has_a_closed_form():
    # A² = −1 − ln v(1 − v)
    for z in (1.0, 2.0, 3.0):
        exact = 1 - math.sqrt(1 - 4 * math.exp(-1 - z))
        assert fd.anderson_darling_pvalue(z, 1) == pytest.approx(exact, abs=3e-3)


def test_anderson_darling_tail_is_monotonic_and_joins():
    z = np.linspace(0.05, 40, 2000)
    p = np.array([fd.anderson_darling_pvalue(v, 10_000) for v in z])
    assert (np.diff(p) <= 0).all()
    assert (p[z > 2] > 0).all()
    assert fd.anderson_darling_pvalue(8.001) == pytest.approx(
        fd.anderson_darling_pvalue(7.999), rel=0.03
    )
    assert fd.anderson_darling_pvalue(0) == 1.0


def test_ks_pvalue_is_the_exact_one():
    for n in (1, 10, 1000, 10_001, 300_000):
        for x in (0.5, 0.8, 1.2, 1.8):
            d = x / math.sqrt(n)
            assert fd.ks_pvalue(d, n) == pytest.approx(stats.kstwo.sf(d, n), abs=3e-6)


def test_unbinned_statistics_agree_with_scipy():
    v = torch.rand(500, dtype=torch.float64)
    expected = stats.kstest(v.numpy(), "uniform")
    assert fd.ks_uniform(v) == pytest.approx((expected.statistic, expected.pvalue))
    result = stats.goodness_of_fit(
        stats.uniform,
        v.numpy(),
        known_params={"loc": 0, "scale": 1},
        statistic="ad",
        n_mc_samples=500,
        rng=np.random.default_rng(0),
    )
    statistic, pvalue = fd.anderson_darling_uniform(v)
    assert statistic == pytest.approx(result.statistic)
    assert pvalue == pytest.approx(result.pvalue, abs=4 * math.sqrt(0.25 / 500))


@pytest.mark.parametrize("n", [1, 7, 300, 50_000])
def test_binned_statistics_agree_with_unbinned(n):
    v = torch.rand(n, dtype=torch.float64) ** 1.02
    result = fd.level_coverage(v)
    assert result.ks_statistic == pytest.approx(fd.ks_uniform(v)[0], abs=1 / 65536 + 1e-9)
    statistic, pvalue = fd.anderson_darling_uniform(v)
    assert result.ad_statistic == pytest.approx(statistic, rel=1e-3, abs=1e-4)
    assert result.ad_pvalue == pytest.approx(pvalue, abs=1e-3)
    assert result.mean_level == pytest.approx(float(v.mean()), abs=1e-5)


def test_outliers_keep_their_weight_in_anderson_darling():
    u = torch.randn(2000, 1, dtype=torch.float64)
    u[0] = 9.0  # 1 − v = 2e-19: not to be told from 1 in float64
    level = stats.chi2.cdf(u[:, 0].numpy() ** 2, 1)
    tail = stats.chi2.sf(u[:, 0].numpy() ** 2, 1)
    order = np.argsort(u[:, 0].abs().numpy())
    i = np.arange(1, 2001)
    exact = -2000 - ((2 * i - 1) * (np.log(level[order]) + np.log(tail[order][::-1]))).sum() / 2000
    assert fd.coverage(u).ad_statistic == pytest.approx(exact, abs=5e-3)
    far = fd.coverage(torch.tensor([[40.0], [0.0]]))
    assert math.isfinite(far.ad_statistic)


def test_band_is_the_binomial_one():
    band = binomial_interval(torch.tensor([0.1, 0.5]), 1000)
    assert band.shape == (3, 2, 2)
    inside = stats.binom.cdf(1000 * band[1, 1, 1], 1000, 0.5) - stats.binom.cdf(
        1000 * band[1, 0, 1] - 1, 1000, 0.5
    )
    assert 0.9545 <= inside < 0.965
    error = math.sqrt(0.25 / 1000)
    assert band[2, 1, 1] == pytest.approx(0.5 + 3 * error, abs=1e-3)


# ------------------------------------------------------------------------------------- coverage


@pytest.mark.parametrize("dof", [1, 2, 3, 10])
@pytest.mark.parametrize("case", CASES)
def test_coverage_of_each_posterior_is_the_closed_form(case, dof):
    width, bias, says = CASES[case]
    n = 20_000
    torch.manual_seed(5)  # 20 levels leave the 3 σ band somewhere in 3 % of samples
    posterior = Gaussian(n, dof, width, bias)
    result = fd.coverage(posterior.to_base(posterior.z), log_prob=posterior.log_prob(posterior.z))
    p = result.nominal.numpy()
    expected = expected_coverage(p, dof, width, bias)
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(result.empirical.numpy() - expected) < 4 * error + 1e-4).all()
    assert result.verdict().startswith(says)
    outside = (result.empirical < result.band[2, 0]) | (result.empirical > result.band[2, 1])
    assert result.within_band == pytest.approx(1 - float(outside.double().mean()))
    if case == "exact":
        assert min(result.ks_pvalue, result.ad_pvalue) > 1e-3
        assert not outside.any()
    else:
        assert max(result.ks_pvalue, result.ad_pvalue) < 1e-4
        assert outside.any()
        assert ("off by" in result.verdict()) == (case == "biased")
    assert np.allclose(result.pull_mean, -bias / width, atol=4.5 / math.sqrt(n))
    assert np.allclose(result.pull_width, 1 / width, atol=4.5 / math.sqrt(2 * n))
    sigma = width * posterior.sigma
    nll = (0.5 * math.log(2 * math.pi) + sigma.log() + (1 + bias**2) / (2 * width**2)).sum()
    assert result.nll == pytest.approx(float(nll), abs=4 * result.nll_error)
    assert result.nll_error == pytest.approx(math.sqrt(dof / 2 / n), rel=0.25)


def test_coverage_agrees_with_numpy_and_scipy():
    u = torch.randn(3000, 3) @ torch.tensor([[1.0, 0.3, 0.0], [0.0, 1.0, 0.0], [0.0, 0.1, 0.8]])
    result = fd.coverage(u)
    v = stats.chi2.cdf(u.double().square().sum(1).numpy(), 3)
    for p in (0.1, 0.5, 0.683, 0.99):
        assert result.coverage_at(p) == pytest.approx((v < p).mean(), abs=1 / 3000)
    assert result.ks_statistic == pytest.approx(stats.kstest(v, "uniform").statistic, abs=2e-5)
    assert np.allclose(result.correlation, np.corrcoef(u.numpy().T), atol=1e-5)
    assert np.allclose(result.pull_mean, u.mean(0), atol=1e-6)
    assert np.allclose(result.pull_width, u.std(0, correction=0), atol=1e-5)
    for j in range(3):
        expected = stats.kstest(u[:, j].numpy(), "norm").pvalue
        assert float(result.pull_ks_pvalue[j]) == pytest.approx(expected, rel=0.02, abs=1e-6)
    assert result.chi2_mean == pytest.approx(float(u.square().sum(1).mean()) / 3, rel=1e-5)
    i, j, r = result.largest_correlation()
    assert (i, j) == (0, 1)
    assert r == pytest.approx(float(result.correlation[0, 1]))
    assert result.pull_histogram.sum(-1) == pytest.approx(
        ((u > -4) & (u < 4)).double().mean(0).numpy(), abs=1e-3
    )


def test_hidden_faults_are_named():
    n = 20_000
    u = torch.randn(n, 2)
    correlated = torch.stack([u[:, 0], 0.8 * u[:, 0] + 0.6 * u[:, 1]], 1)
    assert "u0 and u1 are correlated (+0.8" in fd.coverage(correlated).verdict()
    skew = torch.randn(n, 1).exp()
    base = torch.special.ndtri(skew.argsort(0).argsort(0).add(0.5) / n)  # a normal in disguise
    assert fd.coverage(base).verdict() == "consistent with the nominal coverage"
    exchanged = u * torch.tensor([1.2, 0.74])  # ‖u‖² is almost right
    verdict = fd.coverage(exchanged, names=["energy", "zenith"]).verdict()
    assert "energy too narrow (width 1.2" in verdict
    assert "zenith too wide (width 0.7" in verdict
    for a, tails in ((0.8, "too light"), (1.25, "too heavy")):
        levels = torch.distributions.Beta(a, a).sample((n,))
        assert tails in fd.level_coverage(levels).verdict()
        words = "too narrow" if a < 1 else "too wide"
        assert fd.level_coverage(levels, kind="TARP").verdict() == words
    tilted = fd.coverage(u.roll(1, 1) + torch.tensor([0.04, 0.0])).verdict()
    assert tilted.startswith("consistent with the nominal coverage in ‖u‖², but u0 is off by +0.0")
    odd = torch.rand(n, 1).sub(0.5) * math.sqrt(12)  # mean 0 and width 1, but uniform
    assert "u0 is not normal" in fd.coverage(odd).verdict()
    column = fd.sbc(Coin(2000, odd=True), torch.zeros(2000, 1), 20)
    assert "shape of z0 is wrong" in column.verdict()


def test_table_is_readable():
    u = torch.randn(2000, 2)
    text = str(fd.coverage(u, log_prob=-u.square().sum(1), by=u[:, 0], bins=3, names=["a", "b"]))
    for word in ("68.0 %", "99.0 %", "KS", "AD", "pulls", "largest correlation: a, b", "NLL", "=>"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) < 200
    assert "not known" in str(fd.coverage(u))
    assert repr(fd.coverage(u)).startswith("Coverage(kind='base χ²', count=2000")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inputs_of_any_kind_are_the_same(dtype):
    u = torch.randn(500, 1, dtype=dtype)
    counts = []
    for value in (u, u[:, 0], u.numpy(), u.clone().requires_grad_(), iter(u.split(77))):
        counts.append(fd.coverage(value, levels=[0.5, 0.9]).cumulative)
    assert all(torch.equal(c, counts[0]) for c in counts)


def test_iterators_may_carry_log_prob():
    u = torch.randn(500, 2)
    log_prob = -u.square().sum(1)
    whole = fd.coverage(u, log_prob=log_prob)
    parts = fd.coverage(zip(u.split(100), log_prob.split(100), strict=True))
    assert parts.nll == pytest.approx(whole.nll)
    assert torch.equal(parts.cumulative, whole.cumulative)


def test_bins_of_a_property():
    n = 9000
    energy = 10 * torch.rand(n)
    u = torch.randn(n, 2) * torch.where(energy < 5, 1.0, 1.3)[:, None]
    result = fd.coverage(u, by=energy, bins=[0, 5, 10, 20], log_prob=u[:, 0])
    (low, high, calm), (_, _, narrow) = result.binned
    assert (low, high) == (0, 5)
    assert calm.count + narrow.count == n
    assert calm.verdict().startswith("consistent")
    assert narrow.verdict().startswith("under-covers")
    quantiles = fd.coverage(u, by=energy.numpy(), bins=3).binned
    assert [part.count for *_, part in quantiles] == [3000] * 3
    assert len(fd.coverage(u, by=torch.ones(n)).binned) == 1
    some = fd.coverage(u, by=energy, bins=2, weight=(energy < 2).double())
    assert len(some.binned) == 1


# ---------------------------------------------------------------------------------- accumulator


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    for mine, its in zip(a["histograms"], b["histograms"], strict=True):
        assert torch.equal(mine["counts"], its["counts"])
    assert torch.allclose(a["moments"], b["moments"], rtol=1e-12)


def test_merging_is_exact_in_any_order():
    u, log_prob = torch.randn(150_000, 3), torch.randn(150_000)
    whole = fd.CoverageAccumulator(3)
    whole.update(u, log_prob)
    shuffled = torch.randperm(150_000)
    parts = []
    for rows in shuffled.split([1, 70_000, 9, 79_990]):
        parts.append(fd.CoverageAccumulator(3))
        parts[-1].update(u[rows], log_prob[rows])
    total = fd.CoverageAccumulator(3)
    for part in reversed(parts):
        total.merge(part)
    same_state(total, whole)
    a, b = total.compute(), whole.compute()
    assert a.ks_pvalue == b.ks_pvalue
    assert a.ad_statistic == b.ad_statistic
    assert torch.equal(a.empirical, b.empirical)
    assert torch.equal(a.pull_ks_pvalue, b.pull_ks_pvalue)
    assert a.nll == pytest.approx(b.nll, rel=1e-12)
    assert a.nll_error == pytest.approx(float(log_prob.std()) / math.sqrt(150_000), rel=1e-4)


def test_jobs_resume(tmp_path):
    u = torch.randn(1000, 2)
    whole = fd.CoverageAccumulator(2)
    whole.update(u)
    first = fd.CoverageAccumulator(2)
    first.update(u[:400])
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second = fd.CoverageAccumulator(2)
    second.update(torch.randn(5, 2))
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    first.update(u[:3])  # the saved state is a copy
    second.update(u[400:])
    same_state(second, whole)


def test_accumulators_of_different_things_do_not_mix():
    a = fd.CoverageAccumulator(2)
    for other in (fd.CoverageAccumulator(3), fd.CoverageAccumulator(2, bins=1024)):
        with pytest.raises(ValueError, match="to merge; got"):
            a.merge(other)
        with pytest.raises(ValueError, match="Expected the state of"):
            a.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="to merge; got"):
        a.merge(fd.LevelAccumulator())
    with pytest.raises(ValueError, match="same bins"):
        LevelHistogram(64).merge(LevelHistogram(32))
    with pytest.raises(ValueError, match="Expected a state of 64 bins"):
        LevelHistogram(64).load_state_dict(LevelHistogram(32).state_dict())
    b = fd.CoverageAccumulator(2)
    a.update(torch.randn(5, 2))
    b.update(torch.randn(5, 2), torch.randn(5))
    with pytest.raises(ValueError, match="in none; got both"):
        a.merge(b)
    with pytest.raises(ValueError, match="in none; got both"):
        b.update(torch.randn(5, 2))


def test_whole_weights_are_repetitions():
    u = torch.randn(4000, 2)
    weight = torch.randint(0, 4, (4000,))
    repeated = fd.coverage(u.repeat_interleave(weight, 0), log_prob=None)
    weighted = fd.coverage(u, weight=weight)
    assert torch.allclose(weighted.cumulative, repeated.cumulative)
    assert weighted.ks_statistic == pytest.approx(repeated.ks_statistic)
    assert torch.allclose(weighted.correlation, repeated.correlation)
    assert torch.allclose(weighted.pull_width, repeated.pull_width)
    effective = float(weight.sum() ** 2 / weight.square().sum())
    assert weighted.effective_count == pytest.approx(effective)
    assert "effective" in str(weighted)
    log_prob = torch.randn(4000)
    score = fd.coverage(u, weight=weight, log_prob=log_prob)
    assert score.nll == pytest.approx(-float((weight * log_prob).sum() / weight.sum()))
    assert score.nll_error == pytest.approx(1 / math.sqrt(effective), rel=0.1)


def test_weights_of_one_change_nothing_and_merge():
    u, weight = torch.randn(3000, 2), torch.rand(3000)
    plain, ones = fd.coverage(u), fd.coverage(u, weight=torch.ones(3000))
    assert ones.ks_pvalue == plain.ks_pvalue
    assert ones.ad_statistic == pytest.approx(plain.ad_statistic)
    a, b = fd.CoverageAccumulator(2), fd.CoverageAccumulator(2)
    a.update(u[:1000])
    b.update(u[1000:], weight=weight[1000:])
    full = torch.cat([torch.ones(1000), weight[1000:]])
    expected = fd.coverage(u, weight=full)
    for first, second in ((a, b), (b, a)):
        merged = fd.CoverageAccumulator(2)
        merged.merge(first)
        merged.merge(second)
        assert merged.compute().ks_statistic == pytest.approx(expected.ks_statistic)
        assert merged.compute().effective_count == pytest.approx(expected.effective_count)


def test_level_accumulators_merge_and_resume():
    v, weight = torch.rand(500, dtype=torch.float64), torch.rand(500)
    first, second = (fd.LevelAccumulator("PIT", bins=1024, levels=[0.5]) for _ in range(2))
    first.update(v[:200], weight=weight[:200])
    second.load_state_dict(first.state_dict())
    third = fd.LevelAccumulator("PIT", bins=1024, levels=[0.5])
    third.update(v[200:], weight=weight[200:])
    second.merge(third)
    whole = fd.level_coverage(v, weight=weight, levels=[0.5])
    assert second.compute().coverage_at(0.5) == pytest.approx(whole.coverage_at(0.5))
    assert second.compute().max_gap == pytest.approx(whole.max_gap)
    assert str(second.compute()).startswith("PIT coverage of 500 events (effective")


# ------------------------------------------------------------------------------ HPD, SBC, TARP

SAMPLED = {
    "hpd": lambda q, g: fd.hpd_coverage(q, q.z, draws=200, generator=g),
    "tarp": lambda q, g: fd.tarp(q, q.z, draws=200, generator=g, log_prob=q.log_prob(q.z)),
    "tarp uniform": lambda q, g: fd.tarp(q, q.z, draws=200, references="uniform", generator=g),
    "sbc": lambda q, g: fd.sbc(q, q.z, draws=200, generator=g),
}


@pytest.mark.parametrize("case", ["exact", "too wide", "too narrow", "biased"])
@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_diagnostics_tell_posteriors_apart(name, case):
    width, bias, _ = CASES[case]
    width = width**1.7  # 1.18 and 0.85
    if name.startswith("tarp"):
        bias *= 4  # seen from references on all sides a bias only counts to second order
    result = SAMPLED[name](Gaussian(4000, 2, width, bias), torch.Generator().manual_seed(3))
    pvalue = float(torch.as_tensor(result.ks_pvalue).min())
    if case == "exact":
        assert pvalue > 0.002
        assert "consistent" in result.verdict()
    else:
        assert pvalue < 1e-4
    if name == "sbc" and case != "exact":
        words = {"biased": "biased high", "too wide": "too wide", "too narrow": "too narrow"}
        assert result.verdict().count(words[case]) == 2
    assert str(result)


@pytest.mark.parametrize(("width", "bias"), [(1.0, 0.0), (1.15, 0.0), (0.87, 0.0), (1.0, 0.3)])
def test_hpd_coverage_is_the_closed_form(width, bias):
    n = 8000
    posterior = Gaussian(n, 2, width, bias)
    result = fd.hpd_coverage(posterior, posterior.z, draws=400)
    expected = expected_coverage(result.nominal.numpy(), 2, width, bias)
    error = np.sqrt(expected * (1 - expected) / n)
    assert (np.abs(result.empirical.numpy() - expected) < 4 * error + 2e-3).all()
    assert result.nll == pytest.approx(-float(posterior.log_prob(posterior.z).mean()))


def test_sbc_ranks_count_smaller_draws():
    posterior = Gaussian(5000, 2, bias=0.5)
    ranks = fd.sbc_ranks(posterior, posterior.z, draws=99)
    assert ranks.shape == (5000, 2)
    assert ranks.min() >= 0
    assert ranks.max() <= 99
    # P(draw < truth) = Φ(−b/√2)
    assert float(ranks.double().mean()) / 99 == pytest.approx(
        stats.norm.cdf(-0.5 / math.sqrt(2)), abs=0.01
    )
    result = fd.sbc(posterior, posterior.z, draws=99, names=["energy", "x"])
    assert float(result.chi2_pvalue.max()) < 1e-6
    assert "energy" in str(result)
    assert repr(result).startswith("SBC(count=5000, draws=99, ks_pvalue=[")
    assert math.isnan(float(fd.sbc(Gaussian(4, 1), torch.zeros(4), draws=9).chi2_pvalue[0]))


class Coin(Gaussian):
    """Labels 0 or 1 and an equal density: everything ties. Odd: all draws of an event agree."""

    def __init__(self, events, odd=False):
        super().__init__(events, 1)
        self.z = torch.randint(0, 2, (events, 1)).double()
        self.odd = odd

    def log_prob(self, z):
        return torch.zeros(z.shape[:-1], dtype=z.dtype)

    def sample(self, shape, *, generator=None):
        size = (*shape, *self.z.shape)
        if self.odd:
            below = torch.arange(size[0])[:, None] < 4 + 12 * (torch.rand(size[1:])[:, 0] < 0.5)
            return 0.5 - below[..., None].double()
        return torch.randint(0, 2, size, generator=generator).double()


@pytest.mark.parametrize("name", SAMPLED)
def test_ties_are_broken_at_random(name):
    result = SAMPLED[name](Coin(4000), torch.Generator().manual_seed(1))
    assert float(torch.as_tensor(result.ks_pvalue).min()) > 1e-3


def test_draws_are_reproducible_and_chunks_do_not_matter(monkeypatch):
    posterior = Gaussian(50, 2)
    first, again = (
        fd.hpd_levels(posterior, posterior.z, 64, torch.Generator().manual_seed(7))[0]
        for _ in range(2)
    )
    assert torch.equal(first, again)
    sizes = []
    monkeypatch.setattr("flowpost.diagnostics.draws._ELEMENTS", 1000)  # ten draws at a time
    draw = posterior.sample
    monkeypatch.setattr(
        posterior, "sample", lambda shape, generator: sizes.append(shape[0]) or draw(shape)
    )
    for function in (fd.hpd_levels, fd.sbc_ranks, fd.tarp_levels, fd.sharpness):
        sizes.clear()
        function(posterior, posterior.z, 64)
        assert sizes == [10] * 6 + [4]


def test_the_global_generator_is_left_alone():
    posterior = Gaussian(50, 2)
    before = torch.random.get_rng_state()
    for diagnostic in SAMPLED.values():
        diagnostic(posterior, torch.Generator().manual_seed(0))
    assert torch.equal(before, torch.random.get_rng_state())


def test_tarp_takes_given_references():
    posterior = Gaussian(3000, 2)
    corner = torch.full((3000, 2), -30.0)
    biased = Gaussian(3000, 2, bias=0.3)
    assert fd.tarp(posterior, posterior.z, 100, references=corner).ks_pvalue > 1e-3
    # from one side a bias adds up
    assert fd.tarp(biased, biased.z, 100, references=corner).ks_pvalue < 1e-12


# ------------------------------------------------------------------------------------ sharpness


def test_sharpness_of_a_gaussian():
    n, width = 4000, 1.2
    posterior = Gaussian(n, 2, width)
    result = fd.sharpness(posterior, posterior.z, draws=400, levels=(0.5, 0.68, 0.9))
    log_sigma = float((width * posterior.sigma).log().sum())
    entropy = 1 + math.log(2 * math.pi) + log_sigma
    assert result.entropy == pytest.approx(entropy, abs=4 * result.entropy_error)
    assert result.entropy_error < 0.002
    nll = math.log(2 * math.pi) + log_sigma + 1 / width**2
    assert result.nll == pytest.approx(nll, abs=4 * result.nll_error)
    for k, p in enumerate((0.5, 0.68, 0.9)):
        area = -2 * math.pi * math.log1p(-p) * math.exp(log_sigma)
        assert float(result.volume[k]) == pytest.approx(area, rel=0.015)
        assert result.volume_quantiles[0, k] < area < result.volume_quantiles[2, k]
    assert "68 % volume" in str(result)
    assert "NLL" in str(result)
    alone = fd.sharpness(posterior, draws=10)
    assert alone.nll is None
    assert "NLL" not in str(alone)


# -------------------------------------------------------------------------------------- refusals

U = torch.randn(10, 2)
REFUSED = {
    "nan": (lambda: fd.coverage(torch.tensor([[0.0], [math.nan]])), "finite base coordinates u"),
    "inf": (lambda: fd.coverage(torch.tensor([math.inf])), "finite base coordinates u; got inf"),
    "empty": (lambda: fd.coverage(torch.empty(0, 2)), "at least one event; got none"),
    "no columns": (lambda: fd.coverage(torch.empty(3, 0)), "at least one base coordinate"),
    "empty stream": (lambda: fd.coverage(iter([])), "at least one event; got none"),
    "3-d": (lambda: fd.coverage(torch.zeros(2, 2, 2)), r"shape \(N, d\); got \(2, 2, 2\)"),
    "text": (lambda: fd.coverage(["a"]), "as a tensor or array of numbers"),
    "log_prob": (lambda: fd.coverage(U, log_prob=torch.zeros(9)), r"log_prob of shape \(10,\)"),
    "log_prob nan": (lambda: fd.coverage(U, log_prob=U[:, 0] / 0), "finite log_prob"),
    "weight": (lambda: fd.coverage(U, weight=-torch.ones(10)), "not negative; got -1"),
    "weight nan": (lambda: fd.coverage(U, weight=torch.full((10,), math.nan)), "finite weight"),
    "weight shape": (lambda: fd.coverage(U, weight=torch.ones(10, 1)), "weight of shape"),
    "weight zero": (lambda: fd.coverage(U, weight=torch.zeros(10)), "positive weight; got none"),
    "levels": (lambda: fd.coverage(U, levels=[68.0]), "inside \\(0, 1\\); got \\[68.0\\]"),
    "levels 0": (lambda: fd.coverage(U, levels=0), "levels as a whole number"),
    "names": (lambda: fd.coverage(U, names=["a"]), "2 names of base coordinates; got 1"),
    "bins alone": (lambda: fd.coverage(U, bins=3), "Expected by"),
    "by": (lambda: fd.coverage(U, by=torch.zeros(3)), r"by of shape \(10,\); got \(3,\)"),
    "edges": (lambda: fd.coverage(U, by=U[:, 0], bins=[1.0, 0.0]), "rising edges"),
    "stream": (lambda: fd.coverage(iter([U]), by=U[:, 0]), "got an iterator"),
    "hist bins": (lambda: fd.CoverageAccumulator(2, bins=7), "even whole number"),
    "dof": (lambda: fd.CoverageAccumulator(2).update(torch.zeros(3, 3)), r"\(N, 2\)"),
    "nothing": (lambda: fd.CoverageAccumulator(2).compute(), "got none"),
    "level": (lambda: fd.level_coverage(torch.tensor([1.5])), r"levels in \[0, 1\]"),
    "level list": (lambda: fd.ks_uniform(torch.tensor([-1.0])), r"levels in \[0, 1\]"),
    "level none": (lambda: fd.ks_uniform(torch.empty(0)), "at least one level"),
    "at": (lambda: fd.coverage(U).coverage_at(68), "68 % is written 0.68"),
    "pair": (lambda: fd.coverage(U[:, 0]).largest_correlation(), "at least two"),
    "z shape": (lambda: fd.hpd_coverage(Gaussian(4, 2), torch.zeros(3, 2)), r"shape \(4, 2\)"),
    "z nan": (lambda: fd.sbc(Gaussian(1, 1), torch.tensor([math.nan])), "finite true labels z"),
    "no events": (lambda: fd.sbc(Gaussian(0, 1), torch.zeros(0, 1)), "at least one event"),
    "draws": (lambda: fd.sbc(Gaussian(4, 1), torch.zeros(4), draws=0), "draws as a whole"),
    "sbc names": (lambda: fd.sbc(Gaussian(4, 1), torch.zeros(4), names="ab"), "1 names"),
    "references": (
        lambda: fd.tarp(Gaussian(4, 1), torch.zeros(4), references=torch.zeros(3, 1)),
        "references of shape",
    ),
    "reference word": (
        lambda: fd.tarp(Gaussian(4, 1), torch.zeros(4), references="prior"),
        "got 'prior'",
    ),
    "one event": (lambda: fd.tarp(Gaussian(1, 1), torch.zeros(1)), "at least two events"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_say_what_was_expected(name):
    call, text = REFUSED[name]
    with pytest.raises(ValueError, match=text):
        call()


def test_nan_densities_are_refused():
    posterior = Gaussian(4, 1)
    posterior.shift = torch.full((1,), math.nan)
    posterior.log_prob = lambda z: torch.full(z.shape[:-1], math.nan)
    with pytest.raises(ValueError, match="log q without NaN"):
        fd.hpd_coverage(posterior, torch.zeros(4))
    with pytest.raises(ValueError, match="finite log q of the true labels"):
        fd.sharpness(posterior, torch.zeros(4))
    posterior.batch_shape = torch.Size([2, 2])
    with pytest.raises(ValueError, match="batch shape"):
        fd.sbc(posterior, torch.zeros(4))


def test_import_is_light():
    code = (
        "import sys, flowpost.diagnostics, flowpost.plots.coverage;"
        "assert not {'scipy.stats', 'matplotlib', 'healpy', 'lightning'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_verdict_names_the_bins_that_are_off():
    g = torch.Generator().manual_seed(0)
    by = torch.rand(8000, generator=g)
    # too narrow below and too wide above, which cancels on the whole
    u = torch.randn(8000, 1, generator=g) * torch.where(by < 0.5, 1.25, 0.75)[:, None]
    verdict = fd.coverage(u, by=by, bins=[0.0, 0.5, 1.0]).verdict()
    assert "in bins: 0 to 0.5 under-covers, 0.5 to 1 over-covers" in verdict
    fine = fd.coverage(torch.randn(8000, 1, generator=g), by=by, bins=[0.0, 0.5, 1.0])
    assert fine.verdict() == "consistent with the nominal coverage"


def levels_of(points, n, inverse=False):
    """Levels of n events whose coverage at nominal p is that of the points, joined by lines."""
    nominal, empirical = np.array([(0, 0), *points, (1, 1)]).T
    at = (np.arange(n) + 0.5) / n
    pair = (nominal, empirical) if inverse else (empirical, nominal)
    return torch.as_tensor(np.interp(at, *pair))


CROSSING = [(0.5, 0.559), (0.68, 0.725), (0.9, 0.870), (0.95, 0.919)]


@pytest.mark.parametrize("n", [1000, 20_000])
@pytest.mark.parametrize("crossing", [CROSSING, [(0.1, 0.17), (0.5, 0.43)]], ids=str)
@pytest.mark.parametrize("inverse", [False, True])
def test_verdict_of_a_crossing_is_that_of_the_table(crossing, inverse, n):
    result = fd.level_coverage(levels_of(crossing, n, inverse), kind="HPD")
    points = [(e, p) for p, e in crossing] if inverse else crossing
    for p, e in points:
        assert result.coverage_at(p) == pytest.approx(e, abs=1e-3)
    low = "under" if inverse else "over"
    high = "over" if inverse else "under"
    tails = "heavy" if inverse else "light"
    assert result.verdict() == (
        f"{low}-covers at low and {high}-covers at high credibility (tails too {tails})"
    )


@pytest.mark.parametrize("inverse", [False, True])
def test_verdict_of_a_bump_names_its_place(inverse):
    bump = [(0.4, 0.4), (0.5, 0.55), (0.6, 0.6)]
    verdict = fd.level_coverage(levels_of(bump, 3000, inverse)).verdict()
    word = "under" if inverse else "over"
    assert re.fullmatch(rf"{word}-covers around 5\d(\.\d)? % credibility", verdict)
    exact = fd.level_coverage(levels_of([], 3000))
    assert exact.verdict() == "consistent with the nominal coverage"


@pytest.mark.parametrize("name", SAMPLED)
def test_an_unconditional_density_is_that_of_every_event(name):
    head = fp.PosteriorHead(0, fp.Product(a=fp.Positive(), b=fp.Circle()), "affine")
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    q = head(None)
    z = q.sample((400,))
    results = []
    for one in (q, q.expand((400,))):
        one.z = z
        results.append(SAMPLED[name](one, torch.Generator().manual_seed(1)))
    assert str(results[0]) == str(results[1])
    assert float(torch.as_tensor(results[0].ks_pvalue).min()) > 1e-3
    assert fd.sharpness(q, z, draws=50).count == 400
    with pytest.raises(ValueError, match=r"becomes that by q\.expand\(\(N,\)\)"):
        fd.hpd_coverage(q, z[0])


def test_columns_and_base_coordinates_are_called_as_in_the_space():
    space = fp.Product(energy=fp.Positive(), direction=fp.Sphere())
    q = fp.PosteriorHead(2, space, "affine")(torch.zeros(50, 2))
    z = q.sample()
    assert fd.sbc(q, z, draws=20).names == space.names
    table = str(fd.coverage(q.to_base(z), names=q.space.base_names))
    for name in ("direction.u0", "direction.u1", "energy"):
        assert name in table
