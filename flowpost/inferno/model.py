r"""The counting experiment: processes, the parameter of interest, and nuisances.

The expected count of bin i is

.. math:: \lambda_i(s, \theta) = \sum_p Y_p(s, \theta) \, f_{p,i}(\theta) ,

where the yields of the signals are proportional to the parameter of interest s, those of all
processes to the normalisations that touch them, and the shape :math:`f_p` moves with the other
nuisances. A nuisance has a *constraint*, the density of an auxiliary measurement, or is free.

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743; K. Cranmer et al., *HistFactory*, 2012, CERN-OPEN-2012-016.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, LogNormal, Normal

__all__ = [
    "Alternative",
    "CountingModel",
    "Normalisation",
    "Nuisance",
    "Process",
    "Reweighting",
    "Transform",
]

_LEVEL = 1e-4


@dataclass(frozen=True)
class Process:
    """A signal or a background.

    Attributes:
        name: What it is called.
        expected: Its expected number of events, the yield, at nominal parameters.
        signal: Whether the parameter of interest scales it.

    Raises:
        ValueError: If the yield is not a positive number.
    """

    name: str
    expected: float
    signal: bool = False

    def __post_init__(self) -> None:
        if not (isinstance(self.expected, (int, float)) and 0 < self.expected < math.inf):
            raise ValueError(
                f"Expected the yield of {self.name!r} as a positive number of events; got "
                f"{self.expected!r}."
            )


@dataclass(frozen=True, kw_only=True)
class Nuisance:
    """What the four kinds of nuisance have in common.

    Attributes:
        name: What it is called.
        processes: Names of the processes that it touches; None for all.
        constraint: A distribution of one number, in the units of the nuisance; None where it is
            free. A `LogNormal` is read as HistFactory reads it: a normal on the logarithm.
        nominal: The value of the simulation, where the constraint must be most probable; by
            default that value, and where it is free 0, or 1 for a normalisation.
        shift: The distance from nominal, in the units of the nuisance, at which templates up and
            down are (or, for a `Transform`, will be) made; by default one standard deviation of
            the constraint.

    Raises:
        ValueError: If the constraint is no distribution of one number, is not most probable at
            the nominal value, or a shift is missing or not positive.
    """

    name: str
    processes: Sequence[str] | str | None = None
    constraint: Distribution | None = None
    nominal: float | None = None
    shift: float | None = None
    _default = 0.0

    def __post_init__(self) -> None:
        constraint = self.constraint
        if constraint is not None and not (
            isinstance(constraint, Distribution)
            and constraint.batch_shape.numel() * constraint.event_shape.numel() == 1
        ):
            raise ValueError(
                f"Expected the constraint of {self.name!r} as a torch.distributions.Distribution "
                f"of one number, or None for a free one; got {constraint!r}."
            )
        nominal = self._nominal() if self.nominal is None else float(self.nominal)
        self._check_nominal(nominal)
        object.__setattr__(self, "nominal", nominal)
        if isinstance(self.processes, str):
            object.__setattr__(self, "processes", (self.processes,))
        elif self.processes is not None:
            object.__setattr__(self, "processes", tuple(self.processes))
            if not self.processes:
                raise ValueError(
                    f"Expected at least one process of {self.name!r}; got none. Leave processes=… "
                    "away for all of them."
                )
        if constraint is not None:
            self._check_mode(nominal)
        shift = self._shift() if self.shift is None else float(self.shift)
        if not 0 < shift < math.inf:
            raise ValueError(f"Expected shift of {self.name!r} as a positive number; got {shift}.")
        object.__setattr__(self, "shift", shift)

    def _check_nominal(self, nominal: float) -> None:
        if not math.isfinite(nominal):
            raise ValueError(f"Expected a finite nominal value of {self.name!r}; got {nominal}.")

    def _nominal(self) -> float:
        constraint = self.constraint
        if constraint is None:
            return self._default
        if isinstance(constraint, LogNormal):
            return math.exp(float(constraint.loc))
        try:
            value = float(constraint.mode)
        except NotImplementedError:
            value = math.nan
        if not math.isfinite(value):
            raise ValueError(
                f"Expected nominal=… of {self.name!r}: the most probable value of its constraint "
                f"{constraint} is not known."
            )
        return value

    def _shift(self) -> float:
        if self.constraint is None:
            raise ValueError(
                f"Expected shift=… of {self.name!r}: a free nuisance has no standard deviation. "
                "Give the distance from nominal of its up and down templates."
            )
        if isinstance(self.constraint, LogNormal):
            return float(self.nominal or 0.0) * math.expm1(float(self.constraint.scale))
        return float(self.constraint.stddev)

    def _check_mode(self, nominal: float) -> None:
        at = torch.tensor(nominal, dtype=torch.float64, requires_grad=True)
        penalty = self.penalty(at)
        slope = torch.tensor(math.nan)
        if bool(torch.isfinite(penalty)):
            slope = torch.zeros(())
            if penalty.requires_grad:
                (slope,) = torch.autograd.grad(penalty, at)
        assert self.constraint is not None
        unit = float(self.constraint.stddev)
        if not abs(float(slope)) * (unit if 0 < unit < math.inf else 1.0) < _LEVEL:
            raise ValueError(
                f"Expected the constraint of {self.name!r} most probable at its nominal value "
                f"{nominal:g}; got {self.constraint}, which pulls away from it. Set nominal=… to "
                "the constraint's mode."
            )

    @property
    def free(self) -> bool:
        """Whether nothing but the data constrains it."""
        return self.constraint is None

    def penalty(self, value: Tensor) -> Tensor:
        """Negative log density of the constraint at values (...), without its constant part."""
        constraint = self.constraint
        if constraint is None:
            return torch.zeros_like(value)
        if isinstance(constraint, LogNormal):
            loc, scale = constraint.loc.to(value), constraint.scale.to(value)
            return 0.5 * ((value.log() - loc) / scale).square().reshape(value.shape)
        if isinstance(constraint, Normal):
            loc, scale = constraint.loc.to(value), constraint.scale.to(value)
            return 0.5 * ((value - loc) / scale).square().reshape(value.shape)
        shaped = value.reshape(value.shape + constraint.batch_shape + constraint.event_shape)
        return -constraint.log_prob(shaped).reshape(value.shape)

    def curvature(self) -> float:
        """Second derivative of the penalty at the nominal value: the constraint's information."""
        if self.constraint is None:
            return 0.0
        at = torch.tensor(self.nominal, dtype=torch.float64, requires_grad=True)
        penalty = self.penalty(at)
        if not penalty.requires_grad:
            return 0.0
        (slope,) = torch.autograd.grad(penalty, at, create_graph=True)
        if not slope.requires_grad:
            return 0.0
        return float(torch.autograd.grad(slope, at)[0])

    def touches(self, process: str) -> bool:
        """Whether a process moves with it."""
        return self.processes is None or process in self.processes


