"""Workspaces against pyhf: counts, likelihood, HESSE and half widths; errors, and pyhf's state."""

import json
import math
import sys

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
    Transform,
)
from flowpost.inferno.histograms import templates as fill
from flowpost.inferno.likelihood import Likelihood
from flowpost.inferno.templates import Templates
from flowpost.inferno.workspace import pyhf_fit, pyhf_parameters, workspace
from flowpost.simulators import InfernoToy

pyhf = pytest.importorskip("pyhf")
pytest.importorskip("iminuit")
pytestmark = pytest.mark.filterwarnings("ignore:jsonschema.RefResolver:DeprecationWarning")

X = torch.linspace(0, 1, 8, dtype=torch.float64)
COUNTS = {
    "signal": 100 * torch.softmax(-0.5 * ((X - 0.8) / 0.15).square(), 0),
    "other": 60 * torch.softmax(-0.5 * ((X - 0.6) / 0.2).square(), 0),
    "near": 1500 * torch.softmax(-3 * X, 0),
    "far": 900 * torch.softmax(1.2 * X * (1 - X), 0),
}
KINDS = {
    "transform": (Transform, {"apply": lambda x, v: x}),
    "alternative": (Alternative, {}),
    "reweighting": (Reweighting, {"shape_only": True}),
}


def normalisation(constraint, **options):
    return [Normalisation(name="n", processes=("near", "other"), constraint=constraint, **options)]


def moved(kind, constraint, name="m", **options):
    cls, extra = KINDS[kind]
    return cls(name=name, processes=("near", "signal"), constraint=constraint, **extra, **options)


CASES = {
    "normalisation, normal": normalisation(Normal(1.0, 0.1)),
    "normalisation, yield": normalisation(Normal(1500.0, 130.0)),
    "normalisation, lognormal": normalisation(LogNormal(0.4, 0.15)),
    "normalisation, free": normalisation(None, nominal=3.0),
    **{f"{k}, normal": [moved(k, Normal(2.0, 0.3))] for k in KINDS},
    **{f"{k}, free": [moved(k, None, shift=0.2)] for k in KINDS},
    "templates at half a width": [moved("alternative", Normal(2.0, 0.3), shift=0.15)],
    "templates at two widths": [moved("alternative", Normal(2.0, 0.3), shift=0.6)],
    "off the constraint": [moved("alternative", Normal(2.0, 0.3), nominal=2.00002)],
    "none": [],
    "all": [
        Normalisation(name="n", processes="near", constraint=Normal(1.0, 0.1)),
        Normalisation(name="l", processes="other", constraint=LogNormal(0.0, 0.1)),
        Normalisation(name="o", processes="far"),
        moved("transform", Normal(2.0, 0.3)),
        moved("reweighting", None, "w", shift=0.2),
    ],
}
LIMITED = [(c, True) for c in ("none", "all", "normalisation, lognormal", "alternative, free")]
cases = pytest.mark.parametrize("case", CASES)
stats = pytest.mark.parametrize("mc_stat", [False, True], ids=["", "mc_stat"])


def binned(case, factor=1.0, poi=7.0):
    processes = [
        Process(n, float(factor * c.sum()), n in ("signal", "other")) for n, c in COUNTS.items()
    ]
    model = CountingModel(processes, CASES[case], nominal=poi)
    counts = {n: factor * c for n, c in COUNTS.items()}
    changes = {"m": 0.2 * torch.sin(5 * X), "w": 0.2 * torch.cos(8 * X)}
    varied = {
        n: {p: (c * (1 - change + 0.1 * X), c * (1 + change + 0.1 * X)) for p, c in counts.items()}
        for n, change in changes.items()
    }
    variances = {
        n: factor * s * c for s, (n, c) in zip((0.01, 0.02, 0.6, 0.3), COUNTS.items(), strict=True)
    }
    return Templates(model, counts, variances, varied)


def random_points(templates, count=20):
    """Values of all parameters, three standard deviations or four shifts around nominal."""
    at = templates.point().expand(count, -1).clone()
    at[:, 0] *= 0.2 + 2 * torch.rand(count)
    for column, n in enumerate(templates.model.nuisances, 1):
        draws = torch.randn(count).double()
        if isinstance(n.constraint, LogNormal):
            at[:, column] *= torch.exp(1.5 * float(n.constraint.scale) * draws)
        elif isinstance(n, Normalisation) and n.free:
            at[:, column] *= torch.exp(0.3 * draws)
        else:
            at[:, column] += 1.5 * n.shift * draws
    return at


