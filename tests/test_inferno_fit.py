"""Training of summaries: what they reach, what is kept, what repeats."""

import math
import warnings

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from flowpost.encoders import Tabular
from flowpost.inferno import (
    CountingModel,
    InfernoLoss,
    Normalisation,
    Process,
    Sample,
    SoftBins,
    SummaryModel,
    Transform,
    fit,
    information,
)

# what short trainings leave empty is not the matter here
pytestmark = pytest.mark.filterwarnings("ignore:.*bins hold.*")


def moved(x, value):
    return torch.cat([x[:, :1] + value, x[:, 1:]], 1)


MODEL = CountingModel(
    [Process("signal", 50.0, signal=True), Process("background", 1000.0)],
    [
        Transform(name="r", apply=moved, processes="background", constraint=Normal(0.0, 0.4)),
        Normalisation(name="b", processes="background", constraint=Normal(1000.0, 100.0)),
    ],
)


def samples(size=2000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    signal, background = (torch.randn(size, 2, generator=generator) for _ in range(2))
    return {"signal": 0.7 * signal, "background": 2 * background + torch.tensor([1.5, 0.0])}


def network(seed=0, **options):
    torch.manual_seed(seed)
    return SummaryModel(
        Tabular(2, 16, hidden=32, layers=2, dropout=0.1), SoftBins(16, 6, **options)
    )


def trained(**options):
    net = network()
    return net, fit(net, InfernoLoss(MODEL, spread=0.1), samples(), progress=False, **options)


@pytest.fixture(scope="module")
def whole():
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return trained(epochs=8, batch_size=100, lr=3e-3, seed=4)


def test_it_learns_and_keeps_the_best(whole):
    net, history = whole
    assert not net.training
    assert bool(net.encoder.fitted)
    assert history.best.val == min(e.val for e in history.epochs)
    assert [e.epoch for e in history.epochs] == list(range(1, 9))
    assert "8 epochs" in str(history)
    start = information(MODEL, network().fit_scale(samples()["signal"]), samples(seed=9)).width
    end = information(MODEL, net, samples(seed=9)).width
    # a plain count: 105; no background at all: 7.1
    assert 20 < end < 32 < start
    assert history.best.val == pytest.approx(2 * math.log(end), abs=0.3)


def test_it_repeats_and_leaves_the_global_state(whole):
    state = torch.get_rng_state()
    net, _ = trained(epochs=8, batch_size=100, lr=3e-3, seed=4)
    torch.manual_seed(0)
    torch.set_rng_state(state)
    for a, b in zip(net.state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    other = network()
    before = torch.get_rng_state()
    fit(other, InfernoLoss(MODEL), samples(), epochs=1, batch_size=500, seed=5, progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(other.head.logits.weight, net.head.logits.weight)


def test_a_stopped_training_goes_on(whole, tmp_path):
    from lightning.pytorch import Callback

    class Stop(Callback):
        def on_train_epoch_start(self, trainer, module):
            if len(module.course.rows) == 3:
                raise InterruptedError

    path = tmp_path / "state.ckpt"
    options = {"epochs": 8, "batch_size": 100, "lr": 3e-3, "seed": 4, "checkpoint": path}
    net = network()
    with pytest.raises(InterruptedError):
        fit(
            net, InfernoLoss(MODEL, spread=0.1), samples(), progress=False, callbacks=[Stop()],
            **options,
        )  # fmt: skip
    net = network()
    history = fit(net, InfernoLoss(MODEL, spread=0.1), samples(), progress=False, **options)
    assert [e.val for e in history.epochs] == [e.val for e in whole[1].epochs]
    for a, b in zip(net.state_dict().values(), whole[0].state_dict().values(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match=r"was begun with \(lr=0.003\); got 0.01"):
        fit(net, InfernoLoss(MODEL), samples(), progress=False, **{**options, "lr": 0.01})
    path.write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"as a checkpoint of flowpost.inferno.fit"):
        fit(net, InfernoLoss(MODEL), samples(), progress=False, **options)


def test_a_plain_loop():
    """What fit does for you, without Lightning."""
    from flowpost.inferno import Batches

    net, loss = network(), InfernoLoss(MODEL, spread=0.1)
    data = samples()
    net.fit_scale(torch.cat(list(data.values())))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)
    batches = Batches(MODEL, data, size=200)
    for epoch in range(15):
        loss.anneal(epoch / 15)
        for batch in batches:
            optimizer.zero_grad()
            loss(net, batch).backward()
            optimizer.step()
    assert information(MODEL, net, samples(seed=9)).width < 32


def test_a_schedule_of_the_temperature():
    net = network(temperature=lambda progress: 1.0 - 0.8 * progress)
    history = fit(net, InfernoLoss(MODEL, spread=0.2), samples(), epochs=3, progress=False)
    assert history.epochs[0].temperature > history.epochs[-1].temperature
    assert history.epochs[-1].temperature == pytest.approx(0.2)


def test_a_collapse_after_an_epoch_keeps_the_best_weights():
    net = network()
    loss = InfernoLoss(MODEL)
    calls = []

    class Breaking:
        model = MODEL

        def __call__(self, network, batch):
            calls.append(1)
            if len(calls) > 4:
                raise ValueError("Expected an information matrix that can be inverted")
            return loss(network, batch)

    with pytest.warns(UserWarning, match="stopped in epoch 2 .* weights of epoch 1"):
        history = fit(net, Breaking(), samples(), epochs=3, batch_size=600, progress=False)
    assert len(history.epochs) == 1
    calls.extend([1] * 5)
    with pytest.raises(ValueError, match="information matrix"):
        fit(network(), Breaking(), samples(), epochs=3, batch_size=600, progress=False)


@pytest.mark.filterwarnings("ignore:All events fall into bin")
def test_dead_bins_and_a_collapse_are_told():
    class Dead(nn.Module):
        def __init__(self, keep):
            super().__init__()
            self.keep, self.weight = keep, nn.Parameter(torch.ones(1))

        def forward(self, x):
            zero = torch.full_like(x[:, :1], -50.0)
            first = self.weight * x[:, :1] if self.keep else 50 + 0 * self.weight * x[:, :1]
            return torch.cat([first, -first, *[zero] * 4], 1)

    for keep, text in ((True, "4 of 6 bins hold"), (False, "into one hard bin")):
        net = SummaryModel(Dead(keep), SoftBins(6, 6))
        with torch.no_grad():
            net.head.logits.weight.copy_(torch.eye(6))
            net.head.logits.bias.zero_()
        net.head.requires_grad_(False)
        with pytest.warns(UserWarning, match=text):
            fit(net, InfernoLoss(MODEL), samples(), epochs=1, lr=1e-6, progress=False)


def test_a_classifier_is_scaled_as_a_summary():
    from flowpost.inferno import CrossEntropyLoss

    torch.manual_seed(0)
    classifier = nn.Sequential(Tabular(2, 8, hidden=8, layers=1), nn.SiLU(), nn.Linear(8, 1))
    data = {k: 1000 + 100 * x for k, x in samples().items()}
    model = CountingModel(MODEL.processes)
    fit(classifier, CrossEntropyLoss(model), data, epochs=1, progress=False)
    assert bool(classifier[0].fitted)
    inside = nn.Sequential(nn.Linear(2, 2), Tabular(2, 8, hidden=8, layers=1), nn.Linear(8, 1))
    with pytest.warns(UserWarning, match="'1' has no scales"):
        fit(inside, CrossEntropyLoss(model), data, epochs=1, progress=False)


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precisions(precision):
    net = network()
    history = fit(net, InfernoLoss(MODEL), samples(), epochs=2, progress=False, precision=precision)
    assert math.isfinite(history.best.val)


def test_the_loss_begins_anew_behind_a_training(whole):
    loss = InfernoLoss(MODEL, spread=0.3)
    before = loss(whole[0], samples()).item()
    fit(network(), loss, samples(), epochs=1, progress=False)
    assert loss(whole[0], samples()).item() == before


BAD = torch.where(torch.arange(2000)[:, None] == 7, torch.nan, samples()["signal"])


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: fit(InfernoLoss(MODEL), network(), samples()), "Try fit\\(SummaryModel"),
        (lambda: fit(network(), InfernoLoss(MODEL), {"signal": BAD}), "samples of signal, back"),
        (
            lambda: fit(network(), InfernoLoss(MODEL), {**samples(), "signal": BAD}),
            "In the sample of 'signal': Expected finite x; got nan in row",
        ),
        (
            lambda: fit(network(), InfernoLoss(MODEL), {**samples(), "signal": Sample(BAD[:, :1])}),
            "In the sample of 'signal': Expected x of shape",
        ),
        (lambda: fit(network(), InfernoLoss(MODEL), samples(), epochs=0), "epochs as a whole"),
        (lambda: InfernoLoss(MODEL, spread=-1.0), "spread as a number of at least 0"),
        (lambda: InfernoLoss(network()), "Expected a CountingModel"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
