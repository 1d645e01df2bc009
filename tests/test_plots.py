"""Corner plots, histories and galleries: regions against closed forms, contents of axes."""

import math
import subprocess
import sys

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.colors import same_color, to_hex

import flowpost as fp
from flowpost.plots import (
    draws_region,
    grid_region,
    mass_threshold,
    plot_corner,
    plot_gallery,
    plot_history,
)
from flowpost.plots.corner import _quoted
from flowpost.plots.coverage import _COLOURS
from flowpost.training.history import Epoch, History

LEVELS = (0.68, 0.9)


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def randn(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def normal_area(level, det=1.0):
    """Area of the highest-density region of a normal in two dimensions."""
    return -2 * math.log(1 - level) * math.pi * math.sqrt(det)


def ring_area(level, width):
    """Area of the highest-density region of a ring of radius 1, by quadrature over the radius."""
    r = np.linspace(1 - 7 * width, 1 + 7 * width, 20_001)
    density = np.exp(-0.5 * ((r - 1) / width) ** 2) / r
    order = np.argsort(-density)
    mass = (density * r)[order].cumsum() / (density * r).sum()
    return 2 * math.pi * (r[1] - r[0]) * r[order][mass <= level].sum()


def area(region, level):
    """Area within the drawn contour, holes subtracted, by the shoelace formula."""
    total = 0.0
    for path in region.contour(plt.figure().add_subplot(), level).get_paths():
        for corners in path.to_polygons(closed_only=False):
            x, y = (corners - corners[0]).T
            total += 0.5 * (np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
    return abs(total)


def gaussian_grid(centre=(0.0, 0.0), sd=1.0, n=161):
    x = torch.linspace(-5, 5, n, dtype=torch.float64) * sd + centre[0]
    y = torch.linspace(-5, 5, n - 20, dtype=torch.float64) * sd + centre[1]
    r2 = ((x - centre[0]) ** 2 + (y[:, None] - centre[1]) ** 2) / sd**2
    return x, y, torch.exp(-r2 / 2)


def posterior(events=4, flow="diagonal", labels=2, seed=0):
    """An untrained posterior whose location depends on the event."""
    torch.manual_seed(seed)
    space = (
        fp.Product(position=fp.Real(2), energy=fp.Positive()) if labels == 3 else fp.Real(labels)
    )
    head = fp.PosteriorHead(3, space, flow=flow)
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.1 * torch.randn_like(p))
        return head(torch.randn(events, 3))


# ------------------------------------------------------------------ regions


@pytest.mark.parametrize("level", [0.3, 0.68, 0.9, 0.99])
def test_threshold_of_a_normal(level):
    *_, density = gaussian_grid(n=401)
    cut = mass_threshold(density, level)
    assert float(cut) == pytest.approx(1 - level, rel=0.005)  # max · exp(−r²/2) at the rim
    assert mass_threshold(7 * density.flatten(), level) == pytest.approx(7 * cut, rel=1e-12)


def test_threshold_weighs_uneven_cells():
    # densities 3 and 1 on areas 1 and 3 hold half the mass each
    density = torch.tensor([3.0] * 100 + [1.0] * 100)
    cell = torch.tensor([1.0] * 100 + [3.0] * 100)
    assert float(mass_threshold(density, 0.4, cell)) == 3
    assert float(mass_threshold(density, 0.6, cell)) == 1
    assert float(mass_threshold(density, 0.6)) == 3


@pytest.mark.parametrize("level", LEVELS)
def test_grid_region_has_the_area_of_a_normal(level):
    x, y, density = gaussian_grid((3.0, -2.0), 1e-3)
    region = grid_region(x, y, density, LEVELS)
    assert area(region, level) == pytest.approx(1e-6 * normal_area(level), rel=0.01, abs=0)
    low, high, *_ = region.window(level)
    half = 1e-3 * math.sqrt(-2 * math.log(1 - level))
    assert (low, high) == pytest.approx((3 - half, 3 + half), abs=1e-4)


def test_grid_region_on_an_uneven_grid():
    _, _, density = gaussian_grid()
    t = torch.linspace(-1, 1, 181, dtype=torch.float64)
    x = 6 * t.sign() * t.abs() ** 1.5
    y = torch.linspace(-5, 5, 141, dtype=torch.float64)
    density = torch.exp(-(x**2 + y[:, None] ** 2) / 2)
    region = grid_region(x, y, density, LEVELS)
    for level in LEVELS:
        assert area(region, level) == pytest.approx(normal_area(level), rel=0.02)


@pytest.mark.parametrize("rho", [0.0, 0.6, 0.99, 0.99999])
@pytest.mark.parametrize("scale", [1e-6, 1.0])
def test_draws_region_has_the_area_of_a_normal(rho, scale):
    z = randn(20_000, 2, seed=3)
    z[:, 1] = rho * z[:, 0] + math.sqrt(1 - rho**2) * z[:, 1]
    region = draws_region(5 + scale * z, LEVELS)
    for level in LEVELS:
        true = scale**2 * normal_area(level, 1 - rho**2)
        assert area(region, level) == pytest.approx(true, rel=0.03, abs=0)


@pytest.mark.parametrize("width", [0.05, 0.02])
def test_smoothing_does_not_inflate_a_ring(width):
    angle, radius = 2 * math.pi * torch.rand(20_000), 1 + width * randn(20_000)
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    region = draws_region(z, LEVELS)
    for level in LEVELS:
        assert area(region, level) == pytest.approx(ring_area(level, width), rel=0.04)


def test_smoothing_does_not_inflate_narrow_modes():
    z = 0.04 * randn(20_000, 2)
    z[::2, 0] += 2
    region = draws_region(z, LEVELS)
    for level in LEVELS:
        assert area(region, level) == pytest.approx(2 * 0.04**2 * normal_area(level), rel=0.05)


def test_bounded_draws_do_not_leak():
    z = torch.rand(20_000, 2, dtype=torch.float64)
    region = draws_region(z, (0.9,))
    low_x, high_x, low_y, high_y = region.window()
    assert min(low_x, low_y) >= 0
    assert max(high_x, high_y) <= 1
    assert area(region, 0.9) == pytest.approx(0.9, rel=0.03)
    # e^(−x−y): regions are triangles under x + y = q, the 68 % and 90 % quantiles of Gamma(2)
    region = draws_region(-torch.rand(20_000, 2, dtype=torch.float64).log(), LEVELS)
    for level, q in zip(LEVELS, (2.3477, 3.8897), strict=True):
        assert area(region, level) == pytest.approx(q**2 / 2, rel=0.04)


@pytest.mark.parametrize("level", LEVELS)
def test_draws_region_holds_its_share_of_fresh_draws(level):
    def crescent(seed):
        z = randn(20_000, 2, seed=seed)
        return torch.stack([z[:, 0], z[:, 0] ** 2 + 0.2 * z[:, 1]], 1)

    region = draws_region(crescent(0), LEVELS)
    ax = plt.figure().add_subplot()
    (path,) = region.contour(ax, level).get_paths()
    inside = path.contains_points(crescent(1).numpy()).mean()
    assert inside == pytest.approx(level, abs=0.015)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: mass_threshold([0.5, -0.1], 0.5), "density of 0 or more"),
        (lambda: mass_threshold([0.0, 0.0], 0.5), "not its logarithm"),
        (lambda: mass_threshold([], 0.5), "no cells"),
        (lambda: mass_threshold([1.0], 1.0), "levels between 0 and 1"),
        (lambda: draws_region(randn(50, 2)), "at least 100"),
        (lambda: draws_region(randn(500, 3)), r"shape \(S, 2\)"),
        (lambda: draws_region(torch.ones(500, 2)), "draws that vary"),
        (lambda: draws_region(torch.full((500, 2), math.nan)), "finite draws"),
        (lambda: grid_region([0, 1, 2], [0, 1, 2, 3], torch.ones(3, 4)), "Transpose"),
        (lambda: grid_region([0, 2, 1], [0, 1, 2], torch.ones(3, 3)), "increasing"),
    ],
)
def test_region_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# ------------------------------------------------------------------ corner


