"""Likelihoods: every kind × every property, against scipy, closed forms and quadrature."""

import json
import math

import pytest
import torch
from likelihoods import (
    CASES,
    SENSORS,
    SPACE,
    filled,
    labels,
    normal_likelihood,
    stirred,
)
from scipy import stats

import flowpost as fp
from flowpost import likelihood as fl
from flowpost.spaces import space_from_config

N = 6
# data of which ln p has noise of its own
NOISY = ("on a grid",)
NAMES = list(CASES)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(x, index):
    return tuple(t[index] for t in x) if isinstance(x, tuple) else x[index]


def same(x, y):
    if isinstance(x, tuple):
        return len(x) == len(y) and all(map(same, x, y))
    return x.shape == y.shape and torch.equal(x, y)


# ------------------------------------------------------------------ every kind


@pytest.mark.parametrize("name", NAMES)
def test_labels_broadcast_against_data(name):
    likelihood, z = filled(name), labels(3 * N).reshape(3, N, -1)
    x = likelihood.sample(z[0], seeded())
    together = likelihood(z).log_prob(x, seeded(1))
    assert together.shape == (3, N)
    near = {"rtol": 1e-4, "atol": 1e-4}
    for draw, expected in zip(z, together, strict=True):
        torch.testing.assert_close(likelihood(draw).log_prob(x, seeded(1)), expected, **near)
        one_by_one = [likelihood(draw[i : i + 1]).log_prob(rows(x, [i])) for i in range(N)]
        if name not in NOISY:
            torch.testing.assert_close(torch.cat(one_by_one), expected, **near)
            torch.testing.assert_close(likelihood.log_prob(x, draw), expected, **near)
    assert likelihood(z).batch_shape == (3, N)
    value, _ = likelihood(z).residuals(x, seeded())
    assert value.shape[:2] == (3, N)


@pytest.mark.parametrize("name", NAMES)
def test_one_label_and_none(name):
    likelihood = filled(name)
    x = likelihood.sample(labels(1)[0], seeded())
    assert likelihood(labels(1)[0]).log_prob(x, seeded(1)).shape == ()
    assert likelihood(labels(1)[0]).measured(x).shape == ()
    none = likelihood.sample(torch.zeros(0, 4), seeded())
    assert len(none[0] if isinstance(none, tuple) else none) == 0
    assert likelihood.log_prob(none, torch.zeros(0, 4)).shape == (0,)


@pytest.mark.parametrize("name", NAMES)
def test_draws_repeat_by_seed_and_leave_the_global_generator(name):
    likelihood, z = filled(name), labels(N)
    state = torch.get_rng_state()
    x = likelihood.sample(z, seeded())
    assert same(x, likelihood(z).sample(seeded()))
    assert not same(x, likelihood.sample(z, seeded(1)))
    likelihood(z).sample_and_log_prob(seeded())
    likelihood(z).residuals(x, seeded())
    likelihood(z).log_prob(x, seeded())
    assert torch.equal(torch.get_rng_state(), state)
    for drawn in (x, likelihood(z).sample(), likelihood(z).sample_and_log_prob()[0]):
        assert not (drawn[0] if isinstance(drawn, tuple) else drawn).requires_grad
    assert not likelihood(z).replica(seeded())[1].requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_draws_come_with_their_density(name):
    likelihood, z = filled(name), labels(4 * N).reshape(4, N, -1)
    bound = likelihood(z)
    x, log_prob = bound.sample_and_log_prob(seeded())
    assert same(x, bound.sample(seeded())) or name in NOISY
    if name not in NOISY:
        torch.testing.assert_close(log_prob, bound.log_prob(x), rtol=1e-4, atol=1e-4)
    value, number = bound.replica(seeded())
    torch.testing.assert_close(value, log_prob)
    assert torch.equal(number, bound.measured(x).expand(4, N))


@pytest.mark.parametrize("name", [n for n in NAMES if n not in NOISY])
def test_draws_follow_the_density(name):
    """E[p(x|z')/p(x|z)] = 1 over x of p(x|z)."""
    likelihood, n = filled(name, dtype=torch.float64), 20000
    z = labels(1).double().expand(n, -1)
    other = z + 0.05 * torch.tensor([1.0, -1.0, 0.5, 1.0])
    x = likelihood.sample(z, seeded())
    with torch.no_grad():
        at = [likelihood(t.double()).log_prob(x) for t in (z, other)]
    ratio = torch.exp(at[1] - at[0])
    assert 0.01 < ratio.std() < 1
    assert abs(ratio.mean() - 1) < 4 * ratio.std() / n**0.5


