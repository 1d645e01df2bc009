r"""What every generator can do, and the network of those that can do nothing else.

A generator draws data for labels: ``sample(z, generator)``. One of a density, such as a
`FlowLikelihood`, also says how probable they are. A sampling-only one is a map of noise,

.. math:: x = G_\theta(\epsilon, z), \qquad \epsilon \sim N(0, I_m),

whose density nobody can evaluate; it is trained by what its draws look like, see `fit_energy` and
`fit_critic`.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ..encoders import Tabular
from ..spaces import Space

__all__ = ["NoiseNetwork", "Sampler", "check_labelled"]


@runtime_checkable
class Sampler(Protocol):
    """Anything that draws data for labels: a likelihood, a library, a network."""

    def sample(self, z: Any, generator: torch.Generator | None = None) -> Any:
        """Data, one event for each of the labels (N, D)."""


def check_labelled(x: Any, z: Any, space: Space | None = None) -> tuple[Tensor, Tensor]:
    """Return data (N, …) and labels (N, D) of the same events; labels (N,) become (N, 1).

    Raises:
        ValueError: If there are no events, their numbers differ, or a value is not finite or not
            in the label space.
    """
    x = as_tensor(x, "x")
    z = as_tensor(z, "labels")
    z = z[:, None] if z.ndim == 1 else z
    if x.ndim < 2 or not x.numel():
        raise ValueError(
            f"Expected x of shape (N, F) with at least one event; got {tuple(x.shape)}."
        )
    check_shape(z, (len(x), "D"), "labels", "One row of labels an event of x.")
    check_finite(x, "x")
    if space is None:
        check_finite(z, "labels")
        return x, z
    return x, space.validate(z)


class NoiseNetwork(nn.Module):
    """A network from labels and noise to data: a sampling-only generator.

    A multilayer perceptron with a linear path beside it; its outputs are in units of each column's
    standard deviation about its mean. Untrained it is linear in noise and labels.

    Arguments:
        space: The label space.
        data: Columns F of the data.
        noise: Independent standard normals m that a draw is made of; fewer than the data vary by
            leave a thin sheet in the space of the data.
        hidden: Units of a hidden layer.
        layers: Hidden layers.
        output: A module applied to the data at the end, such as `nn.ReLU()` where columns are cut
            off at 0; it must keep the shape.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> import flowpost as fp
        >>> network = NoiseNetwork(fp.Positive(), data=3, noise=4)
        >>> network.sample(torch.ones(5, 1)).shape
        torch.Size([5, 3])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self,
        space: Space,
        data: int,
        *,
        noise: int = 32,
        hidden: int = 128,
        layers: int = 3,
        output: nn.Module | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(space, Space):
            raise ValueError(
                f"Expected the label space first; got {space!r}. Try flowpost.Real(2)."
            )
        self.space = space
        self.data = check_positive_int(data, "data")
        self.noise = check_positive_int(noise, "noise")
        self.features = space.features(space.centre(space.default_scale())).shape[-1]
        self.net = Tabular(
            self.features + self.noise, data, hidden=hidden, layers=layers, dropout=0.0
        )
        self.output = nn.Identity() if output is None else output
        self.register_buffer("loc", torch.zeros(data))
        self.register_buffer("scale", torch.ones(data))

    @property
    def fitted(self) -> bool:
        """Whether the scales have been set."""
        return self.net.fitted

    def fit_scale(self, x: Any, z: Any) -> NoiseNetwork:
        """Set the scales from data (N, F) and labels (N, D) of the training part.

        Raises:
            ValueError: If they do not fit or are not finite.
        """
        x, z = self.check(x, z)
        features = self.space.features(z.detach().cpu().double())
        self.net.fit_scale(torch.cat([features, features.new_zeros(len(z), self.noise)], 1))
        spread = x.detach().double().std(0, correction=0)
        self.loc = x.detach().double().mean(0).to(self.loc)
        self.scale = torch.where(spread > 0, spread, 1.0).to(self.scale)
        return self

    def check(self, x: Any, z: Any) -> tuple[Tensor, Tensor]:
        """Return data (N, F) and labels (N, D) that fit this network.

        Raises:
            ValueError: If they do not.
        """
        x, z = check_labelled(x, z, self.space)
        check_shape(x, ("N", self.data), "x", "Set NoiseNetwork(data=…) to its columns.")
        return x, z

    def forward(self, z: Tensor, noise: Tensor) -> Tensor:
        """Data (*batch, F) of labels (*batch, D) and noise (*batch, m), with gradients."""
        inputs = torch.cat([self.space.features(z).to(noise), noise], -1)
        out = self.net(inputs.flatten(0, -2)).unflatten(0, inputs.shape[:-1])
        return self.output(self.loc + self.scale * out)

    def draw(self, z: Tensor, draws: int, generator: torch.Generator | None = None) -> Tensor:
        """Data (S, N, F) of S draws at each of validated labels (N, D), with gradients."""
        like = self.net.skip.weight
        # a generator may live on another device than the network
        device = like.device if generator is None else generator.device
        shape = (draws, len(z), self.noise)
        noise = torch.randn(shape, generator=generator, dtype=like.dtype, device=device)
        z = z.to(like)
        return self(z.expand(draws, *z.shape), noise.to(like.device))

    @torch.no_grad()
    def sample(self, z: Any, generator: torch.Generator | None = None) -> Tensor:
        """Data (N, F), one event for each of the labels (N, D).

        Raises:
            ValueError: If a label is not in the space.
        """
        z = as_tensor(z, "labels", like=self.loc)
        z = z[:, None] if z.ndim == 1 and self.space.label_size == 1 else z
        check_shape(z, ("N", self.space.label_size), "labels")
        z = self.space.validate(z)
        if not len(z):
            return self.loc.new_zeros(0, self.data)
        return self.draw(z, 1, generator)[0]