def lines(ax, gid):
    return [line for line in ax.lines if line.get_gid() == gid]


def test_corner_marks_truth_median_and_interval():
    q = posterior(labels=3)
    truth = q.median
    axes = plot_corner(q, truth, event=2, draws=4000)
    assert axes.shape == (3, 3)
    assert [ax.get_xlabel() for ax in axes[-1]] == list(q.space.names)
    assert [ax.get_ylabel() for ax in axes[1:, 0]] == list(q.space.names[1:])
    draws = q[2].sample((4000,), generator=torch.Generator().manual_seed(0)).double()
    for i in range(3):
        (median,) = lines(axes[i, i], "median")
        assert median.get_xdata()[0] == pytest.approx(float(draws[:, i].quantile(0.5)), rel=1e-6)
        (vertical,) = lines(axes[i, i], "truth")
        assert vertical.get_xdata()[0] == pytest.approx(float(truth[2, i]))
        outline, _ = axes[i, i].patches
        values, edges, _ = outline.get_data()
        assert (values * np.diff(edges)).sum() == pytest.approx(1, abs=0.02)
        for j in range(i):
            vertical, horizontal = lines(axes[i, j], "truth")
            assert vertical.get_xdata()[0] == pytest.approx(float(truth[2, j]))
            assert horizontal.get_ydata()[0] == pytest.approx(float(truth[2, i]))
            assert len(axes[i, j].collections) == 3  # a filled region and two contours
            low, high = axes[i, j].get_xlim()
            assert low < truth[2, j] < high
            assert axes[i, j].get_xlim() == axes[j, j].get_xlim()
        for j in range(i + 1, 3):
            assert not axes[i, j].axison


