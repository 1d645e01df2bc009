"""Recombination: all pairings, what they are worth, and the test of independence before it."""

import numpy as np
import pytest
import torch
from scipy import stats

from flowpost.metrics import independence_test, recombine


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def total(x):
    return x.sum(1)


def test_all_pairings_once_and_the_inner_correlation_kept(rng):
    x = rng.normal(size=(40, 3))
    x[:, 1] += 2 * x[:, 0]
    found = recombine(x, [[0, 1], 2], permutations=9)
    expected = {(a, b, c) for a, b, _ in x.tolist() for c in x[:, 2].tolist()}
    assert {tuple(row) for row in found.events.tolist()} == expected
    assert len(found.events) == 1600
    r = np.corrcoef(found.events.numpy().T)
    assert r[0, 1] == pytest.approx(np.corrcoef(x.T)[0, 1])
    assert r[0, 2] == pytest.approx(0, abs=1e-12)
    assert "kept: every correlation within a component" in str(found)


def test_components_in_any_order_of_columns(rng):
    x = rng.normal(size=(30, 3))
    found = recombine(torch.as_tensor(x), [[2, 0], [1]], count=500, permutations=9, seed=3)
    assert found.events.shape == (500, 3)
    rows = {tuple(r) for r in x[:, [0, 2]].tolist()}
    assert all(tuple(r) in rows for r in found.events[:, [0, 2]].tolist())
    again = recombine(torch.as_tensor(x), [[2, 0], [1]], count=500, permutations=9, seed=3)
    assert torch.equal(found.events, again.events)


def test_columns_may_be_any_whole_numbers(rng):
    x = rng.normal(size=(30, 3))
    plain = recombine(x, [[0, 1], 2], permutations=1)
    for components in (
        [np.arange(2), np.int64(2)],
        [torch.tensor([0, 1]), torch.tensor(2)],
        ([np.int32(0), 1], [2]),
    ):
        found = recombine(x, components, permutations=1)
        assert torch.equal(found.events, plain.events)
        assert found.components == ((0, 1), (2,))


def test_more_than_all_that_can_be_held_are_drawn(rng):
    found = recombine(rng.normal(size=(200, 3)), [0, 1, 2], permutations=9)
    assert len(found.events) == 1_000_000
    assert found.possible == 8e6


@pytest.mark.parametrize("threshold", [2.0, 3.0])
def test_the_gain_is_that_of_repeated_training_sets(threshold):
    """Against the spread of the estimate over 2000 sets of 200 events."""
    found = []
    for seed in range(2000):
        a, b = np.random.default_rng(seed).normal(size=(2, 200))
        b.sort()
        found.append(1 - np.searchsorted(b, threshold - a).mean() / 200)
    p, variance = np.mean(found), np.var(found)
    worth = p * (1 - p) / variance
    exact = stats.norm.sf(threshold / np.sqrt(2))
    assert p == pytest.approx(exact, abs=5 * np.sqrt(variance / 2000))
    errors, worths = [], []
    for seed in range(10):
        x = np.random.default_rng(5000 + seed).normal(size=(200, 2))
        gain = recombine(
            x, [0, 1], thresholds=[threshold], statistic=total, permutations=1, seed=seed
        ).gains[0]
        assert gain.share == pytest.approx((x.sum(1) > threshold).mean())
        errors.append(gain.recombined_error**2)
        worths.append(gain.effective_count)
    assert np.mean(errors) == pytest.approx(variance, rel=0.25)
    assert np.median(worths) == pytest.approx(worth, rel=0.25)
    assert worth > 200


def test_drawn_pairings_are_worth_less_than_all(rng):
    x = rng.normal(size=(200, 2))
    options = {"thresholds": [2.0], "statistic": total, "permutations": 1}
    every = recombine(x, [0, 1], **options).gains[0]
    some = recombine(x, [0, 1], 500, **options).gains[0]
    assert some.recombined_error > every.recombined_error
    assert some.recombined == pytest.approx(every.recombined, abs=0.06)


# --- independence --------------------------------------------------------------------------------


def trial(seed):
    r = np.random.default_rng(seed)
    x = r.normal(size=(40, 4))
    x[:, 1] += x[:, 0]
    found = independence_test(x, [[0, 1], [2], [3]], permutations=99, seed=seed)
    return [*found.p_values, found.p_value]


@pytest.mark.parametrize("trials", [80, pytest.param(2000, marks=pytest.mark.slow)])
def test_p_is_uniform_for_independent_components(trials):
    p = np.array([trial(seed) for seed in range(trials)])
    error = np.sqrt(0.05 * 0.95 / trials)
    assert (np.abs((p[:, :2] <= 0.05).mean(0) - 0.05) < 3.3 * error).all()
    assert (p[:, 2] <= 0.05).mean() < 0.05 + 3.3 * error
    for column in p[:, :2].T:
        assert stats.kstest(column, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.01


def test_dependence_without_correlation_or_between_pairs_alone_is_seen(rng):
    x = rng.normal(size=(300, 3))
    square = np.stack([x[:, 0], x[:, 0] ** 2], 1)
    found = independence_test(square, [0, 1])
    assert found.dependent
    assert abs(np.corrcoef(square.T)[0, 1]) < 0.2
    # each pair of the three is independent, all three are not
    x[:, 2] = np.sign(x[:, 0] * x[:, 1]) * np.abs(x[:, 2])
    assert independence_test(x[:, [0, 2]], [0, 1]).p_value > 0.01
    found = independence_test(x, [0, 1, 2])
    assert found.p_adjusted[0] > 0.01 >= found.p_adjusted[1]
    assert "do not recombine" in str(found)
    assert "do not recombine" in str(recombine(x, [0, 1, 2], 100))


def test_many_events_are_thinned(rng):
    x = rng.normal(size=(500, 2))
    assert independence_test(x, [0, 1], permutations=9, max_events=100).count == 100


X = np.random.default_rng(1).normal(size=(30, 2))
BAD = [
    (lambda: recombine(X, [[0, 1]]), "at least two components"),
    (lambda: recombine(X, [0]), "at least two components"),
    (lambda: recombine(X, None), "components as columns of each, whole numbers; got None"),
    (lambda: recombine(X, [0, 1.0]), "components as columns"),
    (lambda: recombine(X, [0, [1.5]]), "components as columns"),
    (lambda: recombine(X, [0, [0, 1]]), "each of 2 columns once"),
    (lambda: recombine(X[:5], [0, 1]), "at least 20 events"),
    (lambda: recombine(X[:, 0], [0, 1]), r"shape \(N, D\)"),
    (lambda: recombine(X * np.inf, [0, 1]), "finite events"),
    (lambda: recombine(X, [0, 1], 0, permutations=1), "count as a whole number"),
    (lambda: recombine(X, [0, 1], thresholds=[1.0], permutations=1), "a statistic of events"),
    (lambda: independence_test(X, [0, 1], max_events=3), "max_events as a whole number"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
