"""Label spaces: charts against autodiff and scipy, behaviour at the bounds, whitening, names."""

import json
import math
import re

import numpy as np
import pytest
import torch
from scipy import stats

from flowpost.flows import BoundFlow
from flowpost.head import PosteriorHead
from flowpost.spaces import (
    Circle,
    Interval,
    Positive,
    Product,
    Real,
    SpaceConstraint,
    Sphere,
    space_from_config,
)
from flowpost.spaces.base import Scale


def normal(n, k):
    return torch.randn(n, k, dtype=torch.float64)


def uniform(n, low, high):
    low, high = torch.tensor(low, dtype=torch.float64), torch.tensor(high, dtype=torch.float64)
    return low + (high - low) * torch.rand(n, len(low), dtype=torch.float64)


# space, labels of n events in double precision
CASES = {
    "real": (Real(2), lambda n: 3 + 2 * normal(n, 2)),
    "positive": (Positive(2), lambda n: torch.exp(1 + 2 * normal(n, 2))),
    "interval": (Interval(-1.0, 3.0), lambda n: uniform(n, [-1.0], [3.0])),
    "intervals": (
        Interval([0.0, -2.0], [1.0, 5.0]),
        lambda n: uniform(n, [0.0, -2.0], [1.0, 5.0]),
    ),
    "product": (
        Product(energy=Positive(), vertex=Real(2), inelasticity=Interval(0.0, 1.0)),
        lambda n: torch.cat(
            [torch.exp(normal(n, 1)), normal(n, 2), uniform(n, [0.0], [1.0])], dim=1
        ),
    ),
    "nested": (
        Product(a=Product(x=Real(), y=Product(p=Positive(2))), b=Interval(2.0, 4.0)),
        lambda n: torch.cat(
            [normal(n, 1), torch.exp(normal(n, 2)), uniform(n, [2.0], [4.0])], dim=1
        ),
    ),
}
DTYPES = {"float64": (torch.float64, 1e-10), "float32": (torch.float32, 2e-5)}


def cast(scale, dtype):
    return Scale(*(t.to(dtype) for t in scale))


def placed(space, scale, location=None, log_width=None):
    """The space's labels about a location, in units of a width; whitened where both are None."""
    zeros = torch.zeros(space.location_size, dtype=scale.loc.dtype)
    location = zeros if location is None else location
    log_width = torch.zeros(space.width_size).to(zeros) if log_width is None else log_width
    return BoundFlow(space, scale, location, log_width)


