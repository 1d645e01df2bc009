r"""What recalibration, conformal levels and local coverage promise, measured over many fits.

    python -m benchmarks.recalibration recalibrate   # coverage and NLL of fresh events
    python -m benchmarks.recalibration conformal     # share in regions of 90 %, over splits
    python -m benchmarks.recalibration local         # a head that is narrow only where x0 > 1
    python -m benchmarks.recalibration null          # false positives of local coverage

The exact posterior is known: z ~ N(0, I₂), x = z + N(0, I₂/4), so that q(z|x) = N(0.8 x, 0.2 I₂).
`recalibrate` and `conformal` make it too narrow or biased; `null` leaves it as it is.
"""

from __future__ import annotations

import argparse
import math
import time
import warnings

import numpy as np
import torch
from torch import Tensor

import flowpost as fp
from flowpost.calibration import Recalibrator, conformal_levels
from flowpost.diagnostics import hpd_levels, local_coverage

SIGMA = math.sqrt(0.2)
NAMES = ("x0", "x1")
# width, bias in σ, map the coordinates too
HEADS = {
    "exact": (1.0, 0.0, False),
    "exact, with coordinates": (1.0, 0.0, True),
    "widths × 0.7": (0.7, 0.0, False),
    "widths × 1.4": (1.4, 0.0, False),
    "biased by 0.5 σ": (1.0, 0.5, False),
    "biased by 0.5 σ, with coordinates": (1.0, 0.5, True),
    "both, with coordinates": (0.7, 0.5, True),
}
# width, bias in σ
CONFORMAL = {
    "widths × 0.7": (0.7, 0.0),
    "widths × 0.3": (0.3, 0.0),
    "widths × 0.1": (0.1, 0.0),
    "widths × 1.4": (1.4, 0.0),
    "biased by 0.5 σ": (1.0, 0.5),
}


def model_of(width: float = 1.0, bias: float = 0.0) -> fp.PosteriorModel:
    """The exact model, its widths multiplied and its mean shifted in units of σ."""
    head = fp.PosteriorHead(2, fp.Real(2), flow="diagonal")
    with torch.no_grad():
        head.flow.weight[:2] = 0.8 * torch.eye(2)
        head.flow.bias[:2] = bias * SIGMA
        head.flow.bias[2:4] = math.log(width * SIGMA)
    return fp.PosteriorModel(None, head).eval().requires_grad_(False)


