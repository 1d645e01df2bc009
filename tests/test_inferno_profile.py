"""Fits and profiles against closed forms and scipy, their plots, and what is refused."""

import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch.distributions import Gamma, LogNormal, Normal

from flowpost.inferno import Alternative, CountingModel, Normalisation, Process, Transform
from flowpost.inferno.likelihood import Likelihood
from flowpost.inferno.newton import minimise
from flowpost.inferno.templates import Templates
from flowpost.plots import inferno as plots

X = torch.linspace(0, 1, 8, dtype=torch.float64)
SIGNAL = 100 * torch.softmax(-0.5 * ((X - 0.8) / 0.15).square(), 0)
NEAR = 1500 * torch.softmax(-3 * X, 0)
FAR = 900 * torch.softmax(1.2 * X * (1 - X), 0)
# of float64, for torch takes its law in the dtype of its parameters
GAMMA = Gamma(*torch.tensor([[9.0], [8.0]], dtype=torch.float64))
# of every kind of constraint, some of them with templates that do not mirror each other
NUISANCES = {
    "normal": Normalisation(name="a", processes="near", constraint=Normal(1.0, 0.1)),
    "lognormal": Normalisation(name="l", processes="far", constraint=LogNormal(0.3, 0.2)),
    "free": Normalisation(name="f", processes=("near", "far")),
    "moved": Transform(name="m", processes="near", constraint=Normal(1.0, 0.3), apply=torch.add),
    "wandering": Alternative(name="w", processes="far", shift=0.4),
    "gamma": Alternative(
        name="g", processes="far", shift=0.5, constraint=GAMMA
    ),
}  # fmt: skip
NAMES = {"all": tuple(NUISANCES), **{n: (n,) for n in NUISANCES}}


def pair(nominal, change, bend):
    return nominal * (1 - change + bend), nominal * (1 + change + bend)


PAIRS = {
    "m": {"near": pair(NEAR, 0.3 * (X - 0.4), 0.05 * X)},
    "w": {"far": pair(FAR, 0.2 * torch.sin(6 * X), 0.03 * (1 - X))},
    "g": {"far": pair(FAR, 0.2 * torch.cos(9 * X), -0.02 * X)},
}
DATA = torch.tensor([672.0, 520, 380, 315, 262, 251, 216, 140])
cases = pytest.mark.parametrize("case", NAMES)


def binned(case="all", factor=1.0):
    processes = [
        Process("signal", 100.0, signal=True),
        Process("near", 1500.0),
        Process("far", 900.0),
    ]
    model = CountingModel(processes, [NUISANCES[n] for n in NAMES[case]])
    counts = {"signal": factor * SIGNAL, "near": factor * NEAR, "far": factor * FAR}
    varied = {
        n: {p: tuple(factor * t for t in v) for p, v in own.items()} for n, own in PAIRS.items()
    }
    variances = {"signal": 0.01 * SIGNAL, "near": 0.6 * NEAR, "far": 0.4 * FAR}
    return Templates(model, counts, {n: factor * v for n, v in variances.items()}, varied)


def counting(s=40.0, b=100.0, nuisances=()):
    model = CountingModel([Process("signal", s, signal=True), Process("back", b)], nuisances)
    return Templates(model, {"signal": [s], "back": [b]})


def scipy_nll(templates, data, mc_stat=False):
    """−ln L by scipy's laws, with the factors on the bins as parameters of their own."""
    n, size = np.asarray(data, dtype=float), len(templates.model.names)
    error = templates.errors.numpy() if mc_stat else np.full(len(n), 1e-9)

    def nll(values):
        at = torch.as_tensor(values[:size])
        counts = templates.expected(at).numpy()
        if mc_stat:
            counts = counts * values[size:]
        if (counts <= 0).any():
            return np.inf
        found = (counts - n * np.log(counts)).sum()
        for value, nuisance in zip(values[1:size], templates.model.nuisances, strict=True):
            if isinstance(nuisance.constraint, Normal):
                law = stats.norm(float(nuisance.constraint.loc), float(nuisance.constraint.scale))
                found -= law.logpdf(value)
            elif isinstance(nuisance.constraint, LogNormal):
                if value <= 0:
                    return np.inf
                loc, scale = float(nuisance.constraint.loc), float(nuisance.constraint.scale)
                found -= stats.norm(loc, scale).logpdf(np.log(value))
            elif nuisance.constraint is not None:
                found -= stats.gamma(9.0, scale=1 / 8.0).logpdf(value)
        return found - (stats.norm(1, error).logpdf(values[size:]).sum() if mc_stat else 0)

    return nll


