"""Systematics: nuisances with a prior, marginalised in training, and an honest report.

Draw ν ~ p(ν) for each event and train as always: the head then targets the posterior with the
nuisances marginalised. There are four ways to draw: a simulator that takes ν (`Simulated`), a
perturbation of events that exist (`Perturbed`), alternative sets (`Mixed`), alternative weights
(`Weighted`).
`report` shows what comes of it: exact coverage on average over the prior, over-coverage at nominal,
under-coverage far from it. With a `ConditionedEncoder` the head is told ν, and `marginal`
integrates it out later.
"""

from __future__ import annotations

from .conditioned import ConditionedEncoder, at
from .datasets import EpochEvents, Perturbed, Simulated
from .marginal import Marginal
from .marginalise import MarginalModel, marginal
from .mixtures import Mixed, Weighted
from .nuisances import Nuisances
from .report import report
from .results import Point, Price, SystematicsReport

__all__ = [
    "ConditionedEncoder",
    "EpochEvents",
    "Marginal",
    "MarginalModel",
    "Mixed",
    "Nuisances",
    "Perturbed",
    "Point",
    "Price",
    "Simulated",
    "SystematicsReport",
    "Weighted",
    "at",
    "marginal",
    "report",
]
