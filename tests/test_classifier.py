"""The classifier two-sample test: statistics against references, truths, refusals."""

import pickle
from dataclasses import FrozenInstanceError

import numpy as np
import pytest
import torch

import flowpost as fp
from flowpost.diagnostics import c2st
from flowpost.metrics import auc, classifier_test
from flowpost.metrics.calibrate import calibrate, log_loss
from flowpost.metrics.learners import Network, Scaler
from flowpost.metrics.ranks import RankTest, permutation_pvalues
from flowpost.metrics.ratio import pareto_shape
from flowpost.simulators import LinearGaussian

pytest.importorskip("sklearn")
FAST = {"classifiers": "logistic", "retrainings": 0, "permutations": 99}


@pytest.fixture
def rng():
    return np.random.default_rng(0)


# --- statistics ----------------------------------------------------------------------------------


@pytest.mark.parametrize("decimals", [1, 12])
def test_auc_is_that_of_sklearn(rng, decimals):
    from sklearn.metrics import roc_auc_score

    s, t = rng.normal(0.3, 1, 80).round(decimals), rng.normal(size=120).round(decimals)
    a, b = rng.exponential(size=80), rng.exponential(size=120)
    target = np.repeat([1, 0], [80, 120])
    pooled, weight = np.concatenate([s, t]), np.concatenate([a, b])
    assert auc(s, t) == pytest.approx(roc_auc_score(target, pooled))
    assert auc(s, t, a, b) == pytest.approx(
        roc_auc_score(target, pooled, sample_weight=weight), rel=1e-12
    )
    assert auc(torch.as_tensor(s), t, 7 * a, b) == pytest.approx(auc(s, t, a, b))


def test_the_statistic_has_delongs_variance(rng):
    s, t = rng.normal(0.5, 1, 60), rng.normal(size=40)
    above = s[:, None] > t
    area = above.mean()
    variance = above.mean(1).var() / 60 + above.mean(0).var() / 40
    label = np.arange(100) < 60
    found = RankTest(np.concatenate([s, t]))(label[None].astype(float), 1.0 - label[None])
    assert found[0][0] == pytest.approx(area)
    assert found[1][0] == pytest.approx((area - 0.5) / np.sqrt(variance))


def test_the_error_of_pairs_knows_that_they_share_an_event(rng):
    common = 5 * rng.normal(size=500)
    scores = np.concatenate([common + rng.normal(size=500), common + rng.normal(size=500)])
    label = (np.arange(1000) < 500)[None].astype(float)
    alone, paired = (RankTest(scores, p)(label, 1 - label)[1][0] for p in (False, True))
    assert abs(paired) > 3 * abs(alone)


def test_small_permutations_are_all_of_them(rng):
    """Against the exact distribution over all 70 labellings of eight events."""
    from itertools import combinations

    scores = np.array([2.0, 1.0, 1.0, 0.3, 0.4, -1.0, 0.1, -0.2])
    ranks = RankTest(scores)

    def statistic(rows):
        label = np.isin(np.arange(8), rows)[None].astype(float)
        return ranks(label, 1 - label)[1][0]

    every = np.array([statistic(rows) for rows in combinations(range(8), 4)])
    exact = (every >= statistic((0, 1, 2, 3)) - 1e-9).mean()
    found = permutation_pvalues([ranks], np.ones(8), 4, 20_000, rng)[1][0]
    assert found == pytest.approx(exact, abs=4 * np.sqrt(exact / 20_000))


def test_the_largest_of_several_is_charged_for_the_choice(rng):
    tests = [RankTest(rng.normal(size=200)) for _ in range(10)]
    _, own, largest = permutation_pvalues(tests, np.ones(200), 100, 500, rng)
    assert (largest >= own).all()
    assert largest.min() > 2 * own.min()
    _, own, largest = permutation_pvalues([tests[0]] * 4, np.ones(200), 100, 500, rng)
    assert (largest == own).all()  # four times the same is one


