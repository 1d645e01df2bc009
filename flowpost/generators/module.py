"""The Lightning module around a generator of a density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._lightning import adamw
from .training import Batches, Rows, averaged_class

__all__ = ["Objective", "module_class"]

# of the learning rate: the share of the steps, and the steps that a cycle has at least
_WARM_UP, _LEAST = 0.1, 30

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
            lr, decay = self.options["lr"], self.options["weight_decay"]
            return adamw(self.learned, lr, decay, self.steps, _WARM_UP, _LEAST)

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
            """Mean loss of all held-out events, with the same noise each time."""
            generator = torch.Generator(self.device).manual_seed(self.options["seed"])
            total, count = 0.0, 0.0
            for rows in self.held:
                batch = tuple(t.to(self.device) for t in rows)
                share = float(rows[-1].sum())
                if not share:
                    continue
                total += share * float(self.objective(batch, generator))
                count += share
            return total / count

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["flowpost.generators"] = {**self.course.state(), "options": self.options}

    return Training
