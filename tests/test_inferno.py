"""The INFERNO loss against second derivatives of the likelihood, and what is refused."""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Gamma, LogNormal, Normal, StudentT, Uniform

from flowpost.encoders import CNN, LSTM, DeepSets, Tabular
from flowpost.inferno import (
    Alternative,
    Batches,
    CountingModel,
    InfernoLoss,
    InformationAccumulator,
    Normalisation,
    Process,
    Reweighting,
    Sample,
    SoftBins,
    SummaryModel,
    Transform,
    hard_assign,
    hard_information,
    information,
    signal_order,
    templates,
    toy_model,
)
from flowpost.inferno.samples import blocks, split
from flowpost.inferno.tangents import propagate
from flowpost.simulators import InfernoToy

DOUBLE = torch.float64


def shifted(x, value):
    return torch.cat([x[:, :1] + value * (1 + 0.1 * x[:, 1:2].square()), x[:, 1:]], 1)


def stretched(x, value):
    return torch.cat([x[:, :1], x[:, 1:] * value], 1)


NUISANCES = {
    "move": Transform(
        name="move", apply=shifted, processes=["qcd", "top"], constraint=Normal(0.0, 0.4)
    ),
    "scale": Transform(name="scale", apply=stretched, processes="qcd", nominal=1.0, shift=0.1),
    "model": Alternative(name="model", processes="top", constraint=Normal(0.0, 1.0)),
    "form": Alternative(
        name="form", processes="signal", constraint=Normal(0.0, 2.0), shape_only=True
    ),
    "weights": Reweighting(name="weights", processes="qcd", constraint=Normal(0.0, 1.0)),
    "tilt": Reweighting(
        name="tilt", processes="signal", constraint=Normal(0.0, 0.5), shape_only=True
    ),
    "rate": Normalisation(name="rate", processes="qcd", constraint=Normal(1.0, 0.1)),
    "lumi": Normalisation(name="lumi", constraint=LogNormal(0.0, 0.05)),
    "top": Normalisation(name="top", processes="top", nominal=200.0),
}
KINDS = {
    "none": [],
    "transforms": ["move", "scale"],
    "alternatives": ["model", "form"],
    "reweightings": ["weights", "tilt"],
    "normalisations": ["rate", "lumi", "top"],
    "all": list(NUISANCES),
}


def counting(names=tuple(NUISANCES)):
    return CountingModel(
        [
            Process("signal", 50.0, signal=True),
            Process("qcd", 1000.0),
            Process("top", 200.0),
        ],
        [NUISANCES[n] for n in names],
    )


def events(size=150, seed=0, features=2, dtype=DOUBLE):
    generator = torch.Generator().manual_seed(seed)

    def draw(loc, n=size):
        return loc + torch.randn(n, features, generator=generator, dtype=dtype)

    def weight(n=size):
        # a third of them negative
        sign = 1.0 - 2.0 * (torch.rand(n, generator=generator) < 0.3).to(dtype)
        return sign * (0.5 + torch.rand(n, generator=generator, dtype=dtype))

    def factors(scale, n=size):
        tilt = scale * torch.rand(n, generator=generator, dtype=dtype)
        return 1 - tilt, 1 + 2 * tilt

    ones = 0.5 + torch.rand(size, generator=generator, dtype=dtype)
    return {
        "signal": Sample(
            draw(1.0),
            factors={"tilt": factors(0.3)},
            varied={"form": (draw(0.8), draw(1.3, size + 20))},
        ),
        "qcd": Sample(draw(-0.5), weight(), factors={"weights": factors(0.2)}),
        "top": Sample(
            draw(0.2),
            ones,
            varied={"model": (Sample(draw(0.1), 0.9 * ones), Sample(draw(0.4), 1.2 * ones))},
        ),
    }


def summary(bins=6, dropout=0.0, hidden=12, seed=0):
    torch.manual_seed(seed)
    encoder = Tabular(2, 5, hidden=hidden, layers=2, dropout=dropout)
    nn.init.normal_(encoder.net[-1].weight, std=0.3)
    return SummaryModel(encoder, SoftBins(5, bins, temperature=0.5)).double()


