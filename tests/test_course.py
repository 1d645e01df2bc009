"""What a training goes by: the average of its weights, the best state, what a checkpoint holds."""

import io
import math

import pytest
import torch
from torch import nn

from flowpost._course import Course, share_kept
from flowpost._lightning import adamw, one_cycle


def walked(steps=4):
    """A course of a layer whose weights were set by hand, and those weights."""
    network = nn.Linear(2, 1).double()
    course, path = Course(network), []
    generator = torch.Generator().manual_seed(0)
    for step in range(1, steps + 1):
        with torch.no_grad():
            for p in network.parameters():
                p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype))
        path.append(network.weight.detach().clone())
        course.follow(share_kept(step))
    return network, course, path


def test_the_average_is_that_of_the_recursion():
    network, course, path = walked()
    mean = path[0]
    for step, value in enumerate(path[1:], start=2):
        keep = (1 + step) / (10 + step)
        mean = keep * mean + (1 - keep) * value
    course.swap()
    torch.testing.assert_close(network.weight.detach(), mean, rtol=1e-14, atol=0)
    course.swap()
    assert torch.equal(network.weight, path[-1])
    assert share_kept(10**6) == 0.998
    assert share_kept(10**6, 0.9) == 0.9


def test_only_what_learns_is_averaged():
    network = nn.Linear(2, 1)
    course = Course(network, [network.weight])
    course.begin()
    before = network.weight.detach().clone()
    with torch.no_grad():
        network.weight.zero_()
        network.bias.fill_(3.0)
    course.swap()
    assert torch.equal(network.weight, before)
    assert network.bias.item() == 3


def test_the_best_average_is_kept_and_restored():
    network, course, path = walked()
    seen = []

    def score():
        assert not network.training
        seen.append(network.weight.detach().clone())
        return 2.0

    assert course.validated(score) == 2.0
    assert network.training
    assert torch.equal(network.weight, path[-1])
    assert (course.best, course.best_epoch) == (2.0, 1)
    course.keep(2.0, 2)
    course.keep(math.nan, 3)
    assert course.best_epoch == 1
    course.restore()
    assert torch.equal(network.weight, seen[0])
    course.keep(2.1, 4, allowance=0.2)
    assert (course.best, course.best_epoch) == (2.0, 4)


def test_a_score_that_fails_leaves_the_weights():
    network, course, path = walked()

    def score():
        raise ValueError("no score")

    with pytest.raises(ValueError, match="no score"):
        course.validated(score)
    assert torch.equal(network.weight, path[-1])
    assert network.training
    assert course.best_state is None


def test_a_course_goes_on_from_its_state():
    network, course, _ = walked()
    course.validated(lambda: 1.0)
    course.rows.append({"epoch": 1, "seconds": 100.0})
    file = io.BytesIO()
    torch.save(course.state(), file)
    file.seek(0)
    again = Course(nn.Linear(2, 1).double())
    again.load(torch.load(file, weights_only=True))
    assert (again.best, again.best_epoch, again.next_epoch) == (1.0, 1, 2)
    assert again.seconds >= 100
    course.restore()
    again.restore()
    assert torch.equal(network.weight, again.network.weight)
    again.swap()
    # the average and the best state are the same here
    assert torch.equal(network.weight, again.network.weight)


@pytest.mark.parametrize(("steps", "least", "total"), [(50, 6, 50), (3, 6, 6), (3, 30, 30)])
def test_only_matrices_decay_through_one_cycle(steps, least, total):
    network = nn.Linear(2, 1)
    parameters = list(network.parameters())
    (optimizer,), (plan,) = adamw(parameters, 0.1, 0.3, steps, 0.2, least)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert decay == {id(network.weight): 0.3, id(network.bias): 0.0}
    assert plan["scheduler"].total_steps == total
    assert plan["interval"] == "step"
    frozen = adamw([network.bias], 0.1, 0.3, steps, 0.2)[0][0]
    assert [g["weight_decay"] for g in frozen.param_groups] == [0.0]


def test_a_cycle_has_the_peak_of_each_group():
    a, b = (nn.Parameter(torch.zeros(1)) for _ in range(2))
    optimizer = torch.optim.SGD([{"params": [a], "lr": 0.1}, {"params": [b], "lr": 0.3}])
    cycle, rates = one_cycle(optimizer, 40, 0.25), []
    for _ in range(40):
        rates.append([g["lr"] for g in optimizer.param_groups])
        optimizer.step()
        if len(rates) < 40:
            cycle.step()
    peak = [max(column) for column in zip(*rates, strict=True)]
    assert peak == pytest.approx([0.1, 0.3])
    assert rates.index(max(rates)) == 9
    assert rates[-1][0] < 1e-5
