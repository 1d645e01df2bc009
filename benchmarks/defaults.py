"""Choose flowpost's untuned defaults by measurement, on simulators with exact posteriors.

Each method is trained on 10 000 simulated events. At a few observed events, a classifier is then
asked to tell its posterior draws from exact ones (C2ST: its cross-validated accuracy, 0.5 if it
cannot, 1 if it always can), and the mean NLL of fresh events is compared with the exact one.

    python benchmarks/defaults.py               # all simulators and methods, ten minutes or more
    python benchmarks/defaults.py --simulators crescents ring --methods zuko-nsf --seeds 0 1
    python benchmarks/defaults.py --methods flowpost --label wide --set encoder.hidden=128 layers=3
    python benchmarks/defaults.py --fast        # does it run?

Sources: D. Lopez-Paz, M. Oquab, *Revisiting classifier two-sample tests*, 2017,
https://arxiv.org/abs/1610.06545; J.-M. Lueckmann et al., *Benchmarking simulation-based
inference*, 2021, https://arxiv.org/abs/2101.04653 (tasks, classifier).
"""

from __future__ import annotations

import argparse
import ast
import json
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from methods import METHODS, Options
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.exceptions import ConvergenceWarning
from sklearn.model_selection import KFold, cross_val_score
from sklearn.neural_network import MLPClassifier
from threadpoolctl import threadpool_limits  # type: ignore[import-untyped]
from torch import Tensor

from flowpost.simulators.posteriors import Crescents, FourModes, NoisyIdentity, Ring, WidthMixture

HELD_OUT_SEED, OBSERVED_SEED, DRAW_SEED = 10_000, 20_000, 30_000

SIMULATORS: dict[str, Callable[[], Any]] = {
    "crescents": Crescents,
    "mixture": WidthMixture,
    "four-modes": FourModes,
    "linear": NoisyIdentity,
    "linear-uniform": lambda: NoisyIdentity(prior="uniform"),
    "ring": Ring,
}
# their exact density takes a grid per event
SLOW_EVIDENCE = {"four-modes": 400, "ring": 1000}


@dataclass
class Record:
    """One training: C2ST per observed event by either classifier, NLL, gap to the exact NLL."""

    simulator: str
    method: str
    seed: int
    mlp: list[float]
    boosting: list[float]
    nll: float
    gap: float
    gap_error: float
    outside: float
    train_cpu: float
    options: Options

    @property
    def c2st(self) -> float:
        """The larger of the two accuracies at each observed event, averaged."""
        return float(np.maximum(self.mlp, self.boosting).mean())


# --- measures ------------------------------------------------------------------------------------


def c2st(exact: Tensor, draws: Tensor, seed: int = 0) -> tuple[float, float]:
    """Return the five-fold accuracy of an MLP and of boosted trees, 0.5 if nothing can be told.

    The MLP is that of sbibm, two hidden layers of 10 D, stopped early: in ten dimensions it
    overfits 2000 + 2000 draws and then misses differences that trees find (0.57 against 0.63).

    Arguments:
        exact: Draws of the exact posterior, shape (S, D); both sets are standardised by them.
        draws: Draws of the posterior under test, shape (S, D).
        seed: Seed of folds and classifiers.
    """
    mean, std = exact.mean(0), exact.std(0)
    # draws beyond 1e4 standard deviations are as good as recognised
    data = ((torch.cat((exact, draws)) - mean) / std).clamp(-1e4, 1e4).double().numpy()
    target = np.repeat([0, 1], [len(exact), len(draws)])
    folds = KFold(5, shuffle=True, random_state=seed)
    hidden = 10 * data.shape[1]
    classifiers = (
        MLPClassifier(
            (hidden, hidden),
            batch_size=256,
            max_iter=100,
            early_stopping=True,
            n_iter_no_change=20,
            random_state=seed,
        ),
        HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=seed),
    )
    with warnings.catch_warnings(), threadpool_limits(1):
        warnings.simplefilter("ignore", ConvergenceWarning)
        scores = [cross_val_score(c, data, target, cv=folds).mean() for c in classifiers]
    return float(scores[0]), float(scores[1])