def scipy_fit(templates, data, mc_stat=False, held=None):
    """The least −ln L and where, with parameters by index held at values."""
    nll, held = scipy_nll(templates, data, mc_stat), held or {}
    size = len(templates.model.names)
    start = np.concatenate([templates.model.values, np.ones(templates.bins if mc_stat else 0)])
    scale = np.array([*templates.widths.values()] + [0.05] * (len(start) - size))
    moves = [i for i in range(len(start)) if i not in held]

    def at(x):
        values = start.copy()
        values[list(held)] = list(held.values())
        values[moves] = start[moves] + x * scale[moves]
        return values

    def least(x):
        return min(nll(at(x)), 1e6)

    best = np.zeros(len(moves))
    for _ in range(2):
        best = optimize.minimize(least, best, method="BFGS", options={"gtol": 1e-6}).x
    return float(least(best)), at(best)


# Newton's method


def test_newton_finds_minima_of_many_functions_at_once():
    def function(x):  # Rosenbrock's, in its curved valley, from points that are not convex
        return (1 - x[:, 0]).square() + 100 * (x[:, 1] - x[:, 0].square()).square()

    start = torch.tensor([[-1.2, 1.0], [0.0, 5.0], [3.0, -8.0], [1.0, 1.0]]).double()
    found = minimise(function, start, torch.ones(2).double())
    assert bool(found.converged.all())
    torch.testing.assert_close(found.at, torch.ones(4, 2).double(), atol=1e-7, rtol=0)
    free = torch.tensor([[True, False]])
    held = minimise(function, start, torch.ones(2).double(), free)
    torch.testing.assert_close(held.at[:, 1], start[:, 1])


def test_newton_tells_what_is_no_minimum():
    def function(x):
        return torch.where(x[:, 0] > 0, x[:, 0] - x[:, 1].square(), torch.inf)

    found = minimise(
        function, torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double(), torch.ones(2).double()
    )
    assert found.converged.tolist() == [False, False]
    assert not math.isnan(float(found.value[0]))
    assert found.at[1].tolist() == [-1.0, 0.0]


# Closed forms


@pytest.mark.parametrize(
    ("s", "b", "n"), [(40.0, 100.0, 140.0), (10.0, 3.0, 25.0), (5.0, 50.0, 30.0)]
)
def test_one_bin(s, b, n):
    one = counting(s, b)
    assert one.width == pytest.approx(math.sqrt(s + b))
    found = one.fit([n])
    assert found.best["s"] == pytest.approx(n - b)
    assert found.width == pytest.approx(math.sqrt(n))
    scan = one.profile([n])
    total = scan.values.numpy() + b
    np.testing.assert_allclose(scan.curve, 2 * (total - n - n * np.log(total / n)), atol=1e-9)
    for level, ends in ((0.6827, (scan.low, scan.high)), (0.95, scan.interval(0.95))):
        z2 = stats.chi2.ppf(level, 1) if level != 0.6827 else 1.0
        wanted = [
            optimize.brentq(lambda t: 2 * (t - n - n * math.log(t / n)) - z2, *side)  # noqa: B023
            for side in ((1e-9, n), (n, 9 * n + 50))
        ]
        assert ends == pytest.approx([w - b for w in wanted], rel=1e-6)


@pytest.mark.parametrize("mc_stat", [False, True])
def test_on_off(mc_stat):
    """Li and Ma's problem: s in the first bin, a free background with τ times as much beside it."""
    tau, s, b = 2.5, 30.0, 40.0
    processes = [Process("signal", s, signal=True), Process("back", b * (1 + tau))]
    model = CountingModel(processes, [Normalisation(name="f", processes="back")])
    counts = {"signal": [s, 0.0], "back": [b, tau * b]}
    on_off = Templates(model, counts, {"signal": [0.0, 0.0], "back": [49.0, 0.0]})
    on, off = 81.0, 95.0
    scan = on_off.profile([on, off], mc_stat=mc_stat, values=[0.0, 20.0])
    assert scan.best == pytest.approx(on - off / tau)
    if mc_stat:  # the first bin is known to 10 %
        expected = math.sqrt(s + b + b / tau + 0.01 * (s + b) ** 2)
        assert on_off.information(mc_stat=True).width == pytest.approx(expected)
        return
    assert scan.width == pytest.approx(math.sqrt(on + off / tau**2))
    assert on_off.width == pytest.approx(math.sqrt(s + b + b / tau))
    alpha = 1 / tau  # their equation 17
    li_ma = on * math.log((1 + alpha) / alpha * on / (on + off))
    li_ma += off * math.log((1 + alpha) * off / (on + off))
    assert float(scan.curve[0]) == pytest.approx(2 * li_ma)


