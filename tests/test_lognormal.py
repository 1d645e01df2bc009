"""Log-normal pairs: the truth by quadrature, the generators, and the page on generative checks."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import flowpost as fp
from benchmarks.lognormal import (
    GENERATORS,
    PAIRS,
    THRESHOLDS,
    compare,
    exceedance,
    flow,
    logarithmic,
    pairs,
    total,
)
from flowpost.metrics import memorisation

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ("fresh truth", "resampled pairs", "all permutations", "fitted log-normals", "cut at 12")


def test_shares_of_the_truth():
    assert exceedance(12.0) == pytest.approx(0.02001, abs=5e-6)
    assert exceedance(24.0) == pytest.approx(0.001998, abs=5e-7)


@pytest.mark.parametrize("threshold", THRESHOLDS)
def test_quadrature_against_a_sum_over_quantiles_and_draws(threshold):
    """P(X2 > s − X1) averaged over equally likely slices of X1, and 10⁶ pairs."""
    u = (np.arange(1_000_000) + 0.5) / 1_000_000
    x = stats.lognorm.ppf(u, 1)
    assert stats.lognorm.sf(threshold - x, 1).mean() == pytest.approx(
        exceedance(threshold), rel=1e-4
    )
    drawn = float((total(pairs(1_000_000, 3)) > threshold).double().mean())
    p = exceedance(threshold)
    assert drawn == pytest.approx(p, abs=4 * np.sqrt(p / 1e6))


@pytest.fixture(scope="module")
def compared():
    return compare({name: GENERATORS[name] for name in PLAIN}, sets=8)


def test_generators_are_what_they_are_called(compared):
    _, made, training = compared
    rows = {tuple(r) for r in training[0].tolist()}
    assert all(tuple(r) in rows for r in made["resampled pairs"][0][:1000].tolist())
    every = made["all permutations"][0]
    assert len(every) == PAIRS**2
    assert len({tuple(r) for r in every[:20_000].tolist()}) == 20_000
    assert float(made["cut at 12"][0].max()) < 12
    logs = training[0].log()
    fitted = made["fitted log-normals"][0].log()
    torch.testing.assert_close(fitted.mean(0), logs.mean(0), atol=0.01, rtol=0)
    torch.testing.assert_close(fitted.std(0), logs.std(0), atol=0.01, rtol=0)


def test_the_report_flags_the_cut_generator_alone(compared):
    report, _, _ = compared
    assert report.flagged == ("cut at 12",)
    assert report["cut at 12", 12.0].flag == "too few"
    assert report["cut at 12", 24.0].flag == "none"


def test_counting_errors_hide_what_the_training_set_leaves_open(compared):
    report, _, _ = compared
    fresh, resampled, every, fitted = (report[name, 12.0] for name in PLAIN[:4])
    # a thousand pairs beyond which nothing is known
    expected = np.sqrt(fresh.true_share / PAIRS)
    assert resampled.spread == pytest.approx(expected, rel=0.6)
    assert every.error > 5 * every.counting_error
    assert fitted.error > 2 * fitted.counting_error
    assert fresh.error < 3 * fresh.counting_error


def test_resampled_pairs_are_memorised(compared):
    """Permuted ones are somewhat nearer too: each has its X1 and its X2 from training events."""
    _, made, training = compared
    found = {
        name: memorisation(
            *(logarithmic(v) for v in (made[name][0][:PAIRS], training[0], pairs(PAIRS, 77)))
        )
        for name in PLAIN
    }
    assert found["resampled pairs"].copies == 1
    assert found["resampled pairs"].p_value < 0.01
    free = ("fresh truth", "fitted log-normals", "cut at 12")
    assert all(found[name].p_value > 0.01 for name in free)
    assert found["all permutations"].copies < 0.01


def test_a_flow_generates_on_its_support(monkeypatch):
    monkeypatch.setattr("benchmarks.lognormal.EVENTS", 5000)
    made = flow(fp.Positive(2), epochs=1)(pairs(200, 0), 0)
    assert made.shape == (5000, 2)
    assert bool((made > 0).all())
    again = flow(fp.Positive(2), epochs=1)(pairs(200, 0), 0)
    assert torch.equal(made, again)


def test_code_of_the_page_runs(capsys):
    page = (ROOT / "docs" / "generative_checks.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})
    out = capsys.readouterr().out
    for text in ("Held-out statistics", "Correlations of", "Shares beyond", "Nearest training"):
        assert text in out
    for text in ("combinations of the components", "Estimates of", "AUC of two event types"):
        assert text in out


@pytest.mark.slow
def test_the_flow_on_the_right_support_finds_the_tail():
    """Mean of four training sets; the wrong support, by design, loses it."""
    names = ("flow, right support", "flow, wrong support", "cut at 12", "fitted log-normals")
    report, _, _ = compare({name: GENERATORS[name] for name in names}, sets=4)
    right, wrong = ([report[name, s].ratio for s in THRESHOLDS] for name in names[:2])
    assert abs(right[0] - 1) < 0.25
    assert abs(right[1] - 1) < 0.60
    assert wrong[1] < 0.2
    assert "cut at 12" in report.flagged
    assert "flow, right support" not in report.flagged
    assert "fitted log-normals" not in report.flagged
