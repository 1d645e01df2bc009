"""Posterior: what a head returns, and the marginals of its blocks."""

from .base import Posterior
from .block import BlockPosterior
from .directional import DirectionMoments
from .summary import Summary

__all__ = ["BlockPosterior", "DirectionMoments", "Posterior", "Summary"]
