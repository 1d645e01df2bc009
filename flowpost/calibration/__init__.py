"""Calibration: losses that align the variations of a nuisance."""

from .align import Align

__all__ = ["Align"]
