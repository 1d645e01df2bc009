"""PosteriorHead and the joint KL: weights, masks, contexts, and errors that name the row."""

import math

import pytest
import torch
from torch import nn

import flowpost as fp
from flowpost import losses
from flowpost.head import PosteriorHead
from flowpost.model import PosteriorModel
from flowpost.spaces import Circle, Interval, Positive, Product, Real

SPACE = Product(e=Positive(), x=Real(2), y=Interval(-1.0, 2.0))


def head_of(space=SPACE, flow="spline", context=3):
    torch.manual_seed(1)
    head = PosteriorHead(context, space, flow=flow, layers=2, bins=6, hidden=8).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.2 * torch.randn_like(p))
    head.scale = torch.full_like(head.scale, 0.4)
    return head


@pytest.fixture
def data():
    head = head_of()
    context = torch.randn(8, 3, dtype=torch.float64)
    return head, context, head(context).sample()


# ------------------------------------------------------------------------------------ weights


def test_loss_is_the_mean_of_minus_log_prob(data):
    head, context, z = data
    expected = -head(context).log_prob(z).mean()
    torch.testing.assert_close(head.loss(context, z), expected)
    torch.testing.assert_close(losses.joint_kl(head(context), z), expected)
    torch.testing.assert_close(PosteriorModel(None, head).loss(context, z), expected)


@pytest.mark.parametrize("factor", [1.0, 1e-6, 1e6])
def test_weights_are_normalised_by_their_sum(data, factor):
    head, context, z = data
    count = torch.tensor([1, 2, 3, 0, 1, 4, 0, 2])
    expected = head.loss(context.repeat_interleave(count, 0), z.repeat_interleave(count, 0))
    torch.testing.assert_close(head.loss(context, z, factor * count), expected)
    torch.testing.assert_close(losses.joint_kl(head(context), z, factor * count), expected)
    gradient = torch.autograd.grad(head.loss(context, z, factor * count), head.flow.weight)
    repeated = torch.autograd.grad(expected, head.flow.weight)
    torch.testing.assert_close(gradient, repeated)


@pytest.mark.parametrize(
    ("weight", "text"),
    [
        ([1, 1, math.nan, 1, 1, 1, 1, 1], "Expected finite weight; got nan in row 2"),
        ([1, 1, 1, math.inf, 1, 1, 1, 1], "Expected finite weight; got inf in row 3"),
        ([1, 1, 1, 1, -0.5, 1, 1, 1], "got -0.5 in row 4. Set signed_weights=True"),
        ([0] * 8, "Expected weights with a positive sum; got 0"),
        ([1] * 7, r"Expected weight of shape \(8,\); got \(7,\)"),
        ([[1]] * 8, r"Expected weight of shape \(8,\); got \(8, 1\)"),
        (1.0, r"Expected weight of shape \(8,\); got \(\)"),
    ],
)
def test_weights_that_are_refused(data, weight, text):
    head, context, z = data
    with pytest.raises(ValueError, match=text):
        head.loss(context, z, weight)
    with pytest.raises(ValueError, match=text):
        losses.joint_kl(head(context), z, weight)


def test_signed_weights(data):
    head, context, z = data
    weight = torch.tensor([1.0, -0.5, 2, 1, 1, -0.2, 1, 1]).double()
    terms = -head(context).log_prob(z)
    found = head.loss(context, z, weight, signed_weights=True)
    torch.testing.assert_close(found, (weight * terms).sum() / weight.sum())
    with pytest.raises(ValueError, match="positive sum; got -"):
        head.loss(context, z, -weight, signed_weights=True)
    with pytest.raises(ValueError, match="finite weight"):
        head.loss(context, z, weight * math.nan, signed_weights=True)


def test_empty_batch(data):
    head, context, z = data
    assert head.log_prob(context[:0], z[:0]).shape == (0,)
    with pytest.raises(ValueError, match="at least one event; got an empty batch"):
        head.loss(context[:0], z[:0])


# -------------------------------------------------------------------------------------- masks