@pytest.fixture(params=CASES)
def case(request):
    return CASES[request.param]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chart_inverse(case, dtype):
    space, labels = case
    dtype, tolerance = DTYPES[dtype]
    z = labels(200)
    scale = cast(space.fit_scale(z), dtype)
    r, ladj = placed(space, scale).to_base(z.to(dtype))
    assert r.dtype == ladj.dtype == dtype
    assert r.shape == ladj.shape == (200, space.dof)
    back, inverse_ladj = placed(space, scale).from_base(r)
    torch.testing.assert_close(back, z.to(dtype), rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(inverse_ladj, -ladj, rtol=10 * tolerance, atol=10 * tolerance)


def test_ladj_against_autodiff(case):
    space, labels = case
    z = labels(20)
    scale = space.fit_scale(z)
    _, ladj = placed(space, scale).to_base(z)
    for row, expected in zip(z, ladj, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda x: placed(space, scale).to_base(x)[0], row
        )
        # one chart a column: the order of the columns is that of the base where nothing is compact
        torch.testing.assert_close(jacobian.diagonal().log(), expected)
        torch.testing.assert_close(jacobian.logdet(), expected.sum())


def test_residuals_against_autodiff(case):
    space, labels = case
    z = labels(10)
    scale = space.fit_scale(z)
    m, s = normal(10, space.location_size), 0.5 * normal(10, space.width_size)
    v, ladj = placed(space, scale, m, s).to_base(z)
    r, _ = placed(space, scale).to_base(z)
    torch.testing.assert_close(v, (r - m) / s.exp())
    back, inverse = placed(space, scale, m, s).from_base(v)
    torch.testing.assert_close(back, z)
    torch.testing.assert_close(inverse, -ladj)
    jacobian = torch.autograd.functional.jacobian(
        lambda x: placed(space, scale, m[0], s[0]).to_base(x)[0], z[0]
    )
    torch.testing.assert_close(jacobian.logdet(), ladj[0].sum())


def test_whitening_has_mean_zero_and_width_one(case):
    space, labels = case
    z = labels(5000)
    r, _ = placed(space, space.fit_scale(z)).to_base(z)
    torch.testing.assert_close(r.mean(0), torch.zeros_like(r[0]), atol=1e-9, rtol=0)
    torch.testing.assert_close(r.std(0), torch.ones_like(r[0]), atol=1e-3, rtol=0)


def test_weights_of_the_whitening_are_counts(case):
    space, labels = case
    z = labels(60)
    count = torch.randint(1, 4, (60,))
    weighted, _ = placed(space, space.fit_scale(z, count.double())).to_base(z)
    repeated, _ = placed(space, space.fit_scale(z.repeat_interleave(count, dim=0))).to_base(z)
    torch.testing.assert_close(weighted, repeated)


# ------------------------------------------------------------------------------ near the bounds


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-3.0, 5.0), (0.0, 1e-6)])
def test_interval_next_to_a_bound_in_float32(bounds):
    space = Interval(*bounds)
    a, b = (torch.tensor(x) for x in bounds)
    step = 1e-7 * (b - a)
    near_low = torch.maximum(a + step, torch.nextafter(a, b))
    near_high = torch.minimum(b - step, torch.nextafter(b, a))
    z = torch.stack([near_low, near_high]).unsqueeze(1)
    low, high = (float(np.float32(x)) for x in bounds)
    exact = z.double().numpy()
    width = high - low
    expected = [
        stats.norm.ppf((exact[0, 0] - low) / width),
        stats.norm.isf((high - exact[1, 0]) / width),
    ]
    y, ladj = space.to_plane(z, space.default_scale())
    assert y.dtype == torch.float32
    np.testing.assert_allclose(y[:, 0], expected, rtol=1e-5)
    np.testing.assert_allclose(
        ladj[:, 0], -stats.norm.logpdf(expected) - math.log(width), rtol=2e-5
    )
    back, _ = space.from_plane(y, space.default_scale())
    gap = torch.stack([back[0, 0] - a, b - back[1, 0]])
    # one float32 step of a label beside the bound is allowed
    ulp = torch.finfo(torch.float32).eps * max(abs(low), abs(high))
    np.testing.assert_allclose(gap, [exact[0, 0] - low, high - exact[1, 0]], rtol=1e-3, atol=ulp)


def test_interval_of_labels_that_are_denormal():
    space = Interval(0.0, 1.0)
    y, ladj = space.to_plane(torch.tensor([[1e-45], [1e-30]]), space.default_scale())
    np.testing.assert_allclose(y[:, 0], stats.norm.ppf([1.4012985e-45, 1e-30]), rtol=1e-4)
    assert torch.isfinite(ladj).all()


@pytest.mark.parametrize("bounds", [(0.1, 0.3), ([0.1, -0.7], [0.3, 1e-3])])
def test_interval_bounds_keep_double_precision(bounds):
    space = Interval(*bounds)
    assert space.low == tuple(np.atleast_1d(bounds[0]))
    assert space.high == tuple(np.atleast_1d(bounds[1]))


def test_interval_of_julian_dates():
    space = Interval(2460000.125, 2460000.375)
    z = torch.tensor([[2460000.25]], dtype=torch.float64)
    y, _ = space.to_plane(space.validate(z), cast(space.default_scale(), torch.float64))
    assert y.item() == pytest.approx(0.0, abs=1e-9)


def test_positive_over_sixty_decades_in_float32():
    space = Positive()
    z = torch.logspace(-30, 30, 61).unsqueeze(1)
    scale = cast(space.fit_scale(z), torch.float32)
    r, ladj = space.to_plane(z, scale)
    y = np.log(z.double().numpy())
    whitened = (y - y.mean()) / y.std()
    np.testing.assert_allclose(r, whitened, atol=2e-5)
    np.testing.assert_allclose(ladj, -y - np.log(y.std()), rtol=1e-4, atol=1e-4)
    back, _ = space.from_plane(r, scale)
    np.testing.assert_allclose(back, z, rtol=3e-4)


