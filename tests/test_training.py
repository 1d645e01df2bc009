"""fit: the forms of data, reproducibility, resuming, best weights, own trainers, plain loops."""

import itertools
import math
import sys

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import flowpost as fp

pl = pytest.importorskip("lightning.pytorch")

N, SIGMA = 120, 0.3


def events(n=N, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g)
    return x, x[:, :1] + SIGMA * torch.randn(n, 1, generator=g)


def model_of(seed=0, dropout=0.2, flow="diagonal"):
    torch.manual_seed(seed)
    encoder = fp.encoders.Tabular(2, 4, hidden=8, layers=1, dropout=dropout)
    return fp.PosteriorModel(encoder, fp.PosteriorHead(4, fp.Real(1), flow, bins=4, hidden=4))


def fit(model, train, val=None, **options):
    options = {"epochs": 2, "batch_size": 40, "progress": False, **options}
    return fp.fit(model, train, events(60, seed=1) if val is None else val, **options)


def equal(a, b):
    return all(torch.equal(u, v) for u, v in zip(a.values(), b.values(), strict=True))


class Recorder(pl.Callback):
    """What the training sees: modes and the events of each step."""

    def __init__(self):
        self.modes, self.steps = [], []

    def on_train_batch_start(self, trainer, module, batch, index):
        self.modes.append(all(m.training for m in module.model.modules()))
        x = batch[0] if isinstance(batch, (tuple, list)) else batch["x"]
        self.steps.append((trainer.current_epoch, tuple(x[:, 0].tolist())))

    def epoch(self, number):
        return [x for epoch, x in self.steps if epoch == number]


class Interrupt(pl.Callback):
    def __init__(self, epoch):
        self.epoch = epoch

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == self.epoch:
            raise RuntimeError("power cut")


# ----------------------------------------------------------------------------- forms of the data


class Dicts(Dataset):
    def __init__(self, x, z):
        self.x, self.z = x, z

    def __len__(self):
        return len(self.z)

    def __getitem__(self, i):
        return {"x": self.x[i], "z": self.z[i]}


class Stream(IterableDataset):
    def __init__(self, x, z):
        self.x, self.z = x, z

    def __iter__(self):
        yield from zip(self.x, self.z, strict=True)


X, Z = events()
FORMS = {
    "tuple": lambda: (X, Z),
    "arrays": lambda: (X.numpy(), Z.double().numpy()),
    "labels (N,)": lambda: (X, Z[:, 0]),
    "dict": lambda: {"x": X, "z": Z},
    "weights": lambda: (X, Z, torch.ones(N)),
    "mask": lambda: {"x": X, "z": Z, "mask": torch.ones(N, 1, dtype=torch.bool)},
    "Dataset": lambda: TensorDataset(X, Z),
    "Dataset of dicts": lambda: Dicts(X, Z),
    "DataLoader": lambda: DataLoader(TensorDataset(X, Z), batch_size=40, shuffle=True),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_training_data(form):
    model = model_of()
    history = fit(model, FORMS[form](), epochs=3, lr=1e-2)
    assert len(history.epochs) == 3
    assert history.epochs[-1].val_nll < history.epochs[0].val_nll
    assert bool(model.head.fitted)
    assert model.encoder.fitted
    assert not any(m.training for m in model.modules())
    torch.testing.assert_close(model.head.loc, Z.mean(0), rtol=1e-4, atol=1e-5)


def test_stream_of_events():
    loader = DataLoader(Stream(X, Z), batch_size=40)
    assert len(fit(model_of(), loader, schedule=None).epochs) == 2


@pytest.mark.parametrize("form", ["tuple", "dict", "Dataset", "DataLoader", "weights"])
def test_every_form_of_validation_data(form):
    expected = fit(model_of(), (X, Z), val=(X, Z)).best.val_nll
    data = DataLoader(TensorDataset(X, Z), 40) if form == "DataLoader" else FORMS[form]()
    assert fit(model_of(), (X, Z), val=data).best.val_nll == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("form", ["tuple", "dict", "weights", "Dataset"])
def test_validation_as_a_fraction(form):
    model, recorder = model_of(), Recorder()
    fit(model, FORMS[form](), val=0.25, callbacks=[recorder], epochs=2)
    seen = set(itertools.chain(*recorder.epoch(0)))
    assert len(seen) == 90
    # scales know the training part only
    kept = torch.tensor([x in seen for x in X[:, 0].tolist()])
    torch.testing.assert_close(model.head.loc, Z[kept].mean(0), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        model.encoder.squash.loc, X[kept].quantile(0.5, dim=0), atol=0.03, rtol=0
    )


class Sum(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 4)

    def forward(self, a, b):
        return self.layer(a + b)


def test_inputs_as_tuples_and_dicts():
    for x in ((X[:, :1], X[:, 1:]), {"a": X[:, :1], "b": X[:, 1:]}):
        model = fp.PosteriorModel(Sum(), fp.PosteriorHead(4, fp.Real(1), "diagonal"))
        assert len(fit(model, {"x": x, "z": Z}, val=0.2).epochs) == 2


@pytest.mark.parametrize("kind", ["tuple", "dict"])
@pytest.mark.parametrize("name", ["LSTM", "DeepSets"])
def test_events_of_variable_length(name, kind):
    hits, lengths = torch.randn(N, 5, 2), torch.arange(N) % 6
    x = (hits, lengths) if kind == "tuple" else {"x": hits, "lengths": lengths}
    encoder = getattr(fp.encoders, name)(2, 4, hidden=4)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(4, fp.Real(1), "diagonal"))
    assert len(fit(model, {"x": x, "z": Z}, val=0.2).epochs) == 2
    assert encoder.fitted


