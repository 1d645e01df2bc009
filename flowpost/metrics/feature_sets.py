"""Sets of features of two samples, side by side, as a classifier test takes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._checks import as_tensor, check_finite

__all__ = ["FEWEST", "FeatureSet", "feature_sets"]

FEWEST = 50


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """Features of the two samples, and of other events.

    Attributes:
        name: Its name.
        x: Features of the first sample (N, F).
        y: Features of the second (M, F).
        function: Features of events; None where events are their own features.
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    function: Callable[[Any], Any] | None

    def rows(self, x: np.ndarray, y: np.ndarray) -> np.ndarray:
        """Features of events of the first sample, and of the second below them."""
        return np.concatenate([self.x[x], self.y[y]])

    def of(self, events: Any) -> np.ndarray:
        """Features (N, F) of other events.

        Raises:
            ValueError: If they have another number of columns or are not finite.
        """
        values = _matrix(self.function(events) if self.function else events, "events")
        if values.shape[1] != self.x.shape[1]:
            raise ValueError(
                f"Expected events of {self.x.shape[1]} columns; got {values.shape[1]}. They are "
                f"those of the features {self.name!r}."
            )
        return values


def feature_sets(x: Any, y: Any, features: Mapping[str, Any] | None) -> list[FeatureSet]:
    """Return the sets of features by name, as `classifier_test` takes them.

    Raises:
        ValueError: If a set is neither function nor pair, does not fit the samples, is not finite,
            or there are too few events.
    """
    if features is None:
        features = {"events": None}
    if not isinstance(features, Mapping) or not features:
        raise ValueError(
            f"Expected features as a dict of sets by name; got {type(features).__name__}. One set "
            'is written {"name": function}.'
        )
    count = _count(x, "x"), _count(y, "y")
    if min(count) < FEWEST:
        raise ValueError(
            f"Expected at least {FEWEST} events of each sample; got {count[0]} and {count[1]}. "
            "They are divided into training, calibration and test: simulate more."
        )
    return [_feature_set(str(name), given, x, y) for name, given in features.items()]


def _count(events: Any, name: str) -> int:
    try:
        return len(events)
    except TypeError:
        raise ValueError(
            f"Expected {name} of shape (N, D), one event a row; got {type(events).__name__}."
        ) from None


def _feature_set(name: str, given: Any, x: Any, y: Any) -> FeatureSet:
    of = "" if given is None else f" of the features {name!r}"
    if given is None or callable(given):
        pair = (x, y) if given is None else (given(x), given(y))
    elif isinstance(given, (tuple, list)) and len(given) == 2:
        pair = tuple(given)
    else:
        raise ValueError(
            f"Expected features {name!r} as a function of events or a pair of arrays; got "
            f"{type(given).__name__}."
        )
    parts = []
    for which, value, events in zip("xy", pair, (x, y), strict=True):
        part = _matrix(value, f"{which}{of}")
        if len(part) != len(events):
            raise ValueError(
                f"Expected {which}{of} with {len(events)} rows; got {len(part)}. One row an event."
            )
        parts.append(part)
    columns = [part.shape[1] for part in parts]
    if columns[0] != columns[1]:
        raise ValueError(
            f"Expected as many columns of y as of x{of}, {columns[0]}; got {columns[1]}. Give both "
            "samples the same features in the same order."
        )
    return FeatureSet(name, parts[0], parts[1], given if callable(given) else None)


def _matrix(value: Any, name: str) -> np.ndarray:
    tensor = as_tensor(value, name).detach().cpu().double()
    if not tensor.numel():
        raise ValueError(f"Expected {name} of shape (N, D); got {tuple(tensor.shape)}.")
    check_finite(tensor, name, "Fill in or leave out what is missing, in both samples alike.")
    return tensor.reshape(len(tensor) if tensor.ndim else 1, -1).numpy()
