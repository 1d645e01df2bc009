"""Goodness of fit: p-values against closed forms, calibration against exchangeability."""

import math

import numpy as np
import pytest
import torch
from likelihoods import (
    SPACE,
    filled,
    gaussian_events,
    gaussian_model,
    gaussian_p,
    labels,
    normal_likelihood,
    own_events,
    own_model,
    pass_on,
    set_normal,
    stirred,
)
from scipy import stats

import flowpost as fp
from flowpost.goodness import Calibrator, ContextDensity, p_value, typicality
from flowpost.likelihood import ExtendedModel, Latent, with_latents

ACCELERATOR = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
    ],
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# ------------------------------------------------------------------ posterior-predictive p


@pytest.mark.parametrize("size", [2, 20])
@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_p_is_that_of_the_closed_form(size, noise):
    x, draws = gaussian_events(1000, size, noise), 300
    found = p_value(gaussian_model(size), x, draws, seed=1)
    exact = gaussian_p(x)
    pull = (found.p - exact) / (exact * (1 - exact) / draws).sqrt().clamp_min(2e-3)
    assert abs(pull.mean()) < 4 / len(x) ** 0.5
    assert pull.abs().max() < 6
    assert pull.std() == pytest.approx(1, abs=0.1) or noise != 1
    assert torch.equal(found.draws, torch.full((1000,), draws))


# draws of x, size, noise: mean, standard deviation and P(p < 0.05) of the design
TABLE = {
    "in distribution": (20, 1.0, 0.51, 0.28, 0.04),
    "noise × 2": (20, 2.0, 0.002, 0.02, 0.99),
    "two values": (2, 1.0, 0.49, 0.21, 0.02),
}


@pytest.mark.parametrize("name", TABLE)
def test_the_table(name):
    size, noise, mean, width, small = TABLE[name]
    found = p_value(gaussian_model(size), gaussian_events(2000, size, noise))
    p, error = found.p, 2000**-0.5
    # the table has one standard error of its own
    assert p.mean().item() == pytest.approx(mean, abs=0.005 + 4 * width * error)
    assert p.std().item() == pytest.approx(width, abs=0.005 + 3 * width * error)
    share = (p < 0.05).double().mean().item()
    assert share == pytest.approx(small, abs=0.005 + 4 * (small * (1 - small)) ** 0.5 * error)


def test_two_sided_sees_too_little_scatter():
    model = gaussian_model(20)
    found = p_value(model, gaussian_events(1000, 20, 0.5), 500)
    assert found.p.mean().item() == pytest.approx(0.994, abs=0.002)
    assert (found.two_sided < 0.05).double().mean() > 0.9
    for noise in (1.0, 2.0):
        found = p_value(model, gaussian_events(500, 20, noise))
        smaller = 2 * torch.minimum(found.p, 1 - found.p)
        # T is continuous: no ties
        torch.testing.assert_close(found.two_sided, smaller)


def test_score_is_that_of_the_closed_form():
    """T is χ² of the residuals: its replicas have mean −½ and variance 1/(2 N_d), up to ln 2π."""
    size, x = 20, gaussian_events(300, 20, 1.5)
    found = p_value(gaussian_model(size), x, 2000)
    posterior = x.mean(1, keepdim=True) * size / (size + 1)
    square = (x - posterior).double().square().sum(1) + size / (size + 1)
    expected = (size - square) / (2 * size) ** 0.5
    torch.testing.assert_close(found.z_score, expected, rtol=0.1, atol=0.15)
    statistic = -square / size / 2 - math.log(2 * math.pi) / 2
    torch.testing.assert_close(found.statistic, statistic, rtol=0.01, atol=0.02)
    torch.testing.assert_close(found.labels, posterior.double(), rtol=0, atol=0.03)


