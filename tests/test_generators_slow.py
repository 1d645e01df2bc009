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
    fit(teacher, x, z[:, :1], epochs=12, progress=False)
    student = teacher.student()
    distill(student, x, z[:, :1], epochs=12, progress=False)
    return teacher, student


@pytest.fixture(autouse=True)
def _one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_teacher_comes_near_the_exact_likelihood(trained):
    teacher, _ = trained
    x, z = SHOWER.sample(3000, seed=2)
    exact = SHOWER.marginal_log_prob(x, z[:, 0])
    with torch.no_grad():
        own = teacher(z[:, :1]).log_prob(x, torch.Generator().manual_seed(0)).double()
    # 78 columns; a bound, so that it cannot be better than the truth
    gap = exact - own
    assert 0 < float(gap.mean()) < 4


def area(model, seed):
    """AUC of an MLP that is shown ln E beside voxels, fresh ones against draws at other labels."""
    (x, z), (_, other) = SHOWER.sample(8000, seed=seed), SHOWER.sample(8000, seed=seed + 1)
    at = other[:, :1]
    g = torch.Generator().manual_seed(0)
    drawn = torch.cat([model.sample(part, g) for part in at.split(1000)])
    pair = [
        torch.cat([e.log(), (1 + v / SHOWER.threshold).log()], 1)
        for e, v in ((z[:, :1], x), (at, drawn))
    ]
    return classifier_test(*pair, classifiers="mlp", permutations=20, retrainings=0).auc


def test_classifier_tells_the_student_no_better_than_its_teacher(trained):
    pytest.importorskip("sklearn")
    teacher, student = (area(model, seed=3) for model in trained)
    assert max(teacher, student) < 0.6
    assert abs(student - teacher) < 0.05


def test_draws_of_the_student_count(trained):
    teacher, student = trained
    z = 10 ** torch.linspace(0.1, 1.9, 5)[:, None]
    generator = torch.Generator().manual_seed(0)
    w = weighted_draws(teacher.continuous(), student.continuous(), z, 400, generator=generator)
    assert float(w.ess.min()) > 0.5


def test_student_is_twenty_times_faster(trained):
    generator = torch.Generator().manual_seed(0)
    energy = torch.full((1000, 1), 20.0)

    def seconds(model):
        start = time.process_time()
        model.sample(energy, generator)
        return time.process_time() - start

    teacher, student = (min(seconds(model) for _ in range(3)) for model in trained)
    assert teacher >= 20 * student
