r"""Tails of generators that learned from 1000 pairs, where the truth is known by quadrature.

    python -m benchmarks.lognormal table      # all generators under all checks
    python -m benchmarks.lognormal bootstrap  # what one training set tells of the error
    python -m benchmarks.lognormal pairings   # what recombination of the pairs is worth

X1 and X2 are log-normal (0, 1) and independent, S = X1 + X2; P(S > 12) = 0.02001 and
P(S > 24) = 0.001998. Each generator sees the same training sets of 1000 pairs.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import numpy as np
import torch
from scipy import integrate, stats
from torch import Tensor

import flowpost as fp
from flowpost.metrics import (
    TailReport,
    bootstrap_tails,
    classifier_test,
    memorisation,
    recombine,
    tails,
)

PAIRS = 1000
THRESHOLDS = (12.0, 24.0)
CUT = 12.0
EVENTS = 200_000
Generator = Callable[[Tensor, int], Tensor]


def exceedance(threshold: float) -> float:
    """P(X1 + X2 > s) by quadrature."""
    x = stats.lognorm(1.0)
    inside = integrate.quad(
        lambda t: x.pdf(t) * x.sf(threshold - t),
        0,
        threshold,
        points=[0.5, 1.0, threshold - 1],
        limit=500,
        epsabs=1e-13,
        epsrel=1e-10,
    )[0]
    return float(inside + x.sf(threshold))


def pairs(n: int, seed: int) -> Tensor:
    """Draw n pairs (n, 2)."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, generator=g, dtype=torch.float64).exp().float()


def total(x: Tensor) -> Tensor:
    """S (N,) of pairs (N, 2)."""
    return x.sum(1)


def logarithmic(x: Tensor) -> Tensor:
    """Pairs on a scale without a heavy tail, also where a generator makes negative ones."""
    return x.sign() * x.abs().log1p()


# --- generators ----------------------------------------------------------------------------------


def resampled(training: Tensor, seed: int) -> Tensor:
    """Training pairs drawn with replacement."""
    g = torch.Generator().manual_seed(seed)
    return training[torch.randint(len(training), (EVENTS,), generator=g)]


def permuted(training: Tensor, seed: int) -> Tensor:
    """Every X1 beside every X2, in random order."""
    g = torch.Generator().manual_seed(seed)
    every = torch.cartesian_prod(training[:, 0], training[:, 1])
    return every[torch.randperm(len(every), generator=g)]


def fitted(training: Tensor, seed: int) -> Tensor:
    """Log-normal distributions of the mean and width of each column's logarithms."""
    g = torch.Generator().manual_seed(seed)
    logs = training.log()
    z = torch.randn(EVENTS, 2, generator=g)
    return (logs.mean(0) + logs.std(0) * z).exp()


def cut(training: Tensor, seed: int) -> Tensor:
    """The fitted ones without anything beyond 12 in either column."""
    made = fitted(training, seed)
    return made[(made < CUT).all(1)]


def flow(space: fp.spaces.Space, epochs: int = 100) -> Generator:
    """A spline flow without context, trained with the defaults of `fp.fit`."""

    def generate(training: Tensor, seed: int) -> Tensor:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = fp.PosteriorModel(None, fp.PosteriorHead(0, space))
        fp.fit(model, training, epochs=epochs, seed=seed, progress=False)
        with torch.no_grad():
            return model(None).sample((EVENTS,), generator=torch.Generator().manual_seed(seed))

    return generate


def fresh(training: Tensor, seed: int) -> Tensor:
    """Pairs of the truth: what a perfect generator gives."""
    return pairs(EVENTS, 9_000_000 + seed)


GENERATORS: dict[str, Generator] = {
    "fresh truth": fresh,
    "resampled pairs": resampled,
    "all permutations": permuted,
    "fitted log-normals": fitted,
    "cut at 12": cut,
    "flow, right support": flow(fp.Positive(2)),
    "flow, wrong support": flow(fp.Real(2)),
}


BOOTSTRAPPED = ("resampled pairs", "fitted log-normals", "flow, right support")


def compare(
    generators: dict[str, Generator], sets: int, first: int = 0
) -> tuple[TailReport, dict[str, list[Tensor]], list[Tensor]]:
    """Tails of generators trained on so many sets, their samples, and the sets."""
    training = [pairs(PAIRS, first + k) for k in range(sets)]
    made = {
        name: [generate(x, first + k) for k, x in enumerate(training)]
        for name, generate in generators.items()
    }
    return judged(made), made, training


