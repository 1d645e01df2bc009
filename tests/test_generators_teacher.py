"""Teachers: densities against closed forms, both directions of the flow, training, two steps."""

import math

import numpy as np
import pytest
import torch
from scipy import stats

import flowpost as fp
from flowpost import goodness
from flowpost.flows.spline import spline, spline_inverse
from flowpost.generators import GroupSums, Teacher, TwoStep, fit
from flowpost.generators.maf import MaskedFlow
from flowpost.generators.splines import bend
from flowpost.likelihood import ExtendedModel, FlowLikelihood
from flowpost.simulators import LinearGaussian, Shower

SMALL = {"hidden": 24, "context": 12, "label_hidden": 16, "bins": 5}


def stirred(model, size=0.3):
    """A model far from its start, where every parameter does something."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p += size * torch.randn_like(p) / max(1, p.shape[-1]) ** 0.5
    return model


@pytest.fixture(scope="module")
def linear():
    """p(x|z) of a linear-Gaussian model, events of it, and a teacher of them."""
    simulator = LinearGaussian(2, features=4, seed=1)
    x, z = simulator.sample(6000, seed=0)
    torch.manual_seed(0)
    teacher = Teacher(fp.Real(2), 4, **SMALL)
    history = fit(teacher, x, z, epochs=12, batch_size=200, lr=5e-3, progress=False)
    return simulator, teacher, history


# Splines and masks


@pytest.mark.parametrize("inverse", [False, True])
def test_spline_is_that_of_the_heads(inverse):
    generator = torch.Generator().manual_seed(0)
    v = 3 * torch.randn(500, 4, generator=generator, dtype=torch.float64)
    parameters = 3 * torch.randn(500, 4, 3 * 6 - 1, generator=generator, dtype=torch.float64)
    wanted = (spline_inverse if inverse else spline)(v, parameters, 5.0)
    for own, other in zip(bend(v, parameters, 5.0, inverse), wanted, strict=True):
        torch.testing.assert_close(own, other, rtol=1e-9, atol=1e-9)


def test_spline_has_gradients_everywhere():
    v = torch.tensor([-7.0, -5.0, 0.0, 5.0, 7.0], dtype=torch.float64, requires_grad=True)
    parameters = torch.randn(5, 14, dtype=torch.float64, requires_grad=True)
    for inverse in (False, True):
        out, ladj = bend(v, parameters, 5.0, inverse)
        for gradient in torch.autograd.grad((out + ladj).sum(), (v, parameters)):
            assert bool(torch.isfinite(gradient).all())


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_jacobian_of_a_layer_is_triangular_and_its_determinant_is_given(inverse, layers):
    flow = MaskedFlow(5, 3, layers=layers, bins=4, hidden=16, depth=2, inverse=inverse)
    flow = stirred(flow.double())
    context = torch.randn(1, 3, dtype=torch.float64)
    columns = torch.randn(5, dtype=torch.float64)

    def through(v):
        return flow.fast(v[None], flow.project(context)).states[0 if inverse else -1][0]

    jacobian = torch.autograd.functional.jacobian(through, columns)
    with torch.no_grad():
        path = flow.fast(columns[None], flow.project(context))
    assert float(path.ladj) == pytest.approx(float(torch.linalg.slogdet(jacobian)[1]), abs=1e-10)
    if layers == 1:
        assert bool((jacobian.triu(1) == 0).all())
        assert bool((jacobian.tril().abs()[torch.tril_indices(5, 5).unbind()] > 0).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("inverse", [False, True])
def test_slow_direction_inverts_the_fast_one(inverse, dtype):
    flow = stirred(MaskedFlow(6, 3, layers=3, bins=4, hidden=16, depth=2, inverse=inverse))
    flow = flow.to(dtype)
    projected = flow.project(torch.randn(40, 3, dtype=dtype))
    columns = torch.randn(40, 6, dtype=dtype)
    path = flow.fast(columns, projected)
    back, ladj = flow.slow(path.states[0 if inverse else -1], projected)
    tolerance = 1e-9 if dtype == torch.float64 else 2e-3
    torch.testing.assert_close(back, columns, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(ladj, -path.ladj, rtol=10 * tolerance, atol=10 * tolerance)
    assert len(path.states) == 4
    assert len(path.parameters) == 3


def test_states_are_the_composition_of_the_layers():
    flow = stirred(MaskedFlow(4, 3, layers=3, bins=4, hidden=16, depth=1).double())
    projected = flow.project(torch.randn(7, 3, dtype=torch.float64))
    path = flow.fast(torch.randn(7, 4, dtype=torch.float64), projected)
    total = 0.0
    for i, layer in enumerate(flow.layers):
        state, ladj, parameters = layer.fast(path.states[i], projected[i])
        torch.testing.assert_close(state, path.states[i + 1])
        torch.testing.assert_close(parameters, path.parameters[i])
        total = total + ladj
    torch.testing.assert_close(total, path.ladj)


# The density


def test_at_the_start_it_is_the_whitened_normal():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4000, 3, generator=generator, dtype=torch.float64) * 3 + 5
    teacher = Teacher(fp.Real(1), 3, **SMALL).double()
    teacher.fit_scale(x, torch.zeros(4000))
    wanted = stats.norm(x.mean(0), x.std(0)).logpdf(x[:20]).sum(1)
    own = teacher.log_prob(x[:20], torch.zeros(20)).detach().numpy()
    np.testing.assert_allclose(own, wanted, rtol=1e-3)


def test_positive_and_bounded_columns_are_normalised():
    space = fp.Product(a=fp.Positive(), b=fp.Interval(-1.0, 2.0))
    teacher = stirred(Teacher(fp.Real(1), space, **SMALL).double())
    teacher.loc += 0.2
    # in the coordinates of the charts, ln a and the normal quantile of b
    line = torch.linspace(-14, 14, 280, dtype=torch.float64)
    a, b = line.exp(), 3 * torch.special.ndtr(line.clamp(-7, 7)) - 1
    x = torch.stack(torch.meshgrid(a, b, indexing="ij"), -1).reshape(-1, 2)
    inside = (b > -1) & (b < 2) & (line.abs() < 7)
    x = x[inside.repeat(280)]
    with torch.no_grad():
        log = teacher.log_prob(x, torch.zeros(len(x), 1)).reshape(280, -1)
    slope = 3 * stats.norm.pdf(line[inside])
    mass = (log.exp() * a[:, None] * torch.as_tensor(slope)).sum() * (line[1] - line[0]) ** 2
    assert float(mass) == pytest.approx(1, abs=0.01)


def test_training_reaches_the_conditional_gaussian(linear):
    simulator, teacher, history = linear
    x, z = simulator.sample(4000, seed=9)
    noise = stats.multivariate_normal(cov=simulator.noise_covariance.numpy())
    exact = noise.logpdf(x.double().numpy() - z.double().numpy() @ simulator.matrix.T.numpy())
    with torch.no_grad():
        own = teacher.log_prob(x, z).double().numpy()
    gap = (exact - own).mean()
    # with n events and k free numbers of a linear fit the gap is about k / 2n
    assert -0.005 < gap < 0.06
    assert history.best.val == min(e.val for e in history.epochs)
    assert "nan" not in str(history)


def test_draws_have_the_moments_of_the_conditional_gaussian(linear):
    simulator, teacher, _ = linear
    z = torch.tensor([[0.8, -0.5]]).expand(4000, 2)
    x, log_prob = teacher(z).sample_and_log_prob(torch.Generator().manual_seed(0))
    torch.testing.assert_close(log_prob, teacher.log_prob(x, z), rtol=0, atol=5e-3)
    mean = (z[:1].double() @ simulator.matrix.T)[0]
    width = simulator.noise_covariance.diagonal().sqrt()
    assert float(((x.double().mean(0) - mean) / width).abs().max()) < 0.12
    covariance = torch.cov(x.double().T)
    ratio = covariance / (width[:, None] * width)
    wanted = simulator.noise_covariance / (width[:, None] * width)
    assert float((ratio - wanted).abs().max()) < 0.15


def test_residuals_are_normal(linear):
    simulator, teacher, _ = linear
    x, z = simulator.sample(3000, seed=11)
    u, which = teacher(z).residuals(x)
    assert which is None
    assert stats.kstest(u.square().sum(1).detach().numpy(), stats.chi2(4).cdf).statistic < 0.05
    assert bool((teacher(z).measured(x) == 4).all())


def test_it_is_a_likelihood_of_draws_and_events(linear):
    _, teacher, _ = linear
    z = torch.randn(3, 5, 2)
    x = teacher.sample(z, torch.Generator().manual_seed(0))
    assert x.shape == (3, 5, 4)
    assert teacher.log_prob(x, z).shape == (3, 5)
    assert teacher.log_prob(x[0], z).shape == (3, 5)
    log_prob, count = teacher(z).replica(torch.Generator().manual_seed(0))
    assert log_prob.shape == count.shape == (3, 5)
    assert not log_prob.requires_grad
    assert teacher.size == 2 * 4 * (3 * 5 + 1)


def test_it_serves_the_goodness_of_fit(linear):
    simulator, teacher, _ = linear
    x, z = simulator.sample(300, seed=4)
    head = fp.PosteriorHead(8, fp.Real(2), "affine")
    model = ExtendedModel(fp.encoders.Tabular(4, 8), head, teacher).set_scales(x, z)
    x = torch.cat([x[:20], x[:1] + 50])
    p = goodness.p_value(model.eval(), x, draws=50).p
    assert p.shape == (21,)
    assert bool(((p >= 0) & (p <= 1)).all())
    assert float(p[-1]) == float(p.min()) < 0.1


def test_far_outliers_cost_tens_of_nats(linear):
    _, teacher, _ = linear
    x = torch.zeros(1, 4)
    near = teacher.log_prob(x, torch.zeros(1, 2)).detach()
    x[0, 2] = 1e4
    far = teacher.log_prob(x, torch.zeros(1, 2)).detach()
    assert 20 < float(near - far) < 500


def test_randomness_types_and_saving(linear, tmp_path):
    _, teacher, _ = linear
    z = torch.randn(6, 2)
    state = torch.get_rng_state()
    first = teacher.sample(z, torch.Generator().manual_seed(3))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(first, teacher.sample(z, torch.Generator().manual_seed(3)))
    assert not torch.equal(first, teacher.sample(z, torch.Generator().manual_seed(4)))
    options = {k: v for k, v in teacher.config().items() if k not in ("type", "space")}
    again = Teacher._build({"space": fp.Real(2), **options})
    torch.save(teacher.state_dict(), tmp_path / "teacher.pt")
    again.load_state_dict(torch.load(tmp_path / "teacher.pt", weights_only=True))
    assert torch.equal(again.log_prob(first, z), teacher.log_prob(first, z))
    double = again.double().log_prob(first.double(), z.double())
    assert double.dtype == torch.float64
    torch.testing.assert_close(double.float(), teacher.log_prob(first, z), rtol=1e-3, atol=1e-3)


def test_training_is_reproducible_and_resumed(tmp_path):
    x, z = LinearGaussian(1, features=3, seed=2).sample(400, seed=0)

    def trained(epochs=3, **options):
        torch.manual_seed(0)
        teacher = Teacher(fp.Real(1), 3, **SMALL)
        history = fit(
            teacher, x, z, epochs=epochs, batch_size=64, progress=False, seed=5, **options
        )
        return teacher.state_dict(), history

    first, history = trained()
    second, _ = trained(checkpoint=tmp_path / "run")
    third, again = trained(checkpoint=tmp_path / "run")
    for key, value in first.items():
        assert torch.equal(value, second[key])
        assert torch.equal(value, third[key])
    assert [e.val for e in again.epochs] == [e.val for e in history.epochs]
    with pytest.raises(ValueError, match=r"begun with \(epochs=3\)"):
        trained(epochs=4, checkpoint=tmp_path / "run")
    (tmp_path / "run").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"as a checkpoint of flowpost\.generators"):
        trained(checkpoint=tmp_path / "run")


def test_weights_of_events_count():
    """Half of the events have weight zero, and nothing is learned of them."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2000, 2, generator=generator)
    x[1000:] += 6
    weight = torch.cat([torch.ones(1000), torch.zeros(1000)])
    order = torch.randperm(2000, generator=generator)
    teacher = Teacher(fp.Real(1), 2, **SMALL)
    z = torch.zeros(2000, 1)
    fit(teacher, x[order], z, weight[order], epochs=6, batch_size=100, lr=1e-2, progress=False)
    draws = teacher.sample(torch.zeros(1000, 1), generator)
    assert float((draws > 3).float().mean()) < 0.05


