"""Likelihoods, calibrators and filters on disk: as saved in a fresh process, or refused by name."""

import json
import subprocess
import sys

import pytest
import torch
from saved import REAL, files_of, nest, rewrite, rewrite_tensors
from torch import nn
from torch.distributions import MultivariateNormal

import flowpost as fp
from flowpost.goodness import Calibrator, Filter, p_value
from flowpost.likelihood import (
    ExtendedModel,
    FlowLikelihood,
    Latent,
    PointProcess,
    PoissonCounts,
    with_latents,
)
from flowpost.systematics import ConditionedEncoder, MarginalModel, Nuisances, at

SPACE = fp.Product(e=fp.Positive(), x=fp.Real(2), a=fp.Circle())
SENSORS = [[-1.0, 0.1], [0.3, 0.7], [1.0, -0.7]]
PLACED = {"position": "x", "direction": "a"}
N = 12


class Own(nn.Module):
    """A user's encoder of images."""

    def __init__(self, width=4):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(6, width), nn.BatchNorm1d(width))

    def forward(self, x):
        return self.net(x)


class Decoder(nn.Module):
    """A user's decoder, with two names for one weight and a buffer of a mask."""

    def __init__(self, hidden=5):
        super().__init__()
        self.a, self.b = nn.Linear(4, hidden), nn.Linear(hidden, 6)
        self.tied = self.a
        self.register_buffer("dead", torch.tensor([0.0, -torch.inf]))

    def forward(self, z):
        return self.b(torch.tanh(self.a(z))).unflatten(-1, (2, 3))


class Data(nn.Module):
    """A user's cut of the input."""

    def __init__(self, most=3.0):
        super().__init__()
        self.register_buffer("most", torch.tensor(most))

    def forward(self, x):
        return x.clamp_max(self.most)


def head_of(context=4):
    return fp.PosteriorHead(context, SPACE, layers=1, bins=4, hidden=4)


def counts():
    return torch.poisson(torch.full((N, 2, 3), 1.5))


def hits():
    at = torch.tensor(SENSORS)[torch.randint(3, (N, 6))]
    events = torch.cat([at, torch.rand(N, 6, 1)], -1)
    return events, torch.randint(7, (N,))


def flow():
    likelihood = FlowLikelihood(SPACE, 3, "spline", context=4, hidden=6)
    return ExtendedModel(fp.encoders.Tabular(3, 4, hidden=8), head_of(), likelihood)


def grid():
    data = fp.Product(n=fp.Positive(), t=fp.Real(2))
    options = {"context": 3, "hidden": 5, "layers": 1, "coupling": True, "dequantize": 1}
    likelihood = FlowLikelihood(SPACE, data, "affine", **options)
    return ExtendedModel(fp.encoders.Tabular(3, 4, hidden=8), head_of(), likelihood)


def image():
    likelihood = PoissonCounts(SPACE, (2, 3), hidden=8, layers=2)
    return ExtendedModel(Own(), head_of(), likelihood)


def sensors():
    likelihood = PoissonCounts(SPACE, (2, 3), sensors=torch.tensor(SENSORS), hidden=4, **PLACED)
    return ExtendedModel(Own(), head_of(), likelihood)


def process():
    likelihood = PointProcess(SPACE, SENSORS, (0, 1), components=2, hidden=4, layers=1, **PLACED)
    return ExtendedModel(fp.encoders.DeepSets(3, 4, hidden=6), head_of(), likelihood)


def latent():
    behind = Latent(SPACE, 2, 4, "spline", prior="learned", hidden=5)
    likelihood = PoissonCounts(with_latents(SPACE, 2), 6, sensors=[[0.0]] * 6, hidden=4)
    return ExtendedModel(fp.encoders.Tabular(6, 4, hidden=8), head_of(), likelihood, behind)


def users():
    likelihood = PoissonCounts(SPACE, (2, 3), decoder=Decoder())
    return ExtendedModel(Own(), head_of(), likelihood, data=Data())


def bare():
    """No encoder: the context is the data."""
    return ExtendedModel(None, head_of(3), FlowLikelihood(SPACE, 3, "diagonal", hidden=4))


def columns():
    return torch.rand(N, 3) * 3 + 0.1


MODELS = {
    "flow": (flow, columns, {}),
    "flow on a grid": (grid, lambda: columns().ceil(), {}),
    "image": (image, counts, {"encoder": Own}),
    "sensors": (sensors, counts, {"encoder": Own}),
    "process": (process, hits, {}),
    "latent": (latent, lambda: counts().flatten(1), {}),
    "users": (users, counts, {"encoder": Own, "decoder": Decoder, "data": Data}),
    "bare": (bare, columns, {}),
}


def labels():
    return SPACE.pack(
        {"e": torch.rand(N) + 0.5, "x": torch.randn(N, 2), "a": 6.2 * torch.rand(N) - 3.1}
    )


