r"""What the classifier two-sample test finds where the truth is known, and how often it is wrong.

    python -m benchmarks.classifier truths      # AUC and divergence against quadrature, 3 seeds
    python -m benchmarks.classifier null        # false positives, and those of the usual traps
    python -m benchmarks.classifier isotonic    # what a calibration does to the divergence
    python -m benchmarks.classifier ratio       # reweighting one normal distribution to another

`truths` takes 5000 events of each sample in five dimensions: x0 shifted by 0.5; all widths
times 1.2; a correlation of 0.5 between two columns. `null --trials 2000` takes some minutes.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy import integrate, stats

from flowpost.metrics import auc, classifier_test
from flowpost.metrics.calibrate import calibrate, log_loss
from flowpost.metrics.ranks import RankTest

DIM = 5
KINDS = ("shift 0.5", "scale 1.2", "correlation 0.5")
CLASSIFIERS = ("logistic", "quadratic", "boosting", "mlp")
Sampler = Callable[[int, np.random.Generator], np.ndarray]


def sample(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Draw (n, 5) of the first sample; the second one is standard normal."""
    x = rng.normal(size=(n, DIM))
    if kind == "shift 0.5":
        x[:, 0] += 0.5
    elif kind == "scale 1.2":
        x *= 1.2
    elif kind == "correlation 0.5":
        x[:, 1] = 0.5 * x[:, 0] + math.sqrt(0.75) * x[:, 1]
    return x


def log_ratio(kind: str, x: np.ndarray) -> np.ndarray:
    """Return ln p/q (n,) of events (n, 5)."""
    if kind == "shift 0.5":
        return 0.5 * x[:, 0] - 0.125
    if kind == "scale 1.2":
        return np.square(x).sum(1) / 2 * (1 - 1 / 1.44) - DIM * math.log(1.2)
    if kind == "correlation 0.5":
        a, b = x[:, 0], x[:, 1]
        inside = (a * a - a * b + b * b) / 0.75 - a * a - b * b
        return -inside / 2 - math.log(0.75) / 2
    return np.zeros(len(x))


def truth(kind: str, n: int = 1_000_000) -> tuple[float, float]:
    """AUC and divergence in bits; of a shift and a scale by quadrature, else of n draws."""
    if kind == "scale 1.2":
        # ‖x‖² is all that tells: χ² of five degrees of freedom, one of them times 1.44
        q, p = stats.chi2(DIM), stats.chi2(DIM, scale=1.44)
        area = integrate.quad(lambda r: p.pdf(r) * q.cdf(r), 0, 120, limit=400)[0]
        return area, divergence(p.pdf, q.pdf, 0.0, 120.0)
    if kind == "shift 0.5":
        q, p = stats.norm(), stats.norm(0.5)
        return stats.norm.cdf(0.5 / math.sqrt(2)), divergence(p.pdf, q.pdf, -12.0, 12.0)
    rng = np.random.default_rng(0)
    s, t = (log_ratio(kind, sample(k, n, rng)) for k in (kind, "null"))
    loss = [log_loss(v, np.full(n, side)).mean() for v, side in ((s, 1), (t, 0))]
    return auc(s, t), 1 - sum(loss) / 2


def divergence(p: Callable, q: Callable, low: float, high: float) -> float:
    """Jensen-Shannon divergence in bits of two densities on a line."""

    def part(r: float) -> float:
        a, b = p(r), q(r)
        terms = [v * math.log2(2 * v / (a + b)) for v in (a, b) if v > 0]
        return sum(terms) / 2

    return integrate.quad(part, low, high, limit=400)[0]


