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

from ._checks import require

__all__ = ["forked", "kept_state", "quiet", "trainer_of"]

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


def kept_state(
    checkpoint: str | os.PathLike[str], name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """What a training keeps in a checkpoint beside Lightning's state, under its name.

    Raises:
        ValueError: If the file cannot be read, or was begun with other options.
    """
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
    return kept


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
