"""Fixtures of all tests: forked random state, one thread, the real catalogues where they lie."""

from pathlib import Path

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)
DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture(autouse=True)
def _forked_rng():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


@pytest.fixture
def photoz_file():
    path = DATA / "dc2_photoz" / "dc2_training_9816.hdf5"
    if not path.exists():
        pytest.skip("the DC2 catalogue is not on this machine")
    return path
