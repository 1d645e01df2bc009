"""fit: training of a summary on Lightning, with the weights of its best validation."""

from __future__ import annotations

import math
import os
import pickle
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_finite, check_positive_int, require
from .._events import called, joined
from .._lightning import forked, quiet, trainer_of
from ..encoders import Encoder
from .model import CountingModel
from .samples import Batches, Sample, check_samples, split
from .summary import SoftBins, SummaryModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SummaryEpoch", "SummaryHistory", "fit"]

# of each step's running average of the weights, some five epochs of 100 batches
_AVERAGE = 0.998
# share of the events of a process below which a bin counts as dead
_DEAD = 1e-4
# events of a process by which dead bins and the scales of inputs are found
_LOOK = 100_000


@dataclass(frozen=True)
class SummaryEpoch:
    """Numbers of one epoch.

    Attributes:
        epoch: Count from 1.
        train: Mean loss of the batches.
        val: Loss of all validation events together; of the INFERNO loss, the logarithm of the
            variance of the parameter of interest.
        temperature: Of the soft bins; NaN without.
        lr: Learning rate at the end of the epoch.
        seconds: Wall-clock time since the start, resumed parts included.
    """

    epoch: int
    train: float
    val: float
    temperature: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class SummaryHistory:
    """The epochs of a training and which one's weights were kept.

    Attributes:
        epochs: Numbers of each epoch.
        best: The epoch whose weights the network has.
    """

    epochs: tuple[SummaryEpoch, ...]
    best: SummaryEpoch

    def __str__(self) -> str:
        last = self.epochs[-1]
        return (
            f"{len(self.epochs)} epochs in {last.seconds:.0f} s; validation loss "
            f"{self.best.val:.4f} in epoch {self.best.epoch}"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Losses by epoch."""
        from ..plots import plot_summary_history

        return plot_summary_history(self, ax=ax)


def fit(
    network: nn.Module,
    loss: Callable[[nn.Module, Any], Tensor],
    train: Any,
    val: Any = 0.1,
    *,
    epochs: int = 20,
    batch_size: int = 1000,
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    gradient_clip: float | None = 5.0,
    checkpoint: str | os.PathLike[str] | None = None,
    precision: Any = "32-true",
    logger: Any = None,
    callbacks: Sequence[Any] = (),
    progress: bool = True,
) -> SummaryHistory:
    """Train a summary, and leave it with the weights of its best validation epoch.

    The learning rate goes through one cycle, and the weights are averaged over some five epochs.
    The network is left in evaluation mode; flowpost's encoders are scaled by the training part,
    unless they were before. The same seed gives the same weights twice on the same machine, also
    where a run was stopped and resumed.

    Arguments:
        network: What the loss takes: for an `InfernoLoss` a `SummaryModel`, or any module from
            inputs (N, …) to probabilities (N, K).
        loss: `InfernoLoss(model)`, `CrossEntropyLoss(model)`, or a function of yours of (network,
            samples) with an attribute `model`.
        train: `Sample` or inputs (N, …) of every process, by its name.
        val: A fraction of the events, or samples as `train`.
        epochs: Passes over the largest sample.
        batch_size: Events of every process, and of every varied sample, in a step.
        lr: Peak learning rate.
        weight_decay: Decay of weight matrices (AdamW).
        seed: Of the division, the order of events and all random numbers of the training.
        gradient_clip: Largest norm of a step's gradient, or None.
        checkpoint: A file that holds the state after each epoch; if it exists the run goes on from
            there, with the same options and data.
        precision: As Lightning's.
        logger: A Lightning logger.
        callbacks: Lightning callbacks.
        progress: Show a progress bar.

    Returns:
        Losses of every epoch.

    Raises:
        ValueError: If samples are missing, not finite or empty, or the training collapsed before
            its first validation.
        ImportError: If Lightning is not installed.
    """
    require("lightning.pytorch", "train")
    model = getattr(loss, "model", None)
    if not isinstance(network, nn.Module) or not isinstance(model, CountingModel):
        raise ValueError(
            "Expected fit(network, loss, samples) with a loss of a CountingModel; got "
            f"{type(network).__name__}, {type(loss).__name__}. Try "
            "fit(SummaryModel(encoder, SoftBins(…)), InfernoLoss(model), samples)."
        )
    check_positive_int(epochs, "epochs")
    if isinstance(val, float):
        train, val = split(model, train, val, seed)
    train, val = check_samples(model, train), check_samples(model, val)
    batches = Batches(model, train, batch_size, seed)
    for samples in (train, val):
        _check_inputs(network, samples)
    _fit_scale(network, train)
    module = _module_class()(network, loss, val, lr, weight_decay, seed, epochs * len(batches))
    module.options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "events": {k: len(s) for k, s in train.items()},
        "network": {k: list(v.shape) for k, v in network.state_dict().items()},
    }
    module.batches = batches
    home = next(network.parameters()).device
    options: dict[str, Any] = {}
    if checkpoint is not None and Path(checkpoint).exists():
        module.take(_read(checkpoint, module.options))
        options = {"ckpt_path": str(checkpoint), "weights_only": True}
    batches.set_epoch(len(module.rows))
    with forked(), quiet():
        trainer = trainer_of(
            epochs,
            gradient_clip=gradient_clip,
            precision=precision,
            progress=progress,
            checkpoint=checkpoint,
            logger=logger,
            callbacks=[_validation(), *callbacks],
        )
        torch.manual_seed(seed)
        network.train()
        try:
            if len(module.rows) < epochs:
                trainer.fit(module, batches, **options)
        finally:
            module.restore_best()
            network.to(home).eval()
    if module.failure is not None:
        _failed(module)
    _warn_dead(network, val)
    rows = tuple(SummaryEpoch(**row) for row in module.rows)
    return SummaryHistory(rows, next(r for r in rows if r.epoch == module.best_epoch))


def _check_inputs(network: nn.Module, samples: dict[str, Sample]) -> None:
    encoder = getattr(network, "encoder", network)
    for name, sample in samples.items():
        for part in (sample, *(s for pair in sample.varied.values() for s in pair)):
            try:
                if encoder is None:
                    check_finite(part.x, "x")
                elif isinstance(encoder, Encoder):
                    called(encoder.check, part.x)
            except ValueError as error:
                raise ValueError(f"In the sample of {name!r}: {error}") from error


def _fit_scale(network: nn.Module, samples: dict[str, Sample]) -> None:
    wanted = isinstance(network, SummaryModel) or (
        isinstance(network, Encoder) and not network.fitted
    )
    if wanted:
        parts = [s.at(torch.arange(min(len(s), _LOOK))) for s in samples.values()]
        called(network.fit_scale, (joined([p.x for p in parts], [len(p) for p in parts]),))  # type: ignore[arg-type]


def _failed(module: Any) -> None:
    if module.best_state is None:
        raise module.failure
    warnings.warn(
        f"The training stopped in epoch {len(module.rows) + 1} ({module.failure}); the network has "
        f"the weights of epoch {module.best_epoch}.",
        stacklevel=3,
    )


def _warn_dead(network: nn.Module, samples: dict[str, Sample]) -> None:
    """Say so where hard bins stay empty."""
    if not isinstance(network, SummaryModel):
        return
    share = torch.zeros(network.bins)
    for sample in samples.values():
        part = sample.at(torch.arange(min(len(sample), _LOOK)))
        filled = torch.bincount(network.assign(part.x).cpu(), minlength=network.bins)
        share = torch.maximum(share, filled / len(part))
    alive = int((share > _DEAD).sum())
    if alive == 1:
        warnings.warn(
            "All events fall into one hard bin: the summary distinguishes nothing. Start anew with "
            "another seed, a lower lr or a lower final temperature.",
            stacklevel=3,
        )
    elif alive < network.bins:
        warnings.warn(
            f"{network.bins - alive} of {network.bins} bins hold (almost) no event. The summary is "
            "valid; if its width disappoints, a higher temperature or more epochs may fill them.",
            stacklevel=3,
        )


def _read(checkpoint: str | os.PathLike[str], options: dict[str, Any]) -> dict[str, Any]:
    try:
        kept = torch.load(checkpoint, map_location="cpu", weights_only=True)["inferno"]
        begun = dict(kept["options"])
    except (KeyError, TypeError, RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"Expected {os.fspath(checkpoint)} as a checkpoint of flowpost.inferno.fit; it cannot "
            f"be read as one ({error}). Remove the file or name another."
        ) from error
    for name, value in options.items():
        if begun.get(name) != value:
            raise ValueError(
                f"Expected the run that {os.fspath(checkpoint)} was begun with ({name}="
                f"{begun.get(name)!r}); got {value!r}. A run goes on as it began: use its options "
                "and data, or name another file."
            )
    return kept


def _validation() -> Any:
    lightning: Any = require("lightning.pytorch", "train")

    class Validation(lightning.Callback):
        """Look at all validation events after each epoch, before the state is written."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if module.failure is None:
                module.validate()

    return Validation()


def _module_class() -> type:
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
            try:
                value = self.loss(self.network, batch)
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
                value = _evaluated(self.loss, self.network, self.held)
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
            checkpoint["inferno"] = {
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


def _evaluated(loss: Any, network: nn.Module, samples: dict[str, Sample]) -> float:
    """Loss of all events together, in portions where the loss knows how."""
    evaluate = getattr(loss, "evaluate", None)
    if evaluate is not None:
        return float(evaluate(network, samples))
    device = next(network.parameters()).device
    with torch.no_grad():
        return float(loss(network, {k: s.to(device) for k, s in samples.items()}))
