r"""Directions as offsets from a middle one, as a corner plot shows them.

A direction at an angle θ from the middle is drawn θ degrees from the origin, along the great circle
that joins them (the azimuthal equidistant projection): with :math:`e` along growing azimuth and
:math:`n` along growing altitude at the middle :math:`m`,

.. math:: (x, y) = \theta \, \frac{(v \cdot e, v \cdot n)}{|(v \cdot e, v \cdot n)|}, \qquad
          \tan\theta = |(v \cdot e, v \cdot n)| / v \cdot m .
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowpost.skymap.projections import tangent_frame
from flowpost.spaces import Space

__all__ = ["middles", "offsets"]

_SMALL = 1e-30


def middles(space: Space, z: Tensor) -> dict[str, Tensor]:
    """Mean direction (3,) of each block of directions, of draws (S, D)."""
    return {
        b.name: torch.nn.functional.normalize(z[:, b.columns].mean(0), dim=0)
        for b in space.blocks
        if b.space.directional
    }


def offsets(space: Space, z: Tensor, about: Mapping[str, Tensor]) -> tuple[Tensor, tuple[str, ...]]:
    """Labels (S, D) with two columns of degrees in place of the three of a direction.

    Arguments:
        space: The label space.
        z: Labels, float64.
        about: The middle (3,) of each block of directions.

    Returns:
        Labels (S, D − number of directions) in the declared order, and the columns' names.
    """
    parts: list[Tensor] = []
    names: list[str] = []
    for b in sorted(space.blocks, key=lambda b: b.columns.start):
        part = z[:, b.columns]
        if not b.space.directional:
            parts.append(part)
            names += space.names[b.columns]
            continue
        frame = torch.as_tensor(tangent_frame(about[b.name].numpy())).to(part)
        across, ahead = (part @ frame.T).split([2, 1], dim=-1)
        sine = across.norm(dim=-1, keepdim=True)
        angle = torch.rad2deg(torch.atan2(sine, ahead))
        parts.append(angle * across / sine.clamp_min(_SMALL))
        names += [f"{b.name} Δ{word} [°]".lstrip() for word in ("az", "alt")]
    return torch.cat(parts, -1), tuple(names)