def test_other_likelihoods_are_trained_too():
    x, z = LinearGaussian(1, features=2, seed=2).sample(500, seed=0)
    model = FlowLikelihood(fp.Real(1), 2, "affine")
    history = fit(model, x, z, epochs=2, batch_size=50, progress=False)
    assert history.epochs[-1].val < history.epochs[0].val + 0.5
    assert not model.training


# Two steps


def test_groups_are_a_bijection_with_its_log_det():
    groups = GroupSums([3, 2, 4])
    x = torch.rand(5, 9, dtype=torch.float64) + 0.01
    groups.fit(x)
    assert sorted(groups.order[:3].tolist()) == [0, 1, 2]
    sums, sticks, ladj = groups.split(x)
    torch.testing.assert_close(sums[:, 1], x[:, 3:5].sum(1))
    torch.testing.assert_close(groups.join(sums, sticks), x)
    both = torch.autograd.functional.jacobian(
        lambda v: torch.cat([p[0] for p in groups.split(v[None])[:2]]), x[0]
    )
    assert float(ladj[0]) == pytest.approx(float(torch.linalg.slogdet(both)[1]), abs=1e-10)


def test_sticks_of_dirichlet_shares_are_independent():
    generator = np.random.default_rng(0)
    x = torch.as_tensor(generator.gamma([0.5, 2.0, 5.0, 9.0], size=(20_000, 4)))
    groups = GroupSums([4]).fit(x)
    assert groups.order.tolist() == [0, 1, 2, 3]
    sums, sticks, _ = groups.split(x)
    joint = torch.corrcoef(torch.cat([sums.log(), sticks], 1).T) - torch.eye(4)
    assert float(joint.abs().max()) < 4 / 20_000**0.5
    assert stats.kstest(sticks[:, 1].sigmoid().numpy(), stats.beta(2, 14).cdf).pvalue > 1e-3