def read(templates, data=None, mc_stat=False):
    space = pyhf.Workspace(json.loads(json.dumps(workspace(templates, data, mc_stat=mc_stat))))
    model = space.model()
    return model, space.data(model)


def pyhf_values(model, templates, values, factors=None):
    found = np.array(model.config.suggested_init(), dtype=float)
    for name, value in pyhf_parameters(templates, values).items():
        found[model.config.par_slice(name)] = value
    if factors is not None:
        found[model.config.par_slice("mc_stat")] = factors
    return found


# The round trip


@cases
def test_expected_counts_are_those_of_pyhf(case):
    templates = binned(case)
    model, data = read(templates)
    assert model.config.poi_name == "s"
    np.testing.assert_allclose(data[:8], templates.total, rtol=1e-12)
    for values in random_points(templates):
        other = model.expected_actualdata(pyhf_values(model, templates, values))
        np.testing.assert_allclose(templates.expected(values), other, rtol=1e-8)
    by_process = templates.by_process(values)
    parts = model.main_model.expected_data(
        pyhf_values(model, templates, values), return_by_sample=True
    )
    for name, part in zip(model.config.samples, parts, strict=True):
        np.testing.assert_allclose(by_process[name], part, rtol=1e-8, atol=1e-9)


@cases
@stats
def test_likelihood_differences_are_those_of_pyhf(case, mc_stat):
    """Counts, the widths of all constraints and the factors on the bins."""
    templates = binned(case)
    observed = torch.poisson(templates.expected({"s": 9.0}))
    model, data = read(templates, observed, mc_stat)
    own = Likelihood.of(templates, observed, mc_stat)
    values = random_points(templates)
    values = values[torch.isfinite(own(values))]
    assert len(values) > 10
    found, wanted = own(values), []
    for v in values:
        factors = own.factors(templates.expected(v)).numpy() if mc_stat else None
        wanted.append(-float(model.logpdf(pyhf_values(model, templates, v, factors), data)[0]))
    difference = found.numpy() - np.array(wanted)
    # a free nuisance has a constraint of 1000 shifts there
    loose = sum((1.5 * 3 / 1000) ** 2 for n in CASES[case] if n.free)
    np.testing.assert_allclose(difference, difference[0], atol=1e-6 + loose)


# Widths


@pytest.mark.parametrize(("case", "mc_stat"), [*((c, False) for c in CASES), *LIMITED])
def test_widths_are_those_of_pyhf(case, mc_stat):
    templates = binned(case, 100.0)
    fisher = templates.information(mc_stat=mc_stat).widths
    other = pyhf_fit(templates, mc_stat=mc_stat)
    assert other.widths == pytest.approx(fisher, rel=5e-3)
    scan = templates.profile(points=3, mc_stat=mc_stat)
    assert (scan.low, scan.high) == pytest.approx((other.low, other.high), rel=2e-4)
    if case == "all" or "lognormal" in case:
        return  # of their constraints, not of few counts, the profile is not a parabola
    assert scan.half_width == pytest.approx(fisher["s"], rel=5e-3)
    assert other.half_width == pytest.approx(fisher["s"], rel=5e-3)


@pytest.mark.parametrize("case", ["all", "normalisation, lognormal", "alternative, free"])
def test_fits_of_data_are_those_of_pyhf(case):
    templates = binned(case, 10.0)
    data = torch.poisson(templates.expected({"s": 9.0}))
    own, other = templates.profile(data, points=3), pyhf_fit(templates, data)
    for name, value in own.fit.best.items():
        assert other.best[name] == pytest.approx(value, abs=1e-2 * own.fit.widths[name])
    assert other.widths == pytest.approx(own.fit.widths, rel=5e-3)
    assert (other.low, other.high) == pytest.approx((own.low, own.high), rel=1e-3)
    assert f"{other.half_width:.4g} by pyhf" in str(other)


def toy_templates(benchmark=4, factor=1.0):
    toy = InfernoToy(benchmark, signal=50.0 * factor, background=1000.0 * factor)
    moves = {"r": (toy.shift, 0.1), "rate": (toy.stretch, 0.5)}
    nuisances = []
    for name, law in toy.constraints.items():
        options = {
            "name": name,
            "processes": "background",
            "constraint": law,
            "nominal": toy.nominal[name],
        }
        if name == "b":
            nuisances.append(Normalisation(**options))
        else:
            apply, shift = moves[name]
            shift = shift if law is None else None
            nuisances.append(Transform(**options, apply=apply, shift=shift))
    model = CountingModel(
        [Process("signal", toy.signal, signal=True), Process("background", toy.background)],
        nuisances,
    )
    samples = {p: toy.sample(p, 40_000, seed=k) for k, p in enumerate(("signal", "background"))}
    return fill(model, lambda x: (10 * toy.signal_probability(x)).long().clamp(0, 9), samples, 10)


