"""Pictures of sky maps: probabilities in the image, rims where they belong, orientation, units."""

import functools
import math

import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.colors import LogNorm
from test_skymap import (
    ARCMIN,
    ARCSEC,
    DEGREE,
    Ellipse,
    Mixture,
    Ring,
    Uniform,
    VonMisesFisher,
    at,
)

from flowpost import skymap
from flowpost.plots.skymap import plot_skymap, plot_zoom
from flowpost.skymap.projections import field_of, mollweide_pixels, mollweide_place, tangent_frame

pytest.importorskip("healpy")


@pytest.fixture(autouse=True)
def _close():
    yield
    plt.close("all")


def cap(lon, lat, sigma):
    return skymap.multiorder(VonMisesFisher(at(lon, lat), sigma))


def radius(level, sigma):
    """Radius in radians of the region of a level of a von Mises–Fisher density."""
    norm = -math.expm1(-2 / sigma**2)
    return 2 * math.asin(math.sqrt(-math.log1p(-level * norm) * sigma**2 / 2))


def image_of(ax):
    return next(im for im in ax.get_images() if im.get_array().ndim == 2)


def rims(ax):
    """Vertices of each contour, in the coordinates that they were drawn in."""
    return [np.concatenate(c.get_paths()[0].to_polygons(closed_only=False)) for c in ax.collections]


def rims_or_none(ax):
    return [p.vertices for c in ax.collections for p in c.get_paths()]


def directions_of(x, y, center=0.0):
    """Sky directions of shares of the axes, by Mollweide's equations."""
    theta = np.arcsin(2 * y - 1)
    lon = center * DEGREE - math.pi * (2 * x - 1) / np.cos(theta)
    z = (2 * theta + np.sin(2 * theta)) / math.pi
    return np.stack([np.sqrt(1 - z**2) * np.cos(lon), np.sqrt(1 - z**2) * np.sin(lon), z], -1)


def texts(ax):
    return [text.get_text() for text in ax.get_legend().get_texts()]


# ------------------------------------------------------------------------------------ whole sky

SKIES = {
    "1°": lambda: cap(60, 35, DEGREE),
    "20°": lambda: cap(60, 35, 20 * DEGREE),
    "seam": lambda: cap(180, 10, 8 * DEGREE),
    "pole": lambda: cap(10, 89, 5 * DEGREE),
    "ring": lambda: skymap.multiorder(Ring(at(100, 20), 30 * DEGREE, 3 * ARCMIN)),
    "uniform": lambda: skymap.multiorder(Uniform()),
}


@pytest.mark.parametrize("name", SKIES)
def test_image_holds_all_probability(name):
    ax = plot_skymap(SKIES[name](), colorbar=False)
    shown = image_of(ax).get_array()
    # the projection keeps areas
    pixel = 4 * math.pi / DEGREE**2 / shown.count()
    assert shown.sum() * pixel == pytest.approx(1, abs=0.03)
    assert shown.mask.mean() == pytest.approx(1 - math.pi / 4, abs=1e-3)


def test_narrow_mode_is_in_the_image_and_circled():
    sky = cap(60, 35, ARCSEC)
    ax = plot_skymap(sky)
    shown = image_of(ax).get_array()
    assert (shown > 0.1).sum() in (1, 2, 3)
    assert len(ax.lines) == 1
    place = ax.lines[0].get_xydata()[0]
    assert np.degrees(place) == pytest.approx([-60, 35], abs=0.2)
    assert texts(ax)[1].endswith("arcsec²")


@pytest.mark.parametrize("sigma", [0.3, 0.7, 1.1, 1.5])
def test_small_regions_get_a_circle_in_place_of_rims(sigma):
    ax = plot_skymap(cap(60, 35, sigma * DEGREE), colorbar=False)
    assert [line.get_marker() for line in ax.lines] == ["o"]
    assert not any(len(points) for points in rims_or_none(ax))


def test_only_the_large_part_has_rims():
    parts = [VonMisesFisher(at(60, 35), 0.8 * DEGREE), VonMisesFisher(at(200, -20), 6 * DEGREE)]
    ax = plot_skymap(skymap.multiorder(Mixture(parts, [0.4, 0.6])), colorbar=False)
    circles = [line.get_xydata()[0] for line in ax.lines]
    assert np.degrees(circles) == pytest.approx(np.array([[-60, 35]]), abs=0.5)
    for points in rims(ax):
        away = np.arccos(directions_of(*points.T) @ at(200, -20)) / DEGREE
        assert away.min() > 2
        assert away.max() < 15