def test_constant_scores_tell_nothing(rng):
    found = permutation_pvalues([RankTest(np.zeros(60))], np.ones(60), 30, 50, rng)
    assert found[0][0] == pytest.approx(0, abs=1e-6)
    assert found[1][0] == 1


def test_p_is_never_zero(rng):
    x, y = rng.normal(10, 1, (60, 2)), rng.normal(size=(60, 2))
    result = classifier_test(x, y, **FAST)
    assert result.auc == pytest.approx(1)
    assert result.p_value == 1 / 100
    assert 0.8 < result.jsd <= 1
    assert "the least that 99 permutations can say" in str(result)


@pytest.mark.parametrize("sigma", [1.5, 3.0])
def test_tail_shape_of_known_weights(rng, sigma):
    u = rng.random(20_000)
    shape = 1 / sigma
    assert pareto_shape((1 - u) ** -shape) == pytest.approx(shape, abs=0.08)


def test_tail_shape_of_bounded_and_equal_weights(rng):
    assert pareto_shape(rng.random(20_000)) < -0.5
    assert np.isnan(pareto_shape(np.ones(1000)))
    assert np.isnan(pareto_shape(rng.random(10)))


# --- calibration ---------------------------------------------------------------------------------


def scored(rng, n, slope=1.0):
    """Scores that are log-odds, times 1/slope, of two unit normals one apart."""
    target = np.repeat([1, 0], n)
    return slope * (rng.normal(size=2 * n) + target - 0.5), target, np.ones(2 * n)


def fresh_divergence(function, rng, slope=1.0):
    s, t, _ = scored(rng, 50_000, slope)
    return 1 - log_loss(function(s), t).mean()


def test_platt_finds_the_log_odds(rng):
    s, t, w = scored(rng, 20_000, 3.0)
    name, function, loss = calibrate(s, t, w, "auto", True, rng)
    assert name == "platt"
    assert function.slope == pytest.approx(1 / 3, abs=0.02)
    assert function(np.zeros(1))[0] == pytest.approx(0, abs=0.04)
    assert loss == pytest.approx(log_loss(s / 3, t).mean(), abs=1e-3)


def test_platt_is_that_of_sklearn_with_weights(rng):
    from sklearn.linear_model import LogisticRegression

    s, t, _ = scored(rng, 500, 2.0)
    w = rng.exponential(size=1000)
    function = calibrate(s, t, w, "platt", True, rng)[1]
    peer = LogisticRegression(C=1e6).fit(s[:, None], t, sample_weight=w)
    at = np.array([-2.0, 0.0, 2.0])
    assert function(at) == pytest.approx(peer.decision_function(at[:, None]), abs=0.05)


def test_platt_takes_separated_and_reversed_scores(rng):
    s, t = np.linspace(-1, 1, 100), np.repeat([0, 1], 50)
    assert np.isfinite(calibrate(s, t, np.ones(100), "platt", True, rng)[1](s)).all()
    reversed_ = calibrate(-s, t, np.ones(100), "platt", True, rng)[1]
    assert (reversed_(s) == 0).all()


def test_isotonic_on_2000_events_biases_the_divergence(rng):
    """Its steps are noise, which fresh events do not share."""
    truth = fresh_divergence(lambda s: s, rng)
    bias = {"platt": [], "isotonic": [], "auto": []}
    for _ in range(5):
        s, t, w = scored(rng, 1000)
        for method, values in bias.items():
            function = calibrate(s, t, w, method, True, rng)[1]
            values.append(fresh_divergence(function, rng) - truth)
    assert np.mean(bias["isotonic"]) < -0.005
    assert abs(np.mean(bias["platt"])) < 0.0025
    assert abs(np.mean(bias["auto"])) < 0.0025


def test_isotonic_is_chosen_where_it_is_needed(rng):
    s, t, w = scored(rng, 4000)
    assert calibrate(np.sign(s) * s**4, t, w, "auto", True, rng)[0] == "isotonic"


def test_scores_that_are_no_probabilities_are_calibrated(rng):
    s, t, w = scored(rng, 1000)
    assert calibrate(s, t, w, "auto", False, rng)[0] == "platt"


