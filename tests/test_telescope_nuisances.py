"""Nuisances per event: the response they change, and that simulation and likelihood agree on it."""

import dataclasses
import math

import pytest
import torch
from scipy import stats
from torch.distributions import Distribution

from flowpost.simulators import Telescope, Telescope3D

FLAT = Telescope()
SOLID = {kind: Telescope3D(kind=kind) for kind in ("cascade", "track")}
CASES = {"flat": FLAT, **SOLID}
NAMES = ("light_yield", "scattering", "noise")
OFF = {"light_yield": 1.3, "scattering": 1.5, "noise": 2.5}
FLAT_Z = torch.tensor([[3.0, -22.0, 40.0]], dtype=torch.float64)
SOLID_Z = torch.tensor([[40.0, 3.0, -22.0, 11.0, 0.6, -0.48, 0.64]], dtype=torch.float64)


@pytest.fixture(params=CASES)
def case(request):
    return request.param


@pytest.fixture
def telescope(case):
    return CASES[case]


def labels_of(case, n, dtype=torch.float64):
    """Labels of n events at one place, the arguments of `simulate`."""
    if case == "flat":
        return FLAT_Z.expand(n, -1).to(dtype), torch.full((n,), 0.4, dtype=dtype)
    return (SOLID_Z.expand(n, -1).to(dtype),)


def labels(events):
    return (events.z, events.angle) if hasattr(events, "angle") else (events.z,)


def expected(telescope, *args, **kwargs):
    """Expected counts, shape (N, sensors) or, of a flat telescope, (N, T, H, W)."""
    flat = isinstance(telescope, Telescope)
    return (telescope.expected_images if flat else telescope.expected_counts)(*args, **kwargs)


def densities(telescope, events, nuisance):
    """Log-densities of all views of the events."""
    args = [t.double() for t in labels(events)]
    seen = [telescope.log_prob_hits(events.hits, events.lengths, *args, nuisance=nuisance)]
    if isinstance(telescope, Telescope):
        seen.append(telescope.log_prob_images(events.images, *args, nuisance=nuisance))
    return seen


def replaced(telescope, light_yield, scattering, noise):
    """The telescope whose nominal response is that of the factors."""
    changes = {
        "light_yield": telescope.light_yield * light_yield,
        "attenuation": telescope.attenuation / math.sqrt(scattering),
        "noise": telescope.noise * noise,
    }
    if isinstance(telescope, Telescope):
        changes["time_spread_growth"] = telescope.time_spread_growth * scattering
    else:
        changes["scattering"] = telescope.scattering / scattering
    return dataclasses.replace(telescope, **changes)


# The nominal response


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factors_of_one_change_no_bit(case, telescope, dtype):
    plain = telescope.simulate(*labels_of(case, 300, dtype), seed=1)
    numbers = dict.fromkeys(NAMES, 1)
    rows = {name: torch.ones(300) for name in NAMES}
    for nuisance in ({}, numbers, rows):
        same = telescope.simulate(*labels_of(case, 300, dtype), seed=1, nuisance=nuisance)
        assert same.hits.dtype == dtype
        for field in plain.__dataclass_fields__:
            assert torch.equal(getattr(plain, field), getattr(same, field)), field
        for first, second in zip(
            densities(telescope, plain, None), densities(telescope, same, nuisance), strict=True
        ):
            assert torch.equal(first, second)
    drawn = [telescope.sample(300, seed=2, nuisance=nuisance) for nuisance in (None, rows)]
    assert torch.equal(drawn[0].hits, drawn[1].hits)


# The changed response


