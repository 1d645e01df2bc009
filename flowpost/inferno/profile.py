"""Fits of binned counts: the best values, the profile of the likelihood, and impacts of nuisances.

All points of a scan, and all impacts, are minimised together by Newton's method; an end of an
interval is found by its own minimisations, not between the points of the scan.

Source: G. Cowan, K. Cranmer, E. Gross, O. Vitells, *Asymptotic formulae for likelihood-based tests
of new physics*, 2011, https://arxiv.org/abs/1007.1727.
"""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from .likelihood import Likelihood
from .model import CountingModel, Normalisation
from .newton import Minimum, minimise

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from .templates import Templates

__all__ = ["FitResult", "Impacts", "Scan", "fit", "impacts", "profile"]

# shifts of templates beyond which a fit extrapolates
_FAR = 3.0
# of √(2Δℓ) at an end of an interval, and widths searched for it
_CLOSE, _REACH = 1e-6, 1e4


@dataclass(frozen=True, eq=False, repr=False)
class FitResult:
    """The maximum of the likelihood.

    Attributes:
        model: The counting experiment.
        values: The best values (P,).
        covariance: The inverse Hessian (P, P) there.
        nll: ℓ there; twice this is a goodness of fit, χ² distributed for large counts.
        factors: With `mc_stat`, the best factors (K,) on the bins.
    """

    model: CountingModel
    values: Tensor
    covariance: Tensor
    nll: float
    factors: Tensor | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """The parameters, that of interest first."""
        return self.model.names

    @property
    def best(self) -> dict[str, float]:
        """The best value of every parameter."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    @property
    def widths(self) -> dict[str, float]:
        """The uncertainty on every parameter."""
        return dict(zip(self.names, self.covariance.diagonal().sqrt().tolist(), strict=True))

    @property
    def width(self) -> float:
        """The uncertainty on the parameter of interest."""
        return math.sqrt(float(self.covariance[0, 0]))

    @property
    def pulls(self) -> dict[str, float]:
        """How far each constrained nuisance went, in standard deviations of its constraint.

        Of any constraint ±√(2Δ) of its penalty; of a normal one (value − nominal) / width.
        """
        found = {}
        for column, n in enumerate(self.model.nuisances, 1):
            if not n.free:
                value, nominal = self.values[column], self.model.values[column]
                rise = float(n.penalty(value) - n.penalty(nominal))
                found[n.name] = math.copysign(math.sqrt(max(0.0, 2 * rise)), float(value - nominal))
        return found

    @property
    def constraints(self) -> dict[str, float]:
        """Uncertainty after the fit over that of the constraint at nominal, where it has one."""
        curvature = self.model.curvature.tolist()[1:]
        return {
            n.name: self.widths[n.name] * math.sqrt(c)
            for n, c in zip(self.model.nuisances, curvature, strict=True)
            if c > 0
        }

    def __str__(self) -> str:
        wide = max(12, *map(len, self.names))
        lines = [f"{'':>{wide}}       value       width     pull  constraint"]
        pulls, constraints = self.pulls, self.constraints
        for name, value in self.best.items():
            row = f"{name:>{wide}} {value:11.5g} {self.widths[name]:11.4g}"
            if name in constraints:
                row += f" {pulls[name]:+8.3f} {constraints[name]:11.3f}"
            lines.append(row)
        lines.append(f"{'2 nll':>{wide}} {2 * self.nll:11.5g}")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw pulls and constraints of the nuisances: `plot_nuisances`."""
        from ..plots.inferno import plot_nuisances

        return plot_nuisances(self, ax)


