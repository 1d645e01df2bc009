"""The choice between a generator and a seed, the same in every simulator."""

from __future__ import annotations

import torch

__all__ = ["resolve_generator"]


def resolve_generator(
    generator: torch.Generator | None, seed: int | None
) -> torch.Generator | None:
    """Return the generator to draw from; None stands for torch's global one.

    Raises:
        ValueError: If both are given.
    """
    if seed is None:
        return generator
    if generator is not None:
        raise ValueError(
            f"Expected a generator or a seed; got both (seed={seed}). Give one of the two."
        )
    return torch.Generator().manual_seed(seed)
