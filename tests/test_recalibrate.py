"""Recalibrated posteriors: exact densities, draws, blocks; right coverage; as saved, so loaded."""

import functools
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from saved import rewrite, rewrite_tensors
from scipy import integrate, stats
from torch import nn

import flowpost as fp
from benchmarks.sphere_targets import place, vmf_deficit
from flowpost.calibration import Recalibrator
from flowpost.calibration.flow import rings_of
from flowpost.calibration.knots import KNOTS, line_map, radial_map
from flowpost.calibration.monotone import Knots, Monotone, stacked
from flowpost.calibration.radial import (
    MARGINAL_KNOTS,
    each,
    log_volume,
    marginal,
    only,
    stretch,
)

SPACES = {
    "line": fp.Real(1),
    "vector": fp.Real(3),
    "positive": fp.Positive(),
    "product": fp.Product(e=fp.Positive(), x=fp.Real(2), y=fp.Interval(0, 1)),
    "circle": fp.Circle(),
    "sphere": fp.Sphere(),
    "mixed": fp.Product(e=fp.Positive(), direction=fp.Sphere(), a=fp.Circle()),
}
KINDS = {
    "radial": {},
    "coordinates": {"radial": False, "coordinates": True},
    "both": {"coordinates": True},
}


def model_of(space, context=2, seed=0, flow="spline"):
    """A head of random weights."""
    torch.manual_seed(seed)
    head = fp.PosteriorHead(context, space, flow, hidden=8).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
        if head.flow.waited is not None:
            head.flow.waited += 2
    return fp.PosteriorModel(None, head).eval()


