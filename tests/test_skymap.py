"""Sky maps against closed forms: narrow, wide, ringed and many-moded, their frames and files."""

import dataclasses
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats

import flowpost as fp
from flowpost import skymap
from flowpost.skymap import SkyMap
from flowpost.skymap.cells import centres, first, from_uniq, index_of, to_uniq
from flowpost.skymap.frames import show_area

hp = pytest.importorskip("healpy")
fits = pytest.importorskip("astropy.io.fits")

DEGREE = math.pi / 180
ARCMIN, ARCSEC = DEGREE / 60, DEGREE / 3600
SKY = 4 * math.pi / DEGREE**2  # square degrees


def at(lon, lat):
    """Unit vector of angles in degrees."""
    lon, lat = lon * DEGREE, lat * DEGREE
    return np.array([math.cos(lat) * math.cos(lon), math.cos(lat) * math.sin(lon), math.sin(lat)])


class Direction:
    """What a map needs of a posterior of one direction."""

    batch_shape, event_shape = torch.Size([]), torch.Size([3])
    device, dtype = torch.device("cpu"), torch.float64

    def __init__(self, mu):
        self.mu = np.asarray(mu) / np.linalg.norm(mu)
        east = np.cross(np.eye(3)[np.argmin(abs(self.mu))], self.mu)
        self.axes = np.stack([east / np.linalg.norm(east), np.zeros(3), self.mu])
        self.axes[1] = np.cross(self.mu, self.axes[0])

    def log_prob(self, z):
        assert z.dtype == torch.float64
        return torch.as_tensor(self.log_density(z.numpy()))

    def around(self, cosine, sine, generator):
        phi = 2 * math.pi * torch.rand(len(cosine), generator=generator, dtype=torch.float64)
        xyz = np.stack([sine * phi.cos().numpy(), sine * phi.sin().numpy(), cosine], -1)
        return torch.as_tensor(xyz @ self.axes)


class VonMisesFisher(Direction):
    """Of width σ = κ^−½ in radians; v = 1 − cos θ keeps small angles."""

    def __init__(self, mu, sigma):
        super().__init__(mu)
        self.kappa = 1 / sigma**2
        self.norm = -math.expm1(-2 * self.kappa)

    def log_density(self, z):
        v = np.square(z - self.mu).sum(-1) / 2
        return math.log(self.kappa / (2 * math.pi * self.norm)) - self.kappa * v

    def sample(self, shape, generator=None):
        p = torch.rand(*shape, generator=generator, dtype=torch.float64).numpy()
        v = -np.log1p(-p * self.norm) / self.kappa
        return self.around(1 - v, np.sqrt(v * (2 - v)), generator)

    def within(self, angle):
        """Probability within an angle in radians."""
        return -math.expm1(-self.kappa * 2 * math.sin(angle / 2) ** 2) / self.norm

    def area(self, level):
        """Square degrees of the region of a level, a cap."""
        return 2 * math.pi * -math.log1p(-level * self.norm) / self.kappa / DEGREE**2


class Ring(Direction):
    """Normal in the angle from an axis, uniform around it."""

    def __init__(self, mu, angle, sigma):
        super().__init__(mu)
        self.angle, self.sigma = angle, sigma

    def log_density(self, z):
        along = z @ self.axes.T
        sine = np.hypot(along[..., 0], along[..., 1])
        pull = (np.arctan2(sine, along[..., 2]) - self.angle) / self.sigma
        return -(pull**2) / 2 - np.log((2 * math.pi) ** 1.5 * self.sigma * sine)

    def sample(self, shape, generator=None):
        noise = torch.randn(*shape, generator=generator, dtype=torch.float64).numpy()
        theta = self.angle + self.sigma * noise
        return self.around(np.cos(theta), np.sin(theta), generator)

    def area(self, level):
        """To leading order in the width."""
        width = 2 * self.sigma * stats.norm.ppf((1 + level) / 2)
        return 2 * math.pi * math.sin(self.angle) * width / DEGREE**2


class Ellipse(Direction):
    """Normal in the plane that touches the sky, of widths a and b in radians."""

    def __init__(self, mu, a, b):
        super().__init__(mu)
        self.widths = np.array([a, b])

    def log_density(self, z):
        along = z @ self.axes.T
        ahead = np.maximum(along[..., 2], 1e-3)
        pull = np.square(along[..., :2] / ahead[..., None] / self.widths).sum(-1)
        norm = np.log(2 * math.pi * self.widths.prod()) + 3 * np.log(ahead)
        return np.where(along[..., 2] > 1e-3, -pull / 2 - norm, -np.inf)

    def sample(self, shape, generator=None):
        noise = torch.randn(*shape, 2, generator=generator, dtype=torch.float64).numpy()
        flat = np.concatenate([noise * self.widths, np.ones((*shape, 1))], -1) @ self.axes
        return torch.as_tensor(flat / np.linalg.norm(flat, axis=-1, keepdims=True))

    def area(self, level):
        """Of the tangent plane, near which the sky is flat."""
        return -2 * math.pi * math.log1p(-level) * self.widths.prod() / DEGREE**2


class Single(VonMisesFisher):
    """Draws in float32, as of a network."""

    def sample(self, shape, generator=None):
        return super().sample(shape, generator).float()


class Mixture(Direction):
    def __init__(self, parts, weights):
        super().__init__(parts[0].mu)
        self.parts, self.weights = parts, np.array(weights)

    def log_density(self, z):
        logs = [
            p.log_density(z) + math.log(w) for p, w in zip(self.parts, self.weights, strict=True)
        ]
        return np.logaddexp.reduce(logs)

    def sample(self, shape, generator=None):
        which = torch.multinomial(
            torch.as_tensor(self.weights), shape[0], replacement=True, generator=generator
        )
        return torch.stack([p.sample(shape, generator) for p in self.parts])[
            which, torch.arange(shape[0])
        ]


