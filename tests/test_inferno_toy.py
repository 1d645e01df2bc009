"""The toy of INFERNO against scipy, draws, finite differences, and the numbers of the paper."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats
from torch.distributions import Normal

from flowpost.simulators import InfernoToy, inferno_toy

TOY = InfernoToy()
PROCESSES = ("signal", "background")
ACTIVE = [(), ("r",), ("r", "rate"), ("r", "rate"), ("r", "rate", "b")]
EDGES = torch.linspace(0, 1, 11)
NUISANCES = [(0.0, 3.0), (0.7, 3.0), (0.0, 2.2), (-0.6, 3.9)]
# table 1 of the paper, benchmarks 0 to 4
ANALYTIC = (14.71, 15.52, 15.65, 15.62, 16.89)
OPTIMAL = (14.97, 19.12, 24.93, 22.13, 27.98)

benchmarks = pytest.mark.parametrize("benchmark", range(5))
processes = pytest.mark.parametrize("process", PROCESSES)
varied = pytest.mark.parametrize(("r", "rate"), NUISANCES)


def laws(process, r=0.0, rate=3.0):
    """The marginal laws of scipy."""
    if process == "signal":
        return stats.norm(0, 1), stats.norm(0, 1), stats.expon(scale=1 / 2)
    return stats.norm(2 + r, 5**0.5), stats.norm(0, 3), stats.expon(scale=1 / rate)


def density(process, x, r=0.0, rate=3.0):
    """The density of scipy at points (N, 3)."""
    columns = zip(laws(process, r, rate), x.T, strict=True)
    return math.prod(law.pdf(c) for law, c in columns)


def derivatives(x, s=50.0, b=1000.0):
    """The event density at points (N, 3) and its finite differences, (N, 4)."""
    signal, background = density("signal", x), density("background", x)
    h = 1e-4
    by_r = (density("background", x, r=h) - density("background", x, r=-h)) / (2 * h)
    by_rate = density("background", x, rate=3 + h) - density("background", x, rate=3 - h)
    return s * signal + b * background, np.stack(
        [signal, b * by_r, b * by_rate / (2 * h), background], 1
    )


def profiled(information, benchmark):
    """The uncertainty on s from a matrix of all four parameters, constraints written out."""
    keep = 1 + len(ACTIVE[benchmark])
    information = information[:keep, :keep].copy()
    if benchmark >= 3:
        information += np.diag([0, 0.4**-2, 1, 1e-4][:keep])
    return math.sqrt(np.linalg.inv(information)[0, 0])


@pytest.fixture(scope="module")
def mixture():
    """Points of both processes; the event density and its derivatives, times weights."""
    n = 120_000
    draws = [TOY.sample(p, n, seed=k, dtype=torch.float64) for k, p in enumerate(PROCESSES)]
    x = torch.cat(draws).numpy()
    rho, jacobian = derivatives(x)
    # 2n draws of (f_s + f_b) / 2
    weight = 1 / n / (density("signal", x) + density("background", x))
    return x, rho * weight, jacobian * weight[:, None]


# Densities and draws


@processes
@varied
def test_log_prob_is_that_of_scipy(process, r, rate):
    x = torch.randn(200, 3, dtype=torch.float64) * 3
    with np.errstate(divide="ignore"):
        reference = np.log(density(process, x.numpy(), r, rate))
    torch.testing.assert_close(
        TOY.log_prob(process, x, r=r, rate=rate), torch.from_numpy(reference)
    )
    assert ((x[:, 2] < 0) == TOY.log_prob(process, x).isneginf()).all()
    per_event = [torch.full((200,), v, dtype=torch.float64) for v in (r, rate)]
    torch.testing.assert_close(
        TOY.log_prob(process, x, r=per_event[0], rate=per_event[1]),
        torch.from_numpy(reference),
    )


@processes
@varied
def test_density_integrates_to_one(process, r, rate):
    axes = [np.linspace(-20, 22, 85), np.linspace(-21, 21, 85), np.linspace(0, 16, 401)]
    grid = torch.from_numpy(np.stack(np.meshgrid(*axes, indexing="ij"), -1))
    total = TOY.log_prob(process, grid, r=r, rate=rate).exp().numpy()
    for axis in reversed(axes):
        total = integrate.simpson(total, x=axis)
    assert total == pytest.approx(1, abs=1e-5)


@processes
@varied
def test_draws_follow_the_density(process, r, rate):
    x = TOY.sample(process, 20_000, r=r, rate=rate, seed=4)
    for column, law in zip(x.T, laws(process, r, rate), strict=True):
        assert stats.kstest(column.numpy(), law.cdf).pvalue > 1e-3
        assert column.mean() == pytest.approx(law.mean(), abs=4 * law.std() / 20_000**0.5)
    assert (torch.corrcoef(x.T) - torch.eye(3)).abs().max() < 0.03


@processes
def test_draws_are_those_of_their_seed(process):
    state = torch.get_rng_state()
    x = TOY.sample(process, 50, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert x.shape == (50, 3)
    assert x.dtype == torch.float32
    assert torch.equal(x, TOY.sample(process, 50, generator=torch.Generator().manual_seed(1)))
    assert not torch.equal(x, TOY.sample(process, 50, seed=2))
    assert TOY.sample(process, 5, seed=1, dtype=torch.float64).dtype == torch.float64
    torch.manual_seed(7)
    x = TOY.sample(process, 5)
    torch.manual_seed(7)
    assert torch.equal(x, TOY.sample(process, 5))


def test_nuisances_act_on_the_background_alone():
    x = TOY.sample("signal", 100, seed=1)
    assert torch.equal(x, TOY.sample("signal", 100, r=1.0, rate=2.0, seed=1))
    assert torch.equal(
        TOY.log_prob("signal", x), TOY.log_prob("signal", x, r=1.0, rate=torch.tensor(2.0))
    )
    assert not torch.equal(
        TOY.log_prob("background", x), TOY.log_prob("background", x, r=1.0, rate=2.0)
    )


# Shift and stretch


@varied
def test_varied_draws_are_nominal_ones_transformed(r, rate):
    x = TOY.sample("background", 1000, seed=3, dtype=torch.float64)
    moved = TOY.stretch(TOY.shift(x, r), rate)
    torch.testing.assert_close(
        moved, TOY.sample("background", 1000, r=r, rate=rate, seed=3, dtype=torch.float64)
    )
    # change of variables: the Jacobian is 3/λ
    torch.testing.assert_close(
        TOY.log_prob("background", moved, r=r, rate=rate) + math.log(3 / rate),
        TOY.log_prob("background", x),
    )
    jacobian = torch.func.jacrev(lambda v: TOY.stretch(TOY.shift(v, r), rate))(x[0])
    assert jacobian.det() == pytest.approx(3 / rate)


def test_every_event_has_its_own_nuisances():
    x = TOY.sample("background", 4, seed=3)
    r, rate = torch.tensor([0.0, 0.5, -0.5, 1.0]), torch.tensor([3.0, 2.0, 4.0, 3.5])
    moved = TOY.stretch(TOY.shift(x, r), rate)
    for i in range(4):
        assert torch.equal(moved[i], TOY.stretch(TOY.shift(x[i], r[i]), float(rate[i])))
    assert torch.equal(moved, TOY.sample("background", 4, r=r, rate=rate, seed=3))


TRANSFORMS = {
    "shift": (InfernoToy.shift, 0.3, lambda x, v: (1.0, 0.0, 0.0)),
    "stretch": (InfernoToy.stretch, 2.5, lambda x, v: (0.0, 0.0, -3 * x[2] / v**2)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_leave_their_input_and_keep_dtype(name):
    move, value, _ = TRANSFORMS[name]
    for dtype in (torch.float32, torch.float64):
        x = TOY.sample("background", 20, seed=0, dtype=dtype)
        before = x.clone()
        moved = move(x, torch.tensor(value, dtype=torch.float64))
        assert torch.equal(x, before)
        assert moved.dtype == dtype
        assert moved.data_ptr() != x.data_ptr()
        torch.testing.assert_close(moved, move(x, value), rtol=0, atol=0)
    assert torch.equal(move(x, TOY.nominal["r" if name == "shift" else "rate"]), x)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_the_transforms(name):
    move, value, derivative = TRANSFORMS[name]
    x = TOY.sample("background", 20, seed=0, dtype=torch.float64)
    value = torch.tensor(value, dtype=torch.float64)
    expected = torch.tensor([derivative(row.tolist(), float(value)) for row in x]).to(x)
    one = torch.ones_like(value)
    jvp = torch.func.jvp(lambda v: move(x, v), (value,), (one,))[1]
    torch.testing.assert_close(jvp, expected)

    def single(row):
        return torch.func.jvp(lambda v: move(row, v), (value,), (one,))[1]

    torch.testing.assert_close(torch.func.vmap(single)(x), expected)
    values = value + 0.1 * torch.arange(5)
    over_values = torch.func.vmap(move, in_dims=(None, 0))(x, values)
    assert torch.equal(over_values[3], move(x, values[3]))
    pairs = torch.func.vmap(move)(x[:5], values)
    assert torch.equal(pairs, move(x[:5], values))
    x.requires_grad_()
    value.requires_grad_()
    assert torch.autograd.gradcheck(move, (x, value))


def test_the_score_is_that_of_the_log_density():
    x = TOY.sample("background", 50, seed=0, dtype=torch.float64)
    r, rate = (torch.tensor(v, dtype=torch.float64) for v in (0.0, 3.0))
    score = torch.func.jacfwd(
        lambda r, rate: TOY.log_prob("background", x, r=r, rate=rate), argnums=(0, 1)
    )(r, rate)
    torch.testing.assert_close(score[0], (x[:, 0] - 2) / 5)
    torch.testing.assert_close(score[1], 1 / 3 - x[:, 2])


# The best classifier


def test_ratio_and_probability_are_those_of_the_densities():
    x = torch.cat([TOY.sample(p, 500, seed=1, dtype=torch.float64) for p in PROCESSES])
    signal, background = (TOY.log_prob(p, x) for p in PROCESSES)
    torch.testing.assert_close(TOY.log_likelihood_ratio(x), signal - background)
    torch.testing.assert_close(
        TOY.signal_probability(x), signal.exp() / (signal.exp() + background.exp())
    )
    assert TOY.signal_probability(x.reshape(4, 250, 3)).shape == (4, 250)
    assert TOY.signal_probability(x.float()).dtype == torch.float32


# Benchmarks


@benchmarks
def test_names_of_a_benchmark(benchmark):
    toy = InfernoToy(benchmark)
    assert toy.parameters == ("s", *ACTIVE[benchmark])
    assert tuple(toy.constraints) == ACTIVE[benchmark]
    assert toy.nominal == {"s": 50.0, "r": 0.0, "rate": 3.0, "b": 1000.0}
    expected = {"r": (0.0, 0.4), "rate": (3.0, 1.0), "b": (1000.0, 100.0)}
    for name, constraint in toy.constraints.items():
        if benchmark < 3:
            assert constraint is None
        else:
            assert isinstance(constraint, Normal)
            found = (constraint.mean.item(), constraint.stddev.item())
            assert found == pytest.approx(expected[name])


def test_other_yields():
    toy = InfernoToy(4, signal=5, background=200.0)
    assert toy.nominal["s"] == 5.0
    assert toy.constraints["b"].mean == 200
    assert toy.constraints["b"].stddev == 20
    assert toy == InfernoToy(signal=5.0, background=200)
    with pytest.raises(dataclasses.FrozenInstanceError):
        toy.signal = 6.0
    # ten times the luminosity: errors grow with its root where no constraint is at work
    many = InfernoToy(2, signal=500.0, background=10_000.0)
    assert many.limit() == pytest.approx(10**0.5 * InfernoToy(2).limit(), rel=1e-9)


# Information


@benchmarks
def test_limit_is_that_of_the_paper(benchmark):
    assert InfernoToy(benchmark).limit() == pytest.approx(ANALYTIC[benchmark], rel=0.005)


@benchmarks
def test_limit_of_ten_bins_is_that_of_the_paper(benchmark):
    assert InfernoToy(benchmark).limit(EDGES) == pytest.approx(OPTIMAL[benchmark], rel=0.015)


@pytest.mark.parametrize("yields", [(50.0, 1000.0), (1.0, 1e5), (500.0, 500.0)])
def test_quadrature_is_converged(yields, monkeypatch):
    toy = InfernoToy(signal=yields[0], background=yields[1])
    matrix, counts, jacobian = toy.information(), *toy.expected_counts(EDGES)
    for nodes, precision in [(100, 1e-10), (40, 1e-6)]:
        monkeypatch.setattr(inferno_toy, "_NODES", nodes)
        scale = matrix.diagonal().rsqrt()
        error = (toy.information() - matrix) * scale * scale[:, None]
        assert error.abs().max() < precision
        other = toy.expected_counts(EDGES)
        torch.testing.assert_close(counts, other[0], rtol=precision, atol=0)
        torch.testing.assert_close(jacobian, other[1], rtol=precision, atol=10 * precision)


@benchmarks
def test_information_is_that_of_draws(benchmark, mixture):
    _, rho, jacobian = mixture
    estimate = jacobian.T @ (jacobian / rho[:, None])
    assert InfernoToy(benchmark).limit() == pytest.approx(profiled(estimate, benchmark), rel=0.005)
    if benchmark == 4:
        exact = TOY.information() - torch.tensor([0, 0.4**-2, 1, 1e-4]).diag()
        scale = exact.diagonal().rsqrt()
        difference = (torch.from_numpy(estimate) - exact) * scale * scale[:, None]
        assert difference.abs().max() < 0.01


def test_expected_counts_are_those_of_draws(mixture):
    x, rho, jacobian = mixture
    edges = torch.tensor([0.02, 0.1, 0.35, 0.5, 0.7, 0.85, 0.95, 1.0], dtype=torch.float64)
    index = np.digitize(TOY.signal_probability(torch.from_numpy(x)).numpy(), edges.numpy()) - 1
    counts, exact = TOY.expected_counts(edges)
    for k in range(7):
        for value, terms in [(counts[k], rho), *zip(exact[k], jacobian.T, strict=True)]:
            inside = np.where(index == k, terms, 0)
            error = inside.std() * len(x) ** 0.5
            assert float(value) == pytest.approx(inside.sum(), abs=4.5 * error)
            assert error < 0.05 * np.abs(inside).sum()


def test_derivatives_of_expected_counts_are_differences_of_varied_counts():
    """Sums over a fine grid of the plane, with the closed form of x2 above the cuts."""
    edges = torch.tensor([0.2, 0.6, 0.9], dtype=torch.float64)
    axes = np.linspace(-20, 24, 1101), np.linspace(-24, 24, 1201)
    x0, x1 = (a.ravel() for a in np.meshgrid(*axes, indexing="ij"))
    cell = math.prod(a[1] - a[0] for a in axes)
    at = torch.from_numpy(np.stack([x0, x1, np.zeros_like(x0)], 1))
    # the ratio grows by one per unit of x2
    least = [(cut - TOY.log_likelihood_ratio(at)).clamp(min=0).numpy() for cut in edges.logit()]

    def counts(r=0.0, rate=3.0):
        *plane, third = laws("background", r, rate)
        weight = 1000 * cell * np.outer(*(w.pdf(a) for w, a in zip(plane, axes, strict=True)))
        return -np.diff([(weight.ravel() * third.sf(a)).sum() for a in least])

    _, jacobian = TOY.expected_counts(edges)
    h = 1e-3
    by_r = (counts(r=h) - counts(r=-h)) / (2 * h)
    by_rate = (counts(rate=3 + h) - counts(rate=3 - h)) / (2 * h)
    assert 1000 * jacobian[:, 3].numpy() == pytest.approx(counts(), rel=1e-4)
    assert jacobian[:, 1].numpy() == pytest.approx(by_r, rel=1e-3)
    assert jacobian[:, 2].numpy() == pytest.approx(by_rate, rel=1e-3)


def test_bins_over_everything_hold_everything():
    for edges in (EDGES, [0.0, 1.0], [0.0, 1e-12, 0.5, 1 - 1e-12, 1.0]):
        counts, jacobian = TOY.expected_counts(edges)
        assert counts.sum() == pytest.approx(1050, rel=1e-12)
        assert jacobian.sum(0).tolist() == pytest.approx([1, 0, 0, 1], abs=1e-9)
        assert (counts >= 0).all()
    halves, _ = TOY.expected_counts([0.0, 0.3, 0.7, 1.0])
    whole, _ = TOY.expected_counts([0.0, 0.7, 1.0])
    assert halves[:2].sum() == pytest.approx(whole[0].item())


@benchmarks
def test_bins_of_the_best_classifier_lose_information_on_nuisances_only(benchmark):
    toy = InfernoToy(benchmark)
    matrix = toy.information()
    assert matrix.shape == (len(toy.parameters),) * 2
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(matrix, matrix.T, rtol=1e-12, atol=1e-12)
    lost = matrix - toy.binned_information(EDGES)
    # with b free nothing is lost on the common scale of s and b
    assert torch.linalg.eigvalsh(lost).min() > -1e-12
    fine = toy.binned_information(torch.linspace(0, 1, 401))
    assert fine[0, 0] == pytest.approx(matrix[0, 0].item(), rel=1e-4)
    if benchmark:
        assert fine[1, 1] < 0.8 * matrix[1, 1]


def test_an_empty_bin_holds_no_information():
    edges = [0.0, 1e-200, *EDGES[1:].tolist()]
    torch.testing.assert_close(TOY.binned_information(edges), TOY.binned_information(EDGES))


# Errors


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: InfernoToy(5), "Expected benchmark as 0, 1, 2, 3 or 4; got 5. Take 4 for all"),
        (lambda: InfernoToy(True), "benchmark"),
        (lambda: InfernoToy(2.0), "benchmark"),
        (lambda: InfernoToy(signal=0.0), "signal as a positive number"),
        (lambda: InfernoToy(background=math.inf), "background as a positive number"),
        (lambda: TOY.sample("sig", 3), "'signal' or 'background'; got 'sig'. Name one"),
        (lambda: TOY.log_prob("data", torch.zeros(2, 3)), "got 'data'"),
        (lambda: TOY.sample("signal", 0), "n as a whole number"),
        (lambda: TOY.sample("signal", 3, generator=torch.Generator(), seed=1), "Give one of"),
        (lambda: TOY.sample("background", 3, rate=0.0), "positive rate; got 0"),
        (lambda: TOY.sample("background", 3, rate=torch.tensor(-1.0)), "positive rate; got -1"),
        (lambda: TOY.sample("background", 3, r=torch.zeros(2)), r"r of shape \(3,\); got \(2,\)"),
        (lambda: TOY.sample("background", 3, r=math.nan), "finite r; got nan"),
        (lambda: TOY.log_prob("signal", torch.zeros(4, 2)), r"x of shape \(..., 3\); got \(4, 2\)"),
        (lambda: TOY.log_prob("signal", torch.tensor(1.0)), "Give x0, x1 and x2 per event"),
        (lambda: TOY.log_prob("signal", torch.full((2, 3), math.nan)), "row 0, column 0"),
        (lambda: TOY.log_prob("background", torch.zeros(2, 3), rate=-3), "got -3. Nominal is 3"),
        (lambda: TOY.shift(torch.zeros(2, 4), 0.1), "x of shape"),
        (lambda: TOY.shift(torch.zeros(2, 3), math.inf), "finite r; got inf"),
        (lambda: TOY.shift(torch.zeros(2, 3), torch.zeros(3)), "r of shape"),
        (lambda: TOY.stretch(torch.zeros(2, 3), 0), "positive rate; got 0"),
        (lambda: TOY.stretch(torch.zeros(2, 3), math.nan), "finite rate; got nan"),
        (lambda: TOY.log_likelihood_ratio(torch.full((3,), math.inf)), "finite x"),
        (lambda: TOY.signal_probability(torch.zeros(3, 2)), "x of shape"),
        (lambda: TOY.signal_probability("x"), "x as a tensor"),
        (lambda: TOY.expected_counts([0.5]), "two increasing numbers"),
        (lambda: TOY.expected_counts([0.5, 0.2]), r"Try torch.linspace\(0, 1, 11\)"),
        (lambda: TOY.expected_counts([0.5, 1.2]), "between 0 and 1"),
        (lambda: TOY.expected_counts([0.5, math.nan]), "between 0 and 1; got .*nan"),
        (lambda: TOY.binned_information(torch.zeros(2, 2)), "edges of shape"),
        (lambda: InfernoToy(2).limit([0.0, 0.5, 1.0]), "enough bins for s, r, rate; got 2"),
    ],
)
def test_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_tensors_that_are_no_rate_become_nan():
    x = TOY.sample("background", 3, seed=0)
    moved = TOY.stretch(x, torch.tensor([3.0, 0.0, -3.0]))
    assert moved[:, 2].isnan().tolist() == [False, True, True]
    assert torch.equal(moved[:, :2], x[:, :2])