def test_error_is_that_of_repeats():
    model, x = gaussian_model(5), gaussian_events(40, 5)
    runs = [p_value(model, x, 100, seed=i) for i in range(60)]
    spread = torch.stack([r.p for r in runs]).std(0)
    error = torch.stack([r.error for r in runs]).square().mean(0).sqrt()
    assert (spread.square().mean() / error.square().mean()).item() == pytest.approx(1, abs=0.15)
    far = p_value(model, gaussian_events(5, 5, 20.0), 100)
    assert (far.p == 0).all()
    assert ((far.error > 0) & (far.error < 0.02)).all()


def test_more_draws_where_p_is_small():
    model = gaussian_model(20)
    x = torch.cat([gaussian_events(400, 20), gaussian_events(100, 20, 1.3, seed=1)])
    found, exact = p_value(model, x, 200, max_draws=6400), gaussian_p(x)
    rarer = torch.minimum(exact, 1 - exact)
    assert (found.draws[rarer > 0.12] == 200).all()
    assert (found.draws[rarer < 0.01] > 200).all()
    assert found.draws.max() == 6400
    assert set(found.draws.tolist()) <= {200 * 2**i for i in range(6)}
    # as many draws as are allowed, or ten on the rarer side
    less = torch.minimum(found.p, 1 - found.p) * found.draws
    assert ((less >= 10) | (found.draws == 6400)).all()
    pull = (found.p - exact) / found.error
    assert pull.abs().max() < 5
    assert pull.std() < 1.3
    plain = p_value(model, x, 200)
    small = (exact < 0.01) & (exact > 1e-3)
    better = (found.p - exact)[small].abs().mean() / (plain.p - exact)[small].abs().mean()
    assert better < 0.6
    not_doubled = p_value(model, x, 200, max_draws=399)
    assert (not_doubled.draws == 200).all()


def test_p_repeats_by_seed_and_leaves_the_global_generator():
    model, x = gaussian_model(3), gaussian_events(50, 3)
    state = torch.get_rng_state()
    first = p_value(model, x, 50, max_draws=400, seed=3)
    again = p_value(model, x, 50, max_draws=400, seed=3)
    other = p_value(model, x, 50, max_draws=400, seed=4)
    typical = [typicality(model, x, seed=s) for s in (0, 0, 1)]
    assert torch.equal(torch.get_rng_state(), state)
    for name in ("p", "two_sided", "error", "draws", "z_score", "statistic", "labels"):
        assert torch.equal(getattr(first, name), getattr(again, name))
    assert not torch.equal(first.p, other.p)
    assert torch.equal(typical[0], typical[1])
    assert not torch.equal(typical[0], typical[2])


def test_an_event_has_its_p_whatever_its_company(monkeypatch):
    model, x = gaussian_model(3), gaussian_events(300, 3)
    exact = gaussian_p(x[:20])
    for chunk in (2**22, 2**10, 1):
        monkeypatch.setattr("flowpost.goodness.predictive._CHUNK", chunk)
        events = x if chunk > 1 else x[:20]
        found = p_value(model, events, 40 if chunk == 1 else 400, seed=chunk)
        pull = (found.p[:20] - exact) / found.error[:20]
        assert pull.abs().max() < 4.5
        assert len(found) == len(events)


@pytest.mark.parametrize("ask", [p_value, typicality])
def test_memory_does_not_grow_with_the_number_of_events(ask, monkeypatch):
    model, chunk = gaussian_model(3), 2**14
    monkeypatch.setattr("flowpost.goodness.predictive._CHUNK", chunk)
    bound, encoded, own, encode = [], [], model.likelihood._bind, model.encode

    def watched(z):
        bound.append(z.shape[:-1].numel())
        return own(z)

    def encoding(x):
        encoded.append(len(x))
        return encode(x)

    monkeypatch.setattr(model.likelihood, "_bind", watched)
    monkeypatch.setattr(model, "encode", encoding)
    size = model.likelihood.size
    for n, draws in ((50, 32), (500, 32), (3, 2 * chunk)):
        bound.clear()
        encoded.clear()
        ask(model, gaussian_events(n, 3), draws)
        assert sum(bound) == draws * n
        assert sum(encoded) == n
        assert max(bound) * size <= chunk
        assert max(encoded) <= max(1, chunk / draws / size)
        if n > 100:
            assert max(bound) * size > 0.9 * chunk, "portions are as large as they may be"


