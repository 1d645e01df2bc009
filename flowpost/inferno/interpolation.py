r"""How templates move with the nuisances: codes 4 and 4p of HistFactory, and their composition.

Of the templates :math:`n_-, n_0, n_+` at :math:`\alpha = -1, 0, 1`, code 4p adds to :math:`n_0`

.. math::

    \delta(\alpha) = S \alpha + A\, e(\alpha), \qquad
    S = \tfrac12 (n_+ - n_-), \quad A = \tfrac1{16} (n_+ + n_- - 2 n_0), \qquad
    e(\alpha) = \begin{cases}
        15 \alpha^2 - 10 \alpha^4 + 3 \alpha^6 & |\alpha| \le 1 \\ 8 |\alpha| & |\alpha| > 1
    \end{cases}

and code 4 multiplies by :math:`r_+^{\alpha}` beyond 1, :math:`r_-^{-\alpha}` below −1 and a
polynomial of sixth order between, of the ratios :math:`r_\pm`. Both have two continuous
derivatives; the parabola of code 2 has one, and may go on with a slope of the wrong sign.

Together, the expected count of bin k is

.. math::

    \lambda_k(\theta) = \sum_p \frac{s_p(\theta)}{s_0} \prod_{j \in m} f_{pj}(\theta_j)
    \Bigl( n_{pk} + \sum_{j \in a} \delta_{pjk}(\alpha_j) \Bigr), \qquad
    \alpha_j = \frac{\theta_j - \theta_{j0}}{u_j} ,

with s/s₀ for signals alone. Additive (a) are the variations known by templates, by code 4p, and
normalisations with a normal constraint, which are linear; multiplicative (m) are free
normalisations, and those with a `LogNormal` constraint, by code 4.

Source: K. Cranmer, G. Lewis, L. Moneta, A. Shibata, W. Verkerke, *HistFactory: A tool for creating
statistical models for use with RooFit and RooStats*, 2012, CERN-OPEN-2012-016, section 4.1; the
codes' numbers are those of L. Heinrich, M. Feickert, G. Stark, K. Cranmer, *pyhf*, 2021,
https://doi.org/10.21105/joss.02823.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import LogNormal, Normal

from .model import CountingModel, Normalisation, Nuisance

__all__ = ["Factor", "Rates", "code4", "code4p", "coefficients", "compose", "even_part", "unit"]

# shifts of a free nuisance's templates to the ends of the polynomial
_WIDE = 1000.0
# below it, the logarithm of a factor is not taken
_LEAST = 1e-300


def even_part(alpha: Tensor) -> Tensor:
    """The even function e(α) (...) of code 4p: 8 at ±1, linear beyond."""
    square = alpha.clamp(-1, 1).square()
    inside = square * (15 + square * (3 * square - 10))
    return inside + 8 * (alpha.abs() - 1).clamp_min(0)


def coefficients(
    down: Tensor, nominal: Tensor, up: Tensor, distance: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Odd and even coefficients S and A (...) of the code 4p that goes through templates.

    Arguments:
        down: Template (...) at α = −distance.
        nominal: Template (...) at α = 0.
        up: Template (...) at α = distance.
        distance: Where the variations are, in units of α; positive.
    """
    even = float(even_part(torch.tensor(distance, dtype=torch.float64)))
    return (up - down) / (2 * distance), (up + down - 2 * nominal) / (2 * even)


def code4p(down: Tensor, nominal: Tensor, up: Tensor, alpha: Tensor) -> Tensor:
    """What code 4p adds (...) to the nominal template at α (...), of templates (...) at ±1."""
    odd, even = coefficients(down, nominal, up)
    return alpha * odd + even_part(alpha) * even


def code4(down: Tensor, up: Tensor, alpha: Tensor) -> Tensor:
    """The factor (...) of code 4 at α (...), of positive factors (...) at α = −1 and 1."""
    log_down, log_up = down.log(), up.log()
    # values, slopes and bends of the exponentials at 1 and −1, by parity
    odd = [(up - down) / 2, (up * log_up - down * log_down) / 2]
    odd.append((up * log_up.square() - down * log_down.square()) / 2)
    even = [(up + down) / 2 - 1, (up * log_up + down * log_down) / 2]
    even.append((up * log_up.square() + down * log_down.square()) / 2)
    a5 = (odd[2] - 3 * (odd[1] - odd[0])) / 8
    a3 = (odd[1] - odd[0]) / 2 - 2 * a5
    a6 = (even[2] - 5 * even[1]) / 8 + even[0]
    a4 = even[1] / 2 - even[0] - 2 * a6
    a1, a2 = odd[0] - a3 - a5, even[0] - a4 - a6
    a = alpha.clamp(-1, 1)
    inside = 1 + a * (a1 + a * (a2 + a * (a3 + a * (a4 + a * (a5 + a * a6)))))
    beyond = (alpha - 1).clamp_min(0) * log_up + (-alpha - 1).clamp_min(0) * log_down
    return inside * beyond.exp()


