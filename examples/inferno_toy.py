r"""A summary trained for the measurement itself, against a classifier: the toy problem of INFERNO.

    python examples/inferno_toy.py              # some minutes
    python examples/inferno_toy.py --fast

50 signal events lie on 1000 background events whose place and slope are not known exactly. A
classifier with ten bins knows nothing of that; soft bins are trained on the uncertainty itself,
with the nuisances profiled. Prints the expected uncertainty on the signal for five assumptions
about the nuisances, and for the hardest one draws templates and likelihood scans, and writes a
workspace that pyhf reads.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import nn

from flowpost import inferno
from flowpost.encoders import Tabular
from flowpost.simulators import InfernoToy

PUBLISHED = {
    "published: classifier, 10 bins": (14.99, 18.94, 23.94, 21.54, 26.71),
    "published: INFERNO": (15.71, 16.89, 16.95, 16.88, 18.68),
}


def events(toy, size, seed):
    """Signal and background events by name."""
    return {
        name: toy.sample(name, size, seed=2 * seed + i)
        for i, name in enumerate(("signal", "background"))
    }


def train(model, data, bins, **options):
    """Soft bins, and a classifier on an encoder of the same kind."""
    torch.manual_seed(0)
    summary = inferno.SummaryModel(
        Tabular(3, context=64, hidden=64, layers=2, dropout=0.0), inferno.SoftBins(64, bins)
    )
    print(inferno.fit(summary, inferno.InfernoLoss(model, spread=0.5), data, **options))
    encoder = Tabular(3, context=64, hidden=64, layers=2, dropout=0.0)
    classifier = nn.Sequential(
        encoder.fit_scale(torch.cat(list(data.values()))), nn.SiLU(), nn.Linear(64, 1)
    )
    print(inferno.fit(classifier, inferno.CrossEntropyLoss(model), data, **options))
    return summary, inferno.score(classifier)


def table(summary, score, held, test, bins):
    """Expected uncertainty on the signal for each benchmark, by way of the summary."""
    uniform = inferno.Binning.uniform(bins)
    rows = {"limit": []} | {name: [] for name in ("uniform", "optimised", "INFERNO")}
    for benchmark in range(5):
        toy = InfernoToy(benchmark)
        model = inferno.toy_model(toy)
        best = inferno.optimised(model, score, held, bins)

        def width(assign, model=model):
            return inferno.hard_information(model, assign, test, bins).width

        rows["limit"].append(toy.limit())
        rows["uniform"].append(width(lambda x: uniform(score(x))))
        rows["optimised"].append(width(lambda x, best=best: best(score(x))))
        rows["INFERNO"].append(width(summary.assign))
    names = {
        "limit": "unbinned limit",
        "uniform": f"classifier, {bins} uniform bins",
        "optimised": f"classifier, {bins} optimised bins",
        "INFERNO": f"INFERNO, {bins} bins",
    }
    print("uncertainty on s, benchmarks 0 to 4")
    for name, values in ({names[k]: v for k, v in rows.items()} | PUBLISHED).items():
        print(f"{name:<36}" + "".join(f"{v:7.2f}" for v in values))
    return best


def draw(counts, scans, out):
    """Templates of the summary, and the likelihood scans of both summaries."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(7, 7), layout="constrained")
    counts.ordered().plot(ax=figure.add_subplot())
    figure.savefig(out / "templates.png", dpi=150)
    figure, axes = plt.subplots(1, 2, figsize=(9, 4), layout="constrained", sharey=True)
    for ax, (name, scan) in zip(axes, scans.items(), strict=True):
        scan.plot(ax=ax).set_title(name)
    figure.savefig(out / "scan.png", dpi=150)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fast", action="store_true", help="a small run, for tests")
    parser.add_argument("--quiet", action="store_true", help="without progress bars")
    parser.add_argument("--out", type=Path, default=Path("inferno"))
    options = parser.parse_args(arguments)
    size, tests, epochs, bins = (2000, 5000, 3, 5) if options.fast else (100_000, 500_000, 20, 10)

    toy = InfernoToy(4)
    model = inferno.toy_model(toy)
    print(model)
    data, held, test = (events(toy, n, seed) for seed, n in enumerate((size, size, tests)))
    summary, score = train(model, data, bins, epochs=epochs, progress=not options.quiet)
    best = table(summary, score, held, test, bins)

    binned = inferno.templates(model, summary, test)
    other = inferno.templates(model, lambda x: best(score(x)), test, bins=bins)
    scans = {"classifier": other.profile(), "INFERNO": binned.profile()}
    for name, scan in scans.items():
        print(f"{name}: {scan}")
    options.out.mkdir(parents=True, exist_ok=True)
    draw(binned, scans, options.out)
    (options.out / "workspace.json").write_text(json.dumps(binned.workspace(), indent=2))
    print(f"templates.png, scan.png and workspace.json are in {options.out}")


if __name__ == "__main__":
    main()
