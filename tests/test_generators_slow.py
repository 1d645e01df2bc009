"""Teacher and student on showers whose likelihood is known, under a classifier (minutes)."""

import time

import pytest
import torch

import flowpost as fp
from flowpost.generators import GroupSums, TwoStep, distill, fit, weighted_draws
from flowpost.metrics import classifier_test
from flowpost.simulators import Shower

pytestmark = pytest.mark.slow
SHOWER = Shower()


@pytest.fixture(scope="module")
def trained():
    """Teacher and student of 20 000 showers, in two steps."""
    x, z = SHOWER.sample(20_000, seed=1)
    groups = GroupSums([24, 36, 18], threshold=SHOWER.threshold)
    torch.manual_seed(0)
    first = {"hidden": 64, "bins": 12}
    teacher = TwoStep.teacher(fp.Positive(), groups, first)
    fit(teacher, x, z[:, :1], epochs=15, progress=False)
    student = teacher.student()
    distill(student, x, z[:, :1], epochs=12, progress=False)
    return teacher, student


def test_teacher_comes_near_the_exact_likelihood(trained):
    teacher, _ = trained
    x, z = SHOWER.sample(3000, seed=2)
    exact = SHOWER.marginal_log_prob(x, z[:, 0])
    with torch.no_grad():
        own = teacher(z[:, :1]).log_prob(x, torch.Generator().manual_seed(0)).double()
    # 78 columns; a bound, so that it cannot be better than the truth
    gap = exact - own
    assert 0 < float(gap.mean()) < 4


@pytest.mark.parametrize("of", ["teacher", "student"])
def test_classifier_hardly_tells_draws_from_showers(trained, of):
    pytest.importorskip("sklearn")
    model = dict(zip(("teacher", "student"), trained, strict=True))[of]
    x, z = SHOWER.sample(8000, seed=3)
    drawn = model.sample(z[:, :1], torch.Generator().manual_seed(0))
    views = [(v + 1e-4).log() for v in (x, drawn)]
    result = classifier_test(*views, classifiers="mlp", permutations=20, retrainings=0)
    assert result.auc < 0.6


def test_student_is_faster_and_its_draws_count(trained):
    teacher, student = trained
    z = 10 ** torch.linspace(0.1, 1.9, 5)[:, None]
    generator = torch.Generator().manual_seed(0)
    w = weighted_draws(teacher.continuous(), student.continuous(), z, 400, generator=generator)
    assert float(w.ess.min()) > 0.5
    energy = torch.full((1000, 1), 20.0)
    seconds = []
    for model in (teacher, student):
        times = []
        for _ in range(3):
            start = time.perf_counter()
            model.sample(energy, generator)
            times.append(time.perf_counter() - start)
        seconds.append(min(times))
    assert seconds[0] > 15 * seconds[1]
