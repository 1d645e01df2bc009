r"""The toy problem of INFERNO: counting a signal in three dimensions, with the exact limit.

Events are those of a Poisson process of density

.. math::

    \rho(x) = s\, f_s(x) + b\, f_b(x; r, \lambda), \qquad
    f_s = N(x_0; 0, 1)\, N(x_1; 0, 1)\, \mathrm{Exp}(x_2; 2), \quad
    f_b = N(x_0; 2 + r, 5)\, N(x_1; 0, 9)\, \mathrm{Exp}(x_2; \lambda)

(variances and rates), with s = 50, b = 1000, r = 0 and λ = 3. The Fisher information about s and
the nuisances is an integral, and the profiled uncertainty on s follows from its inverse,

.. math::

    I_{jk} = \int \frac{\partial_j \rho\, \partial_k \rho}{\rho}\, \mathrm{d}x +
        \frac{\delta_{jk}}{\sigma_j^2}, \qquad \Delta s = \sqrt{(I^{-1})_{ss}} .

with the curvatures of the constraints added. In elliptic coordinates of the plane the ratio of the
nominal densities depends on q = ρ² and x₂ only,

.. math::

    x_0 = -\tfrac12 + \sqrt{5/2}\, \rho \cos\varphi, \quad x_1 = \tfrac32\, \rho \sin\varphi, \qquad
    \ln \frac{f_s}{f_b} = G - \rho^2 + x_2, \quad G = \tfrac12 + \ln 2 + \ln\sqrt5 ,

so that equal steps in φ and Gauss–Legendre nodes in ρ and x₂ resolve the integrand, and bins in the
ratio are intervals of x₂, integrated in closed form.

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743, section 5.1. Its text gives the signal the mean (1, 1); its code,
and the numbers of its tables, are those of the mean (0, 0), which is the one here.
"""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.distributions import Normal

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ._random import resolve_generator

__all__ = ["InfernoToy"]

_MEAN, _VARIANCE = 2.0, (5.0, 9.0)  # of the background in the plane
_RATE, _SIGNAL_RATE = 3.0, 2.0
_ALL = ("s", "r", "rate", "b")
# widths of the constraints of every benchmark, on b in units of b
_FREE, _GIVEN = {"r": math.inf, "rate": math.inf}, {"r": 0.4, "rate": 1.0}
_WIDTHS: list[dict[str, float]] = [{}, {"r": math.inf}, _FREE, _GIVEN, _GIVEN | {"b": 0.1}]

_AXES, _CENTRE = (math.sqrt(5 / 2), 3 / 2), -1 / 2  # of the ellipses of equal ratio
_TOP = 0.5 + math.log(2) + 0.5 * math.log(5)  # G
_REACH_Q, _REACH_X2 = 320.0, 20.0  # ρ² and x2 with at most exp(−40) of either process beyond
_NODES = 64  # along φ and x2, twice as many along ρ: good to ten digits


