"""The exact posteriors that defaults are judged by are exact."""

import math

import pytest
import torch
from scipy import stats

from flowpost.simulators.posteriors import Crescents, FourModes, NoisyIdentity, Ring, WidthMixture

CASES = {
    "crescents": Crescents,
    "mixture": WidthMixture,
    "four-modes": FourModes,
    "linear": NoisyIdentity,
    "linear-uniform": lambda: NoisyIdentity(prior="uniform"),
    "ring": Ring,
}
cases = pytest.mark.parametrize("simulator", [make() for make in CASES.values()], ids=list(CASES))
EVENTS, DRAWS, BINS = 200, 199, 10


def ranks(simulator, distort=None):
    """Return the ranks of each true label column, of its size and of its density, (N, 2D + 1)."""
    x, z = simulator.sample(EVENTS, seed=11)
    generator = torch.Generator().manual_seed(12)
    rows = []
    for event, truth in zip(x, z, strict=True):
        draws = simulator.posterior_sample(event, DRAWS, generator=generator)
        if distort is not None:
            draws = distort(draws)
        density = simulator.log_joint(draws, event) < simulator.log_joint(truth[None], event)
        size = draws.abs() < truth.abs()
        rows.append(torch.cat(((draws < truth).sum(0), size.sum(0), density.sum()[None])))
    return torch.stack(rows)