# --- classifiers ---------------------------------------------------------------------------------


def test_scaler_is_monotone_and_bounded(rng):
    values = np.stack([rng.normal(5, 2, 1000), np.zeros(1000), rng.standard_cauchy(1000)], 1)
    scaler = Scaler(values)
    scaled = scaler(values)
    assert scaled[:, 0].std() == pytest.approx(1, abs=0.1)
    assert (scaled[:, 1] == 0).all()
    assert (np.diff(np.sort(scaled[:, 2])) >= 0).all()
    assert (np.argsort(scaled[:, 2]) == np.argsort(values[:, 2])).all()
    assert np.abs(scaler(np.full((1, 3), 1e12))).max() < 400


@pytest.mark.parametrize("size", [1e-300, 1e160, 1e308])
def test_scaler_sees_values_of_any_size(rng, size):
    values = rng.uniform(-1, 1, size=(400, 1))
    scaled = Scaler(size * values)(size * values)
    np.testing.assert_allclose(scaled, Scaler(values)(values), rtol=1e-9, atol=1e-12)
    far = Scaler(1e-300 * values)(np.array([[1e300], [-1e300]]))
    assert np.isfinite(far).all()
    assert far[0] > 100 > -100 > far[1]


def test_network_leaves_the_global_generator_alone_and_repeats(rng):
    x, t = rng.normal(size=(200, 2)), np.repeat([1, 0], 100)
    state = torch.get_rng_state()
    with torch.no_grad():
        first, second = (
            Network(epochs=3, seed=1).fit(x, t, np.ones(200)).predict_proba(x) for _ in range(2)
        )
    assert torch.equal(torch.get_rng_state(), state)
    assert (first == second).all()
    assert first.sum(1) == pytest.approx(np.ones(200))


def correlated(rng, n):
    x = rng.normal(size=(n, 5))
    x[:, 1] = 0.5 * x[:, 0] + np.sqrt(0.75) * x[:, 1]
    return x


FIRST = {
    "shift": (lambda r, n: r.normal(size=(n, 5)) + np.eye(5)[0] * 0.5, 0.638, 0.044),
    "scale": (lambda r, n: 1.2 * r.normal(size=(n, 5)), 0.651, 0.056),
    "correlation": (correlated, 0.637, 0.054),
}


@pytest.mark.parametrize("kind", FIRST)
def test_analytic_truths(kind):
    """5000 events of each sample, half of them tested, within 0.03 in AUC and 0.02 bits."""
    draw, area, divergence = FIRST[kind]
    rng = np.random.default_rng(2)
    result = classifier_test(
        draw(rng, 5000), rng.normal(size=(5000, 5)), retrainings=0, permutations=199
    )
    assert result.auc == pytest.approx(area, abs=0.03)
    assert result.jsd == pytest.approx(divergence, abs=0.02)
    assert result.p_value == 1 / 200
    assert result["events", "mlp"].auc == pytest.approx(area, abs=0.03)
    if kind != "shift":
        blind = result["events", "logistic"]
        assert blind.auc == pytest.approx(0.5, abs=0.03)
        assert blind.p_adjusted > 0.01


# --- the test ------------------------------------------------------------------------------------


def test_features_side_by_side(rng):
    """Low-level images of equal shape and another total: normalised, the samples are the same."""

    def image(n, light):
        energy = light * rng.lognormal(0, 0.3, (n, 1))
        return torch.as_tensor(energy * rng.gamma(3, 1, (n, 6))).reshape(n, 2, 3)

    sets = {
        "pixels": lambda x: x,
        "normalised": lambda x: x / x.sum((1, 2), keepdim=True),
        "total": lambda x: x.sum((1, 2)),
    }
    result = classifier_test(image(400, 1.2), image(400, 1.0), features=sets, **FAST)
    assert [row.features for row in result.table] == list(sets)
    assert result["total", "logistic"].p_value == 0.01
    assert result["normalised", "logistic"].p_adjusted > 0.02
    assert result.p_value == min(row.p_adjusted for row in result.table)
    assert result.best.features != "normalised"
    assert result.ratio(image(7, 1.0)).shape == (7,)
    with pytest.raises(KeyError, match=r"Expected one of \('pixels', 'logistic'\)"):
        _ = result["total", "mlp"]