def test_unconditional_density_finds_mean_and_width():
    z = torch.tensor([5.0, -1.0]) + torch.tensor([0.1, 30.0]) * torch.randn(2000, 2)
    model = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Real(2), "affine"))
    history = fp.fit(model, z, val=0.2, epochs=5, lr=1e-2, progress=False)
    q = model(None)
    exact = torch.distributions.Normal(torch.tensor([5.0, -1.0]), torch.tensor([0.1, 30.0]))
    assert history.best.val_nll == pytest.approx(exact.entropy().sum().item(), abs=0.1)
    torch.testing.assert_close(q.stddev, exact.stddev, rtol=0.05, atol=0)


def test_model_without_encoder_learns():
    model = fp.PosteriorModel(None, fp.PosteriorHead(2, fp.Real(1), "diagonal"))
    x, z = events(2000)
    fp.fit(model, (x, z), val=0.1, epochs=20, lr=2e-2, progress=False)
    x, z = events(2000, seed=5)
    exact = -torch.distributions.Normal(x[:, :1], SIGMA).log_prob(z).mean()
    nll = -model(x).log_prob(z).mean()
    assert abs(nll - exact) < 0.02
    assert model(x).to_base(z).std().item() == pytest.approx(1, abs=0.05)


def test_weights_act():
    """Labels of two groups; nearly all weight on one: the density has to follow it."""
    z = torch.cat([torch.randn(300, 1) - 4, torch.randn(300, 1) + 4])
    weight = torch.cat([torch.ones(300), torch.full((300,), 1e-3)])
    model = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Real(1), "diagonal"))
    data = {"z": z, "weight": weight}
    fp.fit(model, data, val=data, epochs=20, lr=5e-2, progress=False)
    assert model(None).mean.item() == pytest.approx(-4, abs=0.2)
    assert model(None).stddev.item() == pytest.approx(1, abs=0.15)
    assert model.head.loc.item() == pytest.approx(-4, abs=0.2)


def test_masks_act():
    space = fp.Product(a=fp.Real(), b=fp.Real())
    z = torch.cat([torch.randn(400, 1), torch.randn(400, 1) + 3], 1)
    mask = torch.ones(400, 2, dtype=torch.bool)
    mask[::2, 1] = False
    z[::2, 1] = math.nan
    model = fp.PosteriorModel(None, fp.PosteriorHead(0, space, "affine"))
    data = {"z": z, "mask": mask}
    history = fp.fit(model, data, val=data, epochs=10, lr=2e-2, progress=False)
    torch.testing.assert_close(model(None).mean, torch.tensor([0.0, 3.0]), atol=0.15, rtol=0)
    assert math.isfinite(history.best.val_nll)


# ----------------------------------------------------------------------- reproducible, resumable


@pytest.mark.parametrize("form", ["tuple", "Dataset", "DataLoader"])
def test_same_seed_same_weights_and_untouched_random_state(form):
    states = []
    for seed in (11, 12):
        model = model_of()
        torch.manual_seed(seed)
        np.random.seed(seed)  # noqa: NPY002 (the global state must not matter)
        before, array = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
        fit(model, FORMS[form](), seed=3)
        assert torch.equal(torch.get_rng_state(), before)
        assert (np.random.get_state()[1] == array).all()  # noqa: NPY002
        states.append(model.state_dict())
    assert equal(*states)


def test_other_seed_other_weights():
    states = []
    for seed in (3, 4):
        model = model_of()
        fit(model, (X, Z), seed=seed)
        states.append(model.state_dict())
    assert not equal(*states)


