"""Templates: interpolation by its conditions, filling by loops, bins, and what is refused."""

import math
import warnings

import numpy as np
import pytest
import torch
from torch.distributions import Gamma, LogNormal, Normal

from flowpost.inferno import (
    Alternative,
    CountingModel,
    Normalisation,
    Process,
    Reweighting,
    Sample,
    SoftBins,
    SummaryModel,
    Transform,
    information,
)
from flowpost.inferno.histograms import templates
from flowpost.inferno.interpolation import code4, code4p, coefficients
from flowpost.inferno.templates import Templates

ALPHA = torch.linspace(-3, 3, 121, dtype=torch.float64)[:, None]
DOWN, NOMINAL, UP = torch.tensor(
    [[88.0, 41.0, 9.0, 20.0], [100.0, 40.0, 10.0, 20.0], [117.0, 44.0, 13.0, 20.0]]
).double()
UNIT = Normal(0.0, 1.0)
PROCESSES = [
    Process("signal", 50.0, signal=True),
    Process("near", 600.0),
    Process("far", 400.0),
]


def assign(x):
    return x[:, 0].add(2).floor().long().clamp(0, 3)


# Interpolation


def test_code_4_is_the_polynomial_of_its_conditions():
    up, down = (UP / NOMINAL).numpy(), (DOWN / NOMINAL).numpy()
    powers = np.arange(1, 7)
    rows = []
    for a in (1.0, -1.0):
        rows += [a**powers, powers * a ** (powers - 1), powers * (powers - 1) * a ** (powers - 2)]
    sides = [up - 1, np.log(up) * up, np.log(up) ** 2 * up]
    sides += [down - 1, -np.log(down) * down, np.log(down) ** 2 * down]
    solved = np.linalg.solve(np.array(rows), np.array(sides))
    a = ALPHA.numpy()
    inside = 1 + sum(c * a ** (i + 1) for i, c in enumerate(solved))
    wanted = np.where(a > 1, up**a, np.where(a < -1, down**-a, inside))
    np.testing.assert_allclose(code4(DOWN / NOMINAL, UP / NOMINAL, ALPHA), wanted, rtol=1e-12)


def test_codes_are_those_of_pyhf():
    pyhf = pytest.importorskip("pyhf")
    sets = torch.stack([DOWN, NOMINAL, UP]).numpy()[None, None]
    alphas = ALPHA[:, 0].numpy()[None]
    for name, own in (
        ("code4p", code4p(DOWN, NOMINAL, UP, ALPHA)),
        ("code4", code4(DOWN / NOMINAL, UP / NOMINAL, ALPHA)),
    ):
        other = getattr(pyhf.interpolators, name)(sets, subscribe=False)(alphas)[0, 0]
        np.testing.assert_allclose(own, other, rtol=0, atol=1e-10, err_msg=name)
    other = pyhf.interpolators.code2(sets, subscribe=False)(alphas)[0, 0]
    assert np.abs(code4p(DOWN, NOMINAL, UP, ALPHA).numpy() - other).max() > 0.5


def test_code_4p_has_two_continuous_derivatives():
    for at in (-1.0, 1.0):
        found = []
        for side in (-1e-9, 1e-9):
            x = torch.tensor(at + side, dtype=torch.float64, requires_grad=True)
            y = code4p(DOWN, NOMINAL, UP, x).sum()
            (slope,) = torch.autograd.grad(y, x, create_graph=True)
            (bend,) = torch.autograd.grad(slope, x)
            found.append([v.item() for v in (y, slope, bend)])
        assert found[0] == pytest.approx(found[1], abs=1e-5)


@pytest.mark.parametrize("distance", [1e-3, 0.4, 1.0, 2.5])
def test_curves_go_through_templates_at_any_distance(distance):
    odd, even = coefficients(DOWN, NOMINAL, UP, distance)
    ends = NOMINAL - odd + 8 * even, NOMINAL + odd + 8 * even
    for side, wanted in ((-1, DOWN), (1, UP)):
        at = torch.tensor(side * distance, dtype=torch.float64)
        change = code4p(ends[0], NOMINAL, ends[1], at)
        torch.testing.assert_close(NOMINAL + change, wanted, rtol=1e-10, atol=1e-8)


# Composition


