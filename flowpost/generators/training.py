"""What trainings of generators share: events in batches, epochs and their history."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from .._checks import require
from .._course import Course, share_kept
from .._lightning import forked, quiet, trainer_of, validation

__all__ = [
    "Batches",
    "GeneratorEpoch",
    "GeneratorHistory",
    "Rows",
    "averaged_class",
    "divided",
    "run",
]

Rows: TypeAlias = tuple[Tensor, ...]


@dataclass(frozen=True)
class GeneratorEpoch:
    """Numbers of one epoch.

    Attributes:
        epoch: Count from 1.
        train: Mean loss of the batches; NaN where the generator made no step.
        val: Loss of the held-out events by the averaged weights, of `fit_energy` and `fit_critic`
            their energy score.
        lr: Learning rate of the generator at the end of the epoch.
        seconds: Wall-clock time since the start, resumed parts included.
        critic: Mean loss of the critic; NaN without one.
    """

    epoch: int
    train: float
    val: float
    lr: float
    seconds: float
    critic: float = math.nan


@dataclass(frozen=True)
class GeneratorHistory:
    """The epochs of a training and which one's weights were kept.

    Attributes:
        epochs: Numbers of each epoch.
        best: The epoch whose weights the generator has.
        score: What `val` is.
    """

    epochs: tuple[GeneratorEpoch, ...]
    best: GeneratorEpoch
    score: str = "validation loss"

    def __str__(self) -> str:
        last = self.epochs[-1]
        return (
            f"{len(self.epochs)} epochs in {last.seconds:.0f} s; {self.score} "
            f"{self.best.val:.4f} in epoch {self.best.epoch}"
        )


class Batches:
    """Rows of events in batches, in another order in every epoch.

    Arguments:
        rows: Data, labels and what else there is of each event.
        size: Events of a batch, at most.
        seed: Of the orders.
        whole: Have every event in every epoch, in batches whose sizes differ by one at most. Else
            all batches are of one size, and the events that are left come in the next epochs.
    """

    def __init__(self, rows: Rows, size: int, seed: int, whole: bool = False) -> None:
        self.rows, self.size = rows, min(size, len(rows[0]))
        self.seed, self.whole, self.epoch = seed, whole, 0

    def __len__(self) -> int:
        full, left = divmod(len(self.rows[0]), self.size)
        return full + (self.whole and left > 0)

    def __iter__(self) -> Iterator[Rows]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.rows[0]), generator=generator).to(self.rows[0].device)
        for chosen in order[: len(self) * self.size].tensor_split(len(self)):
            yield tuple(t[chosen] for t in self.rows)


def divided(
    rows: Rows, val: Any, seed: int, check: Callable[[Any, Any], Rows]
) -> tuple[Rows, Rows]:
    """Return training and held-out rows.

    Arguments:
        rows: Data, labels and what else there is of each event.
        val: Share of the events that is held out, or held-out events (x, z) of their own.
        seed: Of the division by a share.
        check: Gives the rows of a pair (x, z).

    Raises:
        ValueError: If `val` is neither, or the share leaves no event in the held-out part or fewer
            than two in the other.
    """
    if isinstance(val, (tuple, list)) and len(val) == 2:
        return rows, check(val[0], val[1])
    count = len(rows[0])
    share = isinstance(val, (int, float)) and 0 < val < 1
    held = round(count * val) if share else 0
    if held < 1 or count - held < 2:
        raise ValueError(
            "Expected val as a share that leaves events in either part, or as held-out events "
            f"(x, z); got {val if isinstance(val, (int, float)) else type(val).__name__} of "
            f"{count} events."
        )
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    order = order.to(rows[0].device)
    return tuple(t[order[held:]] for t in rows), tuple(t[order[:held]] for t in rows)


def averaged_class() -> type:
    """The LightningModule, defined on first use because Lightning is an extra."""
    lightning: Any = require("lightning.pytorch", "train")

    class Averaged(lightning.LightningModule):
        """Follows the weights by their average, and keeps it as it was in its best epoch.

        A training made of it has `score`, the loss of held-out events by the network as it stands,
        `rate`, the learning rate of the generator, and calls `follow` after each step.
        """

        def __init__(
            self, network: nn.Module, learned: Sequence[nn.Parameter], events: Batches, losses: int
        ) -> None:
            super().__init__()
            self.network, self.learned, self.events = network, list(learned), events
            self.course = Course(network, self.learned)
            self.failure: ValueError | None = None
            self.seen: list[list[float]] = [[] for _ in range(losses)]

        def on_train_epoch_start(self) -> None:
            """Forget the losses of the last epoch."""
            self.seen = [[] for _ in self.seen]
            self.course.to(self.device)

        def finite(self, value: Tensor) -> bool:
            """Whether there is a loss; the training ends where there is none."""
            if bool(torch.isfinite(value)):
                return True
            self.failure = ValueError(
                f"Expected a finite loss; got {float(value.detach())}. Lower lr, and look for "
                "extreme data and weights."
            )
            self.trainer.should_stop = True
            return False

        def follow(self, step: int) -> None:
            """Take the weights after a step into their running average."""
            self.course.follow(share_kept(step))

        def validate(self) -> None:
            """Loss of the averaged weights on the held-out events, and the best of them."""
            with torch.no_grad():
                value = self.course.validated(self.score)
            means = [sum(s) / len(s) if s else math.nan for s in self.seen]
            row = GeneratorEpoch(
                epoch=self.course.next_epoch,
                train=means[0],
                val=value,
                lr=self.rate(),
                seconds=self.course.seconds,
                critic=means[1] if len(means) > 1 else math.nan,
            )
            self.course.rows.append(asdict(row))
            self.log("val_loss", value, prog_bar=True, batch_size=1)
            self.events.epoch = len(self.course.rows)

    return Averaged


def run(
    module: Any, epochs: int, *, score: str, start: dict[str, Any] | None = None, **options: Any
) -> GeneratorHistory:
    """Train a module of `averaged_class`, and leave its network with the best weights.

    Arguments:
        module: The module, with its events.
        epochs: Passes over the events.
        score: What it validates by.
        start: Options of the trainer's `fit`, where the training goes on.
        options: Those of `trainer_of`.

    Raises:
        ValueError: If the training diverged before its first validation.
    """
    like, course = module.learned[0], module.course
    module.events.epoch = len(course.rows)
    home, double = like.device, like.dtype == torch.float64
    with forked(), quiet():
        precision = "64-true" if double else "32-true"
        trainer = trainer_of(epochs, precision=precision, callbacks=[validation()], **options)
        module.train()
        try:
            if len(course.rows) < epochs:
                trainer.fit(module, module.events, **(start or {}))
        finally:
            course.restore()
            module.to(home).eval()
    if course.best_state is None:
        raise module.failure or ValueError(
            f"Expected a finite {score}; got none in any epoch. Lower lr, and look for extreme "
            "data and weights."
        )
    if module.failure is not None:
        warnings.warn(
            f"The training stopped in epoch {course.next_epoch} ({module.failure}); the "
            f"generator has the weights of epoch {course.best_epoch}.",
            stacklevel=4,
        )
    rows = tuple(GeneratorEpoch(**row) for row in course.rows)
    return GeneratorHistory(rows, rows[course.best_epoch - 1], score)
