r"""How well the goodness of fit tells bad events from good ones, and what it costs.

    python benchmarks/goodness.py gaussian       # exact model: p-values of trained networks, slow
    python benchmarks/goodness.py images         # telescope images: uniformity, power at 1 % loss
    python benchmarks/goodness.py hits           # hits of the three-dimensional telescope
    python benchmarks/goodness.py cost           # 10 000 events × 200 draws against the bare p(x|z)

`--events 20000 --epochs 5` trains less, `--fresh 5000` tests on less. Power is the share of bad
events with a calibrated p below 0.01: in the upper half of the true energies, and in all.
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from typing import Any

import torch
from scipy import stats
from torch import Tensor

import flowpost as fp
from flowpost.goodness import Calibrator, p_value
from flowpost.likelihood import ExtendedModel, FlowLikelihood, PointProcess, PoissonCounts
from flowpost.simulators import Telescope, Telescope3D, anomalies

SPACE_2D = fp.Product(position=fp.Real(2), energy=fp.Positive(), angle=fp.Circle())
SPACE_3D = fp.Product(energy=fp.Positive(), position=fp.Real(3), direction=fp.Sphere())
STATISTICS = ("p", "two_sided", "typicality", "context")


def say(name: str, p: Tensor) -> None:
    print(
        f"  {name:<28} mean {p.mean():.3f}  std {p.std():.3f}  P(p < 0.05) "
        f"{(p < 0.05).double().mean():.3f}",
        flush=True,
    )


def linear(size: int, generator: torch.Generator, n: int, noise: float) -> tuple[Tensor, Tensor]:
    z = torch.randn(n, 1, generator=generator)
    return z + noise * torch.randn(n, size, generator=generator), z


def gaussian(args: Any) -> None:
    """z ~ N(0, 1), x_k = z + noise: trained networks against the exact table."""
    for size in (20, 2):
        draw = partial(linear, size, torch.Generator().manual_seed(args.seed))
        torch.manual_seed(args.seed)
        encoder = fp.encoders.Tabular(size, 32, hidden=32, layers=1, dropout=0.0)
        likelihood = FlowLikelihood(fp.Real(1), size, hidden=32, layers=1)
        model = ExtendedModel(encoder, fp.PosteriorHead(32, fp.Real(1)), likelihood)
        fp.fit(model, draw(args.events, 1.0), epochs=args.epochs, seed=args.seed, progress=False)
        print(f"N_d = {size}, {args.events} events, {args.epochs} epochs")
        for noise in (1.0, 2.0, 0.5):
            found = p_value(model, draw(args.fresh, noise)[0], draws=200, seed=args.seed)
            say(f"noise × {noise:g}", found.p)
            print(f"  {'two-sided':<28} P(p < 0.05) {(found.two_sided < 0.05).double().mean():.3f}")
        uniformity(model, draw(args.held, 1.0)[0], draw(args.fresh, 1.0)[0], args)


def uniformity(model: ExtendedModel, held: Any, fresh: Any, args: Any) -> Calibrator:
    """Calibrate on held-out events and test that p is uniform on fresh ones."""
    calibrator = Calibrator(model, STATISTICS, draws=args.draws).fit(held, seed=args.seed)
    found = calibrator.p_value(fresh, seed=args.seed + 1)
    for name, p in {**found.each, "joint": found.p}.items():
        # fresh and held-out events both wander: the distance is that of two samples
        held_out = len(getattr(calibrator, f"scores_{name}"))
        count = len(p) * held_out / (len(p) + held_out)
        distance = stats.kstest(p.numpy(), "uniform").statistic
        chance = stats.kstwobign.sf(distance * math.sqrt(count))
        print(
            f"  calibrated {name:<12} {len(p)} good events: KS D {distance:.4f}, p {chance:.2g}, "
            f"P(p < 0.01) {100 * (p < 0.01).double().mean():.2f} %",
            flush=True,
        )
    return calibrator


def share(p: Tensor) -> float:
    return 100 * float((p < 0.01).double().mean())


def power(calibrator: Calibrator, name: str, x: Any, energy: Tensor, median: float) -> None:
    found = calibrator.p_value(x, seed=5)
    high = energy > median
    shares = "  ".join(
        f"{what} {share(p[high]):5.1f} / {share(p):5.1f}"
        for what, p in {**found.each, "all": found.p}.items()
    )
    print(f"  {name:<28} {shares}", flush=True)


def train(model: ExtendedModel, data: Any, args: Any) -> None:
    """The posterior first, then the likelihood."""
    start = time.process_time()
    model.likelihood.requires_grad_(False)
    options = {"batch_size": 256, "seed": args.seed, "progress": False}
    fp.fit(model, data, epochs=args.epochs, **options)
    model.requires_grad_(False)
    model.likelihood.requires_grad_(True)
    history = fp.fit(model, data, epochs=2 * args.epochs, **options)
    print(f"  trained in {time.process_time() - start:.0f} CPU-s; {history}", flush=True)


def labels_2d(events: Any) -> Tensor:
    return torch.cat([events.z, events.angle[:, None]], 1)


def model_2d(telescope: Telescope, seed: int) -> ExtendedModel:
    torch.manual_seed(seed)
    likelihood = PoissonCounts(
        SPACE_2D,
        telescope.image_shape,
        sensors=telescope.sensors,
        position="position",
        direction="angle",
    )
    return ExtendedModel(fp.encoders.CNN(4, 64), fp.PosteriorHead(64, SPACE_2D), likelihood)


def bad_events(telescope: Any, tracks: Any, args: Any) -> dict[str, Any]:
    """Good events, and kinds that the simulation does not contain, by name."""
    good, other = (telescope.sample(args.bad, seed=s + args.seed) for s in (5000, 6000))
    return {
        "good": good,
        "overlay": anomalies.overlay(good, other),
        "dead string, brightest": anomalies.dead_string(telescope, good, "brightest"),
        "dead string, random": anomalies.dead_string(telescope, good, seed=8000),
        "noise × 3": telescope.sample(args.bad, seed=9000, nuisance={"noise": 3.0}),
        "light × 1.5": telescope.sample(args.bad, seed=9100, nuisance={"light_yield": 1.5}),
        "track": tracks,
    }


def images_model(args: Any) -> tuple[Telescope, ExtendedModel]:
    telescope = Telescope()
    events = telescope.sample(args.events, seed=1000 + args.seed)
    model = model_2d(telescope, args.seed)
    train(model, (events.images, labels_2d(events)), args)
    fresh = telescope.sample(2000, seed=2000 + args.seed)
    with torch.no_grad():
        own = model.likelihood.log_prob(fresh.images, labels_2d(fresh)).double()
    gap = telescope.log_prob_images(fresh.images, fresh.z, fresh.angle) - own
    print(f"  likelihood {gap.mean():.3f} nats below the true one", flush=True)
    return telescope, model


def images(args: Any) -> None:
    """Poisson images of the two-dimensional telescope."""
    telescope, model = images_model(args)
    held = telescope.sample(args.held, seed=3000 + args.seed)
    fresh = telescope.sample(args.fresh, seed=4000 + args.seed)
    calibrator = uniformity(model, held.images, fresh.images, args)
    low, high = telescope.energy_range
    z, angle = telescope.sample_prior(args.bad, seed=7000)
    tracks = anomalies.track_like(telescope, z, angle, seed=7100)
    print("power at 1 % loss, %: upper half of energies / all")
    for name, events in bad_events(telescope, tracks, args).items():
        power(calibrator, name, events.images, events.z[:, 2], math.sqrt(low * high))


def hits(args: Any) -> None:
    """Lists of hits of cascades in the three-dimensional telescope."""
    telescope = Telescope3D(kind="cascade")
    events = telescope.sample(args.events, seed=1000 + args.seed)
    torch.manual_seed(args.seed)
    likelihood = PointProcess(
        SPACE_3D, telescope.sensors, telescope.window, position="position", direction="direction"
    )
    encoder = fp.encoders.DeepSets(4, 64, dropout=0.0)
    model = ExtendedModel(encoder, fp.PosteriorHead(64, SPACE_3D), likelihood)
    train(model, ((events.hits, events.lengths), events.z), args)
    fresh = telescope.sample(2000, seed=2000 + args.seed)
    with torch.no_grad():
        own = model.likelihood.log_prob((fresh.hits, fresh.lengths), fresh.z).double()
    gap = telescope.log_prob_hits(fresh.hits, fresh.lengths, fresh.z) - own
    print(f"  likelihood {gap.mean():.3f} nats below the true one", flush=True)
    held = telescope.sample(args.held, seed=3000 + args.seed)
    fresh = telescope.sample(args.fresh, seed=4000 + args.seed)
    calibrator = uniformity(model, (held.hits, held.lengths), (fresh.hits, fresh.lengths), args)
    low, high = telescope.energy_range
    tracks = Telescope3D(kind="track").sample(args.bad, seed=9200)
    print("power at 1 % loss, %: upper half of energies / all")
    for name, events in bad_events(telescope, tracks, args).items():
        x = (events.hits, events.lengths)
        power(calibrator, name, x, events.z[:, 0], math.sqrt(low * high))


def cost(args: Any) -> None:
    """p-values of images beside drawing from and evaluating p(x|z) alone, in turns."""
    torch.set_num_threads(args.threads)
    telescope = Telescope()
    events = telescope.sample(10_000, seed=args.seed)
    model = model_2d(telescope, args.seed)
    small = events[:1000]
    fp.fit(model, (small.images, labels_2d(small)), epochs=20, seed=args.seed, progress=False)
    generator = torch.Generator().manual_seed(args.seed)
    spent = [0.0, 0.0]
    for part in torch.arange(10_000).split(1000):
        x = events.images[part]
        start = time.perf_counter()
        p_value(model, x, draws=200, seed=args.seed)
        middle = time.perf_counter()
        with torch.no_grad():
            q = model(x)
            z = q.sample((200,), generator)
            start_bare = time.perf_counter()
            # in the portions that fit memory best, as p_value's
            for rows in torch.arange(200).split(10):
                bound = model.likelihood(z[rows])
                bound.log_prob(x)
                bound.sample_and_log_prob(generator)
        spent[0] += middle - start
        spent[1] += time.perf_counter() - start_bare
    print(
        f"10 000 events × 200 draws on {args.threads} threads: {spent[0]:.1f} s; drawing from and "
        f"evaluating p(x|z) alone {spent[1]:.1f} s; ratio {spent[0] / spent[1]:.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["gaussian", "images", "hits", "cost"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--events", type=int, default=50_000, help="of the training")
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--held", type=int, default=20_000, help="held out for the calibration")
    parser.add_argument("--fresh", type=int, default=50_000, help="to test that p is uniform")
    parser.add_argument("--bad", type=int, default=2000, help="of each anomaly")
    parser.add_argument("--draws", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2, help="of the cost")
    args = parser.parse_args()
    torch.set_num_threads(1)
    {"gaussian": gaussian, "images": images, "hits": hits, "cost": cost}[args.what](args)


if __name__ == "__main__":
    main()
