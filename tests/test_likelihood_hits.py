"""The point process of hits: normalised, drawn and read as it says, and what it refuses."""

import math

import pytest
import torch
from likelihoods import CASES, GRID, SENSORS, SPACE, filled, labels
from scipy import stats

import flowpost as fp
from flowpost import likelihood as fl
from flowpost.likelihood.points import TimeDensity

N = 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def times(components=3, extreme=False, dtype=torch.float64):
    """Time densities (5,) on a window from −2 to 6."""
    g = seeded()
    log_weight = torch.log_softmax(torch.randn(5, components + 1, generator=g), -1)
    location = torch.rand(5, components, generator=g)
    scale = 10 ** (-3 * torch.rand(5, components, generator=g))
    if extreme:
        location = torch.tensor([0.0, 0.5, 1.0]).expand(5, -1)
        scale = torch.tensor([1e-4, 1.0, 1e-2]).expand(5, -1)
    parts = [t.to(dtype).contiguous() for t in (log_weight, location, scale)]
    return TimeDensity(*parts, (-2.0, 6.0))


@pytest.mark.parametrize("extreme", [False, True])
def test_time_densities_are_normalised(extreme):
    density = times(extreme=extreme)
    t = torch.linspace(-2, 6, 400_001, dtype=torch.float64)
    for i in range(5):
        one = TimeDensity(density.log_weight[i], density.location[i], density.scale[i], (-2.0, 6.0))
        value = one.log_prob(t).exp()
        total = torch.cumulative_trapezoid(value, t)
        assert total[-1].item() == pytest.approx(1, abs=2e-5)
        torch.testing.assert_close(one.cdf(t[1:]), total, rtol=0, atol=2e-5)