def test_constrained_background_adds_in_quadrature():
    b = Normalisation(name="b", processes="back", constraint=Normal(1.0, 0.2))
    one = counting(40.0, 100.0, [b])
    assert one.width == pytest.approx(math.sqrt(140 + 400))
    assert one.fit().pulls["b"] == pytest.approx(0, abs=1e-8)
    assert one.fit().constraints["b"] == pytest.approx(1)
    # beside a bin that measures it to ± 0.1
    two = Templates(one.model, {"signal": [40.0, 0.0], "back": [100.0, 100.0]})
    found, other = two.fit(), 1 / (1 / 0.1**2 + 1 / 0.2**2)
    assert found.constraints["b"] == pytest.approx(math.sqrt(other) / 0.2)
    assert found.width == pytest.approx(math.sqrt(140 + 100**2 * other))
    # a count that says 1.1 to all digits
    sharp = Templates(one.model, {"signal": [40.0, 0.0], "back": [100.0, 1e9]})
    found = sharp.fit([140.0, 1.1e9])
    assert found.pulls["b"] == pytest.approx(0.5, rel=1e-5)
    assert found.best["s"] == pytest.approx(30, abs=1e-3)


@pytest.mark.parametrize("sigma", [0.1, 0.5])
def test_pulls_of_lognormals_are_those_of_the_logarithm(sigma):
    one = counting(
        40.0, 100.0, [Normalisation(name="b", processes="back", constraint=LogNormal(0.0, sigma))]
    )
    two = Templates(one.model, {"signal": [40.0, 0.0], "back": [100.0, 1e7]})
    found = two.fit([140.0, 1e7 * math.exp(-1.3 * sigma)])
    assert found.pulls["b"] == pytest.approx(-1.3, rel=1e-4)


def test_impacts_of_a_normalisation():
    b = Normalisation(name="b", processes="back", constraint=Normal(1.0, 0.2))
    found = counting(40.0, 100.0, [b]).impacts()
    assert found.names == ("b",)
    assert [float(found.down[0]), float(found.up[0])] == pytest.approx([20, -20], rel=1e-6)
    assert str(found).splitlines()[1].split() == ["b", "+20", "-20", "86.1", "%"]


# Against scipy


@cases
def test_fit_is_that_of_scipy(case):
    own, templates = binned(case).fit(DATA), binned(case)
    lowest, at = scipy_fit(templates, DATA)
    nll = scipy_nll(templates, DATA)
    # ours is at least as low, and at the same place
    assert nll(own.values.numpy()) <= lowest + 1e-6
    scale = np.array([*own.widths.values()])
    np.testing.assert_allclose((own.values.numpy() - at) / scale, 0, atol=0.02)


@pytest.mark.parametrize(
    ("case", "mc_stat"), [("all", False), ("moved", True), ("wandering", True), ("gamma", False)]
)
def test_profile_is_that_of_scipy(case, mc_stat):
    templates = binned(case)
    scan = templates.profile(DATA, values=[60.0 if mc_stat else 140.0], mc_stat=mc_stat)
    lowest = min(scipy_fit(templates, DATA, mc_stat)[0], _nll_at(templates, scan.fit, mc_stat))
    for value, curve in zip(scan.values.tolist(), scan.curve.tolist(), strict=True):
        other = scipy_fit(templates, DATA, mc_stat, {0: value})[0]
        assert curve == pytest.approx(2 * (other - lowest), rel=2e-3, abs=1e-4)


def _nll_at(templates, fit, mc_stat):
    extra = [] if fit.factors is None else fit.factors.numpy()
    return scipy_nll(templates, DATA, mc_stat)(np.concatenate([fit.values.numpy(), extra]))


