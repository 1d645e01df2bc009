r"""Energy, position and direction (d = 6) in a three-dimensional telescope: coverage and sharpness.

    python benchmarks/telescope3d.py       # tracks, diagonal and spline; 4 GB of memory
    python benchmarks/telescope3d.py --kind cascade --flows spline --seeds 0 1
    python benchmarks/telescope3d.py --flows spline --epochs 30 --held 100000  # and recalibrated
    python benchmarks/telescope3d.py --flows spline --epochs 60 --anew  # no event is seen twice

The network reads hits beside a first guess and what each hit is relative to it. On fresh events:
base-χ² coverage of all labels and of the direction, which is the leading block and exact; coverage
of the highest-density regions of energy and position, mixtures, on some of the events; the gap to
the true posterior; and the 90 % area of the head against that of the von Mises–Fisher density with
the same mean direction and resultant, the density of its class nearest to q. Its region is the cap

.. math:: A_p = \frac{2\pi}{\kappa} \cdot -\ln\big(1 - p\,(1 - e^{-2\kappa})\big).
"""

from __future__ import annotations

import argparse
import math
import time
from typing import Any

import torch
from torch import Tensor

import flowpost as fp
from flowpost.calibration import Recalibrator
from flowpost.simulators import Telescope3D
from flowpost.simulators.telescope3d import Telescope3DEvents
from flowpost.systematics import Simulated

SPACE = fp.Product(energy=fp.Positive(), position=fp.Real(3), direction=fp.Sphere())
LIGHT_SPEED = 0.299792458  # m/ns
BATCH = 5000


def seen(telescope: Telescope3D, events: Telescope3DEvents) -> dict[str, Any]:
    """Hits as the first guess sees them, and that guess as reference."""
    guess = telescope.first_guess(events.hits, events.lengths)
    size = events.hits.shape[1]
    at = guess["position"][:, None].expand(-1, size, -1)
    direction = guess["direction"][:, None].expand(-1, size, -1)
    offset, time_of_hit = events.hits[..., :3] - at, events.hits[..., 3:]
    along = (offset * direction).sum(-1, keepdim=True)
    across = offset - along * direction
    distance = across.norm(dim=-1, keepdim=True)
    if telescope.kind == "track":
        cosine = telescope.speed / LIGHT_SPEED
        flight = (along + distance * math.sqrt(1 - cosine**2) / cosine) / LIGHT_SPEED
    else:
        flight = offset.norm(dim=-1, keepdim=True) / telescope.speed
    columns = (events.hits, across, along, distance, time_of_hit - flight, at, direction)
    return {"x": (torch.cat(columns, -1), events.lengths), "z": events.z, "reference": guess}


def posterior(model: Any, data: dict[str, Any], rows: slice) -> fp.Posterior:
    x = tuple(t[rows] for t in data["x"])
    guess = {k: v[rows] for k, v in data["reference"].items()} if "reference" in data else None
    return model(x, reference=guess)


def cap(kappa: Tensor, level: float) -> Tensor:
    """1 − cos of the opening angle of the region of a von Mises–Fisher density."""
    return -torch.log1p(level * torch.expm1(-2 * kappa)) / kappa


def shown(name: str, cov: Any) -> str:
    """Deviation, band and p-value of a coverage in one line."""
    return (
        f"  {name:<34} 68 %: {100 * cov.coverage_at(0.68):5.2f} %, 90 %: "
        f"{100 * cov.coverage_at(0.9):5.2f} %, within {100 * cov.max_gap:.2f} %, "
        f"{100 * cov.within_band:3.0f} % of levels in the 3σ band, KS p {float(cov.ks_pvalue):.2g}"
    )


def sampled(
    telescope: Telescope3D, count: int, generator: torch.Generator, args: Any
) -> dict[str, Any]:
    """What a network sees of events, with their labels."""
    data = seen(telescope, telescope.sample(count, generator))
    if not args.reference:
        del data["reference"]
    return data


def train(telescope: Telescope3D, flow: str, seed: int, args: Any) -> fp.PosteriorModel:
    generator = torch.Generator().manual_seed(1000 + seed)
    data: Any = Simulated(lambda n, g: sampled(telescope, n, g, args), None, args.events, seed=seed)
    columns = data.batch([0]).x[0].shape[-1]
    if not args.anew:
        data = sampled(telescope, args.events, generator, args)
    torch.manual_seed(seed)
    encoder = fp.encoders.DeepSets(columns, 64, hidden=args.hidden, dropout=args.dropout)
    head = fp.PosteriorHead(64, SPACE, flow=flow, dropout=args.dropout)
    model = fp.PosteriorModel(encoder, head)
    options = {"epochs": args.epochs, "batch_size": 512, "seed": seed, "progress": False}
    start = time.process_time()
    history = fp.fit(model, data, **options)
    what = "events, new in each epoch," if args.anew else "events,"
    print(
        f"{args.kind}, {flow}, seed {seed}: {args.events} {what} {args.epochs} epochs, kept "
        f"{history.best.epoch}, {time.process_time() - start:.0f} CPU-s",
        flush=True,
    )
    return model


def recalibrated(model: fp.PosteriorModel, telescope: Telescope3D, seed: int, args: Any) -> Any:
    """The model with its coverage mended by events that nothing was trained on."""
    data = sampled(telescope, args.held, torch.Generator().manual_seed(5000 + seed), args)
    print(f"recalibrated by {args.held} events")
    return Recalibrator(model).fit(**data)


