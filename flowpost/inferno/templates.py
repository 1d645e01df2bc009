"""Templates: expected counts in bins, with their variations, and what follows from them.

How counts move with the parameters is written in `flowpost.inferno.interpolation`, and is what
HistFactory and pyhf do, so that nothing is lost on the way to them. There the templates of a
constrained nuisance stand at one standard deviation of the constraint; here they may stand at any
shift, and the curve in units of the standard deviation goes through them. The unit of a free one
is 1000 of its shifts, so that the curve between and around its templates is a parabola; that of
any other constraint is the shift.

Source: K. Cranmer et al., *HistFactory*, 2012, CERN-OPEN-2012-016, section 4.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_shape
from .information import Information, inverse, occupied
from .interpolation import Rates, compose, unit
from .model import CountingModel, Normalisation, Nuisance
from .profile import FitResult, Impacts, Scan, fit, impacts, profile
from .summary import signal_order
from .workspace import workspace

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Templates"]

Pair = tuple[Tensor, Tensor]

# bins that are printed
_ROWS = 24


@dataclass(frozen=True, eq=False, repr=False)
class Templates:
    """Expected counts of every process in bins, and their variations; float64, on the CPU.

    `inferno.templates` makes them from events; histograms of your own can be given directly.

    Attributes:
        model: The counting experiment.
        counts: Expected counts (K,) of each process.
        variances: Their variances (K,) by the number of simulated events; None where not known.
        varied: For each `Transform`, `Alternative` and `Reweighting`, and each process that it
            touches, the counts (down, up), each (K,).
        shifts: Distance from nominal of these, by nuisance; by default the model's.

    Raises:
        ValueError: If something is missing, of another shape, not finite, or a bin expects a
            negative number of events in all.

    Example:
        >>> from flowpost.inferno import CountingModel, Process
        >>> model = CountingModel([Process("signal", 50.0, signal=True), Process("other", 1000.0)])
        >>> binned = Templates(model, {"signal": [10.0, 40.0], "other": [900.0, 100.0]})
        >>> print(f"{binned.width:.2f}")
        14.72
        >>> print(f"{binned.profile().half_width:.2f}")
        14.72
    """

    model: CountingModel
    counts: Mapping[str, Tensor]
    variances: Mapping[str, Tensor] | None = None
    varied: Mapping[str, Mapping[str, Pair]] = field(default_factory=dict)
    shifts: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        known = [p.name for p in self.model.processes]
        counts = _columns(self.counts, known, None, "counts")
        size = len(counts[known[0]])
        values: dict[str, Any] = {"counts": counts, "varied": {}, "shifts": {}}
        if self.variances is not None:
            values["variances"] = _columns(self.variances, known, size, "variances")
        for nuisance in self.model.nuisances:
            if isinstance(nuisance, Normalisation):
                continue
            name = nuisance.name
            touched = [p for p in known if nuisance.touches(p)]
            values["varied"][name] = _pairs(self.varied.get(name, {}), touched, size, name)
            shift = float((self.shifts or {}).get(name, nuisance.shift or 0.0))
            if not 0 < shift < math.inf:
                raise ValueError(
                    f"Expected the shift of {name!r} as a positive number; got {shift}."
                )
            values["shifts"][name] = shift
        for name, value in values.items():
            object.__setattr__(self, name, value)
        _check_bins(self)

    @property
    def bins(self) -> int:
        """Bins K."""
        return len(next(iter(self.counts.values())))

    @property
    def total(self) -> Tensor:
        """Expected counts (K,) of all processes."""
        return torch.stack(list(self.counts.values())).sum(0)

    @property
    def signal(self) -> Tensor:
        """Expected signal counts (K,)."""
        return torch.stack([self.counts[p.name] for p in self.model.processes if p.signal]).sum(0)

    @property
    def order(self) -> Tensor:
        """Indices (K,) of the bins by rising signal over background."""
        return signal_order(self.signal, self.total - self.signal)

    @property
    def errors(self) -> Tensor:
        """Relative uncertainty (K,) of the total by the number of simulated events.

        Raises:
            ValueError: If the variances are not known.
        """
        if self.variances is None:
            raise ValueError(
                "Expected variances of the templates for mc_stat=True; got none. Give "
                "Templates(…, variances={process: Σ weights², scaled as the counts}), or make them "
                "from events by inferno.templates."
            )
        variance = torch.stack(list(self.variances.values())).sum(0)
        total = self.total
        return torch.where(total > 0, variance.sqrt() / torch.where(total > 0, total, 1.0), 0.0)

    def nuisance(self, name: str) -> Nuisance:
        """The nuisance of a name.

        Raises:
            ValueError: If there is no such nuisance.
        """
        for nuisance in self.model.nuisances:
            if nuisance.name == name:
                return nuisance
        known = ", ".join(self.model.names[1:]) or "none"
        raise ValueError(f"Expected a nuisance among {known}; got {name!r}.")

    def unit(self, name: str) -> float:
        """The distance from nominal at which α of a nuisance is 1.

        Raises:
            ValueError: If there is no such nuisance.
        """
        return unit(self.nuisance(name), (self.shifts or {}).get(name))

    @cached_property
    def _rates(self) -> Rates:
        return compose(self.model, self.counts, self.varied, self.shifts or {})

    def point(self, values: Any = None) -> Tensor:
        """Values (..., P) of the parameters: nominal ones, where a dict by name does not tell else.

        Raises:
            ValueError: If a name is unknown, or the last size is not P.
        """
        names = self.model.names
        if values is None or isinstance(values, Mapping):
            at = self.model.values.clone()
            for name, value in (values or {}).items():
                if name not in names:
                    raise ValueError(f"Expected parameters among {', '.join(names)}; got {name!r}.")
                at[names.index(name)] = float(value)
            return at
        at = as_tensor(values, "values").double().cpu()
        if at.ndim == 0 or at.shape[-1] != len(names):
            raise ValueError(
                f"Expected values of shape (..., {len(names)}); got {tuple(at.shape)}. "
                f"Give one for each of {', '.join(names)}, or a dict by name."
            )
        return at

    def by_process(self, values: Any = None) -> dict[str, Tensor]:
        """Expected counts (..., K) of each process at values (..., P), by default nominal ones."""
        rates = self._rates.at(self.point(values)).unbind(-2)
        return {p.name: r for p, r in zip(self.model.processes, rates, strict=True)}

    def expected(self, values: Any = None) -> Tensor:
        """Expected counts (..., K) at values (..., P), differentiable; by default nominal ones."""
        return self._rates.at(self.point(values)).sum(-2)

    def asimov(self, values: Any = None) -> Tensor:
        """The data (K,) that equal what is expected at values, by default nominal ones."""
        return self.expected(values).detach()

    def slopes(self, values: Any = None) -> Tensor:
        """Derivatives (P, K) of the expected counts by the parameters at values (P,)."""
        at = self.point(values).detach()
        slopes: Any = torch.func.jacrev(lambda v: self._rates.at(v).sum(-2))(at)
        return slopes.T

    def information(self, *, mc_stat: bool = False) -> Information:
        """The expected uncertainties at nominal values.

        Arguments:
            mc_stat: Let the number of simulated events limit them, as `fit` does.

        Raises:
            ValueError: If the bins leave parameters open.
        """
        counts = self.total
        # profiling a factor of relative width e on a bin takes its variance from λ to λ + e²λ²
        shrink = (1 + self.errors.square() * counts).rsqrt() if mc_stat else 1.0
        covariance = inverse(self.model, counts, self.slopes() * shrink)
        used = int(occupied(counts).sum())
        return Information(self.model.names, covariance, counts, self.signal, used)

    @property
    def covariance(self) -> Tensor:
        """Expected covariance (P, P) of the parameters."""
        return self.information().covariance

    @property
    def width(self) -> float:
        """Expected uncertainty on the parameter of interest, nuisances profiled."""
        return self.information().width

    @property
    def widths(self) -> dict[str, float]:
        """Expected uncertainty on every parameter."""
        return self.information().widths

    def merged(self, groups: Sequence[Sequence[int]]) -> Templates:
        """The same in fewer bins: each the sum of a group of them, every one in one group.

        Raises:
            ValueError: If a bin is missing or given twice.
        """
        rows = [[int(k) for k in group] for group in groups]
        flat = sorted(k for row in rows for k in row)
        if flat != list(range(self.bins)) or not all(rows):
            raise ValueError(
                f"Expected groups that hold each of the bins 0 to {self.bins - 1} once; got {rows}."
            )
        matrix = torch.zeros(len(rows), self.bins, dtype=torch.float64)
        for row, group in enumerate(rows):
            matrix[row, group] = 1.0
        return self._mapped(lambda t: matrix @ t)

    def ordered(self) -> Templates:
        """The same with bins by rising signal over background; data then go as `data[order]`."""
        order = self.order
        return self._mapped(lambda t: t[order])

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> Templates:
        varied = {
            name: {p: (change(pair[0]), change(pair[1])) for p, pair in own.items()}
            for name, own in self.varied.items()
        }
        counts = {p: change(c) for p, c in self.counts.items()}
        variances = None
        if self.variances is not None:
            variances = {p: change(v) for p, v in self.variances.items()}
        return self._again(self.model, counts, variances, varied)

    def _again(self, model: CountingModel, counts: Any, variances: Any, varied: Any) -> Templates:
        """Others of the same counts; what there is to say of these was said."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Templates(model, counts, variances, varied, self.shifts)

    def fixed(self, *names: str) -> Templates:
        """The same with some nuisances left out, fixed at their nominal values.

        Raises:
            ValueError: If there is no such nuisance.
        """
        model = self.model.without(*names)
        return self._again(model, self.counts, self.variances, self.varied)

    def fit(self, data: Any = None, *, mc_stat: bool = False) -> FitResult:
        """Fit counts (K,), by default those expected: `flowpost.inferno.profile.fit`."""
        return fit(self, data, mc_stat=mc_stat)

    def profile(self, data: Any = None, **options: Any) -> Scan:
        """Profile the likelihood of counts (K,): `flowpost.inferno.profile.profile`."""
        return profile(self, data, **options)

    def impacts(self, data: Any = None, *, mc_stat: bool = False) -> Impacts:
        """What every nuisance does to the result: `flowpost.inferno.profile.impacts`."""
        return impacts(self, data, mc_stat=mc_stat)

    def workspace(self, data: Any = None, **options: Any) -> dict[str, Any]:
        """The pyhf workspace: `flowpost.inferno.workspace.workspace`."""
        return workspace(self, data, **options)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the stacked processes and the variations: `plot_templates`."""
        from ..plots.inferno import plot_templates

        return plot_templates(self, ax, **options)

    def __str__(self) -> str:
        names = list(self.counts)
        wide = [max(10, len(n) + 1) for n in names]
        known = self.variances is not None
        head = "".join(f"{n:>{w}}" for n, w in zip(names, wide, strict=True))
        lines = [f"  bin{head}{'total':>10}" + ("  simulated" if known else "")]
        total = self.total
        for k in range(self.bins)[:_ROWS]:
            row = "".join(f"{self.counts[n][k]:{w}.2f}" for n, w in zip(names, wide, strict=True))
            note = f"  ± {100 * self.errors[k]:.1f} %" if known else ""
            lines.append(f"{k:5d}{row}{total[k]:10.2f}{note}")
        if self.bins > _ROWS:
            lines.append(f"  ... {self.bins - _ROWS} more")
        for name, own in self.varied.items():
            nominal = torch.stack([self.counts[p] for p in own]).sum()
            sides = (torch.stack([pair[i] for pair in own.values()]).sum() for i in range(2))
            change = " / ".join(f"{100 * (s / nominal - 1):+.2f} %" for s in sides)
            of = ", ".join(own)
            lines.append(f"  {name} at ∓{(self.shifts or {})[name]:g}: {change} of {of}")
        return "\n".join(lines)


def _columns(
    value: Mapping[str, Any], names: Sequence[str], size: int | None, what: str
) -> dict[str, Tensor]:
    missing = [n for n in names if n not in value]
    if missing:
        raise ValueError(f"Expected {what} of {', '.join(names)}; got none of {missing[0]!r}.")
    found = {}
    for name in names:
        column = as_tensor(value[name], what).detach().double().cpu()
        check_shape(
            column, ("K",) if size is None else (size,), f"{what} of {name!r}", "One a bin."
        )
        check_finite(column, f"{what} of {name!r}", "Look for empty samples or NaN weights.")
        size = len(column)
        found[name] = column
    return found


def _pairs(own: Mapping[str, Any], touched: Sequence[str], size: int, name: str) -> dict[str, Pair]:
    for process in touched:
        if process not in own or len(own[process]) != 2:
            raise ValueError(
                f"Expected the variation {name!r} of {process!r} as a pair (down, up) of counts "
                f"({size},). Give varied={{{name!r}: {{{process!r}: (down, up)}}}}."
            )
    sides = [
        _columns({p: own[p][i] for p in touched}, touched, size, f"{name!r} {side}")
        for i, side in enumerate(("down", "up"))
    ]
    return {p: (sides[0][p], sides[1][p]) for p in touched}


def _check_bins(templates: Templates) -> None:
    total = templates.total
    least = 1e-9 * float(total.abs().sum())
    for k in (total < -least).nonzero()[:1, 0].tolist():
        parts = ", ".join(f"{n} {c[k]:.3g}" for n, c in templates.counts.items())
        raise ValueError(
            f"Expected counts above zero; got {total[k]:.3g} in bin {k} ({parts}): weights below "
            "zero outweigh the others. Use fewer bins, or simulate more events."
        )
    empty = (total <= least).nonzero()[:, 0].tolist()
    if len(empty) == templates.bins:
        raise ValueError("Expected counts above zero in some bin; got none.")
    if empty:
        warnings.warn(
            f"Nothing is expected in bins {', '.join(map(str, empty))}, which are left out, and "
            "data there are an error. Merge them with others: templates.merged(groups).",
            stacklevel=4,
        )
    for name, counts in templates.counts.items():
        low = (counts < -least).nonzero()[:, 0].tolist()
        if low:
            warnings.warn(
                f"Expected counts of {name!r} above zero; got {float(counts.min()):.3g} in bin "
                f"{int(counts.argmin())} ({len(low)} such), by weights below zero. Merge such bins "
                "with others: templates.merged(groups).",
                stacklevel=4,
            )