@pytest.mark.parametrize("ask", [p_value, typicality])
def test_modes_of_the_modules_stay(ask):
    encoder = torch.nn.Sequential(torch.nn.Dropout(0.9), torch.nn.Identity())
    model = ExtendedModel(encoder, gaussian_model(20).head, normal_likelihood(20))
    model.train()
    model.encoder[1].eval()
    before = [m.training for m in model.modules()]
    found = ask(model, gaussian_events(200, 20))
    assert [m.training for m in model.modules()] == before
    value = found.p if ask is p_value else found
    assert value.mean().item() == pytest.approx(0.5, abs=0.08), "dropout is off"
    with pytest.raises(ValueError, match="Expected"):
        ask(model, torch.zeros(5, 3))
    assert [m.training for m in model.modules()] == before
    assert torch.is_grad_enabled()
    assert not value.requires_grad


def test_latents_are_drawn_too():
    """x = z_o + 2 z_u + noise, where a posterior of z_o alone would not explain the scatter."""
    size, weight = 4, torch.tensor([[1.0, 2.0], [1.0, -2.0], [1.0, 2.0], [1.0, -2.0]])
    space = with_latents(fp.Real(1), 1)
    likelihood = normal_likelihood(size, 1.0, weight, space)
    precision = torch.eye(2) + weight.T @ weight
    gain = torch.linalg.solve(precision, weight.T)
    head = fp.PosteriorHead(size, fp.Real(1), "diagonal")
    set_normal(head, gain[:1], 0.0, float(precision.inverse()[0, 0] ** 0.5))
    latent = Latent(fp.Real(1), 1, context=size, flow="diagonal", hidden=1)
    pass_on(latent.labels)
    column = torch.cat([weight[:, 1], -(weight[:, :1] * weight[:, 1:]).sum(0)]) / precision[1, 1]
    set_normal(latent.head, column[None], 0.0, float(precision[1, 1] ** -0.5))
    model = ExtendedModel(None, head, likelihood, latent)
    z = torch.randn(500, 2, generator=seeded())
    x = z @ weight.T + torch.randn(500, size, generator=seeded(1))
    found = p_value(model, x, 400)
    noise = torch.randn(2000, 2, generator=seeded(2)) @ torch.linalg.cholesky(precision.inverse()).T
    residual = x[:, None] - ((x @ gain.T)[:, None] + noise) @ weight.T
    exact = torch.as_tensor(stats.chi2.sf(residual.square().sum(-1).numpy(), size)).mean(1)
    pull = (found.p - exact) / found.error
    assert pull.abs().max() < 5
    assert pull.std() == pytest.approx(1, abs=0.15)
    assert found.labels.shape == (500, 1)
    assert typicality(model, x).mean() > 0.35


def test_a_head_with_first_guesses():
    """The posterior is the guess, so p needs it, and knows a wrong one."""
    likelihood = normal_likelihood(5)
    guess = torch.randn(200, 1, generator=seeded())
    x = guess + torch.randn(200, 5, generator=seeded(1))
    head = fp.PosteriorHead(5, fp.Real(1), "diagonal", reference=True)
    set_normal(head, torch.zeros(1, 5), 0.0, 1e-3)
    model = ExtendedModel(None, head, likelihood)
    found = p_value(model, x, 400, reference=guess)
    exact = torch.as_tensor(stats.chi2.sf((x - guess).double().square().sum(1).numpy(), 5))
    assert ((found.p - exact) / found.error).abs().max() < 5
    torch.testing.assert_close(found.labels, guess.double(), rtol=0, atol=1e-3)
    assert typicality(model, x, reference=guess).mean() == pytest.approx(0.5, abs=0.06)
    assert p_value(model, x, 50, reference=guess + 9).p.max() == 0
    calibrator = Calibrator(model, draws=20).fit(x, reference=guess)
    assert calibrator.p_value(x, reference=guess).p.mean() == pytest.approx(0.5, abs=0.1)
    with pytest.raises(ValueError, match="Expected a reference"):
        p_value(model, x)


