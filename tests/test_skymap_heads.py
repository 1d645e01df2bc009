"""Maps of what heads give: areas from draws against the map, and a warm event to its file."""

import math
import time

import pytest
import torch
from spherical import perturbed_posterior

import flowpost as fp

DEGREE = math.pi / 180


@pytest.mark.parametrize("sigma", [DEGREE / 60, DEGREE, 20 * DEGREE])
def test_area_from_draws_is_that_of_the_map(sigma):
    q = perturbed_posterior(fp.Sphere(), "spline", size=0.1, events=1)[0]
    q._flow.log_width[0] = math.log(sigma)
    sky = fp.skymap.multiorder(q)
    assert sky.integral == pytest.approx(1, abs=0.01)
    assert sky.evaluations < 40_000
    found = q.hpd_area([0.5, 0.9], draws=50_000)
    for area, level in zip(found.tolist(), (0.5, 0.9), strict=True):
        assert area == pytest.approx(sky.area(level), rel=0.02)
    # the mode is where the map is densest
    assert sky.density_at(q.mode) > 0.95 * sky.density.max()


def test_an_event_becomes_a_file_within_seconds(tmp_path):
    head = fp.PosteriorHead(4, fp.Product(energy=fp.Positive(), direction=fp.Sphere()))
    head.fit_scale(head(torch.randn(50, 4)).sample())
    with torch.no_grad():
        width = head.flow._sections[0]
        head.flow.bias[width] = math.log(DEGREE) - float(head.scale[0].log())
    fp.skymap.multiorder(head(torch.randn(1, 4))["direction"])  # imports healpy
    start = time.process_time()
    q = head(torch.randn(1, 4))["direction"]
    fp.skymap.multiorder(q, frame="C").write(tmp_path / "event.multiorder.fits")
    assert time.process_time() - start < 2
    assert fp.skymap.read(tmp_path / "event.multiorder.fits").area(0.9) > 0


def test_cells_follow_the_second_direction_of_a_product():
    space = fp.Product(a=fp.Sphere(), b=fp.Sphere())
    q = perturbed_posterior(space, "spline", size=0.05, events=1)[0].block("b", draws=8)
    assert fp.skymap.flat(q, 8, draws=200).integral == pytest.approx(1, abs=0.05)
