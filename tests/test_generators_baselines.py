"""The library and the sampling-only networks: exact statements, and conditional distributions."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn

import flowpost as fp
from flowpost.generators.base import NoiseNetwork, Sampler
from flowpost.generators.critic import Critic, fit_critic, gradient_penalty
from flowpost.generators.energy import Views, energy_score, fit_energy
from flowpost.generators.library import Library
from flowpost.likelihood import FlowLikelihood
from flowpost.metrics import energy_distance


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def network(data=2, noise=4, hidden=32, layers=2, seed=0, **options):
    torch.manual_seed(seed)
    return NoiseNetwork(fp.Real(1), data, noise=noise, hidden=hidden, layers=layers, **options)


def test_all_of_them_are_samplers():
    x, z = torch.randn(20, 2), torch.randn(20, 1)
    for one in (Library(x, z), network(), FlowLikelihood(fp.Real(1), data=2)):
        assert isinstance(one, Sampler)
        assert one.sample(z, generator()).shape == (20, 2)


# --- library -------------------------------------------------------------------------------------


def test_the_nearest_event_is_that_of_brute_force_in_units_of_the_standard_deviations():
    g = generator(1)
    z = torch.randn(300, 3, generator=g) * torch.tensor([1.0, 100.0, 0.01]) + 5
    x = torch.arange(300.0)[:, None]
    asked = torch.randn(200, 3, generator=g) * torch.tensor([1.0, 100.0, 0.01]) + 5
    unit = z.std(0, correction=0)
    far = torch.cdist((asked / unit).double(), (z / unit).double())
    assert torch.equal(Library(x, z).sample(asked)[:, 0].long(), far.argmin(1))
    found = Library(x, z, k=7).neighbours(asked)
    assert torch.equal(found, far.argsort(1)[:, :7])
    plain = torch.cdist(asked.double(), z.double()).argmin(1)
    assert not torch.equal(found[:, 0], plain)


def test_each_of_k_neighbours_is_drawn_equally_often():
    library = Library(torch.arange(50.0)[:, None], torch.arange(50.0), k=5)
    drawn = library.sample(torch.full((20_000,), 10.1), generator(2))[:, 0]
    values, counts = drawn.unique(return_counts=True)
    assert values.tolist() == [8, 9, 10, 11, 12]
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


def test_equal_labels_are_broken_at_random():
    """Two events at the label, four at the next: with k = 3 the four share the third place."""
    z = torch.tensor([0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 9.0])
    x = torch.arange(7.0)[:, None]
    asked = torch.full((30_000,), 0.1)
    once = Library(x, z).sample(asked, generator(3))[:, 0]
    assert stats.chisquare(np.bincount(once.long().numpy(), minlength=2)).pvalue > 1e-3
    three = Library(x, z, k=3).sample(asked, generator(4))[:, 0].long().numpy()
    expected = len(asked) * np.array([4, 4, 1, 1, 1, 1]) / 12
    assert stats.chisquare(np.bincount(three), expected).pvalue > 1e-3
    rows = Library(x, z, k=4).neighbours(asked[:1000], generator(5))
    assert bool((rows.sort(1).values.diff(dim=1) > 0).all())
    assert set(rows[:, :2].flatten().tolist()) == {0, 1}
    pairs = Library(x, z, k=4).neighbours(asked, generator(6))[:, 2:].sort(1).values
    _, counts = pairs.unique(dim=0, return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts.numpy()).pvalue > 1e-3


@pytest.mark.parametrize("k", [2, 5])
def test_interpolation_keeps_the_mean_and_shrinks_the_variance_to_2_in_k_plus_1(k):
    x = torch.randn(40_000, 1, generator=generator(7), dtype=torch.float64) + 3
    z = torch.zeros(40_000)
    mixed = Library(x, z, k=k, interpolate=True).sample(z, generator(8))
    chosen = Library(x, z, k=k).sample(z, generator(9))
    assert float(mixed.mean()) == pytest.approx(3, abs=0.02)
    assert float(mixed.var()) == pytest.approx(2 / (k + 1), rel=0.04)
    assert float(chosen.var()) == pytest.approx(1, rel=0.04)
    inside = Library(torch.tensor([[0.0], [1.0]]), torch.zeros(2), k=2, interpolate=True)
    drawn = inside.sample(torch.zeros(5000), generator(10))[:, 0]
    # of two events the weight of one is uniform
    assert stats.kstest(drawn.numpy(), "uniform").pvalue > 1e-3


def test_library_returns_events_as_they_are():
    x = torch.arange(24).reshape(4, 2, 3)
    library = Library(x, torch.arange(4))
    assert torch.equal(library.sample(torch.tensor([2.2])), x[2:3].to(torch.get_default_dtype()))
    double = Library(x.double(), torch.arange(4.0), k=3, interpolate=True)
    assert double.sample(torch.zeros(5)).shape == (5, 2, 3)
    assert double.sample(torch.zeros(5)).dtype == torch.float64
    assert str(double) == "Library(4 events, interpolating k=3)"
    assert library.sample(torch.zeros(0)).shape == (0, 2, 3)
    constant = Library(torch.eye(3), torch.zeros(3, 2))
    assert constant.sample(torch.ones(1, 2)).sum() == 1


def test_library_is_reproducible_and_leaves_the_global_state():
    library = Library(torch.randn(30, 2), torch.randn(30), k=4)
    before = torch.get_rng_state()
    a, b, c = (library.sample(torch.zeros(9), generator(s)) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.equal(before, torch.get_rng_state())


# --- energy score --------------------------------------------------------------------------------


def test_energy_score_is_its_definition():
    g = generator(11)
    draws, x = torch.randn(4, 6, 3, generator=g).double(), torch.randn(6, 3, generator=g).double()
    for i in range(6):
        own = [
            float((draws[a, i] - draws[b, i]).norm()) for a in range(4) for b in range(4) if a != b
        ]
        far = float((draws[:, i] - x[i]).norm(dim=1).mean())
        score = energy_score(draws, x)[i]
        assert float(score) == pytest.approx(far - np.mean(own) / 2, abs=1e-14)


def test_energy_score_is_proper_by_half_the_energy_distance():
    """Of normals: E|x - y| of width s is s √(2/π) about its own mean, and closed off it."""
    g = generator(12)
    n = 200_000
    x = torch.randn(n, 1, generator=g, dtype=torch.float64)
    q = 0.7 + 1.5 * torch.randn(2, n, 1, generator=g, dtype=torch.float64)
    p = torch.randn(2, n, 1, generator=g, dtype=torch.float64)

    def mean_size(shift, width):
        normal = stats.norm(shift, width)
        return normal.expect(abs)

    right = mean_size(0, math.sqrt(2)) / 2
    wrong = mean_size(0.7, math.sqrt(1 + 1.5**2)) - mean_size(0, 1.5 * math.sqrt(2)) / 2
    assert float(energy_score(p, x).mean()) == pytest.approx(right, abs=0.01)
    assert float(energy_score(q, x).mean()) == pytest.approx(wrong, abs=0.01)
    half = float(energy_distance(x[:4000], q[0, :4000])) / 2
    assert wrong - right == pytest.approx(half, abs=0.03)
    assert right < wrong


def test_views_are_in_units_of_their_spread_and_add_up():
    g = generator(13)
    x = torch.randn(500, 3, generator=g) * torch.tensor([1.0, 1000.0, 0.0]) + 7
    views = Views([lambda v: v.sum(1, keepdim=True)], x)
    whole, total = views(x)
    assert torch.allclose(whole.std(0, correction=0)[:2], torch.ones(2), atol=1e-4)
    assert float(whole[:, 2].abs().max()) == 0
    assert views.columns == 4
    draws = x[torch.randperm(500, generator=g)].expand(2, -1, -1) + torch.zeros(2, 1, 1)
    draws = torch.stack([draws[0], x])
    a = energy_score(torch.stack([views(d)[0] for d in draws]), whole) / 3**0.5
    b = energy_score(torch.stack([views(d)[1] for d in draws]), total)
    assert torch.allclose(views.score(draws, x), (a + b) / 2, atol=1e-5)


# --- critic --------------------------------------------------------------------------------------


def test_gradient_penalty_of_a_linear_critic_in_closed_form():
    g = generator(14)
    x, y = torch.randn(2, 50, 4, generator=g, dtype=torch.float64)
    a = torch.randn(4, generator=g, dtype=torch.float64, requires_grad=True)
    value = gradient_penalty(lambda v: v @ a, x, y, g)
    assert value.item() == pytest.approx(float((a.detach().norm() - 1) ** 2), rel=1e-12)
    (slope,) = torch.autograd.grad(value, a)
    expected = 2 * (a.norm() - 1) * a / a.norm()
    assert torch.allclose(slope, expected.detach(), rtol=1e-10)


def test_gradient_penalty_is_taken_between_the_events():
    seen = []

    def critic(v):
        seen.append(v.detach())
        return v.square().sum(1) / 2

    x, y = torch.zeros(2000, 2), torch.tensor([3.0, 4.0]).expand(2000, 2)
    value = gradient_penalty(critic, x, y, generator(15))
    share = seen[0][:, 0] / 3
    assert torch.allclose(seen[0][:, 1] / 4, share, atol=1e-6)
    assert stats.kstest(share.numpy(), "uniform").pvalue > 1e-3
    # the slope is |v| = 5 u
    assert value.item() == pytest.approx(float((5 * share - 1).square().mean()), rel=1e-5)


def test_gradient_penalty_of_a_critic_without_slope_has_a_finite_gradient():
    a = torch.zeros(3, requires_grad=True)
    value = gradient_penalty(lambda v: v @ a, torch.zeros(5, 3), torch.ones(5, 3))
    value.backward()
    assert value.item() == 1
    assert bool(torch.isfinite(a.grad).all())


# --- trainings -----------------------------------------------------------------------------------


def correlated(z, g):
    """A normal whose mean, width and correlation go with the label."""
    width = 0.5 + 0.3 * torch.sigmoid(z[:, :1])
    rho = 0.8 * torch.tanh(z[:, :1])
    e = torch.randn(len(z), 2, generator=g)
    e = torch.cat([e[:, :1], rho * e[:, :1] + (1 - rho**2).sqrt() * e[:, 1:]], 1)
    return torch.cat([z[:, :1], -z[:, :1].square() / 2], 1) + width * e


def moments(x):
    return torch.cat([x.mean(0), x.std(0), torch.corrcoef(x.T)[0, 1:]])


def exact(v):
    width, rho = 0.5 + 0.3 / (1 + math.exp(-v)), 0.8 * math.tanh(v)
    return torch.tensor([v, -(v**2) / 2, width, width, rho])


@pytest.mark.parametrize(
    ("fit", "options", "mean", "width", "correlation"),
    [
        (fit_energy, {"epochs": 18, "lr": 3e-3, "batch_size": 128}, 0.10, 0.12, 0.25),
        pytest.param(
            fit_critic,
            {"epochs": 18, "batch_size": 64},
            0.20,
            0.25,
            0.4,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["energy", "critic"],
)
def test_a_conditional_normal_is_learned(fit, options, mean, width, correlation):
    g = generator(16)
    z = torch.randn(4000, 1, generator=g)
    net = network()
    history = fit(net, correlated(z, g), z, progress=False, **options)
    assert not net.training
    assert history.best.val == min(e.val for e in history.epochs) < 0.75 * history.epochs[0].val
    assert f"in epoch {history.best.epoch}" in str(history)
    for v in (-1.0, 0.0, 1.0):
        found = moments(net.sample(torch.full((20_000, 1), v), g))
        off = (found - exact(v)).abs()
        assert float(off[:2].max()) < mean, (v, found)
        assert float((off[2:4] / exact(v)[2:4]).max()) < width, (v, found)
        assert float(off[4]) < correlation, (v, found)


@pytest.mark.slow
def test_a_ring_is_learned_by_the_energy_score():
    """Radius 1 to 2 by the label, 0.1 thick; a map of noise cannot leave the inside quite empty."""
    g = generator(17)

    def ring(z):
        angle = 2 * math.pi * torch.rand(len(z), generator=g)
        radius = z[:, 0] + 0.1 * torch.randn(len(z), generator=g)
        return radius[:, None] * torch.stack([angle.cos(), angle.sin()], 1)

    z = 1 + torch.rand(6000, 1, generator=g)
    net = network(noise=3, hidden=64, layers=3)
    fit_energy(net, ring(z), z, epochs=20, lr=4e-3, batch_size=128, progress=False)
    for v in (1.2, 1.8):
        x = net.sample(torch.full((10_000, 1), v), g)
        radius, angle = x.norm(dim=1), torch.atan2(x[:, 1], x[:, 0])
        assert float(radius.median()) == pytest.approx(v, abs=0.1)
        assert float((radius < 0.5 * v).float().mean()) < 0.08
        low, high = radius.quantile(torch.tensor([0.16, 0.84])).tolist()
        assert 0.07 < (high - low) / 2 < 0.3
        assert stats.kstest(angle.numpy() / (2 * math.pi) + 0.5, "uniform").statistic < 0.06


@pytest.mark.parametrize("fit", [fit_energy, fit_critic])
def test_trainings_are_reproducible_in_both_precisions(fit):
    g = generator(18)
    z = torch.randn(200, 1, generator=g)
    x = correlated(z, g)
    state = torch.get_rng_state()
    found = []
    for seed in (0, 0, 1):
        net = network(hidden=8).double()
        fit(net, x, z, epochs=2, batch_size=50, seed=seed, progress=False)
        found.append(net.sample(z, generator()))
    torch.set_rng_state(state)
    assert found[0].dtype == torch.float64
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    net = network(hidden=8)
    state = torch.get_rng_state()
    quick = {"epochs": 1, "batch_size": 50, "views": [lambda v: v.sum(1, True)]}
    fit(net, x, z, (x[:50], z[:50]), **quick, progress=False)
    assert torch.equal(state, torch.get_rng_state())
    assert net.sample(z).dtype == torch.float32


def test_the_output_is_applied_and_scales_are_those_of_the_training_part():
    g = generator(19)
    z = torch.randn(500, 1, generator=g)
    x = (3 + 5 * torch.randn(500, 2, generator=g)).clamp_min(0)
    net = network(output=nn.ReLU())
    history = fit_energy(net, x, z, epochs=30, lr=3e-3, batch_size=50, progress=False)
    y = net.sample(torch.randn(20_000, 1, generator=g), g)
    assert float(y.min()) == 0
    share = (x == 0).float().mean(0)
    assert torch.allclose((y == 0).float().mean(0), share, atol=0.1)
    assert math.isnan(history.best.critic)
    fixed = network()
    fixed.fit_scale(torch.tensor([[0.0, 4.0], [2.0, 4.0]]), torch.zeros(2, 1))
    assert torch.equal(fixed.loc, torch.tensor([1.0, 4.0]))
    assert torch.equal(fixed.scale, torch.tensor([1.0, 1.0]))


def test_a_training_that_diverges_says_so():
    z = torch.randn(100, 1)
    with pytest.raises(ValueError, match="finite loss; got nan"):
        fit_energy(
            network(output=Broken()),
            torch.randn(100, 2),
            z,
            epochs=2,
            batch_size=50,
            progress=False,
        )


class Broken(nn.Module):
    def forward(self, x):
        return x * math.nan


X, Z = torch.randn(60, 2), torch.randn(60, 1)
QUICK = {"epochs": 1, "progress": False}
BAD = [
    (lambda: Library(X, Z[:5]), r"labels of shape \(60, D\); got \(5, 1\)"),
    (lambda: Library(X[:0], Z[:0]), "at least one event"),
    (lambda: Library(X * math.nan, Z), "finite x; got nan"),
    (lambda: Library(X, Z / 0), "finite labels"),
    (lambda: Library(X, Z, k=61), "at least k = 61 events; got 60. Lower k"),
    (lambda: Library(X, Z, k=0), "k as a whole number of at least 1"),
    (lambda: Library(X, Z, interpolate=True), "k of at least 2 to interpolate"),
    (lambda: Library(X, Z).sample(torch.zeros(4, 2)), r"labels of shape \(M, 1\); got \(4, 2\)"),
    (lambda: Library(X, Z).sample(Z * math.nan), "finite labels; got nan"),
    (lambda: NoiseNetwork(2, 3), "label space first; got 2"),
    (lambda: NoiseNetwork(fp.Real(1), 0), "data as a whole number"),
    (lambda: network().sample(torch.zeros(4, 2)), r"labels of shape \(N, 1\)"),
    (lambda: NoiseNetwork(fp.Positive(), 2).sample(-torch.ones(3, 1)), "Expected labels"),
    (lambda: energy_score(torch.zeros(1, 4, 2), torch.zeros(4, 2)), "at least two draws"),
    (lambda: energy_score(torch.zeros(2, 4, 2), torch.zeros(5, 2)), r"shape \(S, 5, 2\)"),
    (lambda: fit_energy(network(), X, Z, draws=1, **QUICK), "draws as a whole number"),
    (lambda: fit_energy(network(3), X, Z, **QUICK), r"x of shape \(N, 3\); got \(60, 2\)"),
    (lambda: fit_energy(network(), X * math.inf, Z, **QUICK), "finite x"),
    (lambda: fit_energy(network(), X, Z, 0.0, **QUICK), "val as a share"),
    (lambda: fit_energy(network(), X, Z, (X,), **QUICK), r"held-out events \(x, z\); got tuple"),
    (lambda: fit_energy(network(), X, Z, views=[3], **QUICK), "views as functions of data; got in"),
    (lambda: fit_energy(network(), X, Z, views=[torch.sum], **QUICK), "a view of shape"),
    (lambda: fit_energy(nn.Linear(2, 2), X, Z, **QUICK), "a NoiseNetwork; got Linear"),
    (lambda: fit_critic(network(), X, Z, every=0, **QUICK), "every as a whole number"),
    (lambda: fit_critic(network(), X, Z, penalty=-1.0, **QUICK), "penalty of at least 0; got -1"),
    (lambda: fit_critic(network(), X, Z, penalty=None, **QUICK), "penalty of at least 0; got None"),
    (lambda: fit_critic(network(), X, Z, every=2, **QUICK), "every of at most 1, .* got 2"),
    (
        lambda: fit_critic(network(), X, Z, critic=Critic(fp.Real(1), 3), **QUICK),
        "a critic of 2 inputs, the columns of data and views; got one of 3",
    ),
    (lambda: gradient_penalty(torch.sum, X, X[:5]), r"y of shape \(60, 2\)"),
    (lambda: Critic(fp.Real(1), 2, layers=0), "layers as a whole number"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()
