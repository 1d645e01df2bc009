r"""Generators of calorimeter showers under the classifier metric, against exact truth.

    python -m benchmarks.showers                          # all of them, about an hour of one core
    python -m benchmarks.showers --only library energy    # some of them
    python -m benchmarks.showers --only library --events 5000 --test 5000 --fast

`teacher` and `student` work in two steps, the layers' energies given E, then the shares of the
voxels given those and E. Zeros are filled with noise below the threshold, whose density vanishes at
it or, in `teacher, uniform noise`, does not; in `teacher, no noise` with half the threshold. Their
likelihood is compared with the exact one: ln p is that of x at E in nats per shower, and of a flow
on filled zeros a lower bound on it.

Trains on showers of `simulators.Shower` at energies E, the start of the shower not given, and asks
a classifier to tell fresh showers from generated ones at other energies of the same law; ln E is
among its inputs, so that a shower at the wrong energy counts as wrong. Inputs are: low level, the
logarithms ln(1 + x/τ) of the voxels; normalised, ln(1 + 1000 s) of the voxels' shares s of their
layers; high level, energies, centroids, widths and lit shares of the layers. The classifier is an
MLP of two hidden layers of 256; of the events `--share`, a half, test it, and a quarter of the rest
calibrates it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import flowpost as fp
from flowpost.encoders import Tabular
from flowpost.generators import (
    GroupSums,
    Library,
    NoiseNetwork,
    TwoStep,
    distill,
    fit,
    fit_critic,
    fit_energy,
    weighted_draws,
)
from flowpost.likelihood import ExtendedModel, FlowLikelihood, Latent, with_latents
from flowpost.metrics import classifier_test
from flowpost.metrics.learners import Network
from flowpost.simulators import Shower

SIMULATOR = Shower()
TAU = SIMULATOR.threshold
Draw = Callable[[Tensor, torch.Generator], Tensor]


class MLP(Network):
    """The classifier: an MLP of two hidden layers of 256, in scikit-learn's interface."""

    def __init__(self, hidden: int = 256, epochs: int = 40, random_state: int = 0) -> None:
        super().__init__(hidden, members=1, epochs=epochs, patience=5, lr=1e-3, seed=random_state)

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Return arguments by name."""
        return {"hidden": self.hidden, "epochs": self.epochs, "random_state": self.seed}

    def set_params(self, **values: Any) -> MLP:
        """Set arguments by name."""
        for name, value in values.items():
            setattr(self, "seed" if name == "random_state" else name, value)
        return self


# --- coordinates ---------------------------------------------------------------------------------


def to_log(x: Tensor) -> Tensor:
    """Logarithms ln(x/τ) of the voxels (N, 78), 0 where they are zero."""
    return torch.where(x > 0, (x.clamp_min(TAU) / TAU).log(), 0.0)


def from_log(y: Tensor) -> Tensor:
    """Voxels (N, 78) in GeV; what is not above 0 is below the threshold."""
    return torch.where(y > 0, TAU * y.exp(), 0.0)


def layer_logs(y: Tensor) -> Tensor:
    """Logarithms (N, 3) of the layers' energies, of the logarithms of voxels."""
    x = torch.where(y > 0, TAU * y.clamp_max(12.0).exp(), 0.0)
    return (1 + torch.stack([x[:, part].sum(1) for part in SIMULATOR.layers], 1) / TAU).log()


def voxels(pairs: Tensor) -> Tensor:
    """Low level, of rows of ln E and voxels (N, 79)."""
    return torch.cat([pairs[:, :1], (1 + pairs[:, 1:] / TAU).log()], 1)


def normalised(pairs: Tensor) -> Tensor:
    """Low level, each layer divided by its sum."""
    return torch.cat([pairs[:, :1], (1 + 1000 * SIMULATOR.split(pairs[:, 1:])[1]).log()], 1)


def high_level(pairs: Tensor) -> Tensor:
    """Energies, centroids, widths and lit shares of layers."""
    energies, shares = SIMULATOR.split(pairs[:, 1:])
    found = [pairs[:, :1], (1 + energies / TAU).log()]
    for part, (rows, columns) in zip(SIMULATOR.layers, SIMULATOR.shape, strict=True):
        layer = shares[:, part].unflatten(1, (rows, columns))
        for size, side in ((rows, layer.sum(2)), (columns, layer.sum(1))):
            at = torch.linspace(-1, 1, size, dtype=side.dtype)
            mean = side @ at
            variance = side @ at.square() - mean.square()
            found += [mean[:, None], variance.clamp_min(0).sqrt()[:, None]]
        found.append((layer > 0).flatten(1).to(shares).mean(1, keepdim=True))
    return torch.cat(found, 1)


FEATURES = {"low level": voxels, "normalised": normalised, "high level": high_level}


