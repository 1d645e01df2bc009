"""Nothing is called a p-value until it is seen uniform under its null: 2000 trials of each."""

import numpy as np
import pytest
from scipy import stats

from benchmarks.classifier import EXACT, NULLS

pytest.importorskip("sklearn")
pytestmark = pytest.mark.slow
TRIALS = 2000


def pvalues(name, trials=TRIALS):
    return np.array([NULLS[name](seed, 100) for seed in range(trials)])


@pytest.mark.parametrize("name", EXACT)
def test_p_is_uniform_under_the_null(name):
    p = pvalues(name)
    assert 0.035 <= (p <= 0.05).mean() <= 0.065
    # p has 200 values: their steps are 1/200
    assert stats.kstest(p, "uniform").statistic < 1.63 / np.sqrt(TRIALS) + 1 / 200
    assert p.min() >= 1 / 200


def test_weights_that_depend_on_the_sample():
    """Only nearly exact at 156 effective events."""
    assert 0.03 <= (pvalues("weights of one sample", 1000) <= 0.05).mean() <= 0.08


def test_studentised_where_weights_depend_on_the_sample():
    """The AUC itself is not exchangeable there: it rejects too often, at any sample size."""
    plain, studentised = (
        (pvalues(name, 400) <= 0.05).mean()
        for name in ("the same, AUC not studentised", "heavy weights of one sample")
    )
    assert plain > 0.11
    assert studentised < 0.11


def test_pooled_folds_with_an_analytic_error_reject_too_often():
    assert (pvalues("pooled folds, analytic error", 1000) <= 0.05).mean() > 0.09
