"""The coverage plots show the numbers of the results, on axes given or made."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from flowpost import diagnostics as fd
from flowpost.plots import plot_coverage, plot_pulls, plot_ranks


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def labels(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


def texts_apart(ax):
    """No legend entry lies on another one or leaves the axes."""
    ax.figure.canvas.draw()
    boxes = [t.get_window_extent() for t in ax.get_legend().get_texts()]
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    frame = ax.get_window_extent()
    assert all(b.x1 < frame.x1 and b.y1 < frame.y1 and b.y0 > frame.y0 for b in boxes)


def test_curve_and_residuals_are_the_numbers():
    cov = fd.coverage(1.1 * torch.randn(4000, 2), levels=10)
    ax = cov.plot()
    assert ax.get_ylabel() == "empirical coverage"
    curve, below = ax.figure.axes
    assert below.get_xlabel() == "nominal credibility"
    drawn = next(line for line in curve.lines if len(line.get_xdata()) == 10)
    assert np.allclose(drawn.get_xdata(), cov.nominal)
    assert np.allclose(drawn.get_ydata(), cov.empirical)
    gap = next(line for line in below.lines if len(line.get_xdata()) == 10)
    assert np.allclose(gap.get_ydata(), 100 * (cov.empirical - cov.nominal))
    assert below.get_ylim()[0] < gap.get_ydata().min()
    # the outermost band at one half
    outer = below.collections[2].get_paths()[0].vertices
    assert outer[:, 1].max() == pytest.approx(300 * 0.5 / np.sqrt(4000), rel=0.02)
    texts_apart(ax)


@pytest.mark.parametrize("width", [0.8, 1.2])
def test_several_are_overlaid_with_labels(width):
    u = torch.randn(3000, 2)
    results = {"mse": fd.coverage(width * u), "spline": fd.coverage(u)}
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
    assert plot_coverage(results, ax=axes[0]) is axes[0]
    assert len(figure.axes) == 3
    text = labels(axes[0])
    assert text[0] == "mse (KS p < 1e-6)"
    assert text[1].startswith("spline (KS p = ")
    assert text[2].startswith("1, 2, 3 σ (3")
    texts_apart(axes[0])
    alone = plot_coverage(results, ax=axes[1], residual=False)
    assert alone.get_xlabel() == "nominal credibility"
    assert len(figure.axes) == 3
    by_hand = figure.add_axes((0.1, 0.5, 0.3, 0.4))
    plot_coverage(results, ax=by_hand)
    assert len(by_hand.child_axes) == 1
    assert len(plot_coverage(results["mse"], residual=False).figure.axes) == 1


@pytest.mark.parametrize("count", [0, 9])
def test_too_many_or_none_are_refused(count):
    one = fd.coverage(torch.randn(10))
    with pytest.raises(ValueError, match=f"Expected 1 to 8 coverages in one plot; got {count}"):
        plot_coverage({str(i): one for i in range(count)})


def test_pulls_are_the_histograms():
    u = torch.randn(20_000, 2) * torch.tensor([1.0, 1.5]) + torch.tensor([0.3, 0.0])
    cov = fd.coverage(u, names=["energy", "x"])
    ax = cov.plot_pulls()
    assert ax.get_xlabel() == "base coordinate u"
    for j, name in enumerate(cov.names):
        numbers = f"mean {cov.pull_mean[j]:+.3f}, width {cov.pull_width[j]:.3f}"
        assert any(t.startswith(name) and numbers in t for t in labels(ax))
    first = next(line for line in ax.lines if "energy" in line.get_label())
    expected, _ = np.histogram(u[:, 0].numpy(), bins=40, range=(-4, 4))
    assert np.allclose(first.get_ydata(), expected / 20_000 / 0.2, atol=2e-3)
    texts_apart(ax)


def test_many_pulls_show_the_worst():
    u = torch.randn(3000, 12)
    u[:, 11] += 0.5
    axes = plt.subplots()[1]
    assert plot_pulls(fd.coverage(u), ax=axes) is axes
    assert axes.get_legend().get_title().get_text() == "8 of 12, worst by KS"
    assert any(t.startswith("u11") for t in labels(axes))
    texts_apart(axes)


class Shifted:
    batch_shape, event_shape = torch.Size([2000]), torch.Size([9])

    def sample(self, shape, *, generator=None):
        return torch.randn(*shape, 2000, 9) + 0.2


def test_ranks_are_the_histograms():
    result = fd.sbc(Shifted(), torch.randn(2000, 9), 99)
    ax = result.plot()
    assert ax.get_xlabel() == "rank of the truth / draws"
    assert ax.get_legend().get_title().get_text() == "8 of 9, worst by KS"
    heights = ax.patches[0].get_data().values
    assert heights.mean() == pytest.approx(1)
    assert heights[0] > 1.2
    texts_apart(ax)
    own = plt.subplots()[1]
    assert plot_ranks(result, ax=own, bins=5) is own
