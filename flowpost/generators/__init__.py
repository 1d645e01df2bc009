"""Generators of data for labels: a teacher and its fast student, sampling-only networks, a library.

A `Teacher` is a density that is slow to draw from; a `Student` draws as it does in one pass.
"""

from .base import NoiseNetwork, Sampler
from .critic import Critic, fit_critic, gradient_penalty
from .energy import energy_score, fit_energy
from .fit import distill, fit
from .groups import GroupSums
from .library import Library
from .student import Student
from .teacher import Teacher
from .training import GeneratorEpoch, GeneratorHistory
from .two_step import TwoStep
from .weights import WeightedDraws, effective_size, weighted_draws

__all__ = [
    "Critic",
    "GeneratorEpoch",
    "GeneratorHistory",
    "GroupSums",
    "Library",
    "NoiseNetwork",
    "Sampler",
    "Student",
    "Teacher",
    "TwoStep",
    "WeightedDraws",
    "distill",
    "effective_size",
    "energy_score",
    "fit",
    "fit_critic",
    "fit_energy",
    "gradient_penalty",
    "weighted_draws",
]
