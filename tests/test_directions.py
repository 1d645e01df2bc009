"""Angles of directions: against astropy, at poles and seams, separations without loss."""

import math
import re

import astropy.units as u
import numpy as np
import pytest
import torch
from astropy.coordinates import SkyCoord
from spherical import at_angle, directions

from flowpost import directions as fd

POLES = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]]).double()
DTYPES = {torch.float64: 1e-13, torch.float32: 5e-7}


def sky(n):
    ra = 360 * torch.rand(n, dtype=torch.float64)
    dec = torch.rad2deg(torch.asin(2 * torch.rand(n, dtype=torch.float64) - 1))
    return ra, dec


def test_ra_dec_are_those_of_astropy():
    ra, dec = sky(500)
    coordinates = SkyCoord(ra.numpy() * u.deg, dec.numpy() * u.deg, frame="icrs")
    found = fd.from_ra_dec(ra, dec, degrees=True)
    np.testing.assert_allclose(found, coordinates.cartesian.xyz.value.T, rtol=0, atol=1e-14)
    back = fd.to_ra_dec(coordinates.cartesian.xyz.value.T)
    np.testing.assert_allclose(back[0], coordinates.ra.rad, rtol=0, atol=1e-13)
    np.testing.assert_allclose(back[1], coordinates.dec.rad, rtol=0, atol=1e-13)


def test_separation_is_that_of_astropy():
    a, b = sky(200), sky(200)
    first, second = (SkyCoord(x[0].numpy() * u.deg, x[1].numpy() * u.deg) for x in (a, b))
    found = fd.separation(*(fd.from_ra_dec(*x, degrees=True) for x in (a, b)), degrees=True)
    np.testing.assert_allclose(found, first.separation(second).deg, rtol=1e-13, atol=0)


@pytest.mark.parametrize(
    ("angles", "vector"),
    [
        ((0.0, 0.0), (0.0, 0.0, 1.0)),
        ((90.0, 0.0), (1.0, 0.0, 0.0)),
        ((90.0, 90.0), (0.0, 1.0, 0.0)),
        ((90.0, 270.0), (0.0, -1.0, 0.0)),
        ((180.0, 33.0), (0.0, 0.0, -1.0)),
    ],
)
def test_zenith_and_azimuth_of_the_axes(angles, vector):
    found = fd.from_zenith_azimuth(*angles, degrees=True)
    np.testing.assert_allclose(found, vector, rtol=0, atol=1e-15)
    assert found.dtype == torch.float64
    zenith, azimuth = fd.to_zenith_azimuth(vector, degrees=True)
    assert zenith.item() == pytest.approx(angles[0])
    if 0 < angles[0] < 180:
        assert azimuth.item() == pytest.approx(angles[1])


