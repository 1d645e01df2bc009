"""The example that filters events, in its fast mode."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import flowpost as fp

pytest.importorskip("lightning.pytorch")
EXAMPLE = Path(__file__).parents[1] / "examples" / "filter_events.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    out = tmp_path_factory.mktemp("filtered")
    spec = importlib.util.spec_from_file_location("filter_events", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    argv = sys.argv
    sys.argv = ["filter_events.py", "--fast", "--out", str(out)]
    try:
        module.main()
    finally:
        sys.argv = argv
    return out


def test_decisions_are_those_of_the_saved_filter(folder):
    cut = fp.load(folder / "filter.safetensors")
    images = torch.load(folder / "events.pt", weights_only=True)
    decisions = torch.load(folder / "decisions.pt", weights_only=True)
    assert torch.equal(cut(images), decisions["kept"])
    assert torch.equal(decisions["kept"], decisions["p"] >= cut.threshold)
    # good events come first: few of them are lost
    assert decisions["kept"][: len(images) // 2].double().mean() > 0.9


def test_the_picture_is_there(folder):
    assert (folder / "p_values.png").stat().st_size > 5000


def test_it_is_short():
    assert len(EXAMPLE.read_text().splitlines()) < 120