def network_of(kind):
    torch.manual_seed(1)
    if kind == "shipped":
        return summary()
    if kind == "learned temperature":
        return SummaryModel(nn.Linear(2, 5), SoftBins(5, 6, temperature="learned")).double()
    activations = {"ReLU": nn.ReLU, "Tanh": nn.Tanh, "GELU": nn.GELU}
    middle = [activations[kind]()] if kind in activations else [nn.BatchNorm1d(12), nn.SiLU()]
    return nn.Sequential(nn.Linear(2, 12), *middle, nn.Linear(12, 6), nn.Softmax(-1)).double()


def forward(network, x, nominal):
    """In training, batch norm by the statistics of nominal events."""
    for layer in network if isinstance(network, nn.Sequential) else [network]:
        if isinstance(layer, nn.BatchNorm1d):
            var, mean = torch.var_mean(nominal, 0, unbiased=False)
            x, nominal = (
                (v - mean) * torch.rsqrt(var + layer.eps) * layer.weight + layer.bias
                for v in (x, nominal)
            )
        else:
            x, nominal = layer(x), layer(nominal)
    return x


def variance_by_hessian(network, model, samples):
    """The variance by second derivatives of the likelihood at its Asimov point, differentiable."""

    def counts(theta):
        value = dict(zip(model.names, theta, strict=True))
        found = []
        for p in model.processes:
            sample = samples[p.name]
            x = sample.x
            for n in model.of_kind(Transform, p.name):
                x = n.apply(x, value[n.name])
            found.append(x)
        varied = [
            (p.name, n, side, samples[p.name].varied[n.name][side])
            for p in model.processes
            for n in model.of_kind(Alternative, p.name)
            for side in (0, 1)
        ]
        sizes = [len(x) for x in found] + [len(s) for *_, s in varied]
        others = [s.x for *_, s in varied]
        nominal = torch.cat([samples[p.name].x for p in model.processes] + others)
        parts = forward(network, torch.cat(found + others), nominal).split(sizes)
        total = 0.0
        for p, b in zip(model.processes, parts, strict=False):
            sample = samples[p.name]
            w = torch.ones(len(sample), dtype=DOUBLE) if sample.weight is None else sample.weight
            expected = w @ b / w.sum()
            for n in model.of_kind(Reweighting, p.name):
                down, up = (w * f for f in sample.factors[n.name])
                unit = (down.sum(), up.sum()) if n.shape_only else (w.sum(), w.sum())
                slope = (up @ b / unit[1] - down @ b / unit[0]) / (2 * n.shift)
                expected = expected + (value[n.name] - n.nominal) * slope
            for n in model.of_kind(Alternative, p.name):
                sides = []
                for (process, m, _, s), c in zip(varied, parts[len(found) :], strict=True):
                    if process == p.name and m is n:
                        v = torch.ones(len(s), dtype=DOUBLE) if s.weight is None else s.weight
                        sides.append(v @ c / (v.sum() if n.shape_only else w.sum()))
                slope = (sides[1] - sides[0]) / (2 * n.shift)
                expected = expected + (value[n.name] - n.nominal) * slope
            for n in model.of_kind(Normalisation, p.name):
                expected = expected * value[n.name] / n.nominal
            if p.signal:
                expected = expected * value["s"] / model.nominal
            total = total + p.expected * expected
        return total

    theta = model.values.clone().requires_grad_()
    asimov = counts(model.values)
    expected = counts(theta)
    loss = (expected - asimov * expected.log()).sum()
    for n, value in zip(model.nuisances, theta[1:], strict=True):
        loss = loss + n.penalty(value)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    rows = [torch.autograd.grad(g, theta, create_graph=True)[0] for g in gradient]
    return torch.linalg.inv(torch.stack(rows))[0, 0]


def gradient_of(value, network):
    return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(network.parameters()))])


