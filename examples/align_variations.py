r"""Train a classifier whose efficiencies do not move with a nuisance: several losses, two toys.

    python examples/align_variations.py --seeds 3      # a minute or two
    python examples/align_variations.py --fast

First alignment alone: ten normal columns, a variation with all of them 2 higher, a network of four
classes and no other loss. Then with a primary task: four classes to tell apart, and a variation
that moves four columns by one standard deviation. |SF − 1| is how far the efficiency of a class, at
the cut that keeps 70 % of its nominal events, is off in the variation, as a fraction, averaged over
the classes; the spread is the standard deviation of the predicted probability of the true class.
`--batch 100` and `--mix 0.55` (share of the first class in the variation) show what goes wrong.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from torch import nn

from flowpost.calibration import Align
from flowpost.metrics import energy_distance, sliced_wasserstein, symmetric_kl

K, D = 4, 10  # classes and columns
MEANS = 1.5 * (torch.eye(K, D) + torch.eye(K, D).roll(K, 1))
SHIFT = torch.tensor([1.0, 1.0, -1.0, -1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0])
W1 = partial(sliced_wasserstein, p=1, projections=torch.eye(K))  # mean over the columns
LOSSES = {
    "cross-entropy": None,
    "mean-KL": Align(symmetric_kl, per_class=False, weight=10.0),
    "marginal W1": Align(W1, per_class=False, weight=20.0),
    "marginal W1, weight 50": Align(W1, per_class=False, weight=50.0),
    "marginal energy": Align(energy_distance, per_class=False, weight=50.0),
    "class-conditional energy": Align(energy_distance, weight=50.0),
}


def sample(events, seed, shift=0.0, mix=1 / K):
    """Columns (N, D) and classes (N,); the first class has the share `mix`."""
    g = torch.Generator().manual_seed(seed)
    share = torch.tensor([mix, *[(1 - mix) / (K - 1)] * (K - 1)])
    c = torch.multinomial(share, events, replacement=True, generator=g)
    return MEANS[c] + torch.randn(events, D, generator=g) + shift, c


def train(align, seed, nominal, varied, batch, epochs, primary=True):
    torch.manual_seed(seed)
    layers = [nn.Linear(D, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, K)]
    net, (x, c), (y, k) = nn.Sequential(*layers), nominal, varied
    optimizer = torch.optim.Adam(net.parameters())
    steps = epochs * -(-len(x) // batch) + 1
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for _ in range(epochs):
        orders = (torch.randperm(len(v)).split(batch) for v in (x, y))
        for i, j in zip(*orders, strict=True):
            a, b = net(x[i]), net(y[j])
            loss = nn.functional.cross_entropy(a, c[i]) if primary else torch.zeros(())
            if align is not None:
                if align.metric is not symmetric_kl:  # which alone takes logits
                    a, b = a.softmax(1), b.softmax(1)
                loss = loss + align(a, b, c[i], k[j])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return net


@torch.no_grad()
def scores(net, nominal, varied):
    """|SF − 1|, accuracy and spread."""
    p, q = (net(x).softmax(1) for x, _ in (nominal, varied))
    pairs = [(p[nominal[1] == k, k], q[varied[1] == k, k]) for k in range(K)]
    off = [((b >= a.quantile(0.3)).float().mean() / 0.7 - 1).abs() for a, b in pairs]
    right = (p.argmax(1) == nominal[1]).float().mean()
    return torch.stack([torch.stack(off).mean(), right, p.gather(1, nominal[1][:, None]).std()])


def alone(events, batch, epochs):
    """The first toy: what is left of the mean-KL and of the energy distance, and the spread."""
    g, none = torch.Generator().manual_seed(0), torch.zeros(events, dtype=torch.long)
    x, y = torch.randn(2, events, D, generator=g) + torch.tensor([0.0, 2.0])[:, None, None]
    print(f"{'alignment alone':<26}   mean-KL    energy    spread")
    for name in ("untrained", "mean-KL", "marginal W1", "marginal energy"):
        rounds = 0 if name == "untrained" else epochs
        net = train(LOSSES.get(name), 0, (x, none), (y, none), batch, rounds, primary=False)
        with torch.no_grad():
            a, b = net(x), net(y)
        p, q = a.softmax(1), b.softmax(1)
        left = symmetric_kl(a, b), energy_distance(p, q), p.var(0).sum().sqrt()
        print(f"{name:<26}" + "".join(f"{v:10.1e}" for v in left))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--batch", type=int, default=250)
    parser.add_argument("--mix", type=float, default=1 / K)
    parser.add_argument("--fast", action="store_true", help="little training, for tests")
    args = parser.parse_args()
    events, test, epochs = (2000, 2000, 2) if args.fast else (20_000, 100_000, 20)
    alone(events, args.batch, epochs)
    print(f"{'with a primary task':<26}  |SF - 1|     worst  accuracy    spread     CPU-s")
    fresh = sample(test, 901), sample(test, 902, SHIFT)
    for name, align in LOSSES.items():
        start, found = time.process_time(), []
        for seed in range(args.seeds):
            data = sample(events, 10 * seed), sample(events, 10 * seed + 1, SHIFT, args.mix)
            found.append(scores(train(align, seed, *data, args.batch, epochs), *fresh))
        off, right, spread = torch.stack(found).mean(0).tolist()
        cost = (time.process_time() - start) / args.seeds
        row = (off, max(float(f[0]) for f in found), right, spread)
        print(f"{name:<26}" + "".join(f"{v:10.3f}" for v in row) + f"{cost:10.1f}", flush=True)


if __name__ == "__main__":
    main()
