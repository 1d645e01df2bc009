"""Modules in evaluation mode for a while."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

__all__ = ["evaluated", "evaluating"]


@contextmanager
def evaluated(module: Any) -> Iterator[None]:
    """Evaluation mode within, and behind it for every part the mode that it had."""
    modes = {m: m.training for m in module.modules()} if isinstance(module, nn.Module) else {}
    for part in modes:
        part.training = False
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def evaluating(module: Any) -> Iterator[None]:
    """Evaluation mode without gradients."""
    with evaluated(module), torch.no_grad():
        yield
