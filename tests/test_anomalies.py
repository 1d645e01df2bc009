"""Anomalous events: counts are conserved, images are histograms of hits, hits are in time order."""

import dataclasses
import math

import pytest
import torch

from flowpost.simulators import Telescope, Telescope3D
from flowpost.simulators.anomalies import dead_string, overlay, track_like

FLAT = Telescope()
SOLID = {kind: Telescope3D(kind=kind) for kind in ("cascade", "track")}
CASES = {"flat": FLAT, **SOLID}
DTYPES = {"single": torch.float32, "double": torch.float64}


@pytest.fixture(scope="module", params=CASES)
def case(request):
    return request.param


@pytest.fixture(scope="module")
def telescope(case):
    return CASES[case]


@pytest.fixture(scope="module", params=DTYPES)
def events(request, telescope):
    return telescope.sample(400, seed=1).to(DTYPES[request.param])


def real_hits(events):
    return torch.arange(events.hits.shape[1]) < events.lengths[:, None]


def histogram(telescope, events):
    """The images of the hits, from their positions and times."""
    bins, rows, columns = telescope.image_shape
    event, hit = real_hits(events).nonzero().T
    x, y, time = events.hits[event, hit].double().T
    column, row = (x / 20 + 3.5).round().long(), (y / 20 + 3.5).round().long()
    edges = torch.tensor(telescope.time_edges[1:-1], dtype=torch.float64)
    images = torch.zeros(len(events), bins, rows, columns, dtype=events.images.dtype)
    ones = torch.ones(len(event), dtype=images.dtype)
    place = (event, torch.bucketize(time.contiguous(), edges), row, column)
    return images.index_put(place, ones, accumulate=True)


def check(telescope, events, dtype):
    """What holds of all events."""
    telescope.check_hits(events.hits, events.lengths)
    assert events.hits.dtype == events.z.dtype == dtype
    assert events.lengths.dtype == torch.int64
    assert events.hits.shape[1] == max(1, int(events.lengths.max()))
    real = real_hits(events)
    times = events.hits[..., -1].masked_fill(~real, math.inf)
    assert (times[:, 1:] >= times[:, :-1]).all()
    assert (events.hits[~real] == 0).all()
    if isinstance(telescope, Telescope):
        assert events.images.dtype == dtype
        assert torch.equal(events.images, histogram(telescope, events))


def strings(telescope, hits):
    """Index of the string of every hit, by looking for its sensor."""
    if isinstance(telescope, Telescope):
        places = telescope.sensors[: telescope.columns, 0]
        return (hits[..., :1] - places).abs().argmin(-1)
    places = telescope.sensors[:: telescope.sensors_per_string, :2]
    return (hits[..., None, :2] - places).abs().sum(-1).argmin(-1)


def sorted_rows(*hits):
    """All hits as a sorted list, to compare as sets."""
    return sorted(tuple(row) for part in hits for row in part.tolist())


# Two events at once


def test_overlay_holds_the_hits_of_both(telescope, events):
    first, second = events[:150], events[150:300]
    both = overlay(first, second)
    check(telescope, both, events.z.dtype)
    assert torch.equal(both.lengths, first.lengths + second.lengths)
    assert torch.equal(both.z, first.z)
    for i in range(30):
        parts = [part.hits[i, : int(part.lengths[i])] for part in (first, second)]
        assert sorted_rows(both.hits[i, : int(both.lengths[i])]) == sorted_rows(*parts)
    if isinstance(telescope, Telescope):
        assert torch.equal(both.images, first.images + second.images)
        assert torch.equal(both.angle, first.angle)
    swapped = overlay(second, first)
    assert torch.equal(swapped.lengths, both.lengths)
    assert torch.equal(swapped.hits[..., -1], both.hits[..., -1])


def test_overlay_takes_dtype_from_the_first(telescope, events):
    dtype = events.z.dtype
    other = torch.float32 if dtype == torch.float64 else torch.float64
    check(telescope, overlay(events[:50], events[50:100].to(other)), dtype)