@dataclass(frozen=True)
class InfernoToy:
    r"""Signal and background events with exact densities, and the best uncertainty on s.

    The nuisances act on the background alone: r shifts x₀, the rate λ stretches x₂, b is its yield.

    ========= ========== ===============================
    Benchmark Nuisances  Constraints
    ========= ========== ===============================
    0         none       none
    1         r          none
    2         r, rate    none
    3         r, rate    N(0, 0.4), N(3, 1)
    4         r, rate, b N(0, 0.4), N(3, 1), N(1000, 100)
    ========= ========== ===============================

    Arguments:
        benchmark: Which of them, 0 to 4.
        signal: s, the expected number of signal events.
        background: b, that of background events. Benchmark 4 constrains it to N(b, b/10).

    Raises:
        ValueError: If there is no such benchmark, or a yield is not a positive number.

    Example:
        >>> toy = InfernoToy(benchmark=2)
        >>> x = toy.sample("background", 1000, r=0.1, seed=0)
        >>> toy.signal_probability(x).shape
        torch.Size([1000])
        >>> print(f"{toy.limit():.2f}")
        15.63
    """

    benchmark: int = 4
    _: KW_ONLY
    signal: float = 50.0
    background: float = 1000.0

    def __post_init__(self) -> None:
        if type(self.benchmark) is not int or self.benchmark not in range(5):
            raise ValueError(
                f"Expected benchmark as 0, 1, 2, 3 or 4; got {self.benchmark!r}. Take 4 for all."
            )
        for name, value in (("signal", self.signal), ("background", self.background)):
            if not 0 < value < math.inf:
                raise ValueError(
                    f"Expected {name} as a positive number; got {value!r}. Give expected events."
                )

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the rows of the information: "s", then the nuisances of the benchmark."""
        return ("s", *_WIDTHS[self.benchmark])

    @property
    def nominal(self) -> dict[str, float]:
        """Nominal values of "s", "r", "rate" and "b", whether or not they are free."""
        return {"s": self.signal, "r": 0.0, "rate": _RATE, "b": self.background}

    @property
    def constraints(self) -> dict[str, Normal | None]:
        """Constraint on every nuisance of the benchmark by name, None where it is free."""
        widths = zip(self.parameters[1:], self._widths()[1:], strict=True)
        return {k: Normal(self.nominal[k], w) if w < math.inf else None for k, w in widths}

    def sample(
        self,
        process: str,
        n: int,
        *,
        r: float | Tensor = 0.0,
        rate: float | Tensor = _RATE,
        generator: torch.Generator | None = None,
        seed: int | None = None,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """Draw events of one process; at one seed, nuisances shift and stretch the same draws.

        Arguments:
            process: "signal" or "background".
            n: N, the number of events.
            r: Shift of the background in x₀, one number or shape (N,).
            rate: λ of the background, likewise.
            generator: The source of randomness; events lie on its device.
            seed: A seed, in place of a generator.
            dtype: Dtype of the events; torch's default one for None.

        Returns:
            x, shape (N, 3).

        Raises:
            ValueError: If there is no such process, `n` is no positive whole number, a shape
                differs from these, r is not finite, λ not positive, or `generator` and `seed` are
                both set.
        """
        background, n = _is_background(process), check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        device = None if generator is None else generator.device
        plane = torch.randn(n, 2, generator=generator, dtype=dtype, device=device)
        x2 = plane.new_empty(n, 1).exponential_(generator=generator)
        r, rate = _nuisance(r, "r", plane, look=True), _nuisance(rate, "rate", plane, look=True)
        if not background:
            return torch.cat([plane, x2 / _SIGNAL_RATE], 1)
        plane = plane * plane.new_tensor(_VARIANCE).sqrt() + plane.new_tensor([_MEAN, 0.0])
        return self.stretch(self.shift(torch.cat([plane, x2 / _RATE], 1), r), rate)

    def log_prob(
        self, process: str, x: Tensor, *, r: float | Tensor = 0.0, rate: float | Tensor = _RATE
    ) -> Tensor:
        """Return ln f_s(x) or ln f_b(x; r, λ), differentiable with respect to x, r and λ.

        Arguments:
            process: "signal" or "background".
            x: Events, shape (..., 3).
            r: Shift of the background in x₀, one number or shape (...).
            rate: λ of the background, likewise.

        Returns:
            In nats, shape (...); −∞ where x₂ < 0.

        Raises:
            ValueError: If there is no such process, a shape differs from these, a value is not
                finite, or λ is not positive.
        """
        background, x = _is_background(process), _events(x, look=True)
        r, rate = _nuisance(r, "r", x, look=True), _nuisance(rate, "rate", x, look=True)
        x0, x1, x2 = x.unbind(-1)
        if background:
            log_prob = _log_plane(x0 - _MEAN - r, x1, _VARIANCE) + rate.log() - rate * x2
        else:
            log_prob = _log_plane(x0, x1) + math.log(_SIGNAL_RATE) - _SIGNAL_RATE * x2
        return torch.where(x2 >= 0, log_prob, -math.inf)

    @staticmethod
    def shift(x: Tensor, r: float | Tensor) -> Tensor:
        """Return events with x₀ + r: background events at r, made of those at 0.

        Differentiable with respect to both arguments, also by `torch.func`: the values of tensors
        are not looked at, and NaN stays NaN. `x` is left as it is.

        Arguments:
            x: Events, shape (..., 3).
            r: One number or shape (...).

        Raises:
            ValueError: If a shape differs from these, or `r` is a number that is not finite.
        """
        x0, x1, x2 = (x := _events(x)).unbind(-1)
        return torch.stack([x0 + _nuisance(r, "r", x), x1, x2], -1)

    @staticmethod
    def stretch(x: Tensor, rate: float | Tensor) -> Tensor:
        """Return events with x₂ · 3/λ: background events at λ, made of those at 3.

        As `shift`, with λ in place of r: a `rate` that is not positive is an error if it is a
        number, and makes x₂ NaN if it is a tensor.
        """
        x0, x1, x2 = (x := _events(x)).unbind(-1)
        rate = _nuisance(rate, "rate", x)
        return torch.stack([x0, x1, x2 * torch.where(rate > 0, _RATE / rate, math.nan)], -1)

    def log_likelihood_ratio(self, x: Tensor) -> Tensor:
        """Return ln f_s − ln f_b of events (..., 3) at the nominal values, in nats, shape (...).

        Where x₂ < 0 and both densities vanish, it goes on as the same formula.

        Raises:
            ValueError: If `x` has another shape or is not finite.
        """
        x0, x1, x2 = _events(x, look=True).unbind(-1)
        return _TOP - ((x0 - _CENTRE) / _AXES[0]).square() - (x1 / _AXES[1]).square() + x2

    def signal_probability(self, x: Tensor) -> Tensor:
        """Return f_s / (f_s + f_b) of events (..., 3) in [0, 1], shape (...): the best classifier.

        Raises:
            ValueError: If `x` has another shape or is not finite.
        """
        return self.log_likelihood_ratio(x).sigmoid()

    def information(self) -> Tensor:
        """Return the Fisher information of unbinned events and of the constraints, by quadrature.

        It is about the `parameters` at their nominal values, shape (k, k), float64.
        """
        rho, step = _legendre(2 * _NODES, math.sqrt(_REACH_Q))
        x2, step2 = _legendre(_NODES, _REACH_X2)
        signal, background, score = (t[..., None] for t in _plane(rho.square()))
        # the weights are part of the densities, in which every term is of first order
        measure = (2 * rho * step)[:, None, None] * step2
        signal = signal * measure * _SIGNAL_RATE * torch.exp(-_SIGNAL_RATE * x2)
        background = background * measure * _RATE * torch.exp(-_RATE * x2)
        cells = signal, background * score, background * (1 / _RATE - x2), background
        return self._constrained(*self._counts(torch.stack(cells, -1).flatten(0, -2)))

    def expected_counts(self, edges: Tensor) -> tuple[Tensor, Tensor]:
        """Return expected counts in bins of `signal_probability`, and their derivatives.

        Arguments:
            edges: Increasing numbers in [0, 1], shape (K + 1,). Events outside are not counted.

        Returns:
            Counts, shape (K,), and derivatives with respect to s, r, rate and b (all four in every
            benchmark) at the nominal values, shape (K, 4), float64.

        Raises:
            ValueError: If `edges` are not such numbers.
        """
        cut = _check_edges(edges).logit().clamp(-_REACH_Q, _REACH_Q)
        # events pass the cut if x2 > q − inner: all those with q < inner, a tail in x2 beyond
        inner = (_TOP - cut)[:, None]
        start = inner.clamp(0, _REACH_Q)
        q, step = _legendre(_NODES, start)
        tail, tail_step = _legendre(_NODES, _REACH_X2)
        q = torch.cat([q, start + tail], -1)
        step = torch.cat([step, tail_step.expand_as(step)], -1)
        least = (q - inner).clamp(min=0)
        signal, background, score = _plane(q)
        # the parts of the exponential laws above the least x2
        signal = signal * (step * torch.exp(-_SIGNAL_RATE * least))[..., None]
        background = background * (step * torch.exp(-_RATE * least))[..., None]
        passed = signal, background * score, -background * least[..., None], background
        return self._counts(-torch.stack([p.sum((-2, -1)) for p in passed], -1).diff(dim=0))

    def binned_information(self, edges: Tensor) -> Tensor:
        """Return the Fisher information of the counts in bins of `signal_probability`.

        Arguments and errors are those of `expected_counts`, the return is that of `information`.
        """
        return self._constrained(*self.expected_counts(edges))

    def limit(self, edges: Tensor | None = None) -> float:
        """Return the profiled uncertainty on s in events, the root of the ss-element of I⁻¹.

        Arguments:
            edges: As in `expected_counts`, for counts in bins; by default unbinned.

        Raises:
            ValueError: If `edges` are not such numbers, or too few for the free nuisances.
        """
        information = self.information() if edges is None else self.binned_information(edges)
        # a unit diagonal gives the rank a scale
        scale = information.diagonal().clamp(min=1e-300).rsqrt()
        scaled = scale * information * scale[:, None]
        rank = int(torch.linalg.matrix_rank(scaled, hermitian=True, rtol=1e-10))
        if edges is not None and rank < len(scaled):
            raise ValueError(
                f"Expected edges of enough bins for {', '.join(self.parameters)}; got "
                f"{len(edges) - 1}. Give more bins, or take a benchmark with constraints."
            )
        return float(torch.linalg.inv(scaled)[0, 0].sqrt() * scale[0])

    def _widths(self) -> list[float]:
        """Return the standard deviation of the constraint on every parameter."""
        widths = _WIDTHS[self.benchmark]
        return [math.inf, *(w * (self.background if k == "b" else 1) for k, w in widths.items())]

    def _counts(self, cells: Tensor) -> tuple[Tensor, Tensor]:
        """Return counts (M,) and derivatives (M, 4) from f_s, ∂_r f_b, ∂_λ f_b and f_b, (M, 4)."""
        jacobian = cells * cells.new_tensor([1, self.background, self.background, 1])
        return self.signal * cells[:, 0] + self.background * cells[:, 3], jacobian

    def _constrained(self, counts: Tensor, jacobian: Tensor) -> Tensor:
        """Return the information of independent Poisson counts (M,), derivatives (M, 4)."""
        jacobian = jacobian[:, [_ALL.index(name) for name in self.parameters]]
        filled = counts > 0
        jacobian, counts = jacobian[filled], counts[filled]
        curvature = counts.new_tensor(self._widths()).pow(-2)
        return jacobian.T @ (jacobian / counts[:, None]) + curvature.diag()


def _log_plane(x0: Tensor, x1: Tensor, variance: tuple[float, float] = (1.0, 1.0)) -> Tensor:
    """Return the log-density of a centred normal law in the plane."""
    squares = x0.square() / variance[0] + x1.square() / variance[1]
    return -0.5 * squares - math.log(2 * math.pi * math.sqrt(math.prod(variance)))


def _plane(q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return both densities in the plane per unit of q at angles φ, and ∂_r ln f_b, (*, φ)."""
    # equal steps converge exponentially on a period; the half with x1 < 0 is part of the weight
    angle = (torch.arange(_NODES, dtype=q.dtype, device=q.device) + 0.5) * math.pi / _NODES
    rho = q.sqrt()[..., None]
    x0 = _CENTRE + _AXES[0] * rho * angle.cos()
    x1 = _AXES[1] * rho * angle.sin()
    weight = math.prod(_AXES) * math.pi / _NODES
    signal = weight * _log_plane(x0, x1).exp()
    background = weight * _log_plane(x0 - _MEAN, x1, _VARIANCE).exp()
    return signal, background, (x0 - _MEAN) / _VARIANCE[0]


