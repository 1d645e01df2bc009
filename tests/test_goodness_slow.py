"""Goodness of fit of trained models, and calibrated p of 50 000 fresh events."""

import pytest
import torch
from likelihoods import gaussian_events, gaussian_model, own_events, own_model, uniform
from scipy import stats

import flowpost as fp
from flowpost.goodness import Calibrator, p_value
from flowpost.likelihood import ExtendedModel, FlowLikelihood

pytestmark = pytest.mark.slow

FRESH = 50_000
# of the design: values, noise, mean, standard deviation and P(p < 0.05)
TABLE = [
    (20, 1.0, 0.51, 0.28, 0.04),
    (20, 2.0, 0.002, 0.02, 0.99),
    (2, 1.0, 0.49, 0.21, 0.02),
]


def trained(size):
    """Posterior and likelihood of z ~ N(0, 1), x_k = z + N(0, 1) that know nothing of it."""
    torch.manual_seed(0)
    g = torch.Generator().manual_seed(100)
    z = torch.randn(20_000, 1, generator=g)
    x = z + torch.randn(20_000, size, generator=g)
    head = fp.PosteriorHead(16, fp.Real(1))
    likelihood = FlowLikelihood(fp.Real(1), size, "affine", context=16, hidden=32)
    model = ExtendedModel(fp.encoders.Tabular(size, 16, hidden=64), head, likelihood)
    fp.fit(model, (x, z), epochs=30, progress=False)
    return model


@pytest.mark.parametrize("size", [2, 20])
def test_the_table_of_trained_models(size):
    model = trained(size)
    for values, noise, mean, width, small in TABLE:
        if values != size:
            continue
        p = p_value(model, gaussian_events(5000, size, noise)).p
        error = 5000**-0.5
        assert p.mean().item() == pytest.approx(mean, abs=0.02 + 3 * width * error)
        assert p.std().item() == pytest.approx(width, abs=0.02 + 2 * width * error)
        share = (p < 0.05).double().mean().item()
        assert share == pytest.approx(small, abs=0.02 + 3 * (small * (1 - small)) ** 0.5 * error)
    if size == 20:
        found = p_value(model, gaussian_events(2000, size, 0.5))
        assert found.p.mean().item() == pytest.approx(0.994, abs=0.02)
        assert (found.two_sided < 0.05).double().mean() > 0.85


CASES = {
    "gaussian": (lambda: gaussian_model(5), lambda m, n, seed: gaussian_events(n, 5, seed=seed)),
    "image": (lambda: own_model("counts"), own_events),
    "hits": (lambda: own_model("hits"), own_events),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("statistics", ["p", ("p", "two_sided", "typicality")], ids=str)
def test_calibrated_p_of_many_events(name, statistics):
    build, events = CASES[name]
    model, held = build(), {"hits": 50_000}.get(name, 200_000)
    calibrator = Calibrator(model, statistics, draws=16).fit(events(model, held, 1))
    found = calibrator.p_value(events(model, FRESH, 2))
    known = held // (1 if statistics == "p" else 2)
    assert uniform(found.p, known) > 0.01
    for p in found.each.values():
        assert uniform(p, known) > 0.01
    for cut in (0.001, 0.01, 0.05):
        lost = (found.p < cut).sum().item()
        # the held-out events below the cut are counted too
        width = (cut * FRESH * (1 + FRESH / known)) ** 0.5
        assert abs(lost - cut * FRESH) < 4 * width


def test_calibrated_p_of_many_more_held_out_events():
    """Where there are so many that they are no sample: uniform by scipy's word alone."""
    model = gaussian_model(5)
    calibrator = Calibrator(model, draws=16).fit(gaussian_events(1_000_000, 5, seed=1))
    found = calibrator.p_value(gaussian_events(FRESH, 5, seed=2))
    assert stats.kstest(found.p.numpy(), "uniform").pvalue > 0.01
