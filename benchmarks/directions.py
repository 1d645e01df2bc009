"""How close heads on the sphere come to densities of which everything is known.

    python -m benchmarks.directions widths     # one network from 1″ to 60°
    python -m benchmarks.directions widths --held 200000  # and recalibrated in bins of the width
    python -m benchmarks.directions shapes      # vMF, Kent, ring, modes, uniform: KL to the truth
    python -m benchmarks.directions shapes --conditional
    python -m benchmarks.directions reverse     # the four modes of arXiv:2002.02428 by reverse KL
    python -m benchmarks.directions places      # 5000 draws of fine structure all over the sky

`shapes --only ring --draws 200000` measures a part; `--seeds 0 1` repeats.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import flowpost as fp
from benchmarks.sphere_targets import DEGREE, DOUBLE, SHAPES, Target, place, places
from flowpost.calibration import Recalibrator
from flowpost.simulators.directions import Directions

TEST = 100_000
DECADES = (1.0, 10.0, 100.0, 1000.0, 3600.0, 36_000.0, 216_000.0)


def widths(
    reference: bool, seed: int, events: int = 200_000, epochs: int = 30, held: int = 0
) -> list[dict]:
    """Train one head for all widths; gap and coverage in each decade of σ (arc-seconds).

    With `held` events, those of the head recalibrated by them in each decade follow.
    """
    simulator = Directions(sigma_min=1 / 3600 if reference else 1.0, sigma_max=60.0)
    x, z = simulator.sample(events, seed=1000 + seed)
    fresh_x, fresh_z = simulator.sample(TEST, seed=2000 + seed)
    torch.manual_seed(seed)
    # with so many events of four noiseless numbers nothing is learned by heart
    encoder = fp.encoders.Tabular(x.shape[1], 64, dropout=0.0)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(64, fp.Sphere(), dropout=0.0))
    data = {"x": x, "z": z} | ({"reference": simulator.reference(x)} if reference else {})
    fp.fit(model, data, epochs=epochs, batch_size=512, seed=seed, progress=False)
    edges = DECADES if reference else DECADES[4:]
    true_nll = simulator.true_nll(fresh_x, fresh_z)

    def arcseconds(x: Tensor) -> Tensor:
        return simulator.sigma(x) / DEGREE * 3600

    def scored(model: Any) -> list[dict]:
        with torch.no_grad():
            guess = simulator.reference(fresh_x) if reference else None
            u, log_prob = model(fresh_x, reference=guess).to_base_and_log_prob(fresh_z)
        gap = -true_nll - log_prob.double()
        sigma = arcseconds(fresh_x)
        return [
            _row(low, high, u[some], gap[some])
            for low, high in pairwise(edges)
            if (some := (sigma >= low) & (sigma < high)).any()
        ]

    rows = scored(model)
    if held:
        x, z = simulator.sample(held, seed=4000 + seed)
        guess = simulator.reference(x) if reference else None
        mended = Recalibrator(model, bins=edges[1:-1]).fit(x, z, by=arcseconds, reference=guess)
        rows += scored(mended)
    return rows


def _row(low: float, high: float, u: Tensor, gap: Tensor) -> dict:
    cov = fp.coverage(u)
    return {
        "from": low,
        "to": high,
        "gap": float(gap.mean()),
        "ks_pvalue": float(cov.ks_pvalue),
        "deviation": cov.max_gap,
        "within_band": cov.within_band,
    }


def turns(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Two angles (n, 2) and the rotations (n, 3, 3) that they stand for."""
    a = 2 * torch.rand(n, 2, generator=generator, dtype=DOUBLE) - 1
    c, s = a.cos(), a.sin()
    zero, one = torch.zeros(n, dtype=DOUBLE), torch.ones(n, dtype=DOUBLE)
    about_z = torch.stack([c[:, 0], -s[:, 0], zero, s[:, 0], c[:, 0], zero, zero, zero, one], -1)
    about_y = torch.stack([c[:, 1], zero, s[:, 1], zero, one, zero, -s[:, 1], zero, c[:, 1]], -1)
    return a, about_z.unflatten(-1, (3, 3)) @ about_y.unflatten(-1, (3, 3))