@dataclass(frozen=True, eq=False, repr=False)
class Scan:
    """The profile of the likelihood along a parameter.

    Attributes:
        parameter: Its name.
        values: Where it was held (M,).
        curve: 2Δℓ (M,), the other parameters at their best; infinite where counts turn negative.
        profiled: Values (M, P) of all parameters there.
        low: Where 2Δℓ is 1 below the best value.
        high: Where it is 1 above.
        fit: The maximum.
    """

    parameter: str
    values: Tensor
    curve: Tensor
    profiled: Tensor
    low: float
    high: float
    fit: FitResult
    _likelihood: Likelihood

    @property
    def best(self) -> float:
        """The best value."""
        return self.fit.best[self.parameter]

    @property
    def width(self) -> float:
        """The uncertainty by the Hessian, for comparison."""
        return self.fit.widths[self.parameter]

    @property
    def half_width(self) -> float:
        """Half the distance of the two points where 2Δℓ is 1."""
        return (self.high - self.low) / 2

    def interval(self, level: float = 0.6827) -> tuple[float, float]:
        """The ends of the interval of a confidence level, by the χ² law of one parameter.

        Raises:
            ValueError: If the level is not between 0 and 1.
        """
        if not 0 < level < 1:
            raise ValueError(f"Expected a level between 0 and 1; got {level!r}.")
        z = math.sqrt(2) * float(torch.erfinv(torch.tensor(level, dtype=torch.float64)))
        return _crossings(self._likelihood, self.fit, self.fit.names.index(self.parameter), z)

    def __str__(self) -> str:
        low, high = self.low - self.best, self.high - self.best
        return (
            f"{self.parameter} = {self.best:.5g} {low:+.4g} {high:+.4g} "
            f"(half width {self.half_width:.4g}, by the Hessian {self.width:.4g})"
        )

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the profile with its half widths: `plot_scan`."""
        from ..plots.inferno import plot_scan

        return plot_scan(self, ax)


@dataclass(frozen=True, eq=False, repr=False)
class Impacts:
    """What holding each nuisance off its best value does to the parameter of interest.

    Attributes:
        names: The nuisances.
        down: Changes (J,) with the nuisance one uncertainty below its best value.
        up: Changes (J,) with it one above.
        fit: The maximum.
    """

    names: tuple[str, ...]
    down: Tensor
    up: Tensor
    fit: FitResult

    @property
    def order(self) -> list[int]:
        """Indices of the nuisances, the one of most impact first."""
        return torch.maximum(self.down.abs(), self.up.abs()).argsort(descending=True).tolist()

    def __str__(self) -> str:
        wide = max([12, *map(len, self.names)])
        lines = [f"{'':>{wide}}   {self.fit.names[0]} at −1σ    at +1σ   of its width"]
        for j in self.order:
            share = max(abs(float(self.down[j])), abs(float(self.up[j]))) / self.fit.width
            row = f"{self.names[j]:>{wide}} {self.down[j]:+10.4g}{self.up[j]:+10.4g}"
            lines.append(f"{row}{100 * share:11.1f} %")
        return "\n".join(lines)

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the impacts, the largest on top: `plot_impacts`."""
        from ..plots.inferno import plot_impacts

        return plot_impacts(self, ax)


def fit(templates: Templates, data: Any = None, *, mc_stat: bool = False) -> FitResult:
    """Find the parameters of largest likelihood.

    Arguments:
        templates: Expected counts.
        data: Counts (K,); by default those expected, for an expected result (Asimov).
        mc_stat: Let the number of simulated events limit the templates.

    Raises:
        ValueError: If data do not fit, or the bins leave parameters open.
        RuntimeError: If no minimum was found.
    """
    return _fit(Likelihood.of(templates, data, mc_stat))


def _fit(likelihood: Likelihood) -> FitResult:
    templates = likelihood.templates
    model = templates.model
    scale = likelihood.scale()
    found = minimise(likelihood, model.values[None], scale)
    at = found.at[0]
    if not bool(found.converged[0]):
        where = ", ".join(f"{n} = {v:.4g}" for n, v in zip(model.names, at.tolist(), strict=True))
        raise RuntimeError(
            f"Expected a minimum; the fit stopped at {where}, where it falls further or a count "
            "reaches zero. Merge bins of few events, or constrain a nuisance."
        )
    unit = torch.linalg.inv(found.curve[0] * scale[:, None] * scale) * scale[:, None] * scale
    factors = likelihood.factors(templates.expected(at)) if likelihood.mc_stat else None
    result = FitResult(model, at, unit, float(found.value[0]), factors)
    for column, n in enumerate(model.nuisances, 1):
        reach = abs(float(at[column] - model.values[column])) + result.widths[n.name]
        shift = (templates.shifts or {}).get(n.name, math.inf)
        if not isinstance(n, Normalisation) and reach > _FAR * shift:
            warnings.warn(
                f"The fit goes to {reach:.3g} from the nominal value of {n.name!r}, and its "
                f"templates stand at {shift:.3g}: counts are extrapolated. Make them at a larger "
                "shift.",
                stacklevel=4,
            )
    return result


def profile(
    templates: Templates,
    data: Any = None,
    *,
    parameter: str | None = None,
    values: Any = None,
    points: int = 61,
    widths: float = 3.0,
    mc_stat: bool = False,
) -> Scan:
    """Profile the likelihood along a parameter, by default that of interest.

    Arguments:
        templates: Expected counts.
        data: Counts (K,); by default those expected.
        parameter: Name of the parameter that is scanned.
        values: Where to hold it (M,); by default `points` values within ± `widths` uncertainties
            of the best one, as far as no count turns negative.
        points: How many.
        widths: How far.
        mc_stat: As `fit`.

    Raises:
        ValueError: As `fit`, or if there is no such parameter.
        RuntimeError: If no minimum was found, or the likelihood does not fall by 1/2 on both sides.
    """
    likelihood = Likelihood.of(templates, data, mc_stat)
    names = templates.model.names
    name = names[0] if parameter is None else parameter
    if name not in names:
        raise ValueError(f"Expected a parameter among {', '.join(names)}; got {name!r}.")
    index, best = names.index(name), _fit(likelihood)
    if values is None:
        steps = check_positive_int(points, "points")
        reach = torch.linspace(-widths, widths, steps, dtype=torch.float64)
        at = best.values[index] + reach * best.widths[name]
    else:
        at = as_tensor(values, "values").detach().double().cpu().reshape(-1)
        check_finite(at, "values")
    found = _held(likelihood, best, torch.full(at.shape, index), at)
    inside = torch.isfinite(found.value)
    if values is None:
        found, at, inside = Minimum(*(t[inside] for t in found)), at[inside], inside[inside]
    curve = 2 * (found.value - best.nll)
    missed = at[inside & ~found.converged]
    if len(missed):
        warnings.warn(
            f"No minimum was found with {name} held at {missed[0]:.4g} ({len(missed)} such points):"
            " a count reaches zero there, or the likelihood falls further. Merge bins of few "
            "events, or scan fewer widths.",
            stacklevel=3,
        )
    if bool((curve < -1e-6).any()):
        warnings.warn(
            f"The likelihood is larger at {name} = {at[curve.argmin()]:.4g} than where the fit "
            "ended: there are several maxima. Start the scan from other templates, or merge bins.",
            stacklevel=3,
        )
    low, high = _crossings(likelihood, best, index, 1.0)
    return Scan(name, at, curve, found.at, low, high, best, likelihood)


