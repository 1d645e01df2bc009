"""Encoders: shapes, padding, permutations, outliers, missing values."""

import math

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pack_sequence

from flowpost import encoders
from flowpost.encoders import CNN, LSTM, DeepSets, Encoder, Squash, Tabular

N = 7


def clouds():
    torch.manual_seed(3)
    return torch.randn(N, 5, 2), torch.tensor([5, 1, 3, 2, 4, 5, 1])


# encoder, its inputs
CASES = {
    "tabular": (lambda: Tabular(4, 6), lambda: (torch.randn(N, 4),)),
    "tabular missing": (lambda: Tabular(4, 6, missing=True), lambda: (torch.randn(N, 4),)),
    "cnn": (lambda: CNN(2, 6, width=4), lambda: (torch.rand(N, 2, 8, 9),)),
    "lstm": (lambda: LSTM(2, 6, hidden=5), clouds),
    "lstm stacked": (lambda: LSTM(2, 6, hidden=5, layers=2), clouds),
    "deep sets": (lambda: DeepSets(2, 6, hidden=8), clouds),
}


@pytest.fixture(params=CASES)
def case(request):
    build, inputs = CASES[request.param]
    torch.manual_seed(0)
    return build().eval(), inputs()


def test_shape_and_gradient(case):
    encoder, inputs = case
    context = encoder(*inputs)
    assert context.shape == (N, 6)
    context.square().sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())


def test_events_do_not_see_each_other(case):
    encoder, inputs = case
    whole = encoder(*inputs)
    for i in (0, 3):
        torch.testing.assert_close(encoder(*(t[i : i + 1] for t in inputs)), whole[i : i + 1],
                                   rtol=1e-5, atol=1e-5)  # fmt: skip
    assert (whole[0] - whole[3]).abs().max() > 1e-4


def test_batch_of_no_events(case):
    encoder, inputs = case
    for module in (encoder.train(), encoder.eval()):
        context = module(*(t[:0] for t in inputs))
        assert context.shape == (0, 6)
        assert context.dtype == torch.float32
        context.sum().backward()
    assert encoder(inputs[0][:0]).shape == (0, 6)


def test_inputs_in_double_and_as_arrays(case):
    encoder, inputs = case
    expected = encoder(*inputs)
    double = (inputs[0].double(), *inputs[1:])
    torch.testing.assert_close(encoder(*double), expected)
    torch.testing.assert_close(encoder(*(t.numpy() for t in inputs)), expected)


def test_units_do_not_matter_after_fit_scale(case):
    encoder, inputs = case
    assert not encoder.fitted
    assert encoder.fit_scale(*inputs) is encoder
    assert encoder.fitted
    expected = encoder(*inputs)
    encoder.fit_scale(1000 * inputs[0], *inputs[1:])
    torch.testing.assert_close(
        encoder(1000 * inputs[0], *inputs[1:]), expected, rtol=1e-4, atol=1e-5
    )


def test_config_and_state_build_the_same_encoder(case):
    encoder, inputs = case
    encoder.fit_scale(*inputs)
    config = encoder.config()
    again = getattr(encoders, config.pop("type"))(**config)
    again.load_state_dict(encoder.state_dict())
    assert torch.equal(again.eval()(*inputs), encoder(*inputs))
    assert again.fitted
    assert isinstance(encoder, Encoder)


def test_global_random_state_is_untouched_by_evaluation(case):
    encoder, inputs = case
    state = torch.get_rng_state()
    encoder.fit_scale(*inputs)
    encoder(*inputs)
    assert torch.equal(torch.get_rng_state(), state)


# ------------------------------------------------------------------------------------- squash


