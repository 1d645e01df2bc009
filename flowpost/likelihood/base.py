r"""What every likelihood p_θ(x|z) of an event's data is.

A likelihood turns labels into a distribution over data, as a head turns a context into a posterior:
``likelihood(z)`` runs the network once, and data are drawn and evaluated without touching it again.
The data of an event may be a vector, an image of counts, or a list of hits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Size, Tensor, nn

from .._checks import as_tensor
from ..encoders import Tabular
from ..spaces import Space

__all__ = ["BoundLikelihood", "LabelEncoder", "Likelihood"]


class BoundLikelihood(ABC):
    """The distribution of data at given labels of shape (*batch, D).

    Attributes:
        batch_shape: Shape of the labels, without columns: draws and events, such as (S, N).
    """

    batch_shape: Size

    @abstractmethod
    def log_prob(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x|z) in nats, of shape (*batch); events of x may be fewer where they broadcast.

        The generator is that of the noise that data on a grid are spread by.
        """

    @abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Any:
        """Data of one event for each label, in the form of x; without gradients."""

    def sample_and_log_prob(self, generator: torch.Generator | None = None) -> tuple[Any, Tensor]:
        """Data and ln p of them, (*batch)."""
        x = self.sample(generator)
        return x, self.log_prob(x, generator)

    def replica(self, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """ln p of data drawn for each label, and their number of measured values, (*batch)."""
        x, log_prob = self.sample_and_log_prob(generator)
        return log_prob, self.measured(x)

    @abstractmethod
    def measured(self, x: Any) -> Tensor:
        """N_d, the number of measured values in each event of x, in the form of (*batch)."""

    @abstractmethod
    def residuals(
        self, x: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Data at the base: independent standard normals (*batch, R) if they are of p(x|z).

        Of discrete data these are randomised quantile residuals (*Randomized quantile residuals*,
        P. K. Dunn, G. K. Smyth, 1996, https://doi.org/10.1080/10618600.1996.10474708).

        Returns:
            Residuals, and True where there is one where events differ in their number, or None.
        """


class Likelihood(nn.Module, ABC):
    """p_θ(x|z) of an event's data given its labels.

    Attributes:
        space: The space of the labels, and of latents behind them.
        custom: Whether a user's network is part of it.
    """

    fitted: Tensor
    custom: bool = False

    def __init__(self, space: Space, **options: Any) -> None:
        super().__init__()
        self.space = check_space(space)
        self._options = options
        self.register_buffer("fitted", torch.tensor(False))

    def forward(self, z: Any) -> BoundLikelihood:
        """The distribution of data at labels (*batch, D).

        Raises:
            ValueError: If a label is not in the space.
        """
        return self._bind(self._labels(z).to(self._like))

    def _labels(self, z: Any) -> Tensor:
        """Validated labels (*batch, D); those of a single column may come as (*batch)."""
        z = as_tensor(z, "labels")
        if self.space.label_size == 1 and z.shape[-1:] != (1,):
            z = z.unsqueeze(-1)
        return self.space.validate(z)

    @property
    def _like(self) -> Tensor:
        """A tensor of the device and floating type that it computes in."""
        parts = (*self.parameters(), *self.buffers())
        return next(t for t in parts if t.is_floating_point())

    @abstractmethod
    def _bind(self, z: Tensor) -> BoundLikelihood:
        """The distribution at validated labels, in the type of the parameters."""

    def log_prob(self, x: Any, z: Any) -> Tensor:
        """ln p(x|z) in nats of data of N events at labels (*sample, N, D), of shape (*sample, N).

        Raises:
            ValueError: If data or labels do not fit.
        """
        return self(z).log_prob(x)

    def sample(self, z: Any, generator: torch.Generator | None = None) -> Any:
        """Data drawn at labels (*batch, D), one event each."""
        with torch.no_grad():
            return self(z).sample(generator)

    @property
    @abstractmethod
    def size(self) -> int:
        """Numbers that are held for each label while it is evaluated, by order of magnitude."""

    @abstractmethod
    def fit_scale(self, x: Any, z: Any) -> Likelihood:
        """Set scales from data and labels of the training part; `flowpost.fit` calls it."""

    def config(self) -> dict[str, Any]:
        """JSON description from which the likelihood is built again."""
        return {"type": type(self).__name__, "space": self.space.config(), **self._options}


class LabelEncoder(nn.Module):
    """A multilayer perceptron with a linear path of labels, as a network reads them.

    Arguments:
        space: The label space.
        outputs: Numbers for each event.
        hidden: Units of a hidden layer.
        layers: Hidden layers.
    """

    def __init__(self, space: Space, outputs: int, hidden: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.space = check_space(space)
        self.size = space.features(space.centre(space.default_scale())).shape[-1]
        self.net = Tabular(self.size, outputs, hidden=hidden, layers=layers, dropout=0.0)

    def fit_scale(self, z: Tensor) -> LabelEncoder:
        """Set the standardisation from labels (N, D)."""
        self.net.fit_scale(self.space.features(z))
        return self

    def forward(self, z: Tensor) -> Tensor:
        """Numbers (*batch, outputs) of labels (*batch, D)."""
        rows = self.space.features(z).reshape(-1, self.size)
        out = self.net(rows)
        return out.reshape(*z.shape[:-1], out.shape[-1])


def check_space(space: Any) -> Space:
    """Return the label space.

    Raises:
        ValueError: If it is none.
    """
    if not isinstance(space, Space):
        raise ValueError(f"Expected the label space first; got {space!r}. Try flowpost.Real(2).")
    return space


def check_events(shape: Sequence[int], batch: Size, name: str) -> None:
    """Refuse data of another number of events than there are labels.

    Raises:
        ValueError: If the events do not broadcast to the labels.
    """
    try:
        fits = torch.broadcast_shapes(tuple(shape), batch) == batch
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"Expected {name} of one event for each label; got events of shape {tuple(shape)} and "
            f"labels of shape {tuple(batch)}."
        )
