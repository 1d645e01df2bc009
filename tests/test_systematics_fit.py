"""Nuisances in `fit` and in a plain loop: epochs, resumed runs, validation, signed weights."""

import pytest
import torch
from torch.distributions import Normal
from torch.utils.data import ConcatDataset, DataLoader, Subset, random_split

import flowpost as fp
from benchmarks.systematics import exact, measure
from flowpost.systematics import (
    ConditionedEncoder,
    Mixed,
    Nuisances,
    Perturbed,
    Simulated,
    Weighted,
    at,
    report,
)

pl = pytest.importorskip("lightning.pytorch")

N = 120
PRIOR = Nuisances(shift=Normal(0.0, 0.5))


def simulate(nu, generator):
    z = torch.randn(len(nu), 1, generator=generator)
    return torch.cat([z + nu, z - nu], 1), z


def model_of(seed=0, encoder=None):
    torch.manual_seed(seed)
    encoder = encoder or fp.encoders.Tabular(2, 4, hidden=8, layers=1)
    size = 5 if isinstance(encoder, ConditionedEncoder) else 4
    return fp.PosteriorModel(encoder, fp.PosteriorHead(size, fp.Real(1), "diagonal"))


def nominal(n=N, seed=0):
    return simulate(torch.zeros(n, 1), torch.Generator().manual_seed(seed))


class Seen(pl.Callback):
    """The labels of every batch, by epoch, in training and validation."""

    def __init__(self):
        self.train, self.val = {}, {}

    def _keep(self, store, trainer, batch):
        x = batch[0] if isinstance(batch, (tuple, list)) else batch["x"]
        store.setdefault(trainer.current_epoch, []).append(x.clone())

    def on_train_batch_start(self, trainer, module, batch, index):
        self._keep(self.train, trainer, batch)

    def on_validation_batch_start(self, trainer, module, batch, index, dataloader_idx=0):
        self._keep(self.val, trainer, batch)


def fit(model, train, val=0.25, **options):
    options = {"epochs": 3, "batch_size": 30, "progress": False, **options}
    seen = Seen()
    history = fp.fit(model, train, val, callbacks=[seen], **options)
    assert len(history.epochs) == options["epochs"]
    return history, seen


def joined(batches):
    return torch.cat(batches)


X, Z = nominal()
WEIGHTS = {"nominal": torch.ones(N), "up": torch.linspace(-0.2, 2.2, N)}
EVENTS = {
    "simulated": lambda: Simulated(simulate, PRIOR, N),
    "perturbed": lambda: Perturbed((X, Z), lambda x, nu, _: x + nu, PRIOR),
    "mixed": lambda: Mixed({"a": (X, Z), "b": (X + 1, Z)}),
    "mixed, drawn": lambda: Mixed({"a": (X, Z), "b": (X + 1, Z)}, draw=True),
    "weighted": lambda: Weighted((X, Z), WEIGHTS),
    "weighted, drawn": lambda: Weighted((X, Z), WEIGHTS, draw=True),
}


@pytest.mark.parametrize("name", EVENTS)
def test_every_kind_of_events_trains_the_same_way_twice(name):
    models = [model_of(), model_of()]
    events = EVENTS[name]()
    options = {"signed_weights": name.startswith("weighted"), "epochs": 4}
    for model in models:
        # the same object again, whatever epoch the last run ended in
        fit(model, events, **options)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)
    assert bool(models[0].head.fitted)
    assert models[0].encoder.fitted


@pytest.mark.parametrize("kind", ["Dataset", "Subset", "ConcatDataset", "DataLoader"])
def test_fit_tells_the_epoch(kind):
    events = Simulated(simulate, PRIOR, N)
    train = {
        "Dataset": events,
        "Subset": Subset(events, range(N)),
        "ConcatDataset": ConcatDataset([events]),
        "DataLoader": DataLoader(events, 30),
    }[kind]
    _, seen = fit(model_of(), train, val=nominal(seed=1), epochs=10)
    labels = [set(joined(seen.train[e])[:, 0].tolist()) for e in range(9)]
    assert all(len(one) == N for one in labels)
    assert all(not labels[i] & labels[j] for i in range(9) for j in range(i))
    # the settling saw the tenth
    assert events.epoch == 10


def test_the_first_batch_is_of_its_own_epoch():
    """Lightning takes it before the epoch begins."""
    events = Simulated(simulate, PRIOR, N)
    _, seen = fit(model_of(), DataLoader(events, 30), val=nominal(seed=1))
    for number in range(3):
        events.set_epoch(number)
        expected = [events.batch(range(i, i + 30)).x for i in range(0, N, 30)]
        assert torch.equal(joined(seen.train[number]), joined(expected))


@pytest.mark.parametrize("way", ["fraction", "Dataset", "ConcatDataset", "Subset of the same"])
def test_validation_events_stay_as_they_are(way):
    events = Simulated(simulate, PRIOR, N)
    train, val = events, 0.25
    if way in ("Dataset", "ConcatDataset"):
        val = Simulated(simulate, PRIOR, 50, seed=7)
        val = ConcatDataset([val]) if way == "ConcatDataset" else val
    if way == "Subset of the same":
        train, val = random_split(events, [90, 30], torch.Generator().manual_seed(0))
    _, seen = fit(model_of(), train, val)
    first = joined(seen.val[0])
    assert all(torch.equal(first, joined(seen.val[e])) for e in (1, 2))
    drawn = {x for e in range(3) for x in joined(seen.train[e])[:, 0].tolist()}
    assert not drawn & set(first[:, 0].tolist())


