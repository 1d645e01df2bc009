"""Students: the fast direction, distillation from both sides, weights and the fall-back."""

import math

import pytest
import torch

import flowpost as fp
from flowpost.generators import (
    GroupSums,
    Student,
    Teacher,
    TwoStep,
    distill,
    effective_size,
    fit,
    weighted_draws,
)
from flowpost.generators.maf import MaskedFlow

SMALL = {"hidden": 32, "context": 12, "label_hidden": 16, "bins": 6}


def crescents(n, seed):
    """Five columns with curvature and a label that moves and widens them."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 1, generator=generator)
    e = torch.randn(n, 5, generator=generator)
    first = e[:, :1] * (0.3 * z).exp() + z
    second = e[:, 1:2] * 0.4 + 0.5 * first.square()
    third = e[:, 2:3] * 0.5 + torch.sin(2 * first)
    rest = e[:, 3:] + 0.5 * second - z
    return torch.cat([first, second, third, rest], 1), z


@pytest.fixture(scope="module")
def trained():
    """Teacher and student of the crescents, the student with its slow inverse forbidden."""
    x, z = crescents(4000, 0)
    torch.manual_seed(0)
    teacher = Teacher(fp.Real(1), 5, **SMALL)
    fit(teacher, x, z, epochs=10, batch_size=200, lr=5e-3, progress=False)
    before = {k: v.clone() for k, v in teacher.state_dict().items()}
    student = Student(teacher)
    slow = MaskedFlow.slow

    def forbidden(self, *args):
        raise AssertionError("a slow inverse was called")

    MaskedFlow.slow = forbidden
    try:
        history = distill(student, x, z, epochs=10, batch_size=200, lr=5e-3, progress=False)
    finally:
        MaskedFlow.slow = slow
    for key, value in teacher.state_dict().items():
        assert torch.equal(value, before[key])
    assert all(p.requires_grad for p in teacher.parameters())
    return teacher, student, history


def test_distillation_lowers_every_loss(trained):
    teacher, student, history = trained
    x, z = crescents(1000, 5)
    own = student.distillation(x, z, torch.Generator().manual_seed(0))
    start = Student(teacher).distillation(x, z, torch.Generator().manual_seed(0))
    for name in ("data", "noise", "kl"):
        assert float(own[name].detach()) < 0.5 * float(start[name].detach()), name
    assert float(own["kl"].detach()) > 0
    assert history.best.val < history.epochs[0].val


def test_effective_size_is_high(trained):
    _, student, _ = trained
    generator = torch.Generator().manual_seed(0)
    draws = student.weighted(torch.linspace(-1.5, 1.5, 7)[:, None], 1500, generator=generator)
    assert draws.x.shape == (1500, 7, 5)
    assert float(draws.ess.mean()) > 0.9
    assert float(draws.ess.min()) > 0.75
    assert not bool(draws.replaced.any())
    assert "effective sample size 9" in str(draws)


def test_log_q_of_draws_is_that_of_the_slow_pass(trained):
    _, student, _ = trained
    z = torch.randn(200, 1)
    x, log_q = student(z).sample_and_log_prob(torch.Generator().manual_seed(0))
    assert not log_q.requires_grad
    torch.testing.assert_close(log_q, student.log_prob(x, z).detach(), rtol=0, atol=5e-3)
    # a student is a likelihood of its own
    u, _ = student(z).residuals(x)
    again = student(z).noise(torch.Generator().manual_seed(0))
    torch.testing.assert_close(u, again, rtol=0, atol=5e-3)


def test_a_draw_calls_no_slow_inverse(trained, monkeypatch):
    teacher, student, _ = trained

    def forbidden(self, *args):
        raise AssertionError("a slow inverse was called")

    monkeypatch.setattr(MaskedFlow, "slow", forbidden)
    z = torch.randn(50, 1)
    x = student.sample(z)
    assert bool(torch.isfinite(teacher.log_prob(x, z)).all())
    student.weighted(z, draws=8)
    with pytest.raises(AssertionError, match="slow inverse"):
        teacher.sample(z)
    with pytest.raises(AssertionError, match="slow inverse"):
        student.log_prob(x, z)
    # below the demanded effective size the teacher is asked
    with pytest.raises(AssertionError, match="slow inverse"):
        student.weighted(z, draws=8, minimum_ess=1.0)


def test_distillation_gives_gradients_to_the_student_alone(trained):
    teacher, _, _ = trained
    student = Student(teacher)
    x, z = crescents(20, 1)
    for p in teacher.parameters():
        p.requires_grad_(False)
    try:
        losses = student.distillation(x, z)
        gradients = torch.autograd.grad(sum(losses.values()), student.learned(), allow_unused=True)
    finally:
        for p in teacher.parameters():
            p.requires_grad_(True)
    assert all(g is not None and bool(torch.isfinite(g).all()) for g in gradients)


@pytest.mark.parametrize("name", ["data", "noise", "parameters", "kl"])
def test_a_perfect_student_has_no_loss(name):
    """Where no column looks at another, the teacher's weights are the student's solution."""
    teacher = Teacher(fp.Real(1), 4, **SMALL).double()
    with torch.no_grad():
        for layer in teacher.flow.layers:
            layer.skip.weight.normal_(std=0.3)
            layer.skip.bias.normal_(std=0.3)
    student = Student(teacher)
    x, z = torch.randn(100, 4, dtype=torch.float64), torch.randn(100, 1, dtype=torch.float64)
    assert abs(float(student.distillation(x, z)[name].detach())) < 1e-10
    with torch.no_grad():
        student.flow.layers[0].output.weight.normal_(std=0.2)
    assert float(student.distillation(x, z)[name].detach()) > 1e-5


# Weights


class Off(Student):
    """A student that is too narrow by a factor wherever the label is positive."""

    def _bind(self, z):
        bound = super()._bind(z)
        factor = torch.where(z[..., :1] > 0, 0.6, 1.0)
        path_of = bound.path_of

        def narrow(u):
            path = path_of(u)
            shift = factor.log()[..., 0] * u.shape[-1]
            states = (path.states[0] * factor, *path.states[1:])
            return path._replace(states=states, ladj=path.ladj + shift)

        bound.path_of = narrow
        return bound


@pytest.fixture(scope="module")
def off():
    """A normal teacher of two columns, and a student that is too narrow for some labels."""
    teacher = Teacher(fp.Real(1), 2, **SMALL).double()
    return teacher, Off(teacher)


def test_weights_are_the_ratio_of_densities_and_unbiased(off):
    _, student = off
    z = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    w = student.weighted(z, draws=20_000, generator=torch.Generator().manual_seed(0))
    # of normals of widths 1 and s: ln w = Σ (u²/2)(1 − s²) + d ln s, with x = s u
    torch.testing.assert_close(w.log_weight[:, 0], torch.zeros(20_000, dtype=torch.float64))
    square = w.x[:, 1].square().sum(-1)
    wanted = 0.5 * square * (1 / 0.36 - 1) + 2 * math.log(0.6)
    torch.testing.assert_close(w.log_weight[:, 1], wanted, rtol=1e-5, atol=1e-5)
    # E w² of two columns is (1 / (s √(2 − 1/s²)))², infinite for s² ≤ 1/2: a narrow student
    # cannot be repaired, and the effective size of its draws is far below one
    assert float(w.ess[0]) == pytest.approx(1)
    assert float(w.ess[1]) < 0.6
    assert float(w.mean(square.new_ones(20_000, 2), normalised=False)[0]) == pytest.approx(1)


def test_weighted_means_agree_with_the_teacher(trained):
    """A student half-way through its training, whose own moments are off."""
    teacher, _, _ = trained
    student = Student(teacher)
    x, z = crescents(1500, 3)
    distill(student, x, z, epochs=1, batch_size=100, lr=4e-3, progress=False)
    label = torch.tensor([[0.5]])
    exact = teacher(label.expand(30_000, 1)).sample(torch.Generator().manual_seed(1))
    w = student.weighted(label, draws=30_000, generator=torch.Generator().manual_seed(2))
    assert 0.2 < float(w.ess[0]) < 0.999
    raw = w.x[:, 0]
    error = (exact.var(0) * 2 / 30_000 / w.ess[0]).sqrt()
    for normalised in (True, False):
        values = w.mean(w.x, normalised=normalised)[0]
        assert float(((values - exact.mean(0)) / error).abs().max()) < 4.5
    assert float(((raw.mean(0) - exact.mean(0)) / error).abs().max()) > 4.5
    again = w.resampled(20_000, torch.Generator().manual_seed(3))[:, 0]
    assert float(((again.mean(0) - exact.mean(0)) / error).abs().max()) < 6


def test_fall_back_happens_where_the_effective_size_is_low(off):
    _, student = off
    z = torch.tensor([[-1.0], [1.0], [-2.0]], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    w = student.weighted(z, draws=4000, minimum_ess=0.8, generator=generator)
    assert w.replaced.double().mean(0).tolist() == [0.0, 1.0, 0.0]
    assert bool((w.log_weight[:, 1] == 0).all())
    # the teacher's own draws have its width
    assert float(w.x[:, 1].std()) == pytest.approx(1, abs=0.03)
    assert float(w.ess[1]) < 0.8
    assert "33.3% of the draws replaced" in str(w)
    together = student.weighted(z[[0, 2]].repeat(40, 1), draws=1, generator=generator)
    assert together.ess.shape == (80,)
    joint = weighted_draws(
        student.teacher, student, z.repeat(40, 1), 1, minimum_ess=0.99, together=True
    )
    assert joint.ess.ndim == 0
    assert bool(joint.replaced.all())


def test_fall_back_does_not_bias_the_mean(off):
    """Draws judged by themselves would lose their large weights; half by half they do not."""
    teacher, student = off
    z = torch.full((6000, 1), 1.0, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    w = weighted_draws(teacher, student, z, 8, minimum_ess=0.75, generator=generator)
    assert 0.1 < float(w.replaced.double().mean()) < 0.9
    inner = (w.x.square().sum(-1) < 2).double()
    values = w.mean(inner, normalised=False)
    exact = 1 - math.exp(-1)
    assert float((values.mean() - exact).abs()) < 4 * float(values.std()) / 6000**0.5
    # the two halves are judged apart
    assert bool((w.replaced[0] != w.replaced[1]).any())
    assert torch.equal(w.replaced[0], w.replaced[2])


def test_effective_size_of_known_weights():
    assert float(effective_size(torch.zeros(10))) == pytest.approx(1)
    assert float(effective_size(torch.tensor([0.0, -math.inf, -math.inf, -math.inf]))) == 0.25
    assert float(effective_size(torch.full((3,), -math.inf))) == 0
    assert float(effective_size(torch.tensor([1000.0, 1000.0]))) == pytest.approx(1)
    w = torch.rand(50, 3, dtype=torch.float64)
    wanted = w.sum(0) ** 2 / (50 * w.square().sum(0))
    torch.testing.assert_close(effective_size(w.log()), wanted)


def test_draws_at_a_single_label_are_resampled(off):
    teacher, student = off
    w = weighted_draws(teacher, student, torch.tensor([1.0]).double(), 16)
    assert w.log_weight.shape == (16,)
    again = w.resampled(3, torch.Generator().manual_seed(0))
    assert again.shape == (3, 2)
    assert bool((again[:, None] == w.x).all(-1).any(1).all())


def test_held_out_events_may_be_given(trained):
    teacher, _, _ = trained
    (x, z), held = crescents(300, 0), crescents(50, 1)
    quick = {"epochs": 1, "batch_size": 100, "progress": False}
    torch.manual_seed(0)
    model = Teacher(fp.Real(1), 5, **SMALL)
    history = fit(model, x, z, val=held, **quick)
    own = -model.log_prob(*held).mean()
    assert history.best.val == pytest.approx(float(own.detach()), rel=1e-5)
    # the scales are those of all that was given for training
    torch.testing.assert_close(model.loc, Teacher(fp.Real(1), 5, **SMALL).fit_scale(x, z).loc)
    student = Student(teacher)
    a = distill(student, x, z, val=held, **quick).best.val
    b = distill(Student(teacher), x, z, val=crescents(50, 2), **quick).best.val
    assert a != b


def test_students_of_two_steps(monkeypatch):
    groups = GroupSums([4, 3], threshold=0.05)
    torch.manual_seed(0)
    model = TwoStep.teacher(fp.Positive(), groups, SMALL, SMALL)
    generator = torch.Generator().manual_seed(0)
    z = 1 + torch.rand(1500, 1, generator=generator)
    x = torch._standard_gamma(z * torch.tensor([2.0, 0.5, 4, 1, 1, 3, 2]), generator=generator)
    x = groups.cut(0.1 * x)
    fit(model, x, z, epochs=4, batch_size=150, lr=5e-3, progress=False)
    student = model.student()
    distill(student, x, z, epochs=4, batch_size=150, lr=5e-3, progress=False)
    assert student.first is model.first
    w = weighted_draws(model.continuous(), student.continuous(), z[:5], 400, generator=generator)
    assert w.x.shape == (400, 5, 7)
    assert float(w.ess.min()) > 0.7
    drawn = student.sample(z, generator)
    assert bool(((drawn == 0) | (drawn >= 0.05)).all())
    assert abs(float((drawn == 0).float().mean() - (x == 0).float().mean())) < 0.05
    torch.testing.assert_close(drawn.mean(0), x.mean(0), rtol=0.15, atol=0.01)
    with pytest.raises(ValueError, match="a teacher to learn from; got Student"):
        student.student()
    both = model.student(first=True)
    kept = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in both.first.learned():
            p.add_(0.05 * torch.randn(p.shape, generator=generator))
    poor = weighted_draws(model.continuous(), both.continuous(), z[:5], 400, generator=generator)
    distill(both, x, z, epochs=4, batch_size=150, lr=5e-3, progress=False)
    assert all(torch.equal(v, kept[k]) for k, v in model.state_dict().items())
    w = weighted_draws(model.continuous(), both.continuous(), z[:5], 400, generator=generator)
    assert float(w.ess.mean()) > 0.8 > 2 * float(poor.ess.mean())

    def forbidden(self, *args):
        raise AssertionError("a slow inverse was called")

    monkeypatch.setattr(MaskedFlow, "slow", forbidden)
    both.sample(z, generator)
    with pytest.raises(AssertionError, match="slow inverse"):
        student.sample(z, generator)
    with pytest.raises(ValueError, match="a teacher to learn from; got Student"):
        both.student(first=True)


def test_saving_types_and_randomness(trained, tmp_path):
    teacher, student, _ = trained
    torch.save(student.state_dict(), tmp_path / "student.pt")
    again = Student(Teacher(fp.Real(1), 5, **SMALL))
    again.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))
    z = torch.randn(9, 1)
    first = student.sample(z, torch.Generator().manual_seed(1))
    assert torch.equal(first, again.sample(z, torch.Generator().manual_seed(1)))
    assert not torch.equal(first, again.sample(z, torch.Generator().manual_seed(2)))
    assert again.double().sample(z).dtype == torch.float64
    assert Student(Teacher(fp.Real(1), 5, **SMALL).double()).loc.dtype == torch.float64
    config = student.config()
    assert config["type"] == "Student"
    assert config["teacher"] == teacher.config()
    smaller = Student(teacher, hidden=8, depth=1)
    assert smaller.sample(z).shape == (9, 5)
    assert smaller.flow.layers[0].input.out_features == 8


def test_distillation_is_reproducible():
    x, z = crescents(300, 0)
    torch.manual_seed(0)
    teacher = Teacher(fp.Real(1), 5, **SMALL)
    fit(teacher, x, z, epochs=1, batch_size=100, progress=False)
    states = []
    for _ in range(2):
        student = Student(teacher)
        distill(student, x, z, epochs=2, batch_size=100, progress=False, terms={"parameters": 0.1})
        states.append(student.state_dict())
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda t: Student(fp.Real(2)), "a Teacher to learn from"),
        (lambda t: Student(t, hidden=1), "hidden as a whole number"),
        (lambda t: Student(t).fit_scale(torch.zeros(3, 5), torch.zeros(3)), "the teacher's scales"),
        (lambda t: distill(t, torch.zeros(9, 5), torch.zeros(9)), "Expected a Student"),
        (
            lambda t: distill(Student(Teacher(fp.Real(1), 2)), torch.zeros(9, 2), torch.zeros(9)),
            "a trained teacher",
        ),
        (lambda t: fit(Student(t), torch.zeros(9, 5), torch.zeros(9)), "trained by distill"),
        (
            lambda t: distill(Student(t), torch.zeros(9, 5), torch.zeros(9), terms={"x": 1.0}),
            "of the terms data, noise, parameters, kl",
        ),
        (
            lambda t: distill(Student(t), torch.zeros(9, 5), torch.zeros(9), terms={"kl": -1.0}),
            "at least 0",
        ),
        (lambda t: effective_size([]), "at least one draw along dimension 0"),
        (lambda t: effective_size(torch.zeros(3), dim=1), "along dimension 1"),
        (lambda t: Student(t).weighted(torch.zeros(1), minimum_ess=2.0), "between 0 and 1"),
        (lambda t: Student(t).weighted(torch.zeros(1), draws=0), "draws as a whole number"),
        (
            lambda t: Student(t).weighted(torch.zeros(1), draws=3, minimum_ess=0.5),
            "at least four draws",
        ),
        (
            lambda t: Student(t).weighted(torch.zeros(2), draws=8).mean(torch.zeros(8)),
            r"values of shape \(8, 2, ...\)",
        ),
    ],
)
def test_refuses(trained, call, message):
    with pytest.raises(ValueError, match=message):
        call(trained[0])
