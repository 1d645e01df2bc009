"""What alignment reaches on the toy with a primary task, and where the other losses fail."""

import runpy
from functools import partial
from pathlib import Path

import pytest

from flowpost.calibration import Align
from flowpost.metrics import energy_distance

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "align_variations.py"


@pytest.fixture(scope="module")
def scored():
    """(|SF − 1|, accuracy, spread) of a loss, trained once for each batch size and class mix."""
    toy = runpy.run_path(str(EXAMPLE))
    fresh = toy["sample"](100_000, 901), toy["sample"](100_000, 902, toy["SHIFT"])
    known = {}

    def of(name, batch=250, mix=0.25):
        if (name, batch, mix) not in known:
            data = toy["sample"](20_000, 0), toy["sample"](20_000, 1, toy["SHIFT"], mix)
            align = toy["LOSSES"][name] if isinstance(name, str) else name
            net = toy["train"](align, 0, *data, batch, 20)
            known[name, batch, mix] = toy["scores"](net, *fresh).tolist()
        return known[name, batch, mix]

    return of


def test_class_conditional_energy_aligns_and_keeps_the_spread(scored):
    plain, aligned = scored("cross-entropy"), scored("class-conditional energy")
    assert plain[0] == pytest.approx(0.354, abs=0.03)
    assert aligned[0] < 0.03
    assert aligned[1] == pytest.approx(0.805, abs=0.015)
    assert aligned[2] > 0.9 * plain[2]


def test_mean_probabilities_may_agree_where_efficiencies_do_not(scored):
    assert scored("mean-KL")[0] > 0.2


def test_wasserstein_shrinks_the_spread(scored):
    plain = scored("cross-entropy")
    assert scored("marginal W1")[0] < 0.06
    assert scored("marginal W1, weight 50")[2] < 0.1 * plain[2]


def test_the_v_statistic_shrinks_the_spread_and_the_u_statistic_does_not(scored):
    biased = Align(partial(energy_distance, unbiased=False), weight=50.0)
    assert scored(biased, batch=100)[2] < 0.05
    assert scored("class-conditional energy", batch=100)[2] > 0.28


def test_another_class_mix_misleads_marginal_alignment(scored):
    assert scored("marginal energy", mix=0.55)[0] > 0.1
    assert scored("class-conditional energy", mix=0.55)[0] < 0.03
