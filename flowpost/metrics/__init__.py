"""Distances of samples: pure functions of tensors, differentiable, with event weights."""

from .divergence import symmetric_kl
from .energy import distance_correlation, energy_distance
from .wasserstein import sliced_wasserstein, wasserstein_1d

__all__ = [
    "distance_correlation",
    "energy_distance",
    "sliced_wasserstein",
    "symmetric_kl",
    "wasserstein_1d",
]