def judged(made: dict[str, list[Tensor]]) -> TailReport:
    """Tails of the samples of each training set, against the exact shares."""
    exact = [exceedance(s) for s in THRESHOLDS]
    return tails(made, THRESHOLDS, probabilities=exact, statistic=total, training_size=PAIRS)


# --- tables --------------------------------------------------------------------------------------


def table(args: argparse.Namespace) -> None:
    """Tails, memorisation and classifier of all generators."""
    start = time.process_time()
    report, made, training = compare(GENERATORS, args.sets)
    print(f"{args.sets} training sets of {PAIRS} pairs, seeds 0 to {args.sets - 1}")
    print(f"P(S > 12) = {exceedance(12.0):.6f}, P(S > 24) = {exceedance(24.0):.7f}")
    print(report)
    print("the first four training sets alone:")
    print(judged({name: samples[:4] for name, samples in made.items()}))
    print("| generator | P(S>12)/truth | P(S>24)/truth | tail flagged | "
          "nearest is a training event, copies, p | AUC, p |")  # fmt: skip
    print("|---|---|---|---|---|---|")
    for name, samples in made.items():
        cells = [
            f"{r.ratio:.3f} ± {r.ratio_error:.3f}" for r in report.table if r.generator == name
        ]
        flagged = "yes" if name in report.flagged else "no"
        near = nearest(samples, training)
        area = classified(samples[0], args.events)
        print(f"| {name} | {' | '.join(cells)} | {flagged} | {near} | {area} |", flush=True)
    print(f"{time.process_time() - start:.0f} CPU-s")


def nearest(samples: list[Tensor], training: list[Tensor]) -> str:
    """Memorisation of 1000 events of each training set: mean share and copies, smallest p."""
    found = [
        memorisation(
            logarithmic(y[:PAIRS]),
            logarithmic(x),
            logarithmic(pairs(PAIRS, 5_000_000 + k)),
            seed=k,
        )
        for k, (x, y) in enumerate(zip(training, samples, strict=True))
    ]
    share, copies = (np.mean([getattr(f, n) for f in found]) for n in ("share", "copies"))
    p = min(1.0, len(found) * min(f.p_value for f in found))
    return f"{share:.3f}, {100 * copies:.3g} %, {p:.2g}"


def classified(sample: Tensor, events: int) -> str:
    """Classifiers of events of the first training set against fresh ones."""
    result = classifier_test(
        pairs(events, 7_000_000),
        sample[:events],
        features={"logarithms": logarithmic},
        classifiers=("quadratic", "boosting"),
        retrainings=1,
    )
    return f"{result.auc:.3f} ± {result.auc_error:.3f}, {result.p_value:.2g}"


def bootstrap(args: argparse.Namespace) -> None:
    """Errors from one training set against the spread over training sets."""
    some = {name: GENERATORS[name] for name in BOOTSTRAPPED}
    exact = [exceedance(s) for s in THRESHOLDS]
    report = bootstrap_tails(
        some,
        pairs(PAIRS, 0),
        THRESHOLDS,
        probabilities=exact,
        statistic=total,
        resamplings=args.sets,
    )
    print(report)
    many, _, _ = compare(some, args.sets)
    print("| generator | threshold | error from one training set | spread over training sets |")
    print("|---|---|---|---|")
    for one, other in zip(report.table, many.table, strict=True):
        print(
            f"| {one.generator} | {one.threshold:g} | {one.error / one.true_share:.3f} | "
            f"{other.spread / one.true_share:.3f} |"
        )


def pairings(args: argparse.Namespace) -> None:
    """What 10^6 pairings of 1000 pairs are worth, and what the bootstrap says of it."""
    print(recombine(pairs(PAIRS, 0), [0, 1], thresholds=THRESHOLDS, statistic=total))
    found = []
    for seed in range(1000):
        a, b = np.random.default_rng(seed).lognormal(size=(2, PAIRS))
        b.sort()
        found.append([1 - np.searchsorted(b, s - a).mean() / PAIRS for s in THRESHOLDS])
    p, variance = np.mean(found, 0), np.var(found, 0)
    for s, share, v in zip(THRESHOLDS, p, variance, strict=True):
        print(f"beyond {s:g}: 1000 training sets, worth {share * (1 - share) / v:.0f} events")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["table", "bootstrap", "pairings"])
    parser.add_argument("--sets", type=int, default=8, help="training sets, or resamplings")
    parser.add_argument("--events", type=int, default=5000, help="of each sample classified")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"table": table, "bootstrap": bootstrap, "pairings": pairings}[args.what](args)


if __name__ == "__main__":
    main()
