r"""Templates as a workspace of pyhf, and pyhf's own fit of it.

The parameter of interest and free normalisations become `normfactor` (1 at nominal), those with a
`LogNormal` constraint `normsys`, all others `histosys`. A nuisance is there

.. math::

    \alpha = \frac{\theta - \theta_0}{u} \quad \text{or} \quad \frac{\ln(\theta / \theta_0)}{\sigma}

with a constraint N(0, 1), and `histosys` holds the counts at α = ±1, whatever the shift at which
they were simulated: pyhf has neither another width nor none for it. The unit u is therefore the
standard deviation of the constraint. A free nuisance has a unit of 1000 shifts: its templates there
are far outside of what is fitted, its curve goes through the given ones, and the constraint adds
less than 10⁻⁴ of the information.

Source: L. Heinrich, M. Feickert, G. Stark, K. Cranmer, *pyhf: pure-Python implementation of
HistFactory statistical models*, 2021, https://doi.org/10.21105/joss.02823.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal

from .._checks import require
from .interpolation import even_part
from .likelihood import Likelihood
from .model import Normalisation, Nuisance

if TYPE_CHECKING:
    from .templates import Templates

__all__ = ["PyhfFit", "pyhf_fit", "pyhf_parameters", "workspace"]

# information that the constraint of a free nuisance may add, and the range of fits in widths
_ADDED, _RANGE = 1e-4, 10.0
_CHANNEL = "summary"


def workspace(
    templates: Templates, data: Any = None, *, name: str = "measurement", mc_stat: bool = False
) -> dict[str, Any]:
    """Describe templates and data as pyhf does: JSON of a workspace, version 1.0.0.

    Arguments:
        templates: Expected counts.
        data: Counts (K,); by default those expected.
        name: Of the measurement.
        mc_stat: Add one factor a bin for the number of simulated events (`staterror`).

    Raises:
        ValueError: If a constraint has no counterpart, or the templates of a free nuisance stand
            too near to its nominal value.
    """
    counts = Likelihood.of(templates, data, mc_stat).data
    model = templates.model
    widths = templates.information(mc_stat=mc_stat).widths
    samples = []
    for process in model.processes:
        modifiers: list[dict[str, Any]] = []
        if process.signal:
            modifiers.append({"name": model.poi, "type": "normfactor", "data": None})
        for nuisance in model.nuisances:
            if nuisance.touches(process.name):
                modifiers.append(_modifier(templates, nuisance, process.name, widths))
        if mc_stat:
            assert templates.variances is not None
            errors = templates.variances[process.name].sqrt().tolist()
            modifiers.append({"name": _unused(templates), "type": "staterror", "data": errors})
        own = templates.counts[process.name].tolist()
        samples.append({"name": process.name, "data": own, "modifiers": modifiers})
    parameters = [_poi(templates, widths[model.poi])]
    parameters += [_parameter(templates, n, widths[n.name]) for n in model.nuisances]
    return {
        "channels": [{"name": _CHANNEL, "samples": samples}],
        "observations": [{"name": _CHANNEL, "data": counts.tolist()}],
        "measurements": [{"name": name, "config": {"poi": model.poi, "parameters": parameters}}],
        "version": "1.0.0",
    }


def _unused(templates: Templates) -> str:
    name = "mc_stat"
    while name in templates.model.names:
        name += "_"
    return name


def _modifier(
    templates: Templates, nuisance: Nuisance, process: str, widths: dict[str, float]
) -> dict[str, Any]:
    name, constraint = nuisance.name, nuisance.constraint
    if isinstance(nuisance, Normalisation):
        if constraint is None:
            return {"name": name, "type": "normfactor", "data": None}
        if isinstance(constraint, LogNormal):
            scale = float(constraint.scale)
            sides = {"hi": math.exp(scale), "lo": math.exp(-scale)}
            return {"name": name, "type": "normsys", "data": sides}
    if not (constraint is None or isinstance(constraint, Normal)):
        wanted = "Normal"
        if isinstance(nuisance, Normalisation):
            wanted += " or LogNormal"
        raise ValueError(
            f"Expected the constraint of {name!r} as {wanted}, or None, for pyhf; got "
            f"{constraint}. Replace it, or fit here: templates.fit()."
        )
    unit = templates.unit(name)
    if nuisance.free and (widths[name] / unit) ** 2 > _ADDED:
        assert templates.shifts is not None
        raise ValueError(
            f"Expected templates of the free {name!r} at a shift near to its uncertainty of "
            f"{widths[name]:.3g}; got {templates.shifts[name]:.3g}. Make them at a larger shift, "
            "or constrain it."
        )
    down, up = _sides(templates, nuisance, process)
    return {"name": name, "type": "histosys", "data": {"lo_data": down, "hi_data": up}}


def _sides(templates: Templates, nuisance: Nuisance, process: str) -> tuple[list, list]:
    """Counts (K,) of a process at α = −1 and 1 of an additive nuisance."""
    rates, column = templates._rates, templates.model.names.index(nuisance.name)
    j = rates.columns.tolist().index(column)
    row = [p.name for p in templates.model.processes].index(process)
    odd, even = rates.odd[j, row], rates.even[j, row] * even_part(torch.ones(()).double())
    nominal = rates.nominal[row]
    return (nominal - odd + even).tolist(), (nominal + odd + even).tolist()


def _poi(templates: Templates, width: float) -> dict[str, Any]:
    """Bounds of the strength within which every expected count is positive."""
    relative = width / templates.model.nominal
    signal = templates.signal
    ratio = templates.total / torch.where(signal > 0, signal, 1.0)
    least = float(torch.where(signal > 0, 1 - ratio, -torch.inf).max())
    low = max(1 - _RANGE * relative, 0.99 * least if least < 0 else 0.0)
    bounds = [[low, 1 + _RANGE * relative]]
    return {"name": templates.model.poi, "inits": [1.0], "bounds": bounds}


def _parameter(templates: Templates, nuisance: Nuisance, width: float) -> dict[str, Any]:
    name, constraint = nuisance.name, nuisance.constraint
    nominal = float(nuisance.nominal or 0.0)
    if isinstance(constraint, LogNormal):
        centre = (float(constraint.loc) - math.log(nominal)) / float(constraint.scale)
    elif isinstance(constraint, Normal):
        centre = (float(constraint.loc) - nominal) / float(constraint.scale)
    elif isinstance(nuisance, Normalisation):
        reach = _RANGE * width / nominal
        return {"name": name, "inits": [1.0], "bounds": [[max(0.0, 1 - reach), 1 + reach]]}
    else:
        reach = _RANGE * width / templates.unit(name)
        return {"name": name, "inits": [0.0], "bounds": [[-reach, reach]]}
    return {"name": name, "inits": [0.0], "auxdata": [centre]}


def _scales(templates: Templates) -> list[tuple[float, float, bool]]:
    """Of each parameter: nominal value, what one unit of pyhf's is, and whether of a logarithm."""
    model = templates.model
    found = [(0.0, model.nominal, False)]
    for nuisance in model.nuisances:
        nominal = float(nuisance.nominal or 0.0)
        linear = isinstance(nuisance.constraint, Normal) or not isinstance(nuisance, Normalisation)
        if linear:
            found.append((nominal, templates.unit(nuisance.name), False))
        elif isinstance(nuisance.constraint, LogNormal):
            found.append((nominal, float(nuisance.constraint.scale), True))
        else:
            found.append((0.0, nominal, False))
    return found