@torch.no_grad()
def measure(model: Any, telescope: Telescope3D, seed: int, args: Any) -> Tensor:
    """Print coverage and areas; the NLL of each event."""
    joint, leading, nll = [], [], []
    generator = torch.Generator().manual_seed(2000 + seed)
    for start in range(0, args.test, BATCH):
        data = sampled(telescope, min(BATCH, args.test - start), generator, args)
        if not start:
            first = data
        q = posterior(model, data, slice(None))
        u, log_prob = q.to_base_and_log_prob(data["z"])
        joint.append(u)
        leading.append(q["direction"].to_base(SPACE.unpack(data["z"])["direction"]))
        nll.append(-log_prob)
    nll = torch.cat(nll)
    print(f"  NLL {nll.mean():.3f} ± {nll.std() / math.sqrt(len(nll)):.3f} nats, {len(nll)} events")
    print(shown("all labels, base χ²", fp.coverage(torch.cat(joint))))
    print(shown("direction, base χ²", fp.coverage(torch.cat(leading))), flush=True)
    some = slice(0, args.blocks)
    for name in ("energy", "position"):
        block = posterior(model, first, some).block(name, draws=64)
        z = SPACE.unpack(first["z"][some])[name].reshape(len(first["z"][some]), -1)
        cov = fp.diagnostics.hpd_coverage(block, z, draws=31)
        print(shown(f"{name}, HPD, {len(z)} events", cov), flush=True)
    areas(model, first, args.areas)
    return nll


def areas(model: Any, data: dict[str, Any], count: int) -> None:
    """Print the 90 % area of the head and of the von Mises–Fisher density, and what they hold."""
    some = slice(0, count)
    q = posterior(model, data, some)["direction"]
    truth = data["z"][some, 4:]
    levels, _ = fp.diagnostics.hpd_levels(q, truth, draws=511)
    moments = q.direction_moments(2048)
    kappa = moments.vmf_kappa.double()
    rim = cap(kappa, 0.9)
    inside = (truth.double() - moments.mean.double()).square().sum(-1) / 2 <= rim
    own = q.hpd_area(0.9, 2048)[0].double()
    other = 2 * math.pi * rim * (180 / math.pi) ** 2
    # per steradian, as the head's
    log_vmf = torch.log(kappa / (2 * math.pi * -torch.expm1(-2 * kappa)))
    log_vmf = log_vmf - kappa * (truth.double() - moments.mean.double()).square().sum(-1) / 2
    gain = (q.log_prob(truth).double() - log_vmf).mean()
    print(
        f"  90 % area, {len(truth)} events: head {own.median():.1f} deg² (median), holds "
        f"{100 * float((levels <= 0.9).double().mean()):.1f} %; vMF {other.median():.1f} deg², "
        f"holds {100 * float(inside.double().mean()):.1f} %; median ratio "
        f"{(own / other).median():.3f}; density at the truth {gain:+.3f} nats",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kind", choices=["track", "cascade"], default="track")
    parser.add_argument("--flows", nargs="+", default=["diagonal", "spline"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--events", type=int, default=100_000, help="of the training")
    parser.add_argument("--anew", action="store_true", help="new events in every epoch")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--hidden", type=int, default=64, help="units of the encoder")
    # events are as many as wanted, and dropout widens what a short training has not settled
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--no-reference", dest="reference", action="store_false")
    parser.add_argument("--held", type=int, default=0, help="events to recalibrate by")
    parser.add_argument("--test", type=int, default=50_000, help="fresh events")
    parser.add_argument("--blocks", type=int, default=1000, help="of these for mixtures")
    parser.add_argument("--areas", type=int, default=2000, help="of these for areas")
    parser.add_argument("--truths", type=int, default=100, help="of these for the true posterior")
    args = parser.parse_args()
    torch.set_num_threads(1)
    telescope = Telescope3D(kind=args.kind)
    for seed in args.seeds:
        scores = {}
        for flow in args.flows:
            model = train(telescope, flow, seed, args)
            scores[flow] = measure(model, telescope, seed, args)
            if args.held:
                measure(recalibrated(model, telescope, seed, args), telescope, seed, args)
        best = scores[args.flows[-1]]
        for flow in args.flows[:-1]:
            gain = scores[flow] - best
            error = gain.std() / math.sqrt(len(gain))
            print(f"  {args.flows[-1]} beats {flow} by {gain.mean():.3f} ± {error:.3f} nats")
        if args.truths:
            generator = torch.Generator().manual_seed(2000 + seed)
            events = telescope.sample(min(BATCH, args.test), generator)[: args.truths]
            true = telescope.true_posterior(events.hits, events.lengths, seed=seed)
            for flow, nll in scores.items():
                gap = nll[: len(events)] - true.nll(events.z)
                print(
                    f"  {flow}: gap to the true posterior {gap.mean():.2f} ± "
                    f"{gap.std() / math.sqrt(len(gap)):.2f} nats on {len(gap)} events"
                )
            width = torch.rad2deg(true.direction_radius(0.5)).median()
            print(f"  median true resolution {width:.1f}° (50 %)", flush=True)


if __name__ == "__main__":
    main()