LAWS = {"uniform": (lambda y: y, lambda y: 0 * y + 1), "smooth": (lambda y: 1 - (1 - y**2) ** 8,
        lambda y: 16 * y * (1 - y**2) ** 7)}  # fmt: skip


@pytest.mark.parametrize("noise", ["uniform", "smooth"])
def test_noise_of_known_density_fills_zeros_and_draws_are_cut(noise):
    groups = GroupSums([3, 3], threshold=0.1, noise=noise)
    x = torch.tensor([[0.0, 0.2, 0.3, 0.0, 0.1, 0.4]], dtype=torch.float64).expand(5000, 6)
    filled, density = groups.fill(x, torch.Generator().manual_seed(0))
    assert torch.equal(filled[:, [1, 2, 4, 5]], x[:, [1, 2, 4, 5]])
    y = filled[:, [0, 3]].numpy() / 0.1
    cdf, law = LAWS[noise]
    assert stats.kstest(y.ravel(), cdf).pvalue > 1e-3
    np.testing.assert_allclose(density, -np.log(law(y) / 0.1).sum(1), rtol=1e-9)
    assert torch.equal(groups.cut(filled), x)


def test_constant_filling():
    x = torch.tensor([[0.0, 0.2, 0.3]])
    filled, density = GroupSums([3], threshold=0.1, noise=None).fill(x)
    torch.testing.assert_close(filled, torch.tensor([[0.05, 0.2, 0.3]]))
    assert float(density) == 0


