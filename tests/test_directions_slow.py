"""What heads on the sphere are promised to reach, measured as the benchmark measures it."""

import math

import pytest

from benchmarks.directions import reverse, shape, widths, world
from benchmarks.sphere_targets import SHAPES

pytest.importorskip("lightning.pytorch")
pytestmark = pytest.mark.slow


def test_one_network_from_an_arc_second_to_sixty_degrees():
    for row in widths(reference=True, seed=0):
        assert abs(row["gap"]) < 0.02, row
        assert row["deviation"] < 0.02, row


def test_without_a_reference_from_one_degree_on():
    for row in widths(reference=False, seed=0):
        assert abs(row["gap"]) < 0.02, row


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_and_the_antipode(name):
    found = shape(SHAPES[name], conditional=False, seed=0, draws=100_000, epochs=40)
    assert found["kl"] < 0.01, found
    low, high = found["antipode"]
    assert 0.5 < low <= high < 2, found


@pytest.mark.parametrize("name", ["Kent, κ = 20", "antipodal, κ = 20", "three modes, κ = 20"])
def test_shapes_that_turn_with_the_data(name):
    assert shape(SHAPES[name], conditional=True, seed=0, draws=100_000, epochs=40)["kl"] < 0.01


def test_four_modes_by_reverse_kl():
    found = reverse(seed=0)
    assert found["kl"] < 0.005
    assert found["ess"] > 0.99


def test_warps_pay_for_structure_all_over_the_sky():
    plain, warped = world(0, 0), world(0, 32)
    gaps = [r["nll"] - r["true"] for r in (plain, warped)]
    assert gaps[1] < 0.75 * gaps[0]
    assert warped["nll"] < math.log(4 * math.pi)
