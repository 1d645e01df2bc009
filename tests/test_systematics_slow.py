"""Trained spline heads against the closed form, for every way of feeding nuisances."""

import pytest
import torch

import flowpost as fp
from benchmarks.systematics import LEVELS, exact, measure, nuisances, simulate
from flowpost.systematics import ConditionedEncoder, MarginalModel, Simulated, report

pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("s", [0.5, 1.0])
@pytest.mark.parametrize("way", ["simulated", "perturbed", "mixed", "mixed drawn", "weighted"])
def test_trained_heads_are_within_two_points_everywhere(way, s):
    found = measure(way, s)
    print(f"within {100 * found['gap']:.2f} points, {found['cpu']:.0f} CPU-s")
    assert found["gap"] < 0.02


def test_conditioned_heads_marginalised_later():
    """q(z|x, ν) and p(ν|x) are trained apart; their mixture is the marginalised posterior."""
    prior = nuisances(1.0)
    torch.manual_seed(0)
    encoder = ConditionedEncoder(
        fp.encoders.Tabular(1, 8, hidden=32, layers=1), prior, context=8, hidden=32
    )
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(9, fp.Real(1), hidden=16))
    fp.fit(
        model, Simulated(simulate, prior, 50_000, condition=True),
        epochs=20, lr=3e-3, progress=False,
    )  # fmt: skip
    infer = fp.PosteriorModel(
        fp.encoders.Tabular(1, 8, hidden=32, layers=1),
        fp.PosteriorHead(8, prior.space, hidden=16),
    )
    fp.fit(infer, Simulated(simulate, prior, 50_000, target="nuisances"), epochs=10, progress=False)
    both = MarginalModel(model, infer, draws=64)
    found = report(both, simulate, prior, at=(1, 2), events=20_000, levels=LEVELS)
    print(found)
    for point in found.points[1:]:
        for level in LEVELS:
            held = point.coverage.coverage_at(level)
            assert held == pytest.approx(exact(1.0, point.sigmas, level), abs=0.02)
    for level in LEVELS:
        assert found.averaged.coverage.coverage_at(level) == pytest.approx(level, abs=0.02)