def two_step(**options):
    simulator = Shower()
    groups = GroupSums([24, 36, 18], threshold=simulator.threshold)
    torch.manual_seed(0)
    small = {**SMALL, **options}
    return simulator, TwoStep.teacher(fp.Positive(), groups, small, small)


def test_two_steps_are_a_density_of_what_they_draw():
    simulator, model = two_step()
    x, z = simulator.sample(500, seed=0)
    model.fit_scale(x, z[:, :1])
    model = stirred(model.double(), 0.1).continuous()
    energy = z[:20, :1].double()
    drawn, log_prob = model(energy).sample_and_log_prob(torch.Generator().manual_seed(1))
    torch.testing.assert_close(log_prob, model.log_prob(drawn, energy), rtol=1e-6, atol=1e-6)
    u, _ = model(energy).residuals(drawn)
    assert u.shape == (20, 78)
    assert bool((model(energy).measured(drawn) == 78).all())


def test_two_steps_learn_showers_and_stay_below_the_truth():
    """The noise makes the likelihood a lower bound of that of zeros, which is known."""
    simulator, model = two_step(hidden=48)
    x, z = simulator.sample(3000, seed=0)
    fit(model, x, z[:, :1], epochs=5, batch_size=150, lr=4e-3, progress=False)
    fresh, label = simulator.sample(400, seed=1)
    exact = simulator.marginal_log_prob(fresh, label[:, 0])
    with torch.no_grad():
        own = model(label[:, :1]).log_prob(fresh, torch.Generator().manual_seed(0)).double()
    assert 0 < float((exact - own).mean()) < 25
    drawn = model.sample(label[:, :1], torch.Generator().manual_seed(0))
    assert drawn.shape == (400, 78)
    assert bool(((drawn == 0) | (drawn >= simulator.threshold)).all())
    ratio = (
        simulator.layer_energies(drawn)[:, 1].mean() / simulator.layer_energies(fresh)[:, 1].mean()
    )
    assert 0.8 < float(ratio) < 1.25
    zeros = (drawn == 0).float().mean(0) - (fresh == 0).float().mean(0)
    assert float(zeros.abs().max()) < 0.15
    config = model.config()
    assert config["groups"]["sizes"] == [24, 36, 18]
    assert config["second"]["type"] == "Teacher"


