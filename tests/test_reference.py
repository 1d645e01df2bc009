"""A first guess of the label per event: what it means, its digits, and where it is asked for."""

import json
import math
import re

import numpy as np
import pytest
import torch
from spherical import (
    ARCSEC,
    SKY,
    at_angle,
    directions,
    perturbed,
    rotation,
    width_number,
)
from torch.utils.data import DataLoader, Dataset

import flowpost as fp
from flowpost.directions import separation
from flowpost.head import PosteriorHead
from flowpost.model import PosteriorModel
from flowpost.posterior import BlockPosterior, Posterior
from flowpost.spaces import Circle, Interval, Positive, Product, Real, Sphere

CONTEXT = torch.randn(6, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
NESTED = Product(a=Product(x=Real(2), d=Sphere()), e=Positive(), y=Interval(-1.0, 2.0))


def referenced(head):
    return [b.name for b, own in zip(head.space.blocks, head.referenced, strict=True) if own]


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def vectors(n):
    angle = normal(n)
    return torch.stack([angle.cos(), angle.sin()], -1)


LEAVES = {
    "real": (Real(2), lambda n: normal(n, 2)),
    "positive": (Positive(2), lambda n: normal(n, 2).exp()),
    "interval": (Interval(-1.0, 2.0), lambda n: 3 * torch.rand(n, 1).double() * 0.98 - 0.97),
    "circle": (Circle(), lambda n: 2 * normal(n, 1)),
    "vector": (Circle(vector=True), vectors),
    "sphere": (Sphere(), directions),
}
LABELS = {
    **LEAVES,
    "sky": (SKY, lambda n: torch.cat([normal(n, 1).exp(), normal(n, 2), directions(n)], -1)),
    "nested": (
        NESTED,
        lambda n: torch.cat(
            [normal(n, 2), directions(n), normal(n, 1).exp(), torch.rand(n, 1).double()], -1
        ),
    ),
}


def scaled(space, labels, flow="spline", *, size=0.1, dtype=torch.float64, reference=True):
    """A perturbed head that was whitened about references."""
    head = perturbed(space, flow, size=size, dtype=torch.float64)
    z = labels(300)
    head.fit_scale(z, reference=_near(space, z) if reference else None)
    return head.to(dtype)


def _near(space, z):
    """Labels beside labels: a tenth of the chart away."""
    flow = PosteriorHead(0, space, "diagonal").double()(None)._flow
    u, _ = flow.to_base(z)
    return flow.from_base(u + 0.1 * torch.randn_like(u))[0].detach()


# ----------------------------------------------------------------------------------- semantics


def moved(space, z, generator):
    """Labels with all of them moved as a reference may be, event by event, and ln|dz'/dz|."""
    n = len(z)
    by = torch.randn(n, space.label_size, generator=generator, dtype=torch.float64)
    if isinstance(space, Real):
        return lambda x: x + by, lambda x: torch.zeros(n).double()
    if isinstance(space, Positive):
        return lambda x: x * by.exp(), lambda x: by.sum(-1)
    if isinstance(space, Interval):
        a, b = space.low[0], space.high[0]
        gauss = torch.distributions.Normal(0.0, 1.0)

        def quantile(x):
            return gauss.icdf((x - a) / (b - a))

        def move(x):
            return a + (b - a) * gauss.cdf(quantile(x) + 0.3 * by)

        return move, lambda x: (
            gauss.log_prob(quantile(x) + 0.3 * by) - gauss.log_prob(quantile(x))
        ).sum(-1)
    if space.vector:
        c, s = by[:, 0].cos(), by[:, 0].sin()
        turn = torch.stack([torch.stack([c, -s], -1), torch.stack([s, c], -1)], -2)
        return lambda x: (turn @ x[..., None])[..., 0], lambda x: torch.zeros(n).double()
    return lambda x: x + by, lambda x: torch.zeros(n).double()


@pytest.mark.parametrize("flow", ["diagonal", "spline"])
@pytest.mark.parametrize("name", ["real", "positive", "interval", "circle", "vector"])
def test_label_and_reference_that_move_alike(name, flow):
    space, labels = LEAVES[name]
    head = scaled(space, labels, flow)
    z, context = labels(6), CONTEXT
    reference = _near(space, z)
    move, ladj = moved(space, z, torch.Generator().manual_seed(1))
    before = head.log_prob(context, z, reference=reference)
    after = head.log_prob(context, move(z), reference=move(reference))
    torch.testing.assert_close(after + ladj(z), before, rtol=1e-7, atol=1e-7)
    u = head(context, reference=reference).to_base(z)
    again = head(context, reference=move(reference)).to_base(move(z))
    torch.testing.assert_close(again, u, rtol=1e-6, atol=1e-6)
    # and it does depend on the reference
    other = head.log_prob(context, z, reference=move(reference))
    assert (other - before).abs().max() > 0.1


@pytest.mark.parametrize("flow", ["mse", "diagonal"])
def test_a_direction_turns_with_its_reference(flow):
    """Without a predicted shift: a network that knows no direction predicts none."""
    head = perturbed(Sphere(), flow, size=0.3)
    with torch.no_grad():
        head.flow.bias[:6] = 0
        head.flow.weight[:6] = 0
    z, reference, turn = directions(6), directions(6), rotation(2)
    before = head.log_prob(CONTEXT, z, reference=reference)
    after = head.log_prob(CONTEXT, z @ turn.T, reference=reference @ turn.T)
    torch.testing.assert_close(after, before)


def test_a_direction_points_to_its_reference():
    head = PosteriorHead(3, Sphere(), "spline").double()
    reference = directions(6)
    origin = head(CONTEXT, reference=reference).from_base(torch.zeros(6, 2))
    assert separation(origin, reference).max() < 1e-7
    assert separation(head(CONTEXT, reference=reference).mean, reference).max() < 0.05


@pytest.mark.parametrize("name", ["real", "positive", "interval", "circle"])
def test_an_untrained_head_is_centred_on_its_reference(name):
    space, labels = LEAVES[name]
    reference = labels(6)
    if name == "circle":
        reference = torch.remainder(reference + math.pi, 2 * math.pi) - math.pi
    q = PosteriorHead(3, space, "spline").double()(CONTEXT, reference=reference)
    torch.testing.assert_close(q.from_base(torch.zeros(6, space.dof)), reference)


@pytest.mark.parametrize("log_width", [-9.0, -4.0])
@pytest.mark.parametrize("name", ["real", "circle", "sphere"])
def test_a_shift_is_in_units_of_the_width(name, log_width):
    """The same location numbers move the centre by as many widths at every width."""
    space, labels = LEAVES[name]
    head = PosteriorHead(3, space, "diagonal").double()
    k, reference = space.location_size, labels(6)
    with torch.no_grad():
        head.flow.bias[0 if name == "real" else 1] = 0.5
        head.flow.bias[k : k + (2 if name == "real" else 1)] = width_number(log_width)
    q = head(CONTEXT, reference=reference)
    u = q.to_base(reference).norm(dim=-1)
    if name == "real":
        torch.testing.assert_close(u, torch.full_like(u, 0.5))
    else:
        # across the reference; a part of the shift may lie along it
        assert (u < 0.51).all()
        assert u.max() > 0.3


@pytest.mark.parametrize("name", LABELS)
@pytest.mark.parametrize("flow", ["affine", "spline"])
def test_round_trip_and_density(name, flow):
    space, labels = LABELS[name]
    head = scaled(space, labels, flow)
    z = labels(6)
    reference = _near(space, z)
    q = head(CONTEXT, reference=reference)
    u, log_prob = head.to_base_and_log_prob(CONTEXT, z, reference=reference)
    torch.testing.assert_close(q.to_base(z), u)
    torch.testing.assert_close(q.log_prob(z), log_prob)
    torch.testing.assert_close(head.loss(CONTEXT, z, reference=reference), -log_prob.mean())
    torch.testing.assert_close(head.log_prob(CONTEXT, z, reference=reference), log_prob)
    torch.testing.assert_close(q.from_base(u).cos(), z.cos(), rtol=1e-5, atol=1e-5)
    draws, value = q.sample_and_log_prob((20,))
    torch.testing.assert_close(q.log_prob(draws), value, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", LABELS)
def test_whitening_is_about_the_references(name):
    """References that are as good as the labels' width leave a narrow posterior."""
    space, labels = LABELS[name]
    z = labels(2000)
    head = PosteriorHead(0, space, "diagonal").double()
    wide = head.fit_scale(z).loss(None, z).item()
    near = _near(space, z)
    head = PosteriorHead(0, space, "diagonal").double().fit_scale(z, reference=near)
    narrow = head.loss(None, z, reference=near).item()
    # a tenth of the chart: ln 10 for each coordinate
    assert wide - narrow > 1.2 * space.dof
    u = head(None, reference=near).to_base(z)
    assert ((u.std(0) > 0.7) & (u.std(0) < 1.4)).all()
    assert (u.mean(0).abs() < 0.1).all()


# -------------------------------------------------------------------------------------- digits


def narrow_head(space, sigma, dtype):
    """A head whose whitening is that of labels of width sigma about their references."""
    head = perturbed(space, "affine", size=0.2)
    head.scale.fill_(1.0)
    first = space.blocks[0]
    head.scale[first.base] = sigma
    return head.to(dtype)


@pytest.mark.parametrize("sigma", [1.0, 0.01], ids=["1as", "10mas"])
def test_double_references_keep_their_digits_on_the_sphere(sigma):
    sigma = sigma * ARCSEC
    double, single = (narrow_head(Sphere(), sigma, d) for d in (torch.float64, torch.float32))
    reference = directions(6)
    z = torch.stack([at_angle(r, a * sigma, 0.3) for r, a in zip(reference, range(6), strict=True)])
    exact = double.log_prob(CONTEXT, z, reference=reference)
    found = single.log_prob(CONTEXT.float(), z, reference=reference)
    assert found.dtype == torch.float32
    assert (found.double() - exact).abs().max() < 1e-3
    q = single(CONTEXT.float(), reference=reference)
    draws = q.sample((200,))
    assert draws.dtype == torch.float64
    assert q.from_base(torch.zeros(6, 2)).dtype == torch.float64
    u = q.to_base(draws)
    torch.testing.assert_close(u.norm(dim=-1).mean(0), torch.full((6,), 1.25), rtol=0, atol=0.2)
    torch.testing.assert_close(q.from_base(u), draws, rtol=0, atol=1e-4 * sigma)
    # float32 labels have no such digits, and the numbers show it
    assert (
        single.log_prob(CONTEXT.float(), z.float(), reference=reference) - found
    ).abs().max() > (1e-3)


@pytest.mark.parametrize(
    ("space", "reference", "sigma"),
    [
        (Real(), 2460000.25, 1e-6),
        (Circle(), 3.0, 1e-9),
        (Positive(), 1e6, 1e-8),
    ],
    ids=["real", "circle", "positive"],
)
def test_double_references_keep_their_digits(space, reference, sigma):
    heads = [narrow_head(space, sigma, d) for d in (torch.float64, torch.float32)]
    reference = torch.full((6, 1), reference, dtype=torch.float64)
    step = sigma * torch.linspace(-2, 2, 6).double()[:, None]
    z = reference * step.exp() if isinstance(space, Positive) else reference + step
    exact = heads[0].log_prob(CONTEXT, z, reference=reference)
    found = heads[1].log_prob(CONTEXT.float(), z, reference=reference)
    assert (found.double() - exact).abs().max() < 2e-3
    q = heads[1](CONTEXT.float(), reference=reference)
    draws = q.sample((300,))
    assert draws.dtype == torch.float64
    assert (draws.std(0) > 0.1 * sigma * (1e6 if isinstance(space, Positive) else 1)).all()
    assert len(draws.unique()) > 1500


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
@pytest.mark.parametrize("name", LABELS)
def test_draws_are_of_the_type_of_the_reference(name, dtype):
    space, labels = LABELS[name]
    head = scaled(space, labels, dtype=torch.float32)
    reference = labels(6).to(dtype)
    q = head(CONTEXT.float(), reference=reference)
    assert q.sample().dtype == dtype
    assert q.sample_and_log_prob()[0].dtype == dtype
    assert q.dtype == torch.float32


@pytest.mark.parametrize("name", ["positive", "interval", "circle", "sphere", "sky"])
def test_statistics_with_a_double_reference(name):
    """Every question of a float32 head with double references."""
    space, labels = LABELS[name]
    head = scaled(space, labels, "affine", dtype=torch.float32)
    reference = labels(6)
    q = head(CONTEXT.float(), reference=reference)
    double = scaled(space, labels, "affine")(CONTEXT, reference=reference)
    assert space.contains(q.mean).all()
    assert space.contains(q.mode).all()
    torch.testing.assert_close(q.entropy(256).double(), double.entropy(256), rtol=0, atol=0.05)
    assert q.quantile([0.1, 0.5]).shape == (2, 6, space.label_size)
    assert q.median.shape == (6, space.label_size)
    low, high = q.interval(0.9)
    assert (low <= high).all()
    assert q.summary().mean.shape == (6, space.label_size)
    if name == "sphere":
        assert (q.angular_resolution() > 0).all()
        assert (q.hpd_area() > 0).all()
        assert separation(q.direction_moments().mean, q.mean).max() < 0.05


# ------------------------------------------------------------------------------------- products


def test_references_by_name_are_those_of_the_whole_label():
    space, labels = LABELS["sky"]
    head = scaled(space, labels)
    z = labels(6)
    reference = _near(space, z)
    named = space.unpack(reference)
    exact = head.log_prob(CONTEXT, z, reference=reference)
    torch.testing.assert_close(head.log_prob(CONTEXT, z, reference=named), exact)
    backwards = dict(reversed(named.items()))
    torch.testing.assert_close(head.log_prob(CONTEXT, z, reference=backwards), exact)
    named["energy"] = named["energy"][:, None]
    torch.testing.assert_close(head.log_prob(CONTEXT, z, reference=named), exact)
    named = {k: v.numpy() for k, v in named.items()}
    torch.testing.assert_close(head.log_prob(CONTEXT, z, reference=named), exact)


def test_a_subset_of_blocks():
    space, labels = LABELS["sky"]
    head = perturbed(space, "affine", size=0.2).eval()
    z = labels(6)
    guess = _near(space, z)[:, 3:]
    given = {"direction": guess}
    value = head.log_prob(CONTEXT, z, reference=given)
    q, plain = head(CONTEXT, reference=given), head(CONTEXT)
    u, other = q.to_base(z), plain.to_base(z)
    assert (u[:, :2] - other[:, :2]).abs().max() > 0.1
    # energies and vertices are where they were, but for what leans on the direction
    lower = q._flow.lower[:, 2:, :2]
    assert lower.abs().max() > 0
    wide = head.log_prob(CONTEXT, z, reference={"direction": guess, "energy": z[:, 0]})
    assert (wide - value).abs().max() > 0.01
    torch.testing.assert_close(q.from_base(u), z, rtol=1e-6, atol=1e-6)
    # what the other columns of the packed reference hold does not matter
    head.loc.fill_(0.3)
    moved = head(CONTEXT, reference=given)["direction"].log_prob(z[:, 3:])
    torch.testing.assert_close(moved, q["direction"].log_prob(z[:, 3:]))


def test_references_inside_nested_products():
    space, labels = LABELS["nested"]
    head = perturbed(space, "affine", size=0.2).eval()
    z = labels(6)
    reference = _near(space, z)
    by_leaf = {"a.x": reference[:, :2], "a.d": reference[:, 2:5]}
    whole = head.log_prob(CONTEXT, z, reference={"a": reference[:, :5]})
    torch.testing.assert_close(head.log_prob(CONTEXT, z, reference=by_leaf), whole)
    everything = {"a": reference[:, :5], "e": reference[:, 5], "y": reference[:, 6]}
    torch.testing.assert_close(
        head.log_prob(CONTEXT, z, reference=everything),
        head.log_prob(CONTEXT, z, reference=reference),
    )
    assert PosteriorHead(3, space, reference=["a"]).config()["reference"] == ["a.d", "a.x"]
    assert PosteriorHead(3, space, reference=["a.d", "y"]).config()["reference"] == ["a.d", "y"]


@pytest.mark.parametrize("flow", ["affine", "spline"])
def test_blocks(flow):
    space, labels = LABELS["sky"]
    head = scaled(space, labels, flow, size=0.05)
    z = labels(6)
    reference = _near(space, z)
    q = head(CONTEXT, reference=reference)
    first = q["direction"]
    assert type(first) is Posterior
    u = q.to_base(z)
    torch.testing.assert_close(first.to_base(z[:, 3:]), u[:, :2])
    torch.testing.assert_close(first.from_base(u[:, :2]), z[:, 3:], rtol=1e-6, atol=1e-6)
    assert first.angular_resolution().shape == (3, 6)
    part = q["energy"]
    assert isinstance(part, BlockPosterior)
    log_e = reference[2, 0].log() + torch.linspace(-6, 6, 801).double()
    p = (part[2].log_prob(log_e.exp()[:, None]) + log_e).exp()
    assert torch.trapezoid(p, log_e).item() == pytest.approx(1, abs=1e-3)
    torch.testing.assert_close(q[2]["energy"].log_prob(z[2, :1]), part.log_prob(z[:, :1])[2])


def test_a_block_of_an_arc_second_in_float32():
    """Draws of the earlier block keep the digits that the later block's density needs."""
    space = Product(direction=Sphere(), energy=Positive())
    head = narrow_head(space, 1e-3 * ARCSEC, torch.float64)
    with torch.no_grad():
        start = head.flow._sections[0] + head.flow._sections[1]
        head.flow.bias[start : start + 2] = 0.9
    reference = {"direction": directions(6)}
    energy = torch.linspace(0.3, 2.0, 6)[:, None]
    exact = head(CONTEXT, reference=reference)["energy"].log_prob(energy.double())
    head = head.float()
    for labels in (energy.double(), energy):
        found = head(CONTEXT.float(), reference=reference)["energy"].log_prob(labels)
        assert (found.double() - exact).abs().max() < 5e-3


@pytest.mark.parametrize("name", LABELS)
def test_indexing_expanding_casting(name):
    space, labels = LABELS[name]
    head = scaled(space, labels)
    z = labels(6)
    reference = _near(space, z)
    q = head(CONTEXT, reference=reference)
    value = q.log_prob(z)
    torch.testing.assert_close(q[3:5].log_prob(z[3:5]), value[3:5])
    torch.testing.assert_close(q[2].log_prob(z[2]), value[2])
    torch.testing.assert_close(q[[4, 0]].log_prob(z[[4, 0]]), value[[4, 0]])
    torch.testing.assert_close(q[None].log_prob(z[None]), value[None])
    torch.testing.assert_close(q.expand((2, 6)).log_prob(z), value.expand(2, 6))
    torch.testing.assert_close(q.detach().log_prob(z), value.detach())
    single = head.float()(CONTEXT.float(), reference=reference)
    again = single.to(torch.float64)
    assert again.dtype == torch.float64
    torch.testing.assert_close(again.log_prob(z), value, rtol=0, atol=5e-3)
    assert again.sample().dtype == torch.float64
    assert q[:0].mean.shape == (0, space.label_size)
    pairs = head.double()(CONTEXT.reshape(2, 3, 3), reference=reference.reshape(2, 3, -1))
    torch.testing.assert_close(pairs.log_prob(z.reshape(2, 3, -1)).reshape(6), value,
                               rtol=0, atol=1e-4)  # fmt: skip


def test_an_unconditional_head_with_references():
    head = perturbed(Sphere(), "affine", context=0, size=0.2)
    reference = directions(7)
    q = head(None, reference=reference)
    assert q.batch_shape == (7,)
    assert q.sample((2,)).shape == (2, 7, 3)
    for i in range(7):
        torch.testing.assert_close(
            head(None, reference=reference[i]).log_prob(reference[i]), q.log_prob(reference)[i]
        )


# --------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("flow", ["affine", "spline"])
def test_masks_together_with_references(flow):
    space, labels = LABELS["sky"]
    head = scaled(space, labels, flow)
    z = labels(6)
    reference = _near(space, z)
    known = torch.ones(6, 6, dtype=torch.bool)
    known[2, 1:3] = False
    known[3, :3] = False
    torch.testing.assert_close(
        head.log_prob(CONTEXT, z, torch.ones_like(known), reference=reference),
        head.log_prob(CONTEXT, z, reference=reference),
    )
    holes = torch.where(known, z, torch.nan)
    value = head.log_prob(CONTEXT, holes, known, reference=reference)
    q = head(CONTEXT, reference=reference)
    torch.testing.assert_close(value[3], q["direction"].log_prob(z[:, 3:])[3])
    torch.testing.assert_close(value[[0, 1, 4, 5]], q.log_prob(z)[[0, 1, 4, 5]])
    loss = head.loss(CONTEXT, holes, None, known, reference=reference)
    torch.testing.assert_close(loss, -value.mean())


@pytest.mark.parametrize("far", [1e-30, 1e30])
def test_gradients_of_masked_labels_far_from_their_reference(far):
    head = perturbed(SKY, "spline", size=0.1, dtype=torch.float32)
    z = torch.cat([torch.full((6, 3), torch.nan), directions(6, torch.float32)], -1)
    reference = torch.cat([torch.full((6, 1), far), torch.full((6, 2), 1e25),
                           directions(6, torch.float32)], -1)  # fmt: skip
    known = torch.tensor([False] * 3 + [True] * 3).expand(6, 6)
    value = head.log_prob(CONTEXT.float(), z, known, reference=reference)
    assert torch.isfinite(value).all()
    gradients = torch.autograd.grad(value.sum(), list(head.parameters()))
    assert all(torch.isfinite(g).all() for g in gradients)


# -------------------------------------------------------------------------------------- errors


SKY_REFERENCE = torch.cat([torch.ones(6, 1), torch.zeros(6, 2), directions(6).float()], -1)


def sky(reference=None, **options):
    return PosteriorHead(3, SKY, "affine", **options)(CONTEXT.float(), reference=reference)


def with_value(value, column):
    z = SKY_REFERENCE.clone()
    z[4, column] = value
    return z


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: PosteriorHead(3, SKY, reference=True)(CONTEXT.float()),
            "Expected a reference of direction, energy, vertex, as the head was built or scaled; "
            "got that of nothing. Pass reference=…",
        ),
        (
            lambda: PosteriorHead(3, SKY, reference=False)(
                CONTEXT.float(), reference=SKY_REFERENCE
            ),
            "Expected a reference of nothing, as the head was built or scaled; got that of direc",
        ),
        (
            lambda: PosteriorHead(3, SKY, reference=["direction"])(
                CONTEXT.float(), reference=SKY_REFERENCE
            ),
            "Expected a reference of direction, as the head was built or scaled; got that of "
            "direction, energy, vertex. Give {'direction': …}.",
        ),
        (
            lambda: PosteriorHead(3, SKY, reference=["direction"])(
                CONTEXT.float(), reference={"energy": torch.ones(6)}
            ),
            "Expected a reference of direction, as the head was built or scaled; got that of ener",
        ),
        (
            lambda: PosteriorHead(3, Sphere(), reference=True)(CONTEXT.float()),
            "Expected a reference of the label, as the head was built or scaled; got that of noth",
        ),
        (
            lambda: PosteriorHead(3, SKY, reference=["directions"]),
            "Expected references of blocks of the label space; got 'directions'. Blocks are "
            "direction, energy, vertex.",
        ),
        (
            lambda: PosteriorHead(3, Sphere(), reference=["direction"]),
            "got 'direction'. Blocks are none: it is no Product.",
        ),
        (lambda: sky({"dir": directions(6)}), "got 'dir'. Blocks are direction, energy, vertex"),
        (lambda: sky(SKY_REFERENCE[:, 3:]), "Expected reference of shape (..., 6) for Product("),
        (
            lambda: sky(SKY_REFERENCE[:4]),
            "Expected one reference for each context; got contexts of shape (6, 3) and references "
            "of shape (4, 6).",
        ),
        (lambda: sky(SKY_REFERENCE[0]), "Expected one reference for each context"),
        (lambda: sky(with_value(math.nan, 0)), "Expected finite labels; got nan in reference, row"),
        (lambda: sky(with_value(-2.0, 0)), "labels above 0 (Positive); got -2 in reference, row 4"),
        (lambda: sky(with_value(3.0, 4)), "in reference, row 4, column 'direction[0]'"),
        (
            lambda: sky({"direction": directions(6)[:, :2]}),
            "Expected reference['direction'] of shape (N, 3); got (6, 2). "
            "flowpost.directions.from_ra_dec and from_zenith_azimuth make vectors",
        ),
        (
            lambda: sky({"direction": directions(6), "energy": torch.ones(5)}),
            "Expected references of as many events each; got [(5,), (6,)].",
        ),
        (lambda: sky({"direction": directions(4)}), "Expected one reference for each context"),
        (
            lambda: sky({"direction": 2 * directions(6)}),
            "in reference, row 0, column 'direction[0]' (6 such of 6 events). Normalise them: ",
        ),
        (
            lambda: PosteriorHead(3, Sphere())(CONTEXT.float(), reference=torch.ones(6, 2)),
            "got (6, 2). Its columns are z[0], z[1], z[2]. flowpost.directions.from_ra_dec and",
        ),
        (lambda: sky({"direction": "north"}), "Expected reference['direction'] as a tensor"),
        (
            lambda: PosteriorHead(3, SKY).fit_scale(SKY_REFERENCE, reference=SKY_REFERENCE[:3]),
            "Expected reference of shape (6, 6) as the labels; got (3, 6). Give one first guess",
        ),
        (
            lambda: PosteriorHead(3, SKY, reference=True).fit_scale(SKY_REFERENCE),
            "got that of nothing. Pass reference=… wherever the head is called and to set_scales, "
            "fit_scale or fit.",
        ),
        (
            lambda: PosteriorHead(3, SKY).fit_scale(SKY_REFERENCE)(
                CONTEXT.float(), reference=SKY_REFERENCE
            ),
            "Expected a reference of nothing, as the head was built or scaled; got that of direc"
            "tion, energy, vertex. Pass reference=… wherever the head is called and to set_scales, "
            "fit_scale or fit, or nowhere; head.fit_scale(z, reference=…) scales it anew.",
        ),
        (
            lambda: PosteriorHead(3, SKY, reference=False).fit_scale(
                SKY_REFERENCE, None, {"direction": SKY_REFERENCE[:, 3:]}
            ),
            "got that of direction. Leave it out, or build the head with reference=None.",
        ),
        (
            lambda: PosteriorHead(3, SKY).fit_scale(SKY_REFERENCE, reference=SKY_REFERENCE)(
                CONTEXT.float()
            ),
            "Expected a reference of direction, energy, vertex, as the head was built or scaled",
        ),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


def test_every_method_asks_for_the_reference():
    head = PosteriorHead(3, Sphere(), reference=True)
    model = PosteriorModel(None, head)
    z = directions(6, torch.float32)
    for call in (head, lambda c: head.log_prob(c, z), lambda c: head.loss(c, z),
                 lambda c: head.to_base_and_log_prob(c, z), model,
                 lambda c: model.loss(c, z)):  # fmt: skip
        with pytest.raises(ValueError, match="Expected a reference of the label"):
            call(CONTEXT.float())
    assert model(CONTEXT, reference=z).batch_shape == (6,)
    assert torch.isfinite(model.loss(CONTEXT, z, reference=z))


@pytest.mark.parametrize("events", [1, 2])
def test_one_event_as_many(events):
    space = Product(energy=Positive(), direction=Sphere())
    head = PosteriorHead(3, space, "affine")
    named = {"energy": torch.ones(events), "direction": directions(events, torch.float32)}
    q = head(CONTEXT[:events].float(), reference=named)
    assert q.batch_shape == (events,)


# -------------------------------------------------------------------------------- save and load


def test_config_keeps_which_blocks_have_one():
    for given, kept in (
        (None, None),
        (False, []),
        (True, ["direction", "energy", "vertex"]),
        (["direction"], ["direction"]),
        (("vertex", "direction"), ["direction", "vertex"]),
    ):
        head = PosteriorHead(3, SKY, reference=given)
        assert head.config()["reference"] == kept
        assert referenced(head) == (kept or [])
        options = json.loads(json.dumps(head.config()))
        options["space"] = fp.spaces.space_from_config(options["space"])
        assert PosteriorHead(**options).config() == head.config()
    head = PosteriorHead(3, Sphere(), reference=True)
    assert referenced(head) == [""]
    options = {**head.config(), "space": Sphere()}
    assert PosteriorHead(**options).config()["reference"] == [""]


def test_scaling_decides_which_blocks_have_one():
    z = torch.cat([normal(50, 1).exp(), normal(50, 2), directions(50)], -1)
    head = PosteriorHead(3, SKY).fit_scale(z)
    assert referenced(head) == []
    head = PosteriorHead(3, SKY).fit_scale(z, reference=z + 0)
    assert referenced(head) == ["direction", "energy", "vertex"]
    head = PosteriorHead(3, SKY).fit_scale(z, reference={"direction": directions(50)})
    assert referenced(head) == ["direction"]


@pytest.mark.parametrize("directory", [False, True], ids=["file", "directory"])
@pytest.mark.parametrize("given", ["all", "direction", "label"])
def test_load_gives_the_same_numbers(tmp_path, given, directory):
    space, labels = LABELS["sphere" if given == "label" else "sky"]
    z = labels(300)
    near = _near(space, z)
    reference = {"direction": near[:, 3:]} if given == "direction" else near
    model = PosteriorModel(None, perturbed(space, "spline", size=0.1, dtype=torch.float32))
    model.head.fit_scale(z, reference=reference)
    path = tmp_path / ("model" if directory else "model.safetensors")
    fp.save(model, path)
    again = fp.load(path)
    assert again.head.config() == model.head.config()
    few = {k: v[:6] for k, v in reference.items()} if given == "direction" else reference[:6]
    expected = model(CONTEXT, reference=few)
    found = again(CONTEXT, reference=few)
    assert torch.equal(found.log_prob(z[:6]), expected.log_prob(z[:6]))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(*(q.sample((3,), g) for q, g in zip((found, expected), generators,
                                                           strict=True)))  # fmt: skip
    with pytest.raises(ValueError, match="Expected a reference of"):
        again(CONTEXT)


# ----------------------------------------------------------------------------------------- fit


N = 400


def problem():
    """Energies of unknown scale and directions of 3″ about a first guess of the event."""
    torch.manual_seed(7)
    x, guess = normal(N, 3), directions(N)
    sigma = 3 * ARCSEC
    off = sigma * normal(N).abs() * 1.2
    z = torch.stack(
        [at_angle(g, o, 6.28 * torch.rand(())) for g, o in zip(guess, off, strict=True)]
    )
    energy = (x[:, :1] + 0.1 * normal(N, 1)).exp()
    return x, torch.cat([energy, z], -1), guess


SPACE = Product(energy=Positive(), direction=Sphere())


def trained(data, val=0.2, space=SPACE, **options):
    torch.manual_seed(0)
    model = PosteriorModel(None, PosteriorHead(3, space, "affine"))
    history = fp.fit(model, data, val, epochs=3, batch_size=64, progress=False, **options)
    return model, history


class Events(Dataset):
    def __init__(self, **columns):
        self.columns = columns

    def __len__(self):
        return len(self.columns["z"])

    def __getitem__(self, i):
        return {
            k: {n: t[i] for n, t in v.items()} if isinstance(v, dict) else v[i]
            for k, v in self.columns.items()
        }


class TestFit:
    def test_by_name(self):
        x, z, guess = problem()
        model, history = trained({"x": x, "z": z, "reference": {"direction": guess}})
        assert referenced(model.head) == ["direction"]
        # whitened about the references: an arc-second is 24 nats of prior volume away
        assert history.best.val_nll < -16
        q = model(x, reference={"direction": guess})["direction"]
        resolution = q.angular_resolution(0.68).median().item()
        assert ARCSEC < resolution < 12 * ARCSEC

    def test_tensor(self):
        _, z, guess = problem()
        x = normal(N, 3)
        z = z[:, 1:]
        model, history = trained({"x": x, "z": z, "reference": guess}, space=Sphere())
        assert referenced(model.head) == [""]
        assert history.best.val_nll < -16
        value = model.loss(x, z, reference=guess)
        assert value.item() < -16

    @pytest.mark.parametrize("kind", ["dataset", "loader"])
    @pytest.mark.parametrize("named", [True, False], ids=["dict", "tensor"])
    def test_datasets_and_loaders_of_dicts(self, kind, named):
        x, z, guess = problem()
        reference = {"direction": guess} if named else torch.cat([z[:, :1].exp(), guess], -1)
        events = Events(x=x, z=z, reference=reference)
        if kind == "loader":
            data = DataLoader(events, batch_size=64, shuffle=True)
            model, history = trained(data, val={"x": x, "z": z, "reference": reference})
        else:
            model, history = trained(events)
        expected = ["direction"] if named else ["direction", "energy"]
        assert referenced(model.head) == expected
        assert history.best.val_nll < -15

    def test_dataset_trains_as_tensors(self):
        x, z, guess = problem()
        data = {"x": x, "z": z, "reference": {"direction": guess}}
        first, _ = trained(data, val=data)
        second, _ = trained(Events(**data), val=data)
        for a, b in zip(first.parameters(), second.parameters(), strict=True):
            torch.testing.assert_close(a, b)

    def test_with_masks_and_weights(self):
        x, z, guess = problem()
        known = torch.ones(N, 4, dtype=torch.bool)
        known[::3, 0] = False
        data = {
            "x": x,
            "z": torch.where(known, z, torch.nan),
            "mask": known,
            "weight": torch.rand(N),
            "reference": {"direction": guess},
        }
        model, history = trained(data)
        assert math.isfinite(history.best.val_nll)
        assert referenced(model.head) == ["direction"]
        full = {**data, "reference": torch.cat([torch.ones(N, 1).double(), guess], -1)}
        model, history = trained(full)
        assert math.isfinite(history.best.val_nll)

    def test_a_head_that_asks_for_one(self):
        x, z, guess = problem()
        model = PosteriorModel(None, PosteriorHead(3, SPACE, "affine", reference=["direction"]))
        with pytest.raises(ValueError, match="Expected a reference of direction, as the head"):
            fp.fit(model, {"x": x, "z": z}, epochs=1, progress=False)
        with pytest.raises(ValueError, match="Expected as many inputs as labels"):
            fp.fit(model, {"x": x, "z": z, "reference": {"direction": guess[:7]}}, epochs=1,
                   progress=False)  # fmt: skip


def test_a_guess_that_is_the_truth_trains_on():
    """Labels exactly at their references: finite losses and gradients on every rung."""
    for flow in ("mse", "diagonal", "affine", "spline"):
        for name, (space, labels) in LEAVES.items():
            head = PosteriorHead(3, space, flow)
            z = labels(6).float()
            if name == "vector":
                z = torch.nn.functional.normalize(z, dim=-1)
            loss = head.loss(CONTEXT.float(), z, reference=z)
            assert torch.isfinite(loss)
            for g in torch.autograd.grad(loss, list(head.parameters()), allow_unused=True):
                assert g is None or torch.isfinite(g).all()


def test_no_reference_is_no_change():
    """References are new: a head without them gives the numbers that it gave before."""
    space, labels = LABELS["sky"]
    head = perturbed(space, "spline", size=0.1)
    z = labels(6)
    free = head(CONTEXT)
    head._options["reference"] = []
    torch.testing.assert_close(head(CONTEXT).log_prob(z), free.log_prob(z))
    np.testing.assert_array_equal(head(CONTEXT)._flow.referenced, (False,) * 3)


def test_another_reference_is_another_run(tmp_path):
    """The numbers learned about a reference mean nothing without it."""
    x, z = torch.randn(400, 3), torch.randn(400, 1)
    model = fp.PosteriorModel(None, PosteriorHead(3, Real(), "diagonal"))
    options = {"epochs": 2, "batch_size": 200, "progress": False, "checkpoint": tmp_path / "run"}
    fp.fit(model, {"x": x, "z": z, "reference": z + 0.1}, **options)
    other = fp.PosteriorModel(None, PosteriorHead(3, Real(), "diagonal"))
    with pytest.raises(ValueError, match="was begun with \\(another head\\)"):
        fp.fit(other, (x, z), **options)


def test_weights_carry_which_blocks_have_one():
    z = torch.randn(50, 1)
    head = PosteriorHead(3, Real()).fit_scale(z, reference=z + 0.1)
    fresh = PosteriorHead(3, Real())
    fresh.load_state_dict(head.state_dict())
    with pytest.raises(ValueError, match="Expected a reference of the label"):
        fresh(torch.zeros(2, 3))
    before = {k: v for k, v in PosteriorHead(3, Real()).fit_scale(z).state_dict().items()
              if k != "referenced"}  # fmt: skip
    fresh = PosteriorHead(3, Real())
    fresh.load_state_dict(before)
    with pytest.raises(ValueError, match="Expected a reference of nothing"):
        fresh(torch.zeros(2, 3), reference=torch.zeros(2, 1))


def line(n=200):
    """Labels beside their references."""
    guess = 5 * torch.randn(n, 1)
    return torch.randn(n, 3), guess + 0.1 * torch.randn(n, 1), guess


def test_a_loop_without_scales_decides_too(tmp_path):
    """Labels relative to a reference are learned about it, whoever set the scales."""
    x, z, guess = line()
    model = PosteriorModel(None, PosteriorHead(3, Real(), "diagonal"))
    model.loss(x, z).backward()
    with torch.no_grad():
        model.loss(x, z, reference=guess)
    model.eval()
    model.loss(x, z, reference=guess)
    model.train()
    with pytest.raises(ValueError, match="one reference for each context"):
        model.loss(x, z, reference=guess[:7])
    assert referenced(model.head) == []
    buffer = model.head.referenced
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    for _ in range(3):
        optimizer.zero_grad()
        model.loss(x, z, reference=guess).backward()
        optimizer.step()
    assert referenced(model.head) == [""]
    # a copy for each device hands on what is set in place
    assert model.head.referenced is buffer
    fp.save(model, tmp_path / "model")
    fresh = PosteriorHead(3, Real(), "diagonal")
    fresh.load_state_dict(model.head.state_dict())
    text = "a reference of the label, as the head was called in training; got that of nothing. Pass"
    for own in (model, model.eval(), fp.load(tmp_path / "model"), PosteriorModel(None, fresh)):
        with pytest.raises(ValueError, match=text), torch.no_grad():
            own.loss(x, z)
        assert torch.isfinite(own.loss(x, z, reference=guess))


def test_a_loop_without_scales_decides_by_name():
    x, z, guess = problem()
    for form in (lambda m, r: -m(x, reference=r).log_prob(z).mean(),
                 lambda m, r: m.loss(x, z, None, torch.ones(N, 4).bool(), reference=r),
                 lambda m, r: fp.losses.joint_kl(m(x, reference=r), z)):  # fmt: skip
        model = PosteriorModel(None, PosteriorHead(3, SPACE, "diagonal").double())
        form(model, {"direction": guess})
        assert referenced(model.head) == ["direction"]
        with pytest.raises(ValueError, match=r"called in training; .* Give \{'direction': …\}"):
            form(model, z)
        # scaling is the beginning of another training
        model.set_scales(x, z)
        assert referenced(model.head) == []
        assert torch.isfinite(form(model, None))


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_a_compiled_loop_decides_too():
    x, z, guess = line(20)
    head = PosteriorHead(3, Real(), "diagonal")
    compiled = torch.compile(head.loss, backend="aot_eager")
    for _ in range(3):
        found = compiled(x, z, reference=guess)
        torch.testing.assert_close(found, head.loss(x, z, reference=guess))
        found.backward()
    assert referenced(head) == [""]
    with pytest.raises(ValueError, match="Expected a reference of the label"):
        head.loss(x, z)


def test_scaling_anew_decides_anew():
    x, z, guess = line()
    model = PosteriorModel(None, PosteriorHead(3, Real(), "diagonal")).set_scales(x, z)
    text = r"of nothing, as .* Pass reference=… .* to set_scales, .* head.fit_scale\(z, reference=…"
    for call in (model.loss, model.set_scales):
        with pytest.raises(ValueError, match=text):
            call(x, z, reference=guess)
    with pytest.raises(ValueError, match=text):
        fp.fit(model, {"x": x, "z": z, "reference": guess}, epochs=1, progress=False)
    wide = model.head.scale.item()
    model.head.fit_scale(z, reference=guess)
    assert model.head.scale.item() < 0.1 * wide
    assert torch.isfinite(model.loss(x, z, reference=guess))
    # nothing is left to set
    for again in (model.set_scales(x, z), model.set_scales(x, z, reference=guess)):
        assert referenced(again.head) == [""]
    with pytest.raises(ValueError, match="Expected a reference of the label"):
        model.loss(x, z)
    model.head.fit_scale(z)
    assert model.head.scale.item() == wide
    model.loss(x, z)


def test_a_bad_reference_is_named_by_its_own_row():
    x, z = torch.randn(300, 3), torch.rand(300, 1) + 0.1
    guess = z.clone()
    guess[17] = -1
    model = fp.PosteriorModel(None, PosteriorHead(3, Positive()))
    with pytest.raises(ValueError, match=r"in reference, row 17.*Every event needs a first guess"):
        fp.fit(model, {"x": x, "z": z, "reference": guess}, epochs=1, progress=False)


def test_a_masked_label_needs_no_reference():
    head = PosteriorHead(3, Product(energy=Positive(), vertex=Real()))
    z, known = torch.ones(4, 2), torch.ones(4, 2, dtype=torch.bool)
    known[2, 1] = False
    guess = z.clone()
    guess[2, 1] = torch.nan
    z[2, 1] = torch.nan
    assert torch.isfinite(head.log_prob(torch.zeros(4, 3), z, known, reference=guess)).all()


def test_fit_reads_no_reference_of_a_masked_label():
    space = Product(energy=Positive(), vertex=Real())
    x, z = torch.randn(200, 3), torch.rand(200, 2) + 0.1
    known = torch.ones(200, 2, dtype=torch.bool)
    known[::7, 1] = False
    guess = torch.where(known, z + 0.01, torch.nan)
    model = fp.PosteriorModel(None, PosteriorHead(3, space, "diagonal"))
    data = {"x": x, "z": z, "mask": known, "reference": {"vertex": guess[:, 1], "energy": z[:, 0]}}
    history = fp.fit(model, data, epochs=2, progress=False)
    assert math.isfinite(history.best.val_nll)


def test_forms_of_names():
    space = Product(a=Product(e=Positive(), d=Sphere()), y=Real())
    nested = {"a": {"e": torch.ones(2), "d": directions(2)}}
    plain = {"a.e": torch.ones(2), "a.d": nested["a"]["d"]}
    head = PosteriorHead(3, space).eval()
    z = head(torch.zeros(2, 3), reference=nested).sample(generator=torch.Generator().manual_seed(0))
    same = head(torch.zeros(2, 3), reference=plain).sample(
        generator=torch.Generator().manual_seed(0)
    )
    torch.testing.assert_close(z, same)
    assert head(torch.zeros(2, 3), reference={}).sample().shape == (2, 5)
    assert referenced(PosteriorHead(3, space, reference="a")) == ["a.d", "a.e"]
    with pytest.raises(ValueError, match="no reference of a direction that warps bend"):
        PosteriorHead(3, Sphere(), warps=2)(torch.zeros(2, 3), reference=directions(2))
