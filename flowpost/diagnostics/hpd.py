r"""Coverage of highest-posterior-density regions, from the rank of the truth's density.

The smallest region of credibility p holds the labels whose density exceeds a threshold. Its level
at the true label is the posterior mass of higher density,

.. math:: v = P_{z \sim q(\cdot|x)} \left( q(z|x) > q(z_\text{true}|x) \right),

estimated by the rank of log q(z_true|x) among S draws. Under calibration the truth is exchangeable
with the draws, so `(rank + V) / (S + 1)` with V ~ U(0, 1) is exactly uniform for every S.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .coverage import level_coverage
from .draws import SampledPosterior, draw_chunks, matched, randomised
from .results import LevelCoverage

__all__ = ["hpd_coverage", "hpd_levels"]


def hpd_levels(
    posterior: SampledPosterior,
    z: Tensor,
    draws: int = 256,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the HPD credible level of each true label, and its log-density.

    Arguments:
        posterior: Batch shape (N,), or () for the same of all events; event shape (D,).
        z: True labels (N, D).
        draws: Posterior draws S per event; a level is known to 1/S.
        generator: Source of the draws and of the tie-breaking.

    Returns:
        Levels in [0, 1] (N,), float64, and log q(z_true|x) in nats (N,).

    Raises:
        ValueError: If the shapes do not fit or a density is NaN.
    """
    posterior, z = matched(posterior, z)
    with torch.no_grad():
        log_true = posterior.log_prob(z)
        higher = torch.zeros(len(z), dtype=torch.int64, device=log_true.device)
        ties = torch.zeros_like(higher)
        for size in draw_chunks(posterior, draws):
            _, log_q = posterior.sample_and_log_prob((size,), generator=generator)
            if bool(torch.isnan(log_q).any() | torch.isnan(log_true).any()):
                raise ValueError("Expected log q without NaN; got NaN. Has the training diverged?")
            higher += (log_q > log_true).sum(0)
            ties += (log_q == log_true).sum(0)
        _, levels = randomised(higher, ties, draws, generator)
    return levels, log_true


def hpd_coverage(
    posterior: SampledPosterior,
    z: Tensor,
    draws: int = 256,
    *,
    generator: torch.Generator | None = None,
    weight: Tensor | None = None,
    levels: int | Sequence[float] | Tensor = 20,
) -> LevelCoverage:
    """Return how often the highest-density regions hold the truth, and whether as stated.

    Necessary, not sufficient, as every coverage; the NLL is reported beside it.

    Arguments:
        posterior: Batch shape (N,), or () for the same of all events; event shape (D,).
        z: True labels (N, D).
        draws: Posterior draws S per event.
        generator: Source of the draws and of the tie-breaking.
        weight: Event weights (N,), as in `coverage`.
        levels: Number of nominal credibilities, or the credibilities themselves.

    Raises:
        ValueError: If the shapes do not fit or a density is not finite.
    """
    v, log_prob = hpd_levels(posterior, z, draws, generator)
    return level_coverage(v, kind="HPD", log_prob=log_prob, weight=weight, levels=levels)
