"""Training of sampling-only networks on Lightning, with the weights of the best validation."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._checks import check_positive_int, require
from .._lightning import forked, quiet, trainer_of
from .base import NoiseNetwork

__all__ = ["Learner", "Objective", "SamplingEpoch", "SamplingHistory", "divided", "train"]

# of each step's running average of the weights
_AVERAGE = 0.998
_WARM_UP = 0.05


@dataclass(frozen=True)
class SamplingEpoch:
    """Numbers of one epoch.

    Attributes:
        epoch: Count from 1.
        train: Mean loss of the generator.
        critic: Mean loss of its critic; NaN without one.
        val: Energy score of the held-out events by the averaged weights.
        lr: Learning rate of the generator at the end of the epoch.
        seconds: Wall-clock time since the start.
    """

    epoch: int
    train: float
    critic: float
    val: float
    lr: float
    seconds: float


@dataclass(frozen=True)
class SamplingHistory:
    """The epochs of a training and which one's weights were kept.

    Attributes:
        epochs: Numbers of each epoch.
        best: The epoch whose weights the network has.
    """

    epochs: tuple[SamplingEpoch, ...]
    best: SamplingEpoch

    def __str__(self) -> str:
        last = self.epochs[-1]
        return (
            f"{len(self.epochs)} epochs in {last.seconds:.0f} s; energy score of held-out events "
            f"{self.best.val:.4f} in epoch {self.best.epoch}"
        )


@dataclass(frozen=True)
class Learner:
    """A network that learns, and how."""

    network: nn.Module
    lr: float
    betas: tuple[float, float]
    decay: float = 0.0


class Objective(Protocol):
    """What a generator is trained by."""

    @property
    def learners(self) -> tuple[Learner, ...]:
        """Networks that learn, the generator first."""

    def steps(self, x: Tensor, z: Tensor, index: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Which learner steps next, and its loss, on a batch of data (N, F) and labels (N, D)."""


class _Batches:
    """Events in another order in every epoch; an incomplete batch is left out."""

    def __init__(self, x: Tensor, z: Tensor, size: int, seed: int) -> None:
        self.x, self.z, self.size, self.seed, self.epoch = x, z, min(size, len(x)), seed, 0

    def __len__(self) -> int:
        return len(self.x) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        self.epoch += 1
        order = torch.randperm(len(self.x), generator=generator)
        for rows in order[: len(self) * self.size].split(self.size):
            yield self.x[rows], self.z[rows]


