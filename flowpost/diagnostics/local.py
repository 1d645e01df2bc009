r"""Local coverage: where a posterior fails, by a classifier that may look at the event.

The base coordinates u of true labels are N(0, I_d) *for every event* where the posterior is exact:
independent of anything that is known of the event without its label, its context c. So each event
gets a partner, the same context with u′ ~ N(0, I_d), and no classifier D can tell the two apart.
Its mean out-of-fold log-likelihood above that of a coin,

.. math:: T = \frac{1}{2N} \sum_i \Big[ \ln 2 D(u_i, c_i) + \ln 2 \big(1 - D(u'_i, c_i)\big) \Big],

is on average a lower bound in nats of the Jensen–Shannon divergence of the two, and negative where
there is nothing to be learned. Its null is exact, for any classifier and number of events: within
each pair u and u′ are swapped at random, the pair stays in its fold, all is trained anew, and
p = (1 + #{T_b ≥ T}) / (1 + trials). A run that has seen h trials of T_b ≥ T may stop at the l-th
with p = h/l, which is as exact.

*Where* it fails is asked of one half of the events: a shallow tree of the context, fitted to the
out-of-fold terms of the sum, to u and to its length, proposes regions. In the other half, each
region's sum of the differences ln D/(1 − D) within pairs, for a classifier of the first half, has
its sign flipped pair by pair under the null; its p-value is that of the largest of all regions'
sums in units of their root mean square, so that it holds for all of them together. The worst region
is the one with the largest mean difference, less four standard errors.

Sources: *L-C2ST: Local diagnostics for posterior approximations in simulation-based inference*,
J. Linhart, A. Gramfort, P. Rodrigues, 2023, https://arxiv.org/abs/2306.03580; *Sequential Monte
Carlo p-values*, J. Besag, P. Clifford, 1991, https://doi.org/10.1093/biomet/78.2.301;
*Resampling-based multiple testing*, P. Westfall, S. Young, 1993.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape, require
from .._progress import progress_bar
from .accumulator import as_base
from .coverage import coverage
from .local_result import LocalCoverage, LocalRegion

__all__ = ["local_coverage"]

CLASSIFIERS = ("hist-gradient-boosting", "mlp")
_FEWEST = 200
# sign flips of regions, and values of them at a time
_FLIPS, _ELEMENTS = 9999, 1 << 22
_CLIP = 1e-6
# normal deviates of an event that regions are looked for with, at most
_FAR = 2.5
# χ² of the best of all cuts of a feature
_BEST_CUT = 20.0
# standard errors that a small region has to be worse by than a large one
_CAUTION = 4

_Classifier = str | Callable[[int], Any]


def local_coverage(
    u: Tensor,
    context: Tensor,
    *,
    names: Sequence[str] | None = None,
    classifier: _Classifier = "hist-gradient-boosting",
    trials: int = 200,
    stop: int | None = 20,
    folds: int = 3,
    depth: int = 2,
    smallest: float = 0.05,
    seed: int = 0,
    progress: bool = False,
) -> LocalCoverage:
    """Return whether a posterior is exact for every event, and the regions where it is not.

    Coverage over all events can be right while narrow and wide posteriors make up for each other.
    A classifier finds what depends on the event, as far as it can learn it from N events.

    Arguments:
        u: Base coordinates of the true labels, (N, d) or for d = 1 (N,): `posterior.to_base(z)`.
        context: What is known of each event without its label, (N, F) or (N,): inputs, summaries of
            them, reconstructed labels, or the context of the head. Never the true label.
        names: What the F features are called.
        classifier: `"hist-gradient-boosting"`, `"mlp"`, or a function of a seed that returns
            something with `fit(X, y)` and `predict_proba(X)`, as scikit-learn's classifiers have.
        trials: Trials of the null; the smallest p-value is 1/(trials + 1).
        stop: End as soon as so many trials are above T, as where nothing is wrong; None never.
        folds: Parts of the events, each judged by a classifier of the others.
        depth: Depth of the tree that proposes regions.
        smallest: Smallest share of the events in a region.
        seed: Of partners, folds, swaps and classifiers.
        progress: Show a progress bar.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or there are fewer than 200 events.
        ImportError: If scikit-learn is not installed.
    """
    u = as_base(u).detach().double().cpu()
    context, names = _features(u, context, names)
    trials = check_positive_int(trials, "trials")
    stop = None if stop is None else check_positive_int(stop, "stop")
    folds = check_positive_int(folds, "folds", minimum=2)
    depth = check_positive_int(depth, "depth")
    if not 0 < smallest <= 0.5:
        raise ValueError(f"Expected smallest as a share of at most 0.5; got {smallest!r}.")
    random = np.random.default_rng(seed)
    pairs = _Pairs(u.numpy(), random.standard_normal(u.shape), context.numpy(), classifier, seed)
    statistic, null, p_value = _test(pairs, trials, stop, folds, random, progress)
    regions = _regions(pairs, names, folds, depth, smallest, random)
    label = classifier if isinstance(classifier, str) else type(classifier(seed)).__name__
    return LocalCoverage(
        len(u), names, label, statistic, torch.as_tensor(null), p_value, tuple(regions)
    )


def _features(
    u: Tensor, context: Tensor, names: Sequence[str] | None
) -> tuple[Tensor, tuple[str, ...]]:
    """Features of the context (N, F), checked with the base coordinates, and their names."""
    context = as_tensor(context, "context").detach().double().cpu()
    context = context[:, None] if context.ndim == 1 else context
    check_shape(context, (len(u), "F"), "context", "One row of features for each event.")
    check_finite(u, "base coordinates u")
    check_finite(context, "context")
    if len(u) < _FEWEST:
        raise ValueError(f"Expected at least {_FEWEST} events; got {len(u)}. Give more of them.")
    count = context.shape[1]
    names = tuple(f"c{j}" for j in range(count)) if names is None else tuple(names)
    if len(names) != count or len(set(names)) != count:
        raise ValueError(f"Expected {count} different names of features; got {list(names)}.")
    return context, names


@dataclass(frozen=True, eq=False)
class _Pairs:
    """Events and their partners: base coordinates of labels, those drawn, and contexts."""

    u: np.ndarray
    drawn: np.ndarray
    context: np.ndarray
    classifier: _Classifier
    seed: int

    def swapped(self, swap: np.ndarray) -> _Pairs:
        swap = swap[:, None]
        u, drawn = np.where(swap, self.drawn, self.u), np.where(swap, self.u, self.drawn)
        return replace(self, u=u, drawn=drawn)

    def __getitem__(self, rows: np.ndarray) -> _Pairs:
        return replace(self, u=self.u[rows], drawn=self.drawn[rows], context=self.context[rows])

    def __len__(self) -> int:
        return len(self.u)

    def _inputs(self, u: np.ndarray) -> np.ndarray:
        # a width is one cut in ‖u‖², and many in u
        return np.hstack([u, (u**2).sum(1, keepdims=True), self.context])

    def trained(self) -> Any:
        model = _make(self.classifier, self.seed)
        x = np.vstack([self._inputs(self.u), self._inputs(self.drawn)])
        y = np.repeat([1, 0], len(self))
        with warnings.catch_warnings():
            # networks of few steps on purpose
            warnings.filterwarnings("ignore", message=".*[Mm]aximum iterations.*")
            return model.fit(x, y)

    def log_odds(self, model: Any) -> tuple[np.ndarray, np.ndarray]:
        """ln D/(1 − D) of labels (N,) and of draws (N,), with D inside [1e-6, 1 − 1e-6]."""
        d = (model.predict_proba(self._inputs(v))[:, 1] for v in (self.u, self.drawn))
        first, second = (
            np.log(v / (1 - v)) for v in (p.astype(float).clip(_CLIP, 1 - _CLIP) for p in d)
        )
        return first, second

    def gains(self, fold: np.ndarray) -> np.ndarray:
        """Terms of T (N,), each by a classifier of the other folds."""
        found = np.empty(len(self))
        for k in range(int(fold.max()) + 1):
            own = fold == k
            first, second = self[own].log_odds(self[~own].trained())
            # ln D = −ln(1 + e^−s)
            loss = np.logaddexp(0, -first) + np.logaddexp(0, second)
            found[own] = np.log(2) - loss / 2
        return found


def _make(classifier: _Classifier, seed: int) -> Any:
    if callable(classifier):
        return classifier(seed)
    if classifier not in CLASSIFIERS:
        raise ValueError(
            f"Expected classifier as {', '.join(CLASSIFIERS)} or a function of a seed; got "
            f"{classifier!r}."
        )
    if classifier == "mlp":
        network = require("sklearn.neural_network", "diagnostics").MLPClassifier
        scaler = require("sklearn.preprocessing", "diagnostics").StandardScaler
        join = require("sklearn.pipeline", "diagnostics").make_pipeline
        net = network((32, 32), alpha=1e-3, max_iter=20, learning_rate_init=3e-3, random_state=seed)
        return join(scaler(), net)
    trees = require("sklearn.ensemble", "diagnostics").HistGradientBoostingClassifier
    # no early stopping: it would split pairs
    return trees(
        max_iter=50, max_leaf_nodes=8, min_samples_leaf=20, early_stopping=False, random_state=seed
    )


def _folds(count: int, folds: int, random: np.random.Generator) -> np.ndarray:
    fold = np.empty(count, dtype=int)
    fold[random.permutation(count)] = np.arange(count) % folds
    return fold


def _test(
    pairs: _Pairs,
    trials: int,
    stop: int | None,
    folds: int,
    random: np.random.Generator,
    progress: bool,
) -> tuple[float, np.ndarray, float]:
    """T, those of the trials, and the p-value."""
    fold = _folds(len(pairs), folds, random)
    statistic = float(pairs.gains(fold).mean())
    null: list[float] = []
    above = 0
    with progress_bar(trials, "local coverage", progress) as bar:
        for _ in range(trials):
            swapped = pairs.swapped(random.random(len(pairs)) < 0.5)
            null.append(float(swapped.gains(fold).mean()))
            above += null[-1] >= statistic
            bar.update(1)
            if above == stop:
                return statistic, np.array(null), above / len(null)
    return statistic, np.array(null), (1 + above) / (1 + trials)


def _regions(
    pairs: _Pairs,
    names: tuple[str, ...],
    folds: int,
    depth: int,
    smallest: float,
    random: np.random.Generator,
) -> list[LocalRegion]:
    """Regions that a half of the events proposes, tested by the other, the worst first."""
    tree = require("sklearn.tree", "diagnostics").DecisionTreeRegressor
    half = random.permutation(len(pairs)) < len(pairs) // 2
    first, second = pairs[half], pairs[~half]
    gains = first.gains(_folds(len(first), folds, random))
    least = max(20, round(smallest * len(first)))
    signs = _signs(first, gains)
    # what the best cut of columns that say nothing takes off the variance, with some reserve
    chance = (_BEST_CUT + 2 * signs.shape[1]) / signs.size
    grown = tree(
        max_depth=depth,
        min_samples_leaf=least,
        min_impurity_decrease=chance,
        random_state=pairs.seed,
    )
    # a tree casts to single precision, in which ranks stay apart
    ranks = np.stack([np.unique(c, return_inverse=True)[1] for c in first.context.T], 1)
    grown.fit(ranks, signs)
    digits = {name: _digits(c) for name, c in zip(names, first.context.T, strict=True)}
    nodes = _nodes(grown.tree_, names, ranks, first.context)
    inside = [(b, _inside(second.context, names, b)) for b in nodes]
    found = [(bounds, rows) for bounds, rows in inside if rows.any()]
    odds, partner = second.log_odds(first.trained())
    # its sign flips where a pair is swapped
    terms = (odds - partner)[:, None] * np.stack([rows for _, rows in found], 1)
    p = _largest_sums(terms, random)
    regions = []
    for i, (bounds, rows) in enumerate(found):
        count = int(rows.sum())
        error = float(np.sqrt((terms[:, i] ** 2).sum())) / count
        part = coverage(torch.as_tensor(second.u[rows]))
        share, mean = count / len(second), float(terms[:, i].sum()) / count
        shown = {name: digits[name] for name in bounds}
        regions.append(LocalRegion(bounds, count, share, float(p[i]), mean, error, part, shown))
    return sorted(regions, key=lambda r: _CAUTION * r.error - r.difference)


def _signs(pairs: _Pairs, gains: np.ndarray) -> np.ndarray:
    """What a region may differ in (N, d + 2): gains, each coordinate, and ‖u‖² as a normal."""
    d = pairs.u.shape[1]
    # the cube root of χ² over d is about normal (E. Wilson, M. Hilferty, 1931)
    root = np.cbrt((pairs.u**2).sum(1) / d)
    radius = (root - 1 + 2 / (9 * d)) / np.sqrt(2 / (9 * d))
    columns = [gains / max(gains.std(), 1e-12), *pairs.u.T, radius]
    # outliers would take all cuts
    return np.stack(columns, 1).clip(-_FAR, _FAR)


def _largest_sums(terms: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """p-value of each column (N, K) of terms of random sign, for all columns together."""
    scale = np.sqrt((terms**2).sum(0)).clip(1e-300)
    sums = terms.sum(0) / scale
    above = np.zeros(len(sums))
    size = max(1, _ELEMENTS // len(terms))
    for start in range(0, _FLIPS, size):
        count = min(size, _FLIPS - start)
        signs = 2.0 * random.integers(0, 2, (count, len(terms))) - 1
        above += ((signs @ terms / scale).max(1)[:, None] >= sums).sum(0)
    return (1 + above) / (1 + _FLIPS)


def _digits(values: np.ndarray) -> int:
    """Significant digits of numbers of which a thousandth of their range matters."""
    span, most = float(np.ptp(values)), float(np.abs(values).max())
    return 4 if span == 0 else max(4, math.floor(math.log10(most / span)) + 4)


def _nodes(
    tree: Any, names: tuple[str, ...], ranks: np.ndarray, context: np.ndarray
) -> Iterator[dict[str, tuple[float, float]]]:
    """Bounds of every node of a tree of the ranks of features, halfway between its events."""
    waiting: list[tuple[int, dict[str, tuple[float, float]], np.ndarray]]
    waiting = [(0, {}, np.arange(len(ranks)))]
    while waiting:
        node, bounds, rows = waiting.pop()
        yield bounds
        if tree.children_left[node] < 0:
            continue
        column = int(tree.feature[node])
        below = ranks[rows, column] <= tree.threshold[node]
        name, left, right = names[column], rows[below], rows[~below]
        cut = float(context[left, column].max() / 2 + context[right, column].min() / 2)
        low, high = bounds.get(name, (-np.inf, np.inf))
        waiting.append((int(tree.children_left[node]), {**bounds, name: (low, cut)}, left))
        waiting.append((int(tree.children_right[node]), {**bounds, name: (cut, high)}, right))


def _inside(
    context: np.ndarray, names: tuple[str, ...], bounds: dict[str, tuple[float, float]]
) -> np.ndarray:
    inside = np.ones(len(context), dtype=bool)
    for name, (low, high) in bounds.items():
        column = context[:, names.index(name)]
        inside &= (column > low) & (column <= high)
    return inside