@pytest.mark.parametrize("kind", ["shipped", "learned temperature", "ReLU", "Tanh", "GELU", "norm"])
@pytest.mark.parametrize("names", KINDS)
@pytest.mark.parametrize("by_hand", [True, False])
def test_loss_and_gradient_are_those_of_the_hessian(kind, names, by_hand):
    network, model, samples = network_of(kind), counting(KINDS[names]), events()
    network.train()
    value = InfernoLoss(model, log=False, by_hand=by_hand)(network, samples)
    truth = variance_by_hessian(network, model, samples)
    assert abs(value.item() / truth.item() - 1) < 1e-10
    mine, exact = gradient_of(value.log(), network), gradient_of(truth.log(), network)
    assert (mine - exact).norm() <= 1e-10 * exact.norm()


@pytest.mark.parametrize("names", ["none", "all"])
def test_gradient_is_the_slope_of_the_value(names):
    """It is not where the Asimov counts do not carry it."""
    network, model, samples = summary(), counting(KINDS[names]), events()
    loss = InfernoLoss(model)
    gradient = gradient_of(loss(network, samples), network)
    direction = gradient / gradient.norm()
    step, values = 1e-4, []
    start = nn.utils.parameters_to_vector(network.parameters()).detach()
    for sign in (1, -1):
        nn.utils.vector_to_parameters(start + sign * step * direction, network.parameters())
        values.append(loss(network, samples).item())
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(gradient.norm().item(), rel=1e-5)


def test_one_draw_of_dropout_and_one_set_of_batch_statistics():
    model = counting(["move"])
    samples = events()
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Linear(2, 12), nn.BatchNorm1d(12), nn.SiLU(), nn.Dropout(0.4), nn.Linear(12, 6),
        nn.Softmax(-1),
    ).double()  # fmt: skip
    parts = blocks(model, samples)
    before = network[1].running_mean.clone()
    torch.manual_seed(5)
    bins, slopes = propagate(network, parts)
    assert (network[1].running_mean - before).norm() > 0
    assert network[1].num_batches_tracked == 1
    assert set(slopes[1]) == set(slopes[2]) == {"move"}
    assert slopes[0] == {}
    mean, var = network[1].running_mean, network[1].running_var
    # the order of the one forward pass: those that move come first
    x = torch.cat([samples[k].x for k in ("qcd", "top", "signal")])
    torch.testing.assert_close(mean, 0.1 * network[0](x).mean(0))
    torch.testing.assert_close(var, 0.9 + 0.1 * network[0](x).var(0))
    eps, sides = 1e-6, []
    for sign in (1, -1):
        moved = [shifted(samples[k].x, sign * eps) for k in ("qcd", "top")]
        torch.manual_seed(5)
        sides.append(forward(network, torch.cat([*moved, samples["signal"].x]), x))
    expected = (sides[0] - sides[1]) / (2 * eps)
    found = torch.cat([slopes[1]["move"], slopes[2]["move"]])
    torch.testing.assert_close(found, expected[: len(found)], rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(bins[0], (sides[0] + sides[1])[len(found) :] / 2)
    assert not slopes[0]


@pytest.mark.parametrize("training", [True, False])
def test_dropout_by_hand_is_that_of_the_layers(training):
    network, model = summary(dropout=0.3).train(training), counting(["move", "scale"])
    parts = blocks(model, events())
    found = []
    for by_hand in (True, False):
        torch.manual_seed(7)
        found.append(propagate(network, [p for p in parts if p.moves], by_hand=by_hand))
    for one, other in zip(*found, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b)


def moved_image(x, value):
    return x + value * x.roll(1, -1)


def moved_hits(x, value):
    return (x[0] + value, x[1])


@pytest.mark.parametrize("encoder", ["images", "sequences", "sets"])
def test_any_encoder(encoder):
    """Images, and padded sequences with their lengths, which a transform takes as the encoder.

    An LSTM has no forward derivative: it is differenced.
    """
    torch.manual_seed(0)
    if encoder == "images":
        network, apply = CNN(1, 6, width=4, blocks=1), moved_image
        inputs = {k: torch.rand(20, 1, 8, 8, dtype=DOUBLE) for k in ("signal", "qcd")}
    else:
        apply = moved_hits
        network = LSTM(2, 6, hidden=5) if encoder == "sequences" else DeepSets(2, 6, hidden=8)
        inputs = {
            k: (torch.randn(20, n, 2, dtype=DOUBLE), torch.randint(1, n + 1, (20,)))
            for k, n in (("signal", 5), ("qcd", 7))
        }
    model = CountingModel(
        [Process("signal", 20.0, signal=True), Process("qcd", 100.0)],
        [Transform(name="move", apply=apply, constraint=Normal(0.0, 0.2))],
    )
    network = SummaryModel(network, SoftBins(6, 4)).double()
    value = InfernoLoss(model)(network.eval(), inputs)

    class Own(nn.Module):
        """Takes what a tuple holds as its arguments."""

        def __init__(self):
            super().__init__()
            self.inner = network

        def forward(self, *x):
            return self.inner(x if len(x) > 1 else x[0])

    assert InfernoLoss(model)(Own().eval(), inputs).item() == pytest.approx(value.item())
    value.backward()
    moved = {}
    for sign in (1, -1):
        x = {k: apply(v, torch.tensor(sign * 1e-6, dtype=DOUBLE)) for k, v in inputs.items()}
        moved[sign] = [network(v).mean(0) for v in x.values()]
    slope = sum(
        y * (a - b) / 2e-6 for y, a, b in zip((20.0, 100.0), moved[1], moved[-1], strict=True)
    )
    s, b = (network(v).mean(0) for v in inputs.values())
    rows, counts = torch.stack([s, slope]), 20 * s + 100 * b
    matrix = (rows / counts) @ rows.T + torch.diag(torch.tensor([0.0, 1 / 0.2**2], dtype=DOUBLE))
    expected = torch.linalg.inv(matrix)[0, 0].log()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)