def test_positive_labels_too_small_for_float32_are_no_nan():
    head = PosteriorHead(0, Positive(), flow="diagonal")
    z = 1e-50 * torch.exp(normal(500, 1))
    try:
        head.fit_scale(z)
    except ValueError as error:
        assert "float" in str(error) or "scale" in str(error)  # noqa: PT017 (either is right)
    else:
        expected = stats.lognorm(s=1, scale=1e-50).logpdf(z.numpy()[:, 0])
        np.testing.assert_allclose(head(None).log_prob(z).detach(), expected, atol=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "space",
    [Interval(0.0, 1.0), Interval(0.1, 0.3), Interval(100.0, 101.0), Interval(-7.0, 1e-3)],
    ids=repr,
)
def test_draws_never_touch_a_bound(space, dtype):
    r = torch.tensor([0.0, 3, 5, 8, 13, 37, 100, 1e4], dtype=dtype)
    r = torch.cat([r, -r]).unsqueeze(1)
    z, _ = space.from_plane(r, cast(space.default_scale(), dtype))
    assert z.dtype == dtype
    assert space.contains(z).all()
    assert space.contains(z.double()).all()
    again, ladj = space.to_plane(space.validate(z), cast(space.default_scale(), dtype))
    assert torch.isfinite(again).all()
    assert torch.isfinite(ladj).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_positive_draws_are_positive_and_finite(dtype):
    r = torch.tensor([[-1e4], [-200.0], [0.0], [200.0], [1e4]], dtype=dtype)
    z, _ = Positive().from_plane(r, cast(Positive().default_scale(), dtype))
    assert Positive().contains(z).all()


# ------------------------------------------------------------------------------- validation


@pytest.mark.parametrize(
    ("space", "row", "column", "value", "text"),
    [
        (
            Real(2),
            1,
            1,
            math.nan,
            "Expected finite labels; got nan in labels, row 1, column 'z[1]'",
        ),
        (Positive(), 2, 0, 0.0, "Expected labels above 0 (Positive); got 0 in labels, row 2"),
        (Positive(2), 0, 1, -3.0, "got -3 in labels, row 0, column 'z[1]' (1 such of 4 events)"),
        (Positive(), 3, 0, math.inf, "Expected finite labels; got inf"),
        (Interval(0.0, 2.0), 1, 0, 2.0, "strictly inside Interval(0, 2); got 2 in labels, row 1"),
        (Interval(0.0, 2.0), 1, 0, 0.0, "strictly inside Interval(0, 2); got 0 in labels, row 1"),
        (
            Product(energy=Positive(), angle=Interval(-1.0, 1.0)),
            2,
            1,
            -1.5,
            "strictly inside Interval(-1, 1); got -1.5 in labels, row 2, column 'angle'",
        ),
        (
            Product(vertex=Product(x=Real(2)), energy=Positive()),
            3,
            2,
            -1.0,
            "labels above 0 (Positive); got -1 in labels, row 3, column 'energy'",
        ),
    ],
    ids=lambda x: str(x)[:20],
)
def test_error_names_row_and_column(space, row, column, value, text):
    z = torch.full((4, space.label_size), 0.5)
    assert torch.equal(space.validate(z), z)
    z[row, column] = value
    with pytest.raises(ValueError, match=re.escape(text)):
        space.validate(z)
    assert space.contains(z).tolist() == [i != row for i in range(4)]


def test_error_names_all_indices_of_a_sample():
    z = torch.ones(3, 4, 2)
    z[2, 1, 0] = -1
    with pytest.raises(ValueError, match=r"row 2, 1, column 'z\[0\]'"):
        Positive(2).validate(z)


def test_wrong_number_of_columns():
    space = Product(energy=Positive(), vertex=Real(2))
    with pytest.raises(ValueError, match=r"got \(5, 2\). Its columns are energy, vertex\[0\]"):
        space.validate(torch.ones(5, 2))
    with pytest.raises(ValueError, match=r"Expected labels of shape \(..., 3\)"):
        space.validate(torch.tensor(1.0))