def shape(
    target: Target, conditional: bool, seed: int, draws: int, epochs: int, lr: float = 1e-3
) -> dict:
    """Train the default head on draws of a target, or of the target turned by what x says."""
    generator = torch.Generator().manual_seed(3000 + seed)
    z, fresh = target.sample(draws, generator), target.sample(TEST, generator)
    log_true = target.log_prob(fresh)
    options: dict[str, Any] = {"epochs": epochs, "lr": lr, "seed": seed, "progress": False}
    torch.manual_seed(seed)
    start = time.process_time()
    if conditional:
        x, rotation = turns(draws, generator)
        fresh_x, fresh_rotation = turns(TEST, generator)
        z = (rotation @ z[..., None])[..., 0]
        fresh = (fresh_rotation @ fresh[..., None])[..., 0]
        encoder = fp.encoders.Tabular(2, 64, dropout=0.0)
        model = fp.PosteriorModel(encoder, fp.PosteriorHead(64, fp.Sphere()))
        fp.fit(model, (x.float(), z.float()), **options)
        with torch.no_grad():
            q = model(fresh_x.float())
    else:
        model = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Sphere()))
        fp.fit(model, z.float(), **options)
        q = model(None)
    with torch.no_grad():
        loss = log_true - q.log_prob(fresh).double()
        result = {
            "kl": float(loss.mean()),
            "error": float(loss.std()) / math.sqrt(TEST),
            "cpu": time.process_time() - start,
        }
        if not conditional:
            result["antipode"] = antipode(q, q.log_prob, 3.0)
            result["true_antipode"] = antipode(q, target.log_prob, 3.0)
            # where the density varies by itself, what an antipode adds shows close to it
            result["close"] = antipode(q, q.log_prob, 0.1)
    return result


def antipode(
    q: fp.Posterior, log_prob: Callable[[Tensor], Tensor], within: float
) -> tuple[float, float]:
    """Least and largest density within some degrees of the antipode of μ.

    Over the mean density from there to twice as far.
    """
    block, at = next(q._flow._placements())
    axis = -block.space._frame(at, DOUBLE)[0]
    generator = torch.Generator().manual_seed(0)

    def density(low: float, high: float) -> Tensor:
        share = torch.rand(4000, generator=generator, dtype=DOUBLE)
        angle = (low + (high - low) * share) * DEGREE
        azimuth = 2 * math.pi * torch.rand(4000, generator=generator, dtype=DOUBLE)
        z = place(axis.expand(4000, 3), 2 * (angle / 2).sin() ** 2, azimuth)
        return log_prob(z).double()

    around = torch.logsumexp(density(within, 2 * within), 0) - math.log(4000)
    near = density(0, within) - around
    return math.exp(float(near.min())), math.exp(float(near.max()))


