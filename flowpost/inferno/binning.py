r"""Bins of a scalar score, uniform or chosen for the smallest uncertainty.

A binning of a score is as good as its edges. For K − 1 of them out of M candidates, `optimised`
looks for the smallest variance of the parameter of interest with the nuisances profiled,

.. math:: e^* = \arg\min_{e_1 < \dots < e_{K-1}} \big(I(e)^{-1}\big)_{00} ,

by the search of `flowpost.inferno.edges`. The derivatives in it come from finite simulation: few
events change cells when a nuisance moves. Their noise looks like information on the nuisances, and
a search would find it; so derivatives per event are smoothed along the candidates, and bins of few
events are not relied upon.

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743, section 5.1, for classifiers in bins as the baseline.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._weights import check_weights
from .baseline import hard_sums
from .edges import Cells, search, smoothed
from .information import expectation
from .model import CountingModel, Normalisation
from .samples import Block, Key, blocks

__all__ = ["Binning", "optimised"]


@dataclass(frozen=True, eq=False)
class Binning:
    """Bins of a score: bin k holds edges[k − 1] < score ≤ edges[k], the outer ones all beyond.

    Attributes:
        edges: The K − 1 inner edges, increasing, float64. A score on an edge is of the lower bin.

    Raises:
        ValueError: If edges are not finite, not increasing, or not of shape (K − 1,).

    Example:
        >>> Binning.uniform(4)(torch.tensor([0.1, 0.25, 0.9]))
        tensor([0, 0, 3])
    """

    edges: Tensor

    def __post_init__(self) -> None:
        edges = as_tensor(self.edges, "edges").detach().double()
        check_shape(edges, ("K − 1",), "edges", "Give the inner edges alone.")
        check_finite(edges, "edges", "The outer bins are open: leave infinite edges out.")
        if not bool((edges.diff() > 0).all()):
            raise ValueError(
                f"Expected increasing edges; got {edges.tolist()}. Sort them and leave out those "
                "given twice."
            )
        object.__setattr__(self, "edges", edges)

    @property
    def bins(self) -> int:
        """Bins K."""
        return len(self.edges) + 1

    def __call__(self, scores: Any) -> Tensor:
        """The bin (N,), int64, of scores (N,).

        Raises:
            ValueError: If the shape is another or a score is NaN.
        """
        scores = _scores(scores)
        return torch.bucketize(scores, self.edges.to(scores.device))

    @classmethod
    def uniform(cls, bins: int, low: float = 0.0, high: float = 1.0) -> Binning:
        """Bins of equal width between two scores; the outer ones take what lies beyond.

        Raises:
            ValueError: If there are no bins, or `low` is not below `high`.
        """
        check_positive_int(bins, "bins")
        if not low < high:
            raise ValueError(f"Expected low below high; got {low!r} and {high!r}. Exchange them.")
        return cls(torch.linspace(low, high, bins + 1, dtype=torch.float64)[1:-1])

    @classmethod
    def quantiles(cls, scores: Any, bins: int, weight: Any = None) -> Binning:
        """Bins of equal weight.

        Arguments:
            scores: Scores (N,).
            bins: Bins K.
            weight: Event weights (N,); negative ones count with their size.

        Raises:
            ValueError: If scores are not finite, or have too few different values.
        """
        check_positive_int(bins, "bins")
        edges = _quantiles(_scores(scores), bins - 1, weight)
        if len(edges.unique()) < bins - 1:
            raise ValueError(
                f"Expected scores with {bins - 1} different quantiles; got "
                f"{len(edges.unique())}. Take fewer bins."
            )
        return cls(edges)


def _scores(scores: Any) -> Tensor:
    scores = as_tensor(scores, "scores").detach().double()
    check_shape(scores, ("N",), "scores", "Give one number an event.")
    if bool(scores.isnan().any()):
        check_finite(scores, "scores", "Look for NaN in the inputs of the network.")
    return scores


def _quantiles(scores: Tensor, count: int, weight: Any = None) -> Tensor:
    """The inner quantiles (count,) of scores (N,): scores themselves, so that ties stay ties."""
    if not len(scores):
        raise ValueError("Expected at least one score; got none. Give those of simulated events.")
    check_finite(scores, "scores", "Bound them, by a sigmoid for instance.")
    size = torch.ones_like(scores) if weight is None else check_weights(weight, scores, True).abs()
    order = scores.argsort()
    below = size[order].cumsum(0)
    if not bool(below[-1] > 0):
        raise ValueError("Expected weights other than zero; got none. Leave weight out for ones.")
    levels = torch.arange(1, count + 1, dtype=torch.float64, device=scores.device) / (count + 1)
    return scores[order][torch.searchsorted(below, levels * below[-1]).clamp(max=len(scores) - 1)]


def optimised(
    model: CountingModel,
    score: Callable[[Any], Tensor],
    samples: Any,
    bins: int = 10,
    *,
    candidates: int = 400,
    restarts: int = 4,
    seed: int = 0,
    step: float = 0.5,
    smooth: float = 0.04,
    least: float = 25.0,
    chunk: int = 65536,
) -> Binning:
    """The bins of a score with the smallest expected uncertainty of the parameter of interest.

    Nuisances enter as in `hard_information`. Quote the width that it finds with other events: those
    on which the edges were chosen promise too much.

    Arguments:
        model: The counting experiment.
        score: Inputs (N, …) to scores (N,): `baseline.score(network)`, or any function. It is asked
            twice for every event, and twice for each Transform.
        samples: `Sample` or inputs of every process, by its name.
        bins: Bins K, at least 2.
        candidates: Edges to choose from: quantiles of the scores of each process, in equal shares,
            so that all tails are resolved.
        restarts: Random starts, beside uniform bins, quantiles and the best bins of directions.
        seed: Of the random starts.
        step: As in `hard_information`.
        smooth: Width, in units of all candidates, over which derivatives per event are smoothed; 0
            for none, where the order of scores means nothing.
        least: Effective simulated events, (Σw)² / Σw², below which a bin is not relied upon. With
            negative weights, a sum close to zero would promise all.
        chunk: Events that are scored at once.

    Raises:
        ValueError: If samples are missing, a score is not finite or of another shape, there are
            fewer different candidates than inner edges, or no bins close all parameters.
    """
    check_positive_int(bins, "bins", minimum=2)
    check_positive_int(restarts, "restarts", minimum=0)
    check_positive_int(chunk, "chunk")
    for name, value in (("smooth", smooth), ("least", least)):
        if not 0 <= value < math.inf:
            raise ValueError(f"Expected {name} as a number of at least 0; got {value!r}.")
    parts = blocks(model, samples)
    fine = _candidates(parts, score, check_positive_int(candidates, "candidates"), chunk)
    if fine.bins < bins:
        raise ValueError(
            f"Expected at least {bins - 1} different candidate edges for {bins} bins; got "
            f"{fine.bins - 1}. Raise candidates=…, or take fewer bins."
        )
    counts, slopes, variance = _fine(model, score, parts, fine, step, chunk)
    rows = torch.tensor([False, *(not isinstance(n, Normalisation) for n in model.nuisances)])
    slopes[rows] = smoothed(slopes[rows], counts, smooth * fine.bins)
    cells = Cells(model, counts, slopes, variance, least)
    places = search(cells, _starts(fine.edges, bins, restarts, seed))
    cells.check(places)
    return Binning(fine.edges[places - 1])


def _candidates(
    parts: list[Block], score: Callable[[Any], Tensor], count: int, chunk: int
) -> Binning:
    """Fine bins between quantiles of the scores of each process."""
    nominal = [p for p in parts if not p.key.nuisance]
    found = []
    with torch.no_grad():
        for part in nominal:
            scores = torch.cat([_scores(score(p.x)) for p in part.split(chunk)])
            check_shape(scores, (len(part),), "scores", "Give one number an event.")
            weight = part.weights[part.key]
            found.append(_quantiles(scores, -(-count // len(nominal)), weight).cpu())
    return Binning(torch.cat(found).unique())


def _fine(
    model: CountingModel,
    score: Callable[[Any], Tensor],
    parts: list[Block],
    fine: Binning,
    step: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Counts (C,) of fine bins, derivatives (P, C), and variances (C,) by the simulation."""
    squares = {Key(p.name): Key(p.name, side="squared") for p in model.processes}
    summed = []
    for part in parts:
        weights = dict(part.weights)
        if part.key in squares:
            # squared weights go along like one more reweighting, for which no nuisance asks
            weights[squares[part.key]] = weights[part.key].double().square()
        summed.append(replace(part, weights=weights))
    found = hard_sums(lambda x: fine(score(x)), summed, fine.bins, step, chunk)
    counts, slopes = expectation(model, found)
    variance = torch.zeros_like(counts)
    for process in model.processes:
        key = Key(process.name)
        variance += found.bins[squares[key]] * (process.expected / found.weight[key]).square()
    return counts.cpu(), slopes.cpu(), variance.cpu()


def _starts(edges: Tensor, bins: int, restarts: int, seed: int) -> list[Tensor]:
    """Places 1 to M of K − 1 edges: uniform in the score, every so many candidates, at random."""
    generator = torch.Generator().manual_seed(seed)
    wanted = bins - 1
    uniform = torch.linspace(float(edges[0]), float(edges[-1]), bins + 1, dtype=torch.float64)
    first = torch.searchsorted(edges, uniform[1:-1]).clamp(max=len(edges) - 1) + 1
    even = torch.arange(1, bins) * (len(edges) + 1) // bins
    found = []
    for start in (first, even, *[first[:0]] * restarts):
        start = start.clamp(1, len(edges)).unique()
        rest = torch.randperm(len(edges), generator=generator) + 1
        rest = rest[~torch.isin(rest, start)]
        found.append(torch.cat([start, rest[: wanted - len(start)]]).sort().values)
    return found