def truths(args: argparse.Namespace) -> None:
    """AUC and divergence of each classifier, the mean of seeds and their range."""
    print(f"{args.events} events of each sample, half of them tested, seeds 0 to {args.seeds - 1}")
    print("| | true AUC, JSD | " + " | ".join(CLASSIFIERS) + " | best (JSD) | p |")
    print("|---" * (len(CLASSIFIERS) + 4) + "|")
    start = time.process_time()
    for kind in (*KINDS, "null"):
        areas, best = [], []
        for seed in range(args.seeds):
            rng = np.random.default_rng(1000 + seed)
            x, y = sample(kind, args.events, rng), sample("null", args.events, rng)
            result = classifier_test(x, y, classifiers=CLASSIFIERS, retrainings=0, seed=seed)
            areas.append([row.auc for row in result.table])
            best.append([result.auc, result.jsd, result.p_value])
        area, jsd = truth(kind)
        cells = [f"{m:.3f} ({a:.3f} to {b:.3f})" for m, a, b in spread(areas)]
        chosen = " / ".join(f"{a:.3f} ({j:.3f})" for a, j, _ in best)
        p = ", ".join(f"{v[2]:.3g}" for v in best)
        print(f"| {kind} | {area:.3f}, {jsd:.3f} | {' | '.join(cells)} | {chosen} | {p} |")
    print(f"{time.process_time() - start:.0f} CPU-s")


def spread(values: list[list[float]]) -> list[tuple[float, float, float]]:
    table = np.array(values)
    return list(zip(table.mean(0), table.min(0), table.max(0), strict=True))


# --- false positives -----------------------------------------------------------------------------


def pooled_folds(seed: int, n: int) -> float:
    """The usual trap: scores of five folds pooled, and an error as if they were independent."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedKFold, cross_val_predict

    rng = np.random.default_rng(seed)
    data, target = rng.normal(size=(2 * n, DIM)), np.repeat([1, 0], n)
    folds = StratifiedKFold(5, shuffle=True, random_state=seed)
    scores = cross_val_predict(
        LogisticRegression(), data, target, cv=folds, method="decision_function"
    )
    area = auc(scores[:n], scores[n:])
    error = math.sqrt((2 * n + 1) / (12 * n * n))
    return 2 * stats.norm.sf(abs(area - 0.5) / error)


def plain(seed: int, n: int) -> float:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, DIM))
    return small(x, y, seed=seed)


def small(x: np.ndarray, y: np.ndarray, seed: int, **options: object) -> float:
    """P-value with small classifiers and few permutations."""
    from sklearn.tree import DecisionTreeClassifier

    tree = DecisionTreeClassifier(max_depth=3, min_samples_leaf=5)
    chosen = {"classifiers": {"logistic": "logistic", "tree": tree}, "retrainings": 0}
    return classifier_test(x, y, **{**chosen, "permutations": 199, "seed": seed, **options}).p_value


def alike_weights(seed: int, n: int) -> float:
    """Weights of one kind, which grow with x0, in both samples."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(2, n, DIM))
    a, b = (np.exp(0.5 * v[:, 0]) * rng.exponential(size=n) for v in (x, y))
    return small(x, y, seed=seed, weight_x=a, weight_y=b)


def one_sided_weights(seed: int, n: int) -> float:
    """Unit weights against fewer events from another density, weighted to the first."""
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(6 * n, DIM)), rng.normal(size=(4 * n, DIM))
    y[:, 0] += 0.5
    return small(x, y, seed=seed, weight_y=np.exp(0.125 - 0.5 * y[:, 0]))


def scored(seed: int, n: int, studentise: bool) -> float:
    """Heavier weights, largest at the highest score -x0; the AUC is the statistic.

    Studentised, it is divided by its error in each permutation.
    """
    rng = np.random.default_rng(seed)
    m = 5 * n
    x, y = rng.normal(size=3 * m), 1 + rng.normal(size=m)
    weight = np.concatenate([np.ones(3 * m), np.exp(0.5 - y)])
    label = np.tile(np.arange(4 * m) < 3 * m, (200, 1))
    label[1:] = rng.permuted(label[1:], axis=1)
    first = label * weight
    found = RankTest(-np.concatenate([x, y]))(first, weight - first)[int(studentise)]
    return (1 + (found[1:] >= found[0]).sum()) / 200


def pairs(seed: int, n: int) -> float:
    """Two labels of each event, of one posterior."""
    rng = np.random.default_rng(seed)
    c = 3 * rng.normal(size=(n, 2))
    x, y = (np.concatenate([c, c + rng.normal(size=(n, 2))], 1) for _ in range(2))
    return small(x, y, seed=seed, paired=True)