def test_accumulated_portions_are_the_whole():
    network, model, samples = summary(dropout=0.3), counting(), events()
    whole = InfernoLoss(model, log=False)(network.eval(), samples)
    network.train()
    accumulator = InformationAccumulator(model)
    accumulator.update(network, samples, chunk=37)
    assert network.training
    assert network.encoder.net[2].training
    found = accumulator.compute()
    assert found.width == pytest.approx(math.sqrt(whole.item()), rel=1e-12)
    assert found.names == model.names
    assert set(found.widths) == set(model.names)
    assert information(model, network, samples).width == pytest.approx(found.width, rel=1e-12)
    assert InfernoLoss(model).evaluate(network, samples) == pytest.approx(whole.log().item())
    hard = torch.cat([network.assign(s.x) for s in samples.values()])
    assert found.used == len(hard.unique())
    assert f"bins {found.used} of 6 used" in str(found).replace("        ", "")
    torch.testing.assert_close(found.counts.sum(), torch.tensor(1250.0, dtype=DOUBLE))
    torch.testing.assert_close(found.signal.sum(), torch.tensor(50.0, dtype=DOUBLE))


class Cells(nn.Module):
    """Soft cells in two of the toy's inputs."""

    def forward(self, x):
        def cells(t, edges):
            up = torch.sigmoid(10 * (t[:, None] - torch.tensor(edges)))
            one, zero = torch.ones_like(up[:, :1]), torch.zeros_like(up[:, :1])
            return torch.cat([one, up], 1) - torch.cat([up, zero], 1)

        first, last = cells(x[:, 0], [-1.0, 1.0, 3.0]), cells(5 * x[:, 2], [1.0, 3.0])
        return (first[:, :, None] * last[:, None]).flatten(1)


def test_small_batches_read_too_small_a_width():
    toy = InfernoToy(3)
    model = toy_model(toy)
    samples = {p.name: toy.sample(p.name, 20_000, seed=i) for i, p in enumerate(model.processes)}
    whole = information(model, Cells(), samples).width

    def mean(size):
        losses = [InfernoLoss(model)(Cells(), b).item() for b in Batches(model, samples, size)]
        return math.exp(sum(losses) / len(losses) / 2)

    assert mean(125) < 0.9 * whole
    assert abs(mean(2000) / whole - 1) < 0.05