def test_corner_contour_is_the_region_of_the_posterior():
    axes = plot_corner(randn(20_000, 2), levels=(0.68, 0.9))
    _, inner, outer = axes[1, 0].collections
    for contour, level in ((inner, 0.68), (outer, 0.9)):
        (path,) = contour.get_paths()
        radius = np.hypot(*path.vertices.T)
        assert radius.mean() == pytest.approx(math.sqrt(-2 * math.log(1 - level)), rel=0.02)
        assert radius.std() < 0.05


def test_corner_overlays():
    wide, narrow = 3 * randn(3000, 2), 0.5 * randn(3000, 2) + 4
    axes = plot_corner(wide, names=("a [m]", "b [m]"), label="wide")
    before = axes[1, 0].get_xlim()
    again = plot_corner(narrow, [20.0, 0.0], axes=axes, label="narrow")
    assert again is axes or (again == axes).all()
    assert [t.get_text() for t in axes[0, 1].get_legend().get_texts()] == [
        "wide",
        "narrow",
        "truth",
    ]
    assert [ax.get_xlabel() for ax in axes[1]] == ["a [m]", "b [m]"]
    colours = [to_hex(line.get_color()) for line in lines(axes[0, 0], "median")]
    assert colours == [c.lower() for c in _COLOURS[:2]]
    assert len(axes[1, 0].collections) == 6
    low, high = axes[1, 0].get_xlim()
    assert low <= before[0]
    assert high > 20
    offsets = [t.xyann[1] for t in axes[0, 0].texts]
    assert len(set(offsets)) == 2  # the numbers stand above each other


def test_corner_of_a_single_label():
    q = posterior(labels=1)
    axes = plot_corner(q[1], 0.3, label="one", color="#009E73", draws=2000)
    assert axes.shape == (1, 1)
    assert len(lines(axes[0, 0], "truth")) == 1
    assert same_color(lines(axes[0, 0], "median")[0].get_color(), "#009E73")
    assert axes[0, 0].get_xlabel() == q.space.names[0]
    assert plot_corner(q, event=1, axes=axes[0, 0], draws=2000).shape == (1, 1)


def test_corner_draws_are_the_generator_s():
    q = posterior()

    def median(generator):
        axes = plot_corner(q, draws=500, generator=generator)
        return lines(axes[0, 0], "median")[0].get_xdata()[0]

    assert median(None) == median(None)
    assert median(torch.Generator().manual_seed(5)) == median(torch.Generator().manual_seed(5))
    assert median(torch.Generator().manual_seed(5)) != median(None)


@pytest.mark.parametrize(
    ("low", "mid", "high", "text"),
    [
        (1.0, 1.234, 1.51, "$1.23_{-0.23}^{+0.28}$"),
        (870.8, 1000.6, 1130.6, "$1001_{-130}^{+130}$"),
        (1.67e6, 2e6, 2.33e6, r"$2.00_{-0.33}^{+0.33} \times 10^{6}$"),
        (9.1e-7, 1e-6, 1.09e-6, r"$1.000_{-0.090}^{+0.090} \times 10^{-6}$"),
        (-2.0, -0.01, 2.1, "$0.0_{-2.0}^{+2.1}$"),
        (3.0, 3.0, 3.0, "$3.0_{-0.0}^{+0.0}$"),
    ],
)
def test_quoted_numbers(low, mid, high, text):
    assert _quoted(low, mid, high) == text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"event": 9}, "event from 0 to 3; got 9"),
        ({"names": ("a",)}, "2 names"),
        ({"truth": [1.0, 2.0, 3.0]}, r"truth of shape \(2,\)"),
        ({"truth": [1.0, math.nan]}, "finite truth"),
        ({"levels": (0.5, 1.2)}, "levels between 0 and 1"),
        ({"draws": 3}, "draws as a whole number of at least 100"),
    ],
)
def test_corner_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plot_corner(posterior(), **options)


