"""fit: training on Lightning, with what a calibrated posterior needs by default."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from .._checks import check_positive_int, require
from .._events import called
from .._lightning import forked, one_cycle, quiet, resumed, trainer_of
from ..head import PosteriorHead
from ..masks import read_mask
from ..model import PosteriorModel
from .data import (
    Batch,
    EpochBatches,
    check_events,
    chosen,
    fixed,
    followers,
    loader,
    sample_of,
    split,
)
from .history import Epoch, History
from .module import Schedule, module_class

__all__ = ["fit"]

# of the head's conditioners, measured by benchmarks/defaults.py
_DROPOUT = 0.1
# share of the steps in which the learning rate rises
_WARM_UP = 0.2
# epochs of settling at the end, at most a tenth of all
_SETTLE, _SETTLE_SHARE = 5, 10


def fit(
    model: PosteriorModel,
    train: Any,
    val: Any = 0.1,
    *,
    epochs: int = 100,
    batch_size: int = 256,
    lr: float = 1e-3,
    seed: int = 0,
    weight_decay: float = 0.1,
    schedule: str | Schedule | None = "one-cycle",
    patience: int | None = None,
    gradient_clip: float | None = 5.0,
    signed_weights: bool = False,
    checkpoint: str | os.PathLike[str] | None = None,
    snapshots: Sequence[int] = (),
    precision: Any = "32-true",
    logger: Any = None,
    callbacks: Sequence[Any] = (),
    workers: int = 0,
    progress: bool = True,
    trainer: Any = None,
) -> History:
    """Train a model by the joint KL, and leave it with the weights of its best validation epoch.

    The last epochs (five, at most a tenth of all) settle: from the best weights, from a tenth of
    the rate down and without dropout, so that the predicted widths are those of the network as it
    will be used; before, dropout and large steps widen them. The model is left in evaluation mode.
    Labels and inputs are scaled by the training part, unless they were before. The same seed gives
    the same weights twice on the same machine, also where a run was stopped and resumed.

    Arguments:
        model: Encoder and head.
        train: Tensors `(x, z)`, `(x, z, weight)` or `(x, z, weight, mask)`, labels alone for an
            unconditional density, a dict of those names and `reference`, a `Dataset` or a
            `DataLoader` of such events. x has shape (N, …) and may be a tuple or dict of tensors,
            the arguments of the encoder; z has shape (N, D), weight (N,), mask and reference (N, D)
            or a dict by block.
        val: A fraction of the events, or data as `train`.
        epochs: Passes over the training part.
        batch_size: Events of a step; a `DataLoader` has its own.
        lr: Peak learning rate of a network of your own; the head and the encoders of flowpost take
            three times as much.
        seed: Of the division, the order of events and all random numbers of the training.
        weight_decay: Decay of weight matrices (AdamW); four times as much, times the degrees
            of freedom, of those that take the context to the splines, which fit noise first.
        schedule: `"one-cycle"`, None for a constant rate, or a function of (optimizer, steps).
        patience: Epochs without a better validation loss after which to stop; None trains on.
        gradient_clip: Largest norm of a step's gradient, or None.
        signed_weights: Allow negative event weights.
        checkpoint: A file that holds the state after each epoch; if it exists the run goes on from
            there, with the same options and data.
        snapshots: Epochs, counted from 1, whose validated weights `History.snapshots` keeps.
        precision: As Lightning's, for example `"16-mixed"` or `"bf16-mixed"`.
        logger: A Lightning logger, of the epochs before the settling.
        callbacks: Lightning callbacks, of the epochs before the settling.
        workers: Processes that load a `Dataset`.
        progress: Show a progress bar.
        trainer: A Lightning `Trainer` of your own, in place of `epochs`, `patience`,
            `gradient_clip`, `checkpoint`, `precision`, `logger`, `callbacks` and `progress`;
            nothing settles then, and its own checkpoints hold weights that are not averaged.

    Returns:
        NLL and coverage of every epoch.

    Raises:
        ValueError: If the data do not fit the model, are not finite or empty.
        ImportError: If Lightning is not installed.
    """
    if not isinstance(model, PosteriorModel):
        hint = "PosteriorModel(None, head)" if isinstance(model, PosteriorHead) else "fp.Posterior"
        raise ValueError(
            f"Expected a PosteriorModel; got {type(model).__name__}. Wrap it: {hint}"
            + ("." if isinstance(model, PosteriorHead) else "Model(encoder, head).")
        )
    require("lightning.pytorch", "train")
    check_positive_int(epochs, "epochs")
    if trainer is not None and checkpoint is not None:
        raise ValueError(
            "Expected checkpoint without a Trainer of your own; got both. Give the Trainer a "
            "ModelCheckpoint."
        )
    wanted = _snapshots(snapshots, epochs if trainer is None else None)
    check_events(model, train)
    check_positive_int(batch_size, "batch_size")
    train, val = split(train, val, seed)
    batches = loader(train, batch_size, seed, shuffle=True, workers=workers)
    held = loader(fixed(val), max(batch_size, 1024), seed, shuffle=False, workers=workers)
    module = module_class()(model, lr, weight_decay, _schedule(schedule), seed, signed_weights)
    course = module.course
    module.wanted, module.followers = wanted, followers(batches)
    module.start_epoch(0)
    home = next(model.parameters()).device
    with forked(), quiet():
        own_trainer = trainer is None
        settle = epochs // _SETTLE_SHARE if own_trainer else 0
        settle = min(settle, _SETTLE)
        common = {"gradient_clip": gradient_clip, "precision": precision, "progress": progress}
        if trainer is None:
            trainer = trainer_of(
                epochs - settle,
                **common,
                patience=patience,
                checkpoint=checkpoint,
                logger=logger,
                callbacks=callbacks,
            )
        torch.manual_seed(seed)
        _fit_scales(model, train, batches)
        module.options = {
            "epochs": epochs,
            "batch_size": batch_size,
            "lr": lr,
            "seed": seed,
            "weight_decay": weight_decay,
            "schedule": schedule if schedule is None or isinstance(schedule, str) else "function",
            "events": getattr(batches.dataset, "__len__", lambda: -1)(),
            "model": {k: list(v.shape) for k, v in model.state_dict().items()},
            "head": {**model.head.config(), "referenced": model.head.referenced.tolist()},
        }
        kept, start = resumed(checkpoint, "flowpost.fit", module.options)
        if kept:
            _start_epoch(batches, len(kept["rows"]))
            module.start_epoch(len(kept["rows"]))
        module._seed(len(kept["rows"]) if kept else 0)
        heads = [m for m in model.modules() if isinstance(m, PosteriorHead)]
        before = [(head.flow.dropout, head.flow.wait) for head in heads]
        for head in heads:
            head.flow.dropout = _dropout(head)
            if own_trainer:
                head.flow.wait = _wait(head, epochs, batches)
        try:
            _train_mode(model)
            if kept and kept["stopped"]:
                module.on_load_checkpoint({"flowpost.fit": kept})
                stopped = True
            else:
                trainer.fit(module, batches, held, **start)
                stopped = trainer.should_stop and not module.diverged
            if settle and course.best_state and not (module.diverged or trainer.interrupted):
                module.settle()
                trainer_of(settle, **common).fit(module, batches, held)
        finally:
            for head, own in zip(heads, before, strict=True):
                head.flow.dropout, head.flow.wait = own
            module.restore_best()
            model.to(home).eval()
    if module.diverged:
        warnings.warn(
            f"The training diverged in epoch {len(course.rows)}; the model has the weights of "
            f"epoch {course.best_epoch}. A lower lr helps.",
            stacklevel=2,
        )
    if course.rows and course.best_state is None:
        raise ValueError(
            "Expected a finite validation NLL in some epoch; got none. Lower lr, and look for "
            "extreme inputs."
        )
    if not course.rows:
        raise ValueError(
            "Expected at least one epoch with a validation; got none. Look at the Trainer's limits."
        )
    rows = tuple(Epoch(**row) for row in course.rows)
    best = next(r for r in reversed(rows) if r.epoch == course.best_epoch)
    settled = settle if module.settling else 0
    return History(rows, best, stopped, settled=settled, snapshots=module.snapshots)


def _wait(head: PosteriorHead, epochs: int, batches: DataLoader) -> int:
    """Steps for which splines wait: a tenth of the training, in which the rate has risen."""
    if head.config()["wait"] is not None or isinstance(batches.dataset, IterableDataset):
        return head.flow.wait
    return max(1, epochs * len(batches) // 10)


def _dropout(head: PosteriorHead) -> float:
    chosen = head.config()["dropout"]
    return _DROPOUT if chosen is None else chosen


def _start_epoch(batches: Any, done: int) -> None:
    """Begin a resumed run with the order of its epoch; Lightning takes the first batch earlier."""
    for order in (batches.sampler, batches.batch_sampler):
        if isinstance(order, EpochBatches):
            order.set_epoch(done)


def _snapshots(epochs: Any, last: int | None) -> frozenset[int]:
    try:
        wanted = frozenset(int(e) for e in epochs)
    except TypeError as error:
        raise ValueError(
            f"Expected snapshots as epochs, such as (1, 10); got {epochs!r}."
        ) from error
    if any(e < 1 or (last is not None and e > last) for e in wanted):
        raise ValueError(f"Expected snapshots between 1 and {last}; got {sorted(wanted)}.")
    return wanted


def _train_mode(model: PosteriorModel) -> None:
    """Training mode, but for modules whose parameters are all frozen: they stay as they are."""
    frozen = [
        m
        for m in model.modules()
        if not m.training
        and any(True for _ in m.parameters())
        and not any(p.requires_grad for p in m.parameters())
    ]
    model.train()
    for m in frozen:
        m.eval()


def _schedule(schedule: str | Schedule | None) -> Schedule | None:
    if schedule is None or callable(schedule):
        return schedule
    if schedule == "one-cycle":
        return partial(one_cycle, warm_up=_WARM_UP)
    raise ValueError(
        f"Expected schedule as 'one-cycle', None or a function of (optimizer, steps); got "
        f"{schedule!r}."
    )


def _fit_scales(model: PosteriorModel, train: Any, batches: Any) -> None:
    encoder = model.encoder
    wanted = callable(getattr(encoder, "fit_scale", None)) and not getattr(encoder, "fitted", False)
    more = model.unscaled
    if bool(model.head.fitted) and not wanted and not more:
        return
    batch: Batch = sample_of(train, batches)
    if more:
        model.fit_scale(batch.x, batch.z)
    if not bool(model.head.fitted):
        z, weight, reference = batch.z, batch.weight, batch.reference
        if batch.mask is not None:
            # whiten a column by the events that have it
            known = read_mask(model.head.space, batch.mask, model.head._columns(z)).all(-1)
            if not bool(known.any()):
                raise ValueError(
                    "Expected at least one event with all labels; every one is masked."
                )
            z, weight = z[known], None if weight is None else weight[known]
            reference = chosen(reference, known)
        model.head.fit_scale(z, weight, reference)
    if wanted:
        called(encoder.fit_scale, batch.x)  # type: ignore[union-attr, arg-type]