class Uniform(Direction):
    def __init__(self):
        super().__init__([0, 0, 1])

    def log_density(self, z):
        return np.full(z.shape[:-1], -math.log(4 * math.pi))

    def sample(self, shape, generator=None):
        z = torch.randn(*shape, 3, generator=generator, dtype=torch.float64)
        return z / z.norm(dim=-1, keepdim=True)


class Batched:
    """The same posterior with one batch dimension."""

    batch_shape, event_shape, device = torch.Size([1]), torch.Size([3]), torch.device("cpu")

    def __init__(self, inner):
        self.inner = inner

    def log_prob(self, z):
        assert z.shape[1:] == (1, 3)
        return self.inner.log_prob(z)

    def sample(self, shape, generator=None):
        return self.inner.sample(shape, generator).unsqueeze(1)


WIDTHS = {"1″": ARCSEC, "1′": ARCMIN, "1°": DEGREE, "20°": 20 * DEGREE, "60°": 60 * DEGREE}
PLACES = {
    "anywhere": at(203.1, -41.7),
    "north pole": at(0, 90),
    "near the south pole": at(77, -89.999),
    "longitude 0": at(359.9999, 12),
    "corner of base pixels": at(45, math.degrees(math.asin(2 / 3))),
    "longitude 180": at(180, 0),
}


@pytest.fixture(scope="module")
def degree():
    posterior = VonMisesFisher(at(203.1, -41.7), DEGREE)
    return posterior, skymap.multiorder(posterior, frame="C")


# ---------------------------------------------------------------------------------------- cells


