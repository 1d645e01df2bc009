"""Tails with errors over training sets: p under nulls, generators that are off, refusals."""

import numpy as np
import pytest
import torch
from scipy import stats

from flowpost.metrics import bootstrap_tails, tails

SHARES = (0.1, 0.02, 0.002)
AT = stats.expon.isf(SHARES)


def repeated(x, r, size=5000):
    """What a generator that draws training events with replacement gives."""
    return r.choice(x, size)


def trial(kind, seed, sets=4, n=1000):
    r = np.random.default_rng(seed)
    made = [repeated(x, r) for x in r.exponential(size=(sets, n))]
    known = {"probabilities": SHARES} if kind == "exact" else {"true": r.exponential(size=5 * n)}
    found = tails({"g": made}, AT, training_size=n, bootstraps=100, seed=seed, **known)
    return [min(row.p_adjusted for row in found.table), *(row.p_value for row in found.table)]


@pytest.mark.parametrize("trials", [300, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", ["exact", "sampled truth"])
def test_p_is_uniform_under_the_null(kind, trials):
    """At two training events a set beyond the last threshold it is only nearly right."""
    p = np.array([trial(kind, seed) for seed in range(trials)])
    error = np.sqrt(0.05 * 0.95 / trials)
    assert (p[:, 0] <= 0.05).mean() < 0.06 + 3.3 * error
    assert (p[:, 3] <= 0.05).mean() < 0.07 + 3.3 * error
    assert (np.abs((p[:, 1:3] <= 0.05).mean(0) - 0.05) < 3.3 * error).all()
    for column in p[:, 1:3].T:
        assert stats.kstest(column, "uniform").statistic < 1.63 / np.sqrt(trials)


def test_the_error_is_that_of_the_training_sets_and_not_of_counting():
    r = np.random.default_rng(0)
    sets = r.exponential(size=(200, 500))
    made = [r.choice(x, 100_000) for x in sets]
    row = tails({"g": made}, AT[:1], probabilities=SHARES[:1])["g", AT[0]]
    truth = np.sqrt(0.1 * 0.9 / 500)
    assert row.spread == pytest.approx(truth, rel=0.2)
    assert row.error == pytest.approx(truth / np.sqrt(200), rel=0.25)
    assert row.counting_error < 0.1 * row.error
    shares = np.array([(np.asarray(x) > AT[0]).mean() for x in made])
    assert row.share == pytest.approx(shares.mean())
    assert row.error == pytest.approx(shares.std(ddof=1) / np.sqrt(200), rel=0.15)


def test_a_cut_generator_is_flagged_and_a_fair_one_is_not():
    r = np.random.default_rng(1)
    fair = [r.exponential(size=20_000) for _ in range(4)]
    cut = [x[x < AT[1]] for x in fair]
    many = [1.5 * x for x in fair]
    samples = {"fair": fair, "cut": cut, "many": many}
    found = tails(samples, AT, probabilities=SHARES, training_size=20_000)
    assert found.flagged == ("cut", "many")
    assert found["cut", AT[1]].flag == "none"
    assert found["cut", AT[0]].flag == "too few"
    assert found["many", AT[0]].flag == "too many"
    assert "cut is off: too few beyond" in found.verdict()
    assert "Poisson" in str(found)
    with pytest.raises(KeyError, match="fair, cut, many"):
        found["other", AT[0]]


def test_no_events_prove_something_only_where_training_sets_had_some():
    made = [np.linspace(0, AT[2] - 0.01, 5000) for _ in range(2)]
    few = tails({"g": made}, AT[2:], probabilities=SHARES[2:], training_size=50)
    many = tails({"g": made}, AT[2:], probabilities=SHARES[2:], training_size=2000)
    assert few.table[0].p_value == pytest.approx(0.998**100)
    # 5000 drawings leave out e^(-5000/2000) of 2000 events
    seen = 1 - np.exp(-2.5)
    assert many.table[0].p_value == pytest.approx((1 - 0.002 * seen) ** 4000)
    assert not few.flagged
    assert many.flagged == ("g",)
    # with a truth of events: the chance that all of those beyond are in the true sample
    true = np.concatenate([np.zeros(9980), np.full(20, 99.0)])
    sampled = tails({"g": made}, AT[2:], true=true, training_size=2000)
    expected = (10_000 / (10_000 + 4000 * seen)) ** 20
    assert sampled.table[0].p_value == pytest.approx(expected, rel=1e-6)


def test_of_no_events_nothing_is_said_without_the_number_of_training_events():
    """What a generator that resamples 200 events gives is no more than they hold."""
    r = np.random.default_rng(0)
    made = {"g": [repeated(x, r, 20_000) for x in r.exponential(size=(4, 200))]}
    at = max(7.0, *(float(x.max()) for x in made["g"]))
    exact = {"probabilities": [np.exp(-7.0)]}
    found = tails(made, [at], **exact)
    assert found.table[0].share == 0
    assert found.table[0].p_value == 1
    assert not found.flagged
    assert "g has no event beyond" in found.verdict()
    assert "give training_size" in found.verdict()
    known = tails(made, [at], training_size=200, **exact)
    assert known.table[0].p_value == pytest.approx((1 - np.exp(-7.0)) ** 800)
    assert "training_size" not in known.verdict()


def test_few_generated_events_need_none_beyond_whatever_trained_them():
    made = [np.zeros(100) for _ in range(4)]
    exact = {"probabilities": [0.00135], "training_size": 20_000}
    found = tails({"g": made}, [3.0], **exact)
    assert found.table[0].p_value == pytest.approx(0.99865**400, rel=0.01)
    assert not found.flagged
    # events of no weight are not there
    weighted = tails({"g": [(x, np.repeat([1.0, 0.0], [10, 90])) for x in made]}, [3.0], **exact)
    assert weighted.table[0].p_value == pytest.approx(0.99865**40, rel=0.01)
    training = torch.zeros(20_000)
    one = bootstrap_tails(
        {"g": lambda x, s: x[:100]}, training, [3.0], probabilities=[0.00135], resamplings=2
    )
    assert one.table[0].p_value == pytest.approx(0.99865**100, rel=0.01)
    assert not one.flagged


def test_none_beyond_is_as_rare_as_it_says_for_resampled_events():
    """As many drawings as training events: 37 % of those are never drawn."""
    p, n, least = 0.005, 1000, 0.0
    found = []
    for seed in range(400):
        r = np.random.default_rng(seed)
        made = [repeated(x, r, n) for x in r.uniform(size=(2, n))]
        row = tails({"g": made}, [1 - p], probabilities=[p], training_size=n, bootstraps=2).table[0]
        if row.share == 0:
            least = row.p_value
        found.append(row.share == 0)
    rate = np.mean(found)
    assert least == pytest.approx(np.exp(-2 * n * p * (1 - np.exp(-1))), rel=0.05)
    assert rate <= least + 3.3 * np.sqrt(least / 400)
    assert rate > 0


def test_a_small_truth_is_said():
    r = np.random.default_rng(2)
    made = {"g": [r.exponential(size=5000) for _ in range(4)]}
    found = tails(made, AT, true=r.exponential(size=1000))
    assert [row.judged for row in found.table] == [True, True, False]
    assert found.table[2].flag == "truth too small"
    assert found.table[2].p_adjusted == 1
    assert "nothing can be said beyond" in str(found)
    assert "limited by the number of true events" in str(found)
    assert not found.flagged
    chosen = tails(made, true=r.exponential(size=2000))
    assert len(chosen.table) == 2
    assert chosen.table[0].true_share == pytest.approx(0.1, abs=0.002)


def test_weights_of_truth_and_of_generated_events():
    r = np.random.default_rng(3)

    def tilted(n):
        x = r.exponential(2.0, size=n)
        return x, np.exp(-x / 2)

    found = tails(
        {"g": [tilted(40_000) for _ in range(6)]},
        AT[:2],
        true=(truth := tilted(40_000))[0],
        weight_true=truth[1],
    )
    assert not found.flagged
    for row, share in zip(found.table, SHARES, strict=False):
        assert row.share == pytest.approx(share, abs=5 * row.error)
        assert row.true_share == pytest.approx(share, abs=4 * row.true_error)


def test_one_training_set_is_resampled():
    r = np.random.default_rng(4)
    training = torch.as_tensor(r.exponential(size=(400, 1)))
    seen = []

    def generate(x, seed):
        seen.append((x, seed))
        g = np.random.default_rng(seed)
        return x[torch.as_tensor(g.integers(len(x), size=4000))]

    found = bootstrap_tails(
        {"a": generate, "b": generate}, training, AT[:1], probabilities=SHARES[:1], resamplings=60
    )
    assert torch.equal(seen[0][0], training)
    assert len(seen) == 122
    assert all(torch.equal(x[0], y[0]) for x, y in zip(seen[:61], seen[61:], strict=True))
    assert len({seed for _, seed in seen[:61]}) == 61
    share = float((training > AT[0]).double().mean())
    assert found.table[0].share == pytest.approx(share, abs=0.02)
    assert found.table[0].error == pytest.approx(np.sqrt(share * (1 - share) / 400), rel=0.35)
    assert found["a", AT[0]].share == found["b", AT[0]].share
    assert "resampled training events" in str(found)


def test_resampled_p_rejects_as_often_as_it_says():
    p = []
    for trial_seed in range(120):
        x = torch.as_tensor(np.random.default_rng(trial_seed).exponential(size=500))

        def generate(x, seed):
            return x[torch.as_tensor(np.random.default_rng(seed).integers(len(x), size=5000))]

        found = bootstrap_tails(
            {"g": generate}, x, AT[:1], probabilities=SHARES[:1], seed=trial_seed
        )
        p.append(found.table[0].p_value)
    assert stats.kstest(p, "uniform").statistic < 1.63 / np.sqrt(120)
    assert (np.array(p) <= 0.05).mean() < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 120)


ONE = [np.ones(20), np.zeros(20)]
BAD = [
    (lambda: tails(ONE, [0.5], probabilities=[0.1]), "samples by the name"),
    (lambda: tails({"g": ONE[:1]}, [0.5], probabilities=[0.1]), "at least two training sets"),
    (lambda: tails({"g": ONE}, [0.5]), "either true events or exact probabilities; got neither"),
    (lambda: tails({"g": ONE}, [0.5], true=ONE[0], probabilities=[0.1]), "got both"),
    (lambda: tails({"g": ONE}, probabilities=[0.1]), "thresholds beside exact"),
    (lambda: tails({"g": ONE}, [0.5], probabilities=[0.0]), "probability between 0 and 1"),
    (lambda: tails({"g": ONE}, [0.5, 0.6], probabilities=[0.1]), "each of 2"),
    (lambda: tails({"g": ONE}, [np.nan], probabilities=[0.1]), "finite thresholds"),
    (lambda: tails({"g": [np.ones((5, 2))] * 2}, [0.5], probabilities=[0.1]), "one value an event"),
    (lambda: tails({"g": [np.ones(0)] * 2}, [0.5], probabilities=[0.1]), "one value an event"),
    (lambda: tails({"g": ONE}, true=np.ones(20)), "at least one threshold"),
    (
        lambda: tails({"g": ONE}, [0.5], probabilities=[0.1], training_size=0),
        "training_size as a whole number",
    ),
    (lambda: bootstrap_tails({}, np.ones(20), [0.5], probabilities=[0.1]), "generators by name"),
    (
        lambda: bootstrap_tails({"g": lambda x, s: x}, np.ones(3), [0.5], probabilities=[0.1]),
        "at least 10 training events",
    ),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
