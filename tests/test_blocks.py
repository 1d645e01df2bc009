"""q["name"]: the marginal of a block, against numerical integration of the joint density."""

import functools

import numpy as np
import pytest
import torch
from quadrature import grid

from flowpost.head import PosteriorHead
from flowpost.posterior import BlockPosterior, Posterior, base, block, statistics
from flowpost.spaces import Interval, Positive, Product, Real


def head_of(space, flow="spline", *, context=3, size=0.15, coupling=False):
    """A head with random parameters and clear dependence between blocks."""
    torch.manual_seed(2)
    head = PosteriorHead(
        context, space, flow=flow, layers=2, bins=6, hidden=8, coupling=coupling
    ).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(size * torch.randn_like(p))
        if head.flow._pairs:
            start = head.flow._sections[0] + head.flow._sections[1]
            head.flow.bias[start : start + len(head.flow._pairs)] = 0.9
    head.scale = torch.full_like(head.scale, 0.4)
    return head


def posterior_of(space, flow="spline", events=4, **options):
    return head_of(space, flow, **options)(torch.randn(events, 3).double()).detach()


PAIRS = {
    "real-real": (Real(), Real()),
    "positive-real": (Positive(), Real()),
    "real-interval": (Real(), Interval(-1.0, 2.0)),
}


@functools.cache
def joint_density(pair, flow):
    leaves = PAIRS[pair]
    q = posterior_of(Product(a=leaves[0], b=leaves[1]), flow, events=1)[0]
    draws = q.sample((5000,), torch.Generator().manual_seed(0))
    a, b = (grid(leaf, draws[:, i], 601) for i, leaf in enumerate(leaves))
    z = torch.tensor(np.stack(np.meshgrid(a, b, indexing="ij"), -1))
    p = torch.stack([q.log_prob(row) for row in z]).exp().numpy()
    return q, a, b, p


@pytest.mark.parametrize("flow", ["affine", "spline"])
@pytest.mark.parametrize("pair", PAIRS)
class TestAgainstIntegralsOfTheJointDensity:
    def test_first_block_is_exact(self, pair, flow):
        q, a, b, p = joint_density(pair, flow)
        first = q["a"]
        assert type(first) is Posterior
        expected = np.trapezoid(p, b, axis=1)
        found = first.log_prob(torch.tensor(a).unsqueeze(-1)).exp()
        # narrow conditionals cost the quadrature some per cent at single points
        assert np.trapezoid(np.abs(found.numpy() - expected), a) < 0.03
        u = torch.randn(20, 1).double()
        torch.testing.assert_close(first.to_base(first.from_base(u)), u)

    def test_second_block_is_the_mixture(self, pair, flow):
        q, a, b, p = joint_density(pair, flow)
        expected = np.trapezoid(p, a, axis=0)
        assert np.trapezoid(expected, b) == pytest.approx(1, abs=2e-3)
        few, many = q["b"], q.block("b", draws=4096)
        assert isinstance(few, BlockPosterior)
        found = few.log_prob(torch.tensor(b).unsqueeze(-1)).exp()
        assert np.trapezoid(found, b) == pytest.approx(1, abs=2e-3)
        # draws of narrow conditionals are noisy at single points
        assert np.trapezoid(np.abs(found.numpy() - expected), b) < 0.05
        found = many.log_prob(torch.tensor(b[::3]).unsqueeze(-1)).exp()
        assert np.trapezoid(np.abs(found.numpy() - expected[::3]), b[::3]) < 0.01
        # it is neither the conditional at the centre nor the density at any one draw
        fixed = p[np.argmax(np.trapezoid(p, b, axis=1))]
        assert np.abs(fixed / np.trapezoid(fixed, b) - expected).max() > 0.05 * expected.max()