def test_unique_numbers_are_those_of_astropy_healpix():
    healpix = pytest.importorskip("astropy_healpix")
    order = np.repeat(np.arange(30), 5)
    pixel = np.array([f * (12 * 4**k - 1) // 4 for k in range(30) for f in range(5)])
    uniq = to_uniq(order, pixel)
    assert (uniq == healpix.level_ipix_to_uniq(order, pixel)).all()
    again = from_uniq(uniq)
    assert (again[0] == order).all()
    assert (again[1] == pixel).all()
    with pytest.raises(ValueError, match=r"Expected unique numbers .* got 3"):
        from_uniq(np.array([4, 3]))
    with pytest.raises(ValueError, match="Expected unique numbers"):
        from_uniq(np.array([2**62]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("order", [20, 29])
def test_geometry_keeps_its_digits_at_the_finest_orders(place, order):
    pixel = index_of(PLACES[place][None]) >> 2 * (29 - order)
    around = pixel // 4 * 4 + np.arange(4)
    vectors = centres(np.full(4, order), around)
    assert np.allclose(np.linalg.norm(vectors, axis=1), 1, rtol=0, atol=3e-16)
    assert (index_of(vectors) >> 2 * (29 - order) == around).all()
    gaps = np.linalg.norm(vectors - np.roll(vectors, 1, 0), axis=1) * 2**order
    assert 0.5 < gaps.min() < gaps.max() < 2.5


# --------------------------------------------------------------------------------------- shapes


@pytest.mark.parametrize("width", WIDTHS)
def test_von_mises_fisher_of_any_width(width):
    sigma = WIDTHS[width]
    posterior = VonMisesFisher(PLACES["anywhere"], sigma)
    sky = skymap.multiorder(posterior)
    assert sky.integral == pytest.approx(1, abs=1e-3)
    assert sky.evaluations < 30_000
    assert sky.order.max() <= 25
    assert sky.probability.sum() == pytest.approx(1, abs=1e-12)
    for level in (0.5, 0.9):
        assert sky.area(level) == pytest.approx(posterior.area(level), rel=3e-3)
    for times in (0.1, 1, 2.5):
        angle = min(times * sigma, 3.0)
        expected = posterior.within(angle)
        found = sky.cone_probability(posterior.mu, angle / DEGREE)
        assert found == pytest.approx(expected, abs=1e-3, rel=2e-2)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("width", ["1″", "1°"])
def test_no_place_is_special(place, width):
    posterior = VonMisesFisher(PLACES[place], WIDTHS[width])
    sky = skymap.multiorder(posterior)
    assert sky.integral == pytest.approx(1, abs=1e-3)
    assert sky.area(0.9) == pytest.approx(posterior.area(0.9), rel=3e-3)
    angle = 2 * WIDTHS[width]
    found = sky.cone_probability(posterior.mu, angle / DEGREE)
    assert found == pytest.approx(posterior.within(angle), abs=1e-3)
    assert np.linalg.norm(sky.maximum - posterior.mu) < 0.2 * WIDTHS[width]


@pytest.mark.parametrize("latitude", [20, 89.5])
@pytest.mark.parametrize(("sigma", "most"), [(DEGREE, 45_000), (3 * ARCMIN, 150_000)])
def test_ring(sigma, most, latitude):
    # near a pole most cells are needed
    posterior = Ring(at(100, latitude), 30 * DEGREE, sigma)
    sky = skymap.multiorder(posterior)
    assert sky.integral == pytest.approx(1, abs=3e-3)
    assert sky.evaluations < most
    assert sky.area(0.9) == pytest.approx(posterior.area(0.9), rel=0.01)
    inside = sky.cone_probability(posterior.mu, 30)
    assert inside == pytest.approx(0.5, abs=5e-3)
    assert sky.cone_probability(-posterior.mu, 150) == pytest.approx(1 - inside, abs=1e-5)


@pytest.mark.parametrize("ratio", [10, 100])
def test_thin_ellipse(ratio):
    posterior = Ellipse(at(20, 33), DEGREE, DEGREE / ratio)
    sky = skymap.multiorder(posterior)
    assert sky.integral == pytest.approx(1, abs=2e-3)
    assert sky.area(0.9) == pytest.approx(posterior.area(0.9), rel=0.01)
    assert sky.evaluations < 60_000


@pytest.mark.parametrize("sigma", [ARCSEC, 0.01 * ARCSEC])
def test_draws_in_single_precision_lead_to_the_mode(sigma):
    # rounding of the draws is 0.012″
    posterior = Single(at(203.1, -41.7), sigma)
    sky = skymap.multiorder(posterior)
    assert sky.integral == pytest.approx(1, abs=2e-3)
    assert sky.area(0.9) == pytest.approx(posterior.area(0.9), rel=3e-3)


@pytest.mark.parametrize("weight", [0.01, 0.001])
@pytest.mark.parametrize("where", [at(80, 15), at(200, -60)], ids=["inside", "far"])
def test_narrow_mode_is_not_missed(weight, where):
    wide, narrow = VonMisesFisher(at(80, 15), 5 * DEGREE), VonMisesFisher(where, ARCSEC)
    sky = skymap.multiorder(Mixture([wide, narrow], [1 - weight, weight]))
    assert sky.integral == pytest.approx(1, abs=2e-3)
    assert sky.cone_probability(where, 5 / 3600) == pytest.approx(weight, rel=0.01)
    assert sky.order.max() >= 18


def test_mode_of_a_single_draw_is_found():
    wide, narrow = VonMisesFisher(at(80, 15), 5 * DEGREE), VonMisesFisher(at(200, -60), ARCSEC)
    posterior = Mixture([wide, narrow], [1 - 1e-4, 1e-4])
    generators = (torch.Generator().manual_seed(s) for s in range(99))
    state = torch.Generator()
    for generator in generators:
        state.set_state(generator.get_state())
        draws = posterior.sample((10_000,), generator).numpy()
        if (np.linalg.norm(draws - narrow.mu, axis=1) < 0.01).sum() == 1:
            break
    sky = skymap.multiorder(posterior, generator=state)
    assert sky.cone_probability(narrow.mu, 5 / 3600) == pytest.approx(1e-4, rel=0.05)


def test_modes_of_different_width_and_their_union():
    parts = [
        VonMisesFisher(at(200, -40), 6 * DEGREE),
        VonMisesFisher(at(30, 10), 2 * DEGREE),
        VonMisesFisher(at(300, 60), ARCMIN),
    ]
    weights = (0.5, 0.3, 0.2)
    sky = skymap.multiorder(Mixture(parts, weights))
    for part, weight in zip(parts, weights, strict=True):
        angle = 5 / math.sqrt(part.kappa) / DEGREE
        assert sky.cone_probability(part.mu, angle) == pytest.approx(weight, abs=1e-3)

    # the same threshold t cuts each cap: w (1 − t/(w·peak)) of its mass is above
    def region(log_t):
        mass = area = 0.0
        for part, weight in zip(parts, weights, strict=True):
            peak = math.log(weight * part.kappa / (2 * math.pi))
            share = max(0.0, -math.expm1(log_t - peak))
            mass, area = mass + weight * share, area + part.area(share)
        return mass, area

    low, high = -10.0, 25.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if region(middle)[0] > 0.9 else (low, middle)
    assert sky.area(0.9) == pytest.approx(region(low)[1], rel=4e-3)


def test_uniform_sky():
    sky = skymap.multiorder(Uniform())
    assert sky.integral == pytest.approx(1, abs=1e-12)
    assert sky.area(0.9) == pytest.approx(0.9 * SKY)
    assert sky.area([0.25, 1.0]) == pytest.approx([0.25 * SKY, SKY])
    assert sky.searched_probability(at(12, 34)) == pytest.approx(0.5)  # all of it is a tie
    assert sky.searched_area(at(12, 34)) == pytest.approx(0.5 * SKY)
    for radius in (0, 1e-4, 1, 60, 90, 179, 180):
        expected = math.sin(radius * DEGREE / 2) ** 2
        assert sky.cone_probability(at(200, 80), radius) == pytest.approx(expected, abs=2e-5)
    assert np.allclose(skymap.flat(Uniform(), 16).rasterize(16), 1 / 3072, rtol=1e-12)


def test_posterior_of_a_head():
    space = fp.Product(energy=fp.Positive(), direction=fp.Sphere())
    head = fp.PosteriorHead(4, space, flow="diagonal")
    posterior = head(torch.randn(3, 4))["direction"]
    sky = skymap.multiorder(posterior[1])
    again = skymap.multiorder(posterior[1:2])
    assert sky.integral == pytest.approx(1, abs=2e-3)
    assert again.area(0.9) == pytest.approx(sky.area(0.9), rel=1e-3)
    truth = posterior[1].sample((2000,))
    levels = sky.searched_probability(truth)
    assert stats.kstest(levels, "uniform").pvalue > 1e-3
    assert (
        posterior[1].log_prob(torch.as_tensor(sky.maximum))
        > posterior[1].log_prob(truth).max() - 0.05
    )


# -------------------------------------------------------------------------------------- regions


def test_searched_region_of_a_direction(degree):
    posterior, sky = degree
    truth = posterior.sample((2000,), torch.Generator().manual_seed(3))
    v = np.square(truth.numpy() - posterior.mu).sum(-1) / 2
    level = -np.expm1(-posterior.kappa * v)
    assert np.abs(sky.searched_probability(truth) - level).max() < 0.05
    area = 2 * math.pi * v / DEGREE**2
    core = level < 0.9
    assert np.abs(sky.searched_area(truth) - area)[core].max() < 0.08 * posterior.area(0.9)
    # without bias, since the cell that holds the direction counts half
    assert np.mean(sky.searched_area(truth) - area) == pytest.approx(0, abs=0.02)
    one = sky.searched_area(truth[0])
    assert isinstance(one, float)
    assert one == pytest.approx(sky.searched_area(truth.float())[0])
    assert stats.kstest(sky.searched_probability(truth), "uniform").pvalue > 1e-3


def test_levels_are_those_of_sorting(degree):
    _, sky = degree
    rank = np.argsort(-sky.density)
    above = np.cumsum(sky.probability[rank])
    equal = np.array([sky.probability[sky.density == d].sum() for d in sky.density[rank][:50]])
    mine = sky.levels[rank][:50]
    groups = [sky.probability[sky.density > d].sum() for d in sky.density[rank][:50]]
    assert np.allclose(mine, np.array(groups) + equal / 2, atol=1e-12)
    assert (np.diff(sky.levels[rank]) >= 0).all()
    assert above[-1] == pytest.approx(1)
    # a region of level p is the cells of levels up to p
    area = sky.cell_area[sky.levels <= 0.9].sum() / DEGREE**2
    assert area == pytest.approx(sky.area(0.9), rel=2e-3)


def test_flat_and_multiorder_maps_agree(degree):
    posterior, sky = degree
    flat = skymap.flat(posterior, 256)
    assert flat.area(0.9) == pytest.approx(sky.area(0.9), rel=0.02)
    assert flat.cone_probability(posterior.mu, 1.5) == pytest.approx(
        sky.cone_probability(posterior.mu, 1.5), abs=5e-3
    )
    truth = posterior.sample((50,), torch.Generator().manual_seed(3))
    assert np.allclose(flat.searched_probability(truth), sky.searched_probability(truth), atol=0.2)


def test_cones_of_many_directions(degree):
    posterior, sky = degree
    found = sky.cone_probability(np.stack([posterior.mu, -posterior.mu]), 2)
    assert found.shape == (2,)
    assert found[0] == sky.cone_probability(posterior.mu, 2)
    assert found[1] == pytest.approx(0, abs=1e-9)
    # a cone inside one coarse cell
    coarse = skymap.multiorder(Uniform()).coarsen(0)
    tiny = coarse.cone_probability(at(10, 10), 1 / 3600)
    assert tiny == pytest.approx(math.sin(ARCSEC / 2) ** 2, abs=1e-7)


def test_raster_conserves_probability(degree):
    _, sky = degree
    nested = {nside: sky.rasterize(nside, nest=True) for nside in (1, 4, 64, 256)}
    for values in nested.values():
        assert values.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(nested[256].reshape(-1, 16).sum(1), nested[64], rtol=1e-9, atol=1e-300)
    ring = sky.rasterize(64)
    assert (ring == hp.reorder(nested[64], n2r=True)).all()
    density = sky.rasterize(64, density=True)
    assert np.allclose(density * hp.nside2pixarea(64), ring, rtol=1e-12)
    # each pixel by its cells, one by one
    pixel = int(nested[64].argmax())
    start = first(np.array([6]), np.array([pixel]))
    held = (first(sky.order, sky.pixel) >= start) & (first(sky.order, sky.pixel) < start + 4**23)
    assert nested[64][pixel] == pytest.approx(sky.probability[held].sum())


def test_coarser_map_keeps_probability(degree):
    _, sky = degree
    coarse = sky.coarsen(7)
    assert coarse.order.max() == 7
    assert coarse.probability.sum() == pytest.approx(1, abs=1e-12)
    assert np.allclose(coarse.rasterize(64), sky.rasterize(64), rtol=1e-9, atol=1e-300)
    assert np.allclose(sky.coarsen(29).density, sky.density, rtol=1e-15)
    with pytest.raises(ValueError, match="Expected an order from 0 to 29; got 30"):
        sky.coarsen(30)


# ----------------------------------------------------------------------------------------- flat


def test_flat_map_is_the_density_at_its_centres():
    posterior = VonMisesFisher(at(3, 60), 25 * DEGREE)
    sky = skymap.flat(posterior, 16)
    vectors = np.stack(hp.pix2vec(16, np.arange(3072)), -1)
    exact = np.exp(posterior.log_density(vectors))
    assert sky.integral == pytest.approx(1, abs=1e-3)
    assert sky.rasterize(16, density=True) == pytest.approx(exact, rel=0.02)
    tail = exact < 1e-2  # coarse cells of the multi-order map: evaluated at the centre
    assert tail.sum() > 500
    ratio = sky.rasterize(16, density=True)[tail] * sky.integral / exact[tail]
    assert np.median(np.abs(ratio - 1)) < 1e-9


def test_flat_map_keeps_what_is_narrower_than_a_pixel():
    posterior = VonMisesFisher(at(3, 60), ARCSEC)
    sky = skymap.flat(posterior, 32)
    assert sky.integral == pytest.approx(1, abs=1e-3)
    pixel = hp.vec2pix(32, *posterior.mu)
    assert sky.rasterize(32)[pixel] == pytest.approx(1, abs=1e-6)
    assert (sky.order == 5).all()
    assert len(sky.density) == 12 * 32**2


# --------------------------------------------------------------------------------------- frames


def rotation(seed=1):
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(3, 3)))
    return q * np.sign(np.linalg.det(q))


def test_rotation_re_evaluates_the_density():
    r = rotation()
    posterior = Ring(at(100, 20), 30 * DEGREE, 2 * DEGREE)
    turned = Ring(r @ posterior.mu, 30 * DEGREE, 2 * DEGREE)
    sky = skymap.multiorder(posterior, frame="local", rotation=r)
    assert sky.frame == "C"
    exact = np.exp(turned.log_density(sky.centres()))
    assert np.allclose(sky.density * sky.integral, exact, rtol=1e-9, atol=1e-12)
    truth = posterior.sample((500,), torch.Generator().manual_seed(0)).numpy()
    own = skymap.multiorder(posterior, frame="local")
    assert own.frame == "local"
    levels = sky.searched_probability(truth @ r.T)
    assert np.allclose(levels, own.searched_probability(truth), atol=0.2)  # half a cell's steps
    assert np.mean(levels - own.searched_probability(truth)) == pytest.approx(0, abs=0.01)
    assert sky.area(0.9) == pytest.approx(own.area(0.9), rel=3e-3)
    flat = skymap.flat(posterior, 32, rotation=torch.as_tensor(r))
    assert flat.frame == "C"
    other = skymap.flat(turned, 32)
    assert np.allclose(flat.rasterize(32), other.rasterize(32), atol=1e-5)


def test_galactic_rotation_is_that_of_astropy():
    coordinates = pytest.importorskip("astropy.coordinates")
    r = skymap.galactic_rotation()
    lon, lat = np.array([0, 33, 266.4, 359]), np.array([0, 12, -28.9, 88])
    galactic = coordinates.SkyCoord(l=lon, b=lat, unit="deg", frame="galactic")
    expected = galactic.icrs.cartesian.xyz.value
    assert np.abs(r @ galactic.cartesian.xyz.value - expected).max() < 1e-13
    assert np.linalg.det(r) == pytest.approx(1, abs=1e-14)
    center = r @ [1, 0, 0]  # Sagittarius A* is 0.07° from the Galactic frame's origin
    assert np.degrees(np.arctan2(center[1], center[0])) % 360 == pytest.approx(266.405, abs=0.01)


LOCATIONS = {"south pole": (-63.453, -89.99, 2800), "mountain": (-155.47, 19.83, 4200)}


def horizontal(vectors, location, time, x_azimuth):
    """ICRS vectors of local ones by astropy's azimuth (north through east) and altitude."""
    from astropy.coordinates import AltAz, SkyCoord
    from astropy.time import Time
    from astropy.utils import iers

    # compass azimuth falls while the right-handed one rises
    azimuth = x_azimuth - np.degrees(np.arctan2(vectors[:, 1], vectors[:, 0]))
    altitude = np.degrees(np.arcsin(vectors[:, 2]))
    with iers.conf.set_temp("auto_download", False):
        frame = AltAz(obstime=Time(time), location=location)
        sky = SkyCoord(az=azimuth, alt=altitude, unit="deg", frame=frame)
        return sky.icrs.cartesian.xyz.value.T


@pytest.mark.parametrize("place", LOCATIONS)
@pytest.mark.parametrize("x_azimuth", [90.0, 0.0, 217.3])
def test_detector_rotation_is_that_of_astropy(place, x_azimuth):
    coordinates = pytest.importorskip("astropy.coordinates")
    lon, lat, height = LOCATIONS[place]
    location = coordinates.EarthLocation.from_geodetic(lon, lat, height)
    time = "2019-08-14T21:10:39"
    draws = np.random.default_rng(0).normal(size=(20, 3))
    draws /= np.linalg.norm(draws, axis=1, keepdims=True)
    expected = horizontal(draws, location, time, x_azimuth)
    r = skymap.detector_rotation(location, time, x_azimuth=x_azimuth)
    assert np.linalg.det(r) == pytest.approx(1, abs=1e-12)
    # aberration is 20.5″, twice that between opposite directions
    assert np.linalg.norm(draws @ r.T - expected, axis=1).max() < 42 * ARCSEC
    near = skymap.detector_rotation(location, time, x_azimuth=x_azimuth, direction=draws[0])
    assert np.linalg.norm(near @ draws[0] - expected[0]) < 1e-5 * ARCSEC
    close = draws[0] + 0.01 * draws[1]
    close /= np.linalg.norm(close)
    there = horizontal(close[None], location, time, x_azimuth)[0]
    assert np.linalg.norm(near @ close - there) < 0.4 * ARCSEC
    zenith = horizontal(np.array([[0, 0, 1.0]]), location, time, x_azimuth)[0]
    assert np.linalg.norm(r[:, 2] - zenith) < 1e-5 * ARCSEC


def test_left_handed_frames_are_refused():
    posterior = VonMisesFisher(at(10, 20), DEGREE)
    mirrored = np.diag([1.0, -1.0, 1.0])  # azimuth from north through east, taken as atan2(y, x)
    with pytest.raises(ValueError, match=r"determinant \+1; got −1, which mirrors .* left-handed"):
        skymap.multiorder(posterior, rotation=mirrored)


# ---------------------------------------------------------------------------------------- files


def test_multiorder_file_and_its_readers(degree, tmp_path):
    healpix, mhealpy = pytest.importorskip("astropy_healpix"), pytest.importorskip("mhealpy")
    posterior, sky = degree
    path = tmp_path / "event.multiorder.fits"
    sky.write(path, name="IC170922A", time="2017-09-22T20:54:30.43", origin="tests")
    assert os.listdir(tmp_path) == [path.name]
    with fits.open(path) as file:
        header, table = file[1].header, file[1].data
        uniq, density = np.array(table["UNIQ"]), np.array(table["PROBDENSITY"])
    expected = {
        "PIXTYPE": "HEALPIX",
        "ORDERING": "NUNIQ",
        "COORDSYS": "C",
        "INDXSCHM": "EXPLICIT",
        "MOCORDER": sky.order.max(),
        "TFORM1": "K",
        "TFORM2": "D",
        "TUNIT2": "sr-1",
        "OBJECT": "IC170922A",
        "DATE-OBS": "2017-09-22T20:54:30.430",
        "CREATOR": f"flowpost {fp.__version__}",
        "ORIGIN": "tests",
    }
    assert {key: header[key] for key in expected} == expected
    assert header["MJD-OBS"] == pytest.approx(58018.87118553, abs=1e-8)
    assert uniq.dtype.newbyteorder("=") == np.int64
    assert (np.diff(uniq) > 0).all()

    order, pixel = healpix.uniq_to_level_ipix(uniq)
    area = healpix.nside_to_pixel_area(1 << order).value
    assert (density * area).sum() == pytest.approx(1, abs=1e-12)
    held = int(np.flatnonzero(sky.uniq[sky.cell_at(posterior.mu)] == uniq)[0])
    lonlat = healpix.healpix_to_lonlat(pixel[held], 1 << order[held], order="nested")
    assert np.linalg.norm(at(*(a.to_value("deg") for a in lonlat)) - posterior.mu) < 0.1 * DEGREE

    foreign = mhealpy.HealpixMap.read_map(path)
    assert foreign.is_moc
    assert foreign.density()
    truth = posterior.sample((20,), torch.Generator().manual_seed(0)).numpy()
    cells = [foreign.vec2pix(*v) for v in truth]
    values = np.array([foreign[c].value for c in cells])
    assert np.allclose(values, sky.density_at(truth), rtol=1e-12)

    again = skymap.read(path)
    for name in ("order", "pixel"):
        assert (getattr(again, name) == getattr(sky, name)).all()
    assert np.allclose(again.density, sky.density, rtol=1e-14)
    assert again.frame == "C"
    assert again.integral == pytest.approx(1, abs=1e-12)


@pytest.mark.parametrize("nside", [4, 32])
@pytest.mark.parametrize("nest", [False, True])
@pytest.mark.parametrize("frame", ["C", "G", "local"])
def test_flat_file_and_its_readers(nside, nest, frame, tmp_path):
    sky = skymap.flat(VonMisesFisher(at(10, 20), 15 * DEGREE), nside, frame=frame)
    path = tmp_path / "event.fits.gz"
    sky.write(path, nside=nside, nest=nest)
    assert path.read_bytes()[:2] == b"\x1f\x8b"
    values, header = hp.read_map(path, h=True, nest=nest)
    header = dict(header)
    assert (values == sky.rasterize(nside, nest=nest)).all()
    assert header["TTYPE1"] == "PROB"
    assert header["TUNIT1"] == "pix-1"
    assert header["ORDERING"] == ("NESTED" if nest else "RING")
    assert header.get("COORDSYS", "local") == frame
    again = skymap.read(path)
    assert again.frame == frame
    assert np.allclose(again.rasterize(nside), sky.rasterize(nside), rtol=1e-13)
    assert (again.order == sky.order).all()


def test_map_of_healpy_is_read(tmp_path):
    values = np.random.default_rng(0).random(12 * 16**2)
    hp.write_map(
        tmp_path / "a.fits", values / values.sum(), coord="G", column_names=["PROB"], dtype=float
    )
    sky = skymap.read(tmp_path / "a.fits")
    assert sky.frame == "G"
    assert np.allclose(sky.rasterize(16), values / values.sum(), rtol=1e-12)
    hp.write_map(tmp_path / "b.fits", values, column_names=["PROB"], dtype=float)
    with pytest.warns(UserWarning, match="integral was"):
        assert skymap.read(tmp_path / "b.fits").frame == "local"


def test_other_units_of_density_are_read(degree, tmp_path):
    _, sky = degree
    columns = [
        fits.Column("UNIQ", "K", array=sky.uniq[::-1]),
        fits.Column("PROBDENSITY", "D", unit="deg-2", array=sky.density[::-1] * DEGREE**2),
    ]
    table = fits.BinTableHDU.from_columns(columns)
    table.header.update({"ORDERING": "NUNIQ", "COORDSYS": "ICRS"})
    table.writeto(tmp_path / "a.fits")
    again = skymap.read(tmp_path / "a.fits")
    assert np.allclose(again.density, sky.density, rtol=1e-12)


def test_files_are_replaced_whole_or_not_at_all(degree, tmp_path, monkeypatch):
    _, sky = degree
    path = tmp_path / "a.fits"
    path.write_text("kept")
    with pytest.raises(FileExistsError, match=r"exists\. Give overwrite=True"):
        sky.write(path)
    monkeypatch.setattr(fits.HDUList, "writeto", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sky.write(path, overwrite=True)
    assert path.read_text() == "kept"
    assert os.listdir(tmp_path) == ["a.fits"]
    monkeypatch.undo()
    sky.write(path, overwrite=True)
    assert len(skymap.read(path).order) == len(sky.order)
    with pytest.raises(ValueError, match="Expected a folder"):
        sky.write(tmp_path / "none" / "a.fits")


def test_multiorder_files_are_equatorial(degree, tmp_path):
    posterior, _ = degree
    sky = skymap.multiorder(posterior, frame="G")
    with pytest.raises(ValueError, match=r"Expected an equatorial map .* 'G'.*rotation="):
        sky.write(tmp_path / "a.fits")
    turned = skymap.multiorder(posterior, frame="G", rotation=skymap.galactic_rotation())
    turned.write(tmp_path / "a.fits")
    assert os.listdir(tmp_path) == ["a.fits"]


def test_a_flat_map_is_written_flat(tmp_path):
    sky = skymap.flat(VonMisesFisher(at(60, 35), 10 * DEGREE), 16, frame="G")
    sky.write(tmp_path / "a.fits")
    values, header = hp.read_map(tmp_path / "a.fits", h=True)
    assert dict(header)["ORDERING"] == "RING"
    assert np.allclose(values, sky.rasterize(16))
    sky = dataclasses.replace(sky, frame="C")
    sky.write(tmp_path / "a.multiorder.fits")
    assert fits.getheader(tmp_path / "a.multiorder.fits", 1)["ORDERING"] == "NUNIQ"
    sky.write(tmp_path / "b.fits", nside=8)
    assert fits.getheader(tmp_path / "b.fits", 1)["NSIDE"] == 8
    back = skymap.read(tmp_path / "a.multiorder.fits")
    assert np.allclose(back.density, sky.density)


def test_labels_that_are_equatorial_are_not_rotated():
    posterior = VonMisesFisher(at(60, 35), 10 * DEGREE)
    for call in (skymap.multiorder, lambda q, **options: skymap.flat(q, 16, **options)):
        with pytest.raises(ValueError, match=r'Expected a rotation of labels .* frame="C"\. Leave'):
            call(posterior, frame="C", rotation=np.eye(3))


def test_truth_is_rotated_with_the_map():
    r = rotation()
    posterior = VonMisesFisher(at(60, 35), 10 * DEGREE)
    label = at(50, 40)
    sky, turned = skymap.multiorder(posterior), skymap.multiorder(posterior, rotation=r)
    expected = sky.searched_probability(label)
    assert turned.searched_probability(r @ label) == pytest.approx(expected, abs=0.01)
    assert turned.searched_probability(label) > 0.9
    both = np.stack([label, at(60, 35)])
    areas = turned.searched_area(both @ r.T)
    assert areas == pytest.approx(sky.searched_area(both), rel=0.02, abs=1)


def foreign_table(path, columns, **header):
    table = fits.BinTableHDU.from_columns([fits.Column(n, f, array=a) for n, f, a in columns])
    table.header.update(header)
    table.writeto(path)


def write_foreign(kind, path):
    ones = np.full(48, 1 / 48)
    uniq, density = np.arange(4, 16), np.full(12, 1 / (4 * math.pi))
    multi = {"ORDERING": "NUNIQ", "COORDSYS": "C"}
    flat = {"ORDERING": "RING", "COORDSYS": "C", "NSIDE": 2}
    if kind == "text":
        path.write_text("no FITS")
    elif kind == "image":
        fits.PrimaryHDU(np.zeros((4, 4))).writeto(path)
    elif kind == "truncated":
        foreign_table(path, [("UNIQ", "K", uniq), ("PROBDENSITY", "D", density)], **multi)
        path.write_bytes(path.read_bytes()[:-2000])
    else:
        columns, header = {
            "table": ([("PROB", "D", ones)], {}),
            "temperature": ([("TEMPERATURE", "D", ones)], flat),
            "ecliptic": ([("PROB", "D", ones)], flat | {"COORDSYS": "E"}),
            "partial": ([("PROB", "D", ones)], flat | {"INDXSCHM": "EXPLICIT"}),
            "size": ([("PROB", "D", ones[:-1])], flat),
            "nside 3": ([("PROB", "D", np.full(108, 1 / 108))], flat),
            "no density": ([("UNIQ", "K", uniq)], multi),
            "float UNIQ": ([("UNIQ", "D", uniq), ("PROBDENSITY", "D", density)], multi),
            "gap": ([("UNIQ", "K", uniq[1:]), ("PROBDENSITY", "D", density[1:])], multi),
            "twice": ([("UNIQ", "K", uniq // 5 * 5), ("PROBDENSITY", "D", density)], multi),
            "no cell": ([("UNIQ", "K", uniq - 4), ("PROBDENSITY", "D", density)], multi),
            "negative": ([("UNIQ", "K", uniq), ("PROBDENSITY", "D", density - 0.08)], multi),
            "NaN": ([("PROB", "D", ones * np.nan)], flat),
            "zero": ([("PROB", "D", 0 * ones)], flat),
        }[kind]
        foreign_table(path, columns, **header)


FOREIGN = (
    "text image truncated table temperature ecliptic partial size no-density float-UNIQ gap twice "
    "no-cell negative NaN zero nside-3"
)


@pytest.mark.parametrize("kind", FOREIGN.split())
def test_foreign_files_are_refused(kind, tmp_path):
    path = tmp_path / "a.fits"
    write_foreign(kind.replace("-", " "), path)
    with pytest.raises(ValueError, match=r"Expected a (HEALPix )?sky map"):
        skymap.read(path)
    with pytest.raises(ValueError, match="there is no file"):
        skymap.read(tmp_path / "b.fits")


# ---------------------------------------------------------------------------------------- input


def test_draws_are_reproducible_and_batches_alike(degree):
    posterior, sky = degree
    state = torch.get_rng_state()
    again = skymap.multiorder(Batched(posterior))
    assert (torch.get_rng_state() == state).all()
    assert (again.density == sky.density).all()
    other = skymap.multiorder(posterior, generator=torch.Generator().manual_seed(8))
    assert len(other.order) != len(sky.order)
    assert other.area(0.9) == pytest.approx(sky.area(0.9), rel=3e-3)


def test_result_reads_well_and_is_frozen(degree):
    posterior, sky = degree
    assert skymap.multiorder(posterior).frame == "local"
    text = str(sky)
    assert "equatorial (ICRS)" in text
    assert "50 % area" in text
    assert "deg²" in text
    assert "RA 203." in text
    assert "Dec −41.7" in text
    assert f"from {sky.evaluations} densities" in text
    narrow = str(skymap.multiorder(VonMisesFisher(posterior.mu, ARCSEC), frame="local"))
    assert "arcsec²" in narrow
    assert "azimuth" in narrow
    with pytest.raises(dataclasses.FrozenInstanceError):
        sky.frame = "G"


def test_areas_have_no_exponents():
    sky = skymap.multiorder(Uniform())
    assert re.search(r"90 % area      371\d\d deg²", str(sky))
    for value, text in ((10_720.3, "10720 deg²"), (999.96, "1000 deg²"), (12.3456, "12.35 deg²")):
        assert show_area(value) == text


def test_truth_as_a_tensor_is_rotated_as_the_docstrings_say():
    r = rotation()
    sky = skymap.multiorder(VonMisesFisher(at(60, 35), 10 * DEGREE), rotation=r)
    labels = torch.tensor(np.stack([at(50, 40), at(60, 35)]), dtype=torch.float32)
    areas = sky.searched_area(labels.numpy() @ r.T)
    assert areas[0] == sky.searched_area(r @ labels[0].numpy())
    docs = [sky.searched_area.__doc__, sky.searched_probability.__doc__, sky.plot.__doc__]
    for text in [*docs, sky.plot_zoom.__doc__, skymap.multiorder.__doc__]:
        assert "R @ label.numpy()" in text


def test_bad_integral_is_told():
    posterior = VonMisesFisher(at(10, 20), DEGREE)

    class Wrong(VonMisesFisher):
        def log_density(self, z):
            return super().log_density(z) + math.log(1.02)

    with pytest.warns(UserWarning, match=r"integral was 1\.0[12]\d? before .* more than 1 %"):
        sky = skymap.multiorder(Wrong(posterior.mu, DEGREE))
    assert sky.integral == pytest.approx(1.02, abs=2e-3)
    assert sky.probability.sum() == pytest.approx(1)
    with pytest.warns(UserWarning, match="stopped refining"):
        skymap.multiorder(posterior, max_evaluations=5000)


class Broken(VonMisesFisher):
    value = float("nan")

    def log_density(self, z):
        return np.full(z.shape[:-1], self.value)


class Zero(Broken):
    value = -math.inf


class Long(VonMisesFisher):
    def sample(self, shape, generator=None):
        return 2 * super().sample(shape, generator)


class Plane(VonMisesFisher):
    event_shape = torch.Size([2])


class Many(VonMisesFisher):
    batch_shape = torch.Size([7])


REFUSED = [
    (Plane, {}, r"event shape \(3,\); got \(2,\).*q\[\"direction\"\]"),
    (Many, {}, r"one event, batch shape \(\) or \(1,\); got \(7,\).*q\[0\]"),
    (Broken, {}, "log q without NaN"),
    (Zero, {}, "positive integral; got 0"),
    (Long, {}, "draws are unit vectors"),
    (VonMisesFisher, {"frame": "E"}, "frame as one of C, G, local; got 'E'"),
    (VonMisesFisher, {"rotation": np.eye(2)}, r"shape \(3, 3\); got \(2, 2\)"),
    (VonMisesFisher, {"rotation": 2 * np.eye(3)}, "orthogonal matrix; got R Rᵀ"),
    (VonMisesFisher, {"rotation": np.full((3, 3), np.nan)}, "orthogonal matrix"),
    (VonMisesFisher, {"draws": 10}, "draws as a whole number of at least 100"),
    (VonMisesFisher, {"tolerance": 0}, "tolerance above 0"),
    (VonMisesFisher, {"max_evaluations": 0}, "max_evaluations as a whole number"),
]


@pytest.mark.parametrize(("kind", "options", "message"), REFUSED)
def test_bad_posteriors_and_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        skymap.multiorder(kind(at(10, 20), DEGREE), **options)


def test_bad_questions_are_refused(degree, tmp_path):
    posterior, sky = degree
    mu = posterior.mu
    for call, message in (
        (lambda: sky.area(90), r"levels in \(0, 1\]; got 90"),
        (lambda: sky.area([0.5, 0.0]), "levels in"),
        (lambda: sky.searched_area(2 * mu), "unit vectors; got length 2. Divide"),
        (lambda: sky.searched_area([10.0, 20.0]), r"of shape \(3,\) or \(N, 3\)"),
        (lambda: sky.searched_probability("north"), "as unit vectors"),
        (lambda: sky.searched_probability([np.nan, 0, 0]), "unit vectors; got length nan"),
        (lambda: sky.cone_probability(mu, 181), r"degrees in \[0, 180\]; got 181"),
        (lambda: sky.cone_probability(mu, math.nan), "degrees in"),
        (lambda: sky.rasterize(12), "power of two up to 8192; got 12"),
        (lambda: sky.rasterize(16384), "power of two up to 8192; got 16384"),
        (lambda: skymap.flat(posterior, 0), "nside as a whole number of at least 1"),
        (lambda: sky.write(tmp_path / "a", name="naïve"), "name as ASCII text"),
        (lambda: sky.write(tmp_path / "a", origin=3), "origin as ASCII text"),
        (lambda: sky.write(tmp_path / "a", time="yesterday"), "time as an astropy Time"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert not os.listdir(tmp_path)


def test_bad_cells_are_refused():
    order, pixel = np.zeros(12, dtype=np.int64), np.arange(12)
    density = np.full(12, 1 / (4 * math.pi))
    SkyMap(order, pixel, density)
    for arguments, message in (
        ((order, pixel[::-1], density), "cover the sky exactly once"),
        ((order[:-1], pixel[:-1], density[:-1]), "cover the sky exactly once"),
        ((order, pixel, density[:-1]), "of one shape"),
        ((order, pixel, -density), "densities of 0 or more; got -0.0"),
        ((order, pixel, 2 * density), "integral 1; got 2"),
        ((order, pixel, density, "E"), "frame as one of"),
    ):
        with pytest.raises(ValueError, match=message):
            SkyMap(*arguments)


def test_bad_detectors_are_refused():
    coordinates = pytest.importorskip("astropy.coordinates")
    location = coordinates.EarthLocation.from_geodetic(0, 0)
    for arguments, options, message in (
        (("Greenwich", "2020-01-01"), {}, "location as one EarthLocation; got str"),
        ((location, "never"), {}, "time as an astropy Time"),
        ((location, 60000.0), {}, r'got 60000\.0\. .*astropy\.time\.Time\(…, format="mjd"\)'),
        ((location, ["2020-01-01", "2020-01-02"]), {}, "Expected one time"),
        ((location, "2020-01-01"), {"x_azimuth": math.nan}, "x_azimuth in degrees"),
        ((location, "2020-01-01"), {"direction": np.eye(3)}, "one direction"),
    ):
        with pytest.raises(ValueError, match=message):
            skymap.detector_rotation(*arguments, **options)


def test_nothing_is_downloaded_or_left_set():
    coordinates = pytest.importorskip("astropy.coordinates")
    iers = pytest.importorskip("astropy.utils.iers")
    before = (iers.conf.auto_download, iers.conf.auto_max_age)
    location = coordinates.EarthLocation.from_geodetic(10, 50)
    r = skymap.detector_rotation(location, "2024-05-01")
    assert np.linalg.det(r) == pytest.approx(1)
    assert (iers.conf.auto_download, iers.conf.auto_max_age) == before


def test_healpy_is_met_in_one_folder():
    root = Path(fp.__file__).parent
    users = {p.relative_to(root).parts[0] for p in root.rglob("*.py") if 'healpy"' in p.read_text()}
    assert users <= {"skymap"}
