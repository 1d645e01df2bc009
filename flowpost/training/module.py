"""The Lightning module around a posterior model: losses, best weights, coverage of each epoch."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, require
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
# of the settling: its rate in units of the peak, its running average, and the nats by which the
# settled weights may be worse in validation than the best
_SETTLE_RATE = 0.1
_SETTLE_AVERAGE = 0.99
_SETTLE_LOSS = 0.003
# what a loss of posterior and likelihood is the sum of
_PARTS = ("posterior", "data")
Schedule = Callable[[torch.optim.Optimizer, int], torch.optim.lr_scheduler.LRScheduler]


def one_cycle(optimizer: torch.optim.Optimizer, steps: int) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up over a fifth of the steps, then anneal to nothing.

    Source: *Super-Convergence*, L. N. Smith, N. Topin, 2017, https://arxiv.org/abs/1708.07120.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=max(6, steps), pct_start=0.2, cycle_momentum=False
    )


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
            self.rows: list[dict[str, float]] = []
            self.best_nll = math.inf
            self.best_epoch = 0
            self.best_state: dict[str, Tensor] | None = None
            self.average: list[Tensor] | None = None
            self.wanted: frozenset[int] = frozenset()
            self.snapshots: dict[int, dict[str, Tensor]] = {}
            self.options: dict[str, Any] = {}
            self.followers: list[Any] = []
            self.settling = False
            self.diverged = False
            self._offset = 0
            self._own_dropout: list[tuple[Any, float]] = []
            self._first = True
            self._before = 0.0
            self._start = time.monotonic()
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
            if self.schedule is None or self.settling:
                return optimizer
            steps = self.trainer.estimated_stepping_batches
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
            if self.average is not None:
                # a checkpoint is read before the model moves to its device
                self.average = [t.to(self.device) for t in self.average]

        def on_train_batch_start(self, batch: Any, index: int) -> None:
            """Start the random numbers of the step, so that a resumed run repeats them."""
            self._seed(self.trainer.fit_loop.total_batch_idx + self.settling * 500_009)

        def _seed(self, count: int) -> None:
            seed = self.seed * 1_000_003 + count
            # torch.manual_seed formats a stack trace for every kind of device
            torch.default_generator.manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.manual_seed(seed)

        def _learned(self) -> list[Tensor]:
            # frozen ones too: a callback may thaw them
            return [p.data for p in self.model.parameters()]

        def on_train_batch_end(self, outputs: Any, batch: Any, index: int) -> None:
            """Follow the weights by their running average."""
            learned = self._learned()
            if self.average is None:
                self.average = [p.clone() for p in learned]
                return
            step = self.global_step
            keep = _SETTLE_AVERAGE if self.settling else min(_AVERAGE, (1 + step) / (10 + step))
            torch._foreach_lerp_(self.average, learned, 1 - keep)

        def _swap(self) -> None:
            """Exchange the weights and their average."""
            if self.average is not None:
                for own, mean in zip(self._learned(), self.average, strict=True):
                    kept = own.clone()
                    own.copy_(mean)
                    mean.copy_(kept)

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
            self._swap()

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
                self._swap()
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
                seconds=self._before + time.monotonic() - self._start,
                **parts,
            )
            if self.logger is not None:
                self.log_dict({"coverage68": row.coverage68, "coverage90": row.coverage90})
            self.rows.append(asdict(row))
            # a settled model counts as better where it is as good: its widths fit its weights
            allowance = _SETTLE_LOSS if self.settling else 0.0
            if math.isfinite(nll) and nll < self.best_nll + allowance:
                self.best_nll, self.best_epoch = min(nll, self.best_nll), row.epoch
                self.best_state = self._state()
            if row.epoch in self.wanted:
                self.snapshots[row.epoch] = {k: v.cpu() for k, v in self._state().items()}
            self._swap()

        def _coverage(self) -> LevelCoverage | None:
            u, weight = (torch.cat(parts) for parts in zip(*self._base, strict=True))
            if not bool(torch.isfinite(u).all()) or bool((weight < 0).any()):
                return None
            if not bool((weight > 0).any()):
                return None
            return level_coverage(chi2_level(u.double()), weight=weight)

        def _state(self) -> dict[str, Tensor]:
            return {k: v.detach().clone() for k, v in self.model.state_dict().items()}

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Keep history and best weights beside the last ones."""
            checkpoint["flowpost.fit"] = {
                "rows": self.rows,
                "best_nll": self.best_nll,
                "best_epoch": self.best_epoch,
                "best_state": self.best_state,
                "average": self.average,
                "snapshots": self.snapshots,
                "options": self.options,
                "stopped": self.trainer.should_stop,
            }

        def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            """Take up history and best weights."""
            kept = checkpoint["flowpost.fit"]
            self.rows = list(kept["rows"])
            self.best_nll, self.best_epoch = kept["best_nll"], kept["best_epoch"]
            self.best_state = kept["best_state"]
            self.average = kept["average"]
            self.snapshots = kept["snapshots"]
            self._before = self.rows[-1]["seconds"] if self.rows else 0.0

        def settle(self) -> None:
            """Begin the last epochs: from the best weights, at a low rate and without dropout."""
            self.restore_best()
            self.settling, self._offset = True, int(self.rows[-1]["epoch"])
            self.average = [p.clone() for p in self._learned()]
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
            if self.best_state is not None:
                self.model.load_state_dict(self.best_state)

    return Training
