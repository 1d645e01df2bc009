r"""Alignment: the numbers of docs/alignment.md beside those of examples/align_variations.py.

    python -m benchmarks.alignment exact         # accuracy of the exact classifiers
    python -m benchmarks.alignment divergence    # what is left of the mean-KL, on fresh events
    python -m benchmarks.alignment v-statistic   # the biased energy distance, in small batches

The toy is that of the example: classes c of means m_c with unit noise and equal shares, so that the
exact classifier takes the nearest mean; without the direction of the shift, the nearest in the
columns that are orthogonal to it.
"""

from __future__ import annotations

import argparse
import runpy
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowpost.calibration import Align
from flowpost.metrics import energy_distance, symmetric_kl

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "align_variations.py"
TOY = runpy.run_path(str(EXAMPLE))
TRAINED, FRESH, EPOCHS = 20_000, 100_000, 20


def accuracy(x: Tensor, c: Tensor, direction: Tensor | None = None) -> float:
    """Accuracy of the nearest mean, blind to a direction (D,) if there is one."""
    means = TOY["MEANS"]
    if direction is not None:
        unit = direction / direction.norm()
        x, means = (v - (v @ unit)[:, None] * unit for v in (x, means))
    return float((torch.cdist(x, means).argmin(1) == c).double().mean())


def trained(align: Any, seed: int, batch: int) -> torch.nn.Module:
    """A network of the example, trained on nominal and varied events."""
    data = (
        TOY["sample"](TRAINED, 10 * seed),
        TOY["sample"](TRAINED, 10 * seed + 1, TOY["SHIFT"]),
    )
    net: torch.nn.Module = TOY["train"](align, seed, *data, batch, EPOCHS)
    return net


def fresh() -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Nominal and varied test events."""
    return TOY["sample"](FRESH, 901), TOY["sample"](FRESH, 902, TOY["SHIFT"])


def exact(args: argparse.Namespace) -> None:
    """Accuracy of the exact classifier, and of the one that does not see the shift."""
    x, c = TOY["sample"](1_000_000, 901)
    print(f"exact {accuracy(x, c):.4f}, without the shift's direction "
          f"{accuracy(x, c, TOY['SHIFT']):.4f}")  # fmt: skip


def divergence(args: argparse.Namespace) -> None:
    """Divergence of the mean probabilities of fresh nominal and varied events."""
    (x, _), (y, _) = fresh()
    for name in ("cross-entropy", "mean-KL", "class-conditional energy"):
        for seed in range(args.seeds):
            net = trained(TOY["LOSSES"][name], seed, 250)
            with torch.no_grad():
                print(f"{name:<26} seed {seed}  mean-KL {symmetric_kl(net(x), net(y)):.1e}")


def v_statistic(args: argparse.Namespace) -> None:
    """|SF - 1|, accuracy and spread in batches of 100."""
    biased = partial(energy_distance, unbiased=False)
    losses = {
        "V, marginal, 50": Align(biased, per_class=False, weight=50.0),
        "V, by class, 50": Align(biased, weight=50.0),
        "U, marginal, 200": Align(energy_distance, per_class=False, weight=200.0),
    }
    data = fresh()
    for name, align in losses.items():
        for seed in range(args.seeds):
            found = TOY["scores"](trained(align, seed, 100), *data)
            row = "".join(f"{v:10.3f}" for v in found.tolist())
            print(f"{name:<26} seed {seed}  {row}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["exact", "divergence", "v-statistic"])
    parser.add_argument("--seeds", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    start = time.process_time()
    {"exact": exact, "divergence": divergence, "v-statistic": v_statistic}[args.what](args)
    print(f"{time.process_time() - start:.0f} CPU-s")


if __name__ == "__main__":
    main()
