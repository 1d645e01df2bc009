"""Calibration: losses that align variations of a nuisance, and recalibration of any posterior."""

from .align import Align
from .conformal import Conformal, conformal_levels
from .recalibrate import Recalibrator

__all__ = ["Align", "Conformal", "Recalibrator", "conformal_levels"]
