"""What trained summaries reach: on the toy problem, and on a case of one's own."""

import argparse

import pytest

from benchmarks import inferno as benchmark
from flowpost import inferno
from flowpost.simulators import InfernoToy

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*bins hold.*")]


def test_ten_bins_of_the_toy(capsys):
    options = argparse.Namespace(
        bins=10, hidden=64, layers=2, spread=0.5, epochs=20, batch=1000, lr=1e-3, held=20_000,
        seed=0, seeds=1,
    )  # fmt: skip
    benchmark.train(options)
    line = next(s for s in capsys.readouterr().out.splitlines() if s.startswith("median"))
    widths = [float(v) for v in line.split()[1:]]
    assert widths[4] < 18.6
    assert widths[0] < 15.7
    assert widths[2] < 17.0
    # hard bins never beat the exact limit
    for k, width in enumerate(widths):
        assert width > InfernoToy(k).limit()


def test_classifiers_of_the_toy():
    """Uniform and optimised bins of the exact classifier, on simulated events."""
    toy, model = InfernoToy(4), inferno.toy_model(InfernoToy(4))
    data, other = benchmark.simulated(400_000, 1), benchmark.simulated(1_000_000, 2)
    best = inferno.optimised(model, toy.signal_probability, data, 10)
    for binning, expected, tolerance in (
        (inferno.Binning.uniform(10), 28.0, 0.4),
        (best, 25.0, 0.3),
    ):
        found = inferno.hard_information(
            model, lambda x, b=binning: b(toy.signal_probability(x)), other, 10
        )
        assert found.width == pytest.approx(expected, abs=tolerance)


def test_two_backgrounds_every_nuisance_and_negative_weights():
    model, samples = benchmark.OWN, benchmark.own_samples(1000, 0)
    assert {type(n) for n in model.nuisances} == {
        inferno.Transform, inferno.Alternative, inferno.Reweighting, inferno.Normalisation
    }  # fmt: skip
    assert (samples["second"].weight < 0).float().mean() > 0.25
    ours, theirs = benchmark.own_widths(seed=0)
    assert ours < 0.9 * theirs