def impacts(templates: Templates, data: Any = None, *, mc_stat: bool = False) -> Impacts:
    """Hold each nuisance one uncertainty off its best value, and fit the others.

    Arguments are those of `fit`.

    Raises:
        ValueError: As `fit`.
        RuntimeError: If a minimum was not found.
    """
    likelihood = Likelihood.of(templates, data, mc_stat)
    best, names = _fit(likelihood), templates.model.names[1:]
    index = torch.arange(1, len(names) + 1).repeat(2)
    sides = torch.tensor([-1.0, 1.0]).repeat_interleave(len(names))
    at = best.values[index] + sides * best.covariance.diagonal().sqrt()[index]
    found = _held(likelihood, best, index, at)
    for row in (~found.converged).nonzero()[:1, 0].tolist():
        raise RuntimeError(
            f"Expected a minimum with {names[index[row] - 1]} held at {at[row]:.4g}; there is none "
            "where counts and parameters are in their range. Constrain it, or merge bins."
        )
    down, up = (found.at[:, 0] - best.values[0]).reshape(2, -1)
    return Impacts(names, down, up, best)


def _held(likelihood: Likelihood, best: FitResult, index: Tensor, at: Tensor) -> Minimum:
    """Minima with a parameter each, those of `index` (M,), held at values (M,)."""
    rows = torch.arange(len(at))
    off = at - best.values[index]
    # where a parabola has its minimum
    slope = best.covariance[:, index] / best.covariance[index, index]
    start = best.values + (slope * off).T
    plain = best.values.expand_as(start).clone()
    start[rows, index] = plain[rows, index] = at
    free = torch.ones_like(start, dtype=torch.bool)
    free[rows, index] = False
    # from both, for noise in the templates makes local minima
    found = minimise(
        likelihood, torch.cat([start, plain]), best.covariance.diagonal().sqrt(), free.repeat(2, 1)
    )
    lower = found.value[: len(at)] <= found.value[len(at) :]
    return Minimum(*(t[torch.where(lower, rows, rows + len(at))] for t in found))


def _crossings(
    likelihood: Likelihood, best: FitResult, index: int, z: float
) -> tuple[float, float]:
    """The two values of a parameter where √(2Δℓ) is z, by Newton's method between bounds."""
    sides = torch.tensor([-1.0, 1.0]).double()
    width = float(best.covariance[index, index].sqrt())
    away = torch.full_like(sides, z * width)
    inner, outer = torch.zeros_like(away), torch.full_like(away, torch.inf)
    for _ in range(200):
        at = best.values[index] + sides * away
        found = _held(likelihood, best, torch.tensor([index] * 2), at)
        height = (2 * (found.value - best.nll)).clamp_min(0).sqrt()
        below = height < z
        inner, outer = torch.where(below, away, inner), torch.where(below, outer, away)
        done = ((height - z).abs() < _CLOSE) | (outer - inner < _CLOSE * width)
        if bool(done.all()):
            # where the range of counts and parameters ends before, bisection runs into its end
            for value in at[(height - z).abs() > 0.01].tolist():
                warnings.warn(
                    f"The likelihood ends at {best.names[index]} = {value:.4g}, where a count or a "
                    f"parameter leaves its range, before √(2Δnll) is {z:.3g}: the interval ends "
                    "there.",
                    stacklevel=4,
                )
            low, high = at.tolist()
            return low, high
        if bool((inner > _REACH * width).any()):
            break
        step = away + (z - height) * height / (sides * found.slope[:, index])
        middle = torch.where(torch.isfinite(outer), (inner + outer) / 2, 2 * away)
        step = torch.where((step > inner) & (step < outer.clamp_max(8 * away)), step, middle)
        away = torch.where(done, away, step)
    raise RuntimeError(
        f"Expected √(2Δnll) of {best.names[index]} to reach {z:.3g} on both sides; it stays below "
        f"up to {float(inner.max()):.3g} from the best value. Constrain what it is exchanged with, "
        "or give more bins."
    )
