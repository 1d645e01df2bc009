"""fit: training of a summary on Lightning, with the weights of its best validation."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_finite, check_positive_int, require
from .._course import Course
from .._events import called, joined, leaves
from .._lightning import forked, quiet, resumed, trainer_of, validation
from ..encoders import Encoder
from .history import SummaryEpoch, SummaryHistory
from .model import CountingModel
from .module import Portions, module_class
from .samples import Batches, Sample, check_samples, split
from .summary import SummaryModel

__all__ = ["fit"]

# share of the events of a process below which a bin counts as dead
_DEAD = 1e-4
# events of a process by which dead bins and the scales of inputs are found
_LOOK = 100_000


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
    if isinstance(val, (int, float)):
        train, val = split(model, train, val, seed)
    train, val = check_samples(model, train), check_samples(model, val)
    batches = Batches(model, train, batch_size, seed)
    for samples in (train, val):
        _check_inputs(network, samples)
    _fit_scale(network, train)
    options = {
        "epochs": epochs,
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "gradient_clip": gradient_clip,
        "precision": str(precision),
        "loss": repr(loss),
        "events": {k: _mark(s) for k, s in train.items()},
        "network": {k: list(v.shape) for k, v in network.state_dict().items()},
    }
    module = module_class()(network, loss, val, batches, options)
    course, home = module.course, next(network.parameters()).device
    kept, start = resumed(checkpoint, "flowpost.inferno.fit", options)
    if kept is not None:
        course.load(kept)
    batches.set_epoch(len(course.rows))
    with forked(), quiet():
        trainer = trainer_of(
            epochs,
            gradient_clip=gradient_clip,
            precision=precision,
            progress=progress,
            checkpoint=checkpoint,
            logger=logger,
            callbacks=[validation(), *callbacks],
        )
        torch.manual_seed(seed)
        network.train()
        try:
            if len(course.rows) < epochs:
                trainer.fit(module, Portions(batches), **start)
        finally:
            course.restore()
            # a loop of one's own begins anew with it
            if callable(getattr(loss, "anneal", None)):
                loss.anneal(0.0)  # type: ignore[attr-defined]
            network.to(home).eval()
    if module.failure is not None:
        _failed(course, module.failure)
    _warn_dead(network, val)
    rows = tuple(SummaryEpoch(**row) for row in course.rows)
    return SummaryHistory(rows, rows[course.best_epoch - 1])


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


def _mark(sample: Sample) -> list[float]:
    """Numbers by which a sample is known again."""
    return [len(sample), *(float(t.double().sum()) for t in leaves(sample.x))]


def _first(network: nn.Module) -> nn.Module:
    """The module that takes the inputs."""
    if isinstance(network, SummaryModel) and network.encoder is not None:
        return _first(network.encoder)
    if isinstance(network, nn.Sequential) and len(network):
        return _first(network[0])
    return network


def _fit_scale(network: nn.Module, samples: dict[str, Sample]) -> None:
    first = _first(network)
    if isinstance(first, Encoder) and not first.fitted:
        parts = [s.at(torch.arange(min(len(s), _LOOK))) for s in samples.values()]
        x = joined([p.x for p in parts], [len(p) for p in parts])
        called(first.fit_scale, x)  # type: ignore[arg-type]
    for name, part in network.named_modules():
        if isinstance(part, Encoder) and not part.fitted:
            warnings.warn(
                f"The encoder {name!r} has no scales, and fit cannot tell what it is given. Call "
                "its fit_scale(x) before, or make it the first module.",
                stacklevel=4,
            )


def _failed(course: Course, failure: ValueError) -> None:
    if course.best_state is None:
        raise failure
    warnings.warn(
        f"The training stopped in epoch {course.next_epoch} ({failure}); the network has the "
        f"weights of epoch {course.best_epoch}.",
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
