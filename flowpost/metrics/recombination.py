r"""Recombination of independent components: n events give n^k combinations of their k parts.

If an event consists of components that do not depend on each other, any component of one event
beside those of others is an event of the same truth. Tail shares become averages over pairings,

.. math:: \hat P = \frac{1}{n^k} \sum_{i_1 \ldots i_k} 1[ S(a_{i_1}, b_{i_2}, \ldots) > s ] ,

whose variance is, to first order in 1/n, that of the means given one component each,

.. math:: \mathrm{Var}\, \hat P \approx \frac{1}{n} \sum_c \mathrm{Var}\, \mathbb{E}[ 1[S > s] |
          \text{component } c ] \le \frac{P (1 - P)}{n} .

So n^k events are worth P(1 − P)/Var of them, some times n at best: they share their components.
Bootstraps of the n events, which take each with all its components, measure it.

What is kept: everything within a component, correlations of its columns included. What is lost:
every dependence between components. Before that is done, it has to be looked for:
`independence_test` compares the distance correlation, 0 only for independent components, with that
of permuted ones. Component c is tested against all before it at once, so that together the tests
are of mutual independence.

References:
    A Class of Statistics with Asymptotically Normal Distribution (W. Hoeffding, 1948)
    https://doi.org/10.1214/aoms/1177730196

    Measuring and testing dependence by correlation of distances (G. Székely, M. Rizzo, N. Bakirov,
    2007) https://arxiv.org/abs/0803.4101
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from operator import index
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from .._progress import progress_bar
from .energy import distance_correlation
from .multiple import holm
from .recombination_result import Independence, Recombination, TailGain
from .tail_shares import share_beyond, tail_values

__all__ = ["independence_test", "recombine"]

_FEWEST = 20
_ALL = 1_000_000


def recombine(
    events: Any,
    components: Sequence[Any],
    count: int | None = None,
    *,
    thresholds: Any = None,
    statistic: Callable[[Tensor], Any] | None = None,
    permutations: int = 199,
    bootstraps: int = 200,
    max_events: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Recombination:
    """Pair the components of events anew, after a test that they are independent.

    Arguments:
        events: Events (N, D), without event weights.
        components: Columns of each component, at least two: [[0, 1], [2]]; a column may be written
            as a number. Together they are all columns, each once.
        count: Combinations drawn at random; by default all N^k, or 10⁶ where there are more.
        thresholds: Thresholds of the statistic, at which the gain is measured.
        statistic: S, a function of events (N, D) to values (N,). Without it, nothing is measured.
        permutations: Of the test of independence; the least p-value is 1/(1 + permutations).
        bootstraps: Of the events, for the errors of shares.
        max_events: Of the test of independence: more are left out, since pairs of events are held.
        seed: Of combinations, permutations and bootstraps.
        progress: Show a progress bar of permutations.

    Returns:
        The combinations, with what they gain and lose; print it.

    Raises:
        ValueError: If components do not divide the columns, there are fewer than 20 events or a
            value is not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x = torch.randn(100, 2, generator=g)
        >>> made = recombine(x, [0, 1], permutations=99)
        >>> made.events.shape, made.independence.p_value > 0.01
        (torch.Size([10000, 2]), True)
    """
    x = _checked(events)
    groups = _groups(components, x.shape[1])
    rng = np.random.default_rng(seed)
    independence = independence_test(
        x,
        groups,
        permutations=permutations,
        max_events=max_events,
        seed=int(rng.integers(2**31)),
        progress=progress,
    )
    rows = _pairings(len(x), len(groups), count, rng)
    made = x.new_empty(len(rows), x.shape[1])
    for k, group in enumerate(groups):
        made[:, group] = x[torch.as_tensor(rows[:, k], device=x.device)][:, group]
    gains: tuple[TailGain, ...] = ()
    if thresholds is not None:
        if statistic is None:
            raise ValueError("Expected a statistic of events beside thresholds; got none.")
        at = as_tensor(thresholds, "thresholds").double().reshape(-1)
        check_finite(at, "thresholds")
        values = (
            tail_values(x, "events", statistic),
            tail_values(made, "combinations", statistic),
        )
        gains = _gains(values, rows, at.cpu().numpy(), len(groups), bootstraps, rng)
    return Recombination(
        events=made,
        independence=independence,
        gains=gains,
        components=tuple(tuple(g) for g in groups),
        count=len(x),
        possible=float(len(x)) ** len(groups),
    )


def independence_test(
    events: Any,
    components: Sequence[Any],
    *,
    permutations: int = 199,
    max_events: int = 1000,
    seed: int = 0,
    progress: bool = False,
) -> Independence:
    """Test whether components of events are independent, by distance correlation.

    Arguments:
        events: Events (N, D).
        components: Columns of each component.
        permutations: B; the p-values are exact.
        max_events: Events taken, drawn at random where there are more.
        seed: Of these and of the permutations.
        progress: Show a progress bar.

    Raises:
        ValueError: As of `recombine`.
    """
    permutations = check_positive_int(permutations, "permutations")
    x = _checked(events)
    groups = _groups(components, x.shape[1])
    rng = np.random.default_rng(seed)
    if len(x) > check_positive_int(max_events, "max_events", minimum=_FEWEST):
        x = x[torch.as_tensor(rng.permutation(len(x))[:max_events], device=x.device)]
    x = x.double()
    spread = x.std(0)
    x = (x - x.mean(0)) / torch.where(spread > 0, spread, 1.0)
    correlation, p = [], []
    with progress_bar(permutations * (len(groups) - 1), "permutations", progress) as bar:
        for k in range(1, len(groups)):
            before = [c for group in groups[:k] for c in group]
            one, two = x[:, groups[k]], x[:, before]
            correlation.append(float(distance_correlation(one, two)))
            p.append(_permuted(_centred(one), _centred(two), permutations, rng, bar))
    return Independence(
        correlation=tuple(correlation),
        p_values=tuple(p),
        p_adjusted=tuple(float(v) for v in holm(np.array(p))),
        components=tuple(tuple(g) for g in groups),
        count=len(x),
        permutations=permutations,
    )


def _checked(events: Any) -> Tensor:
    x = as_tensor(events, "events").detach()
    if x.ndim != 2 or len(x) < _FEWEST:
        raise ValueError(
            f"Expected at least {_FEWEST} events of shape (N, D); got {tuple(x.shape)}."
        )
    check_finite(x, "events")
    return x


def _groups(components: Sequence[Any], columns: int) -> list[list[int]]:
    try:
        groups = [_whole(component) for component in components]
    except TypeError:
        raise ValueError(
            f"Expected components as columns of each, whole numbers; got {components!r}. Two of "
            "three columns are [[0, 1], [2]]."
        ) from None
    if len(groups) < 2 or sorted(i for g in groups for i in g) != list(range(columns)):
        raise ValueError(
            f"Expected at least two components that have each of {columns} columns once; got "
            f"{groups}. Two of three columns are [[0, 1], [2]]."
        )
    return groups


def _whole(component: Any) -> list[int]:
    try:
        return [index(component)]
    except TypeError:
        return [index(column) for column in component]


def _pairings(n: int, k: int, count: int | None, rng: np.random.Generator) -> np.ndarray:
    """Which event each component comes from (M, k)."""
    if count is None and float(n) ** k <= _ALL:
        return np.stack([i.reshape(-1) for i in np.indices((n,) * k)], 1)
    size = _ALL if count is None else check_positive_int(count, "count")
    return rng.integers(n, size=(size, k))


def _centred(x: Tensor) -> Tensor:
    """Distances (N, N) less the means of rows and columns."""
    distance = torch.cdist(x, x, compute_mode="donot_use_mm_for_euclid_dist")
    mean = distance.mean(0)
    return distance - mean - mean[:, None] + mean.mean()


def _permuted(a: Tensor, b: Tensor, permutations: int, rng: np.random.Generator, bar: Any) -> float:
    found = float((a * b).sum())
    rounding = 1e-9 * float(a.norm() * b.norm())
    above = 0
    for _ in range(permutations):
        order = torch.as_tensor(rng.permutation(len(a)), device=a.device)
        above += float((a[order][:, order] * b).sum()) >= found - rounding
        bar.update(1)
    return (1 + above) / (1 + permutations)


def _gains(
    values: tuple[np.ndarray, np.ndarray],
    rows: np.ndarray,
    at: np.ndarray,
    k: int,
    bootstraps: int,
    rng: np.random.Generator,
) -> tuple[TailGain, ...]:
    """Shares beyond thresholds of events and of combinations, and their errors."""
    check_positive_int(bootstraps, "bootstraps", minimum=2)
    n, m = len(values[0]), len(values[1])
    plain, spread = share_beyond(values[0], np.ones(n), at)
    paired, _ = share_beyond(values[1], np.ones(m), at)
    above = [np.flatnonzero(values[1] > s) for s in at]
    drawn = np.empty((bootstraps, len(at)))
    for share in drawn:
        times = rng.multinomial(n, np.full(n, 1 / n)).astype(float)
        weight = np.ones(m)
        for c in range(k):
            weight *= times[rows[:, c]]
        share[:] = [weight[i].sum() for i in above]
        share /= weight.sum()
    variance = drawn.var(0, ddof=1)
    if m < float(n) ** k:
        # of the combinations that were drawn among all
        variance += paired * (1 - paired) / m
    return tuple(
        TailGain(
            threshold=float(at[j]),
            share=float(plain[j]),
            error=float(np.sqrt(spread[j])),
            recombined=float(paired[j]),
            recombined_error=float(np.sqrt(variance[j])),
        )
        for j in range(len(at))
    )
