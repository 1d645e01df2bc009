"""Conditional bijections between labels and the Gaussian base: the ladder of heads."""

from .residual import RUNGS, BoundFlow, ResidualFlow

__all__ = ["RUNGS", "BoundFlow", "ResidualFlow"]
