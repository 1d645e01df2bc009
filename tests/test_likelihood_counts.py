"""Poisson counts of images and sensor grids, against scipy and by hand."""

import math

import pytest
import torch
from likelihoods import SEEN_FROM, SENSORS, SPACE, filled, labels, stirred
from scipy import stats

import flowpost as fp
from flowpost import likelihood as fl

N = 6


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


class Constant(torch.nn.Module):
    """A decoder without parameters."""

    def __init__(self, log_rate):
        super().__init__()
        self.log_rate = log_rate

    def forward(self, z):
        return self.log_rate.to(z).expand(len(z), *self.log_rate.shape)


def test_counts_are_those_of_scipy():
    log_rate = torch.tensor([[-6.0, -1.0, 0.0], [1.0, 3.0, 9.0]]).double()
    likelihood = fl.PoissonCounts(fp.Real(2), (2, 3), Constant(log_rate)).double()
    rate = log_rate.exp().numpy()
    x = likelihood.sample(torch.zeros(20000, 2), seeded())
    expected = stats.poisson(rate).logpmf(x.numpy()).sum((1, 2))
    found = likelihood.log_prob(x, torch.zeros(20000, 2))
    torch.testing.assert_close(found.double(), torch.as_tensor(expected), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(x.mean(0), log_rate.exp(), rtol=0.05, atol=0.002)
    torch.testing.assert_close(x.var(0), log_rate.exp(), rtol=0.05, atol=0.002)
    assert torch.equal(likelihood(torch.zeros(5, 2)).measured(x[:5]), torch.full((5,), 6.0))
    for cell in ((0, 2), (1, 0)):
        counts = torch.bincount(x[:, cell[0], cell[1]].long(), minlength=8)[:8]
        theory = 20000 * stats.poisson(rate[cell]).pmf(range(8))
        assert ((counts.numpy() - theory) ** 2 / theory).sum() < stats.chi2(8).ppf(0.999)


def test_counts_are_normalised():
    torch.manual_seed(0)
    likelihood = stirred(fl.PoissonCounts(fp.Real(1), 2, hidden=4).double())
    k = torch.arange(60.0)
    x = torch.stack(torch.meshgrid(k, k, indexing="ij"), -1).reshape(-1, 2)
    z = torch.tensor([[[0.5]], [[-2.0]]]).double().expand(-1, len(x), -1)
    total = likelihood(z).log_prob(x).exp().sum(1)
    torch.testing.assert_close(total, torch.ones(2).double(), rtol=1e-9, atol=1e-9)


def test_large_counts_in_single_precision():
    rate = torch.tensor([3.0, 40.0, 5000.0, 150000.0])
    likelihood = fl.PoissonCounts(fp.Real(1), 4, Constant(rate.double().log()))
    z = torch.zeros(200, 1)
    x, found = likelihood(z).sample_and_log_prob(seeded())
    # the rate as single precision holds it
    at = likelihood(z).log_rate[0].double().exp().numpy()
    expected = torch.as_tensor(stats.poisson(at).logpmf(x.double().numpy()).sum(1))
    assert (found - expected).abs().max() < 1e-4
    assert torch.isfinite(likelihood.log_prob(x, z)).all()


def test_cells_that_never_saw_anything():
    likelihood, z = fl.PoissonCounts(fp.Real(1), 3), torch.randn(50, 1)
    x = torch.zeros(50, 3)
    likelihood.fit_scale(x, z)
    value = likelihood.log_prob(x, z)
    assert ((value > -1) & (value < 0)).all()
    torch.testing.assert_close(likelihood.log_mean, torch.full((3,), 0.01).log())
    hot = torch.tensor([[0.0, 5.0, 0.0]])
    assert torch.isfinite(likelihood.log_prob(hot, z[:1])).all()
    value.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in likelihood.parameters() if p.grad is not None)


def test_dark_and_blinding_sensors_leave_finite_numbers():
    log_rate = torch.tensor([-math.inf, -1000.0, 1000.0])
    likelihood = fl.PoissonCounts(fp.Real(1), 3, Constant(log_rate))
    z = torch.zeros(4, 1)
    x = likelihood.sample(z, seeded())
    assert torch.equal(x[:, :2], torch.zeros(4, 2))
    assert torch.isfinite(x).all()
    for events in (x, x + 1, torch.zeros(4, 3)):
        assert torch.isfinite(likelihood.log_prob(events, z)).all()
        r, _ = likelihood(z).residuals(events, seeded())
        assert torch.isfinite(r).all()


