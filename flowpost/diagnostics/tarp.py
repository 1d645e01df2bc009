r"""TARP: coverage of regions around random points, for any label space, from draws alone.

For a reference point z_r the region of credibility α is the ball around z_r that holds the
fraction α of the posterior. Its level at the true label is

.. math:: v = P_{z \sim q(\cdot|x)} \left( \lVert z - z_r \rVert < \lVert z_\text{true} - z_r
          \rVert \right),

uniform under calibration, if z_r does not depend on the true label given x: again
`(rank + V) / (S + 1)`. Distances are Euclidean in standardised label columns (chords, where the
columns are unit vectors).

Reference:
    Sampling-Based Accuracy Testing of Posterior Estimators for General Inference
    (P. Lemos, A. Coogan, Y. Hezaveh, L. Perreault-Levasseur, 2023)
    https://arxiv.org/abs/2302.03026
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_shape
from .coverage import level_coverage
from .draws import SampledPosterior, draw_chunks, matched, randomised
from .results import LevelCoverage

__all__ = ["tarp", "tarp_levels"]


def tarp_levels(
    posterior: SampledPosterior,
    z: Tensor,
    draws: int = 256,
    references: Tensor | Literal["labels", "uniform"] = "labels",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the TARP credible level of each true label in [0, 1], (N,), float64.

    The arguments are those of `tarp`.

    Raises:
        ValueError: If the shapes do not fit or a value is not finite.
    """
    posterior, z = matched(posterior, z)
    centre = _references(z, references, generator)
    # one event, or a constant column, has no scale of its own
    scale = z.std(dim=0, correction=0)
    scale = torch.where(scale > 0, scale, 1.0)
    with torch.no_grad():
        distance = ((z - centre) / scale).norm(dim=-1)
        closer = torch.zeros(len(z), dtype=torch.int64, device=z.device)
        ties = torch.zeros_like(closer)
        for size in draw_chunks(posterior, draws):
            sample = posterior.sample((size,), generator=generator)
            other = ((sample - centre) / scale).norm(dim=-1)
            closer += (other < distance).sum(0)
            ties += (other == distance).sum(0)
    return randomised(closer, ties, draws, generator)[1]


def tarp(
    posterior: SampledPosterior,
    z: Tensor,
    draws: int = 256,
    *,
    references: Tensor | Literal["labels", "uniform"] = "labels",
    generator: torch.Generator | None = None,
    log_prob: Tensor | None = None,
    weight: Tensor | None = None,
    levels: int | Sequence[float] | Tensor = 20,
) -> LevelCoverage:
    """Return the expected coverage of balls around random points, and whether as stated.

    With references that do not depend on x the test is necessary, not sufficient: a posterior
    that equals the prior passes. Seen from references on all sides a bias counts to second order
    only; given references on one side, or computed from x (not from z), make it more searching.

    Arguments:
        posterior: Batch shape (N,), or () for the same of all events; event shape (D,); only
            `sample` is used.
        z: True labels (N, D).
        draws: Posterior draws S per event.
        references: Reference points (N, D); or "labels": the true label of another event, each
            used once, so that they follow the prior and lie in the label space; or "uniform": in
            the box that the true labels span, as in the paper.
        generator: Source of the references, the draws and the tie-breaking.
        log_prob: log q(z_true|x) in nats (N,): the NLL is reported.
        weight: Event weights (N,), as in `coverage`.
        levels: Number of nominal credibilities, or the credibilities themselves.

    Raises:
        ValueError: If the shapes do not fit, a value is not finite or there is one event only and
            no reference for it.
    """
    v = tarp_levels(posterior, z, draws, references, generator)
    return level_coverage(v, kind="TARP", log_prob=log_prob, weight=weight, levels=levels)


def _references(z: Tensor, references: Tensor | str, generator: torch.Generator | None) -> Tensor:
    if not isinstance(references, str):
        given = as_tensor(references, "references", z)
        check_shape(given, tuple(z.shape), "references", "One reference point per event.")
        check_finite(given, "references")
        return given.to(z.dtype)
    if len(z) < 2:
        raise ValueError("Expected at least two events to draw references from; got one.")
    device = z.device if generator is None else generator.device
    if references == "labels":
        # One cycle through all events: no event is its own reference, and as each level is uniform
        # whatever its reference, the levels along the cycle stay independent.
        order = torch.randperm(len(z), generator=generator, device=device).to(z.device)
        reference = torch.empty_like(z)
        reference[order] = z[order.roll(1)]
        return reference
    if references == "uniform":
        low, high = z.amin(0), z.amax(0)
        noise = torch.rand(z.shape, generator=generator, device=device, dtype=z.dtype)
        return low + (high - low) * noise.to(z.device)
    raise ValueError(f'Expected references as a tensor, "labels" or "uniform"; got {references!r}.')