class Factor(NamedTuple):
    """A nuisance that multiplies the counts of processes.

    Attributes:
        column: Its place among the parameters.
        nominal: The value at which it is 1.
        scale: The width of its logarithm, for code 4; None where it is linear.
        touched: Which processes (R,) it multiplies.
    """

    column: int
    nominal: float
    scale: float | None
    touched: Tensor

    def at(self, values: Tensor) -> Tensor:
        """The factors (..., R) at values (..., P) of the parameters."""
        own = values[..., self.column] / self.nominal
        if self.scale is not None:
            edge = own.new_tensor(self.scale).exp()
            own = code4(1 / edge, edge, own.clamp_min(_LEAST).log() / self.scale)
        return torch.where(self.touched, own[..., None], 1.0)


class Rates(NamedTuple):
    """Templates of R processes in K bins with J additive nuisances, composed as HistFactory does.

    Attributes:
        nominal: Nominal counts (R, K).
        signal: Which processes (R,) the parameter of interest scales.
        strength: Its nominal value.
        factors: The nuisances that multiply.
        columns: Places of the additive nuisances among the parameters (J,).
        centre: Their nominal values (J,).
        unit: Their units u (J,).
        odd: Their coefficients S (J, R, K).
        even: Their coefficients A (J, R, K).
    """

    nominal: Tensor
    signal: Tensor
    strength: float
    factors: tuple[Factor, ...]
    columns: Tensor
    centre: Tensor
    unit: Tensor
    odd: Tensor
    even: Tensor

    def at(self, values: Tensor) -> Tensor:
        """Expected counts (..., R, K) at values (..., P) of the parameters."""
        alpha = (values[..., self.columns] - self.centre) / self.unit
        rates = self.nominal + torch.einsum("...j,jrk->...rk", alpha, self.odd)
        rates = rates + torch.einsum("...j,jrk->...rk", even_part(alpha), self.even)
        factor = torch.where(self.signal, values[..., :1] / self.strength, 1.0)
        for own in self.factors:
            factor = factor * own.at(values)
        return factor[..., None] * rates


def unit(nuisance: Nuisance, shift: float | None = None) -> float:
    """The distance from nominal at which α of a nuisance is 1, of templates at ±shift."""
    if isinstance(nuisance.constraint, Normal):
        return float(nuisance.constraint.stddev)
    own = float(nuisance.shift or 0.0) if shift is None else shift
    return own * (_WIDE if nuisance.free and not isinstance(nuisance, Normalisation) else 1.0)


def compose(
    model: CountingModel,
    counts: Mapping[str, Tensor],
    varied: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]],
    shifts: Mapping[str, float],
) -> Rates:
    """Stack templates (K,) of all processes, their variations and the shifts of these."""
    counts = {p.name: counts[p.name] for p in model.processes}
    nominal = torch.stack(list(counts.values()))
    factors, columns = [], []
    odd, even = [nominal[:0]], [nominal[:0]]
    for column, n in enumerate(model.nuisances, 1):
        touched = torch.tensor([n.touches(p.name) for p in model.processes])
        centre = float(n.nominal or 0.0)
        if isinstance(n, Normalisation) and not isinstance(n.constraint, Normal):
            scale = float(n.constraint.scale) if isinstance(n.constraint, LogNormal) else None
            factors.append(Factor(column, centre, scale, touched))
            continue
        if isinstance(n, Normalisation):
            s = torch.where(touched[:, None], nominal * (unit(n) / centre), 0.0)
            a = torch.zeros_like(s)
        else:
            pairs = [varied[n.name].get(p, (c, c)) for p, c in counts.items()]
            down, up = (torch.stack([pair[i] for pair in pairs]) for i in range(2))
            s, a = coefficients(down, nominal, up, shifts[n.name] / unit(n, shifts[n.name]))
        columns.append(column)
        odd.append(s)
        even.append(a)
    shape = (len(columns), *nominal.shape)
    units = [unit(model.nuisances[c - 1], shifts.get(model.names[c])) for c in columns]
    return Rates(
        nominal,
        torch.tensor([p.signal for p in model.processes]),
        model.nominal,
        tuple(factors),
        torch.tensor(columns, dtype=torch.long),
        model.values[columns],
        torch.tensor(units, dtype=torch.float64),
        torch.cat(odd).reshape(shape),
        torch.cat(even).reshape(shape),
    )
