"""What holds for every test, doctests included: one seed, a forked random state, one thread."""

import os

# before torch is imported, and for the processes that tests start: two workers share the cores
os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pytest
import torch

matplotlib.use("Agg")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _forked_rng():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield
