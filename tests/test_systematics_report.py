"""The report on exact heads against closed forms; conditioned heads and their marginals."""

import importlib
import math

import pytest
import torch
from torch import nn
from torch.distributions import MultivariateNormal, Normal, Uniform

import flowpost as fp
from benchmarks.systematics import exact
from flowpost.diagnostics import hpd_coverage
from flowpost.systematics import (
    ConditionedEncoder,
    Marginal,
    MarginalModel,
    Nuisances,
    SystematicsReport,
    at,
    marginal,
    report,
)
from flowpost.systematics.widths import label_widths

EVENTS = 20_000
ACCELERATOR = pytest.param(
    "cuda",
    marks=[
        pytest.mark.gpu,
        pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an accelerator"),
    ],
)
# coverage of 68.3 and 90 % regions in per cent, by s and the shift of the nuisance in σ
TABLE = {
    0.5: {0: (73.6, 93.4), 1: (67.9, 90.0), 2: (53.0, 79.7)},
    1.0: {0: (84.3, 98.0), 1: (65.3, 90.7), 2: (27.9, 62.8)},
}


def linear(weight, width, context=1):
    """An exact head: location is linear in the context, width is fixed."""
    head = fp.PosteriorHead(context, fp.Real(1), "affine")
    with torch.no_grad():
        head.flow.weight.zero_()
        head.flow.bias.zero_()
        head.flow.weight[0] = torch.tensor(weight)
        head.flow.bias[1] = 14 * math.atanh(math.log(width) / 14)
    return head


def exact_model(s):
    """The posterior of a flat label prior, the nuisance marginalised."""
    return fp.PosteriorModel(None, linear([1.0], (1 + s * s) ** 0.5))


def prior_of(s):
    return Nuisances(shift=Normal(0.0, s))


def simulate(nu, generator):
    z = 20 * torch.randn(len(nu), 1, generator=generator)
    return z + nu.sum(1, keepdim=True) + torch.randn(len(nu), 1, generator=generator), z


@pytest.fixture(scope="module")
def found():
    return report(
        exact_model(1.0), simulate, prior_of(1.0), without=exact_model(0.0), events=EVENTS
    )


def test_the_table_of_the_closed_form():
    for s, rows in TABLE.items():
        for shift, values in rows.items():
            held = [100 * exact(s, shift, level) for level in (0.682689, 0.9)]
            assert held == pytest.approx(values, abs=0.06)


@pytest.mark.parametrize("s", [0.5, 1.0])
def test_exact_heads_have_the_coverage_of_the_closed_form(s):
    result = report(exact_model(s), simulate, prior_of(s), events=EVENTS, seed=2)
    assert isinstance(result, SystematicsReport)
    assert [p.label for p in result.points] == [
        "averaged", "nominal", "shift −2σ", "shift −1σ", "shift +1σ", "shift +2σ"
    ]  # fmt: skip
    for point in result.points:
        for level in result.levels:
            held = point.coverage.coverage_at(level)
            wanted = level if point.sigmas is None else exact(s, abs(point.sigmas), level)
            assert held == pytest.approx(wanted, abs=4 * point.error(level))
    for shift, values in TABLE[s].items():
        held = [result.point("shift", shift).coverage.coverage_at(c) for c in result.levels]
        assert [100 * h for h in held] == pytest.approx(values, abs=1.3)


def test_it_says_where_it_under_covers(found):
    names = {p.label for p in found.under_covered()}
    assert {"shift −2σ", "shift +2σ"} <= names
    assert not names & {"averaged", "nominal"}
    text = str(found)
    assert "UNDER-COVERS at shift −2σ" in text
    assert "covered on average over the prior; over-covers at nominal" in found.verdict()
    assert text.count("UNDER ") >= 3
    assert "6 points" in repr(found)


def test_price_of_the_exact_heads(found):
    """ln √2 nats wider; the gain is that of the mean square against both widths."""
    price = found.price
    assert price.nominal_nats == pytest.approx(0.5 * math.log(2) - 0.25, abs=0.01)
    assert price.averaged_nats == pytest.approx(0.5 * math.log(2) - 0.5, abs=0.02)
    assert price.nominal_error == pytest.approx(0.25 * (2 / EVENTS) ** 0.5, rel=0.1)
    assert price.averaged_error == pytest.approx(0.5 * (2 / EVENTS) ** 0.5, rel=0.1)
    assert price.columns == found.columns == ("z",)
    for ratio in (price.nominal_width, price.averaged_width):
        assert ratio.tolist() == pytest.approx([2**0.5], rel=1e-4)
    assert found.nominal.width.tolist() == pytest.approx([2 * 2**0.5], rel=1e-3)
    assert "price at nominal: +0.09" in str(price)
    other = found.nominal.without
    assert other.coverage_at(0.9) == pytest.approx(0.9, abs=0.01)
    assert found.averaged.without.coverage_at(0.682689) == pytest.approx(0.52, abs=0.015)


def test_a_report_without_the_other_model():
    result = report(exact_model(1.0), simulate, prior_of(1.0), at=(2,), events=3000)
    assert result.price is None
    assert result.averaged.without is None
    assert len(result.points) == 3
    assert "without" not in str(result)


def test_too_narrow_is_named_on_average_too():
    result = report(exact_model(0.0), simulate, prior_of(1.0), at=(0, 1), events=5000)
    assert "MISCALIBRATED on average over the prior: under-covers (5" in result.verdict()
    assert "at nominal" not in result.verdict()


def test_both_models_see_the_same_events_and_points_do_not():
    model = exact_model(1.0)
    result = report(model, simulate, prior_of(1.0), at=(1,), without=model, events=3000)
    assert result.nominal.nats == result.averaged.nats == 0
    again = report(model, simulate, prior_of(1.0), at=(1,), events=3000)
    assert torch.equal(again.nominal.coverage.cumulative, result.nominal.coverage.cumulative)
    other = report(model, simulate, prior_of(1.0), at=(1,), events=3000, seed=1)
    assert not torch.equal(other.nominal.coverage.cumulative, result.nominal.coverage.cumulative)


def test_several_nuisances_and_the_values_that_they_have():
    prior = Nuisances(a=Normal(0.0, 0.6), b=(Uniform(0.0, 2.0), 0.0), c=Normal(0.0, 0.8))
    seen = []

    def watched(nu, generator):
        seen.append(nu)
        return simulate(nu[:, [0, 2]], generator)

    result = report(exact_model(1.0), watched, prior, events=4000, chunk=1500)
    assert len(result.points) == 2 + 3 * 4
    assert {len(nu) for nu in seen} == {1500, 1000}
    assert len(seen) == 3 * len(result.points)
    for point, nu in zip(result.points[1:], seen[3::3], strict=True):
        assert torch.equal(point.nu, nu[0])
        assert (nu == nu[0]).all()
    assert result.point("b", 1).nu.tolist() == pytest.approx([0.0, 2 * 0.841345, 0.0])
    # b does nothing: as covered as at nominal; a and c share the variance
    b = result.point("b", 2).coverage.coverage_at(0.682689)
    assert b == pytest.approx(exact(1.0, 0, 0.682689), abs=0.025)
    a = result.point("a", 2).coverage.coverage_at(0.682689)
    edge = Normal(0.0, 1.0).cdf(torch.tensor([2**0.5 - 1.2, -(2**0.5) - 1.2]))
    assert a == pytest.approx(float(edge[0] - edge[1]), abs=0.03)
    assert result.point("a", 0) is result.nominal
    with pytest.raises(ValueError, match=r"averaged, nominal, a −2σ.*got 'a' at \+3 σ"):
        result.point("a", 3)


def test_weights_and_references():
    def weighted(nu, generator):
        z = torch.randn(len(nu), 1, generator=generator) + 2
        weight = torch.rand(len(nu), generator=generator)
        return {"x": torch.zeros(len(nu), 1), "z": z, "weight": weight, "reference": z * 0 + 2}

    head = fp.PosteriorHead(1, fp.Real(1), "diagonal", reference=True)
    result = report(fp.PosteriorModel(None, head), weighted, prior_of(1.0), at=(), events=EVENTS)
    assert result.averaged.coverage.effective_count < 0.8 * EVENTS
    assert result.averaged.coverage.coverage_at(0.9) == pytest.approx(0.9, abs=0.01)


def test_inputs_of_a_cut_sample():
    """A simulator with a trigger gives fewer events than nuisances, and some chunks none."""

    def triggered(nu, generator):
        x, z = simulate(nu, generator)
        keep = x[:, 0] > 0
        return x[keep], z[keep]

    result = report(exact_model(1.0), triggered, prior_of(1.0), at=(), events=800, chunk=1)
    assert 340 < result.averaged.coverage.count < 460


def test_models_are_left_as_they_were():
    encoder = nn.Sequential(nn.Dropout(0.9))
    model = fp.PosteriorModel(encoder, linear([1.0], 2**0.5)).train()
    model.head.eval()
    result = report(model, simulate, prior_of(1.0), at=(), events=4000)
    assert model.training
    assert encoder[0].training
    assert not model.head.flow.training
    assert result.averaged.coverage.coverage_at(0.9) == pytest.approx(0.9, abs=0.02)


def test_any_function_of_x_is_a_model():
    model = exact_model(1.0)
    result = report(lambda x: model(x), simulate, prior_of(1.0), at=(), events=4000)
    assert result.averaged.coverage.kind == "base χ²"

    class Plain:
        """No base and no label space: coverage is HPD."""

        def __init__(self, x):
            self.normal = MultivariateNormal(x, 2 * torch.eye(1))
            self.batch_shape, self.event_shape = self.normal.batch_shape, self.normal.event_shape
            self.space = fp.Real(1)

        def log_prob(self, z):
            return self.normal.log_prob(z)

        def sample(self, shape, generator=None):
            noise = torch.randn((*shape, *self.normal.mean.shape), generator=generator)
            return self.normal.mean + 2**0.5 * noise

        def sample_and_log_prob(self, shape, generator=None):
            z = self.sample(shape, generator)
            return z, self.log_prob(z)

    hpd = report(Plain, simulate, prior_of(1.0), at=(2,), events=6000)
    assert hpd.averaged.coverage.kind == "HPD"
    assert hpd.averaged.coverage.coverage_at(0.9) == pytest.approx(0.9, abs=0.015)
    assert hpd.point("shift", 2).coverage.coverage_at(0.9) == pytest.approx(0.628, abs=0.025)
    assert hpd.nominal.width.item() == pytest.approx(2 * 2**0.5, rel=0.03)


