"""Distances of samples and checks of generated events: pure functions of tensors, with weights."""

from .classifier import classifier_test
from .classifier_result import ClassifierScore, ClassifierTest
from .correlations import CorrelationTest, compare_correlations
from .cross_table import CrossTable, cross_table
from .divergence import symmetric_kl
from .downstream import DownstreamComparison, DownstreamRow, downstream
from .energy import distance_correlation, energy_distance
from .memorisation import MemorisationTest, memorisation
from .ranks import auc
from .ratio import DensityRatio
from .recombination import independence_test, recombine
from .recombination_result import Independence, Recombination, TailGain
from .statistics import held_out_statistics, leave_one_out
from .statistics_result import StatisticScore, StatisticsTest
from .tails import bootstrap_tails, tails
from .tails_result import TailReport, TailRow
from .wasserstein import sliced_wasserstein, wasserstein_1d

__all__ = [
    "ClassifierScore",
    "ClassifierTest",
    "CorrelationTest",
    "CrossTable",
    "DensityRatio",
    "DownstreamComparison",
    "DownstreamRow",
    "Independence",
    "MemorisationTest",
    "Recombination",
    "StatisticScore",
    "StatisticsTest",
    "TailGain",
    "TailReport",
    "TailRow",
    "auc",
    "bootstrap_tails",
    "classifier_test",
    "compare_correlations",
    "cross_table",
    "distance_correlation",
    "downstream",
    "energy_distance",
    "held_out_statistics",
    "independence_test",
    "leave_one_out",
    "memorisation",
    "recombine",
    "sliced_wasserstein",
    "symmetric_kl",
    "tails",
    "wasserstein_1d",
]
