"""INFERNO on the toy problem: widths reached, cost of a step, and a case of one's own.

python -m benchmarks.inferno limits     # exact limits and binned classifiers, seconds
python -m benchmarks.inferno train      # five seeds at benchmark 4: --bins, --seeds, --epochs …
python -m benchmarks.inferno speed      # a training step against others
python -m benchmarks.inferno own        # two backgrounds, all kinds of nuisance, signed weights
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec

import torch
from torch import Tensor, nn
from torch.distributions import Normal
from torch.nn import functional as F

from flowpost import inferno
from flowpost.encoders import Tabular
from flowpost.simulators import InfernoToy

PUBLISHED = {
    "classifier of the paper": (14.99, 18.94, 23.94, 21.54, 26.71),
    "INFERNO of the paper": (15.71, 16.89, 16.95, 16.88, 18.68),
    "limit of the paper": (14.71, 15.52, 15.65, 15.62, 16.89),
}


def simulated(events: int, seed: int) -> dict[str, Tensor]:
    toy = InfernoToy()
    return {
        name: toy.sample(name, events, seed=2 * seed + i)
        for i, name in enumerate(("signal", "background"))
    }


def network(bins: int, hidden: int, layers: int) -> inferno.SummaryModel:
    encoder = Tabular(3, 64, hidden=hidden, layers=layers, dropout=0.0)
    return inferno.SummaryModel(encoder, inferno.SoftBins(64, bins))


def hard_widths(summary: inferno.SummaryModel, test: dict[str, Tensor]) -> list[float]:
    """Width of the hard bins at benchmarks 0 to 4."""
    return [
        inferno.hard_information(
            inferno.toy_model(InfernoToy(k)), summary.assign, test, summary.bins
        ).width
        for k in range(5)
    ]


def row(name: str, values: list[float] | tuple[float, ...]) -> str:
    return f"{name:<34}" + "".join(f"{v:8.2f}" for v in values)


def limits(options: argparse.Namespace) -> None:
    toys = [InfernoToy(k) for k in range(5)]
    print(row("benchmark", range(5)))
    print(row("limit", [t.limit() for t in toys]))
    uniform = torch.linspace(0, 1, options.bins + 1, dtype=torch.float64)
    print(row(f"classifier, {options.bins} uniform bins", [t.limit(uniform) for t in toys]))
    data = simulated(400_000, options.seed)
    found = []
    for toy in toys:
        binning = inferno.optimised(
            inferno.toy_model(toy), toy.signal_probability, data, options.bins
        )
        edges = torch.cat([torch.zeros(1), binning.edges, torch.ones(1)]).double()
        found.append(toy.limit(edges))
    print(row(f"classifier, {options.bins} optimised bins", found))
    for name, values in PUBLISHED.items():
        print(row(name, values))


def train(options: argparse.Namespace) -> None:
    toy = InfernoToy(4)
    model = inferno.toy_model(toy)
    test = simulated(500_000, 1_000_000)
    table, costs = [], []
    print(row("benchmark", range(5)))
    for seed in range(options.seed, options.seed + options.seeds):
        data = simulated(100_000, seed)
        held = simulated(100_000, 500_000 + seed)
        held = {k: v[: options.held] for k, v in held.items()}
        torch.manual_seed(seed)
        summary = network(options.bins, options.hidden, options.layers)
        start = time.process_time()
        inferno.fit(
            summary,
            inferno.InfernoLoss(model, spread=options.spread),
            data,
            held,
            epochs=options.epochs,
            batch_size=options.batch,
            lr=options.lr,
            seed=seed,
            progress=False,
        )
        costs.append(time.process_time() - start)
        table.append(hard_widths(summary, test))
        print(row(f"seed {seed}, {costs[-1]:.0f} CPU-s", table[-1]), flush=True)
    columns = list(zip(*table, strict=True))
    print(row("median", [statistics.median(c) for c in columns]))
    print(row("worst", [max(c) for c in columns]))
    print(f"CPU-seconds of a training: median {statistics.median(costs):.0f}")


def hessian_loss(net: nn.Module, model: inferno.CountingModel, batch: dict[str, Tensor]) -> Tensor:
    """The variance by second derivatives of the likelihood through the network."""
    toy = InfernoToy()
    theta = model.values.float().clone().requires_grad_()
    x = toy.stretch(toy.shift(batch["background"], theta[1]), theta[2])
    both = torch.cat([batch["signal"], x])
    s, b = net(both).split([len(batch["signal"]), len(x)])
    expected = theta[0] * s.mean(0) + theta[3] * b.mean(0)
    nominal = net(batch["background"]).mean(0)
    asimov = model.nominal * s.mean(0) + 1000.0 * nominal
    loss = (expected - asimov * expected.log()).sum()
    for nuisance, value in zip(model.nuisances, theta[1:], strict=True):
        loss = loss + nuisance.penalty(value)
    (gradient,) = torch.autograd.grad(loss, theta, create_graph=True)
    rows = [torch.autograd.grad(g, theta, create_graph=True)[0] for g in gradient]
    return torch.linalg.inv(torch.stack(rows))[0, 0].log()


def foreign_step(net: nn.Module, batch: dict[str, Tensor]) -> Callable[[], None]:
    """A training step of pytorch_inferno 0.2.2, by its own callback and wrapper."""
    from pytorch_inferno.inferno import PaperInferno
    from pytorch_inferno.model_wrapper import ModelWrapper

    wrapper = ModelWrapper(net)
    wrapper.opt = torch.optim.Adam(net.parameters(), 1e-4)
    callback = PaperInferno(
        float_r=True,
        float_l=True,
        shape_aux=[Normal(0.0, 0.4), Normal(0.0, 1.0)],
        b_norm_aux=[Normal(0.0, 100.0)],
    )
    callback.set_wrapper(wrapper)
    wrapper.cbs, wrapper.state = [callback], "train"
    callback.on_train_begin()
    x = torch.cat([batch["signal"], batch["background"]])
    y = torch.cat([torch.ones(len(batch["signal"])), torch.zeros(len(batch["background"]))])
    return lambda: wrapper._fit_batch(x.clone(), y[:, None], None)


def step(module: nn.Module, loss: Callable[[], Tensor]) -> Callable[[], None]:
    """A training step of a module by Adam."""
    optimizer = torch.optim.Adam(module.parameters(), 1e-4)

    def run() -> None:
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()

    return run


def networks(x: Tensor) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Summaries, and classifiers alike, by name."""
    torch.manual_seed(0)
    shipped = network(10, 64, 2).fit_scale(x)
    plain = [
        nn.Sequential(nn.Linear(3, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), *last)
        for last in ((nn.Linear(100, 10), nn.Softmax(-1)), (nn.Linear(100, 1),))
    ]
    encoder = Tabular(3, 64, hidden=64, layers=2, dropout=0.0).fit_scale(x)
    return {
        "shipped": (shipped, nn.Sequential(encoder, nn.Linear(64, 1))),
        "plain": (plain[0], plain[1]),
    }