def _legendre(nodes: int, end: float | Tensor) -> tuple[Tensor, Tensor]:
    """Return points and weights of Gauss–Legendre quadrature from 0 to `end`."""
    point, weight = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(nodes))
    return end * (point + 1) / 2, end * weight / 2


def _is_background(process: str) -> bool:
    if process not in ("signal", "background"):
        raise ValueError(f"Expected 'signal' or 'background'; got {process!r}. Name one process.")
    return process == "background"


def _events(x: Any, look: bool = False) -> Tensor:
    """Return events as a tensor (..., 3); values are checked where `look` says so."""
    x = as_tensor(x, "x")
    if x.shape[-1:] != (3,):
        raise ValueError(
            f"Expected x of shape (..., 3); got {tuple(x.shape)}. Give x0, x1 and x2 per event."
        )
    if look:
        check_finite(x, "x", "Leave such events out.")
    return x


def _nuisance(value: Any, name: str, x: Tensor, look: bool = False) -> Tensor:
    """Return r or λ in the dtype of x, of shape () or (...); numbers are checked anyway."""
    look = look or not isinstance(value, Tensor)
    tensor = as_tensor(value, name, like=x).to(x.dtype)
    if tensor.ndim:
        check_shape(tensor, x.shape[:-1], name, "Give one value per event, or one number.")
    if look:
        check_finite(tensor, name, "Give a finite number.")
    if look and name == "rate" and bool((tensor <= 0).any()):
        raise ValueError(f"Expected positive rate; got {tensor.min().item():g}. Nominal is 3.")
    return tensor


def _check_edges(edges: Any) -> Tensor:
    edges = as_tensor(edges, "edges").detach().to("cpu", torch.float64)
    check_shape(edges, ("K + 1",), "edges", "Give one more edge than bins.")
    inside = (edges >= 0) & (edges <= 1)
    if len(edges) < 2 or not bool(inside.all()) or not bool((edges.diff() > 0).all()):
        raise ValueError(
            "Expected edges as at least two increasing numbers between 0 and 1; got "
            f"{edges.tolist()}. Try torch.linspace(0, 1, 11)."
        )
    return edges
