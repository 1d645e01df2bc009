"""Lightning as the trainings of flowpost use it: quiet, on one device, resumable epoch by epoch."""

from __future__ import annotations

import logging
import os
import pickle
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ._checks import require

__all__ = ["adamw", "forked", "one_cycle", "quiet", "resumed", "trainer_of", "validation"]

# options of a run that are too long to be shown
_LONG = ("head", "model", "network")


def trainer_of(
    epochs: int,
    *,
    gradient_clip: float | None,
    precision: Any,
    progress: bool,
    patience: int | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    logger: Any = None,
    callbacks: Sequence[Any] = (),
) -> Any:
    """A Lightning `Trainer` on one device that writes nothing but what is asked for."""
    lightning = require("lightning.pytorch", "train")
    own: list[Any] = list(callbacks)
    if patience is not None:
        own.append(lightning.callbacks.EarlyStopping("val_nll", patience=patience))
    if checkpoint is not None:
        own.append(_keep_state(lightning, Path(checkpoint)))
    return lightning.Trainer(
        max_epochs=epochs,
        devices=1,
        callbacks=own,
        logger=logger if logger is not None else False,
        gradient_clip_val=gradient_clip,
        precision=precision,
        enable_progress_bar=progress,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(c, lightning.callbacks.ModelCheckpoint) for c in own),
        num_sanity_val_steps=0,
        log_every_n_steps=1 if logger is not None else 50,
    )


def _keep_state(lightning: Any, path: Path) -> Any:
    class KeepState(lightning.Callback):
        """Write the whole state after each epoch; an interruption leaves the last one whole."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(path.name + ".partial")
            trainer.save_checkpoint(partial)
            os.replace(partial, path)

        def on_train_end(self, trainer: Any, module: Any) -> None:
            # Lightning decides to stop early after the state of the epoch was written
            if trainer.should_stop:
                self.on_train_epoch_end(trainer, module)

    return KeepState()


def validation() -> Any:
    """A Lightning callback that has a module validate itself, defined on first use."""
    lightning = require("lightning.pytorch", "train")

    class Validation(lightning.Callback):  # type: ignore[name-defined]
        """Look at the held-out events after each epoch, before the state is written."""

        def on_train_epoch_end(self, trainer: Any, module: Any) -> None:
            if module.failure is None:
                module.validate()

    return Validation()


def one_cycle(
    optimizer: torch.optim.Optimizer, steps: int, warm_up: float, least: int = 6
) -> torch.optim.lr_scheduler.LRScheduler:
    """Warm up over a share of the steps, then anneal to nothing.

    Source: *Super-Convergence*, L. N. Smith, N. Topin, 2017, https://arxiv.org/abs/1708.07120.
    """
    peaks = [group["lr"] for group in optimizer.param_groups]
    return torch.optim.lr_scheduler.OneCycleLR(
        optimizer, peaks, total_steps=max(least, steps), pct_start=warm_up, cycle_momentum=False
    )


def adamw(
    learned: Sequence[nn.Parameter],
    lr: float,
    weight_decay: float,
    steps: int,
    warm_up: float,
    least: int = 6,
) -> tuple[list[Any], list[dict[str, Any]]]:
    """AdamW, decaying matrices only, through one cycle, as Lightning takes optimizers."""
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learned if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in learned if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr)
    cycle = one_cycle(optimizer, steps, warm_up, least)
    return [optimizer], [{"scheduler": cycle, "interval": "step"}]


def resumed(
    checkpoint: str | os.PathLike[str] | None, name: str, options: dict[str, Any]
) -> tuple[dict[str, Any] | None, dict[str, Any]]:
    """What a training kept in a checkpoint under its name, and options of the trainer's `fit`.

    None and no options where there is no file, and the training begins.

    Raises:
        ValueError: If the file cannot be read, or was begun with other options.
    """
    if checkpoint is None or not Path(checkpoint).exists():
        return None, {}
    path = os.fspath(checkpoint)
    try:
        kept: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)[name]
        begun = dict(kept["options"])
    except (KeyError, TypeError, RuntimeError, OSError, pickle.UnpicklingError, EOFError) as error:
        raise ValueError(
            f"Expected {path} as a checkpoint of {name}; it cannot be read as one ({error}). "
            "Remove the file or name another."
        ) from error
    for key, value in options.items():
        if begun.get(key) != value:
            was, now = f"{key}={begun.get(key)!r}", repr(value)
            if key in _LONG:
                was, now = f"another {key}", "this one"
            raise ValueError(
                f"Expected the run that {path} was begun with ({was}); got {now}. A run goes on as "
                "it began: use its options and data, or name another file."
            )
    return kept, {"ckpt_path": path, "weights_only": True}


@contextmanager
def forked() -> Iterator[None]:
    """Leave the global random states, of all devices, as they were."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Lightning's advertisements and known remarks out of the user's output."""
    names = ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric")
    loggers = [logging.getLogger(name) for name in names]
    levels = [log.level for log in loggers]
    for log in loggers:
        log.setLevel(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*does not have many workers.*")
            warnings.filterwarnings("ignore", ".*training_step. returned .None.*")
            warnings.filterwarnings("ignore", ".*treespec.*")
            warnings.filterwarnings("ignore", ".*in eval mode at the start of training.*")
            warnings.filterwarnings("ignore", ".*LeafSpec.*")
            warnings.filterwarnings("ignore", ".*number of training batches.*")
            yield
    finally:
        for log, level in zip(loggers, levels, strict=True):
            log.setLevel(level)