NULLS: dict[str, Callable[[int, int], float]] = {
    "no weights": plain,
    "pairs": pairs,
    "weights of one kind": alike_weights,
    "weights of one sample": one_sided_weights,
    "heavy weights of one sample": partial(scored, studentise=True),
    "the same, AUC not studentised": partial(scored, studentise=False),
    "pooled folds, analytic error": pooled_folds,
}


EXACT = ("no weights", "pairs", "weights of one kind")


def null(args: argparse.Namespace) -> None:
    """Share of trials with p of at most 0.05, and the distance of p from uniform."""
    for name, one in NULLS.items():
        trials = args.trials if name in EXACT else args.trials // 2
        start = time.process_time()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            p = np.array([one(seed, args.events_null) for seed in range(trials)])
        print(
            f"{name:<34} {trials} trials, p <= 0.05 in {100 * (p <= 0.05).mean():5.2f} %, "
            f"<= 0.01 in {100 * (p <= 0.01).mean():5.2f} %, KS distance "
            f"{stats.kstest(p, 'uniform').statistic:.4f}, {time.process_time() - start:.0f} CPU-s",
            flush=True,
        )


# --- calibration and weights ---------------------------------------------------------------------


def isotonic(args: argparse.Namespace) -> None:
    """Divergence after each calibration of exact scores, which need none, on so many events."""
    print("| events | true JSD | none | Platt | isotonic | chosen |")
    print("|---|---|---|---|---|---|")
    for kind in ("null", "shift 0.5"):
        exact = truth(kind)[1] if kind != "null" else 0.0
        for n in (500, 2000, 20_000):
            found = {m: [] for m in ("none", "platt", "isotonic", "auto")}
            for seed in range(args.repeats):
                rng = np.random.default_rng(seed)
                target = np.repeat([1, 0], n // 2)
                held = scores(kind, n // 2, rng)
                fresh, truth_of = scores(kind, 50_000, rng), np.repeat([1, 0], 50_000)
                for method, values in found.items():
                    fit = calibrate(held, target, np.ones(n), method, True, rng)[1]
                    values.append(1 - log_loss(fit(fresh), truth_of).mean())
            row = " | ".join(f"{np.mean(v):.4f} ± {np.std(v):.4f}" for v in found.values())
            print(f"| {kind}, {n} | {exact:.4f} | {row} |", flush=True)


def scores(kind: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """Exact log ratios of both samples; of equal ones those of a column, as a training has them."""
    both = np.concatenate([sample(kind, n, rng), sample("null", n, rng)])
    return 0.1 * both[:, 0] if kind == "null" else log_ratio(kind, both)


def ratio(args: argparse.Namespace) -> None:
    """Weights of a normal sample that make it wider: true tail shape 1 − 1/σ²."""
    for width in (1.2, 1.5, 2.0):
        rng = np.random.default_rng(args.seeds)
        x, y = width * rng.normal(size=(20_000, 1)), rng.normal(size=(20_000, 1))
        result = classifier_test(x, y, classifiers="quadratic", retrainings=0)
        fresh = rng.normal(size=(20_000, 1))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            weight = result.ratio(fresh)
        again = classifier_test(
            width * rng.normal(size=(20_000, 1)), fresh, weight_y=weight, retrainings=0
        )
        second = float((weight * torch.as_tensor(fresh[:, 0]).square()).sum() / weight.sum())
        print(f"width {width}: true shape {1 - 1 / width**2:.2f}; {result.ratio}")
        print(f"  variance after reweighting {second:.3f}, wanted {width**2:.3f}")
        print(f"  test of the reweighted: AUC {again.auc:.4f}, p {again.p_value:.3f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["truths", "null", "isotonic", "ratio"])
    parser.add_argument("--events", type=int, default=5000, help="of each sample in `truths`")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=2000, help="of each null")
    parser.add_argument("--events-null", type=int, default=100, help="of a sample in `null`")
    parser.add_argument("--repeats", type=int, default=20, help="of `isotonic`")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"truths": truths, "null": null, "isotonic": isotonic, "ratio": ratio}[args.what](args)


if __name__ == "__main__":
    main()
