"""The final estimator and the cross table: values against references, nulls, power, refusals."""

import numpy as np
import pytest
import torch
from scipy import stats

from flowpost.metrics import cross_table, downstream


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def same(x):
    return x


# --- the estimator -------------------------------------------------------------------------------


def pair(r, n, noise=None):
    z = r.normal(size=n)
    return z + (r.normal(size=n) if noise is None else noise), z


def test_bias_and_resolution_of_normal_residuals(rng):
    true = pair(rng, 20_000)
    made = pair(rng, 10_000, 0.2 + 1.5 * rng.normal(size=10_000))
    found = downstream(same, true, made)
    bias, width = found["estimate", "bias"], found["estimate", "resolution"]
    assert bias.true == pytest.approx((true[0] - true[1]).mean(), abs=1e-12)
    assert bias.true_error == pytest.approx(1 / np.sqrt(20_000), rel=0.15)
    assert bias.generated_error == pytest.approx(1.5 / np.sqrt(10_000), rel=0.15)
    assert bias.difference == pytest.approx(0.2, abs=0.06)
    assert width.true == pytest.approx(1, abs=0.03)
    assert width.generated == pytest.approx(1.5, abs=0.06)
    # of a quantile: p(1 − p)/(n φ²), of the difference of two of them
    q = stats.norm.sf(1)
    phi = stats.norm.pdf(1)
    exact = np.sqrt((2 * q * (1 - q) - 2 * q * q) / 20_000) / phi / 2
    assert width.true_error == pytest.approx(exact, rel=0.2)
    assert found.p_value < 1e-6
    assert "differs in bias of estimate, resolution of estimate" in str(found)
    assert width.error == pytest.approx(np.hypot(width.true_error, width.generated_error))


def test_resolution_is_that_of_numpy_and_weights_are_multiples(rng):
    r = rng.standard_t(3, size=2001)
    found = downstream(same, (r, np.zeros(2001)), (r, np.zeros(2001)))
    low, high = np.quantile(r, stats.norm.cdf([-1, 1]), method="hazen")
    assert found["estimate", "resolution"].true == pytest.approx((high - low) / 2, rel=0.01)
    assert found.p_value == 1
    times = rng.integers(1, 4, 2001)
    many = np.repeat(r, times)
    weighted = downstream(same, (r, 0 * r), (many, 0 * many), times)
    for row in weighted.table:
        assert row.true == pytest.approx(row.generated, rel=1e-2, abs=1e-12)


def test_columns_names_and_residuals_of_ones_own(rng):
    z = torch.as_tensor(rng.uniform(-np.pi, np.pi, (400, 2)))
    x = z + 0.1 * torch.randn(400, 2, generator=torch.Generator().manual_seed(0))
    turned = (x + np.pi) % (2 * np.pi) - np.pi

    def difference(estimate, label):
        return torch.remainder(estimate - label + np.pi, 2 * np.pi) - np.pi

    found = downstream(
        same, (turned, z), (turned, z), residual=difference, names=("zenith", "azimuth")
    )
    assert found["azimuth", "resolution"].true == pytest.approx(0.1, rel=0.2)
    assert found.residual_true.shape == (400, 2)
    with pytest.raises(KeyError, match="zenith, azimuth"):
        found["column 0", "bias"]
    assert downstream(same, (turned, z), (turned, z)).names == ("column 0", "column 1")


def trial(kind, seed, n=300):
    r = np.random.default_rng(seed)
    weight = None
    if kind == "heavy tails":
        noise = r.standard_t(4, size=(2, n))
    elif kind == "skewed":
        noise = r.gamma(2.0, size=(2, n))
    else:
        noise = r.normal(size=(2, n))
        noise[1] += 0.5
        weight = np.exp(0.125 - 0.5 * noise[1])
    found = downstream(
        same, pair(r, n, noise[0]), pair(r, n, noise[1]), None, weight, bootstraps=150, seed=seed
    )
    return [found.p_value, *(row.p_value for row in found.table)]


