"""Distances of samples against scipy, POT and their definitions; gradients, weights, errors."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from scipy import stats
from scipy.spatial.distance import cdist
from torch.autograd import gradcheck

from flowpost.metrics import (
    distance_correlation,
    energy_distance,
    sliced_wasserstein,
    symmetric_kl,
    wasserstein_1d,
)

TIGHT = {"rel": 1e-12, "abs": 1e-12}
SLICED = partial(sliced_wasserstein, projections=torch.eye(3).double())
# each with the columns that it takes
PAIRS = {
    "kl": (symmetric_kl, 3),
    "w1": (wasserstein_1d, 1),
    "w2": (partial(wasserstein_1d, p=2), 1),
    "w3": (partial(wasserstein_1d, p=3), 1),
    "sliced 1": (partial(SLICED, p=1), 3),
    "sliced 2": (SLICED, 3),
    "energy U": (energy_distance, 3),
    "energy V": (partial(energy_distance, unbiased=False), 3),
    "energy U, blocks": (partial(energy_distance, chunk=2), 3),
}
CORRELATIONS = {
    "correlation": distance_correlation,
    "correlation, blocks": partial(distance_correlation, chunk=3),
    "bias-corrected": partial(distance_correlation, unbiased=True),
    "bias-corrected, blocks": partial(distance_correlation, unbiased=True, chunk=3),
}


def pair(n=37, m=51, columns=1, seed=0):
    """Two samples and their weights, of float64."""
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(k, columns, generator=g, dtype=torch.float64) for k in (n, m))
    wx, wy = (torch.rand(k, generator=g, dtype=torch.float64) + 0.1 for k in (n, m))
    return x, y + 0.3, wx, wy


def one_hot(mix, events=100):
    eye = 30 * torch.eye(len(mix), dtype=torch.float64)
    return torch.cat([eye[k].expand(round(events * f), -1) for k, f in enumerate(mix)])


@pytest.fixture
def ot():
    return pytest.importorskip("ot")


# references


def test_kl_of_means_not_of_geometric_means():
    x, y = one_hot([0.25] * 4), one_hot([0.7, 0.1, 0.1, 0.1])
    p, q = torch.full((4,), 0.25), torch.tensor([0.7, 0.1, 0.1, 0.1])
    assert float(symmetric_kl(x, y)) == pytest.approx(0.438, abs=5e-4)
    assert float(symmetric_kl(x, y)) == pytest.approx(
        float(((p - q) * (p / q).log()).sum() / 2), rel=1e-6
    )
    a, b = (v.log_softmax(1).mean(0) for v in (x, y))
    geometric = (a.exp() - b.exp()) * (a - b) / 2
    assert float(geometric.sum()) == pytest.approx(8.3e-4, rel=0.01)
    assert float(geometric.mean()) == pytest.approx(2.1e-4, rel=0.02)  # averaged over classes too


@pytest.mark.parametrize("weighted", [False, True])
def test_kl_against_scipy(weighted):
    x, y, wx, wy = pair(columns=4)
    weights = (wx, wy) if weighted else (None, None)
    p, q = (
        np.average(v.softmax(1).numpy(), axis=0, weights=None if w is None else w.numpy())
        for v, w in zip((x, y), weights, strict=True)
    )
    expected = (stats.entropy(p, q) + stats.entropy(q, p)) / 2
    assert float(symmetric_kl(x, y, *weights)) == pytest.approx(expected, **TIGHT)


WEIGHTINGS = pytest.mark.parametrize("weighting", ["none", "both", "one"])


def chosen(weighting, wx, wy):
    return {"none": (None, None), "both": (wx, wy), "one": (wx, None)}[weighting]


@WEIGHTINGS
@pytest.mark.parametrize("sizes", [(37, 51), (40, 40), (1, 7)])
def test_one_dimension_against_scipy(weighting, sizes):
    x, y, wx, wy = pair(*sizes)
    weights = chosen(weighting, wx, wy)
    args = [x[:, 0].numpy(), y[:, 0].numpy(), *(None if w is None else w.numpy() for w in weights)]
    found = wasserstein_1d(x[:, 0], y, *weights)
    assert float(found) == pytest.approx(stats.wasserstein_distance(*args), **TIGHT)
    found = energy_distance(x, y[:, 0], *weights, unbiased=False)
    assert float(found) == pytest.approx(stats.energy_distance(*args) ** 2, **TIGHT)


@WEIGHTINGS
@pytest.mark.parametrize("p", [1, 2, 3])
def test_wasserstein_against_pot(ot, weighting, p):
    x, y, wx, wy = pair()
    wx, wy = wx / wx.sum(), wy / wy.sum()
    weights = chosen(weighting, wx, wy)
    args = [None if w is None else w.numpy() for w in weights]
    expected = ot.wasserstein_1d(x[:, 0].numpy(), y[:, 0].numpy(), *args, p=p) ** (1 / p)
    assert float(wasserstein_1d(x, y, *weights, p=p)) == pytest.approx(expected, **TIGHT)


@WEIGHTINGS
@pytest.mark.parametrize("p", [1, 2])
def test_sliced_against_pot(ot, weighting, p):
    x, y, wx, wy = pair(columns=4)
    weights = chosen(weighting, wx / wx.sum(), wy / wy.sum())
    directions = ot.sliced.get_random_projections(4, 30, 0)
    expected = ot.sliced_wasserstein_distance(
        x.numpy(),
        y.numpy(),
        *(None if w is None else w.numpy() for w in weights),
        projections=directions,
        p=p,
    )
    found = sliced_wasserstein(x, y, *weights, p=p, projections=torch.from_numpy(directions.T))
    assert float(found) == pytest.approx(expected, **TIGHT)


@WEIGHTINGS
@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("chunk", [2048, 10])
def test_energy_against_all_pairs(weighting, unbiased, chunk):
    x, y, wx, wy = pair(columns=4)
    weights = chosen(weighting, wx, wy)
    u, v = (
        np.ones(len(s)) if w is None else w.numpy() for s, w in zip((x, y), weights, strict=True)
    )

    def mean(a, b, wa, wb, without=0.0):
        return wa @ cdist(a.numpy(), b.numpy()) @ wb / (wa.sum() * wb.sum() - without)

    less = [w @ w if unbiased else 0.0 for w in (u, v)]
    expected = 2 * mean(x, y, u, v) - mean(x, x, u, u, less[0]) - mean(y, y, v, v, less[1])
    found = energy_distance(x, y, *weights, unbiased=unbiased, chunk=chunk)
    assert float(found) == pytest.approx(expected, **TIGHT)


def test_energy_against_pot_distances(ot):
    x, y, _, _ = pair(columns=4)
    between, xx, yy = (
        float(ot.dist(a, b, metric="euclidean").mean()) for a, b in ((x, y), (x, x), (y, y))
    )
    found = energy_distance(x, y, unbiased=False)
    # POT's distance of an event to itself is of order 1e-8
    assert float(found) == pytest.approx(2 * between - xx - yy, abs=1e-8)


def test_energy_of_signed_weights():
    """Events of weight −1 take away what the same events of weight 1 add."""
    x, y, wx, _ = pair(columns=2)
    both, weights = torch.cat([x, y[:5], y[:5]]), torch.cat([wx, torch.ones(5), -torch.ones(5)])
    expected = energy_distance(x, y, wx, unbiased=False)
    found = energy_distance(both, y, weights, unbiased=False, signed_weights=True)
    assert float(found) == pytest.approx(float(expected), **TIGHT)


def defined_correlation(x, y, w):
    """Square of the distance correlation from its definition."""
    w = w / w.sum()
    centred = []
    for v in (x, y):
        d = cdist(v, v)
        row = d @ w
        centred.append(d - row[:, None] - row[None] + w @ row)
    a, b = centred
    ww = np.outer(w, w)
    return (ww * a * b).sum() / np.sqrt((ww * a * a).sum() * (ww * b * b).sum())


def defined_corrected(x, y):
    """Székely and Rizzo 2014, eqs. 2.1 and 2.4."""
    n, centred = len(x), []
    for v in (x, y):
        d = cdist(v, v)
        row = d.sum(1)
        u = d - (row[:, None] + row[None]) / (n - 2) + d.sum() / ((n - 1) * (n - 2))
        np.fill_diagonal(u, 0.0)
        centred.append(u)
    a, b = centred
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum())


@pytest.mark.parametrize("chunk", [2048, 7])
def test_correlation_against_its_definition(chunk):
    x, y, w, _ = pair(40, 40, 3)
    y = (y[:, :2] + x[:, :2].square()).numpy()
    for weight, used in ((None, torch.ones(40)), (w, w)):
        found = distance_correlation(x, y, weight, chunk=chunk)
        expected = defined_correlation(x.numpy(), y, used.double().numpy()) ** 0.5
        assert float(found) == pytest.approx(expected, **TIGHT)
    found = distance_correlation(x, y, unbiased=True, chunk=chunk)
    assert float(found) == pytest.approx(defined_corrected(x.numpy(), y), **TIGHT)


# properties


@pytest.mark.parametrize("name", PAIRS)
def test_distance_of_a_sample_to_itself(name):
    metric, columns = PAIRS[name]
    x, _, w, _ = pair(columns=columns)
    x.requires_grad_()
    value = metric(x, x.detach().flip(0), w, w.flip(0))
    (slope,) = torch.autograd.grad(value, x)
    assert torch.isfinite(slope).all()
    if name.startswith("energy U"):
        assert float(value.detach()) < 0
    else:
        assert float(value.detach()) == pytest.approx(0, abs=1e-7)


@pytest.mark.parametrize("name", PAIRS)
def test_whole_weights_are_repetitions(name):
    metric, columns = PAIRS[name]
    x, y, _, _ = pair(20, 30, columns)
    g = torch.Generator().manual_seed(1)
    counts = torch.randint(0, 4, (20,), generator=g)
    if name.startswith("energy U"):  # repeated events are pairs, a weighted one is not
        counts = (counts > 1).long()
    repeated = metric(x.repeat_interleave(counts, 0), y)
    assert float(metric(x, y, 5.0 * counts)) == pytest.approx(float(repeated), **TIGHT)


def test_whole_weights_of_a_correlation_are_repetitions():
    x, y, _, _ = pair(20, 20, 2)
    counts = torch.arange(20) % 3
    repeated = distance_correlation(*(v.repeat_interleave(counts, 0) for v in (x, y)))
    assert float(distance_correlation(x, y, counts)) == pytest.approx(float(repeated), **TIGHT)


@pytest.mark.parametrize("name", PAIRS)
def test_gradients(name):
    metric, columns = PAIRS[name]
    x, y, wx, wy = (v.requires_grad_() for v in pair(5, 7, columns))
    assert gradcheck(metric, (x, y))
    assert gradcheck(metric, (x, y, wx, wy))


@pytest.mark.parametrize("name", CORRELATIONS)
def test_gradients_of_correlations(name):
    x, y, w, _ = (v.requires_grad_() for v in pair(7, 7, 2))
    assert gradcheck(CORRELATIONS[name], (x, y))
    if "bias" not in name:
        assert gradcheck(CORRELATIONS[name], (x, y, w))


@pytest.mark.parametrize("name", PAIRS)
def test_gradients_are_finite_at_ties(name):
    metric, columns = PAIRS[name]
    x = torch.zeros(6, columns, dtype=torch.float64, requires_grad=True)
    y = torch.zeros(4, columns, dtype=torch.float64, requires_grad=True)
    w = torch.tensor([0.0, 1.0, 1.0, 0.0, 2.0, 0.0], dtype=torch.float64, requires_grad=True)
    for args in ((x, y), (x, y, w)):
        value = metric(*args)
        assert float(value.detach()) == pytest.approx(0, abs=1e-12)
        for slope in torch.autograd.grad(value, args):
            assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", CORRELATIONS)
def test_correlation_of_a_constant_is_zero(name):
    x = torch.ones(8, 2, dtype=torch.float64, requires_grad=True)
    y = pair(8, 8)[1].requires_grad_()
    value = CORRELATIONS[name](x, y)
    assert float(value.detach()) == 0
    for slope in torch.autograd.grad(value, (x, y)):
        assert torch.isfinite(slope).all()


@pytest.mark.parametrize("name", CORRELATIONS)
def test_correlation_of_a_line_is_one_whatever_its_units(name):
    x, y, _, _ = pair(30, 30, 2)
    assert float(CORRELATIONS[name](x, 1e-9 * x)) == pytest.approx(1, rel=1e-9)
    found = float(CORRELATIONS[name](x, y))
    assert float(CORRELATIONS[name](1e6 * x + 3, y)) == pytest.approx(found, rel=1e-7)


def test_unbiased_ones_are_zero_on_average_and_others_not():
    g = torch.Generator().manual_seed(0)
    values = {"U": [], "V": [], "corrected": [], "correlation": [], "weighted U": []}
    for _ in range(400):
        x, y = torch.randn(2, 40, 3, generator=g)
        w = torch.rand(40, generator=g)
        values["U"].append(energy_distance(x, y))
        values["V"].append(energy_distance(x, y, unbiased=False))
        values["weighted U"].append(energy_distance(x, y, w))
        values["corrected"].append(distance_correlation(x, y, unbiased=True))
        values["correlation"].append(distance_correlation(x, y))
    pulls = {k: float(torch.stack(v).mean() / torch.stack(v).std()) * 20 for k, v in values.items()}
    for name in ("U", "corrected", "weighted U"):
        assert abs(pulls[name]) < 3.5
    assert pulls["V"] > 20
    assert pulls["correlation"] > 20


def test_distance_of_two_batches_of_the_same_normal():
    """E[W1] = 1.82 σ/√n: what a training can lower by shrinking its outputs."""
    x, y = 3 * torch.randn(2, 1000, 400, generator=torch.Generator().manual_seed(0))
    mean = torch.stack([wasserstein_1d(a, b) for a, b in zip(x, y, strict=True)]).mean()
    assert float(mean) == pytest.approx(1.82 * 3 / 400**0.5, rel=0.05)


def test_directions_are_of_the_generator():
    x, y, _, _ = pair(columns=3)
    state = torch.get_rng_state()
    first, again, other = (
        sliced_wasserstein(x, y, generator=torch.Generator().manual_seed(s)) for s in (0, 0, 1)
    )
    assert torch.equal(state, torch.get_rng_state())
    assert first == again != other
    assert sliced_wasserstein(x, y, projections=3) != sliced_wasserstein(x, y, projections=3)
    state = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    two = [
        sliced_wasserstein(x, y, projections=n, generator=g)
        for n, g in zip((3, np.int64(3)), state, strict=True)
    ]
    assert two[0] == two[1]
    columns = [wasserstein_1d(x[:, k], y[:, k]) for k in range(3)]
    found = sliced_wasserstein(x, y, p=1, projections=torch.eye(3))
    assert float(found) == pytest.approx(float(torch.stack(columns).mean()), **TIGHT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", PAIRS)
def test_dtypes(name, dtype):
    metric, columns = PAIRS[name]
    x, y, wx, wy = (v.to(dtype) for v in pair(columns=columns))
    kept = dtype if dtype in (torch.float32, torch.float64) else torch.float32
    value = metric(x, y, wx, wy)
    assert value.dtype == kept
    exact = metric(*(v.double() for v in (x, y, wx, wy)))
    assert float(value) == pytest.approx(float(exact), abs=1e-5)


def test_confident_logits_stay_finite():
    x = torch.tensor([[1e4, 0.0]], requires_grad=True)
    value = symmetric_kl(x, torch.tensor([[0.0, 1e4]]))
    assert float(value.detach()) == pytest.approx(1e4, rel=1e-5)
    assert torch.isfinite(torch.autograd.grad(value, x)[0]).all()


@pytest.mark.parametrize("correlation", [False, True])
def test_memory_does_not_grow_with_pairs(correlation):
    x = torch.randn(600, 2, requires_grad=True)
    y = torch.randn(600, 2)
    stored = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: stored.append(t.numel()) or t, lambda t: t
    ):
        value = (distance_correlation if correlation else energy_distance)(x, y, chunk=60)
        assert max(stored) < 20 * 600
        assert sum(stored) < 600**2 / 4
    (slope,) = torch.autograd.grad(value, x)
    whole = (distance_correlation if correlation else energy_distance)(x, y)
    assert torch.allclose(slope, torch.autograd.grad(whole, x)[0], atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator")
@pytest.mark.parametrize("name", [*PAIRS, *CORRELATIONS])
def test_an_accelerator_gives_the_same(name):
    if name in PAIRS:
        metric, columns = PAIRS[name]
        args = pair(columns=columns)
    else:
        metric, args = CORRELATIONS[name], pair(40, 40, 2)[:2]
    there = metric(*(v.cuda() for v in args))
    assert there.device.type == "cuda"
    assert float(there) == pytest.approx(float(metric(*args)), rel=1e-10)


# errors

X = torch.zeros(4)
BAD = [
    (lambda: wasserstein_1d(torch.zeros(0), X), "at least one event in x"),
    (lambda: energy_distance(X, torch.zeros(2, 2, 2)), r"Expected y of shape \(N,\) or \(N, D\)"),
    (lambda: energy_distance(torch.zeros(4, 2), X), "same columns; got 2 and 1"),
    (lambda: energy_distance(X, X.clone().fill_(math.nan)), "finite y; got nan in row 0"),
    (lambda: energy_distance("x", X), "Expected x as a tensor"),
    (lambda: energy_distance(X, X, torch.ones(3)), r"weight_x of shape \(4,\); got \(3,\)"),
    (lambda: energy_distance(X, X, None, -torch.ones(4)), "Set signed_weights=True"),
    (lambda: wasserstein_1d(X, X, -torch.ones(4)), "Only energy_distance takes negative"),
    (lambda: wasserstein_1d(X, X, torch.zeros(4)), "weight_x with a positive sum; got 0"),
    (lambda: wasserstein_1d(X, X, X / 0), "finite weight_x"),
    (lambda: wasserstein_1d(torch.zeros(4, 2), torch.zeros(4, 2)), "of one column; got 2"),
    (lambda: wasserstein_1d(X, X, p=0.5), "at least 1; got 0.5"),
    (lambda: symmetric_kl(X, X), "two classes; got one column. Put zeros"),
    (lambda: symmetric_kl(torch.full((2, 2), -math.inf), torch.zeros(2, 2)), "finite x"),
    (lambda: energy_distance(X[:1], X), "at least two events of non-zero weight in x"),
    (lambda: energy_distance(X, X, None, torch.eye(4)[0]), "unbiased=False"),
    (lambda: energy_distance(X, X, chunk=0), "chunk as a whole number"),
    (lambda: sliced_wasserstein(X, X, projections=0), "projections as a whole number"),
    (lambda: sliced_wasserstein(X, X, projections=torch.eye(2)), r"projections of shape \(P, 1\)"),
    (lambda: sliced_wasserstein(X, X, projections=torch.zeros(0, 1)), "at least one direction"),
    (lambda: distance_correlation(X, X * math.nan), "Expected finite y; got nan"),
    (lambda: distance_correlation(X, X[None, None]), r"Expected y of shape \(N,\) or \(N, D\)"),
    (lambda: distance_correlation(X, X[:3]), "a y of each event of x; got 3 for 4"),
    (lambda: distance_correlation(X, X, torch.ones(4), unbiased=True), "events with weights"),
    (lambda: distance_correlation(X[:3], X[:3], unbiased=True), "at least four events"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
