"""A table of posteriors: what one reads off each event."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .base import Posterior

__all__ = ["Summary", "summarise"]

_LEVELS = (0.05, 0.158655, 0.5, 0.841345, 0.95)
_SHOWN = 6


@dataclass(frozen=True)
class Summary:
    """Numbers of each event and label column.

    Attributes:
        names: Names of the D columns.
        mean: Mean, of shape (*batch, D).
        stddev: Standard deviation, of shape (*batch, D).
        median: Median, of shape (*batch, D).
        interval68: Central 68.27 % interval, lower and upper end, each (*batch, D).
        interval90: Central 90 % interval, lower and upper end, each (*batch, D).
        entropy: Differential entropy in nats, of shape (*batch,).
    """

    names: tuple[str, ...]
    mean: Tensor
    stddev: Tensor
    median: Tensor
    interval68: tuple[Tensor, Tensor]
    interval90: tuple[Tensor, Tensor]
    entropy: Tensor

    def __str__(self) -> str:
        width = max(len(n) for n in (*self.names, "label")) + 1
        lines = [
            f"{'event':>6} {'label':<{width}}{'median':>11}{'mean':>11}{'stddev':>11}"
            "   68 % interval"
        ]
        flat = [
            t.reshape(-1, len(self.names)).tolist()
            for t in (self.median, self.mean, self.stddev, *self.interval68)
        ]
        events = len(flat[0])
        for i in range(min(events, _SHOWN)):
            for j, name in enumerate(self.names):
                median, mean, std, low, high = (column[i][j] for column in flat)
                lines.append(
                    f"{i:>6} {name:<{width}}{median:>11.4g}{mean:>11.4g}{std:>11.4g}"
                    f"   [{low:.4g}, {high:.4g}]"
                )
        if events > _SHOWN:
            lines.append(f"   … and {events - _SHOWN} more events")
        lines.append(f"mean entropy {float(self.entropy.mean()):.3f} nats")
        return "\n".join(lines)


def summarise(posterior: Posterior, draws: int, generator: torch.Generator | None) -> Summary:
    """Reduce the draws of a posterior to a `Summary` in one pass."""

    def reduce(z: Tensor, log_prob: Tensor) -> tuple[Tensor, ...]:
        space = posterior.space
        q = torch.quantile(space.unwrap(z), z.new_tensor(_LEVELS), dim=0)
        return space.mean(z), space.stddev(z), *q, -log_prob.mean(0)

    mean, std, q05, q16, q50, q84, q95, entropy = posterior._reduce(
        reduce, draws, generator, central=generator is None, density=True
    )
    return Summary(posterior.space.names, mean, std, q50, (q16, q84), (q05, q95), entropy)
