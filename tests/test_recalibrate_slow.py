"""What recalibration, conformal levels and local coverage promise, measured over many fits."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import flowpost as fp
from flowpost.calibration import Conformal, Recalibrator, conformal_levels
from flowpost.diagnostics import hpd_levels, local_coverage

pytestmark = pytest.mark.slow
SIGMA = math.sqrt(0.2)


def model_of(width=1.0, bias=0.0):
    """The exact model of z ~ N(0, I₂), x = z + N(0, ¼ I), made narrow or biased in units of σ."""
    head = fp.PosteriorHead(2, fp.Real(2), flow="diagonal")
    with torch.no_grad():
        head.flow.weight[:2] = 0.8 * torch.eye(2)
        head.flow.bias[:2] = bias * SIGMA
        head.flow.bias[2:4] = math.log(width * SIGMA)
    return fp.PosteriorModel(None, head).eval()


def measured(n, seed):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 2, generator=generator)
    return z + 0.5 * torch.randn(n, 2, generator=generator), z


@pytest.mark.parametrize(
    ("width", "bias", "coordinates"), [(0.7, 0.0, False), (1.0, 0.5, False), (1.0, 0.5, True)]
)
def test_coverage_is_right_at_every_level_and_nothing_is_lost(width, bias, coordinates):
    """0.024 is the two-sample 1 % point of 5000 and 50 000 events, here of each of 40 fits."""
    gaps, losses = [], []
    model, x, z = model_of(width, bias), *measured(50_000, 1000)
    before = model(x).log_prob(z).detach().mean()
    for seed in range(40):
        recalibrated = Recalibrator(model, coordinates=coordinates).fit(*measured(5000, seed))
        u, log_q = recalibrated(x).detach().to_base_and_log_prob(z)
        gaps.append(fp.coverage(u).ks_statistic)
        losses.append(float(before - log_q.mean()))
    print(
        f"width × {width}, bias {bias}, coordinates={coordinates}: off by {np.mean(gaps):.4f}, at "
        f"most {max(gaps):.4f}; NLL {np.mean(losses):+.4f}, at most {max(losses):+.4f}"
    )
    assert sorted(gaps)[-2] <= 0.024
    assert gaps[0] <= 0.024
    assert max(losses) < 0


@pytest.mark.parametrize("kind", ["base", "hpd"])
@pytest.mark.parametrize("width", [0.7, 0.3])
def test_conformal_regions_on_average_over_splits(kind, width):
    """90 % regions of a head that is too narrow, by 5000 events, over 200 splits of 55 000."""
    x, z = measured(55_000, 7)
    q = model_of(width)(x)
    if kind == "base":
        levels = q.to_base(z).detach().double().square().sum(-1)
    else:
        levels, _ = hpd_levels(q, z, 128, torch.Generator().manual_seed(0))
    shares = []
    for seed in range(200):
        order = torch.randperm(55_000, generator=torch.Generator().manual_seed(seed))
        used = conformal_levels(levels[order[:5000]], 0.1)
        shares.append(float((levels[order[5000:]] <= used).double().mean()))
    held = f"{100 * np.mean(shares):.3f} % on average, {np.std(shares):.4f} for one split"
    print(f"{kind}, width × {width}: {held}")
    assert 0.899 <= np.mean(shares) <= 0.902
    x, z = measured(5000, 8)
    inside = Conformal(model_of(width), kind, draws=128).fit(x, z).contains(*measured(5000, 9))
    assert abs(float(inside.double().mean()) - 0.9) < 0.025


@pytest.mark.parametrize("exact", [False, True])
def test_local_coverage_of_a_head_that_is_narrow_in_one_corner(exact):
    """Widths × 0.7 where x0 > 1, and as they should be everywhere; five sets of 5000 events."""
    alarms = 0
    for seed in range(5):
        x, z = measured(5000, 100 + seed)
        u = model_of()(x).to_base(z).detach()
        u = u if exact else torch.where(x[:, :1] > 1, u / 0.7, u)
        result = local_coverage(u, x, names=["x0", "x1"], trials=100 if exact else 199, seed=seed)
        # where nothing is wrong no region may be proposed but all events
        worst = next((r for r in result.regions if r.bounds), result.regions[0])
        print(f"exact={exact}, seed {seed}: p = {result.p_value:.3g}; {worst}")
        if exact:
            alarms += bool(result.failing) + (result.p_value < 0.01)
        else:
            assert result.p_value < 0.01
            assert worst.p_value < 0.01
            assert 0.8 < worst.bounds["x0"][0] < 1.4
            assert "under-covers" in result.verdict()
    assert not alarms


def quadratic(seed):
    """A classifier that is fitted in a millisecond."""
    from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

    return QuadraticDiscriminantAnalysis(reg_param=1e-3)


@pytest.mark.parametrize("stop", [None, 3])
def test_p_values_are_uniform_under_the_null(stop):
    """Also for a context that u has nothing to do with but that is skewed and discrete."""
    found, regions = [], []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        u = torch.randn(200, 1, generator=generator)
        x = torch.randint(3, (200, 1), generator=generator) + torch.rand(200, 1)
        result = local_coverage(
            u, x, classifier=quadratic, trials=19, stop=stop, folds=2, seed=seed, smallest=0.2
        )
        found.append(result.p_value)
        regions.append(min(r.p_value for r in result.regions))
    # levels that p can take, with and without an early end
    for level in (0.1, 0.25, 0.5):
        share = np.mean(np.array(found) <= level + 1e-9)
        assert stats.binomtest(round(200 * share), 200, level).pvalue > 1e-3
        # the smallest of all regions, of which the p-value holds for all together
        least = np.mean(np.array(regions) <= level)
        assert stats.binomtest(round(200 * least), 200, level).pvalue > 1e-3
