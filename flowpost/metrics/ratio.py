r"""Density-ratio weights of a classifier, and whether anything can be built on them.

With the calibrated probability f of the first sample at equal totals,

.. math:: w(x) = \frac{f(x)}{1 - f(x)} \approx \frac{p(x)}{q(x)},

events of the second sample (density q) weighted by w follow the first (p). Three numbers tell where
that fails. The mean of w over the second sample is 1; less says that the first has events where the
second has none, which no weight can make up for. The effective sample size
:math:`(\sum w)^2 / \sum w^2` is what is left of the events. And the shape k̂ of a generalised Pareto
distribution fitted to the largest weights says whether more events would help: beyond 0.5 their
variance is infinite, beyond 0.7 means over them converge too slowly for any use.

References:
    Pareto Smoothed Importance Sampling (A. Vehtari, D. Simpson, A. Gelman, Y. Yao, J. Gabry, 2024)
    https://arxiv.org/abs/1507.02646

    A New and Efficient Estimation Method for the Generalized Pareto Distribution
    (J. Zhang, M. Stephens, 2009) https://doi.org/10.1198/tech.2009.08017
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DensityRatio", "density_ratio", "pareto_shape"]

_HEAVY = 0.7
# of all weight in the largest hundredth of the events
_TOP = 0.3
_FEWEST = 5


@dataclass(frozen=True, eq=False, repr=False)
class DensityRatio:
    """Weights w = f/(1 − f) that make the second sample look like the first.

    Called with events, it returns their weights; what is stored is of test events, which trained
    nothing.

    Attributes:
        weights: Weights of the test events of the second sample, times their event weights (M,).
        effective_count: (Σw)²/Σw² of them.
        largest_share: Share of the largest one in their sum.
        top_share: Share of the largest hundredth of them.
        shape: k̂ of the generalised Pareto distribution of the largest ones; NaN where they are too
            few or too often equal.
        mean: Mean of f/(1 − f) over the second sample, 1 where it covers the first.
        mean_error: Its standard error.
        function: Weights (N,) of events.
    """

    weights: Tensor
    effective_count: float
    largest_share: float
    top_share: float
    shape: float
    mean: float
    mean_error: float
    function: Callable[[Any], Tensor]

    @property
    def heavy(self) -> bool:
        """Whether a few weights decide: k̂ above 0.7, or 30 % of all weight in 1 % of the events."""
        return bool(self.shape > _HEAVY or self.top_share > _TOP)

    @property
    def incomplete(self) -> bool:
        """Whether the mean weight is off 1 by a tenth and by three standard errors."""
        return abs(self.mean - 1) > max(0.1, 3 * self.mean_error)

    def __call__(self, y: Any) -> Tensor:
        """Return the weights f/(1 − f) (N,) of events, float64 on the CPU.

        Take events that did not train the classifier, and multiply by their event weights. There is
        a `UserWarning` where the tail of the weights is heavy.

        Arguments:
            y: Events as `classifier_test` had them (N, …); where the features of the best
                classifier were given as arrays, those features (N, F).
        """
        if self.heavy or self.incomplete:
            warnings.warn(f"{self.verdict()} {self.describe()}", UserWarning, stacklevel=2)
        return self.function(y)

    def verdict(self) -> str:
        """Return in a sentence whether the weights can be used."""
        found = []
        if self.heavy:
            found.append("The density-ratio weights have a heavy tail: a few events decide.")
        if self.incomplete:
            found.append(
                "The mean weight is not 1: the second sample does not cover the first, or the "
                "classifier is not calibrated."
            )
        return " ".join(found) or "The weights are well behaved."

    def describe(self) -> str:
        """Return the numbers of the weights in a line."""
        shape = "not known" if math.isnan(self.shape) else f"{self.shape:.2f}"
        return (
            f"Weights f/(1 - f): {self.effective_count:.0f} of {len(self.weights)} events "
            f"effective, mean {self.mean:.3f} ± {self.mean_error:.3f}, largest "
            f"{100 * self.largest_share:.2g} % of the sum, top 1 % of events "
            f"{100 * self.top_share:.2g} %, tail shape {shape}."
        )

    def __str__(self) -> str:
        return f"{self.describe()}\n  => {self.verdict()}"

    def __repr__(self) -> str:
        return (
            f"DensityRatio(events={len(self.weights)}, effective_count={self.effective_count:.1f}, "
            f"shape={self.shape:.3g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the share of events with larger weights, and the share of weight they carry."""
        from ..plots.classifier import plot_ratio

        return plot_ratio(self, ax)


def density_ratio(
    odds: np.ndarray, weight: np.ndarray, function: Callable[[Any], Tensor]
) -> DensityRatio:
    """Return the weights of test events and their tails.

    Arguments:
        odds: Calibrated log-odds of the test events of the second sample (M,).
        weight: Their event weights (M,).
        function: Weights of events.
    """
    ratio = np.exp(odds)
    w = ratio * weight
    share = np.sort(w / w.sum())[::-1]
    b = weight / weight.sum()
    mean = float(b @ ratio)
    return DensityRatio(
        weights=torch.as_tensor(w),
        effective_count=float(1 / np.square(share).sum()),
        largest_share=float(share[0]),
        top_share=float(share[: math.ceil(len(w) / 100)].sum()),
        shape=pareto_shape(w),
        mean=mean,
        mean_error=float(np.sqrt(np.square(b * (ratio - mean)).sum())),
        function=function,
    )


def pareto_shape(weights: np.ndarray) -> float:
    """Return k̂ of the generalised Pareto distribution of the largest weights.

    The tail is the min(N/5, 3 √N) largest; k̂ is drawn towards ½ by ten events' worth, as in
    Pareto-smoothed importance sampling. NaN where the tail is below five events or a quarter of it
    is equal to the threshold.

    Arguments:
        weights: Weights (N,).

    Source:
        Zhang and Stephens 2009; Vehtari et al. 2024, section 6 and appendix.
    """
    w = np.sort(np.asarray(weights, dtype=float))
    tail = math.ceil(min(0.2 * len(w), 3 * math.sqrt(len(w))))
    if tail < _FEWEST:
        return math.nan
    excess = w[-tail:] - w[-tail - 1]
    quarter = excess[int(tail / 4 + 0.5) - 1]
    if quarter <= 1e-12 * w[-1]:
        return math.nan
    points = 30 + int(math.sqrt(tail))
    b = 1 / excess[-1] + (1 - np.sqrt(points / (np.arange(1, points + 1) - 0.5))) / (3 * quarter)
    k = np.log1p(-b[:, None] * excess).mean(1)
    likelihood = tail * (np.log(-b / k) - k - 1)
    posterior = np.exp(likelihood - likelihood.max())
    k_hat = np.log1p(-(b @ posterior) / posterior.sum() * excess).mean()
    return float((tail * k_hat + 10 * 0.5) / (tail + 10))
