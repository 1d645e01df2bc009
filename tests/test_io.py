"""Models on disk: bit-equal after a round trip, refused where a byte differs, nothing executes."""

import ast
import hashlib
import json
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from saved import REAL, files_of, nest, rewrite, rewrite_tensors
from torch import nn

import flowpost as fp
from flowpost import io
from flowpost.spaces import Circle, Interval, Positive, Product, Real

SPACE = Product(e=Positive(clip=1e-5), x=Real(2), y=Interval(-1.0, 0.7))


class Own(nn.Module):
    """A user's encoder, with buffers and two names for one weight."""

    def __init__(self, width=4):
        super().__init__()
        self.a = nn.Linear(2, width)
        self.norm = nn.BatchNorm1d(width)
        self.tied = self.a

    def forward(self, x):
        return self.norm(self.a(x))


ENCODERS = {
    "tabular": (lambda: fp.encoders.Tabular(2, 4, hidden=8), (5, 2)),
    "cnn": (lambda: fp.encoders.CNN(1, 4, width=2), (5, 1, 4, 4)),
    "lstm": (lambda: fp.encoders.LSTM(2, 4, hidden=3), (5, 3, 2)),
    "deep sets": (lambda: fp.encoders.DeepSets(2, 4, hidden=8), (5, 3, 2)),
    "none": (lambda: None, (5, 4)),
}


def model_of(encoder, flow="spline", **options):
    torch.manual_seed(0)
    head = fp.PosteriorHead(4, SPACE, flow, layers=2, bins=4, hidden=4, **options)
    model = fp.PosteriorModel(encoder, head)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    head.fit_scale(torch.rand(50, 4) * 0.6 + 0.05)
    return model.eval()


@pytest.fixture(params=["run", "run.safetensors"], ids=["directory", "file"])
def path(request, tmp_path):
    return tmp_path / request.param


LABELS = torch.tensor([[0.5, 0.0, 0.1, 0.3]])


@pytest.mark.parametrize("name", ENCODERS)
def test_round_trip_is_bit_equal(name, path):
    build, shape = ENCODERS[name]
    x = torch.randn(shape)
    model = model_of(build())
    if model.encoder is not None:
        model.encoder.fit_scale(x)
    fp.save(model, path)
    again = fp.load(path)
    assert isinstance(again, fp.PosteriorModel)
    assert not any(m.training for m in again.modules())
    assert again.head.space == SPACE
    assert torch.equal(again(x).log_prob(LABELS), model(x).log_prob(LABELS))
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    assert torch.equal(again(x).sample((3,), generators[0]), model(x).sample((3,), generators[1]))
    assert again.head.fitted


