"""The calorimeter example in its fast mode, the guide's code, and pictures of mean showers."""

import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from flowpost.plots.showers import plot_showers

ROOT = Path(__file__).resolve().parents[1]
SHAPE = ((2, 3), (1, 2))


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


def test_example(tmp_path, monkeypatch, capsys):
    arguments = ["calorimeter.py", "--fast", "--quiet", "--out", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", arguments)
    runpy.run_path(str(ROOT / "examples" / "calorimeter.py"), run_name="__main__")
    out = capsys.readouterr().out
    table = out.split("ms a shower\n")[1].splitlines()
    names = ("truth again", "teacher", "student", "library", "energy distance")
    for name, line in zip(names, table, strict=False):
        assert line.startswith(name)
        pairs = [[float(v) for v in p] for p in re.findall(r"([\d.]+) / ([\d.]+)", line)]
        assert len(pairs) == 3
        if name in ("truth again", "library"):
            assert all(abs(area - 0.5) < 0.09 and jsd < 0.05 for area, jsd in pairs)
        if name == "energy distance":
            assert min(area for area, _ in pairs) > 0.9
    assert "effective sample size" in out
    assert "ln p of a shower: exact" in out
    assert (tmp_path / "out" / "mean_showers.png").stat().st_size > 10_000


def test_code_of_the_guide_runs(monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "generators.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) >= 4
    exec("\n".join(blocks), {})
    assert "effective sample size" in capsys.readouterr().out


def test_pictures_show_the_means_of_the_cells_on_one_scale():
    g = torch.Generator().manual_seed(0)
    bright = 10 * torch.rand(50, 8, generator=g)
    dim = bright / 100
    dim[:, 5] = 0
    axes = plot_showers({"bright": bright, "dim": dim}, SHAPE, extent=2.0, unit="MeV")
    assert axes.shape == (2, 2)
    for i, x in enumerate((bright, dim)):
        mean = x.double().mean(0)
        for k, (part, cells) in enumerate(zip((mean[:6], mean[6:]), SHAPE, strict=True)):
            (image,) = axes[i, k].images
            expected = part.reshape(cells).numpy()
            shown = np.ma.filled(image.get_array(), np.nan)
            assert np.allclose(shown, np.where(expected > 0, expected, np.nan), equal_nan=True)
            assert image.norm.vmax == pytest.approx(float(bright.mean(0).split([6, 2])[k].max()))
    assert axes[0, 0].get_ylabel() == "bright"
    assert axes[0, 1].get_title() == "layer 2: 1 × 2"
    given = plot_showers({"dark": torch.zeros(3, 8)}, SHAPE, axes=axes[:1])
    assert given[0, 0] is axes[0, 0]


BAD = [
    (lambda: plot_showers({}, SHAPE), "at least one sample"),
    (lambda: plot_showers({"x": torch.ones(3, 7)}, SHAPE), r"x of shape \(N, 8\); got \(3, 7\)"),
    (lambda: plot_showers({"x": torch.ones(3, 8) / 0}, SHAPE), "finite x"),
    (lambda: plot_showers({"x": torch.ones(3, 8)}, SHAPE, axes=np.empty((2, 2))), r"axes of shape"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
