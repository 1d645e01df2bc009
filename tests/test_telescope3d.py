"""The telescope in three dimensions against formulas, quadrature and plain Monte Carlo."""

import dataclasses
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from flowpost.simulators.telescope3d import Telescope3D, Telescope3DEvents
from flowpost.simulators.telescope3d import response as response_module

KINDS = {kind: Telescope3D(kind=kind) for kind in ("cascade", "track")}
Z = torch.tensor(
    [
        [40.0, 3.0, -22.0, 11.0, 0.6, -0.48, 0.64],
        [2.5, 48.0, 40.0, -45.0, -0.28, 0.0, 0.96],
    ],
    dtype=torch.float64,
)


@pytest.fixture(scope="module", params=KINDS)
def kind(request):
    return request.param


@pytest.fixture(scope="module")
def telescope(kind):
    return KINDS[kind]


@pytest.fixture(scope="module")
def events(telescope):
    return telescope.sample(2000, seed=5)


def by_hand(kind, z, sensor):
    """Photons, time of flight and spread of the default telescope, in plain Python."""
    energy, position, direction = z[0], z[1:4], z[4:]
    offset = [s - p for s, p in zip(sensor, position, strict=True)]
    square = sum(o * o for o in offset)
    along = sum(o * d for o, d in zip(offset, direction, strict=True))
    cosine = 0.22 / 0.299792458
    if kind == "track":
        across = math.sqrt(square - along**2 + 9)
        path = across / math.sin(math.acos(cosine))
        # emitted where the Cherenkov cone starts that ends at the sensor
        start = along - across / math.tan(math.acos(cosine))
        time = start / 0.299792458 + path / 0.22
        bright = 0.4 / (1 + path / 12)
    else:
        path = math.sqrt(square + 9)
        time = path / 0.22
        width = 0.15 * (1 + path / 20)
        mean = integrate.quad(lambda c: 0.5 / (1 + ((c - cosine) / width) ** 2), -1, 1)[0]
        ring = 1 / (1 + ((along / path - cosine) / width) ** 2) / mean
        bright = ring / (1 + (path / 12) ** 2)
    return energy * 0.6 * math.exp(-path / 25) * bright, time, 4 * (1 + path / 20)


# The response


def test_light_by_hand(kind, telescope):
    light = telescope.light(Z, telescope.sensors)
    for event in (0, 1):
        for sensor in (0, 17, 100, 131, 199):
            wanted = by_hand(kind, Z[event].tolist(), telescope.sensors[sensor].tolist())
            value = [float(part[event, sensor]) for part in light]
            assert value == pytest.approx(wanted, rel=1e-9)


def test_counts_are_integrals_of_the_intensity(telescope):
    counts = telescope.expected_counts(Z)
    first, last = telescope.window
    bright = int(counts[0].argmax())
    for event, sensor in [(0, bright), (0, 0), (0, 120), (1, 199), (1, 30)]:
        row = Z[event : event + 1]
        peak = float(telescope.light(row, telescope.sensors[sensor : sensor + 1]).time)
        x, y, height = telescope.sensors[sensor].tolist()

        def rate(t, at=(x, y, height), row=row):
            hit = torch.tensor([[[*at, t]]], dtype=torch.float64)
            return float(telescope.intensity(hit, row))

        points = sorted({first, *(p for p in (peak - 30, peak + 100) if first < p < last), last})
        value = sum(
            integrate.quad(rate, a, b, epsabs=1e-11, limit=200)[0] for a, b in pairwise(points)
        )
        assert float(counts[event, sensor]) == pytest.approx(value, rel=1e-7)


@pytest.mark.parametrize("distance", [1.0, 20.0, 80.0])
def test_the_ring_of_a_cascade_shines_once_over_the_sphere(distance):
    """Averaged over directions, light is A/(1 + ρ²/r₀²); close by, cos δ stays within ±d/ρ."""
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(400))
    z = Z[:1].repeat(400, 1)
    z[:, 1:4] = 0
    z[:, 4:] = torch.stack([(1 - nodes**2).sqrt(), torch.zeros(400), nodes], 1)
    at = torch.tensor([[0.0, 0.0, distance]], dtype=torch.float64)
    mean = float((weights * KINDS["cascade"].light(z, at).photons[:, 0]).sum()) / 2
    path = math.sqrt(distance**2 + 9)
    cosine, width = 0.22 / 0.299792458, 0.15 * (1 + path / 20)

    def average(edge):
        ring = integrate.quad(lambda c: 1 / (1 + ((c - cosine) / width) ** 2), -edge, edge)
        return ring[0] / edge

    share = average(distance / path) / average(1.0)
    isotropic = 40 * 0.6 * math.exp(-path / 25) / (1 + (path / 12) ** 2)
    assert mean == pytest.approx(isotropic * share, rel=1e-6)
    assert distance < 5 or share == pytest.approx(1, abs=0.02)


