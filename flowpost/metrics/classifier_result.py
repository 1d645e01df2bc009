"""What a classifier two-sample test returns: a table by features and classifier, and its best."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

from .ratio import DensityRatio

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["ClassifierScore", "ClassifierTest"]

_ALARM = 0.01


@dataclass(frozen=True, eq=False, repr=False)
class ClassifierScore:
    """How well one classifier on one set of features tells the samples apart, on test events.

    Attributes:
        features: Name of the features.
        classifier: Name of the classifier.
        calibration: "none", "platt" or "isotonic".
        auc: Area under the ROC curve, 0.5 if nothing is told.
        auc_error: Its standard deviation over bootstraps of the test events.
        auc_spread: Its standard deviation over retrainings; NaN without any.
        divergence: 1 − cross-entropy in bits, as estimated: may be negative.
        jsd_error: Its standard deviation over bootstraps of the test events.
        jsd_spread: Its standard deviation over retrainings; NaN without any.
        loss: Cross-entropy in bits of held-out events of the calibration part, the mean over
            retrainings: the best classifier is that of the lowest.
        statistic: Studentised AUC, T.
        p_value: P-value of this classifier alone, not corrected for there being others.
        p_adjusted: The same, corrected.
        score_x: Scores of the test events of the first sample (n,), float64 on the CPU.
        score_y: Those of the second (m,).
        probability_x: Calibrated probabilities of the first sample at equal totals (n,).
        probability_y: The same of test events of the second sample (m,).
    """

    features: str
    classifier: str
    calibration: str
    auc: float
    auc_error: float
    auc_spread: float
    divergence: float
    jsd_error: float
    jsd_spread: float
    loss: float
    statistic: float
    p_value: float
    p_adjusted: float
    score_x: Tensor
    score_y: Tensor
    probability_x: Tensor
    probability_y: Tensor

    @property
    def name(self) -> str:
        """Classifier and features."""
        return f"{self.classifier} on {self.features}"

    @property
    def jsd(self) -> float:
        """Jensen–Shannon divergence in bits, a lower bound but for noise, clipped to [0, 1]."""
        return min(max(self.divergence, 0.0), 1.0)

    def __repr__(self) -> str:
        return (
            f"ClassifierScore({self.name!r}, auc={self.auc:.4f}, jsd={self.jsd:.4f}, "
            f"p_adjusted={self.p_adjusted:.3g})"
        )


@dataclass(frozen=True, eq=False, repr=False)
class ClassifierTest:
    """Result of `classifier_test`.

    Attributes:
        table: One entry for each set of features and classifier.
        best: That of the lowest cross-entropy on the calibration part: its AUC and divergence are
            not raised by the choice, as no test event took part in it.
        p_value: P-value of the largest studentised AUC of the table, by permutation of the test
            events: the choice of the largest is made in each permutation too.
        ratio: Density-ratio weights of the best.
        count: Events (N, M) of the two samples.
        test_count: Test events (n, m).
        effective_count: (Σw)²/Σw² of the test events' weights, of the two samples.
        weight_x: Event weights of the test events of the first sample, of mean one (n,).
        weight_y: Those of the second (m,).
        permutations: B.
        retrainings: Further trainings of each classifier.
        paired: Whether labels were exchanged within pairs.
    """

    table: tuple[ClassifierScore, ...]
    best: ClassifierScore
    p_value: float
    ratio: DensityRatio
    count: tuple[int, int]
    test_count: tuple[int, int]
    effective_count: tuple[float, float]
    weight_x: Tensor
    weight_y: Tensor
    permutations: int
    retrainings: int
    paired: bool

    @property
    def auc(self) -> float:
        """Area under the ROC curve of the best classifier."""
        return self.best.auc

    @property
    def auc_error(self) -> float:
        """Uncertainty of `auc` from the test events and from the training, in quadrature."""
        return _both(self.best.auc_error, self.best.auc_spread)

    @property
    def jsd(self) -> float:
        """Jensen–Shannon divergence in bits, by the best classifier."""
        return self.best.jsd

    @property
    def jsd_error(self) -> float:
        """Uncertainty of `jsd` from the test events and from the training, in quadrature."""
        return _both(self.best.jsd_error, self.best.jsd_spread)

    def __getitem__(self, key: tuple[str, str]) -> ClassifierScore:
        """Return the entry of (features, classifier).

        Raises:
            KeyError: If there is none.
        """
        for row in self.table:
            if (row.features, row.classifier) == key:
                return row
        known = ", ".join(f"({r.features!r}, {r.classifier!r})" for r in self.table)
        raise KeyError(f"Expected one of {known}; got {key}.")

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 %."""
        count = sum(1 / n for n in self.effective_count)
        least = min(1.0, 0.5 + 3 * math.sqrt(count / 12))
        if self.p_value > _ALARM:
            return (
                f"no difference seen (p = {self.p_value:.3g}); an AUC of {least:.3f} would stand "
                "out by 3 σ"
            )
        first = max(self.table, key=lambda row: row.statistic)
        text = f"the samples differ (p = {self.p_value:.3g}, by {first.name})"
        if self.p_value <= 1.5 / (1 + self.permutations):
            text += f", the least that {self.permutations} permutations can say"
        return text

    def __str__(self) -> str:
        (n, m), (test_n, test_m) = self.count, self.test_count
        pairs = ", in pairs" if self.paired else ""
        lines = [
            f"Classifier two-sample test of {n} and {m} events{pairs}; untouched test split "
            f"{test_n} and {test_m}"
        ]
        a, b = self.effective_count
        if not (math.isclose(a, test_n) and math.isclose(b, test_m)):
            lines.append(f"  effective by weights: {a:.0f} and {b:.0f}")
        wide = max(8, *(len(r.features) for r in self.table))
        tall = max(10, *(len(r.classifier) for r in self.table))
        lines += [
            f"  {'':{wide}}  {'':{tall}}  {'':11}    AUC  ± data  ± train    JSD [bit]  ± data  "
            "± train        p   for all",
            *(self._row(row, wide, tall) for row in self.table),
            f"  best on the calibration part (*): AUC {self.auc:.4f} ± {self.auc_error:.4f}, "
            f"JSD {self.jsd:.4f} ± {self.jsd_error:.4f} bits",
            f"  {self.ratio.describe()}",
            f"  => {self.verdict()}",
        ]
        if self.ratio.heavy or self.ratio.incomplete:
            lines.append(f"  => {self.ratio.verdict()}")
        return "\n".join(lines)

    def _row(self, row: ClassifierScore, wide: int, tall: int) -> str:
        mark = "*" if row is self.best else " "
        return (
            f"{mark} {row.features:{wide}}  {row.classifier:{tall}}  {row.calibration:11}"
            f"{row.auc:7.4f} {row.auc_error:7.4f}  {_text(row.auc_spread)}  {row.jsd:11.4f} "
            f"{row.jsd_error:7.4f}  {_text(row.jsd_spread)}  {row.p_value:7.3g}   "
            f"{row.p_adjusted:7.3g}"
        )

    def __repr__(self) -> str:
        return (
            f"ClassifierTest(best={self.best.name!r}, auc={self.auc:.4f}, jsd={self.jsd:.4f}, "
            f"p_value={self.p_value:.3g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the ROC curves of the table; see also `plot_calibration` and `ratio.plot()`."""
        from ..plots.classifier import plot_roc

        return plot_roc(self, ax)

    def plot_calibration(self, ax: Axes | None = None) -> Axes:
        """Draw the share of the first sample against the calibrated probability of the best."""
        from ..plots.classifier import plot_reliability

        return plot_reliability(self, ax)


def _both(data: float, training: float) -> float:
    return math.hypot(data, 0.0 if math.isnan(training) else training)


def _text(value: float) -> str:
    return "      -" if math.isnan(value) else f"{value:7.4f}"
