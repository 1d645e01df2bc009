"""Posterior: a torch Distribution whose numbers agree with closed forms, scipy and quadrature."""

import math

import numpy as np
import pytest
import torch
from scipy import stats
from spherical import grown

from flowpost.head import PosteriorHead
from flowpost.posterior import Posterior, Summary, base, block, statistics
from flowpost.spaces import Interval, Positive, Product, Real

SPACES = {
    "real": Real(1),
    "real3": Real(3),
    "positive": Positive(2),
    "interval": Interval(-1.0, 2.0),
    "product": Product(e=Positive(), x=Real(2), y=Interval(-1.0, 2.0)),
}


def head_of(space, flow="spline", *, context=3, size=0.15, dtype=torch.float64, **options):
    """A head with random parameters everywhere."""
    torch.manual_seed(1)
    head = PosteriorHead(context, space, flow=flow, layers=2, bins=6, hidden=8, **options).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(size * torch.randn_like(p))
    head.scale = torch.full_like(head.scale, 0.4)
    return grown(head).to(dtype)


def posterior_of(space, flow="spline", events=6, dtype=torch.float64, **options):
    head = head_of(space, flow, dtype=dtype, **options)
    return head(torch.randn(events, 3, dtype=dtype)).detach()


def gaussian(mean, scale_tril):
    """N(mean, scale_tril scale_trilᵀ) as an unconditional head, without fitting."""
    mean = torch.as_tensor(mean, dtype=torch.float64)
    scale_tril = torch.as_tensor(scale_tril, dtype=torch.float64)
    d = len(mean)
    head = PosteriorHead(0, Real(d), flow="affine").double()
    width = scale_tril.diagonal().log()
    lower = torch.linalg.inv(scale_tril / scale_tril.diagonal()[:, None]).tril(-1)
    entries = [lower[i, j] for i in range(d) for j in range(i)]
    with torch.no_grad():
        # log widths are softly bounded by 14 tanh(w / 14)
        head.flow.bias.copy_(
            torch.cat(
                [mean, 14 * torch.atanh(width / 14), torch.tensor(entries, dtype=torch.float64)]
            )
        )
    return head(None)


def lognormal(mu, sigma):
    head = PosteriorHead(0, Positive(), flow="diagonal").double()
    with torch.no_grad():
        head.flow.bias.copy_(
            torch.tensor([mu, 14 * math.atanh(math.log(sigma) / 14)], dtype=torch.float64)
        )
    return head(None)


def chunk_size(monkeypatch, size):
    for module in (statistics, base, block):
        monkeypatch.setattr(module, "CHUNK", size)


@pytest.fixture(params=SPACES)
def q(request):
    return posterior_of(SPACES[request.param])


# ------------------------------------------------------------------------- torch's Distribution


def test_is_a_torch_distribution(q):
    d = q.space.label_size
    assert isinstance(q, torch.distributions.Distribution)
    assert q.batch_shape == (6,)
    assert q.event_shape == (d,)
    assert q.arg_constraints == {}
    assert q.has_rsample
    assert q.support.check(q.sample((10,))).all()
    assert q.support.event_dim == 1
    assert q.dtype == torch.float64
    assert q.device.type == "cpu"
    assert len(q) == 6
    assert f"event_shape=({d}," in repr(q)


@pytest.mark.parametrize("sample_shape", [(), (4,), (2, 3)])
def test_shapes(q, sample_shape):
    z = q.sample(sample_shape)
    assert z.shape == (*sample_shape, 6, q.space.label_size)
    assert q.rsample(sample_shape).shape == z.shape
    assert q.log_prob(z).shape == (*sample_shape, 6)
    assert q.to_base(z).shape == (*sample_shape, 6, q.dof)
    assert q.credibility(z).shape == (*sample_shape, 6)
    draws, log_prob = q.sample_and_log_prob(sample_shape)
    assert draws.shape == z.shape
    assert log_prob.shape == (*sample_shape, 6)


