"""Batches of an epoch, and the events from which scales are found."""

import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from torch.utils.data import DataLoader, Dataset

import flowpost as fp
from flowpost.training.data import EpochBatches, loader, sample_of

F = 2
SIZES = (6, 6, 3)


class Batches(Dataset):
    """Whole batches, for a DataLoader of batch_size=None."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]


def of(inputs):
    """What `sample_of` makes of batches with these inputs."""
    items = [(x, torch.randn(n, 1)) for x, n in zip(inputs, SIZES, strict=True)]
    batches = DataLoader(Batches(items), batch_size=None, collate_fn=lambda item: item)
    sample = sample_of(batches, batches)
    assert len(sample.z) == sum(SIZES)
    return sample.x


def clouds():
    """Batches of hits, lengths and masks, each padded to its own longest; later ones far off."""
    torch.manual_seed(5)
    parts = []
    for i, (n, longest) in enumerate(zip(SIZES, (4, 7, 5), strict=True)):
        lengths = torch.randint(1, longest + 1, (n,))
        lengths[0] = longest
        mask = torch.arange(longest) < lengths[:, None]
        hits = torch.where(mask[..., None], 10.0 * i + torch.randn(n, longest, F), 0.0)
        parts.append((hits, lengths, mask))
    return parts


def real():
    return torch.cat([hits[mask] for hits, _, mask in clouds()])


def check_clouds(hits, lengths, mask=None):
    assert hits.shape == (15, 7, F)
    known = torch.arange(7) < torch.as_tensor(lengths)[:, None]
    assert torch.equal(hits[known], real())
    assert (hits[~known] == 0).all()
    if mask is not None:
        assert mask.dtype == torch.bool
        assert torch.equal(mask, known)


# ------------------------------------------------------------------------------------- scales


@pytest.mark.parametrize("kind", [tuple, list])
def test_tuples_are_joined_over_batches(kind):
    x = of([kind(part[:2]) for part in clouds()])
    check_clouds(*x)
    encoder = fp.encoders.DeepSets(F, 3, hidden=4).fit_scale(*x)
    expected = fp.encoders.Squash(F)
    expected.fit(real())
    assert torch.equal(encoder.squash.loc, expected.loc)
    assert torch.equal(encoder.squash.scale, expected.scale)


def test_dicts_are_joined_over_batches():
    x = of([{"x": h, "lengths": n, "mask": m} for h, n, m in clouds()])
    check_clouds(*x.values())
    x = of([{"x": h, "lengths": None, "mask": m} for h, _, m in clouds()])
    assert x["lengths"] is None
    check_clouds(x["x"], x["mask"].sum(1), x["mask"])


def test_arrays_and_plain_lengths_are_joined_over_batches():
    check_clouds(*of([(h.numpy(), n.tolist()) for h, n, _ in clouds()]))


def test_packed_sequences_are_joined_over_batches():
    x = of([
        pack_padded_sequence(h, n, batch_first=True, enforce_sorted=False) for h, n, _ in clouds()
    ])  # fmt: skip
    assert isinstance(x, PackedSequence)
    check_clouds(*pad_packed_sequence(x, batch_first=True))
    encoder = fp.encoders.LSTM(F, 3, hidden=4).fit_scale(x)
    torch.testing.assert_close(encoder.squash.loc, real().median(0).values, rtol=0.3, atol=0.3)


def test_tensors_and_no_inputs():
    parts = [torch.randn(n, 3) for n in SIZES]
    assert torch.equal(of(parts), torch.cat(parts))
    assert torch.equal(of([p.numpy() for p in parts]), torch.cat(parts))
    assert of([None] * 3) is None


@pytest.mark.parametrize(
    "change",
    [
        lambda i, h, n, m: h,  # nothing tells what is padding
        lambda i, h, n, m: (h, h.sum(-1)),
        lambda i, h, n, m: (h[..., : 1 + i % 2], n),
        lambda i, h, n, m: (h, n)[: 2 - i % 2],
        lambda i, h, n, m: {"x": h, f"lengths{i}": n},
        lambda i, h, n, m: (h, n, 2.0),
        lambda i, h, n, m: (h, n if i else None),
        lambda i, h, n, m: (h[1:], n[1:]),
        lambda i, h, n, m: (h, n, object()),
        lambda i, h, n, m: "a form of one's own",
    ],
)
def test_what_cannot_be_joined_is_the_first_batch(change):
    inputs = [change(i, *part) for i, part in enumerate(clouds())]
    assert of(inputs) is inputs[0]


def test_one_batch_is_left_as_it_is():
    hits, lengths, _ = clouds()[0]
    items = [((hits, lengths), torch.randn(len(hits), 1))]
    batches = DataLoader(Batches(items), batch_size=None, collate_fn=lambda item: item)
    assert sample_of(batches, batches).x is items[0][0]


class Events(Dataset):
    """Events whose hits lie at the number of the event."""

    def __len__(self):
        return 100

    def __getitem__(self, i):
        return (torch.full((4, F), float(i)), torch.tensor(1 + i % 4)), torch.tensor([0.1 * i])


def test_all_events_of_a_dataset():
    x = sample_of(Events(), loader(Events(), 30, seed=0, shuffle=True)).x
    assert sorted(x[0][:, 0, 0].tolist()) == list(range(100))
    assert torch.equal(x[1], 1 + x[0][:, 0, 0].long() % 4)


def test_fit_finds_scales_in_all_batches():
    pytest.importorskip("lightning")
    encoder = fp.encoders.DeepSets(F, 3, hidden=4)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(3, fp.Real(1)))
    train = loader(Events(), 10, seed=0, shuffle=False)
    fp.fit(model, train, val=loader(Events(), 50, seed=0, shuffle=False), epochs=1, progress=False)
    assert encoder.squash.loc[0].item() == pytest.approx(50, abs=3)


# -------------------------------------------------------------------------------------- order


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    ("size", "batch_size"), [(1, 1), (1, 9), (9, 9), (10, 9), (65, 32), (101, 20), (120, 40)]
)
def test_batches_of_an_epoch_are_nearly_equal(size, batch_size, shuffle):
    order = EpochBatches(size, batch_size, 3, shuffle)
    batches = list(order)
    counts = [len(b) for b in batches]
    assert len(batches) == len(order) == -(-size // batch_size)
    assert max(counts) <= batch_size
    assert max(counts) - min(counts) <= 1
    assert sorted(i for b in batches for i in b) == list(range(size))
    assert batches == list(EpochBatches(size, batch_size, 3, shuffle))
    order.set_epoch(1)
    if shuffle and size > 1:
        assert list(order) != batches


def test_batch_norm_survives_one_event_too_many():
    pytest.importorskip("lightning")
    encoder = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(3, fp.Real(1)))
    x = np.random.default_rng(0).normal(size=(33 + 33, 2)).astype("float32")
    fp.fit(model, (x, x[:, :1]), val=0.5, batch_size=32, epochs=1, progress=False)