def test_simulated_counts_and_times_follow_the_response(telescope):
    n = 4000
    events = telescope.simulate(Z[:1].expand(n, -1), seed=3)
    expected = telescope.expected_counts(Z[:1])[0]
    real = torch.arange(events.hits.shape[1]) < events.lengths[:, None]
    hits = events.hits[real]
    x, y, height = ((hits[:, :3] + torch.tensor([50.0, 50.0, 52.5])) / torch.tensor([25, 25, 15])).T
    sensor = (40 * x + 8 * y + height).round().long()
    assert (hits[:, :3] - telescope.sensors[sensor]).abs().max() < 1e-4
    counts = torch.bincount(sensor, minlength=200)
    pulls = (counts / n - expected) / (expected / n).sqrt()
    assert pulls.square().mean() == pytest.approx(1, abs=0.4)
    total = events.lengths.double()
    assert float(total.mean()) == pytest.approx(float(expected.sum()), abs=0.4)
    assert float(total.var() / total.mean()) == pytest.approx(1, abs=0.1)

    brightest = int(expected.argmax())
    light = telescope.light(Z[:1], telescope.sensors[brightest : brightest + 1])
    times = hits[sensor == brightest, 3]
    noise = telescope.noise * 1100 / float(expected[brightest])
    assert noise < 0.01
    test = stats.kstest(
        times.numpy(),
        lambda t: (
            (1 - noise) * telescope.arrival_cdf(torch.as_tensor(t), light)[0].numpy()
            + noise * (t + 400) / 1100
        ),
    )
    assert test.pvalue > 1e-3


def test_log_prob_hits_by_hand(kind, telescope, events):
    part = events[:5]
    value = telescope.log_prob_hits(part.hits, part.lengths, part.z.double())
    for i in range(5):
        z = part.z[i].double().tolist()
        total = -float(telescope.expected_counts(part.z[i : i + 1].double()).sum())
        for x, y, height, time in part.hits[i, : int(part.lengths[i])].tolist():
            photons, flight, spread = by_hand(kind, z, (x, y, height))
            total += math.log(photons * stats.gumbel_r.pdf(time, flight, spread) + 1.2e-5)
        assert float(value[i]) == pytest.approx(total, abs=1e-4)


def test_likelihood_ratios_average_to_one(telescope):
    """E[p(x|z') / p(x|z)] = 1 over events of z, for p normalised over events of any length."""
    near = Z[:1].clone()
    near[:, 0] *= 1.05
    near[:, 1:4] += torch.tensor([0.05, -0.03, 0.06])
    turned = near[:, 4:] + torch.tensor([0.006, 0.003, -0.003], dtype=torch.float64)
    near[:, 4:] = turned / turned.norm()
    n = 6000
    events = telescope.simulate(Z[:1].expand(n, -1), seed=9)
    at = [
        telescope.log_prob_hits(events.hits, events.lengths, z.expand(n, -1)) for z in (Z[:1], near)
    ]
    ratio = (at[1] - at[0]).exp()
    assert float(ratio.std()) > 0.1
    assert float(ratio.mean()) == pytest.approx(1, abs=4 * float(ratio.std()) / math.sqrt(n))


def test_chunks_and_precision_do_not_matter(telescope, events, monkeypatch):
    whole = telescope.log_prob_hits(events.hits, events.lengths, events.z)
    monkeypatch.setattr(response_module, "_ELEMENTS", 3000)
    part = events[:60]
    pieces = telescope.log_prob_hits(part.hits, part.lengths, part.z)
    assert pieces.dtype == torch.float32
    assert pieces.numpy() == pytest.approx(whole[:60].numpy(), abs=1e-3)
    double = telescope.log_prob_hits(part.hits, part.lengths, part.z.double())
    assert double.dtype == torch.float64
    assert pieces.double().numpy() == pytest.approx(double.numpy(), abs=2e-3)


