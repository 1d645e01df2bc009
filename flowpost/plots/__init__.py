"""Results drawn: every function takes and returns matplotlib axes, imported when it draws."""

from __future__ import annotations

from flowpost.plots.classifier import plot_ratio, plot_reliability, plot_roc
from flowpost.plots.corner import plot_corner
from flowpost.plots.coverage import plot_coverage, plot_pulls, plot_ranks
from flowpost.plots.gallery import plot_gallery
from flowpost.plots.generative import (
    plot_correlations,
    plot_cross_table,
    plot_downstream,
    plot_memorisation,
    plot_recombination,
    plot_statistics,
    plot_tails,
)
from flowpost.plots.goodness import plot_p_values
from flowpost.plots.history import plot_history
from flowpost.plots.inferno import (
    plot_impacts,
    plot_nuisances,
    plot_scan,
    plot_templates,
)
from flowpost.plots.local import plot_local_coverage
from flowpost.plots.regions import Region, draws_region, grid_region, mass_threshold
from flowpost.plots.showers import plot_showers
from flowpost.plots.skymap import plot_skymap, plot_zoom
from flowpost.plots.summaries import plot_summary_history
from flowpost.plots.systematics import plot_systematics

__all__ = [
    "Region",
    "draws_region",
    "grid_region",
    "mass_threshold",
    "plot_corner",
    "plot_correlations",
    "plot_coverage",
    "plot_cross_table",
    "plot_downstream",
    "plot_gallery",
    "plot_history",
    "plot_impacts",
    "plot_local_coverage",
    "plot_memorisation",
    "plot_nuisances",
    "plot_p_values",
    "plot_pulls",
    "plot_ranks",
    "plot_ratio",
    "plot_recombination",
    "plot_reliability",
    "plot_roc",
    "plot_scan",
    "plot_showers",
    "plot_skymap",
    "plot_statistics",
    "plot_summary_history",
    "plot_systematics",
    "plot_tails",
    "plot_templates",
    "plot_zoom",
]
