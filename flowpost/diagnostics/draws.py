"""What the sampled diagnostics ask of a posterior, and their draws in chunks of flat memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int

__all__ = ["SampledPosterior"]

_ELEMENTS = 1 << 22


class SampledPosterior(Protocol):
    """The part of `torch.distributions.Distribution` that is used: N events, labels of D columns.

    `sbc` and `tarp` need only `sample`.
    """

    @property
    def batch_shape(self) -> torch.Size:
        """(N,)."""

    @property
    def event_shape(self) -> torch.Size:
        """(D,)."""

    def log_prob(self, value: Tensor, /) -> Tensor:
        """Return log q (..., N) in nats of labels (..., N, D)."""

    def sample(self, sample_shape: Any, /, *, generator: torch.Generator | None) -> Tensor:
        """Return draws (S, N, D)."""

    def sample_and_log_prob(
        self, sample_shape: Any, /, *, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Return draws (S, N, D) and their log q (S, N)."""


def matched(posterior: Any, z: Any) -> tuple[Any, Tensor]:
    # A posterior of N events and true labels (N, D) that fit it; (N,) is D = 1. An unconditional
    # density is that of every event.
    z = as_tensor(z, "true labels z").detach()
    z = z.to(getattr(posterior, "device", z.device))
    rows = z.ndim == 2 or (z.ndim == 1 and posterior.event_shape == (1,))
    if not posterior.batch_shape and rows and hasattr(posterior, "expand"):
        posterior = posterior.expand((len(z),))
    shape = (*posterior.batch_shape, *posterior.event_shape)
    if len(shape) != 2:
        raise ValueError(
            f"Expected a posterior of batch shape (N,) and event shape (D,); got "
            f"{tuple(posterior.batch_shape)} and {tuple(posterior.event_shape)}. One that is the "
            "same for all events becomes that by q.expand((N,))."
        )
    if z.ndim == 1 and shape[1] == 1:
        z = z[:, None]
    if tuple(z.shape) != shape:
        raise ValueError(
            f"Expected true labels z of shape {shape}, one row per event of the posterior; got "
            f"{tuple(z.shape)}."
        )
    if not shape[0]:
        raise ValueError("Expected at least one event; got none.")
    check_finite(z, "true labels z")
    space = getattr(posterior, "space", None)
    return posterior, z if space is None else space.canonical(z)


def draw_chunks(posterior: Any, draws: int) -> Iterator[int]:
    # Numbers of draws that add up to `draws`, each of at most 4 million label values.
    check_positive_int(draws, "draws")
    values = max(int(posterior.batch_shape.numel() * posterior.event_shape.numel()), 1)
    size = max(_ELEMENTS // values, 1)
    for start in range(0, draws, size):
        yield min(size, draws - start)


def randomised(
    less: Tensor, ties: Tensor, draws: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    # Ranks in {0, …, S} with ties broken at random, and levels (rank + V)/(S + 1), V ~ U(0, 1):
    # exactly uniform where the truth is exchangeable with the draws, so KS applies as it stands.
    device = less.device if generator is None else generator.device
    noise = torch.rand(2, *less.shape, dtype=torch.float64, device=device, generator=generator)
    noise = noise.to(less.device)
    rank = less + torch.minimum((noise[0] * (ties + 1)).long(), ties)
    return rank, (rank + noise[1]) / (draws + 1)