def test_squash_standardises_the_centre():
    x = torch.tensor([5.0, -300.0, 1e-4]) + torch.tensor([2.0, 1e3, 1e-6]) * torch.randn(20_000, 3)
    squash = Squash(3)
    squash.fit(x)
    torch.testing.assert_close(squash.loc, x.median(0).values, rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(squash.scale, x.std(0), rtol=0.03, atol=0)
    y = squash(x)
    assert (y.mean(0).abs() < 0.03).all()
    torch.testing.assert_close(y.std(0), torch.ones(3), rtol=0.03, atol=0)


def test_squash_is_linear_within_four_widths():
    squash = Squash(2)
    x = torch.linspace(-4, 4, 101)[:, None].expand(-1, 2)
    torch.testing.assert_close(squash(x), x)


def test_squash_bounds_outliers_but_keeps_their_order():
    squash = Squash(1)
    far = squash(torch.tensor([[-1e6], [10.0], [100.0], [1e6], [1e30]]))[:, 0]
    beyond = [4 + math.asinh(x - 4) for x in (1e6, 10, 100, 1e6, 1e30)]
    torch.testing.assert_close(far, torch.tensor([-beyond[0], *beyond[1:]]))
    x = torch.randn(10_000, 1)
    clean = Squash(1)
    clean.fit(x)
    x[5] = 1e8
    squash.fit(x)
    torch.testing.assert_close(squash.scale, clean.scale, rtol=1e-3, atol=0)


def test_squash_of_odd_columns():
    x = torch.zeros(100, 4)
    x[:, 0] = 3.0  # constant
    x[0, 1] = 5.0  # nearly always zero
    x[:, 2] = math.nan  # never there
    x[:, 3] = torch.randn(100)
    x[::2, 3] = math.nan
    squash = Squash(4)
    squash.fit(x)
    assert torch.isfinite(squash.loc).all()
    assert torch.isfinite(squash.scale).all()
    assert (squash.scale > 0).all()
    assert squash.loc[0] == 3
    assert squash.scale[1] == pytest.approx(0.5, rel=0.01)
    kept = x[1::2, 3]
    assert squash.loc[3].item() == pytest.approx(kept.median().item(), abs=0.05)


@pytest.mark.parametrize("rows", [2**24 + 4, 100_000_007])
def test_squash_of_more_rows_than_float32_can_count(rows):
    squash = Squash(1)
    squash.fit(torch.full((1, 1), 2.0).expand(rows, 1))
    assert squash.loc.item() == 2


@pytest.mark.parametrize("name", ["tabular", "cnn", "lstm", "deep sets"])
def test_outliers_of_the_input_stay_small(name):
    build, inputs = CASES[name]
    encoder, x = build().eval(), inputs()
    encoder.fit_scale(*x)
    usual = encoder(*x).abs().max()
    far = encoder(x[0] * 1e6, *x[1:])
    assert torch.isfinite(far).all()
    assert far.abs().max() < 200 * usual.clamp_min(0.1)


# ---------------------------------------------------------------------------------- not finite


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["tabular", "cnn", "lstm", "deep sets"])
def test_values_that_are_not_finite_are_named(name, value):
    build, inputs = CASES[name]
    encoder, x = build(), list(inputs())
    x[0] = x[0].clone()
    x[0][(2, 0) + (0,) * (x[0].ndim - 2)] = value
    with pytest.raises(ValueError, match=f"Expected finite x; got {value} in row 2, column 0"):
        encoder(*x)
    with pytest.raises(ValueError, match="Expected finite x"):
        encoder.fit_scale(*x)


def test_missing_values_are_told_to_the_network():
    encoder = Tabular(3, 4, missing=True).eval()
    x = torch.randn(500, 3) + torch.tensor([0.0, 50.0, 0.0])
    encoder.fit_scale(torch.where(torch.rand(500, 3) < 0.2, math.nan, x))
    gone = x[:1].clone()
    gone[0, 1] = math.nan
    value = encoder(gone)
    assert torch.isfinite(value).all()
    infinite = gone.clone()
    infinite[0, 1] = math.inf
    assert torch.equal(encoder(infinite), value)
    # a missing value is no measured median
    median = gone.clone()
    median[0, 1] = encoder.squash.loc[1]
    assert (encoder(median) - value).abs().max() > 1e-4
    with pytest.raises(ValueError, match="missing=True"):
        Tabular(3, 4)(gone)


# ---------------------------------------------------------------------------------- sequences


@pytest.mark.parametrize("name", ["lstm", "lstm stacked", "deep sets"])
@pytest.mark.parametrize("padding", [0.0, 1e30, math.nan, math.inf])
def test_content_of_the_padding_does_not_matter(name, padding):
    encoder = CASES[name][0]().eval()
    x, lengths = clouds()
    real = torch.arange(5) < lengths[:, None]
    expected = encoder(x, lengths)
    filled = torch.where(real.unsqueeze(-1), x, padding)
    assert torch.equal(encoder(filled, lengths), expected)
    longer = torch.cat([filled, torch.full((N, 3, 2), padding)], 1)
    torch.testing.assert_close(encoder(longer, lengths), expected, rtol=1e-5, atol=1e-6)
    encoder.fit_scale(filled, lengths)
    other = CASES[name][0]()
    other.fit_scale(x, lengths)
    assert torch.equal(encoder.squash.loc, other.squash.loc)


@pytest.mark.parametrize("name", ["lstm", "lstm stacked"])
def test_packed_sequence_equals_padded(name):
    encoder = CASES[name][0]().eval()
    x, lengths = clouds()
    expected = encoder(x, lengths)
    packed = pack_padded_sequence(x, lengths, batch_first=True, enforce_sorted=False)
    torch.testing.assert_close(encoder(packed), expected)
    events = [e[:n] for e, n in zip(x, lengths, strict=True)]
    torch.testing.assert_close(encoder(pack_sequence(events, enforce_sorted=False)), expected)
    torch.testing.assert_close(encoder(x), encoder(x, torch.full((N,), 5)))
    encoder.fit_scale(packed)
    loc = encoder.squash.loc
    encoder.fit_scale(x, lengths)
    torch.testing.assert_close(encoder.squash.loc, loc)