def test_likelihood_is_differentiable(telescope, events):
    z = Z.clone().requires_grad_()
    part = events[:2]
    telescope.log_prob_hits(part.hits, part.lengths, z).sum().backward()
    assert torch.isfinite(z.grad).all()
    assert (z.grad[:, :4].abs() > 0).all()


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_symmetric_about_the_vertical(telescope, events, turns):
    """Quarter turns map the strings onto each other; other angles do not."""
    part = events[:40]
    rotation = torch.tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]]).double()
    rotation = torch.linalg.matrix_power(rotation, turns)
    z, hits = part.z.double(), part.hits.double()
    turned = torch.cat([z[:, :1], z[:, 1:4] @ rotation.T, z[:, 4:] @ rotation.T], 1)
    moved = torch.cat([hits[..., :3] @ rotation.T, hits[..., 3:]], -1)
    first = telescope.log_prob_hits(hits, part.lengths, z)
    second = telescope.log_prob_hits(moved, part.lengths, turned)
    assert second.numpy() == pytest.approx(first.numpy(), abs=1e-8)
    only_labels = telescope.log_prob_hits(hits, part.lengths, turned)
    assert (first - only_labels).mean() > 5


def test_a_track_moves_with_the_speed_of_light():
    telescope = KINDS["track"]
    events = telescope.simulate(Z[:1].expand(50, -1), seed=2)
    shift = 20.0
    later = Z[:1].clone()
    later[:, 1:4] -= shift * 0.299792458 * Z[:1, 4:]
    hits = events.hits.clone()
    real = torch.arange(hits.shape[1]) < events.lengths[:, None]
    kept = real & (hits[..., 3] < 700 - shift)
    keep = (kept == real).all(1)
    hits[..., 3] += shift * kept
    first = telescope.log_prob_hits(
        events.hits[keep], events.lengths[keep], Z[:1].expand(50, -1)[keep]
    )
    second = telescope.log_prob_hits(hits[keep], events.lengths[keep], later.expand(50, -1)[keep])
    assert keep.sum() > 30
    assert second.numpy() == pytest.approx(first.numpy(), abs=1e-3)


# Events


def test_events_are_well_formed(telescope, events):
    hits, lengths = telescope.check_hits(events.hits, events.lengths)
    assert hits.dtype == torch.float32
    assert lengths.dtype == torch.int64
    assert 20 < float(lengths.double().mean()) < 60
    assert hits.shape[1] == int(lengths.max()) < 300
    for i in range(30):
        own = hits[i, : int(lengths[i])]
        assert (own[:, 3].diff() >= 0).all()
        assert (hits[i, int(lengths[i]) :] == 0).all()
    assert len(events[:7]) == 7
    assert len(events[events.lengths > 20]) == int((lengths > 20).sum())
    moved = events[:3].to(torch.float64)
    assert moved.hits.dtype == moved.z.dtype == torch.float64
    assert moved.lengths.dtype == torch.int64
    assert "N=2000" in repr(events)


def test_labels_follow_the_prior(telescope):
    z = telescope.sample_prior(20_000, seed=0)
    log_energy = stats.uniform(math.log(2), math.log(50))
    assert stats.kstest(z[:, 0].log().numpy(), log_energy.cdf).pvalue > 1e-4
    for column in z[:, 1:4].T:
        assert stats.kstest(column.numpy(), stats.uniform(-50, 100).cdf).pvalue > 1e-4
    for column in z[:, 4:].T:
        assert stats.kstest(column.numpy(), stats.uniform(-1, 2).cdf).pvalue > 1e-4
    # constant per ln E, m³ and steradian
    density = telescope.log_prior(z).double() + z[:, 0].double().log()
    volume = math.log(50) * 1e6 * 4 * math.pi
    assert density.numpy() == pytest.approx(-math.log(volume), abs=1e-4)
    outside = z[:3].clone()
    outside[0, 0], outside[1, 2], outside[2, 0] = 1.9, 50.1, 101.0
    assert torch.isinf(telescope.log_prior(outside)).all()


def test_labels_pack_and_unpack(events):
    named = events.labels
    assert named["energy"].shape == (2000,)
    assert named["position"].shape == named["direction"].shape == (2000, 3)
    assert torch.equal(Telescope3D.pack(named), events.z)
    assert torch.equal(Telescope3D.unpack(events.z)["direction"], events.z[:, 4:])
    assert named["direction"].norm(dim=1).sub(1).abs().max() < 1e-6