def test_widths_of_closed_forms():
    """A plain count, with the background known and to 10 %; and two bins that separate."""
    events_ = {"signal": torch.ones(9, 1), "background": torch.zeros(9, 1)}
    processes = [Process("signal", 50.0, signal=True), Process("background", 1000.0)]
    known = CountingModel(processes)
    unsure = CountingModel(
        processes, [Normalisation(name="b", processes="background", constraint=Normal(1.0, 0.1))]
    )

    class One(nn.Module):
        def forward(self, x):
            return torch.cat([1 + 0 * x, 0 * x], 1)

    class Two(nn.Module):
        def forward(self, x):
            return torch.cat([x, 1 - x], 1)

    with pytest.warns(UserWarning, match="plain count, 32.4"):
        value = InfernoLoss(known, log=False)(One(), events_)
    assert value.item() == pytest.approx(1050.0)
    with pytest.warns(UserWarning, match=r"All events fall into bin 0.*105.* higher temperature"):
        value = InfernoLoss(unsure, log=False)(One(), events_)
    assert value.item() == pytest.approx(1050.0 + 100.0**2)
    assert InfernoLoss(unsure, log=False)(Two(), events_).item() == pytest.approx(50.0)
    strength = CountingModel(processes, poi="mu", nominal=1.0)
    assert InfernoLoss(strength, log=False)(Two(), events_).item() == pytest.approx(50 / 50**2)


def test_event_weights_are_repeated_events():
    model, samples, network = counting(["move", "weights"]), events(), summary()
    sample = samples["top"]
    whole = torch.arange(len(sample)) % 3 + 1
    weighted = {**samples, "top": Sample(sample.x, whole)}
    repeated = {**samples, "top": Sample(sample.x.repeat_interleave(whole, 0))}
    a, b = (InfernoLoss(model)(network, s).item() for s in (weighted, repeated))
    assert a == pytest.approx(b, rel=1e-12)


@pytest.mark.parametrize(
    ("constraint", "nominal", "expected"),
    [
        (Normal(1.0, 0.1), None, 100.0),
        (LogNormal(0.0, 0.1), None, 100.0),
        (LogNormal(math.log(2.0), 0.1), None, 25.0),
        (Gamma(5.0, 4.0), None, 4.0),
        (StudentT(5.0, 1.0, 0.1), None, 120.0),
        (Uniform(0.5, 1.5), 1.0, 0.0),
    ],
)
def test_curvature_of_constraints(constraint, nominal, expected):
    nuisance = Normalisation(name="b", constraint=constraint, nominal=nominal)
    assert nuisance.curvature() == pytest.approx(expected, rel=1e-5)


def test_soft_bins():
    head = SoftBins(4, 3, temperature=lambda progress: 1.0 - 0.9 * progress)
    context = torch.randn(5, 4)
    start = head(context)
    assert head.temperature == pytest.approx(1.0)
    head.anneal(1.0)
    assert head.temperature == pytest.approx(0.1)
    torch.testing.assert_close(head(context), torch.softmax(10 * head.logits(context), -1))
    assert (head(context).amax(1) > start.amax(1)).all()
    learned = SoftBins(4, 3, temperature="learned")
    learned.anneal(1.0)
    assert learned.temperature == 1.0
    assert any("temperature" in n for n, _ in learned.named_parameters())
    other = SoftBins(**head.config())
    other.load_state_dict(head.state_dict())
    torch.testing.assert_close(other(context), head(context))
    assert hard_assign(torch.tensor([[0.1, 0.9], [0.8, 0.2]])).tolist() == [1, 0]
    order = signal_order(torch.tensor([5.0, 1.0, 0.0, 0.0]), torch.tensor([5.0, 9.0, 3.0, 0.0]))
    assert order.tolist() == [3, 2, 1, 0]


def test_hard_bins_of_a_model():
    network = summary(dropout=0.5)
    x = torch.randn(50, 2, dtype=DOUBLE)
    expected = network.eval()(x).argmax(1)
    network.train()
    assert torch.equal(network.assign(x, chunk=7), expected)
    assert network.training