def wrong(n, d, seed):
    """Base coordinates of a head that is too narrow, biased in one direction and heavy-tailed."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.randn(n, d, generator=generator, dtype=torch.float64)
    wide = 1.2 + 0.6 * torch.rand(n, 1, generator=generator, dtype=torch.float64)
    u = wide * u
    u[:, 0] += 0.4
    return u


def events(model, n, seed=1):
    x = torch.randn(n, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    with torch.no_grad():
        q = model(x)
        return x, q.from_base(wrong(n, q.dof, seed + 1))


def gaussian(d=2, width=1.0, bias=0.0):
    """The exact head of z ~ N(0, I), x = z + N(0, ¼ I), made narrow or biased in units of σ."""
    head = fp.PosteriorHead(d, fp.Real(d), flow="diagonal")
    sigma = math.sqrt(0.2)
    with torch.no_grad():
        head.flow.weight[:d] = 0.8 * torch.eye(d)
        head.flow.bias[:d] = bias * sigma
        head.flow.bias[d : 2 * d] = math.log(width * sigma)
    return fp.PosteriorModel(None, head).eval()


def measured(n, d=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator)
    return z + 0.5 * torch.randn(n, d, generator=generator), z


@functools.cache
def case(name):
    model = model_of(SPACES[name])
    return model, events(model, 2000)


# fast: every space with both maps, and each map alone on some
ALONE = {
    ("vector", "coordinates"), ("product", "radial"), ("sphere", "radial"),
    ("sphere", "coordinates"), ("mixed", "coordinates"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(n, k, marks=() if k == "both" or (n, k) in ALONE else pytest.mark.slow)
        for n in SPACES
        for k in KINDS
    ],
)
def test_is_a_posterior_on_any_space(name, kind):
    model, (x, z) = case(name)
    free = model.head.space.compact_dof
    recalibrated = Recalibrator(model, **KINDS[kind]).fit(x, z)
    assert recalibrated.gain.item() > 0.05
    new_x, new_z = events(model, 2500, seed=11)
    q, old = recalibrated(new_x), model(new_x)
    assert (q.batch_shape, q.event_shape, q.dof) == (old.batch_shape, old.event_shape, old.dof)
    u = q.to_base(new_z)
    if kind != "coordinates" or q.dof == 1:
        assert fp.coverage(u).ks_statistic < 0.05 < fp.coverage(old.to_base(new_z)).ks_statistic
    if kind != "radial":
        assert u[:, free:].numel() == 0 or u[:, free:].mean(0).abs().max() < 0.1
    some = q[:40]
    assert torch.allclose(some.from_base(u[:40]), new_z[:40], atol=1e-8)
    # ln |det ∂u′/∂u| by automatic differentiation
    first = old[:1]

    def base(v):
        return q[:1].to_base(first.from_base(v[None]))[0]

    for v in wrong(2, q.dof, 5):
        jacobian = torch.autograd.functional.jacobian(base, v)
        label = first.from_base(v[None])
        expected = first.log_prob(label) + (v.square() - base(v).square()).sum() / 2
        expected = expected + torch.linalg.slogdet(jacobian)[1]
        assert torch.allclose(q[:1].log_prob(label), expected, atol=1e-7)
    draws, log_q = q[:50].sample_and_log_prob((10,), torch.Generator().manual_seed(0))
    # but for labels that rounding puts at the edge of an interval
    assert (q[:50].log_prob(draws) - log_q).abs().quantile(0.9) < 1e-6
    assert model.head.space.contains(draws).all()


def test_every_block_is_covered_by_itself():
    """Directions too narrow, angles and energies too wide: the radius of all is about right."""
    model = model_of(SPACES["mixed"])

    def sampled(n, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(n, 2, generator=generator, dtype=torch.float64)
        u = torch.randn(n, 4, generator=generator, dtype=torch.float64)
        with torch.no_grad():
            return x, model(x).from_base(u * torch.tensor([1.4, 1.4, 0.7, 0.6]).double())

    x, z = sampled(4000, 3)
    whole, parts = (Recalibrator(model, coordinates=c).fit(x, z) for c in (False, True))
    x, z = sampled(4000, 4)
    direction = z[:, 1:4]
    assert fp.coverage(whole(x)["direction"].to_base(direction)).ks_statistic > 0.1
    assert fp.coverage(parts(x)["direction"].to_base(direction)).ks_statistic < 0.04
    u = parts(x).to_base(z)
    for block in (slice(0, 2), slice(2, 3), slice(3, 4), slice(0, 4)):
        assert fp.coverage(u[:, block]).ks_statistic < 0.04


@pytest.mark.parametrize("name", ["sphere", "circle", "mixed"])
def test_density_goes_on_smoothly_at_the_antipode(name):
    """There the base is infinite: the density before has a factor that no longer changes."""
    model = model_of(SPACES[name])
    recalibrated = Recalibrator(model, coordinates=True).fit(*events(model, 1000))
    q = recalibrated(torch.randn(1, 2, dtype=torch.float64))
    for ring in rings_of(model.head.space):
        own = (..., ring)
        u = torch.randn(50, 1, q.dof, dtype=torch.float64)
        factors = []
        for far in (10.0, 11.0, 12.0, 30.0):
            u[own] = far * torch.nn.functional.normalize(u[own], dim=-1)
            v, ladj = each(u, q._flow.coordinates, q._flow.place, rings_of(q._flow.space))
            v, more = stretch(v, q._flow.radius, q._flow.place, q._flow._ends)
            factors.append((ladj + more).sum(-1) + (u.square() - v.square()).sum(-1) / 2)
            assert torch.allclose(
                torch.nn.functional.normalize(v[own], dim=-1),
                torch.nn.functional.normalize(u[own], dim=-1),
            )
        factors = torch.stack(factors)
        assert (factors - factors[-1]).abs().max() < 0.2, factors[:, :3]


@pytest.mark.parametrize("sigma", [0.3, 0.6])
def test_far_too_narrow_directions_have_no_second_peak(sigma):
    """Truth and head share their axis, so that the map of the radius makes one the other."""
    head = fp.PosteriorHead(0, fp.Sphere(), flow="diagonal")
    generator = torch.Generator().manual_seed(0)
    kappa = torch.full((20_000,), sigma**-2, dtype=torch.float64)
    axis = torch.nn.functional.normalize(torch.tensor([[0.3, 0.4, 1.0]]).double(), dim=-1)
    azimuth = 2 * math.pi * torch.rand(20_000, generator=generator, dtype=torch.float64)
    z = place(axis.expand(20_000, 3), vmf_deficit(kappa, generator), azimuth)
    head.fit_scale(z)
    with torch.no_grad():
        head.flow.bias[head.space.location_size] += math.log(0.3)
    recalibrated = Recalibrator(head).fit(None, z[:3000].float())
    fresh = z[3000:]
    q = recalibrated(None)
    log_norm = math.log(kappa[0] / (2 * math.pi)) - math.log(-math.expm1(-2 * kappa[0]))
    log_true = log_norm - kappa[0] * ((fresh - axis) ** 2).sum(-1) / 2
    assert (log_true - q.log_prob(fresh.float()).double()).mean() < 0.02
    behind = place(
        -axis.expand(1000, 3),
        2 * torch.logspace(-12, -1, 1000, dtype=torch.float64),
        azimuth[:1000],
    )
    assert q.log_prob(behind.float()).max() < log_norm - 0.5 * kappa[0]


@pytest.mark.parametrize("kind", KINDS)
def test_density_is_normalised(kind):
    model = model_of(fp.Real(2), seed=3)
    recalibrated = Recalibrator(model, **KINDS[kind]).fit(*events(model, 2000))
    q = recalibrated(torch.randn(1, 2, dtype=torch.float64))
    draws = q.sample((4000,))[:, 0]
    low, high = draws.amin(0), draws.amax(0)
    low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    axes = [torch.linspace(a, b, 241, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    grid = torch.cartesian_prod(*axes)
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    with torch.no_grad():
        density = q.log_prob(grid[:, None]).exp().reshape(241, 241)
    assert abs(float(density.sum()) * cell - 1) < 5e-3
    # draws follow it
    share = float(density[:, :120].sum()) * cell
    counted = float((draws[:, 1] < axes[1][119] + (axes[1][1] - axes[1][0]) / 2).double().mean())
    assert abs(share - counted) < 4 * 0.5 / 4000**0.5


@pytest.mark.parametrize("space", ["circle", "sphere"])
def test_compact_density_is_normalised(space):
    """The mean of the ratio to the density before is one: a sum over a grid of the old base."""
    model = model_of(SPACES[space], seed=4)
    recalibrated = Recalibrator(model, coordinates=True).fit(*events(model, 2000))
    x = torch.randn(1, 2, dtype=torch.float64)
    q, old = recalibrated(x), model(x)
    n, d = (2000, 1) if space == "circle" else (120, 2)
    line = 17 * ((torch.arange(n, dtype=torch.float64) + 0.5) / n - 0.5)
    u = torch.cartesian_prod(*[line] * d).reshape(-1, 1, d)
    with torch.no_grad():
        z = old.from_base(u)
        ratio = (q.log_prob(z) - old.log_prob(z)).exp()[:, 0]
    share = (-u.square().sum((-1, -2)) / 2).exp() * (17 / n / math.sqrt(2 * math.pi)) ** d
    assert abs(float((share * ratio).sum()) - 1) < 2e-3
    assert (ratio - 1).abs().quantile(0.5) > 0.01


def test_shapes_and_precisions():
    """Any batch of events, in single precision as in double."""
    model = model_of(SPACES["mixed"])
    x, z = events(model, 1000)
    recalibrated = Recalibrator(model, coordinates=True).fit(x, z)
    q, many = recalibrated(x[:12]), recalibrated(x[:12].reshape(3, 4, 2))
    z = z[:12]
    assert many.batch_shape == (3, 4)
    assert torch.allclose(many.log_prob(z.reshape(3, 4, -1)).reshape(-1), q.log_prob(z))
    assert many.sample((5,)).shape == (5, 3, 4, z.shape[-1])
    assert many[1:, 2]["direction"].log_prob(z.reshape(3, 4, -1)[1:, 2, 1:4]).shape == (2,)
    single = q.to(torch.float32)
    assert single.sample().dtype == torch.float32
    assert torch.allclose(single.log_prob(z.float()).double(), q.log_prob(z), atol=1e-3)
    low = Recalibrator(model.float(), coordinates=True).fit(x.float(), events(model, 1000)[1])
    assert low(x[:12].float()).to_base(z.float()).dtype == torch.float32
    # without events: one label, or many, of the same density
    head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
    alone = Recalibrator(head).fit(None, 2 * torch.randn(1000, 2))(None)
    labels = torch.randn(6, 2)
    assert torch.allclose(alone.log_prob(labels)[3], alone.log_prob(labels[3]))
    u, log_q = alone.to_base_and_log_prob(labels)
    assert u.shape == (6, 2)
    assert torch.allclose(log_q, alone.log_prob(labels))


def test_labels_that_no_smooth_map_repairs_are_told_of():
    coarse = (2 * torch.randn(2000, 1)).round() / 2
    with pytest.warns(UserWarning, match="Are labels rounded"):
        Recalibrator(fp.PosteriorHead(0, fp.Real(1), flow="diagonal")).fit(None, coarse)


def test_one_label_has_its_distribution_function():
    model = model_of(fp.Positive(), seed=1)
    recalibrated = Recalibrator(model, coordinates=True).fit(*events(model, 1000))
    q = recalibrated(torch.randn(3, 2, dtype=torch.float64))
    levels = torch.linspace(0.01, 0.99, 9, dtype=torch.float64)[:, None].expand(-1, 3)
    z = q.icdf(levels)
    assert torch.allclose(q.cdf(z), levels, atol=1e-9)
    step = 1e-6 * z
    slope = (q.cdf(z + step) - q.cdf(z - step)) / (2 * step[..., 0])
    assert torch.allclose(slope, q.log_prob(z).exp(), rtol=1e-5)
    assert torch.allclose(q.quantile([0.5])[0], q.median)


@pytest.mark.parametrize("width", [0.7, 1.4])
@pytest.mark.parametrize("d", [1, 2, 6])
def test_a_factor_of_the_width_is_found(d, width):
    model = gaussian(d, width)
    recalibrated = Recalibrator(model).fit(*measured(5000, d))
    x, z = measured(20_000, d, seed=1)
    u, log_q = recalibrated(x).to_base_and_log_prob(z)
    assert fp.coverage(u).ks_statistic < 0.024
    exact = gaussian(d)(x).log_prob(z).mean()
    assert abs(exact - log_q.mean()) < 0.01
    assert torch.allclose(recalibrated.gain.float(), log_q.mean() - model(x).log_prob(z).mean(),
                          atol=0.05)  # fmt: skip


def test_a_calibrated_head_is_left_alone():
    x, z = measured(20_000, seed=1)
    exact = gaussian()(x).log_prob(z).mean()
    for seed in range(3):
        recalibrated = Recalibrator(gaussian(), coordinates=True).fit(
            *measured(2000, seed=seed + 2)
        )
        assert abs(recalibrated.gain) < 0.005
        assert (exact - recalibrated(x).log_prob(z).mean()) < 0.005


def test_bias_needs_the_coordinates():
    x, z = measured(20_000, seed=1)
    radial, both = (
        Recalibrator(gaussian(bias=0.5), coordinates=c).fit(*measured(5000)) for c in (False, True)
    )
    for recalibrated in (radial, both):
        assert fp.coverage(recalibrated(x).to_base(z)).ks_statistic < 0.024
    assert both(x).to_base(z).mean(0).abs().max() < 0.05
    assert radial(x).to_base(z).mean(0).abs().max() > 0.3
    exact = gaussian()(x).log_prob(z).mean()
    assert exact - both(x).log_prob(z).mean() < 0.005
    assert exact - radial(x).log_prob(z).mean() > 0.1


# ------------------------------------------------------------------------------ maps


def test_maps_agree_with_their_definition():
    """Each knot is met, the slope is that of finite differences, and the inverse inverts."""
    knots = Knots(*(torch.tensor(v).double() for v in (
        [-1.0, 0.0, 0.2, 3.0], [-4.0, -3.9, 1.0, 1.5], [0.3, 2.0, 5.0, 0.1])))  # fmt: skip
    maps = Monotone(
        stacked([[knots, knots], [Knots(knots.x, 2 * knots.y, 2 * knots.slope)] * 2], 16)
    )
    place = torch.tensor([0, 1, 1])
    v = torch.linspace(-4, 9, 500, dtype=torch.float64)[:, None, None].expand(-1, 3, 2)
    y, log_slope = maps(v, place)
    assert (y.diff(dim=0) > 0).all()
    assert torch.allclose(2 * y[:, 0], y[:, 1])
    h = 1e-6
    slope = (maps(v + h, place)[0] - maps(v - h, place)[0]) / (2 * h)
    assert torch.allclose(slope.log(), log_slope, atol=1e-5)
    back, same = maps.inverse(y, place)
    assert torch.allclose(back, v, atol=1e-9)
    assert torch.allclose(same, log_slope, atol=1e-8)
    at, _ = maps(knots.x[:, None, None].expand(-1, 3, 2), place)
    assert torch.allclose(at[:, 0, 0], knots.y)
    # as far away as floats go, and with gradients there
    far = torch.tensor([[-1e30, 1e30]], requires_grad=True)
    y, log_slope = maps(far, torch.tensor([0]))
    (slope,) = torch.autograd.grad(y.sum() + log_slope.sum(), far)
    assert torch.allclose(slope, torch.tensor([[0.3, 0.1]]))


def map_of(values, dof=None, compact=False, weight=None):
    values = values.numpy()
    weight = np.ones(len(values)) if weight is None else weight
    order = np.random.default_rng(0).permutation(len(values))
    if dof is None:
        return line_map(values, weight, order)
    return radial_map(values, weight, dof, compact, order)


def test_quantiles_of_a_skewed_coordinate_become_normal():
    generator = torch.Generator().manual_seed(0)
    values, fresh = torch.randn(2, 10_000, generator=generator, dtype=torch.float64).exp()
    knots, gain = map_of(values)
    y, log_slope = Monotone(stacked([[knots]], KNOTS))(fresh[:, None], torch.zeros(10_000).long())
    assert stats.kstest(y[:, 0].numpy(), "norm").statistic < 0.024
    found = (log_slope - y.square() / 2).mean()
    exact = (-fresh.log() - fresh.log().square() / 2).mean()
    assert 0 < exact - found < 0.03
    assert abs(gain - (found + (fresh.square() / 2).mean()).item()) < 0.6


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize(
    ("d", "k"),
    [
        (2, 1),
        pytest.param(3, 1, marks=pytest.mark.slow),
        (3, 2),
        pytest.param(7, 3, marks=pytest.mark.slow),
        (30, 1),
    ],
)
def test_radius_of_some_coordinates(d, k, compact):
    """Against draws of a law whose radius was mapped, and the closed form of a mere factor."""
    generator = torch.Generator().manual_seed(1)
    t = torch.randn(5000, d, generator=generator, dtype=torch.float64).square().sum(-1)
    knots, _ = map_of(t * (0.6 + 1.5 * torch.rand(5000, generator=generator).double()), d, compact)
    some = marginal(knots, d, k, compact)
    u = torch.randn(50_000, d, generator=generator, dtype=torch.float64)
    whole, part = only(knots), only(some)
    assert len(some.x) <= MARGINAL_KNOTS
    t = u.square().sum(-1, keepdim=True)
    zero = torch.zeros(len(u), dtype=torch.int64)
    drawn = u * (whole.inverse(t, zero)[0] / t).sqrt()
    y, _ = part(drawn[:, :k].square().sum(-1, keepdim=True), zero)
    assert stats.kstest(y[:, 0].numpy(), stats.chi2(k).cdf).pvalue > 1e-3
    factor = Knots(*(torch.tensor(v).double() for v in ([0.0, 500.0], [0.0, 200.0], [0.4, 0.4])))
    same = marginal(factor, d, k, False)
    assert torch.allclose(same.y, 0.4 * same.x, rtol=1e-4)
    assert torch.allclose(same.slope, torch.full_like(same.slope, 0.4), rtol=1e-4)


@pytest.mark.parametrize("law", ["ring", "two widths"])
@pytest.mark.parametrize(("d", "k"), [(2, 1), (3, 2), (7, 3)])
def test_conditional_densities_are_normalised(d, k, law):
    """The density of all coordinates, integrated over the last, is that of the first."""
    generator = torch.Generator().manual_seed(2)
    u = torch.randn(4000, d, generator=generator, dtype=torch.float64)
    if law == "ring":
        u = 0.1 * u + 2 * nn.functional.normalize(u, dim=-1)
    else:
        u[::5] *= 5
    t = u.square().sum(-1)
    knots, _ = map_of(t, d)
    whole, part, m = only(knots), only(marginal(knots, d, k, False)), d - k
    at = u[:, :k].square().sum(-1).quantile(torch.tensor([0.01, 0.1, 0.5, 0.9, 0.99]).double())
    ends = [0.0, *(knots.x[1:].sqrt().tolist()), 3 * knots.x[-1].sqrt().item() + 20]
    area = 2 * math.pi ** (m / 2) / math.gamma(m / 2) / (2 * math.pi) ** (m / 2)
    for first in at:

        def density(v, first=first):
            log = log_volume(whole, first + torch.as_tensor(v).square(), d)
            return np.exp(log.numpy()) * v ** (m - 1)

        # between the bends of the map
        cuts = np.sqrt(np.clip(np.square(ends) - first.item(), 0, None))
        total = sum(
            integrate.fixed_quad(density, a, b, n=40)[0] for a, b in pairwise(cuts) if b > a
        )
        assert abs(area * total / log_volume(part, first, k).exp().item() - 1) < 3e-3


@pytest.mark.parametrize("n", [100, 150, 249])
@pytest.mark.parametrize("compact", [False, True])
def test_coordinates_of_few_events(n, compact):
    """Too few for two quantiles and yet enough for a shift and scale."""
    generator = torch.Generator().manual_seed(n)
    values = 1 + 2 * torch.randn(n, generator=generator, dtype=torch.float64)
    knots, gain = map_of(values, compact=compact)
    y, _ = Monotone(stacked([[knots]], KNOTS))(values[:, None], torch.zeros(n).long())
    assert gain > 0.5
    assert abs(y.mean()) < 0.1
    assert abs(y.std() - 1) < 0.15


def test_density_of_a_head_that_is_far_too_wide_is_finite():
    """The straight ends rise also in single precision, however far the map was eased."""
    width = 1e-4
    z, fresh = width * torch.randn(2, 5000, 2, generator=torch.Generator().manual_seed(1))
    head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
    q = Recalibrator(head).fit(None, z)(None)
    assert torch.isfinite(q.log_prob(fresh)).all()
    line = width * torch.linspace(0, 9, 2000)[:, None].expand(-1, 2)
    assert torch.isfinite(q.log_prob(line)).all()


def test_few_values_or_equal_ones():
    with pytest.raises(ValueError, match=r"Expected base coordinates that differ .* repeated\?"):
        map_of(torch.ones(1000, dtype=torch.float64), None)
    coarse = (2 * torch.randn(5000, dtype=torch.float64)).round()
    with pytest.warns(UserWarning, match="no smooth map repairs"):
        knots, _ = map_of(coarse)
    assert (knots.x.diff() > 0).all()
    assert (knots.slope > 0).all()


# ---------------------------------------------------------------------------- blocks


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_add_up(kind):
    """The first block is the integral of the whole over the others; so are later ones."""
    space = fp.Product(a=fp.Real(1), b=fp.Real(1))
    model = model_of(space, seed=5)
    recalibrated = Recalibrator(model, **KINDS[kind]).fit(*events(model, 2000))
    q = recalibrated(torch.randn(1, 2, dtype=torch.float64))
    draws = q.sample((20_000,))[:, 0]
    low, high = draws.amin(0), draws.amax(0)
    low, high = low - 0.5 * (high - low), high + 0.5 * (high - low)
    grids = [torch.linspace(a, b, 601, dtype=torch.float64) for a, b in zip(low, high, strict=True)]
    at = draws[:5]
    for j, name in enumerate("ab"):
        other = grids[1 - j]
        both = torch.stack([at[:, j, None].expand(-1, 601), other.expand(5, -1)], -1)
        both = both if j == 0 else both.flip(-1)
        with torch.no_grad():
            whole = q.log_prob(both.reshape(-1, 1, 2)).exp().reshape(5, 601).sum(-1)
            block = q.block(name, draws=1024)
            found = block.log_prob(at[:, None, j : j + 1])[:, 0].exp()
            line = block.log_prob(grids[j][::4, None, None]).exp()
        assert torch.allclose(found, whole * (other[1] - other[0]), rtol=5e-3 if j == 0 else 0.1)
        assert abs(line.sum() * (grids[j][4] - grids[j][0]) - 1) < 5e-3
    u = q["a"].to_base(draws[:, None, :1])[:, 0, 0].detach()
    assert stats.kstest(u.numpy(), "norm").pvalue > 1e-3
    drawn = q["b"].sample((20_000,), torch.Generator().manual_seed(2))[:, 0, 0]
    assert stats.ks_2samp(drawn.numpy(), draws[:, 1].numpy()).pvalue > 1e-3


def test_blocks_of_a_nested_product_in_another_order():
    space = fp.Product(e=fp.Positive(), p=fp.Product(n=fp.Sphere(), v=fp.Real(2)))
    model = model_of(space, seed=2)
    recalibrated = Recalibrator(model, coordinates=True).fit(*events(model, 1000))
    x, z = events(model, 8, seed=20)
    q = recalibrated(x)
    parts = space.unpack(z)
    first = q["p.n"]
    assert torch.isfinite(first.log_prob(z[:, 1:4])).all()
    assert first.to_base(z[:, 1:4]).shape == (8, 2)
    assert q["e"].log_prob(parts["e"]).shape == (8,)
    assert q[2:4]["p.n"].mean.shape == (2, 3)


# ------------------------------------------------------------------------------ bins


def uneven(n, seed):
    """Events that a head of one width is too narrow for where x0 is large."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 2, generator=generator)
    noise = torch.where(x[:, :1] > 0.5, 2.0, 0.7) * torch.randn(n, 2, generator=generator)
    return x, 0.8 * x + math.sqrt(0.2) * noise