@pytest.mark.parametrize("form", ["tuple", "Dataset", "Dataset of dicts"])
def test_epochs_have_different_orders_of_all_events(form):
    recorder = Recorder()
    fit(model_of(), FORMS[form](), epochs=3, callbacks=[recorder])
    first, second, third = (recorder.epoch(i) for i in range(3))
    assert [len(x) for x in first] == [40, 40, 40]
    for epoch in (first, second, third):
        assert sorted(itertools.chain(*epoch)) == sorted(X[:, 0].tolist())
    assert first != second
    assert second != third


@pytest.mark.parametrize("form", ["tuple", "Dataset"])
@pytest.mark.parametrize("epoch", [1, 3])
def test_resumed_run_is_the_uninterrupted_one(form, epoch, tmp_path):
    data, file = FORMS[form](), tmp_path / "run.ckpt"
    whole = model_of()
    expected = fit(whole, data, epochs=5, lr=1e-2)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model_of(), data, epochs=5, lr=1e-2, checkpoint=file, callbacks=[Interrupt(epoch)])
    assert file.exists()
    resumed, recorder = model_of(seed=99), Recorder()
    torch.rand(7)
    history = fit(resumed, data, epochs=5, lr=1e-2, checkpoint=file, callbacks=[recorder])
    assert recorder.steps[0][0] == epoch
    assert history["val_nll"] == expected["val_nll"]
    assert history["epoch"] == [1, 2, 3, 4, 5]
    assert equal(resumed.state_dict(), whole.state_dict())


def test_finished_run_is_not_run_again(tmp_path):
    file = tmp_path / "sub" / "run.ckpt"
    first, again = model_of(), model_of(seed=9)
    expected = fit(first, (X, Z), checkpoint=file)
    recorder = Recorder()
    history = fit(again, (X, Z), checkpoint=file, callbacks=[recorder])
    assert recorder.steps == []
    assert history["val_nll"] == expected["val_nll"]
    assert equal(first.state_dict(), again.state_dict())
    assert [p.name for p in file.parent.iterdir()] == ["run.ckpt"]


# ------------------------------------------------------------------------ best weights, stopping


def test_best_weights_are_kept():
    def runaway(optimizer, steps):
        rate = torch.optim.lr_scheduler.LambdaLR
        return rate(optimizer, lambda i: 1.0 if i < steps // 2 else 300.0)

    model = model_of()
    history = fit(model, (X, Z), epochs=8, lr=0.01, schedule=runaway)
    nll = history["val_nll"]
    assert history.best.epoch == 1 + int(np.argmin(nll))
    # the learning rate is far too large in the end on purpose: the last epoch is not the best
    assert history.best.epoch < 8
    x, z = events(60, seed=1)
    assert -model(x).log_prob(z).mean().item() == pytest.approx(min(nll), abs=1e-5)


def test_snapshots_are_the_weights_of_their_epochs(tmp_path):
    file, model = tmp_path / "run.ckpt", model_of()
    options = {"epochs": 5, "checkpoint": file, "snapshots": (1, 4)}
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model_of(), (X, Z), callbacks=[Interrupt(2)], **options)
    history = fit(model, (X, Z), **options)
    assert list(history.snapshots) == [1, 4]
    x, z = events(60, seed=1)
    for epoch, state in history.snapshots.items():
        model.load_state_dict(state)
        expected = history.epochs[epoch - 1].val_nll
        assert -model(x).log_prob(z).mean().item() == pytest.approx(expected, abs=1e-5)


def test_numbers_of_the_history():
    model = model_of()
    x, z = events(60, seed=1)
    history = fit(model, (X, Z), epochs=3)
    best = history.best
    level = model(x).credibility(z)
    assert best.coverage50 == pytest.approx((level <= 0.5).float().mean().item(), abs=0.02)
    assert best.coverage68 == pytest.approx((level <= 0.682689).float().mean().item(), abs=0.02)
    assert best.coverage90 == pytest.approx((level <= 0.9).float().mean().item(), abs=0.02)
    assert 0 <= best.ks_pvalue <= 1
    assert history["seconds"] == sorted(history["seconds"])
    assert f"kept epoch {best.epoch}" in str(history)
    with pytest.raises(ValueError, match="Expected one of epoch, train_nll"):
        history["loss"]


def test_early_stopping():
    history = fit(model_of(), (X, Z), epochs=40, lr=0.3, schedule=None, patience=2)
    assert history.stopped_early
    settled = 4
    best = min(history.epochs[:-settled], key=lambda e: e.val_nll)
    assert len(history.epochs) == best.epoch + 2 + settled
    assert not fit(model_of(), (X, Z)).stopped_early


# ----------------------------------------------------------------------- Lightning passed through


def test_own_trainer(tmp_path):
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    model = model_of()
    history = fit(model, (X, Z), epochs=100, trainer=trainer)
    assert len(history.epochs) == 3
    assert trainer.current_epoch == 3
    assert not model.training


