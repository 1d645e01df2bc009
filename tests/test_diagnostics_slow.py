"""Nothing is called a p-value until it is seen uniform under its null."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

from flowpost import diagnostics as fd

pytestmark = pytest.mark.slow


class Exact:
    """A correlated, skewed posterior in two dimensions and its own draws as truth."""

    def __init__(self, events):
        self.x = torch.randn(events, 2)
        self.batch_shape, self.event_shape = torch.Size([events]), torch.Size([2])
        self.z = self.sample((1,))[0]

    def _base(self, z):
        first = z[..., 0].log() - self.x[:, 0]
        second = z[..., 1] - self.x[:, 1] - 0.8 * first
        return first, second / 0.6

    def log_prob(self, z):
        first, second = self._base(z)
        return -(first**2 + second**2) / 2 - z[..., 0].log() - math.log(2 * math.pi * 0.6)

    def sample(self, shape, *, generator=None):
        u = torch.randn(*shape, len(self.x), 2, generator=generator)
        second = self.x[:, 1] + 0.8 * u[..., 0] + 0.6 * u[..., 1]
        return torch.stack([(self.x[:, 0] + u[..., 0]).exp(), second], -1)

    def sample_and_log_prob(self, shape, *, generator=None):
        z = self.sample(shape, generator=generator)
        return z, self.log_prob(z)


def from_coverage(events, dof=2, weighted=False):
    weight = torch.distributions.Exponential(1.0).sample((events,)) if weighted else None
    result = fd.coverage(torch.randn(events, dof), weight=weight)
    named = {"ks": result.ks_pvalue, "ad": result.ad_pvalue}
    return named | {f"pull {j}": float(p) for j, p in enumerate(result.pull_ks_pvalue)}


def from_levels(name, function):
    def one():
        result = function(Exact(300))
        return {f"{name} ks": result.ks_pvalue, f"{name} ad": result.ad_pvalue}

    return one


def from_sbc():
    q = Exact(1000)
    result = fd.sbc(q, q.z, 49)
    named = {f"ks {j}": float(p) for j, p in enumerate(result.ks_pvalue)}
    return named | {f"chi2 {j}": float(p) for j, p in enumerate(result.chi2_pvalue)}


def unbinned():
    v = torch.rand(25, dtype=torch.float64)
    return {"ks": fd.ks_uniform(v)[1], "ad": fd.anderson_darling_uniform(v)[1]}


NULLS = {
    "10 events": lambda: from_coverage(10),
    "500 events": lambda: from_coverage(500),
    "20 000 events, d = 10": lambda: from_coverage(20_000, 10),
    "weighted": lambda: from_coverage(2000, weighted=True),
    "unbinned": unbinned,
    "hpd": from_levels("hpd", lambda q: fd.hpd_coverage(q, q.z, 20)),
    "tarp": from_levels("tarp", lambda q: fd.tarp(q, q.z, 20)),
    "tarp uniform": from_levels("tarp", lambda q: fd.tarp(q, q.z, 20, references="uniform")),
    "sbc": from_sbc,
}
REPETITIONS = {"tarp": 4000, "20 000 events, d = 10": 400, "unbinned": 10_000}


@pytest.mark.parametrize("name", NULLS)
def test_pvalues_are_uniform_under_their_null(name):
    torch.manual_seed(11)
    rows = [NULLS[name]() for _ in range(REPETITIONS.get(name, 2000))]
    count = len(rows)
    for key in rows[0]:
        p = np.array([row[key] for row in rows])
        assert stats.kstest(p, "uniform").pvalue > 1e-3, key
        # the tail that alarms are raised in
        for cut in (0.01, 0.05):
            error = math.sqrt(cut * (1 - cut) / count)
            assert abs((p < cut).mean() - cut) < 3.5 * error, (key, cut)
        print(
            f"{name}: {key}: {stats.kstest(p, 'uniform').pvalue:.3f}, "
            f"{(p < 0.01).mean():.4f} below 0.01, {(p < 0.05).mean():.4f} below 0.05"
        )


def test_band_holds_the_stated_fraction():
    torch.manual_seed(12)
    inside = []
    for _ in range(1000):
        result = fd.coverage(torch.randn(2000, 3))
        low, high = result.band[:, 0], result.band[:, 1]
        inside.append(((result.empirical >= low) & (result.empirical <= high)).double())
    mean = torch.stack(inside).mean(dim=(0, 2)).tolist()
    # interpolated between discrete counts: slightly more than 68.3, 95.4 and 99.7 %
    assert mean[0] == pytest.approx(0.69, abs=0.015)
    assert mean[1] == pytest.approx(0.956, abs=0.006)
    assert mean[2] == pytest.approx(0.9975, abs=0.0012)


def test_million_events_resolve_half_a_per_cent():
    torch.manual_seed(13)
    u = torch.randn(1_000_000, 3)
    assert fd.coverage(u).ks_pvalue > 1e-3
    assert fd.coverage(1.005 * u).ks_pvalue < 1e-8
    assert fd.coverage(u + 0.01).verdict().count("off by +0.0") == 3