@pytest.mark.parametrize("flow", ["mse", "diagonal", "affine", "spline"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_head_alone_in_any_rung_and_type(flow, dtype, path):
    head = model_of(None, flow, coupling=flow == "spline", dropout=0.2).head.to(dtype)
    fp.save(head, path)
    again = fp.load(path)
    assert isinstance(again, fp.PosteriorHead)
    assert again.config() == head.config()
    for (name, a), (other, b) in zip(
        head.state_dict().items(), again.state_dict().items(), strict=True
    ):
        assert name == other
        assert a.dtype == b.dtype
        assert torch.equal(a, b)


def test_round_trip_in_a_fresh_process(path):
    model = model_of(fp.encoders.Tabular(2, 4, hidden=8))
    x = torch.randn(20, 2)
    fp.save(model, path)
    torch.save({"x": x}, path.parent / "x.pt")
    code = (
        "import sys, torch, flowpost as fp; torch.set_num_threads(1)\n"
        "x = torch.load(sys.argv[2])['x']\n"
        "q = fp.load(sys.argv[1])(x)\n"
        "z = torch.tensor([[0.5, 0.0, 0.1, 0.3]])\n"
        "torch.save(q.log_prob(z).detach(), sys.argv[3])"
    )
    out = path.parent / "out.pt"
    subprocess.run(
        [sys.executable, "-c", code, path, path.parent / "x.pt", out], check=True, timeout=300
    )
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        assert torch.equal(torch.load(out), model(x).log_prob(LABELS))
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------ a user's own encoder


def test_own_encoder_is_filled(path):
    model = model_of(Own())
    model.train()(torch.randn(50, 2))
    model.eval()
    x = torch.randn(5, 2)
    fp.save(model, path)
    again = fp.load(path, encoder=Own())
    assert torch.equal(again(x).log_prob(LABELS), model(x).log_prob(LABELS))
    assert again.encoder.norm.num_batches_tracked == 1
    assert again.encoder.tied is again.encoder.a
    with pytest.raises(ValueError, match=r"an encoder of your own, .*Own. Load it with .*encoder="):
        fp.load(path)


def test_types_of_encoder_and_head_are_kept(path):
    class Wide(Own):
        def forward(self, x):
            return super().forward(x.double())

    model = model_of(Wide())
    model.encoder.double()
    x = torch.randn(5, 2)
    fp.save(model, path)
    again = fp.load(path, encoder=Wide().double())
    assert again.head.loc.dtype == torch.float32
    assert again.encoder.a.weight.dtype == torch.float64
    assert torch.equal(again(x).log_prob(LABELS), model(x).log_prob(LABELS))


def test_an_own_class_of_a_name_of_flowpost_is_the_users(path):
    class Tabular(fp.encoders.Tabular):
        def forward(self, x):
            return super().forward(x) + 1

    model, x = model_of(Tabular(2, 4, hidden=8)), torch.randn(5, 2)
    fp.save(model, path)
    with pytest.raises(ValueError, match=r"an encoder of your own, .*Tabular. Load it with"):
        fp.load(path)
    again = fp.load(path, encoder=Tabular(2, 4, hidden=8))
    assert torch.equal(again(x).log_prob(LABELS), model(x).log_prob(LABELS))


class Tied(nn.Module):
    """A user's encoder with one Parameter in two modules, and a buffer of a mask."""

    def __init__(self, tie=True):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)
        if tie:
            self.b.weight = self.a.weight
        self.register_buffer("attention", torch.full((2,), -torch.inf))

    def forward(self, x):
        return self.b(self.a(x.to(self.a.weight.dtype))).float()


def test_tied_weights_stay_tied(path):
    model, x = model_of(Tied().double()), torch.randn(5, 4)
    fp.save(model, path)
    again = fp.load(path, encoder=Tied())
    assert again.encoder.a.weight is again.encoder.b.weight
    assert again.encoder.a.weight.dtype == torch.float64
    assert torch.equal(again(x).log_prob(LABELS), model(x).log_prob(LABELS))
    fp.save(model_of(Tied(tie=False)), path)
    with pytest.raises(ValueError, match=r"Expected tensor 'encoder.a.weight' in .* ties to it"):
        fp.load(path, encoder=Tied())


def test_masks_of_the_conditioners_have_the_type_of_the_head(path):
    head = model_of(None).head.to(torch.bfloat16)
    fp.save(head, path)
    for (name, a), (_, b) in zip(head.named_buffers(), fp.load(path).named_buffers(), strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), name


def test_numbers_of_numpy_are_saved(path):
    head = fp.PosteriorHead(
        np.int64(3),
        Real(np.int64(2)),
        hidden=np.int64(16),
        layers=np.int32(1),
        bins=np.int64(4),
        coupling=np.bool_(True),
        dropout=np.float32(0.5),
    )
    encoder = fp.encoders.Tabular(np.int64(2), np.int64(3), hidden=np.int64(8))
    fp.save(fp.PosteriorModel(encoder, head), path)
    again = fp.load(path)
    assert again.head.config() == head.config()
    assert again.encoder.config() == encoder.config()


@pytest.mark.parametrize("dropout", [1.0, -0.1, float("nan"), "0.1"])
def test_dropout_is_a_share(dropout):
    with pytest.raises(ValueError, match="Expected dropout as a share of at least 0 and below 1"):
        fp.PosteriorHead(2, Real(1), dropout=dropout)


def test_mismatch_names_the_tensor(path):
    fp.save(model_of(Own()), path)
    with pytest.raises(
        ValueError, match=r"Expected tensor 'encoder.a.weight' of shape \(7, 2\); got"
    ):
        fp.load(path, encoder=Own(7))
    with pytest.raises(ValueError, match=r"Expected tensor 'encoder.weight' in .*not there"):
        fp.load(path, encoder=nn.Linear(2, 4))
    with pytest.raises(ValueError, match=r"Tensor 'encoder.a.bias' in .* has no place .*others"):
        fp.load(path, encoder=nn.Identity())


def test_encoder_where_none_belongs(path):
    fp.save(model_of(None), path)
    with pytest.raises(ValueError, match="has no encoder; load it without encoder="):
        fp.load(path, encoder=Own())
    fp.save(model_of(None).head, path)
    with pytest.raises(ValueError, match="holds a head alone; load it without encoder="):
        fp.load(path, encoder=Own())


# ------------------------------------------------------------------------------- what is refused


def test_files_from_before_a_buffer_existed(tmp_path):
    """A head in a file without them had no references, and its splines had done waiting."""
    head = fp.PosteriorHead(3, Product(a=Circle(), b=Real(2)), layers=1, hidden=4).double()
    if "flow.waited" in head.state_dict():
        head.flow.waited.fill_(2.0)
    model = fp.PosteriorModel(None, head.eval())
    fp.save(model, tmp_path / "run")
    later = ("head.referenced", "head.flow.waited")
    rewrite_tensors(tmp_path / "run", lambda t: [t.pop(name, None) for name in later])
    again = fp.load(tmp_path / "run")
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert tensor.dtype == model.state_dict()[name].dtype
        assert torch.equal(tensor, model.state_dict()[name]), name
    context, z = torch.randn(5, 3).double(), torch.rand(5, 3).double()
    assert torch.equal(again(context).log_prob(z), model(context).log_prob(z))
    rewrite_tensors(
        tmp_path / "run", lambda t: [t.pop("head.fitted"), t.pop("head.referenced", None)]
    )
    with pytest.raises(ValueError, match=r"Expected tensor 'head.fitted' in .* it is not there"):
        fp.load(tmp_path / "run")


def test_what_earlier_files_lack_is_of_heads_alone():
    """Whatever a user's encoder calls its buffers, they are not made up."""
    model = fp.PosteriorModel(nn.Linear(2, 3), fp.PosteriorHead(3, Real(1), "affine"))
    model.head.flow.register_buffer("waited", torch.zeros(()))
    model.encoder.register_buffer("referenced", torch.zeros(1, dtype=torch.bool))
    tensors = {"head.loc": torch.zeros(1, dtype=torch.float64)}
    io.build.complete(model, tensors)
    assert set(tensors) == {"head.loc", "head.referenced", "head.flow.waited"}
    assert tensors["head.flow.waited"].dtype == torch.float64
    assert tensors["head.flow.waited"] == 2
    assert tensors["head.referenced"].tolist() == [False]


def test_an_altered_byte_is_refused(path):
    fp.save(fp.PosteriorHead(0, Real(1), "diagonal"), path)
    for file in files_of(path):
        raw = file.read_bytes()
        positions = range(len(raw)) if len(raw) < 1500 else [*range(0, len(raw), 5), len(raw) - 1]
        for flip in (0x01, 0x20, 0xFF):
            for i in positions:
                altered = raw[:i] + bytes([raw[i] ^ flip]) + raw[i + 1 :]
                # JSON means the same with one blank for another
                if raw[i : i + 1].isspace() and altered[i : i + 1].isspace():
                    continue
                file.write_bytes(altered)
                with pytest.raises(ValueError, match=path.name):
                    fp.load(path)
        file.write_bytes(raw)
    assert isinstance(fp.load(path), fp.PosteriorHead)


def test_exponents_in_capitals_are_an_altered_byte_too(tmp_path):
    fp.save(fp.PosteriorHead(0, Positive(clip=1e-5), "diagonal"), tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    text = file.read_text()
    assert "1e-05" in text
    file.write_text(text.replace("1e-05", "1E-05"))
    with pytest.raises(ValueError, match="altered"):
        fp.load(tmp_path / "run")


def test_a_shortened_or_lengthened_file_is_refused(path):
    fp.save(model_of(None), path)
    for file in files_of(path):
        raw = file.read_bytes()
        for altered in (b"", raw[:7], raw[:-3], raw[: len(raw) // 2], raw + b"x"):
            file.write_bytes(altered)
            with pytest.raises(ValueError, match=r"no model of flowpost|altered"):
                fp.load(path)
        file.write_bytes(raw)
    fp.load(path)


def test_swapped_weights_are_refused(tmp_path):
    fp.save(model_of(None), tmp_path / "a")
    other = model_of(None)
    with torch.no_grad():
        other.head.flow.bias[0] += 1e-6
    fp.save(other, tmp_path / "b")
    weights = (tmp_path / "b" / "weights.safetensors").read_bytes()
    (tmp_path / "a" / "weights.safetensors").write_bytes(weights)
    with pytest.raises(ValueError, match="checksum differs"):
        fp.load(tmp_path / "a")


class Trap:
    """A pickle that would execute."""

    def __reduce__(self):
        return (open, ("trapped", "w"))


def test_a_renamed_pickle_is_refused_and_not_executed(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trap = pickle.dumps(Trap())
    if path.suffix:
        path.write_bytes(trap)
    else:
        fp.save(model_of(None), path)
        (path / "weights.safetensors").write_bytes(trap)
    with pytest.raises(ValueError, match="pickles never are"):
        fp.load(path)
    torch.save(model_of(None).state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no model of flowpost"):
        fp.load(tmp_path / "model.safetensors")
    assert not (tmp_path / "trapped").exists()


@pytest.mark.parametrize("name", ["__init__", "build", "checks", "describe", "files", "sizes"])
def test_no_pickle_in_the_modules(name):
    folder = Path(io.__file__).parent
    assert len(list(folder.glob("*.py"))) == 6
    tree = ast.parse((folder / f"{name}.py").read_text())
    names = {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {a.name for a in node.names} | {getattr(node, "module", None)}
    assert not names & {
        "pickle",
        "dill",
        "joblib",
        "cloudpickle",
        "marshal",
        "eval",
        "exec",
        "shelve",
    }
    calls = {
        f"{n.func.value.id}.{n.func.attr}"
        for n in ast.walk(tree)
        if isinstance(n, ast.Call)
        and isinstance(n.func, ast.Attribute)
        and isinstance(n.func.value, ast.Name)
    }
    assert not calls & {"torch.load", "torch.save"}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (
            lambda c: c.update(format_version=2),
            "format version 1 or earlier; got 2 .*Update flowpost",
        ),
        (lambda c: c.update(format_version="1"), "format version 1 or earlier; got '1'"),
        (lambda c: c.pop("format_version"), "format version 1 or earlier; got None"),
        (lambda c: c.update(format="other"), "no model of flowpost"),
        (lambda c: c["head"]["space"].update(type="Torus"), "got 'Torus'"),
        (lambda c: c["head"].update(colour="red"), "Expected the description of a model"),
        (lambda c: c.pop("head"), "Expected the description of a model"),
        (lambda c: c.update(encoder={"type": "Encoder"}), "Expected an encoder of flowpost"),
        (lambda c: c.update(encoder={"type": "annotations"}), "Expected an encoder of flowpost"),
        (
            lambda c: c.update(encoder={"type": "Tabular", "x": 1}),
            "Tabular.* unexpected keyword argument 'x'",
        ),
        (lambda c: c["head"].update(bins=5), r"Expected tensor 'head.flow"),
    ],
)
def test_descriptions_of_another_version(change, text, tmp_path):
    fp.save(model_of(fp.encoders.Tabular(2, 4, hidden=8)), tmp_path / "run")
    rewrite(tmp_path / "run", lambda c: None)
    fp.load(tmp_path / "run")
    rewrite(tmp_path / "run", change)
    with pytest.raises(ValueError, match=text):
        fp.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda c: c["head"].update(hidden=10**11), "Expected tensor 'head.flow.*' of shape"),
        (lambda c: c["head"].update(bins=10**11), "Expected tensor 'head.flow.*' of shape"),
        (lambda c: c["head"].update(hidden=10**19), "cannot be built"),
        (lambda c: c["head"].update(hidden=10**4000), "cannot be built"),
        (lambda c: c["head"].update(layers=10**9), r"at most \d+ pairs"),
        (lambda c: c["head"].update(layers="aaaa"), "cannot be built"),
        (lambda c: c["head"].update(hidden=float("inf")), "no model of flowpost"),
        (lambda c: c["head"].update(dropout=float("nan")), "no model of flowpost"),
        (lambda c: c["head"].update(hidden="abc"), "cannot be built"),
        (lambda c: c["head"].update(dropout=1.5), "Expected dropout as a share"),
        (lambda c: c["head"].update(space=nest(REAL, 60)), "at most 100 levels"),
        (lambda c: c["head"].update(flow=["spline"]), "Expected flow as one of"),
        (lambda c: c["head"].update(space=nest(REAL, 300)), "at most 100 levels"),
        (lambda c: c["head"].update(space={"type": "Real", "size": 10**12}), "label columns"),
        (
            lambda c: c["head"].update(
                space={"type": "Interval", "low": 0, "high": 1, "size": 10**12}
            ),
            "label columns; got 1e",
        ),
        (lambda c: c["head"].update(space={"type": "Real", "size": [1]}), "cannot be built"),
        (
            lambda c: c["head"].update(space={"type": "Product", "spaces": [["a", REAL]] * 2}),
            "each name of a Product once",
        ),
        (lambda c: c.update(head="head"), "cannot be built"),
        (lambda c: c["encoder"].update(hidden=-3), "cannot be built"),
        (lambda c: c["encoder"].update(hidden=10**8), "Expected tensor 'encoder.*' of shape"),
        (lambda c: c["encoder"].update(hidden=10**12), "cannot be built"),
        (lambda c: c["encoder"].update(layers=10**12), r"at most \d+ layers"),
        (lambda c: c.update(encoder={"type": "CNN", "blocks": 10**12}), r"at most \d+ blocks"),
        (lambda c: c.update(encoder="Tabular"), "description of an encoder in .*got 'Tabular'"),
        (lambda c: c.update(encoder={"type": ["CNN"]}), "Expected an encoder of flowpost"),
        (lambda c: c.update(kind="Model"), "Expected kind as .*got 'Model'"),
        (lambda c: c.update(kind=["PosteriorModel"]), "Expected kind as .*got"),
        (lambda c: c.pop("kind"), "Expected kind as .*got None"),
        (lambda c: c.update(format_version=0), "Expected format version 1 .*got 0"),
        (lambda c: c.update(format_version=True), "Expected format version 1 .*got True"),
    ],
)
def test_malformed_descriptions_are_refused_by_name(change, text, tmp_path):
    fp.save(model_of(fp.encoders.Tabular(2, 4, hidden=8)), tmp_path / "run")
    rewrite(tmp_path / "run", change)
    with pytest.raises(ValueError, match=f"(?s){text}") as caught:
        fp.load(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


@pytest.mark.parametrize("depth", [400, 10**5])
def test_deeply_nested_products_are_refused(depth, tmp_path):
    fp.save(fp.PosteriorHead(0, Real(1), "diagonal"), tmp_path / "run")
    file = tmp_path / "run" / "config.json"
    config = json.loads(file.read_text())
    config["head"]["space"], config["sha256"] = "SPACE", "0" * 64
    space = '{"type": "Product", "spaces": [["a", ' * depth + json.dumps(REAL) + "]]}" * depth
    text = json.dumps(config).replace('"SPACE"', space)
    weights = (tmp_path / "run" / "weights.safetensors").read_bytes()
    file.write_text(text.replace("0" * 64, hashlib.sha256(text.encode() + weights).hexdigest()))
    with pytest.raises(ValueError, match=r"at most 100 levels|recursion") as caught:
        fp.load(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


def test_many_coordinates_without_parameters_of_their_own_are_refused(tmp_path):
    fp.save(fp.PosteriorHead(0, Real(1), "diagonal"), tmp_path / "run")
    rewrite_tensors(tmp_path / "run", lambda t: t.update(loc=torch.zeros(10**5)))
    rewrite(tmp_path / "run", lambda c: c["head"]["space"].update(size=10**5))
    with pytest.raises(ValueError, match=r"Expected at most \d+ pairs of coordinates"):
        fp.load(tmp_path / "run")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda t: t["head.scale"].neg_(), "positive numbers in tensor 'head.scale'"),
        (lambda t: t["head.unit"].zero_(), "positive numbers in tensor 'head.unit'"),
        (lambda t: t["encoder.squash.scale"].zero_(), "positive numbers in tensor 'encoder.sq"),
        (lambda t: t["head.loc"].fill_(torch.nan), "finite numbers in tensor 'head.loc'"),
        (lambda t: t["head.flow.bias"].fill_(torch.inf), "finite numbers in tensor 'head.flow.b"),
        (lambda t: t["encoder.skip.bias"].fill_(torch.nan), "finite numbers in tensor 'encoder"),
        (lambda t: t.update({"head.scale": t["head.scale"].half()}), "one type of head tensors"),
        (
            lambda t: t.update({"encoder.skip.bias": t["encoder.skip.bias"].double()}),
            "one type of encoder tensors",
        ),
        (
            lambda t: t.update({"head.loc": t["head.loc"].long()}),
            "'head.loc' of type torch.float32; got torch.int64",
        ),
        (
            lambda t: t.update({"head.fitted": t["head.fitted"].float()}),
            "'head.fitted' of type torch.bool; got torch.float32",
        ),
    ],
)
def test_malformed_tensors_are_refused_by_name(change, text, tmp_path):
    fp.save(model_of(fp.encoders.Tabular(2, 4, hidden=8)), tmp_path / "run")
    rewrite_tensors(tmp_path / "run", change)
    with pytest.raises(ValueError, match=text) as caught:
        fp.load(tmp_path / "run")
    assert str(tmp_path / "run") in str(caught.value)


def test_what_could_not_be_loaded_is_not_saved(path):
    model = model_of(None)
    with torch.no_grad():
        model.head.flow.bias[0] = torch.nan
    with pytest.raises(ValueError, match=r"finite numbers in tensor 'head.flow.bias'"):
        fp.save(model, path)
    nested = Real(1)
    for _ in range(60):
        nested = Product(a=nested)
    with pytest.raises(ValueError, match="at most 100 levels"):
        fp.save(fp.PosteriorHead(0, nested, "diagonal"), path)
    with pytest.raises(ValueError, match=r"can describe in JSON; got .*object.* Build the model"):
        fp.save(model_of(fp.encoders.Tabular(2, 4, hidden=8, missing=object())), path)
    assert not path.exists()


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="there is nothing"):
        fp.load(tmp_path / "absent")
    with pytest.raises(ValueError, match=r"Expected config.json in"):
        fp.load(tmp_path)


