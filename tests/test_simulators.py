"""The simulators against closed forms, quadrature, scipy, and the calibration of their truth."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from flowpost.simulators import LinearGaussian, Telescope
from flowpost.simulators.telescope.quadrature import log_likelihood

TELESCOPE = Telescope()


@pytest.fixture(scope="module")
def events():
    return TELESCOPE.sample(160, seed=5)


@pytest.fixture(scope="module")
def true_images(events):
    return TELESCOPE.true_posterior_images(events.images)


@pytest.fixture(scope="module")
def true_hits(events):
    return TELESCOPE.true_posterior_hits(events.hits[:24], events.lengths[:24])


# Linear Gaussian


@pytest.mark.parametrize(("dim", "features"), [(1, None), (3, None), (3, 5), (4, 2), (10, 10)])
def test_linear_gaussian_posterior_is_prior_times_likelihood(dim, features):
    simulator = LinearGaussian(dim, features, seed=3, prior_std=1.5)
    x, _ = simulator.sample(1, seed=0)
    z = 2 * torch.randn(50, dim, dtype=torch.float64)
    x = x.double().expand(50, -1)
    noise = stats.multivariate_normal(cov=simulator.noise_covariance.numpy())
    joint = noise.logpdf((x - z @ simulator.matrix.T).numpy()) + stats.norm.logpdf(
        z.numpy(), scale=1.5
    ).sum(1)
    difference = simulator.posterior(x).log_prob(z).numpy() - joint
    assert np.ptp(difference) < 1e-9
    evidence = stats.multivariate_normal(
        cov=(2.25 * simulator.matrix @ simulator.matrix.T + simulator.noise_covariance).numpy()
    )
    assert difference[0] == pytest.approx(-evidence.logpdf(x[0].numpy()), abs=1e-9)


@pytest.mark.parametrize("dim", [1, 3, 10])
def test_linear_gaussian_base_is_standard_normal(dim):
    simulator = LinearGaussian(dim)
    x, z = simulator.sample(20_000, seed=1)
    u = simulator.to_base(x, z)
    assert u.shape == (20_000, dim)
    assert stats.kstest(u.square().sum(1).numpy(), stats.chi2(dim).cdf).pvalue > 1e-3
    assert (torch.cov(u.T).reshape(dim, dim) - torch.eye(dim)).abs().max() < 0.05
    nll = simulator.true_nll(x, z)
    exact = 0.5 * dim * (1 + math.log(2 * math.pi))
    exact += 0.5 * float(torch.logdet(simulator.posterior_covariance))
    assert nll.mean() == pytest.approx(exact, abs=0.05)


def test_linear_gaussian_randomness():
    simulator = LinearGaussian(3, 4, seed=7)
    state = torch.get_rng_state()
    x, z = simulator.sample(5, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert x.shape == (5, 4)
    assert z.shape == (5, 3)
    again = simulator.sample(5, torch.Generator().manual_seed(1))
    assert torch.equal(x, again[0])
    assert torch.equal(z, again[1])
    assert not torch.equal(z, simulator.sample(5, seed=2)[1])
    assert torch.equal(simulator.matrix, LinearGaussian(3, 4, seed=7).matrix)
    assert not torch.equal(simulator.matrix, LinearGaussian(3, 4, seed=8).matrix)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LinearGaussian(0), "dim"),
        (lambda: LinearGaussian(2, prior_std=-1.0), "prior_std"),
        (lambda: LinearGaussian(2).sample(0), "n as a whole number"),
        (lambda: LinearGaussian(2).sample(3, torch.Generator(), 1), "Give one of the two"),
        (lambda: LinearGaussian(2).posterior(torch.zeros(4, 3)), r"x of shape \(N, 2\)"),
        (lambda: LinearGaussian(2).posterior(torch.full((1, 2), math.nan)), "row 0, column 0"),
        (lambda: LinearGaussian(2).true_nll(torch.zeros(4, 2), torch.zeros(3, 2)), "z of shape"),
    ],
)
def test_linear_gaussian_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# Telescope: the response


def test_bins_are_integrals_of_the_intensity():
    z = torch.tensor([[3.0, -22.0, 40.0], [71.0, 64.0, 2.0]], dtype=torch.float64)
    angle = torch.tensor([0.4, -2.0], dtype=torch.float64)
    expected = TELESCOPE.expected_images(z, angle)
    edges = TELESCOPE.time_edges
    for event, sensor in [(0, 28), (0, 20), (0, 63), (1, 63), (1, 62)]:
        x, y = TELESCOPE.sensors[sensor].tolist()
        row, column = divmod(sensor, TELESCOPE.columns)
        one = slice(event, event + 1)

        def rate(t, x=x, y=y, one=one):
            hit = torch.tensor([[[x, y, t]]], dtype=torch.float64)
            return float(TELESCOPE.intensity(hit, z[one], angle[one]))

        for k in range(len(edges) - 1):
            value = integrate.quad(rate, edges[k], edges[k + 1], epsabs=1e-10, limit=200)[0]
            assert float(expected[event, k, row, column]) == pytest.approx(value, rel=1e-7)


def test_sampled_images_and_hits_have_the_expected_rates():
    z = torch.tensor([[3.0, -22.0, 40.0]]).expand(4000, -1)
    angle = torch.full((4000,), 0.4)
    events = TELESCOPE.simulate(z, angle, seed=3)
    expected = TELESCOPE.expected_images(z[:1], angle[:1])[0]
    pulls = (events.images.mean(0) - expected) / (expected / 4000).sqrt()
    assert pulls.square().mean() == pytest.approx(1, abs=0.4)
    bright = expected > 0.5
    dispersion = events.images.var(0)[bright] / expected[bright]
    assert (dispersion - 1).abs().max() < 0.12
    # Times within one bin of the brightest sensor follow the intensity.
    sensor = int(expected.sum(0).argmax())
    x, y = TELESCOPE.sensors[sensor].tolist()
    times = events.hits[(events.hits[..., 0] == x) & (events.hits[..., 1] == y)][:2000, 2]
    offset = TELESCOPE.sensors[sensor].float() - z[0, :2]
    distance = TELESCOPE.distance(offset)
    assert (
        stats.kstest(
            times.numpy(), lambda t: TELESCOPE.arrival_cdf(torch.as_tensor(t), distance).numpy()
        ).pvalue
        > 1e-3
    )


def test_image_is_the_histogram_of_the_hits(events):
    assert torch.equal(events.images.sum((1, 2, 3)).long(), events.lengths)
    for i in range(20):
        hits = events.hits[i, : int(events.lengths[i])].double().numpy()
        x = np.unique(TELESCOPE.sensors[:, 0].numpy())
        edges = [(x[1:] + x[:-1]) / 2] * 2
        outer = [np.r_[-1e3, e, 1e3] for e in edges]
        bins = [np.array(TELESCOPE.time_edges), outer[1], outer[0]]
        counts, _ = np.histogramdd(hits[:, [2, 1, 0]], bins)
        assert np.array_equal(counts, events.images[i].numpy())
        assert (np.diff(hits[:, 2]) >= 0).all()
    assert (events.hits[0, int(events.lengths[0]) :] == 0).all()


def test_log_prob_images_is_poisson(events):
    z, angle, images = events.z[:5].double(), events.angle[:5].double(), events.images[:5]
    expected = TELESCOPE.expected_images(z, angle)
    reference = stats.poisson.logpmf(images.numpy(), expected.numpy()).sum((1, 2, 3))
    assert TELESCOPE.log_prob_images(images, z, angle).numpy() == pytest.approx(reference, abs=1e-6)


def test_log_prob_hits_by_hand(events):
    """A sum over hits with the formulas written out, and the limit of fine bins."""
    z, angle = events.z[:4].double(), events.angle[:4].double()
    value = TELESCOPE.log_prob_hits(events.hits[:4], events.lengths[:4], z, angle)
    for i in range(4):
        x, y, energy = z[i].tolist()
        total = -float(TELESCOPE.expected_images(z, angle)[i].sum())
        for sx, sy, t in events.hits[i, : int(events.lengths[i])].tolist():
            rho = math.sqrt((sx - x) ** 2 + (sy - y) ** 2 + 4)
            cosine = ((sx - x) * math.cos(angle[i]) + (sy - y) * math.sin(angle[i])) / rho
            light = energy * 2 * math.exp(-rho / 20) / (1 + rho**2 / 64) * (1 + cosine) ** 2 / 1.5
            density = stats.gumbel_r.pdf(t, rho / 0.22, 4 + 0.25 * rho)
            total += math.log(light * density + 1e-4)
        assert float(value[i]) == pytest.approx(total, abs=1e-4)

    fine = Telescope(time_edges=tuple(np.linspace(-20, 300, 6401)))
    i = int((events.lengths[:50] - 6).abs().argmin())
    one = slice(i, i + 1)
    hits, lengths = events.hits[one], events.lengths[one]
    image = torch.zeros(1, 6400, 8, 8)
    for sx, sy, t in hits[0, : int(lengths[0])].tolist():
        row, column = round(sy / 20 + 3.5), round(sx / 20 + 3.5)
        image[0, int((t + 20) / 0.05), row, column] += 1
    binned = fine.log_prob_images(image, events.z[one].double(), events.angle[one].double())
    listed = TELESCOPE.log_prob_hits(hits, lengths, events.z[one].double(), events.angle[one])
    assert float(binned - int(lengths[0]) * math.log(0.05)) == pytest.approx(
        float(listed), abs=0.02
    )


def test_angles_are_periodic_and_seen(events):
    z, angle = events.z.double(), events.angle.double()
    first = TELESCOPE.log_prob_images(events.images, z, angle)
    assert first.numpy() == pytest.approx(
        TELESCOPE.log_prob_images(events.images, z, angle + 2 * math.pi).numpy()
    )
    turned = TELESCOPE.log_prob_images(events.images, z, angle + math.pi)
    assert (first - turned).mean() > 1


def test_telescope_randomness(events):
    again = TELESCOPE.sample(160, torch.Generator().manual_seed(5))
    for name in ("z", "angle", "images", "hits", "lengths"):
        assert torch.equal(getattr(events, name), getattr(again, name)), name
    state = torch.get_rng_state()
    assert not torch.equal(TELESCOPE.sample(160, seed=6).z, events.z)
    assert torch.equal(state, torch.get_rng_state())


def test_events_within_bounds_and_selected():
    events = TELESCOPE.sample(5000, seed=0)
    low, high = (torch.tensor(b) for b in TELESCOPE.bounds)
    assert ((events.z >= low) & (events.z <= high)).all()
    assert stats.kstest(events.z[:, 2].log().numpy() / math.log(100), "uniform").pvalue > 1e-3
    assert len(events[:7]) == 7
    assert (events[events.lengths == 0].hits == 0).all()
    moved = events[:3].to(torch.float64)
    assert moved.images.dtype == torch.float64
    assert moved.lengths.dtype == torch.int64


# Telescope: the true posterior


def test_evidence_is_that_of_a_plain_sum(events, true_images, true_hits):
    """Against a fixed grid over the whole prior, without any adaptation."""
    event = next(i for i in range(24) if 2 <= int(events.lengths[i]) <= 6)
    steps = 160 * (torch.arange(128, dtype=torch.float64) + 0.5) / 128 - 80
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(16))
    energies = torch.exp(math.log(100) * (nodes + 1) / 2)
    angles = torch.arange(32, dtype=torch.float64) / 32 * 2 * math.pi
    seen = [
        (true_images, TELESCOPE.image_channels(events.images[event])),
        (true_hits, TELESCOPE.hit_channels(events.hits[event, : int(events.lengths[event])])),
    ]
    for true, channels in seen:
        terms = [
            log_likelihood(TELESCOPE, channels, torch.cartesian_prod(x, steps), angles, energies)
            for x in steps.split(2)
        ]
        table = torch.cat(terms) + (weights / 2).log()
        total = float(table.flatten().logsumexp(0)) - math.log(32 * 128**2)
        assert float(true.log_evidence[event]) == pytest.approx(total, abs=0.003)


def test_density_is_that_of_bayes(events, true_images):
    """ln p(z|x) differs from ln p(x|z) p(z), angle summed with the public likelihood, by p(x)."""
    k, count = 6, 720
    angles = torch.arange(count, dtype=torch.float64) / count * 2 * math.pi
    z = events.z[:k].double()
    for i in range(k):
        image = events.images[i : i + 1].expand(count, -1, -1, -1)
        joint = TELESCOPE.log_prob_images(image, z[i : i + 1].expand(count, -1), angles)
        joint = float(joint.logsumexp(0)) - math.log(count)
        joint -= math.log(160**2 * float(z[i, 2]) * math.log(100))
        value = joint - float(true_images.log_evidence[i])
        assert float(true_images[i : i + 1].log_prob(z[i : i + 1])) == pytest.approx(
            value, abs=1e-3
        )
    outside = z + torch.tensor([200.0, 0.0, 0.0])
    assert torch.isinf(true_images[:k].nll(outside)).all()


@pytest.mark.parametrize(
    ("images", "hits"), [(4, 1), pytest.param(150, 40, marks=pytest.mark.slow)]
)
def test_resolution_doubling(events, images, hits):
    part = events[:images]
    pair = [TELESCOPE.true_posterior_images(part.images, r).nll(part.z) for r in (1, 2)]
    change = (pair[0] - pair[1]).abs()
    part = events[:hits]
    pair = [TELESCOPE.true_posterior_hits(part.hits, part.lengths, r).nll(part.z) for r in (1, 2)]
    change = torch.cat([change, (pair[0] - pair[1]).abs()])
    assert (change < 0.01).double().mean() >= 0.99


def test_true_posterior_is_calibrated(events, true_images):
    levels = true_images.position_credibility(events.z[:, :2])
    assert stats.kstest(levels.numpy(), "uniform").pvalue > 1e-3


def test_map_is_normalised_and_modes_are_counted(events, true_images):
    for i in range(10):
        x, y, density = true_images.position_map(i, 160)
        assert float(density.sum() * (x[1] - x[0]) * (y[1] - y[0])) == pytest.approx(1, abs=0.03)
    modes = true_images[:150].n_modes()
    assert modes.min() == 1
    assert 0.1 < float((modes > 1).double().mean()) < 0.35


def test_hits_know_more_than_their_image(events, true_images, true_hits):
    difference = true_images[:24].nll(events.z[:24]) - true_hits.nll(events.z[:24])
    assert difference.mean() > 0.3


def test_an_event_without_light_has_a_posterior():
    true = TELESCOPE.true_posterior_hits(torch.zeros(1, 1, 3), torch.tensor([0]))
    images = TELESCOPE.true_posterior_images(torch.zeros(1, 4, 8, 8))
    z = torch.tensor([[70.0, 70.0, 1.5]])
    assert float(true.nll(z)) == pytest.approx(float(images.nll(z)), abs=1e-3)
    assert float(true.log_evidence) < 0


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Telescope(spacing=-1.0), "spacing as a positive number"),
        (lambda: Telescope(rows=0), "rows as a positive whole number"),
        (lambda: Telescope(beaming=1.5), "beaming between 0 and 1"),
        (lambda: Telescope(energy_range=(5.0, 1.0)), "energy_range"),
        (lambda: Telescope(time_edges=(3.0, 1.0)), "Sort them"),
        (lambda: TELESCOPE.sample(0), "n as a whole number"),
        (lambda: TELESCOPE.sample(2, torch.Generator(), 3), "Give one of the two"),
        (lambda: TELESCOPE.simulate(torch.ones(0, 3), torch.ones(0)), "at least one row"),
        (lambda: TELESCOPE.simulate(torch.ones(2, 2), torch.ones(2)), "z of shape"),
        (lambda: TELESCOPE.simulate(torch.ones(2, 3), torch.ones(3)), "angle of shape"),
        (lambda: TELESCOPE.simulate(-torch.ones(2, 3), torch.ones(2)), "column 2 of z"),
        (lambda: TELESCOPE.true_posterior_images(torch.ones(2, 8, 8)), "images of shape"),
        (lambda: TELESCOPE.true_posterior_images(torch.full((1, 4, 8, 8), 0.5)), "logarithm"),
        (
            lambda: TELESCOPE.true_posterior_hits(torch.ones(1, 2, 3), torch.tensor([1])),
            "row 0, hit 0. Pass hits in metres and ns",
        ),
        (
            lambda: TELESCOPE.true_posterior_hits(torch.zeros(1, 2, 3), torch.tensor([3])),
            "lengths between 0 and 2",
        ),
        (
            lambda: TELESCOPE.true_posterior_images(torch.zeros(1, 4, 8, 8)).nll(torch.ones(2, 3)),
            "z of shape",
        ),
    ],
)
def test_telescope_refuses(call, message):
    with pytest.raises(ValueError, match=message):
        call()
