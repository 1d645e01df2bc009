r"""Poisson counts, with a network that decodes labels to expected counts: images, sensor grids.

.. math:: \ln p_\theta(x|z) = \sum_k x_k \ln \lambda_k(z) - \lambda_k(z) - \ln x_k! .
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int
from ..spaces import Space
from .base import BoundLikelihood, LabelEncoder, Likelihood, check_events
from .sensors import SensorFeatures, SensorNetwork

__all__ = ["PoissonCounts"]

# ln λ within these, so that neither a rate nor its gradient overflows
_LOWEST, _HIGHEST = -20.0, 15.0
_NORMAL_LIMIT = 7.0
_FIT_EVENTS = 2000
_TABLE = 100_000
# counts from which single precision loses more than some thousandths of a nat
_BRIGHT = 4096


class PoissonCounts(Likelihood):
    """Independent Poisson counts in the cells of an image or grid.

    Arguments:
        space: The label space.
        shape: Shape of the counts of one event, such as (8, 8).
        decoder: A module that takes labels (M, D) to the logarithm of expected counts
            (M, \\*shape); by default a multilayer perceptron. It is given the columns of `space` as
            they are, in their units and not standardised, with those of latents after them, in the
            precision of its parameters. Nothing is added to what it returns.
        sensors: Positions of sensors (M, P), where the last dimensions of `shape` are those of M
            sensors: one small network then decodes each of them by where it is, which takes far
            fewer events to learn than the multilayer perceptron where sensors are many, tens or
            more; with a few of them, or a small image, the multilayer perceptron does as well. In
            place of a decoder.
        position: Name of a block of the labels that is a point among the sensors.
        direction: Name of a block that is a direction, as `PointProcess` takes it.
        hidden: Units of a hidden layer of the default decoder.
        layers: Its hidden layers.

    Raises:
        ValueError: If the shape is empty, sensors do not fit it, or both a decoder and sensors are
            given, or a position without sensors.

    Example:
        >>> import flowpost as fp
        >>> likelihood = PoissonCounts(fp.Real(2), shape=(4, 4))
        >>> likelihood.sample(torch.zeros(3, 2)).shape
        torch.Size([3, 4, 4])
    """

    log_mean: Tensor

    def __init__(
        self,
        space: Space,
        shape: int | Sequence[int],
        decoder: nn.Module | None = None,
        *,
        sensors: Any = None,
        position: str | None = None,
        direction: str | None = None,
        hidden: int | None = None,
        layers: int | None = None,
    ) -> None:
        sizes = [shape] if isinstance(shape, int) else list(shape)
        dimensions = tuple(check_positive_int(n, "shape") for n in sizes)
        if not dimensions:
            raise ValueError("Expected shape of at least one dimension; got ().")
        own = {"hidden": hidden, "layers": layers}
        cells = math.prod(dimensions)
        if decoder is not None and sensors is not None:
            raise ValueError("Expected a decoder or sensors; got both. A decoder has its own.")
        if sensors is None and (position is not None or direction is not None):
            raise ValueError(
                "Expected sensors beside position and direction, which are seen from them; got "
                "none. Give their positions (M, P)."
            )
        if sensors is not None:
            features = SensorFeatures(space, sensors, position, direction)
            channels = _channels(dimensions, len(features.sensors))
            decoder_of: nn.Module = SensorDecoder(features, channels, hidden or 32, layers or 2)
            own = {**own, **features.options}
        else:
            decoder_of = decoder or LabelEncoder(space, cells, hidden or 128, layers or 3)
        super().__init__(space, shape=list(dimensions), **own)
        self.shape = torch.Size(dimensions)
        self.custom = decoder is not None
        self.decoder = decoder_of
        self.register_buffer("log_mean", torch.zeros(self.shape.numel()))

    def fit_scale(self, x: Any, z: Any) -> PoissonCounts:
        """Set the scales from counts (N, \\*shape) and labels (N, D) of the training part."""
        mean = check_counts(x, self.shape, self.log_mean).double().mean(0)
        # a cell that never saw anything: half a count in all events
        mean = mean.clamp_min(0.5 / len(x))
        if not self.custom:
            self.log_mean = torch.log(mean).to(self.log_mean)
        scale = getattr(self.decoder, "fit_scale", None)
        if callable(scale):
            scale(self._labels(z).to(self.log_mean.dtype))
        self.fitted = torch.ones_like(self.fitted)
        return self

    @property
    def size(self) -> int:
        """The cells, and hidden units of each sensor."""
        if isinstance(self.decoder, SensorDecoder):
            return self.decoder.size
        return self.shape.numel()

    def log_rate(self, z: Tensor) -> Tensor:
        """Logarithm of the expected counts (*batch, cells) of labels (*batch, D)."""
        rows = z.reshape(-1, z.shape[-1])
        out = self._decoded(rows)
        cells = self.shape.numel()
        if out.shape[:1] != rows.shape[:1] or out[:1].numel() != cells * len(out[:1]):
            raise ValueError(
                f"Expected the decoder to give {cells} numbers for each label; got "
                f"{tuple(out.shape)} for {len(rows)}. Its output is "
                f"(M, {', '.join(map(str, self.shape))})."
            )
        return out.reshape(*z.shape[:-1], cells) + self.log_mean

    def _decoded(self, rows: Tensor) -> Tensor:
        try:
            return self.decoder(rows)
        except RuntimeError as error:
            # of matrices that do not fit, not of memory
            if not self.custom or "shape" not in str(error):
                raise
            raise ValueError(
                f"Expected a decoder of labels (M, {rows.shape[1]}), the columns "
                f"{', '.join(self.space.names)}; this one does not take them ({error})."
            ) from error

    def _bind(self, z: Tensor) -> BoundPoissonCounts:
        if isinstance(self.decoder, SensorDecoder):
            # cells in the order of the network, sensor by sensor, for a copy costs as much again
            mean = self.log_mean.reshape(self.decoder.channels, -1).T
            return BoundPoissonCounts(
                (self.decoder.net(z) + mean).flatten(-2), self.shape, self.decoder.channels
            )
        return BoundPoissonCounts(self.log_rate(z), self.shape)


class SensorDecoder(nn.Module):
    """One network for all sensors: labels (M, D) to numbers (M, channels, sensors)."""

    def __init__(self, features: SensorFeatures, channels: int, hidden: int, layers: int) -> None:
        super().__init__()
        self.net = SensorNetwork(features, channels, hidden, layers)
        self.channels, self.size = channels, len(features.sensors) * hidden

    def fit_scale(self, z: Tensor) -> SensorDecoder:
        """Set the standardisation of the features at labels (N, D)."""
        self.net.fit_scale(z[:_FIT_EVENTS])
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Numbers of every channel and sensor."""
        return self.net(z).movedim(-1, -2)


