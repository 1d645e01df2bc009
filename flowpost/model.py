"""PosteriorModel: an encoder and its head, and the loss of an event that `fit` minimises."""

from __future__ import annotations

from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import as_tensor
from ._events import called, mapped
from ._weights import weighted_mean
from .encoders import Encoder
from .head import PosteriorHead
from .posterior import Posterior

__all__ = ["EventLoss", "PosteriorModel"]

_Self = TypeVar("_Self", bound="PosteriorModel")


def _cast(x: Any, dtype: torch.dtype) -> Any:
    if isinstance(x, np.ndarray):
        x = torch.as_tensor(x)
    if isinstance(x, Tensor):
        return x.to(dtype) if x.is_floating_point() else x
    if isinstance(x, dict):
        return {k: _cast(v, dtype) for k, v in x.items()}
    if type(x) in (tuple, list):
        return tuple(_cast(v, dtype) for v in x)
    return x


class EventLoss(NamedTuple):
    """Loss of each event.

    Attributes:
        value: Loss in nats (N,).
        base: Base coordinates (N, d), arbitrary where labels are missing; or None.
        whole: Which events have all labels (N,); None where all have.
        posterior: The part −ln q(z|x) (N,) of a loss that can have another; None where it has none.
        data: The part of the data given the labels (N,); None where it has none.
    """

    value: Tensor
    base: Tensor | None = None
    whole: Tensor | None = None
    posterior: Tensor | None = None
    data: Tensor | None = None


class PosteriorModel(nn.Module):
    """An encoder and its head.

    Arguments:
        encoder: Any module that returns (N, L); None where the input is the context itself.
        head: The head.

    Raises:
        ValueError: If the head is no `PosteriorHead`.
    """

    def __init__(self, encoder: nn.Module | None, head: PosteriorHead) -> None:
        super().__init__()
        if not isinstance(head, PosteriorHead):
            raise ValueError(
                f"Expected head as a PosteriorHead; got {type(head).__name__}. The order is "
                "PosteriorModel(encoder, head)."
            )
        self.encoder = encoder
        self.head = head

    def encode(self, x: Any) -> Tensor | None:
        """The context (N, L): tuples and dicts are passed on as the encoder's arguments.

        Floating inputs are cast to the precision of the encoder's parameters.
        """
        if self.encoder is None:
            return x if x is None else as_tensor(x, "x", like=self.head.flow.bias)
        own = next((p.dtype for p in self.encoder.parameters() if p.is_floating_point()), None)
        if own is not None:
            x = _cast(x, own)
        return called(self.encoder, x)

    def forward(self, x: Any, *, reference: Any = None) -> Posterior:
        """The posterior of each event of a batch of inputs x; None for an unconditional density.

        References are those of `PosteriorHead.forward`.
        """
        return self.head(self.encode(x), reference=reference)

    @property
    def unscaled(self) -> bool:
        """Whether there are parts beside encoder and head whose scales are not set."""
        return False

    def fit_scale(self, x: Any, z: Any) -> None:
        """Set the scales of parts beside encoder and head, of inputs and labels; there are none.

        See `set_scales` for all parts.
        """

    def set_scales(
        self: _Self, x: Any, z: Any, weight: Any = None, *, reference: Any = None
    ) -> _Self:
        """Set every scale that is not set yet, as `flowpost.fit` does before it trains.

        That is for a loop of your own: scales of the inputs where the encoder has a `fit_scale`,
        of the labels, and of a likelihood and latents if there are any.

        Arguments:
            x: Inputs of the training part, or of enough of it.
            z: Their labels (N, D).
            weight: Event weights (N,), for the scale of the labels.
            reference: First guesses, for a head that wants them.

        Raises:
            ValueError: If inputs, labels, weights or references do not fit, or the head was scaled
                with other references.
        """
        if reference is not None and bool(self.head.fitted):
            self.head._reference(reference, 2)
        x = mapped(x, torch.as_tensor)
        if self.unscaled:
            self.fit_scale(x, z)
        if not bool(self.head.fitted):
            self.head.fit_scale(as_tensor(z, "labels"), weight, reference)
        fit_encoder = getattr(self.encoder, "fit_scale", None)
        if callable(fit_encoder) and not getattr(self.encoder, "fitted", False):
            called(fit_encoder, x)
        return self

    def own_parts(self) -> list[nn.Module]:
        """Modules of flowpost, which `flowpost.fit` lets learn at a higher rate than a user's."""
        inner = [] if self.encoder is None else self.encoder.modules()
        return [self.head, *(m for m in inner if isinstance(m, Encoder))]

    def event_loss(
        self, x: Any, z: Any, mask: Any = None, *, reference: Any = None, base: bool = False
    ) -> EventLoss:
        """−ln q(z|x) of each event, and its base coordinates if asked for.

        Arguments are those of `loss`.

        Raises:
            ValueError: If labels or mask do not fit.
        """
        return self._posterior_loss(self.encode(x), z, mask, reference, base)

    def _posterior_loss(
        self, context: Tensor | None, z: Any, mask: Any, reference: Any, base: bool
    ) -> EventLoss:
        if mask is not None:
            u, log_prob, whole = self.head._masked(context, z, mask, reference)
            return EventLoss(-log_prob, u, whole)
        if base:
            u, log_prob = self.head.to_base_and_log_prob(context, z, reference=reference)
            return EventLoss(-log_prob, u)
        return EventLoss(-self.head.log_prob(context, z, reference=reference))

    def loss(
        self,
        x: Any,
        z: Any,
        weight: Any = None,
        mask: Any = None,
        *,
        reference: Any = None,
        signed_weights: bool = False,
    ) -> Tensor:
        """The loss that `flowpost.fit` minimises, in nats; arguments as in `PosteriorHead.loss`."""
        loss = self.event_loss(x, z, mask, reference=reference).value
        return weighted_mean(loss, weight, signed_weights)
