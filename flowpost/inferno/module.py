"""The Lightning module around a summary: losses, averaged weights, the best of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from .history import SummaryEpoch
from .samples import Batches, Sample
from .summary import SoftBins

__all__ = ["Portions", "module_class", "validation"]

# of each step's running average of the weights, some five epochs of 100 batches
_AVERAGE = 0.998


class Portions:
    """Batches as Lightning passes them on, without looking into them."""

    def __init__(self, batches: Batches) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Portion]:
        return map(Portion, self.batches)


class Portion:
    """The samples of a step."""

    def __init__(self, samples: dict[str, Sample]) -> None:
        self.samples = samples


def validation() -> Any:
    """The Lightning callback that validates, defined on first use as the module is."""
    lightning: Any = require("lightning.pytorch", "train")

    class Validation(lightning.Callback):
        """Look at all validation events after each epoch, before the state is written."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if module.failure is None:
                module.validate()

    return Validation()


def module_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    lightning: Any = require("lightning.pytorch", "train")

    class Training(lightning.LightningModule):
        """Training of a summary; keeps the weights of the best validation epoch."""

        def __init__(
            self,
            network: nn.Module,
            loss: Callable[[nn.Module, Any], Tensor],
            held: dict[str, Sample],
            lr: float,
            weight_decay: float,
            seed: int,
            steps: int,
        ) -> None:
            super().__init__()
            self.network, self.held = network, held
            self.loss: Any = loss
            self.lr, self.weight_decay, self.seed, self.steps = lr, weight_decay, seed, steps
            self.rows: list[dict[str, float]] = []
            self.best, self.best_epoch = math.inf, 0
            self.best_state: dict[str, Tensor] | None = None
            self.average: list[Tensor] | None = None
            self.failure: ValueError | None = None
            self.options: dict[str, Any] = {}
            self.batches: Any = None
            self._seen: list[float] = []
            self._before, self._start = 0.0, time.monotonic()

        def configure_optimizers(self) -> Any:
            """AdamW, decaying matrices only, through one cycle of the learning rate."""
            some = [p for p in self.network.parameters() if p.requires_grad]
            groups = [
                {"params": [p for p in some if p.ndim > 1], "weight_decay": self.weight_decay},
                {"params": [p for p in some if p.ndim <= 1], "weight_decay": 0.0},
            ]
            optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=self.lr)
            cycle = torch.optim.lr_scheduler.OneCycleLR(
                optimizer,
                self.lr,
                total_steps=max(6, self.steps),
                pct_start=0.15,
                cycle_momentum=False,
            )
            return [optimizer], [{"scheduler": cycle, "interval": "step"}]

        def on_train_epoch_start(self) -> None:
            """Forget the losses of the last epoch."""
            self._seen = []
            if self.average is not None:
                self.average = [t.to(self.device) for t in self.average]

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            """Random numbers and annealing of the step, so that a resumed run repeats them."""
            torch.manual_seed(self.seed * 1_000_003 + self.global_step)
            progress = min(1.0, self.global_step / max(1, self.steps - 1))
            for part in (self.loss, *self.network.modules()):
                if callable(getattr(part, "anneal", None)):
                    part.anneal(progress)

        def training_step(self, batch: Any, index: int) -> Tensor | None:
            """Loss of a batch; None, and the end of the training, where there is none."""
            like = next(self.network.parameters())
            try:
                samples = {k: s.to(like.device, like.dtype) for k, s in batch.samples.items()}
                value = self.loss(self.network, samples)
                if not bool(torch.isfinite(value)):
                    raise ValueError(
                        f"Expected a finite loss; got {float(value)}. Lower lr, and look for "
                        "extreme inputs and weights."
                    )
            except ValueError as error:
                self.failure, self.trainer.should_stop = error, True
                return None
            self._seen.append(float(value.detach()))
            self.log("loss", value.detach(), prog_bar=True, batch_size=1)
            return value

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            """Follow the weights by their running average."""
            learned = [p.data for p in self.network.parameters()]
            if self.average is None:
                self.average = [p.clone() for p in learned]
                return
            keep = min(_AVERAGE, (1 + self.global_step) / (10 + self.global_step))
            torch._foreach_lerp_(self.average, learned, 1 - keep)

        def _swap(self) -> None:
            for own, mean in zip(self.network.parameters(), self.average or [], strict=False):
                kept = own.data.clone()
                own.data.copy_(mean)
                mean.copy_(kept)

        def validate(self) -> None:
            """Loss of the averaged weights, and the best of them."""
            self._swap()
            self.network.eval()
            try:
                value = _validated(self.loss, self.network, self.held)
                if not math.isfinite(value):
                    raise ValueError(
                        f"Expected a finite validation loss; got {value}. Lower lr, and look for "
                        "extreme inputs and weights."
                    )
            except ValueError as error:
                value, self.failure = math.nan, error
            if math.isfinite(value) and value < self.best:
                self.best, self.best_epoch = value, len(self.rows) + 1
                state = self.network.state_dict()
                self.best_state = {k: v.detach().clone() for k, v in state.items()}
            self._swap()
            self.network.train()
            if self.failure is not None:
                self.trainer.should_stop = True
                return
            bins = [m for m in self.network.modules() if isinstance(m, SoftBins)]
            row = SummaryEpoch(
                epoch=len(self.rows) + 1,
                train=sum(self._seen) / max(1, len(self._seen)),
                val=value,
                temperature=bins[0].temperature if bins else math.nan,
                lr=float(self.optimizers().param_groups[0]["lr"]),
                seconds=self._before + time.monotonic() - self._start,
            )
            self.rows.append(asdict(row))
            self.log("val_loss", value, prog_bar=True, batch_size=1)
            self.batches.set_epoch(len(self.rows))

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["flowpost.inferno.fit"] = {
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

        def restore_best(self) -> None:
            """Put the best weights into the network."""
            if self.best_state is not None:
                self.network.load_state_dict(self.best_state)

    return Training


def _validated(loss: Any, network: nn.Module, samples: dict[str, Sample]) -> float:
    """Loss of all events together, in portions where the loss knows how."""
    evaluate = getattr(loss, "evaluate", None)
    if evaluate is not None:
        return float(evaluate(network, samples))
    like = next(network.parameters())
    with torch.no_grad():
        held = {k: s.to(like.device, like.dtype) for k, s in samples.items()}
        return float(loss(network, held))