def test_best_is_chosen_without_the_test_events(rng):
    x, y = rng.normal(0.2, 1, (400, 2)), rng.normal(size=(400, 2))
    result = classifier_test(
        x, y, classifiers=("logistic", "quadratic"), permutations=49, retrainings=1
    )
    assert result.best.loss == min(row.loss for row in result.table)
    assert all(row.auc_spread > 0 for row in result.table)
    assert result.auc_error >= result.best.auc_error
    assert result.retrainings == 1


def test_errors_from_the_test_events(rng):
    """The bootstrap agrees with the scatter of independent tests."""
    found = []
    options = FAST | {"permutations": 1, "calibration": "none", "test": 0.1}
    for seed in range(80):
        x, y = rng.normal(0.5, 1, (1500, 1)), rng.normal(size=(1500, 1))
        result = classifier_test(x, y, **options, seed=seed)
        found.append([result.auc, result.best.auc_error, result.best.divergence,
                      result.best.jsd_error])  # fmt: skip
    found = np.array(found)
    assert found[:, 1].mean() == pytest.approx(found[:, 0].std(), rel=0.25)
    assert found[:, 3].mean() == pytest.approx(found[:, 2].std(), rel=0.25)


def test_weights_undo_a_difference(rng):
    x, y = rng.normal(size=(2000, 2)), rng.normal([0.5, 0], 1, (2000, 2))
    weight = np.exp(0.125 - 0.5 * y[:, 0])
    assert classifier_test(x, y, **FAST).p_value == 0.01
    undone = classifier_test(x, y, weight_y=1e-4 * weight, **FAST)
    assert undone.p_value > 0.02
    assert undone.auc == pytest.approx(0.5, abs=0.04)
    assert undone.effective_count[1] < 900
    assert "effective by weights" in str(undone)
    # the scale of weights says nothing, the AUC is weighted
    again = classifier_test(x, y, weight_y=4 * weight, weight_x=4 * np.ones(2000), **FAST)
    assert again.auc == pytest.approx(undone.auc, abs=1e-6)


@pytest.mark.parametrize("name", ["logistic", "boosting", "mlp", "no weights"])
def test_every_classifier_learns_from_weights(rng, name):
    from sklearn.neighbors import KNeighborsClassifier

    x, y = rng.normal(size=(1000, 1)), rng.normal(size=(1000, 1))
    weight = np.where(x[:, 0] > 0, 4.0, 1.0)
    given = KNeighborsClassifier(50) if name == "no weights" else name
    result = classifier_test(x, y, weight_x=weight, **FAST | {"classifiers": given})
    assert result.auc == pytest.approx(0.65, abs=0.06)


def test_estimators_of_the_user(rng):
    from sklearn.naive_bayes import GaussianNB
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import LinearSVC

    x, y = rng.normal(1, 1, (200, 2)), rng.normal(size=(200, 2))
    pipeline = make_pipeline(StandardScaler(), GaussianNB())
    given = {"svm": LinearSVC(), "pipeline": pipeline, "logistic": "logistic"}
    result = classifier_test(x, y, **FAST | {"classifiers": given})
    assert [row.classifier for row in result.table] == list(given)
    assert result["events", "svm"].calibration != "none"
    assert all(row.auc > 0.75 for row in result.table)
    alone = classifier_test(x, y, **FAST | {"classifiers": [GaussianNB()]})
    assert alone.best.classifier == "GaussianNB"


def test_same_seed_same_result(rng):
    x, y = torch.randn(100, 2), torch.randn(120, 2)
    first, second, other = (
        classifier_test(x, y, **FAST | {"classifiers": ("logistic", "boosting")}, seed=s)
        for s in (3, 3, 4)
    )
    assert str(first) == str(second)
    assert first.table[0].auc != other.table[0].auc
    assert first.count == (100, 120)
    assert first.test_count == (50, 60)


