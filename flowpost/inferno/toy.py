"""The counting experiment of the INFERNO toy problem."""

from __future__ import annotations

from typing import Any

from ..simulators import InfernoToy
from .model import CountingModel, Normalisation, Nuisance, Process, Transform

__all__ = ["toy_model"]

# distances from nominal of the templates, where the nuisance is free
_SHIFT = {"r": 0.4, "rate": 1.0, "b": 100.0}


def toy_model(toy: InfernoToy) -> CountingModel:
    """Processes and nuisances of a benchmark of `flowpost.simulators.InfernoToy`.

    The nuisances are "r" and "rate", which move background events, and "b", the background's
    yield, as far as the benchmark has them; the parameter of interest is the number of signal
    events.

    Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
    https://arxiv.org/abs/1806.04743, section 5.

    Example:
        >>> toy_model(InfernoToy(1))
        CountingModel(s = 50: signal; background 1000; r = 0, free (transform of background))
    """
    nuisances: list[Nuisance] = []
    for name, constraint in toy.constraints.items():
        common: dict[str, Any] = {
            "name": name,
            "processes": "background",
            "nominal": toy.nominal[name],
            "constraint": constraint,
            "shift": _SHIFT[name] if constraint is None else None,
        }
        if name == "b":
            nuisances.append(Normalisation(**common))
        else:
            nuisances.append(Transform(apply=toy.shift if name == "r" else toy.stretch, **common))
    processes = [Process("signal", toy.signal, signal=True), Process("background", toy.background)]
    return CountingModel(processes, nuisances)