def test_logger_is_passed_through(tmp_path):
    from lightning.pytorch.loggers import CSVLogger

    history = fit(model_of(), (X, Z), logger=CSVLogger(tmp_path, name="run"))
    (file,) = tmp_path.rglob("metrics.csv")
    lines = file.read_text().splitlines()
    columns = lines[0].split(",")
    assert {"train_nll", "val_nll", "coverage68"} <= set(columns)
    at = columns.index("val_nll")
    logged = [float(v) for v in (line.split(",")[at] for line in lines[1:]) if v]
    assert logged == pytest.approx(history["val_nll"], rel=1e-5)


def test_nothing_is_written_without_being_asked(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    fit(model_of(), (X, Z))
    assert list(tmp_path.iterdir()) == []
    out, err = capfd.readouterr()
    assert out + err == ""


def test_bfloat16_precision():
    x, z = events(500)
    nll = [
        fit(model_of(dropout=0.0), (x, z), epochs=5, lr=1e-2, precision=p).best.val_nll
        for p in ("32-true", "bf16-mixed")
    ]
    assert nll[0] == pytest.approx(nll[1], abs=0.03)


@pytest.mark.parametrize("schedule", [None, "one-cycle"])
def test_schedule(schedule):
    lr = fit(model_of(), (X, Z), epochs=5, lr=1e-2, schedule=schedule)["lr"]
    if schedule is None:
        assert lr == pytest.approx([1e-2] * 5)
    else:
        assert max(lr) <= 1e-2
        assert lr[-1] < 5e-4


def test_own_schedule():
    def half(optimizer, steps):
        assert steps == 6
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5)

    assert fit(model_of(), (X, Z), lr=1e-2, schedule=half)["lr"] == pytest.approx([5e-3] * 2)


def test_second_fit_trains_with_dropout_and_keeps_the_scale():
    model, recorder = model_of(), Recorder()
    fit(model, (X, Z))
    scale = model.head.scale.clone()
    fit(model, (X, 100 * Z), val=(X, 100 * Z), callbacks=[recorder])
    assert recorder.modes == [True] * 6
    assert torch.equal(model.head.scale, scale)
    assert not model.training


def test_frozen_encoders_stay_frozen():
    model = model_of()
    for p in model.encoder.parameters():
        p.requires_grad_(False)
    before = {k: v.clone() for k, v in model.encoder.named_parameters()}
    head = model.head.flow.bias.detach().clone()
    fit(model, (X, Z))
    assert equal(before, dict(model.encoder.named_parameters()))
    assert not torch.equal(model.head.flow.bias, head)


# --------------------------------------------------------------------------------------- errors


def nan_at(t, row):
    t = t.clone()
    t[row, 0] = math.nan
    return t


@pytest.mark.parametrize(
    ("train", "options", "text"),
    [
        ((nan_at(X, 3), Z), {}, "Expected finite x; got nan in row 3"),
        ((X, nan_at(Z, 3)), {}, "finite labels; got nan in labels, row 3"),
        ((X[:0], Z[:0]), {}, "Expected at least one event"),
        ((X[:-1], Z), {}, "Expected as many inputs as labels; got"),
        ((X, Z, torch.ones(3)), {}, "Expected as many inputs as labels"),
        ((X, Z, -torch.ones(N)), {}, "Expected weights of at least 0; got -1"),
        ((X, Z, torch.full((N,), math.nan)), {}, "Expected finite weight"),
        ((X, Z), {"val": (X, nan_at(Z, 7))}, "finite labels; got nan"),
        ((X, Z), {"val": (X, Z, torch.full((N,), math.nan))}, "finite weight"),
        ((X, Z), {"val": (X[:0], Z[:0])}, "Expected at least one event"),
        ((X, Z), {"val": 0.0}, "Expected val as a fraction between 0 and 1; got 0"),
        ((X, Z), {"val": 1}, "Expected val as a fraction"),
        ((X[:3], Z[:3]), {"val": 0.01}, "Expected events for training and validation"),
        ({"x": X, "y": Z}, {}, "Expected keys x, z, weight, mask, reference; got x, y"),
        ((X, Z, None, None, None), {}, "Expected one to four parts; got 5"),
        ((X, Z), {"epochs": 0}, "Expected epochs"),
        ((X, Z), {"batch_size": 0}, "Expected batch_size"),
        ((X, Z), {"schedule": "cosine"}, "Expected schedule as 'one-cycle'"),
    ],
)
def test_errors(train, options, text):
    with pytest.raises(ValueError, match=text):
        fit(model_of(), train, options.pop("val", None), **options)


def test_a_loader_cannot_be_divided():
    with pytest.raises(ValueError, match="Expected val as a DataLoader or tensors beside a DataLo"):
        fit(model_of(), FORMS["DataLoader"](), val=0.1)


