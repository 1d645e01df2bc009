"""Distances of samples: pure functions of tensors, differentiable, with event weights."""

from .classifier import classifier_test
from .classifier_result import ClassifierScore, ClassifierTest
from .divergence import symmetric_kl
from .energy import distance_correlation, energy_distance
from .ranks import auc
from .ratio import DensityRatio
from .wasserstein import sliced_wasserstein, wasserstein_1d

__all__ = [
    "ClassifierScore",
    "ClassifierTest",
    "DensityRatio",
    "auc",
    "classifier_test",
    "distance_correlation",
    "energy_distance",
    "sliced_wasserstein",
    "symmetric_kl",
    "wasserstein_1d",
]