@pytest.mark.parametrize("shape", [(3, 2), (6,), (4, 3, 2), (2, 2, 3, 2), (4, 6), (1, 6)])
def test_sensors_are_decoded_where_they_stand(shape):
    """The same numbers as those of a decoder that gives cells in their order."""
    torch.manual_seed(0)
    likelihood = fl.PoissonCounts(SPACE, shape, hidden=8, **SEEN_FROM)
    stirred(likelihood).log_mean.copy_(torch.linspace(-2, 3, math.prod(shape)))
    z, channels = labels(N), math.prod(shape) // 6

    class Plain(torch.nn.Module):
        def forward(self, z):
            numbers = likelihood.decoder.net(z)  # (M, sensors, channels)
            cells = torch.zeros(len(z), channels, 6)
            for sensor in range(6):
                for channel in range(channels):
                    cells[:, channel, sensor] = numbers[:, sensor, channel]
            return cells.reshape(-1, *shape) + likelihood.log_mean.reshape(shape)

    plain = fl.PoissonCounts(SPACE, shape, Plain())
    x = likelihood.sample(z, seeded())
    assert x.shape == (N, *shape)
    torch.testing.assert_close(
        likelihood.log_prob(x, z), plain.log_prob(x, z), rtol=1e-5, atol=1e-4
    )
    torch.testing.assert_close(likelihood.log_rate(z), plain.log_rate(z))
    many = likelihood.sample(z[:1].expand(4000, -1), seeded()).mean(0)
    torch.testing.assert_close(many, plain.log_rate(z[:1]).exp().reshape(shape), rtol=0.2, atol=0.1)
    assert likelihood(z).residuals(x, seeded())[0].shape == (N, math.prod(shape))


def test_scales_of_channels_are_their_own():
    likelihood = fl.PoissonCounts(SPACE, (2, 3, 2), **SEEN_FROM)
    with torch.no_grad():
        for p in likelihood.parameters():
            p.zero_()
    mean = torch.arange(1.0, 13.0).reshape(2, 3, 2)
    x = torch.stack([mean - 1, mean + 1])
    likelihood.fit_scale(x, labels(2))
    assert likelihood.sample(labels(3), seeded()).shape == (3, 2, 3, 2)
    expected = torch.as_tensor(stats.poisson(mean.numpy()).logpmf(x.numpy())).sum((1, 2, 3))
    found = likelihood.log_prob(x, labels(2)).detach()
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_what_a_network_sees_of_a_sensor():
    features = fl.sensors.SensorFeatures(SPACE, SENSORS, "vertex", "angle")
    z = labels(2)
    vertex, angle = z[:, :2], z[:, 3]
    found = features(z)
    assert found.shape == (2, 6, features.size)
    for i in range(2):
        for m, at in enumerate(SENSORS):
            offset = at - vertex[i]
            r = offset.norm()
            along = offset @ torch.stack([angle[i].cos(), angle[i].sin()])
            across = (r**2 - along**2).clamp_min(1e-12).sqrt()
            cosine = along / (r + features.step)
            logs = [torch.log(t + features.step) for t in (r, across)]
            expected = torch.stack(
                [*SPACE.features(z)[i], *at, *offset, r, logs[0], along, across, logs[1], cosine]
            )
            torch.testing.assert_close(found[i, m], expected, rtol=1e-4, atol=1e-4)
    index = torch.tensor([[5, 0, 0], [2, 3, 1]])
    torch.testing.assert_close(features(z, index)[1, 2], found[1, 1])
    torch.testing.assert_close(features(z, index)[0, 0], found[0, 5])


def test_the_network_of_sensors_standardises():
    """Folded into the weights it is the plain network of standardised features."""
    likelihood = filled("sensors")
    net, z = likelihood.decoder.net, labels(3)
    seen = (net.features(z) - net.loc) / net.scale
    torch.testing.assert_close(net(z), net.skip(seen) + net.net(seen.clone()), rtol=1e-4, atol=1e-4)
    z = labels(500)
    assert seen.shape == (3, 6, net.features.size)
    net.fit_scale(z)
    rows = ((net.features(z) - net.loc) / net.scale).flatten(0, 1)
    torch.testing.assert_close(rows.mean(0), torch.zeros(rows.shape[1]), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.std(0), torch.ones(rows.shape[1]), rtol=0.01, atol=0)


