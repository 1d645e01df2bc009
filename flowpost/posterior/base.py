r"""Posterior: what a head returns.

With u ~ N(0, I_d) at the base and the flow f that takes it to the label,

.. math:: \ln q(z|x) = \ln N\big(f^{-1}(z); 0, I_d\big) + \ln |\det \partial f^{-1} / \partial z|,

so ‖u(z)‖² of the true label follows χ² with d degrees of freedom where the posterior is calibrated.
Sources: T. Glüsenkamp, *Unifying supervised learning and VAEs – coverage, systematics and
goodness-of-fit in normalizing-flow based neural network models for astro-particle
reconstructions*, 2020, https://arxiv.org/abs/2008.05825; for the name of the interface, torch's
`Distribution`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Size, Tensor
from torch.distributions import Distribution

from .._checks import as_tensor
from .._normal import chi2_level, ndtr
from ..flows import BoundFlow
from ..spaces import Scale, Space, SpaceConstraint
from .directional import Directional
from .statistics import CHUNK, Statistics

__all__ = ["Posterior"]

_Self = TypeVar("_Self", bound="Posterior")
_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Posterior(Statistics, Directional, Distribution):
    """The posterior of a batch of events: a `torch.distributions.Distribution` over labels.

    It is immutable and lives on the device of its context. Every method works on all events at
    once and streams where memory would grow as N·S.

    Attributes:
        space: The label space.
        batch_shape: Shape of the events, (N,) or () for an unconditional density.
        event_shape: (D,), the columns of a label.

    Arguments:
        flow: A flow bound to the context of each event.
        validate_args: Whether labels are checked; torch's default where it is None.
    """

    arg_constraints = {}  # noqa: RUF012 (torch's interface)
    has_rsample = True

    def __init__(self, flow: BoundFlow, validate_args: bool | None = None) -> None:
        self._flow = flow
        self._validate_args: bool
        super().__init__(
            flow.batch_shape, Size([flow.space.label_size]), validate_args=validate_args
        )

    @property
    def space(self) -> Space:
        """The label space."""
        return self._flow.space

    @property
    def support(self) -> SpaceConstraint:
        """The label space as a torch constraint."""
        return self.space.support

    @property
    def dof(self) -> int:
        """Degrees of freedom d of the base."""
        return self.space.dof

    @property
    def dtype(self) -> torch.dtype:
        """Floating type of the parameters."""
        return self._flow.location.dtype

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return self._flow.location.device

    # ------------------------------------------------------------------ events

    def _with(self: _Self, flow: BoundFlow) -> _Self:
        new = object.__new__(type(self))
        new.__dict__.update(self.__dict__)
        new._flow = flow
        new._batch_shape = flow.batch_shape
        return new

    def expand(self: _Self, batch_shape: Sequence[int], _instance: object = None) -> _Self:
        """The same posterior over a batch shape that this one broadcasts to."""
        return self._with(self._flow.expand(Size(batch_shape)))

    def to(self: _Self, *args: Any, **kwargs: Any) -> _Self:
        """The posterior on another device or in another floating type, as `Tensor.to`."""
        return self._with(self._flow.apply(lambda t: t.to(*args, **kwargs)))

    def detach(self: _Self) -> _Self:
        """The posterior without gradients to the network."""
        return self._with(self._flow.apply(torch.Tensor.detach))

    def __len__(self) -> int:
        if not self.batch_shape:
            raise TypeError("A posterior without batch dimensions has no length.")
        return self.batch_shape[0]

    def __getitem__(self, index: Any) -> Posterior:
        """The posterior of a block (a name) or of some events (an index into the batch).

        Arguments:
            index: A name of the product, dotted where nested, or any index of a tensor of shape
                `batch_shape`.

        Raises:
            ValueError: If no block has this name.
            IndexError: If there are no events to index.
        """
        if isinstance(index, str):
            return self.block(index)
        if not self.batch_shape:
            raise IndexError(f"This posterior has no batch to index with {index!r}.")
        index = torch.as_tensor(index) if isinstance(index, list) else index
        return self._with(self._flow[index])

    def block(self, name: str, draws: int = 512) -> Posterior:
        """The marginal posterior of a block of labels.

        The leading blocks of the flow have an exact density. A later one has the normalised mixture
        of its exact conditionals over a fixed set of draws of the earlier blocks.

        Arguments:
            name: A name of the product, dotted where nested.
            draws: Draws S of the earlier blocks.

        Raises:
            ValueError: If no block has this name, or its parts do not stand together.
        """
        from .block import block_posterior

        return block_posterior(self, name, draws)

    # ------------------------------------------------------------------ labels

    def _labels(self, z: Any, name: str = "labels") -> Tensor:
        z = as_tensor(z, name, like=self._flow.location).to(self.device)
        if self.event_shape[0] == 1 and z.shape[-1:] != (1,):
            z = z.unsqueeze(-1)
        if self._validate_args:
            z = self.space.validate(z, name)
        # double labels keep their digits until they are residuals
        z = z.to(torch.promote_types(z.dtype, self.dtype))
        return self._broadcast(z, name)

    def _broadcast(self, x: Tensor, name: str) -> Tensor:
        if x.shape[:-1][-len(self.batch_shape) :] == self.batch_shape:
            return x
        try:
            shape = torch.broadcast_shapes(x.shape[:-1], self.batch_shape)
        except RuntimeError as error:
            hint = self.space._hint(x.shape[-2]) if x.shape[-1] == 1 else ""
            raise ValueError(
                f"Expected {name} of shape (..., {', '.join(map(str, self.batch_shape))}, "
                f"{x.shape[-1]}) for {self!r}; got {tuple(x.shape)}. {hint}".rstrip()
            ) from error
        return x.expand(*shape, x.shape[-1])

    def _stream(self, run: Callable[[BoundFlow, Tensor], Sequence[Tensor]], x: Tensor) -> Any:
        """Apply a function of (flow, x) to x (*sample, *batch, k) in chunks of rows."""
        rows, limit = x.shape[:-1].numel(), max(1, CHUNK // self._flow.dof)
        if rows <= limit:
            return run(self._flow, x)
        lead = x.shape[:-1]
        batch = lead[len(lead) - len(self.batch_shape) :]
        events = batch.numel()
        flow, x = (
            self._flow.expand(batch).flatten(),
            x.reshape(lead[: len(lead) - len(batch)].numel(), events, -1),
        )
        n = min(events, limit)
        s = max(1, limit // n)
        columns = []
        for i in range(0, max(1, events), n):
            part = flow if n == events else flow[i : i + n]
            pieces = [run(part, x[j : j + s, i : i + n]) for j in range(0, len(x), s)]
            columns.append([torch.cat(p, 0) for p in zip(*pieces, strict=True)])
        merged = [torch.cat(c, 1) for c in zip(*columns, strict=True)]
        return [t.reshape(*lead, *t.shape[2:]) for t in merged]

    def _evaluate(self, z: Tensor) -> Tensor:
        (value,) = self._stream(lambda flow, x: (log_density(*flow.to_base(x)).sum(-1),), z)
        return value

    def _decode_labels(self, u: Tensor) -> Tensor:
        """Labels of base draws."""
        (z,) = self._stream(lambda flow, x: (flow.from_base(x)[0],), u)
        return z

    def _decode(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Labels of base draws and their log density."""

        def run(flow: BoundFlow, x: Tensor) -> tuple[Tensor, Tensor]:
            z, ladj = flow.from_base(x)
            return z, log_density(x, -ladj).sum(-1)

        z, log_prob = self._stream(run, u)
        return z, log_prob

    def log_prob(self, value: Any) -> Tensor:
        """Log density of labels in nats per unit of the label's measure.

        Arguments:
            value: Labels z of shape (*sample, *batch_shape, D); (..., ) where D = 1.

        Returns:
            Log density of shape (*sample, *batch_shape).

        Raises:
            ValueError: If a label is not in the space or the shape does not fit.
        """
        return self._evaluate(self._labels(value))

    def to_base(self, value: Any) -> Tensor:
        """Base coordinates u of labels: N(0, I_d) at the truth where the posterior is calibrated.

        Arguments:
            value: Labels z of shape (*sample, *batch_shape, D).

        Returns:
            u of shape (*sample, *batch_shape, d), in the order of the flow.

        Raises:
            ValueError: If a label is not in the space or the shape does not fit.
        """
        (u,) = self._stream(lambda flow, x: (flow.to_base(x)[0],), self._labels(value))
        return u

    def to_base_and_log_prob(self, value: Any) -> tuple[Tensor, Tensor]:
        """Base coordinates (*sample, *batch_shape, d) and log density of labels from one pass.

        Raises:
            ValueError: If a label is not in the space or the shape does not fit.
        """

        def run(flow: BoundFlow, z: Tensor) -> tuple[Tensor, Tensor]:
            u, ladj = flow.to_base(z)
            return u, log_density(u, ladj).sum(-1)

        u, log_prob = self._stream(run, self._labels(value))
        return u, log_prob

    def from_base(self, u: Any) -> Tensor:
        """Labels (*sample, *batch_shape, D) of base coordinates (*sample, *batch_shape, d).

        Raises:
            ValueError: If the shape does not fit.
        """
        u = as_tensor(u, "u", like=self._flow.location).to(self.device, self.dtype)
        if u.ndim == 0 or u.shape[-1] != self.dof:
            raise ValueError(
                f"Expected u of shape (..., {self.dof}) for {self.space!r}; got {tuple(u.shape)}."
            )
        return self._decode_labels(self._broadcast(u, "u"))

    def credibility(self, value: Any) -> Tensor:
        """Base-ordered credible level of labels: the χ²_d distribution function at ‖u‖².

        Regions ordered at the base are images of balls, not highest-density regions.

        Arguments:
            value: Labels z of shape (*sample, *batch_shape, D).

        Returns:
            Level in (0, 1) of shape (*sample, *batch_shape); uniform at the truth where the
            posterior is calibrated.
        """
        return chi2_level(self.to_base(value))

    @property
    def _scale(self) -> Scale:
        return self._flow.scale

    def _line(self) -> None:
        if not self._exact_line():
            raise NotImplementedError(
                f"A distribution function needs one label on a line; this is {self.space!r}. "
                "Use credibility, or a block of one label."
            )

    def cdf(self, value: Any) -> Tensor:
        """Distribution function of a single label, of shape (*sample, *batch_shape).

        Raises:
            NotImplementedError: If there is more than one label.
        """
        self._line()
        return ndtr(self.to_base(value).squeeze(-1))

    def icdf(self, value: Any) -> Tensor:
        """Quantiles (*sample, *batch_shape, 1) of a single label at levels (*sample, *batch_shape).

        Raises:
            ValueError: If a level is not in (0, 1).
            NotImplementedError: If there is more than one label.
        """
        self._line()
        levels = as_tensor(value, "levels", like=self._flow.location)
        if not bool(((levels > 0) & (levels < 1)).all()):
            raise ValueError("Expected levels between 0 and 1; got one on or outside the bounds.")
        return self.from_base(torch.special.ndtri(levels).unsqueeze(-1))

    # ------------------------------------------------------------------ draws

    def _noise(self, sample_shape: Sequence[int], generator: torch.Generator | None) -> Tensor:
        shape = (*sample_shape, *self.batch_shape, self._flow.dof)
        if generator is not None and generator.device != self.device:
            # a CPU generator gives the same draws whatever the device of the model
            u = torch.randn(shape, generator=generator, device=generator.device, dtype=self.dtype)
            return u.to(self.device)
        return torch.randn(shape, generator=generator, device=self.device, dtype=self.dtype)

    def rsample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws (*sample_shape, *batch_shape, D) that carry gradients to the network."""
        return self._decode_labels(self._noise(sample_shape, generator))

    def sample(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> Tensor:
        """Draws of shape (*sample_shape, *batch_shape, D), without gradients."""
        with torch.no_grad():
            return self.rsample(sample_shape, generator)

    def sample_and_log_prob(
        self, sample_shape: Sequence[int] = (), generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draws and their log density from one pass; both carry gradients.

        Returns:
            Labels (*sample_shape, *batch_shape, D) and log density (*sample_shape, *batch_shape).
        """
        return self._decode(self._noise(sample_shape, generator))

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(batch_shape={tuple(self.batch_shape)}, "
            f"event_shape={tuple(self.event_shape)}, space={self.space!r})"
        )


def log_density(u: Tensor, ladj: Tensor) -> Tensor:
    """Log density of each coordinate given the earlier ones, of shape (..., d)."""
    return ladj - u**2 / 2 - _HALF_LOG_2PI
