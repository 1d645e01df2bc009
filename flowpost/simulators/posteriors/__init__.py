"""Simulators of two to ten labels with exact posteriors, by which defaults are judged."""

from .crescents import Crescents
from .four_modes import FourModes
from .linear import NoisyIdentity
from .mixture import WidthMixture
from .ring import Ring

__all__ = ["Crescents", "FourModes", "NoisyIdentity", "Ring", "WidthMixture"]
