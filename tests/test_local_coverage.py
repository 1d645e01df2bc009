"""Local coverage: an exact null, regions that fail by name, and no others."""

import itertools
import math
import re
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import stats

from flowpost.diagnostics import coverage, local_coverage
from flowpost.diagnostics.local import _test
from flowpost.diagnostics.local_result import told_apart
from flowpost.plots.local import plot_local_coverage

pytest.importorskip("sklearn")
from sklearn.discriminant_analysis import QuadraticDiscriminantAnalysis

NAMES = ["x0", "x1"]


def quadratic(seed):
    """A classifier that is fitted in a millisecond."""
    return QuadraticDiscriminantAnalysis(reg_param=1e-3)


def contexts(n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=generator), torch.randn(n, 2, generator=generator)


def failing(n, seed, how):
    """Base coordinates of a head that is exact but where x0 > 1."""
    x, u = contexts(n, seed)
    there = x[:, :1] > 1
    changed = {
        "exact": u,
        "narrow": 2 * u,
        "wide": u / 2,
        "biased": u + torch.tensor([1.0, 0.0]),
    }[how]
    return x, torch.where(there, changed, u)


@pytest.mark.parametrize("how", ["narrow", "wide", "biased"])
def test_region_is_named(how):
    x, u = failing(3000, 0, how)
    result = local_coverage(u, x, names=NAMES, trials=5, folds=2)
    worst = next(r for r in result.regions if r.bounds)
    assert result.p_value == 1 / 6
    assert worst.p_value < 1e-3
    low, high = worst.bounds["x0"]
    assert 0.85 < low < 1.3
    assert math.isinf(high)
    assert worst.name.startswith("x0 > ")
    verdict = {"narrow": "under-covers", "wide": "over-covers", "biased": "off by"}[how]
    assert verdict in result.verdict()
    assert result.verdict().startswith(f"fails at {worst.name}: ")
    assert worst in result.failing
    for region in result.regions:
        if region.bounds.get("x0", (0, math.inf))[1] <= 1:
            assert region.p_value > 0.01
    assert f"{worst.name}: p = " in str(result)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_bias_that_depends_on_one_feature_is_named(seed):
    """Both sides are as far from exact; what they differ in is the sign of u0."""
    generator = torch.Generator().manual_seed(seed)
    context = torch.randn(4000, 3, generator=generator)
    u = torch.randn(4000, 2, generator=generator)
    u[:, 0] += 0.3 * torch.sign(context[:, 0])
    found = local_coverage(u, context, names=["a", "b", "c"], trials=1, seed=seed)
    worst = next(r for r in found.regions if r.bounds)
    assert "a" in worst.bounds
    low, high = worst.bounds["a"]
    assert min(abs(low), abs(high)) < 0.1
    assert "u0 is off by" in found.verdict()


def test_what_coverage_of_all_events_does_not_see():
    """Too narrow here and too wide there, as much as makes up for it."""
    x, u = contexts(6000, 3)
    u = torch.where(x[:, :1] > 0, 1.3 * u, u / 1.42)
    assert coverage(u).max_gap < 0.06
    result = local_coverage(u, x, names=NAMES, trials=5, folds=2)
    assert result.p_value == 1 / 6
    ends = [(r, *r.bounds.get("x0", (-math.inf, math.inf))) for r in result.failing]
    narrow = [r.coverage.verdict() for r, low, _ in ends if low > -0.5]
    wide = [r.coverage.verdict() for r, _, high in ends if high < 0.5]
    assert narrow
    assert wide
    assert all(v.startswith("under-covers") for v in narrow)
    assert all(v.startswith("over-covers") for v in wide)