def test_lstm_sees_the_order():
    encoder = CASES["lstm"][0]().eval()
    x, _ = clouds()
    assert (encoder(x) - encoder(x.flip(1))).abs().max() > 1e-4


def test_deep_sets_do_not_see_the_order():
    encoder = CASES["deep sets"][0]().eval()
    x, lengths = clouds()
    real = torch.arange(5) < lengths[:, None]
    expected = encoder(x, lengths)
    order = torch.randperm(5)
    torch.testing.assert_close(encoder(x[:, order], mask=real[:, order]), expected)
    torch.testing.assert_close(encoder(x, mask=real), expected)
    # but how many points there are
    twice = encoder(torch.cat([x, x], 1), mask=torch.cat([real, real], 1))
    assert (twice - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["lstm", "lstm stacked", "deep sets"])
def test_empty_events(name):
    encoder = CASES[name][0]().eval()
    x, lengths = clouds()
    lengths[2] = 0
    context = encoder(x, lengths)
    assert torch.isfinite(context).all()
    context.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    none = encoder(torch.zeros(3, 0, 2), torch.zeros(3, dtype=torch.long))
    assert none.shape == (3, 6)
    torch.testing.assert_close(none, context[2:3].expand(3, 6))
    # an empty event is no event of one element at zero
    one = encoder(torch.zeros(1, 1, 2), torch.tensor([1]))
    assert (one - none[:1]).abs().max() > 1e-4


@pytest.mark.parametrize("encoder", [LSTM(2, 6), DeepSets(2, 6)], ids=["lstm", "deep sets"])
@pytest.mark.parametrize(
    ("x", "lengths", "text"),
    [
        (torch.zeros(3, 5, 4), None, r"Expected x of shape \(N, M, 2\); got \(3, 5, 4\)"),
        (torch.zeros(3, 2), None, r"Expected x of shape \(N, M, 2\)"),
        (torch.zeros(3, 5, 2), [1, 6, 2], "Expected lengths between 0 and 5; got 1 to 6"),
        (torch.zeros(3, 5, 2), [1, -1, 2], "Expected lengths between 0 and 5; got -1 to 2"),
        (torch.zeros(3, 5, 2), [1, 2], r"Expected lengths of shape \(3,\)"),
    ],
)
def test_sequences_that_do_not_fit(encoder, x, lengths, text):
    with pytest.raises(ValueError, match=text):
        encoder(x, lengths)


# ---------------------------------------------------------------------------- images, columns


@pytest.mark.parametrize("size", [(4, 4), (5, 7), (8, 8), (16, 9), (28, 28)])
@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_images_of_any_size(size, blocks):
    encoder = CNN(3, 6, width=4, blocks=blocks).eval()
    x = torch.rand(2, 3, *size)
    encoder.fit_scale(x)
    assert encoder(x).shape == (2, 6)
    assert torch.isfinite(encoder(x)).all()


@pytest.mark.parametrize(
    ("encoder", "x", "text"),
    [
        (CNN(2, 6), torch.zeros(3, 1, 8, 8), r"Expected x of shape \(N, 2, H, W\); got \(3, 1"),
        (CNN(2, 6), torch.zeros(3, 2, 8), "Set CNN"),
        (Tabular(4, 6), torch.zeros(3, 5), r"Expected x of shape \(N, 4\); got \(3, 5\). Set Tab"),
        (Tabular(4, 6), torch.zeros(4), r"Expected x of shape \(N, 4\)"),
    ],
)
def test_inputs_that_do_not_fit(encoder, x, text):
    with pytest.raises(ValueError, match=text):
        encoder(x)


def test_tabular_has_a_linear_path():
    encoder = Tabular(3, 2).eval()
    with torch.no_grad():
        for p in encoder.net.parameters():
            p.zero_()
    x = 0.01 * torch.randn(5, 3)
    expected = nn.functional.linear(x, encoder.skip.weight, encoder.skip.bias)
    torch.testing.assert_close(encoder(x), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    "build",
    [
        lambda: Tabular(0, 2),
        lambda: Tabular(2, 0),
        lambda: Tabular(2, 2, layers=0),
        lambda: CNN(0, 2),
        lambda: CNN(1, 2, blocks=0),
        lambda: LSTM(2, 0),
        lambda: DeepSets(-1, 2),
    ],
)
def test_sizes_out_of_range(build):
    with pytest.raises(ValueError, match=r"Expected .* as a whole number of at least 1"):
        build()
