"""Toy problems with a tractable true posterior, for tests, demos and benchmarks."""

from __future__ import annotations

from .linear_gaussian import LinearGaussian
from .posteriors import Crescents, FourModes, NoisyIdentity, Ring, WidthMixture
from .telescope import Telescope, TelescopeEvents, TelescopePosterior

__all__ = [
    "Crescents",
    "FourModes",
    "LinearGaussian",
    "NoisyIdentity",
    "Ring",
    "Telescope",
    "TelescopeEvents",
    "TelescopePosterior",
    "WidthMixture",
]
