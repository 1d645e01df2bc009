"""A three-dimensional neutrino telescope: hit lists with exact likelihoods and true posteriors."""

from __future__ import annotations

from .events import Telescope3DEvents
from .model import Telescope3D
from .posterior import Telescope3DPosterior

__all__ = ["Telescope3D", "Telescope3DEvents", "Telescope3DPosterior"]