def test_likelihood_differences_are_those_of_scipy():
    templates, data = binned(), DATA
    own, other = Likelihood.of(templates, data, False), scipy_nll(templates, data)
    scale = torch.tensor([*templates.widths.values()]).double()
    values = templates.point() + 0.4 * torch.randn(40, len(scale)) * scale
    found = own(values)
    wanted = np.array([other(v.numpy()) for v in values])
    inside = np.isfinite(wanted)
    assert inside.sum() > 30
    assert bool((torch.isfinite(found).numpy() == inside).all())
    difference = (found.numpy() - wanted)[inside]
    np.testing.assert_allclose(difference, difference[0], atol=1e-8)


def test_impacts_are_fits_with_a_nuisance_held():
    templates = binned()
    found = templates.impacts(DATA)
    j, column = found.names.index("m"), templates.model.names.index("m")
    value = found.fit.best["m"] + found.fit.widths["m"]
    _, at = scipy_fit(templates, DATA, held={column: value})
    moved = at[0] - found.fit.best["s"]
    assert float(found.up[j]) == pytest.approx(moved, abs=0.02 * found.fit.width)


# Of expected data


@cases
@pytest.mark.parametrize("mc_stat", [False, True])
def test_expected_fits_are_the_information(case, mc_stat):
    templates = binned(case, 100.0)
    found = templates.fit(mc_stat=mc_stat)
    torch.testing.assert_close(found.values, templates.model.values, rtol=1e-7, atol=1e-7)
    own = templates.information(mc_stat=mc_stat)
    torch.testing.assert_close(found.covariance, own.covariance, rtol=1e-5, atol=1e-8)
    scan = templates.profile(mc_stat=mc_stat, points=7)
    assert scan.half_width == pytest.approx(own.width, rel=5e-3)
    assert (
        own.width >= templates.fixed(*templates.model.names[1:]).information(mc_stat=mc_stat).width
    )


def test_scans_go_along_any_parameter():
    templates = binned("moved", factor=100.0)
    scan = templates.profile(parameter="m", points=11)
    assert scan.half_width == pytest.approx(templates.widths["m"], rel=5e-3)
    assert scan.interval(0.9545)[1] - 1.0 == pytest.approx(2 * templates.widths["m"], rel=0.02)
    assert len(scan.values) == 11
    assert str(scan).startswith("m = 1 -0.")
    assert scan.profiled[0, scan.fit.names.index("m")] == scan.values[0]


def test_the_scan_crosses_where_it_says():
    templates = binned()
    scan = templates.profile(DATA)
    again = templates.profile(DATA, values=[scan.low, scan.high, *scan.interval(0.9)])
    assert again.curve.tolist() == pytest.approx([1, 1, 2.70554, 2.70554], rel=1e-5)


def test_text():
    found = binned().fit(DATA)
    lines = str(found).splitlines()
    assert lines[0].split() == ["value", "width", "pull", "constraint"]
    row = lines[1 + found.names.index("m")].split()
    assert row[0] == "m"
    assert float(row[1]) == pytest.approx(found.best["m"], rel=1e-4)
    assert float(row[3]) == pytest.approx(found.pulls["m"], abs=1e-3)
    assert float(lines[-1].split()[-1]) == pytest.approx(2 * found.nll, rel=1e-4)


# At the edges


def test_counts_that_turn_negative_are_outside():
    model = CountingModel([Process("signal", 10.0, signal=True), Process("back", 20.0)])
    pure = Templates(model, {"signal": [5.0, 5.0], "back": [20.0, 0.0]})
    scan = pure.profile()
    assert float(scan.values.min()) > 0
    assert bool(torch.isfinite(scan.curve).all())
    held = pure.profile(values=[-1.0, 10.0])
    assert held.curve.tolist() == [math.inf, pytest.approx(0.0, abs=1e-9)]
    # nothing in a bin of signal alone: the likelihood rises up to the edge
    with pytest.raises(RuntimeError, match=r"the fit stopped at s = .* or a count reaches zero"):
        pure.fit([15.0, 0.0])
    with pytest.raises(ValueError, match="at or above zero"):
        pure.fit([-1.0, 2.0])