def test_overlay_with_an_event_without_hits_changes_nothing(telescope, events):
    nothing = dead_string(telescope, events[:60], 0)
    count = telescope.columns if isinstance(telescope, Telescope) else 25
    for string in range(1, count):
        nothing = dead_string(telescope, nothing, string)
    assert int(nothing.lengths.max()) == 0
    check(telescope, nothing, events.z.dtype)
    same = overlay(events[:60], nothing)
    longest = int(events.lengths[:60].max())
    assert torch.equal(same.hits, events.hits[:60, :longest])
    assert torch.equal(overlay(nothing, events[:60]).hits, same.hits)
    assert len(overlay(events[:0], events[:0])) == 0


def test_noise_can_be_had_once(telescope):
    quiet = telescope.sample(2000, seed=2, nuisance={"noise": 1e-9, "light_yield": 1e-9})
    assert int(quiet.lengths.max()) == 0


# A dead string


@pytest.mark.parametrize("string", ["random", "brightest", 3, "each"])
def test_dead_string_sees_nothing_and_others_all(telescope, events, string):
    each = torch.arange(len(events)) % 8
    rule = each if string == "each" else string
    dead = dead_string(telescope, events, rule, seed=3)
    check(telescope, dead, events.z.dtype)
    assert torch.equal(dead.z, events.z)
    owner, real = strings(telescope, events.hits), real_hits(events)
    count = telescope.columns if isinstance(telescope, Telescope) else 25
    seen = torch.stack([((owner == s) & real).sum(1) for s in range(count)], 1)
    left = strings(telescope, dead.hits)
    left = torch.stack([((left == s) & real_hits(dead)).sum(1) for s in range(count)], 1)
    lost = seen - left
    assert (lost >= 0).all()
    assert ((lost > 0).sum(1) <= 1).all()
    assert torch.equal(dead.lengths, events.lengths - lost.sum(1))
    touched = lost.sum(1) > 0
    killed = lost.argmax(1)
    assert (left.gather(1, killed[:, None])[:, 0][touched] == 0).all()
    if string == "brightest":
        assert torch.equal(lost.amax(1), seen.amax(1))
        assert torch.equal(killed[touched], seen.argmax(1)[touched])
    elif string == "random":
        spread = torch.bincount(killed[touched], minlength=count)
        assert (spread > 0).all()
        assert lost.amax(1).double().mean() < seen.amax(1).double().mean()
    else:
        assert torch.equal(
            lost.sum(1), seen[torch.arange(len(seen)), each if string == "each" else 3]
        )
        assert (killed[touched] == (each[touched] if string == "each" else 3)).all()
    for i in range(20):
        kept = events.hits[i][real[i] & ((owner[i] != killed[i]) | ~touched[i])]
        assert torch.equal(dead.hits[i, : len(kept)], kept)


def test_dead_strings_are_equally_likely(telescope):
    """Among 4000 events that hit every string once."""
    flat = isinstance(telescope, Telescope)
    places = telescope.sensors[:8] if flat else telescope.sensors[::8]
    count = len(places)
    hits = torch.cat([places, torch.zeros(count, 1)], 1).float().expand(4000, -1, -1)
    some = telescope.sample(4000, seed=0)
    made = dataclasses.replace(some, hits=hits, lengths=torch.full((4000,), count))
    dead = dead_string(telescope, made, seed=4)
    assert (dead.lengths == count - 1).all()
    killed = 4000 - torch.bincount(strings(telescope, dead.hits).flatten(), minlength=count)
    chi2 = float((killed - 4000 / count).square().sum()) / (4000 / count)
    assert chi2 < count + 4 * math.sqrt(2 * count)


def test_dead_string_can_be_repeated(telescope, events):
    state = torch.get_rng_state()
    one, two, three = (
        dead_string(telescope, events, seed=5),
        dead_string(telescope, events, generator=torch.Generator().manual_seed(5)),
        dead_string(telescope, events, seed=6),
    )
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(one.hits, two.hits)
    assert not torch.equal(one.lengths, three.lengths)
    torch.manual_seed(7)
    assert not torch.equal(dead_string(telescope, events).lengths, one.lengths)