def test_randomness(telescope, events):
    state = torch.get_rng_state()
    again = telescope.sample(2000, torch.Generator().manual_seed(5))
    assert not torch.equal(telescope.sample(20, seed=6).z, events.z[:20])
    telescope.first_guess(events.hits[:5], events.lengths[:5])
    assert torch.equal(state, torch.get_rng_state())
    for name in ("z", "hits", "lengths"):
        assert torch.equal(getattr(events, name), getattr(again, name)), name
    double = telescope.sample(20, seed=5, dtype=torch.float64)
    assert double.hits.dtype == double.z.dtype == torch.float64


def test_nuisances_are_fields():
    dim = dataclasses.replace(KINDS["cascade"], light_yield=0.3)
    assert isinstance(dim, Telescope3D)
    signal = [t.expected_counts(Z).sum(1) - 1.2e-5 * 1100 * 200 for t in (KINDS["cascade"], dim)]
    assert (signal[0] / signal[1]).numpy() == pytest.approx(2)
    blurred = dataclasses.replace(KINDS["cascade"], scattering=10.0)
    assert (blurred.light(Z, blurred.sensors).spread > 1.2 * 4).all()


# Reconstruction


def test_first_guess_is_better_than_chance(kind, telescope, events):
    guess = telescope.first_guess(events.hits, events.lengths)
    assert guess["direction"].norm(dim=1).sub(1).abs().max() < 1e-5
    cosine = (guess["direction"] * events.labels["direction"]).sum(1)
    assert float(cosine.median()) > (0.95 if kind == "track" else 0.4)
    distance = (guess["position"] - events.labels["position"]).norm(dim=1)
    assert float(distance.median()) < 25
    log_ratio = (guess["energy"] / events.labels["energy"]).log()
    assert float(log_ratio.std()) < 0.5
    assert abs(float(log_ratio.median())) < 0.3
    assert all(torch.isfinite(value).all() for value in guess.values())


def test_first_guess_of_events_that_do_not_tell(telescope):
    hits = torch.zeros(3, 2, 4)
    hits[1:, :, :3] = torch.tensor([0.0, 0.0, 7.5])
    guess = telescope.first_guess(hits, torch.tensor([0, 1, 2]))
    assert torch.equal(guess["direction"][0], torch.tensor([0.0, 0.0, -1.0]))
    assert guess["position"][1].tolist() == pytest.approx([0.0, 0.0, 7.5], abs=1e-5)
    assert guess["energy"].tolist() == [2.0, 2.0, 2.0]


# The true posterior


def test_evidence_is_that_of_plain_draws_from_the_prior(telescope):
    """For an event without and one with a single hit, where the prior is proposal enough."""
    hits = torch.zeros(2, 1, 4)
    hits[1] = torch.tensor([[25.0, 0.0, 7.5, 130.0]])
    lengths = torch.tensor([0, 1])
    true = telescope.true_posterior(hits, lengths, particles=256, seed=1)
    z = telescope.sample_prior(60_000, seed=2)
    for i in range(2):
        joint = telescope.log_prob_hits(
            hits[i : i + 1].expand(len(z), -1, -1), lengths[i].expand(len(z)), z
        ).double()
        plain = float(joint.logsumexp(0)) - math.log(len(z))
        weight = joint.softmax(0)
        error = float(weight.square().sum().sqrt() + true.effective[i] ** -0.5)
        assert error < 0.16
        assert float(true.log_evidence[i]) == pytest.approx(plain, abs=4 * error)
        draws = true.samples[i].double()
        for column in range(7):
            wanted = float((weight * z[:, column]).sum())
            width = float(draws[:, column].std())
            assert float(draws[:, column].mean()) == pytest.approx(wanted, abs=4 * width * error)


def test_two_runs_of_the_posterior_agree(telescope, events):
    part = events[(events.lengths > 20) & (events.lengths < 40)][:2]
    runs = [telescope.true_posterior(part.hits, part.lengths, 256, seed=s) for s in (0, 1)]
    error = sum(1 / run.effective for run in runs).sqrt()
    assert error.max() < 0.15
    nll = [run.nll(part.z) for run in runs]
    assert ((nll[0] - nll[1]).abs() < 4 * error + 1e-3).all()
    assert nll[0].numpy() == pytest.approx(
        (
            runs[0].log_evidence - telescope.log_joint(part.hits, part.lengths, part.z.double())
        ).numpy(),
        abs=1e-3,
    )
    ratio = runs[0].direction_radius() / runs[1].direction_radius()
    assert ratio.log().abs().max() < 0.25
    assert (runs[0].mean_direction() * runs[1].mean_direction()).sum(1).min() > 0.97
    assert len(runs[0]) == 2
    assert "N=2" in repr(runs[0])
    outside = part.z.clone()
    outside[:, 1] = 60.0
    assert torch.isinf(runs[0].nll(outside)).all()