def test_only_models_are_trained():
    with pytest.raises(ValueError, match=r"Wrap it: PosteriorModel\(None, head\)"):
        fit(model_of().head, (X, Z))
    with pytest.raises(
        ValueError, match=r"Expected a PosteriorModel; got Linear.*\(encoder, head\)"
    ):
        fit(nn.Linear(2, 2), (X, Z))


def test_checkpoints_of_others_are_refused(tmp_path):
    trainer = pl.Trainer(max_epochs=1, logger=False, enable_checkpointing=False,
                         enable_progress_bar=False, enable_model_summary=False)  # fmt: skip
    fit(model_of(), (X, Z), trainer=trainer)
    file = tmp_path / "other.ckpt"
    trainer.save_checkpoint(file)
    content = torch.load(file, weights_only=True)
    del content["flowpost.fit"]
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"Expected .*other.ckpt as a checkpoint of flowpost.fit"):
        fit(model_of(), (X, Z), checkpoint=file)


# ------------------------------------------------------------------------------- the plain loop


def test_plain_pytorch_loop():
    x, z = events(1000)
    model = model_of(dropout=0.0)
    model.encoder.fit_scale(x)
    model.head.fit_scale(z)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(10):
        for i in torch.randperm(len(z)).split(100):
            optimizer.zero_grad()
            loss = model.loss(x[i], z[i])
            loss.backward()
            optimizer.step()
    model.eval()
    x, z = events(2000, seed=7)
    exact = -torch.distributions.Normal(x[:, :1], SIGMA).log_prob(z).mean()
    assert abs(-model(x).log_prob(z).mean() - exact) < 0.05
    cov = fp.coverage(model(x).to_base(z).detach())
    assert cov.ks_pvalue > 1e-4


@pytest.mark.slow
def test_the_lines_of_the_issue(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    x = torch.randn(3000, 12)
    z = torch.exp(x[:, :1] + 0.2 * torch.randn(3000, 1))
    x_train, z_train, x_test, z_test = x[:2000], z[:2000], x[2000:], z[2000:]
    model = fp.PosteriorModel(
        fp.encoders.Tabular(12, 64),
        fp.PosteriorHead(64, fp.Product(z=fp.Positive()), flow="spline"),
    )
    fp.fit(model, (x_train, z_train), val=0.1, epochs=30, batch_size=256, lr=1e-3, seed=0,
           progress=False)  # fmt: skip
    q = model(x_test)
    nll = -q.log_prob(z_test).mean()
    exact = torch.distributions.LogNormal(x_test[:, :1], 0.2).log_prob(z_test).mean()
    assert nll + exact < 0.25
    cov = fp.coverage(q.to_base(z_test))
    assert cov.ks_pvalue > 1e-6
    fp.save(model, "run1")
    assert torch.equal(fp.load("run1")(x_test).log_prob(z_test), q.log_prob(z_test))
    density = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Real(2)))
    fp.fit(density, torch.randn(2000, 2), val=0.1, epochs=10, progress=False)
    z = torch.randn(2000, 2)
    entropy = 1 + math.log(2 * math.pi)
    assert -density(None).log_prob(z).mean() - entropy < 0.1


# -------------------------------------------------------------------------------------- settling


def drop(model, seen):
    """Record whether dropout is active whenever the model is evaluated in a training step."""
    net = model.encoder.net[2]
    assert isinstance(net, nn.Dropout)
    net.register_forward_hook(lambda m, a, b: seen.append(m.training) if b.requires_grad else None)


def test_the_last_epochs_settle_from_the_best_weights_without_dropout():
    model, active = model_of(), []
    drop(model, active)
    history = fit(model, (X, Z), epochs=20, lr=1e-2)
    # three batches an epoch, of which a tenth of the epochs settle
    assert active == [True] * 54 + [False] * 6
    first, last = history["lr"][18:]
    assert 1e-3 > first > 4e-4 > 2 * last >= 0
    assert len(history.epochs) == 20
    assert history["epoch"] == list(range(1, 21))
    best = min(history.epochs[:18], key=lambda e: e.val_nll)
    assert history.best.epoch > 18 or history.best is best


def test_settling_is_undone_where_it_is_worse(monkeypatch):
    from flowpost.training import module

    monkeypatch.setattr(module, "_SETTLE_RATE", 100.0)
    history = fit(model_of(), (X, Z), epochs=20, lr=1e-2)
    assert history.best.epoch <= 18
    assert history.best.val_nll == min(history["val_nll"][:18])


