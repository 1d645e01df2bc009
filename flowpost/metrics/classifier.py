r"""Classifier two-sample test: can anything tell two samples of events apart, and by how much?

A classifier is trained on a part of two samples of densities p and q, calibrated on a second, and
asked on a third, untouched one. With f its probability of the first sample at equal totals, the
mean cross-entropy in bits is bounded by the Jensen–Shannon divergence,

.. math:: H = -\tfrac12 E_p \log_2 f - \tfrac12 E_q \log_2 (1 - f) \ge 1 - \mathrm{JSD}(p, q),

with equality for the true probability p/(p + q): `1 - H` is what is told of the divergence.

Everything that is chosen (classifier, features, calibration, when to stop) is chosen on other
events than the test part, or, for the p-value, chosen again in each permutation: see `ranks`.

Reference:
    Revisiting Classifier Two-Sample Tests (D. Lopez-Paz, M. Oquab, 2017)
    https://arxiv.org/abs/1610.06545
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import check_positive_int
from .._progress import progress_bar
from .calibrate import METHODS, Calibration, calibrate, log_loss
from .classifier_result import ClassifierScore, ClassifierTest
from .feature_sets import FeatureSet, feature_sets
from .learners import Trained, named_classifiers, train
from .ranks import RankTest, effective_count, event_weights, permutation_pvalues
from .ratio import density_ratio

__all__ = ["classifier_test"]

# of the events that are not for the test
_CALIBRATION = 0.25
_BOOTSTRAPS = 200
_CHUNK = 1 << 21
# of log-odds, so that weights remain numbers
_LARGEST = 36.0

Pair = tuple[np.ndarray, np.ndarray]


def classifier_test(
    x: Any,
    y: Any,
    *,
    weight_x: Any = None,
    weight_y: Any = None,
    classifiers: str | Sequence[Any] | Mapping[str, Any] = ("logistic", "boosting", "mlp"),
    features: Mapping[str, Any] | None = None,
    test: float = 0.5,
    calibration: str = "auto",
    permutations: int = 1000,
    retrainings: int = 3,
    paired: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> ClassifierTest:
    """Ask classifiers to tell two samples of events apart; needs `flowpost[diagnostics]`.

    The p-value is exact without weights, and with weights where events with their weights are
    exchangeable between the samples under the null; where weights depend on the sample it is
    right for large samples.

    Arguments:
        x: First sample (N, D), such as data or truth; (N, …) is flattened.
        y: Second sample (M, D), such as simulation; independent of x, unless `paired`.
        weight_x: Event weights of x (N,), at least 0.
        weight_y: Event weights of y (M,). Their sums need not agree with those of x.
        classifiers: Names of "logistic", "quadratic" (logistic on all squares and products),
            "boosting" and "mlp", or estimators of scikit-learn's interface, or a dict of such.
        features: Sets of features by name, side by side: a function of events, applied to x and to
            y, or a pair of arrays (N, F) and (M, F). A function looks at each event alone: what it
            takes from all events of a sample would tell the samples apart. None takes x and y.
        test: Share of the events that is only tested on. A quarter of the others calibrates.
        calibration: "none", "platt", "isotonic", or "auto": that of the lowest log-loss in
            cross-validation on the calibration part.
        permutations: B; the least p-value is 1/(1 + B).
        retrainings: Further trainings of each classifier, with other seeds and another division
            of training and calibration, for the spread; the first training is what is reported.
        paired: x and y are pairs of the same events, row by row: they are split together, and
            labels are exchanged within pairs.
        seed: Of splits, trainings and permutations.
        progress: Show a progress bar.

    Returns:
        A table by features and classifier, the best, the p-value of all and weights f/(1 − f).

    Raises:
        ValueError: If shapes do not fit, a value is not finite, a weight is negative or all are
            zero, there are fewer than 50 events of a sample, or an option is unknown.
        ImportError: If scikit-learn is not installed.
    """
    if calibration not in ("auto", *METHODS):
        raise ValueError(
            f"Expected calibration as auto, {', '.join(METHODS)}; got {calibration!r}."
        )
    trainings = 1 + check_positive_int(retrainings, "retrainings", minimum=0)
    permutations = check_positive_int(permutations, "permutations")
    makers = named_classifiers(classifiers)
    sets = feature_sets(x, y, features)
    count = (len(sets[0].x), len(sets[0].y))
    own = (
        event_weights(weight_x, count[0], "weight_x"),
        event_weights(weight_y, count[1], "weight_y"),
    )
    seeds = [np.random.default_rng(s) for s in np.random.SeedSequence(seed).spawn(trainings + 3)]
    tested, others = _split(count, test, seeds[0], paired)
    weights = _comparable(own, others, tested)

    sample = _Sample(tuple(w[t] for w, t in zip(weights, tested, strict=True)), paired)
    cells = [_Cell(s, name, make) for s in sets for name, make in makers.items()]
    per_training = sum(map(len, others))
    with progress_bar(trainings * len(cells) * per_training, "classifiers", progress) as bar:
        for rng in seeds[3:]:
            trained, held = _divide(others, rng, paired)
            draws = [int(s) for s in rng.integers(2**31, size=2)]
            for cell in cells:
                cell.train(weights, trained, held, tested, sample, calibration, draws)
                bar.update(per_training)
    tests = [cell.ranks for cell in cells]
    found = permutation_pvalues(
        tests, sample.weights, len(tested[0]), permutations, seeds[1], paired
    )
    errors = sample.bootstrap([(c.ranks, c.losses) for c in cells], seeds[2])
    rows = tuple(cell.row((float(f[k]) for f in found), errors[k]) for k, cell in enumerate(cells))
    best = min(range(len(rows)), key=lambda k: rows[k].loss)
    chosen = cells[best]
    n = len(tested[0])
    return ClassifierTest(
        table=rows,
        best=rows[best],
        p_value=min(row.p_adjusted for row in rows),
        ratio=density_ratio(chosen.odds[n:], sample.pair[1], chosen.weights_of),
        count=count,
        test_count=(n, len(tested[1])),
        effective_count=(effective_count(sample.pair[0]), effective_count(sample.pair[1])),
        weight_x=torch.as_tensor(_mean_one(sample.pair[0])),
        weight_y=torch.as_tensor(_mean_one(sample.pair[1])),
        permutations=permutations,
        retrainings=trainings - 1,
        paired=paired,
    )


# --- parts of the samples ------------------------------------------------------------------------


def _split(
    count: tuple[int, int], test: float, rng: np.random.Generator, paired: bool
) -> tuple[Pair, Pair]:
    """Rows of the two samples that are tested, and the others."""
    if not isinstance(test, Real) or not 0 < test < 1:
        raise ValueError(f"Expected test as a share between 0 and 1; got {test!r}.")
    if paired and count[0] != count[1]:
        raise ValueError(
            f"Expected as many events of x as of y where they are pairs; got {count[0]} and "
            f"{count[1]}. Independent samples need paired=False."
        )
    sizes = [round(n * test) for n in count]
    if min(sizes) < 10 or min(n - t for n, t in zip(count, sizes, strict=True)) < 20:
        raise ValueError(
            f"Expected at least 10 test events and 20 others of each sample; got {sizes} of "
            f"{list(count)}. Take another share than test={test:g}, or more events."
        )
    first = rng.permutation(count[0])
    second = first if paired else rng.permutation(count[1])
    return (first[: sizes[0]], second[: sizes[1]]), (first[sizes[0] :], second[sizes[1] :])


def _divide(others: Pair, rng: np.random.Generator, paired: bool) -> tuple[Pair, Pair]:
    """Rows that train, and rows that calibrate."""
    first = rng.permutation(others[0])
    second = first if paired else rng.permutation(others[1])
    a, b = (round(len(rows) * _CALIBRATION) for rows in others)
    return (first[a:], second[b:]), (first[:a], second[:b])


def _comparable(weights: Pair, others: Pair, tested: Pair) -> Pair:
    """Weights of scales that agree within a factor of two, by a power of four if need be.

    Permutations mix the weights of the samples. Where those are of one kind they are left as they
    are, which keeps the test exact; the scale is that of events which are not tested.
    """
    for rows in (others, tested):
        for name, w, r in zip("xy", weights, rows, strict=True):
            if not w[r].sum() > 0:
                raise ValueError(
                    f"Expected weight_{name} with a positive sum in every part of the sample; got "
                    "0 in one. Leave out events of zero weight."
                )
    mean_x, mean_y = (w[r].mean() for w, r in zip(weights, others, strict=True))
    return weights[0], weights[1] * 4.0 ** round(math.log(mean_x / mean_y, 4))


def _mean_one(weight: np.ndarray) -> np.ndarray:
    return weight / weight.mean()


def _labelled(weights: Pair, rows: Pair) -> Pair:
    """Targets (n,), 1 for the first sample, and weights (n,) of mean one, equal in total."""
    parts = [w[r] for w, r in zip(weights, rows, strict=True)]
    total = sum(map(len, parts))
    target = np.repeat([1, 0], [len(p) for p in parts])
    return target, np.concatenate([p * (total / 2 / p.sum()) for p in parts])


# --- trainings -----------------------------------------------------------------------------------


class _Sample:
    """Test events: their weights, and what many reweightings of them say."""

    def __init__(self, pair: tuple[np.ndarray, ...], paired: bool) -> None:
        self.pair, self.paired = pair, paired
        self.weights = np.concatenate(pair)
        self.target = np.repeat([1, 0], [len(w) for w in pair])

    def measure(self, ranks: RankTest, losses: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """AUC and 1 − H (B, 2) of events taken so many times (B, n)."""
        weights = counts * self.weights
        first, second = weights * self.target, weights * (1 - self.target)
        # a draw without events of weight has no value
        with np.errstate(invalid="ignore", divide="ignore"):
            loss = [(w @ losses) / w.sum(1) for w in (first, second)]
            return np.stack([ranks(first, second)[0], 1 - (loss[0] + loss[1]) / 2], 1)

    def bootstrap(
        self, cells: list[tuple[RankTest, np.ndarray]], rng: np.random.Generator
    ) -> list[tuple[float, float]]:
        """Standard deviations of AUC and 1 − H of each cell over draws of the test events."""
        found: list[list[np.ndarray]] = [[] for _ in cells]
        for counts in self._counts(rng):
            for values, (ranks, losses) in zip(found, cells, strict=True):
                values.append(self.measure(ranks, losses, counts))
        spread = [np.nanstd(np.concatenate(v), axis=0, ddof=1) for v in found]
        return [(float(s[0]), float(s[1])) for s in spread]

    def _counts(self, rng: np.random.Generator) -> Iterator[np.ndarray]:
        a, b = map(len, self.pair)
        size = max(_CHUNK // (a + b), 1)
        for start in range(0, _BOOTSTRAPS, size):
            rows = min(size, _BOOTSTRAPS - start)
            first = rng.multinomial(a, np.full(a, 1 / a), size=rows)
            second = first if self.paired else rng.multinomial(b, np.full(b, 1 / b), size=rows)
            yield np.concatenate([first, second], 1).astype(float)


@dataclass(eq=False)
class _Cell:
    """One classifier on one set of features; its first training is kept, of all the numbers."""

    features: FeatureSet
    name: str
    make: Callable[[int], Any]
    numbers: list[tuple[float, float, float]] = field(default_factory=list)
    kept: tuple[Trained, str, Calibration] | None = None

    def train(
        self,
        weights: Pair,
        trained: Pair,
        held: Pair,
        tested: Pair,
        sample: _Sample,
        calibration: str,
        seeds: list[int],
    ) -> None:
        """Train, calibrate on held-out events and measure on the tested ones."""
        classifier = train(
            self.make, self.features.rows(*trained), *_labelled(weights, trained), seeds[0]
        )
        method, function, loss = calibrate(
            classifier(self.features.rows(*held)),
            *_labelled(weights, held),
            calibration,
            classifier.probabilistic,
            np.random.default_rng(seeds[1]),
        )
        scores = classifier(self.features.rows(*tested))
        odds = np.clip(function(scores), -_LARGEST, _LARGEST)
        losses = log_loss(odds, sample.target)
        ranks = RankTest(scores, sample.paired)
        once = np.ones((1, len(scores)))
        area, divergence = (float(v) for v in sample.measure(ranks, losses, once)[0])
        self.numbers.append((area, divergence, loss))
        if self.kept is None:
            self.kept = classifier, method, function
            self.scores, self.odds, self.losses, self.ranks = scores, odds, losses, ranks
            self.first = sample.target == 1

    def row(self, found: Iterable[float], errors: tuple[float, float]) -> ClassifierScore:
        """The line of the table."""
        assert self.kept is not None
        statistic, p_value, p_adjusted = found
        numbers = np.array(self.numbers)
        spread = numbers.std(0, ddof=1) if len(numbers) > 1 else np.full(3, math.nan)
        probability = 1 / (1 + np.exp(-self.odds))
        return ClassifierScore(
            features=self.features.name,
            classifier=self.name,
            calibration=self.kept[1],
            auc=float(numbers[0, 0]),
            auc_error=errors[0],
            auc_spread=float(spread[0]),
            divergence=float(numbers[0, 1]),
            jsd_error=errors[1],
            jsd_spread=float(spread[1]),
            loss=float(numbers[:, 2].mean()),
            statistic=statistic,
            p_value=p_value,
            p_adjusted=p_adjusted,
            score_x=torch.as_tensor(self.scores[self.first]),
            score_y=torch.as_tensor(self.scores[~self.first]),
            probability_x=torch.as_tensor(probability[self.first]),
            probability_y=torch.as_tensor(probability[~self.first]),
        )

    def weights_of(self, events: Any) -> Tensor:
        """Density-ratio weights (N,) of events."""
        assert self.kept is not None
        classifier, _, function = self.kept
        odds = np.clip(function(classifier(self.features.of(events))), -_LARGEST, _LARGEST)
        return torch.as_tensor(np.exp(odds))