def test_a_resumed_run_sees_the_events_of_its_epochs(tmp_path):
    class Interrupt(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 2:
                raise RuntimeError("power cut")

    whole, file = model_of(), tmp_path / "run.ckpt"
    fp.fit(whole, EVENTS["simulated"](), epochs=10, batch_size=30, progress=False)
    options = {"epochs": 10, "batch_size": 30, "progress": False, "checkpoint": file}
    with pytest.raises(RuntimeError, match="power cut"):
        fp.fit(model_of(), EVENTS["simulated"](), callbacks=[Interrupt()], **options)
    resumed = model_of(seed=9)
    fp.fit(resumed, EVENTS["simulated"](), **options)
    for a, b in zip(resumed.state_dict().values(), whole.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_workers_change_nothing():
    models = [model_of(), model_of()]
    for model, workers in zip(models, (0, 1), strict=True):
        fit(model, Simulated(simulate, PRIOR, N), epochs=2, workers=workers)
    for a, b in zip(*(m.state_dict().values() for m in models), strict=True):
        assert torch.equal(a, b)


def test_a_trainer_of_ones_own_is_told_too():
    events = Simulated(simulate, PRIOR, N)
    trainer = pl.Trainer(
        max_epochs=2, logger=False, enable_progress_bar=False, enable_checkpointing=False,
        enable_model_summary=False,
    )  # fmt: skip
    fp.fit(model_of(), events, trainer=trainer)
    assert events.epoch == 2


def test_padded_hits_with_their_lengths():
    def hits(nu, generator):
        lengths = torch.randint(1, 9, (len(nu),), generator=generator)
        x = torch.randn(len(nu), int(lengths.max()), 2, generator=generator) + nu[:, None]
        return (x, lengths), nu + lengths[:, None]

    encoder = fp.encoders.DeepSets(2, 4, hidden=4)
    history, _ = fit_hits(encoder, Simulated(hits, PRIOR, N))
    assert len(history.epochs) == 2


def fit_hits(encoder, events):
    torch.manual_seed(0)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(4, fp.Real(1), "diagonal"))
    history = fp.fit(model, events, epochs=2, batch_size=30, progress=False)
    assert encoder.fitted
    return history, model


def test_a_conditioned_encoder_is_scaled_inside():
    inner = fp.encoders.Tabular(2, 4, hidden=8, layers=1)
    model = model_of(encoder=ConditionedEncoder(inner, PRIOR, context=4))
    assert not model.encoder.fitted
    fp.fit(model, Simulated(simulate, PRIOR, N, condition=True), epochs=2, progress=False)
    assert inner.fitted
    assert model.encoder.fitted
    assert model(at(X, torch.zeros(1))).batch_shape == (N,)


def test_signed_weights_must_be_meant():
    with pytest.raises(ValueError, match="signed_weights=True"):
        fp.fit(
            model_of(),
            Weighted((X, Z), {"a": WEIGHTS["up"]}),
            val=nominal(seed=1),
            batch_size=N,
            progress=False,
        )


def test_plain_loop():
    """The loop of the guide: any optimizer, one call for each epoch."""
    prior = Nuisances(shift=Normal(0.0, 1.0))

    def events(nu, generator):
        z = 5 * torch.randn(len(nu), 1, generator=generator)
        return z + nu, z

    torch.manual_seed(0)
    model = fp.PosteriorModel(None, fp.PosteriorHead(1, fp.Real(1), "diagonal"))
    train = Simulated(events, prior, 2048)
    loader = DataLoader(train, batch_size=256, shuffle=True)
    model.head.fit_scale(train.batch(range(2048)).z)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 30)
    for number in range(30):
        train.set_epoch(number)
        for x, z in loader:
            loss = model.loss(x, z)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()
    # all the error is the nuisance: σ² = 1/(1 + 1/25)
    x, z = train.fixed().batch(range(2048))[:2]
    assert model(x).stddev.mean().item() == pytest.approx(0.98, abs=0.03)
    found = report(model, events, prior, at=(), events=5000)
    assert found.averaged.coverage.coverage_at(0.68) == pytest.approx(0.68, abs=0.03)


@pytest.mark.parametrize(
    "way",
    [
        "simulated",
        pytest.param("perturbed", marks=pytest.mark.slow),
        pytest.param("weighted", marks=pytest.mark.slow),
    ],
)
def test_trained_heads_reach_the_closed_form(way):
    """Small and affine; the slow test trains splines for every way."""
    found = measure(way, 1.0, size=20_000, epochs=20, flow="affine", fresh=20_000)
    assert found["gap"] < 0.02
    assert found["coverage"][2.0, 0.9] == pytest.approx(exact(1.0, 2, 0.9), abs=0.02)
