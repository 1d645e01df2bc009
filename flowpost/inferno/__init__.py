"""INFERNO: summaries trained for the measurement itself, with nuisances profiled."""

from __future__ import annotations

from .baseline import CrossEntropyLoss, hard_information, score
from .binning import Binning, optimised
from .fit import fit
from .histograms import templates
from .history import SummaryEpoch, SummaryHistory
from .information import Information
from .loss import InfernoLoss, InformationAccumulator, information
from .model import Alternative, CountingModel, Normalisation, Process, Reweighting, Transform
from .profile import FitResult, Impacts, Scan
from .samples import Batches, Sample
from .summary import SoftBins, SummaryModel, hard_assign, signal_order
from .templates import Templates
from .toy import toy_model
from .workspace import PyhfFit, pyhf_fit

__all__ = [
    "Alternative",
    "Batches",
    "Binning",
    "CountingModel",
    "CrossEntropyLoss",
    "FitResult",
    "Impacts",
    "InfernoLoss",
    "Information",
    "InformationAccumulator",
    "Normalisation",
    "Process",
    "PyhfFit",
    "Reweighting",
    "Sample",
    "Scan",
    "SoftBins",
    "SummaryEpoch",
    "SummaryHistory",
    "SummaryModel",
    "Templates",
    "Transform",
    "fit",
    "hard_assign",
    "hard_information",
    "information",
    "optimised",
    "pyhf_fit",
    "score",
    "signal_order",
    "templates",
    "toy_model",
]
