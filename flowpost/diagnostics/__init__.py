"""Is the posterior calibrated, and how much does it say?

`coverage` needs only the base coordinates of the true labels, one forward pass; `hpd_coverage`,
`sbc` and `tarp` ask the same of regions and scalars of the label space, with draws. All of them
are necessary, not sufficient: `sharpness` belongs beside them.
"""

from __future__ import annotations

from .accumulator import CoverageAccumulator
from .c2st import c2st
from .coverage import coverage, level_coverage
from .hpd import hpd_coverage, hpd_levels
from .levels import LevelAccumulator
from .local import local_coverage
from .local_result import LocalCoverage, LocalRegion
from .nulls import (
    anderson_darling_pvalue,
    anderson_darling_uniform,
    ks_pvalue,
    ks_uniform,
)
from .results import Coverage, LevelCoverage
from .sbc import SBC, sbc, sbc_ranks
from .sharpness import Sharpness, sharpness
from .tarp import tarp, tarp_levels

__all__ = [
    "Coverage",
    "CoverageAccumulator",
    "LevelAccumulator",
    "LevelCoverage",
    "LocalCoverage",
    "LocalRegion",
    "SBC",
    "Sharpness",
    "anderson_darling_pvalue",
    "anderson_darling_uniform",
    "c2st",
    "coverage",
    "hpd_coverage",
    "hpd_levels",
    "ks_pvalue",
    "ks_uniform",
    "level_coverage",
    "local_coverage",
    "sbc",
    "sbc_ranks",
    "sharpness",
    "tarp",
    "tarp_levels",
]