def measured(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels (n, 2)."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 2, generator=generator)
    return z + 0.5 * torch.randn(n, 2, generator=generator), z


def recalibrate(args: argparse.Namespace) -> None:
    """Largest distance of the coverage of fresh events from nominal, and their NLL."""
    x, z = measured(50_000, 1_000_000)
    exact = float(model_of()(x).log_prob(z).mean())
    limit = 1.63 * math.sqrt(1 / args.events + 1 / len(z))
    print(f"{args.events} held-out events, {len(z)} fresh ones, {args.fits} fits each")
    print(f"off by: {limit:.4f} is the two-sample 1 % point; NLL in nats above the exact one")
    print("| head | off by, before | after: mean, most | above | NLL before | after: mean, most |")
    print("|---" * 6 + "|")
    for name, (width, bias, coordinates) in HEADS.items():
        model = model_of(width, bias)
        u, log_q = model(x).to_base_and_log_prob(z)
        gaps, losses = [], []
        for seed in range(args.fits):
            fitted = Recalibrator(model, coordinates=coordinates)
            v, log_p = fitted.fit(*measured(args.events, seed))(x).to_base_and_log_prob(z)
            gaps.append(fp.coverage(v).ks_statistic)
            losses.append(exact - float(log_p.mean()))
        print(
            f"| {name} | {fp.coverage(u).ks_statistic:.3f} | {np.mean(gaps):.4f}, {max(gaps):.4f} "
            f"| {sum(g > limit for g in gaps)} of {args.fits} "
            f"| {exact - float(log_q.mean()):.4f} | {np.mean(losses):.4f}, {max(losses):.4f} |",
            flush=True,
        )


def conformal(args: argparse.Namespace) -> None:
    """Share of fresh labels in the region of 90 %, over splits into held-out and fresh events."""
    count = args.events + 50_000
    x, z = measured(count, 7)
    print(f"{args.splits} splits of {count} events: {args.events} held out")
    print("| head, regions | nominal 90 % holds | conformal 90 % holds, mean | of one split |")
    print("|---|---|---|---|")
    for name, head in CONFORMAL.items():
        q = model_of(*head)(x)
        for kind in ("base", "hpd"):
            if kind == "base":
                # credible levels of heads that are far too narrow round to 1
                levels = q.to_base(z).double().square().sum(-1)
            else:
                levels = hpd_levels(q, z, 256, torch.Generator().manual_seed(0))[0]
            shares = []
            for seed in range(args.splits):
                order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
                used = conformal_levels(levels[order[: args.events]], 0.1)
                shares.append(float((levels[order[args.events :]] <= used).double().mean()))
            nominal = -2 * math.log(0.1) if kind == "base" else 0.9
            plain = 100 * float((levels <= nominal).double().mean())
            print(
                f"| {name}, {kind} | {plain:.2f} % | {100 * np.mean(shares):.3f} % "
                f"| ± {100 * np.std(shares):.2f} % |",
                flush=True,
            )


def seen(n: int, seed: int, narrow: bool) -> tuple[Tensor, Tensor]:
    """Base coordinates of the exact head, or of one with widths × 0.7 where x0 > 1; and inputs."""
    x, z = measured(n, 10_000 + seed)
    u = model_of()(x).to_base(z)
    return torch.where(x[:, :1] > 1, u / 0.7, u) if narrow else u, x


def local(args: argparse.Namespace) -> None:
    """What is found of widths × 0.7 where x0 > 1, which is true of 19 % of the events."""
    print("| events | coverage of all: p | local: p | worst region, its p | holds, of 90 % |")
    print("|---|---|---|---|---|")
    for n in (1000, args.events):
        for seed in range(args.seeds):
            u, x = seen(n, seed, True)
            result = local_coverage(u, x, names=NAMES, seed=seed, trials=args.trials)
            plain = fp.coverage(u).ks_pvalue
            worst = next(r for r in result.regions if r.bounds)
            print(
                f"| {n} | {plain:.2g} | {result.p_value:.3g} | {worst.name}, {worst.p_value:.2g} "
                f"| {100 * worst.coverage.coverage_at(0.9):.0f} % |",
                flush=True,
            )


def null(args: argparse.Namespace) -> None:
    """Share of exact heads that are said to fail at 5 %, by the whole and by any region."""
    p, regions, alarms = [], [], 0
    for seed in range(args.nulls):
        # ends as soon as one trial is above: p = 1/l is exact, and at most 0.05 for none of 19
        u, x = seen(args.events_null, seed, False)
        result = local_coverage(u, x, names=NAMES, seed=seed, trials=19, stop=1)
        p.append(result.p_value)
        regions.append(min(r.p_value for r in result.regions))
        alarms += bool(result.failing)
    error = 100 * math.sqrt(0.05 * 0.95 / args.nulls)
    print(f"{args.nulls} exact heads, {args.events_null} events each; standard error {error:.1f} %")
    print("| | p ≤ 0.05 | p ≤ 0.5 |\n|---|---|---|")
    for name, values in (("of T", p), ("smallest of all regions", regions)):
        shares = (100 * (np.array(values) <= level + 1e-9).mean() for level in (0.05, 0.5))
        print(f"| {name} | " + " | ".join(f"{s:.1f} %" for s in shares) + " |")
    print(f"regions with p < 0.01, as `failing` lists them: in {100 * alarms / args.nulls:.1f} %")


COMMANDS = {"recalibrate": recalibrate, "conformal": conformal, "local": local, "null": null}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="what", required=True)
    for name, function in COMMANDS.items():
        command = commands.add_parser(name, help=function.__doc__)
        if name != "null":
            command.add_argument("--events", type=int, default=5000, help="held out")
    commands.choices["recalibrate"].add_argument("--fits", type=int, default=100)
    commands.choices["conformal"].add_argument("--splits", type=int, default=200)
    commands.choices["local"].add_argument("--seeds", type=int, default=3)
    commands.choices["local"].add_argument("--trials", type=int, default=119)
    commands.choices["null"].add_argument("--nulls", type=int, default=400)
    commands.choices["null"].add_argument("--events-null", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        COMMANDS[args.what](args)
    print(f"{time.process_time() - start:.0f} CPU-s")


if __name__ == "__main__":
    main()
