r"""Correlations of statistics of generated events against those of true ones.

For statistics :math:`T_j` standardised in each sample, with normalised weights a_i, the correlation
and its variance are

.. math:: r_{jk} = \sum_i a_i T_{ij} T_{ik}, \qquad V_{jk} = \sum_i a_i^2 \Big( T_{ij} T_{ik}
          - \tfrac12 r_{jk} (T_{ij}^2 + T_{ik}^2) \Big)^2 ,

whatever the distribution. The statistic of a pair is the difference of the two samples over its
error, computed anew for each permutation of the labels. If all distributions agree that is exact;
if only the correlations do (other widths, event weights of one sample), the division by the error
makes it right for large samples. The largest of all pairs is what the matrix as a whole is judged
by.

Correlations of heavy-tailed statistics hang on a few events. Ranks among the pooled events, one
monotone map for both samples, do not: Spearman's correlation where the distributions agree.

Reference:
    Robust Permutation Tests for Correlation and Regression Coefficients (C. DiCiccio, J. Romano,
    2017) https://doi.org/10.1080/01621459.2016.1202117
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import check_positive_int
from .._progress import progress_bar
from .multiple import largest_statistic
from .ranks import event_weights, labellings
from .statistics import Statistics, statistic_values

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CorrelationTest", "compare_correlations"]

_ALARM = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class CorrelationTest:
    """Correlation matrices of statistics of true and of generated events.

    Attributes:
        names: Names of the K statistics.
        true: Correlations of true events (K, K).
        generated: Correlations of generated events (K, K).
        error: Standard deviation of their difference over bootstraps of both samples (K, K).
        p_values: P-value of each pair alone (K, K), 1 on the diagonal.
        p_adjusted: The same, corrected for the number of pairs.
        count: True and generated events.
        ranks: Whether they are correlations of pooled ranks.
        permutations: B.
    """

    names: tuple[str, ...]
    true: np.ndarray
    generated: np.ndarray
    error: np.ndarray
    p_values: np.ndarray
    p_adjusted: np.ndarray
    count: tuple[int, int]
    ranks: bool
    permutations: int

    @property
    def difference(self) -> np.ndarray:
        """Correlations of generated events less those of true ones (K, K)."""
        return self.generated - self.true

    @property
    def p_value(self) -> float:
        """P-value of all pairs: the smallest corrected one."""
        return float(self.p_adjusted.min())

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 %."""
        first, second = np.triu_indices(len(self.names), 1)
        low = self.p_adjusted[first, second]
        if low.min() > _ALARM:
            return f"no correlation differs at 1 % (p = {self.p_value:.3g} for all pairs)"
        off = [
            f"({self.names[j]}, {self.names[k]})"
            for j, k, p in zip(first, second, low, strict=True)
            if p <= _ALARM
        ]
        shown = ", ".join(off[:5]) + (f" and {len(off) - 5} more" if len(off) > 5 else "")
        return f"correlations differ: {shown} (p = {self.p_value:.3g} for all pairs)"

    def __str__(self) -> str:
        n, m = self.count
        kind = "pooled ranks of " if self.ranks else ""
        wide = max(9, *(len(a) + len(b) + 2 for a in self.names for b in self.names))
        lines = [
            f"Correlations of {kind}{len(self.names)} statistics, {n} true and {m} generated "
            "events",
            f"  {'':{wide}}    true  generated  difference  ± boot        p   for all",
        ]
        for j, k in zip(*np.triu_indices(len(self.names), 1), strict=True):
            lines.append(
                f"  {self.names[j] + ', ' + self.names[k]:{wide}}  {self.true[j, k]:6.3f}  "
                f"{self.generated[j, k]:9.3f}  {self.difference[j, k]:10.3f}  "
                f"{self.error[j, k]:6.3f}  {self.p_values[j, k]:7.3g}   "
                f"{self.p_adjusted[j, k]:7.3g}"
            )
        lines.append(f"  => {self.verdict()}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return f"CorrelationTest(statistics={len(self.names)}, p_value={self.p_value:.3g})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the differences, with their errors in each cell."""
        from ..plots.generative import plot_correlations

        return plot_correlations(self, ax)


def compare_correlations(
    true: Any,
    generated: Any,
    statistics: Statistics | None = None,
    weight_true: Any = None,
    weight_generated: Any = None,
    *,
    ranks: bool = False,
    permutations: int = 1000,
    bootstraps: int = 200,
    seed: int = 0,
    progress: bool = False,
) -> CorrelationTest:
    """Compare the correlations of statistics of true and of generated events.

    Arguments:
        true: True events that trained nothing (N, …).
        generated: Generated events (M, …).
        statistics: At least two functions of events to values (N,), by name; None takes the columns
            of events (N, D).
        weight_true: Event weights (N,), at least 0.
        weight_generated: Event weights (M,).
        ranks: Correlate ranks among the pooled events: for heavy tails.
        permutations: Labellings B; the least p-value is 1/(1 + B).
        bootstraps: Of both samples, for the errors.
        seed: Of labellings and bootstraps.
        progress: Show a progress bar.

    Returns:
        The two matrices, errors and p-values of their difference.

    Raises:
        ValueError: If there are fewer than two statistics, one is constant, or they or the weights
            do not fit.

    Example:
        >>> import torch
        >>> g = torch.Generator().manual_seed(0)
        >>> true = torch.randn(500, 2, generator=g)
        >>> mixed = torch.stack([true[:, 0], true.sum(1)], 1)
        >>> round(float(compare_correlations(true, mixed, permutations=99).difference[0, 1]), 1)
        0.7
    """
    permutations = check_positive_int(permutations, "permutations")
    check_positive_int(bootstraps, "bootstraps", minimum=2)
    names, x = statistic_values(true, statistics, "true events")
    y = statistic_values(generated, statistics, "generated events")[1]
    if x.shape[1] != y.shape[1] or len(names) < 2:
        raise ValueError(
            f"Expected at least two statistics of both samples; got {x.shape[1]} of true and "
            f"{y.shape[1]} of generated events."
        )
    a = event_weights(weight_true, len(x), "weight_true")
    b = event_weights(weight_generated, len(y), "weight_generated")
    values = _standardised(np.concatenate([x, y]), len(x), names, ranks)
    # the scale is of no meaning, but permutations mix the weights
    weights = np.concatenate([a / a.mean(), b / b.mean()])
    rng = np.random.default_rng(seed)
    pairs = np.triu_indices(len(names), 1)
    found = []
    with progress_bar(1 + permutations + bootstraps, "correlations", progress) as bar:
        for block in labellings(len(values), len(x), permutations, rng, paired=False):
            for label in block:
                found.append(_studentised(values, weights, label)[pairs])
            bar.update(len(block))
        own, adjusted = largest_statistic(np.stack(found))
        n = len(x)
        drawn = []
        for _ in range(bootstraps):
            rows = rng.integers(n, size=n), n + rng.integers(len(y), size=len(y))
            r = [_correlations(values[i], weights[i])[0] for i in rows]
            drawn.append(r[1] - r[0])
            bar.update(1)
    return CorrelationTest(
        names=tuple(names),
        true=_correlations(values[:n], weights[:n])[0],
        generated=_correlations(values[n:], weights[n:])[0],
        error=np.nanstd(drawn, axis=0, ddof=1),
        p_values=_matrix(own, pairs, len(names)),
        p_adjusted=_matrix(adjusted, pairs, len(names)),
        count=(len(x), len(y)),
        ranks=ranks,
        permutations=permutations,
    )


def _standardised(values: np.ndarray, n: int, names: list[str], ranks: bool) -> np.ndarray:
    for part, which in ((values[:n], "true"), (values[n:], "generated")):
        for k, name in enumerate(names):
            if np.ptp(part[:, k]) == 0:
                raise ValueError(
                    f"Expected statistics that vary; got {name!r} equal for all {which} events. "
                    "Leave it out."
                )
    if ranks:
        from scipy.stats import rankdata

        values = rankdata(values, axis=0)
    return (values - values.mean(0)) / values.std(0)


def _correlations(values: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Correlations (K, K) and their variances."""
    with np.errstate(invalid="ignore", divide="ignore"):
        share = weight / weight.sum()
        centred = values - share @ values
        z = centred / np.sqrt(share @ np.square(centred))
        r = z.T @ (z * share[:, None])
        square, squared_share = np.square(z), np.square(share)[:, None]
        fourth = square.T @ (square * squared_share)
        third = (square * z).T @ (z * squared_share)
        ends = np.add.outer(np.diag(fourth), np.diag(fourth))
        variance = fourth - r * (third + third.T) + np.square(r) / 4 * (ends + 2 * fourth)
    return r, variance


def _studentised(values: np.ndarray, weights: np.ndarray, label: np.ndarray) -> np.ndarray:
    (r, v), (s, w) = (_correlations(values[rows], weights[rows]) for rows in (label, ~label))
    scale = np.sqrt(np.maximum(v + w, 1e-24))
    return np.asarray(np.abs(s - r) / scale)


def _matrix(values: np.ndarray, pairs: Any, size: int) -> np.ndarray:
    matrix = np.ones((size, size))
    matrix[pairs] = values
    return np.minimum(matrix, matrix.T)
