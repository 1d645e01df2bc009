r"""Cross table: classifiers of two event types, of generated or true events, tested on both.

A generator of two types of events A and B that is good enough to train on gives a classifier which
separates *true* events as well as one trained on true events does,

.. math:: D = \mathrm{AUC}(\text{trained on generated; true test events})
          - \mathrm{AUC}(\text{trained on true; true test events}) \approx 0 .

The four areas of the table tell two failures apart: generated types that are easier to separate
than true ones raise the area on generated test events; generated types without a property that
separates true ones lower that on true test events.

The p-value of D is by permutation: "true" and "generated" are exchanged among the training events,
within each type, and both classifiers trained again, as often as there are permutations; test
events are not touched. Exact if generated events are fresh true ones, for any classifier.

Reference:
    Permutation P-values Should Never Be Zero (B. Phipson, G. Smyth, 2010)
    https://doi.org/10.2202/1544-6115.1585
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import TYPE_CHECKING, Any

import numpy as np

from .._checks import as_tensor, check_finite, check_positive_int
from .._progress import progress_bar
from .learners import named_classifiers, train
from .ranks import RankTest

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CrossTable", "cross_table"]

_ALARM = 0.01
_FEWEST = 50
_BOOTSTRAPS = 200
_KINDS = ("true", "generated")

Pair = tuple[np.ndarray, np.ndarray]


@dataclass(frozen=True, eq=False, repr=False)
class CrossTable:
    """Result of `cross_table`; rows are what was trained on, columns what was tested on.

    Both are in the order true, generated.

    Attributes:
        auc: Areas under the ROC curve (2, 2) of type A against type B.
        error: Standard deviations of the areas over bootstraps of the test events and trainings
            on bootstraps of the training events (2, 2).
        loss: Area on true test events when trained on generated ones, less that when trained on
            true ones: below 0 where generated events teach less.
        loss_error: Its standard deviation; the test events are the same.
        p_value: P-value of the loss, two-sided; NaN without permutations.
        classifier: Name of the classifier.
        count: Training and test events of (true A, true B, generated A, generated B).
        permutations: B.
    """

    auc: np.ndarray
    error: np.ndarray
    loss: float
    loss_error: float
    p_value: float
    classifier: str
    count: tuple[tuple[int, int], ...]
    permutations: int

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 %."""
        text = f"{self.loss:+.4f} ± {self.loss_error:.4f} in AUC on true events"
        if math.isnan(self.p_value):
            return f"training on generated events changes {text} (not tested)"
        if _ALARM < self.p_value <= 1.5 / (1 + self.permutations):
            return (
                f"{text} (p = {self.p_value:.3g}, the least that {self.permutations} permutations "
                "can say: take more)"
            )
        if self.p_value > _ALARM:
            return f"no loss by training on generated events: {text} (p = {self.p_value:.3g})"
        worse = "worse" if self.loss < 0 else "better"
        return f"generated events train a {worse} classifier: {text} (p = {self.p_value:.3g})"

    def __str__(self) -> str:
        lines = [
            f"AUC of two event types by {self.classifier}",
            f"  {'trained on':12}  tested on true      tested on generated",
        ]
        for k, kind in enumerate(_KINDS):
            cells = [f"{self.auc[k, j]:.4f} ± {self.error[k, j]:.4f}" for j in (0, 1)]
            lines.append(f"  {kind:12}  {cells[0]:18}  {cells[1]}")
        return "\n".join([*lines, f"  => {self.verdict()}"])

    def __repr__(self) -> str:
        return f"CrossTable(loss={self.loss:.4f}, p_value={self.p_value:.3g})"

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the four areas with their errors."""
        from ..plots.generative import plot_cross_table

        return plot_cross_table(self, ax)


def cross_table(
    true: tuple[Any, Any],
    generated: tuple[Any, Any],
    *,
    classifier: Any = "boosting",
    test: float = 0.5,
    permutations: int = 99,
    retrainings: int = 5,
    seed: int = 0,
    progress: bool = False,
) -> CrossTable:
    """Train classifiers of two event types on true and on generated events, and test on both.

    Needs `flowpost[diagnostics]`. The classifier is trained 2 · (1 + retrainings + permutations)
    times.

    Arguments:
        true: True events of type A (N, …) and of type B (N', …), without event weights.
        generated: Generated events of type A and of type B, about as many: fewer teach less.
        classifier: "logistic", "quadratic", "boosting", "mlp", or an estimator of scikit-learn's
            interface.
        test: Share of the events that is tested on.
        permutations: B; the least p-value is 1/(1 + B). 0 for none.
        retrainings: On bootstraps of the training events, for the errors; at least 2.
        seed: Of splits, trainings, bootstraps and permutations.
        progress: Show a progress bar over trainings.

    Raises:
        ValueError: If there are fewer than 50 events of a type, columns differ, or a value is not
            finite.
        ImportError: If scikit-learn is not installed.
    """
    makers = named_classifiers(classifier)
    if len(makers) != 1:
        raise ValueError(f"Expected one classifier; got {', '.join(makers)}. Call once for each.")
    name, make = next(iter(makers.items()))
    permutations = check_positive_int(permutations, "permutations", minimum=0)
    check_positive_int(retrainings, "retrainings", minimum=2)
    if not isinstance(test, Real) or not 0 < test < 1:
        raise ValueError(f"Expected test as a share between 0 and 1; got {test!r}.")
    samples = [_types(pair, kind) for pair, kind in zip((true, generated), _KINDS, strict=True)]
    if len({part.shape[1] for pair in samples for part in pair}) > 1:
        raise ValueError("Expected as many columns of all events; got different numbers.")
    rng, own_seed = np.random.default_rng(seed), int(np.random.default_rng(seed).integers(2**31))
    trained, tested = _split(samples, test, rng)
    job = _Job(make, own_seed, [_Test(pair) for pair in tested])
    with progress_bar(2 * (1 + retrainings + permutations), "trainings", progress) as bar:
        first = job.run(trained, bar)
        spread = _spread(job, trained, first, retrainings, rng, bar)
        loss = first[1][0].area - first[0][0].area
        above = 0
        for _ in range(permutations):
            found = job.run(_exchanged(trained, rng), bar, only_true=True)
            above += abs(found[1][0].area - found[0][0].area) >= abs(loss) - 1e-9
    return CrossTable(
        auc=np.array([[score.area for score in row] for row in first]),
        error=spread[0],
        loss=loss,
        loss_error=spread[1],
        p_value=(1 + above) / (1 + permutations) if permutations else math.nan,
        classifier=name,
        count=tuple(
            (len(a), len(b))
            for one, two in zip(trained, tested, strict=True)
            for a, b in zip(one, two, strict=True)
        ),
        permutations=permutations,
    )


@dataclass(frozen=True, eq=False)
class _Score:
    area: float
    ranks: RankTest
    test: _Test

    def bootstrap(self, times: np.ndarray) -> np.ndarray:
        """Areas (B,) of test events taken so many times (B, n)."""
        target = self.test.target
        return self.ranks(times * target, times * (1 - target))[0]


class _Test:
    """Test events of two types."""

    def __init__(self, pair: Pair) -> None:
        self.values = np.concatenate(pair)
        self.sizes = tuple(map(len, pair))
        self.target = np.repeat([1.0, 0.0], self.sizes)

    def score(self, classifier: Callable[[np.ndarray], np.ndarray]) -> _Score:
        ranks = RankTest(classifier(self.values))
        area = ranks(self.target[None], 1 - self.target[None])[0][0]
        return _Score(float(area), ranks, self)

    def times(self, rng: np.random.Generator) -> np.ndarray:
        """How often each event is in each bootstrap (B, n)."""
        parts = [rng.multinomial(n, np.full(n, 1 / n), size=_BOOTSTRAPS) for n in self.sizes]
        return np.concatenate(parts, 1).astype(float)


class _Job:
    """Trainings on true and on generated events, each tested on both."""

    def __init__(self, make: Callable[[int], Any], seed: int, tests: list[_Test]) -> None:
        self.make, self.seed, self.tests = make, seed, tests

    def run(self, trained: list[Pair], bar: Any, only_true: bool = False) -> list[list[_Score]]:
        tests = self.tests[:1] if only_true else self.tests
        found = []
        for pair in trained:
            sizes = [len(part) for part in pair]
            weight = np.concatenate([np.full(n, sum(sizes) / 2 / n) for n in sizes])
            values, target = np.concatenate(pair), np.repeat([1, 0], sizes)
            classifier = train(self.make, values, target, weight, self.seed)
            found.append([t.score(classifier) for t in tests])
            bar.update(1)
        return found


def _types(pair: Any, kind: str) -> Pair:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(
            f"Expected {kind} events as a pair of the two types; got {type(pair).__name__}."
        )
    parts = []
    for letter, part in zip("AB", pair, strict=True):
        events = as_tensor(part, f"{kind} events of type {letter}").detach().cpu().double()
        if not events.ndim or len(events) < _FEWEST:
            raise ValueError(
                f"Expected at least {_FEWEST} {kind} events of type {letter}; got shape "
                f"{tuple(events.shape)}."
            )
        check_finite(events, f"{kind} events of type {letter}")
        parts.append(events.reshape(len(events), -1).numpy())
    return parts[0], parts[1]


def _split(
    samples: list[Pair], test: float, rng: np.random.Generator
) -> tuple[list[Pair], list[Pair]]:
    trained, tested = [], []
    for pair in samples:
        cuts = [min(max(round(test * len(part)), 10), len(part) - 20) for part in pair]
        a, b = (part[rng.permutation(len(part))] for part in pair)
        tested.append((a[: cuts[0]], b[: cuts[1]]))
        trained.append((a[cuts[0] :], b[cuts[1] :]))
    return trained, tested


def _exchanged(trained: list[Pair], rng: np.random.Generator) -> list[Pair]:
    """Training events of each type divided anew into "true" and "generated"."""
    kinds: list[tuple[np.ndarray, np.ndarray]] = []
    for k in (0, 1):
        pooled = np.concatenate([trained[0][k], trained[1][k]])
        pooled = pooled[rng.permutation(len(pooled))]
        cut = len(trained[0][k])
        kinds.append((pooled[:cut], pooled[cut:]))
    return [(kinds[0][j], kinds[1][j]) for j in (0, 1)]


def _spread(
    job: _Job,
    trained: list[Pair],
    first: list[list[_Score]],
    retrainings: int,
    rng: np.random.Generator,
    bar: Any,
) -> tuple[np.ndarray, float]:
    """Errors of the areas (2, 2), and of the loss: test events and trainings in quadrature."""
    areas, losses = [], []
    for _ in range(retrainings):
        drawn = [
            (a[rng.integers(len(a), size=len(a))], b[rng.integers(len(b), size=len(b))])
            for a, b in trained
        ]
        found = job.run(drawn, bar)
        areas.append([[score.area for score in row] for row in found])
        losses.append(found[1][0].area - found[0][0].area)
    times = [t.times(rng) for t in job.tests]
    tested = [[score.bootstrap(times[j]) for j, score in enumerate(row)] for row in first]
    spread = np.array([[cell.std(ddof=1) for cell in row] for row in tested])
    error = np.hypot(np.std(areas, axis=0, ddof=1), spread)
    of_test = (tested[1][0] - tested[0][0]).std(ddof=1)
    return error, float(np.hypot(np.std(losses, ddof=1), of_test))
