r"""Sharpness: how much a posterior says. To be read beside every coverage, which it completes.

.. math::
    \text{NLL} = -\log q(z_\text{true}|x), \quad
    H = -E_{z \sim q} \log q(z|x), \quad
    V_p = \frac{1}{S} \sum_{i=1}^{S} \frac{1[q_i \ge q_p]}{q_i},

where q_i are the densities of S draws and q_p is their (1 − p) quantile: V_p is the volume of the
smallest region of credibility p, with no map. For a calibrated posterior NLL and H have the same
mean; of two calibrated posteriors the one of lower NLL says more.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._checks import check_finite
from .draws import SampledPosterior, draw_chunks, matched
from .levels import nominal_levels

__all__ = ["Sharpness", "sharpness"]


@dataclass(frozen=True, eq=False)
class Sharpness:
    """Mean NLL, entropy and credible volume over N events.

    Attributes:
        count: N.
        draws: S.
        nll: Mean −log q(z_true|x) in nats, or None without true labels.
        nll_error: Its standard error.
        entropy: Mean entropy of the posteriors in nats.
        entropy_error: Its standard error over events and draws.
        levels: Credibilities (K,).
        volume: Geometric mean over events of the highest-density volume at each level (K,), in
            the product of the label's units (steradians for a direction).
        volume_quantiles: Its 16, 50 and 84 % quantiles over events (3, K).
    """

    count: int
    draws: int
    nll: float | None
    nll_error: float | None
    entropy: float
    entropy_error: float
    levels: Tensor
    volume: Tensor
    volume_quantiles: Tensor

    def __str__(self) -> str:
        lines = [f"Sharpness over {self.count} events, {self.draws} draws each"]
        if self.nll is not None:
            lines.append(f"  NLL     {self.nll:10.4f} ± {self.nll_error:.4f} nats")
        lines.append(f"  entropy {self.entropy:10.4f} ± {self.entropy_error:.4f} nats")
        for k, level in enumerate(self.levels.tolist()):
            low, middle, high = self.volume_quantiles[:, k].tolist()
            lines.append(
                f"  {100 * level:.3g} % volume {float(self.volume[k]):.4g} "
                f"(median {middle:.4g}, 16–84 % of events {low:.4g} to {high:.4g})"
            )
        return "\n".join(lines)


def sharpness(
    posterior: SampledPosterior,
    z: Tensor | None = None,
    draws: int = 256,
    *,
    generator: torch.Generator | None = None,
    levels: Sequence[float] | Tensor = (0.68, 0.9),
) -> Sharpness:
    """Return mean NLL, entropy and highest-density volumes.

    Holds the N·S log-densities of the draws in memory, not the draws.

    Arguments:
        posterior: Batch shape (N,), or () for the same of all events; event shape (D,).
        z: True labels (N, D), for the NLL.
        draws: Posterior draws S per event.
        generator: Source of the draws.
        levels: Credibilities of the volumes.

    Raises:
        ValueError: If the shapes do not fit or a density is not finite.
    """
    credibility = nominal_levels(list(levels))
    nll = error = None
    with torch.no_grad():
        if z is not None:
            posterior, z = matched(posterior, z)
            log_true = posterior.log_prob(z).double()
            check_finite(log_true, "log q of the true labels", "Are they inside the support?")
            nll, error = _mean(-log_true)
        chunks = []
        for size in draw_chunks(posterior, draws):
            chunks.append(posterior.sample_and_log_prob((size,), generator=generator)[1])
        log_q = torch.cat(chunks)
        check_finite(log_q, "log q of the draws", "Has the training diverged?")
        log_volume = _log_volumes(log_q, credibility)
        entropy, entropy_error = _mean(-log_q.double().mean(0))
    cut = torch.tensor([0.16, 0.5, 0.84], dtype=torch.float64)
    return Sharpness(
        count=log_q.shape[1],
        draws=draws,
        nll=nll,
        nll_error=error,
        entropy=entropy,
        entropy_error=entropy_error,
        levels=credibility,
        volume=log_volume.mean(0).exp(),
        volume_quantiles=log_volume.quantile(cut, dim=0).exp(),
    )


def _log_volumes(log_q: Tensor, levels: Tensor) -> Tensor:
    # log V_p of each event (N, K) from the log-densities (S, N) of its draws.
    draws = len(log_q)
    falling = log_q.sort(dim=0, descending=True).values
    columns = []
    for level in levels.tolist():
        inside = falling[: max(round(level * draws), 1)]
        columns.append((-inside).logsumexp(0).double().cpu() - math.log(draws))
    return torch.stack(columns, dim=-1)


def _mean(value: Tensor) -> tuple[float, float]:
    return float(value.mean()), float(value.std(correction=0)) / math.sqrt(max(len(value) - 1, 1))
