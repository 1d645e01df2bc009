r"""Held-out statistics: do generated events have the distributions T_k(x) that true ones have?

For scalar functions T_k of an event, chosen before the training, the weighted Wasserstein distance

.. math:: W_1 = \int | F(t) - G(t) | \, dt, \qquad F(t) = \sum_i a_i 1[T_k(x_i) \le t]

of the distribution functions of true and generated events, of normalised weights a and b, has the
units of T_k; divided by the spread of the truth it says how far probability has to be moved, in
standard deviations. Its p-value compares it with what labels given by chance make of it.

*With event weights* there are two nulls. Under `"permutation"` labels are exchanged and weights
stay with their events: exact if events *with* their weights come from one source, the case of no
weights included. Where weights belong to one sample, as of weighted truth beside unweighted draws,
only the weighted distributions agree, and exchanged labels would spread the weights over both
samples. There `"multiplier"` keeps each event in its sample and turns the sign of its deviation,

.. math:: (F - G)^*(t) = \sum_i g_i a_i \big( 1[T_k(x_i) \le t] - F(t) \big)
          - \sum_j h_j b_j \big( 1[T_k(y_j) \le t] - G(t) \big), \qquad g, h = \pm 1 ,

which has the covariance of F − G whatever the weights, and is right for large samples; below a
thousand effective events it rejects somewhat too often.

A statistic that entered the training proves nothing: `leave_one_out` trains once for each T_k
without it.

References:
    Permutation P-values Should Never Be Zero (B. Phipson, G. Smyth, 2010)
    https://doi.org/10.2202/1544-6115.1585

    Weak Convergence and Empirical Processes (A. van der Vaart, J. Wellner, 1996), section 2.9, for
    the multipliers
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from .._progress import progress_bar
from .multiple import holm, largest_statistic
from .ranks import effective_count, event_weights, labellings
from .statistics_result import StatisticScore, StatisticsTest

__all__ = ["Statistics", "held_out_statistics", "leave_one_out", "statistic_values"]

Statistics = Mapping[str, Callable[[Tensor], Any]]

_CHUNK = 1 << 21
_NULLS = ("auto", "permutation", "multiplier")
_FEWEST = 10
# of mean weights: beyond it they are not of one kind
_SCALE = 4.0


def held_out_statistics(
    true: Any,
    generated: Any,
    statistics: Statistics | None = None,
    weight_true: Any = None,
    weight_generated: Any = None,
    *,
    null: str = "auto",
    permutations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> StatisticsTest:
    """Compare the distributions of statistics of true and of generated events.

    Arguments:
        true: True events that trained nothing (N, …).
        generated: Generated events (M, …), independent of them and of each other.
        statistics: Functions of events (N, …) to values (N,) by name, each looking at one event
            alone, chosen before the training. None takes the columns of events (N, D).
        weight_true: Event weights (N,), at least 0.
        weight_generated: Event weights (M,).
        null: "permutation", exact where events with their weights are of one kind (on one scale);
            "multiplier", right for large samples where weights belong to a sample; "auto" takes the
            latter where one sample alone has weights that are not all equal.
        permutations: Labellings B; the least p-value is 1/(1 + B).
        seed: Of the labellings.
        progress: Show a progress bar.

    Returns:
        W1 of each statistic, its p-value alone and corrected for their number.

    Raises:
        ValueError: If a statistic does not give one finite number an event, there are fewer than
            ten events of a sample, weights do not fit or an option is unknown.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> true, narrow = torch.randn(500, 2, generator=g), 0.7 * torch.randn(500, 2, generator=g)
        >>> radius = {"radius": lambda x: x.norm(dim=1)}
        >>> held_out_statistics(true, narrow, radius, permutations=199).p_value
        0.005
    """
    permutations = check_positive_int(permutations, "permutations")
    names, x = statistic_values(true, statistics, "true events")
    y = statistic_values(generated, statistics, "generated events")[1]
    if x.shape[1] != y.shape[1]:
        raise ValueError(
            f"Expected generated events of {x.shape[1]} columns, as the true ones; got "
            f"{y.shape[1]}."
        )
    a = event_weights(weight_true, len(x), "weight_true")
    b = event_weights(weight_generated, len(y), "weight_generated")
    weighted = bool(np.ptp(a) > 0), bool(np.ptp(b) > 0)
    if not any(weighted):
        # equal weights are none, whatever their scale
        a, b = np.ones(len(x)), np.ones(len(y))
    null = _null(null, weighted, a, b)
    rng = np.random.default_rng(seed)
    values = _distances(np.concatenate([x, y]), a, b, null, permutations, rng, progress)
    own, adjusted = largest_statistic(values)
    spread = np.sqrt(np.average(np.square(x - np.average(x, 0, a)), 0, a))
    table = []
    for k, name in enumerate(names):
        table.append(
            StatisticScore(
                name=name,
                w1=float(values[0, k]),
                spread=float(spread[k]),
                expected=float(np.quantile(values[1:, k], 0.95)),
                mean_true=float(np.average(x[:, k], weights=a)),
                mean_generated=float(np.average(y[:, k], weights=b)),
                p_value=float(own[k]),
                p_adjusted=float(adjusted[k]),
            )
        )
    return StatisticsTest(
        table=tuple(table),
        count=(len(x), len(y)),
        effective_count=(effective_count(a), effective_count(b)),
        null=null,
        permutations=permutations,
        correction="largest statistic",
        left_out=False,
    )


def leave_one_out(
    train: Callable[[dict[str, Callable[[Tensor], Any]]], Any],
    statistics: Statistics,
    true: Any,
    weight_true: Any = None,
    *,
    null: str = "auto",
    permutations: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> StatisticsTest:
    """Judge each statistic of a loss by a training that did not have it.

    Arguments:
        train: Trains a generator with a loss on the statistics given, all but one, and returns
            generated events (M, …), or a pair of them and their weights (M,).
        statistics: At least two functions of events, by name.
        true: True events that take no part in the trainings (N, …).
        weight_true: Event weights (N,).
        null: As of `held_out_statistics`, as are `permutations` and `progress`.
        permutations: Labellings of each statistic.
        seed: Of the labellings.
        progress: Show a progress bar of the trainings.

    Returns:
        One line a statistic, each of another generator; the p-values are corrected by Holm's
        method.

    Raises:
        ValueError: If there are fewer than two statistics, or as of `held_out_statistics`.
    """
    if not isinstance(statistics, Mapping) or len(statistics) < 2:
        raise ValueError(
            "Expected at least two statistics as functions by name, one of which is left out of "
            "each training. With one, train without it and call held_out_statistics."
        )
    seeds = np.random.SeedSequence(seed).generate_state(len(statistics))
    found = []
    with progress_bar(len(statistics), "trainings", progress) as bar:
        for name, own_seed in zip(statistics, seeds, strict=True):
            made = train({k: f for k, f in statistics.items() if k != name})
            events, weight = made if isinstance(made, tuple) else (made, None)
            found.append(
                held_out_statistics(
                    true,
                    events,
                    {name: statistics[name]},
                    weight_true,
                    weight,
                    null=null,
                    permutations=permutations,
                    seed=int(own_seed),
                )
            )
            bar.update(1)
    rows = [result.table[0] for result in found]
    corrected = holm(np.array([row.p_value for row in rows]))
    table = [replace(r, p_adjusted=float(p)) for r, p in zip(rows, corrected, strict=True)]
    return replace(found[0], table=tuple(table), correction="Holm", left_out=True)


def statistic_values(
    events: Any, statistics: Statistics | None, name: str
) -> tuple[list[str], np.ndarray]:
    """Return the names and values (N, K) of statistics of events, in double precision.

    Arguments:
        events: Events (N, …).
        statistics: Functions by name; None takes the columns.
        name: What the events are called in an error.

    Raises:
        ValueError: If there is none, one does not give a finite number for each event, or there are
            fewer than ten events.
    """
    events = as_tensor(events, name)
    if not events.ndim or len(events) < _FEWEST:
        raise ValueError(
            f"Expected at least {_FEWEST} {name}, one a row; got shape {tuple(events.shape)}."
        )
    check_finite(events, name)
    if statistics is None:
        values = events.detach().double().cpu().reshape(len(events), -1).numpy()
        return [f"column {j}" for j in range(values.shape[1])], values
    if not isinstance(statistics, Mapping) or not statistics:
        raise ValueError(
            f"Expected statistics as functions by name; got {statistics!r}. One is written "
            '{"sum": lambda x: x.sum(1)}.'
        )
    columns = []
    for key, function in statistics.items():
        with torch.no_grad():
            value = as_tensor(function(events), f"statistic {key!r}").detach().double().cpu()
        if value.shape not in ((len(events),), (len(events), 1)):
            raise ValueError(
                f"Expected statistic {key!r} of shape ({len(events)},), one number an event; got "
                f"{tuple(value.shape)}."
            )
        check_finite(value, f"statistic {key!r} of {name}")
        columns.append(value.reshape(-1).numpy())
    return [str(k) for k in statistics], np.stack(columns, 1)


def _null(null: str, weighted: tuple[bool, bool], a: np.ndarray, b: np.ndarray) -> str:
    if null not in _NULLS:
        raise ValueError(f"Expected null as one of {', '.join(_NULLS)}; got {null!r}.")
    if null == "auto":
        null = "multiplier" if weighted[0] != weighted[1] else "permutation"
    ratio = a.mean() / b.mean()
    if null == "permutation" and not 1 / _SCALE <= ratio <= _SCALE:
        raise ValueError(
            f"Expected weights of one kind to be permuted; got mean weights in the ratio "
            f'{ratio:.3g}. Bring them to one scale, or set null="multiplier".'
        )
    return null


def _distances(
    values: np.ndarray,
    a: np.ndarray,
    b: np.ndarray,
    null: str,
    permutations: int,
    rng: np.random.Generator,
    progress: bool,
) -> np.ndarray:
    """W1 (1 + B, K) of pooled values (n, K): of the data, and under the null."""
    order = np.argsort(values, axis=0, kind="stable")
    gaps = np.diff(np.take_along_axis(values, order, 0), axis=0)
    weights, n = np.concatenate([a, b]), len(a)
    draws = (
        _permuted(weights, n, permutations, rng)
        if null == "permutation"
        else _multiplied(a, b, permutations, rng)
    )
    found = []
    with progress_bar(1 + permutations, "labellings", progress) as bar:
        for signed, of_x, of_y in draws:
            part = np.empty((len(signed), values.shape[1]))
            for k in range(values.shape[1]):
                rows = order[:, k]
                steps = signed[:, rows]
                if of_x is not None:
                    # F and G at each value, for the deviations of the events from them
                    f = np.cumsum(np.where(rows < n, weights[rows] / a.sum(), 0.0))
                    g = np.cumsum(np.where(rows < n, 0.0, weights[rows] / b.sum()))
                    difference = np.cumsum(steps, 1) - of_x[:, None] * f + of_y[:, None] * g
                else:
                    difference = np.cumsum(steps, 1)
                part[:, k] = np.abs(difference[:, :-1]) @ gaps[:, k]
            found.append(part)
            bar.update(len(signed))
    return np.concatenate(found)


Draws = Iterator[tuple[np.ndarray, Any, Any]]


def _permuted(weights: np.ndarray, n: int, permutations: int, rng: np.random.Generator) -> Draws:
    for label in labellings(len(weights), n, permutations, rng, paired=False):
        first = np.where(label, weights, 0.0)
        second = weights - first
        # a sample of no weight counts as the largest distance
        with np.errstate(invalid="ignore", divide="ignore"):
            signed = first / first.sum(1, keepdims=True) - second / second.sum(1, keepdims=True)
        yield signed, None, None


def _multiplied(a: np.ndarray, b: np.ndarray, permutations: int, rng: np.random.Generator) -> Draws:
    shares = a / a.sum(), b / b.sum()
    yield np.concatenate([shares[0], -shares[1]])[None], np.zeros(1), np.zeros(1)
    # deviations from an estimated F are too small by this factor
    x, y = (s / np.sqrt(max(1 - np.square(s).sum(), 1e-12)) for s in shares)
    size = max(_CHUNK // (len(x) + len(y)), 1)
    for start in range(0, permutations, size):
        rows = min(size, permutations - start)
        first, second = (s * rng.choice([-1.0, 1.0], size=(rows, len(s))) for s in (x, y))
        yield np.concatenate([first, -second], 1), first.sum(1), second.sum(1)
