"""How often generative checks whose p-value is not exact reject what is right.

    python -m benchmarks.generative_nulls                      # all of them, 2000 trials each
    python -m benchmarks.generative_nulls "weights" --trials 400

Nominal are 5 % and 1 %; the errors are binomial ones.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from scipy import stats

from flowpost.metrics import downstream, held_out_statistics, tails

SHARES = (0.02, 0.002)
PAIRS = 1000


def weighted(seed: int, events: int, null: str = "multiplier") -> dict[str, float]:
    """Plain events of N(0, 1) against a third as many of N(0.7, 1) weighted to it."""
    r = np.random.default_rng(seed)
    x, y = r.normal(size=events), r.normal(0.7, 1, events // 3)
    w = np.exp(0.7**2 / 2 - 0.7 * y)
    found = held_out_statistics(x, y, None, None, w, null=null, permutations=99, seed=seed)
    return {"p": found.p_value}


def resampled(seed: int) -> dict[str, float]:
    """Four sets of 1000 exponential events, resampled; thresholds with 20 and with two beyond."""
    r = np.random.default_rng(seed)
    made = [r.choice(x, 5000) for x in r.exponential(size=(4, PAIRS))]
    found = tails(
        {"g": made},
        stats.expon.isf(SHARES),
        probabilities=SHARES,
        training_size=PAIRS,
        bootstraps=100,
        seed=seed,
    )
    return {
        f"{share * PAIRS:g} beyond": row.p_value
        for share, row in zip(SHARES, found.table, strict=True)
    }


def residuals(seed: int) -> dict[str, float]:
    """300 residuals of each kind, of Student's distribution with four degrees of freedom."""
    true, made = np.random.default_rng(seed).standard_t(4, size=(2, 300, 1))
    found = downstream(lambda x: x, (true, 0 * true), (made, 0 * made), bootstraps=150, seed=seed)
    return {row.quantity: row.p_value for row in found.table}


NULLS: dict[str, Callable[[int], dict[str, float]]] = {
    "weights of one sample, 900 against 300 events": partial(weighted, events=900),
    "weights of one sample, 3600 against 1200 events": partial(weighted, events=3600),
    "the same, 900 against 300, permuted": partial(weighted, events=900, null="permutation"),
    "tails of resampled events": resampled,
    "downstream residuals": residuals,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("which", nargs="?", default="", help="part of the name of one of them")
    parser.add_argument("--trials", type=int, default=2000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in (n for n in NULLS if args.which in n):
        start = time.process_time()
        found = [NULLS[name](seed) for seed in range(args.trials)]
        for key in found[0]:
            p = np.array([trial[key] for trial in found])
            rates = [100 * (p <= level).mean() for level in (0.05, 0.01)]
            errors = [np.sqrt(rate * (100 - rate) / args.trials) for rate in rates]
            text = ", ".join(f"{r:.1f} ± {e:.1f} %" for r, e in zip(rates, errors, strict=True))
            print(f"{name}, {key}: {text} of {args.trials} at 5 % and at 1 %", flush=True)
        print(f"  {time.process_time() - start:.0f} CPU-s")


if __name__ == "__main__":
    main()