def speed(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    model = inferno.toy_model(InfernoToy(4))
    batch = simulated(1000, options.seed)
    x = torch.cat(list(batch.values()))
    y = torch.cat([torch.ones(1000), torch.zeros(1000)])
    by_hand, by_jvp = (inferno.InfernoLoss(model, by_hand=h) for h in (True, False))
    for name, (net, classifier) in networks(x).items():
        entropy = partial(_entropy, classifier, x, y)
        steps = {
            "cross-entropy": step(classifier, entropy),
            "by hand": step(net, partial(by_hand, net, batch)),
            "by jvp": step(net, partial(by_jvp, net, batch)),
            "double backward": step(net, partial(hessian_loss, net, model, batch)),
        }
        if find_spec("pytorch_inferno") and name == "plain":
            steps["pytorch_inferno"] = foreign_step(net, batch)
        times: dict[str, list[float]] = {k: [] for k in steps}
        for _ in range(options.repeats):
            for k, run in steps.items():
                start = time.process_time()
                run()
                times[k].append(time.process_time() - start)
        medians = {k: statistics.median(v) for k, v in times.items()}
        print(f"{name} network, 2 x 1000 events, one thread, CPU time")
        for k, v in medians.items():
            ratio = v / medians["cross-entropy"]
            print(f"  {k:<18}{1e3 * v:8.2f} ms   {ratio:6.2f} x cross-entropy")


def _entropy(classifier: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(classifier(x)[:, 0], y)


# Two backgrounds in four features. "move" shifts a feature of the first; the second has an
# alternative generator; weights of the first vary with a feature; its yield is known to 10 %.
OWN = inferno.CountingModel(
    [
        inferno.Process("signal", 60.0, signal=True),
        inferno.Process("first", 1500.0),
        inferno.Process("second", 400.0),
    ],
    [
        inferno.Transform(
            name="move",
            apply=lambda x, v: torch.cat([x[:, :1] + v, x[:, 1:]], 1),
            processes="first",
            constraint=Normal(0.0, 0.3),
        ),
        inferno.Alternative(name="generator", processes="second", constraint=Normal(0.0, 1.0)),
        inferno.Reweighting(name="tilt", processes="first", constraint=Normal(0.0, 1.0)),
        inferno.Normalisation(name="yield", processes="first", constraint=Normal(1.0, 0.1)),
    ],
)


def own_samples(events: int, seed: int) -> dict[str, inferno.Sample]:
    """Events of `OWN`; 30 % of those of the second background have weight −1."""
    generator = torch.Generator().manual_seed(seed)

    def draw(loc: list[float], scale: list[float]) -> Tensor:
        noise = torch.randn(events, 4, generator=generator)
        return torch.tensor(loc) + noise * torch.tensor(scale)

    signal = draw([0.0, 0.0, 0.5, 1.0], [1.0, 1.0, 1.0, 1.0])
    first = draw([1.5, 0.0, 0.0, 0.0], [1.5, 2.0, 1.0, 1.5])
    noise = torch.randn(events, 4, generator=generator)
    sign = 1.0 - 2.0 * (torch.rand(events, generator=generator) < 0.3)
    scale = torch.tensor([1.2, 1.0, 1.5, 1.0])
    # the negative events lie where the positive ones are too many: wider, and about the same place
    spread = torch.where(sign > 0, 1.0, 0.8)[:, None]

    def second(shift: float) -> Tensor:
        return torch.tensor([-0.5, 1.0 + shift, 0.0, 0.5 - 0.5 * shift]) + spread * noise * scale

    tilt = 0.15 * torch.tanh(first[:, 2] + 0.5 * first[:, 1])
    weight = 0.5 + torch.rand(events, generator=generator)
    return {
        "signal": inferno.Sample(signal, weight),
        "first": inferno.Sample(first, factors={"tilt": (1 - tilt, 1 + tilt)}),
        "second": inferno.Sample(
            second(0.0),
            sign,
            varied={
                "generator": (
                    inferno.Sample(second(-0.4), 0.95 * sign),
                    inferno.Sample(second(0.4), 1.05 * sign),
                )
            },
        ),
    }


def own_widths(
    seed: int = 0, events: int = 50_000, epochs: int = 20, bins: int = 10
) -> tuple[float, float]:
    """Held-out width of INFERNO's hard bins, and of a classifier with optimised bins."""
    data, held = own_samples(events, 3 * seed + 1), own_samples(events, 3 * seed + 2)
    test = own_samples(10 * events, 3 * seed + 3)
    torch.manual_seed(seed)
    summary = inferno.SummaryModel(
        Tabular(4, 64, hidden=64, layers=2, dropout=0.0), inferno.SoftBins(64, bins)
    )
    options = {"epochs": epochs, "seed": seed, "progress": False}
    inferno.fit(summary, inferno.InfernoLoss(OWN, spread=0.5), data, **options)
    ours = inferno.hard_information(OWN, summary.assign, test, bins).width
    classifier = nn.Sequential(
        Tabular(4, 64, hidden=64, layers=2, dropout=0.0).fit_scale(data["first"].x),
        nn.Linear(64, 1),
    )
    inferno.fit(classifier, inferno.CrossEntropyLoss(OWN), data, **options)
    score = inferno.score(classifier)
    binning = inferno.optimised(OWN, score, held, bins)
    theirs = inferno.hard_information(OWN, lambda x: binning(score(x)), test, bins).width
    return ours, theirs


def own(options: argparse.Namespace) -> None:
    for seed in range(options.seed, options.seed + options.seeds):
        ours, theirs = own_widths(seed, epochs=options.epochs, bins=options.bins)
        print(f"seed {seed}: INFERNO {ours:.2f}, classifier with optimised bins {theirs:.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["limits", "train", "speed", "own"])
    parser.add_argument("--bins", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=1000)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--spread", type=float, default=0.5)
    parser.add_argument("--held", type=int, default=20_000, help="validation events of each class")
    parser.add_argument("--repeats", type=int, default=100, help="of speed")
    options = parser.parse_args()
    {"limits": limits, "train": train, "speed": speed, "own": own}[options.what](options)


if __name__ == "__main__":
    main()