def mask_of(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def test_a_full_mask_changes_nothing(data):
    head, context, z = data
    mask = torch.ones(8, 4, dtype=torch.bool)
    torch.testing.assert_close(head.log_prob(context, z, mask), head(context).log_prob(z))


@pytest.mark.parametrize("flow", ["mse", "diagonal", "affine", "spline"])
def test_missing_trailing_blocks_are_marginalised_exactly(flow):
    head = head_of(flow=flow)
    context = torch.randn(4, 3, dtype=torch.float64)
    z = head(context).sample()
    mask = mask_of([1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0])
    found = head.log_prob(context, torch.where(mask, z, math.nan), mask)
    q = head(context)
    # e and x are the leading blocks: their marginal is the leading flow itself
    pair = Product(e=Positive(), x=Real(2))
    leading = fp.Posterior(q._flow.leading(2))
    assert leading.space == pair
    expected = torch.stack([q.log_prob(z)[0], leading.log_prob(z[:, :3])[1],
                            q["e"].log_prob(z[:, :1])[2], torch.zeros(()).double()])  # fmt: skip
    torch.testing.assert_close(found, expected)
    # and against Monte Carlo over the missing label
    y = torch.rand(20_000, 1).double() * 3 - 1
    whole = torch.cat([z[1, :3].expand(20_000, 3), y], -1)
    integral = 3 * q[1].log_prob(whole).exp().mean()
    assert found[1].exp().item() == pytest.approx(integral.item(), rel=0.06)


def test_masked_loss_has_finite_gradients(data):
    head, context, z = data
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[::2, 3] = False
    mask[4, 1:] = False
    head.loss(context, torch.where(mask, z, math.nan), mask=mask).backward()
    assert all(torch.isfinite(p.grad).all() for p in head.parameters())
    assert head.flow.weight.grad.abs().sum() > 0


def test_masked_values_are_not_read(data):
    head, context, z = data
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[3:, 3] = False
    value = head.log_prob(context, z, mask)
    for other in (math.nan, math.inf, -7.0):
        torch.testing.assert_close(head.log_prob(context, torch.where(mask, z, other), mask), value)
    z = z.clone()
    z[0, 3] = math.nan
    with pytest.raises(ValueError, match="row 0, column 'y'"):
        head.log_prob(context, z, mask)


@pytest.mark.parametrize(
    "row", [[0, 1, 1, 1], [1, 0, 0, 1], [1, 1, 0, 1], [1, 1, 0, 0], [0, 0, 0, 1]], ids=str
)
def test_masks_that_are_not_exact_are_refused(data, row):
    head, context, z = data
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[5] = torch.tensor(row, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"whole trailing blocks .* 'e', 'x', 'y'\).* row 5 has"):
        head.loss(context, z, mask=mask)


@pytest.mark.parametrize(
    "mask", [torch.ones(8, 4), torch.ones(8, 3).bool(), torch.ones(4).bool(), [True]]
)
def test_masks_of_the_wrong_kind(data, mask):
    head, context, z = data
    with pytest.raises(ValueError, match=r"Expected mask as booleans of shape \(8, 4\)"):
        head.loss(context, z, mask=mask)


def test_masks_by_the_name_of_a_block(data):
    head, context, z = data
    mask = torch.ones(8, 4, dtype=torch.bool)
    mask[3:, 3] = False
    mask[5:, 1:3] = False
    expected = head.log_prob(context, z, mask)
    for named in (
        {"x": mask[:, 1], "y": mask[:, 3]},
        {"y": mask[:, 3:], "x": mask[:, 1:3]},
        {"e": [True] * 8, "x": mask[:, 1].numpy(), "y": mask[:, 3].tolist()},
    ):
        torch.testing.assert_close(head.log_prob(context, z, named), expected)
        torch.testing.assert_close(head.loss(context, z, mask=named), -expected.mean())
    torch.testing.assert_close(head.log_prob(context, z, {}), head(context).log_prob(z))
    nested = head_of(Product(a=Product(e=Positive(), x=Real(2)), y=Real()))
    label = nested(context).sample()
    columns = torch.ones(8, 4, dtype=torch.bool)
    columns[2:, 1:] = False
    known = columns[:, 1]
    expected = nested.log_prob(context, label, columns)
    for named in ({"a": {"x": known}, "y": known}, {"a.x": known, "y": known}):
        torch.testing.assert_close(nested.log_prob(context, label, named), expected)


@pytest.mark.parametrize(
    ("mask", "text"),
    [
        ({"z": torch.ones(8).bool()}, "Expected a mask of blocks of the label space; got 'z'. Bl"),
        (
            {"e": torch.ones(8)},
            r"Expected mask\['e'\] as booleans of shape \(8,\); got torch.fl",
        ),
        ({"x": torch.ones(8, 3).bool()}, r"mask\['x'\] as booleans of shape \(8, 2\)"),
        ({"y": torch.ones(7).bool()}, r"mask\['y'\] as booleans of shape \(8,\)"),
        ({"e": torch.zeros(8).bool()}, "Declare labels that may be missing last"),
    ],
    ids=str,
)
def test_named_masks_that_are_refused(data, mask, text):
    head, context, z = data
    with pytest.raises(ValueError, match=text):
        head.loss(context, z, mask=mask)


def test_a_missing_direction_is_told_what_it_is():
    space = Product(energy=Positive(), direction=fp.Sphere(), azimuth=fp.Circle())
    head = head_of(space, "affine")
    context = torch.randn(8, 3, dtype=torch.float64)
    z, some = head(context).sample(), torch.arange(8) != 5
    first = "Directions and angles come first in the flow.* leave out events without "
    for name in ("direction", "azimuth"):
        with pytest.raises(ValueError, match=rf"mask row 5 has .*{first}'{name}'"):
            head.loss(context, z, mask={name: some})
    half = torch.ones(8, 5, dtype=torch.bool)
    half[5, 2] = False
    text = "mask row 5 has .* The mask divides 'direction': mask all columns of a vector or none"
    for reference in (None, {"direction": z[:, 1:4]}):
        with pytest.raises(ValueError, match=text):
            head.loss(context, z, mask=half, reference=reference)
    # what stands behind them may be missing
    assert torch.isfinite(head.loss(context, z, mask={"energy": some}))


def test_mask_of_a_single_column():
    head = head_of(Positive())
    context = torch.randn(5, 3, dtype=torch.float64)
    z = head(context).sample().squeeze(-1)
    mask = torch.tensor([True, False, True, True, False])
    found = head.log_prob(context, torch.where(mask, z, -1.0), mask)
    torch.testing.assert_close(found, torch.where(mask, head(context).log_prob(z), 0.0))


# ------------------------------------------------------------------------------------ contexts


@pytest.mark.parametrize(
    ("context", "text"),
    [
        (torch.zeros(4, 2), r"Expected context of shape \(N, 3\); got \(4, 2\). Set PosteriorHead"),
        (torch.tensor(0.0), r"Expected context of shape \(N, 3\); got \(\)"),
        (None, "Only a head with context=0 is an unconditional density"),
        (torch.tensor([[0, 0, 0], [0, math.nan, 0]]), "finite context; got nan in row 1, column 1"),
        (torch.tensor([[math.inf, 0, 0]]), "finite context; got inf in row 0, column 0"),
    ],
)
def test_contexts_that_do_not_fit(context, text):
    with pytest.raises(ValueError, match=text):
        head_of()(context)


def test_context_of_zero_width():
    head = head_of(Real(1), context=0)
    assert head(None).batch_shape == ()
    assert head(torch.zeros(5, 0)).batch_shape == (5,)
    with pytest.raises(ValueError, match=r"\(N, 0\)"):
        head(torch.zeros(5, 1))


def test_gradient_reaches_the_encoder():
    encoder = nn.Linear(2, 3).double()
    head = head_of()
    x = torch.randn(8, 2).double()
    PosteriorModel(encoder, head).loss(x, head(torch.zeros(8, 3)).sample()).backward()
    assert encoder.weight.grad.abs().sum() > 0


def test_dropout_acts_in_training_only():
    head = PosteriorHead(3, Real(2), dropout=0.5).double()
    with torch.no_grad():
        for p in head.parameters():
            p.add_(0.3 * torch.randn_like(p))
    context, z = torch.randn(200, 3).double(), torch.zeros(200, 2).double()
    assert (head.log_prob(context, z) - head.log_prob(context, z)).abs().max() > 0.01
    q = head(context)
    assert torch.equal(q.log_prob(z), q.log_prob(z))
    torch.testing.assert_close(q.to_base(q.from_base(z)), z, atol=1e-6, rtol=0)
    head.eval()
    assert torch.equal(head.log_prob(context, z), head.log_prob(context, z))


@pytest.mark.parametrize(
    ("shape", "labels", "remedy"),
    [
        ((6, 3), (4, 4), r"Give as many labels as inputs, \(6, 4\)\.$"),
        ((6, 3), (1, 4), r"Give as many labels as inputs, \(6, 4\)\.$"),
        ((6, 3), (4, 6), r"Give as many labels as inputs, \(6, 4\)\.$"),
        ((6, 5, 3), (6, 4), r"An encoder gives \(N, 3\): flatten what it returns\.$"),
    ],
)
def test_labels_of_another_number(shape, labels, remedy):
    text = f"Expected one label for each context; got contexts of shape .* {remedy}"
    with pytest.raises(ValueError, match=text):
        head_of().loss(torch.zeros(shape), torch.ones(labels))


# ----------------------------------------------------------------------------- labels and scale


@pytest.mark.parametrize("method", ["loss", "log_prob", "to_base_and_log_prob"])
def test_labels_by_name_are_packed_first(data, method):
    head, context, z = data
    text = r"got dict\. Pack it, as a Product does: space\.pack\(\{…\}\)\.$"
    with pytest.raises(ValueError, match=text):
        getattr(head, method)(context, SPACE.unpack(z))
    with pytest.raises(ValueError, match=text):
        PosteriorModel(None, head).set_scales(context, SPACE.unpack(z))
    torch.testing.assert_close(head.loss(context, SPACE.pack(SPACE.unpack(z))),
                               head.loss(context, z))  # fmt: skip


def test_labels_of_a_single_column_need_no_axis():
    head = head_of(Positive())
    context, z = torch.randn(6, 3).double(), torch.rand(6).double() + 0.1
    torch.testing.assert_close(head.loss(context, z), head.loss(context, z.unsqueeze(-1)))
    other = head_of(Positive())
    head.fit_scale(z)
    other.fit_scale(z.unsqueeze(-1))
    assert torch.equal(head.loc, other.loc)


@pytest.mark.parametrize("space", [Real(), Positive(), Circle()])
def test_a_batch_of_one_event_needs_no_axis_either(space):
    """As the last of a loader often is."""
    head = head_of(space)
    context, z = torch.randn(1, 3).double(), torch.rand(1).double() + 0.1
    expected = head.log_prob(context, z[:, None])
    assert expected.shape == (1,)
    for found in (
        head.log_prob(context, z),
        head.log_prob(context, z, torch.ones(1, 1, dtype=torch.bool)),
        head.to_base_and_log_prob(context, z)[1],
        # an event without a batch
        head.log_prob(context[0], z)[None],
    ):
        assert torch.equal(found, expected)
    assert torch.equal(head.loss(context, z), -expected.mean())
    assert PosteriorHead(0, space).fit_scale(z).log_prob(None, z).shape == (1,)
    events = torch.utils.data.TensorDataset(torch.randn(5, 3), torch.rand(5) + 0.1)
    pytest.importorskip("lightning.pytorch")
    model = PosteriorModel(None, PosteriorHead(3, space, "diagonal"))
    loader = torch.utils.data.DataLoader(events, batch_size=4)
    fp.fit(model, loader, val=events.tensors, epochs=1, progress=False)


@pytest.mark.parametrize(
    ("labels", "weight", "text"),
    [
        (torch.zeros(0, 2), None, "Expected labels of at least one event; got none"),
        (torch.zeros(5, 3), None, "Expected labels of shape"),
        (
            torch.tensor([[0.0, 1], [math.nan, 2]]),
            None,
            r"got nan in labels, row 1, column 'z\[0\]'",
        ),
        (torch.zeros(3, 2), [1.0, math.nan, 1], "Expected finite weight; got nan in row 1"),
        (torch.zeros(3, 2), [1.0, 1], r"Expected weight of shape \(3,\)"),
        (torch.randn(3, 2), [0.0, 0, 0], "positive sum"),
    ],
)
def test_fit_scale_refuses(labels, weight, text):
    head = PosteriorHead(0, Real(2))
    with pytest.raises(ValueError, match=text):
        head.fit_scale(labels, weight)
    assert not head.fitted
    assert torch.isfinite(head.loc).all()


def test_fit_scale_is_stored_with_the_model():
    head = PosteriorHead(0, SPACE)
    assert not head.fitted
    z = torch.rand(50, 4) + 0.1
    assert head.fit_scale(z) is head
    assert head.fitted
    again = PosteriorHead(0, SPACE)
    again.load_state_dict(head.state_dict())
    assert torch.equal(again(None).log_prob(z), head(None).log_prob(z))
    assert not any(p is head.loc for p in head.parameters())


def test_fit_scale_takes_signed_weights_by_size():
    z = torch.randn(50, 1)
    weight = torch.randn(50)
    a = PosteriorHead(0, Real()).fit_scale(z, weight)
    b = PosteriorHead(0, Real()).fit_scale(z, weight.abs())
    assert torch.equal(a.scale, b.scale)


def test_config_builds_the_same_head():
    head = PosteriorHead(5, SPACE, "affine", layers=3, bins=7, hidden=9, coupling=True, dropout=0.1)
    config = head.config()
    assert config.pop("space") == SPACE.config()
    assert config == {"context": 5, "flow": "affine", "layers": 3, "bins": 7, "hidden": 9,
                      "coupling": True, "dropout": 0.1, "warps": 0,
                      "wait": None, "reference": None}  # fmt: skip


@pytest.mark.parametrize(
    ("build", "text"),
    [
        (lambda: PosteriorHead(2, "real"), "Expected space as a label space; got 'real'"),
        (lambda: PosteriorHead(2, Real), "Expected space as a label space"),
        (lambda: PosteriorHead(-1, Real()), "Expected context as a whole number of at least 0"),
        (lambda: PosteriorHead(2.5, Real()), "Expected context as a whole number"),
        (lambda: PosteriorHead(2, Real(), wait=0), "Expected wait as a whole number of at least 1"),
        (lambda: PosteriorHead(2, Real(), flow="nsf"), "Expected flow as one of mse, diagonal"),
        (lambda: PosteriorModel(PosteriorHead(2, Real()), nn.Linear(2, 2)), "The order is Post"),
    ],
)
def test_nonsense_is_refused(build, text):
    with pytest.raises(ValueError, match=text):
        build()


# ---------------------------------------------------------------------------------- the model


class Two(nn.Module):
    def forward(self, a, b):
        return torch.cat([a, b], -1)


def test_inputs_may_be_tuples_and_dicts():
    model = PosteriorModel(Two(), head_of())
    a, b = torch.randn(4, 1).double(), torch.randn(4, 2).double()
    expected = model.head(torch.cat([a, b], -1)).mean
    torch.testing.assert_close(model((a, b)).mean, expected)
    torch.testing.assert_close(model([a, b]).mean, expected)
    torch.testing.assert_close(model({"b": b, "a": a}).mean, expected)


def test_model_without_encoder():
    head = head_of()
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(PosteriorModel(None, head)(x).mean, head(x).mean)
    assert PosteriorModel(None, head_of(context=0))(None).batch_shape == ()


def test_training_reaches_the_entropy_of_the_truth():
    """z | x ~ N(x, 0.3²): the loss has to come down to its entropy, with the right width."""
    torch.manual_seed(0)
    x = torch.randn(4000, 1)
    z = x + 0.3 * torch.randn(4000, 1)
    head = PosteriorHead(1, Real(), flow="diagonal").fit_scale(z)
    optimizer = torch.optim.Adam(head.parameters(), 0.05)
    for _ in range(150):
        optimizer.zero_grad()
        loss = head.loss(x, z)
        loss.backward()
        optimizer.step()
    exact = -torch.distributions.Normal(x, 0.3).log_prob(z).mean()
    assert abs(loss.item() - exact.item()) < 0.005
    assert head(x).to_base(z).std().item() == pytest.approx(1, abs=0.01)