@pytest.mark.parametrize("value", ["a", [["x"]], object(), torch.zeros(2, 1, dtype=torch.cfloat)])
def test_labels_that_are_no_numbers(value):
    with pytest.raises(ValueError, match="Expected labels as"):
        Real().validate(value)


def test_clip_moves_labels_within_the_margin():
    z = torch.tensor([[-0.005], [0.0], [0.004], [0.02], [1.0]])
    expected = torch.tensor([[0.01], [0.01], [0.01], [0.02], [1.0]])
    assert torch.equal(Positive(clip=0.01).validate(z), expected)
    z = torch.tensor([[-1.005], [-1.0], [0.0], [2.995], [3.0], [3.009]])
    expected = torch.tensor([[-0.99], [-0.99], [0.0], [2.99], [2.99], [2.99]])
    torch.testing.assert_close(Interval(-1.0, 3.0, clip=0.01).validate(z), expected)


@pytest.mark.parametrize("space", [Positive(clip=0.01), Interval(0.0, 3.0, clip=0.01)], ids=repr)
def test_clip_refuses_what_is_farther_out(space):
    with pytest.raises(ValueError, match=r"got -0.02 in labels, row 0"):
        space.validate(torch.tensor([[-0.02]]))


def test_clip_inside_a_product_keeps_other_columns():
    space = Product(x=Real(), e=Positive(clip=0.5), y=Interval(0.0, 1.0, clip=0.1))
    z = torch.tensor([[0.0, 0.0, 1.0]])
    torch.testing.assert_close(space.validate(z), torch.tensor([[0.0, 0.5, 0.9]]))


@pytest.mark.parametrize(
    "build",
    [
        lambda: Real(0),
        lambda: Real(1.5),
        lambda: Real(True),
        lambda: Positive(clip=-1.0),
        lambda: Positive(clip=math.nan),
        lambda: Interval(1.0, 1.0),
        lambda: Interval(0.0, math.inf),
        lambda: Interval([0.0, 1.0], [1.0, 2.0, 3.0]),
        lambda: Interval([0.0, 1.0], [2.0, 2.0], size=3),
        lambda: Interval(0.0, 1.0, clip=0.5),
        lambda: Product(),
        lambda: Product(x=3),
    ],
)
def test_nonsense_is_refused(build):
    with pytest.raises(ValueError, match="Expected"):
        build()


@pytest.mark.parametrize("spaces", [(Positive(), Sphere()), ({"energy": Positive()},)])
def test_blocks_need_names(spaces):
    text = rf"got {len(spaces)} without one\. Name the blocks: Product\(energy=Positive\(\), direc"
    with pytest.raises(ValueError, match=text):
        Product(*spaces, y=Real())
    assert Product(unnamed=Real()).names == ("unnamed",)


def test_interval_size():
    assert Interval(0.0, 1.0, size=3) == Interval([0.0] * 3, [1.0] * 3)
    assert Interval(0.0, [1.0, 2.0]).low == (0.0, 0.0)
    assert Interval(0.0, 1.0, 3).label_size == 3


# ---------------------------------------------------- whitening under scale and outliers


@pytest.mark.parametrize("space", [Real(2), Positive(2), Product(a=Real(), b=Positive())], ids=repr)
@pytest.mark.parametrize("power", [-20, -1, 20])
def test_powers_of_two_change_nothing_but_the_unit(space, power):
    z = torch.exp(torch.randn(1000, 2))
    coordinates, densities = [], []
    for factor in (1.0, 2.0**power):
        head = PosteriorHead(0, space).fit_scale(factor * z)
        scale = Scale(head.unit, head.loc, head.scale)
        r, ladj = placed(space, scale).to_base(factor * z)
        coordinates.append(r)
        densities.append(ladj)
    assert torch.equal(*coordinates)
    shift = densities[1] - densities[0]
    torch.testing.assert_close(
        shift, torch.full_like(shift, -power * math.log(2)), atol=2e-6, rtol=2e-6
    )