def test_batches():
    model, samples = counting(), events(100)
    batches = Batches(model, samples, 30, seed=1)
    # the longest varied sample has 120
    assert len(batches) == 4
    first = list(batches)
    second = list(batches)
    assert not torch.equal(first[0]["qcd"].x, second[0]["qcd"].x)
    batches.set_epoch(0)
    assert all(torch.equal(a["qcd"].x, b["qcd"].x) for a, b in zip(first, batches, strict=True))
    seen = torch.cat([b["qcd"].x for b in first])[:100]
    assert torch.equal(seen.unique(dim=0), samples["qcd"].x.unique(dim=0))
    for batch in first:
        top = batch["top"]
        down, up = top.varied["model"]
        # pairs stay together: the weights of the three are proportional
        torch.testing.assert_close(up.weight, 1.2 * top.weight)
        torch.testing.assert_close(down.weight, 0.9 * top.weight)
        assert top.total == pytest.approx(samples["top"].total)
        assert len(top) == 30


def test_division_keeps_pairs_and_ratios():
    model, samples = counting(), events(100)
    first, second = split(model, samples, 0.25, seed=3)
    assert (len(first["qcd"]), len(second["qcd"])) == (75, 25)
    for part in (first, second):
        torch.testing.assert_close(part["top"].varied["model"][1].weight, 1.2 * part["top"].weight)
        assert part["top"].varied["model"][1].total == samples["top"].varied["model"][1].total
    with pytest.raises(ValueError, match="Expected events of 'signal' enough for two parts"):
        split(model, samples, 0.001)


def faulty(**changes):
    return {**events(), **changes}


X = torch.randn(10, 2, dtype=DOUBLE)
BAD = torch.where(torch.arange(10)[:, None] == 3, torch.nan, X)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Process("b", 0.0), "yield of 'b' as a positive number"),
        (lambda: CountingModel([Process("b", 1.0)]), "Mark it: Process"),
        (lambda: CountingModel([Process("b", 1.0, True)] * 2), "each process once; got 'b' twice"),
        (lambda: CountingModel([Process("b", 1.0, True)], [NUISANCES["rate"]]), "got 'qcd'"),
        (lambda: counting(["rate", "rate"]), "each parameter once; got 'rate' twice"),
        (lambda: counting().without("nothing"), "got 'nothing'"),
        (lambda: Normalisation(name="b", constraint=0.1), "None for a free one; got 0.1"),
        (
            lambda: Normalisation(name="b", constraint=Normal(1.2, 0.1), nominal=1.0),
            "Set nominal=… to the constraint's mode",
        ),
        (lambda: Normalisation(name="b", nominal=0.0), "positive factor or yield"),
        (lambda: Alternative(name="m"), "free nuisance has no standard deviation"),
        (lambda: Alternative(name="m", shift=-1.0), "shift of 'm' as a positive"),
        (lambda: Transform(name="m", shift=1.0), "Expected apply=…"),
        (lambda: SoftBins(3, 1), "bins as a whole number of at least 2"),
        (lambda: SoftBins(3, temperature=0.0), "temperature as a positive number"),
        (lambda: SoftBins(3, temperature="cold"), "'learned' or a function; got 'cold'"),
        (lambda: SoftBins(3)(torch.zeros(2, 4)), r"context of shape \(N, 3\)"),
        (lambda: SummaryModel(SoftBins(3), nn.Linear(2, 3)), "SummaryModel\\(encoder, head\\)"),
        (lambda: Sample(X[:0]), "at least one event"),
        (lambda: Sample((X, X[:5])), r"got \[5, 10\]"),
        (lambda: Sample(X, torch.ones(9)), r"weight of shape \(10,\); got \(9,\)"),
        (lambda: Sample(X, torch.full((10,), math.nan)), "finite weight; got nan in row 0"),
        (lambda: Sample(X, factors={"a": torch.ones(10)}), r"'a' as a pair \(down, up\)"),
        (lambda: InfernoLoss(counting())(summary(), [X]), "samples as a dict by process"),
        (lambda: InfernoLoss(counting())(summary(), {"signal": X}), "samples of signal, qcd, top"),
        (lambda: InfernoLoss(counting())(summary(), faulty(qcd=X)), "factors of 'weights'"),
        (lambda: InfernoLoss(counting())(summary(), faulty(top=X)), "varied of 'model'"),
        (
            lambda: InfernoLoss(counting([]))(summary(), faulty(top=Sample(X, -torch.ones(10)))),
            "weights of 'top' with a positive sum",
        ),
        (
            lambda: InfernoLoss(counting([]))(network_of("Tanh"), faulty(top=BAD)),
            "finite summary of 'top'; got NaN or infinity in event 3",
        ),
        (
            lambda: InfernoLoss(counting([]))(nn.Flatten(0), events()),
            r"Expected a summary of shape \(450, K\)",
        ),
        (
            lambda: InfernoLoss(counting(["scale", "top"]))(summary(bins=2), events()),
            "2 occupied bins cannot hold 3 free parameters",
        ),
        (
            lambda: Batches(
                counting([]).__class__(
                    counting().processes,
                    [Transform(name="t", apply=stretched, processes="qcd", shift=1.0)],
                ),
                events(),
            ),
            "leave events as they are at its nominal value 0",
        ),
        (lambda: InformationAccumulator(counting()).compute(), "Call update first"),
        (lambda: hard_assign(BAD), "finite probabilities; got nan in row 3"),
    ],
)
def test_errors_name_the_remedy(call, text):
    with pytest.raises(ValueError, match=text):
        call()


