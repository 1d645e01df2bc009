r"""Sampling-only generators trained against a Wasserstein critic.

The critic f estimates how far the generator's distribution is from the truth, as the largest
difference of its means over functions of slope one, the Kantorovich dual of the Wasserstein
distance; the slope is kept near one by a penalty on interpolated events
:math:`\hat x = u x + (1 - u) y,\ u \sim U(0, 1)`,

.. math:: L_f = \mathbb{E} f(y, z) - \mathbb{E} f(x, z)
          + \lambda\, \mathbb{E} \big( |\nabla_{\hat x} f(\hat x, z)| - 1 \big)^2 , \qquad
          L_G = - \mathbb{E} f(G(\epsilon, z), z) .

Both see the label of each event, so the distance is of the joint distributions of data and labels
at the labels of the training. Draws of the generator are never compared with each other, and no
loss of a single batch says how good it is: the weights kept are those of the lowest energy score on
held-out events.

Source: I. Gulrajani et al., *Improved training of Wasserstein GANs*, 2017,
https://arxiv.org/abs/1704.00028, eq. 3 and algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_positive_int, check_shape
from ..encoders import Squash
from ..spaces import Space
from .base import NoiseNetwork
from .energy import View, Views, held_score, prepared
from .rounds import Learner, train
from .training import GeneratorHistory

__all__ = ["Critic", "fit_critic", "gradient_penalty"]


class Critic(nn.Module):
    """A function f(x, z) of data and labels, without bound.

    Arguments:
        space: The label space.
        inputs: Columns F of what it is shown of the data, in units of order one.
        hidden: Units of a hidden layer.
        layers: Hidden layers.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> import flowpost as fp
        >>> critic = Critic(fp.Real(2), inputs=3)
        >>> critic(torch.zeros(4, 3), torch.zeros(4, 2)).shape
        torch.Size([4])
    """

    def __init__(self, space: Space, inputs: int, hidden: int = 128, layers: int = 3) -> None:
        super().__init__()
        self.space = space
        size = space.features(space.centre(space.default_scale())).shape[-1]
        self.squash = Squash(size)
        check_positive_int(layers, "layers")
        self.inputs = check_positive_int(inputs, "inputs")
        sizes = [inputs + size, *[check_positive_int(hidden, "hidden")] * layers, 1]
        parts: list[nn.Module] = []
        for a, b in pairwise(sizes):
            parts += [nn.Linear(a, b), nn.SiLU()]
        self.net = nn.Sequential(*parts[:-1])

    def fit_scale(self, z: Tensor) -> Critic:
        """Set the standardisation of labels (N, D)."""
        self.squash.fit(self.space.features(z))
        return self

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        """Values (N,) of data (N, F) at labels (N, D)."""
        labels = self.squash(self.space.features(z).to(x))
        return self.net(torch.cat([x, labels], -1))[..., 0]


def gradient_penalty(
    function: Callable[[Tensor], Tensor],
    x: Tensor,
    y: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean (|∇f| − 1)² at points drawn uniformly between pairs of events, a scalar with gradients.

    Arguments:
        function: From data (N, F) to values (N,), each of its own event alone.
        x: True events (N, F).
        y: Generated events (N, F).
        generator: Of the points.

    Raises:
        ValueError: If shapes differ.

    Example:
        >>> x, y = torch.zeros(5, 2), torch.ones(5, 2)
        >>> gradient_penalty(lambda v: v @ torch.tensor([3.0, 4.0]), x, y).item()
        16.0
    """
    check_shape(y, tuple(x.shape), "y", "Pairs of true and generated events.")
    device = x.device if generator is None else generator.device
    u = torch.rand(len(x), 1, generator=generator, dtype=x.dtype, device=device).to(x.device)
    at = (u * x + (1 - u) * y).detach().requires_grad_()
    (slope,) = torch.autograd.grad(function(at).sum(), at, create_graph=True)
    # the norm has no gradient of its own at zero, where a critic starts that sees nothing
    size = (slope.square().sum(-1) + torch.finfo(x.dtype).tiny).sqrt()
    return (size - 1).square().mean()


