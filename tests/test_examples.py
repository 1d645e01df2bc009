"""Examples run in their fast mode, and the code of the README as it stands."""

import re
import runpy
import sys
from pathlib import Path

import h5py
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]


def run(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", [script, *map(str, arguments)])
    runpy.run_path(str(ROOT / "examples" / script), run_name="__main__")


@pytest.mark.filterwarnings("ignore:.*bins hold.*", "ignore:Nothing is expected.*")
def test_readme_code_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    torch.manual_seed(0)
    exec("\n".join(blocks[1:]), {})
    assert capsys.readouterr().out.count("coverage of 1000 events") == 2


@pytest.mark.filterwarnings("ignore:.*bins hold.*", "ignore:Nothing is expected.*")
def test_code_of_the_page_on_summaries_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs" / "inferno.md").read_text()
    exec("\n".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), {})
    out = capsys.readouterr().out
    assert "optimised" in out
    assert "half width" in out or "±" in out


@pytest.mark.filterwarnings("ignore:.*bins hold.*", "ignore:Nothing is expected.*")
def test_inferno_toy(tmp_path, monkeypatch, capsys):
    import json

    run("inferno_toy.py", monkeypatch, "--out", tmp_path, "--fast", "--quiet")
    out = capsys.readouterr().out
    for name in ("unbinned limit", "5 uniform bins", "5 optimised bins", "INFERNO, 5 bins"):
        assert name in out
    assert (tmp_path / "templates.png").exists()
    assert (tmp_path / "scan.png").exists()
    workspace = json.loads((tmp_path / "workspace.json").read_text())
    assert {s["name"] for s in workspace["channels"][0]["samples"]} == {"signal", "background"}


def test_replace_mse_head(tmp_path, monkeypatch, capsys):
    run("replace_mse_head.py", monkeypatch, "--out", tmp_path / "demo", "--fast", "--quiet")
    out = capsys.readouterr().out
    for name in ("CNN, mse", "CNN, spline", "LSTM, diagonal", "report.html"):
        assert name in out
    page = (tmp_path / "demo" / "report.html").read_text()
    assert page.count("data:image/png;base64") == len(list((tmp_path / "demo").glob("*.png"))) >= 9


def test_photoz_trains_scores_and_keeps_every_galaxy(tmp_path, monkeypatch, capsys, photoz_file):
    few = tmp_path / "few.hdf5"
    with h5py.File(photoz_file) as whole, h5py.File(few, "w") as part:
        for name, column in whole["photometry"].items():
            part[f"photometry/{name}"] = column[:1500]
    model = tmp_path / "model"
    common = ("--model", model, "--quiet")
    run("photoz.py", monkeypatch, "--data", few, "--epochs", 4, *common)
    run("photoz.py", monkeypatch, "--score", few, *common)
    lines = capsys.readouterr().out.splitlines()
    assert sum("CDE loss" in line for line in lines) == 2
    numbers = [float(v) for v in lines[-1].split()[-6:]]
    assert numbers[0] < 0.5
    features, z = runpy.run_path(str(ROOT / "examples" / "photoz.py"))["read"](str(photoz_file))
    assert features.shape == (10_225, 16)
    assert z.shape == (10_225, 1)
    assert int(features.isnan().any(1).sum()) > 700


def test_report_needs_its_folder(tmp_path):
    from flowpost.report import write_report

    with pytest.raises(ValueError, match="Expected a folder"):
        write_report(tmp_path / "absent", "title", {})
