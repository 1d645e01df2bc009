"""Validation in the trainings of generators: every held-out event counts, by its weight."""

import pytest
import torch

import flowpost as fp
from flowpost.generators import Student, Teacher, distill, fit
from flowpost.generators.module import module_class
from flowpost.generators.training import Batches, divided

SMALL = {"hidden": 8, "context": 6, "label_hidden": 8, "bins": 4}
# held-out events are looked at in batches of four times as many
BATCH = 4


def events(count, seed=0):
    """Data (N, 2) and their labels (N, 1)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(count, 1, generator=generator, dtype=torch.float64)
    return z + torch.randn(count, 2, generator=generator, dtype=torch.float64), z


def teacher():
    torch.manual_seed(0)
    return Teacher(fp.Real(1), 2, **SMALL).double()


OPTIONS = {"epochs": 2, "batch_size": BATCH, "progress": False, "seed": 3}


@pytest.mark.parametrize("count", [1, 3, 15, 16, 17, 31, 32, 37, 50])
def test_batches_have_every_event_once_or_one_size(count):
    rows = (torch.arange(count),)
    batches = Batches(rows, 16, 0, whole=True)
    sizes = [len(b[0]) for b in batches]
    seen = torch.cat([b[0] for b in batches])
    assert seen.sort().values.equal(rows[0])
    assert len(sizes) == len(batches) == -(-count // 16)
    assert max(sizes) <= 16
    assert max(sizes) - min(sizes) <= 1
    equal = [len(b[0]) for b in Batches(rows, 16, 0)]
    assert equal == [min(count, 16)] * max(1, count // 16)


@pytest.mark.parametrize("count", [1, 15, 16, 17, 32, 37])
def test_validation_is_the_loss_of_all_held_out_events(count):
    model, (x, z) = teacher(), events(count, seed=1)
    history = fit(model, *events(60), val=(x, z), **OPTIONS)
    assert history.best.val == pytest.approx(-model(z).log_prob(x).mean().item(), rel=1e-12)


def test_validation_is_weighted_where_the_events_are():
    model, (x, z) = teacher(), events(120)
    weight = torch.rand(120, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    _, (x_held, z_held, w) = divided((x, z, weight), 0.31, OPTIONS["seed"], lambda x, z: (x, z))
    history = fit(model, x, z, weight, val=0.31, **OPTIONS)
    assert len(w) == 37
    expected = (w * -model(z_held).log_prob(x_held)).sum() / w.sum()
    assert history.best.val == pytest.approx(expected.item(), rel=1e-12)


def test_a_held_out_batch_without_weight_counts_nothing():
    model, (x, z) = teacher(), events(8)
    model.fit_scale(x, z)
    held = Batches((x, z, torch.zeros(8).double()), 4, 0, whole=True)
    order = torch.cat([b[0] for b in held])
    mine = (x[:, None] == order[:4]).all(-1).any(-1)
    held = Batches((x, z, mine.double()), 4, 0, whole=True)

    def objective(batch, generator):
        assert float(batch[2].sum()) > 0
        return -model(batch[1]).log_prob(batch[0]).mean()

    options = {"epochs": 1, "seed": 0}
    module = module_class()(model, list(model.parameters()), objective, held, held, options)
    with torch.no_grad():
        expected = -model(z[mine]).log_prob(x[mine]).mean().item()
        assert module.score() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("count", [16, 17, 37])
def test_validation_of_a_distillation_is_of_all_held_out_events(count):
    model = teacher()
    fit(model, *events(60), **OPTIONS)
    student, (x, z) = Student(model), events(count, seed=1)
    terms = {"noise": 0, "kl": 0}
    history = distill(student, *events(60), terms=terms, val=(x, z), **OPTIONS)
    # the term of the data has no noise
    expected = student.distillation(x, z)["data"].item()
    assert history.best.val == pytest.approx(expected, rel=1e-12)


def test_held_out_events_without_weight_are_refused():
    x, z = events(20)
    _, (_, _, held) = divided((x, z, torch.arange(20)), 0.2, OPTIONS["seed"], lambda x, z: (x, z))
    weight = torch.ones(20)
    weight[held] = 0
    with pytest.raises(ValueError, match="held-out events of some weight; got 0 in all 4"):
        fit(teacher(), x, z, weight, val=0.2, **OPTIONS)