def _channels(shape: Sequence[int], sensors: int) -> int:
    """How many numbers each sensor has in data of a shape."""
    for i in range(len(shape) + 1):
        if math.prod(shape[i:]) == sensors:
            return math.prod(shape[:i])
    raise ValueError(
        f"Expected the last dimensions of shape {tuple(shape)} to be those of {sensors} sensors."
    )


class BoundPoissonCounts(BoundLikelihood):
    """Poisson counts bound to labels.

    Arguments:
        log_rate: Logarithm of the expected counts (*batch, cells), sensor by sensor where there
            are channels.
        shape: Shape of the counts.
        channels: Leading dimensions of the shape in all, where the order differs.
    """

    def __init__(self, log_rate: Tensor, shape: torch.Size, channels: int = 1) -> None:
        self.log_rate = log_rate.clamp(_LOWEST, _HIGHEST)
        self.shape, self.channels = shape, channels
        self.rate = torch.exp(self.log_rate)
        self.total = self.rate.sum(-1)
        check_finite(self.total.detach(), "expected counts", "Look for a diverged decoder.")
        self.batch_shape = log_rate.shape[:-1]

    def _read(self, x: Any) -> Tensor:
        x = check_counts(x, self.shape, self.log_rate)
        check_events(x.shape[:-1], self.batch_shape, "x")
        if self.channels == 1:
            return x
        return x.unflatten(-1, (self.channels, -1)).transpose(-1, -2).flatten(-2)

    def _shaped(self, x: Tensor) -> Tensor:
        """Counts (*batch, cells) as (*batch, \\*shape)."""
        if self.channels > 1:
            x = x.unflatten(-1, (-1, self.channels)).transpose(-1, -2)
        return x.reshape(*self.batch_shape, *self.shape)

    def log_prob(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x|z) of counts (*batch, \\*shape)."""
        return self._log_prob(self._read(x))

    def _log_prob(self, x: Tensor) -> Tensor:
        most = int(x.max()) if x.numel() else 0
        log_rate, total = self.log_rate, self.total
        if most > _BRIGHT:
            x, log_rate = x.double(), log_rate.double()
            total = torch.exp(log_rate).sum(-1)
        value = torch.linalg.vecdot(x.expand_as(log_rate), log_rate)
        return (value - total - log_factorial(x, most).sum(-1)).to(self.log_rate.dtype)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Counts (*batch, \\*shape)."""
        return self._shaped(poisson(self.rate.detach(), generator))

    def sample_and_log_prob(
        self, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Counts (*batch, \\*shape) and ln p of them."""
        x = poisson(self.rate.detach(), generator)
        return self._shaped(x), self._log_prob(x)

    def replica(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """ln p of counts drawn for each label, and the number of cells."""
        value = self._log_prob(poisson(self.rate.detach(), generator))
        return value, torch.full_like(value, float(self.shape.numel()))

    def measured(self, x: Any) -> Tensor:
        """The cells."""
        batch = torch.as_tensor(x).shape[: torch.as_tensor(x).ndim - len(self.shape)]
        return self.log_rate.new_full(batch, float(self.shape.numel()))

    def residuals(
        self, x: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Randomised quantile residuals (*batch, cells)."""
        return count_residuals(self._read(x), self.rate, generator), None


def check_counts(x: Any, shape: torch.Size, like: Tensor) -> Tensor:
    """Counts (*batch, \\*shape) as (*batch, cells) in the type of `like`.

    Raises:
        ValueError: If the shape differs, or a value is negative or no whole number.
    """
    x = as_tensor(x, "x", like=like)
    if x.ndim < len(shape) or x.shape[x.ndim - len(shape) :] != shape:
        raise ValueError(
            f"Expected counts x of shape (N, {', '.join(map(str, shape))}); got {tuple(x.shape)}."
        )
    x = x.flatten(x.ndim - len(shape)).to(like.dtype)
    check_finite(x, "counts x")
    bad = (x < 0) | (x != x.floor())
    if bool(bad.any()):
        where = tuple(int(i) for i in bad.nonzero()[0])
        raise ValueError(
            f"Expected counts x as whole numbers of at least 0; got {x[where].item():g} in row "
            f"{where[0]}. Use FlowLikelihood for amplitudes."
        )
    return x


def poisson(rate: Tensor, generator: torch.Generator | None) -> Tensor:
    """Poisson draws of rates; a generator on the CPU serves every device."""
    if generator is not None and generator.device != rate.device:
        return torch.poisson(rate.to(generator.device), generator).to(rate.device)
    return torch.poisson(rate, generator)


def log_factorial(x: Tensor, most: int) -> Tensor:
    """ln x! of whole numbers up to `most`, read from a table where they are small."""
    if most >= _TABLE:
        return torch.lgamma(x + 1)
    table = torch.lgamma(torch.arange(1, most + 2, dtype=torch.float64)).to(x)
    return table[x.to(torch.int64)]


def count_residuals(x: Tensor, rate: Tensor, generator: torch.Generator | None) -> Tensor:
    """Φ⁻¹ of F(x − 1) + U·p(x): standard normal where counts are Poisson of the rate."""
    x, rate = torch.broadcast_tensors(x.double(), rate.double())
    below = torch.where(x > 0, torch.special.gammaincc(x.clamp_min(1.0), rate), 0.0)
    upto = torch.special.gammaincc(x + 1, rate)
    device = rate.device if generator is None else generator.device
    u = torch.rand(x.shape, generator=generator, dtype=torch.float64, device=device).to(rate.device)
    return normal_quantile(below + u * (upto - below))


def normal_quantile(level: Tensor) -> Tensor:
    """Φ⁻¹ of levels, at most some seven standard deviations out."""
    return torch.special.ndtri(level.double()).clamp(-_NORMAL_LIMIT, _NORMAL_LIMIT)