def divided(x: Tensor, z: Tensor, val: Any, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training data and labels, and held-out ones: a fraction, or events of their own.

    Raises:
        ValueError: If the fraction leaves fewer than two events in a part.
    """
    if not isinstance(val, (int, float)):
        if not isinstance(val, (tuple, list)) or len(val) != 2:
            raise ValueError("Expected val as a fraction or as (x, z); got neither.")
        return x, z, val[0], val[1]
    held = round(len(x) * val) if 0 < val < 1 else 0
    if held < 2 or len(x) - held < 2:
        raise ValueError(
            f"Expected val as a fraction that leaves at least two events in either part; got "
            f"{val!r} of {len(x)} events."
        )
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    order = order.to(x.device)
    return x[order[held:]], z[order[held:]], x[order[:held]], z[order[:held]]


def train(
    network: NoiseNetwork,
    objective: Objective,
    events: tuple[Tensor, Tensor],
    validate: Callable[[], float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    gradient_clip: float | None,
    progress: bool,
) -> SamplingHistory:
    """Train by an objective, and leave the network with the weights of the best validation.

    Arguments:
        network: The generator.
        objective: Losses of generator and critic.
        events: Training data and labels.
        validate: Score of held-out events by the network as it stands.
        epochs: Passes over the events.
        batch_size: Events of a step.
        seed: Of the order of events and all random numbers.
        gradient_clip: Largest norm of a step's gradient, or None.
        progress: Show a progress bar.

    Raises:
        ValueError: If the training diverged before its first validation.
        ImportError: If Lightning is not installed.
    """
    epochs = check_positive_int(epochs, "epochs")
    like = network.net.skip.weight
    x, z = (t.detach().to("cpu", like.dtype) for t in events)
    batches = _Batches(x, z, check_positive_int(batch_size, "batch_size", minimum=2), seed)
    module = _module_class()(objective, validate, seed, epochs * len(batches), gradient_clip)
    home = like.device
    with forked(), quiet():
        trainer = trainer_of(epochs, gradient_clip=None, precision="32-true", progress=progress)
        torch.manual_seed(seed)
        network.train()
        try:
            trainer.fit(module, batches)
        finally:
            module.restore_best()
            for learner in objective.learners:
                learner.network.to(home).eval()
    if module.failure is not None:
        if module.best_state is None:
            raise ValueError(module.failure)
        warnings.warn(
            f"The training stopped in epoch {len(module.rows) + 1} ({module.failure}); the network "
            f"has the weights of epoch {module.best_epoch}.",
            stacklevel=3,
        )
    rows = tuple(SamplingEpoch(**row) for row in module.rows)
    return SamplingHistory(rows, rows[module.best_epoch - 1])


def _module_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    lightning: Any = require("lightning.pytorch", "train")

    class Training(lightning.LightningModule):
        """Steps of the generator and of its critic in turn, each with its own optimizer."""

        def __init__(
            self,
            objective: Objective,
            validate: Callable[[], float],
            seed: int,
            steps: int,
            clip: float | None,
        ) -> None:
            super().__init__()
            self.automatic_optimization = False
            self.learning = nn.ModuleList(one.network for one in objective.learners)
            self.objective, self.score = objective, validate
            self.seed, self.steps, self.clip = seed, max(1, steps), clip
            self.count = 0
            self.rows: list[dict[str, float]] = []
            self.best, self.best_epoch = math.inf, 0
            self.best_state: dict[str, Tensor] | None = None
            self.average: list[Tensor] | None = None
            self.failure: str | None = None
            self._seen: list[list[float]] = []
            self._start = time.monotonic()

        def configure_optimizers(self) -> Any:
            """Adam for each; the rates warm up, then fall along a cosine."""
            return [
                torch.optim.AdamW(
                    one.network.parameters(), lr=one.lr, betas=one.betas, weight_decay=one.decay
                )
                for one in self.objective.learners
            ]

        def _rate(self) -> float:
            share = self.count / self.steps
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
            return min(1.0, (share + 1 / self.steps) / _WARM_UP) * cosine

        def on_train_epoch_start(self) -> None:
            """Forget the losses of the last epoch."""
            self._seen = [[] for _ in self.learning]

        def training_step(self, batch: Any, index: int) -> None:
            """Steps of a batch; the end of the training where a loss is not finite."""
            torch.manual_seed(self.seed * 1_000_003 + self.count)
            x, z = batch
            optimizers = self.optimizers(use_pl_optimizer=False)
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            for one, optimizer in zip(self.objective.learners, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = one.lr * self._rate()
            for which, loss in self.objective.steps(x, z, self.count):
                optimizer = optimizers[which]
                self.toggle_optimizer(optimizer)
                value = loss()
                if not bool(torch.isfinite(value)):
                    self.failure = (
                        f"Expected a finite loss; got {float(value.detach())}. Lower lr, and look "
                        "for extreme data."
                    )
                    self.trainer.should_stop = True
                    self.untoggle_optimizer(optimizer)
                    return
                optimizer.zero_grad()
                self.manual_backward(value)
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(self.learning[which].parameters(), self.clip)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
                self._seen[which].append(float(value.detach()))
            self.count += 1
            self._follow()

        def _follow(self) -> None:
            """Follow the generator's weights by their running average."""
            learned = [p.data for p in self.learning[0].parameters()]
            if self.average is None:
                self.average = [p.clone() for p in learned]
                return
            keep = min(_AVERAGE, (1 + self.count) / (10 + self.count))
            torch._foreach_lerp_(self.average, learned, 1 - keep)

        def _swap(self) -> None:
            for own, mean in zip(self.learning[0].parameters(), self.average or [], strict=False):
                kept = own.data.clone()
                own.data.copy_(mean)
                mean.copy_(kept)

        def on_train_epoch_end(self) -> None:
            """Score of the averaged weights, and the best of them."""
            if self.failure is not None:
                return
            self._swap()
            value = self.score()
            if math.isfinite(value) and value < self.best:
                self.best, self.best_epoch = value, len(self.rows) + 1
                state = self.learning[0].state_dict()
                self.best_state = {k: v.detach().clone() for k, v in state.items()}
            self._swap()
            if self.best_state is None:
                self.failure = f"Expected a finite energy score; got {value}. Lower lr."
                self.trainer.should_stop = True
                return
            means = [sum(s) / len(s) if s else math.nan for s in self._seen]
            row = SamplingEpoch(
                epoch=len(self.rows) + 1,
                train=means[0],
                critic=means[1] if len(means) > 1 else math.nan,
                val=value,
                lr=self.objective.learners[0].lr * self._rate(),
                seconds=time.monotonic() - self._start,
            )
            self.rows.append(asdict(row))
            self.log("val_score", value, prog_bar=True, batch_size=1)

        def restore_best(self) -> None:
            """Put the best weights into the generator."""
            if self.best_state is not None:
                self.learning[0].load_state_dict(self.best_state)

    return Training
