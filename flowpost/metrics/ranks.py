r"""Area under the ROC curve, its permutations and its bootstrap.

With event weights normalised in each sample, a_i of the first and b_j of the second, scores s_i and
t_j,

.. math:: A = \sum_{ij} a_i b_j \left( 1[s_i > t_j] + \tfrac12 1[s_i = t_j] \right), \qquad
          V = \sum_i a_i^2 (F_i - A)^2 + \sum_j b_j^2 (G_j - A)^2,

with F_i the share of the second sample below s_i and G_j that of the first above t_j, is the area
with DeLong's variance of it. The statistic of the test is :math:`T = (A - 1/2) / \sqrt V`, computed
anew for each permutation of the labels of the events, which keep their weights; of several
classifiers, the largest. One permutation is that of the data, so

.. math:: p = \frac{1 + \#\{b: T_b \ge T\}}{1 + B}

is at most α with probability at most α, whatever was trained on other events, if events *with*
their weights are exchangeable between the samples. Where weights depend on the sample, only the
weighted distributions agree under the null; the division by V makes T standard normal both of
the data and of the permutations, so that p is right for large samples.

References:
    Comparing the Areas under Two or More Correlated Receiver Operating Characteristic Curves
    (E. DeLong, D. DeLong, D. Clarke-Pearson, 1988) https://doi.org/10.2307/2531595

    Permutation P-values Should Never Be Zero (B. Phipson, G. Smyth, 2010)
    https://doi.org/10.2202/1544-6115.1585

    Exact and asymptotically robust permutation tests (E. Chung, J. Romano, 2013)
    https://doi.org/10.1214/13-AOS1090
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from .._checks import as_tensor, check_finite, check_shape
from .divergence import checked_weights

__all__ = [
    "RankTest",
    "auc",
    "effective_count",
    "event_weights",
    "labellings",
    "permutation_pvalues",
]

_CHUNK = 1 << 21
# T and T_b that are equal in exact arithmetic differ by rounding
_ROUNDING = 1e-9
# variance of an AUC that rounding leaves of 0
_LEAST = 1e-12


class RankTest:
    """Scores of n events in their order, asked for A and T under many labellings at once.

    Arguments:
        scores: Scores (n,).
        paired: Whether event i of the first half and of the second half belong together: their
            contributions to V are added before they are squared.
    """

    def __init__(self, scores: np.ndarray, paired: bool = False) -> None:
        self.order = np.argsort(scores, kind="stable")
        ranked = scores[self.order]
        self.left = np.searchsorted(ranked, ranked, "left")
        self.right = np.searchsorted(ranked, ranked, "right")
        self.ties = bool((self.right - self.left > 1).any())
        self.paired = paired

    def __call__(self, first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return A and T, each (B,).

        Arguments:
            first: Weights in the first sample (B, n), 0 for events that are not in it.
            second: Weights in the second sample (B, n).
        """
        a, b = (w[:, self.order] / w.sum(1, keepdims=True) for w in (first, second))
        below, above = self._below(b), 1 - self._below(a)
        area = np.einsum("ij,ij->i", a, below)
        part = a * (below - area[:, None]) + b * (above - area[:, None])
        if self.paired:
            events = np.empty_like(part)
            events[:, self.order] = part
            half = part.shape[1] // 2
            part = events[:, :half] + events[:, half:]
        variance = np.einsum("ij,ij->i", part, part)
        return area, (area - 0.5) / np.sqrt(np.maximum(variance, _LEAST))

    def _below(self, weight: np.ndarray) -> np.ndarray:
        # share of the weight (B, n) below each event, half of that of equal scores
        total = np.cumsum(weight, axis=1)
        if not self.ties:
            return total - weight / 2
        padded = np.concatenate([np.zeros_like(total[:, :1]), total], axis=1)
        return (padded[:, self.left] + padded[:, self.right]) / 2


