"""The Lightning module around a generator of a density: averaged weights, the best of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._checks import require

__all__ = [
    "Events",
    "GeneratorEpoch",
    "GeneratorHistory",
    "Objective",
    "module_class",
    "validation",
]

# of each step's running average of the weights
_AVERAGE = 0.998
_WARM_UP = 0.1

Rows: TypeAlias = tuple[Tensor, Tensor, Tensor]
Objective: TypeAlias = Callable[[Rows, "torch.Generator | None"], Tensor]


@dataclass(frozen=True)
class GeneratorEpoch:
    """Numbers of one epoch.

    Attributes:
        epoch: Count from 1.
        train: Mean loss of the batches.
        val: Loss of the held-out events by the averaged weights.
        lr: Learning rate at the end of the epoch.
        seconds: Wall-clock time since the start, resumed parts included.
    """

    epoch: int
    train: float
    val: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class GeneratorHistory:
    """The epochs of a training and which one's weights were kept.

    Attributes:
        epochs: Numbers of each epoch.
        best: The epoch whose weights the generator has.
    """

    epochs: tuple[GeneratorEpoch, ...]
    best: GeneratorEpoch

    def __str__(self) -> str:
        last = self.epochs[-1]
        return (
            f"{len(self.epochs)} epochs in {last.seconds:.0f} s; validation loss "
            f"{self.best.val:.4f} in epoch {self.best.epoch}"
        )


class Events:
    """Data, labels and weights of events in batches, in another order in every epoch."""

    def __init__(self, x: Tensor, z: Tensor, weight: Tensor, size: int, seed: int) -> None:
        self.x, self.z, self.weight = x, z, weight
        self.size, self.seed, self.epoch = min(size, len(x)), seed, 0

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.x), generator=generator).to(self.x.device)
        # an incomplete batch is left out: its events come in the next epochs
        for rows in order[: len(self) * self.size].split(self.size):
            yield self.x[rows], self.z[rows], self.weight[rows]


def validation() -> Any:
    """The Lightning callback that validates, defined on first use as the module is."""
    lightning: Any = require("lightning.pytorch", "train")

    class Validation(lightning.Callback):
        """Look at the held-out events after each epoch, before the state is written."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if module.failure is None:
                module.validate()

    return Validation()


def module_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    lightning: Any = require("lightning.pytorch", "train")

    class Training(lightning.LightningModule):
        """Training of a generator; keeps the weights of the best validation epoch."""

        def __init__(
            self,
            network: nn.Module,
            learned: Sequence[nn.Parameter],
            objective: Objective,
            events: Events,
            held: Events,
            options: dict[str, Any],
        ) -> None:
            super().__init__()
            self.network, self.objective = network, objective
            self.learned, self.events, self.held = list(learned), events, held
            self.options = options
            self.steps = options["epochs"] * len(events)
            self.rows: list[dict[str, float]] = []
            self.best, self.best_epoch = math.inf, 0
            self.best_state: list[Tensor] | None = None
            self.average: list[Tensor] | None = None
            self.failure: ValueError | None = None
            self._seen: list[float] = []
            self._before, self._start = 0.0, time.monotonic()

        def configure_optimizers(self) -> Any:
            """AdamW, decaying matrices only, through one cycle of the learning rate."""
            decay, lr = self.options["weight_decay"], self.options["lr"]
            groups = [
                {"params": [p for p in self.learned if p.ndim > 1], "weight_decay": decay},
                {"params": [p for p in self.learned if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                lr,
                total_steps=max(30, self.steps),
                pct_start=_WARM_UP,
                cycle_momentum=False,
            )
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

        def on_train_epoch_start(self) -> None:
            """Forget the losses of the last epoch."""
            self._seen = []
            if self.average is not None:
                self.average = [t.to(self.device) for t in self.average]

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            """Random numbers of the step, so that a resumed run repeats them."""
            torch.manual_seed(self.options["seed"] * 1_000_003 + self.global_step)

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            """Loss of a batch; None, and the end of the training, where there is none."""
            value = self.objective(batch, None)
            if not bool(torch.isfinite(value)):
                self.failure = ValueError(
                    f"Expected a finite loss; got {float(value)}. Lower lr, and look for extreme "
                    "data and weights."
                )
                self.trainer.should_stop = True
                return None
            self._seen.append(float(value.detach()))
            self.log("loss", value.detach(), prog_bar=True, batch_size=1)
            return value

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            """Follow the weights by their running average."""
            now = [p.data for p in self.learned]
            if self.average is None:
                self.average = [p.clone() for p in now]
                return
            keep = min(_AVERAGE, (1 + self.global_step) / (10 + self.global_step))
            torch._foreach_lerp_(self.average, now, 1 - keep)

        def _swap(self) -> None:
            for own, mean in zip(self.learned, self.average or [], strict=False):
                kept = own.data.clone()
                own.data.copy_(mean)
                mean.copy_(kept)

        def validate(self) -> None:
            """Loss of the averaged weights on the held-out events, and the best of them."""
            self._swap()
            self.network.eval()
            generator = torch.Generator(self.device).manual_seed(self.options["seed"])
            total, count = 0.0, 0.0
            with torch.no_grad():
                for x, z, weight in self.held:
                    batch = (x.to(self.device), z.to(self.device), weight.to(self.device))
                    share = float(weight.sum())
                    total += share * float(self.objective(batch, generator))
                    count += share
            value = total / count
            if math.isfinite(value) and value < self.best:
                self.best, self.best_epoch = value, len(self.rows) + 1
                self.best_state = [p.detach().clone() for p in self.learned]
            self._swap()
            self.network.train()
            row = GeneratorEpoch(
                epoch=len(self.rows) + 1,
                train=sum(self._seen) / max(1, len(self._seen)),
                val=value,
                lr=float(self.optimizers().param_groups[0]["lr"]),
                seconds=self._before + time.monotonic() - self._start,
            )
            self.rows.append(asdict(row))
            self.log("val_loss", value, prog_bar=True, batch_size=1)
            self.events.epoch = len(self.rows)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["generator"] = {
                "rows": self.rows,
                "best": self.best,
                "best_epoch": self.best_epoch,
                "best_state": self.best_state,
                "average": self.average,
                "options": self.options,
            }

        def take(self, kept: dict[str, Any]) -> None:
            """Take up history and best weights."""
            self.rows = list(kept["rows"])
            self.best, self.best_epoch = kept["best"], kept["best_epoch"]
            self.best_state, self.average = kept["best_state"], kept["average"]
            self._before = self.rows[-1]["seconds"] if self.rows else 0.0
            self.events.epoch = len(self.rows)

        def restore_best(self) -> None:
            """Put the best weights into the network."""
            if self.best_state is not None:
                for own, best in zip(self.learned, self.best_state, strict=True):
                    own.data.copy_(best)

    return Training