def histograms(constraint, shift=None, kind=Transform, size=4):
    extra = {"apply": lambda x, v: x} if kind is Transform else {}
    moved = kind(name="m", processes="near", constraint=constraint, shift=shift, **extra)
    model = CountingModel(
        PROCESSES,
        [
            moved,
            Normalisation(name="a", processes="far", constraint=Normal(1.0, 0.1)),
            Normalisation(name="l", processes=("near", "far"), constraint=LogNormal(0.0, 0.2)),
            Normalisation(name="f", processes="signal"),
        ],
        poi="mu",
        nominal=2.0,
    )
    counts = {"signal": torch.tensor([2.0, 3, 5, 40]), "far": torch.tensor([300.0, 50, 40, 10])}
    counts["near"] = NOMINAL
    return Templates(model, counts, varied={"m": {"near": (DOWN, UP)}})


@pytest.mark.parametrize(
    ("constraint", "shift"),
    [(Normal(0.0, 0.5), None), (Normal(0.0, 0.5), 0.2), (Normal(0.0, 0.5), 1.3), (None, 0.3)],
)
def test_composition_is_that_of_histfactory(constraint, shift):
    binned = histograms(constraint, shift)
    step = 0.5 if shift is None else shift
    for side, template in ((-1, DOWN), (1, UP)):
        rates = binned.by_process({"m": side * step, "mu": 3.0, "f": 1.1, "l": math.exp(0.3)})
        # beyond one standard deviation code 4 is the exponential
        torch.testing.assert_close(rates["near"], template * math.exp(0.3), rtol=1e-9, atol=1e-9)
        wanted = binned.counts["signal"] * 1.5 * 1.1
        torch.testing.assert_close(rates["signal"], wanted, rtol=1e-12, atol=0)
    rates = binned.by_process({"a": 1.37})
    torch.testing.assert_close(rates["far"], 1.37 * binned.counts["far"], rtol=1e-12, atol=0)


def test_one_standard_deviation_is_where_the_polynomial_ends():
    binned = histograms(Normal(0.0, 0.5))
    at = {"m": 0.25}  # code 4p at half a standard deviation, its formula written out
    s, a = (UP - DOWN) / 2, (UP + DOWN - 2 * NOMINAL) / 16
    wanted = NOMINAL + s / 2 + a * (15 / 4 - 10 / 16 + 3 / 64)
    torch.testing.assert_close(binned.by_process(at)["near"], wanted)
    torch.testing.assert_close(binned.by_process({"m": 1.5})["near"], NOMINAL + 3 * (UP - NOMINAL))
    free = histograms(None, 0.5)  # a parabola through the three
    torch.testing.assert_close(
        free.by_process(at)["near"], NOMINAL + s / 2 + 2 * a, rtol=1e-5, atol=0
    )


def test_additive_nuisances_add_and_factors_multiply():
    binned = histograms(Normal(0.0, 0.5))
    model = CountingModel(
        PROCESSES[:2],
        [
            Normalisation(name="a", processes="near", constraint=Normal(2.0, 0.2)),
            *binned.model.nuisances[:1],
        ],
    )
    own = Templates(model, {p: binned.counts[p] for p in ("signal", "near")}, varied=binned.varied)
    rates = own.by_process({"a": 2.6, "m": 0.5})["near"]
    torch.testing.assert_close(rates, 0.3 * NOMINAL + UP)


def test_expected_is_batched_and_differentiable():
    binned = histograms(Normal(0.0, 0.5))
    values = binned.point() + 0.1 * torch.randn(5, 3, 5).double()
    found = binned.expected(values)
    assert found.shape == (5, 3, 4)
    torch.testing.assert_close(found[2, 1], binned.expected(values[2, 1]))
    torch.testing.assert_close(binned.expected(), binned.total)
    at = binned.point({"m": 0.7, "l": 1.15}).requires_grad_()
    assert torch.autograd.gradcheck(binned.expected, at)
    assert torch.autograd.gradgradcheck(binned.expected, at)


def test_slopes_are_finite_differences():
    binned = histograms(Normal(0.0, 0.5))
    for row, name in enumerate(binned.model.names):
        nominal, h = float(binned.model.values[row]), 1e-6
        up, down = (binned.expected({name: nominal + s * h}) for s in (1, -1))
        torch.testing.assert_close(
            binned.slopes()[row], (up - down) / (2 * h), rtol=1e-6, atol=1e-6
        )


# Filling


def nuisances(shape_only=False):
    return [
        Transform(name="t", processes="near", constraint=Normal(0.0, 0.2), apply=torch.add),
        Alternative(name="v", processes=("near", "far"), constraint=UNIT, shape_only=shape_only),
        Reweighting(name="w", processes="far", constraint=UNIT, shape_only=shape_only),
        Normalisation(name="b", constraint=Normal(1.0, 0.1), processes="far"),
    ]


