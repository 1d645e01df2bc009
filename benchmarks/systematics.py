"""Trained heads against the closed form of a linear-Gaussian problem with a nuisance.

    python benchmarks/systematics.py                     # five ways of feeding, s = 0.5 and 1
    python benchmarks/systematics.py --ways simulated --s 1 --seeds 0 1
    python benchmarks/systematics.py --telescope         # images, light yield, scattering, noise

x = z + ν + n with n ~ N(0, 1), ν ~ N(0, s²) and a label prior of 20 standard deviations of the
noise. For each way: coverage at nominal, +1σ and +2σ against the closed form, and its largest
deviation from it at all points and both levels, in percentage points.

The telescope: the report of a network trained on simulations of many nuisances, against one that
was trained on nominal ones.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Normal

import flowpost as fp
from flowpost.simulators import Telescope
from flowpost.systematics import (
    Mixed,
    Nuisances,
    Perturbed,
    Simulated,
    SystematicsReport,
    Weighted,
    report,
)

PRIOR_STD = 20.0
LEVELS = (0.682689, 0.9)
# Gauss-Hermite nodes and weights of a standard normal: its moments up to the ninth
NODES = (0.0, 1.355626179974266, -1.355626179974266, 2.856970013872806, -2.856970013872806)
SHARES = (8 / 15, *[0.22207592200561266] * 2, *[0.011257411327720689] * 2)
SHARES = tuple(w / sum(SHARES) for w in SHARES)
WAYS = ("simulated", "perturbed", "mixed", "mixed drawn", "weighted")


def nuisances(s: float) -> Nuisances:
    return Nuisances(shift=Normal(0.0, s))


def simulate(nu: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    z = PRIOR_STD * torch.randn(len(nu), 1, generator=generator)
    return z + nu + torch.randn(len(nu), 1, generator=generator), z


def exact(s: float, shift: float, level: float) -> float:
    """Coverage of a region of the marginalised posterior where ν is off by `shift` σ."""
    normal = Normal(0.0, 1.0)
    edge = normal.icdf(torch.tensor((1 + level) / 2)) * (1 + s * s) ** 0.5
    return float(normal.cdf(edge - s * shift) - normal.cdf(-edge - s * shift))


def events(way: str, s: float, size: int, seed: int) -> Any:
    """Training events of one way of feeding nuisances."""
    generator = torch.Generator().manual_seed(1000 + seed)
    if way == "simulated":
        return Simulated(simulate, nuisances(s), size, seed=seed)
    nominal = simulate(torch.zeros(size, 1), generator)
    if way == "perturbed":
        return Perturbed(nominal, lambda x, nu, _: x + nu, nuisances(s), seed=seed)
    names = [f"{node:+.2f}" for node in NODES]
    shares = dict(zip(names, SHARES, strict=True))
    if way.startswith("mixed"):
        draw = way.endswith("drawn")
        # the rare shifts weigh little: twice the events in all for the same precision
        each = size if draw else 2 * size // len(NODES)
        sets = {
            name: simulate(torch.full((each, 1), s * node), generator)
            for name, node in zip(names, NODES, strict=True)
        }
        return Mixed(sets, shares, draw=draw, seed=seed)
    z = nominal[1]
    error = 2 * torch.randn(z.shape, generator=generator)
    ratio = Normal(0.0, 2.0).log_prob(error)
    weights = {
        name: (Normal(s * node, 1.0).log_prob(error) - ratio).exp()[:, 0]
        for name, node in zip(names, NODES, strict=True)
    }
    return Weighted((z + error, z), weights, shares, seed=seed)


def measure(
    way: str,
    s: float,
    seed: int = 0,
    size: int = 50_000,
    epochs: int = 20,
    flow: str = "spline",
    fresh: int = 50_000,
) -> dict[str, Any]:
    """Train one head and compare its coverage with the closed form."""
    torch.manual_seed(seed)
    encoder = fp.encoders.Tabular(1, 8, hidden=32, layers=1)
    model = fp.PosteriorModel(encoder, fp.PosteriorHead(8, fp.Real(1), flow, hidden=16))
    start = time.process_time()
    fp.fit(model, events(way, s, size, seed), epochs=epochs, seed=seed, progress=False)
    cpu = time.process_time() - start
    found = report(model, simulate, nuisances(s), events=fresh, levels=LEVELS, seed=seed)
    table, gap = {}, 0.0
    for point in found.points[1:]:
        for level in LEVELS:
            held = point.coverage.coverage_at(level)
            table[point.sigmas, level] = held
            assert point.sigmas is not None
            gap = max(gap, abs(held - exact(s, point.sigmas, level)))
    for level in LEVELS:
        gap = max(gap, abs(found.averaged.coverage.coverage_at(level) - level))
    return {"report": found, "coverage": table, "gap": gap, "cpu": cpu}


def telescope(seed: int = 0, size: int = 20_000, epochs: int = 30) -> SystematicsReport:
    """Train on images with and without systematics, and report both."""
    simulator = Telescope()
    prior = Nuisances(**simulator.nuisances())

    def images(nu: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        z, angle = simulator.sample_prior(len(nu), generator)
        seen = simulator.simulate(z, angle, generator, nuisance=prior.unpack(nu))
        return torch.log1p(seen.images), seen.z

    def nominal(nu: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        return images(prior.nominal.expand(len(nu), -1), generator)

    space = fp.Product(
        position=fp.Interval(-80.001, 80.001, size=2), energy=fp.Interval(0.999, 100.001)
    )
    models = []
    for make in (images, nominal):
        torch.manual_seed(seed)
        # every epoch has new events, which a network cannot learn by heart
        encoder = fp.encoders.CNN(4, 64, width=16, dropout=0.0)
        model = fp.PosteriorModel(encoder, fp.PosteriorHead(64, space, dropout=0.0))
        train, start = Simulated(make, prior, size, seed=seed), time.process_time()
        history = fp.fit(model, train, epochs=epochs, seed=seed, progress=False)
        seconds = time.process_time() - start
        print(f"{make.__name__}: NLL {history.best.val_nll:.3f}, {seconds:.0f} CPU-s", flush=True)
        models.append(model)
    return report(models[0], images, prior, without=models[1], events=10_000, seed=seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS)
    parser.add_argument("--s", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--flow", default="spline")
    parser.add_argument("--telescope", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.telescope:
        for seed in args.seeds:
            start = time.process_time()
            print(telescope(seed))
            print(f"{time.process_time() - start:.0f} CPU-s in all")
        return
    for s in args.s:
        wanted = [f"{100 * exact(s, t, p):.1f}" for t in (0, 1, 2) for p in LEVELS]
        print(f"s = {s:g}: closed form at 0, +1, +2σ: {' '.join(wanted)}")
        for way in args.ways:
            for seed in args.seeds:
                r = measure(way, s, seed, flow=args.flow)
                held = [f"{100 * r['coverage'][t, p]:.1f}" for t in (0.0, 1.0, 2.0) for p in LEVELS]
                print(
                    f"  {way:<12} seed {seed}: {' '.join(held)}, within {100 * r['gap']:.2f} "
                    f"points, {r['cpu']:.0f} CPU-s",
                    flush=True,
                )


if __name__ == "__main__":
    main()