def model_of(name):
    """A model with scales that are set and weights that do something, and inputs of events."""
    torch.manual_seed(0)
    build, draw, _ = MODELS[name]
    model, x, z = build(), draw(), labels()
    model.head.fit_scale(z)
    model.fit_scale(x, z)
    if isinstance(model.encoder, fp.encoders.Encoder):
        model.encoder.fit_scale(*(x if isinstance(x, tuple) else (x,)))
    model.train()
    with torch.no_grad():
        model.encode(x)
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model.eval(), x


def filter_of(name="flow", statistics=("p", "context"), events=160, **options):
    """A filter of a calibrator, whose held-out events repeat a few with noise of their own."""
    model, x = model_of(name)
    many = x.repeat(events // N + 1, *[1] * (x.ndim - 1))[:events]
    if many.shape[1:] == (3,):
        many = many + 0.1 * torch.rand_like(many)
    return Filter(Calibrator(model, statistics, 6, **options).fit(many), 0.06), x


def fresh(name):
    return {part: build() for part, build in MODELS.get(name, MODELS["flow"])[2].items()}


def alike(a, b):
    """Whether everything that the two hold is the same: tensors, types, masks, options."""
    for kind in ("state_dict", "named_buffers"):
        own, other = dict(getattr(a, kind)()), dict(getattr(b, kind)())
        assert own.keys() == other.keys()
        for name, tensor in own.items():
            assert tensor.dtype == other[name].dtype, name
            assert torch.equal(tensor, other[name]), name
    assert type(a) is type(b)
    return repr(a) == repr(b)


@pytest.fixture(params=["run", "run.safetensors"], ids=["directory", "file"])
def path(request, tmp_path):
    return tmp_path / request.param


# ----------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_equal(name, path):
    (model, x), z = model_of(name), labels()
    fp.save(model, path)
    again = fp.load(path, **fresh(name))
    assert alike(again, model)
    assert not any(m.training for m in again.modules())
    assert again.likelihood.config() == model.likelihood.config()
    assert (again.likelihood.custom, again.own_parts()[0]) == (model.likelihood.custom, again.head)
    assert not again.unscaled
    assert torch.equal(again(x).log_prob(z), model(x).log_prob(z))
    ours, theirs = (p_value(m, x, draws=5) for m in (again, model))
    for field in ("p", "two_sided", "z_score", "statistic", "labels"):
        assert torch.equal(getattr(ours, field), getattr(theirs, field))
    full = z if model.latent is None else torch.cat([z, torch.randn(N, 2)], -1)
    torch.manual_seed(1)
    value = model.likelihood.log_prob(model.measured(x), full)
    torch.manual_seed(1)
    assert torch.equal(again.likelihood.log_prob(again.measured(x), full), value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["grid", "process", "latent"])
def test_types_are_kept(name, dtype, path):
    model, _ = model_of({"grid": "flow on a grid"}.get(name, name))
    model.to(dtype)
    fp.save(model, path)
    assert alike(fp.load(path), model)


def test_parts_of_different_types(path):
    model, _ = model_of("users")
    model.likelihood.decoder.double()
    model.data.double()
    fp.save(model, path)
    assert alike(fp.load(path, **fresh("users")), model)


def test_rebuilt_sensors_are_as_given_in_any_precision(path):
    """The typical distance of sensors enters the features: it is of their saved positions."""
    torch.manual_seed(3)
    for place in (torch.randn(7, 2) * 1e3, torch.randn(7, 2).double(), torch.randn(7, 2).half()):
        likelihood = PoissonCounts(SPACE, 7, sensors=place, **PLACED)
        fp.save(ExtendedModel(None, head_of(), likelihood), path)
        again = fp.load(path).likelihood
        assert again.decoder.net.features.step == likelihood.decoder.net.features.step
        assert again.config() == likelihood.config()


@pytest.mark.parametrize(
    ("name", "statistics", "options"),
    [
        ("flow", "p", {}),
        ("flow", ("context", "typicality", "two_sided", "p"), {"by": "e", "bins": 2}),
        ("latent", ("p", "two_sided"), {"max_draws": 12}),
        ("users", "two_sided", {}),
    ],
)
def test_calibrator_and_filter(name, statistics, options, path):
    cut, x = filter_of(name, statistics, 200, **options)
    fp.save(cut, path)
    again = fp.load(path, **fresh(name))
    assert isinstance(again, Filter)
    assert alike(again, cut)
    assert again.threshold == cut.threshold
    assert again.calibrator.config() == cut.calibrator.config()
    assert torch.equal(again(x), cut(x))
    fp.save(cut.calibrator, path)
    again = fp.load(path, **fresh(name))
    assert isinstance(again, Calibrator)
    assert alike(again, cut.calibrator)
    ours, theirs = again.p_value(x), cut.calibrator.p_value(x)
    assert torch.equal(ours.p, theirs.p)
    assert ours.each.keys() == theirs.each.keys()
    assert all(torch.equal(ours.each[k], theirs.each[k]) for k in ours.each)


def test_a_calibrator_without_events(path):
    model, x = model_of("flow")
    fp.save(Filter(Calibrator(model, ("p", "context"), by="e")), path)
    again = fp.load(path)
    assert not again.calibrator.fitted
    with pytest.raises(ValueError, match="Expected a fitted Calibrator"):
        again(x)


def test_a_filter_in_a_fresh_process(path):
    cut, x = filter_of("flow", ("p", "context", "typicality"), 240, by="e", bins=2)
    fp.save(cut, path)
    torch.save(x, path.parent / "x.pt")
    code = (
        "import sys, torch, flowpost as fp; torch.set_num_threads(1)\n"
        "cut, x = fp.load(sys.argv[1]), torch.load(sys.argv[2])\n"
        "found = cut.calibrator.p_value(x)\n"
        "torch.save([cut(x), found.p, found.each, found.labels], sys.argv[3])"
    )
    out = path.parent / "out.pt"
    subprocess.run(
        [sys.executable, "-c", code, path, path.parent / "x.pt", out], check=True, timeout=300
    )
    mask, p, each, means = torch.load(out)
    found = cut.calibrator.p_value(x)
    assert torch.equal(mask, cut(x))
    assert torch.equal(p, found.p)
    assert torch.equal(means, found.labels)
    assert each.keys() == found.each.keys()
    assert all(torch.equal(each[k], found.each[k]) for k in each)


def test_global_random_state_is_untouched(path):
    cut, _ = filter_of(events=90)
    state = torch.get_rng_state()
    fp.save(cut, path)
    fp.load(path)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_written(tmp_path):
    fp.save(filter_of("users", "p")[0], tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["kind"] == "Filter"
    assert config["format_version"] == 1
    assert config["filter"] == {"threshold": 0.06}
    assert config["calibrator"]["statistics"] == ["p"]
    assert config["likelihood"]["type"] == "PoissonCounts"
    assert config["likelihood"]["decoder"]["class"].endswith("Decoder")
    assert config["latent"] is None


# --------------------------------------------------------------------------- modules of the user


def test_missing_modules_are_named(path):
    fp.save(model_of("users")[0], path)
    with pytest.raises(
        ValueError,
        match=r"has an encoder of your own, .*Own. Load it with flowpost.load\('.*', "
        r"encoder=Own\(…\), decoder=Decoder\(…\), data=Data\(…\)\)",
    ):
        fp.load(path)
    with pytest.raises(ValueError, match=r"has a decoder of your own, .*Decoder. Load it"):
        fp.load(path, Own(), data=Data())
    with pytest.raises(ValueError, match=r"has a data module of your own, .*Data. Load it"):
        fp.load(path, Own(), decoder=Decoder())


def test_modules_where_none_belong(path):
    fp.save(model_of("flow")[0], path)
    with pytest.raises(ValueError, match="has no decoder; load it without decoder="):
        fp.load(path, decoder=Decoder())
    with pytest.raises(ValueError, match="has no data module; load it without data="):
        fp.load(path, data=Data())
    fp.save(fp.PosteriorModel(None, head_of()), path)
    with pytest.raises(ValueError, match="has no decoder; load it without decoder="):
        fp.load(path, decoder=Decoder())
    fp.save(head_of(), path)
    with pytest.raises(ValueError, match="holds a head alone; load it without data="):
        fp.load(path, data=Data())


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        (
            {"decoder": lambda: Decoder(7)},
            r"'.*likelihood.decoder.a.weight' of shape \(7, 4\); got \(5, 4\) in .* Build the "
            "decoder as it was saved",
        ),
        (
            {"decoder": lambda: nn.Linear(4, 6)},
            r"'.*likelihood.decoder.weight' in .*Is this the decoder that was saved",
        ),
        (
            {"decoder": nn.Identity},
            r"'.*likelihood.decoder.a.bias' in .* has no place .* Build the decoder",
        ),
        ({"data": nn.Identity}, r"'.*data.most' in .* has no place .* Build the data module"),
        ({"data": lambda: Data([1.0, 2.0])}, r"'.*data.most' of shape \(2,\); got \(\) "),
        ({"encoder": lambda: Own(3)}, r"'.*encoder.net.1.weight' of shape .* Build the encoder"),
    ],
)
@pytest.mark.parametrize("kind", ["model", "filter"])
def test_wrong_modules_are_refused_by_tensor(wrong, text, kind, tmp_path):
    saved = model_of("users")[0] if kind == "model" else filter_of("users", "p")[0]
    fp.save(saved, tmp_path / "run")
    given = fresh("users")
    before = {k: [p.clone() for p in m.parameters()] for k, m in given.items()}
    with pytest.raises(ValueError, match=f"(?s){text}"):
        fp.load(tmp_path / "run", **{**given, **{k: build() for k, build in wrong.items()}})
    for name, module in given.items():
        assert all(
            torch.equal(*pair) for pair in zip(before[name], module.parameters(), strict=True)
        )