def pyhf_parameters(templates: Templates, values: Any = None) -> dict[str, float]:
    """The workspace's parameters, by name, at values (P,) or a dict of the package's.

    Raises:
        ValueError: As `Templates.point`.
    """
    found = {}
    at = templates.point(values).tolist()
    for name, value, (centre, unit, log) in zip(
        templates.model.names, at, _scales(templates), strict=True
    ):
        found[name] = (math.log(value / centre) if log else value - centre) / unit
    return found


@dataclass(frozen=True, eq=False, repr=False)
class PyhfFit:
    """What pyhf and Minuit find, in the units of the package.

    Attributes:
        names: The parameters, that of interest first.
        values: Their best values (P,).
        errors: Their uncertainties (P,) by HESSE.
        low: Where −2 ln of pyhf's profile likelihood is 1 below the best value of the parameter of
            interest.
        high: Where it is 1 above.
    """

    names: tuple[str, ...]
    values: Tensor
    errors: Tensor
    low: float
    high: float

    @property
    def best(self) -> dict[str, float]:
        """The best value of every parameter."""
        return dict(zip(self.names, self.values.tolist(), strict=True))

    @property
    def widths(self) -> dict[str, float]:
        """The uncertainty on every parameter by HESSE."""
        return dict(zip(self.names, self.errors.tolist(), strict=True))

    @property
    def width(self) -> float:
        """The uncertainty on the parameter of interest by HESSE."""
        return float(self.errors[0])

    @property
    def half_width(self) -> float:
        """Half the distance of the two points."""
        return (self.high - self.low) / 2

    def __str__(self) -> str:
        rows = [f"{n:>12} {v:11.5g} ± {self.widths[n]:.4g}" for n, v in self.best.items()]
        rows.append(f"{'half width':>12} {self.half_width:11.4g} by pyhf's profile")
        return "\n".join(rows)