class Columns(nn.Module):
    """The inputs themselves."""

    def forward(self, x):
        return x


def signed_width(excess):
    """Of two bins, of which the first has next to no background by weights below zero."""
    model = CountingModel([Process("signal", 10.0, signal=True), Process("qcd", 100.0)])
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=DOUBLE)
    weight = torch.tensor([1.0, excess - 1.0, 9.0], dtype=DOUBLE)
    signal = torch.tensor([[0.9, 0.1]], dtype=DOUBLE)
    value = InfernoLoss(model, log=False)(Columns(), {"signal": signal, "qcd": Sample(x, weight)})
    return value.item() ** 0.5


def test_weights_below_zero_do_not_promise_everything():
    """Neither a pole where a count vanishes, nor a cliff behind it; and no less than the signal."""
    excess = [1.0, 0.3, 0.1, 0.0, -0.1, -0.5, -0.85, -0.95, -1.0, -1.05, -1.5]
    widths = [signed_width(e) for e in excess]
    assert min(widths) > 10**0.5
    steps = torch.tensor([signed_width(e) for e in torch.linspace(1, -1.5, 300).tolist()])
    assert steps.diff().abs().max() < 0.1
    # without cancellation it is the plain formula
    first, other = 9.0 + 100 * 1.5 / 10.5, 1.0 + 100 * 9 / 10.5
    plain = 1 / (0.9**2 / first + 0.1**2 / other)
    assert signed_width(0.5) ** 2 != pytest.approx(plain, rel=1e-3)
    assert signed_width(1.5) ** 2 == pytest.approx(plain, rel=1e-9)


def test_negative_bins_are_told():
    model = CountingModel([Process("signal", 10.0, signal=True), Process("qcd", 100.0)])
    eye = torch.eye(2, dtype=DOUBLE)
    data = {"signal": eye, "qcd": Sample(eye, torch.tensor([-1.0, 9.0]))}
    with pytest.warns(UserWarning, match=r"got -7\.5 in bin 0: weights below zero outweigh"):
        information(model, Columns(), data)


def in_place(x, value):
    x[:, 0] += value
    return x


def constant(x, value):
    return torch.cat([x[:, :1] + float(value), x[:, 1:]], 1)


@pytest.mark.parametrize(
    ("apply", "text"),
    [
        (in_place, "changes those that it is given. Work on x.clone"),
        (constant, "differentiable in its value.* without float\\(\\) or numpy"),
        (lambda x, value: x + value + 1, "leave events as they are"),
    ],
)
@pytest.mark.parametrize("way", ["loss", "all events", "hard bins", "templates", "batches"])
def test_transforms_are_looked_at(apply, text, way):
    model = CountingModel(
        [Process("signal", 10.0, signal=True), Process("qcd", 100.0)],
        [Transform(name="move", apply=apply, processes="qcd", constraint=Normal(0.0, 0.4))],
    )
    data = {k: s.x.clone() for k, s in events().items() if k != "top"}
    network = summary()
    call = {
        "loss": lambda: InfernoLoss(model)(network, data),
        "all events": lambda: information(model, network, data),
        "hard bins": lambda: hard_information(model, network.assign, data, 6),
        "templates": lambda: templates(model, network, data),
        "batches": lambda: Batches(model, data),
    }[way]
    with pytest.raises(ValueError, match=text):
        call()


