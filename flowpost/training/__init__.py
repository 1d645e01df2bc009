"""Training: `fit` on Lightning, and what it reports."""

from .fit import fit
from .history import Epoch, History

__all__ = ["Epoch", "History", "fit"]
