r"""Simulation-based calibration: ranks of the true label among posterior draws, column by column.

If z ~ p(z), x ~ p(x|z) and z_1 … z_S ~ q(z|x) with q the true posterior, the rank of any scalar of
the label, here each column, is uniform on {0, …, S}: `(draws < z).sum(0)`.

Reference:
    Validating Bayesian Inference Algorithms with Simulation-Based Calibration
    (S. Talts et al., 2018) https://arxiv.org/abs/1804.06788
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .draws import SampledPosterior, draw_chunks, matched, randomised
from .nulls import chi2_sf, ks_uniform

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SBC", "sbc", "sbc_ranks"]

_ALARM = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class SBC:
    """Ranks of the true label and tests of their uniformity, per label column.

    Attributes:
        ranks: Ranks in {0, …, S} (N, D), int64.
        draws: S.
        names: What the columns are called, D of them.
        ks_statistic: Distance of the randomised ranks (r + V)/(S + 1) from uniform (D,).
        ks_pvalue: Its exact p-value (D,).
        chi2_pvalue: P-value of Pearson's χ² of the binned ranks (D,), asymptotic; NaN below ten
            events.
    """

    ranks: Tensor
    draws: int
    names: tuple[str, ...]
    ks_statistic: Tensor
    ks_pvalue: Tensor
    chi2_pvalue: Tensor

    def verdict(self) -> str:
        """Return what the ranks say in one sentence; alarms are raised at 1 % for all columns."""
        level = (self.ranks.double() + 0.5) / (self.draws + 1)
        count, found = len(level), []
        for j, name in enumerate(self.names):
            if float(self.ks_pvalue[j]) >= _ALARM / len(self.names):
                continue
            shift = float(level[:, j].mean()) - 0.5
            spread = float((level[:, j] - 0.5).square().mean()) * 12
            if abs(shift) * math.sqrt(12 * count) > 4:
                found.append(f"{name} is biased {'low' if shift > 0 else 'high'}")
            elif abs(spread - 1) * math.sqrt(count * 1.25) > 3:
                found.append(f"{name} is too {'narrow' if spread > 1 else 'wide'}")
            else:
                found.append(f"the shape of {name} is wrong")
        return "; ".join(found) or "consistent with uniform ranks"

    def __str__(self) -> str:
        pad = max(6, *(len(n) for n in self.names))
        level = (self.ranks.double() + 0.5) / (self.draws + 1)
        lines = [
            f"SBC ranks of {len(self.ranks)} events among {self.draws} draws",
            f"  {'column':{pad}}  mean rank/S     KS D     KS p     χ² p",
        ]
        for j, name in enumerate(self.names):
            lines.append(
                f"  {name:{pad}} {float(level[:, j].mean()):12.4f} {self.ks_statistic[j]:8.4f} "
                f"{self.ks_pvalue[j]:8.3g} {self.chi2_pvalue[j]:8.3g}"
            )
        return "\n".join([*lines, f"  => {self.verdict()}"])

    def __repr__(self) -> str:
        pvalues = ", ".join(f"{float(p):.3g}" for p in self.ks_pvalue)
        return f"SBC(count={len(self.ranks)}, draws={self.draws}, ks_pvalue=[{pvalues}])"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the rank histogram of each column with its binomial band; return the axes."""
        from ..plots.coverage import plot_ranks

        return plot_ranks(self, ax=ax)


def sbc_ranks(
    posterior: SampledPosterior,
    z: Tensor,
    draws: int = 255,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the rank of each true label column among the draws, ties broken at random.

    Arguments:
        posterior: Batch shape (N,), or () for the same of all events; event shape (D,); only
            `sample` is used.
        z: True labels (N, D).
        draws: Posterior draws S per event.
        generator: Source of the draws and of the tie-breaking.

    Returns:
        Ranks in {0, …, S} (N, D), int64.

    Raises:
        ValueError: If the shapes do not fit or a label is not finite.
    """
    return _ranks(posterior, z, draws, generator)[0]


def sbc(
    posterior: SampledPosterior,
    z: Tensor,
    draws: int = 255,
    *,
    generator: torch.Generator | None = None,
    names: Sequence[str] | None = None,
) -> SBC:
    """Return the ranks of the true label columns and how uniform they are.

    Holds for every column of every space, as a scalar of the label; the angle of a circle is
    ranked from its cut on. Necessary, not sufficient: a posterior that equals the prior passes.

    Arguments:
        posterior: Batch shape (N,), or () for the same of all events; event shape (D,); only
            `sample` is used.
        z: True labels (N, D).
        draws: Posterior draws S per event.
        generator: Source of the draws and of the tie-breaking.
        names: What the columns are called; by default as the posterior's space has it, or z0, z1, …

    Raises:
        ValueError: If the shapes do not fit or a label is not finite.
    """
    ranks, levels = _ranks(posterior, z, draws, generator)
    columns = ranks.shape[1]
    if names is None:
        space = getattr(posterior, "space", None)
        names = [f"z{j}" for j in range(columns)] if space is None else space.names
    labels = tuple(names)
    if len(labels) != columns:
        raise ValueError(f"Expected {columns} names of label columns; got {len(labels)}.")
    ks = torch.tensor([ks_uniform(levels[:, j]) for j in range(columns)], dtype=torch.float64)
    chi2 = [_chi2(ranks[:, j], draws) for j in range(columns)]
    return SBC(
        ranks=ranks,
        draws=draws,
        names=labels,
        ks_statistic=ks[:, 0],
        ks_pvalue=ks[:, 1],
        chi2_pvalue=torch.tensor(chi2, dtype=torch.float64),
    )


def _ranks(
    posterior: SampledPosterior, z: Tensor, draws: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    posterior, z = matched(posterior, z)
    less = torch.zeros(z.shape, dtype=torch.int64, device=z.device)
    ties = torch.zeros_like(less)
    with torch.no_grad():
        for size in draw_chunks(posterior, draws):
            sample = posterior.sample((size,), generator=generator)
            less += (sample < z).sum(0)
            ties += (sample == z).sum(0)
    return randomised(less, ties, draws, generator)


def _chi2(ranks: Tensor, draws: int) -> float:
    # Pearson's χ² in at most 20 groups of neighbouring ranks, at least 5 events expected in each.
    groups = min(20, draws + 1, len(ranks) // 5)
    if groups < 2:
        return math.nan
    every = torch.arange(draws + 1, device=ranks.device)
    expected = torch.bincount(every * groups // (draws + 1)).double() * len(ranks) / (draws + 1)
    observed = torch.bincount(ranks * groups // (draws + 1), minlength=groups).double()
    statistic = float(((observed - expected).square() / expected).sum())
    return chi2_sf(statistic, groups - 1)
