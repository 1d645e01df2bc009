"""What importing flowpost costs and changes, and who may import whom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import flowpost

ROOT = Path(flowpost.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

# design.md §2: a module imports from its own layer or lower ones
LAYERS = [
    {"_checks", "_zuko"},
    {"spaces", "directions", "encoders", "simulators", "metrics"},
    {"flows"},
    {"posterior", "references", "masks", "head", "model"},
    {"likelihood", "losses", "diagnostics"},
    {"generators", "systematics", "calibration", "inferno"},
    {"goodness", "skymap", "training", "io"},
    {"plots"},
    {"cli"},
]
# known deviations, each with its reason; empty is the aim
LAZY_UPWARD = {("head", "losses")}  # head.loss calls losses.weighted_mean


def layer(part):
    if part.startswith("_"):
        return 0
    return next(i for i, names in enumerate(LAYERS) if part in names)


def part_of(path):
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports_of(path):
    """(module parts below flowpost or foreign dotted name, inside a function?, names)."""
    package = ["flowpost", *path.relative_to(ROOT).parts[:-1]]
    tree = ast.parse(path.read_text())
    inside, typing_only = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            inside |= {id(n) for n in ast.walk(node)}
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            typing_only |= {id(n) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        lazy = id(node) in inside
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name.split("."), lazy
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = base + (node.module.split(".") if node.module else [])
            if base == ["flowpost"]:
                for alias in node.names:
                    yield [*base, alias.name], lazy
            else:
                yield base, lazy


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_lower_never_imports_higher(path):
    own = part_of(path)
    if own == "__init__":
        return
    for target, lazy in imports_of(path):
        if target[0] != "flowpost" or target[1:] == ["__version__"]:
            continue
        other = target[1]
        if lazy and (other == "plots" or (own, other) in LAZY_UPWARD):
            continue
        assert layer(other) <= layer(own), f"{own} imports {'.'.join(target)}"
        assert other != "plots" or own in ("plots", "cli"), f"{own} imports plots at its head"


def test_parts_import_each_other_one_way():
    edges = set()
    for path in FILES:
        own = part_of(path)
        if own == "__init__":
            continue
        for target, lazy in imports_of(path):
            if (
                target[0] == "flowpost"
                and len(target) > 1
                and target[1] not in (own, "__version__")
            ):
                edges |= set() if lazy and target[1] == "plots" else {(own, target[1])}
    assert edges, "no import was read"
    both = {(a, b) for a, b in edges if (b, a) in edges} - {
        pair for a, b in LAZY_UPWARD for pair in ((a, b), (b, a))
    }
    assert not both


def test_files_of_a_folder_import_each_other_one_way():
    for folder in {p.parent for p in FILES} - {ROOT}:
        prefix = ["flowpost", *folder.relative_to(ROOT).parts]
        edges = set()
        for path in folder.glob("*.py"):
            for target, _ in imports_of(path):
                if target[: len(prefix)] == prefix and len(target) > len(prefix):
                    edges.add((path.stem, target[len(prefix)]))
        lazy_pairs = {("base", "block"), ("block", "base")}  # Posterior.block makes a subclass
        assert not {(a, b) for a, b in edges if (b, a) in edges} - lazy_pairs


def test_zuko_is_imported_in_one_place():
    users = {part_of(p) for p in FILES for target, _ in imports_of(p) if target[0] == "zuko"}
    assert users == {"_zuko"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_heavy_packages_are_imported_lazily(path):
    if part_of(path) in ("plots", "cli"):
        return
    eager = {t[0] for t, lazy in imports_of(path) if not lazy}
    assert not eager & {"matplotlib", "healpy", "astropy", "lightning"}
    assert not eager & {"sklearn", "h5py", "pyhf", "iminuit"}
    stats = {".".join(t[:2]) for t, lazy in imports_of(path) if not lazy}
    assert "scipy.stats" not in stats


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_has_all_and_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree)
    names = [
        [e.value for e in node.value.elts]
        for node in tree.body
        if isinstance(node, ast.Assign)
        and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
    ]
    assert len(names) == 1
    assert len(set(names[0])) == len(names[0])
    defined = {getattr(n, "name", None) for n in tree.body}
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            defined |= {(a.asname or a.name).split(".")[0] for a in node.names}
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            # what a module of this name gives on being asked
            later = [n for n in node.body if isinstance(n, ast.ImportFrom)]
            defined |= {a.name for n in later for a in n.names}
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            defined |= {t.id for t in targets if isinstance(t, ast.Name)}
    assert set(names[0]) <= defined


def run(code):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout.strip()


def test_import_is_light():
    heavy = ("matplotlib", "healpy", "lightning", "pytorch_lightning", "sklearn", "scipy.stats",
             "h5py", "pandas", "pyhf", "iminuit", "astropy")  # fmt: skip
    found = run(f"import sys, flowpost; print([m for m in {heavy} if m in sys.modules])")
    assert found == "[]"


CONTAINED = """
import torch
from torch.distributions import Distribution, Normal
validate, constraints = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
{first}
{second}
assert Distribution._validate_args is validate is True
assert Distribution.__dict__["arg_constraints"] is constraints
try:
    Normal(0.0, -1.0)
except ValueError:
    pass
else:
    raise SystemExit("torch no longer checks arguments")
import zuko
flow = zuko.flows.NSF(2, 3, transforms=1)
q = flow(torch.zeros(5, 3))
assert q.log_prob(q.sample((4,))).shape == (4, 5)
zuko.distributions.BoxUniform(torch.zeros(2), torch.ones(2)).sample()
zuko.distributions.DiagNormal(torch.zeros(2), torch.ones(2)).log_prob(torch.zeros(2))
assert Distribution._validate_args is True
head = flowpost.PosteriorHead(0, flowpost.Positive())
try:
    head(None).log_prob(torch.tensor([-1.0]))
except ValueError:
    print("contained")
"""


@pytest.mark.parametrize("second", ["", "import zuko"])
def test_import_leaves_torch_as_it_was(second):
    assert run(CONTAINED.format(first="import flowpost", second=second)) == "contained"


def test_labels_are_checked_also_where_zuko_came_first():
    """zuko switches torch's checks off; a label out of its space must not become NaN in a loss."""
    code = """
import zuko, torch, flowpost
head = flowpost.PosteriorHead(0, flowpost.Positive())
try:
    head.loss(None, torch.tensor([[-1.0]]))
except ValueError:
    print("checked")
"""
    assert run(code) == "checked"


def test_import_touches_no_global_state():
    code = """
import torch, numpy, random, logging, warnings
state = torch.get_rng_state(), numpy.random.get_state()[1].tolist(), random.getstate()
before = torch.get_default_dtype(), torch.get_num_threads(), list(warnings.filters)
level = logging.getLogger().level
import flowpost
assert torch.equal(torch.get_rng_state(), state[0])
assert numpy.random.get_state()[1].tolist() == state[1]
assert random.getstate() == state[2]
assert before[:2] == (torch.get_default_dtype(), torch.get_num_threads())
assert logging.getLogger().level == level
print("untouched")
"""
    assert run(code) == "untouched"


def test_parts_are_imported_when_asked_for():
    code = """
import sys, flowpost
later = ("calibration", "generators", "goodness", "inferno", "metrics")
later += ("plots", "simulators", "skymap", "systematics")
assert not any(f"flowpost.{name}" in sys.modules for name in later)
for name in later:
    assert name in dir(flowpost)
    assert getattr(flowpost, name).__name__ == f"flowpost.{name}"
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = flowpost.nothing