def test_time_densities_are_those_of_scipy():
    density, t = times(), torch.linspace(-1.9, 5.9, 7, dtype=torch.float64)
    y = (t + 2) / 8
    found = torch.stack([density.log_prob(v.expand(5)) for v in t])
    for i in range(5):
        weight = density.log_weight[i].exp().tolist()
        parts = [weight[-1]] * len(y) + 0 * y.numpy()
        for w, a, b in zip(weight, density.location[i], density.scale[i], strict=False):
            gumbel = stats.gumbel_r(a.item(), b.item())
            parts = parts + w * gumbel.pdf(y) / (gumbel.cdf(1) - gumbel.cdf(0))
        torch.testing.assert_close(found[:, i].exp(), torch.as_tensor(parts / 8), rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("extreme", [False, True])
def test_times_are_drawn_from_their_density(dtype, extreme):
    density = times(extreme=extreme, dtype=dtype)
    for i in range(5):
        parts = (density.log_weight[i], density.location[i], density.scale[i])
        many = TimeDensity(*(p.expand(20000, -1) for p in parts), (-2.0, 6.0))
        draws = many.sample(torch.rand(20000, 2, generator=seeded(i), dtype=dtype))
        assert draws.dtype == dtype
        assert ((draws >= -2) & (draws <= 6)).all()
        assert stats.kstest(many.cdf(draws).double().numpy(), "uniform").pvalue > 0.002
        assert torch.isfinite(many.log_prob(draws)).all()


def two_sensors(rates=(0.7, 1.6)):
    """Two sensors of constant rates, whose times are uniform on [0, 2]."""
    process = fl.PointProcess(fp.Real(1), [[0.0], [1.0]], (0.0, 2.0), components=1, hidden=2)
    with torch.no_grad():
        for p in process.parameters():
            p.zero_()
        process.times.skip.bias[0] = -80.0
        slope = math.log(rates[1] / rates[0])
        process.rates.skip.weight[0, -1] = slope
        process.rates.skip.bias.fill_(math.log(rates[0]))
    return process.double()


def test_hits_are_those_of_a_poisson_process():
    """Σ over sensors and ∫ over ordered times of p is the Poisson probability of the number."""
    process, rates, z = two_sensors(), (0.7, 1.6), torch.zeros(1, 1)
    none = process.log_prob((torch.zeros(1, 0, 2), torch.zeros(1, dtype=torch.int64)), z)
    assert none.item() == pytest.approx(-sum(rates))
    for sensors in ([0], [1], [0, 1], [1, 1, 0]):
        n = len(sensors)
        hits = torch.tensor([[[float(s), 0.3 * i] for i, s in enumerate(sensors)]])
        found = process.log_prob((hits, torch.tensor([n])), z)
        expected = sum(math.log(rates[s] / 2) for s in sensors) - sum(rates)
        assert found.item() == pytest.approx(expected, abs=1e-6)
    # so of n hits anywhere, at times in order: (Λ/2)ⁿ e^(−Λ) · 2ⁿ/n!
    total = stats.poisson(sum(rates)).pmf(2)
    pairs = torch.tensor([[[a, 0.1], [b, 0.2]] for a in (0.0, 1.0) for b in (0.0, 1.0)])
    value = process.log_prob((pairs, torch.full((4,), 2)), z.expand(4, -1)).exp().sum()
    assert value.item() * 2**2 / 2 == pytest.approx(total, rel=1e-6)


def test_numbers_and_times_of_hits():
    process, n = filled("hits", dtype=torch.float64), 20000
    z = labels(1).double().expand(n, -1)
    bound = process(z)
    hits, lengths = bound.sample(seeded())
    real = torch.arange(hits.shape[1]) < lengths[:, None]
    assert (hits[~real] == 0).all()
    assert hits.shape[1] == lengths.max()
    later = hits[:, 1:, -1] >= hits[:, :-1, -1]
    assert (later | ~real[:, 1:]).all(), "hits are in the order of their times"
    rate = process.rates(z[:1])[0, :, 0].add(process.log_mean).exp()
    for m, at in enumerate(SENSORS.double()):
        here = real & (hits[..., :2] == at).all(-1)
        count = here.sum(1).double()
        assert abs(count.mean() - rate[m]) < 4 * (rate[m] / n) ** 0.5
        assert abs(count.var() / count.mean() - 1) < 0.06
        t = hits[here][:, -1]
        index = torch.full((len(t), 1), m)
        level = process.time_density(z[:1].expand(len(t), -1), index).cdf(t[:, None])
        assert stats.kstest(level[:, 0].detach().numpy(), "uniform").pvalue > 0.002
    assert torch.equal(bound.measured((hits, lengths)), lengths.double())


def test_padding_is_not_read():
    process, z = filled("hits"), labels(N)
    hits, lengths = process.sample(z, seeded())
    expected = process.log_prob((hits, lengths), z)
    real = torch.arange(hits.shape[1]) < lengths[:, None]
    for value in (math.nan, math.inf, 1e9):
        padded = torch.cat([hits, torch.zeros(N, 3, 3)], 1)
        known = torch.cat([real, torch.zeros(N, 3, dtype=torch.bool)], 1)
        padded[~known] = value
        torch.testing.assert_close(process.log_prob((padded, lengths), z), expected)
        r, there = process(z).residuals((padded, lengths), seeded())
        assert torch.isfinite(r[there]).all()
        assert torch.equal(there.sum(1), 6 + lengths)
        fresh = CASES["hits"]().fit_scale((padded, lengths), z)
        again = CASES["hits"]().fit_scale((hits, lengths), z)
        torch.testing.assert_close(fresh.log_mean, again.log_mean)
        torch.testing.assert_close(fresh.times.loc, again.times.loc)


def test_the_order_of_hits_does_not_matter():
    process, z = filled("hits"), labels(1)
    hits, lengths = process.sample(z, seeded())
    torch.testing.assert_close(
        process.log_prob((hits.flip(1), lengths), z), process.log_prob((hits, lengths), z)
    )


def test_events_without_hits():
    process, z = filled("hits"), labels(N)
    none = (torch.zeros(N, 0, 3), torch.zeros(N, dtype=torch.int64))
    expected = -process(z).rate.sum(-1)
    torch.testing.assert_close(process.log_prob(none, z), expected)
    torch.testing.assert_close(
        process.log_prob((torch.full((N, 2, 3), math.nan), none[1]), z), expected
    )
    r, known = process(z).residuals(none, seeded())
    assert r.shape == known.shape == (N, 6)
    process.fit_scale(none, z)
    assert torch.isfinite(process.log_prob(none, z)).all()
    with torch.no_grad():
        process.log_mean.fill_(-50.0)
        process.rates.skip.bias.fill_(-50.0)
    hits, lengths = process.sample(z, seeded())
    assert hits.shape == (N, 1, 3)
    assert torch.equal(lengths, torch.zeros(N, dtype=torch.int64))


def test_many_hits_are_taken_in_portions(monkeypatch):
    process, z = filled("hits"), labels(20)
    x, expected = process(z).sample_and_log_prob(seeded())
    r, _ = process(z).residuals(x, seeded())
    monkeypatch.setattr("flowpost.likelihood.points._HITS", 7)
    again, value = process(z).sample_and_log_prob(seeded())
    torch.testing.assert_close(again, x)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(process(z).residuals(x, seeded())[0], r, rtol=1e-4, atol=1e-4)


def test_labels_far_outside_do_not_exhaust_memory():
    process, z = filled("hits"), labels(500)
    most = process.sample(z, seeded())[1].max()
    process.fit_scale(process.sample(z, seeded()), z)
    with torch.no_grad():
        process.rates.skip.bias.fill_(9.0)
    bound = process(z)
    torch.testing.assert_close(bound.rate.sum(-1), torch.full((500,), 10.0 * float(most)))
    x, value = bound.sample_and_log_prob(seeded())
    torch.testing.assert_close(bound.log_prob(x), value, rtol=1e-4, atol=1e-2)
    ratio = bound.rate / bound.rate[:, :1]
    free = process.rates(z)[..., 0]
    torch.testing.assert_close(ratio.log(), free - free[:, :1], rtol=0, atol=1e-3)


def test_sensors_far_from_the_origin_are_told_apart():
    sensors = GRID.reshape(-1, 2) * 17 + torch.tensor([5e5, 4e6])
    process = fl.PointProcess(fp.Real(1), sensors, (0.0, 1.0))
    many = sensors.repeat(10, 1)
    index, _, _ = process._hits((torch.cat([many, many[:, :1] * 0], 1)[None], torch.tensor([60])))
    assert torch.equal(index[0], torch.arange(6).repeat(10))


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda h, n: h, "Expected x as (hits, lengths); got Tensor"),
        (lambda h, n: (h, n, n), "Expected x as (hits, lengths); got tuple"),
        (lambda h, n: (h[..., :2], n), "Expected hits of shape (N, n, 3)"),
        (lambda h, n: (h, n[:2]), "lengths of shape (N,); got"),
        (lambda h, n: (h, n.float()), "Expected lengths as whole numbers from 0"),
        (lambda h, n: (h, n + 1000), "Expected lengths as whole numbers from 0"),
        (lambda h, n: (h, n * 0 - 1), "Expected lengths as whole numbers from 0"),
        (lambda h, n: (h + torch.tensor([0.5, 0.0, 0.0]), n), "Expected hits at a sensor; got ["),
        (lambda h, n: (h + torch.tensor([0.0, 0.0, 4.1]), n), "Expected hits between -1 and 3"),
        (lambda h, n: (h - torch.tensor([0.0, 0.0, 4.1]), n), "Expected hits between -1 and 3"),
        (lambda h, n: (h * math.nan, n), "Expected finite hits"),
        (lambda h, n: (h[:2], n[:2]), "Expected hits of one event for each label"),
    ],
)
def test_refused_hits(spoil, text):
    process, z = filled("hits"), labels(N)
    x = spoil(*process.sample(z, seeded()))
    for ask in (lambda x: process.log_prob(x, z), process(z).residuals):
        with pytest.raises(ValueError, match="Expected") as error:
            ask(x)
        assert text in str(error.value)


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"window": (1.0, 1.0)}, "Expected window as two increasing times"),
        ({"window": (math.nan, 1.0)}, "Expected window as two increasing times"),
        ({"components": 0}, "Expected components as a whole number"),
        ({"layers": 0}, "Expected layers as a whole number"),
        ({"hidden": 0}, "Expected hidden as a whole number"),
        ({"position": "energy"}, "Expected position as the name of a block"),
    ],
)
def test_refused_processes(options, text):
    with pytest.raises(ValueError, match=text):
        fl.PointProcess(SPACE, **{"sensors": SENSORS, "window": (0.0, 1.0), **options})