@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_finite_differences(name):
    likelihood, z = filled(name, dtype=torch.float64), labels(N).double()
    x = likelihood.sample(z, seeded())
    move = torch.randn(z.shape, generator=seeded(2)).double()
    moves = [torch.randn(p.shape, generator=seeded(3)).double() for p in likelihood.parameters()]

    def value(step):
        with torch.no_grad():
            for p, m in zip(likelihood.parameters(), moves, strict=True):
                p.add_(step * m)
            found = likelihood(z + step * move).log_prob(x, seeded(1)).sum()
            for p, m in zip(likelihood.parameters(), moves, strict=True):
                p.sub_(step * m)
        return found

    free = z.clone().requires_grad_()
    likelihood(free).log_prob(x, seeded(1)).sum().backward()
    found = (free.grad * move).sum()
    for p, m in zip(likelihood.parameters(), moves, strict=True):
        if p.grad is not None:
            assert torch.isfinite(p.grad).all()
            found = found + (p.grad * m).sum()
    expected = (value(1e-6) - value(-1e-6)) / 2e-6
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_single_precision_is_that_of_double(name):
    likelihood, z = filled(name, dtype=torch.float64), labels(50).double()
    x = likelihood.sample(z, seeded())
    expected = likelihood(z).log_prob(x, seeded(1))
    if name in NOISY:  # its noise is other numbers in another type
        return
    single = likelihood.float()(z)
    found = single.log_prob(x)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=2e-3)
    values = single.sample(seeded())
    assert (values[0] if isinstance(values, tuple) else values).dtype == torch.float32


@pytest.mark.parametrize("name", NAMES)
def test_residuals_are_normal_where_the_model_is_right(name):
    likelihood, z = filled(name), labels(3000)
    x = likelihood.sample(z, seeded())

    def pvalue(of):
        r, known = likelihood(of).residuals(x, seeded(1))
        r = r.flatten() if known is None else r[known]
        return stats.kstest(r.detach().double().numpy(), "norm").pvalue

    assert pvalue(z) > 0.01
    other = z + torch.tensor([1.0, 1.0, 1.0, 1.0])
    assert pvalue(other) < 1e-6


@pytest.mark.parametrize("name", NAMES)
def test_residuals_are_independent(name):
    """Their sum of squares follows χ², which correlated ones would widen."""
    likelihood, z = filled(name), labels(3000)
    x = likelihood.sample(z, seeded())
    r, known = likelihood(z).residuals(x, seeded(1))
    known = torch.ones_like(r, dtype=torch.bool) if known is None else known
    square = torch.where(known, r.double(), 0.0).square().sum(-1)
    level = stats.chi2.cdf(square.detach().numpy(), known.sum(-1).numpy())
    assert stats.kstest(level, "uniform").pvalue > 0.01


@pytest.mark.parametrize("name", [n for n in NAMES if n != "decoder"])
def test_description_builds_it_again(name):
    likelihood, z = filled(name), labels(N)
    options = json.loads(json.dumps(likelihood.config()))
    kind = getattr(fl, options.pop("type"))
    if "data" in options:
        options["data"] = space_from_config(options["data"])
    again = kind(**{**options, "space": space_from_config(options["space"])})
    assert not bool(again.fitted)
    again.load_state_dict(likelihood.state_dict())
    assert bool(again.fitted)
    assert again.config() == likelihood.config()
    x = likelihood.sample(z, seeded())
    assert same(x, again.sample(z, seeded()))
    torch.testing.assert_close(
        again(z).log_prob(x, seeded(1)), likelihood(z).log_prob(x, seeded(1)), rtol=0, atol=0
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda z: z[:, :3], "Expected labels of shape (..., 4)"),
        (lambda z: torch.cat([z[:, :2], -z[:, 2:]], 1), "Expected labels above 0"),
        (lambda z: z * math.nan, "Expected finite labels"),
        (lambda z: z[:4], "one event for each label"),
    ],
)
def test_refused_labels(name, spoil, text):
    likelihood, z = filled(name), labels(N)
    x = likelihood.sample(z, seeded())
    with pytest.raises(ValueError, match="Expected") as error:
        likelihood.log_prob(x, spoil(z))
    assert text in str(error.value)


def test_a_single_column_of_labels_may_be_flat():
    for likelihood in (normal_likelihood(2), fl.PoissonCounts(fp.Real(1), 2)):
        z = torch.randn(5)
        x = likelihood.sample(z, seeded())
        assert torch.equal(likelihood.log_prob(x, z), likelihood.log_prob(x, z[:, None]))
        likelihood.fit_scale(x, z)


def test_a_space_is_needed():
    for build in (
        lambda: fl.PoissonCounts(3, 2),
        lambda: fl.PoissonCounts(3, 2, sensors=[[0.0], [1.0]]),
        lambda: fl.PoissonCounts(3, 2, torch.nn.Identity()),
        lambda: fl.PointProcess(3, SENSORS, (0.0, 1.0)),
        lambda: fl.FlowLikelihood(3, 2),
        lambda: fl.LabelEncoder(3, 2),
    ):
        with pytest.raises(ValueError, match=r"Expected the label space first; got 3"):
            build()


# ------------------------------------------------------------------ vectors