# --- generators: each trains and returns what draws voxels at energies (N, 1) --------------------


def truth(x: Tensor, energy: Tensor, args: argparse.Namespace) -> Draw:
    def draw(e: Tensor, g: torch.Generator) -> Tensor:
        z = SIMULATOR.sample_prior(len(e), g)
        return SIMULATOR.simulate(torch.cat([e, z[:, 1:]], 1), g)

    return draw


def library(k: int, interpolate: bool = False) -> Callable[..., Draw]:
    def make(x: Tensor, energy: Tensor, args: argparse.Namespace) -> Draw:
        book = Library(x, energy.log(), k=k, interpolate=interpolate)
        return lambda e, g: book.sample(e.log(), g)

    return make


def vae(x: Tensor, energy: Tensor, args: argparse.Namespace) -> Draw:
    """Eight latents and a diagonal normal in the logarithms, by the extended loss."""
    space, g = fp.Positive(), torch.Generator().manual_seed(args.seed)
    y = to_log(x)
    # zeros are spread below 0, where draws become zeros again
    y = torch.where(y > 0, y, -torch.randn(y.shape, generator=g).abs())
    both = with_latents(space, 8)
    torch.manual_seed(args.seed)
    model = ExtendedModel(
        Tabular(78, 64, dropout=0.0),
        fp.PosteriorHead(64, space, "affine"),
        FlowLikelihood(both, 78, "diagonal", context=128, hidden=128),
        Latent(space, 8, 64),
    )
    epochs = 1 if args.fast else 30
    fp.fit(model, (y, energy), epochs=epochs, seed=args.seed, weight_decay=0.0, progress=False)

    def draw(e: Tensor, g: torch.Generator) -> Tensor:
        z = torch.cat([e, torch.randn(len(e), 8, generator=g)], 1)
        return from_log(model.likelihood.sample(z, g))

    return draw


def _options(name: str, epochs: int, args: argparse.Namespace) -> dict[str, Any]:
    file = None if args.checkpoints is None else args.checkpoints / f"{name}.ckpt"
    epochs = 4 if args.fast else epochs
    return {"epochs": epochs, "seed": args.seed, "checkpoint": file, "progress": False}


def _two_step(x: Tensor, energy: Tensor, args: argparse.Namespace, noise: str | None) -> TwoStep:
    """A trained teacher; one training for all that ask for it."""
    name = noise or "none"
    if name not in args.trained:
        torch.manual_seed(args.seed)
        model = TwoStep.teacher(
            fp.Positive(),
            GroupSums([rows * columns for rows, columns in SIMULATOR.shape], TAU, noise=noise),
            {"hidden": 64, "layers": 2, "bins": 12},
            {"hidden": 128, "layers": 2, "bins": 8},
        )
        print(f"  {fit(model, x, energy, **_options(name, args.epochs, args))}")
        args.trained[name] = model
    return args.trained[name]


def teacher(noise: str | None) -> Callable[..., Draw]:
    def make(x: Tensor, energy: Tensor, args: argparse.Namespace) -> Draw:
        return _two_step(x, energy, args, noise).sample

    return make


def student(x: Tensor, energy: Tensor, args: argparse.Namespace) -> Draw:
    model = _two_step(x, energy, args, "smooth").student()
    print(f"  {distill(model, x, energy, **_options('student', args.distil, args))}")
    args.trained["student"] = model
    return model.sample


def network(train: Callable[..., Any], *own: str) -> Callable[..., Draw]:
    """A sampling-only network; `own` are options of its training among the arguments."""

    def make(x: Tensor, energy: Tensor, args: argparse.Namespace) -> Draw:
        torch.manual_seed(args.seed)
        net = NoiseNetwork(fp.Positive(), 78, noise=100, hidden=256, output=nn.ReLU())
        options = {name: getattr(args, name) for name in ("seed", *own)}
        epochs = 1 if args.fast else 40
        history = train(
            net, to_log(x), energy, views=[layer_logs], epochs=epochs, progress=False, **options
        )
        print(f"  {history}")
        return lambda e, g: from_log(net.sample(e, g))

    return make


GENERATORS: dict[str, Callable[..., Draw]] = {
    "truth": truth,
    "library": library(1),
    "library k=10": library(10),
    "library mix 2": library(2, interpolate=True),
    "teacher": teacher("smooth"),
    "teacher, uniform noise": teacher("uniform"),
    "teacher, no noise": teacher(None),
    "student": student,
    "vae": vae,
    "energy": network(fit_energy),
    "wasserstein": network(fit_critic, "penalty"),
}


# --- comparison ----------------------------------------------------------------------------------