def test_a_decoder_that_ties_other_weights(tmp_path):
    fp.save(model_of("users")[0], tmp_path / "run")
    rewrite_tensors(tmp_path / "run", lambda t: t["likelihood.decoder.tied.bias"].add_(1))
    with pytest.raises(ValueError, match=r"decoder.*bias' in .* that the decoder ties to it"):
        fp.load(tmp_path / "run", **fresh("users"))


def test_derived_classes_are_not_saved(tmp_path):
    class Tempered(ExtendedModel):
        pass

    class Wide(PoissonCounts):
        pass

    class Loose(Filter):
        pass

    class Split(Latent):
        pass

    likelihood = FlowLikelihood(SPACE, 3, hidden=4)
    model, _ = model_of("flow")
    latents = FlowLikelihood(with_latents(SPACE, 1), 3, hidden=4)
    for other, text in (
        (Tempered(None, head_of(), likelihood), r"Expected a PosteriorHead, .* got Tempered"),
        (Calibrator(Tempered(None, head_of(), likelihood)), "got Calibrator of Tempered"),
        (Loose(Calibrator(model)), "got Loose"),
        (ExtendedModel(None, head_of(), Wide(SPACE, 3)), "of flowpost; got Wide"),
        (
            ExtendedModel(None, head_of(), latents, Split(SPACE, 1, 4)),
            "Expected a Latent of flowpost; got Split",
        ),
    ):
        with pytest.raises(ValueError, match=f"(?s){text}"):
            fp.save(other, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- what is refused


def test_an_altered_byte_is_refused(path):
    fp.save(filter_of("bare", "p", 40)[0], path)
    for file in files_of(path):
        raw = file.read_bytes()
        for i in [*range(0, len(raw), 41), len(raw) - 1]:
            altered = raw[:i] + bytes([raw[i] ^ 0x5A]) + raw[i + 1 :]
            file.write_bytes(altered)
            with pytest.raises(ValueError, match=path.name):
                fp.load(path)
        file.write_bytes(raw)
    assert isinstance(fp.load(path), Filter)


BIG = 10**12
MANY = {"type": "Product", "spaces": [[f"a{i}", {"type": "Positive"}] for i in range(10**4)]}


def option(part, **values):
    return lambda c: c[part].update(values)


DESCRIPTIONS = [
    # of another version
    ("flow", lambda c: c.update(format_version=2), "format version 1 or earlier; got 2"),
    ("flow", option("likelihood", type="Histogram"), "likelihood of type .*; got 'Hist.*later"),
    ("flow", option("likelihood", type=["x"]), r"likelihood of type .*; got \['x'\]"),
    ("flow", lambda c: c["likelihood"].pop("type"), "likelihood of type .*; got None"),
    ("flow", lambda c: c.update(likelihood="x"), "likelihood of type .*; got 'x'"),
    ("flow", lambda c: c.pop("likelihood"), "likelihood of type .*; got None"),
    ("flow", option("likelihood", type="PoissonCounts"), "cannot be built"),
    ("flow", option("likelihood", type="ExtendedModel"), "likelihood of type"),
    ("flow", option("likelihood", colour="red"), "unexpected keyword argument 'colour'"),
    ("flow", option("likelihood", decoder={"type": "custom"}), "has a decoder of your own, None"),
    ("flow", option("likelihood", decoder={"type": "CNN"}), "Expected a decoder of flowpost"),
    ("flow", option("likelihood", decoder=["x"]), r"description of a decoder in .* got \['x'\]"),
    ("flow", lambda c: c.update(data="x"), "description of a data module in .* got 'x'"),
    ("flow", lambda c: c.update(data={"type": "CNN"}), "Expected a data module of flowpost"),
    ("flow", lambda c: c.update(kind="Sorter"), "Expected kind as PosteriorHead, .*got 'Sorter'"),
    ("flow", lambda c: c.update(kind="PosteriorModel"), "Expected tensor 'encoder.squash"),
    ("flow", lambda c: c.update(kind="Calibrator"), "Expected tensor 'edges' in"),
    ("flow", lambda c: c.pop("filter"), "KeyError: 'filter'"),
    ("flow", lambda c: c.pop("calibrator"), "KeyError: 'calibrator'"),
    ("flow", lambda c: c.update(calibrator="x"), "cannot be built"),
    # sizes of spaces
    ("flow", option("likelihood", data={"type": "Real", "size": BIG}), "data columns; got 1e"),
    ("flow", option("likelihood", data=5), "cannot be built"),
    ("flow", option("likelihood", data=nest(REAL, 60)), "at most 100 levels"),
    ("flow", option("likelihood", space=nest(REAL, 60)), "at most 100 levels"),
    ("flow", option("likelihood", space={"type": "Real", "size": BIG}), "label columns; got 1e"),
    ("flow", option("likelihood", space={"type": "Torus"}), "got 'Torus'"),
    ("flow", option("likelihood", space=REAL), "Expected the likelihood over Product"),
    ("flow", option("likelihood", space=MANY), "Expected the likelihood over Product"),
    ("flow", option("likelihood", data={"type": "Real", "size": 300}), "at most .* pairs of coord"),
    ("latent", option("latent", space={"type": "Real", "size": BIG}), "label columns; got 1e"),
    ("latent", option("latent", space=REAL), "Expected the latent over Product"),
    ("latent", option("latent", size=BIG), "latents; got 1e"),
    ("latent", option("latent", size=100), "at most .* pairs of coordinates"),
    ("latent", option("latent", size=-1), "cannot be built"),
    # sizes of networks
    ("flow", option("likelihood", hidden=10**9), "'.*likelihood.labels.*' of shape"),
    ("flow", option("likelihood", hidden=BIG), "cannot be built"),
    ("flow", option("likelihood", context=10**11), "'.*likelihood.*' of shape"),
    ("flow", option("likelihood", layers=BIG), r"at most \d+ layers"),
    ("flow", option("likelihood", layers=0), "cannot be built"),
    ("flow", option("likelihood", dequantize="x"), "cannot be built"),
    ("flow", option("likelihood", dequantize=-1), "Expected dequantize"),
    ("latent", option("latent", hidden=10**9), "'latent.*' of shape"),
    ("latent", option("latent", context=10**11), "'latent.head.*' of shape"),
    ("latent", option("latent", flow="x"), "Expected flow as one of"),
    ("latent", option("latent", prior="x"), "Expected prior as"),
    ("latent", option("latent", prior="normal"), "Tensor 'latent.prior_head.* no place"),
    ("latent", lambda c: c.update(latent=3), "cannot be built"),
    ("latent", lambda c: c.update(latent=None), "Expected the likelihood over"),
    # sizes of data
    ("image", option("likelihood", shape=[10**6, 10**6]), r"at most \d+ cells; got 1000000000000"),
    ("image", option("likelihood", shape=[2**32, 2**32]), r"at most \d+ cells"),
    ("image", option("likelihood", shape=[[0], 10**9]), "cannot be built"),
    ("image", option("likelihood", shape=["a", 10**9]), "cannot be built"),
    ("image", option("likelihood", shape=[1] * 10**6), "at most 64 sizes; got 1000000"),
    ("image", option("likelihood", shape=BIG), "cannot be built"),
    ("image", option("likelihood", shape=[]), "cannot be built"),
    ("image", option("likelihood", shape=[3, 2, 1]), None),
    ("image", option("likelihood", shape=[2, 4]), r"'likelihood.log_mean' of shape \(8,\)"),
    ("users", option("likelihood", shape=[2**32, 2**32]), r"at most \d+ cells"),
    ("sensors", option("likelihood", sensors=[[0.0, 1.0]] * 10**5), r"at most \d+ sensors; got"),
    ("sensors", option("likelihood", sensors=[[0.0, 1.0]] * 4), "Expected the last dimensions"),
    ("sensors", option("likelihood", sensors=[[0.0], [1.0, 2.0]]), "Expected sensors as"),
    ("sensors", option("likelihood", sensors=BIG), "cannot be built"),
    ("sensors", option("likelihood", sensors="abc"), "Expected sensors as a tensor"),
    ("sensors", option("likelihood", position="q"), "Expected position as the name of a block"),
    ("sensors", option("likelihood", hidden=10**9), "'likelihood.decoder.*' of shape"),
    ("sensors", option("likelihood", layers=BIG), r"at most \d+ layers"),
    ("process", option("likelihood", sensors=[[0.0, 1.0]] * 2), r"sensors' of shape \(2, 2\)"),
    ("process", option("likelihood", components=10**11), "'likelihood.times.*' of shape"),
    ("process", option("likelihood", components=10**18), "cannot be built"),
    ("process", option("likelihood", hidden=10**11), "'likelihood.rates.*' of shape"),
    ("process", option("likelihood", hidden=BIG * BIG), "cannot be built"),
    ("process", option("likelihood", layers=10**9), r"at most \d+ layers"),
    ("process", option("likelihood", window=[1, 0]), "two increasing times"),
    ("process", option("likelihood", window="ab"), "cannot be built"),
    # calibrator and filter
    ("flow", option("calibrator", bins=BIG, by="e"), "'calibrator.edges' of shape"),
    ("flow", option("calibrator", bins=10**20, by="e"), "cannot be built"),
    ("flow", option("calibrator", by="q"), "Expected by as a label column"),
    ("flow", option("calibrator", statistics=["p", "q"]), "Expected statistics as some of"),
    ("flow", option("calibrator", statistics=[["p"]]), "cannot be built"),
    ("flow", option("calibrator", statistics=["p", "two_sided"]), "two_sided' in .*not there"),
    ("flow", option("calibrator", draws=-1), "cannot be built"),
    ("flow", option("calibrator", max_draws="x"), "cannot be built"),
    ("flow", option("calibrator", max_draws=2), "max_draws as a whole number of at least 6"),
    ("flow", option("calibrator", model=None), "multiple values"),
    ("flow", option("filter", threshold=2.0), "Expected a threshold between 0 and 1"),
    ("flow", option("filter", threshold="x"), "cannot be built"),
]  # fmt: skip


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One directory of each model, the first of them as a filter, and as one with bins."""
    folder = tmp_path_factory.mktemp("originals")
    with torch.random.fork_rng(devices=[]):
        for name in MODELS:
            saved = filter_of()[0] if name == "flow" else model_of(name)[0]
            fp.save(saved, folder / name)
        fp.save(filter_of("flow", "p", 160, by="e", bins=4)[0], folder / "binned")
    return folder


def copy_of(folder, path):
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    return path


@pytest.mark.parametrize(("name", "change", "text"), DESCRIPTIONS)
def test_malformed_descriptions_are_refused_by_name(name, change, text, originals, tmp_path):
    path = copy_of(originals / name, tmp_path / "run")
    rewrite(path, change)
    if text is None:
        fp.load(path, **fresh(name))
        return
    with pytest.raises(ValueError, match=f"(?s){text}") as caught:
        fp.load(path, **fresh(name))
    assert str(path) in str(caught.value)


def test_many_coordinates_without_parameters_of_their_own_are_refused(originals, tmp_path):
    path = copy_of(originals / "bare", tmp_path / "run")
    rewrite_tensors(path, lambda t: t.update(filling=torch.zeros(10**5)))
    rewrite(path, option("likelihood", data={"type": "Real", "size": 10**5}))
    with pytest.raises(ValueError, match=r"Expected at most \d+ pairs of coordinates"):
        fp.load(path)


def swap(t):
    t["calibrator.scores_p"][[0, -1]] = t["calibrator.scores_p"][[-1, 0]]


def replaced(name, change):
    return lambda t: t.update({name: change(t[name])})


TENSORS = [
    ("flow", lambda t: t["calibrator.scores_p"][3].fill_(torch.nan), "numbers in .*scores_p.*NaN"),
    ("flow", lambda t: t["calibrator.edges"].fill_(1), None),
    ("flow", swap, "sorted scores in tensor 'calibrator.scores_p'"),
    ("flow", lambda t: t["calibrator.counts_p"].add_(1), "events of each bin in .*counts_p"),
    ("flow", lambda t: t["calibrator.counts_joint"].neg_(), "of each bin in .*counts_joint"),
    (
        "flow",
        lambda t: t.update({"calibrator.scores_p": t["calibrator.scores_p"][:-1].clone()}),
        "events of each bin in tensor 'calibrator.counts_p'",
    ),
    (
        "flow",
        lambda t: [
            t.update({"calibrator.scores_joint": torch.zeros(0, 2, dtype=torch.float64)}),
            t["calibrator.counts_joint"].zero_(),
        ],
        "held-out events of every statistic",
    ),
    (
        "flow",
        lambda t: [
            t.update({"calibrator.scores_p": torch.zeros(0, 2, dtype=torch.float64)}),
            t["calibrator.counts_p"].zero_(),
        ],
        "held-out events of every statistic",
    ),
    ("flow", replaced("calibrator.scores_p", lambda s: s.long()), "of type torch.float64; got"),
    (
        "binned",
        replaced("calibrator.edges", lambda e: e.to(torch.float8_e5m2)),
        "'calibrator.edges' in .* in double precision",
    ),
    (
        "flow",
        replaced("calibrator.scores_p", lambda s: s.to(torch.float8_e5m2)),
        "'calibrator.scores_p' in .* in double precision",
    ),
    ("binned", lambda t: t["calibrator.edges"].neg_(), "increasing numbers in .*edges'"),
    (
        "binned",
        lambda t: t["calibrator.counts_p"].add_(torch.tensor([1, -1, 0, 0])),
        "sorted scores in tensor 'calibrator.scores_p'",
    ),
    (
        "binned",
        lambda t: t["calibrator.counts_p"].copy_(torch.tensor([160, 0, 0, 0])),
        "held-out events of each bin in tensor 'calibrator.counts_p'",
    ),
    ("binned", lambda t: t["calibrator.scores_p"][-1].fill_(torch.inf), None),
    ("flow", replaced("calibrator.scores_p", lambda s: s.flatten()), r"shape \(0, 2\); got"),
    (
        "flow",
        replaced("calibrator.scores_p", lambda s: torch.cat([s, s[:, :1]], 1)),
        "calibrator.scores_p' of shape .* got",
    ),
    ("flow", replaced("calibrator.counts_p", lambda c: c.double()), "of type torch.int64; got"),
    ("flow", lambda t: t["calibrator.contexts.mean"].fill_(torch.inf), "finite numbers in .*mean"),
    ("flow", lambda t: t["calibrator.contexts.whiten"][0].fill_(torch.nan), "finite .*whiten"),
    (
        "flow",
        lambda t: t["calibrator.model.likelihood.head.scale"].neg_(),
        "positive numbers in tensor 'calibrator.model.likelihood.head.scale'",
    ),
    (
        "flow",
        replaced("calibrator.model.likelihood.head.loc", torch.Tensor.double),
        "one type of likelihood tensors",
    ),
    ("flow", lambda t: t["calibrator.model.head.loc"].fill_(torch.nan), "finite .*model.head.loc"),
    ("image", lambda t: t["likelihood.log_mean"].fill_(-torch.inf), "finite .*log_mean"),
    ("image", lambda t: t["encoder.net.2.running_var"].fill_(torch.nan), None),
    ("users", lambda t: t["likelihood.decoder.b.bias"].fill_(torch.nan), "finite .*decoder.b.bias"),
    ("users", lambda t: t["data.most"].fill_(torch.inf), None),
    ("sensors", lambda t: t["likelihood.decoder.net.scale"].zero_(), "positive .*net.scale"),
    (
        "sensors",
        replaced("likelihood.decoder.net.features.sensors", lambda s: s[:2].clone()),
        r"sensors' of shape \(3, 2\); got \(2, 2\) in .* Build the model as it was saved",
    ),
    (
        "process",
        lambda t: t["likelihood.rates.features.sensors"].add_(1),
        "sensors' in .* alike under each name that the model ties to it",
    ),
    ("process", replaced("likelihood.log_mean", torch.Tensor.half), "one type of likelihood"),
    ("latent", lambda t: t["latent.head.loc"].fill_(torch.nan), "finite .*'latent.head.loc'"),
    ("latent", lambda t: t["latent.prior_head.unit"].zero_(), "positive .*prior_head.unit'"),
    ("latent", lambda t: t.pop("latent.labels.net.skip.bias"), "'latent.labels.*not there"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "text"), TENSORS)
def test_malformed_tensors_are_refused_by_name(name, change, text, originals, tmp_path):
    path = copy_of(originals / name, tmp_path / "run")
    rewrite_tensors(path, change)
    if text is None:
        fp.load(path, **fresh(name))
        return
    with pytest.raises(ValueError, match=f"(?s){text}") as caught:
        fp.load(path, **fresh(name))
    assert str(path) in str(caught.value)


def test_what_could_not_be_loaded_is_not_saved(path):
    cut, _ = filter_of("flow", "p")
    with torch.no_grad():
        cut.calibrator.scores_p[:2] = cut.calibrator.scores_p[:2].flip(0)
    with pytest.raises(ValueError, match=r"sorted scores in tensor 'calibrator.scores_p'"):
        fp.save(cut, path)
    model, _ = model_of("process")
    model.likelihood.log_mean.fill_(torch.nan)
    with pytest.raises(ValueError, match=r"finite numbers in tensor 'likelihood.log_mean'"):
        fp.save(model, path)
    model, _ = model_of("flow")
    model.likelihood.head.double()
    with pytest.raises(ValueError, match="one type of likelihood tensors"):
        fp.save(model, path)
    with pytest.raises(ValueError, match="max_draws as a whole number of at least 200"):
        fp.save(Calibrator(model_of("flow")[0], max_draws=20), path)
    assert not path.exists()


# ------------------------------------------------------------------ models told their nuisances

PRIOR = Nuisances({("a", "b"): MultivariateNormal(torch.ones(2), 0.2 * torch.eye(2))})


def told(inner=None, width=3, context=4):
    encoder = ConditionedEncoder(inner, PRIOR, context=context)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(context + 2, fp.Real(2), "affine"))
    with torch.no_grad():
        encoder.mix[-1].weight.normal_()
        model.head.flow.weight.normal_(0, 0.3)
    return model.eval()


def inferred():
    inner = fp.encoders.Tabular(3, 4, hidden=4, layers=1)
    return fp.PosteriorModel(inner, fp.PosteriorHead(4, PRIOR.space, "diagonal")).eval()


@pytest.mark.parametrize("own", ["an encoder", "no encoder", "one alternative of three"])
def test_an_encoder_that_is_told_nuisances_is_built_again(own, path):
    inner = None if own == "no encoder" else fp.encoders.Tabular(3, 4, hidden=4, layers=1)
    model, nu = told(inner), torch.tensor([1.2, 0.7])
    if own == "one alternative of three":
        encoder = ConditionedEncoder(inner, 3, context=4, hidden=0).double()
        model = fp.PosteriorModel(encoder, fp.PosteriorHead(7, fp.Real(2)).double()).eval()
        nu = torch.eye(3)[0].double()
    fp.save(model, path)
    again = fp.load(path)
    assert alike(again, model)
    assert again.encoder.names == model.encoder.names
    assert again.encoder.config() == model.encoder.config()
    x, z = at(torch.randn(5, 4 if inner is None else 3).to(nu), nu), torch.zeros(5, 2).to(nu)
    assert torch.equal(again(x).log_prob(z), model(x).log_prob(z))


def test_one_around_a_network_of_ones_own_is_given_again(path):
    model = told(nn.Linear(3, 4))
    fp.save(model, path)
    with pytest.raises(ValueError, match=r"encoder of your own, .*ConditionedEncoder. Load it"):
        fp.load(path)
    again = fp.load(path, encoder=ConditionedEncoder(nn.Linear(3, 4), PRIOR, context=4))
    assert alike(again, model)


@pytest.mark.parametrize("nuisances", ["a model", "draws"])
def test_a_model_with_its_nuisances(nuisances, path):
    inner = fp.encoders.Tabular(3, 4, hidden=4, layers=1)
    of = inferred() if nuisances == "a model" else PRIOR.sample(20, seed=0)
    both = MarginalModel(told(inner), of, draws=16).eval()
    fp.save(both, path)
    again = fp.load(path)
    assert isinstance(again, MarginalModel)
    assert again.draws == 16
    assert alike(again, both)
    assert not any(m.training for m in again.modules())
    x, z = torch.randn(5, 3), torch.zeros(5, 2)
    assert torch.equal(again(x).log_prob(z), both(x).log_prob(z))
    with pytest.raises(ValueError, match="no encoder of your own; load it without encoder="):
        fp.load(path, encoder=inner)


def test_a_model_with_nuisances_and_a_network_of_ones_own_says_what_to_do(path):
    both = MarginalModel(told(nn.Linear(3, 4)), inferred())
    text = r"its model is another.*Save model.model and model.nuisances by themselves, and build"
    with pytest.raises(ValueError, match=text):
        fp.save(both, path)

    class Other(MarginalModel):
        pass

    with pytest.raises(ValueError, match=r"got Other of PosteriorModel for .* their parts alone"):
        fp.save(Other(told(), inferred()), path)
    assert not path.exists()


PAIRS = [
    (lambda c: c.pop("model"), "PosteriorModel as the model of the MarginalModel"),
    (lambda c: c["model"].update(kind="Filter"), "PosteriorModel as the model of the Marginal"),
    (lambda c: c.update(nuisances=None), "PosteriorModel as the nuisances of the MarginalModel"),
    (lambda c: c.update(nuisances=3), "PosteriorModel as the nuisances of the MarginalModel"),
    (lambda c: c.update(draws=0), "draws as a whole number"),
    (lambda c: c.pop("draws"), "cannot be built"),
    (lambda c: c["nuisances"]["head"].update(context=10**11), "of shape"),
    (lambda c: c["model"]["encoder"].update(context=10**11), "of shape"),
    (lambda c: c["model"]["encoder"].update(hidden=10**11), "of shape"),
    (lambda c: c["model"]["encoder"].update(hidden="x"), "cannot be built"),
    (lambda c: c["model"]["encoder"].update(nuisances=10**11), "of shape"),
    (
        lambda c: c["model"]["encoder"].update(nuisances=["c", "d"]),
        "of the nuisances c, d; got one",
    ),
    (lambda c: c["model"]["encoder"].pop("nuisances"), "cannot be built"),
    (lambda c: c["model"]["encoder"]["encoder"].update(layers=10**9), r"at most \d+ layers"),
    (lambda c: c["model"]["encoder"]["encoder"].update(type="as_tensor"), "an encoder of flowpost"),
    (lambda c: c["model"]["encoder"].update(encoder="x"), "an encoder of flowpost"),
    (
        lambda c: c["model"]["encoder"].update(encoder=dict(c["model"]["encoder"])),
        "an encoder of flowpost.*got .ConditionedEncoder of",
    ),
]


@pytest.mark.parametrize(("change", "text"), PAIRS)
def test_malformed_pairs_are_refused_by_name(change, text, tmp_path):
    inner = fp.encoders.Tabular(3, 4, hidden=4, layers=1)
    fp.save(MarginalModel(told(inner), inferred()), tmp_path / "run")
    rewrite(tmp_path / "run", change)
    with pytest.raises(ValueError, match=text):
        fp.load(tmp_path / "run")


def test_a_tensor_of_neither_model_is_refused(tmp_path):
    fp.save(MarginalModel(told(), PRIOR.sample(9, seed=0)), tmp_path / "run")
    rewrite_tensors(tmp_path / "run", lambda t: t.update(other=torch.zeros(1)))
    with pytest.raises(ValueError, match=r"Tensor 'other' in .* has no place in a MarginalModel"):
        fp.load(tmp_path / "run")


def test_calibrators_of_before_keep_their_draws(tmp_path):
    """Held-out events all had the same draws: new ones have them too."""
    model, x = model_of("flow")
    calibrator = Calibrator(model, draws=6, max_draws=6).fit(torch.cat([x] * 4))
    fp.save(calibrator, tmp_path / "run")
    rewrite(tmp_path / "run", lambda c: c["calibrator"].update(max_draws=None))
    again = fp.load(tmp_path / "run")
    assert again.max_draws == 6
    assert torch.equal(again.p_value(x).p, calibrator.p_value(x).p)