def test_diverged_networks_are_named():
    process = filled("hits")
    with torch.no_grad():
        process.rates.skip.bias.fill_(math.nan)
    with pytest.raises(ValueError, match="finite expected hits"):
        process(labels(2))


def test_a_direction_on_the_sphere():
    """A process seen from a vertex turns with it."""
    space = fp.Product(vertex=fp.Real(3), direction=fp.Sphere())
    sensors = torch.randn(5, 3, generator=seeded())
    features = fl.sensors.SensorFeatures(space, sensors, "vertex", "direction")
    z = torch.tensor([[0.5, -1.0, 2.0, 0.0, 0.6, 0.8]])
    along, across = features.seen(z)[0, :, 8], features.seen(z)[0, :, 9]
    offset = sensors - z[0, :3]
    torch.testing.assert_close(along, offset @ z[0, 3:])
    expected = torch.linalg.cross(offset, z[0, 3:].expand(5, -1)).norm(dim=-1)
    torch.testing.assert_close(across, expected, rtol=1e-4, atol=1e-4)
    # among labels that stand beside latents too
    beside = fl.with_latents(space, 2)
    again = fl.sensors.SensorFeatures(beside, sensors, "vertex", "direction")
    both = torch.cat([z, torch.zeros(1, 2)], 1)
    torch.testing.assert_close(again.seen(both), features.seen(z))