def compare(name: str, draw: Draw, fresh: tuple[Tensor, Tensor], args: argparse.Namespace) -> dict:
    """Time of a draw, and AUC and divergence of each set of features."""
    x, z = fresh
    g = torch.Generator().manual_seed(args.seed + 3)
    energy = SIMULATOR.sample_prior(len(x), g)[:, :1]
    draw(energy[:100], torch.Generator().manual_seed(0))
    start, y = time.process_time(), []
    for part in energy.split(1000):
        y.append(draw(part, g))
    spent = 1000 * (time.process_time() - start) / len(x)
    pairs = [torch.cat([e.log(), v], 1) for e, v in ((z[:, :1], x), (energy, torch.cat(y)))]
    row: dict[str, Any] = {"name": name, "ms": spent}
    for kind, function in FEATURES.items():
        result = classifier_test(
            *pairs,
            classifiers={"mlp": MLP(epochs=3 if args.fast else 40)},
            features={kind: function},
            test=args.share,
            retrainings=0,
            permutations=200,
            seed=args.seed,
        )
        row[kind] = {"auc": result.auc, "auc_error": result.auc_error, "jsd": result.jsd}
    return row


def line(row: dict) -> str:
    cells = "".join(
        f"  {row[k]['auc']:.3f} ± {row[k]['auc_error']:.3f} / {row[k]['jsd']:.3f}" for k in FEATURES
    )
    return f"{row['name']:<24}{cells}  {row['ms']:9.4f}  {row['seconds']:8.0f}"


def likelihoods(fresh: tuple[Tensor, Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Mean ln p(x|E) of fresh showers, exact and by the teachers, and the student's weights."""
    x, energy = fresh[0][: args.exact], fresh[1][: args.exact, :1]
    exact = SIMULATOR.marginal_log_prob(x, energy[:, 0])
    found = {"exact": float(exact.mean())}
    for noise in ("smooth", "uniform", "none"):
        name = f"teacher, {noise}"
        if noise in args.trained:
            with torch.no_grad():
                g = torch.Generator().manual_seed(args.seed)
                own = args.trained[noise](energy).log_prob(x, g).double()
            gap = exact - own
            found |= {name: float(own.mean()), f"exact - {name}": float(gap.mean())}
            found[f"exact - {name}, error"] = float(gap.std() / len(gap) ** 0.5)
    return found


def weights(fresh: tuple[Tensor, Tensor], args: argparse.Namespace) -> dict[str, float]:
    """Effective size of the student's draws, weighted to the teacher."""
    pair = (args.trained[k].continuous() for k in ("smooth", "student"))
    g = torch.Generator().manual_seed(args.seed)
    drawn = weighted_draws(*pair, fresh[1][:200, :1], 256, generator=g)
    print(f"student to teacher, at each of 200 energies: {drawn}")
    return {"ess": float(drawn.ess.mean()), "lowest ess": float(drawn.ess.min())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=list(GENERATORS), default=list(GENERATORS))
    parser.add_argument("--events", type=int, default=50_000, help="for training")
    parser.add_argument("--test", type=int, default=50_000, help="fresh, and generated")
    parser.add_argument("--share", type=float, default=0.5, help="that the classifier is tested on")
    parser.add_argument("--exact", type=int, default=5000, help="showers of the exact likelihood")
    parser.add_argument("--epochs", type=int, default=20, help="of the teacher")
    parser.add_argument("--distil", type=int, default=6, help="epochs of the student")
    parser.add_argument("--checkpoints", type=Path, help="to go on with teacher and student")
    parser.add_argument("--penalty", type=float, default=0.1, help="of the Wasserstein critic")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fast", action="store_true", help="hardly any training, for tests")
    parser.add_argument("--out", type=Path, help="a JSON file of all numbers")
    args = parser.parse_args()
    args.trained = {}
    torch.set_num_threads(1)
    x, z = SIMULATOR.sample(args.events, seed=args.seed + 1)
    fresh = SIMULATOR.sample(args.test, seed=args.seed + 2)
    title = "".join(f"  {k + ': AUC / JSD':<21}" for k in FEATURES)
    print(f"{'generator':<24}{title}  ms a shower  CPU-s of training", flush=True)
    rows = []
    for name in args.only:
        start = time.process_time()
        draw = GENERATORS[name](x, z[:, :1], args)
        seconds = time.process_time() - start
        rows.append(compare(name, draw, fresh, args) | {"seconds": seconds})
        print(line(rows[-1]), flush=True)
    found = likelihoods(fresh, args)
    for name, value in found.items():
        print(f"ln p, {name}: {value:.3f} nats a shower")
    if "student" in args.trained:
        found |= weights(fresh, args)
    if args.out is not None:
        args.out.write_text(json.dumps({"table": rows, "likelihood": found}, indent=2))


if __name__ == "__main__":
    main()