@pytest.mark.parametrize("how", ["name", "function", "values", "smooth"])
def test_bins_are_right_each(how):
    x, z = uneven(8000, 0)
    new_x, new_z = uneven(20_000, 1)
    by, given = None, None
    model = gaussian()
    if how == "name":
        model = fp.PosteriorModel(None, fp.PosteriorHead(2, fp.Product(a=fp.Real(1), b=fp.Real(1)),
                                                         flow="diagonal"))  # fmt: skip
        model.head.flow.load_state_dict(gaussian().head.flow.state_dict())
        by = "a"
    elif how == "function":
        by = lambda x: x[:, 0]  # noqa: E731
    else:
        by, given = x[:, 0], new_x[:, 0]
    many = how == "smooth"
    recalibrated = Recalibrator(model, bins=16 if many else [-0.4, 0.4 if how == "name" else 0.5],
                                smooth=1.0 if many else 0.0).fit(x, z, by=by)  # fmt: skip
    q = recalibrated(new_x, by=given)
    u = q.to_base(new_z)
    at = 0.4 / 0.8 if how == "name" else 0.5
    for rows in (new_x[:, 0] > at + 0.3 * many, new_x[:, 0] < at - 0.3 * many):
        assert fp.coverage(u[rows]).ks_statistic < 0.035
        assert fp.coverage(model(new_x).to_base(new_z)[rows]).ks_statistic > 0.1
    assert int(recalibrated.held.sum()) == 8000
    if not many:
        assert len(str(recalibrated).splitlines()) == 4
    if given is not None:
        # other bins, other maps; rows and slices keep theirs
        assert not torch.equal(recalibrated(new_x, by=-given).to_base(new_z), u)
        assert torch.equal(q[5:9].to_base(new_z[5:9]), u[5:9])
        assert torch.equal(q[torch.tensor([7, 3])].to_base(new_z[[7, 3]]), u[[7, 3]])
        assert torch.allclose(q.to(torch.float64).to_base(new_z).float(), u, atol=1e-3)
        assert torch.equal(q.detach().expand((2, 20_000)).to_base(new_z)[1], u)


