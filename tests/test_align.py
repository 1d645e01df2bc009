"""Align: which distances it averages, what it leaves out and refuses; the page and the example."""

import math
import re
import runpy
import sys
from functools import partial
from pathlib import Path

import pytest
import torch

import flowpost as fp
from flowpost.calibration import Align
from flowpost.metrics import (
    distance_correlation,
    energy_distance,
    sliced_wasserstein,
    symmetric_kl,
    wasserstein_1d,
)

ROOT = Path(__file__).resolve().parents[1]


def events(n=120, seed=0, shift=0.0, mix=(1.0, 1.0, 1.0)):
    """Outputs (n, 3) and classes of a network that reacts to a shift."""
    g = torch.Generator().manual_seed(seed)
    c = torch.multinomial(torch.tensor(mix), n, replacement=True, generator=g)
    return torch.eye(3)[c] + torch.randn(n, 3, generator=g) + shift, c


def test_is_the_mean_over_variations_and_classes_alike():
    (x, c), (y, k), (z, m) = events(mix=(8.0, 1.0, 1.0)), events(90, 1, 0.3), events(70, 2, -0.3)
    align = Align(weight=3.0)
    found = align.distances(x, {"up": y, "down": z}, c, {"up": k, "down": m})
    by_hand = {
        name: {j: energy_distance(x[c == j], v[t == j]) for j in range(3)}
        for name, v, t in (("up", y, k), ("down", z, m))
    }
    assert found == by_hand
    expected = 3 * torch.tensor([v for of in by_hand.values() for v in of.values()]).mean()
    value = align(x, {"up": y, "down": z}, c, {"up": k, "down": m})
    assert float(value) == pytest.approx(float(expected), rel=1e-6)
    assert align(x, y, c, k) == align(x, {"up": y}, c, {"up": k})
    assert list(align.distances(x, y, c, k)) == ["variation"]


def test_one_tensor_of_labels_serves_variations_of_the_same_events():
    x, c = events()
    both = {"up": x + 0.1, "down": x - 0.2}
    assert Align()(x, both, c, c) == Align()(x, both, c, {"up": c, "down": c})


def test_all_events_together():
    (x, c), (y, k) = events(), events(seed=1)
    align = Align(per_class=False)
    assert align(x, y) == energy_distance(x, y) == align(x, y, c, k)
    assert list(align.distances(x, y)["variation"]) == ["all"]


@pytest.mark.parametrize(
    ("metric", "outputs"),
    [
        (symmetric_kl, lambda v: v),
        (partial(symmetric_kl), lambda v: v),
        (energy_distance, lambda v: v.softmax(1)),
        (wasserstein_1d, lambda v: v[:, 0]),
        (partial(sliced_wasserstein, p=1, projections=torch.eye(3)), lambda v: v),
        (lambda a, b: (a.mean(0) - b.mean(0)).abs().sum(), lambda v: v),
    ],
)
def test_metrics(metric, outputs):
    (x, c), (y, k) = events(), events(100, 1, 0.3)
    x.requires_grad_()
    y.requires_grad_()
    expected = torch.stack([metric(outputs(x)[c == j], outputs(y)[k == j]) for j in range(3)])
    value = Align(metric)(outputs(x), outputs(y), c, k)
    assert torch.allclose(value, expected.mean())
    for slope in torch.autograd.grad(value, (x, y)):
        assert torch.isfinite(slope).all()
        assert slope.abs().sum() > 0


def test_posteriors_parameters_are_outputs():
    """The location of a head for nominal and varied events, with bins of the label as classes."""
    g = torch.Generator().manual_seed(0)
    head = fp.PosteriorHead(2, fp.Real(1), "diagonal")
    context, z = torch.randn(80, 2, generator=g), torch.rand(80, generator=g)
    bins = torch.bucketize(z, torch.tensor([0.3, 0.6]))
    context.requires_grad_()
    nominal, varied = (head(v).from_base(torch.zeros(80, 1)) for v in (context, context + 1))
    torch.autograd.grad(Align()(nominal, varied, bins, bins), context)


def test_another_class_mix_is_no_difference_per_class():
    (x, c), (y, k) = events(4000), events(4000, 1, mix=(8.0, 1.0, 1.0))
    assert float(Align(per_class=False)(x, y)) > 0.05
    assert abs(float(Align()(x, y, c, k))) < 0.005


def test_weights_reach_the_metric():
    (x, c), (y, k) = events(), events(100, 1)
    g = torch.Generator().manual_seed(2)
    w, v = torch.rand(120, generator=g), torch.rand(100, generator=g)
    found = Align().distances(x, y, c, k, w, v)["variation"]
    for j in range(3):
        assert found[j] == energy_distance(x[c == j], y[k == j], w[c == j], v[k == j])
    assert Align(per_class=False)(x, y, None, None, w) == energy_distance(x, y, w)
    assert Align()(x, {"up": y}, c, {"up": k}, w, {"up": v}) == Align()(x, y, c, k, w, v)
    signed = torch.where(w < 0.1, -w, w)
    with pytest.raises(ValueError, match="signed_weights=True"):
        Align()(x, y, c, k, signed)
    value = Align(partial(energy_distance, signed_weights=True))(x, y, c, k, signed)
    assert torch.isfinite(value)


