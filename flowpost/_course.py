r"""What a training goes by: its epochs, the running average of its weights, and their best state.

After step :math:`t` the weights :math:`\theta` enter their average by

.. math:: \bar\theta \leftarrow k\, \bar\theta + (1 - k)\, \theta ,\qquad
          k = \min\big(k_{\max}, (1 + t) / (10 + t)\big) ;

held-out events are looked at with the average in the place of the weights, and the state of the
network in the best epoch is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Course", "share_kept"]

# the largest share of the average that a step leaves: some 500 steps are averaged
_SHARE = 0.998


def share_kept(step: int, most: float = _SHARE) -> float:
    """Share k of the running average that stays in a step, small while there were few."""
    return min(most, (1 + step) / (10 + step))


class Course:
    """The epochs of a training, the running average of a network's weights, and its best state.

    Arguments:
        network: The network that learns.
        learned: Its parameters that are averaged; by default all of them, frozen ones too, for they
            may thaw.

    Attributes:
        rows: Numbers of each epoch.
        best: The lowest validation loss.
        best_epoch: Its epoch, from 1; 0 before there is one.
        best_state: State of the network in that epoch.
    """

    def __init__(self, network: nn.Module, learned: Iterable[nn.Parameter] | None = None) -> None:
        self.network = network
        self._learned = None if learned is None else list(learned)
        self.rows: list[dict[str, Any]] = []
        self.best, self.best_epoch = math.inf, 0
        self.best_state: dict[str, Tensor] | None = None
        self._average: list[Tensor] | None = None
        self._before, self._start = 0.0, time.monotonic()

    def _weights(self) -> list[Tensor]:
        some = self.network.parameters() if self._learned is None else self._learned
        return [p.data for p in some]

    @property
    def next_epoch(self) -> int:
        """The epoch that has no row yet, from 1."""
        return len(self.rows) + 1

    @property
    def seconds(self) -> float:
        """Wall-clock time since the start, resumed parts included."""
        return self._before + time.monotonic() - self._start

    def begin(self) -> None:
        """Begin the average with the weights as they stand."""
        self._average = [p.clone() for p in self._weights()]

    def follow(self, keep: float) -> None:
        """Take the weights after a step into their average, of which a share is kept."""
        if self._average is None:
            self.begin()
        else:
            torch._foreach_lerp_(self._average, self._weights(), 1 - keep)

    def to(self, device: torch.device) -> None:
        """Bring the average to the weights; a checkpoint is read before they are at their place."""
        if self._average is not None:
            self._average = [t.to(device) for t in self._average]

    def swap(self) -> None:
        """Exchange the weights and their average."""
        if self._average is not None:
            for own, mean in zip(self._weights(), self._average, strict=True):
                kept = own.clone()
                own.copy_(mean)
                mean.copy_(kept)

    def now(self) -> dict[str, Tensor]:
        """A copy of the network's state as it stands."""
        return {k: v.detach().clone() for k, v in self.network.state_dict().items()}

    def keep(self, value: float, epoch: int, allowance: float = 0.0) -> None:
        """Keep the state as it stands if its loss is lower than the best and an allowance."""
        if math.isfinite(value) and value < self.best + allowance:
            self.best, self.best_epoch = min(value, self.best), epoch
            self.best_state = self.now()

    def validated(self, score: Callable[[], float]) -> float:
        """Loss of the average by a score of the network as it stands, kept if it is the best."""
        self.swap()
        self.network.eval()
        try:
            value = score()
            self.keep(value, self.next_epoch)
        finally:
            self.swap()
            self.network.train()
        return value

    def restore(self) -> None:
        """Put the best state into the network."""
        if self.best_state is not None:
            self.network.load_state_dict(self.best_state)

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of it."""
        return {
            "rows": self.rows,
            "best": self.best,
            "best_epoch": self.best_epoch,
            "best_state": self.best_state,
            "average": self._average,
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self.rows = list(state["rows"])
        self.best, self.best_epoch = state["best"], state["best_epoch"]
        self.best_state, self._average = state["best_state"], state["average"]
        self._before = self.rows[-1]["seconds"] if self.rows else 0.0
