"""Likelihoods p_θ(x|z) of an event's data: vectors, counts and lists of hits."""

from .base import BoundLikelihood, LabelEncoder, Likelihood
from .counts import PoissonCounts
from .extended import ExtendedModel, with_latents
from .latent import Latent
from .points import PointProcess
from .vector import FlowLikelihood

__all__ = [
    "BoundLikelihood",
    "ExtendedModel",
    "FlowLikelihood",
    "LabelEncoder",
    "Latent",
    "Likelihood",
    "PointProcess",
    "PoissonCounts",
    "with_latents",
]
