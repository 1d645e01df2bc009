r"""Fast simulation of calorimeter showers, and a classifier that tells it from the truth.

    python examples/calorimeter.py              # some minutes of one core
    python examples/calorimeter.py --fast

A teacher (a flow with a density, slow to draw from), a student that learns to draw as the teacher
does, a sampling-only network and a library of training showers generate showers of given energies.
For each, an AUC of 0.5 means that the classifier cannot tell them from fresh ones. Prints a table
and draws the mean showers of each layer. The truth is known here: the exact likelihood says how far
the teacher is from it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

import flowpost as fp
from flowpost import generators
from flowpost.metrics import classifier_test
from flowpost.plots.showers import plot_showers
from flowpost.simulators import Shower

CALORIMETER = Shower()
TAU = CALORIMETER.threshold


def low_level(x):
    return (1 + x / TAU).log()


def normalised(x):
    return (1 + 1000 * CALORIMETER.split(x)[1]).log()


def high_level(x):
    lit = [(x[:, layer] > 0).float().mean(1, keepdim=True) for layer in CALORIMETER.layers]
    return torch.cat([low_level(CALORIMETER.layer_energies(x)), *lit], 1)


def train(x, energy, epochs, progress):
    """What draws showers at energies (N, 1), by name; the teacher, and the student."""
    torch.manual_seed(0)
    groups = generators.GroupSums([rows * columns for rows, columns in CALORIMETER.shape], TAU)
    teacher = generators.TwoStep.teacher(fp.Positive(), groups)
    print(generators.fit(teacher, x, energy, epochs=epochs, progress=progress))
    student = teacher.student()
    print(generators.distill(student, x, energy, epochs=epochs, progress=progress))
    # logarithms, cut off at the threshold
    y = (x / TAU).clamp_min(1).log()
    network = generators.NoiseNetwork(fp.Positive(), 78, noise=100, hidden=256, output=nn.ReLU())
    print(generators.fit_energy(network, y, energy, epochs=2 * epochs, progress=progress))

    def sampled(e, g):
        y = network.sample(e, g)
        return torch.where(y > 0, TAU * y.exp(), 0.0)

    library = generators.Library(x, energy.log())
    draws = {
        "teacher": teacher.sample,
        "student": student.sample,
        "library": lambda e, g: library.sample(e.log(), g),
        "energy distance": sampled,
    }
    return draws, teacher, student


def score(truth, energy, drawn, at, classifier):
    """AUC and divergence of three sets of features, each with the energy beside it."""
    pairs = torch.cat([energy.log(), truth], 1), torch.cat([at.log(), drawn], 1)
    found = []
    for features in (low_level, normalised, high_level):
        view = {"": lambda p, f=features: torch.cat([p[:, :1], f(p[:, 1:])], 1)}
        result = classifier_test(
            *pairs, classifiers=classifier, features=view, retrainings=0, permutations=100
        )
        found.append(f"{result.auc:.3f} / {result.jsd:.3f}")
    return "".join(f"{v:>20}" for v in found)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a small run, for tests")
    parser.add_argument("--quiet", action="store_true", help="without progress bars")
    parser.add_argument("--out", type=Path, default=Path("calorimeter"))
    options = parser.parse_args(arguments)
    size, epochs = (600, 3) if options.fast else (20_000, 15)
    x, z = CALORIMETER.sample(size, seed=1)
    (truth, labels), (again, other) = (CALORIMETER.sample(size, seed=s) for s in (2, 3))
    draws, teacher, student = train(x, z[:, :1], epochs, not options.quiet)

    head = "".join(f"{v:>20}" for v in ("low level", "normalised", "high level"))
    print(f"{'AUC / JSD in bits':<18}{head}{'ms a shower':>14}")
    energy, pictures = labels[:, :1], {"truth": truth}
    kind = "logistic" if options.fast else "mlp"
    print(f"{'truth again':<18}{score(truth, energy, again, other[:, :1], kind)}")
    for name, draw in draws.items():
        g, start = torch.Generator().manual_seed(4), time.perf_counter()
        pictures[name] = torch.cat([draw(e, g) for e in other[:, :1].split(1000)])
        cost = 1000 * (time.perf_counter() - start) / size
        row = score(truth, energy, pictures[name], other[:, :1], kind)
        print(f"{name:<18}{row}{cost:>14.4f}", flush=True)

    few = slice(0, min(size, 1000))
    exact = CALORIMETER.marginal_log_prob(truth[few], energy[few, 0]).mean()
    with torch.no_grad():
        own = teacher.log_prob(truth[few], energy[few]).mean()
    print(f"ln p of a shower: exact {exact:.1f}, teacher {own:.1f} nats")
    pair = teacher.continuous(), student.continuous()
    print(f"student: {generators.weighted_draws(*pair, energy[few][:100], 64)}")
    options.out.mkdir(parents=True, exist_ok=True)
    axes = plot_showers(pictures, CALORIMETER.shape, extent=CALORIMETER.half_width)
    axes[0, 0].figure.savefig(options.out / "mean_showers.png", dpi=120)
    print(f"mean_showers.png is in {options.out}")


if __name__ == "__main__":
    main()