@contextmanager
def _numpy_minuit() -> Iterator[Any]:
    """pyhf with numpy and Minuit; what the process had chosen comes back behind."""
    require("iminuit", "hep")
    pyhf = require("pyhf", "hep")
    optimizer = require("pyhf.optimize.opt_minuit", "hep").minuit_optimizer
    before = pyhf.get_backend()
    pyhf.set_backend("numpy", optimizer(tolerance=0.01, strategy=1))
    try:
        with warnings.catch_warnings():
            # pyhf validates by a part of jsonschema that will go
            warnings.filterwarnings("ignore", "jsonschema.RefResolver", DeprecationWarning)
            yield pyhf
    except pyhf.exceptions.FailedMinimization as error:
        raise RuntimeError(
            "Expected a minimum by Minuit; it found none. Constrain nuisances that the bins do not "
            "tell apart, or fit here: templates.fit()."
        ) from error
    finally:
        pyhf.set_backend(*before)


def pyhf_fit(templates: Templates, data: Any = None, *, mc_stat: bool = False) -> PyhfFit:
    """Fit the workspace by pyhf with numpy and iminuit (`pip install flowpost[hep]`).

    pyhf's backend and optimizer are what they were before.

    Arguments:
        templates: Expected counts.
        data: Counts (K,); by default those expected.
        mc_stat: As `workspace`.

    Raises:
        ImportError: If pyhf or iminuit is not installed.
        ValueError: As `workspace`.
        RuntimeError: If Minuit finds no minimum.
    """
    described = workspace(templates, data, mc_stat=mc_stat)
    with _numpy_minuit() as pyhf:
        space = pyhf.Workspace(described)
        model = space.model()
        counts = space.data(model)
        _, lowest, found = pyhf.infer.mle.fit(
            counts, model, return_fitted_val=True, return_result_obj=True
        )
        best, spread = _hesse(templates, model.config, found.minuit, mc_stat)

        def height(strength: float) -> float:
            if model.config.npars == 1:  # pyhf refuses a fit without free parameters
                value = -2 * model.logpdf([strength], counts)[0]
            else:
                _, value = pyhf.infer.mle.fixed_poi_fit(
                    strength, counts, model, return_fitted_val=True
                )
            return math.sqrt(max(0.0, float(value - lowest)))

        strength, error = float(best[model.config.poi_index]), float(spread[model.config.poi_index])
        low, high = (strength + s * _crossing(height, strength, s * error) for s in (-1, 1))
    values, errors = [], []
    for name, (centre, unit, log) in zip(templates.model.names, _scales(templates), strict=True):
        place = model.config.par_slice(name)
        value, error = float(best[place]), float(spread[place])
        values.append(centre * math.exp(unit * value) if log else centre + unit * value)
        errors.append(error * unit * (values[-1] if log else 1.0))
    scale = templates.model.nominal
    return PyhfFit(
        templates.model.names,
        torch.tensor(values, dtype=torch.float64),
        torch.tensor(errors, dtype=torch.float64),
        scale * low,
        scale * high,
    )


def _hesse(templates: Templates, config: Any, minuit: Any, mc_stat: bool) -> tuple[Tensor, Tensor]:
    """Values and uncertainties of pyhf's parameters, by HESSE with steps of the expected widths.

    With the steps that are left of a search from near the minimum, HESSE is off by some per cent.
    Uncertainties are those of the covariance: Minuit's `errors` average over both ends of a step
    within the bounds, and are 0.2 % too small for bounds at ten of them.
    """
    widths = templates.information(mc_stat=mc_stat).widths.values()
    for name, width, (centre, unit, log) in zip(
        templates.model.names, widths, _scales(templates), strict=True
    ):
        minuit.errors[config.par_slice(name).start] = width / unit / (centre if log else 1.0)
    if mc_stat:
        first = config.par_slice(_unused(templates)).start
        for k, error in enumerate(templates.errors.tolist()):
            minuit.errors[first + k] = error or 1.0
    minuit.hesse()
    covariance = torch.tensor(minuit.covariance.tolist(), dtype=torch.float64)
    return torch.tensor(list(minuit.values), dtype=torch.float64), covariance.diagonal().sqrt()


def _crossing(height: Callable[[float], float], best: float, step: float) -> float:
    """The distance from the best value, to the side of `step`, at which a function is 1."""
    from scipy.optimize import brentq

    far = 1.0
    while height(best + far * step) < 1:
        far *= 1.5
        if far > _RANGE:
            raise RuntimeError(
                "Expected pyhf's likelihood to fall by 1/2 within ten uncertainties; it does not. "
                "Constrain a nuisance, or give more bins."
            )
    near = far / 1.5
    while height(best + near * step) > 1:
        near /= 1.5
    return abs(step) * brentq(lambda t: height(best + t * step) - 1, near, far, xtol=1e-5)