@pytest.mark.parametrize("names", [*((name,) for name in NAMES), NAMES])
def test_factors_are_those_of_a_replaced_telescope(case, telescope, names):
    nuisance = {name: OFF[name] for name in names}
    other = replaced(telescope, **(dict.fromkeys(NAMES, 1.0) | nuisance))
    events = telescope.sample(40, seed=3)
    args = [t.double() for t in labels(events)]
    torch.testing.assert_close(
        expected(telescope, *args, nuisance=nuisance), expected(other, *args), rtol=1e-11, atol=0
    )
    hits = events.hits.double()
    torch.testing.assert_close(
        telescope.intensity(hits, *args, nuisance=nuisance), other.intensity(hits, *args)
    )
    for first, second, nominal in zip(
        densities(telescope, events, nuisance),
        densities(other, events, None),
        densities(telescope, events, None),
        strict=True,
    ):
        torch.testing.assert_close(first, second, rtol=1e-11, atol=1e-11)
        assert (first - nominal).abs().min() > 0


def test_every_event_has_its_own_factors(case, telescope, monkeypatch):
    if case != "flat":
        monkeypatch.setattr("flowpost.simulators.telescope3d.response._ELEMENTS", 3000)
    draw = torch.Generator().manual_seed(0)
    nuisance = {name: 0.5 + torch.rand(30, generator=draw) for name in NAMES}
    events = telescope.sample(30, seed=4, nuisance=nuisance)
    seen = densities(telescope, events, nuisance)
    for i in (0, 7, 29):
        one = {name: float(value[i]) for name, value in nuisance.items()}
        row = slice(i, i + 1)
        for whole, single in zip(seen, densities(telescope, events[row], one), strict=True):
            assert float(whole[i]) == pytest.approx(float(single), abs=1e-6)


def test_scattering_dims_and_delays(case, telescope):
    args = labels_of(case, 3000)
    more = [telescope.simulate(*args, seed=5, nuisance={"scattering": s}) for s in (1.0, 1.6)]
    counts = [events.lengths.double().mean() for events in more]
    assert counts[1] < 0.9 * counts[0]
    # per sensor, so that the loss of far ones does not hide the delay
    spread = []
    for events in more:
        real = torch.arange(events.hits.shape[1]) < events.lengths[:, None]
        hits = events.hits[real]
        place = hits[:, :-1].unique(dim=0, return_counts=True)
        at = place[0][place[1].argmax()] if not spread else spread[0][0]
        times = hits[(hits[:, :-1] == at).all(1), -1]
        spread.append((at, float(times.quantile(0.9) - times.quantile(0.1))))
    assert spread[1][1] > 1.1 * spread[0][1]


# Simulated events follow the changed likelihood


def test_counts_and_times_follow_the_factors(case, telescope):
    n = 4000
    events = telescope.simulate(*labels_of(case, n), seed=6, nuisance=OFF)
    mean = expected(telescope, *labels_of(case, 1), nuisance=OFF)[0]
    real = torch.arange(events.hits.shape[1]) < events.lengths[:, None]
    hits = events.hits[real]
    places, sensor = hits[:, :-1].unique(dim=0, return_inverse=True)
    sensor = (places[:, None] - telescope.sensors).abs().sum(-1).argmin(1)[sensor]
    per_sensor = mean.sum(0).flatten() if case == "flat" else mean
    counts = torch.bincount(sensor, minlength=len(per_sensor))
    pulls = (counts / n - per_sensor) / (per_sensor / n).sqrt()
    assert pulls.square().mean() == pytest.approx(1, abs=0.4)
    if case == "flat":
        pulls = (events.images.mean(0) - mean) / (mean / n).sqrt()
        assert pulls.square().mean() == pytest.approx(1, abs=0.4)
    total = events.lengths.double()
    assert float(total.var() / total.mean()) == pytest.approx(1, abs=0.1)

    brightest = int(per_sensor.argmax())
    other = replaced(telescope, **OFF)
    at = telescope.sensors[brightest]
    if case == "flat":
        first, last = telescope.time_edges[0], telescope.time_edges[-1]
        distance = other.distance(at - FLAT_Z[0, :2])
        cdf = lambda t: other.arrival_cdf(torch.as_tensor(t), distance).numpy()  # noqa: E731
    else:
        first, last = telescope.window
        light = other.light(SOLID_Z, at[None])
        cdf = lambda t: other.arrival_cdf(torch.as_tensor(t), light)[0].numpy()  # noqa: E731
    dark = other.noise * (last - first) / float(per_sensor[brightest])
    assert dark < 0.02
    test = stats.kstest(
        hits[sensor == brightest, -1].numpy(),
        lambda t: (1 - dark) * cdf(t) + dark * (t - first) / (last - first),
    )
    assert test.pvalue > 1e-3