@pytest.mark.parametrize("benchmark", range(5))
def test_toy_of_inferno(benchmark):
    templates = toy_templates(benchmark, 100.0)
    limit = InfernoToy(benchmark, signal=5000.0, background=1e5).limit(torch.linspace(0, 1, 11))
    # 40 000 events know the derivatives to some per cent
    assert templates.width == pytest.approx(limit, rel=0.05)
    other = pyhf_fit(templates)
    assert other.width == pytest.approx(templates.width, rel=5e-3)
    assert other.half_width == pytest.approx(templates.profile(points=3).half_width, rel=1e-4)


def test_free_nuisances_are_not_constrained():
    """The wide constraint of the workspace adds less than 1e-4 of the information."""
    templates = binned("alternative, free")
    added = (templates.widths["m"] / templates.unit("m")) ** 2
    assert added < 1e-4
    assert templates.unit("m") == pytest.approx(200)


# What it looks like


def test_workspaces_are_plain_json_of_the_schema():
    described = workspace(binned("all"), name="toy", mc_stat=True)
    pyhf.schema.validate(json.loads(json.dumps(described)), "workspace.json")
    near = described["channels"][0]["samples"][2]
    types = {m["name"]: m["type"] for m in near["modifiers"]}
    assert types == {"n": "histosys", "m": "histosys", "w": "histosys", "mc_stat": "staterror"}
    sides = {m["name"]: m["data"] for m in near["modifiers"]}
    other = described["channels"][0]["samples"][1]["modifiers"]
    assert [m["type"] for m in other] == ["normfactor", "normsys", "staterror"]
    assert other[1]["data"] == pytest.approx({"hi": math.exp(0.1), "lo": math.exp(-0.1)})
    np.testing.assert_allclose(sides["n"]["hi_data"], 1.1 * COUNTS["near"])
    assert described["measurements"][0]["name"] == "toy"
    clash = binned("none")
    model = CountingModel(clash.model.processes, [Normalisation(name="mc_stat", processes="far")])
    other = Templates(model, clash.counts, clash.variances)
    names = [
        m["name"] for m in workspace(other, mc_stat=True)["channels"][0]["samples"][3]["modifiers"]
    ]
    assert names == ["mc_stat", "mc_stat_"]


@pytest.mark.parametrize(
    ("nuisance", "text"),
    [
        (
            moved("alternative", LogNormal(0.0, 0.2)),
            "constraint of 'm' as Normal, or None, for pyhf",
        ),
        (
            Normalisation(name="n", constraint=Gamma(torch.tensor([5.0]), torch.tensor([4.0]))),
            "'n' as Normal or LogNormal, or None, for pyhf; got Gamma.*templates.fit",
        ),
    ],
)
def test_constraints_without_counterpart_are_refused(nuisance, text):
    templates = binned("none")
    model = CountingModel(templates.model.processes, [nuisance])
    own = Templates(model, templates.counts, varied=binned("all").varied)
    with pytest.raises(ValueError, match=text):
        own.workspace()


def test_templates_too_near_are_refused():
    templates = binned("none")
    model = CountingModel(templates.model.processes, [moved("alternative", None, shift=0.2)])
    close = {p: (c * (1 - 1e-4 * X), c * (1 + 1e-4 * X)) for p, c in templates.counts.items()}
    own = Templates(model, templates.counts, varied={"m": close})
    with pytest.raises(
        ValueError, match=r"free 'm' at a shift near to its uncertainty of .*; got 0\.2"
    ):
        own.workspace()


# pyhf's state


def test_backend_and_optimizer_come_back():
    before = pyhf.get_backend()
    try:
        pyhf.set_backend("numpy", "scipy", precision="32b")
        chosen = pyhf.get_backend()
        pyhf_fit(binned("normalisation, normal"))
        assert pyhf.get_backend() == chosen
        with pytest.raises(ValueError, match="data of shape"):
            pyhf_fit(binned("none"), [1.0])
        assert pyhf.get_backend() == chosen
    finally:
        pyhf.set_backend(*before)


@pytest.mark.parametrize("missing", ["pyhf", "iminuit"])
def test_missing_packages_are_named(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=rf"{missing} is not installed.*flowpost\[hep\]"):
        pyhf_fit(binned("none"))