def test_one_outlier_at_ten_thousand_sigma_does_not_set_the_scale():
    z = normal(10_000, 2)
    clean = Real(2).fit_scale(z)
    z[17, 1] = 1e4
    dirty = Real(2).fit_scale(z)
    torch.testing.assert_close(dirty.scale, clean.scale, rtol=0.03, atol=0)
    torch.testing.assert_close(dirty.loc, clean.loc, rtol=0, atol=0.03)
    dirty = Positive().fit_scale(torch.exp(0.01 * z[:, 1:]))
    assert 0.0097 < dirty.scale.item() < 0.0103


@pytest.mark.parametrize("value", [0.0, 7.0, -1e-20, 1e20])
def test_constant_column_has_a_usable_scale(value):
    head = PosteriorHead(0, Real(2), flow="diagonal")
    z = torch.stack([torch.full((50,), value), torch.randn(50)], 1)
    head.fit_scale(z)
    assert (head.scale > 0).all()
    assert torch.isfinite(head.scale).all()
    u = head(None).to_base(z)
    torch.testing.assert_close(u[:, 0], torch.zeros(50), atol=1e-5, rtol=0)


# ------------------------------------------------------------------------------------- names


def test_names_and_blocks():
    space = CASES["nested"][0]
    assert space.names == ("a.x", "a.y.p[0]", "a.y.p[1]", "b")
    assert [b.name for b in space.blocks] == ["a.x", "a.y.p", "b"]
    assert [(b.columns, b.base) for b in space.blocks] == [
        (slice(0, 1), slice(0, 1)),
        (slice(1, 3), slice(1, 3)),
        (slice(3, 4), slice(3, 4)),
    ]
    assert Real(2).names == ("z[0]", "z[1]")
    assert Real().names == ("z",)


def test_base_names_stand_in_the_order_of_the_flow():
    space = Product(
        energy=Positive(), vertex=Real(2), azimuth=Circle(), sky=Product(direction=Sphere())
    )
    names = ["sky.direction.u0", "sky.direction.u1", "azimuth", "energy", "vertex[0]", "vertex[1]"]
    assert list(space.base_names) == names
    assert len(space.base_names) == space.dof
    assert Sphere().base_names == Real(2).base_names == ("u0", "u1")
    assert Product(phase=Circle(vector=True)).base_names == ("phase",)


@pytest.mark.parametrize("batch", [(), (1,), (5,), (1, 1), (2, 3)], ids=str)
def test_pack_and_unpack(batch):
    space = CASES["nested"][0]
    labels = {
        "a": {"x": torch.randn(batch), "y": {"p": torch.randn(*batch, 2)}},
        "b": torch.randn(batch),
    }
    z = space.pack(labels)
    assert z.shape == (*batch, 4)
    again = space.unpack(z)
    assert torch.equal(again["a"]["x"], labels["a"]["x"])
    assert torch.equal(again["a"]["y"]["p"], labels["a"]["y"]["p"])
    assert torch.equal(again["b"], labels["b"])


@pytest.mark.parametrize("batch", [(), (1,), (5,)], ids=str)
def test_pack_of_scalars(batch):
    space = Product(x=Real(), e=Positive())
    z = space.pack({"e": torch.full(batch, 2.0), "x": torch.full(batch, 1.0)})
    assert torch.equal(z, torch.tensor([1.0, 2.0]).expand(*batch, 2))


def test_pack_refuses_what_does_not_fit():
    space = Product(e=Positive(), v=Real(3))
    with pytest.raises(ValueError, match=r"Expected labels named e, v; got e."):
        space.pack({"e": torch.ones(4)})
    with pytest.raises(ValueError, match="Expected labels named e, v; got e, v, w"):
        space.pack({"e": torch.ones(4), "v": torch.ones(4, 3), "w": torch.ones(4)})
    with pytest.raises(ValueError, match=r"Expected v of shape \(..., 3\)"):
        space.pack({"e": torch.ones(4), "v": torch.ones(4, 2)})
    with pytest.raises(ValueError, match="as many labels of every name"):
        space.pack({"e": torch.ones(4), "v": torch.ones(5, 3)})
    sky = Product(e=Positive(), phi=Circle(), direction=Sphere())
    given = {"e": torch.ones(4), "phi": torch.ones(4), "direction": torch.ones(4, 3)}
    angles = r"\(4, 2\)\. flowpost\.directions\.from_ra_dec and from_zenith_azimuth"
    with pytest.raises(ValueError, match=angles):
        sky.pack({**given, "direction": torch.ones(4, 2)})
    for pair in (sky, Product(phi=Circle(), e=Positive())):
        some = {k: v for k, v in given.items() if k in pair.spaces}
        with pytest.raises(ValueError, match=r"of (shape )?\(4, 2\).* Circle\(vector=True\) takes"):
            pair.pack({**some, "phi": torch.ones(4, 2)})
    with pytest.raises(ValueError, match=r"Expected labels of shape \(..., 4\)"):
        space.unpack(torch.ones(4, 3))


