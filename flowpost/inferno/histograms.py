r"""Templates from simulated events in hard bins.

The counts of a process are its yield times weighted fractions,

.. math:: n_k = Y \frac{\sum_{i \in k} w_i}{\sum_i w_i} , \qquad
          \mathrm{Var}\, n_k = Y^2 \frac{\sum_{i \in k} w_i^2}{(\sum_i w_i)^2} ,

and its variations come from events moved by a `Transform`, from other weights of a `Reweighting`,
or from the other samples of an `Alternative`, whose yields stand to the nominal one as the sums of
weights do, unless they change the shape only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .._checks import check_positive_int
from .._events import sizes
from .._progress import progress_bar
from .model import Alternative, CountingModel, Nuisance, Reweighting, Transform
from .samples import Block, Key, blocks, check_nuisances, check_samples, first_floating
from .summary import SummaryModel
from .templates import Templates

__all__ = ["templates"]

_SIDES = (("down", -1.0), ("up", 1.0))


@dataclass
class _Filled:
    """Weighted counts (K,), their squares (K,), and sums of weights, by what they stand for."""

    bins: dict[Key, Tensor] = field(default_factory=dict)
    squares: dict[Key, Tensor] = field(default_factory=dict)
    weight: dict[Key, float] = field(default_factory=dict)
    totals: dict[Key, float] = field(default_factory=dict)

    def add(self, key: Key, place: Tensor, weight: Tensor, size: int) -> None:
        """Count events at bins (N,) with weights (N,)."""
        counts = torch.bincount(place, weight, size)
        squares = torch.bincount(place, weight.square(), size)
        self.bins[key] = self.bins[key] + counts if key in self.bins else counts
        self.squares[key] = self.squares[key] + squares if key in self.squares else squares
        self.weight[key] = self.weight.get(key, 0.0) + float(weight.sum())


def templates(
    model: CountingModel,
    assign: SummaryModel | Callable[[Any], Any],
    samples: Any,
    bins: int | None = None,
    *,
    shifts: float | Mapping[str, float] = 1.0,
    chunk: int = 65536,
    progress: bool = False,
) -> Templates:
    """Count simulated events in hard bins, with all variations of the model.

    Arguments:
        model: The counting experiment.
        assign: A `SummaryModel`, whose most probable bin is taken, or any function of inputs
            (N, …) to bin indices (N,).
        samples: `Sample` or inputs of every process, by its name.
        bins: Bins K; that of the `SummaryModel` by default.
        shifts: Factor on the shift of every `Transform`, or factors by name. Samples and weights
            of the other nuisances are at the model's shift.
        chunk: Events that are assigned at once.
        progress: Show a progress bar.

    Raises:
        ValueError: If bins, samples or shifts are missing, or indices are no bins.

    Example:
        >>> from flowpost.inferno import Process
        >>> model = CountingModel([Process("signal", 50.0, signal=True), Process("other", 1000.0)])
        >>> events = {"signal": torch.full((40, 1), 0.7), "other": torch.rand(1000, 1)}
        >>> found = templates(model, lambda x: (10 * x[:, 0]).long(), events, bins=10)
        >>> found.counts["signal"].sum()
        tensor(50., dtype=torch.float64)
    """
    if bins is None and not isinstance(assign, SummaryModel):
        raise ValueError("Expected bins=K beside a function that assigns them; got none.")
    if isinstance(assign, SummaryModel) and bins not in (None, assign.bins):
        raise ValueError(
            f"Expected the {assign.bins} bins of the SummaryModel; got bins={bins!r}. Leave it "
            "away, and merge templates: templates.merged(groups)."
        )
    size = assign.bins if isinstance(assign, SummaryModel) else check_positive_int(bins, "bins")
    check_positive_int(chunk, "chunk")
    place = assign.assign if isinstance(assign, SummaryModel) else assign
    moved = _shifts(model, shifts)
    check_nuisances(model, check_samples(model, samples))
    parts = blocks(model, samples)
    found = _Filled()
    with progress_bar(sum(map(len, parts)), "templates", progress) as bar, torch.no_grad():
        for part in parts:
            found.totals[part.key] = part.total
            for portion in part.split(chunk):
                _fill(found, portion, place, moved, size)
                bar.update(len(portion))
    return _made(model, found, moved)


def _shifts(model: CountingModel, factors: float | Mapping[str, float]) -> dict[str, float]:
    """Distances from nominal of all variations."""
    transforms = [n.name for n in model.nuisances if isinstance(n, Transform)]
    if not isinstance(factors, Mapping):
        factors = dict.fromkeys(transforms, float(factors))
    for name, factor in factors.items():
        if name not in transforms or not factor > 0:
            known = ", ".join(transforms) or "none"
            raise ValueError(
                f"Expected shifts as positive factors of transforms ({known}); got {factor!r} of "
                f"{name!r}. Samples and weights of other nuisances are where they were simulated."
            )
    return {n.name: float(n.shift or 0.0) * factors.get(n.name, 1.0) for n in model.nuisances}


def _fill(
    found: _Filled, part: Block, place: Callable[[Any], Any], shifts: dict[str, float], size: int
) -> None:
    weights = {k: w.double().cpu() for k, w in part.weights.items()}
    index = _index(place, part.x, part.key, size)
    for key, weight in weights.items():
        found.add(key, index, weight, size)
    for move in part.moves:
        for side, sign in _SIDES:
            key = Key(part.key.process, move.name, side)
            value = float(move.nominal or 0.0) + sign * shifts[move.name]
            x = move.apply(part.x, first_floating(part.x).new_tensor(value))
            found.add(key, _index(place, x, key, size), weights[part.key], size)


def _index(place: Callable[[Any], Any], x: Any, key: Key, size: int) -> Tensor:
    """Bins (N,) of inputs, as they should be."""
    said = f"{key.process!r}" + (f" ({key.nuisance} {key.side})" if key.nuisance else "")
    events = next(iter(sizes(x)))
    try:
        index = torch.as_tensor(place(x)).cpu()
    except ValueError as error:
        raise ValueError(f"Events of {said} cannot be put into bins: {error}") from error
    if index.shape != (events,) or index.is_floating_point() or index.dtype == torch.bool:
        raise ValueError(
            f"Expected whole bin indices ({events},) for {said}; got {index.dtype} of shape "
            f"{tuple(index.shape)}. Of probabilities (N, K), lambda x: hard_assign(network(x)) "
            "gives the bins."
        )
    low, high = int(index.min()), int(index.max())
    if low < 0 or high >= size:
        raise ValueError(
            f"Expected bin indices from 0 to {size - 1} for {said}; got {low} to {high}. Clamp "
            "events outside to the first or last bin, or set bins=… to their number."
        )
    return index.long()


def _made(model: CountingModel, found: _Filled, shifts: dict[str, float]) -> Templates:
    counts, variances = {}, {}
    for process in model.processes:
        key = Key(process.name)
        scale = process.expected / _positive(found, key)
        counts[process.name] = scale * found.bins[key]
        variances[process.name] = scale**2 * found.squares[key]
    varied: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    for nuisance in model.nuisances:
        if not isinstance(nuisance, (Transform, Alternative, Reweighting)):
            continue
        varied[nuisance.name] = {}
        for process in model.processes:
            if nuisance.touches(process.name):
                down, up = (
                    process.expected * _side(found, nuisance, Key(process.name, nuisance.name, s))
                    for s, _ in _SIDES
                )
                varied[nuisance.name][process.name] = down, up
    own = {name: shifts[name] for name in varied}
    return Templates(model, counts, variances, varied, own)


def _positive(found: _Filled, key: Key) -> float:
    weight = found.weight[key]
    if not weight > 0:
        raise ValueError(
            f"Expected weights of {key.process!r} {key.nuisance} {key.side}".rstrip()
            + f" with a positive sum; got {weight:g}. Simulate more events."
        )
    return weight


def _side(found: _Filled, nuisance: Nuisance, key: Key) -> Tensor:
    """Counts (K,) of a variation over the nominal yield."""
    nominal, weight = Key(key.process), _positive(found, key)
    ratio = 1.0
    if isinstance(nuisance, Reweighting) and not nuisance.shape_only:
        ratio = weight / _positive(found, nominal)
    elif isinstance(nuisance, Alternative) and not nuisance.shape_only:
        ratio = found.totals[key] / found.totals[nominal]
    return ratio * found.bins[key] / weight
