"""What the training of a summary did, epoch by epoch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SummaryEpoch", "SummaryHistory"]


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
