"""Calibrated p-values against exchangeability, and the filter against scipy."""

import math

import pytest
import torch
from likelihoods import (
    broken,
    gaussian_events,
    gaussian_model,
    normal_likelihood,
    own_events,
    own_model,
    uniform,
)
from scipy import stats

import flowpost as fp
from flowpost.goodness import Calibrator, Filter, p_value, typicality
from flowpost.goodness.calibrate import positions, sort_pairs
from flowpost.likelihood import ExtendedModel

STATISTICS = ("p", "two_sided", "typicality", "context")


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ calibration


@pytest.mark.parametrize("scores", [[0.0] * 8, [1, 2, 2, 3, 3, 3, 9], [5, 1, 4, 2, 3], [7, 7, 1]])
def test_p_is_exactly_uniform_under_exchangeability(scores):
    """Over which of n + 1 alike events is the new one, p has density one everywhere."""
    scores = torch.tensor(scores, dtype=torch.float64)
    pairs = torch.stack([scores, (scores * 7) % 2], 1)
    n, density = len(pairs) - 1, torch.zeros(len(pairs), dtype=torch.float64)
    for i in range(n + 1):
        others = torch.cat([pairs[:i], pairs[i + 1 :]])
        below, upto = (int(k) for k in positions(sort_pairs(others), pairs[i : i + 1]))
        # p is uniform between below/(n + 1) and (upto + 1)/(n + 1)
        density[below : upto + 1] += 1 / (upto - below + 1)
    torch.testing.assert_close(density, torch.ones(n + 1).double())


def test_positions_are_those_of_python():
    g = seeded()
    known = torch.randint(3, (50, 2), generator=g).double()
    new = torch.randint(-1, 4, (40, 2), generator=g).double()
    below, upto = positions(sort_pairs(known), new)
    for i, pair in enumerate(new.tolist()):
        assert below[i] == sum(k < pair for k in known.tolist())
        assert upto[i] == sum(k <= pair for k in known.tolist())
    assert sort_pairs(known).tolist() == sorted(known.tolist())


class Given(Calibrator):
    """A calibrator of scores that are the first column of x, and labels that are the second."""

    def _scores(self, x, reference, seed, progress):
        scores = {n: torch.stack([x[:, 0], 0 * x[:, 0]], 1).double() for n in self.statistics}
        return scores, x[:, 1:2]


def test_ties_are_broken_at_random():
    calibrator = Given(gaussian_model(1))
    calibrator.fit(torch.zeros(30, 2))
    p = calibrator.p_value(torch.zeros(20000, 2)).p
    assert stats.kstest(p.numpy(), "uniform").pvalue > 0.01
    again = [calibrator.p_value(torch.zeros(20000, 2), seed=s).p for s in (1, 2)]
    assert torch.equal(again[0], p)
    assert not torch.equal(again[1], p)


def test_one_is_added():
    """Worse than all n held-out events is a p of at most 1/(n + 1), and never 0."""
    calibrator = Given(gaussian_model(1)).fit(torch.randn(99, 2))
    worst = calibrator.p_value(torch.full((5000, 2), -50.0)).p
    assert worst.min() > 0
    assert worst.max() < 0.01
    assert stats.kstest(100 * worst.numpy(), "uniform").pvalue > 0.01
    best = calibrator.p_value(torch.full((5000, 2), 50.0)).p
    assert best.min() > 0.99
    assert best.max() < 1


COMBINED = [*STATISTICS, ("p", "two_sided"), ("p", "context"), STATISTICS]


@pytest.mark.parametrize("statistics", COMBINED, ids=str)
def test_calibrated_p_is_uniform(statistics):
    model, held = gaussian_model(4), 4001
    calibrator = Calibrator(model, statistics, draws=40).fit(gaussian_events(held, 4))
    found = calibrator.p_value(gaussian_events(4000, 4, seed=1))
    several = not isinstance(statistics, str)
    assert uniform(found.p, held / 2 if several else held) > 0.01
    assert found.p.min() > 0
    assert found.p.max() < 1
    for name, p in found.each.items():
        known = len(getattr(calibrator, f"scores_{name}"))
        assert uniform(p, known) > 0.01, name
    if several:
        smallest = torch.stack(list(found.each.values())).amin(0)
        assert len(found.each) == len(statistics)
        assert len(calibrator.scores_joint) == 2001, "of the half that no score was ranked by"
        assert stats.spearmanr(found.p, smallest).statistic == pytest.approx(1, abs=1e-3)
        assert stats.kstest(smallest.numpy(), "uniform").pvalue < 1e-6
    else:
        assert torch.equal(found.p, found.each[statistics])
    assert found.labels.shape == (4000, 1)
    text = str(found)
    assert "Calibrated p of 4000 events: below 0.01, 0.05 and 0.5:" in text
    assert repr(found).startswith("CalibratedP(N=4000, of ")


