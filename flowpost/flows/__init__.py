"""Conditional bijections between labels and the Gaussian base: the ladder of heads."""

from .bound import BoundFlow
from .residual import RUNGS, ResidualFlow

__all__ = ["RUNGS", "BoundFlow", "ResidualFlow"]
