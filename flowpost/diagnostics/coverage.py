"""Coverage from base coordinates, of arrays or streams, whole and in bins of an event property."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .accumulator import CoverageAccumulator, as_base
from .levels import LevelAccumulator
from .results import Coverage, LevelCoverage

__all__ = ["coverage", "level_coverage"]


def coverage(
    u: Tensor | np.ndarray | Iterable[Any],
    *,
    log_prob: Tensor | None = None,
    weight: Tensor | None = None,
    levels: int | Sequence[float] | Tensor = 20,
    by: Tensor | None = None,
    bins: int | Sequence[float] | Tensor | None = None,
    names: Sequence[str] | None = None,
) -> Coverage:
    r"""Return how often the base-ordered credible regions hold the truth, and whether as stated.

    The base coordinates of a calibrated posterior's true labels are N(0, I_d), so the levels
    F_χ²_d(‖u‖²) are uniform; the fraction of them below p is the empirical coverage of the
    regions of nominal credibility p. Coverage is necessary, not sufficient: a posterior that
    equals the prior passes. Give `log_prob` to have the sharpness beside it.

    Arguments:
        u: Base coordinates of the true labels, (N, d) or for d = 1 (N,): `posterior.to_base(z)`.
            Or an iterator of such chunks, or of pairs (u, log_prob): memory then stays flat.
        log_prob: log q(z_true|x) in nats (N,): the NLL is reported.
        weight: Event weights (N,), not negative. Band and p-values are then those of the effective
            sample size (Σw)²/Σw²: asymptotically right for weights that do not depend on u.
        levels: Number of nominal credibilities, or the credibilities themselves.
        by: A property of the events (N,), to see coverage in bins of it.
        bins: Edges of those bins, or the number of quantile bins (5 by default). Bins are closed
            at the lower edge, the last one at both; events outside the edges are in none.
        names: What the base coordinates are called, d of them: `q.space.base_names` has them as
            they stand in the flow, directions first.

    Raises:
        ValueError: If there are no events, a shape is wrong, a value is not finite, or a weight is
            negative.

    Source:
        Unifying supervised learning and VAEs – coverage, systematics and goodness-of-fit in
        normalizing-flow based neural network models for astro-particle reconstructions
        (T. Glüsenkamp, 2020) https://arxiv.org/abs/2008.05825, section 4

    Example:
        >>> u = torch.special.ndtri((torch.arange(10_000) + 0.5) / 10_000)
        >>> coverage(u).verdict()
        'consistent with the nominal coverage'
        >>> print(coverage(1.2 * u))
        base χ² coverage of 10000 events, d = 1
          nominal        50.0 %     68.0 %     90.0 %     95.0 %     99.0 %
          empirical     42.60 %    59.28 %    82.96 %    89.76 %    96.82 %
          1σ             0.50 %     0.47 %     0.30 %     0.22 %     0.10 %
          ...
          => under-covers (too narrow or biased); u0 too narrow (width 1.200)
    """
    if isinstance(u, Iterable) and not isinstance(u, (Tensor, np.ndarray, Sequence)):
        if any(option is not None for option in (log_prob, weight, by, bins)):
            raise ValueError(
                "Expected u as an array where log_prob, weight, by or bins are given; got an "
                "iterator. Let it yield (u, log_prob), or update a CoverageAccumulator per bin."
            )
        return _stream(u, levels, names)
    u = as_base(u)
    if not len(u):
        raise ValueError("Expected base coordinates u of at least one event; got none.")
    if by is None and bins is not None:
        raise ValueError("Expected by, the property to bin in, where bins are given; got None.")

    def measure(rows: Tensor | slice) -> Coverage:
        accumulator = CoverageAccumulator(u.shape[1], levels=levels, names=names)
        log_q = None if log_prob is None else as_tensor(log_prob, "log_prob", u)[rows]
        w = None if weight is None else as_tensor(weight, "weight", u)[rows]
        accumulator.update(u[rows], log_q, w)
        return accumulator.compute()

    whole = measure(slice(None))
    if by is None:
        return whole
    by = as_tensor(by, "by", u).double()
    check_shape(by, (len(u),), "by", "One value per event.")
    check_finite(by, "by")
    edges = _edges(by, 5 if bins is None else bins)
    parts = []
    for k, (low, high) in enumerate(pairwise(edges.tolist())):
        last = k == len(edges) - 2
        rows = (by >= low) & ((by <= high) if last else (by < high))
        rows = rows if weight is None else rows & (as_tensor(weight, "weight", u) > 0)
        if bool(rows.any()):
            parts.append((low, high, measure(rows)))
    return replace(whole, binned=tuple(parts))


def level_coverage(
    levels_of_truth: Tensor,
    *,
    kind: str = "credible level",
    log_prob: Tensor | None = None,
    weight: Tensor | None = None,
    levels: int | Sequence[float] | Tensor = 20,
) -> LevelCoverage:
    """Return the coverage of credible levels (N,) that are uniform under calibration.

    Arguments:
        levels_of_truth: The level of each event's true label in [0, 1], (N,).
        kind: What the levels are, for the table.
        log_prob: log q(z_true|x) in nats (N,).
        weight: Event weights (N,), as in `coverage`.
        levels: Number of nominal credibilities, or the credibilities themselves.

    Raises:
        ValueError: If there are none, or one is not finite or outside [0, 1].
    """
    accumulator = LevelAccumulator(kind, levels=levels)
    accumulator.update(levels_of_truth, log_prob, weight)
    return accumulator.compute()


def _stream(chunks: Iterable[Any], levels: Any, names: Sequence[str] | None) -> Coverage:
    accumulator: CoverageAccumulator | None = None
    for chunk in chunks:
        u, log_prob = chunk if isinstance(chunk, tuple) else (chunk, None)
        u = as_base(u)
        if accumulator is None:
            accumulator = CoverageAccumulator(u.shape[1], levels=levels, names=names)
        accumulator.update(u, log_prob)
    if accumulator is None:
        raise ValueError("Expected base coordinates u of at least one event; got none.")
    return accumulator.compute()


def _edges(by: Tensor, bins: Any) -> Tensor:
    if isinstance(bins, int):
        check_positive_int(bins, "bins")
        # numpy, since torch.quantile refuses more than 16 million values
        quantiles = np.quantile(by.detach().double().cpu().numpy(), np.linspace(0, 1, bins + 1))
        edges = torch.as_tensor(quantiles).unique()
        edges = edges if len(edges) > 1 else edges.repeat(2)
    else:
        edges = as_tensor(bins, "bins").double()
        check_shape(edges, ("K",), "bins")
        check_finite(edges, "bins")
        if len(edges) < 2 or not bool((edges.diff() > 0).all()):
            raise ValueError(f"Expected at least two rising edges as bins; got {edges.tolist()}.")
    return edges.to(by.device)