def test_corner_refuses_other_axes():
    axes = plot_corner(randn(200, 3))
    with pytest.raises(ValueError, match=r"axes of shape \(2, 2\)"):
        plot_corner(randn(200, 2), axes=axes)
    with pytest.raises(ValueError, match=r"draws of shape \(S, D\)"):
        plot_corner(randn(200, 2, 2))
    with pytest.raises(ValueError, match="draws that vary"):
        plot_corner(torch.ones(200, 1))


# ------------------------------------------------------------------ history


def history(n=20, start=0.0, coverage=True):
    def epoch(i):
        shares = [p + 0.3 * math.exp(-i / 2) * (1 - p) for p in (0.5, 0.6827, 0.9)]
        shares = shares if coverage else [math.nan] * 3
        extra = start if i < 3 else 0.0
        val = math.exp(-i / 5) + 0.002 * i + extra
        return Epoch(i, math.exp(-i / 5) + extra, val, *shares, 0.2, 1e-3, float(i))

    rows = tuple(epoch(i) for i in range(1, n + 1))
    return History(rows, min(rows, key=lambda r: r.val_nll), stopped_early=False)


def test_history_draws_its_numbers():
    h = history()
    upper, lower = plot_history(h, events=400)
    drawn = {line.get_label(): line for line in (*upper.lines, *lower.lines)}
    for label, name, unit in (
        ("train", "train_nll", 1),
        ("validation", "val_nll", 1),
        ("50 %", "coverage50", 100),
        ("68 %", "coverage68", 100),
        ("90 %", "coverage90", 100),
    ):
        np.testing.assert_allclose(drawn[label].get_xdata(), h["epoch"])
        np.testing.assert_allclose(drawn[label].get_ydata(), unit * np.array(h[name]))
    star = next(line for name, line in drawn.items() if name.startswith("kept"))
    assert star.get_xydata().tolist() == [[h.best.epoch, h.best.val_nll]]
    for ax in (upper, lower):
        assert lines(ax, "best")[0].get_xdata()[0] == h.best.epoch
    nominal = sorted(line.get_ydata()[0] for line in lines(lower, "nominal"))
    assert nominal == pytest.approx([50, 68.2689, 90])
    bands = [p for p in lower.patches if p.get_gid() == "band"]
    for band, level in zip(bands, (0.9, 0.682689, 0.5), strict=True):
        width = 100 * 2 * math.sqrt(level * (1 - level) / 400)
        assert band.get_height() / 2 == pytest.approx(width, rel=0.15)
    assert upper.get_ylabel() == "NLL [nats]"


def test_history_plots_itself_on_given_axes():
    _, (a, b) = plt.subplots(2)
    assert history().plot((a, b)).tolist() == [a, b]
    _, one = plt.subplots(layout="constrained")
    first, second = plot_history(history(), one)
    assert first is one
    assert second.figure is one.figure
    assert not [p for p in second.patches if p.get_gid() == "band"]
    one.figure.draw_without_rendering()
    assert second.get_position().y1 < first.get_position().y0
    by_hand = plt.figure().add_axes((0.1, 0.6, 0.8, 0.3))
    assert plot_history(history(), by_hand)[0] is by_hand


def test_history_cuts_the_first_epochs():
    upper, _ = plot_history(history(start=1e4))
    assert upper.get_ylim()[1] < 10
    assert upper.texts[0].get_text() == "↑ to 1e+04"
    upper, _ = plot_history(history())
    assert upper.get_ylim()[1] > max(history()["train_nll"])
    assert not upper.texts


def test_history_without_coverage_and_of_one_epoch():
    _, lower = plot_history(history(coverage=False))
    assert "no coverage" in lower.texts[0].get_text()
    upper, _ = plot_history(history(1))
    upper.figure.draw_without_rendering()


def test_history_errors():
    with pytest.raises(ValueError, match="at least one epoch"):
        plot_history(History((), history().best, False))
    with pytest.raises(ValueError, match="one or two matplotlib axes"):
        plot_history(history(), "top")
    with pytest.raises(ValueError, match="events as a whole number"):
        plot_history(history(), events=0)


# ------------------------------------------------------------------ gallery


