"""The same numbers on every device: on the CPU always, on an accelerator where there is one."""

import pytest
import torch
from spherical import grown

import flowpost as fp

ACCELERATOR = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
    ],
)
SPACE = fp.Product(
    vertex=fp.Real(2),
    energy=fp.Positive(),
    zenith=fp.Interval(0.0, 3.0),
    direction=fp.Sphere(),
    phi=fp.Circle(),
)


def events(n=600):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g)
    r = x + 0.3 * torch.randn(n, 3, generator=g)
    vertex = r[:, :2]
    return x, SPACE.pack(
        {
            "vertex": vertex,
            "energy": r[:, 2:].exp(),
            "zenith": 3 * torch.sigmoid(r[:, :1]),
            "direction": torch.nn.functional.normalize(r, dim=-1),
            "phi": torch.atan2(r[:, 0], r[:, 1]),
        }
    )


def model_of(flow="spline"):
    torch.manual_seed(0)
    encoder = fp.encoders.Tabular(3, 8, hidden=16, layers=1)
    return fp.PosteriorModel(encoder, fp.PosteriorHead(8, SPACE, flow))


def perturbed(flow):
    model, (x, z) = model_of(flow), events()
    model.encoder.fit_scale(x)
    model.head.fit_scale(z)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    grown(model.head)
    return model.eval()


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
@pytest.mark.parametrize("flow", ["mse", "diagonal", "affine", "spline"])
def test_densities_and_draws(device, flow):
    model, (x, z) = perturbed(flow), events()
    expected = model(x).log_prob(z)
    model.to(device)
    q = model(x.to(device))
    torch.testing.assert_close(q.log_prob(z.to(device)).cpu(), expected, rtol=1e-4, atol=1e-4)
    draws = q.sample((50,), torch.Generator(device).manual_seed(1))
    again = q.sample((50,), torch.Generator(device).manual_seed(1))
    assert draws.device.type == device
    assert torch.equal(draws, again)
    u = q.to_base(draws)
    assert u.mean(0).abs().max() < 1
    torch.testing.assert_close(q.from_base(u), draws, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
def test_every_question_to_a_posterior(device):
    model, (x, z) = perturbed("spline").to(device), events(40)
    q, z = model(x.to(device)), z.to(device)
    for value in (q.mean, q.stddev, q.mode, q.median, q.entropy(), q.credibility(z), *q.interval()):
        assert value.device.type == device
        assert torch.isfinite(value).all()
    assert q["energy"].log_prob(z[:, 2:3]).device.type == device
    assert fp.coverage(q.to_base(z)).ks_pvalue >= 0
    assert fp.diagnostics.hpd_coverage(q, z, draws=64).ks_pvalue >= 0


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
def test_fit_returns_the_model_to_its_device(device, tmp_path):
    model, (x, z) = model_of().to(device), events()
    history = fp.fit(model, (x, z), epochs=10, progress=False, checkpoint=tmp_path / "run.ckpt")
    assert all(p.device.type == device for p in model.parameters())
    assert history.best.val_nll < history.epochs[0].val_nll
    repeat = model_of().to(device)
    again = fp.fit(repeat, (x, z), epochs=10, progress=False, checkpoint=tmp_path / "run.ckpt")
    assert again.best.val_nll == pytest.approx(history.best.val_nll, abs=1e-4)
    fp.save(model, tmp_path / "model")
    loaded = fp.load(tmp_path / "model").to(device)
    with torch.no_grad():
        at = x.to(device), z.to(device)
        torch.testing.assert_close(loaded(at[0]).log_prob(at[1]), model(at[0]).log_prob(at[1]))


@pytest.mark.filterwarnings("ignore:.*bins hold.*", "ignore:Nothing is expected.*")
@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
@pytest.mark.parametrize("by_hand", [True, False])
def test_summaries(device, by_hand):
    """The loss and its gradient, all events, hard bins, templates and a training."""
    toy = fp.simulators.InfernoToy()
    counting = fp.inferno.toy_model(toy)
    samples = {p.name: toy.sample(p.name, 500, seed=0) for p in counting.processes}
    torch.manual_seed(0)
    encoder = fp.encoders.Tabular(3, 8, hidden=16, layers=1, dropout=0.0)
    summary = fp.inferno.SummaryModel(encoder, fp.inferno.SoftBins(8, 5))
    summary.fit_scale(samples["background"])
    loss = fp.inferno.InfernoLoss(counting, spread=0.1, by_hand=by_hand)
    found = []
    for place in ("cpu", device):
        summary.to(place).zero_grad()
        value = loss(summary, {k: x.to(place) for k, x in samples.items()})
        value.backward()
        found.append((value.item(), summary.head.logits.weight.grad.cpu()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-5)
    # events stay where they are, and go to the network in portions
    width = fp.inferno.information(counting, summary, samples).width
    assert width == pytest.approx(summary_width(counting, summary.cpu(), samples), rel=1e-4)
    summary.to(device)
    binned = fp.inferno.templates(counting, summary, samples)
    hard = fp.inferno.hard_information(counting, summary.assign, samples, 5)
    torch.testing.assert_close(binned.total, hard.counts, rtol=1e-4, atol=1e-3)
    history = fp.inferno.fit(summary, loss, samples, epochs=2, batch_size=100, progress=False)
    assert len(history.epochs) == 2
    assert next(summary.parameters()).device.type == device


def summary_width(counting, summary, samples):
    return fp.inferno.information(counting, summary, samples).width
