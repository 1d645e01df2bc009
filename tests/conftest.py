"""Fixtures of the tests: the real catalogues, where they lie."""

from pathlib import Path

import pytest

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def photoz_file():
    path = DATA / "dc2_photoz" / "dc2_training_9816.hdf5"
    if not path.exists():
        pytest.skip("the DC2 catalogue is not on this machine")
    return path
