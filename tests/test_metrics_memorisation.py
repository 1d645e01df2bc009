"""Memorisation: exact nulls whatever the generator, copies and jitter found, refusals."""

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial import cKDTree

from flowpost.metrics import memorisation

N = 120


def events(kind, seed):
    """Generated, training and held-out events."""
    r = np.random.default_rng(seed)
    training, held_out, other = r.normal(size=(3, N, 2))
    if kind == "fresh":
        made = other
    elif kind == "narrow":
        made = 0.5 * other
    elif kind == "clumped":
        made = np.repeat(other[: N // 6], 6, axis=0)
    elif kind == "discrete":
        training, held_out, made = (np.round(2 * v) for v in (training, held_out, other))
    elif kind == "unequal numbers":
        held_out, made = r.normal(size=(50, 2)), r.normal(size=(300, 2))
    elif kind == "resampled":
        made = r.choice(training, N)
    elif kind == "jittered":
        made = r.choice(training, N) + 0.1 * r.normal(size=(N, 2))
    elif kind == "a third resampled":
        made = np.concatenate([r.choice(training, N // 3), other[N // 3 :]])
    return made, training, held_out


def trial(kind, seed):
    found = memorisation(*events(kind, seed), permutations=99, seed=seed)
    return found.p_value, found.p_close


@pytest.mark.parametrize("trials", [200, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["fresh", "narrow", "clumped", "discrete", "unequal numbers"])
def test_memorisation_is_uniform_for_generators_that_saw_nothing(kind, trials):
    """Also where they are wrong, repeat themselves, or share their neighbours."""
    p = np.array([trial(kind, seed)[0] for seed in range(trials)])
    assert abs((p <= 0.05).mean() - 0.05) < 3.3 * np.sqrt(0.05 * 0.95 / trials)
    assert stats.kstest(p, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.01
    assert p.min() >= 0.01


@pytest.mark.parametrize("trials", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_closeness_is_uniform_for_fresh_events(trials):
    p = np.array([trial("fresh", seed)[1] for seed in range(trials)])
    assert abs((p <= 0.05).mean() - 0.05) < 3.3 * np.sqrt(0.05 * 0.95 / trials)
    assert stats.kstest(p, "uniform").statistic < 1.63 / np.sqrt(trials) + 0.01


@pytest.mark.parametrize("kind", ["resampled", "jittered", "a third resampled"])
def test_repeated_training_events_are_found(kind):
    p = np.array([trial(kind, seed) for seed in range(20)])
    assert (p[:, 0] <= 0.05).mean() > (0.6 if kind == "a third resampled" else 0.99)
    found = memorisation(*events(kind, 0), permutations=999)
    if kind != "a third resampled":
        assert "memorised" in found.verdict()
        assert found.p_value == 0.001
    copies = {"resampled": 1, "jittered": 0, "a third resampled": 1 / 3}[kind]
    assert found.copies == pytest.approx(copies)
    assert found.copies_held_out == 0
    assert ("copies of training events" in found.verdict()) == (kind != "jittered")


def test_a_narrow_generator_is_close_but_has_not_memorised():
    found = memorisation(*events("narrow", 1))
    assert found.p_close < 0.01 < found.p_value
    assert "too narrow" in str(found)
    assert "no sign of memorisation" in str(memorisation(*events("fresh", 3)))


def test_distances_and_shares_are_those_of_a_tree():
    made, training, held_out = events("unequal numbers", 2)
    unit = np.concatenate([training, held_out]).std(0, ddof=1)
    a, b, c = (v / unit for v in (made, training, held_out))
    found = memorisation(made, training, held_out, permutations=9)
    near, other = cKDTree(b).query(a)[0], cKDTree(c).query(a)[0]
    np.testing.assert_allclose(found.distance_generated, near, rtol=1e-12)
    np.testing.assert_allclose(found.distance_held_out, cKDTree(b).query(c)[0], rtol=1e-12)
    assert found.share == pytest.approx((near < other).mean())
    assert found.expected == pytest.approx(len(b) / (len(b) + len(c)))
    below = found.distance_generated[:, None] < found.distance_held_out
    assert found.auc == pytest.approx(float(below.double().mean()))


def test_units_chunks_and_precision(monkeypatch):
    made, training, held_out = events("jittered", 4)
    one = memorisation(made, training, held_out)
    far = [torch.as_tensor(v * [1, 1000.0]) for v in (made, training, held_out)]
    assert memorisation(*far).p_value == one.p_value
    unit = memorisation(*far, scale=[1.0, 1000.0])
    np.testing.assert_allclose(
        unit.distance_generated, cKDTree(training).query(made)[0], rtol=1e-12
    )
    single = memorisation(*(torch.as_tensor(v).float() for v in (made, training, held_out)))
    assert single.share == pytest.approx(one.share, abs=0.02)
    import sys

    monkeypatch.setattr(sys.modules["flowpost.metrics.memorisation"], "_CHUNK", 1000)
    again = memorisation(made, training, held_out)
    assert torch.equal(again.distance_generated, one.distance_generated)
    assert again.p_value == one.p_value
    assert repr(again) == repr(one)


X = np.random.default_rng(0).normal(size=(30, 2))
BAD = [
    (lambda: memorisation(X[:5], X, X), "at least 20 generated events"),
    (lambda: memorisation(X, X[:, :1], X), "as many columns"),
    (lambda: memorisation(X, X, X * np.nan), "finite held-out events"),
    (lambda: memorisation(X, X, X, scale=[1.0]), "scale as 2 positive numbers"),
    (lambda: memorisation(X, X, X, scale=[1.0, 0.0]), "scale as 2 positive numbers"),
    (lambda: memorisation(X, X, X, permutations=0), "permutations as a whole number"),
    (lambda: memorisation(X + 1, X, X), "did not train the generator; got the training events"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