# ------------------------------------------------------------------------------------- writing


def test_what_is_written(tmp_path):
    fp.save(model_of(None), tmp_path / "deep" / "run")
    assert sorted(p.name for p in (tmp_path / "deep" / "run").iterdir()) == [
        "config.json",
        "weights.safetensors",
    ]
    config = json.loads((tmp_path / "deep" / "run" / "config.json").read_text())
    assert config["format_version"] == io.FORMAT_VERSION == 1
    assert config["flowpost_version"] == fp.__version__
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["run"]


def test_overwrites_a_model(path):
    first, second = model_of(None), model_of(None, "affine")
    fp.save(first, path)
    fp.save(second, path)
    assert fp.load(path).head.config() == second.head.config()
    assert len(list(path.parent.iterdir())) == 1


def test_a_failure_leaves_the_old_model(path, monkeypatch):
    model = model_of(None)
    fp.save(model, path)

    def fail(*args):
        raise OSError("disk full")

    for name in ("replace", "fdopen") if path.suffix else ("replace",):
        with monkeypatch.context() as patch:
            patch.setattr(io.files.os, name, fail)
            with pytest.raises(OSError, match="disk full"):
                fp.save(model_of(None, "affine"), path)
        assert fp.load(path).head.config() == model.head.config()
        assert len(list(path.parent.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(io.files, "save_tensors", fail)
        with pytest.raises(OSError, match="disk full"):
            fp.save(model_of(None, "affine"), path)
    assert fp.load(path).head.config() == model.head.config()
    assert len(list(path.parent.iterdir())) == 1


def test_a_failure_between_the_two_moves_restores_the_old_model(tmp_path, monkeypatch):
    model = model_of(None)
    fp.save(model, tmp_path / "run")
    replace, calls = io.files.os.replace, []

    def second_fails(*args):
        calls.append(args)
        if len(calls) == 2:
            raise OSError("disk full")
        return replace(*args)

    monkeypatch.setattr(io.files.os, "replace", second_fails)
    with pytest.raises(OSError, match="disk full"):
        fp.save(model_of(None, "affine"), tmp_path / "run")
    assert fp.load(tmp_path / "run").head.config() == model.head.config()


def test_refuses_to_overwrite_other_files(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"holds other files. Name a new directory"):
        fp.save(model_of(None), tmp_path / "run")
    assert (tmp_path / "run" / "thesis.tex").read_text() == "years of work"
    with pytest.raises(ValueError, match=r"got a file. For a single file end the name in .safet"):
        fp.save(model_of(None), tmp_path / "run" / "thesis.tex")
    assert [p.name for p in tmp_path.iterdir()] == ["run"]


def test_refuses_other_modules(tmp_path):
    with pytest.raises(
        ValueError, match=r"Expected a PosteriorHead, .* or SummaryModel; got Linear"
    ):
        fp.save(nn.Linear(2, 2), tmp_path / "run")

    class Tempered(fp.PosteriorHead):
        pass

    head = Tempered(4, SPACE, layers=1)
    for model in (head, fp.PosteriorModel(None, head)):
        with pytest.raises(ValueError, match=r"Expected a PosteriorHead, .* .*Tempered"):
            fp.save(model, tmp_path / "run")


def test_global_random_state_is_untouched(path):
    model = model_of(fp.encoders.Tabular(2, 4, hidden=8))
    state = torch.get_rng_state()
    fp.save(model, path)
    fp.load(path)
    assert torch.equal(torch.get_rng_state(), state)
