"""Generators on disk: they draw and say as before, or are refused by name."""

import json
import subprocess
import sys

import pytest
import torch
from saved import nest, rewrite, rewrite_tensors
from torch import nn

import flowpost as fp
from flowpost.generators import GroupSums, Library, NoiseNetwork, Student, Teacher, TwoStep
from flowpost.likelihood import ExtendedModel, FlowLikelihood, PointProcess, PoissonCounts

SPACE = fp.Product(e=fp.Positive(), x=fp.Real(2), a=fp.Circle())
DATA = fp.Product(n=fp.Positive(), t=fp.Interval(0.0, 2.0), q=fp.Real(2))
SMALL = {
    "layers": 2,
    "bins": 4,
    "hidden": 6,
    "depth": 2,
    "context": 4,
    "label_hidden": 6,
    "label_layers": 1,
}
SIZES = [3, 2, 4]
SENSORS = [[-1.0, 0.1], [0.3, 0.7], [1.0, -0.7]]
N = 12


def teacher():
    return Teacher(SPACE, DATA, **SMALL)


def two_step(noise="smooth"):
    groups = GroupSums(SIZES, threshold=0.01, noise=noise)
    return TwoStep.teacher(SPACE, groups, {**SMALL, "depth": 1}, SMALL)


def mixed():
    """Other likelihoods of vectors as the steps."""
    joint = fp.Product(label=SPACE, sums=fp.Positive(2))
    first = FlowLikelihood(SPACE, fp.Positive(2), "affine", context=4, hidden=6)
    second = FlowLikelihood(joint, 3, "spline", context=4, hidden=6, coupling=True)
    return TwoStep(first, second, GroupSums([3, 2], noise=None))


def head():
    return fp.PosteriorHead(4, SPACE, layers=1, bins=4, hidden=4)