def test_small_parts_near_each_other_have_a_circle_each():
    parts = [VonMisesFisher(at(60, 35), ARCMIN), VonMisesFisher(at(60, 39), ARCMIN)]
    ax = plot_skymap(skymap.multiorder(Mixture(parts, [0.5, 0.5])), colorbar=False)
    places = sorted(np.degrees(line.get_xydata()[0, 1]) for line in ax.lines)
    assert places == pytest.approx([35, 39], abs=0.2)


def test_longitude_increases_to_the_left():
    sky = cap(60, 35, 3 * DEGREE)
    for center in (0.0, 300.0):
        ax = sky.plot(truth=at(60, 35), center=center)
        x, y = ax.lines[-1].get_xydata()[0]
        assert np.degrees(y) == pytest.approx(35)
        assert np.degrees(x) == pytest.approx((center - 60 + 180) % 360 - 180)
        # the densest image pixel is where matplotlib's own projection puts that point
        row, column = np.unravel_index(image_of(ax).get_array().argmax(), (800, 1600))
        ax.figure.canvas.draw()
        shares = ax.transAxes.inverted().transform(ax.transData.transform((x, y)))
        assert (column + 0.5) / 1600 == pytest.approx(shares[0], abs=5e-3)
        assert (row + 0.5) / 800 == pytest.approx(shares[1], abs=5e-3)
        label = ax.xaxis.get_major_formatter()(-math.pi / 3, 0)
        assert label == f"{(center + 60) % 360:.0f}°"
    assert "increases to the left" in ax.get_xlabel()
    assert texts(ax)[2].startswith("truth, at 0.")


@pytest.mark.parametrize("name", ["20°", "seam", "pole"])
def test_rims_are_circles_on_the_sky(name):
    lon, lat, width = {
        "20°": (60, 35, 20),
        "seam": (180, 10, 8),
        "pole": (10, 89, 5),
    }[name]
    ax = plot_skymap(SKIES[name](), colorbar=False)
    for level, points in zip((0.5, 0.9), rims(ax), strict=True):
        vectors = directions_of(*points[(np.abs(points - 0.5) < 0.49).all(1)].T)
        away = np.arccos(vectors @ at(lon, lat)) / DEGREE
        expected = radius(level, width * DEGREE) / DEGREE
        # an image pixel is 0.23°, more across at the poles
        assert np.median(away) == pytest.approx(expected, rel=0.04)
        assert np.abs(away - expected).max() < 0.12 * expected + 0.5


def test_modes_of_different_width_share_a_scale():
    parts = [VonMisesFisher(at(200, -40), 6 * DEGREE), VonMisesFisher(at(300, 60), ARCMIN)]
    sky = skymap.multiorder(Mixture(parts, [0.8, 0.2]))
    ax = sky.plot()
    norm = image_of(ax).norm
    assert isinstance(norm, LogNorm)
    wide = float(sky.density_at(at(200, -40))) * DEGREE**2
    assert norm.vmin < wide / 5
    assert wide < norm.vmax
    circles = [line for line in ax.lines if line.get_marker() == "o"]
    assert len(circles) == 1
    assert not isinstance(image_of(SKIES["20°"]().plot()).norm, LogNorm)


def test_frames_and_units_are_named():
    posterior = VonMisesFisher(at(60, 35), 3 * DEGREE)
    for frame, x, title in (
        ("C", "right ascension", "RA"),
        ("G", "Galactic longitude", "l "),
        ("local", "azimuth", "azimuth"),
    ):
        sky = skymap.multiorder(posterior, frame=frame)
        ax = sky.plot()
        assert ax.get_xlabel().startswith(x)
        assert ax.figure.axes[1].get_xlabel() == "probability per deg²"
        assert sky.plot_zoom().get_title().startswith(f"centre {title}")


def test_axes_are_used_and_made():
    sky = cap(60, 35, 10 * DEGREE)
    figure, ax = plt.subplots(subplot_kw={"projection": "mollweide"})
    assert plot_skymap(sky, ax, colorbar=False) is ax
    assert figure.axes == [ax]
    figure, ax = plt.subplots()
    assert plot_zoom(sky, ax, colorbar=False, levels=(0.3,)) is ax
    assert figure.axes == [ax]
    with pytest.raises(ValueError, match="projection 'mollweide'; got 'rectilinear'"):
        plot_skymap(sky, ax)


# ----------------------------------------------------------------------------------------- zoom