class _Adversary:
    """Losses of the critic in every step, and of the generator in every n-th."""

    def __init__(
        self,
        network: NoiseNetwork,
        critic: Critic,
        views: Views,
        every: int,
        penalty: float,
        rates: tuple[float, float],
    ) -> None:
        self.network, self.critic, self.views = network, critic, views
        self.every, self.penalty = every, penalty
        betas = (0.0, 0.99)
        self.learners: tuple[Learner, ...] = (
            Learner(network, rates[0], betas),
            Learner(critic, rates[1], betas),
        )

    def _value(self, x: Tensor, z: Tensor) -> Tensor:
        return self.critic(torch.cat(self.views(x), -1), z)

    def _of_critic(self, x: Tensor, z: Tensor) -> Tensor:
        scale, loc = self.network.scale, self.network.loc
        y = self.network.draw(z, 1)[0].detach()
        # the slope is that in the generator's units, in which columns vary alike
        slope = gradient_penalty(
            lambda v: self._value(loc + scale * v, z), (x - loc) / scale, (y - loc) / scale
        )
        return self._value(y, z).mean() - self._value(x, z).mean() + self.penalty * slope

    def _of_generator(self, z: Tensor) -> Tensor:
        return -self._value(self.network.draw(z, 1)[0], z).mean()

    def steps(self, x: Tensor, z: Tensor, index: int) -> Iterator[tuple[int, Callable[[], Tensor]]]:
        self.views.to(x.device)
        yield 1, lambda: self._of_critic(x, z)
        if index % self.every == self.every - 1:
            yield 0, lambda: self._of_generator(z)


def fit_critic(
    network: NoiseNetwork,
    x: Any,
    z: Any,
    val: Any = 0.1,
    *,
    critic: Critic | None = None,
    views: Sequence[View] = (),
    every: int = 3,
    penalty: float = 0.1,
    epochs: int = 50,
    batch_size: int = 256,
    lr: float = 1e-3,
    critic_lr: float = 4e-3,
    seed: int = 0,
    gradient_clip: float | None = None,
    progress: bool = True,
) -> GeneratorHistory:
    """Train a sampling-only generator against a Wasserstein critic; it keeps its best weights.

    Weights are averaged along the training, and those of the lowest energy score on held-out events
    are kept. The same seed gives the same weights twice on the same machine.

    Arguments:
        network: The generator; its scales are set by the training part, unless they were before.
        x: Data (N, F).
        z: Labels (N, D).
        val: Share of the events that is held out, or held-out events (x, z) of their own.
        critic: The critic, of as many inputs as there are columns in data and views; by default one
            of the generator's size, initialised by the seed.
        views: Functions of data that the critic is shown beside the data themselves.
        every: Steps of the critic for one of the generator; at most all of the training.
        penalty: λ of the gradient penalty; the source takes 0.1 for its toy problems and 10 for
            images. Too large a one leaves the critic too slow for the generator.
        epochs: Passes over the events, by the critic.
        batch_size: Events of a step.
        lr: Peak learning rate of the generator.
        critic_lr: Peak learning rate of the critic.
        seed: Of the division, the order of events and all random numbers.
        gradient_clip: Largest norm of a step's gradient, or None.
        progress: Show a progress bar.

    Returns:
        Losses of every epoch.

    Raises:
        ValueError: If data or labels do not fit or are not finite, the generator would never step,
            or the training diverged.
        ImportError: If Lightning is not installed.
    """
    check_positive_int(every, "every")
    epochs = check_positive_int(epochs, "epochs")
    batch_size = check_positive_int(batch_size, "batch_size", minimum=2)
    if not isinstance(penalty, (int, float)) or not 0 <= penalty < math.inf:
        raise ValueError(f"Expected penalty of at least 0; got {penalty!r}.")
    own, held = prepared(network, x, z, val, seed)
    seen = Views(views, own[0])
    if critic is None:
        hidden, layers = network.net._options["hidden"], network.net._options["layers"]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            critic = Critic(network.space, seen.columns, hidden, layers)
        critic = critic.to(network.loc)
    if critic.inputs != seen.columns:
        raise ValueError(
            f"Expected a critic of {seen.columns} inputs, the columns of data and views; got one "
            f"of {critic.inputs}. Set Critic(inputs={seen.columns})."
        )
    steps = epochs * (len(own[0]) // min(batch_size, len(own[0])))
    if every > steps:
        raise ValueError(
            f"Expected every of at most {steps}, the steps of the critic in all epochs; got "
            f"{every}: the generator would never step. Lower every, or train longer."
        )
    critic.fit_scale(own[1])
    return train(
        _Adversary(network, critic, seen, every, penalty, (lr, critic_lr)),
        own,
        held_score(network, seen, *held, seed),
        epochs=epochs,
        batch_size=batch_size,
        seed=seed,
        gradient_clip=gradient_clip,
        progress=progress,
    )