# Cascades in a row


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_track_like_follows_the_sum_of_its_pieces(dtype):
    n, pieces, length = 4000, 5, 90.0
    nuisance = {"light_yield": 1.2, "scattering": 0.8, "noise": 2.0}
    z = torch.tensor([[-40.0, 10.0, 60.0]], dtype=dtype)
    angle = torch.tensor([-0.3], dtype=dtype)
    events = track_like(
        FLAT, z.expand(n, -1), angle.expand(n), length, pieces, seed=1, nuisance=nuisance
    )
    check(FLAT, events, dtype)
    assert torch.equal(events.z, z.expand(n, -1))
    assert torch.equal(events.angle, angle.expand(n))
    total = torch.zeros(FLAT.image_shape, dtype=torch.float64)
    for k in range(pieces):
        along = (k + 0.5) * length / pieces
        # an event that is later by t is one in a window that is earlier by t
        edges = tuple(t - along / 0.299792458 for t in FLAT.time_edges)
        moved = dataclasses.replace(FLAT, time_edges=edges)
        x, y = -40 + along * math.cos(-0.3), 10 + along * math.sin(-0.3)
        at = torch.tensor([[x, y, 60.0 / pieces]], dtype=torch.float64)
        part = nuisance | {"noise": 2.0 / pieces}
        total += moved.expected_images(at, angle.double(), part)[0]
    pulls = (events.images.mean(0) - total) / (total / n).sqrt()
    assert pulls.square().mean() == pytest.approx(1, abs=0.4)
    counts = events.lengths.double()
    assert float(counts.mean()) == pytest.approx(float(total.sum()), abs=0.5)
    assert float(counts.var() / counts.mean()) == pytest.approx(1, abs=0.1)


def test_a_short_track_is_a_cascade():
    z, angle = FLAT.sample_prior(3000, seed=2)
    short = track_like(FLAT, z, angle, 1e-3, 4, seed=3)
    mean = FLAT.expected_images(z.double(), angle.double()).mean(0)
    pulls = (short.images.mean(0) - mean) / (mean / 3000).sqrt()
    assert pulls.square().mean() == pytest.approx(1, abs=0.4)
    fits = FLAT.log_prob_images(short.images, z, angle).mean()
    cascades = FLAT.simulate(z, angle, seed=4)
    assert float(fits) == pytest.approx(
        float(FLAT.log_prob_images(cascades.images, z, angle).mean()), abs=1.5
    )


def test_events_do_not_depend_on_how_they_are_chunked(monkeypatch):
    z, angle = FLAT.sample_prior(50, seed=2)
    length = torch.linspace(20, 150, 50)
    monkeypatch.setattr("flowpost.simulators.telescope.events._CHUNK", 21)
    made = track_like(FLAT, z, angle, length, 10, seed=3)
    check(FLAT, made, torch.float32)
    assert torch.equal(made.images.sum((1, 2, 3)).long(), made.lengths)
    monkeypatch.setattr("flowpost.simulators.telescope.events._CHUNK", 4096)
    whole = track_like(FLAT, z, angle, length, 10, seed=3)
    # other random numbers, the same expectation
    difference = (whole.lengths - made.lengths).double().sum()
    assert abs(float(difference)) < 5 * math.sqrt(float((whole.lengths + made.lengths).sum()))


def test_track_like_can_be_repeated():
    z, angle = FLAT.sample_prior(40, seed=2)
    state = torch.get_rng_state()
    first = track_like(FLAT, z, angle, seed=3)
    second = track_like(FLAT, z, angle, generator=torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first.hits, second.hits)
    assert not torch.equal(first.images, track_like(FLAT, z, angle, seed=4).images)