def test_weights_count():
    """Events of weight zero do not count; those of weight two as often as two events."""
    x, z = measured(4000)
    wrong_z = z.clone()
    wrong_z[2000:] += 3
    weight = torch.ones(4000)
    weight[2000:] = 0
    model = gaussian(width=0.7)
    found = Recalibrator(model).fit(x, wrong_z, weight)
    u = found(x[:2000]).to_base(z[:2000])
    assert fp.coverage(u).ks_statistic < 0.03
    weight[50:] = 0
    with pytest.raises(ValueError, match="Expected at least 100 held-out events"):
        Recalibrator(model).fit(x, z, weight)


# ------------------------------------------------------------------- use and mistakes


def test_gradients_reach_the_network():
    encoder = nn.Linear(3, 2)
    model = fp.PosteriorModel(encoder, gaussian().head)
    x = torch.randn(500, 3)
    recalibrated = Recalibrator(model, coordinates=True).fit(x, 2 * model(x).sample())
    q = recalibrated(x[:10])
    (q.log_prob(torch.zeros(10, 2)).sum() + q.rsample((4,)).sum()).backward()
    assert torch.isfinite(encoder.weight.grad).all()
    assert encoder.weight.grad.abs().max() > 0
    # at the centre of the base and far away
    centre = q.from_base(torch.zeros(10, 2)).detach().requires_grad_()
    (slope,) = torch.autograd.grad(q.log_prob(centre).sum(), centre)
    assert torch.isfinite(slope).all()
    assert torch.isfinite(q.log_prob(torch.full((10, 2), 1e6))).all()
    assert q.mode.shape == q.mean.shape == (10, 2)
    assert q.entropy().shape == (10,)
    low, high = q.interval(0.9)
    assert (low < high).all()