def events(size=4000, seed=0, total=True):
    g = torch.Generator().manual_seed(seed)

    def draw(shift, n):
        return torch.randn(n, 2, generator=g) + shift

    def weights(n, mean=1.0):
        return mean * (0.2 + torch.rand(n, generator=g))

    far = draw(-1.0, size)
    weight = weights(size)
    return {
        "signal": draw(1.0, size // 2),
        "near": Sample(
            draw(0.0, size),
            varied={"v": (draw(-0.2, size), Sample(draw(0.3, size), weights(size, 1.5)))},
        ),
        "far": Sample(
            far,
            weight,
            factors={"w": (1 - 0.1 * far[:, 1] - 0.02, 1 + 0.1 * far[:, 1] + 0.04)},
            varied={"v": (Sample(draw(-1.1, size), weights(size)), draw(-0.9, size // 2))},
        ),
    }


def counted(x, weight=None):
    """Sums of weights by a loop over events."""
    found = np.zeros(4)
    w = np.ones(len(x)) if weight is None else weight.double().numpy()
    for k, one in zip(assign(x).tolist(), w, strict=True):
        found[k] += one
    return found, w


@pytest.mark.parametrize("shape_only", [False, True])
def test_filling_is_that_of_a_loop(shape_only):
    model, samples = CountingModel(PROCESSES, nuisances(shape_only)), events()
    found = templates(model, assign, samples, 4, chunk=617)
    for process in PROCESSES:
        sample = samples[process.name]
        sample = sample if isinstance(sample, Sample) else Sample(sample)
        n, w = counted(sample.x, sample.weight)
        scale = process.expected / w.sum()
        np.testing.assert_allclose(found.counts[process.name], scale * n)
        squares = counted(sample.x, torch.as_tensor(w) ** 2)[0]
        np.testing.assert_allclose(found.variances[process.name], scale**2 * squares)
        for nuisance in model.nuisances[:3]:
            if not nuisance.touches(process.name):
                assert process.name not in found.varied[nuisance.name]
                continue
            for i, sign in enumerate((-1, 1)):
                total = w.sum()
                if nuisance.name == "t":
                    m, _ = counted(sample.x + sign * 0.2, sample.weight)
                elif nuisance.name == "w":
                    m, v = counted(sample.x, sample.weight * sample.factors["w"][i])
                else:
                    other = sample.varied["v"][i]
                    m, v = counted(other.x, other.weight)
                if nuisance.name != "t" and shape_only:
                    total = v.sum()
                wanted = process.expected * m / total
                got = found.varied[nuisance.name][process.name][i]
                np.testing.assert_allclose(got, wanted, err_msg=f"{nuisance.name} {i}")


def test_yields_of_alternatives_follow_the_whole_samples():
    model = CountingModel(
        PROCESSES[:2], [Alternative(name="v", processes="near", constraint=Normal(0.0, 1.0))]
    )
    x = torch.randn(600, 2)
    sides = Sample(x, total=800.0), Sample(x, total=1300.0)
    samples = {"signal": x, "near": Sample(x, varied={"v": sides}, total=1000.0)}
    found = templates(model, assign, samples, 4).varied["v"]["near"]
    assert [float(side.sum()) for side in found] == pytest.approx([480.0, 780.0])


def test_shifts_are_factors_by_name():
    model, samples = CountingModel(PROCESSES, nuisances()), events()
    one = templates(model, assign, samples, 4, shifts={"t": 2.0})
    assert one.shifts == pytest.approx({"t": 0.4, "v": 1.0, "w": 1.0})
    n, _ = counted(samples["near"].x + 0.4)
    np.testing.assert_allclose(one.varied["t"]["near"][1], n * 600 / n.sum())
    assert templates(model, assign, samples, 4, shifts=0.5).shifts["t"] == pytest.approx(0.1)


class Hard(torch.nn.Module):
    def forward(self, x):
        return torch.nn.functional.one_hot(assign(x), 4).to(x.dtype)


@pytest.mark.parametrize("shape_only", [False, True])
def test_information_is_that_of_the_loss_in_hard_bins(shape_only):
    model = CountingModel(PROCESSES, nuisances(shape_only)[1:])
    samples = events()
    own = templates(model, assign, samples, 4).information()
    soft = information(model, Hard(), samples)
    assert own.widths == pytest.approx(soft.widths, rel=1e-5)
    unit = own.covariance.diagonal().rsqrt()
    torch.testing.assert_close(
        own.covariance * unit[:, None] * unit,
        soft.covariance * unit[:, None] * unit,
        rtol=0,
        atol=1e-5,
    )
    torch.testing.assert_close(own.counts, soft.counts, rtol=1e-5, atol=0)
    torch.testing.assert_close(own.signal, soft.signal, rtol=1e-5, atol=0)


def test_summary_models_and_dicts_of_inputs():
    class Pair(torch.nn.Module):
        def forward(self, a, b):
            return torch.stack([a, b], -1)

    network = SummaryModel(Pair(), SoftBins(2, 3))
    x = {"a": torch.randn(500), "b": torch.randn(500)}
    move = Transform(
        name="t", constraint=Normal(0.0, 0.1), apply=lambda x, v: {**x, "a": x["a"] + v}
    )
    model = CountingModel(PROCESSES[:2], [move])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = templates(model, network, {"signal": x, "near": x})
    index = network.assign({"a": x["a"] + 0.1, "b": x["b"]})
    assert found.bins == 3
    np.testing.assert_allclose(
        found.varied["t"]["near"][1], 600 * np.bincount(index, minlength=3) / 500
    )


# Bins


def test_merging_and_ordering_go_through_everything():
    model, samples = CountingModel(PROCESSES, nuisances()), events()
    four = templates(model, assign, samples, 4)
    two = templates(model, lambda x: assign(x) // 2, samples, 2)
    merged = four.merged([[0, 1], [3, 2]])
    for name in ("counts", "variances"):
        for p, value in getattr(two, name).items():
            torch.testing.assert_close(getattr(merged, name)[p], value)
    torch.testing.assert_close(merged.varied["t"]["near"][0], two.varied["t"]["near"][0])
    assert merged.width > four.width
    ordered = four.merged([[2], [0], [3], [1]]).ordered()
    ratio = ordered.signal / (ordered.total - ordered.signal)
    assert bool((ratio.diff() > 0).all())
    assert ordered.width == pytest.approx(four.width)
    fixed = four.fixed("t", "b")
    assert fixed.model.names == ("s", "v", "w")
    assert fixed.width < four.width


def test_information_with_few_simulated_events():
    model = CountingModel(PROCESSES[:2])
    counts = {"signal": [10.0], "near": [90.0]}
    one = Templates(model, counts, {"signal": [4.0], "near": [21.0]})
    # a count of 100 ± 10, known to ± 5 by simulation, and s = 50 where 10 are counted
    assert one.information(mc_stat=True).width == pytest.approx(5 * math.sqrt(125))
    assert one.width == pytest.approx(50)
    assert float(one.errors) == pytest.approx(0.05)


def test_text():
    model = CountingModel(PROCESSES, nuisances())
    found = templates(model, assign, events(), 4)
    text = str(found)
    assert text.startswith("  bin    signal      near       far     total  simulated\n    0")
    row = [f"{c[0]:.2f}" for c in found.counts.values()]
    assert text.splitlines()[1].split()[1:4] == row
    down, up = (100 * (float(side.sum()) / 400 - 1) for side in found.varied["w"]["far"])
    assert f"w at ∓1: {down:+.2f} % / {up:+.2f} % of far" in text
    bins = {"signal": torch.ones(30), "near": torch.ones(30), "far": torch.ones(30)}
    assert "... 6 more" in str(Templates(CountingModel(PROCESSES), bins))


# What is refused

FLAT = {p.name: torch.ones(4) for p in PROCESSES}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"near": torch.ones(3)}, r"counts of 'near' of shape \(4,\); got \(3,\). One a bin"),
        (
            {"near": torch.tensor([1.0, torch.nan, 1, 1])},
            "finite counts of 'near'; got nan in row 1",
        ),
        ({"near": torch.tensor([1.0, -5, 1, 1])}, r"got -3 in bin 1 \(signal 1, near -5, far 1\)"),
        ({p: torch.zeros(4) for p in FLAT}, "above zero in some bin; got none"),
    ],
)
def test_counts_are_checked(change, text):
    with pytest.raises(ValueError, match=text):
        Templates(CountingModel(PROCESSES), {**FLAT, **change})


def test_missing_parts_are_named():
    with pytest.raises(ValueError, match="counts of signal, near, far; got none of 'far'"):
        Templates(CountingModel(PROCESSES), {"signal": [1.0], "near": [1.0]})
    model = CountingModel(PROCESSES, nuisances()[:1])
    with pytest.raises(ValueError, match=r"Give varied=\{'t': \{'near': \(down, up\)\}\}"):
        Templates(model, FLAT)
    pair = torch.ones(4), torch.ones(5)
    with pytest.raises(ValueError, match=r"'t' up of 'near' of shape \(4,\); got \(5,\)"):
        Templates(model, FLAT, varied={"t": {"near": pair}})
    with pytest.raises(ValueError, match="shift of 't' as a positive number; got 0"):
        Templates(model, FLAT, varied={"t": {"near": pair[:1] * 2}}, shifts={"t": 0.0})
    with pytest.raises(ValueError, match="Expected variances of the templates for mc_stat"):
        Templates(CountingModel(PROCESSES), FLAT).information(mc_stat=True)


def test_empty_and_negative_bins_are_warned_of():
    empty = {p: torch.tensor([1.0, 0, 1, 0]) for p in FLAT}
    with pytest.warns(UserWarning, match=r"expected in bins 1, 3, .* templates.merged\(groups\)"):
        binned = Templates(CountingModel(PROCESSES), empty)
    full = binned.merged([[0, 1], [2, 3]])
    assert full.width == pytest.approx(binned.width)
    with pytest.raises(ValueError, match="got 2 in bin 3, where 0 are expected"):
        binned.fit([3.0, 0, 3, 2])
    low = {**FLAT, "near": torch.tensor([1.0, 3, -0.5, 1])}
    with pytest.warns(
        UserWarning, match="'near' above zero; got -0.5 in bin 2 .* weights below zero"
    ):
        Templates(CountingModel(PROCESSES), low)


@pytest.mark.parametrize(
    ("function", "text"),
    [
        (lambda x: x, r"whole bin indices \(2000,\) for 'signal'; got torch.float32 of shape"),
        (lambda x: assign(x)[:-1], r"whole bin indices \(2000,\) .*hard_assign"),
        (lambda x: assign(x) + 1, "indices from 0 to 3 for 'signal'; got 1 to 4. Clamp"),
    ],
)
def test_functions_are_checked(function, text):
    with pytest.raises(ValueError, match=text):
        templates(CountingModel(PROCESSES, nuisances()), function, events(), 4)


def test_filling_is_checked():
    model, samples = CountingModel(PROCESSES, nuisances()), events(400)
    with pytest.raises(ValueError, match="bins=K beside a function"):
        templates(model, assign, samples)
    with pytest.raises(ValueError, match=r"factors of transforms \(t\); got 2.0 of 'v'"):
        templates(model, assign, samples, 4, shifts={"v": 2.0})
    broken = Transform(
        name="t", processes="near", constraint=Normal(0.0, 0.2), apply=lambda x, v: x + v.sqrt()
    )
    network = SummaryModel(None, SoftBins(2, 2))
    with pytest.raises(ValueError, match=r"'near' \(t down\) cannot be put into bins: .*NaN"):
        templates(CountingModel(PROCESSES, [broken]), network, {p: torch.randn(9, 2) for p in FLAT})
    negative = Sample(
        torch.randn(4, 2),
        torch.tensor([1.0, 1, 1, -2]),
        {"w": (torch.ones(4), torch.tensor([1.0, 1, 1, 2]))},
    )
    small = CountingModel(PROCESSES[1:] + PROCESSES[:1], nuisances()[2:3])
    with pytest.raises(ValueError, match="weights of 'far' w up with a positive sum; got -1"):
        templates(small, lambda x: torch.zeros(len(x)).long(), {**samples, "far": negative}, 1)


def test_points_and_groups_are_checked():
    binned = histograms(Normal(0.0, 0.5))
    with pytest.raises(ValueError, match="parameters among mu, m, a, l, f; got 'x'"):
        binned.expected({"x": 1.0})
    with pytest.raises(ValueError, match=r"shape \(..., 5\); got \(3,\). Give one for each of mu"):
        binned.expected(torch.zeros(3))
    with pytest.raises(ValueError, match="each of the bins 0 to 3 once"):
        binned.merged([[0, 1], [1, 2, 3]])
    with pytest.raises(ValueError, match="a nuisance among m, a, l, f; got 'mu'"):
        binned.nuisance("mu")
    free = [Normalisation(name=n, processes=p) for n, p in (("n", "near"), ("f", "far"))]
    two = Templates(CountingModel(PROCESSES, free), FLAT).merged([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match="2 occupied bins cannot hold 3 free"):
        two.fit()


def test_other_constraints_take_the_shift_as_unit():
    binned = histograms(Gamma(torch.tensor([5.0]), torch.tensor([4.0])), 0.2)
    assert binned.unit("m") == 0.2
    torch.testing.assert_close(binned.by_process({"m": 1.2})["near"], UP)