@pytest.mark.parametrize(
    ("sigma", "sign", "unit"),
    [
        (ARCSEC, "″", "arcsec"),
        (ARCMIN, "′", "arcmin"),
        (DEGREE, "°", "deg"),
        (15 * DEGREE, "°", "deg"),
    ],
)
@pytest.mark.parametrize("place", [(60, 35), (359.9999, -89.99)])
def test_zoom_shows_circles_of_the_right_size(sigma, sign, unit, place):
    sky = skymap.multiorder(VonMisesFisher(at(*place), sigma), frame="C")
    ax = plot_zoom(sky, truth=at(*place))
    assert ax.get_xlabel() == f"offset east [{sign}]"
    assert ax.get_ylabel() == f"offset north [{sign}]"
    assert ax.figure.axes[1].get_ylabel() == f"probability per {unit}²"
    assert ax.get_xlim()[0] > ax.get_xlim()[1]  # east is left
    star = ax.lines[-1].get_xydata()[0]
    for level, points in zip((0.5, 0.9), rims(ax), strict=True):
        expected = radius(level, sigma)
        away = np.arctan(np.linalg.norm(points - star, axis=1))
        assert np.median(away) == pytest.approx(expected, rel=0.02)
        assert np.abs(away - expected).max() < 0.08 * expected
    shown = image_of(ax).get_array()
    assert shown.shape == (501, 501)
    side = 2 * ax.get_xlim()[0] / 501
    mass = shown.sum() * (side / DEGREE * {"deg": 1, "arcmin": 60, "arcsec": 3600}[unit]) ** 2
    if sigma <= DEGREE:  # where the tangent plane is flat
        assert mass == pytest.approx(0.995, abs=0.006)


def test_zoom_has_north_up_and_east_left():
    sky = cap(60, 35, DEGREE)
    for truth, sign in ((at(60, 36), (0, 1)), (at(61, 35), (1, 0))):
        star = plot_zoom(sky, truth=truth).lines[-1].get_xydata()[0]
        assert np.round(star / DEGREE).tolist() == list(sign)
    frame = tangent_frame(at(0, 90))
    assert np.allclose(frame, [[0, 1, 0], [-1, 0, 0], [0, 0, 1]])
    assert np.linalg.det(tangent_frame(at(200, -30))) == pytest.approx(1)


def test_zoom_field_is_that_of_the_mode_or_the_ring():
    middle, reach = field_of(skymap.multiorder(Ring(at(100, 20), 30 * DEGREE, DEGREE)), 0.9, 60)
    assert np.linalg.norm(middle - at(100, 20)) < 0.02
    assert 1.5 * 31 < reach < 1.5 * 34
    parts = [VonMisesFisher(at(200, -40), 2 * DEGREE), VonMisesFisher(at(30, 10), DEGREE)]
    middle, reach = field_of(skymap.multiorder(Mixture(parts, [0.5, 0.5])), 0.9, 60)
    assert np.linalg.norm(middle - at(30, 10)) < 0.1 * DEGREE
    assert 1.5 * 2 < reach < 1.5 * 3
    wide = skymap.multiorder(Uniform())
    assert field_of(wide, 0.9, 60)[1] == 60
    middle, reach = field_of(wide, 0.9, 60, at(1, 2))
    assert (middle == at(1, 2)).all()
    ax = plot_zoom(wide, center=at(1, 2), radius=20)
    assert ax.get_xlim()[0] == pytest.approx(math.tan(20 * DEGREE))
    assert {"−15", "15"} & {t.get_text() for t in ax.get_xticklabels()} or len(ax.get_xticks()) > 4


@pytest.mark.parametrize(
    ("sky", "truth", "away"),
    [
        (lambda: cap(60, 35, DEGREE), at(60, -21), "56° away"),
        (lambda: cap(60, 35, DEGREE), -at(60, 35), "180° away"),
        (lambda: cap(60, 35, ARCSEC), at(60, 35 + 12.3 / 60), "12.3′ away"),
    ],
)
def test_a_truth_outside_the_field_is_in_the_legend(sky, truth, away):
    ax = plot_zoom(sky(), center=at(60, 35), truth=truth)
    assert texts(ax)[2:] == [f"truth, {away}"]
    assert not any(len(line.get_xydata()) for line in ax.lines)


def test_a_few_cells_far_out_do_not_open_the_field():
    mode = skymap.flat(VonMisesFisher(at(60, 35), 3 * DEGREE), 128)
    rim = mode.density[mode.levels <= 0.9].min()
    density = mode.density.copy()
    # one cell at each distance, so that no gap tells them from the mode
    stray = [int(mode.cell_at(at(60, 35 - d))) for d in (8, 9, 11, 14, 19, 27, 38)]
    density[stray] = 1.2 * rim
    density /= (density * mode.cell_area).sum()
    sky = skymap.SkyMap(mode.order, mode.pixel, density, mode.frame)
    assert (sky.levels[stray] < 0.9).all()
    middle, reach = field_of(sky, 0.9, 60)
    expected = radius(0.9, 3 * DEGREE) / DEGREE
    assert reach == pytest.approx(1.5 * expected, rel=0.15)
    assert np.degrees(np.linalg.norm(middle - at(60, 35))) < 1
    # where they hold more than a hundredth of the region, they are part of what is shown
    density[stray] *= 7
    heavy = skymap.SkyMap(
        mode.order, mode.pixel, density / (density * mode.cell_area).sum(), mode.frame
    )
    assert field_of(heavy, 0.9, 60)[1] > 2 * reach