@dataclass(frozen=True, kw_only=True)
class Normalisation(Nuisance):
    """A factor on the yields of processes, 1 where nothing is changed.

    With a nominal value other than 1 it is the yield in units of its own: the factor is
    value / nominal.

    Example:
        >>> Normalisation(name="b", processes="background", constraint=Normal(1000.0, 100.0)).shift
        100.0
    """

    _default = 1.0

    def _check_nominal(self, nominal: float) -> None:
        if not 0 < nominal < math.inf:
            raise ValueError(
                f"Expected the nominal value of {self.name!r} as a positive factor or yield; got "
                f"{nominal!r}."
            )

    def _shift(self) -> float:
        # free factors need no templates: any distance serves for their display
        return 0.1 * float(self.nominal or 0.0) if self.free else super()._shift()


@dataclass(frozen=True, kw_only=True)
class Transform(Nuisance):
    """A nuisance that moves the inputs of events: x → apply(x, value).

    Attributes:
        apply: A function of inputs (N, …), in the form that the encoder takes, and of the value, a
            scalar tensor. It returns new inputs, is differentiable in the value, and at the nominal
            value leaves inputs as they are.
    """

    apply: Callable[[Any, Tensor], Any] = field(default=None)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not callable(self.apply):
            raise ValueError(
                f"Expected apply=… of {self.name!r} as a function (x, value) -> x; got "
                f"{self.apply!r}."
            )


@dataclass(frozen=True, kw_only=True)
class Alternative(Nuisance):
    """A nuisance known by samples simulated at nominal − shift and nominal + shift.

    Attributes:
        shape_only: Leave out what it does to the yield. Otherwise the sums of weights of the
            samples must stand to each other as the yields do.
    """

    shape_only: bool = False


@dataclass(frozen=True, kw_only=True)
class Reweighting(Nuisance):
    """A nuisance known by factors on the event weights at nominal − shift and nominal + shift.

    Attributes:
        shape_only: Leave out what it does to the yield.
    """

    shape_only: bool = False