class Decoder(nn.Module):
    """A user's decoder."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 6)

    def forward(self, z):
        return self.a(z).unflatten(-1, (2, 3))


GENERATORS = {
    "teacher": teacher,
    "one hidden layer": lambda: Teacher(fp.Real(1), 1, **{**SMALL, "depth": 1, "layers": 3}),
    "student": lambda: Student(teacher()),
    "smaller student": lambda: Student(teacher(), hidden=4, depth=1),
    "two teachers": two_step,
    "a student's step": lambda: two_step("uniform").student(depth=1),
    "other steps": mixed,
}
PLAIN = {
    "flow": lambda: FlowLikelihood(SPACE, 3, "spline", context=4, hidden=6, dequantize=1),
    "counts": lambda: PoissonCounts(SPACE, (2, 3), hidden=8, layers=2),
    "process": lambda: PointProcess(SPACE, SENSORS, (0, 1), position="x", hidden=4, layers=1),
}
EXTENDED = {
    f"{name} in a model": lambda build=build: ExtendedModel(
        fp.encoders.Tabular(3, 4, hidden=8, layers=1), head(), build()
    )
    for name, build in GENERATORS.items()
    if name in ("teacher", "smaller student", "a student's step")
}
ALL = {**GENERATORS, **PLAIN, **EXTENDED}


def labels(space=SPACE):
    if space == fp.Real(1):
        return torch.randn(N, 1)
    return SPACE.pack(
        {"e": torch.rand(N) + 0.5, "x": torch.randn(N, 2), "a": 6.2 * torch.rand(N) - 3.1}
    )


def model_of(name):
    """A generator with scales of its own draws and weights that do something."""
    torch.manual_seed(0)
    model = ALL[name]()
    for module in model.modules():
        if isinstance(module, GroupSums):
            module.fit(torch.linspace(1.0, 0.1, module.values)[None])
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
        for buffer, value in model.named_buffers():
            if buffer.rpartition(".")[2] in ("loc", "scale", "unit"):
                value.add_(0.3 * torch.rand_like(value))
            elif buffer.endswith("fitted"):
                value.fill_(True)
    return model.eval()


def likelihood_of(model):
    return model.likelihood if isinstance(model, ExtendedModel) else model


def answers(model, z):
    """Draws and ln p of a generator at labels, of generators of random numbers of their own."""
    likelihood = likelihood_of(model)
    seeded = [torch.Generator().manual_seed(i) for i in range(3)]
    with torch.no_grad():
        bound = likelihood(z)
        x = bound.sample(seeded[0])
        return (
            x,
            bound.log_prob(x, seeded[1]),
            *bound.sample_and_log_prob(seeded[2]),
        )


def equal(a, b):
    if isinstance(a, tuple):
        return all(equal(*pair) for pair in zip(a, b, strict=True))
    return a.dtype == b.dtype and torch.equal(a, b)


@pytest.fixture(params=["run", "run.safetensors"], ids=["directory", "file"])
def path(request, tmp_path):
    return tmp_path / request.param


# ----------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("dtype", "file"), [(torch.float32, "run"), (torch.float64, "run.safetensors")]
)
def test_draws_and_densities_come_back(name, dtype, file, tmp_path):
    model, path = model_of(name).to(dtype), tmp_path / file
    state = torch.get_rng_state()
    fp.save(model, path)
    again = fp.load(path)
    assert torch.equal(torch.get_rng_state(), state)
    assert type(again) is type(model)
    assert not any(m.training for m in again.modules())
    ours, theirs = likelihood_of(again), likelihood_of(model)
    assert ours.config() == theirs.config()
    assert repr(again) == repr(model)
    for kind in ("state_dict", "named_buffers"):
        own, other = dict(getattr(again, kind)()), dict(getattr(model, kind)())
        assert own.keys() == other.keys()
        assert all(equal(own[k], other[k]) for k in own)
    z = labels(theirs.space).to(dtype)
    assert equal(answers(again, z), answers(model, z))


def test_a_student_keeps_its_teacher(path):
    model = model_of("student")
    fp.save(model, path)
    again, z = fp.load(path), labels()
    assert type(again.teacher) is Teacher
    assert equal(answers(again.teacher, z), answers(model.teacher, z))
    assert again.teacher.flow.layers[0].input.weight is not again.flow.layers[0].input.weight
    ours, theirs = (
        m.weighted(z, 8, generator=torch.Generator().manual_seed(0)) for m in (again, model)
    )
    assert torch.equal(ours.log_weight, theirs.log_weight)
    assert torch.equal(ours.x, theirs.x)


def test_a_view_on_filled_values(path):
    model = model_of("two teachers")
    fp.save(model.continuous(), path)
    again, z = fp.load(path), labels()
    assert again.groups.threshold == 0
    assert torch.equal(again.groups.order, model.groups.order)
    assert equal(answers(again, z), answers(model.continuous(), z))


def test_a_model_goes_on_learning_as_it_would_have(path):
    model = model_of("teacher in a model")
    fp.save(model, path)
    again, z = fp.load(path), labels()
    x = torch.rand(N, 3)
    data = model.likelihood.sample(z)
    grads = [
        torch.autograd.grad(m.likelihood.log_prob(data, z).mean(), [*m.likelihood.parameters()])
        for m in (model, again)
    ]
    assert all(torch.equal(*pair) for pair in zip(*grads, strict=True))
    assert torch.equal(again(x).log_prob(z), model(x).log_prob(z))
    assert again.own_parts() == [again.head, again.encoder, again.likelihood]


def test_a_fresh_process(tmp_path):
    path = tmp_path / "run"
    model, z = model_of("a student's step"), labels()
    fp.save(model, path)
    torch.save(z, tmp_path / "z.pt")
    code = (
        "import sys, torch, flowpost as fp; torch.set_num_threads(1)\n"
        "assert 'flowpost.generators' not in sys.modules\n"
        "model, z = fp.load(sys.argv[1]), torch.load(sys.argv[2])\n"
        "torch.save(model.sample(z, torch.Generator().manual_seed(0)), sys.argv[3])"
    )
    out = tmp_path / "out.pt"
    subprocess.run(
        [sys.executable, "-c", code, path, tmp_path / "z.pt", out], check=True, timeout=300
    )
    assert torch.equal(torch.load(out), model.sample(z, torch.Generator().manual_seed(0)))


def test_what_is_written(tmp_path):
    fp.save(model_of("a student's step"), tmp_path / "run")
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert (config["kind"], config["format_version"]) == ("Generator", 1)
    assert config["likelihood"]["type"] == "TwoStep"
    assert config["likelihood"]["groups"]["sizes"] == SIZES
    assert config["likelihood"]["second"]["teacher"]["type"] == "Teacher"


def test_a_decoder_of_ones_own_is_given_again(path):
    model = PoissonCounts(SPACE, (2, 3), decoder=Decoder())
    fp.save(model, path)
    with pytest.raises(ValueError, match=r"a decoder of your own, .*load\('.*', decoder=Decoder"):
        fp.load(path)
    z = labels()
    again = fp.load(path, decoder=Decoder())
    assert equal(answers(again, z), answers(model, z))


def test_modules_where_none_belong(path):
    fp.save(model_of("teacher"), path)
    for name in ("encoder", "decoder", "data"):
        noun = {"data": "data module"}.get(name, name)
        with pytest.raises(ValueError, match=f"has no {noun}; load it without {name}="):
            fp.load(path, **{name: nn.Identity()})


def test_other_generators_say_what_to_do(tmp_path):
    class Wide(Teacher):
        pass

    class Groups(GroupSums):
        pass

    other = two_step()
    other.first = Wide(SPACE, fp.Positive(3), **SMALL)
    grouped = two_step()
    grouped.groups = Groups(SIZES)
    counts = two_step()
    counts.first = PoissonCounts(SPACE, 3)
    for saved, text in (
        (
            Library(torch.rand(5, 2), torch.rand(5)),
            r"got Library .*keep x and z, and build Library",
        ),
        (NoiseNetwork(SPACE, 3), r"got NoiseNetwork .*Save network.state_dict\(\)"),
        (Wide(SPACE, 3, **SMALL), "of flowpost; got Wide"),
        (Student(Wide(SPACE, 3, **SMALL)), "Expected a Teacher of flowpost; got Wide"),
        (other, "Expected a FlowLikelihood or Teacher or Student of flowpost; got Wide"),
        (counts, "Expected a FlowLikelihood or Teacher or Student of flowpost; got PoissonCounts"),
        (grouped, "Expected a GroupSums of flowpost; got Groups"),
        (GroupSums(SIZES), "Filter, Likelihood, .* got GroupSums"),
    ):
        with pytest.raises(ValueError, match=text):
            fp.save(saved, tmp_path / "run")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    """One directory of each."""
    folder = tmp_path_factory.mktemp("originals")
    with torch.random.fork_rng(devices=[]):
        for name in ALL:
            fp.save(model_of(name), folder / name)
    return folder


@pytest.fixture
def copy_of(originals, tmp_path):
    def copy(name):
        path = tmp_path / "run"
        path.mkdir(exist_ok=True)
        for file in (originals / name).iterdir():
            (path / file.name).write_bytes(file.read_bytes())
        return path

    return copy


BIG = 10**12
DEEP = "a student's step"
OUTER = "a student's step in a model"


def option(*keys, **values):
    def change(config):
        part = config["likelihood"]
        for key in keys:
            part = part[key]
        part.update(values)

    return change


def whole(**values):
    return lambda config: config.update(values)


DESCRIPTIONS = [
    ("teacher", whole(kind="PosteriorHead"), "KeyError: 'head'"),
    ("teacher", whole(kind="ExtendedModel"), "KeyError: 'head'"),
    ("teacher", whole(likelihood=None), "Expected a likelihood of type .*; got None"),
    ("teacher", option(type="Library"), "Expected a likelihood of type .*; got 'Library'"),
    ("teacher", option(type="GroupSums"), "Expected a likelihood of type .*; got 'GroupSums'"),
    ("teacher", option(type=["Teacher"]), r"Expected a likelihood of type .*; got \['Teacher'\]"),
    ("teacher", option(type="Student"), "KeyError: 'teacher'"),
    ("teacher", option(type="TwoStep"), "KeyError: 'first'"),
    ("teacher", option(type="FlowLikelihood"), "cannot be built"),
    ("teacher", option(colour="red"), "unexpected keyword argument 'colour'"),
    ("teacher", option(decoder={"type": "custom"}), "has a decoder of your own, None"),
    ("teacher", option(teacher={"type": "Teacher"}), "unexpected keyword argument 'teacher'"),
    ("teacher", option(space={"type": "Real", "size": BIG}), "label columns; got 1e"),
    ("teacher", option(data={"type": "Real", "size": BIG}), "data columns; got 1e"),
    ("teacher", option(data={"type": "Sphere"}), "Expected data as a number of columns"),
    ("teacher", option(data=nest({"type": "Real", "size": 1}, 60)), "at most 100 levels"),
    ("teacher", option(data={"type": "Real", "size": 500}), r"at most \d+ weights of masked"),
    ("teacher", option(layers=BIG), r"at most \d+ layers"),
    ("teacher", option(layers=0), "layers as a whole number of at least 1"),
    ("teacher", option(label_layers=BIG), r"at most \d+ label_layers"),
    ("teacher", option(depth=BIG), r"at most \d+ hidden layers"),
    ("teacher", option(layers=15, depth=15), r"at most \d+ hidden layers"),
    ("teacher", option(hidden=BIG), r"at most \d+ weights"),
    ("teacher", option(hidden=10), r"of shape \(10, 4\)"),
    ("teacher", option(label_hidden=BIG * BIG), "cannot be built"),
    ("teacher", option(label_hidden=10**9), "'labels.net.*' of shape"),
    ("teacher", option(context=10**9), "'labels.net.*' of shape"),
    ("teacher", option(bins=10**9), "'flow.layers.0.output.*' of shape"),
    ("teacher", option(bins=10**18), "cannot be built"),
    ("student", option(teacher={"type": "Student"}), "Expected teacher as a Teacher; got Student"),
    ("student", option(teacher=["Teacher"]), "cannot be built"),
    ("student", option(space={"type": "Real", "size": 4}), "Expected a student over Product"),
    ("student", option("teacher", space=nest({"type": "Real"}, 60)), "at most 100 levels"),
    ("student", option(hidden=BIG), r"at most \d+ weights"),
    ("student", option(hidden=8), r"'flow.layers.0.input.*' of shape \(8, 4\)"),
    ("student", option(depth=BIG), r"at most \d+ hidden layers"),
    ("student", option(depth=3), r"'flow.layers.0.inner.1.*not there"),
    ("student", option("teacher", hidden=BIG), r"at most \d+ weights"),
    ("student", option("teacher", layers=3), "'flow.layers.2.*not there"),
    (DEEP, option("first", type="TwoStep"), "first as a FlowLikelihood or .*; got TwoStep"),
    (DEEP, option("second", type="PoissonCounts"), "second as .*; got PoissonCounts"),
    (DEEP, option("second", "teacher", type="Student"), "teacher as a Teacher; got Student"),
    (DEEP, option("second", type="Teacher"), "cannot be built"),
    (DEEP, option("second", "teacher", bins=10**9), "'second.*' of shape"),
    (DEEP, option("second", "teacher", depth=BIG), r"at most \d+ hidden layers"),
    (DEEP, option("first", hidden=BIG), r"at most \d+ weights"),
    (DEEP, option("first", decoder=1, label_layers=BIG), r"at most \d+ label_layers"),
    ("other steps", option("first", decoder={}, layers=BIG), r"at most \d+ layers"),
    (DEEP, option("groups", sizes=[BIG, BIG]), r"groups of at most \d+ values"),
    (DEEP, option("groups", sizes=[2] * 10**5), r"groups of at most \d+ values"),
    (DEEP, option("groups", sizes=[1, 4, 4]), "a group's size as a whole number of at least 2"),
    (DEEP, option("groups", sizes=[3, 6]), "Expected the second likelihood at 6 label columns"),
    (DEEP, option("groups", sizes=[3, 3, 4]), "second likelihood of the sticks, in 7 columns"),
    (DEEP, option("groups", sizes=[2, 3, 4]), "each value once, among those of its group"),
    (DEEP, option("groups", sizes=7), "cannot be built"),
    (DEEP, option("groups", sizes=[]), "Expected"),
    (DEEP, option("groups", threshold=-1), "threshold of at least 0"),
    (DEEP, option("groups", threshold="x"), "cannot be built"),
    (DEEP, option("groups", noise="loud"), "Expected noise as one of"),
    (DEEP, option(first=None), "cannot be built"),
    (DEEP, option(groups=None), "cannot be built"),
    (OUTER, option("second", "teacher", depth=BIG), r"at most \d+ hidden layers"),
    (OUTER, option("first", space={"type": "Real", "size": 4}), "Expected the likelihood over"),
    ("teacher in a model", option(space={"type": "Real"}), "Expected the likelihood over"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "text"), DESCRIPTIONS)
def test_malformed_descriptions_are_refused_by_name(name, change, text, copy_of):
    path = copy_of(name)
    rewrite(path, change)
    with pytest.raises(ValueError, match=f"(?s){text}") as caught:
        fp.load(path)
    assert str(path) in str(caught.value)


def replaced(name, change):
    return lambda t: t.update({name: change(t[name])})


TENSORS = [
    ("teacher", lambda t: t["scale"].zero_(), "positive numbers in tensor 'scale'"),
    ("teacher", lambda t: t["unit"][1].fill_(-1), "positive numbers in tensor 'unit'"),
    ("teacher", lambda t: t["unit"].fill_(torch.nan), "finite numbers in tensor 'unit'"),
    ("teacher", lambda t: t["loc"].fill_(torch.inf), "finite numbers in tensor 'loc'"),
    ("teacher", lambda t: t["labels.net.squash.scale"].neg_(), "positive .*'labels.net.sq"),
    ("teacher", replaced("loc", torch.Tensor.double), "one type of likelihood tensors"),
    ("teacher", replaced("loc", torch.Tensor.long), "'loc' of type .*; got torch.int64"),
    ("teacher", replaced("scale", lambda s: s[:2].clone()), r"'scale' of shape \(4,\); got \(2,\)"),
    ("teacher", lambda t: t.pop("flow.layers.1.skip.bias"), "skip.bias' in .*not there"),
    ("teacher", lambda t: t.update(other=torch.zeros(1)), "'other' in .* has no place"),
    ("teacher", lambda t: t.clear(), "cannot be built"),
    ("student", lambda t: t["teacher.scale"].zero_(), "positive .*'teacher.scale'"),
    ("student", lambda t: t.pop("teacher.loc"), "'teacher.loc' in .*not there"),
    (DEEP, lambda t: t["groups.order"].zero_(), "each value once, .*'groups.order'"),
    (DEEP, lambda t: t["groups.order"].add_(1), "each value once, .*'groups.order'"),
    (DEEP, lambda t: t["groups.order"].copy_(t["groups.order"].flip(0)), "among those of its grou"),
    (DEEP, replaced("groups.order", torch.Tensor.int), "of type torch.int64; got torch.int32"),
    (DEEP, replaced("groups.order", lambda o: o[:-1].clone()), r"shape \(9,\); got \(8,\)"),
    (DEEP, lambda t: t["second.teacher.unit"].zero_(), "positive .*'second.teacher.unit'"),
    (DEEP, lambda t: t["first.loc"].fill_(torch.nan), "finite .*'first.loc'"),
    (OUTER, lambda t: t["likelihood.groups.order"].zero_(), ".*'likelihood.groups.order'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "change", "text"), TENSORS)
def test_malformed_tensors_are_refused_by_name(name, change, text, copy_of):
    path = copy_of(name)
    rewrite_tensors(path, change)
    with pytest.raises(ValueError, match=f"(?s){text}") as caught:
        fp.load(path)
    assert str(path) in str(caught.value)


def test_what_could_not_be_loaded_is_not_saved(path):
    model = model_of("two teachers")
    model.groups.order.zero_()
    with pytest.raises(ValueError, match=r"each value once, .*Fit the scales again"):
        fp.save(model, path)
    model = model_of("student")
    model.teacher.scale.zero_()
    with pytest.raises(ValueError, match=r"positive numbers in tensor 'teacher\.scale'"):
        fp.save(model, path)
    model = model_of("student")
    model.teacher.double()
    with pytest.raises(ValueError, match="one type of likelihood tensors"):
        fp.save(model, path)
    assert not path.exists()


@pytest.mark.parametrize("kind", ["teacher", "PosteriorHead"])
def test_a_part_that_belongs_to_no_model_is_not_built(kind, tmp_path):
    """An encoder of 4·10¹⁰ weights beside what has none."""
    fp.save(model_of("teacher") if kind == "teacher" else head(), tmp_path / "run")
    many = {"type": "Tabular", "features": 1, "context": 1, "hidden": 2 * 10**5, "layers": 2}
    rewrite(tmp_path / "run", whole(encoder=many, data=3))
    fp.load(tmp_path / "run")


@pytest.mark.parametrize("depth", [1, 3])
def test_masks_take_no_more_than_the_weights_in_the_file(depth):
    model = Teacher(fp.Real(1), 1, **{**SMALL, "hidden": 200, "depth": depth})
    masks = sum(t.numel() for name, t in model.named_buffers() if name.endswith("_mask"))
    assert 0 < masks < sum(p.numel() for p in model.parameters())


# ---------------------------------------------------------------------------- random malformations

VALUES = [None, True, -1, 0, 1, 3, 7, 300, BIG, 0.5, 1e300, "x", "Teacher", [], [3], {}]


def places(config):
    """Every container and key in a description."""
    items = config.items() if isinstance(config, dict) else enumerate(config)
    for key, value in items:
        yield config, key
        if isinstance(value, (dict, list)):
            yield from places(value)


def damage(config, generator):
    """Change, drop or copy one entry of the description of a likelihood."""

    def pick(items):
        return items[int(torch.randint(len(items), (), generator=generator))]

    found = list(places(config["likelihood"]))
    part, key = pick(found)
    how = pick(["value", "value", "drop", "copy"])
    if how == "value":
        part[key] = pick(VALUES)
    elif how == "drop":
        part.pop(key)
    else:
        other, at = pick(found)
        part[key] = json.loads(json.dumps(other[at]))


CHANGES = [
    lambda t: None,
    lambda t: torch.full_like(t, -1),
    lambda t: torch.zeros_like(t),
    lambda t: t.flip(0).clone() if t.ndim else t,
    lambda t: t[None],
    lambda t: t[..., :-1].clone() if t.ndim else t[None, None],
    lambda t: t.to(torch.float64 if t.dtype == torch.float32 else torch.float32),
    lambda t: t.to(torch.complex64),
    lambda t: torch.where(torch.arange(t.numel()).reshape(t.shape) == 0, torch.nan, t)
    if t.is_floating_point()
    else t.to(torch.uint8),
]  # fmt: skip


def damage_tensors(tensors, generator):
    # heads that ask for a first guess say so when they are used
    names = sorted(name for name in tensors if not name.endswith("referenced"))
    name = names[int(torch.randint(len(names), (), generator=generator))]
    change = CHANGES[int(torch.randint(len(CHANGES), (), generator=generator))]
    value = change(tensors.pop(name))
    if value is not None:
        tensors[name] = value.contiguous()


@pytest.mark.parametrize("what", ["description", "tensors"])
@pytest.mark.parametrize("name", ["teacher", "smaller student", DEEP, "other steps", OUTER])
def test_random_malformations_are_refused_or_work(name, what, copy_of):
    """A signed file either loads and draws, or says by a ValueError what is wrong with it."""
    generator = torch.Generator().manual_seed(len(name))
    refused = worked = 0
    rounds = 24 if what == "description" else 12
    for _ in range(rounds):
        path = copy_of(name)
        if what == "description":
            rewrite(path, lambda config: damage(config, generator))
        else:
            rewrite_tensors(path, lambda tensors: damage_tensors(tensors, generator))
        try:
            likelihood = likelihood_of(fp.load(path))
        except ValueError as error:
            refused += str(path) in str(error)
            continue
        at = likelihood.space.centre(likelihood.space.default_scale()).expand(3, -1)
        drawn = likelihood.sample(at, torch.Generator().manual_seed(0))
        worked += len(drawn) == 3
    assert refused + worked == rounds
    assert refused > 5