def p_values(rank):
    """Return the p-value of χ² over bins of equal probability for every column of ranks."""
    counts = [torch.bincount(r * BINS // (DRAWS + 1), minlength=BINS) for r in rank.T]
    return torch.tensor([stats.chisquare(c.numpy()).pvalue for c in counts])


@cases
def test_true_label_ranks_uniformly_among_exact_draws(simulator):
    p = p_values(ranks(simulator))
    assert p.min() > 0.05 / len(p), p


def test_ranks_find_posteriors_that_are_too_wide_or_biased():
    for distort in (lambda d: d.mean(0) + 1.4 * (d - d.mean(0)), lambda d: d + 0.4 * d.std(0)):
        p = p_values(ranks(NoisyIdentity(2), distort))
        assert p.min() < 1e-5, p


@pytest.mark.parametrize("name", ["crescents", "mixture"])
@pytest.mark.parametrize("edge", [False, True])
def test_density_integrates_to_one(name, edge):
    simulator = CASES[name]()
    lower, upper = (b.double() for b in simulator.bounds)
    x, _ = simulator.sample(500, seed=2)
    if name == "crescents":
        # at the mirror line, where half circles give labels only in part, or away from it
        score = (x - torch.tensor([0.25, 0.0])).norm(dim=-1) if edge else (x[:, 0] + 0.3).abs()
        event, cells = x[score.argmin()], 1600
    else:
        score = (x - 9.9).norm(dim=-1) if edge else x.norm(dim=-1)
        event, cells = x[score.argmin()], 1000
    axes = [
        low + (torch.arange(cells, dtype=torch.float64) + 0.5) * (high - low) / cells
        for low, high in zip(lower, upper, strict=True)
    ]
    grid = torch.cartesian_prod(*axes)
    density = simulator.log_posterior(grid, event).exp()
    integral = density.mean() * (upper - lower).prod()
    assert integral == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("name", ["four-modes", "ring", "linear", "linear-uniform"])
def test_density_integrates_to_the_fraction_of_draws_in_a_box(name):
    simulator = NoisyIdentity(3, name[7:] or "normal") if "linear" in name else CASES[name]()
    x, _ = simulator.sample(6, seed=4)
    generator = torch.Generator().manual_seed(5)
    errors = []
    for event in x:
        z = simulator.posterior_sample(event, 20_000, generator=generator).double()
        centre = z[0]
        near = z[((z - centre) / z.std(0)).norm(dim=-1).argsort()[:1000]]
        lower, upper = near.quantile(torch.tensor([0.02, 0.98], dtype=z.dtype), dim=0)
        fraction = ((z > lower) & (z < upper)).all(-1).double().mean()
        u = torch.rand(60_000, simulator.dim, generator=generator, dtype=z.dtype)
        density = simulator.log_posterior(lower + u * (upper - lower), event).exp()
        errors.append((density.mean() * (upper - lower).prod() / fraction).log())
    errors = torch.stack(errors)
    assert errors.abs().max() < 0.2, errors
    assert errors.mean().abs() < 0.05, errors


def test_four_modes_are_equally_weighted_and_mirrored():
    simulator = FourModes()
    x, _ = simulator.sample(3, seed=5)
    n = 8000
    generator = torch.Generator().manual_seed(6)
    for event in x:
        z = simulator.posterior_sample(event, n, generator=generator)
        counts = torch.bincount((z[:, 2] > 0) * 2 + (z[:, 3] > 0), minlength=4)
        assert stats.chisquare(counts.numpy()).pvalue > 1e-3
        flipped = z * torch.tensor([1.0, 1, -1, 1, 1])
        a, b = simulator.log_joint(z, event), simulator.log_joint(flipped, event)
        assert torch.equal(a, b)
        size = z[:, 2].abs()
        assert stats.ks_2samp(size[z[:, 2] > 0], size[z[:, 2] < 0]).pvalue > 1e-3


def test_crescents_and_rings_are_mirrored():
    z = Crescents().posterior_sample(torch.tensor([-0.3, 0.0]), 4000, seed=0)
    assert stats.binomtest(int((z.sum(-1) > 0).sum()), 4000).pvalue > 1e-3
    z = Ring().posterior_sample(torch.tensor([0.0, 1.0, 0.2]), 4000, seed=0)
    assert stats.binomtest(int((z[:, 2] > 0).sum()), 4000).pvalue > 1e-3


def test_mixture_holds_both_widths():
    z = WidthMixture().posterior_sample(torch.zeros(2), 10_000, seed=0)
    inside = (z.norm(dim=-1) < 0.4).double().mean()
    expected = 0.5 * (1 - math.exp(-0.08)) + 0.5 * (1 - math.exp(-8))
    assert inside == pytest.approx(expected, abs=0.02)


def test_linear_posteriors_are_the_known_ones():
    x = torch.linspace(-1, 1, 10)
    z = NoisyIdentity().posterior_sample(x, 20_000, seed=0)
    torch.testing.assert_close(z.mean(0), x / 2, atol=0.01, rtol=0)
    torch.testing.assert_close(z.std(0), torch.full((10,), 0.05**0.5), atol=0.006, rtol=0)
    z = NoisyIdentity(prior="uniform").posterior_sample(x, 4000, seed=0)
    sd = 0.1**0.5
    for column, centre in zip(z.T, x.tolist(), strict=True):
        exact = stats.truncnorm((-1 - centre) / sd, (1 - centre) / sd, centre, sd)
        assert stats.kstest(column, exact.cdf).pvalue > 1e-3


@cases
def test_interface_and_reproducibility(simulator):
    x, z = simulator.sample(50, seed=3)
    assert x.shape == (50, simulator.features)
    assert z.shape == (50, simulator.dim)
    assert x.dtype == z.dtype == torch.float32
    if simulator.bounds is not None:
        lower, upper = simulator.bounds
        assert ((z > lower) & (z < upper)).all()
        outside = (upper + 1).expand(2, -1)
        assert torch.isneginf(simulator.log_joint(outside, x[0])).all()
    again = simulator.sample(50, generator=torch.Generator().manual_seed(3))
    assert torch.equal(x, again[0])
    assert torch.equal(z, again[1])
    state = torch.get_rng_state()
    draws = simulator.posterior_sample(x[0], 20, seed=1)
    assert torch.equal(draws, simulator.posterior_sample(x[:1], 20, seed=1))
    assert draws.shape == (20, simulator.dim)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(draws, simulator.posterior_sample(x[0], 20, seed=2))
    expected = simulator.log_joint(z[:2], x[:2]) - simulator.log_evidence(x[:2])
    torch.testing.assert_close(simulator.log_posterior(z[:2], x[:2]), expected)
    assert torch.isfinite(expected).all()


@cases
def test_wrong_input_is_refused(simulator):
    x, z = simulator.sample(4, seed=0)
    with pytest.raises(ValueError, match="Expected n as a whole number"):
        simulator.sample(0)
    with pytest.raises(ValueError, match="got both"):
        simulator.sample(2, generator=torch.Generator(), seed=1)
    with pytest.raises(ValueError, match=r"Expected x of shape .* Draw for one event"):
        simulator.posterior_sample(x, 10)
    with pytest.raises(ValueError, match="Expected finite x"):
        simulator.posterior_sample(x[0] * math.nan, 10)
    with pytest.raises(ValueError, match="Expected z of shape"):
        simulator.log_joint(z[:, :1], x)
    with pytest.raises(ValueError, match="Give one row per label"):
        simulator.log_posterior(z, x[:2])


def test_impossible_data_and_unknown_priors_are_refused():
    with pytest.raises(ValueError, match="that the simulator can produce"):
        Crescents().posterior_sample(torch.tensor([5.0, 0.0]), 2)
    with pytest.raises(ValueError, match="Expected prior 'normal' or 'uniform'; got 'cauchy'"):
        NoisyIdentity(3, "cauchy")
    with pytest.raises(ValueError, match="Expected dim"):
        NoisyIdentity(0)
