"""The Lightning module around a posterior model: losses, best weights, coverage of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, require
from .._course import Course, share_kept
from .._normal import chi2_level
from .._weights import check_weights, weighted_mean
from ..diagnostics import LevelCoverage, level_coverage
from ..head import PosteriorHead
from ..model import PosteriorModel
from .data import to_batch
from .history import Epoch

__all__ = ["Schedule", "module_class"]

# measured by benchmarks/defaults.py: heads and encoders of ours learn best at three times the rate
# that suits a user's network
_OWN_RATE = 3.0
# of each step's running average of the weights, some five epochs of 10 000 events
_AVERAGE = 0.995
# weight decay of the splines in units of the others', for each base coordinate; measured by
# benchmarks/linear_gaussian.py and benchmarks/defaults.py: splines are the first to fit noise, and
# the more labels the sooner
_SPLINE_DECAY = {"spline_weight": 4.0, "outer": 0.5}
# of the settling: its first rate in units of the peak, its running average, and the nats by which
# the settled weights may be worse in validation than the best
_SETTLE_RATE = 0.1
_SETTLE_AVERAGE = 0.99
_SETTLE_LOSS = 0.003
# what a loss of posterior and likelihood is the sum of
_PARTS = ("posterior", "data")
Schedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


def module_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    lightning = require("lightning.pytorch", "train")

    class Training(lightning.LightningModule):  # type: ignore[name-defined]
        """Joint-KL training of a model; keeps the weights of the best validation epoch."""

        def __init__(
            self,
            model: PosteriorModel,
            lr: float,
            weight_decay: float,
            schedule: Schedule | None,
            seed: int,
            signed_weights: bool,
        ) -> None:
            super().__init__()
            self.model = model
            self.lr, self.weight_decay, self.schedule = lr, weight_decay, schedule
            self.seed, self.signed_weights = seed, signed_weights
            self.course = Course(model)
            self.wanted: frozenset[int] = frozenset()
            self.snapshots: dict[int, dict[str, Tensor]] = {}
            self.options: dict[str, Any] = {}
            self.followers: list[Any] = []
            self.settling = False
            self.diverged = False
            self._offset = 0
            self._own_dropout: list[tuple[Any, float]] = []
            self._first = True
            self._sums = {name: [0.0, 0.0] for name in ("train", "val", *_PARTS)}
            self._base: list[tuple[Tensor, Tensor]] = []

        def _parameters_of(self, own: bool) -> list[torch.nn.Parameter]:
            """Parameters of flowpost's head and encoders, or of the user's encoder."""
            # once each, for parts may lie in one another
            ours = list({p: p for part in self.model.own_parts() for p in part.parameters()})
            kept = {id(p) for p in ours}
            return ours if own else [p for p in self.parameters() if id(p) not in kept]

        def _groups(self) -> list[dict[str, Any]]:
            """Parameters by rate, in units of `lr`, and decay."""
            groups: dict[tuple[float, float], list[torch.nn.Parameter]] = {}
            scale = _SETTLE_RATE if self.settling else 1.0
            factor = {
                id(p): max(1.0, head.space.dof * _SPLINE_DECAY.get(name.rpartition(".")[2], 0.0))
                for head in self.model.modules()
                if isinstance(head, PosteriorHead)
                for name, p in head.named_parameters()
            }
            for own in (True, False):
                rate = _OWN_RATE if own else 1.0
                for p in self._parameters_of(own):
                    decay = self.weight_decay * factor.get(id(p), 1.0) if p.ndim > 1 else 0.0
                    if p.requires_grad:
                        groups.setdefault((rate, decay * (not self.settling)), []).append(p)
            return [
                {"params": some, "lr": self.lr * rate * scale, "rate": rate, "weight_decay": decay}
                for (rate, decay), some in groups.items()
            ]

        def configure_optimizers(self) -> Any:
            """AdamW, decaying matrices only, with the schedule stepped each batch."""
            groups = self._groups()
            if not groups:
                raise ValueError("Expected parameters to learn; all of them are frozen.")
            # Lightning does not clip gradients of a fused optimizer under mixed precision
            fused = "mixed" not in str(self.trainer.precision)
            optimizer = torch.optim.AdamW(groups, lr=self.lr, fused=fused)
            steps = self.trainer.estimated_stepping_batches
            if self.settling and math.isfinite(steps):
                # at a constant rate widths stay as wide as its noise: benchmarks/telescope3d.py
                decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, int(steps))
                return [optimizer], [{"scheduler": decay, "interval": "step"}]
            if self.schedule is None or self.settling:
                return optimizer
            if not math.isfinite(steps):
                raise ValueError(
                    "Expected a finite number of epochs and batches for the learning-rate "
                    "schedule; got no end. Set epochs, or schedule=None."
                )
            scheduler = self.schedule(optimizer, int(steps))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

        def start_epoch(self, epoch: int) -> None:
            """Tell the data sets that draw anew in each epoch which one begins, counted from 0."""
            for events in self.followers:
                events.set_epoch(epoch)

        def on_train_epoch_end(self) -> None:
            """Before Lightning takes the first batch of the next epoch."""
            self.start_epoch(self._offset + self.current_epoch + 1)

        def on_train_epoch_start(self) -> None:
            """Forget the sums of the last epoch."""
            self._sums["train"] = [0.0, 0.0]
            # the order of a user's shuffling loader; Lightning made the first iterator of this run
            # before, with one draw that those of later epochs take from here on
            self._seed(self.current_epoch)
            if self._first:
                torch.empty((), dtype=torch.int64).random_()
                self._first = False
            self.course.to(self.device)

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            """Start the random numbers of the step, so that a resumed run repeats them."""
            self._seed(self.trainer.fit_loop.total_batch_idx + self.settling * 500_009)

        def _seed(self, count: int) -> None:
            seed = self.seed * 1_000_003 + count
            # torch.manual_seed formats a stack trace for every kind of device
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            """Follow the weights by their running average."""
            keep = _SETTLE_AVERAGE if self.settling else share_kept(self.global_step, _AVERAGE)
            self.course.follow(keep)

        def _add(self, part: str, value: Tensor, weight: Any) -> None:
            """Add losses to the sums of a part, with weights that were checked."""
            w = torch.ones_like(value)
            if weight is not None:
                w = as_tensor(weight, "weight", like=value).to(value)
            sums = self._sums[part]
            sums[0] += float((w * value).double().sum())
            sums[1] += float(w.double().sum())

        def training_step(self, data: Any, index: int) -> Tensor | None:
            """Joint KL of a batch; None, and the end of the training, where it is not finite."""
            batch = to_batch(data)
            value = self.model.event_loss(
                batch.x, batch.z, batch.mask, reference=batch.reference
            ).value
            loss = weighted_mean(value, batch.weight, self.signed_weights)
            if not bool(torch.isfinite(loss)):
                self.diverged = self.trainer.should_stop = True
                return None
            self._add("train", value.detach(), batch.weight)
            if self.logger is not None or self.trainer.progress_bar_callback is not None:
                self.log("train_nll", loss.detach(), prog_bar=True, batch_size=len(value))
            return loss

        def on_validation_epoch_start(self) -> None:
            """Forget the sums of the last validation."""
            self._sums |= {name: [0.0, 0.0] for name in ("val", *_PARTS)}
            self._base = []
            self.course.swap()

        def validation_step(self, data: Any, index: int) -> None:
            """Log density, and base coordinates of the events that have all labels."""
            batch = to_batch(data)
            found = self.model.event_loss(
                batch.x, batch.z, batch.mask, reference=batch.reference, base=True
            )
            value, u, whole = found.value, found.base, found.whole
            assert u is not None
            weight = torch.ones_like(value)
            if batch.weight is not None:
                weight = check_weights(batch.weight, value, self.signed_weights)
            self._add("val", value, weight)
            for name in _PARTS:
                part = getattr(found, name)
                if part is not None:
                    self._add(name, part, weight)
            if whole is not None:
                u, weight = u[whole], weight[whole]
            self._base.append((u.detach().cpu(), weight.detach().cpu()))

        def on_validation_epoch_end(self) -> None:
            """Log the validation and keep the weights if it is the best so far."""
            if self.trainer.sanity_checking:
                self.course.swap()
                return
            nll, total = self._sums["val"]
            if not total > 0:
                raise ValueError(
                    f"Expected validation weights with a positive sum; got {total:g}. Give other "
                    "validation events."
                )
            nll = nll / total
            parts = {f"val_{k}": s / w if w else None for k in _PARTS for s, w in [self._sums[k]]}
            self.log("val_nll", nll, prog_bar=True)
            coverage = self._coverage()

            def within(level: float) -> float:
                return math.nan if coverage is None else coverage.coverage_at(level)

            ks = math.nan if coverage is None else coverage.ks_pvalue
            seen, weight = self._sums["train"]
            group = self.optimizers().param_groups[0]
            row = Epoch(
                epoch=self._offset + self.current_epoch + 1,
                train_nll=seen / weight if weight else math.nan,
                val_nll=nll,
                coverage50=within(0.5),
                coverage68=within(0.682689),
                coverage90=within(0.9),
                ks_pvalue=float(ks),
                lr=float(group["lr"]) / group["rate"],
                seconds=self.course.seconds,
                **parts,
            )
            if self.logger is not None:
                self.log_dict({"coverage68": row.coverage68, "coverage90": row.coverage90})
            self.course.rows.append(asdict(row))
            # a settled model counts as better where it is as good: its widths fit its weights
            allowance = _SETTLE_LOSS if self.settling else 0.0
            self.course.keep(nll, row.epoch, allowance)
            if row.epoch in self.wanted:
                self.snapshots[row.epoch] = {k: v.cpu() for k, v in self.course.now().items()}
            self.course.swap()

        def _coverage(self) -> LevelCoverage | None:
            u, weight = (torch.cat(parts) for parts in zip(*self._base, strict=True))
            if not bool(torch.isfinite(u).all()) or bool((weight < 0).any()):
                return None
            if not bool((weight > 0).any()):
                return None
            return level_coverage(chi2_level(u.double()), weight=weight)

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["flowpost.fit"] = {
                **self.course.state(),
                "snapshots": self.snapshots,
                "options": self.options,
                "stopped": self.trainer.should_stop,
            }

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Take up history and best weights."""
            kept = checkpoint["flowpost.fit"]
            self.course.load(kept)
            self.snapshots = kept["snapshots"]

        def settle(self) -> None:
            """Begin the last epochs: from the best weights, at a low rate and without dropout."""
            self.restore_best()
            self.settling, self._offset = True, int(self.course.rows[-1]["epoch"])
            self.course.begin()
            self.model.eval()
            # the gradient of recurrent layers needs the training mode
            module: Any
            for module in self.model.modules():
                if isinstance(module, torch.nn.RNNBase):
                    self._own_dropout.append((module, module.dropout))
                    module.train()
                    module.dropout = 0.0

        def restore_best(self) -> None:
            """Put the best weights, and what the settling changed, into the model."""
            for module, rate in self._own_dropout:
                module.dropout = rate
            self._own_dropout = []
            self.course.restore()

    return Training