def test_a_run_stopped_while_settling_is_resumed(tmp_path, monkeypatch):
    from flowpost.training import module

    whole, file = model_of(), tmp_path / "run.ckpt"
    fit(whole, (X, Z), epochs=20)
    kind = module.module_class()

    def interrupted(self):
        raise RuntimeError("power cut")

    kind.settle = interrupted
    monkeypatch.setattr(sys.modules["flowpost.training.fit"], "module_class", lambda: kind)
    with pytest.raises(RuntimeError, match="power cut"):
        fit(model_of(), (X, Z), epochs=20, checkpoint=file)
    monkeypatch.undo()
    resumed = model_of(seed=99)
    fit(resumed, (X, Z), epochs=20, checkpoint=file)
    assert equal(resumed.state_dict(), whole.state_dict())


def test_recurrent_networks_settle():
    torch.manual_seed(0)
    encoder = fp.encoders.LSTM(2, 4, hidden=4)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(4, fp.Real(1), "diagonal"))
    x = X[:, None, :].expand(-1, 3, -1)
    lengths = torch.full((len(x),), 3)
    val, z = events(60, seed=1)
    history = fp.fit(
        model,
        ((x, lengths), Z),
        ((val[:, None, :].expand(-1, 3, -1), lengths[:60]), z),
        epochs=10,
        progress=False,
    )
    assert len(history.epochs) == 10


def test_splines_decay_faster():
    from flowpost.training import module

    model = model_of(flow="spline")
    training = module.module_class()(model, 1e-3, 0.1, None, 0, False)
    decay = {id(p): g["weight_decay"] for g in training._groups() for p in g["params"]}
    assert decay[id(model.head.flow.spline_weight)] == pytest.approx(0.4)
    assert decay[id(model.head.flow.weight)] == pytest.approx(0.1)
    assert decay[id(model.head.flow.bias)] == 0
    assert len(decay) == len(list(model.parameters()))


def test_recurrent_dropout_rests_while_settling_and_comes_back():
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.lstm = nn.LSTM(2, 4, 2, dropout=0.5, batch_first=True)
            self.rates = []

        def forward(self, x):
            self.rates.append(self.lstm.dropout)
            return self.lstm(x[:, None])[0][:, -1]

    net = Net()
    fit(fp.PosteriorModel(net, fp.PosteriorHead(4, fp.Real(1), "diagonal")), (X, Z), epochs=10)
    assert set(net.rates) == {0.5, 0.0}
    assert net.lstm.dropout == 0.5


# --------------------------------------------------------------------------- what must not happen


def test_labels_do_not_broadcast_over_contexts():
    class Keeps(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(2, 4)

        def forward(self, x):
            return self.net(x)[:, None]

    model = fp.PosteriorModel(Keeps(), fp.PosteriorHead(4, fp.Real(1), "diagonal"))
    with pytest.raises(ValueError, match="Expected one label for each context"):
        fit(model, (X, Z))
    with pytest.raises(ValueError, match="Expected one label for each context"):
        model.head.loss(torch.randn(1, 4), Z)


def test_a_divergence_ends_the_training_with_the_best_weights():
    def runaway(optimizer, steps):
        rate = torch.optim.lr_scheduler.LambdaLR
        return rate(optimizer, lambda i: 1.0 if i < 12 else 1e30)

    model = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Real(1), "diagonal"))
    with pytest.warns(UserWarning, match="diverged in epoch"):
        history = fp.fit(
            model, Z, val=Z, epochs=30, batch_size=40, schedule=runaway, progress=False
        )
    assert history.best.epoch <= 5
    assert math.isfinite(history.best.val_nll)
    assert not history.stopped_early
    assert -model(None).log_prob(Z).mean().item() == pytest.approx(history.best.val_nll, abs=1e-4)


def test_validation_without_weight_is_an_error():
    x, z = events(60, seed=1)
    with pytest.raises(ValueError, match="Expected validation weights with a positive sum"):
        fit(model_of(), (X, Z), val=(x, z, torch.zeros(60)))


def test_history_of_weighted_events():
    u = torch.randn(4000, 1, generator=torch.Generator().manual_seed(0))
    u[2000:] *= 3
    w = torch.ones(4000)
    w[2000:] = 1e-6
    model = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Real(1), "diagonal"))
    data = {"z": u, "weight": w}
    history = fp.fit(model, data, val=data, epochs=10, progress=False)
    cov = fp.coverage(model(None).to_base(u), weight=w)
    assert history.best.coverage68 == pytest.approx(cov.coverage_at(0.682689), abs=1e-3)
    assert history.best.coverage68 == pytest.approx(0.68, abs=0.04)