class Task:
    """A simulator with its held-out events, observed events and exact draws, made once."""

    def __init__(self, name: str, observations: int, draws: int, held_out: int):
        self.name, self.simulator = name, SIMULATORS[name]()
        self.x, self.z = self.simulator.sample(held_out, seed=HELD_OUT_SEED)
        some = min(SLOW_EVIDENCE.get(name, held_out), held_out)
        self.exact = self.simulator.log_posterior(self.z[:some], self.x[:some])
        self.observed, _ = self.simulator.sample(observations, seed=OBSERVED_SEED)
        self.draws = [
            self.simulator.posterior_sample(x, draws, seed=DRAW_SEED + i)
            for i, x in enumerate(self.observed)
        ]

    def measure(self, method: str, label: str, seed: int, n: int, options: Options) -> Record:
        """Train a method on n simulations of a seed and measure it."""
        x, z = self.simulator.sample(n, seed=seed)
        start = time.process_time()
        trained = METHODS[method](self.simulator, x, z, seed, options)
        cpu = time.process_time() - start
        log_q = trained.log_prob(self.x, self.z).double()
        differences = self.exact - log_q[: len(self.exact)]
        scores, outside = [], []
        generator = torch.Generator().manual_seed(seed)
        for x_o, exact in zip(self.observed, self.draws, strict=True):
            draws = trained.sample(x_o, len(exact), generator)
            scores.append(c2st(exact, draws))
            outside.append(self._outside(draws))
        mlp, boosting = (list(s) for s in zip(*scores, strict=True))
        return Record(
            simulator=self.name,
            method=label,
            seed=seed,
            mlp=mlp,
            boosting=boosting,
            nll=-float(log_q.mean()),
            gap=float(differences.mean()),
            gap_error=float(differences.std()) / len(differences) ** 0.5,
            outside=float(np.mean(outside)),
            train_cpu=cpu,
            options=options,
        )

    def _outside(self, draws: Tensor) -> float:
        """Return the fraction of draws outside the prior's box."""
        if self.simulator.bounds is None:
            return 0.0
        lower, upper = self.simulator.bounds
        return float(((draws < lower) | (draws > upper)).any(-1).double().mean())


# --- tables --------------------------------------------------------------------------------------


def table(records: list[Record]) -> str:
    """Return a Markdown table, one line per simulator and method, averaged over seeds."""
    lines = [
        "| simulator | method | seeds | C2ST (worse of two) | MLP | trees | NLL | gap to exact "
        "| outside the box | training, CPU s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    keys = list(dict.fromkeys((r.simulator, r.method) for r in records))
    order = list(SIMULATORS)
    for simulator, method in sorted(keys, key=lambda k: order.index(k[0])):
        group = [r for r in records if (r.simulator, r.method) == (simulator, method)]
        scores = [r.c2st for r in group]
        spread = f" ± {np.std(scores, ddof=1):.3f}" if len(group) > 1 else ""

        def mean(name: str, group: list[Record] = group) -> float:
            return float(np.mean([np.mean(getattr(r, name)) for r in group]))

        lines.append(
            f"| {simulator} | {method} | {len(group)} | {np.mean(scores):.3f}{spread} "
            f"| {mean('mlp'):.3f} | {mean('boosting'):.3f} | {mean('nll'):.3f} "
            f"| {mean('gap'):.3f} ± {mean('gap_error'):.3f} | {mean('outside'):.4f} "
            f"| {mean('train_cpu'):.1f} |"
        )
    return "\n".join(lines)


def read(path: Path) -> list[Record]:
    if not path.exists():
        return []
    return [Record(**r) for r in json.loads(path.read_text())]


def merge(old: list[Record], new: Record) -> list[Record]:
    """Replace the record of the same simulator, method and seed."""
    key = (new.simulator, new.method, new.seed)
    return [r for r in old if (r.simulator, r.method, r.seed) != key] + [new]


def parse_options(items: list[str]) -> Options:
    """Read KEY=VALUE, where a value is a Python literal or else a string."""
    options: Options = {}
    for item in items:
        key, _, text = item.partition("=")
        try:
            options[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            options[key] = text
    return options


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--simulators", nargs="+", choices=SIMULATORS, default=list(SIMULATORS))
    parser.add_argument(
        "--methods", nargs="+", choices=METHODS, default=["flowpost", "flowpost-real", "zuko-nsf"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="for each method")
    parser.add_argument("--label", help="name of a variant in the table; default: the method's")
    parser.add_argument("--simulations", type=int, default=10_000)
    parser.add_argument("--observations", type=int, default=5)
    parser.add_argument("--draws", type=int, default=2000)
    parser.add_argument("--held-out", type=int, default=20_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="records are merged into this file")
    parser.add_argument("--markdown", type=Path, help="the table of all records goes here")
    parser.add_argument("--fast", action="store_true", help="tiny sizes: does it run?")
    args = parser.parse_args(argv)
    if args.fast:
        args.simulations, args.observations, args.draws, args.held_out = 1000, 1, 200, 200
    return args


def main(argv: list[str] | None = None) -> list[Record]:
    args = parse(argv)
    torch.set_num_threads(args.threads)
    options = parse_options(args.set)
    if args.fast:
        options = {"epochs": 2} | options
    records = read(args.json) if args.json else []
    for name in args.simulators:
        task = Task(name, args.observations, args.draws, args.held_out)
        for method in args.methods:
            for seed in args.seeds:
                label = args.label if args.label and method.startswith("flowpost") else method
                record = task.measure(method, label, seed, args.simulations, options)
                print(
                    f"{name} {label} seed {seed}: C2ST {record.c2st:.3f}, NLL {record.nll:.3f}, "
                    f"gap {record.gap:.3f} ± {record.gap_error:.3f}, {record.train_cpu:.1f} CPU s",
                    flush=True,
                )
                records = merge(records, record)
                if args.json:
                    args.json.write_text(json.dumps([asdict(r) for r in records], indent=1))
    print(table(records))
    if args.markdown:
        args.markdown.write_text(table(records) + "\n")
    return records


if __name__ == "__main__":
    main()