def test_the_score_averages_to_zero(case, telescope):
    """E[∂ ln p(x|z, ν)/∂ν] = 0 over events simulated with ν, and not at other factors."""
    n = 1500
    events = telescope.simulate(*labels_of(case, n), seed=7, nuisance=OFF)
    for true in (True, False):
        factors = {
            name: torch.full((n,), OFF[name] if true else 1.0, dtype=torch.float64).requires_grad_()
            for name in NAMES
        }
        for view in densities(telescope, events, factors):
            scores = torch.autograd.grad(view.sum(), list(factors.values()), retain_graph=True)
            for name, score in zip(NAMES, scores, strict=True):
                pull = float(score.mean() / score.std()) * math.sqrt(n)
                assert (abs(pull) < 4) == true, (name, pull)


# Priors


def test_priors_are_distributions_with_a_nominal_value(case, telescope):
    nuisances = telescope.nuisances()
    assert tuple(nuisances) == NAMES
    for prior, nominal in nuisances.values():
        assert isinstance(prior, Distribution)
        assert prior.batch_shape == prior.event_shape == ()
        assert nominal == 1.0
    moments = {name: (float(p.mean), float(p.stddev)) for name, (p, _) in nuisances.items()}
    assert moments["light_yield"] == pytest.approx((1, 0.1))
    assert moments["scattering"] == pytest.approx((1, 0.15))
    assert moments["noise"] == pytest.approx((2, 2 / math.sqrt(12)))
    drawn = {name: prior.sample((50,)) for name, (prior, _) in nuisances.items()}
    assert len(telescope.sample(50, seed=0, nuisance=drawn)) == 50


def test_draws_can_be_repeated(case, telescope):
    nuisance = {"light_yield": torch.linspace(0.5, 2, 40)}
    state = torch.get_rng_state()
    first = telescope.sample(40, seed=8, nuisance=nuisance)
    second = telescope.sample(40, torch.Generator().manual_seed(8), nuisance=nuisance)
    assert torch.equal(first.hits, second.hits)
    assert torch.equal(state, torch.get_rng_state())


# Errors


@pytest.mark.parametrize(
    ("nuisance", "message"),
    [
        ([1.0], "nuisance as a mapping of names to factors; got list"),
        ({"ice": 1.1}, "among light_yield, scattering, noise; got ice"),
        ({"noise": torch.ones(3)}, r"nuisance 'noise' of shape \(4,\); got \(3,\)"),
        ({"noise": torch.ones(4, 1)}, "nuisance 'noise' of shape"),
        ({"scattering": [1.0, 1.0, -0.5, 0.0]}, "'scattering'; got -0.5 in row 2"),
        ({"light_yield": 0.0}, "positive factors as nuisance 'light_yield'; got 0 in row 0"),
        ({"light_yield": [1, 1, math.nan, 1]}, "finite nuisance 'light_yield'; got nan in row 2"),
        ({"noise": "much"}, "nuisance 'noise' as a tensor"),
    ],
)
def test_refuses(case, telescope, nuisance, message):
    args = labels_of(case, 4)
    hits = torch.zeros(4, 1, 3 if case == "flat" else 4)
    calls = [
        lambda: telescope.sample(4, seed=0, nuisance=nuisance),
        lambda: telescope.simulate(*args, seed=0, nuisance=nuisance),
        lambda: expected(telescope, *args, nuisance=nuisance),
        lambda: telescope.intensity(hits, *args, nuisance=nuisance),
        lambda: telescope.log_prob_hits(hits, [0] * 4, *args, nuisance=nuisance),
    ]
    if case == "flat":
        images = torch.zeros(4, *telescope.image_shape)
        calls.append(lambda: telescope.log_prob_images(images, *args, nuisance=nuisance))
    for call in calls:
        with pytest.raises(ValueError, match=message):
            call()