def test_two_step_log_prob_varies_with_the_noise_only():
    simulator, model = two_step()
    x, z = simulator.sample(50, seed=0)
    model.fit_scale(x, z[:, :1])
    bound = model(z[:, :1])
    one = bound.log_prob(x, torch.Generator().manual_seed(0))
    assert torch.equal(one, bound.log_prob(x, torch.Generator().manual_seed(0)))
    assert not torch.equal(one, bound.log_prob(x, torch.Generator().manual_seed(1)))
    drawn, log_prob = bound.sample_and_log_prob(torch.Generator().manual_seed(0))
    assert drawn.shape == (50, 78)
    assert log_prob.shape == (50,)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Teacher(2, 4), "label space first"),
        (lambda: Teacher(fp.Real(1), fp.Sphere()), "Give directions as FlowLikelihood"),
        (lambda: Teacher(fp.Real(1), 2, layers=0), "layers as a whole number"),
        (lambda: Teacher(fp.Real(1), 2, bins=1), "bins as a whole number of at least 2"),
        (
            lambda: Teacher(fp.Real(1), 2).log_prob(torch.zeros(3, 3), torch.zeros(3)),
            r"x of shape \(..., 2\)",
        ),
        (
            lambda: Teacher(fp.Real(1), 2).log_prob(torch.full((1, 2), math.nan), torch.zeros(1)),
            "x",
        ),
        (
            lambda: Teacher(fp.Real(1), 2).log_prob(torch.zeros(3, 2), torch.zeros(2)),
            "one event for each label",
        ),
        (
            lambda: Teacher(fp.Real(1), fp.Positive(2)).fit_scale(
                torch.zeros(3, 2), torch.zeros(3)
            ),
            "x",
        ),
        (lambda: fit(torch.nn.Linear(2, 2), torch.zeros(4, 2), torch.zeros(4)), "a likelihood"),
        (lambda: fit(Teacher(fp.Real(1), 2), torch.zeros(9, 2), torch.zeros(8)), "same events"),
        (
            lambda: fit(Teacher(fp.Real(1), 2), torch.zeros(9, 2), torch.zeros(9), val=0),
            "val as a share",
        ),
        (
            lambda: fit(Teacher(fp.Real(1), 2), torch.zeros(9, 2), torch.zeros(9), val=(1, 2, 3)),
            r"held-out events \(x, z\); got tuple",
        ),
        (
            lambda: TwoStep.teacher(fp.Real(1), GroupSums([2, 2])).fit_scale(
                torch.ones(5, 4), torch.zeros(4)
            ),
            r"x of shape \(4, 4\); got \(5, 4\)",
        ),
        (
            lambda: fit(Teacher(fp.Real(1), 2), torch.zeros(9, 2), torch.zeros(9), -torch.ones(9)),
            "weights of at least 0",
        ),
        (lambda: GroupSums([3, 1]), "a group's size"),
        (lambda: GroupSums([3], threshold=-1.0), "threshold of at least 0"),
        (lambda: GroupSums([3], noise="white"), "noise as one of smooth, uniform or None"),
        (lambda: GroupSums([3]).check(torch.zeros(2, 3)), "above zero; got 0 in row 0, column 0"),
        (lambda: GroupSums([3], 0.1).check(torch.full((2, 3), 0.05)), "zero or at least 0.1"),
        (lambda: GroupSums([3]).check(torch.ones(2, 4)), r"x of shape \(..., 3\)"),
        (
            lambda: TwoStep(Teacher(fp.Real(1), 2), Teacher(fp.Real(2), 2), GroupSums([2, 2])),
            "at 3 label columns",
        ),
        (
            lambda: TwoStep.teacher(fp.Real(1), GroupSums([2, 2])).distillation(
                torch.ones(2, 4), torch.zeros(2, 1)
            ),
            "a student as the second step",
        ),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
