"""What a training did, epoch by epoch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

__all__ = ["Epoch", "History"]

# nats gained in the last tenth of the epochs, and the p-value, from which there is advice
_STILL_IMPROVING = 0.02
_ALARM = 0.01


@dataclass(frozen=True)
class Epoch:
    """Numbers of one epoch.

    Attributes:
        epoch: Count from 1.
        train_nll: Mean loss over the training batches as they were seen, in nats: −ln q, and for
            an `ExtendedModel` the parts of the loss whose parameters learn.
        val_nll: Mean loss of the validation events, in nats.
        coverage50: Share of the validation events that have all labels within the base-ordered
            50 % region; NaN where none has, or a weight is negative.
        coverage68: Within the 68.27 % region.
        coverage90: Within the 90 % region.
        ks_pvalue: Kolmogorov–Smirnov p-value of the base χ² of the validation events.
        lr: Learning rate at the end of the epoch, in the sense of `fit(lr=…)`.
        seconds: Wall-clock time since the start, resumed parts included.
        val_posterior: The part −ln q(z|x) of `val_nll` for an `ExtendedModel`; None where it is not
            in the loss, and for other models, whose loss it is.
        val_data: The part of `val_nll` of the data given the labels, for an `ExtendedModel`.
    """

    epoch: int
    train_nll: float
    val_nll: float
    coverage50: float
    coverage68: float
    coverage90: float
    ks_pvalue: float
    lr: float
    seconds: float
    val_posterior: float | None = None
    val_data: float | None = None


@dataclass(frozen=True)
class History:
    """The epochs of a training and which one's weights were kept.

    Attributes:
        epochs: Numbers of each epoch.
        best: The epoch whose weights the model has.
        stopped_early: Whether the validation loss had stopped improving.
        settled: How many of the last epochs settled the weights of the best one before.
        snapshots: Weights of the epochs that `fit(snapshots=…)` named, for
            `model.load_state_dict`.
    """

    epochs: tuple[Epoch, ...]
    best: Epoch
    stopped_early: bool
    settled: int = 0
    snapshots: Mapping[int, dict[str, Tensor]] = field(default_factory=dict, repr=False)

    def __getitem__(self, name: str) -> list[float]:
        """One number of all epochs, by the name of its field; NaN where an epoch has none.

        Raises:
            ValueError: If there is no such number.
        """
        known = [f.name for f in fields(Epoch)]
        if name not in known:
            raise ValueError(f"Expected one of {', '.join(known)}; got {name!r}.")
        values = (getattr(e, name) for e in self.epochs)
        return [math.nan if v is None else v for v in values]

    @property
    def loss_name(self) -> str:
        """What was minimised: the NLL of the posterior, that of the data, or the sum of both."""
        if self.best.val_data is None:
            return "NLL"
        if self.best.val_posterior is None:
            return "NLL of the data"
        return "loss (posterior + data)"

    def __str__(self) -> str:
        b = self.best
        advice = self._advice()
        end = "stopped early" if self.stopped_early else "complete"
        return (
            f"{len(self.epochs)} epochs in {self.epochs[-1].seconds:.1f} s, {end}; kept epoch "
            f"{b.epoch}: validation {self.loss_name} {self._value()} nats, {_covered(b)}"
            + (f"\n{advice}" if advice else "")
        )

    def _value(self) -> str:
        b = self.best
        if b.val_posterior is None or b.val_data is None:
            return f"{b.val_nll:.4f}"
        return f"{b.val_nll:.4f} = {b.val_posterior:.4f} + {b.val_data:.4f}"

    def _advice(self) -> str:
        main = self.epochs[: len(self.epochs) - self.settled]
        before = [e.val_nll for e in main[: max(1, len(main) * 9 // 10)]]
        if len(main) > 1 and min(before) - main[-1].val_nll > _STILL_IMPROVING:
            return f"The validation {self.loss_name} was still falling: more epochs may help."
        if self.best.ks_pvalue < _ALARM:
            low = self.best.coverage68 < 0.682689
            cure = (
                "more events, more dropout or a lower rung of the flow"
                if low
                else "more epochs, or a higher rung of the flow"
            )
            return f"The validation events are {'under' if low else 'over'}-covered: try {cure}."
        return ""

    def plot(self, ax: Any = None) -> Any:
        """Loss and coverage against epoch; see `flowpost.plots.plot_history`."""
        from ..plots import plot_history

        return plot_history(self, ax)


def _covered(epoch: Epoch) -> str:
    if math.isnan(epoch.coverage68):
        return "coverage not known: no validation event has all labels, or a weight is negative"
    return (
        f"coverage {100 * epoch.coverage68:.1f} % of 68.3 %, {100 * epoch.coverage90:.1f} % of "
        f"90 %, KS p = {epoch.ks_pvalue:.3g}"
    )
