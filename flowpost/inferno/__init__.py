"""INFERNO: summaries trained for the measurement itself, with nuisances profiled."""

from __future__ import annotations

from .baseline import CrossEntropyLoss, hard_information, score
from .binning import Binning, optimised
from .fit import SummaryEpoch, SummaryHistory, fit
from .information import Information
from .loss import InfernoLoss, InformationAccumulator, information
from .model import Alternative, CountingModel, Normalisation, Process, Reweighting, Transform
from .samples import Batches, Sample
from .summary import SoftBins, SummaryModel, hard_assign, signal_order
from .toy import toy_model

__all__ = [
    "Alternative",
    "Batches",
    "Binning",
    "CountingModel",
    "CrossEntropyLoss",
    "InfernoLoss",
    "Information",
    "InformationAccumulator",
    "Normalisation",
    "Process",
    "Reweighting",
    "Sample",
    "SoftBins",
    "SummaryEpoch",
    "SummaryHistory",
    "SummaryModel",
    "Transform",
    "fit",
    "hard_assign",
    "hard_information",
    "information",
    "optimised",
    "score",
    "signal_order",
    "toy_model",
]