def test_gaussian_blocks_in_closed_form():
    head = head_of(Product(a=Real(2), b=Real(2)), "affine", context=0)
    q = head(None).detach()
    zero = torch.zeros(4).double()
    matrix = torch.stack([q.from_base(zero + e) - q.from_base(zero) for e in torch.eye(4)], -1)
    mean, covariance = q.from_base(zero), matrix @ matrix.T
    z = torch.randn(50, 2).double() * covariance.diagonal()[:2].sqrt() + mean[:2]
    first = torch.distributions.MultivariateNormal(mean[:2], covariance[:2, :2])
    torch.testing.assert_close(q["a"].log_prob(z), first.log_prob(z))
    second = torch.distributions.MultivariateNormal(mean[2:], covariance[2:, 2:])
    z = second.sample((200,))
    found = q.block("b", draws=8192)
    assert (found.log_prob(z) - second.log_prob(z)).abs().mean() < 0.02
    for part, exact in ((q["a"], first), (q["b"], second)):
        assert ((part.mean - exact.mean).abs() < 0.02 * exact.stddev).all()
        torch.testing.assert_close(part.stddev, exact.stddev, rtol=0.02, atol=0)
        assert part.entropy().item() == pytest.approx(exact.entropy().item(), abs=0.03)
        assert ((part.mode - exact.mean).abs() < 0.1 * exact.stddev).all()
        low, high = part.interval(0.9)
        torch.testing.assert_close(high - low, 2 * 1.644854 * exact.stddev, rtol=0.03, atol=0)


THREE = Product(e=Positive(), x=Real(2), y=Interval(-1.0, 2.0))


@pytest.mark.parametrize("coupling", [False, True], ids=["autoregressive", "coupling"])
@pytest.mark.parametrize("name", ["e", "x", "y"])
def test_draws_of_a_block_are_columns_of_the_draws(name, coupling):
    q = posterior_of(THREE, coupling=coupling)
    part = q[name]
    columns = {"e": slice(0, 1), "x": slice(1, 3), "y": slice(3, 4)}[name]
    assert part.space == THREE.spaces[name]
    assert part.batch_shape == (4,)
    assert part.event_shape == (THREE.spaces[name].label_size,)
    torch.testing.assert_close(part.mean, q.mean[:, columns], rtol=0.02, atol=0.02)
    torch.testing.assert_close(part.quantile([0.5]), q.quantile([0.5])[..., columns],
                               rtol=0.03, atol=0.03)  # fmt: skip
    z = part.sample((10_000,), torch.Generator().manual_seed(0))
    whole = q.sample((10_000,), torch.Generator().manual_seed(1))[..., columns]
    assert ((z.mean(0) - whole.mean(0)).abs() < 0.05 * whole.std(0)).all()
    assert part.support.check(z).all()


@pytest.mark.parametrize("chunk", [70, 500, 2000])
def test_size_of_chunks_changes_nothing(monkeypatch, chunk):
    part = posterior_of(THREE).block("y", draws=16)
    z = part.sample((2, 2), torch.Generator().manual_seed(0))

    def numbers():
        return [part.log_prob(z), part.entropy(32), part.mean, part.log_prob(z[0, 0, :1])]

    expected = numbers()
    for module in (statistics, base, block):
        monkeypatch.setattr(module, "CHUNK", chunk)
    for a, b in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_density_of_each_event_is_its_own():
    q = posterior_of(THREE)
    part, z = q["y"], torch.linspace(-0.5, 1.5, 4).double().unsqueeze(-1)
    value = part.log_prob(z)
    for i in range(4):
        torch.testing.assert_close(q[i]["y"].log_prob(z[i]), value[i])
        torch.testing.assert_close(part[i].log_prob(z[i]), value[i])
    torch.testing.assert_close(part.expand((3, 4)).log_prob(z), value.expand(3, 4))


def test_labels_that_broadcast_inside_the_batch():
    head = head_of(Product(a=Real(), b=Real()))
    q = head(torch.randn(3, 1, 3).double()).detach()["b"]
    z = torch.randn(3, 5, 1).double()
    expected = torch.stack([q[i, 0].log_prob(z[i]) for i in range(3)])
    torch.testing.assert_close(q.log_prob(z), expected)


def test_no_events():
    part = posterior_of(THREE)[:0]["y"]
    assert part.log_prob(torch.zeros(0, 1)).shape == (0,)
    assert part.mean.shape == (0, 1)