def test_a_hand_set_flow_is_a_normal():
    likelihood, z = normal_likelihood(3, noise=0.7), torch.randn(9, 1, generator=seeded())
    x = likelihood.sample(z, seeded())
    expected = stats.norm(z.numpy(), 0.7).logpdf(x.numpy()).sum(1)
    torch.testing.assert_close(
        likelihood.log_prob(x, z).detach().double(), torch.as_tensor(expected), rtol=1e-5, atol=1e-5
    )
    draws = likelihood.sample(torch.full((20000, 1), 1.5), seeded())
    assert stats.kstest(draws.flatten().numpy(), "norm", args=(1.5, 0.7)).pvalue > 0.01
    r, known = likelihood(z).residuals(x)
    assert known is None
    torch.testing.assert_close(r, (x - z) / 0.7, rtol=1e-4, atol=1e-4)
    assert torch.equal(likelihood(z).measured(x), torch.full((9,), 3.0))


@pytest.mark.parametrize("space", [fp.Real(1), fp.Positive(), fp.Interval(-1.0, 2.0), fp.Circle()])
@pytest.mark.parametrize("flow", ["diagonal", "spline"])
def test_the_density_of_a_vector_is_normalised(space, flow):
    torch.manual_seed(0)
    likelihood = stirred(fl.FlowLikelihood(SPACE, space, flow, hidden=16).double(), 0.1)
    t = torch.linspace(-30, 30, 30001, dtype=torch.float64)
    charts = {"Positive": t.exp(), "Interval": -1 + 3 * torch.sigmoid(t)}
    turn = torch.linspace(-math.pi, math.pi, 30001, dtype=torch.float64)
    x = {**charts, "Circle": turn, "Real": t}[type(space).__name__][:, None]
    z = labels(3)[:, None].double().expand(-1, len(x), -1)
    density = likelihood(z).log_prob(x).exp()
    total = torch.trapezoid(density, x[:, 0], dim=-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-4, atol=1e-4)


def test_data_on_a_grid():
    step, n = 0.5, 40000
    likelihood = normal_likelihood(1, noise=0.6)
    likelihood.dequantize = step
    bound = likelihood(torch.full((n, 1), 0.3))
    x, log_prob = bound.sample_and_log_prob(seeded())
    assert torch.equal(x, torch.round(x / step) * step)
    edges = torch.arange(-1.5, 2.6, step).numpy()
    expected = torch.as_tensor(stats.norm(0.3, 0.6).cdf(edges)).diff()
    found = torch.stack([(x == e).double().mean() for e in edges[:-1].tolist()])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01)
    # draws on the grid get noise of their own, as data do
    again = bound.log_prob(x, seeded(1))
    assert abs((log_prob - again).mean()) < 4 * (log_prob - again).std() / n**0.5
    u = torch.rand(x.shape, generator=seeded(1))
    expected = stats.norm(0.3, 0.6).logpdf((x + step * u).numpy())[:, 0]
    torch.testing.assert_close(
        again.detach().double(), torch.as_tensor(expected).double(), rtol=1e-3, atol=1e-3
    )


@pytest.mark.parametrize("space", [fp.Positive(), fp.Interval(0.0, 3.0)])
def test_data_on_a_grid_may_touch_the_bounds_of_their_space(space):
    likelihood = fl.FlowLikelihood(fp.Real(1), space, dequantize=1.0)
    x, z = torch.tensor([[0.0], [1.0], [2.0]]), torch.randn(3, 1)
    likelihood.fit_scale(x, z)
    many = x.repeat(20000, 1)
    assert torch.isfinite(likelihood.log_prob(many, z.repeat(20000, 1))).all()


def test_noise_of_a_grid_stays_within_a_step():
    from flowpost.likelihood.vector import _within

    for dtype in (torch.float32, torch.float64):
        x = torch.tensor([0.0, 1.0, 9.0, -9.0, 5e4], dtype=dtype)
        for u in (0.0, 1.0 - torch.finfo(dtype).eps):
            inner = _within(x, 1.0, torch.full_like(x, u))
            assert ((inner > x) & (inner < x + 1)).all()


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: fl.FlowLikelihood(SPACE, 2, dequantize=-1.0), "dequantize as a step"),
        (lambda: fl.FlowLikelihood(SPACE, 2, dequantize=math.nan), "dequantize as a step"),
        (lambda: fl.FlowLikelihood(SPACE, 2, "cubic"), "Expected flow as one of"),
        (lambda: fl.FlowLikelihood(SPACE, 0), "Expected size as a whole number of at least 1"),
    ],
)
def test_refused_flows(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize(
    ("x", "text"),
    [
        (torch.zeros(N, 2), "Expected x of shape"),
        (torch.full((N, 3), math.nan), "Expected finite labels; got nan in x"),
        (torch.zeros(2, N, 3), "Expected x of one event for each label"),
    ],
)
def test_refused_vectors(x, text):
    with pytest.raises(ValueError, match="Expected") as error:
        filled("diagonal").log_prob(x, labels(N))
    assert text in str(error.value)


def test_data_of_one_event_need_no_axis():
    likelihood = fl.FlowLikelihood(fp.Real(), fp.Real()).fit_scale(torch.randn(9), torch.randn(9))
    x, z = torch.randn(1), torch.randn(1, 1)
    bound = likelihood(z)
    assert bound.log_prob(x).shape == (1,)
    assert torch.equal(bound.log_prob(x), bound.log_prob(x[:, None]))
    assert bound.measured(x).shape == (1,)
