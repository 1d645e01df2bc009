"""flowpost: replace the MSE regression head of a network by a calibrated posterior."""

from importlib import import_module
from typing import Any

from . import (
    diagnostics,
    directions,
    encoders,
    goodness,
    likelihood,
    losses,
    simulators,
    skymap,
    systematics,
)
from .diagnostics import coverage
from .head import PosteriorHead
from .io import load, save
from .model import PosteriorModel
from .posterior import Posterior
from .spaces import Circle, Interval, Positive, Product, Real, Sphere
from .training import fit

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # matplotlib is imported by those who plot
    if name == "plots":
        return import_module(".plots", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


__all__ = [
    "Circle",
    "Interval",
    "Positive",
    "Posterior",
    "PosteriorHead",
    "PosteriorModel",
    "Product",
    "Real",
    "Sphere",
    "coverage",
    "diagnostics",
    "directions",
    "encoders",
    "fit",
    "goodness",
    "likelihood",
    "load",
    "losses",
    "save",
    "simulators",
    "skymap",
    "systematics",
]
