"""Nuisances of the telescopes: factors on light yield, scattering and noise, one set per event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, Uniform

from .._checks import as_tensor, check_finite, check_shape

__all__ = ["Factors", "check_nuisance", "telescope_nuisances"]


class Factors(NamedTuple):
    """Factors on the nominal response of N events, each of shape (N,).

    Attributes:
        light_yield: On the number of photons.
        scattering: On the amount of scattering per metre.
        noise: On the rate of noise hits.
    """

    light_yield: Tensor
    scattering: Tensor
    noise: Tensor


def check_nuisance(nuisance: Mapping[str, Any] | None, like: Tensor) -> Factors:
    """Return factors for the rows of labels `like`, in its dtype and on its device.

    Arguments:
        nuisance: Factors by name ("light_yield", "scattering", "noise"), each a number or of shape
            (N,); names left out, and all of them for None, are 1.
        like: Labels, shape (N, columns).

    Raises:
        ValueError: If a name is unknown, a shape does not fit, or a factor is not positive.
    """
    given = {} if nuisance is None else nuisance
    if not isinstance(given, Mapping):
        raise ValueError(
            f"Expected nuisance as a mapping of names to factors; got {type(given).__name__}. "
            'Write nuisance={"light_yield": 1.1}.'
        )
    unknown = [str(name) for name in given if name not in Factors._fields]
    if unknown:
        raise ValueError(
            f"Expected nuisance with names among {', '.join(Factors._fields)}; got "
            f"{', '.join(unknown)}. Leave the others to the rest of the analysis."
        )
    return Factors(*(_factor(given.get(name, 1.0), name, like) for name in Factors._fields))


def telescope_nuisances() -> dict[str, tuple[Distribution, float]]:
    """Return the prior and the nominal value of every nuisance, by name."""
    return {
        "light_yield": (Normal(1.0, 0.10), 1.0),
        "scattering": (Normal(1.0, 0.15), 1.0),
        "noise": (Uniform(1.0, 3.0), 1.0),
    }


def _factor(value: Any, name: str, like: Tensor) -> Tensor:
    name = f"nuisance {name!r}"
    factor = as_tensor(value, name, like=like).to(like.dtype)
    if factor.ndim == 0:
        factor = factor.expand(len(like))
    check_shape(factor, (len(like),), name, "Give one factor per event, or one number.")
    check_finite(factor, name)
    bad = factor <= 0
    if bool(bad.any()):
        row = int(torch.nonzero(bad)[0])
        raise ValueError(
            f"Expected positive factors as {name}; got {factor[row].item():g} in row {row}. "
            "1 is the nominal response."
        )
    return factor