def test_result_is_frozen_and_can_be_kept(rng):
    result = classifier_test(rng.normal(size=(60, 1)), rng.normal(size=60), **FAST)
    with pytest.raises(FrozenInstanceError):
        result.p_value = 0.0
    again = pickle.loads(pickle.dumps(result))
    assert str(again) == str(result)
    assert repr(result).startswith("ClassifierTest(best='logistic on events', auc=")
    assert "no difference seen" in str(result)


def test_plots(rng):
    x, y = rng.normal(0.5, 1, (300, 1)), rng.normal(size=(300, 1))
    result = classifier_test(x, y, **FAST | {"classifiers": ("logistic", "quadratic")})
    roc = result.plot()
    curve = roc.lines[1].get_xydata()
    assert np.trapezoid(curve[:, 1], curve[:, 0]) == pytest.approx(result.table[0].auc)
    assert "AUC" in roc.get_legend().get_texts()[0].get_text()
    assert result.plot_calibration().get_ylabel() == "share of the first sample"
    assert "effective" in result.ratio.plot().get_title()


def test_progress(rng, capsys):
    pytest.importorskip("tqdm")
    classifier_test(rng.normal(size=60), rng.normal(size=60), **FAST, progress=True)
    assert "classifiers" in capsys.readouterr().err


# --- weights f/(1 − f) ---------------------------------------------------------------------------


def test_ratio_reweights_the_second_sample(rng):
    x, y = 1.3 * rng.normal(size=(4000, 1)), rng.normal(size=(4000, 1))
    result = classifier_test(x, y, **FAST | {"classifiers": "quadratic"})
    fresh = rng.normal(size=(20_000, 1))
    weight = result.ratio(fresh)
    exact = np.exp(fresh[:, 0] ** 2 / 2 * (1 - 1 / 1.69)) / 1.3
    assert weight.dtype == torch.float64
    assert np.median(np.abs(weight.numpy() / exact - 1)) < 0.1
    assert np.average(fresh[:, 0] ** 2, weights=weight) == pytest.approx(1.69, abs=0.15)
    ratio = result.ratio
    assert ratio.shape == pytest.approx(1 - 1 / 1.69, abs=0.25)
    assert ratio.mean == pytest.approx(1, abs=0.05)
    assert 0.7 < ratio.effective_count / 2000 < 0.95
    assert not ratio.heavy
    assert "well behaved" in str(ratio)


def test_ratio_warns_of_a_heavy_tail(rng):
    x, y = 3 * rng.normal(size=(2000, 3)), rng.normal(size=(2000, 3))
    result = classifier_test(x, y, **FAST | {"classifiers": "quadratic"})
    assert result.ratio.heavy
    assert "heavy tail" in str(result)
    with pytest.warns(UserWarning, match=r"heavy tail.*effective"):
        result.ratio(y)


def test_ratio_tells_what_the_second_sample_lacks(rng):
    x = np.concatenate([rng.normal(size=1000), rng.normal(20, 1, size=1000)])[:, None]
    y = rng.normal(size=(2000, 1))
    result = classifier_test(x, y, **FAST | {"classifiers": "boosting"})
    assert result.ratio.incomplete
    assert result.ratio.mean == pytest.approx(0.5, abs=0.1)
    assert "does not cover" in result.ratio.verdict()


# --- refusals ------------------------------------------------------------------------------------