def test_axes_of_a_local_map_say_how_azimuth_is_counted():
    ax = cap(60, 35, DEGREE).plot_zoom()
    assert ax.get_xlabel() == "offset along azimuth, from +x to +y [°]"
    assert ax.get_ylabel() == "offset along altitude [°]"
    assert ax.get_xlim()[0] > ax.get_xlim()[1]
    # growing azimuth is left
    star = plot_zoom(cap(60, 35, DEGREE), truth=at(61, 35)).lines[-1].get_xydata()[0]
    assert star[0] > 0


def test_axes_of_a_galactic_map_are_along_its_coordinates():
    sky = skymap.multiorder(VonMisesFisher(at(60, 35), DEGREE), frame="G")
    ax = sky.plot_zoom()
    assert ax.get_xlabel() == "offset along Galactic longitude [°]"
    assert ax.get_ylabel() == "offset along latitude [°]"


TILTED = Ellipse(at(60, 35), 5 * DEGREE, 2 * DEGREE)
TILTED.axes[:2] = np.array([[1, -1], [1, 1]]) / math.sqrt(2) @ TILTED.axes[:2]
FIELDS = {
    "arc-seconds": (VonMisesFisher(at(60, 35), 2 * ARCSEC), (60, 35)),
    "0.3°": (VonMisesFisher(at(60, 35), 0.3 * DEGREE), (60.2, 35.1)),
    "12°": (VonMisesFisher(at(60, 35), 12 * DEGREE), (70, 40)),
    "pole": (VonMisesFisher(at(10, 89.5), DEGREE), (80, 89.2)),
    "wide": (VonMisesFisher(at(60, 35), 35 * DEGREE), (75, 50)),
    "tilted": (TILTED, (61, 35)),
    "star in the corner": (VonMisesFisher(at(60, 35), DEGREE), (56.5, 37.6)),
}


@functools.cache
def field(name):
    return skymap.multiorder(FIELDS[name][0])


@pytest.mark.parametrize("size", [(5.4, 4.6), (3.2, 2.6)])
@pytest.mark.parametrize("name", FIELDS)
def test_legend_of_the_zoom_covers_no_rim_and_no_star(name, size):
    truth = FIELDS[name][1]
    figure, ax = plt.subplots(figsize=size, layout="constrained")
    plot_zoom(field(name), ax, truth=at(*truth))
    figure.canvas.draw()
    box = ax.get_legend().get_window_extent()
    label = ax.xaxis.label.get_window_extent()
    drawn = [*rims(ax), ax.lines[-1].get_xydata()]
    assert ax.lines[-1].get_marker() == "*"
    for points in drawn:
        assert not any(box.contains(*p) for p in ax.transData.transform(points))
    assert not box.overlaps(label)
    assert box.y0 >= 0
    if name == "wide":
        assert box.y1 < label.y0


def test_ticks_are_angles():
    ax = plot_zoom(cap(60, 35, 15 * DEGREE))
    for at_, label in zip(ax.get_xticks(), ax.get_xticklabels(), strict=True):
        angle = float(label.get_text().replace("−", "-"))
        assert math.degrees(math.atan(at_)) == pytest.approx(angle, abs=1e-9)


def test_bad_arguments_are_refused():
    sky = cap(60, 35, DEGREE)
    for call, message in (
        (lambda: sky.plot(levels=(0.5, 90)), "levels between 0 and 1"),
        (lambda: sky.plot(levels=(0.1, 0.2, 0.3, 0.4, 0.5)), "at most 4 levels"),
        (lambda: sky.plot_zoom(radius=0), r"radius in degrees in \(0, 60\]; got 0"),
        (lambda: sky.plot_zoom(radius=80), r"got 80\. Use plot_skymap"),
        (lambda: sky.plot(truth=np.eye(3)), r"one direction of shape \(3,\)"),
        (lambda: sky.plot(truth=(60, 35)), r"direction of shape \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


# ----------------------------------------------------------------------------------- projection


def test_pixels_and_places_are_inverse():
    for center in (0.0, 180.0, 77.0):
        x, y, inside, vectors = mollweide_pixels(64, center)
        assert vectors.shape == (inside.sum(), 3)
        _, ax = plt.subplots(subplot_kw={"projection": "mollweide"})
        places = np.array([mollweide_place(v, center) for v in vectors])
        shares = ax.transAxes.inverted().transform(ax.transData.transform(places))
        assert np.abs(shares - np.stack([x[inside], y[inside]], -1)).max() < 2e-3