def test_expand(q):
    wide = q.expand((4, 6))
    assert isinstance(wide, Posterior)
    assert wide.batch_shape == (4, 6)
    assert wide.event_shape == q.event_shape
    z = q.sample((4,))
    torch.testing.assert_close(wide.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(wide.mean, q.mean.expand(4, 6, -1))
    assert wide.sample((2,)).shape == (2, 4, 6, q.space.label_size)


def test_works_inside_torch_independent(q):
    joint = torch.distributions.Independent(q, 1)
    z = q.sample((5,))
    torch.testing.assert_close(joint.log_prob(z), q.log_prob(z).sum(-1))
    assert joint.sample((5,)).shape == z.shape


def test_unconditional_has_no_batch():
    q = head_of(Real(2), context=0)(None)
    assert q.batch_shape == ()
    assert q.sample().shape == (2,)
    assert q.log_prob(torch.zeros(7, 2)).shape == (7,)
    assert q.mean.shape == (2,)
    with pytest.raises(TypeError, match="no length"):
        len(q)
    with pytest.raises(IndexError, match="no batch to index"):
        q[0]


def test_to_another_floating_type(q):
    single = q.to(torch.float32)
    assert single.dtype == torch.float32
    assert single.sample().dtype == torch.float32
    # the label that float32 holds, away from where an Interval rounds
    z = q.from_base(torch.zeros(6, q.dof)).float()
    assert q.dtype == torch.float64
    assert (single.log_prob(z).double() - q.log_prob(z)).abs().max() < 1e-3


@pytest.mark.parametrize(
    "index",
    [
        2,
        -1,
        slice(1, 4),
        slice(None, None, 2),
        [0, 3, 3],
        [True, False, True, False, False, True],
        torch.tensor([4, 1]),
        torch.tensor([True, False, True, False, False, True]),
        np.array([5, 0]),
        Ellipsis,
        None,
        (Ellipsis, 2),
        (Ellipsis, slice(1, 3)),
    ],
    ids=str,
)
def test_index_as_a_tensor_of_the_batch(index):
    q = posterior_of(SPACES["product"])
    events = torch.arange(6)[torch.as_tensor(index) if isinstance(index, list) else index]
    part = q[index]
    assert part.batch_shape == events.shape
    z = q.sample((2,))
    torch.testing.assert_close(part.log_prob(z[:, events]), q.log_prob(z)[:, events])
    torch.testing.assert_close(part.mean, q.mean[events])


def test_index_of_a_batch_of_two_dimensions():
    head = head_of(Real(2))
    q = head(torch.randn(3, 4, 3, dtype=torch.float64)).detach()
    z = q.sample()
    value = q.log_prob(z)
    for index in ((1, 2), (slice(None), 3), (Ellipsis, 0), 1, torch.ones(3, 4).bool()):
        # an ellipsis stands for the dimensions of the batch, not for those of a label
        own = z[:, 0] if index == (Ellipsis, 0) else z[index]
        torch.testing.assert_close(q[index].log_prob(own), value[index])


@pytest.mark.parametrize("index", [6, (0, 0), (slice(None), 0)], ids=str)
def test_index_beyond_the_batch(index):
    with pytest.raises(IndexError):
        posterior_of(SPACES["product"])[index]


def test_iterates_over_events():
    q = posterior_of(Real(2), events=3)
    assert [p.batch_shape for p in q] == [(), (), ()]


# ----------------------------------------------------------------- density, draws and base agree


def test_base_and_back(q):
    u = torch.randn(50, 6, q.dof, dtype=torch.float64)
    z = q.from_base(u)
    torch.testing.assert_close(q.to_base(z), u, rtol=1e-6, atol=1e-6)
    again, log_prob = q.to_base_and_log_prob(z)
    assert torch.equal(again, q.to_base(z))
    torch.testing.assert_close(log_prob, q.log_prob(z))


def test_sample_and_log_prob_are_those_of_sample_and_log_prob(q):
    z, log_prob = q.sample_and_log_prob((30,), torch.Generator().manual_seed(3))
    assert torch.equal(z, q.sample((30,), torch.Generator().manual_seed(3)))
    assert torch.equal(z, q.rsample((30,), torch.Generator().manual_seed(3)))
    torch.testing.assert_close(log_prob, q.log_prob(z), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("flow", ["mse", "diagonal", "affine", "spline"])
@pytest.mark.parametrize("name", ["real3", "positive", "product"])
def test_density_is_that_of_the_draws(name, flow):
    """E_q[p / q] = 1 for a density p on part of the space: fails if q is wrong by a factor."""
    q = posterior_of(SPACES[name], flow, events=1, size=0.07)[0]
    z = q.sample((40_000,), torch.Generator().manual_seed(0))
    low, high = torch.quantile(z, torch.tensor([0.25, 0.75]).double(), dim=0)
    inside = ((z > low) & (z < high)).all(-1)
    weight = torch.where(inside, (-(high - low).log().sum() - q.log_prob(z)).exp(), 0.0)
    error = weight.std() / math.sqrt(len(z))
    assert error < 0.025
    assert abs(weight.mean() - 1) < 4 * error


@pytest.mark.parametrize("space", [Real(), Positive(), Interval(-1.0, 2.0)], ids=repr)
def test_distribution_function_in_one_dimension(space):
    q = posterior_of(space, events=1)[0]
    draws = q.sample((5000,), torch.Generator().manual_seed(0)).squeeze(-1)
    assert (
        stats.kstest(draws, lambda z: q.cdf(torch.as_tensor(z).unsqueeze(-1)).numpy()).pvalue > 1e-3
    )
    # against the integral of the density, starting from a point of known level
    z = torch.linspace(draws.quantile(0.001).item(), draws.quantile(0.999).item(), 4001).double()
    p = q.log_prob(z.unsqueeze(-1)).exp().numpy()
    expected = np.concatenate([[0], np.cumsum((p[1:] + p[:-1]) / 2 * float(z[1] - z[0]))])
    cdf = q.cdf(z.unsqueeze(-1)).numpy()
    np.testing.assert_allclose(cdf - cdf[0], expected, atol=1e-3)
    assert cdf[0] < 0.01
    levels = torch.tensor([0.01, 0.3, 0.5, 0.99], dtype=torch.float64)
    torch.testing.assert_close(q.cdf(q.icdf(levels)), levels)


def test_distribution_function_of_a_batch():
    q = posterior_of(Positive())
    levels = torch.tensor([0.1, 0.9]).double().unsqueeze(1)
    z = q.icdf(levels)
    assert z.shape == (2, 6, 1)
    torch.testing.assert_close(q.cdf(z), levels.expand(2, 6))


def test_no_distribution_function_of_several_labels():
    q = posterior_of(Real(3))
    for function in (q.cdf, q.icdf):
        with pytest.raises(NotImplementedError, match="needs one label on a line"):
            function(torch.zeros(6, 3))


def test_credibility_is_chi_square_at_the_base(q):
    u = 1.5 * torch.randn(200, 6, q.dof, dtype=torch.float64)
    expected = stats.chi2.cdf(u.square().sum(-1), q.dof)
    np.testing.assert_allclose(q.credibility(q.from_base(u)), expected, atol=1e-6)
    z = q.sample((2000,), torch.Generator().manual_seed(0))
    assert stats.kstest(q.credibility(z).flatten(), "uniform").pvalue > 1e-3


def test_rsample_gradient_against_finite_differences():
    head = head_of(SPACES["product"])
    context = torch.randn(4, 3, dtype=torch.float64)
    target = torch.tensor([1.0, 0.0, 0.5, 0.3], dtype=torch.float64)

    def value():
        z, log_prob = head(context).sample_and_log_prob((8,), torch.Generator().manual_seed(0))
        return ((z - target).square().sum(-1) + 0.1 * log_prob).mean()

    check_gradient(head, value)


def test_log_prob_gradient_against_finite_differences():
    head = head_of(SPACES["product"])
    context = torch.randn(4, 3, dtype=torch.float64)
    z = head(context).sample((8,))
    check_gradient(head, lambda: head(context).log_prob(z).mean())


def check_gradient(module, value, step=1e-5, entries=5):
    names, parameters = zip(*module.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value(), parameters)
    generator = torch.Generator().manual_seed(0)
    for name, p, gradient in zip(names, parameters, gradients, strict=True):
        for i in torch.randint(p.numel(), (entries,), generator=generator).tolist():
            ends = []
            for sign in (1, -1):
                with torch.no_grad():
                    p.view(-1)[i] += sign * step
                    ends.append(value().item())
                    p.view(-1)[i] -= sign * step
            expected = (ends[0] - ends[1]) / (2 * step)
            assert gradient.flatten()[i].item() == pytest.approx(expected, rel=1e-4, abs=1e-7), name


# ------------------------------------------------------------------------- generators and chunks


def test_generator_makes_draws_reproducible_and_leaves_the_global_one_alone(q):
    state = torch.get_rng_state()
    for draw in (
        lambda g: q.sample((3,), g),
        lambda g: q.rsample((3,), generator=g),
        lambda g: q.sample_and_log_prob((3,), g)[1],
        lambda g: q.quantile([0.2, 0.7], 64, g),
        lambda g: q.entropy(64, g),
        lambda g: q.summary(64, g).mean,
        lambda g: torch.stack(q.interval(0.5, 64, g)),
    ):
        first = draw(torch.Generator().manual_seed(7))
        assert torch.equal(first, draw(torch.Generator().manual_seed(7)))
        other = draw(torch.Generator().manual_seed(8))
        # one label has exact quantiles
        assert not torch.equal(first, other) or q.dof == 1
    for number in (q.mean, q.stddev, q.variance, q.mode, q.median, q.entropy()):
        assert torch.isfinite(number).all()
    assert torch.equal(torch.get_rng_state(), state)


def test_without_generator_the_global_one_is_used():
    q = posterior_of(Real(1))
    torch.manual_seed(5)
    first = q.sample((3,))
    torch.manual_seed(5)
    assert torch.equal(first, q.sample((3,)))
    assert not torch.equal(first, q.sample((3,)))


@pytest.mark.parametrize("chunk", [50, 300])
@pytest.mark.parametrize("name", ["real3", "product"])
def test_size_of_chunks_changes_nothing(monkeypatch, name, chunk):
    q = posterior_of(SPACES[name])

    def numbers():
        z = q.sample((3, 2), torch.Generator().manual_seed(0))
        draws, log_prob = q.sample_and_log_prob((3,), torch.Generator().manual_seed(0))
        return [
            z,
            draws,
            log_prob,
            q.log_prob(z),
            q.to_base(z),
            q.credibility(z),
            q.log_prob(z[0, 0, 0]),
            q.from_base(q.to_base(z)),
            q.quantile([0.2, 0.8], 16),
            q.quantile([0.2, 0.8], 16, torch.Generator().manual_seed(0)),
            q.entropy(16, torch.Generator().manual_seed(0)),
            q.summary(16).stddev,
        ]

    expected = numbers()
    chunk_size(monkeypatch, chunk)
    for a, b in zip(numbers(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_chunks_of_labels_that_broadcast_inside_the_batch(monkeypatch):
    head = head_of(Real(2))
    q = head(torch.randn(3, 1, 3, dtype=torch.float64)).detach()
    z = torch.randn(3, 4, 2, dtype=torch.float64)
    expected = torch.stack([q[i, 0].log_prob(z[i]) for i in range(3)])
    torch.testing.assert_close(q.log_prob(z), expected)
    chunk_size(monkeypatch, 4)
    torch.testing.assert_close(q.log_prob(z), expected)


@pytest.mark.parametrize("chunk", [64, 2**17])
def test_no_events(monkeypatch, chunk):
    chunk_size(monkeypatch, chunk)
    q = posterior_of(SPACES["product"], events=3)[:0]
    assert q.sample((5,)).shape == (5, 0, 4)
    assert q.log_prob(torch.zeros(0, 4)).shape == (0,)
    assert q.mean.shape == (0, 4)
    assert q.quantile([0.1, 0.9]).shape == (2, 0, 4)
    assert q.summary(64).entropy.shape == (0,)


# --------------------------------------------------------------------------------- closed forms

MEAN = torch.tensor([1.0, -2.0, 30.0])
TRIL = torch.tensor([[0.5, 0, 0], [-1.2, 0.7, 0], [0.3, 2.0, 4.0]])


def test_gaussian_against_closed_forms():
    q = gaussian(MEAN, TRIL)
    exact = torch.distributions.MultivariateNormal(MEAN.double(), scale_tril=TRIL.double())
    z = exact.sample((100,))
    torch.testing.assert_close(q.log_prob(z), exact.log_prob(z))
    sigma = exact.stddev
    assert ((q.mean - exact.mean).abs() < 0.01 * sigma).all()
    torch.testing.assert_close(q.stddev, sigma, rtol=0.01, atol=0)
    torch.testing.assert_close(q.variance, exact.variance, rtol=0.02, atol=0)
    assert ((q.mode - exact.mean).abs() < 0.01 * sigma).all()
    assert ((q.median - exact.mean).abs() < 0.01 * sigma).all()
    assert q.entropy().item() == pytest.approx(exact.entropy().item(), abs=0.01)
    levels = [0.05, 0.158655, 0.7, 0.95]
    expected = exact.mean + sigma * torch.tensor(stats.norm.ppf(levels)).unsqueeze(1)
    assert ((q.quantile(levels) - expected).abs() < 0.03 * sigma).all()
    low, high = q.interval(0.9)
    torch.testing.assert_close(high - low, 2 * 1.644854 * sigma, rtol=0.02, atol=0)
    draws = q.sample((100_000,), torch.Generator().manual_seed(0))
    unit = sigma[:, None] * sigma
    assert ((draws.T.cov() - exact.covariance_matrix).abs() < 0.015 * unit).all()


def test_gaussian_marginal_of_one_label_is_exact():
    q = gaussian([3.0], [[0.2]])
    exact = stats.norm(3, 0.2)
    levels = [1e-4, 0.1, 0.5, 0.999]
    np.testing.assert_allclose(q.quantile(levels).detach()[:, 0], exact.ppf(levels), rtol=1e-6)
    low, high = q.interval(0.6827)
    np.testing.assert_allclose([low.item(), high.item()], exact.interval(0.6827), rtol=1e-6)
    z = torch.linspace(2, 4, 9).double()
    np.testing.assert_allclose(q.cdf(z.unsqueeze(-1)).detach(), exact.cdf(z), rtol=1e-9)


@pytest.mark.parametrize(("mu", "sigma"), [(1.0, 0.5), (-3.0, 0.1), (40.0, 1.0)])
def test_lognormal_against_scipy(mu, sigma):
    q = lognormal(mu, sigma)
    exact = stats.lognorm(s=sigma, scale=math.exp(mu))
    z = torch.tensor(exact.rvs(50, random_state=0)).unsqueeze(-1)
    np.testing.assert_allclose(q.log_prob(z).detach(), exact.logpdf(z[:, 0]), rtol=1e-9)
    np.testing.assert_allclose(q.cdf(z).detach(), exact.cdf(z[:, 0]), rtol=1e-7)
    np.testing.assert_allclose(
        q.icdf(torch.tensor([0.1, 0.9])).detach()[:, 0], exact.ppf([0.1, 0.9]), rtol=1e-5
    )
    assert q.mean.item() == pytest.approx(exact.mean(), rel=0.005 + 0.005 * sigma)
    # the central 1 − 10⁻⁴ of draws: at σ = 1 the cut takes 4 % of the standard deviation
    assert q.stddev.item() == pytest.approx(exact.std(), rel=0.02 if sigma < 1 else 0.15)
    assert q.median.item() == pytest.approx(exact.median(), rel=1e-6)
    assert q.mode.item() == pytest.approx(math.exp(mu - sigma**2), rel=0.01 * sigma)
    assert q.entropy().item() == pytest.approx(exact.entropy(), abs=0.01)


def test_mode_of_a_bimodal_posterior_is_the_higher_peak():
    head = head_of(Real(1), size=1.2, context=0)
    q = head(None).detach()
    z = torch.linspace(-4, 4, 20_001).double().unsqueeze(-1)
    best = q.log_prob(z).max()
    assert q.log_prob(q.mode) > best - 1e-3


def test_mode_is_as_good_as_any_draw(q):
    best = q.log_prob(q.sample((4000,), torch.Generator().manual_seed(0))).amax(0)
    # ascent starts from the best of other draws, and may end on a peak of nearly that height
    assert (q.log_prob(q.mode) > best - 0.25).all()
    assert q.space.contains(q.mode).all()


@pytest.mark.parametrize("name", ["real3", "positive", "product"])
def test_moments_against_many_draws(name):
    q = posterior_of(SPACES[name], events=2)
    z = q.sample((40_000,), torch.Generator().manual_seed(0))
    sigma = z.std(0)
    assert ((q.mean - z.mean(0)).abs() < 0.02 * sigma).all()
    # Positive labels have heavy tails, which the central draws leave out
    heavy = torch.tensor([isinstance(b.space, Positive) for b in q.space.blocks for _ in
                          range(b.space.label_size)])  # fmt: skip
    torch.testing.assert_close(q.stddev[:, ~heavy], sigma[:, ~heavy], rtol=0.03, atol=0)
    levels = torch.tensor([0.05, 0.16, 0.5, 0.84, 0.95]).double()
    found, expected = q.quantile(levels), torch.quantile(z, levels, dim=0)
    # as probability: the share of draws below each quantile
    share = (z.unsqueeze(0) < found.unsqueeze(1)).double().mean(1)
    assert found.shape == expected.shape == (5, 2, q.space.label_size)
    assert (share - levels[:, None, None]).abs().max() < 0.012
    entropy = -q.log_prob(z).mean(0)
    assert (q.entropy() - entropy).abs().max() < 0.03
    more = q.entropy(20_000, torch.Generator().manual_seed(1))
    assert (more - entropy).abs().max() < 0.03


def test_summary(q):
    s = q.summary()
    assert isinstance(s, Summary)
    torch.testing.assert_close(s.mean, q.mean)
    torch.testing.assert_close(s.stddev, q.stddev)
    torch.testing.assert_close(torch.stack(s.interval68), torch.stack(q.interval(0.68269)),
                               rtol=0.03, atol=0.03)  # fmt: skip
    assert s.entropy.shape == (6,)
    text = str(s)
    assert all(name in text for name in q.space.names)
    assert f"{s.median[0, 0]:.4g}" in text
    assert "nats" in text


def test_summary_of_many_events_is_short():
    text = str(posterior_of(Real(1), events=50).summary(16))
    assert "… and 44 more events" in text
    assert len(text.splitlines()) == 9


@pytest.mark.parametrize("levels", [0.0, 1.0, [0.5, -0.1], float("nan")])
def test_levels_out_of_range(levels):
    with pytest.raises(ValueError, match="Expected levels between 0 and 1"):
        posterior_of(Real(2)).quantile(levels)
    if not isinstance(levels, list):
        with pytest.raises(ValueError, match="Expected level between 0 and 1"):
            posterior_of(Real(2)).interval(levels)


def test_too_few_draws():
    with pytest.raises(ValueError, match="Expected draws as a whole number of at least 2; got 1"):
        posterior_of(Real(2)).entropy(draws=1)


# -------------------------------------------------------------------------------------- labels


@pytest.mark.parametrize(
    ("labels", "text"),
    [
        (torch.zeros(6, 3), "Expected labels of shape"),
        (torch.full((5, 4), 0.5), r"Expected labels of shape \(..., 6, 4\)"),
        (torch.tensor([1.0, 0, 0, 2.0]).expand(6, 4), "strictly inside Interval.*column 'y'"),
        (torch.tensor([-1.0, 0, 0, 0]), "labels above 0.*column 'e'"),
        (torch.tensor([1.0, math.nan, 0, 0]), r"finite labels; got nan.*column 'x\[0\]'"),
        ("energy", "Expected labels as a tensor or array of numbers; got str"),
    ],
)
def test_labels_that_do_not_fit(labels, text):
    q = posterior_of(SPACES["product"])
    for function in (q.log_prob, q.to_base, q.credibility, q.to_base_and_log_prob):
        with pytest.raises(ValueError, match=text):
            function(labels)


def test_base_coordinates_that_do_not_fit():
    q = posterior_of(SPACES["product"])
    with pytest.raises(ValueError, match=r"Expected u of shape \(..., 4\)"):
        q.from_base(torch.zeros(6, 3))
    with pytest.raises(ValueError, match="Expected u of shape"):
        q.from_base(torch.zeros(5, 4))


def test_label_of_a_single_column_needs_no_axis():
    q = posterior_of(Real(1))
    z = torch.randn(6, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(z), q.log_prob(z.unsqueeze(-1)))
    torch.testing.assert_close(
        q.log_prob(0.3), q.log_prob(torch.full((6, 1), 0.3, dtype=torch.float64))
    )
    several = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(q.log_prob(several), q.log_prob(several.unsqueeze(-1)))


def test_arrays_and_lists_are_labels():
    q = posterior_of(Real(2))
    z = np.random.default_rng(0).normal(size=(6, 2))
    assert torch.equal(q.log_prob(z), q.log_prob(torch.as_tensor(z)))
    assert torch.equal(q.log_prob([1, 2]), q.log_prob(torch.tensor([1.0, 2.0]).double()))


def test_double_labels_keep_their_digits_in_a_float32_model():
    head = PosteriorHead(0, Real(), flow="diagonal")
    z = 1e6 + 1e-3 * torch.randn(1000, 1, dtype=torch.float64)
    head.fit_scale(z)
    with torch.no_grad():
        u = head(None).to_base(z)
    assert u.dtype == torch.float32
    # the buffers hold 10⁶ to a float32 step of 1/16 only, which a location takes up
    assert u.std().item() == pytest.approx(1, rel=0.01)


def test_validate_args_false_takes_any_label():
    head = head_of(Positive())
    context = torch.randn(6, 3, dtype=torch.float64)
    z = torch.full((6, 1), 0.7).double()
    fast = head(context, validate_args=False)
    torch.testing.assert_close(fast.log_prob(z), head(context).log_prob(z))
    assert fast[2:].log_prob(-z[2:]).isnan().all()
    assert fast.expand((2, 6)).log_prob(-z).isnan().all()
    with pytest.raises(ValueError, match="labels above 0"):
        head(context, validate_args=True).log_prob(-z)


# ---------------------------------------------------------------------------------- immutability


@pytest.mark.parametrize("flow", ["mse", "diagonal", "affine", "spline"])
@pytest.mark.parametrize("context", [0, 3])
def test_a_posterior_is_immutable(flow, context):
    head = head_of(SPACES["product"], flow, context=context)
    q = head(torch.randn(6, 3).double() if context else None)
    z = q.sample((4,))
    before, draws = q.log_prob(z).detach(), q.sample((4,), torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(head.parameters(), 0.5)
    head(torch.randn(6, 3).double() if context else None).log_prob(z).sum().backward()
    optimizer.step()
    assert not torch.equal(head(torch.zeros(6, 3) if context else None).log_prob(z), before)
    assert torch.equal(q.log_prob(z), before)
    head.fit_scale(3 * z.reshape(-1, 4).clamp(0.01, 0.6))
    assert torch.equal(q.log_prob(z), before)
    head.load_state_dict({k: 0.5 * v for k, v in head.state_dict().items()})
    assert torch.equal(q.log_prob(z), before)
    assert torch.equal(q.sample((4,), torch.Generator().manual_seed(0)), draws)


def test_detached_posteriors_carry_no_gradient():
    q = head_of(Real(2))(torch.randn(6, 3).double())
    assert q.rsample().requires_grad
    assert q.log_prob(torch.zeros(2)).requires_grad
    assert not q.sample().requires_grad
    assert not q.mean.requires_grad
    assert not q.detach().rsample().requires_grad
    assert not q.detach().log_prob(torch.zeros(2)).requires_grad


@pytest.mark.parametrize("flow", ["affine", "spline"])
def test_autocast_changes_neither_type_nor_precision(flow):
    head = head_of(SPACES["product"], flow, dtype=torch.float32)
    context = torch.randn(50, 3)
    z = head(context).sample((2,))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    expected, draws = head(context).log_prob(z), head(context).sample((5,), generators[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        q = head(context)
        value, other = q.log_prob(z), q.sample((5,), generators[1])
        assert q.mean.dtype == torch.float32
    assert value.dtype == other.dtype == torch.float32
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(other, draws)


def test_autocast_takes_the_context_of_a_half_precision_encoder():
    head = head_of(Real(2), dtype=torch.float32)
    context = torch.randn(50, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = torch.nn.functional.linear(context, torch.eye(3))
        assert half.dtype == torch.bfloat16
        q = head(half)
    assert q.dtype == torch.float32
    torch.testing.assert_close(q.mean, head(half.float()).mean)