def reverse(seed: int, layers: int = 2, steps: int = 2000) -> dict:
    """Fit the four modes of arXiv:2002.02428 (third mean (0.6, 5.0)) by draws of the head."""
    zenith = torch.tensor([0.7, -1.0, 0.6, -0.7], dtype=DOUBLE)
    azimuth = torch.tensor([1.5, 1.0, 5.0, 4.0], dtype=DOUBLE)
    means = fp.directions.from_zenith_azimuth(
        zenith.abs(), azimuth + torch.where(zenith < 0, math.pi, 0.0)
    )
    log_norm = math.log(4 * 2 * math.pi / 10) + 10 + math.log(-math.expm1(-20.0))

    def log_target(z: Tensor) -> Tensor:
        return torch.logsumexp(10 * z @ means.T.to(z), -1) - log_norm

    torch.manual_seed(seed)
    head = fp.PosteriorHead(0, fp.Sphere(), layers=layers)
    optimizer = torch.optim.Adam(head.parameters(), lr=1e-2)
    rate = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, 1e-2, total_steps=steps, pct_start=0.2, cycle_momentum=False
    )
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        z, log_prob = head(None).sample_and_log_prob((512,), generator=generator)
        optimizer.zero_grad()
        (log_prob - log_target(z)).mean().backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 5.0)
        optimizer.step()
        rate.step()
    with torch.no_grad():
        z, log_prob = head(None).sample_and_log_prob((TEST,), generator=generator)
    excess = (log_prob - log_target(z)).double()
    weight = torch.exp(-excess)
    ess = float(weight.sum() ** 2 / (weight**2).sum()) / TEST
    return {"kl": float(excess.mean()), "ess": ess}


def world(seed: int, warps: int, draws: int = 5000, **options: object) -> dict:
    """Train an unconditional density on few draws of the stand-in for places of the world."""
    target, generator = places(seed), torch.Generator().manual_seed(4000 + seed)
    z, fresh = target.sample(draws, generator), target.sample(TEST, generator)
    torch.manual_seed(seed)
    model = fp.PosteriorModel(None, fp.PosteriorHead(0, fp.Sphere(), warps=warps))
    start = time.process_time()
    fp.fit(model, z.float(), seed=seed, progress=False, **options)
    with torch.no_grad():
        nll = -float(model(None).log_prob(fresh).mean())
    true = -float(target.log_prob(fresh).mean())
    return {"nll": nll, "true": true, "cpu": time.process_time() - start}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["widths", "shapes", "reverse", "places"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--conditional", action="store_true")
    parser.add_argument("--held", type=int, default=0, help="events to recalibrate by")
    parser.add_argument("--only", default="", help="shapes whose name holds this")
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--lr", type=float, default=1e-3, help="highest rate of `shapes`")
    parser.add_argument("--warps", type=int, nargs="+", default=[0, 64])
    args = parser.parse_args()
    torch.set_num_threads(1)
    for seed in args.seeds:
        if args.what == "widths":
            for reference in (True, False):
                print(f"seed {seed}, {'with' if reference else 'without'} a reference")
                for r in widths(reference, seed, held=args.held):
                    print(
                        f"  {r['from']:8.0f}″ to {r['to']:8.0f}″: gap {r['gap']:+.4f} nats, "
                        f"coverage within {100 * r['deviation']:.2f} %, "
                        f"{100 * r['within_band']:.0f} % of levels in the 3σ band, "
                        f"KS p {r['ks_pvalue']:.2g}",
                        flush=True,
                    )
        elif args.what == "shapes":
            for name, target in SHAPES.items():
                if args.only in name:
                    r = shape(target, args.conditional, seed, args.draws, args.epochs, args.lr)
                    ends = "".join(
                        f", {what} {{:.2g}} to {{:.2g}}".format(*r[name])
                        for name, what in (
                            ("antipode", "antipode"),
                            ("true_antipode", "of the truth"),
                            ("close", "within 0.1°"),
                        )
                        if name in r
                    )
                    print(
                        f"{name:22s} seed {seed}: KL {r['kl']:.4f} ± {r['error']:.4f}{ends}, "
                        f"{r['cpu']:.0f} CPU-s",
                        flush=True,
                    )
        elif args.what == "reverse":
            r = reverse(seed)
            print(f"seed {seed}: KL {r['kl']:.4f}, ESS {100 * r['ess']:.2f} %", flush=True)
        else:
            for warps in args.warps:
                r = world(seed, warps, epochs=args.epochs)
                print(
                    f"seed {seed}, {warps} warps: NLL {r['nll']:.3f}, truth {r['true']:.3f}, gap "
                    f"{r['nll'] - r['true']:.3f} nats, {r['cpu']:.0f} CPU-s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