def auc(score_x: Any, score_y: Any, weight_x: Any = None, weight_y: Any = None) -> float:
    """Return the weighted probability that x scores above y, ties counting half.

    Arguments:
        score_x: Scores of the first sample (N,).
        score_y: Scores of the second sample (M,).
        weight_x: Event weights (N,) of the first sample.
        weight_y: Event weights (M,) of the second sample.

    Raises:
        ValueError: If a sample is empty, a value is not finite, or shapes do not fit.

    Example:
        >>> round(auc([0.1, 0.7, 0.9], [0.2, 0.7]), 4)
        0.5833
    """
    scores, weights = [], []
    for name, score, weight in (("x", score_x, weight_x), ("y", score_y, weight_y)):
        s = as_tensor(score, f"score_{name}").detach().double().cpu()
        check_shape(s, ("N",), f"score_{name}", "One score an event.")
        check_finite(s, f"score_{name}")
        weights.append(event_weights(weight, len(s), f"weight_{name}"))
        scores.append(s.numpy())
    (n, m), (a, b) = map(len, scores), weights
    first, second = np.concatenate([a, np.zeros(m)]), np.concatenate([np.zeros(n), b])
    return float(RankTest(np.concatenate(scores))(first[None], second[None])[0][0])


def event_weights(weight: Any, count: int, name: str) -> np.ndarray:
    """Return weights (N,), ones where there are none.

    Raises:
        ValueError: If the shape differs, one is negative or not finite, or all are zero.
    """
    if weight is None:
        if not count:
            raise ValueError("Expected at least one event of each sample; got none.")
        return np.ones(count)
    w = as_tensor(weight, name).detach().double().cpu()
    remedy = "Negative weights have no meaning here: reweight the events to positive ones first."
    return checked_weights(w, count, name, remedy).numpy()


def effective_count(weight: np.ndarray) -> float:
    """Return how many unweighted events weights (N,) are worth, (Σ w)² / Σ w²."""
    return float(weight.sum() ** 2 / np.square(weight).sum())


def permutation_pvalues(
    tests: list[RankTest],
    weights: np.ndarray,
    count_x: int,
    permutations: int,
    rng: np.random.Generator,
    paired: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return T of the data (K,), their own p-values (K,), and those of the largest T (K,).

    The last are corrected for the choice of the largest among K; the smallest of them is the
    p-value of that choice.

    Arguments:
        tests: One of each classifier, of the same n events, those of the first sample first.
        weights: Event weights (n,).
        count_x: Events of the first sample.
        permutations: B.
        rng: Source of the permutations.
        paired: Exchange labels within pairs alone.
    """
    found = np.full(len(tests), np.nan)
    own, largest = np.ones(len(tests)), np.ones(len(tests))
    for k, label in enumerate(labellings(len(weights), count_x, permutations, rng, paired)):
        first = np.where(label, weights, 0.0)
        with np.errstate(invalid="ignore", divide="ignore"):
            values = np.stack([t(first, weights - first)[1] for t in tests], 1)
        # a group of no weight separates nothing
        values = np.where(np.isnan(values), -np.inf, values)
        if not k:
            found, values = values[0], values[1:]
        bound = found - _ROUNDING * (1 + np.abs(found))
        own += (values >= bound).sum(0)
        largest += (values.max(1)[:, None] >= bound).sum(0)
    return found, own / (1 + permutations), largest / (1 + permutations)


def labellings(
    n: int, count_x: int, permutations: int, rng: np.random.Generator, paired: bool
) -> Iterator[np.ndarray]:
    """Which events are in the first sample (b, n), those of the data first.

    Arguments:
        n: Events of both samples, those of the first before the others.
        count_x: Events of the first.
        permutations: Labellings beside that of the data; they come in blocks.
        rng: Source of them.
        paired: Exchange events i and count_x + i alone.
    """
    given = np.arange(n) < count_x
    size = max(_CHUNK // n, 2)
    for start in range(0, permutations + 1, size):
        rows = min(size, permutations + 1 - start)
        label = np.tile(given, (rows, 1))
        if paired:
            swap = rng.random((rows, count_x)) < 0.5
            label = label ^ np.concatenate([swap, swap], axis=1)
        else:
            label = rng.permuted(label, axis=1)
        if not start:
            label[0] = given
        yield label