def test_classes_of_too_few_events_are_left_out():
    (x, c), (y, k) = events(), events(100, 1)
    keep = (c != 0) | (torch.arange(120) == int((c == 0).nonzero()[0]))  # one event of class 0
    found = Align().distances(x[keep], y[k != 1], c[keep], k[k != 1])["variation"]
    assert list(found) == [2]
    assert list(Align(wasserstein_1d, min_events=1).distances(
        x[keep, 0], y[k != 1, 0], c[keep], k[k != 1])["variation"]) == [0, 2]  # fmt: skip
    w = torch.where(c == 2, 0.0, 1.0)
    assert list(Align().distances(x, y, c, k, w)["variation"]) == [0, 1]
    # negative and boolean classes are classes
    assert list(Align().distances(x, y, c - 1, k - 1)["variation"]) == [-1, 0, 1]
    assert Align()(x, y, c == 0, k == 0) == Align()(x, y, (c == 0).int(), (k == 0).numpy())


def test_a_batch_with_no_common_class_is_an_error():
    (x, c), (y, k) = events(), events(100, 1)
    with pytest.raises(ValueError, match=r"at least 2 events .* in 'up'; got none. Use larger"):
        Align()(x, {"up": y}, c, {"up": k + 3})


X, C = events(8)
BAD = [
    (lambda: Align("energy"), "metric as a function"),
    (lambda: Align(distance_correlation), "distance of two samples; got distance_corr.*add dist"),
    (
        lambda: Align(partial(partial(distance_correlation), unbiased=True), per_class=False),
        "of the same events",
    ),
    (lambda: Align(weight="a"), "weight as a number of at least 0; got 'a'"),
    (lambda: Align(weight=None), "weight as a number"),
    (lambda: Align(weight=-1.0), "weight as a number of at least 0"),
    (lambda: Align(weight=math.nan), "weight as a number"),
    (lambda: Align(min_events=0), "min_events as a whole number"),
    (lambda: Align()(X, X), "labels of the nominal outputs.*or set per_class=False"),
    (lambda: Align()(X, X, C), "labels of the outputs of 'variation'"),
    (lambda: Align()(X, {"up": X}, C, {"down": C}), r"varied_labels of 'up'; got .*\['down'\]"),
    (lambda: Align()(X, X, C, C.float()), "whole numbers; got torch.float32. Bin a continuous"),
    (lambda: Align()(X, X, C, C[:3]), r"labels of the outputs of 'variation' of shape \(8,\)"),
    (lambda: Align()(X, {}, C, {}), "at least one variation"),
    (lambda: Align()(X, X * math.nan, C, C), "finite outputs of 'variation'; got nan"),
    (lambda: Align()(X[:0], X, C[:0], C), "nominal outputs of shape .* not empty"),
    (lambda: Align()(X[None], X, C, C), r"nominal outputs of shape \(N,\) or \(N, D\)"),
    (lambda: Align()(X, X, C, C, torch.ones(3)), "weights of the nominal outputs of shape"),
    (lambda: Align(per_class=False)(X, X[:, :2]), "same columns; got 3 and 2"),
]


@pytest.mark.parametrize("case", range(len(BAD)))
def test_errors_say_what_was_expected(case):
    call, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        call()


def test_repr_tells_the_metric_and_its_options():
    assert repr(Align(weight=5)) == "Align(energy_distance, per_class=True, weight=5, min_events=2)"
    biased = partial(energy_distance, unbiased=False, chunk=8)
    assert repr(Align(biased, per_class=False, weight=0.5)) == (
        "Align(energy_distance(unbiased=False, chunk=8), per_class=False, weight=0.5, min_events=2)"
    )
    sliced = partial(sliced_wasserstein, p=1, projections=torch.eye(3))
    assert repr(Align(sliced)).startswith("Align(sliced_wasserstein(p=1), per_class=True")

    class Own:
        def __call__(self, x, y):
            return x.mean() - y.mean()

        def __repr__(self):
            return "Own()"

    assert repr(Align(Own())).startswith("Align(Own(), per_class=True")


def test_code_of_the_page_runs():
    page = (ROOT / "docs" / "alignment.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert blocks
    exec("\n".join(blocks), {})


def test_example(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["align_variations.py", "--fast"])
    runpy.run_path(str(ROOT / "examples" / "align_variations.py"), run_name="__main__")
    out = capsys.readouterr().out
    for name in ("alignment alone", "mean-KL", "marginal W1", "class-conditional energy"):
        assert name in out
    rows = [line.split()[-5:] for line in out.split("CPU-s\n")[1].splitlines()]
    assert len(rows) == 6
    assert all(math.isfinite(float(v)) for row in rows for v in row)