@pytest.mark.parametrize("name", ["counts", "channels", "hits", "on a grid"])
def test_good_events_of_any_likelihood(name):
    """Posteriors that are points at the truth: p is uniform, but for ties of whole numbers."""
    likelihood, n = filled(name), 800
    z = labels(n)
    head = fp.PosteriorHead(1, SPACE, "diagonal", reference=True)
    with torch.no_grad():
        head.flow.bias[head.space.location_size :] = -7.0
    model = ExtendedModel(Zero(), head, likelihood)
    for seed in range(2):
        x = likelihood.sample(z, seeded(seed))
        found = p_value(model, x, 100, reference=z)
        assert stats.kstest(found.p.numpy(), "uniform").statistic < 1.7 / n**0.5 + 0.01
        ties = found.p + (1 - found.p) - found.two_sided
        assert ties.isfinite().all()


class Zero(torch.nn.Module):
    """No context."""

    def forward(self, x, lengths=None):
        return torch.zeros(len(x), 1)


def test_forms_of_inputs():
    x = gaussian_events(30, 3)
    model = gaussian_model(3)
    expected = p_value(model, x, 20).p
    assert torch.equal(p_value(model, x.numpy(), 20).p, expected)

    class First(torch.nn.Module):
        def forward(self, a, b):
            return a

    pair = ExtendedModel(First(), model.head, model.likelihood, data=First())
    assert torch.equal(p_value(pair, (x, x * 0), 20).p, expected)
    assert torch.equal(p_value(pair, {"b": x * 0, "a": x}, 20).p, expected)
    assert torch.equal(typicality(pair, (x, x * 0)), typicality(model, x))
    double = p_value(model.double(), x.double(), 2000)
    assert ((double.p - gaussian_p(x)) / double.error).abs().max() < 5


def test_p_prints_what_matters(capsys):
    found = p_value(gaussian_model(3), gaussian_events(30, 3), 20, progress=True)
    assert "p-values" in capsys.readouterr().err
    text = str(found)
    assert f"of 30 events: mean {found.p.mean():.3f}" in text
    assert "20 to 20 draws" in text
    assert repr(found) == "PredictiveP(N=30)"
    p_value(gaussian_model(3), gaussian_events(30, 3), 20)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("ask", "text"),
    [
        (lambda m, x: p_value(fp.PosteriorModel(None, m.head), x), "Expected an ExtendedModel"),
        (lambda m, x: typicality(m.head, x), "Expected an ExtendedModel; got PosteriorHead"),
        (lambda m, x: Calibrator(fp.PosteriorModel(None, m.head)), "Expected an ExtendedModel"),
        (lambda m, x: p_value(m, (x, x[:3])), r"one row for each event; got \[3, 30\]"),
        (lambda m, x: p_value(m, None), "one row for each event; got NoneType"),
        (lambda m, x: p_value(m, x.tolist()), "a list of something else. Convert it with torch.as"),
        (lambda m, x: p_value(m, (x, x[:, :1])), "without labels, where there is no encoder; got"),
        (lambda m, x: Calibrator(m).fit((x, x[:, :1])), "x as one tensor, without labels"),
        (lambda m, x: p_value(m, x, 1), "Expected draws as a whole number of at least 2"),
        (lambda m, x: p_value(m, x, 100, max_draws=99), "max_draws as a whole number of at least"),
        (lambda m, x: typicality(m, x, 0), "Expected draws as a whole number of at least 1"),
        (lambda m, x: p_value(m, x * math.nan), "Expected finite"),
        (lambda m, x: p_value(m, x[:, :2]), "Expected context of shape"),
    ],
)
def test_refused(ask, text):
    with pytest.raises(ValueError, match=text):
        ask(gaussian_model(3), gaussian_events(30, 3))


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
def test_any_device(device):
    for name in ("on a grid", "channels", "hits"):
        model = own_model(name)
        x, held = own_events(model, 60, 0), own_events(model, 200, 1)
        model.to(device)
        found = p_value(model, x, 50, max_draws=200)
        assert found.p.device.type == "cpu"
        assert typicality(model, x).isfinite().all()
        calibrator = (
            Calibrator(model, ("p", "typicality", "context"), draws=20).to(device).fit(held)
        )
        expected = calibrator.p_value(x).p
        assert expected.mean() == pytest.approx(0.5, abs=0.2)
        model.likelihood.log_prob(x, labels(60))
        again = calibrator.cpu().p_value(x).p
        torch.testing.assert_close(again, expected, rtol=0, atol=1e-6 if device == "cpu" else 0.2)


