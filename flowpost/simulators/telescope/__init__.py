"""A two-dimensional neutrino telescope: events as images or hit lists, with exact posteriors."""

from __future__ import annotations

from .events import TelescopeEvents
from .model import Telescope
from .posterior import TelescopePosterior

__all__ = ["Telescope", "TelescopeEvents", "TelescopePosterior"]