def test_each_p_is_uniform_where_contexts_are_many():
    """A density that knew the events it is ranked among would call new ones rare."""
    size, held, total = 30, 300, []
    model = gaussian_model(size)
    for i in range(12):
        calibrator = Calibrator(model, ("context", "p"), draws=4)
        calibrator.fit(gaussian_events(held, size, seed=2 * i), seed=i)
        total.append(calibrator.p_value(gaussian_events(500, size, seed=2 * i + 1)).each["context"])
    p = torch.cat(total)
    # twelve times 75 held-out events
    assert abs(p.mean() - 0.5) < 4 * (1 / 12 / 75 / 12) ** 0.5


@pytest.mark.parametrize("name", ["channels", "hits"])
def test_calibrated_p_of_images_and_hits(name):
    model = own_model(name)
    calibrator = Calibrator(model, ("p", "typicality"), draws=20, max_draws=40, by="energy", bins=2)
    calibrator.fit(own_events(model, 2000, 1))
    found = calibrator.p_value(own_events(model, 2000, 2))
    assert uniform(found.p, 1000) > 0.01
    place = calibrator._bin(found.labels)
    for i in range(2):
        assert uniform(found.p[place == i], 500) > 0.01
    other = own_events(broken(own_model(name)), 500, 3)
    assert (calibrator.p_value(other).p < 0.05).double().mean() > 0.3


def test_bins_of_a_label():
    """Noise that grows with the label: without bins p is uniform over all events alone."""

    def events(n, seed):
        z = torch.randn(n, 1, generator=seeded(seed))
        noise = 1 + 0.5 * torch.sigmoid(3 * z)
        return z + noise * torch.randn(n, 10, generator=seeded(seed + 1))

    model, held = gaussian_model(10), 4000
    plain = Calibrator(model, draws=40).fit(events(held, 0))
    binned = Calibrator(model, draws=40, by="z", bins=4).fit(events(held, 0))
    x = events(4000, 10)
    found, alone = binned.p_value(x), plain.p_value(x)
    place = torch.bucketize(found.labels[:, 0].contiguous(), binned.edges)
    assert place.bincount().tolist() == pytest.approx([1000] * 4, abs=120)
    assert uniform(alone.p, held) > 0.01
    for i in range(4):
        assert uniform(found.p[place == i], held / 4) > 0.01
    assert uniform(alone.p[place == 3], held) < 1e-6
    assert binned.resolution == pytest.approx(4 / held, rel=0.05)
    several = Calibrator(model, ("p", "two_sided"), draws=40, by="z", bins=3).fit(events(held, 0))
    found = several.p_value(x)
    for i in range(3):
        assert uniform(found.p[several._bin(found.labels) == i], held / 6) > 0.01


def test_power_of_calibrated_p():
    model = gaussian_model(20)
    bad, tight = gaussian_events(500, 20, 2.0, seed=5), gaussian_events(500, 20, 0.5, seed=6)
    share = {}
    for name in (*STATISTICS, ("p", "two_sided")):
        calibrator = Calibrator(model, name, draws=100).fit(gaussian_events(4000, 20))
        share[name] = [
            (calibrator.p_value(x).p < 0.01).double().mean().item() for x in (bad, tight)
        ]
    assert share["p"][0] > 0.95
    assert share["p"][1] == 0
    assert min(share["two_sided"]) > 0.4
    assert min(share["typicality"]) > 0.4
    assert min(share["p", "two_sided"]) > 0.4
    # the context here is the data themselves, with which too little scatter is close to the mean
    assert share["context"][0] > 0.9
    assert share["context"][1] < 0.01


def test_a_shift_of_the_prior_is_not_seen_where_data_are_informative():
    """What it is blind to: labels three prior widths off, at two and at twenty values."""
    seen = {}
    for size in (2, 20):
        calibrator = Calibrator(gaussian_model(size)).fit(gaussian_events(4000, size))
        found = calibrator.p_value(gaussian_events(4000, size, seed=1, shift=3.0))
        seen[size] = (found.p < 0.05).double().mean().item()
    assert seen[20] < 0.075
    assert seen[2] > 0.1


def test_calibration_repeats_and_leaves_the_global_generator():
    model, x = gaussian_model(3), gaussian_events(200, 3)
    state = torch.get_rng_state()
    fits = [Calibrator(model, STATISTICS, draws=10).fit(x, seed=s) for s in (0, 0, 1)]
    p = [c.p_value(gaussian_events(100, 3, seed=1)).p for c in fits]
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(p[0], p[1])
    assert not torch.equal(p[0], p[2])


