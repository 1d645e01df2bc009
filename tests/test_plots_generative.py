"""Generative checks drawn: what is marked, where, and what is refused."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgba

from flowpost.metrics import (
    CrossTable,
    compare_correlations,
    downstream,
    held_out_statistics,
    memorisation,
    recombine,
    tails,
)


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_statistics_that_differ_are_marked(rng):
    x, y = rng.normal(size=(2, 200, 2))
    y[:, 1] += 1
    columns = {"one": lambda e: e[:, 0], "two": lambda e: e[:, 1], "flat": lambda e: 0 * e[:, 0]}
    result = held_out_statistics(x, y, columns, permutations=199)
    ax = result.plot()
    drawn = {line.get_label(): line.get_xdata() for line in ax.get_lines()}
    assert drawn["differs"] == pytest.approx([result["two"].w1_scaled])
    assert drawn["p > 1 %"] == pytest.approx([result["one"].w1_scaled])
    assert [t.get_text().split()[0] for t in ax.get_yticklabels()] == ["one", "two"]
    widths = [patch.get_width() for patch in ax.patches]
    assert widths[0] == pytest.approx(result["one"].expected / result["one"].spread)


def test_correlations_have_their_differences_written(rng):
    x = rng.normal(size=(200, 3))
    y = x @ np.array([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
    result = compare_correlations(x, y, permutations=9)
    ax = result.plot()
    image = ax.get_images()[0].get_array()
    pull = result.difference[0, 1] / result.error[0, 1]
    assert float(image[0, 1]) == pytest.approx(pull)
    assert image.mask[0, 0] or np.isnan(image.data[0, 0])
    assert f"{result.difference[0, 1]:+.2f}" in {t.get_text() for t in ax.texts}
    many = rng.normal(size=(60, 9))
    assert not compare_correlations(many, many, permutations=1).plot().texts


def test_flagged_tails_are_open(rng):
    fair = [rng.exponential(size=5000) for _ in range(4)]
    cut = [x[x < 1] for x in fair]
    exact = np.exp([-0.5, -1.5])
    result = tails({"fair": fair, "cut": cut}, [0.5, 1.5], probabilities=exact, training_size=5000)
    _, ax = plt.subplots()
    assert result.plot(ax) is ax
    lines = [line for line in ax.get_lines() if line.get_marker() in ("o", "s")]
    heights = [float(line.get_ydata()[0]) for line in lines]
    assert heights == pytest.approx([row.ratio for row in result.table])
    open_ones = [to_rgba(line.get_markerfacecolor()) == (1, 1, 1, 1) for line in lines]
    assert open_ones == [bool(row.flag) for row in result.table]
    assert [t.get_text() for t in ax.get_xticklabels()] == ["0.5", "1.5"]
    small = tails({"fair": fair}, [0.5, 99], true=rng.exponential(size=100)).plot()
    assert len([line for line in small.get_lines() if line.get_marker() == "o"]) == 1


def test_distances_are_distribution_functions(rng):
    training, held_out, fresh = rng.normal(size=(3, 100, 2))
    result = memorisation(fresh, training, held_out, permutations=9)
    ax = result.plot()
    for line, distance in zip(
        ax.get_lines(), (result.distance_generated, result.distance_held_out), strict=True
    ):
        np.testing.assert_allclose(line.get_xdata(), np.sort(distance))
        assert line.get_ydata()[-1] == 1


def test_residuals_at_equal_areas(rng):
    z = torch.as_tensor(rng.normal(size=(200, 2)))
    x = z + torch.as_tensor(rng.normal(size=(200, 2)))
    result = downstream(lambda e: e, (x, z), (x[:100], z[:100]), names=("a", "b"))
    ax = result.plot(name="b")
    for patch in ax.patches:
        data = patch.get_data()
        assert (data.values * np.diff(data.edges)).sum() == pytest.approx(1, abs=0.03)
    assert ax.get_xlabel() == "residual of b"
    assert result.plot().get_xlabel() == "residual of a"
    with pytest.raises(ValueError, match="name as one of a, b"):
        result.plot(name="c")


def test_what_combinations_are_worth(rng):
    x = rng.normal(size=(60, 2))
    options = {"statistic": lambda v: v.sum(1), "permutations": 9}
    result = recombine(x, [0, 1], thresholds=[1.0, 2.0, 99.0], **options)
    ax = result.plot()
    heights = [patch.get_height() for patch in ax.patches]
    assert heights == pytest.approx([*(g.effective_count for g in result.gains[:2]), 0])
    assert ax.get_lines()[0].get_ydata()[0] == 60
    assert [t.get_text() for t in ax.get_xticklabels()] == ["1", "2", "99"]
    assert [t.get_text() for t in ax.texts] == [f"× {h / 60:.2g}" for h in heights[:2]]
    with pytest.raises(ValueError, match="with gains at thresholds; got none"):
        recombine(x, [0, 1], permutations=9).plot()


def test_the_four_areas_are_written_in_their_cells():
    result = CrossTable(
        auc=np.array([[0.81, 0.72], [0.63, 0.94]]),
        error=np.array([[0.011, 0.012], [0.013, 0.014]]),
        loss=-0.18,
        loss_error=0.02,
        p_value=0.01,
        classifier="logistic",
        count=((50, 50),) * 4,
        permutations=99,
    )
    _, ax = plt.subplots()
    assert result.plot(ax) is ax
    np.testing.assert_array_equal(ax.get_images()[0].get_array(), result.auc)
    written = {t.get_position(): t.get_text() for t in ax.texts}
    # columns are what was tested on
    assert written[(1, 0)] == "0.720\n± 0.012"
    assert written[(0, 1)] == "0.630\n± 0.013"
    assert ax.get_ylabel() == "trained on"
    assert ax.get_title() == "logistic: loss -0.180 ± 0.020, p = 0.01"
