"""The baseline: classifiers by cross-entropy, hard bins, and edges chosen for the measurement."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal
from torch.nn import functional as F

from flowpost.encoders import DeepSets, Tabular
from flowpost.inferno import (
    Alternative,
    CountingModel,
    Normalisation,
    Process,
    Reweighting,
    Sample,
    SoftBins,
    SummaryModel,
    Transform,
    information,
)
from flowpost.inferno.baseline import CrossEntropyLoss, hard_information, hard_sums, score
from flowpost.inferno.binning import Binning, optimised
from flowpost.inferno.edges import Cells, search, smoothed
from flowpost.inferno.samples import Key, blocks
from flowpost.simulators import InfernoToy

# arXiv:1806.04743, the optimal classifier with ten bins, each benchmark for itself
UNIFORM = [14.97, 19.12, 24.93, 22.13, 27.98]
OPTIMISED = [14.80, 17.45, 22.51, 20.66, 25.01]
PROCESSES = (Process("signal", 50.0, signal=True), Process("background", 1000.0))
PLAIN = CountingModel(PROCESSES)
TOY = InfernoToy(4)
PLAIN_EVENTS = {"signal": torch.linspace(0, 1, 50), "background": torch.linspace(-1, 1, 80)}


def counting(toy):
    nuisances = []
    for name, constraint in toy.constraints.items():
        common = {"name": name, "processes": "background", "constraint": constraint}
        if name == "b":
            nuisances.append(Normalisation(**common))
            continue
        apply, shift = {"r": (toy.shift, 0.4), "rate": (toy.stretch, 1.0)}[name]
        nuisances.append(Transform(**common, nominal=toy.nominal[name], shift=shift, apply=apply))
    return CountingModel(PROCESSES, nuisances)


def draws(seed, signal=200_000, background=400_000):
    return {
        "signal": TOY.sample("signal", signal, seed=seed),
        "background": TOY.sample("background", background, seed=seed + 1),
    }


def exact(toy, binning):
    outer = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return toy.limit(torch.cat([outer[:1], binning.edges, outer[1:]]))


@pytest.fixture(scope="module")
def events():
    return draws(1)


# Binning


@pytest.mark.parametrize("bins", [1, 2, 7])
def test_bins_are_those_of_numpy(bins):
    binning = Binning.uniform(bins, -1.0, 2.0)
    assert binning.bins == bins
    assert binning.edges.dtype == torch.float64
    x = torch.randn(1000)
    expected = np.digitize(x.double().numpy(), np.linspace(-1, 2, bins + 1)[1:-1], right=True)
    assert binning(x).dtype == torch.int64
    assert binning(x).tolist() == expected.tolist()


def test_an_edge_belongs_to_the_lower_bin():
    binning = Binning(torch.tensor([0.25, 0.5]))
    assert binning(torch.tensor([0.25, 0.2500001, 0.5, 9.0, -math.inf])).tolist() == [0, 1, 1, 2, 0]


def test_quantiles_have_equal_weight():
    x, weight = torch.randn(10_000), torch.rand(10_000)
    for w in (None, weight):
        binning = Binning.quantiles(x, 8, w)
        parts = torch.bincount(binning(x), w, 8)
        torch.testing.assert_close(
            parts, torch.full_like(parts, parts.sum() / 8), rtol=3e-3, atol=0
        )
    twice = torch.randint(1, 3, (1000,))
    repeated = Binning.quantiles(x[:1000].repeat_interleave(twice), 9)
    assert torch.equal(Binning.quantiles(x[:1000], 9, twice).edges, repeated.edges)
    assert torch.equal(Binning.quantiles(x[:1000], 9, -twice).edges, repeated.edges)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Binning(torch.tensor([1.0, 0.0])), r"Expected increasing edges; got \[1.0, 0.0\]"),
        (lambda: Binning(torch.tensor([0.0, math.inf])), "Expected finite edges"),
        (lambda: Binning(torch.zeros(2, 2)), "Expected edges of shape"),
        (lambda: Binning.uniform(0), "Expected bins"),
        (lambda: Binning.uniform(3, 1.0, 1.0), "Expected low below high"),
        (
            lambda: Binning.uniform(3)(torch.tensor([0.1, math.nan])),
            "Expected finite scores.*row 1",
        ),
        (lambda: Binning.uniform(3)(torch.zeros(4, 1)), r"Expected scores of shape \(N,\)"),
        (lambda: Binning.quantiles(torch.ones(9), 3), "Expected scores with 2 different quantiles"),
        (lambda: Binning.quantiles(torch.ones(0), 3), "Expected at least one score"),
        (lambda: Binning.quantiles(torch.rand(3), 2, torch.zeros(3)), "other than zero"),
        (lambda: Binning.quantiles(torch.tensor([math.inf, 0]), 2), "Expected finite scores"),
    ],
)
def test_errors_of_binning(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# Information of hard bins


def uneven(x):
    return (3 * x.abs()).long().clamp(max=3)


class OneHot(nn.Module):
    def forward(self, x):
        return F.one_hot(uneven(x), 4).double()


def nuisances(shape_only=False):
    return [
        Normalisation(name="b", processes="background", constraint=Normal(1.0, 0.1)),
        Alternative(
            name="scale", processes="background", constraint=Normal(0.0, 1.0), shape_only=shape_only
        ),
        Reweighting(name="tilt", constraint=Normal(0.0, 2.0), shape_only=shape_only),
    ]


def varied(signed=False):
    samples = {}
    for i, name in enumerate(("signal", "background")):
        g = torch.Generator().manual_seed(i)
        x = torch.randn(300, generator=g) * (1 + 0.5 * i)
        weight = torch.rand(300, generator=g) - 0.2 * signed
        factors = {"tilt": (1 - 0.1 * x.tanh(), 1.05 + 0.1 * x.tanh())}
        others = {
            "scale": (
                Sample(0.9 * x[:250], weight[:250]),
                Sample(1.2 * torch.randn(310, generator=g), torch.rand(310, generator=g)),
            )
        }
        samples[name] = Sample(x, weight, factors, others if i else {})
    return samples


@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("shape_only", [False, True])
def test_hard_bins_are_counted_like_soft_ones(shape_only, signed):
    model = CountingModel(PROCESSES, nuisances(shape_only))
    soft = information(model, OneHot(), varied(signed))
    hard = hard_information(model, uneven, varied(signed), 4, chunk=77)
    assert hard.names == soft.names
    for name in ("covariance", "counts", "signal"):
        torch.testing.assert_close(getattr(hard, name), getattr(soft, name))


def test_width_in_closed_form():
    events = {"signal": torch.tensor([0, 1, 1, 1]), "background": torch.tensor([0, 0, 0, 1])}
    s, b = np.array([12.5, 37.5]), np.array([750.0, 250.0])
    found = hard_information(PLAIN, lambda x: x, events, 2)
    assert found.width == pytest.approx(50 / np.sqrt((s**2 / (s + b)).sum()))
    assert found.counts.tolist() == (s + b).tolist()
    free = Normalisation(name="b", processes="background")
    found = hard_information(CountingModel(PROCESSES, [free]), lambda x: x, events, 2)
    # as many bins as free parameters: the counts are inverted
    inverse = np.linalg.inv(np.stack([s / 50, b], 1))
    assert found.width == pytest.approx(np.sqrt(inverse[0] ** 2 @ (s + b)))


@pytest.mark.parametrize("step", [0.1, 0.5, 1.0])
def test_events_that_move_give_the_derivative(step):
    """A uniform density on [0, 1] that moves by v loses v below every edge."""
    move = Transform(
        name="v",
        processes="background",
        constraint=Normal(0.0, 0.1),
        apply=lambda x, v: {"x": x["x"] + v, "kind": x["kind"]},
    )
    grid = (torch.arange(10_000, dtype=torch.float64) + 0.5) / 10_000
    x = {"x": grid, "kind": torch.zeros(10_000, dtype=torch.long)}
    model = CountingModel(PROCESSES, [move])
    binning = Binning(torch.tensor([0.3, 0.7]))
    parts = blocks(model, {"signal": x, "background": x})
    found = hard_sums(lambda x: binning(x["x"]), parts, 3, step, chunk=999)
    slope = found.moved["background", "v"] / found.weight[Key("background")]
    torch.testing.assert_close(slope, torch.tensor([-1.0, 0.0, 1.0]).double(), atol=2e-3, rtol=0)
    assert ("signal", "v") not in found.moved


def test_derivatives_on_the_toy_are_exact_ones(events):
    edges = torch.tensor([0.0, 0.01, 0.3, 0.6, 0.8, 0.9, 1.0], dtype=torch.float64)
    binning = Binning(edges[1:-1])
    parts = blocks(counting(TOY), events)
    found = hard_sums(lambda x: binning(TOY.signal_probability(x)), parts, 6, 0.25)
    slopes = TOY.expected_counts(edges)[1]
    for column, name in ((1, "r"), (2, "rate")):
        moved = 1000 * found.moved["background", name] / found.weight[Key("background")]
        torch.testing.assert_close(moved, slopes[:, column], atol=3.0, rtol=0.02)


def test_hard_bins_of_a_summary(events):
    torch.manual_seed(1)
    summary = SummaryModel(Tabular(3, 8), SoftBins(8, 5)).fit_scale(events["background"])
    with torch.no_grad():
        summary.head.logits.weight.mul_(5)
    model = CountingModel(PROCESSES, nuisances()[:1])
    part = {k: x[:5000] for k, x in events.items()}
    found = hard_information(model, summary.assign, part, 5, chunk=1024)
    index = {k: summary(x).argmax(1) for k, x in part.items()}
    expected = 0.2 * torch.bincount(index["background"], minlength=5)
    expected += 0.01 * torch.bincount(index["signal"], minlength=5)
    torch.testing.assert_close(found.counts, expected.double())
    assert (
        found.width
        > hard_information(
            model, lambda x: Binning.uniform(5)(TOY.signal_probability(x)), part, 5
        ).width
    )


@pytest.mark.parametrize(
    ("assign", "options", "match"),
    [
        (lambda x: x, {}, "Expected bins as whole numbers; got torch.float32"),
        (lambda x: x.long()[1:], {}, "Expected assigned bins of shape"),
        (lambda x: x.long() + 4, {}, "Expected bins from 0 to 3; got 5. Set bins"),
        (lambda x: x.long() - 5, {}, "Expected bins from 0 to 3; got -5"),
        (lambda x: x.long(), {"step": 0.0}, "Expected step as a positive number"),
        (lambda x: x.long(), {"chunk": 0}, "Expected chunk"),
        (lambda x: x.long(), {"samples": {"signal": torch.ones(3)}}, "samples of signal, backgr"),
    ],
)
def test_errors_of_hard_bins(assign, options, match):
    samples = options.pop("samples", PLAIN_EVENTS)
    with pytest.raises(ValueError, match=match):
        hard_information(PLAIN, assign, samples, 4, **options)


# Optimised edges


def profiled(model, counts, slopes, groups):
    """Variance of bins made of cells, without anything of the package."""
    matrix = np.diag(model.curvature.numpy()).copy()
    for group in groups:
        n, d = counts[group].sum(), slopes[:, group].sum(1)
        if n > 1e-9 * counts.sum():
            matrix += np.outer(d, d) / n
    return np.linalg.inv(matrix)[0, 0]


@pytest.mark.parametrize("bins", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_search_finds_the_best_of_all_choices(seed, bins):
    rng = np.random.default_rng(seed)
    model = CountingModel(PROCESSES, nuisances())
    counts = rng.uniform(0.1, 50, 12)
    slopes = rng.normal(size=(4, 12)) * np.sqrt(counts) * [[0.1], [1.0], [1.0], [0.3]]
    slopes[0] = rng.uniform(0, 0.1, 12) * counts
    best = min(
        profiled(model, counts, slopes, np.split(np.arange(12), cut))
        for cut in itertools.combinations(range(1, 12), bins - 1)
    )
    tensors = torch.from_numpy(counts), torch.from_numpy(slopes)
    cells = Cells(model, *tensors, torch.zeros(12, dtype=torch.float64), 0.0)
    start = torch.arange(1, bins)
    found = search(cells, [start, start + 12 - bins])
    groups = np.split(np.arange(12), found.tolist())
    assert len(found) == bins - 1
    assert profiled(model, counts, slopes, groups) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("signed", [False, True])
def test_edges_are_the_best_of_all_choices(signed):
    """Scores of nine values: all edges between them are tried by hand."""
    model = CountingModel(PROCESSES, nuisances())
    samples = varied(signed)

    def scores(x):
        return (2 * x + 4).round().clamp(0, 8)

    found = optimised(model, scores, samples, 3, smooth=0.0, least=0.0)
    every = [
        hard_information(model, lambda x, e=e: Binning(e)(scores(x)), samples, 3).width
        for e in map(torch.tensor, itertools.combinations([v + 0.5 for v in range(8)], 2))
    ]
    width = hard_information(model, lambda x: found(scores(x)), samples, 3).width
    assert len(every) == 28
    assert width == pytest.approx(min(every), rel=1e-9)
    assert width < 0.98 * np.median(every)


def test_the_best_bins_of_a_direction_bound_all_others(events):
    """A certificate: no ten bins of these cells are better than the direction allows."""
    model = counting(TOY)
    fine = Binning.quantiles(TOY.signal_probability(torch.cat([*events.values()])), 200)
    edges = torch.cat([torch.zeros(1), fine.edges, torch.ones(1)]).double()
    counts, jacobian = TOY.expected_counts(edges)
    cells = Cells(model, counts, jacobian.T, torch.zeros_like(counts), 25.0)
    found = search(cells, [torch.arange(1, 10)])
    direction = cells.direction(found)
    best = cells.total(cells.best(direction, 10)) + cells.curvature
    bound = 1 / (direction @ best @ direction)
    variance = cells.variances(cells.total(found))
    assert bound <= variance * (1 + 1e-9)
    assert variance < 1.002 * bound
    width = exact(TOY, Binning(fine.edges[found - 1]))
    assert width == pytest.approx(24.9, abs=0.1)


@pytest.mark.parametrize("benchmark_", range(5))
def test_optimised_bins_on_the_toy(benchmark_, events):
    toy = InfernoToy(benchmark_)
    model, scores, uniform = counting(toy), toy.signal_probability, Binning.uniform(10)
    chosen = optimised(model, scores, events)

    assert chosen.bins == 10
    # the quadrature knows nothing of these events
    assert exact(toy, uniform) == pytest.approx(UNIFORM[benchmark_], rel=0.015)
    assert exact(toy, chosen) == pytest.approx(OPTIMISED[benchmark_], rel=0.01)
    assert exact(toy, chosen) < exact(toy, uniform)
    own = hard_information(model, lambda x: chosen(scores(x)), events, 10).width
    assert own == pytest.approx(exact(toy, chosen), rel=0.015)


def test_widths_on_other_events(events):
    model, scores = counting(TOY), TOY.signal_probability
    others = draws(11, 400_000, 3_000_000)
    uniform, chosen = Binning.uniform(10), optimised(model, scores, events)
    equal, best, own = (
        hard_information(model, lambda x, b=binning: b(scores(x)), samples, 10).width
        for binning, samples in ((uniform, others), (chosen, others), (chosen, events))
    )
    assert equal == pytest.approx(28.0, abs=0.4)
    assert best == pytest.approx(25.0, abs=0.3)
    assert own == pytest.approx(best, rel=0.01)


def test_seeds_agree(events):
    model, scores = counting(TOY), TOY.signal_probability
    widths = [
        exact(TOY, optimised(model, scores, events, seed=seed, restarts=restarts))
        for seed, restarts in ((1, 0), (2, 1), (3, 2))
    ]
    assert max(widths) < 1.003 * min(widths)


def test_edges_do_not_follow_the_noise_of_few_events():
    """Without smoothing, cells that changed places by chance look like knowledge of nuisances."""
    few, model, scores = draws(5, 20_000, 20_000), counting(TOY), TOY.signal_probability
    assert exact(TOY, optimised(model, scores, few)) < 25.6
    assert exact(TOY, optimised(model, scores, few, smooth=0.0, step=0.25)) > 26.5


def test_smoothing_keeps_lines_and_counts():
    at = torch.arange(50, dtype=torch.float64)
    counts = torch.rand(50, dtype=torch.float64)
    slopes = torch.stack([counts, counts * (3 - 0.2 * at)])
    torch.testing.assert_close(smoothed(slopes, counts, 4.0), slopes)
    noisy = slopes + torch.randn(2, 50)
    assert torch.equal(smoothed(noisy, counts, 0.4), noisy)
    assert (smoothed(noisy, counts, 4.0) - slopes).square().mean() < 0.5
    alone = torch.zeros(50, dtype=torch.float64)
    alone[7] = 1.0
    assert torch.isfinite(smoothed(slopes, alone, 2.0)).all()


def test_weights_are_copies_of_events(events):
    model, scores = counting(TOY), TOY.signal_probability
    part = {k: x[:20_000] for k, x in events.items()}
    copies = {k: torch.randint(1, 4, (20_000,)) for k in part}
    weighted = {k: Sample(x, copies[k].double()) for k, x in part.items()}
    repeated = {k: x.repeat_interleave(copies[k], 0) for k, x in part.items()}
    found, expected = (
        optimised(model, scores, s, 6, least=0.0, restarts=1) for s in (weighted, repeated)
    )
    torch.testing.assert_close(found.edges, expected.edges)
    widths = [
        hard_information(model, lambda x: found(scores(x)), s, 6).width
        for s in (weighted, repeated)
    ]
    assert widths[0] == pytest.approx(widths[1], rel=1e-9)


def test_negative_weights(events):
    """Sums close to zero by chance promise all; bins of so few effective events are left alone."""
    model, scores = counting(TOY), TOY.signal_probability
    samples = {
        k: Sample(x, torch.where(torch.rand(len(x)) < 0.25, -1.0, 1.0)) for k, x in events.items()
    }
    assert exact(TOY, optimised(model, scores, samples)) == pytest.approx(25.0, abs=0.4)
    # one cell of little signal, where the background happens to vanish
    model = CountingModel(PROCESSES, nuisances()[:1])
    grid = torch.arange(20).repeat_interleave(100).double()
    weight = torch.ones(2000)
    weight[700:749] = -1
    samples = {"signal": grid[:1600] + 2, "background": Sample(grid + 2, weight)}
    trusting = optimised(model, lambda x: x, samples, 3, least=0.0, candidates=100)
    careful = optimised(model, lambda x: x, samples, 3, candidates=100)
    assert trusting.edges.tolist() == [8.0, 9.0]
    assert careful.edges.tolist() != [8.0, 9.0]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"score": lambda x: torch.where(x > 0.9, math.nan, x)}, "Expected finite scores"),
        ({"score": lambda x: x[:, None]}, r"Expected scores of shape \(N,\)"),
        ({"score": lambda x: x[1:]}, "Expected scores of shape"),
        ({"score": lambda x: (x > 0).float()}, "different candidate edges for 10 bins; got 2"),
        ({"candidates": 4}, "different candidate edges for 10 bins; got 4. Raise candidates"),
        ({"bins": 1}, "Expected bins as a whole number of at least 2"),
        ({"least": 1e9}, "effective events that close all"),
        ({"smooth": -1.0}, "Expected smooth as a number of at least 0"),
        (
            {"samples": {"noise": torch.ones(3)}},
            "Expected samples of signal, background; got noise",
        ),
        ({"restarts": 0.5}, "Expected restarts"),
    ],
)
def test_errors_of_optimised(options, match):
    options = {"score": lambda x: x, "samples": PLAIN_EVENTS} | options
    with pytest.raises(ValueError, match=match):
        optimised(PLAIN, **options)


def test_too_few_bins_for_free_nuisances(events):
    part = {k: x[:5000] for k, x in events.items()}
    toy = InfernoToy(2)
    with pytest.raises(ValueError, match=r"2 occupied bins cannot hold 3 free parameters"):
        optimised(counting(toy), toy.signal_probability, part, 2)


# Cross-entropy


def test_cross_entropy_of_balanced_events(events):
    network = nn.Linear(3, 1)
    part = {k: x[:500] for k, x in events.items()}
    loss = CrossEntropyLoss(PLAIN)(network, part)
    x = torch.cat([part["signal"], part["background"]])
    labels = torch.cat([torch.ones(500), torch.zeros(500)])
    expected = F.binary_cross_entropy_with_logits(network(x)[:, 0], labels)
    torch.testing.assert_close(loss, expected)
    found = torch.autograd.grad(loss, [*network.parameters()])
    for gradient, other in zip(
        found, torch.autograd.grad(expected, [*network.parameters()]), strict=True
    ):
        torch.testing.assert_close(gradient, other)
        assert gradient.abs().min() > 0


def test_cross_entropy_of_weighted_processes():
    processes = [
        Process("a", 30.0, signal=True),
        Process("b", 10.0, signal=True),
        Process("c", 700.0),
        Process("d", 300.0),
    ]
    # nuisances have no part in it, nor have their samples to be there
    model = CountingModel(processes, nuisances()[2:])
    x = {p.name: torch.randn(20 + i, 2, dtype=torch.float64) for i, p in enumerate(processes)}
    w = {k: torch.rand(len(v)) * 3 for k, v in x.items()}
    w["c"][0] = -0.5
    network = nn.Sequential(nn.Linear(2, 1, dtype=torch.float64), nn.Flatten(0))
    loss = CrossEntropyLoss(model)(network, {k: Sample(x[k], w[k]) for k in x})
    share = {"a": 0.75, "b": 0.25, "c": 0.7, "d": 0.3}
    expected = 0.0
    for name, value in x.items():
        probability = network(value).sigmoid().detach().numpy()
        nats = -np.log(probability if name in "ab" else 1 - probability)
        expected += 0.5 * share[name] * np.average(nats, weights=w[name].numpy())
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_the_exact_ratio_is_best(events):
    class Ratio(nn.Module):
        def __init__(self, scale=1.0, shift=0.0):
            super().__init__()
            self.scale, self.shift = scale, shift

        def forward(self, x):
            return self.scale * TOY.log_likelihood_ratio(x) + self.shift

    loss = CrossEntropyLoss(counting(TOY))
    least = loss(Ratio(), events)
    for other in ((1.1, 0.0), (0.9, 0.0), (1.0, 0.1), (1.0, -0.1)):
        assert loss(Ratio(*other), events) > least + 1e-4
    assert score(Ratio())(events["signal"]).allclose(
        TOY.signal_probability(events["signal"].double()), atol=1e-5
    )


@pytest.mark.parametrize("form", [tuple, dict])
def test_inputs_of_several_tensors(form):
    network = DeepSets(3, 1)
    names = ("x", "lengths")

    def sets(n):
        values = torch.randn(n, 4 + n % 3, 3), torch.randint(1, 4, (n,))
        return values if form is tuple else dict(zip(names, values, strict=True))

    samples = {"signal": sets(30), "background": sets(41)}
    loss = CrossEntropyLoss(PLAIN)(network, samples)
    loss.backward()
    assert network.train() is network
    values = score(network, chunk=7)(samples["signal"])
    assert values.shape == (30,)
    x = samples["signal"]
    direct = network.eval()(*(x if form is tuple else x.values()))[:, 0]
    torch.testing.assert_close(values, direct.double().sigmoid(), check_dtype=False)


def test_score_is_a_plain_function_of_evaluated_events():
    network = nn.Sequential(nn.Dropout(0.5), nn.Linear(3, 1), nn.Flatten(0))
    network[1].eval()
    x = torch.randn(100, 3)
    found = score(network, chunk=33)(x)
    assert found.dtype == torch.float64
    assert not found.requires_grad
    torch.testing.assert_close(found, network[1](x)[:, 0].double().sigmoid().detach())
    # each module is left in its own mode
    assert [m.training for m in network] == [True, False, True]
    # scores close to one do not merge
    high = score(nn.Identity())(torch.tensor([20.0, 21.0]))
    assert high[1] > high[0]


def missing(x):
    return torch.full((len(x),), math.nan)


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (
            lambda: CrossEntropyLoss(PLAIN)(
                nn.Linear(1, 2), {k: v[:, None] for k, v in PLAIN_EVENTS.items()}
            ),
            r"Expected logits of shape \(130,\) or \(130, 1\); got \(130, 2\)",
        ),
        (
            lambda: CrossEntropyLoss(PLAIN)(Function(missing), PLAIN_EVENTS),
            "Expected finite logits",
        ),
        (
            lambda: CrossEntropyLoss(PLAIN)(Function(lambda x: None), PLAIN_EVENTS),
            "got NoneType. The network takes",
        ),
        (lambda: CrossEntropyLoss(PLAIN)(nn.Identity(), {}), "Expected samples of signal"),
        (
            lambda: CrossEntropyLoss(PLAIN)(
                nn.Identity(),
                PLAIN_EVENTS
                | {"signal": Sample(torch.ones(2), torch.tensor([1.0, -2.0]), total=1)},
            ),
            "Expected weights of 'signal' with a positive sum; got -1",
        ),
        (lambda: CrossEntropyLoss(CountingModel(PROCESSES[:1])), "got no background"),
        (lambda: score(Function(missing))(torch.zeros(4)), "Expected finite logits"),
        (lambda: score(nn.Identity())(torch.zeros(0)), "Expected at least one event"),
        (lambda: score(nn.Identity(), chunk=0), "Expected chunk"),
    ],
)
def test_errors_of_cross_entropy(call, match):
    with pytest.raises(ValueError, match=match):
        call()