@pytest.mark.parametrize("offset", [0.0, 1.7e9])
def test_region_of_a_context_far_from_zero(offset):
    """Too narrow after 40 s of a minute, in seconds and in Unix time."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(2000, 1, generator=generator, dtype=torch.float64)
    time = 60 * torch.rand(2000, generator=generator, dtype=torch.float64)
    u[time > 40] *= 3
    result = local_coverage(u, time + offset, names=["t"], classifier=quadratic, trials=9, folds=2)
    worst = next(r for r in result.regions if r.bounds)
    low, high = worst.bounds["t"]
    assert 38 < low - offset < 42
    assert math.isinf(high)
    assert worst.p_value < 0.01
    # to a thousandth of a minute in words, too
    assert worst.name.startswith("t > ")
    assert float(worst.name.removeprefix("t > ")) - low == pytest.approx(0, abs=0.06)
    assert len({r.name for r in result.regions}) == len(result.regions)


def test_ends_in_words_differ():
    assert told_apart([0.5, 2.0]) == ["0.5", "2"]
    assert told_apart([1.70000001e9, 1.70000002e9]) == ["1.70000001e+09", "1.70000002e+09"]
    assert told_apart([1.0, 1.0], 3) == ["1", "1"]


def test_a_single_region_is_not_everywhere():
    _, u = contexts(400, 1)
    result = local_coverage(2 * u, torch.zeros(400), classifier=quadratic, trials=9)
    assert len(result.regions) == len(result.failing) == 1
    assert result.verdict().startswith(
        "fails on average, nowhere more than elsewhere: under-covers"
    )


def test_failure_that_is_alike_everywhere_is_called_so():
    x, u = contexts(2000, 1)
    result = local_coverage(1.5 * u, x, classifier=quadratic, trials=19)
    assert result.verdict().startswith("fails on average, nowhere more than elsewhere")
    assert "under-covers" in result.verdict()
    assert max(r.count for r in result.regions) == 1000


def test_exact_posterior_passes_and_ends_early():
    x, u = contexts(2000, 2)
    result = local_coverage(u, x, trials=200, stop=3, folds=2)
    assert len(result.null) < 200
    assert result.p_value == 3 / len(result.null)
    assert result.verdict() == "no failure found at any context"
    assert all(r.p_value > 0.01 for r in result.regions)
    assert "(" in repr(result)
    assert "LocalRegion(" in repr(result.regions[0])


class Ranks:
    """Stands for pairs whose statistics come in a given order."""

    def __init__(self, values):
        self.values = iter(values)

    def __len__(self):
        return 2

    def swapped(self, _):
        return self

    def gains(self, _):
        return np.array([next(self.values)])


@pytest.mark.parametrize("stop", [None, 1, 2, 3])
def test_p_value_is_exact_also_where_it_ends_early(stop):
    """Over all orders of seven statistics that are exchangeable: P(p ≤ a) = a for each p found."""
    orders = list(itertools.permutations(range(7)))
    found = np.array(
        [_test(Ranks(o), 6, stop, 2, np.random.default_rng(0), False)[2] for o in orders]
    )
    for p in np.unique(found):
        assert (found <= p).mean() == pytest.approx(p)


@pytest.mark.slow
def test_p_values_of_exact_posteriors():
    """Never too small; that they are uniform takes the many events of the slow test."""
    x, u = contexts(20 * 200, 7)
    found = [
        local_coverage(u[i::20], x[i::20], classifier=quadratic, trials=9, folds=2, seed=i)
        for i in range(20)
    ]
    small = sum(r.p_value <= 0.1 for r in found)
    assert stats.binomtest(small, 20, 0.1, alternative="greater").pvalue > 1e-3
    small = sum(min(part.p_value for part in r.regions) <= 0.1 for r in found)
    assert stats.binomtest(small, 20, 0.1, alternative="greater").pvalue > 1e-3


def test_classifiers_and_seeds():
    x, u = failing(1000, 5, "narrow")
    one, same, other = (
        local_coverage(u, x[:, 0], classifier=quadratic, trials=9, seed=s) for s in (0, 0, 1)
    )
    assert one.statistic == same.statistic != other.statistic
    assert torch.equal(one.null, same.null)
    assert one.classifier == "QuadraticDiscriminantAnalysis"
    assert one.names == ("c0",)
    before = np.random.get_state()[1].tolist()  # noqa: NPY002
    network = local_coverage(u, x, classifier="mlp", trials=1, folds=2)
    assert network.classifier == "mlp"
    assert before == np.random.get_state()[1].tolist()  # noqa: NPY002
    line = local_coverage(u[:, 0], x, classifier=quadratic, trials=3)
    assert line.regions[0].coverage.dof == 1


def test_plot():
    x, u = failing(1000, 5, "narrow")
    result = local_coverage(u, x, names=NAMES, classifier=quadratic, trials=5)
    ax = result.plot()
    labels = [t.get_text() for t in ax.get_yticklabels()]
    assert len(labels) == len(result.regions)
    assert labels[0].startswith(result.regions[0].name)
    assert plot_local_coverage(result, ax) is ax
    plt.close("all")


def test_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).resolve().parents[1] / "docs" / "recalibration.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    out = capsys.readouterr().out
    assert "Recalibrator of 4000 held-out events" in out
    assert "consistent with the nominal coverage" in out
    assert "=> fails" in out


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"u": torch.full((300, 2), math.nan)}, "Expected finite base coordinates"),
        (
            {"u": torch.zeros(100, 2), "context": torch.zeros(100, 2)},
            "at least 200 events; got 100",
        ),
        ({"context": torch.zeros(299, 2)}, "Expected context of shape"),
        ({"context": torch.full((300, 2), math.inf)}, "Expected finite context"),
        ({"names": ["a"]}, "Expected 2 different names"),
        ({"names": ["a", "a"]}, "Expected 2 different names"),
        ({"classifier": "forest"}, "Expected classifier as hist-gradient-boosting, mlp or"),
        ({"trials": 0}, "Expected trials"),
        ({"folds": 1}, "Expected folds"),
        ({"smallest": 0.9}, "Expected smallest as a share"),
    ],
)
def test_mistakes(options, match):
    given = {"u": torch.randn(300, 2), "context": torch.randn(300, 2)} | options
    with pytest.raises(ValueError, match=match):
        local_coverage(given.pop("u"), given.pop("context"), **given)


def test_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.ensemble", None)
    with pytest.raises(ImportError, match=r"pip install flowpost\[diagnostics\]"):
        local_coverage(torch.randn(300, 2), torch.randn(300, 2))
