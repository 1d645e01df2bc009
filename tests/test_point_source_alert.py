"""The alert example in its fast mode: printed areas, the sky map in other readers, the pictures."""

import re
import runpy
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

import flowpost as fp

SCRIPT = Path(__file__).resolve().parents[1] / "examples" / "point_source_alert.py"


@pytest.fixture(scope="module")
def alert(tmp_path_factory):
    """Folder and output of one run."""
    from contextlib import redirect_stdout
    from io import StringIO

    out, text = tmp_path_factory.mktemp("alert") / "new", StringIO()
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng(devices=[]):
        patch.setattr(sys, "argv", [SCRIPT.name, "--out", str(out), "--fast"])
        with redirect_stdout(text):
            runpy.run_path(str(SCRIPT), run_name="__main__")
    plt.close("all")
    return out, text.getvalue()


def number(pattern, text):
    return float(re.search(pattern, text).group(1))


def test_it_is_short():
    assert len(SCRIPT.read_text().splitlines()) < 100


def test_printed_numbers_agree_with_the_map(alert):
    out, text = alert
    sky = fp.skymap.read(out / "alert.multiorder.fits")
    half, most = number(r"50 % area ([\d.]+) deg²", text), number(r"90 % area ([\d.]+) deg²", text)
    assert 0 < half < most < 41253
    assert half == pytest.approx(sky.area(0.5), rel=0.1)
    assert most == pytest.approx(sky.area(0.9), rel=0.1)
    assert 0 < number(r"angular resolution ([\d.]+)°", text) < 90
    assert 0 <= number(r"searched probability of the truth ([\d.]+) %", text) <= 100
    assert text.count("coverage of 300 events") == 2
    pulls = text.split("KS p\n")[1].splitlines()[:6]
    assert [line.split()[0] for line in pulls] == [
        *("direction.u0", "direction.u1", "energy"),
        *("position[0]", "position[1]", "position[2]"),
    ]


def test_other_readers_find_the_map_through_its_unique_numbers(alert):
    import astropy_healpix
    from astropy.io import fits
    from mhealpy import HealpixMap

    path = alert[0] / "alert.multiorder.fits"
    sky = fp.skymap.read(path)
    assert sky.frame == "C"
    with fits.open(path) as file:
        uniq, density = (np.array(file[1].data[n]) for n in ("UNIQ", "PROBDENSITY"))
        assert file[1].header["OBJECT"].startswith("track")
    order, pixel = astropy_healpix.uniq_to_level_ipix(uniq)
    area = np.pi / 3 / 4.0**order
    assert float((density * area).sum()) == pytest.approx(1, abs=1e-9)
    best = int(density.argmax())
    grid = astropy_healpix.HEALPix(nside=2 ** int(order[best]), order="nested")
    lon, lat = (float(angle.rad) for angle in grid.healpix_to_lonlat(int(pixel[best])))
    found = [np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)]
    assert np.allclose(found, sky.maximum, atol=1e-9)

    foreign = HealpixMap.read_map(path)
    assert foreign.is_moc
    assert foreign[foreign.vec2pix(*found)].value == pytest.approx(density.max())


def test_the_source_lies_opposite_to_the_travel(alert):
    out, text = alert
    script = runpy.run_path(str(SCRIPT))
    telescope = fp.simulators.Telescope3D(kind="track")
    events = telescope.sample(300, seed=2)
    fresh = script["data"](telescope, 300, 2)
    assert torch.equal(fresh["z"][:, 4:], -events.z[:, 4:])
    chosen = int(re.search(r"event (\d+):", text).group(1))
    assert int(events.lengths[chosen]) == number(r"event \d+: (\d+) hits", text)
    rotation = fp.skymap.detector_rotation(script["SITE"], script["TIME"])
    source = rotation @ -events.z[chosen, 4:].double().numpy()
    sky = fp.skymap.read(out / "alert.multiorder.fits")
    printed = number(r"searched probability of the truth ([\d.]+) %", text)
    assert 100 * sky.searched_probability(source) == pytest.approx(printed, abs=0.06)
    # the line fit of a bright track is better than a coin; the map follows it, not its opposite
    assert sky.cone_probability(source, 90.0) > 0.5


def test_pictures_and_model(alert):
    out, _ = alert
    for name in ("sky.png", "zoom.png"):
        picture = plt.imread(out / name)
        assert min(picture.shape[:2]) > 400
        assert picture.std() > 0.01
    space = fp.load(out / "model").head.space
    assert space.names == runpy.run_path(str(SCRIPT))["SPACE"].names
