r"""Fisher information of a binned Poisson model, and the uncertainty with nuisances profiled.

At the Asimov point, where the observed counts are the expected ones :math:`\lambda_i`, the second
derivatives of the negative log likelihood are

.. math::

    I_{jk} = \sum_i \frac{1}{\lambda_i} \frac{\partial \lambda_i}{\partial \theta_j}
             \frac{\partial \lambda_i}{\partial \theta_k}
             - \delta_{jk} \frac{\partial^2 \ln p(\theta_j)}{\partial \theta_j^2} ,

with first derivatives alone, for every weight of the network, as long as :math:`\lambda_i` in the
denominator carries its gradient too. The variance of the parameter of interest with the nuisances
profiled is :math:`(I^{-1})_{00}`.

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743, section 3.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from .model import Alternative, CountingModel, Normalisation, Nuisance, Reweighting, Transform
from .samples import Block, Key
from .tangents import propagate

__all__ = ["Information", "Sums", "expectation", "inverse", "occupied", "sums"]

# of all events: what counts as none
_EMPTY = 1e-9
# smallest eigenvalue of the scaled information
_SINGULAR = 1e-12
# by which rows of probabilities may miss 1
_PROBABILITY = 1e-3
# share of the absolute weights below which those of a bin count as cancelled
_CANCELLED = 0.1
# share of the events below which a hard bin counts as empty
_DEAD = 1e-4


@dataclass
class Sums:
    """Weighted sums over events, from which counts and derivatives follow; they add up.

    Attributes:
        weight: Sum of weights () of each block and reweighting.
        bins: Weighted sums (K,) of soft bins.
        moved: Those of their derivatives (K,), by process and transform.
        totals: Sum of weights of the whole sample.
        gross: As `bins`, of the absolute weights of nominal events.
        hard: Nominal events (K,) whose most probable bin it is; where no gradient is wanted.
    """

    weight: dict[Key, Tensor] = field(default_factory=dict)
    bins: dict[Key, Tensor] = field(default_factory=dict)
    moved: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    totals: dict[Key, float] = field(default_factory=dict)
    gross: dict[Key, Tensor] = field(default_factory=dict)
    hard: dict[Key, Tensor] = field(default_factory=dict)

    def add(self, other: Sums) -> Sums:
        """Add the sums of other events to these."""
        for name in ("weight", "bins", "moved", "gross", "hard"):
            own: dict = getattr(self, name)
            for key, value in getattr(other, name).items():
                own[key] = own[key] + value if key in own else value
        self.totals.update(other.totals)
        return self


def sums(network: nn.Module, parts: list[Block], *, by_hand: bool = True) -> Sums:
    """Sums over the events of blocks, of one forward pass, in float64.

    Raises:
        ValueError: If the network does not give finite values of shape (N, K).
    """
    bins, slopes = propagate(network, parts, by_hand=by_hand)
    # autocast would add up in half precision
    with torch.autocast(bins[0].device.type, enabled=False):
        found = Sums()
        for part, b, slope in zip(parts, bins, slopes, strict=True):
            _add_block(found, part, _full(b), {k: _full(s) for k, s in slope.items()})
    named = [(key.process, value) for key, value in found.bins.items()]
    named += [(process, value) for (process, _), value in found.moved.items()]
    for process, value in named:
        if not bool(torch.isfinite(value).all()):
            raise ValueError(_not_finite(parts, bins, process))
    return found


def _full(t: Tensor) -> Tensor:
    return t.float() if t.dtype in (torch.float16, torch.bfloat16) else t


def _add_block(found: Sums, part: Block, b: Tensor, slope: dict[str, Tensor]) -> None:
    keys = list(part.weights)
    weights = torch.stack([part.weights[k].to(b) for k in keys])
    counts = (weights @ b).double()
    total = weights.double().sum(1)
    for key, c, w in zip(keys, counts, total, strict=True):
        found.bins[key], found.weight[key] = c, w
    found.totals[part.key] = part.total
    if not part.key.nuisance:
        size = weights[0].abs()
        negative = bool((weights[0] < 0).any())
        found.gross[part.key] = (size @ b).double() if negative else counts[0]
        _check_probabilities(b, found.gross[part.key], size, part.key)
        if not torch.is_grad_enabled():
            found.hard[part.key] = torch.bincount(b.argmax(1), minlength=b.shape[1])
    for name, s in slope.items():
        found.moved[part.key.process, name] = (weights[0] @ s).double()


def _check_probabilities(b: Tensor, counts: Tensor, size: Tensor, key: Key) -> None:
    """Raise where rows do not add up to one; what is not finite has an error of its own."""
    total, wanted = float(counts.detach().sum()), float(size.double().sum())
    if not abs(total - wanted) <= _PROBABILITY * wanted and math.isfinite(total):
        raise ValueError(
            f"Expected probabilities (N, K) of the bins, which add up to 1 for each event; those "
            f"of {key.process!r} add up to {total / wanted:.3g}. End the network with SoftBins or "
            "torch.nn.Softmax(-1)."
        )


def _not_finite(parts: list[Block], bins: list[Tensor], process: str) -> str:
    for part, b in zip(parts, bins, strict=True):
        bad = (~torch.isfinite(b)).any(1).nonzero()
        if part.key.process == process and len(bad):
            return (
                f"Expected a finite summary of {process!r}; got NaN or infinity in event "
                f"{int(bad[0, 0])} of the batch ({len(bad)} such). Look for NaN in the inputs, or "
                "lower the learning rate."
            )
    return (
        f"Expected finite derivatives of the summary of {process!r}; got NaN or infinity. Look at "
        "the Transforms: their derivative must be finite for every event."
    )


def expectation(model: CountingModel, found: Sums) -> tuple[Tensor, Tensor]:
    """Expected counts (K,) and their derivatives (P, K) by the parameters, at nominal values.

    Raises:
        ValueError: If the weights of a block do not sum to a positive number.
    """
    for key, value in found.weight.items():
        if not bool(value > 0):
            raise ValueError(
                f"Expected weights of {_said(key)} with a positive sum; got {float(value):g}. Use "
                "larger batches: negative weights must not outweigh the positive ones."
            )
    shapes = {k: b / found.weight[k] for k, b in found.bins.items()}
    yields = {p.name: p.expected * shapes[Key(p.name)] for p in model.processes}
    counts = torch.stack(list(yields.values())).sum(0)
    signal = torch.stack([yields[p.name] for p in model.processes if p.signal]).sum(0)
    rows = [signal / model.nominal]
    for nuisance in model.nuisances:
        row = torch.zeros_like(counts)
        for process in model.processes:
            if nuisance.touches(process.name):
                row = row + _derivative(nuisance, process.name, process.expected, shapes, found)
        rows.append(row)
    return counts, torch.stack(rows)


def _said(key: Key) -> str:
    return repr(key.process) + (f" ({key.nuisance} {key.side})" if key.nuisance else "")


def _derivative(
    nuisance: Nuisance, process: str, expected: float, shapes: dict[Key, Tensor], found: Sums
) -> Tensor:
    """Derivative (K,) of the counts of a process by a nuisance at its nominal value."""
    key = Key(process)
    if isinstance(nuisance, Normalisation):
        return expected * shapes[key] / float(nuisance.nominal or 0.0)
    if isinstance(nuisance, Transform):
        return expected * found.moved[process, nuisance.name] / found.weight[key]
    assert isinstance(nuisance, (Alternative, Reweighting))
    sides = []
    for side in ("down", "up"):
        at = Key(process, nuisance.name, side)
        ratio: Tensor | float = 1.0
        if not nuisance.shape_only:
            if isinstance(nuisance, Reweighting):
                ratio = found.weight[at] / found.weight[key]
            else:
                ratio = found.totals[at] / found.totals[key]
        sides.append(ratio * shapes[at])
    return expected * (sides[1] - sides[0]) / (2 * float(nuisance.shift or 0.0))


def gross(model: CountingModel, found: Sums) -> Tensor:
    """Expected counts (K,) of absolute weights: those of weights, where none is negative."""
    keys = [(p.expected, Key(p.name)) for p in model.processes]
    return torch.stack([y * found.gross[k] / found.weight[k] for y, k in keys]).sum(0)


def occupied(counts: Tensor) -> Tensor:
    """Which bins (K,) expect anything."""
    return counts > _EMPTY * counts.detach().abs().sum()


def inverse(
    model: CountingModel, counts: Tensor, slopes: Tensor, size: Tensor | None = None
) -> Tensor:
    r"""Covariance (P, P) of the parameters at the Asimov point, differentiable.

    Bins that expect nothing carry no information. Where negative weights cancel others, an expected
    count near zero would carry any amount of it: with the counts g of absolute weights and r = λ/g,
    the denominator is there, below r = 2c = 0.2,

    .. math:: g \left( c + \frac{r^2}{4 c} \right) \ge \lambda ,

    and never less than the signal.

    Arguments:
        model: The counting experiment.
        counts: Expected counts λ (K,).
        slopes: Their derivatives (P, K).
        size: Expected counts g (K,) of absolute weights; without negative ones those above.

    Raises:
        ValueError: If the data and constraints leave a combination of parameters open.
    """
    size = counts if size is None else size
    full = occupied(size)
    if not bool(full.any()):
        raise ValueError("Expected counts above zero in some bin; got none.")
    g = torch.where(full, size, 1.0)
    share = torch.where(full, counts / g, 1.0)
    held = _CANCELLED + share.square() / (4 * _CANCELLED)
    safe = g * torch.where(share < 2 * _CANCELLED, held, share)
    # nor are there fewer events than those of the signal
    safe = torch.maximum(safe, torch.where(full, slopes[0] * model.nominal, 0.0))
    weighted = torch.where(full, slopes / safe, 0.0)
    matrix = weighted @ slopes.T + torch.diag(model.curvature.to(counts))
    # in units of each parameter's own information
    unit = matrix.detach().diagonal().clamp_min(torch.finfo(matrix.dtype).tiny).rsqrt()
    scaled = matrix * unit[:, None] * unit
    values, vectors = torch.linalg.eigh(scaled.detach())
    if not bool(values[0] > _SINGULAR * len(values)):
        raise ValueError(_open(model, int(full.sum()), vectors[:, 0]))
    identity = torch.eye(len(scaled), dtype=scaled.dtype, device=scaled.device)
    factor = torch.linalg.cholesky(scaled)
    return torch.cholesky_solve(identity, factor) * unit[:, None] * unit


def _open(model: CountingModel, bins: int, direction: Tensor) -> str:
    free = [model.poi, *(n.name for n in model.nuisances if n.free)]
    part = direction.abs()
    names = [n for n, p in zip(model.names, part.tolist(), strict=True) if p > 0.1]
    why = f"the data leave {' and '.join(names)} open"
    if bins < len(free):
        why = (
            f"{bins} occupied bin{'s' * (bins != 1)} cannot hold {len(free)} free parameters "
            f"({', '.join(free)})"
        )
    return (
        f"Expected an information matrix that can be inverted; {why}. Give more bins, constrain a "
        "nuisance, or, if the training collapsed, start anew with another seed, a lower learning "
        "rate or a higher temperature."
    )


@dataclass(frozen=True, eq=False)
class Information:
    """Expected uncertainties of a measurement with soft or hard bins.

    Attributes:
        names: The parameters, that of interest first.
        covariance: Their covariance (P, P).
        counts: Expected counts (K,).
        signal: Expected signal counts (K,).
        used: How many bins are the most probable one of any share of the events.
        least: Uncertainty on the parameter of interest by the signal without any background.
    """

    names: tuple[str, ...]
    covariance: Tensor
    counts: Tensor
    signal: Tensor
    used: int
    least: float = 0.0

    @property
    def width(self) -> float:
        """Uncertainty on the parameter of interest, nuisances profiled."""
        return math.sqrt(float(self.covariance[0, 0]))

    @property
    def widths(self) -> dict[str, float]:
        """Uncertainty on every parameter."""
        return dict(zip(self.names, self.covariance.diagonal().sqrt().tolist(), strict=True))

    def __str__(self) -> str:
        rows = [f"{name:>12} ± {width:.4g}" for name, width in self.widths.items()]
        rows.append(f"{'bins':>12} {self.used} of {len(self.counts)} used")
        return "\n".join(rows)

    def told(self) -> Information:
        """The same, with warnings of what makes it worthless."""
        poi = self.names[0]
        if self.used == 1:
            warnings.warn(
                "All events fall into one hard bin: the summary distinguishes nothing, and the "
                f"hard bins' uncertainty on {poi} is that of a plain count. Start anew with "
                "another seed, a lower learning rate or a higher temperature.",
                stacklevel=3,
            )
        if bool((self.counts < 0).any()):
            k = int(self.counts.argmin())
            warnings.warn(
                f"Expected counts at or above zero; got {self.counts[k]:.3g} in bin {k}: weights "
                "below zero outweigh the others there. Use fewer bins, or simulate more events.",
                stacklevel=3,
            )
        # no experiment knows a signal better than by counting it alone
        scale = float((self.covariance[0, 0]).sqrt())
        least = self.least
        if scale < 0.999 * least:
            warnings.warn(
                f"The uncertainty on {poi}, {scale:.4g}, is smaller than that of the signal "
                f"without background, {least:.4g}: weights below zero cancel in some bin. Simulate "
                "more events, or use fewer bins.",
                stacklevel=3,
            )
        return self

    @classmethod
    def of(cls, model: CountingModel, found: Sums) -> Information:
        """Of sums over events."""
        counts, slopes = expectation(model, found)
        covariance = inverse(model, counts, slopes, gross(model, found))
        events = sum(found.hard.values(), torch.zeros_like(counts))
        signal = slopes[0].detach().cpu() * model.nominal
        return cls(
            model.names,
            covariance.detach().cpu(),
            counts.detach().cpu(),
            signal,
            int((events > _DEAD * events.sum()).sum()),
            model.nominal / math.sqrt(max(float(signal.sum()), 1e-300)),
        )


def added(parts: Iterable[Sums]) -> Sums:
    """Sums of all events, from those of portions."""
    total = Sums()
    for part in parts:
        total.add(part)
    return total
