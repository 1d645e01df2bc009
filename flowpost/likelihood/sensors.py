"""What a network reads of a sensor at given labels: where it is, also as seen from the event."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ..spaces import Block, Circle, Space
from .base import check_space

__all__ = ["SensorFeatures", "SensorNetwork"]

# of a feature's size, below which its spread is rounding
_ROUNDING = 1e-6


class SensorFeatures(nn.Module):
    """Features (*batch, M, G) of M sensors at labels (*batch, D).

    Arguments:
        space: The label space.
        sensors: Positions of the sensors (M, P).
        position: Name of a block of the labels that is a point among the sensors: a network then
            sees each sensor from there, by offset and distance.
        direction: Name of a block that is a direction (`Sphere`, or `Circle` where P = 2), for
            which it sees distances along and across it too.

    Raises:
        ValueError: If sensors have the wrong form, or no block has these names.
    """

    sensors: Tensor

    def __init__(
        self, space: Space, sensors: Any, position: str | None, direction: str | None
    ) -> None:
        super().__init__()
        # on the CPU, whatever device a model is built on
        sensors = as_tensor(sensors, "sensors", like=torch.empty(0, device="cpu")).double()
        check_shape(sensors, ("M", "P"), "sensors")
        check_finite(sensors, "sensors")
        self.space = check_space(space)
        size = sensors.shape[1]
        self._position = _columns(space, position, size, "position")
        self._direction = _direction(space, direction, size, position)
        # a tenth of the typical distance of sensors, below which nothing varies
        extent = float((sensors.amax(0) - sensors.amin(0)).max())
        self.step = max(0.1 * extent / len(sensors) ** (1 / size), 1e-6)
        self.options = {"sensors": sensors.tolist(), "position": position, "direction": direction}
        self.register_buffer("sensors", sensors.to(torch.get_default_dtype()))
        start = space.centre(space.default_scale())[None]
        self.shared = space.features(start).shape[-1]
        self.size = self.shared + self.seen(start).shape[-1]

    def seen(self, z: Tensor, index: Tensor | None = None) -> Tensor:
        """What differs between sensors (*batch, n, G): all, or those of an index (*batch, n)."""
        at = self.sensors.to(z) if index is None else self.sensors.to(z)[index]
        if self._position is None:
            return at.expand(*z.shape[:-1], *at.shape[-2:])
        offset = at - z[..., None, self._position]
        distance = offset.norm(dim=-1, keepdim=True)
        parts = [at.expand(offset.shape), offset, distance, torch.log(distance + self.step)]
        if self._direction is not None:
            d = z[..., None, self._direction]
            if d.shape[-1] == 1:
                d = torch.cat([d.cos(), d.sin()], -1)
            along = (offset * d).sum(-1, keepdim=True)
            across = (distance.square() - along.square()).clamp_min(1e-12).sqrt()
            parts += [along, across, torch.log(across + self.step), along / (distance + self.step)]
        return torch.cat(parts, -1)

    def forward(self, z: Tensor, index: Tensor | None = None) -> Tensor:
        """All features (*batch, n, shared + G)."""
        own = self.seen(z, index)
        labels = self.space.features(z)[..., None, :]
        return torch.cat([labels.expand(*own.shape[:-1], -1), own], -1)


class SensorNetwork(nn.Module):
    """One small network for all sensors, with a linear path beside it.

    Arguments:
        features: What it reads.
        outputs: Numbers K for each sensor.
        hidden: Units of a hidden layer.
        layers: Hidden layers.
    """

    loc: Tensor
    scale: Tensor

    def __init__(self, features: SensorFeatures, outputs: int, hidden: int, layers: int) -> None:
        super().__init__()
        check_positive_int(hidden, "hidden")
        check_positive_int(layers, "layers")
        self.features = features
        self.register_buffer("loc", torch.zeros(features.size))
        self.register_buffer("scale", torch.ones(features.size))
        self.skip = nn.Linear(features.size, outputs)
        sizes = [features.size, *[hidden] * layers]
        parts: list[nn.Module] = []
        for a, b in pairwise(sizes):
            parts += [nn.Linear(a, b), nn.SiLU(inplace=True)]
        last = nn.Linear(hidden, outputs)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.net = nn.Sequential(*parts, last)

    def fit_scale(self, z: Tensor, index: Tensor | None = None, known: Any = None) -> None:
        """Set the standardisation of the features at labels (N, D), of hits that are known."""
        rows = self.features(z, index)
        rows = (rows.flatten(0, -2) if known is None else rows[known]).double()
        spread = rows.std(0, correction=0)
        varies = spread > _ROUNDING * rows.abs().amax(0)
        self.loc = rows.mean(0).to(self.loc)
        self.scale = torch.where(varies, spread, 1.0).to(self.scale)

    def forward(self, z: Tensor, index: Tensor | None = None) -> Tensor:
        """Numbers (*batch, n, K) of all sensors, or of those of an index (*batch, n)."""
        first, rest = self.net[0], self.net[2:]
        assert isinstance(first, nn.Linear)
        # the standardisation is in the weights, and labels are multiplied once for all sensors
        weight = torch.cat([first.weight, self.skip.weight]) / self.scale
        bias = torch.cat([first.bias, self.skip.bias]) - weight @ self.loc
        of_labels, of_sensors = weight.split(
            [self.features.shared, self.features.size - self.features.shared], 1
        )
        shared = F.linear(self.features.space.features(z), of_labels, bias)[..., None, :]
        rows = F.linear(self.features.seen(z, index), of_sensors) + shared
        hidden, straight = rows.split([first.out_features, self.skip.out_features], -1)
        return straight + rest(F.silu(hidden))


def _named(block: Block, name: str) -> bool:
    """Whether a leaf has a name, among labels that may stand beside latents."""
    return block.name in (name, f"labels.{name}")


def _columns(space: Space, name: str | None, size: int, what: str) -> slice | None:
    if name is None:
        return None
    for b in space.blocks:
        if _named(b, name) and b.columns.stop - b.columns.start == size:
            return b.columns
    known = ", ".join(f"{b.name} ({b.columns.stop - b.columns.start})" for b in space.blocks)
    raise ValueError(
        f"Expected {what} as the name of a block of {size} columns; got {name!r}. Blocks (columns) "
        f"are {known}."
    )


def _direction(space: Space, name: str | None, size: int, position: str | None) -> slice | None:
    if name is None:
        return None
    if position is None:
        raise ValueError("Expected position beside direction; got the direction alone.")
    for b in space.blocks:
        if _named(b, name) and size == 2 and isinstance(b.space, Circle):
            return b.columns
    return _columns(space, name, size, "direction")