def test_generator_and_global_random_state():
    part = posterior_of(THREE)["y"]
    state = torch.get_rng_state()
    first = part.sample_and_log_prob((5,), torch.Generator().manual_seed(1))
    second = part.sample_and_log_prob((5,), torch.Generator().manual_seed(1))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
    torch.testing.assert_close(part.log_prob(first[0]), first[1])
    assert torch.equal(part.log_prob(first[0]), part.log_prob(first[0]))
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_of_a_marginal_density():
    """The draws of the earlier blocks move with the network, and so does the gradient."""
    head = head_of(Product(a=Real(), b=Real()), "affine", context=0)
    z = torch.linspace(-0.5, 0.5, 5).double().unsqueeze(-1)

    def value():
        return head(None)["b"].log_prob(z).sum()

    (gradient,) = torch.autograd.grad(value(), head.flow.bias)
    for i, g in enumerate(gradient.tolist()):
        ends = []
        for sign in (1, -1):
            with torch.no_grad():
                head.flow.bias[i] += sign * 1e-5
                ends.append(value().item())
                head.flow.bias[i] -= sign * 1e-5
        assert g == pytest.approx((ends[0] - ends[1]) / 2e-5, rel=1e-4, abs=1e-6)


NESTED = Product(a=Positive(), b=Product(x=Real(), y=Interval(-1.0, 2.0)), c=Real())


def test_nested_blocks():
    q = posterior_of(NESTED)
    pair = q["b"]
    assert pair.event_shape == (2,)
    assert pair.space.label_size == 2
    z = q.sample((3,))
    for name, column in (("a", 0), ("b.x", 1), ("b.y", 2), ("c", 3)):
        assert q[name].event_shape == (1,)
        assert q[name].log_prob(z[..., column : column + 1]).shape == (3, 4)
    assert pair.log_prob(z[..., 1:3]).isfinite().all()


def test_block_of_a_block_is_the_block():
    q = posterior_of(NESTED)
    pair, z = q["b"], q.sample((3,))
    inner = pair[pair.space.blocks[0].name]
    assert inner.space == Real()
    torch.testing.assert_close(
        inner.log_prob(z[..., 1:2]), q["b.x"].log_prob(z[..., 1:2]), rtol=1e-6, atol=1e-6
    )
    last = pair[pair.space.blocks[1].name]
    assert last.space == Interval(-1.0, 2.0)
    assert ((last.mean - q["b.y"].mean).abs() < 0.02).all()


def test_names_inside_a_block_are_relative():
    q = posterior_of(NESTED)
    assert q["b"].space == NESTED.spaces["b"]
    assert set(q["b"].space.unpack(q["b"].sample())) == {"x", "y"}
    torch.testing.assert_close(q["b"]["x"].mean, q["b.x"].mean, rtol=0.02, atol=0.02)


def test_leading_blocks_of_a_nested_product_are_exact():
    space = Product(b=Product(x=Real(), y=Positive()), c=Real())
    q = posterior_of(space)
    assert type(q["b"]) is Posterior
    assert type(q["b.x"]) is Posterior
    assert isinstance(q["b.y"], BlockPosterior)
    z = q.sample((2,))
    u = q.to_base(z)
    torch.testing.assert_close(q["b"].to_base(z[..., :2]), u[..., :2])


@pytest.mark.parametrize("name", ["energy", "", "B", "b.", "b.z"])
def test_unknown_names(name):
    q = posterior_of(NESTED)
    with pytest.raises(ValueError, match=r"Expected the name of a block; got .* a, b.x, b.y, c"):
        q[name]


def test_no_names_without_a_product():
    with pytest.raises(ValueError, match="the space is no Product"):
        posterior_of(Real(2))["z"]


def test_a_mixture_has_no_base():
    part = posterior_of(THREE)["y"]
    z = torch.zeros(4, 1)
    for function in (
        part.to_base,
        part.from_base,
        part.cdf,
        part.icdf,
        part.credibility,
        part.to_base_and_log_prob,
    ):
        with pytest.raises(ValueError, match=r"is a mixture and has no .* Use that of the whole"):
            function(z)


def test_labels_of_a_block_are_checked():
    q = posterior_of(THREE)
    with pytest.raises(ValueError, match="strictly inside Interval"):
        q["y"].log_prob(torch.full((4, 1), 2.5))
    with pytest.raises(ValueError, match="labels above 0"):
        q["e"].log_prob(torch.full((4, 1), -1.0))
    with pytest.raises(ValueError, match="Expected draws"):
        q.block("y", draws=0)


def test_detach_and_cast_of_a_block():
    head = head_of(THREE)
    part = head(torch.randn(4, 3).double())["y"]
    z = torch.zeros(4, 1).double()
    assert part.log_prob(z).requires_grad
    assert not part.detach().log_prob(z).requires_grad
    single = part.to(torch.float32)
    assert single.sample().dtype == torch.float32
    assert (single.log_prob(z).double() - part.log_prob(z)).abs().max() < 1e-3