def test_anomalies_fit_their_labels_worse():
    """The exact likelihood at the true labels falls; it would not for events of the simulation."""
    events = FLAT.sample(600, seed=6)
    events = events[events.z[:, 2] > 20]
    others = FLAT.simulate(*FLAT.sample_prior(len(events), seed=7), seed=8)
    made = {
        "overlay": overlay(events, others),
        "brightest": dead_string(FLAT, events, "brightest"),
        "track": track_like(FLAT, events.z, events.angle, seed=9),
        "light": FLAT.simulate(events.z, events.angle, seed=9, nuisance={"light_yield": 1.5}),
        "noise": FLAT.simulate(events.z, events.angle, seed=9, nuisance={"noise": 3.0}),
        "none": FLAT.simulate(events.z, events.angle, seed=9),
    }
    fit = FLAT.log_prob_images(events.images, events.z, events.angle)
    fall = {
        name: fit - FLAT.log_prob_images(e.images, events.z, events.angle)
        for name, e in made.items()
    }
    pull = {name: float(f.mean() / f.std()) * math.sqrt(len(f)) for name, f in fall.items()}
    assert abs(pull.pop("none")) < 4
    assert min(pull.values()) > 4


# Errors

EVENTS = FLAT.sample(4, seed=0)
HITS = SOLID["track"].sample(4, seed=0)
ONE = EVENTS.z, EVENTS.angle


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: overlay(EVENTS, HITS), "got TelescopeEvents and Telescope3DEvents"),
        (lambda: overlay(EVENTS.z, EVENTS.z), "one kind of telescope; got Tensor and Tensor"),
        (lambda: overlay(HITS, HITS[:3]), "as many others as events; got 3 and 4"),
        (
            lambda: overlay(EVENTS, Telescope(rows=4).sample(4, seed=0)),
            "images of others of shape .* Use one telescope",
        ),
        (lambda: dead_string(FLAT, HITS), "its events; got Telescope and Telescope3DEvents"),
        (lambda: dead_string(Telescope(spacing=15.0), EVENTS), "hits at a sensor"),
        (lambda: dead_string(Telescope(time_edges=(-20.0, 300.0)), EVENTS), "images of shape"),
        (lambda: dead_string(SOLID["track"], HITS, "nearest"), "'brightest' or indices; got 'near"),
        (lambda: dead_string(SOLID["track"], HITS, None), "or indices; got None"),
        (lambda: dead_string(SOLID["track"], HITS, 25), "between 0 and 24; got 25 in row 0"),
        (lambda: dead_string(FLAT, EVENTS, [0, 7, -1, 2]), "between 0 and 7; got -1 in row 2"),
        (lambda: dead_string(FLAT, EVENTS, torch.ones(4)), "whole numbers; got torch.float32"),
        (lambda: dead_string(FLAT, EVENTS, [1, 2]), r"string of shape \(4,\)"),
        (
            lambda: dead_string(FLAT, EVENTS, generator=torch.Generator(), seed=1),
            "Give one of the two",
        ),
        (lambda: track_like(SOLID["track"], HITS.z, HITS.z[:, 0]), "Telescope; got Telescope3D"),
        (lambda: track_like(FLAT, EVENTS.z[:, :2], EVENTS.angle), "z of shape"),
        (lambda: track_like(FLAT, EVENTS.z[:0], EVENTS.angle[:0]), "at least one row"),
        (lambda: track_like(FLAT, *ONE, pieces=1), "pieces as a whole number of at least 2"),
        (lambda: track_like(FLAT, *ONE, length=0.0), "positive lengths; got 0 in row 0"),
        (lambda: track_like(FLAT, *ONE, length=[1, 2, math.nan, 3]), "finite length"),
        (lambda: track_like(FLAT, *ONE, length=torch.ones(3)), r"length of shape \(4,\)"),
        (lambda: track_like(FLAT, *ONE, nuisance={"noise": 0.0}), "nuisance 'noise'"),
        (
            lambda: track_like(FLAT, *ONE, generator=torch.Generator(), seed=1),
            "Give one of the two",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