# ------------------------------------------------------------------ other scores


@pytest.mark.parametrize("noise", [0.5, 1.0, 2.0])
def test_typicality_is_that_of_the_closed_form(noise):
    size, x = 10, gaussian_events(200, 10, noise)
    nodes = torch.linspace(-6, 6, 401, dtype=torch.float64)
    weight = torch.exp(-(nodes**2) / 2)
    z = x.double().mean(1, keepdim=True) * size / (size + 1) + nodes / (size + 1) ** 0.5
    level = stats.chi2.cdf((x[:, None].double() - z[..., None]).square().sum(-1), size)
    both = torch.as_tensor(2 * np.minimum(level, 1 - level))
    exact = (both * weight).sum(1) / weight.sum()
    found = typicality(gaussian_model(size), x, 1000)
    torch.testing.assert_close(found, exact, rtol=0.1, atol=0.03)
    assert (found.mean() < 0.25) == (noise != 1)


def test_typicality_reads_no_padding(monkeypatch):
    from flowpost.likelihood.points import BoundPointProcess

    model = own_model("hits")
    x, own = own_events(model, 50, 0), BoundPointProcess.residuals

    def undefined(self, *args):
        value, known = own(self, *args)
        return torch.where(known, value, math.nan), known

    expected = typicality(model, x)
    monkeypatch.setattr(BoundPointProcess, "residuals", undefined)
    assert torch.equal(typicality(model, x), expected)


def test_density_of_contexts_is_that_of_scipy():
    mix = torch.randn(4, 4, generator=seeded()).double()
    good = torch.randn(5000, 4, generator=seeded(1)).double() @ mix + 3
    density = ContextDensity(4).fit(good)
    cov = np.cov(good.numpy().T)
    cov += 1e-4 * np.trace(cov) / 4 * np.eye(4)
    new = 2 * torch.randn(100, 4, generator=seeded(2)).double()
    expected = stats.multivariate_normal(good.mean(0).numpy(), cov)
    constant = expected.logpdf(good.mean(0).numpy())
    torch.testing.assert_close(
        density.log_prob(new),
        torch.as_tensor(expected.logpdf(new) - constant),
        rtol=1e-8,
        atol=1e-8,
    )
    assert density.log_prob(good.float()).shape == (5000,)
    # a feature that is constant, and one that repeats another
    twice = torch.cat([good, good[:, :1], torch.ones(5000, 1)], 1)
    assert ContextDensity(6).fit(twice).log_prob(twice).mean() == pytest.approx(-2, abs=0.1)
    with pytest.raises(ValueError, match=r"more events than features of the context \(4\); got 4"):
        ContextDensity(4).fit(good[:4])
    with pytest.raises(ValueError, match=r"Expected context of shape \(N, 4\)"):
        density.log_prob(good[:, :3])


def test_contexts_are_those_of_the_encoder():
    from flowpost.goodness.scores import contexts

    encoder = stirred(fp.encoders.Tabular(3, 5, dropout=0.9))
    model = ExtendedModel(encoder, fp.PosteriorHead(5, fp.Real(1)), normal_likelihood(3)).train()
    x = gaussian_events(10000, 3)
    found = contexts(model, x)
    assert encoder.training
    assert not found.requires_grad
    torch.testing.assert_close(found, encoder.eval()(x).double(), rtol=1e-4, atol=1e-4)
