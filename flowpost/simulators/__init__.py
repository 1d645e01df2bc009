"""Toy problems with a tractable true posterior, for tests, demos and benchmarks."""

from __future__ import annotations

from . import anomalies
from .directions import Directions, DirectionsPosterior
from .inferno_toy import InfernoToy
from .linear_gaussian import LinearGaussian
from .posteriors import Crescents, FourModes, NoisyIdentity, Ring, WidthMixture
from .shower import Shower
from .telescope import Telescope, TelescopeEvents, TelescopePosterior
from .telescope3d import Telescope3D, Telescope3DEvents, Telescope3DPosterior

__all__ = [
    "Crescents",
    "Directions",
    "DirectionsPosterior",
    "FourModes",
    "InfernoToy",
    "LinearGaussian",
    "NoisyIdentity",
    "Ring",
    "Shower",
    "Telescope",
    "Telescope3D",
    "Telescope3DEvents",
    "Telescope3DPosterior",
    "TelescopeEvents",
    "TelescopePosterior",
    "WidthMixture",
    "anomalies",
]