@pytest.mark.parametrize("name", ["zenith_azimuth", "ra_dec"])
@pytest.mark.parametrize("degrees", [False, True], ids=["radians", "degrees"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip(name, degrees, dtype):
    to, back = getattr(fd, f"to_{name}"), getattr(fd, f"from_{name}")
    near = at_angle(POLES[0], torch.logspace(-12, -1, 12), 1.0)
    z = torch.cat([directions(300), POLES, near, -near, torch.eye(3).double(), -torch.eye(3)])
    z = z.to(dtype)
    angles = to(z, degrees=degrees)
    assert all(a.dtype == dtype and a.shape == z.shape[:-1] for a in angles)
    again = back(*angles, degrees=degrees)
    assert again.dtype == dtype
    torch.testing.assert_close(again, z, rtol=0, atol=3 * DTYPES[dtype])
    long = angles[1] if name == "zenith_azimuth" else angles[0]
    turn = 360.0 if degrees else 2 * math.pi
    assert ((long >= 0) & (long < turn + 1e-5)).all()


def test_length_does_not_matter():
    z = directions(50)
    for to in (fd.to_zenith_azimuth, fd.to_ra_dec):
        for a, b in zip(to(z), to(7e3 * z), strict=True):
            torch.testing.assert_close(a, b)
    torch.testing.assert_close(fd.separation(3 * z, 0.1 * z.flip(0)), fd.separation(z, z.flip(0)))


def test_azimuth_next_to_the_seam():
    z = torch.tensor([[1.0, -1e-18, 0.0], [1.0, 0.0, 0.0], [1.0, -0.0, 0.0], [1.0, -1e-9, 0.0]])
    azimuth = fd.to_zenith_azimuth(z.double())[1]
    assert ((azimuth >= 0) & (azimuth < 2 * math.pi)).all()
    assert azimuth[:3].tolist() == [0.0, 0.0, 0.0]
    assert azimuth[3].item() == pytest.approx(2 * math.pi - 1e-9, abs=1e-14)
    single = fd.to_ra_dec(z)[0]
    assert ((single >= 0) & (single < 2 * math.pi)).all()


def test_azimuth_on_any_branch():
    z = fd.from_zenith_azimuth(1.0, torch.tensor([-0.5, 2 * math.pi - 0.5]).double())
    torch.testing.assert_close(z[0], z[1])


def test_poles_keep_tiny_angles():
    theta = torch.logspace(-15, -3, 13, dtype=torch.float64)
    z = fd.from_zenith_azimuth(theta, 0.7)
    np.testing.assert_allclose(fd.to_zenith_azimuth(z)[0], theta, rtol=1e-12)
    south = fd.to_ra_dec(-z)[1]
    np.testing.assert_allclose(south, theta - math.pi / 2, rtol=0, atol=1e-15)


def test_shapes_broadcast():
    assert fd.from_zenith_azimuth(torch.rand(4, 1), torch.rand(3)).shape == (4, 3, 3)
    assert fd.from_ra_dec(torch.rand(3), 0.2).shape == (3, 3)
    assert fd.separation(directions(5), directions(1)[0]).shape == (5,)
    assert fd.from_ra_dec([10, 20], [3, 4], degrees=True).shape == (2, 3)


# ------------------------------------------------------------------------------------ separation


@pytest.mark.parametrize("angle", [0.0, 1e-12, 1e-9, 1e-5, 0.3, 1.5, 3.0, math.pi])
def test_separation_is_precise_everywhere(angle):
    for axis in torch.cat([POLES, directions(5)]):
        found = fd.separation(at_angle(axis, angle, 0.4), axis).item()
        assert found == pytest.approx(angle, rel=1e-9, abs=4e-16)


@pytest.mark.parametrize("gap", [1e-9, 1e-6, 1e-3])
def test_separation_next_to_the_antipode(gap):
    a = directions(1)[0]
    found = fd.separation(at_angle(-a, gap, 1.1), a)
    assert math.pi - found.item() == pytest.approx(gap, rel=1e-5)


def test_separation_at_an_arc_second_in_float32():
    a = directions(20)
    b = torch.stack([at_angle(v, 5e-6, 0.2) for v in a])
    found = fd.separation(a.float(), b.float())
    # the vectors themselves are rounded
    torch.testing.assert_close(found, torch.full((20,), 5e-6), rtol=0, atol=2e-7)


def test_separation_has_gradients_off_its_ends():
    a = directions(10).requires_grad_()
    (gradient,) = torch.autograd.grad(fd.separation(a, directions(10)).sum(), a)
    assert torch.isfinite(gradient).all()
    torch.testing.assert_close(gradient.norm(dim=-1), torch.ones(10).double())


# ----------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: fd.from_zenith_azimuth(100.0, 0.0),
            "Expected zenith between 0 and 3.142 radians; got 100. Set degrees=True if the angles "
            "are in degrees.",
        ),
        (
            lambda: fd.from_zenith_azimuth(-5.0, 0.0, degrees=True),
            "Expected zenith between 0 and 180 degrees; got -5. Set degrees=False",
        ),
        (
            lambda: fd.from_ra_dec(0.0, 1.7),
            "Expected dec between -1.571 and 1.571 radians; got 1.7.",
        ),
        (
            lambda: fd.from_ra_dec(0.0, [10.0, 91.0], degrees=True),
            "Expected dec between -90 and 90 degrees; got 91.",
        ),
        (lambda: fd.from_ra_dec(math.nan, 0.0), "Expected finite ra; got nan"),
        (lambda: fd.from_zenith_azimuth([0.1, math.inf], 0.0), "Expected finite zenith; got inf"),
        (lambda: fd.to_ra_dec(torch.ones(4, 2)), "Expected directions of shape (..., 3); got (4,"),
        (lambda: fd.to_zenith_azimuth(1.0), "Expected directions of shape (..., 3); got ()"),
        (lambda: fd.to_ra_dec(torch.zeros(2, 3)), "Expected directions of some length; got a vec"),
        (lambda: fd.separation([1, 0, 0], [0, 0, 0]), "got a vector of zeros"),
        (
            lambda: fd.separation([1.0, 0, 0], [0, math.nan, 0]),
            "Expected finite directions; got nan in row 1",
        ),
        (lambda: fd.to_ra_dec("north"), "Expected directions as"),
    ],
)
def test_errors(call, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("size", [1, 9])
def test_a_longitude_in_degrees_is_told(size):
    """Small zenith angles and declinations fit as radians too."""
    polar = torch.linspace(0.1, 1.5, size).double()
    longitude = torch.linspace(180, 350, size).double()
    for name, call in (
        ("azimuth", lambda a, **options: fd.from_zenith_azimuth(polar, a, **options)),
        ("ra", lambda a, **options: fd.from_ra_dec(a, polar, **options)),
    ):
        median = longitude.median().item()
        text = (
            rf"Expected {name} in radians; got angles of which most are beyond 2π \(median size "
            rf"{median:.4g}\)\. If they are degrees, set degrees=True; angles on other branches"
        )
        for sign in (1, -1):
            with pytest.warns(UserWarning, match=text) as caught:
                call(sign * longitude)
            assert caught[0].filename == __file__
        call(longitude, degrees=True)
        # a whole turn, a few on other branches and none at all
        call(torch.full((size,), 2 * math.pi))
        call(torch.cat([torch.zeros(size), torch.full((size,), 400.0)])[:, None])
        call(longitude[:0, None])


def test_rounding_at_the_end_of_the_range_is_allowed():
    top = torch.tensor(math.pi, dtype=torch.float32)
    assert torch.isfinite(fd.from_zenith_azimuth(top, 0.0)).all()
    z = fd.from_ra_dec(0.0, torch.tensor(90.0, dtype=torch.float32), degrees=True)
    np.testing.assert_allclose(z, [0.0, 0.0, 1.0], rtol=0, atol=1e-7)
