"""Summaries on disk."""

import json

import pytest
import torch
from torch import nn

import flowpost as fp
from flowpost.inferno import SoftBins, SummaryModel


def summary(encoder, **options):
    torch.manual_seed(0)
    return SummaryModel(encoder(), SoftBins(6, 4, **options))


def shipped():
    return fp.encoders.Tabular(3, 6, hidden=8, layers=2)


def own():
    return nn.Sequential(nn.Linear(3, 6), nn.BatchNorm1d(6))


@pytest.mark.parametrize("file", ["folder", "one.safetensors"])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.2}, {"temperature": "learned"}, {"temperature": lambda t: 2.0}],
)
def test_the_same_bins_come_back(tmp_path, file, options):
    model = summary(shipped, **options)
    x = torch.randn(20, 3)
    model.fit_scale(x)
    fp.save(model, tmp_path / file)
    other = fp.load(tmp_path / file)
    assert type(other) is SummaryModel
    assert not other.training
    assert torch.equal(other(x), model.eval()(x))
    assert other.head.temperature == pytest.approx(model.head.temperature)


def test_an_encoder_of_ones_own_is_given_again(tmp_path):
    model = summary(own).double()
    fp.save(model, tmp_path / "model")
    with pytest.raises(ValueError, match="encoder of your own"):
        fp.load(tmp_path / "model")
    x = torch.randn(20, 3, dtype=torch.float64)
    other = fp.load(tmp_path / "model", encoder=own())
    assert torch.equal(other(x), model.eval()(x))
    without = SummaryModel(None, SoftBins(3, 4))
    fp.save(without, tmp_path / "bare")
    assert torch.equal(fp.load(tmp_path / "bare")(x.float()), without(x.float()))


def test_what_does_not_fit_is_refused(tmp_path):
    class Derived(SummaryModel):
        pass

    with pytest.raises(ValueError, match="got Derived"):
        fp.save(Derived(None, SoftBins(3, 4)), tmp_path / "model")
    fp.save(summary(shipped), tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    text = path.read_text()
    path.write_text(text.replace('"bins": 4', '"bins": 5'))
    with pytest.raises(ValueError, match=r"altered|checksum|SHA"):
        fp.load(tmp_path / "model")
    assert json.loads(text)["kind"] == "SummaryModel"
    broken = summary(shipped)
    with torch.no_grad():
        broken.head.logits.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"finite numbers in tensor 'head\.logits\.weight'"):
        fp.save(broken, tmp_path / "other")