GOOD = torch.zeros(60, 2)
REFUSED = {
    "nan": ((torch.full((60, 2), torch.nan), GOOD), {}, "Expected finite x; got nan in row 0"),
    "columns": ((GOOD, torch.zeros(60, 3)), {}, "Expected as many columns of y as of x, 2; got 3"),
    "number": ((3, GOOD), {}, "Expected x of shape (N, D), one event a row; got int"),
    "nothing": ((GOOD, None), {}, "Expected y of shape (N, D), one event a row; got NoneType"),
    "few": ((GOOD[:49], GOOD), {}, "Expected at least 50 events of each sample; got 49 and 60"),
    "words": ((["a"] * 60, GOOD), {}, "Expected x as a tensor or array"),
    "weights": ((GOOD, GOOD), {"weight_x": torch.zeros(60)}, "Expected weight_x with a positive"),
    "negative": ((GOOD, GOOD), {"weight_y": -torch.ones(60)}, "Expected weight_y of at least 0"),
    "shape": ((GOOD, GOOD), {"weight_y": torch.ones(59)}, "Expected weight_y of shape"),
    "part": (
        (GOOD, GOOD),
        {"weight_y": torch.eye(60)[0]},
        "positive sum in every part of the sample",
    ),
    "name": ((GOOD, GOOD), {"classifiers": "forest"}, "Expected a classifier of logistic, quad"),
    "none": ((GOOD, GOOD), {"classifiers": ()}, "Expected at least one classifier; got none"),
    "twice": ((GOOD, GOOD), {"classifiers": ["mlp", "mlp"]}, "got 'mlp' twice. Give a dict"),
    "object": ((GOOD, GOOD), {"classifiers": [3]}, "Expected classifiers as names or estimators"),
    "test": ((GOOD, GOOD), {"test": 1.0}, "Expected test as a share between 0 and 1; got 1.0"),
    "test word": ((GOOD, GOOD), {"test": "a"}, "Expected test as a share between 0 and 1; got 'a'"),
    "small test": ((GOOD, GOOD), {"test": 0.9}, "Expected at least 10 test events and 20 others"),
    "calibration": ((GOOD, GOOD), {"calibration": "beta"}, "Expected calibration as auto, none"),
    "permutations": ((GOOD, GOOD), {"permutations": 0}, "Expected permutations as a whole number"),
    "retrainings": ((GOOD, GOOD), {"retrainings": -1}, "Expected retrainings as a whole number"),
    "pairs": ((GOOD, torch.zeros(70, 2)), {"paired": True}, "where they are pairs; got 60 and 70"),
    "features": ((GOOD, GOOD), {"features": [1]}, "Expected features as a dict of sets"),
    "set": ((GOOD, GOOD), {"features": {"a": 3}}, "Expected features 'a' as a function of events"),
    "rows": (
        (GOOD, GOOD),
        {"features": {"a": (GOOD, GOOD[:50])}},
        "Expected y of the features 'a' with 60 rows; got 50",
    ),
    "log": (
        (GOOD, GOOD),
        {"features": {"log": torch.log}},
        "Expected finite x of the features 'log'; got -inf",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(case):
    (x, y), options, text = REFUSED[case]
    with pytest.raises(ValueError, match="Expected") as error:
        classifier_test(x, y, **{"classifiers": "logistic", **options})
    assert text in str(error.value)


def test_events_of_other_columns_are_refused(rng):
    result = classifier_test(rng.normal(size=(60, 2)), rng.normal(size=(60, 2)), **FAST)
    with pytest.raises(ValueError, match="Expected events of 2 columns; got 3"):
        result.ratio(torch.zeros(4, 3))


# --- posteriors ----------------------------------------------------------------------------------


class Gaussian:
    """The exact posterior of a linear Gaussian problem, made wider or shifted by its widths."""

    def __init__(self, posterior, width, bias):
        self.exact, self.width, self.bias = posterior, width, bias
        self.batch_shape, self.event_shape = posterior.batch_shape, posterior.event_shape

    def sample(self, shape, *, generator=None):
        mean = self.exact.mean
        noise = torch.randn(*shape, *mean.shape, generator=generator, dtype=mean.dtype)
        moved = noise @ self.exact.scale_tril[0].T * self.width + self.bias * self.exact.stddev
        return self.exact.mean + moved

    def to_base(self, z):
        u = (z - self.exact.mean - self.bias * self.exact.stddev) / self.width
        return torch.linalg.solve_triangular(self.exact.scale_tril[0], u.T, upper=False).T


@pytest.mark.parametrize(
    ("width", "bias", "right"), [(1, 0, True), (1.5, 0, False), (0.7, 0, False), (1, 0.4, False)]
)
def test_c2st_of_exact_wide_narrow_and_biased_posteriors(width, bias, right):
    simulator = LinearGaussian(dim=2, features=3)
    x, z = simulator.sample(1200, seed=1)
    result = c2st(
        lambda x: Gaussian(simulator.posterior(x), width, bias),
        x,
        z,
        classifiers=("logistic", "quadratic"),
        permutations=199,
        retrainings=0,
    )
    assert {row.features for row in result.table} == {"labels", "base"}
    assert result.paired
    assert (result.p_value > 0.02) == right


def test_c2st_sees_narrow_posteriors_in_the_base_coordinates(rng):
    """Widths a thousandth of the prior's, off by half of them."""
    z = 1000 * torch.as_tensor(rng.normal(size=(600, 1)))
    x = z + torch.as_tensor(rng.normal(size=(600, 1)))
    exact = torch.distributions.MultivariateNormal(x, torch.eye(1).double())
    result = c2st(lambda _: Gaussian(exact, 1, 0.5), x, z, **FAST)
    assert result["labels", "logistic"].auc < 0.53
    assert result["base", "logistic"].auc == pytest.approx(0.638, abs=0.05)
    assert result.best.features == "base"


def model_of(space, features=2):
    torch.manual_seed(0)
    return fp.PosteriorModel(
        torch.nn.Sequential(torch.nn.Linear(features, 4), torch.nn.Dropout(0.5)),
        fp.PosteriorHead(4, space),
    )


def test_c2st_of_a_model_leaves_it_as_it_was():
    space = fp.Product(energy=fp.Positive(), angle=fp.Circle(), way=fp.Sphere())
    model = model_of(space)
    model.encoder.train()
    model.head.eval()
    x = torch.randn(80, 2)
    with torch.no_grad():
        model.encoder.eval()
        z = model(x).sample()
        model.encoder.train()
    state = torch.get_rng_state()
    first, second = (c2st(model, x.numpy(), z, **FAST, seed=1) for _ in range(2))
    assert model.encoder[1].training
    assert not model.head.training
    assert torch.equal(torch.get_rng_state(), state)
    assert str(first) == str(second)
    # context 4; log energy, cosine, sine, three of a unit vector; four base coordinates
    seen = c2st(model, x, z, summary=x[:, :1], **FAST)
    assert seen.table[0].features == "labels"
    columns = []

    def record(context, z):
        columns.append((context.shape[1], z.shape[1]))
        return z

    told = c2st(model, x, z, features={"mine": record}, **FAST)
    assert [row.features for row in told.table] == ["mine"]
    assert set(columns) == {(4, 5)}


def test_c2st_without_context_and_with_references():
    density = fp.PosteriorHead(0, fp.Real(1))
    result = c2st(density, None, torch.randn(100), weight=torch.rand(100), **FAST)
    assert result.count == (100, 100)
    head = fp.PosteriorHead(2, fp.Sphere(), reference=True)
    guess = torch.nn.functional.normalize(torch.randn(60, 3), dim=1)
    result = c2st(head, torch.randn(60, 2), guess, reference=guess, **FAST)
    assert result.table[0].features == "labels"


def test_c2st_refusals():
    model = model_of(fp.Real(1))
    x, z = torch.randn(60, 2), torch.randn(60, 1)
    with pytest.raises(ValueError, match="Expected x of 60 events, as z has; got"):
        c2st(model, x[:50], z)
    with pytest.raises(ValueError, match="Expected summary of shape"):
        c2st(model, x, z, summary=x[:50])
    with pytest.raises(ValueError, match="weights are given as `weight`"):
        c2st(model, x, z, weight_x=torch.ones(60))
    with pytest.raises(ValueError, match="Expected at least one event"):
        c2st(model, x[:0], z[:0])
    with pytest.raises(ValueError, match="Expected finite true labels"):
        c2st(model, x, torch.full((60, 1), torch.nan))
    with pytest.raises(ValueError, match="what classifiers shall see of x as `summary`"):
        c2st(lambda x: model(x[0]), (x,), z)
