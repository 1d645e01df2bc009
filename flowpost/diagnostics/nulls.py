r"""Null distributions of the tests of uniformity, and the statistics themselves.

Under calibration the credible levels v_1 … v_N are independent and uniform on [0, 1]. With the
empirical distribution F_N of the levels,

.. math::
    D_N = \sup_v |F_N(v) - v|, \qquad
    A_N^2 = N \int_0^1 \frac{(F_N(v) - v)^2}{v (1 - v)} \, dv .

Nothing is fitted, so the nulls are those of a *fully specified* distribution: the exact one of D_N
(Simard and L'Ecuyer; Vrbik for large N) and Marsaglia and Marsaglia's for A_N², beyond
A² = 8 the expansion of its tail, where their polynomial falls off too fast.

References:
    Evaluating the Anderson-Darling Distribution (G. Marsaglia, J. Marsaglia, 2004)
    https://doi.org/10.18637/jss.v009.i02

    Computing the Two-Sided Kolmogorov-Smirnov Distribution (R. Simard, P. L'Ecuyer, 2011)
    https://doi.org/10.18637/jss.v039.i11

    Small-sample corrections to Kolmogorov–Smirnov test statistic (J. Vrbik, 2018)
    Pioneer Journal of Theoretical and Applied Statistics 15, 15–23
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int

__all__ = [
    "anderson_darling_pvalue",
    "anderson_darling_uniform",
    "binomial_interval",
    "chi2_sf",
    "ks_pvalue",
    "ks_uniform",
    "sigma_level",
]

_ADINF_LOW = (2.00012, 0.247105, -0.0649821, 0.0347962, -0.011672, 0.00168691)
_ADINF_HIGH = (1.0776, -2.30695, 0.43424, -0.082433, 0.008056, -0.0003146)
_FIX_MIDDLE = (-0.00022633, 6.54034, -14.6538, 14.458, -8.259, 1.91864)
_FIX_HIGH = (-130.2137, 745.2337, -1705.091, 1950.646, -1116.360, 255.7844)


def ks_pvalue(statistic: float, count: float) -> float:
    """Return P(D_N ≥ `statistic`) of the two-sided Kolmogorov–Smirnov statistic.

    Exact up to N = 10 000 (`scipy.stats.kstwo`); beyond, the limiting distribution at Vrbik's
    corrected argument, within 3e-6 of it and five orders of magnitude faster. An effective sample
    size of weighted events is rounded (at least 1).

    Example:
        >>> round(ks_pvalue(0.0136, 10_000), 3)
        0.049
    """
    n = max(round(count), 1)
    if n > 10_000:
        from scipy.special import kolmogorov

        x = math.sqrt(n) * statistic
        return float(kolmogorov(x + 1 / (6 * math.sqrt(n)) + (x - 1) / (4 * n)))
    from scipy.stats import kstwo

    return float(kstwo.sf(statistic, n))


def anderson_darling_pvalue(statistic: float, count: float = math.inf) -> float:
    """Return P(A_N² ≥ `statistic`) for N = `count` levels from a fully specified distribution.

    Good to about 1e-4 absolutely up to A² = 8 and to 1 % relatively beyond.

    Arguments:
        statistic: A².
        count: N, infinite for the limit; an effective sample size may be fractional.

    Source:
        Marsaglia and Marsaglia 2004, `adinf` and `errfix`.

    Example:
        >>> round(anderson_darling_pvalue(2.492), 4), round(anderson_darling_pvalue(3.878), 4)
        (0.05, 0.01)
    """
    z = float(statistic)
    if z <= 0:
        return 1.0
    if z > 8.0:
        # E exp(sA²) = [−2πs / cos(π√(1 + 8s)/2)]^½ has its first singularity at s = 1; two terms
        # of the expansion there give the tail √3 (1 + 11/(36z)) exp(−z)/√(πz) of the density.
        leading = math.erfc(math.sqrt(z)) * 7 / 18
        return math.sqrt(3) * (leading + 11 / 18 * math.exp(-z) / math.sqrt(math.pi * z))
    if z < 2.0:
        upper = 1 - math.exp(-1.2337141 / z) / math.sqrt(z) * _poly(_ADINF_LOW, z)
    else:
        upper = -math.expm1(-math.exp(_poly(_ADINF_HIGH, z)))
    return min(max(upper - _errfix(1 - upper, count), 0.0), 1.0)


def _errfix(x: float, count: float) -> float:
    # What the limiting CDF x lacks at N = count.
    n = max(count, 1.0)
    if math.isinf(n):
        return 0.0
    if x > 0.8:
        return _poly(_FIX_HIGH, x) / n
    c = 0.01265 + 0.1757 / n
    if x < c:
        t = x / c
        t = math.sqrt(t) * (1 - t) * (49 * t - 102)
        return t * (0.0037 / n**2 + 0.00078 / n + 0.00006) / n
    t = _poly(_FIX_MIDDLE, (x - c) / (0.8 - c))
    return t * (0.04213 + 0.01365 / n) / n


def _poly(coefficients: tuple[float, ...], x: float) -> float:
    value = 0.0
    for c in reversed(coefficients):
        value = value * x + c
    return value


def ks_uniform(levels: Tensor) -> tuple[float, float]:
    """Return D_N and its p-value for unbinned `levels` (N,) in [0, 1].

    Raises:
        ValueError: If `levels` is empty, not finite or outside [0, 1].
    """
    v = _sorted_levels(levels)
    n = len(v)
    above = (torch.arange(1, n + 1, dtype=v.dtype, device=v.device) / n - v).max()
    below = (v - torch.arange(n, dtype=v.dtype, device=v.device) / n).max()
    statistic = float(torch.maximum(above, below))
    return statistic, ks_pvalue(statistic, n)


def anderson_darling_uniform(levels: Tensor) -> tuple[float, float]:
    """Return A_N² and its p-value for unbinned `levels` (N,) in [0, 1].

    Raises:
        ValueError: If `levels` is empty, not finite or outside [0, 1].
    """
    v = _sorted_levels(levels)
    n = len(v)
    weight = 2 * torch.arange(1, n + 1, dtype=v.dtype, device=v.device) - 1
    statistic = float(-n - (weight * (v.log() + (-v.flip(0)).log1p())).sum() / n)
    return statistic, anderson_darling_pvalue(statistic, n)


def _sorted_levels(levels: Tensor) -> Tensor:
    v = as_tensor(levels, "levels").flatten().double()
    if not len(v):
        raise ValueError("Expected at least one level; got none.")
    check_finite(v, "levels")
    if bool(((v < 0) | (v > 1)).any()):
        raise ValueError(
            f"Expected levels in [0, 1]; got {v.min().item():.6g} to {v.max().item():.6g}."
        )
    return v.sort().values


def chi2_sf(statistic: float, dof: int) -> float:
    """Return P(χ²_dof ≥ `statistic`)."""
    check_positive_int(dof, "dof")
    half = torch.tensor([dof / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


def sigma_level(sigma: float) -> float:
    """Return the probability that a normal variable lies within ±`sigma` standard deviations."""
    return math.erf(sigma / math.sqrt(2))


def binomial_interval(
    nominal: Tensor, count: float, sigma: tuple[float, ...] = (1.0, 2.0, 3.0)
) -> Tensor:
    """Return the band in which the empirical coverage of a calibrated posterior falls.

    The exact central interval of a Binomial(N, p)/N at the probability of each of `sigma`; the
    effective sample size of weighted events is rounded (at least 1).

    Arguments:
        nominal: Credible levels (K,).
        count: N.
        sigma: Half-widths in standard deviations of a normal variable, m of them.

    Returns:
        Lower and upper ends (m, 2, K), float64.
    """
    from scipy.stats import binom

    n = max(round(count), 1)
    p = nominal.detach().double().cpu().numpy()
    ends = []
    for s in sigma:
        tail = (1 - sigma_level(s)) / 2
        ends.append([binom.ppf(tail, n, p) / n, binom.isf(tail, n, p) / n])
    return torch.stack([torch.stack([torch.as_tensor(e) for e in pair]) for pair in ends])
