r"""Which monotone map makes held-out base coordinates normal, with no more knots than it takes.

A knot puts a quantile of the held-out values where that of the base is. How many there are is what
cross-validation says: of no map at all, a shift and scale, and ever more knots, those that leave
the values nowhere further from the base than chance does in one of a hundred cases, and of these
the simplest that comes within two nats of the lowest :math:`-\sum \ln q` of events to which it was
not fitted. Beyond the last knot it goes on with its slope there, but in the end no steeper than 1:
a head that is too wide is not known to be so for outliers. Where the label is compact the base
reaches infinity at the antipode, and the density there has a factor of e^((t − G)/2): the slope of
G becomes 1 at once, so that t − G is constant and the density goes on smoothly.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from .monotone import Knots, Monotone, stacked

__all__ = ["IDENTITY", "KNOTS", "effective", "line_map", "radial_map"]

# knots of every map, those on its straight ends included
KNOTS = 64
IDENTITY = Knots(*(torch.tensor(v, dtype=torch.float64) for v in ([0, 1], [0, 1], [1, 1])))
# events beyond the last knot, and between two of them
_TAIL, _BETWEEN = 25, 15
_PIECES = (0, 1, 2, 4, 8, 16, 32)
_FOLDS = 5
# √n times the Kolmogorov–Smirnov distance that uniform levels exceed in one of a hundred cases
_CHANCE = 1.63
# nats of all held-out events together that a simpler map may lack
_LACK = 2.0
# by what factor the slope at the end may differ from that of the map as a whole
_BEND = 4.0
# compact labels: from the last knot to where the slope is 1, in ‖u‖²
_TURN = 2.0

_Fit = Callable[[np.ndarray, np.ndarray, int], Knots]
# ln q but for a constant, and level, of values (n,)
_Score = Callable[[Monotone, Tensor], tuple[Tensor, Tensor]]


def effective(weight: np.ndarray) -> float:
    """Number of unweighted events that say as much: (Σw)²/Σw²."""
    total = float(weight.sum())
    return total**2 / float((weight**2).sum()) if total else 0.0


def radial_map(
    t: np.ndarray, weight: np.ndarray, dof: int, compact: bool, order: np.ndarray
) -> tuple[Knots, float]:
    """The map of ‖u‖² that makes it χ² with `dof` degrees of freedom.

    Arguments:
        t: ‖u‖² of held-out events (n,).
        weight: Their weights (n,).
        dof: d.
        compact: Whether its slope has to be 1 beyond the events.
        order: A permutation of the events, which sets the folds.

    Returns:
        The knots, and by how many nats it lowers the mean −ln q of events it was not fitted to.
    """
    from scipy.special import chdtri

    def fit(t: np.ndarray, weight: np.ndarray, pieces: int) -> Knots:
        if pieces == 1:
            ratio = dof * weight.sum() / (weight * t).sum()
            y = chdtri(dof, np.array([1e-2, 5e-4]))
            y = np.unique(np.minimum(y, ratio * t.max())) if compact else y
            x = y / ratio
        else:
            p = _levels(pieces, effective(weight))
            x, y = _rising(_quantiles(t, weight, p), chdtri(dof, 1 - p), 0.0)
        x, y = np.concatenate([[0.0], x]), np.concatenate([[0.0], y])
        if not compact:
            return _through(*_eased(x, y))
        rise = _TURN * (_end_slope(x, y) + 1) / 2
        return _through(np.append(x, x[-1] + _TURN), np.append(y, y[-1] + rise), y[1] / x[1], 1.0)

    def score(table: Monotone, t: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = table(t[:, None], torch.zeros(len(t), dtype=torch.int64))
        volume = (dof / 2 - 1) * (y / t[:, None]).log()
        level = torch.special.gammainc(t.new_tensor(dof / 2), y / 2)
        return (log_slope + volume - y / 2)[:, 0], level[:, 0]

    return _chosen(np.maximum(t, 1e-30), weight, fit, score, order)


def line_map(u: np.ndarray, weight: np.ndarray, order: np.ndarray) -> tuple[Knots, float]:
    """The map of one base coordinate (n,) that makes it N(0, 1); see `radial_map`."""
    from scipy.special import ndtri

    def fit(u: np.ndarray, weight: np.ndarray, pieces: int) -> Knots:
        p = _levels(pieces, effective(weight)) if pieces > 1 else np.empty(0)
        # a shift and scale, where events are too few for two quantiles
        if len(p) < 2:
            mean = np.average(u, weights=weight)
            width = max(np.average((u - mean) ** 2, weights=weight) ** 0.5, 1e-6)
            y = np.array([-3.5, -2.5, 2.5, 3.5])
            x = mean + width * y
        else:
            x, y = _rising(_quantiles(u, weight, p), ndtri(p), -math.inf)
        right, top, _, last = _eased(x, y)
        left, bottom, _, first = _eased(-x[::-1], -y[::-1])
        new = len(left) - len(x)
        x = np.concatenate([-left[::-1][:new], right])
        y = np.concatenate([-bottom[::-1][:new], top])
        return _through(x, y, first, last)

    def score(table: Monotone, u: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = table(u[:, None], torch.zeros(len(u), dtype=torch.int64))
        return (log_slope - y.square() / 2)[:, 0], torch.special.ndtr(y[:, 0])

    return _chosen(u, weight, fit, score, order)


def _chosen(
    values: np.ndarray, weight: np.ndarray, fit: _Fit, score: _Score, order: np.ndarray
) -> tuple[Knots, float]:
    """The map of as many pieces as cross-validation likes best, fitted to all events."""
    most = effective(weight) * (1 - 1 / _FOLDS) / _BETWEEN
    pieces = [k for k in _PIECES if k < 2 or k <= most]
    fold = np.empty(len(values), dtype=int)
    fold[order] = np.arange(len(values)) % _FOLDS

    def made(rows: np.ndarray, count: int) -> Knots:
        return fit(values[rows], weight[rows], count) if count else IDENTITY

    total = np.zeros(len(pieces))
    for k in range(_FOLDS):
        held = fold == k
        if not weight[held].any() or not weight[~held].any():
            continue
        for i, count in enumerate(pieces):
            table = Monotone(stacked([[made(~held, count)]], KNOTS))
            gained = score(table, torch.as_tensor(values[held]))[0].numpy()
            total[i] += (weight[held] * gained).sum()
    fitted = [made(np.ones(len(values), dtype=bool), count) for count in pieces]
    tables = [Monotone(stacked([[knots]], KNOTS)) for knots in fitted]
    levels = [score(table, torch.as_tensor(values))[1].numpy() for table in tables]
    far = np.array([_distance(level, weight) for level in levels])
    fine = far * effective(weight) ** 0.5 < _CHANCE
    scores = np.where(fine | ~fine.any(), total, -np.inf) * effective(weight) / weight.sum()
    best = int((scores >= scores.max() - _LACK).argmax())
    if not fine[best]:
        warnings.warn(
            f"Credible levels stay off by {far[best]:.3f}, which no smooth map repairs. Are labels "
            "rounded, or the same events repeated?",
            stacklevel=6,
        )
    return fitted[best], float(total[best] - total[0]) / float(weight.sum())


def _distance(levels: np.ndarray, weight: np.ndarray) -> float:
    """Kolmogorov–Smirnov distance of weighted levels from uniform ones."""
    order = np.argsort(levels, kind="stable")
    after = np.cumsum(weight[order]) / weight.sum()
    before = after - weight[order] / weight.sum()
    return float(np.maximum(after - levels[order], levels[order] - before).max())


def _levels(pieces: int, count: float) -> np.ndarray:
    """Credibilities at knots: even ones, and in the tails as far out as there are events."""
    tail, ends = 1 / pieces / 4, []
    while count * tail >= _TAIL:
        ends.append(tail)
        tail /= 4
    inner = np.arange(1, pieces) / pieces
    return np.concatenate([ends[::-1], inner, 1 - np.array(ends)])


def _quantiles(values: np.ndarray, weight: np.ndarray, p: np.ndarray) -> np.ndarray:
    order = np.argsort(values, kind="stable")
    w = weight[order]
    middle = (np.cumsum(w) - w / 2) / w.sum()
    return np.interp(p, middle, values[order])


def _rising(x: np.ndarray, y: np.ndarray, above: float) -> tuple[np.ndarray, np.ndarray]:
    """Knots without those that do not rise, as of values that many events share."""
    least = 1e-6 * max(float(np.abs(x).max()), 1e-6)
    keep: list[int] = []
    for i in range(len(x)):
        if x[i] > (x[keep[-1]] if keep else above) + least:
            keep.append(i)
    if len(keep) < 1 + math.isinf(above):
        raise ValueError(
            f"Expected base coordinates that differ between events; got {len(x)} quantiles that "
            "are equal. Is the same event repeated?"
        )
    return x[keep], y[keep]


def _end_slope(x: np.ndarray, y: np.ndarray) -> float:
    whole, slope = (y[-1] - y[0]) / (x[-1] - x[0]), (y[-1] - y[-2]) / (x[-1] - x[-2])
    return float(min(max(slope, whole / _BEND), whole * _BEND))


def _eased(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, float, float]:
    """Knots that go on with the last slope, where it is above 1 until it is 1; and outer slopes."""
    first = (y[1] - y[0]) / (x[1] - x[0])
    slope = _end_slope(x, y)
    if slope <= 1:
        return x, y, first, slope
    span = x[-1] - x[0]
    steps = span * np.array([0.1, 0.6])
    rise = np.array([0.1 * slope, 0.1 * slope + 0.25 * (slope + 1)]) * span
    return np.append(x, x[-1] + steps), np.append(y, y[-1] + rise), first, 1.0


def _through(x: np.ndarray, y: np.ndarray, first: float, last: float) -> Knots:
    """Knots with slopes that are the weighted harmonic means of those of the two neighbours.

    Source: *A method for constructing local monotone piecewise cubic interpolants*, F. N. Fritsch,
    J. Butland, 1984, https://doi.org/10.1137/0905021.
    """
    step = np.diff(x)
    slope = np.diff(y) / step
    near, far = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
    inner = (near + far) / (near / slope[:-1] + far / slope[1:])
    slopes = np.concatenate([[first], inner, [last]])
    return concatenated((x, y, slopes))


def only(knots: Knots) -> Monotone:
    """One map as that of a single bin and coordinate."""
    return Monotone(stacked([[knots]], len(knots.x)))


def concatenated(parts: Sequence[np.ndarray]) -> Knots:
    """Knots, values and slopes as they stand."""
    return Knots(*(torch.as_tensor(v, dtype=torch.float64) for v in parts))