def test_features_that_do_not_vary_are_not_blown_up():
    sensors = torch.tensor([[0.1, 1.0], [0.1, 2.0], [0.1, 3.0]])
    likelihood = fl.PoissonCounts(fp.Real(1), 3, sensors=sensors)
    likelihood.fit_scale(torch.ones(50, 3), torch.full((50, 1), 0.3))
    assert likelihood.decoder.net.scale[0] == 1
    z = torch.tensor([[0.3], [0.4]])
    rate = likelihood(z).rate
    assert (rate / rate[:1]).log().abs().max() < 1


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: fl.PoissonCounts(SPACE, ()), "shape of at least one dimension"),
        (lambda: fl.PoissonCounts(SPACE, (2, 0)), "Expected shape as a whole number"),
        (lambda: fl.PoissonCounts(SPACE, (4, 4), **SEEN_FROM), "to be those of 6 sensors"),
        (lambda: fl.PoissonCounts(SPACE, 6, sensors=SENSORS[0]), r"Expected sensors of shape"),
        (lambda: fl.PoissonCounts(SPACE, 6, sensors=SENSORS * math.nan), "Expected finite sensors"),
        (
            lambda: fl.PoissonCounts(SPACE, 6, sensors=SENSORS, position="energy"),
            r"position as the name of a block of 2 columns; got 'energy'.*vertex \(2\)",
        ),
        (
            lambda: fl.PoissonCounts(SPACE, 6, sensors=SENSORS, direction="angle"),
            "Expected position beside direction",
        ),
        (
            lambda: fl.PoissonCounts(
                SPACE, 6, sensors=SENSORS, position="vertex", direction="energy"
            ),
            "direction as the name of a block",
        ),
        (lambda: fl.PoissonCounts(SPACE, 6, position="vertex"), "Expected sensors beside position"),
        (
            lambda: fl.PoissonCounts(SPACE, 6, Constant(torch.zeros(6)), sensors=SENSORS),
            "Expected a decoder or sensors; got both",
        ),
    ],
)
def test_refused_images(build, text):
    with pytest.raises(ValueError, match=text):
        build()


@pytest.mark.parametrize("name", ["counts", "decoder", "channels"])
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda x: -1.0 - x, "whole numbers of at least 0; got -"),
        (lambda x: x + 0.5, "FlowLikelihood for amplitudes"),
        (lambda x: x * math.nan, "Expected finite counts x"),
        (lambda x: x + math.inf, "Expected finite counts x"),
        (lambda x: x[..., :1], "Expected counts x of shape (N, "),
        (lambda x: x[0, 0], "Expected counts x of shape (N, "),
        (lambda x: x[:2], "Expected x of one event for each label"),
        (lambda x: "counts", "Expected x as a tensor"),
    ],
)
def test_refused_counts(name, spoil, text):
    likelihood, z = filled(name), labels(N)
    x = likelihood.sample(z, seeded())
    for ask in (lambda x: likelihood.log_prob(x, z), likelihood(z).residuals):
        with pytest.raises(ValueError, match="Expected") as error:
            ask(spoil(x))
        assert text in str(error.value)


def test_refused_decoders():
    z = torch.zeros(3, 1)
    for decoder, found in ((Constant(torch.zeros(5)), "(3, 5)"), (torch.nn.Flatten(0), "(3,)")):
        with pytest.raises(ValueError, match="Expected the decoder to give 2 numbers") as error:
            fl.PoissonCounts(fp.Real(1), 2, decoder)(z)
        assert found in str(error.value)
    with pytest.raises(ValueError, match=r"finite expected counts.*diverged decoder"):
        fl.PoissonCounts(fp.Real(1), 2, Constant(torch.full((2,), math.nan)))(z)


def test_a_decoder_of_other_labels_is_named():
    """Labels come as they are: their columns, in their units."""
    seen = []

    class Watched(torch.nn.Linear):
        def forward(self, z):
            seen.append(z)
            return super().forward(z)

    z = labels(4)
    fl.PoissonCounts(SPACE, 6, Watched(4, 6)).log_prob(torch.ones(4, 6), z)
    assert torch.equal(seen[0], z)
    wrong = fl.PoissonCounts(SPACE, 6, torch.nn.Linear(5, 6))
    names = r"labels \(M, 4\), the columns vertex\[0\], vertex\[1\], energy, angle; this one does"
    with pytest.raises(ValueError, match=names):
        wrong.log_prob(torch.ones(4, 6), z)

    class Broken(torch.nn.Module):
        def forward(self, z):
            raise RuntimeError("its own business")

    with pytest.raises(RuntimeError, match="its own business"):
        fl.PoissonCounts(SPACE, 6, Broken()).log_prob(torch.ones(4, 6), z)