def test_modes_seeds_and_random_state_stay():
    model = fp.PosteriorModel(nn.Dropout(0.5), gaussian(width=0.7).head).train()
    model.head.eval()
    x, z = measured(1000)
    before = torch.get_rng_state()
    one, two = (Recalibrator(model).fit(x, z, seed=3) for _ in range(2))
    assert torch.equal(before, torch.get_rng_state())
    assert model.encoder.training
    assert not model.head.training
    assert torch.equal(one.radius_y, two.radius_y)
    assert one.fit(x, z, seed=4).fitted


def test_unconditional_density_and_references():
    head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
    z = torch.randn(1000, 2) * torch.tensor([2.0, 0.5])
    recalibrated = Recalibrator(head, coordinates=True).fit(None, z)
    q = recalibrated(None)
    assert q.batch_shape == ()
    assert torch.allclose(q.stddev, z.std(0), rtol=0.1)
    sky = fp.PosteriorHead(2, fp.Sphere(), reference=True)
    truth = torch.nn.functional.normalize(torch.randn(300, 3), dim=-1)
    guess = torch.nn.functional.normalize(truth + 0.1 * torch.randn(300, 3), dim=-1)
    with pytest.warns(UserWarning, match="300 held-out events with all events"):
        found = Recalibrator(sky).fit(torch.zeros(300, 2), truth, reference=guess)
    assert found(torch.zeros(3, 2), reference=truth[:3]).log_prob(truth[:3]).shape == (3,)


