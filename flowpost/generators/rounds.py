"""Training of sampling-only networks on Lightning: steps of a generator and its critic in turn."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .training import Batches, GeneratorHistory, averaged_class, run

__all__ = ["Learner", "Losses", "train"]

_WARM_UP = 0.05


@dataclass(frozen=True)
class Learner:
    """A network that learns, and how."""

    network: nn.Module
    lr: float
    betas: tuple[float, float]
    decay: float = 0.0


class Losses(Protocol):
    """What a generator, and its critic, are trained by."""

    @property
    def learners(self) -> tuple[Learner, ...]:
        """Networks that learn, the generator first."""

    def steps(self, x: Tensor, z: Tensor, index: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        """Which learner steps next, and its loss, on a batch of data (N, F) and labels (N, D)."""


def train(
    losses: Losses,
    events: tuple[Tensor, Tensor],
    validate: Callable[[], float],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    gradient_clip: float | None,
    progress: bool,
) -> GeneratorHistory:
    """Train by losses, and leave the generator with the weights of the best validation.

    Arguments:
        losses: Losses of generator and critic.
        events: Training data and labels.
        validate: Score of held-out events by the generator as it stands.
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
    batches = Batches(events, check_positive_int(batch_size, "batch_size", minimum=2), seed)
    module = _module_class()(losses, validate, batches, epochs * len(batches), gradient_clip)
    return run(
        module,
        epochs,
        score="energy score of held-out events",
        gradient_clip=None,
        progress=progress,
    )


def _module_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    averaged: Any = averaged_class()

    class Training(averaged):
        """Steps of the generator and of its critic in turn, each with its own optimizer."""

        def __init__(
            self,
            losses: Losses,
            validate: Callable[[], float],
            events: Batches,
            steps: int,
            clip: float | None,
        ) -> None:
            generator = losses.learners[0].network
            super().__init__(
                generator, list(generator.parameters()), events, losses=len(losses.learners)
            )
            self.automatic_optimization = False
            self.learning = nn.ModuleList(one.network for one in losses.learners)
            self.losses, self.score = losses, validate
            self.steps, self.clip, self.count = steps, clip, 0

        def configure_optimizers(self) -> Any:
            """Adam for each; the rates warm up, then fall along a cosine."""
            return [
                torch.optim.AdamW(
                    one.network.parameters(), lr=one.lr, betas=one.betas, weight_decay=one.decay
                )
                for one in self.losses.learners
            ]

        def _factor(self) -> float:
            share = self.count / self.steps
            cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, share)))
            return min(1.0, (share + 1 / self.steps) / _WARM_UP) * cosine

        def rate(self) -> float:
            """Learning rate of the generator's next step."""
            return self.losses.learners[0].lr * self._factor()

        def training_step(self, batch: Any, index: int) -> None:
            """Steps of a batch; the end of the training where a loss is not finite."""
            torch.manual_seed(self.events.seed * 1_000_003 + self.count)
            x, z = batch
            optimizers = self.optimizers(use_pl_optimizer=False)
            optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
            for one, optimizer in zip(self.losses.learners, optimizers, strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = one.lr * self._factor()
            for which, loss in self.losses.steps(x, z, self.count):
                optimizer = optimizers[which]
                self.toggle_optimizer(optimizer)
                value = loss()
                if not self.finite(value):
                    self.untoggle_optimizer(optimizer)
                    return
                optimizer.zero_grad()
                self.manual_backward(value)
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(self.learning[which].parameters(), self.clip)
                optimizer.step()
                self.untoggle_optimizer(optimizer)
                self.seen[which].append(float(value.detach()))
            self.count += 1
            self.follow(self.count)

    return Training