def gallery(events=(2, 0), **options):
    q = {"diagonal": posterior(flow="diagonal"), "spline": posterior(flow="spline", seed=1)}
    return plot_gallery(events, q, draws=1000, **options)


def test_gallery_draws_events_predictions_and_stages():
    truth = randn(4, 2)
    asked = []

    def regions(event):
        asked.append(event)
        return gaussian_grid((float(event), 0.0), 0.5)

    stages = {"untrained": posterior(seed=2), "epoch 1": posterior(seed=3)}
    axes = gallery(
        truth=truth,
        true_regions=regions,
        stages=stages,
        names=("x [m]", "y [m]"),
        titles=("dim", "bright"),
    )
    assert axes.shape == (3, 2)
    assert asked == [2, 0]
    assert [ax.get_title() for ax in axes[0]] == ["dim", "bright"]
    assert [ax.get_xlabel() for ax in axes[-1]] == ["x [m]"] * 2
    assert [ax.get_ylabel() for ax in axes[:, 0]] == ["y [m]"] * 3
    assert [ax.texts[0].get_text() for ax in axes[:, 0]] == ["final", "untrained", "epoch 1"]
    for row, drawn in zip(axes, (4, 4, 4), strict=True):
        for ax, event in zip(row, (2, 0), strict=True):
            (star,) = lines(ax, "truth")
            assert star.get_xydata()[0] == pytest.approx(truth[event].numpy())
            assert len(ax.collections) == drawn  # true 90 %, true 68 %, and two of predictions
    colours = [to_hex(c.get_edgecolor()[0]) for c in axes[0, 0].collections[2:]]
    assert colours == [c.lower() for c in _COLOURS[:2]]
    assert to_hex(axes[1, 0].collections[-1].get_edgecolor()[0]) == _COLOURS[1].lower()
    texts = [t.get_text() for t in axes[0, 0].figure.legends[0].get_texts()]
    assert texts == ["true 68 %", "true 90 %", "diagonal 68 %", "spline 68 %", "true label"]
    assert axes[1, 0].get_xlim() == axes[2, 0].get_xlim()


def test_gallery_true_region_has_its_area():
    grid = gaussian_grid((1.0, 2.0), 0.5)
    axes = gallery((1,), true_regions=[grid])
    outer, inner = axes[0, 0].collections[:2]
    for patch, level in ((outer, 0.9), (inner, 0.68)):
        (path,) = patch.get_paths()
        (corners,) = path.to_polygons()
        x, y = corners.T
        drawn = 0.5 * abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1)))
        assert drawn == pytest.approx(0.25 * normal_area(level), rel=0.02)
    same = gallery((1,), true_regions={1: grid})
    assert same[0, 0].get_xlim() == axes[0, 0].get_xlim()


def test_gallery_prediction_is_the_event_s_own():
    draws = randn(2000, 3, 2) + torch.tensor([[0.0, 0.0], [50.0, 0.0], [100.0, 0.0]])
    axes = plot_gallery([2, 1], {"model": draws})
    for ax, centre in zip(axes[0], (100, 50), strict=True):
        low, high = ax.get_xlim()
        assert (low + high) / 2 == pytest.approx(centre, abs=0.5)
        (path,) = ax.collections[0].get_paths()
        assert path.vertices[:, 0].mean() == pytest.approx(centre, abs=0.2)


def test_gallery_takes_the_telescope_s_posterior():
    telescope = fp.simulators.Telescope()
    events = telescope.sample(1, seed=1)
    true = telescope.true_posterior_images(events.images)
    q = posterior(1, labels=3)
    axes = plot_gallery(
        [0],
        {"model": q},
        events.z,
        true_regions=true.position_map,
        columns=(q.space.names[0], 1),
        equal=True,
        draws=500,
    )
    (ax,) = axes[0]
    assert ax.get_aspect() == 1
    assert np.diff(ax.get_xlim()) == pytest.approx(np.diff(ax.get_ylim()))
    assert ax.get_xlabel() == q.space.names[0]