@pytest.mark.parametrize("trials", [100, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["heavy tails", "skewed", "weights of one sample"])
def test_p_is_uniform_under_the_null(kind, trials):
    """Bootstraps of quantiles of few events spread a little too much: p is too large there."""
    p = np.array([trial(kind, seed) for seed in range(trials)])
    error = np.sqrt(0.05 * 0.95 / trials)
    assert ((p <= 0.05).mean(0) < 0.05 + 3.3 * error).all()
    for column in p[:, 1:].T:
        assert stats.kstest(column, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.02


X = np.random.default_rng(1).normal(size=60)
BAD = [
    (lambda: downstream(same, X, (X, X)), r"true events as a pair \(x, z\)"),
    (lambda: downstream(same, (X, X[:50]), (X, X)), r"estimates of true events of shape \(50, 1\)"),
    (lambda: downstream(same, (X[:9], X[:9]), (X, X)), "at least 50 true events"),
    (lambda: downstream(lambda x: x * np.nan, (X, X), (X, X)), "finite residuals of true"),
    (lambda: downstream(same, (X, X), (X, X), names=("a", "b")), "Expected 1 names"),
    (lambda: downstream(same, (X, X), (X, X), bootstraps=2), "bootstraps as a whole number"),
    (lambda: downstream(same, (X, X), (X, X), -X * X), "at least 0"),
    (lambda: downstream(same, (X, X), (X, X), residual=lambda a, b: a[:3]), "residuals of 60"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_of_downstream_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


# --- the cross table -----------------------------------------------------------------------------


def types(r, n, shift=0.7, width=1.5):
    """Two types of events: apart in one column, of other widths in another."""
    a, b = r.normal(size=(2, n, 3))
    b[:, 0] += shift
    b[:, 1] *= width
    return a, b


def test_areas_are_those_of_the_types(rng):
    """Logistic regression sees the shift alone: AUC Φ(shift/√2)."""
    pytest.importorskip("sklearn")
    true, made = types(rng, 8000), types(rng, 8000, shift=1.4)
    found = cross_table(true, made, classifier="logistic", permutations=0)
    exact = stats.norm.cdf(np.array([0.7, 1.4]) / np.sqrt(2))
    for row, error in zip(found.auc, found.error, strict=True):
        np.testing.assert_allclose(row, exact, atol=0.025)
        np.testing.assert_allclose(error, 0.0055, rtol=0.6)
    assert abs(found.loss) < 0.01
    assert np.isnan(found.p_value)
    assert "not tested" in str(found)
    assert found.count[0] == (4000, 4000)


def test_a_generator_without_a_property_teaches_less(rng):
    pytest.importorskip("sklearn")
    true, made = types(rng, 800, 0.7, 2.5), types(rng, 800, 0.7, 1.0)
    found = cross_table(true, made, classifier="quadratic", permutations=99)
    assert found.loss < -found.loss_error
    assert found.p_value == 1 / 100
    assert "train a worse classifier" in str(found)
    other = cross_table(true, types(rng, 800, 0.7, 2.5), classifier="quadratic", permutations=19)
    assert other.p_value > 0.05
    again = cross_table(true, made, classifier="quadratic", permutations=0)
    np.testing.assert_array_equal(again.auc, found.auc)


@pytest.mark.parametrize("trials", [20, pytest.param(500, marks=pytest.mark.slow)])
def test_p_of_the_cross_table_is_uniform_under_the_null(trials):
    bayes = pytest.importorskip("sklearn.naive_bayes").GaussianNB()
    p = []
    for seed in range(trials):
        r = np.random.default_rng(seed)
        p.append(
            cross_table(
                types(r, 60),
                types(r, 60),
                classifier=bayes,
                permutations=19,
                retrainings=2,
                seed=seed,
            ).p_value
        )
    # p has 20 values
    assert stats.kstest(p, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.05
    assert (np.array(p) <= 0.05).mean() < 0.05 + 3.3 * np.sqrt(0.05 * 0.95 / trials)


def test_refusals_of_the_cross_table(rng):
    pytest.importorskip("sklearn")
    good = types(rng, 60)
    for call, message in (
        (lambda: cross_table(good[0], good), "as a pair of the two types"),
        (lambda: cross_table((good[0][:9], good[1]), good), "at least 50 true events of type A"),
        (lambda: cross_table(good, (good[0], good[1] * np.nan)), "finite generated events of type"),
        (lambda: cross_table(good, (good[0][:, :1], good[1])), "as many columns"),
        (lambda: cross_table(good, good, classifier=["mlp", "logistic"]), "one classifier"),
        (lambda: cross_table(good, good, test=1.0), "test as a share"),
        (lambda: cross_table(good, good, test="a"), "test as a share"),
        (lambda: cross_table(good, good, retrainings=1), "retrainings as a whole number"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
