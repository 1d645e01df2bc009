r"""Downstream comparison: the final estimator on generated and on true test events.

What generated events are for is often an estimator :math:`\hat z(x)`. Of its residuals
:math:`\hat z(x) - z`, with event weights, two numbers are compared: the bias, their mean, and the
resolution, the half-width of the central 68.27 %,

.. math:: b = \sum_i a_i r_i, \qquad
          \sigma_{68} = \tfrac12 \big( F^{-1}(0.8413) - F^{-1}(0.1587) \big) .

Their errors are standard deviations over bootstraps of the events with their weights; the
difference of the two samples over its error is compared with a normal distribution, which is right
for large samples whatever the weights and other properties of the residuals. All p-values together
are corrected by Holm's method.

An estimator that was trained on events of the same generator knows its faults: train it on true
events, or on neither.

Reference:
    An Introduction to the Bootstrap (B. Efron, R. Tibshirani, 1993), chapter 6
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .multiple import holm
from .ranks import event_weights

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["DownstreamComparison", "DownstreamRow", "downstream"]

_ALARM = 0.01
_FEWEST = 50
_CHUNK = 1 << 21
# of a normal distribution within one standard deviation
_LEVELS = (0.15865525393145707, 0.8413447460685429)


@dataclass(frozen=True)
class DownstreamRow:
    """Bias or resolution of one estimate, on true and on generated events.

    Attributes:
        name: Name of the estimate.
        quantity: "bias" or "resolution".
        true: Its value on true events, in units of the label.
        true_error: Standard deviation of it over bootstraps.
        generated: Its value on generated events.
        generated_error: Standard deviation of it over bootstraps.
        p_value: P-value of the difference alone.
        p_adjusted: The same, corrected for the number of rows.
    """

    name: str
    quantity: str
    true: float
    true_error: float
    generated: float
    generated_error: float
    p_value: float
    p_adjusted: float

    @property
    def difference(self) -> float:
        """Value on generated events less that on true ones."""
        return self.generated - self.true

    @property
    def error(self) -> float:
        """Standard deviation of the difference."""
        return float(np.hypot(self.true_error, self.generated_error))


@dataclass(frozen=True, eq=False, repr=False)
class DownstreamComparison:
    """Result of `downstream`.

    Attributes:
        table: Bias and resolution of each estimate.
        residual_true: Residuals of true events (N, D), float64 on the CPU.
        residual_generated: Residuals of generated events (M, D).
        weight_true: Event weights (N,).
        weight_generated: Event weights (M,).
        names: Names of the D estimates.
    """

    table: tuple[DownstreamRow, ...]
    residual_true: Tensor
    residual_generated: Tensor
    weight_true: Tensor
    weight_generated: Tensor
    names: tuple[str, ...]

    @property
    def p_value(self) -> float:
        """P-value of all rows: the smallest corrected one."""
        return min(row.p_adjusted for row in self.table)

    def __getitem__(self, key: tuple[str, str]) -> DownstreamRow:
        """Return the entry of (name, "bias" or "resolution").

        Raises:
            KeyError: If there is none.
        """
        for row in self.table:
            if (row.name, row.quantity) == key:
                return row
        raise KeyError(f"Expected one of {', '.join(self.names)} with a quantity; got {key}.")

    def verdict(self) -> str:
        """Return what the numbers say in one sentence; the alarm is raised at 1 %."""
        off = [f"{r.quantity} of {r.name}" for r in self.table if r.p_adjusted <= _ALARM]
        if not off:
            return f"no difference seen (p = {self.p_value:.3g} for all)"
        return f"the estimator differs in {', '.join(off)} (p = {self.p_value:.3g} for all)"

    def __str__(self) -> str:
        n, m = len(self.residual_true), len(self.residual_generated)
        wide = max(8, *(len(name) for name in self.names))
        lines = [
            f"Estimates of {n} true and {m} generated events",
            f"  {'':{wide}}  {'':10}       true  ± boot    generated  ± boot   difference  ± boot "
            "        p   for all",
        ]
        for r in self.table:
            lines.append(
                f"  {r.name:{wide}}  {r.quantity:10} {r.true:10.4g} {r.true_error:7.2g}   "
                f"{r.generated:10.4g} {r.generated_error:7.2g}   {r.difference:10.4g} "
                f"{r.error:7.2g}  {r.p_value:8.3g}  {r.p_adjusted:8.3g}"
            )
        return "\n".join([*lines, f"  => {self.verdict()}"])

    def __repr__(self) -> str:
        return f"DownstreamComparison(names={list(self.names)}, p_value={self.p_value:.3g})"

    def plot(self, ax: Axes | None = None, name: str | None = None) -> Axes:
        """Draw the residuals of an estimate, by default the first, on both kinds of events."""
        from ..plots.generative import plot_downstream

        return plot_downstream(self, ax, name=name)


def downstream(
    estimator: Callable[[Any], Any],
    true: tuple[Any, Any],
    generated: tuple[Any, Any],
    weight_true: Any = None,
    weight_generated: Any = None,
    *,
    residual: Callable[[Tensor, Tensor], Any] | None = None,
    names: tuple[str, ...] | None = None,
    bootstraps: int = 500,
    seed: int = 0,
) -> DownstreamComparison:
    """Compare bias and resolution of an estimator on true and on generated events.

    Arguments:
        estimator: A function of events x to estimates (N,) or (N, D).
        true: Events x and labels z, (N,) or (N, D), of true test events.
        generated: Events and labels of generated ones, independent of the true ones.
        weight_true: Event weights (N,), at least 0.
        weight_generated: Event weights (M,).
        residual: A function of estimates (N, D) and labels (N, D) to residuals (N,) or (N, D), in
            place of their difference: for angles, or relative to the label.
        names: Names of the columns of the residuals.
        bootstraps: Of the events, for the errors.
        seed: Of the bootstraps.

    Raises:
        ValueError: If shapes do not fit, a value is not finite or there are fewer than 50 events of
            a kind.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> z = torch.rand(2, 500, generator=g)
        >>> noise = 0.1 * torch.randn(2, 500, generator=g)
        >>> found = downstream(lambda x: x, (z[0] + noise[0], z[0]), (z[1] + 2 * noise[1], z[1]))
        >>> found["estimate", "resolution"].p_value < 0.001
        True
    """
    check_positive_int(bootstraps, "bootstraps", minimum=20)
    rng = np.random.default_rng(seed)
    residuals, weights, found = [], [], []
    for which, pair, weight in (
        ("true", true, weight_true),
        ("generated", generated, weight_generated),
    ):
        r = _residuals(estimator, pair, which, residual)
        w = event_weights(weight, len(r), f"weight_{which}")
        numbers = np.stack([_measure(r[:, j], w, bootstraps, rng) for j in range(r.shape[1])])
        residuals.append(r)
        weights.append(w)
        found.append(numbers)
    columns = [r.shape[1] for r in residuals]
    if columns[0] != columns[1]:
        raise ValueError(
            f"Expected as many estimates of generated as of true events; got {columns[1]} and "
            f"{columns[0]}."
        )
    if names is None:
        one = columns[0] == 1
        names = ("estimate",) if one else tuple(f"column {j}" for j in range(columns[0]))
    if len(names) != columns[0]:
        raise ValueError(f"Expected {columns[0]} names; got {names}.")
    return DownstreamComparison(
        table=_table(found[0], found[1], tuple(names)),
        residual_true=torch.as_tensor(residuals[0]),
        residual_generated=torch.as_tensor(residuals[1]),
        weight_true=torch.as_tensor(weights[0]),
        weight_generated=torch.as_tensor(weights[1]),
        names=tuple(names),
    )


def _residuals(
    estimator: Callable[[Any], Any],
    pair: tuple[Any, Any],
    which: str,
    residual: Callable[[Tensor, Tensor], Any] | None,
) -> np.ndarray:
    if not isinstance(pair, (tuple, list)) or len(pair) != 2:
        raise ValueError(f"Expected {which} events as a pair (x, z); got {type(pair).__name__}.")
    events, labels = pair
    z = as_tensor(labels, f"labels of {which} events").detach()
    if z.ndim not in (1, 2) or len(z) < _FEWEST:
        raise ValueError(
            f"Expected labels of at least {_FEWEST} {which} events, (N,) or (N, D); got "
            f"{tuple(z.shape)}."
        )
    with torch.no_grad():
        estimate = as_tensor(estimator(events), f"estimates of {which} events").detach()
    estimate = estimate.cpu().double().reshape(len(estimate), -1)
    z = z.cpu().double().reshape(len(z), -1)
    check_shape(estimate, tuple(z.shape), f"estimates of {which} events", "One a label.")
    value = estimate - z if residual is None else as_tensor(residual(estimate, z), "residuals")
    value = value.detach().cpu().double()
    if not value.ndim or len(value) != len(z):
        raise ValueError(f"Expected residuals of {len(z)} events; got {tuple(value.shape)}.")
    check_finite(value, f"residuals of {which} events")
    return np.asarray(value.reshape(len(value), -1).numpy())


def _measure(
    values: np.ndarray, weight: np.ndarray, bootstraps: int, rng: np.random.Generator
) -> np.ndarray:
    """Bias and resolution with their errors, (2, 2)."""
    order = np.argsort(values, kind="stable")
    values, weight = values[order], weight[order]
    n = len(values)
    exact = _bias_and_width(values, weight[None])[0]
    found = []
    size = max(_CHUNK // n, 1)
    for start in range(0, bootstraps, size):
        rows = min(size, bootstraps - start)
        times = rng.multinomial(n, np.full(n, 1 / n), size=rows)
        found.append(_bias_and_width(values, times * weight))
    drawn = np.concatenate(found)
    # draws without an event of weight have no value
    return np.stack([exact, np.nanstd(drawn, axis=0, ddof=1)])


def _bias_and_width(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Bias and resolution (B, 2) of ordered values (n,) with weights (B, n)."""
    levels = np.cumsum(weights, 1)
    total = levels[:, -1:]
    with np.errstate(invalid="ignore", divide="ignore"):
        bias = (weights @ values) / total[:, 0]
        # in the middle of each event's step
        levels = (levels - weights / 2) / total
    ends = [values[np.argmax(levels >= q, 1)] for q in _LEVELS]
    return np.stack([bias, (ends[1] - ends[0]) / 2], 1)


def _table(
    true: np.ndarray, generated: np.ndarray, names: tuple[str, ...]
) -> tuple[DownstreamRow, ...]:
    difference = generated[:, 0] - true[:, 0]
    error = np.hypot(generated[:, 1], true[:, 1])
    equal = difference == 0
    z = np.where(equal, 0.0, np.abs(difference) / np.maximum(error, np.finfo(float).tiny))
    p = 2 * torch.special.ndtr(torch.as_tensor(-z)).numpy()
    adjusted = holm(p.reshape(-1)).reshape(p.shape)
    return tuple(
        DownstreamRow(
            name=name,
            quantity=quantity,
            true=float(true[j, 0, q]),
            true_error=float(true[j, 1, q]),
            generated=float(generated[j, 0, q]),
            generated_error=float(generated[j, 1, q]),
            p_value=float(p[j, q]),
            p_adjusted=float(adjusted[j, q]),
        )
        for j, name in enumerate(names)
        for q, quantity in enumerate(("bias", "resolution"))
    )