def test_samples_of_another_size_are_no_yields():
    model, data = counting(["model"]), events()
    top = data["top"]
    short = Sample(top.x, varied={"model": (top.x[:50], top.x[:70])})
    with pytest.raises(ValueError, match=r"got 150, 50, 70 events .* shape_only=True"):
        InfernoLoss(model)(summary(), {**data, "top": short})


def test_logits_are_no_bins():
    for call in (
        lambda: InfernoLoss(counting([]))(nn.Linear(2, 6).double(), events()),
        lambda: information(counting([]), nn.Linear(2, 6).double(), events()),
    ):
        with pytest.raises(ValueError, match="End the network with SoftBins"):
            call()


def hooked(network):
    network.encoder.net[0].register_forward_hook(lambda module, x, y: 1.5 * y)
    return network


def patched(network):
    layer = network.encoder.net[0]
    layer.forward = lambda x: 2 * nn.Linear.forward(layer, x)
    return network


def parametrised(network):
    nn.utils.parametrizations.spectral_norm(network.encoder.net[0])
    return network.eval()


def other_layer(network):
    network.encoder.net[1] = nn.GELU()
    return network


@pytest.mark.parametrize("change", [hooked, patched, parametrised, other_layer])
def test_what_was_done_to_shipped_layers_counts(change):
    network, model, data = change(summary()), counting(["move", "scale"]), events()
    value = InfernoLoss(model, log=False)(network, data)
    torch.testing.assert_close(value, variance_by_hessian(network, model, data))


def test_second_derivatives_of_the_loss():
    found = []
    for by_hand in (True, False):
        network = summary()
        value = InfernoLoss(counting(["move"]), by_hand=by_hand)(network, events())
        weights = [p for n, p in network.named_parameters() if "logits.bias" not in n]
        slopes = torch.autograd.grad(value, weights, create_graph=True)
        found.append(torch.autograd.grad(sum(s.square().sum() for s in slopes), weights))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_portions_of_ones_own_add_up():
    model, data, network = counting(["model"]), events(), summary()

    def rows(sample, part):
        return Sample(sample.x[part], None if sample.weight is None else sample.weight[part])

    accumulator = InformationAccumulator(model)
    for part in (slice(0, 130), slice(130, 150)):
        own = {k: rows(s, part) for k, s in data.items()}
        down, up = (rows(s, part) for s in data["top"].varied["model"])
        own["top"] = Sample(own["top"].x, own["top"].weight, varied={"model": (down, up)})
        accumulator.update(network, own)
    whole = information(model, network, data)
    torch.testing.assert_close(accumulator.compute().covariance, whole.covariance)


def test_a_constraint_without_curvature_is_told():
    with pytest.warns(UserWarning, match="has no curvature at its nominal value"):
        CountingModel(
            [Process("signal", 10.0, signal=True)],
            [Normalisation(name="b", constraint=Uniform(0.5, 1.5), nominal=1.0, shift=0.1)],
        )


@pytest.mark.parametrize("momentum", [0.0, 0.3, None])
def test_momentum_of_batch_norm(momentum):
    found = []
    for way in ("tangents", "plain"):
        torch.manual_seed(0)
        norm = nn.BatchNorm1d(2, momentum=momentum)
        network = nn.Sequential(norm, nn.Linear(2, 6), nn.Softmax(-1)).double()
        parts = blocks(counting(["move"]), events())
        if way == "tangents":
            propagate(network, parts)
        else:
            order = [p for p in parts if p.moves] + [p for p in parts if not p.moves]
            network(torch.cat([p.x for p in order]))
        assert "forward" not in norm.__dict__
        found.append(norm)
    torch.testing.assert_close(found[0].running_mean, found[1].running_mean)
    torch.testing.assert_close(found[0].running_var, found[1].running_var)
