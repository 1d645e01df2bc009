"""The Lightning module around a generator of a density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .training import Batches, Rows, averaged_class

__all__ = ["Objective", "module_class"]

_WARM_UP = 0.1

Objective: TypeAlias = Callable[[Rows, "torch.Generator | None"], Tensor]


def module_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    averaged: Any = averaged_class()

    class Training(averaged):
        """Training of a generator by one loss, which may be resumed."""

        def __init__(
            self,
            network: nn.Module,
            learned: Sequence[nn.Parameter],
            objective: Objective,
            events: Batches,
            held: Batches,
            options: dict[str, Any],
        ) -> None:
            super().__init__(network, learned, events, losses=1)
            self.objective, self.held, self.options = objective, held, options
            self.steps = options["epochs"] * len(events)

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

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            """Random numbers of the step, so that a resumed run repeats them."""
            torch.manual_seed(self.options["seed"] * 1_000_003 + self.global_step)

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            """Loss of a batch; None, and the end of the training, where there is none."""
            value = self.objective(batch, None)
            if not self.finite(value):
                return None
            self.seen[0].append(float(value.detach()))
            self.log("loss", value.detach(), prog_bar=True, batch_size=1)
            return value

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            """Follow the weights by their running average."""
            self.follow(self.global_step)

        def rate(self) -> float:
            """Learning rate of the next step."""
            return float(self.optimizers().param_groups[0]["lr"])

        def score(self) -> float:
            """Mean loss of the held-out events, with the same noise each time."""
            generator = torch.Generator(self.device).manual_seed(self.options["seed"])
            total, count = 0.0, 0.0
            for rows in self.held:
                batch = tuple(t.to(self.device) for t in rows)
                share = float(rows[-1].sum())
                total += share * float(self.objective(batch, generator))
                count += share
            return total / count

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["flowpost.generators"] = {
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
            self.before = self.rows[-1]["seconds"] if self.rows else 0.0
            self.events.epoch = len(self.rows)

    return Training