def test_gallery_on_given_axes():
    _, given = plt.subplots(1, 2)
    axes = gallery(axes=given)
    assert axes.tolist() == [list(given)]
    assert len(given[0].get_legend().get_texts()) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"events": ()}, "at least one event"),
        ({"events": (7,)}, "event from 0 to 3; got 7"),
        ({"titles": ("one",)}, "2 titles"),
        ({"columns": (0, 5)}, "two different label columns"),
        ({"columns": (1, 1)}, "two different label columns"),
        ({"names": ("x",)}, "two names"),
        ({"levels": (0.9, 0.68)}, "two increasing levels"),
        ({"truth": torch.zeros(1, 2)}, "truth of all events"),
        ({"true_regions": []}, "2 true regions"),
        ({"true_regions": {0: gaussian_grid()}}, r"\[2\] have none"),
        ({"axes": []}, r"axes of shape \(1, 2\)"),
        ({"stages": {"early": torch.randn(500, 4, 1)}}, "'early' has 1 columns"),
    ],
)
def test_gallery_errors(options, message):
    with pytest.raises(ValueError, match=message):
        gallery(**options)


def test_matplotlib_is_imported_when_something_is_drawn():
    code = "import flowpost.plots, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ------------------------------------------------------------------ directions


def sky_posterior(seed=0):
    """Energies and directions of some 2°, beside a pole."""
    torch.manual_seed(seed)
    space = fp.Product(energy=fp.Positive(), direction=fp.Sphere(), angle=fp.Circle())
    head = fp.PosteriorHead(3, space, "affine")
    around = torch.tensor([0.01, -0.02, 1.0]) + 0.03 * torch.randn(500, 3)
    head.fit_scale(
        torch.cat(
            [torch.rand(500, 1) + 1, torch.nn.functional.normalize(around, dim=-1),
             torch.randn(500, 1)], -1
        )
    )  # fmt: skip
    with torch.no_grad():
        return head(0.1 * torch.randn(4, 3))


def test_corner_draws_a_direction_as_offsets_from_its_mean():
    q = sky_posterior()
    truth = q.sample(generator=torch.Generator().manual_seed(1))
    axes = plot_corner(q, truth, event=1, draws=4000)
    assert axes.shape == (4, 4)
    names = ["energy", "direction Δaz [°]", "direction Δalt [°]", "angle [rad]"]
    assert [ax.get_xlabel() for ax in axes[-1]] == names
    draws = q[1].sample((4000,), generator=torch.Generator().manual_seed(0)).double()[:, 1:4]
    mean = torch.nn.functional.normalize(draws.mean(0), dim=0)
    east = torch.linalg.cross(torch.tensor([0.0, 0.0, 1.0]).double(), mean)
    east = torch.nn.functional.normalize(east, dim=0)
    marks = [lines(axes[i, i], "truth")[0].get_xdata()[0] for i in (1, 2)]
    # angle to the truth, and its side, by another formula
    true = truth[1, 1:4].double()
    angle = fp.directions.separation(mean, true, degrees=True)
    assert math.hypot(*marks) == pytest.approx(float(angle), rel=1e-6)
    bearing = math.atan2(float(true @ torch.linalg.cross(mean, east)), float(true @ east))
    assert math.atan2(marks[1], marks[0]) == pytest.approx(bearing, abs=1e-6)
    spread = torch.rad2deg(torch.asin(draws @ east)).std()
    edges = axes[1, 1].patches[0].get_data()[1]
    assert 4 * spread < edges[-1] - edges[0] < 9 * spread


def test_corner_says_that_angles_are_in_radians():
    draws = torch.Generator().manual_seed(0)
    inner = fp.Product(roll=fp.Circle(), unit=fp.Circle(vector=True), mass=fp.Positive())
    for space, names in (
        (fp.Circle(), ["z [rad]"]),
        (fp.Product(a=inner), ["a.roll [rad]", "a.unit[0]", "a.unit[1]", "a.mass"]),
    ):
        q = fp.PosteriorHead(3, space, "diagonal")(torch.zeros(1, 3))
        axes = plot_corner(q, draws=500, generator=draws)
        assert [ax.get_xlabel() for ax in axes[-1]] == names


def test_corner_overlays_directions_about_the_same_middle():
    q, other = sky_posterior(), sky_posterior(seed=3)
    truth = q.sample()
    axes = plot_corner(q, truth, draws=1000)
    plot_corner(other, truth, draws=1000, axes=axes)
    for i in range(4):
        first, second = (line.get_xdata()[0] for line in lines(axes[i, i], "truth"))
        assert first == pytest.approx(second, abs=1e-12)
    with pytest.raises(ValueError, match="Expected 4 names"):
        plot_corner(q, names=("a", "b", "c", "d", "e"))
    single = plot_corner(sky_posterior()["direction"], draws=1000)
    assert [ax.get_xlabel() for ax in single[-1]] == ["Δaz [°]", "Δalt [°]"]
