"""flowpost: replace the MSE regression head of a network by a calibrated posterior."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import diagnostics, directions, encoders, losses
from .diagnostics import coverage
from .head import PosteriorHead
from .io import load, save
from .model import PosteriorModel
from .posterior import Posterior
from .spaces import Circle, Interval, Positive, Product, Real, Sphere
from .training import fit

if TYPE_CHECKING:
    from . import (
        calibration,
        generators,
        goodness,
        inferno,
        likelihood,
        metrics,
        simulators,
        skymap,
        systematics,
    )

__version__ = "0.1.0"

# imported when they are first asked for: a training needs none of them
_LATER = (
    "calibration",
    "generators",
    "goodness",
    "inferno",
    "likelihood",
    "metrics",
    "plots",
    "simulators",
    "skymap",
    "systematics",
)


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LATER})


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
    "calibration",
    "coverage",
    "diagnostics",
    "directions",
    "encoders",
    "fit",
    "generators",
    "goodness",
    "inferno",
    "likelihood",
    "load",
    "losses",
    "metrics",
    "save",
    "simulators",
    "skymap",
    "systematics",
]