@pytest.mark.parametrize("by", [None, "z"])
def test_calibrators_travel_as_weights(by):
    model, x = gaussian_model(3), gaussian_events(100, 3, seed=1)
    calibrator = Calibrator(model, STATISTICS, draws=10, by=by, bins=2)
    calibrator.fit(gaussian_events(400, 3))
    expected = calibrator.p_value(x)
    options = calibrator.config()
    assert options == {
        "statistics": list(STATISTICS),
        "draws": 10,
        "max_draws": 160,
        "by": by,
        "bins": 2 if by else 1,
    }
    other = Calibrator(gaussian_model(3), **options)
    assert not other.fitted
    other.load_state_dict(calibrator.state_dict())
    assert other.fitted
    assert torch.equal(other.p_value(x).p, expected.p)
    cut = Filter(Calibrator(gaussian_model(3), **options), **Filter(calibrator, 0.1).config())
    cut.load_state_dict(Filter(calibrator, 0.1).state_dict())
    assert torch.equal(cut(x), expected.p >= 0.1)
    # ties stay ties in single precision
    again = calibrator.float().p_value(x)
    torch.testing.assert_close(again.p, expected.p, rtol=0, atol=0.03)
    constant = Given(model).fit(torch.full((50, 2), 0.1)).float()
    p = constant.p_value(torch.full((5000, 2), 0.1, dtype=torch.float64)).p
    assert stats.kstest(p.numpy(), "uniform").pvalue > 0.01


def test_small_p_gets_more_draws_unless_asked_otherwise():
    """New and held-out ones alike; fewer events change sides where a file is cut in portions."""
    model, held = gaussian_model(20), gaussian_events(4000, 20)
    x, changed = gaussian_events(10_000, 20, seed=1), {}
    for most in (None, 50):
        calibrator = Calibrator(model, draws=50, max_draws=most).fit(held)
        whole = calibrator.p_value(x).p < 0.01
        parts = [calibrator.p_value(part).p for part in x.flip(0).split(1000)]
        other = torch.cat(parts).flip(0) < 0.01
        changed[most] = int((whole & ~other).sum()) / int(whole.sum())
        assert calibrator.config()["max_draws"] == (most or 800)
    assert changed[None] < 0.7 * changed[50]


def test_a_calibrator_is_called():
    calibrator = Calibrator(gaussian_model(3), draws=10).fit(gaussian_events(200, 3))
    x = gaussian_events(40, 3, seed=1)
    assert torch.equal(calibrator(x, seed=4).p, calibrator.p_value(x, seed=4).p)


@pytest.mark.parametrize("by", [None, "z"])
def test_no_events(by):
    """As a production meets them: files of which nothing was left."""
    model, x = gaussian_model(3), gaussian_events(400, 3)
    calibrator = Calibrator(model, STATISTICS, draws=10, by=by, bins=2).fit(x)
    none = x[:0]
    found = calibrator.p_value(none)
    assert found.p.shape == (0,)
    assert found.labels.shape == (0, 1)
    assert all(p.shape == (0,) for p in found.each.values())
    assert str(found) == "Calibrated p of 0 events"
    plain = p_value(model, none)
    assert [len(getattr(plain, k)) for k in ("p", "error", "draws", "labels")] == [0] * 4
    assert str(plain) == "Posterior-predictive p of 0 events"
    assert typicality(model, none).shape == (0,)
    cut = Filter(calibrator, 0.1)
    assert cut(none).dtype == torch.bool
    assert cut(none).shape == (0,)
    with pytest.raises(ValueError, match="at least one event for an efficiency"):
        cut.efficiency(none)
    with pytest.raises(ValueError, match=r"held-out events for bins=.* got 0"):
        calibrator.fit(none)


def test_labels_beside_the_inputs_are_refused():
    encoder = torch.nn.Linear(3, 3)
    model = ExtendedModel(encoder, fp.PosteriorHead(3, fp.Real(1)), normal_likelihood(3))
    x = gaussian_events(60, 3)
    with pytest.raises(ValueError, match="encoder, without labels; got 2 of them, which it does"):
        Calibrator(model).fit((x, x[:, :1]))
    with pytest.raises(ValueError, match="without labels; got 2 of them"):
        Calibrator(model, "context").fit((x, x[:, :1]))


def test_what_cannot_be_evaluated_fits_worst(monkeypatch):
    model = gaussian_model(3)
    calibrator = Calibrator(model, "typicality", draws=4).fit(gaussian_events(200, 3))

    def broken(model, x, **options):
        value = typicality(model, x)
        value[0] = math.nan
        return value

    monkeypatch.setattr("flowpost.goodness.calibrate.typicality", broken)
    assert calibrator.p_value(gaussian_events(50, 3)).p[0] < 1 / 201