def test_values_of_an_unconditional_head():
    generator = torch.Generator().manual_seed(0)
    v = torch.rand(2000, generator=generator)
    z = torch.where(v[:, None] < 0.5, 1.0, 3.0) * torch.randn(2000, 2, generator=generator)
    head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
    q = Recalibrator(head, bins=[0.5]).fit(None, z, by=v)(None, by=v[:4])
    assert q.batch_shape == (4,)
    width = torch.where(v[:4] < 0.5, 1.0, 3.0)
    assert torch.allclose(q.stddev, width[:, None].expand(4, 2), rtol=0.2)


def test_failed_fit_leaves_the_first():
    x, z = measured(1500)
    recalibrated = Recalibrator(gaussian(width=0.7), bins=[0.0]).fit(x, z, by=lambda x: x[:, 0])
    before = recalibrated(x).log_prob(z)
    for options in ({"by": "energy"}, {"by": x[:, 1] + 100}, {"weight": torch.zeros(1500)}):
        with pytest.raises(ValueError, match="Expected"):
            recalibrated.fit(x, z, **options)
        assert recalibrated.fitted
        assert torch.equal(recalibrated(x).log_prob(z), before)


def test_edges_in_words_differ():
    z = torch.randn(4000, 2)
    time = 1.7e9 + torch.linspace(0, 60, 4000, dtype=torch.float64)
    head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
    events = Recalibrator(head).fit(None, z, by=time).events
    assert len(set(events.intervals())) == 4
    assert (
        len({part for line in events.intervals() for part in line.split() if part[0] == "1"}) == 3
    )


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"z": torch.full((500, 2), math.nan)}, "Expected finite labels"),
        ({"z": torch.zeros(400, 2)}, r"as many events as there are labels, 400; got \[500\]"),
        ({"z": torch.zeros(0, 2)}, "at least one event"),
        ({"x": torch.zeros(50, 2), "z": torch.zeros(50, 2)}, "at least 100 .* got 50"),
        ({"by": "energy"}, "Expected by as a label column, .* got 'energy'"),
        ({"by": torch.zeros(499)}, r"by of as many events as there are labels, 500; got \[499\]"),
        ({"reference": torch.zeros(9, 2)}, r"reference of as many events .* 500; got \[9\]"),
        ({"z": {"a": torch.zeros(500)}}, "Expected labels as a tensor .* Stack its columns: z"),
        ({"by": torch.full((500,), math.nan)}, "Expected finite by"),
        ({"by": torch.zeros(500)}, "many events have the same value"),
        ({"by": torch.zeros(500, 2)}, "Expected by of shape"),
        ({"by": torch.arange(500.0)}, "at least 100 held-out events in each bin; got 83 .*smooth"),
        ({"weight": -torch.ones(500)}, "weights of at least 0"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*held-out events")
def test_mistakes_of_fit(options, match):
    given = {"x": torch.randn(500, 2), "z": torch.randn(500, 2)} | options
    with pytest.raises(ValueError, match=match):
        Recalibrator(gaussian(), bins=6).fit(**given)


def test_labels_by_name_are_to_be_packed():
    space = fp.Product(e=fp.Positive(), t=fp.Real())
    labels = {"e": torch.rand(600) + 1, "t": torch.randn(600)}
    head = fp.PosteriorHead(0, space, flow="diagonal")
    with pytest.raises(ValueError, match=r"got a dict. Give model.head.space.pack\(labels\)"):
        Recalibrator(head).fit(None, labels)
    assert Recalibrator(head).fit(None, space.pack(labels)).fitted


def test_few_events_are_told_of_once_and_with_what_helps():
    x, z = measured(1100)
    edges = x[:, 0].sort().values[[200, 500]].tolist()
    fitted = Recalibrator(gaussian(), bins=edges)
    with pytest.warns(UserWarning, match="held-out events") as told:
        fitted.fit(x, z, by=lambda x: x[:, 0])
    assert len(told) == 1
    assert told[0].filename == __file__
    first, second, _ = fitted.events.intervals()
    assert str(told[0].message) == (
        f"200 held-out events with {first}, 300 with {second}: coverage there may be off by 0.12. "
        "Give more events, fewer bins, or smooth=1."
    )
    # where there are no bins, fewer of them are no help
    with pytest.warns(UserWarning, match=r"off by 0\.09\. Give more events\.$"):
        Recalibrator(gaussian()).fit(x[:300], z[:300])
    with pytest.raises(ValueError, match=r"got 50 with all events\. Give more events\.$"):
        Recalibrator(gaussian()).fit(x[:50], z[:50])


def test_mistakes_of_use():
    with pytest.raises(ValueError, match="Expected a PosteriorModel or PosteriorHead; got Linear"):
        Recalibrator(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="got neither"):
        Recalibrator(gaussian(), radial=False)
    with pytest.raises(ValueError, match="Expected rising inner edges"):
        Recalibrator(gaussian(), bins=[2.0, 1.0])
    with pytest.raises(ValueError, match="Expected smooth"):
        Recalibrator(gaussian(), smooth=-1.0)
    with pytest.raises(ValueError, match=r"Expected smooth as a number .* got None"):
        Recalibrator(gaussian(), smooth=None)
    x, z = measured(1000)
    with pytest.raises(ValueError, match="Expected a fitted Recalibrator; call fit"):
        Recalibrator(gaussian())(x)
    plain = Recalibrator(gaussian()).fit(x, z)
    with pytest.raises(ValueError, match="Expected no values of by"):
        plain(x, by=x[:, 0])
    with pytest.warns(UserWarning, match="250 held-out events"):
        binned = Recalibrator(gaussian()).fit(x, z, by=x[:, 0])
    with pytest.raises(ValueError, match="Expected by=… with the values"):
        binned(x)
    with pytest.raises(ValueError, match=r"Expected by as values .* got a function"):
        binned(x, by=lambda x: x[:, 0])
    assert "NLL falls by" in str(plain)
    assert str(Recalibrator(gaussian())) == "Recalibrator, not fitted"


# ---------------------------------------------------------------------------- on disk


@pytest.fixture(scope="module", params=[None, "b", "values"])
def stored(request):
    """A recalibrated model, what its bins are of, inputs and labels."""
    space = fp.Product(a=fp.Sphere(), b=fp.Real(1), c=fp.Positive())
    model = model_of(space).float()
    model.encoder = nn.Linear(2, 2)
    x = torch.randn(1100, 2)
    z = model(x).from_base(1.4 * torch.randn(1100, 4)).detach()
    by = x[:, 0] if request.param == "values" else request.param
    return Recalibrator(model, coordinates=True, bins=2).fit(x, z, by=by), by, x, z


@pytest.mark.parametrize("name", ["model", "model.safetensors"])
def test_saved_and_loaded(tmp_path, name, stored):
    recalibrated, by, x, z = stored
    values = by if isinstance(by, torch.Tensor) else None
    fp.save(recalibrated, tmp_path / name)
    back = fp.load(tmp_path / name, encoder=nn.Linear(2, 2))
    assert type(back) is Recalibrator
    assert back.config() == recalibrated.config()
    q, new = (r(x[:20], by=None if values is None else values[:20]) for r in (recalibrated, back))
    assert torch.equal(q.log_prob(z[:20]), new.log_prob(z[:20]))
    assert torch.equal(q["b"].log_prob(z[:20, 3:4]), new["b"].log_prob(z[:20, 3:4]))
    assert torch.equal(recalibrated.gain, back.gain)
    with pytest.raises(ValueError, match="has an encoder of your own"):
        fp.load(tmp_path / name)


def test_what_is_refused_on_disk(tmp_path):
    x, z = measured(1000)
    with pytest.raises(ValueError, match="Expected a fitted Recalibrator"):
        fp.save(Recalibrator(gaussian()), tmp_path / "unfitted")
    recalibrated = Recalibrator(gaussian(width=0.7)).fit(x, z)

    def refused(match, config=None, tensors=None):
        path = tmp_path / "changed"
        fp.save(recalibrated, path)
        if config is not None:
            rewrite(path, config)
        if tensors is not None:
            rewrite_tensors(path, tensors)
        with pytest.raises(ValueError, match=match):
            fp.load(path)

    refused("Expected the description of a PosteriorModel", lambda c: c.update(model=None))
    refused("PosteriorModel", lambda c: c["model"].update(kind="Recalibrator"))
    refused("Expected 1 bins; got 1000000000", lambda c: c["recalibrator"].update(
        bins=10**9, by="z[0]"))  # fmt: skip
    refused("cannot be built", lambda c: c.pop("recalibrator"))
    refused("cannot be built", lambda c: c["recalibrator"].update(other=1))
    refused("Expected tensor 'coordinate_x'", lambda c: c["recalibrator"].update(coordinates=True))
    refused("rising", None, lambda t: t.update(radius_x=torch.tensor(1.0)))
    refused("Expected tensor 'radius_x'|shape", None, lambda t: t.update(
        radius_x=t["radius_x"][..., :0].clone()))  # fmt: skip
    refused("radii from 0 on", None, lambda t: t["radius_y"].add_(1))
    refused("rising numbers in tensor 'radius_y'", None, lambda t: t["radius_y"].zero_())
    refused("positive numbers in tensor 'radius_slope'", None, lambda t: t["radius_slope"].neg_())
    refused("finite numbers in tensor 'radius_x'", None, lambda t: t["radius_x"].fill_(math.nan))
    refused("no place", None, lambda t: t.update(more=torch.zeros(1)))
    refused("Expected tensor 'held'", None, lambda t: t.pop("held"))

    class Tempered(Recalibrator):
        pass

    with pytest.raises(ValueError, match=r"Expected a PosteriorHead, .* got Tempered"):
        fp.save(Tempered(gaussian()).fit(x, z), tmp_path / "derived")
