"""Held-out statistics and their correlations: references, nulls, power, refusals."""

from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch
from scipy import stats

from flowpost.metrics import compare_correlations, held_out_statistics, leave_one_out
from flowpost.metrics.correlations import _correlations
from flowpost.metrics.multiple import holm, largest_statistic

STATISTICS = {
    "first": lambda e: e[:, 0],
    "square": lambda e: e[:, 1] ** 2,
    "sum": lambda e: e.sum(1),
}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- several p-values ----------------------------------------------------------------------------


def test_holm_by_hand():
    assert holm(np.array([0.01, 0.04, 0.03])) == pytest.approx([0.03, 0.06, 0.06])
    assert holm(np.array([0.9, 0.8])) == pytest.approx([1.0, 1.0])


def test_largest_statistic_by_hand():
    values = np.array([[3.0, 10.0], [1.0, 40.0], [2.0, 30.0], [4.0, 20.0]])
    own, adjusted = largest_statistic(values)
    assert own == pytest.approx([0.5, 1.0])
    # the largest of each row, in deviations: 0.45, 1.34, 0.45, 1.34
    assert adjusted == pytest.approx([1.0, 1.0])
    own, adjusted = largest_statistic(values[[3, 0, 1, 2]])
    assert own == pytest.approx([0.25, 0.75])
    assert adjusted == pytest.approx([0.5, 1.0])


def test_largest_of_equal_statistics_costs_nothing(rng):
    values = np.tile(rng.normal(size=(200, 1)), 5) * [1, 2, 3, 4, 5]
    own, adjusted = largest_statistic(values)
    assert (own == adjusted).all()


def test_largest_statistic_is_exact_for_correlated_ones_of_any_scale(rng):
    common = rng.normal(size=(2000, 100, 1))
    values = np.exp(common + 0.3 * rng.normal(size=(2000, 100, 6))) * 10.0 ** np.arange(6)
    p = np.array([largest_statistic(v)[1].min() for v in values])
    assert abs((p <= 0.05).mean() - 0.05) < 3.3 * np.sqrt(0.05 * 0.95 / 2000)


def test_the_correction_leaves_the_least_p_within_reach(rng):
    values = rng.normal(size=(100, 10))
    values[0, 3] = 50.0
    own, adjusted = largest_statistic(values)
    assert own[3] == adjusted[3] == 0.01


