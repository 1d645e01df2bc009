r"""fit and distill: training of a teacher by maximum likelihood, and of a student by its teacher.

.. math::

    L_{\mathrm{fit}} = -\frac{1}{\sum w} \sum_i w_i \ln p_T(x_i|z_i), \qquad
    L_{\mathrm{distill}} = \lambda_x L_x + \lambda_u L_u + \lambda_\theta L_\theta
    + \lambda_{\mathrm{KL}}\, \mathrm{KL}(q_S \| p_T) / F ,

with the terms of `flowpost.generators.student`. Neither takes a slow inverse.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_positive_int
from .._lightning import resumed
from .._weights import check_weights, weighted_mean
from ..likelihood import Likelihood
from .module import Objective, module_class
from .student import Student
from .training import Batches, GeneratorHistory, Rows, divided, run
from .two_step import TwoStep

__all__ = ["distill", "fit"]

_TERMS = {"data": 1.0, "noise": 1.0, "parameters": 0.0, "kl": 1.0}


def fit(
    model: Likelihood,
    x: Any,
    z: Any,
    weight: Any = None,
    *,
    val: Any = 0.1,
    epochs: int = 20,
    batch_size: int = 512,
    lr: float = 2e-3,
    weight_decay: float = 1e-4,
    seed: int = 0,
    gradient_clip: float | None = 10.0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GeneratorHistory:
    """Train a likelihood of vectors, such as a `Teacher`, by maximum likelihood.

    The learning rate goes through one cycle; the weights are averaged over some 500 steps, and
    those of the best validation epoch are kept. The scales are set from the training part unless
    they were before. The model is left in evaluation mode. The same seed gives the same weights
    twice on the same machine, also where a run was stopped and resumed.

    Arguments:
        model: `Teacher`, `TwoStep`, or another likelihood whose data are a tensor.
        x: Data (N, F).
        z: Labels (N, D).
        weight: Weights of events (N,).
        val: Share of the events that is held out, or held-out events (x, z) of their own, all of
            weight one.
        epochs: Passes over the events.
        batch_size: Events of a step.
        lr: Peak learning rate.
        weight_decay: Decay of weight matrices (AdamW).
        seed: Of the division, the order of events and all noise.
        gradient_clip: Largest norm of a step's gradient, or None.
        checkpoint: A file that holds the state after each epoch; if it exists the run goes on from
            there, with the same options and data.
        progress: Show a progress bar.

    Returns:
        Losses of every epoch, in nats per event.

    Raises:
        ValueError: If data or labels do not fit the model, no held-out event has any weight, or the
            training collapsed before its first validation.
        ImportError: If Lightning is not installed.
    """
    if not isinstance(model, Likelihood) or isinstance(model, Student):
        raise ValueError(
            f"Expected a likelihood, such as a Teacher; got {type(model).__name__}. A student is "
            "trained by distill."
        )
    rows = _rows(model, x, z, weight)
    train, held = _batches(model, rows, val, batch_size, seed)
    if not bool(model.fitted):
        model.fit_scale(train.rows[0], train.rows[1])

    def objective(batch: Rows, generator: torch.Generator | None) -> Tensor:
        data, labels, share = batch
        return weighted_mean(-model(labels).log_prob(data, generator), share)

    options = _options("fit", (train, held), model, epochs, batch_size, lr, weight_decay, seed)
    learned = [p for p in model.parameters() if p.requires_grad]
    return _run(
        model, learned, objective, train, held, options, gradient_clip, checkpoint, progress
    )


def distill(
    student: Student | TwoStep,
    x: Any,
    z: Any,
    weight: Any = None,
    *,
    terms: Mapping[str, float] | None = None,
    val: Any = 0.1,
    epochs: int = 20,
    batch_size: int = 512,
    lr: float = 2e-3,
    weight_decay: float = 0.0,
    seed: int = 0,
    gradient_clip: float | None = 10.0,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> GeneratorHistory:
    """Train a student by its teacher, which stays as it is.

    Arguments:
        student: A `Student`, or `TwoStep.student()` of a trained one.
        x: Data (N, F): those of the teacher's training, or draws of the teacher.
        z: Labels (N, D).
        weight: Weights of events (N,), for the share of each batch in the validation.
        terms: Weights of the losses "data", "noise", "parameters" and "kl" (per column); those left
            out have 1, 1, 0 and 1.
        val: Share of the events that is held out, or held-out events (x, z) of their own, all of
            weight one.
        epochs: Passes over the events.
        batch_size: Events of a step.
        lr: Peak learning rate.
        weight_decay: Decay of weight matrices (AdamW).
        seed: Of the division, the order of events and all noise.
        gradient_clip: Largest norm of a step's gradient, or None.
        checkpoint: A file that holds the state after each epoch, as of `fit`.
        progress: Show a progress bar.

    Returns:
        Losses of every epoch.

    Raises:
        ValueError: If the student is none or its teacher not trained, a term is unknown or
            negative, data do not fit, or no held-out event has any weight.
        ImportError: If Lightning is not installed.
    """
    own = _students(student)
    columns = sum(one.flow.columns for one in own)
    chosen = _chosen(terms)
    rows = _rows(student, x, z, weight)
    train, held = _batches(student, rows, val, batch_size, seed)

    def objective(batch: Rows, generator: torch.Generator | None) -> Tensor:
        found = student.distillation(batch[0], batch[1], generator)
        found["kl"] = found["kl"] / columns
        return torch.stack([s * found[name] for name, s in chosen.items() if s]).sum()

    options = _options(
        "distill", (train, held), student, epochs, batch_size, lr, weight_decay, seed
    )
    options["terms"] = chosen
    learned = [p for one in own for p in one.learned()]
    kept = {id(p) for p in learned}
    others = [p for p in student.parameters() if id(p) not in kept and p.requires_grad]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        return _run(
            student, learned, objective, train, held, options, gradient_clip, checkpoint, progress
        )
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _students(model: Any) -> list[Student]:
    steps = (model.first, model.second) if isinstance(model, TwoStep) else (model,)
    if not isinstance(steps[-1], Student):
        raise ValueError(
            f"Expected a Student, or a TwoStep with one; got {type(steps[-1]).__name__}. Try "
            "Student(teacher) or two_step.student()."
        )
    found = [one for one in steps if isinstance(one, Student)]
    if not all(bool(one.teacher.fitted) for one in found):
        raise ValueError("Expected a trained teacher; got one without scales. Fit it first.")
    return found


def _chosen(terms: Mapping[str, float] | None) -> dict[str, float]:
    chosen = {**_TERMS, **(terms or {})}
    unknown = set(chosen) - set(_TERMS)
    if unknown or not all(s >= 0 for s in chosen.values()) or not any(chosen.values()):
        raise ValueError(
            f"Expected weights of at least 0 of the terms {', '.join(_TERMS)}, not all of them 0; "
            f"got {dict(terms or {})}."
        )
    return chosen


def _rows(model: Likelihood, x: Any, z: Any, weight: Any, least: int = 4) -> Rows:
    like = model._like
    x = as_tensor(x, "x", like=like).to(like.dtype)
    x = x[:, None] if x.ndim == 1 else x
    z = model._labels(as_tensor(z, "labels", like=like)).to(like.dtype)
    if len(x) != len(z) or len(x) < least:
        raise ValueError(
            f"Expected data and labels of the same events, at least {least}; got {len(x)} and "
            f"{len(z)}."
        )
    if isinstance(model, TwoStep):
        model.groups.check(x)
    shares = torch.ones_like(x[:, 0])
    return x, z, shares if weight is None else check_weights(weight, shares)


def _batches(
    model: Likelihood, rows: Rows, val: Any, size: int, seed: int
) -> tuple[Batches, Batches]:
    size = check_positive_int(size, "batch_size", minimum=2)
    train, held = divided(rows, val, seed, lambda x, z: _rows(model, x, z, None, least=1))
    if not bool(held[-1].sum() > 0):
        raise ValueError(
            f"Expected held-out events of some weight; got 0 in all {len(held[-1])}. Hold out a "
            "larger share, or events of their own."
        )
    return Batches(train, size, seed), Batches(held, 4 * size, seed, whole=True)


def _options(
    name: str,
    parts: tuple[Batches, Batches],
    model: nn.Module,
    epochs: int,
    batch_size: int,
    lr: float,
    weight_decay: float,
    seed: int,
) -> dict[str, Any]:
    return {
        "training": name,
        "epochs": check_positive_int(epochs, "epochs"),
        "batch_size": batch_size,
        "lr": lr,
        "weight_decay": weight_decay,
        "seed": seed,
        "events": [float(t.double().sum()) for part in parts for t in part.rows],
        "network": {k: list(v.shape) for k, v in model.state_dict().items()},
    }


def _run(
    network: nn.Module,
    learned: list[Any],
    objective: Objective,
    train: Batches,
    held: Batches,
    options: dict[str, Any],
    gradient_clip: float | None,
    checkpoint: str | os.PathLike[str] | None,
    progress: bool,
) -> GeneratorHistory:
    module = module_class()(network, learned, objective, train, held, options)
    kept, start = resumed(checkpoint, "flowpost.generators", options)
    if kept is not None:
        module.course.load(kept)
    return run(
        module,
        options["epochs"],
        score="validation loss",
        start=start,
        gradient_clip=gradient_clip,
        checkpoint=checkpoint,
        progress=progress,
    )