def test_a_shuffling_loader_resumes_with_its_order(tmp_path):
    def loaders():
        data = TensorDataset(X, Z)
        return DataLoader(data, batch_size=40, shuffle=True), events(60, seed=1)

    file, whole, resumed = tmp_path / "run.ckpt", model_of(), model_of(seed=5)
    fp.fit(whole, *loaders(), epochs=5, progress=False)
    with pytest.raises(RuntimeError, match="power cut"):
        fp.fit(model_of(), *loaders(), epochs=5, checkpoint=file, callbacks=[Interrupt(3)],
               progress=False)  # fmt: skip
    fp.fit(resumed, *loaders(), epochs=5, checkpoint=file, progress=False)
    assert equal(resumed.state_dict(), whole.state_dict())


def test_a_run_that_stopped_early_is_not_trained_on(tmp_path):
    options = {"epochs": 40, "lr": 0.3, "schedule": None, "patience": 2}
    file = tmp_path / "run.ckpt"
    first, again = model_of(), model_of(seed=3)
    expected = fit(first, (X, Z), checkpoint=file, **options)
    history = fit(again, (X, Z), checkpoint=file, **options)
    assert history["val_nll"] == expected["val_nll"]
    assert history.stopped_early
    assert equal(first.state_dict(), again.state_dict())


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"epochs": 6}, r"begun with \(epochs=3\); got 6"),
        ({"lr": 1e-4}, r"begun with \(lr=0.01\); got 0.0001"),
        ({"schedule": None}, r"begun with \(schedule='one-cycle'\); got None"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(tmp_path, changed, text):
    options = {"epochs": 3, "lr": 1e-2, "checkpoint": tmp_path / "run.ckpt"}
    fit(model_of(), (X, Z), **options)
    with pytest.raises(ValueError, match=text):
        fit(model_of(), (X, Z), **{**options, **changed})


def test_a_checkpoint_of_another_model_or_place_is_refused(tmp_path):
    fit(model_of(), (X, Z), checkpoint=tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"begun with \(another model\)"):
        fit(model_of(flow="spline"), (X, Z), checkpoint=tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match="cannot be read"):
        fit(model_of(), (X, Z), checkpoint=tmp_path)
    with pytest.raises(ValueError, match="checkpoint without a Trainer"):
        fit(model_of(), (X, Z), checkpoint="run.ckpt", trainer=pl.Trainer(logger=False))


def test_frozen_networks_stay_as_they_are():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    net.requires_grad_(False).eval()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    fit(fp.PosteriorModel(net, fp.PosteriorHead(4, fp.Real(1), "diagonal")), (X + 3, Z), epochs=3)
    assert equal(before, net.state_dict())


def test_parameters_thawed_by_a_callback_are_averaged():
    class Thaw(pl.Callback):
        def on_train_epoch_start(self, trainer, module):
            if trainer.current_epoch == 1:
                model.encoder.requires_grad_(True)
                some = {"params": list(model.encoder.parameters()), "lr": 1e-3}
                trainer.optimizers[0].add_param_group(some)

    model = model_of()
    before = model.encoder.skip.weight.detach().clone()
    model.encoder.requires_grad_(False)
    fit(model, (X, Z), epochs=3, schedule=None, callbacks=[Thaw()])
    assert not torch.equal(model.encoder.skip.weight, before)


@pytest.mark.parametrize("snapshots", [3, (0,), (1, 9)])
def test_snapshots_that_cannot_be(snapshots):
    with pytest.raises(ValueError, match="Expected snapshots"):
        fit(model_of(), (X, Z), epochs=2, snapshots=snapshots)


def test_a_bad_label_is_named_by_its_row():
    z = Z.clone()
    z[17] = math.nan
    with pytest.raises(ValueError, match="row 17, column"):
        fp.fit(model_of(), (X, z), val=0.3, progress=False)


def test_double_inputs_of_a_network_of_ones_own():
    net = nn.Linear(2, 4)
    model = fp.PosteriorModel(net, fp.PosteriorHead(4, fp.Real(1), "diagonal"))
    x, z = events(60, seed=1)
    fit(model, (X.double().numpy(), Z.double()), val=(x.double(), z))
    assert model(x.double()).log_prob(z).dtype == torch.float32


def test_advice_after_a_training():
    short = fit(model_of(dropout=0.0), (X, Z), val=(X, Z), epochs=4, lr=3e-2, schedule=None)
    assert "more epochs may help" in str(short)


def test_a_bad_input_is_named_by_its_row():
    x = X.clone()
    x[17, 1] = math.nan
    with pytest.raises(ValueError, match="Expected finite x; got nan in row 17, column 1"):
        fp.fit(model_of(), (x, Z), val=0.3, progress=False)
    head = fp.PosteriorHead(2, fp.Real(1), "diagonal")
    with pytest.raises(ValueError, match="Expected finite x; got nan in row 17"):
        fp.fit(fp.PosteriorModel(None, head), (x, Z), val=0.3, progress=False)
    hits = torch.randn(N, 5, 2)
    hits[41, 2, 0] = math.inf
    lengths = torch.full((N,), 4)
    for inputs in ((hits, lengths), {"x": hits, "lengths": lengths}):
        sets = fp.PosteriorModel(fp.encoders.DeepSets(2, 2, hidden=4), head)
        with pytest.raises(ValueError, match="Expected finite x; got inf in row 41, column 2"):
            fp.fit(sets, {"x": inputs, "z": Z}, val=0.3, progress=False)


def test_inputs_that_may_be_missing_are_left_to_the_encoder():
    x = X.clone()
    x[17, 1] = math.nan

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 4)

        def forward(self, x):
            return self.layer(torch.nan_to_num(x))

    for encoder in (fp.encoders.Tabular(2, 4, hidden=8, missing=True), Own()):
        model = fp.PosteriorModel(encoder, fp.PosteriorHead(4, fp.Real(1), "diagonal"))
        assert math.isfinite(fit(model, (x, Z), val=0.3).best.val_nll)
    hits = torch.randn(N, 5, 2)
    hits[:, 3:] = math.nan
    encoder = fp.encoders.LSTM(2, 4, hidden=4)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(4, fp.Real(1), "diagonal"))
    data = {"x": (hits, torch.full((N,), 3)), "z": Z}
    assert math.isfinite(fit(model, data, val=0.3).best.val_nll)