@pytest.mark.parametrize(
    ("options", "events", "text"),
    [
        ({"statistics": "chi2"}, 0, "Expected statistics as some of p, two_sided, typicality"),
        ({"statistics": ()}, 0, "Expected statistics as some of"),
        ({"statistics": ("p", "p")}, 0, "Expected statistics as some of"),
        ({"by": "energy"}, 0, "Expected by as a label column; got 'energy'. Columns are z"),
        ({"by": "z", "bins": 0}, 0, "Expected bins as a whole number"),
        ({"draws": 1}, 0, "Expected draws as a whole number of at least 2"),
        ({}, 19, "Expected at least 20 held-out events for bins=1"),
        ({"statistics": ("p", "two_sided")}, 39, "at least 40 held-out events"),
        ({"statistics": "context"}, 39, "at least 40 held-out events"),
        ({"statistics": ("p", "context")}, 79, "at least 80 held-out events"),
        ({"by": "z", "bins": 4}, 79, "at least 80 held-out events for bins=4"),
        ({"max_draws": 10}, 30, "Expected max_draws as a whole number of at least 200"),
    ],
)
def test_refused_calibrators(options, events, text):
    with pytest.raises(ValueError, match=text):
        Calibrator(gaussian_model(3), **options).fit(gaussian_events(events, 3))


def test_refused_uses_of_a_calibrator():
    model, x = gaussian_model(3), gaussian_events(30, 3)
    for use in (Calibrator(model), Filter(Calibrator(model))):
        with pytest.raises(ValueError, match="Expected a fitted Calibrator; call fit"):
            use.p_value(x) if isinstance(use, Calibrator) else use(x)
    blind = ExtendedModel(torch.nn.Module(), fp.PosteriorHead(0, fp.Real(1)), normal_likelihood(3))
    with pytest.raises(ValueError, match="a context for the statistic 'context'"):
        Calibrator(blind, "context")
    with pytest.raises(ValueError, match="Expected events in every bin of z; got 100, 0, 0, 0"):
        Given(model, by="z").fit(torch.ones(100, 2))


# ------------------------------------------------------------------ the filter


def test_filter_keeps_good_events():
    model = gaussian_model(20)
    calibrator = Calibrator(model, draws=100).fit(gaussian_events(4000, 20))
    cut = Filter(calibrator, 0.05)
    good, bad = gaussian_events(4000, 20, seed=1), gaussian_events(200, 20, 2.0, seed=2)
    mask = cut(good)
    assert mask.dtype == torch.bool
    assert torch.equal(mask, calibrator.p_value(good).p >= 0.05)
    assert cut(bad).double().mean() < 0.05
    found = cut.efficiency(good, level=0.999)
    assert found.kept == int(mask.sum())
    assert found.count == 4000
    assert found.value == mask.double().mean().item()
    # the held-out events are a sample too
    assert found.value == pytest.approx(0.95, abs=4 * (0.05 * 0.95 / 2000) ** 0.5)
    exact = stats.binomtest(found.kept, 4000).proportion_ci(0.999, "exact")
    assert found.low == pytest.approx(exact.low, rel=1e-9)
    assert found.high == pytest.approx(exact.high, rel=1e-9)
    text = f"{100 * found.value:.2f} % of 4000 events kept"
    assert str(found).startswith(text)
    # what the interval does not hold: the calibration is of a sample
    assert found.held == calibrator.held == 4000
    assert found.calibration == pytest.approx((0.05 * 0.95 / 4000) ** 0.5)
    assert "beside it ± 0.34 % of the calibration by 4000 held-out events" in str(found)
    assert "at 100 %" not in str(cut.efficiency(good[:50]))
    assert repr(cut).startswith("Filter(\n  threshold=0.05")


@pytest.mark.parametrize(("kept", "count"), [(0, 7), (7, 7), (3, 7), (990, 1000), (1, 1)])
@pytest.mark.parametrize("level", [0.5, 0.68, 0.95])
def test_interval_is_that_of_clopper_and_pearson(kept, count, level):
    from flowpost.goodness.filter import clopper_pearson

    exact = stats.binomtest(kept, count).proportion_ci(level, "exact")
    assert clopper_pearson(kept, count, level) == pytest.approx((exact.low, exact.high), rel=1e-9)


def test_refused_filters():
    model = gaussian_model(3)
    calibrator = Calibrator(model, draws=10)
    for threshold in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="Expected a threshold between 0 and 1"):
            Filter(calibrator, threshold)
    with pytest.raises(ValueError, match="Expected a Calibrator; got ExtendedModel"):
        Filter(model)
    early = Filter(calibrator, 0.001)
    calibrator.fit(gaussian_events(200, 3))
    for use in (lambda: Filter(calibrator, 0.001), lambda: early(gaussian_events(5, 3))):
        with pytest.raises(ValueError, match=r"at least 0.005, which the held-out events"):
            use()
    for level in (0.0, 1.0):
        with pytest.raises(ValueError, match="Expected a level between 0 and 1"):
            Filter(calibrator).efficiency(gaussian_events(5, 3), level=level)