@pytest.mark.parametrize(
    ("count", "particles", "moves"),
    [(10, 96, 4), pytest.param(100, 512, 10, marks=pytest.mark.slow)],
)
def test_true_posterior_is_calibrated(telescope, events, count, particles, moves):
    part = events[:count]
    true = telescope.true_posterior(part.hits, part.lengths, particles, moves, seed=3)
    ranks = [(true.samples[..., i] < part.z[:, None, i]).double().mean(1) for i in range(7)]
    for level in (true.credibility(part.z), *ranks):
        assert stats.kstest(level.numpy(), "uniform").pvalue > 1e-3
    # more energy, more light, a better direction
    energy, radius = part.z[:, 0].log(), true.direction_radius().log()
    assert float(torch.corrcoef(torch.stack([energy, radius]))[0, 1]) < -0.5
    state = torch.get_rng_state()
    again = telescope.true_posterior(part.hits[:2], part.lengths[:2], 64, 2, seed=3)
    other = telescope.true_posterior(
        part.hits[:2], part.lengths[:2], 64, 2, torch.Generator().manual_seed(3)
    )
    assert torch.equal(again.samples, other.samples)
    assert torch.equal(state, torch.get_rng_state())


# Errors


HITS, ONE = torch.zeros(1, 2, 4), torch.tensor([1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Telescope3D(kind="shower"), "'cascade' or 'track'"),
        (lambda: Telescope3D(strings=(5, 0)), "strings as two positive whole numbers"),
        (lambda: Telescope3D(noise=0.0), "noise as a positive number"),
        (lambda: Telescope3D(speed=0.31), "that of light in vacuum"),
        (lambda: Telescope3D(energy_range=(5.0, 1.0)), "energy_range"),
        (lambda: Telescope3D(window=(5.0, 1.0)), "two increasing times"),
        (lambda: KINDS["track"].sample(0), "n as a whole number"),
        (lambda: KINDS["track"].sample(2, torch.Generator(), 3), "Give one of the two"),
        (lambda: KINDS["track"].simulate(Z[:0]), "at least one row"),
        (lambda: KINDS["track"].simulate(Z[:, :6]), r"z of shape \(N, 7\)"),
        (lambda: KINDS["track"].simulate(-Z), "column 0 of z"),
        (lambda: KINDS["track"].simulate(2 * Z), "Divide the direction by its length"),
        (lambda: KINDS["track"].simulate(Z * math.nan), "finite z"),
        (lambda: Telescope3D.pack({"energy": 1.0}), "named energy, position and direction"),
        (lambda: Telescope3D.unpack(torch.zeros(3, 6)), r"z of shape \(..., 7\)"),
        (lambda: KINDS["track"].first_guess(HITS[..., :3], ONE), "hits of shape"),
        (lambda: KINDS["track"].first_guess(HITS, ONE + 2), "lengths between 0 and 2"),
        (lambda: KINDS["track"].first_guess(HITS, ONE), "row 0, hit 0. Pass hits in metres"),
        (lambda: KINDS["track"].log_prob_hits(HITS, 0 * ONE, Z), "one hit list per label"),
        (lambda: KINDS["track"].true_posterior(HITS, 0 * ONE, 65), "particles as an even number"),
        (lambda: KINDS["track"].true_posterior(HITS[:0], ONE[:0]), "at least one event"),
        (
            lambda: KINDS["track"].true_posterior(HITS, 0 * ONE, 64, 1, seed=0).nll(Z),
            "one label per event",
        ),
        (
            lambda: (
                KINDS["track"].true_posterior(HITS, 0 * ONE, 64, 1, seed=0).direction_radius(1.5)
            ),
            "level between 0 and 1",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_events_are_frozen(events):
    assert isinstance(events, Telescope3DEvents)
    with pytest.raises(dataclasses.FrozenInstanceError):
        events.z = Z