MASKED = fp.Product(a=fp.Real(), b=fp.Real())


def masked_events(n, share, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=g)
    z = x + SIGMA * torch.randn(n, 2, generator=g)
    known = torch.rand(n, generator=g) < share
    z[~known, 1] = math.nan
    return x, z, known


class Rows(Dataset):
    """Events one by one of columns, which may be dicts."""

    def __init__(self, columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["z"])

    def __getitem__(self, i):
        return {
            k: {n: t[i] for n, t in v.items()} if isinstance(v, dict) else v[i]
            for k, v in self.columns.items()
        }


@pytest.mark.parametrize("form", ["tensor", "dict", "Dataset of dicts"])
def test_coverage_of_a_masked_training_is_that_of_the_known_events(form):
    x, z, known = masked_events(300, 0.6)
    columns = torch.stack([torch.ones_like(known), known], 1)
    data = {"x": x, "z": z, "mask": columns if form == "tensor" else {"b": known}}
    train = Rows(data) if form == "Dataset of dicts" else data
    torch.manual_seed(0)
    model = fp.PosteriorModel(None, fp.PosteriorHead(2, MASKED, "affine"))
    history = fit(model, train, val=data, epochs=3)
    level = model(x[known]).credibility(z[known])
    for name, p in (("coverage50", 0.5), ("coverage68", 0.682689), ("coverage90", 0.9)):
        expected = (level <= p).double().mean().item()
        assert getattr(history.best, name) == pytest.approx(expected, abs=0.01)
    assert 0 <= history.best.ks_pvalue <= 1
    assert "nan" not in str(history)


def test_a_training_without_a_fully_known_validation_says_so():
    x, z, known = masked_events(200, 0.6)
    model = fp.PosteriorModel(None, fp.PosteriorHead(2, MASKED, "diagonal"))
    val = {"x": x[~known], "z": z[~known], "mask": {"b": known[~known]}}
    history = fit(model, {"x": x, "z": z, "mask": {"b": known}}, val=val)
    assert math.isnan(history.best.coverage68)
    text = "coverage not known: no validation event has all labels, or a weight is negative"
    assert text in str(history)
    assert "nan" not in str(history)


def test_a_bad_mask_is_named_by_its_row():
    x, z, _ = masked_events(200, 0.6)
    columns = torch.ones(200, 2, dtype=torch.bool)
    columns[23, 0] = False
    model = fp.PosteriorModel(None, fp.PosteriorHead(2, MASKED, "diagonal"))
    with pytest.raises(ValueError, match="mask row 23 has"):
        fit(model, {"x": x, "z": z, "mask": columns}, val=0.2)


def test_splines_of_directions_wait_a_tenth_of_the_training():
    """Also of a long one, in which the rate rises slowly."""
    x = torch.randn(400, 2)
    z = nn.functional.normalize(nn.functional.pad(x, (0, 1), value=1.0), dim=-1)

    def waited(**options):
        head = fp.PosteriorHead(2, fp.Sphere(), layers=1, bins=4, hidden=4, **options)
        # so narrow that every epoch is the best yet
        fp.fit(fp.PosteriorModel(None, head), (x, z), epochs=9, batch_size=20, progress=False)
        return float(head.flow.waited), head.flow.wait

    # 162 steps in all; the loop that goes on from there has its own pace again
    steps, after = waited()
    assert 9 < steps < 12
    assert after == 300
    steps, after = waited(wait=27)
    assert 5.5 < steps < 6.5
    assert after == 27