@pytest.mark.parametrize("name", CASES)
def test_config_round_trip(name):
    space = CASES[name][0]
    again = space_from_config(json.loads(json.dumps(space.config())))
    assert again == space
    assert hash(again) == hash(space)
    assert repr(again) == repr(space)
    assert again.names == space.names


def test_equality_sees_order_bounds_and_margins():
    different = [
        Real(1),
        Real(2),
        Positive(1),
        Positive(1, clip=0.1),
        Interval(0.0, 1.0),
        Interval(0.0, 2.0),
        Product(a=Real(), b=Positive()),
        Product(b=Positive(), a=Real()),
    ]
    assert len(set(different)) == len(different)
    assert Real(1) != "Real(1)"


def test_config_of_an_unknown_space():
    with pytest.raises(ValueError, match=r"got 'Torus'. The file may come from a later flowpost"):
        space_from_config({"type": "Torus"})
    with pytest.raises(ValueError, match="Expected the options of a Real"):
        space_from_config({"type": "Real", "length": 3})


def test_support_is_a_torch_constraint():
    support = Product(e=Positive(), x=Real()).support
    assert isinstance(support, torch.distributions.constraints.Constraint)
    assert isinstance(support, SpaceConstraint)
    assert support.event_dim == 1
    assert support.check(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])).tolist() == [True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_near_the_bounds_of_an_interval_keep_their_quantile(dtype):
    """torch's float32 ndtr is 0 from −6 on: draws would pile up on the bound."""
    space = Interval(0.0, 1.0)
    scale = Scale(*(t.to(dtype) for t in space.default_scale()))
    y = torch.linspace(-8, 4, 200, dtype=dtype)[:, None]
    again, _ = space.to_plane(space.from_plane(y, scale)[0], scale)
    torch.testing.assert_close(again, y, rtol=0, atol=3e-3 if dtype is torch.float32 else 1e-9)


MASK = "Correct or remove such events, or give missing labels a mask."
CLIP = "events, give missing labels a mask, or set `clip` where a bound may be touched."
FIRST = "Correct or remove such events: a missing {} cannot be masked while other labels are known."


@pytest.mark.parametrize(
    ("space", "label", "text"),
    [
        (Product(e=Positive(), d=Sphere()), [1.0, math.nan, 0, 1], FIRST.format("direction")),
        (Product(e=Positive(), phi=Circle()), [1.0, math.inf], FIRST.format("angle")),
        (Product(d=Sphere(), phi=Circle()), [0.0, 0, 1, math.nan], MASK),
        (Sphere(), [0.0, 0, math.nan], MASK),
        (Product(e=Positive(), d=Sphere()), [math.nan, 0, 0, 1], MASK),
        (Interval(0.0, 1.0), [math.nan], MASK),
        (Interval(0.0, 1.0), [1.0], CLIP),
        (Positive(2), [1.0, 0.0], CLIP),
        (Real(2), [1.0, math.nan], MASK),
    ],
    ids=str,
)
def test_remedies_that_apply(space, label, text):
    """A mask where it would be taken, and a margin where it would help."""
    z = torch.tensor([label])
    for batch in (z, z[0]):
        with pytest.raises(ValueError, match=re.escape(text) + "$") as caught:
            space.validate(batch)
        assert (" in labels, row 0, column " if batch.ndim > 1 else " in labels, column ") in str(
            caught.value
        )