REFUSED = {
    "no prior": ({"prior": Normal(0.0, 1.0)}, "systematics.Nuisances; got Normal"),
    "levels": ({"levels": (68,)}, "levels between 0 and 1"),
    "no levels": ({"levels": ()}, "levels between 0 and 1"),
    "no events": ({"events": 0}, "events as a whole number"),
    "a mask": (
        {"make_events": lambda nu, g: (nu, nu, torch.ones(len(nu)), torch.ones(len(nu), 1))},
        "known labels; got a mask",
    ),
    "signed weights": (
        {"make_events": lambda nu, g: (nu, nu, nu[:, 0])},
        "weights that are not negative",
    ),
    "nothing": ({"make_events": lambda nu, g: (nu[:0], nu[:0])}, "make_events; got none at aver"),
    "no model": ({"model": prior_of(1.0)}, "got Nuisances. The order is report.model, make_ev"),
    "a model as the events": ({"make_events": exact_model(1.0)}, "got PosteriorModel. The order"),
    "a prior as the events": ({"make_events": prior_of(1.0)}, "got Nuisances. The order is"),
    "no generator": (
        {"make_events": lambda nu: (nu, nu)},
        r"called as make_events\(nu, generator\); got one of the arguments \(nu\)",
    ),
    "labels alone": ({"make_events": lambda nu, g: nu}, r"make_events to return inputs and labels"),
    "unequal": ({"make_events": lambda nu, g: (nu[:3], nu)}, "as many inputs as labels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_reports_that_are_refused(name):
    change, message = REFUSED[name]
    given = {"make_events": simulate, "prior": prior_of(1.0), "events": 50, **change}
    with pytest.raises(ValueError, match=message):
        report(**{"model": exact_model(1.0), **given})


def test_one_shift_as_a_number_and_a_progress_bar(capsys):
    result = report(exact_model(1.0), simulate, prior_of(1.0), at=2, events=500, progress=True)
    assert [p.label for p in result.points] == ["averaged", "nominal", "shift +2σ"]
    assert "report: 100%" in capsys.readouterr().err
    report(exact_model(1.0), simulate, prior_of(1.0), at=(), events=10)
    assert capsys.readouterr().err == ""


# --------------------------------------------------------------------------------------- widths


def test_widths_of_every_space():
    space = fp.Product(
        energy=fp.Positive(),
        direction=fp.Sphere(),
        angle=fp.Circle(),
        axis=fp.Circle(vector=True),
        position=fp.Real(2),
    )
    torch.manual_seed(0)
    head = fp.PosteriorHead(4, space, "affine")
    with torch.no_grad():
        head.flow.bias.normal_(0, 0.3)
    q = head(torch.zeros(6, 4))
    width = label_widths(q, 4096)
    names = ["energy", "angle of direction", "angle", "angle of axis", "position[0]", "position[1]"]
    assert list(width) == names
    assert all(w.shape == (6,) for w in width.values())
    low, high = q.interval(0.682689)
    inside = [(high - low)[:, i] for i in (0, 4, 7, 8)]
    for name, expected in zip(["energy", "angle", *names[4:]], inside, strict=True):
        torch.testing.assert_close(width[name], expected, rtol=0.1, atol=0)
    (angle,) = q["direction"].angular_resolution([0.682689])
    torch.testing.assert_close(width["angle of direction"], angle, rtol=0.1, atol=0)
    assert 0 < width["angle of axis"].max() < 2 * math.pi


# --------------------------------------------------------------------- conditioned and marginal


def conditioned(s, prior_std=math.inf):
    """The exact q(z|x, ν) of a normal label prior, from the context (x, ν/s)."""
    gain = 1.0 if math.isinf(prior_std) else prior_std**2 / (prior_std**2 + 1)
    encoder = ConditionedEncoder(None, prior_of(s), context=1, hidden=0)
    return fp.PosteriorModel(encoder, linear([gain, -gain * s], gain**0.5, context=2))


def quantiles(s, count=400):
    """Draws of the prior without noise, (S, 1)."""
    return s * Normal(0.0, 1.0).icdf((torch.arange(count) + 0.5) / count)[:, None]


def test_a_conditioned_head_at_given_nuisances():
    model = conditioned(0.5)
    x = torch.linspace(-3, 3, 7)[:, None]
    q = model(at(x, torch.tensor([1.0])))
    torch.testing.assert_close(q.log_prob(x - 1.2), Normal(x - 1, 1.0).log_prob(x - 1.2)[:, 0])
    result = report(lambda x: model(at(x, torch.tensor([0.0]))), simulate, prior_of(0.5), at=(1,))
    assert result.nominal.coverage.coverage_at(0.9) == pytest.approx(0.9, abs=0.01)


def test_the_marginal_of_a_flat_prior_is_the_wider_normal():
    x = torch.linspace(-3, 3, 50)[:, None]
    q = marginal(conditioned(1.0), x, quantiles(1.0))
    assert isinstance(q, Marginal)
    assert len(q) == 50
    truth = Normal(x, 2**0.5)
    z = x + torch.linspace(-4, 4, 9)[:, None, None]
    torch.testing.assert_close(q.log_prob(z), truth.log_prob(z)[..., 0], rtol=0, atol=0.02)
    torch.testing.assert_close(q.mean, x, rtol=0, atol=0.2)
    torch.testing.assert_close(q.stddev, truth.stddev, rtol=0.12, atol=0)
    torch.testing.assert_close(q.variance, q.stddev**2)
    low, high = q.interval(0.682689, draws=20_000)
    torch.testing.assert_close((high - low).mean(), torch.tensor(2 * 2**0.5), rtol=0.02, atol=0)
    part = q[3:9]
    torch.testing.assert_close(part.log_prob(x[3:9]), q.log_prob(x)[3:9])
    assert "draws=400" in repr(q)


def informative(nu, generator):
    """A label prior that is no wider than the noise, so that x says something of ν."""
    z = torch.randn(len(nu), 1, generator=generator)
    return z + nu + torch.randn(len(nu), 1, generator=generator), z


def nuisance_model(s):
    """The exact p(ν|x) of it."""
    head = fp.PosteriorHead(1, prior_of(s).space, "affine")
    gain = s * s / (2 + s * s)
    plain = linear([gain], (2 * gain) ** 0.5)
    head.load_state_dict(plain.state_dict())
    return fp.PosteriorModel(None, head)


def test_the_marginal_needs_draws_given_the_event():
    s, generator = 1.0, torch.Generator().manual_seed(0)
    model, prior = conditioned(s, prior_std=1.0), prior_of(s)
    x, z = informative(prior.sample(4000, generator), generator)
    truth = Normal(x / 3, (2 / 3) ** 0.5).log_prob(z)[:, 0]
    right = marginal(model, x, nuisance_model(s), draws=256)
    with torch.no_grad():
        gap = truth - right.log_prob(z)
    assert gap.mean() == pytest.approx(0.0, abs=0.01)
    assert gap.std() < 0.15
    assert hpd_coverage(right[:1000], z[:1000], 100, generator=generator).ks_pvalue > 0.01
    u, log_prob = right.to_base_and_log_prob(z)
    torch.testing.assert_close(log_prob, right.log_prob(z))
    assert fp.coverage(u.detach()).ks_pvalue > 0.01
    # draws of the prior are wrong where x says something of ν
    wrong = marginal(model, x, quantiles(s, 64))
    assert (truth - wrong.log_prob(z)).mean() > 0.05


def test_report_of_a_marginal():
    both = MarginalModel(conditioned(1.0), quantiles(1.0, 64))
    options = {"at": (2,), "events": 10_000, "draws": 64}
    result = report(both, simulate, prior_of(1.0), without=exact_model(0.0), **options)
    assert result.averaged.coverage.kind == "base χ²"
    for point in result.points[1:]:
        for level in result.levels:
            held = point.coverage.coverage_at(level)
            assert held == pytest.approx(exact(1.0, point.sigmas, level), abs=0.02)
    assert result.price.nominal_width.tolist() == pytest.approx([2**0.5], rel=0.05)


def test_base_coordinate_of_a_marginal():
    """That of N(x, 2), also far out, where one component has all the density."""
    x, off = torch.zeros(9, 1), torch.linspace(-12, 12, 9)[:, None]
    q = marginal(conditioned(1.0), x, quantiles(1.0))
    u, _ = q.to_base_and_log_prob(off)
    inner = off.abs() <= 6
    torch.testing.assert_close(u[inner], off[inner] / 2**0.5, rtol=0.03, atol=1e-3)
    assert torch.isfinite(u).all()
    assert (u.diff(dim=0) > 0).all()
    torch.testing.assert_close(
        q.cdf(off)[2:7], Normal(0.0, 2**0.5).cdf(off)[2:7, 0], rtol=0.05, atol=1e-4
    )


def test_marginal_of_several_labels(monkeypatch):
    """No base: the report takes highest-density regions, and they cover."""

    def pair(nu, generator):
        z = 20 * torch.randn(len(nu), 2, generator=generator)
        return z + nu + torch.randn(len(nu), 2, generator=generator), z

    head = fp.PosteriorHead(3, fp.Real(2), "affine")
    with torch.no_grad():
        head.flow.weight.zero_()
        head.flow.bias.zero_()
        head.flow.weight[:2] = torch.tensor([[1.0, 0.0, -1.0], [0.0, 1.0, -1.0]])
    encoder = ConditionedEncoder(None, prior_of(1.0), context=2, hidden=0)
    both = MarginalModel(fp.PosteriorModel(encoder, head), quantiles(1.0, 32))
    result = report(both, pair, prior_of(1.0), at=(2,), events=3000, draws=64)
    assert result.averaged.coverage.kind == "HPD"
    for level in result.levels:
        held = result.averaged.coverage.coverage_at(level)
        assert held == pytest.approx(level, abs=4 * result.averaged.error(level))
    assert result.under_covered()[-1].label == "shift +2σ"
    # each density is that of a mixture: fewer of them unless asked for
    monkeypatch.setattr(importlib.import_module("flowpost.systematics.report"), "_SLOW_EVENTS", 40)
    few = report(both, pair, prior_of(1.0), at=())
    assert few.averaged.coverage.count == 40
    assert "events: 40 at each point, for the densities are mixtures; events= for" in str(few)
    assert "mixtures" not in str(result)
    q = both(torch.zeros(2, 2))
    assert not q.has_base
    with pytest.raises(ValueError, match="a single label on a line; this is Real"):
        q.cdf(torch.zeros(2, 2))


def test_draws_of_a_marginal():
    q = marginal(conditioned(1.0), torch.zeros(3, 1), quantiles(1.0))
    generator = torch.Generator().manual_seed(0)
    z, log_prob = q.sample_and_log_prob((5000, 2), generator=generator)
    assert z.shape == (5000, 2, 3, 1)
    assert log_prob.shape == (5000, 2, 3)
    torch.testing.assert_close(z.std((0, 1))[:, 0], torch.full((3,), 2**0.5), rtol=0.03, atol=0)
    again = q.sample((5000, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(z, again)
    assert q.sample().shape == (3, 1)
    entropy = -log_prob.mean((0, 1))
    torch.testing.assert_close(
        entropy, torch.full((3,), 0.5 * math.log(4 * math.pi * math.e)), rtol=0.01, atol=0
    )


@pytest.mark.parametrize("form", ["tensor", "tuple", "dict"])
def test_forms_of_inputs(form):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(2, 3)

        def forward(self, x, lengths=None):
            return self.layer(x)

    torch.manual_seed(0)
    prior = Nuisances(a=Normal(1.0, 0.1), b=Uniform(1.0, 3.0))
    encoder = ConditionedEncoder(Net(), prior, context=3)
    with torch.no_grad():
        encoder.mix[-1].weight.normal_()
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(5, fp.Real(1), "diagonal"))
    with torch.no_grad():
        model.head.flow.weight.normal_(0, 0.3)
    x, lengths, nu = torch.randn(4, 2), torch.ones(4, dtype=torch.int64), prior.sample(4, seed=0)
    given = {"tensor": x, "tuple": (x, lengths), "dict": {"x": x, "lengths": lengths}}[form]
    told = at(given, nu)
    q, z = model(told), torch.zeros(4, 1)
    standard = (nu - prior.nominal) / prior.stddev
    torch.testing.assert_close(model.encode(told)[:, 3:], standard)
    mixed = marginal(model, given, nu[None])
    torch.testing.assert_close(mixed.log_prob(z), q.log_prob(z))
    # nuisances change more than an offset
    moved = model(at(given, nu + prior.stddev))
    assert (moved.stddev / q.stddev).std() > 1e-3


def test_a_conditioned_model_is_saved(tmp_path):
    def build():
        return ConditionedEncoder(fp.encoders.Tabular(2, 3, hidden=4), prior_of(0.5), context=3)

    model = fp.PosteriorModel(build(), fp.PosteriorHead(4, fp.Real(1), "diagonal")).eval()
    fp.save(model, tmp_path / "model")
    loaded = fp.load(tmp_path / "model", encoder=build())
    x = at(torch.ones(2, 2), torch.tensor([0.3]))
    assert torch.equal(model(x).log_prob(torch.zeros(2, 1)), loaded(x).log_prob(torch.zeros(2, 1)))


@pytest.mark.parametrize("device", ["cpu", ACCELERATOR])
def test_devices(device):
    model = exact_model(1.0).to(device)
    options = {"at": (2,), "events": 2000, "draws": 32}
    here = report(model, simulate, prior_of(1.0), without=exact_model(0.0).to(device), **options)
    there = report(exact_model(1.0), simulate, prior_of(1.0), **options)
    for a, b in zip(here.points, there.points, strict=True):
        assert a.coverage.coverage_at(0.9) == pytest.approx(b.coverage.coverage_at(0.9), abs=1e-3)
        assert a.coverage.nll == pytest.approx(b.coverage.nll, abs=1e-5)
    both = MarginalModel(conditioned(1.0), nuisance_model(1.0), draws=16).to(device)
    assert report(both, simulate, prior_of(1.0), **options).nominal.coverage.count == 2000
    q = both(torch.zeros(4, 1, device=device))
    assert q[q.mean[:, 0] < 9].sample((2,)).device.type == device
    assert prior_of(1.0).sample(3, torch.Generator(device)).device.type == device


def test_double_precision():
    prior = Nuisances(shift=Normal(torch.tensor(0.0).double(), 1.0))
    assert prior.sample(3, seed=0).dtype == torch.float64
    model = conditioned(1.0).double()
    q = marginal(model, torch.zeros(3, 1).double(), prior.sample(8, seed=0))
    assert q.log_prob(torch.zeros(3, 1).double()).dtype == torch.float64


def several(events=6, later=False):
    """A `Marginal` over 8 draws, of an energy and a position or an angle that leads them."""
    torch.manual_seed(3)
    angle = {"angle": fp.Circle()} if later else {}
    space = fp.Product(energy=fp.Positive(), position=fp.Real(2), **angle)
    encoder = ConditionedEncoder(fp.encoders.Tabular(3, 4, hidden=4), prior_of(1.0), context=4)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(5, space, "affine")).eval()
    with torch.no_grad():
        encoder.mix[-1].weight.normal_()
        model.head.flow.weight.normal_(0, 0.3)
    nu = torch.randn(8, 1)
    return marginal(model, torch.randn(events, 3), nu), model, nu


def test_what_a_marginal_has():
    q, _, _ = several()
    z = q.sample((4000,), torch.Generator().manual_seed(0))
    assert z.shape == (4000, 6, 3)
    below = (z < q.median).double().mean(0)
    assert (below - 0.5).abs().max() < 0.07
    assert torch.equal(q.median, q.quantile([0.5])[0])
    assert q.quantile([0.1, 0.5, 0.9]).shape == (3, 6, 3)
    entropy = -q.log_prob(z[:1000]).mean(0)
    torch.testing.assert_close(q.entropy(2000), entropy, rtol=0, atol=0.2)
    assert q.support.check(z).all()
    for refused in (lambda: q.mode, lambda: q.icdf(z[0]), q.rsample):
        with pytest.raises(ValueError, match=r"A Marginal is a mixture.*It has log_prob, sample"):
            refused()
    for name in ("summary", "from_base", "credibility", "angular_resolution"):
        with pytest.raises(AttributeError, match=f"mixture over nuisances and has no {name}. It h"):
            getattr(q, name)
    with pytest.raises(AttributeError, match="has no attribute 'colour'"):
        q.colour  # noqa: B018
    with pytest.raises(ValueError, match=r"base coordinates: use diagnostics.hpd_cov"):
        q.to_base(z[0])
    line = marginal(conditioned(1.0), torch.zeros(4, 1), quantiles(1.0, 50))
    at_two = torch.full((4, 1), 2.0)
    assert torch.equal(line.to_base(at_two), line.to_base_and_log_prob(at_two)[0])


def test_one_event_of_a_marginal():
    q, _, _ = several()
    one, z = q[2], q.sample((7,), torch.Generator().manual_seed(0))
    assert one.batch_shape == ()
    assert q[2:3].batch_shape == (1,)
    assert q[torch.tensor(2)].batch_shape == ()
    torch.testing.assert_close(one.log_prob(z[:, 2]), q.log_prob(z)[:, 2])
    assert one.log_prob(z[0, 2]).shape == ()
    assert one.sample().shape == (3,)
    assert one.sample((5, 2)).shape == (5, 2, 3)
    assert one.mean.shape == one.stddev.shape == one.median.shape == (3,)
    assert one.quantile([0.2, 0.8]).shape == (2, 3)
    assert one.entropy(16).shape == ()
    for refused, text in ((lambda: one[0], "no batch to index"), (lambda: len(one), "no length")):
        with pytest.raises((IndexError, TypeError), match=text):
            refused()
    many = one.expand((4,))
    assert many.batch_shape == (4,)
    torch.testing.assert_close(many.log_prob(z[:4, 2]), one.log_prob(z[:4, 2]))
    assert hpd_coverage(one, z[:, 2], 16).count == 7
    with pytest.raises(ValueError, match="Expected one event and a shape"):
        q.expand((4, 6))
    line = marginal(conditioned(1.0), torch.zeros(4, 1), quantiles(1.0, 50))[1]
    assert line.cdf(torch.tensor(0.0)).item() == pytest.approx(0.5, abs=0.01)
    assert line.log_prob(torch.zeros(5)).shape == (5,)


@pytest.mark.parametrize("name", ["energy", "position", "angle"])
def test_a_block_of_a_marginal(name):
    """The mixture of the blocks of its components."""
    q, model, nu = several(later=True)
    block, z = q[name], q.sample((300,), torch.Generator().manual_seed(0))
    columns = {"energy": [0], "position": [1, 2], "angle": [3]}[name]
    assert block.event_shape == (len(columns),)
    drawn = block.sample((300,), torch.Generator().manual_seed(0))
    assert drawn.shape == (300, 6, len(columns))
    assert block.mean.shape == block.stddev.shape == (6, len(columns))
    if name != "angle":
        share = (z[..., columns] < block.quantile([0.2, 0.5, 0.8])[:, None]).double().mean(1)
        wanted = torch.tensor([0.2, 0.5, 0.8]).double()[:, None, None].expand_as(share)
        torch.testing.assert_close(share, wanted, rtol=0, atol=0.12)
    x = q._context
    parts = [
        model.head(model.encoder.append(x, one.expand(6, 1)))[name].log_prob(drawn[:3])
        for one in nu
    ]
    expected = torch.stack(parts).logsumexp(0) - math.log(len(nu))
    torch.testing.assert_close(block.log_prob(drawn[:3]), expected)
    assert not block.has_base
    assert block[1].batch_shape == q[1][name].batch_shape == ()
    with pytest.raises(ValueError, match=r"the name of a block; got 'colour'. Blocks are"):
        q["colour"]


def test_the_leading_block_of_a_marginal_has_a_base_coordinate():
    q = several()[0]
    assert q["energy"].has_base
    assert not q["position"].has_base
    drawn = q["energy"].sample((400,), torch.Generator().manual_seed(0))
    u = q["energy"].to_base(drawn)
    assert u.mean().item() == pytest.approx(0.0, abs=0.1)
    assert u.std().item() == pytest.approx(1.0, abs=0.1)


def test_marginal_of_no_events():
    q, model, nu = several()
    for none in (q[:0], marginal(model, torch.zeros(0, 3), nu)):
        assert none.batch_shape == (0,)
        assert none.sample((4,)).shape == (4, 0, 3)
        assert none.log_prob(torch.ones(0, 3)).shape == (0,)
        assert none.mean.shape == none.stddev.shape == none.median.shape == (0, 3)
        assert none.quantile([0.1, 0.9]).shape == (2, 0, 3)
        assert none["energy"].mean.shape == (0, 1)


def test_corner_of_a_marginal():
    import matplotlib.pyplot as plt

    q = several()[0]
    z = q.sample()
    whole = fp.plots.plot_corner(q, z, event=1, draws=2000)
    one = fp.plots.plot_corner(q[1], z[1], draws=2000)
    assert whole.shape == one.shape == (3, 3)
    assert fp.plots.plot_corner(q[1]["position"], z[1, 1:], draws=2000).shape == (2, 2)
    plt.close("all")


def test_a_model_of_other_nuisances_is_refused():
    prior = Nuisances(light=Normal(1.0, 0.1), noise=Normal(0.0, 1.0))
    encoder = ConditionedEncoder(fp.encoders.Tabular(3, 4), prior, context=4)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(6, fp.Real(1))).eval()

    def infer(space):
        return fp.PosteriorModel(fp.encoders.Tabular(3, 4), fp.PosteriorHead(4, space)).eval()

    assert marginal(model, torch.zeros(2, 3), infer(prior.space), draws=4).batch_shape == (2,)
    other = fp.Product(noise=fp.Real(), light=fp.Real())
    for space, got in ((fp.Real(2), r"z\[0\], z\[1\]"), (other, "noise, light")):
        text = f"model of the nuisances light, noise; got one of {got}. Build its head with the pri"
        for build in (
            lambda: marginal(model, torch.zeros(2, 3), infer(space)),  # noqa: B023
            lambda: MarginalModel(model, infer(space)),  # noqa: B023
        ):
            with pytest.raises(ValueError, match=text):
                build()
    with pytest.raises(ValueError, match=r"nuisances of shape \(S, 2\)"):
        MarginalModel(model, torch.zeros(5, 3))
    with pytest.raises(ValueError, match="with a ConditionedEncoder; got Tabular"):
        MarginalModel(infer(fp.Real(1)), infer(prior.space))
    # where only their number is known, any do
    unnamed = ConditionedEncoder(fp.encoders.Tabular(3, 4), 2, context=4)
    model = fp.PosteriorModel(unnamed, fp.PosteriorHead(6, fp.Real(1))).eval()
    assert marginal(model, torch.zeros(2, 3), infer(fp.Real(2)), draws=4).batch_shape == (2,)


MODEL = conditioned(1.0)
WRONG = {
    "not conditioned": (
        lambda: marginal(exact_model(1.0), torch.zeros(3, 1), quantiles(1.0)),
        "with a ConditionedEncoder; got NoneType",
    ),
    "other nuisances": (
        lambda: marginal(MODEL, torch.zeros(3, 1), torch.zeros(5, 2)),
        r"nu of shape \(S, 3, 1\), or \(S, 1\) for all events alike; got \(5, 3, 2\)",
    ),
    "no draws": (lambda: marginal(MODEL, torch.zeros(3, 1), torch.zeros(0, 1)), "nu of shape"),
    "draws that are not finite": (
        lambda: marginal(MODEL, torch.zeros(3, 1), torch.full((2, 1), math.nan)),
        "finite nu",
    ),
    "inputs alone": (lambda: MODEL(torch.zeros(3, 1)), r"systematics.at\(x, nu\)"),
    "nuisances of other events": (lambda: at(torch.zeros(3, 1), torch.zeros(2, 1)), r"nu of shape"),
    "nuisances that are not finite": (
        lambda: at(torch.zeros(3, 1), torch.tensor([math.nan])),
        "finite nu; got nan",
    ),
    "labels of other events": (
        lambda: marginal(MODEL, torch.zeros(3, 1), quantiles(1.0)).log_prob(torch.zeros(2, 1)),
        r"labels of shape \(..., 3, 1\) for Marginal\(batch_shape=\(3,\).*got \(2, 1\)",
    ),
    "labels of more columns": (
        lambda: marginal(MODEL, torch.zeros(3, 1), quantiles(1.0)).log_prob(torch.zeros(3, 2)),
        r"labels of shape",
    ),
    "inputs of several lengths": (
        lambda: at((torch.zeros(3, 1), torch.zeros(2)), torch.zeros(3, 1)),
        "inputs of as many events each",
    ),
    "other context": (
        lambda: ConditionedEncoder(nn.Linear(2, 4), prior_of(1.0), context=3)(
            torch.zeros(5, 2), torch.zeros(5, 1)
        ),
        r"the encoder's context of shape \(N, 3\); got \(5, 4\)",
    ),
    "other number": (
        lambda: ConditionedEncoder(None, 2, context=1)(torch.zeros(5, 1), torch.zeros(5, 1)),
        r"nu of shape \(5, 2\); got \(5, 1\)",
    ),
    "a level": (
        lambda: marginal(MODEL, torch.zeros(3, 1), quantiles(1.0)).interval(68),
        "level between 0 and 1",
    ),
    "levels": (
        lambda: marginal(MODEL, torch.zeros(3, 1), quantiles(1.0)).quantile([0.5, 1.0]),
        "levels between 0 and 1",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_conditioned_models_that_are_refused(name):
    build, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        build()


# ----------------------------------------------------------------------------------------- plots


def test_plot(found):
    import matplotlib.pyplot as plt

    ax = found.plot()
    assert len(ax.figure.axes) == 2
    assert ax.get_ylabel() == "coverage [%]"
    assert [t.get_text() for t in ax.get_xticklabels()] == ["−2", "−1", "0", "+1", "+2", "prior"]
    line = ax.containers[0][0]
    held = [100 * p.coverage.coverage_at(0.682689) for p in found.points]
    drawn = line.get_ydata().tolist()
    assert drawn == pytest.approx([held[2], held[3], held[1], held[4], held[5]])
    (own,) = plt.subplots()[1:]
    assert found.plot(own, level=0.9) is own
    assert "90 %" in own.get_title()
    assert len(found.plot(level=0.9).figure.axes) == 1
    with pytest.raises(ValueError, match=r"levels 0.682689, 0.9; got 0.5"):
        found.plot(level=0.5)
    plt.close("all")


def test_a_nominal_value_at_the_edge_is_joined_to_no_line():
    import matplotlib.pyplot as plt

    prior = Nuisances(a=Normal(0.0, 1.0), b=(Uniform(1.0, 3.0), 1.0))
    result = report(exact_model(1.0), simulate, prior, events=500)
    _, ax = plt.subplots()
    result.plot(ax)
    # no line passes the nominal point by: two lines, and the point between them
    assert [len(c[0].get_xdata()) for c in ax.containers] == [5, 2, 1, 2, 1]
    assert ax.containers[2][0].get_xdata()[0] == pytest.approx(0.03)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == [
        "a", "b (nominal at the edge of its prior)", "averaged over the prior"
    ]  # fmt: skip
    assert "±σ are quantiles of the prior" in ax.get_xlabel()
    assert result.at_edge == ("b",)
    assert "b: nominal at the edge of its prior; ±σ are quantiles of the prior" in str(result)
    inside = report(exact_model(1.0), simulate, Nuisances(a=Normal(0.0, 1.0)), events=500)
    assert inside.at_edge == ()
    assert "edge" not in str(inside)
    plt.close("all")
