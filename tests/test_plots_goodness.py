"""p-values drawn: heights, the band, names, and what is refused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.patches import StepPatch
from scipy import stats

import flowpost as fp
from flowpost.goodness import CalibratedP


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def steps(ax):
    return [a for a in ax.patches if isinstance(a, StepPatch)]


def test_heights_are_shares_over_those_of_the_uniform():
    p = torch.cat([torch.full((30,), 0.02), torch.rand(70)]).double()
    ax = fp.plots.plot_p_values(p, bins=10)
    expected = np.histogram(p.numpy(), 10, (0, 1))[0] / len(p) * 10
    np.testing.assert_allclose(steps(ax)[0].get_data().values, expected)


def test_band_is_that_of_a_binomial():
    ax = fp.plots.plot_p_values(torch.rand(400), bins=20)
    low, high = stats.binom.ppf([stats.norm.cdf(-2), stats.norm.cdf(2)], 400, 0.05) / 400 * 20
    y = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert y.min() == pytest.approx(low)
    assert y.max() == pytest.approx(high)


def test_several_by_name_with_a_cut():
    parts = {"good": torch.rand(50), "bad": CalibratedP(torch.zeros(40).double(), {}, None)}
    ax = fp.plots.plot_p_values(parts, threshold=0.01)
    text = [t.get_text() for t in ax.get_legend().get_texts()]
    assert {"good: 50 events", "bad: 40 events", "cut at 0.01"} <= set(text)
    # a logarithmic axis with an edge on the cut, and all far below it in the first bin
    found = [s.get_data() for s in steps(ax)]
    edges, drawn = found[0].edges, found[0].values
    assert ax.get_xscale() == "log"
    assert np.isclose(edges, 0.01).sum() == 1
    assert edges[1] == pytest.approx(0.001)
    assert found[1].values[0] == pytest.approx(1000)
    assert not found[1].values[1:].any()
    exact = np.histogram(parts["good"].numpy(), [0, *edges[1:]])[0] / 50
    np.testing.assert_allclose(drawn, exact / np.diff([0, *edges[1:]]))
    for cut in (0.3, 0.99, 1e-4):
        fp.plots.plot_p_values(parts, threshold=cut, bins=2)
    with pytest.raises(ValueError, match="Expected threshold between 0 and 1"):
        fp.plots.plot_p_values(parts, threshold=1.0)


def test_a_result_draws_itself():
    found = CalibratedP(torch.rand(50).double(), {}, None)
    _, ax = plt.subplots()
    assert found.plot(ax, bins=5) is ax
    assert len(steps(ax)[0].get_data().values) == 5
    assert found.plot(threshold=0.05).get_xscale() == "log"


@pytest.mark.parametrize("p", [torch.rand(0), torch.tensor([0.5, 1.5]), torch.tensor([torch.nan])])
def test_no_p_values_are_refused(p):
    with pytest.raises(ValueError, match="Expected p-values between 0 and 1"):
        fp.plots.plot_p_values(p)
    with pytest.raises(ValueError, match="at least one set"):
        fp.plots.plot_p_values({})