class CountingModel:
    """Processes, nuisances and the parameter of interest of a binned measurement.

    Arguments:
        processes: Signals and backgrounds.
        nuisances: `Normalisation`, `Transform`, `Alternative`, `Reweighting`.
        poi: Name of the parameter of interest, which scales all signals together.
        nominal: Its nominal value; by default the expected number of signal events, so that it is
            their yield. With 1 it is the signal strength.

    Attributes:
        names: The parameter of interest and the nuisances, in the order of all matrices.
        values: Their nominal values, of shape (P,), float64.
        curvature: The information (P,) of the constraints.

    Raises:
        ValueError: If there is no signal, a name is given twice, or a nuisance touches a process
            that is not there.

    Example:
        >>> model = CountingModel(
        ...     [Process("signal", 50.0, signal=True), Process("background", 1000.0)],
        ...     [Normalisation(name="b", processes="background", constraint=Normal(1.0, 0.1))],
        ... )
        >>> model
        CountingModel(s = 50: signal; background 1000; b = 1 ± 0.1 (normalisation of background))
    """

    def __init__(
        self,
        processes: Iterable[Process],
        nuisances: Iterable[Nuisance] = (),
        poi: str = "s",
        nominal: float | None = None,
    ) -> None:
        self.processes = tuple(processes)
        self.nuisances = tuple(nuisances)
        known = [p.name for p in self.processes]
        _once([*known], "process")
        _once([poi, *(n.name for n in self.nuisances)], "parameter")
        if not any(p.signal for p in self.processes):
            raise ValueError(
                "Expected at least one signal; got none. Mark it: Process(name, expected, "
                "signal=True)."
            )
        for nuisance in self.nuisances:
            if type(nuisance) is Nuisance or not isinstance(nuisance, Nuisance):
                raise ValueError(
                    "Expected Normalisation, Transform, Alternative or Reweighting; got "
                    f"{type(nuisance).__name__}."
                )
            for name in nuisance.processes or ():
                if name not in known:
                    raise ValueError(
                        f"Expected processes of {nuisance.name!r} among {', '.join(known)}; got "
                        f"{name!r}."
                    )
        self.poi = poi
        total = sum(p.expected for p in self.processes if p.signal)
        self.nominal = float(total if nominal is None else nominal)
        if not 0 < self.nominal < math.inf:
            raise ValueError(f"Expected nominal as a positive number; got {nominal!r}.")
        self.names = (poi, *(n.name for n in self.nuisances))
        for nuisance in self.nuisances:
            if not (nuisance.free or nuisance.curvature() > 0):
                warnings.warn(
                    f"The constraint {nuisance.constraint} of {nuisance.name!r} has no curvature "
                    "at its nominal value: Fisher information takes it for free. Use a Normal of "
                    "the same width.",
                    stacklevel=2,
                )
        self.values = torch.tensor(
            [self.nominal, *(float(n.nominal or 0.0) for n in self.nuisances)], dtype=torch.float64
        )
        self.curvature = torch.tensor(
            [0.0, *(n.curvature() for n in self.nuisances)], dtype=torch.float64
        )

    def __repr__(self) -> str:
        signals = " + ".join(p.name for p in self.processes if p.signal)
        parts = [f"{self.poi} = {self.nominal:g}: {signals}"]
        parts += [f"{p.name} {p.expected:g}" for p in self.processes if not p.signal]
        for n in self.nuisances:
            width = "free" if n.free else f"± {n.shift:g}"
            of = "all" if n.processes is None else ", ".join(n.processes)
            sign = f"{n.nominal:g} {width}" if not n.free else f"{n.nominal:g}, free"
            parts.append(f"{n.name} = {sign} ({type(n).__name__.lower()} of {of})")
        return f"CountingModel({'; '.join(parts)})"

    def of_kind(self, kind: type[Nuisance], process: str) -> list[Any]:
        """Nuisances of a kind that touch a process."""
        return [n for n in self.nuisances if isinstance(n, kind) and n.touches(process)]

    def without(self, *names: str) -> CountingModel:
        """The same with some nuisances left out, fixed at their nominal values.

        Raises:
            ValueError: If there is no such nuisance.
        """
        for name in names:
            if name not in self.names[1:]:
                raise ValueError(
                    f"Expected nuisances among {', '.join(self.names[1:])}; got {name!r}."
                )
        rest = [n for n in self.nuisances if n.name not in names]
        return CountingModel(self.processes, rest, self.poi, self.nominal)


def _once(names: list[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"Expected each {what} once; got {name!r} twice.")
