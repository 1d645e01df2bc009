"""The Lightning module around a summary: losses, averaged weights, the best of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import require
from .._course import Course, share_kept
from .._lightning import adamw
from .history import SummaryEpoch
from .samples import Batches, Sample
from .summary import SoftBins

__all__ = ["Portions", "module_class"]

# share of the steps in which the learning rate rises
_WARM_UP = 0.15


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
            batches: Batches,
            options: dict[str, Any],
        ) -> None:
            super().__init__()
            self.network, self.held, self.batches = network, held, batches
            self.loss: Any = loss
            self.options, self.steps = options, options["epochs"] * len(batches)
            self.course = Course(network)
            self.failure: ValueError | None = None
            self._seen: list[float] = []

        def configure_optimizers(self) -> Any:
            """AdamW, decaying matrices only, through one cycle of the learning rate."""
            learned = [p for p in self.network.parameters() if p.requires_grad]
            lr, decay = self.options["lr"], self.options["weight_decay"]
            return adamw(learned, lr, decay, self.steps, _WARM_UP)

        def on_train_epoch_start(self) -> None:
            """Forget the losses of the last epoch."""
            self._seen = []
            self.course.to(self.device)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            """Random numbers and annealing of the step, so that a resumed run repeats them."""
            torch.manual_seed(self.options["seed"] * 1_000_003 + self.global_step)
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
            self.course.follow(share_kept(self.global_step))

        def validate(self) -> None:
            """Loss of the averaged weights, and the best of them."""
            try:
                value = self.course.validated(self._score)
            except ValueError as error:
                self.failure, self.trainer.should_stop = error, True
                return
            bins = [m for m in self.network.modules() if isinstance(m, SoftBins)]
            row = SummaryEpoch(
                epoch=self.course.next_epoch,
                train=sum(self._seen) / max(1, len(self._seen)),
                val=value,
                temperature=bins[0].temperature if bins else math.nan,
                lr=float(self.optimizers().param_groups[0]["lr"]),
                seconds=self.course.seconds,
            )
            self.course.rows.append(asdict(row))
            self.log("val_loss", value, prog_bar=True, batch_size=1)
            self.batches.set_epoch(len(self.course.rows))

        def _score(self) -> float:
            value = _validated(self.loss, self.network, self.held)
            if not math.isfinite(value):
                raise ValueError(
                    f"Expected a finite validation loss; got {value}. Lower lr, and look for "
                    "extreme inputs and weights."
                )
            return value

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["flowpost.inferno.fit"] = {**self.course.state(), "options": self.options}

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