def test_ties_by_rounding_samples_without_weight_and_constants():
    own, adjusted = largest_statistic(np.array([[0.1 + 0.2], [0.3], [0.3], [np.nan]]))
    assert own == pytest.approx([1.0])
    assert adjusted == pytest.approx([1.0])
    values = np.array([[3.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    assert largest_statistic(values)[1] == pytest.approx([1 / 3, 1.0])


# --- statistics ----------------------------------------------------------------------------------


def test_w1_is_that_of_scipy_with_weights(rng):
    x, y = rng.normal(size=(80, 2)), rng.normal(0.3, 1, size=(120, 2))
    a, b = rng.exponential(size=80), rng.exponential(size=120)
    found = held_out_statistics(x, y, STATISTICS, a, b, permutations=9)
    for name, function in STATISTICS.items():
        s, t = function(torch.as_tensor(x)), function(torch.as_tensor(y))
        assert found[name].w1 == pytest.approx(stats.wasserstein_distance(s, t, a, b), rel=1e-12)
        mean = np.average(s, weights=a)
        spread = np.sqrt(np.average((s - mean) ** 2, weights=a))
        assert found[name].w1_scaled == pytest.approx(found[name].w1 / float(spread))
    assert found.effective_count[0] == pytest.approx(a.sum() ** 2 / (a**2).sum())


def test_small_permutations_are_all_of_them():
    """Against the exact distribution over all 184 756 labellings of 20 events."""
    from itertools import combinations

    rng = np.random.default_rng(3)
    x = rng.normal(size=10)
    y = rng.normal(0.9, 1, 10)
    pooled = np.sort(np.concatenate([x, y]))
    gaps = np.diff(pooled)
    labels = np.full((184_756, 20), -0.1)
    rows = np.array(list(combinations(range(20), 10)))
    np.put_along_axis(labels, rows, 0.1, axis=1)
    every = np.abs(labels.cumsum(1)[:, :-1]) @ gaps
    exact = (every >= stats.wasserstein_distance(x, y) - 1e-9).mean()
    found = held_out_statistics(x[:, None], y[:, None], permutations=20_000)
    assert found.p_value == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def trial(kind, seed, n=80, permutations=99):
    """P-values of a null: of all statistics, and of each."""
    r = np.random.default_rng(seed)
    x, y, weights, options = r.normal(size=(n, 2)), r.normal(size=(n, 2)), (None, None), {}
    if kind == "weights of one kind":
        weights = [np.exp(0.5 * v[:, 0]) * r.exponential(size=n) for v in (x, y)]
    elif kind == "weights of one sample":
        y = r.normal(size=(3 * n, 2))
        y[:, 0] += 0.5
        weights = (None, np.exp(0.125 - 0.5 * y[:, 0]))
    elif kind == "the same, permuted":
        x, y = r.normal(size=(3 * n, 2)), r.normal(size=(n, 2))
        y[:, 0] += 1
        weights, options = (None, np.exp(0.5 - y[:, 0])), {"null": "permutation"}
    found = held_out_statistics(
        x, y, STATISTICS, *weights, permutations=permutations, seed=seed, **options
    )
    return [found.p_value, *(row.p_value for row in found.table)]


@pytest.mark.parametrize("trials", [150, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["no weights", "weights of one kind", "weights of one sample"])
def test_p_is_uniform_under_the_null(kind, trials):
    p = np.array([trial(kind, seed) for seed in range(trials)])
    error = np.sqrt(0.05 * 0.95 / trials)
    assert (np.abs((p <= 0.05).mean(0) - 0.05) < 3.3 * error).all()
    for column in p[:, 1:].T:
        # p has 100 values
        assert stats.kstest(column, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.01
    assert p.min() >= 0.01


def test_exchanged_labels_are_wrong_where_one_sample_has_the_weights():
    p = np.array([trial("the same, permuted", seed)[0] for seed in range(150)])
    assert (p <= 0.05).mean() > 0.08


def test_weights_that_are_equal_are_none(rng):
    x, y = rng.normal(size=(40, 2)), rng.normal(size=(60, 2))
    plain = held_out_statistics(x, y, permutations=49)
    for a, b in ((np.ones(40), None), (None, np.full(60, 2.0)), (np.ones(40), np.ones(60))):
        found = held_out_statistics(x, y, None, a, b, permutations=49)
        assert found.null == "permutation"
        assert [r.p_value for r in found.table] == [r.p_value for r in plain.table]
    some = rng.exponential(size=60)
    assert held_out_statistics(x, y, None, np.ones(40), some, permutations=9).null == "multiplier"


@pytest.mark.parametrize("weights", [False, True])
def test_power(rng, weights):
    x, y = rng.normal(size=(300, 2)), rng.normal(size=(300, 2))
    y[:, 1] *= 1.5
    w = (None, rng.exponential(size=300) + 0.2) if weights else ()
    found = held_out_statistics(x, y, STATISTICS, *w, permutations=499)
    assert found.null == ("multiplier" if weights else "permutation")
    assert found["square"].p_adjusted < 0.01
    assert found["first"].p_value > 0.01
    assert "square" in found.verdict()
    assert "square" in str(found)
    assert "first" not in found.verdict()


def test_seed_dtype_and_no_global_state():
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(2, 60, 3, generator=g)
    before = torch.get_rng_state()
    one, two = (held_out_statistics(x, y, seed=s) for s in (4, 4))
    assert one == two
    assert torch.equal(before, torch.get_rng_state())
    double = held_out_statistics(x.double(), y.double(), seed=4)
    assert double["column 0"].w1 == pytest.approx(one["column 0"].w1, rel=1e-6)
    with pytest.raises(FrozenInstanceError):
        one.null = "other"
    with pytest.raises(KeyError, match="column 0, column 1"):
        one["radius"]
    assert "no statistic differs at 1 %" in str(held_out_statistics(x, x.flip(0)))
    constant = held_out_statistics(x, y, {"one": lambda e: torch.ones(len(e))})
    assert np.isnan(constant["one"].w1_scaled)
    assert constant.p_value == 1


# --- one is left out -----------------------------------------------------------------------------


def test_each_statistic_is_judged_by_a_training_without_it(rng):
    """A "generator" that is right exactly in the statistics that it was given."""
    seen = []

    def train(statistics):
        seen.append(set(statistics))
        made = rng.normal(size=(400, 2))
        if "first" not in statistics:
            made[:, 0] += 0.5
        return made

    true = rng.normal(size=(400, 2))
    chosen = {k: STATISTICS[k] for k in ("first", "square")}
    found = leave_one_out(train, chosen, true, permutations=499)
    assert seen == [{"square"}, {"first"}]
    assert found.left_out
    assert found["first"].p_adjusted < 0.01 < found["square"].p_adjusted
    assert "left it out" in str(found)


def test_left_out_with_weights_rejects_rarely_enough():
    def p(seed):
        r = np.random.default_rng(seed)

        def train(statistics):
            made = r.normal(size=(200, 2))
            made[:, 0] += 0.5
            return made, np.exp(0.125 - 0.5 * made[:, 0])

        found = leave_one_out(
            train, STATISTICS, r.normal(size=(100, 2)), permutations=99, seed=seed
        )
        assert found.null == "multiplier"
        return found.p_value

    p = np.array([p(seed) for seed in range(100)])
    # Holm's correction may only be too careful; of 99 draws and three statistics p ≥ 0.03
    assert (p <= 0.05).mean() < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / 100)
    assert (p <= 0.05).mean() > 0.005


# --- correlations --------------------------------------------------------------------------------

MIXING = np.linalg.cholesky(np.array([[1, 0.6, 0], [0.6, 1, 0.2], [0, 0.2, 1]]))


def correlation_trial(kind, seed, n=120, permutations=99):
    r = np.random.default_rng(seed)
    x, y = r.normal(size=(n, 3)) @ MIXING.T, r.normal(size=(2 * n, 3)) @ MIXING.T
    options = {"ranks": kind == "ranks"}
    if kind == "ranks":
        x, y = np.exp(2 * x), np.exp(2 * y)
    elif kind == "other widths":
        y *= [1, 3, 0.2]
    elif kind == "weights of one sample":
        shift = np.array([0.5, 0, 0])
        y += shift
        way = np.linalg.solve(MIXING @ MIXING.T, shift)
        options["weight_generated"] = np.exp(-(y - shift / 2) @ way)
    found = compare_correlations(
        x, y, permutations=permutations, bootstraps=2, seed=seed, **options
    )
    return [found.p_value, *found.p_values[np.triu_indices(3, 1)]]


@pytest.mark.parametrize("trials", [60, pytest.param(1000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["equal", "ranks", "other widths", "weights of one sample"])
def test_p_of_correlations_is_uniform_under_the_null(kind, trials):
    p = np.array([correlation_trial(kind, seed) for seed in range(trials)])
    assert ((p <= 0.05).mean(0) < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / trials)).all()
    for column in p.T:
        assert stats.kstest(column, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.01


def test_correlations_are_those_of_numpy_with_the_error_of_a_bootstrap(rng):
    x = rng.normal(size=(400, 3)) @ MIXING.T
    w = rng.integers(1, 4, 400)
    r, variance = _correlations(x, w.astype(float))
    np.testing.assert_allclose(r, np.corrcoef(np.repeat(x, w, 0).T), atol=1e-12)
    rows = rng.integers(400, size=(1000, 400))
    drawn = np.array([_correlations(x[i], w[i].astype(float))[0] for i in rows])
    upper = np.triu_indices(3, 1)
    np.testing.assert_allclose(np.sqrt(variance[upper]), drawn.std(0)[upper], rtol=0.15)


def test_ranks_are_spearmans(rng):
    x = np.exp(2 * rng.normal(size=(300, 2)) @ MIXING[:2, :2].T)
    found = compare_correlations(x, x, ranks=True, permutations=9)
    assert found.true[0, 1] == pytest.approx(stats.spearmanr(x[:, 0], x[:, 1])[0], abs=1e-12)
    assert found.difference[0, 1] == pytest.approx(0, abs=1e-12)
    assert found.p_value == 1


def test_power_of_correlations(rng):
    x, y = rng.normal(size=(300, 3)) @ MIXING.T, rng.normal(size=(300, 3))
    found = compare_correlations(x, y, permutations=499)
    assert found.p_adjusted[0, 1] < 0.01
    assert found.p_values[0, 2] > 0.01
    assert abs(found.difference[0, 1]) > 5 * found.error[0, 1]
    assert "(column 0, column 1)" in found.verdict()
    assert "(column 0, column 1)" in str(found)


# --- refusals ------------------------------------------------------------------------------------

X = np.random.default_rng(5).normal(size=(30, 2))
RAMP = np.arange(1.0, 31.0)
BAD = [
    (lambda: held_out_statistics(X[:5], X), "at least 10 true events"),
    (lambda: held_out_statistics(X, X[:, :1]), "columns, as the true ones"),
    (lambda: held_out_statistics(X, np.full((30, 2), np.nan)), "finite generated events"),
    (lambda: held_out_statistics(X, X, {}), "statistics as functions"),
    (lambda: held_out_statistics(X, X, {"all": lambda e: e}), r"statistic 'all' of shape \(30,\)"),
    (lambda: held_out_statistics(X, X, {"log": lambda e: e[:, 0].log()}), "finite statistic 'log'"),
    (lambda: held_out_statistics(X, X, null="bootstrap"), "null as one of auto"),
    (lambda: held_out_statistics(X, X, None, np.ones(29)), "weight_true of shape"),
    (lambda: held_out_statistics(X, X, None, -np.ones(30)), "at least 0"),
    (lambda: held_out_statistics(X, X, permutations=0), "permutations as a whole number"),
    (
        lambda: held_out_statistics(X, X, None, RAMP, 10 * RAMP),
        "weights of one kind",
    ),
    (lambda: leave_one_out(lambda s: X, {"one": STATISTICS["sum"]}, X), "at least two statistics"),
    (lambda: compare_correlations(X[:, :1], X[:, :1]), "at least two statistics"),
    (lambda: compare_correlations(X, X * [1, 0]), "that vary; got 'column 1'"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
