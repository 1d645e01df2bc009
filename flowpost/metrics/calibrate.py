r"""Scores as probabilities: none, Platt's or isotonic calibration, chosen by held-out log-loss.

Platt's is :math:`f = \sigma(a s + b)` with :math:`a \ge 0`, two numbers fitted by maximum
likelihood. Isotonic regression is the monotone step function of least squares, with as many
parameters as the data ask for: on few events it learns their noise, and with it the cross-entropy
of others rises, so that the divergence of the samples comes out too small, or even below 0.

Reference:
    Predicting Good Probabilities with Supervised Learning (A. Niculescu-Mizil, R. Caruana, 2005)
    https://doi.org/10.1145/1102351.1102430
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .._checks import require
from .ranks import effective_count

__all__ = ["METHODS", "Linear", "Steps", "calibrate", "log_loss"]

METHODS = ("none", "platt", "isotonic")
_FOLDS = 5
# events of prior knowledge that the scores are log-odds already
_PRIOR = 1.0


@dataclass(frozen=True)
class Linear:
    """Log-odds a (s − loc) + b of scores s."""

    slope: float = 1.0
    loc: float = 0.0
    offset: float = 0.0

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return log-odds (N,) of scores (N,)."""
        return self.slope * (scores - self.loc) + self.offset


@dataclass(frozen=True, eq=False)
class Steps:
    """Log-odds of scores by interpolation of probabilities."""

    scores: np.ndarray
    probabilities: np.ndarray

    def __call__(self, scores: np.ndarray) -> np.ndarray:
        """Return log-odds (N,) of scores (N,)."""
        p = np.interp(scores, self.scores, self.probabilities)
        return np.log(p) - np.log1p(-p)


Calibration = Linear | Steps


def log_loss(odds: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Return the cross-entropy of each event in bits (N,).

    Arguments:
        odds: Log-odds (N,).
        target: 1 for the first sample, 0 for the second, (N,).
    """
    return np.logaddexp(0.0, np.where(target > 0, -odds, odds)) / np.log(2)


def calibrate(
    scores: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    method: str,
    probabilistic: bool,
    rng: np.random.Generator,
) -> tuple[str, Calibration, float]:
    """Return the name of a calibration, log-odds as a function of scores, and its log-loss in bits.

    The log-loss is of five-fold cross-validation within the events given, the rule of the choice;
    where there are equals the simpler is taken.

    Arguments:
        scores: Scores (N,) of events that trained nothing.
        target: 1 for the first sample, 0 for the second, (N,).
        weight: Weights (N,), of the same sum in both samples.
        method: One of `METHODS`, or "auto".
        probabilistic: Whether the scores are log-odds; else "auto" does not take "none".
        rng: Source of the folds.
    """
    methods = METHODS[0 if probabilistic else 1 :] if method == "auto" else (method,)
    fold = np.empty(len(scores), dtype=int)
    for side in (0, 1):
        rows = rng.permutation(np.flatnonzero(target == side))
        fold[rows] = np.arange(len(rows)) % _FOLDS
    losses = []
    for name in methods:
        loss = np.zeros(len(scores))
        for k in range(_FOLDS):
            out, rest = fold == k, fold != k
            function = _FITS[name](scores[rest], target[rest], weight[rest])
            loss[out] = log_loss(function(scores[out]), target[out])
        losses.append(float(np.average(loss, weights=weight)))
    best = int(np.argmin(losses))
    name = methods[best]
    return name, _FITS[name](scores, target, weight), losses[best]


def _none(scores: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Linear:
    return Linear()


def _platt(scores: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Linear:
    # Newton's method for σ(a u + b), u the scores in units of their spread about their mean
    loc, scale = scores.mean(), scores.std() or 1.0
    columns = np.stack([(scores - loc) / scale, np.ones_like(scores)], 1)
    start = np.array([min(scale, 10.0), 0.0])
    at, ridge = start, _PRIOR * np.array([1.0, 1e-3])
    value = _penalised(at, start, ridge, columns, target, weight)
    for _ in range(50):
        p = 1 / (1 + np.exp(-np.clip(columns @ at, -500, 500)))
        gradient = columns.T @ (weight * (p - target)) + ridge * (at - start)
        curvature = (columns * (weight * p * (1 - p))[:, None]).T @ columns + np.diag(ridge)
        step = np.linalg.solve(curvature, gradient)
        new = _penalised(at - step, start, ridge, columns, target, weight)
        while new > value and np.abs(step).max() > 1e-9:
            step = step / 2
            new = _penalised(at - step, start, ridge, columns, target, weight)
        at, value = at - step, new
        if np.abs(step).max() < 1e-9:
            break
    if at[0] <= 0:
        return Linear(0.0)
    return Linear(float(at[0] / scale), float(loc), float(at[1]))


def _penalised(
    at: np.ndarray,
    start: np.ndarray,
    ridge: np.ndarray,
    columns: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
) -> float:
    odds = columns @ at
    loss = np.logaddexp(0.0, np.where(target > 0, -odds, odds))
    return float(weight @ loss + ridge @ (at - start) ** 2 / 2)


def _isotonic(scores: np.ndarray, target: np.ndarray, weight: np.ndarray) -> Steps:
    fit = require("sklearn.isotonic", "diagnostics").IsotonicRegression(out_of_bounds="clip")
    fit.fit(scores, target, sample_weight=weight)
    # so many events cannot show a probability closer to 0 or 1
    edge = 1 / (effective_count(weight) + 2)
    return Steps(fit.X_thresholds_, np.clip(fit.y_thresholds_, edge, 1 - edge))


_FITS: dict[str, Callable[[np.ndarray, np.ndarray, np.ndarray], Calibration]] = {
    "none": _none,
    "platt": _platt,
    "isotonic": _isotonic,
}