def test_points_without_minimum_are_named():
    """Held at 60, the signal leaves so little to the background that a bin turns negative."""
    processes = [Process("signal", 10.0, signal=True), Process("back", 21.0)]
    tilt = Alternative(name="w", processes="back", constraint=Normal(0.0, 1.0))
    varied = {"w": {"back": ([10.0, 0.5], [30.0, 1.5])}}
    counts = {"signal": [10.0, 0.0], "back": [20.0, 1.0]}
    two = Templates(CountingModel(processes, [tilt]), counts, varied=varied)
    assert two.fit([30.0, 0.0]).best["w"] == pytest.approx(-0.5)
    with pytest.warns(UserWarning, match="No minimum was found with s held at 60"):
        two.profile([30.0, 0.0], values=[10.0, 60.0])


def test_impacts_outside_of_a_constraint_are_an_error():
    law = Gamma(*torch.tensor([[1.5], [0.5]], dtype=torch.float64))
    one = counting(40.0, 100.0, [Normalisation(name="b", processes="back", constraint=law)])
    with pytest.raises(RuntimeError, match=r"with b held at -0\.4142; there is none"):
        one.impacts()


def test_far_templates_are_warned_of():
    small = Templates(
        CountingModel(
            binned().model.processes, [Alternative(name="w", processes="far", shift=0.02)]
        ),
        binned().counts,
        varied=PAIRS,
    )
    # the templates of 0.4 given as those of 0.02: nothing is far
    assert small.fit().widths["w"] < 0.02
    near = {"far": tuple(FAR + 0.01 * (t - FAR) for t in PAIRS["w"]["far"])}
    weak = Templates(small.model, small.counts, varied={"w": near})
    with pytest.warns(UserWarning, match="nominal value of 'w', and its templates stand at 0.02"):
        weak.fit()


def test_refused():
    templates = binned("normal")
    with pytest.raises(ValueError, match=r"data of shape \(8,\); got \(3,\). One count a bin"):
        templates.fit(torch.ones(3))
    with pytest.raises(ValueError, match="Expected finite data; got nan in row 1"):
        templates.fit([1.0, torch.nan, *[1.0] * 6])
    with pytest.raises(ValueError, match="a parameter among s, a; got 'x'"):
        templates.profile(parameter="x")
    with pytest.raises(ValueError, match="points as a whole number"):
        templates.profile(points=0)
    with pytest.raises(ValueError, match="a level between 0 and 1; got 68"):
        templates.profile(points=3).interval(68)


# Plots


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def test_templates_are_drawn():
    templates = binned()
    ax = templates.plot(data=DATA)
    panels = ax.figure.axes
    assert len(panels) == 1 + 4
    labels = [t.get_text() for t in ax.get_legend().get_texts()]
    assert labels == ["near", "far", "signal", "simulation ± 1 σ", "data"]
    heights = panels[0].patches[0].get_data().values
    np.testing.assert_allclose(heights, templates.total[templates.order])
    _, own = plt.subplots()
    assert templates.plot(own, nuisances=["m"], ordered=False, log=False) is own
    strip = own.figure.axes[1]
    up = strip.patches[1].get_data().values
    change = PAIRS["m"]["near"][1] - NEAR
    np.testing.assert_allclose(up, 100 * change / templates.total, rtol=1e-6)
    assert len(plots.plot_templates(templates, nuisances=[]).figure.axes) == 1
    with pytest.raises(ValueError, match="a nuisance among"):
        templates.plot(nuisances=["x"])


def test_scans_are_drawn():
    scan = binned().profile(DATA, points=21)
    ax = scan.plot()
    np.testing.assert_allclose(ax.lines[0].get_ydata(), scan.curve)
    ends = [line.get_xdata()[0] for line in ax.lines if line.get_ls() == ":"]
    assert ends == [scan.low, scan.best, scan.high]
    assert f"half width {scan.half_width:.4g}" in ax.get_legend().get_title().get_text()


def test_pulls_and_impacts_are_drawn():
    fit, impacts = binned().fit(DATA), binned().impacts(DATA)
    ax = fit.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == ["a", "l", "m", "g"]
    np.testing.assert_allclose(
        ax.containers[0][0].get_xdata().astype(float), [fit.pulls[n] for n in "almg"]
    )
    ax = impacts.plot()
    assert [t.get_text() for t in ax.get_yticklabels()] == [impacts.names[j] for j in impacts.order]
    assert [b.get_width() for b in ax.patches[:2]] == impacts.down[impacts.order[:2]].tolist()
    with pytest.raises(ValueError, match="a constrained nuisance; got none"):
        counting().fit().plot()
    with pytest.raises(ValueError, match="at least one nuisance; got none"):
        counting().impacts().plot()
