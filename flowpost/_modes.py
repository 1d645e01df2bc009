"""Modules in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

__all__ = ["evaluated"]


@contextmanager
def evaluated(module: nn.Module) -> Iterator[None]:
    """Evaluation mode within, and behind it for every part the mode that it had."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training
