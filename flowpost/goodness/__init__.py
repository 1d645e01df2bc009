"""Goodness of fit of each event: posterior-predictive and calibrated p-values, and a filter."""

from .calibrate import CalibratedP, Calibrator
from .filter import Efficiency, Filter
from .predictive import PredictiveP, p_value
from .scores import ContextDensity, typicality

__all__ = [
    "CalibratedP",
    "Calibrator",
    "ContextDensity",
    "Efficiency",
    "Filter",
    "PredictiveP",
    "p_value",
    "typicality",
]
