r"""A posterior model beside the likelihood of its data, trained by the extended supervised loss.

See `flowpost.losses.extended` for the loss. Terms whose parameters are all frozen are constants and
are left out while others learn, so that one trains jointly, or one part after the other:

.. code-block:: python

    model.likelihood.requires_grad_(False)
    fp.fit(model, data)                        # the posterior first
    model.requires_grad_(False)
    model.likelihood.requires_grad_(True)
    fp.fit(model, data)                        # then the likelihood
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from .._checks import as_tensor
from .._events import called
from ..head import PosteriorHead
from ..losses import likelihood_loss
from ..model import EventLoss, PosteriorModel
from ..spaces import Product, Real, Space
from .base import Likelihood
from .latent import Latent

__all__ = ["ExtendedModel", "with_latents"]


def with_latents(space: Space, size: int) -> Product:
    """The space of labels and latents behind them, over which a likelihood with latents stands."""
    return Product(labels=space, latent=Real(size))


class ExtendedModel(PosteriorModel):
    """An encoder with its head, and the likelihood of the data given the labels.

    It is a `PosteriorModel`: `model(x)` is the posterior, and `flowpost.fit` trains all parts.

    Arguments:
        encoder: Any module that returns (N, L); None where the input is the context itself.
        head: The head of the labels.
        likelihood: p(x|z); its space is that of the head, or `with_latents(head.space, k)`.
        latent: Posterior and prior of the latents, if there are any.
        data: A module that takes the encoder's input to the data of the likelihood, where they
            differ.

    Raises:
        ValueError: If the parts do not fit together.
    """

    def __init__(
        self,
        encoder: nn.Module | None,
        head: PosteriorHead,
        likelihood: Likelihood,
        latent: Latent | None = None,
        data: nn.Module | None = None,
    ) -> None:
        super().__init__(encoder, head)
        if not isinstance(likelihood, Likelihood):
            raise ValueError(
                f"Expected a Likelihood; got {type(likelihood).__name__}. The order is "
                "ExtendedModel(encoder, head, likelihood)."
            )
        wanted = head.space if latent is None else with_latents(head.space, latent.size)
        if likelihood.space != wanted:
            raise ValueError(
                f"Expected the likelihood over {wanted!r}; got {likelihood.space!r}. Build it with "
                + ("the space of the head." if latent is None else "with_latents(space, k).")
            )
        if latent is not None and latent.space != head.space:
            raise ValueError(
                f"Expected latents of {head.space!r}; got those of {latent.space!r}. Build them "
                "with the space of the head."
            )
        self.likelihood, self.latent, self.data = likelihood, latent, data
        self._warned = False

    def own_parts(self) -> list[nn.Module]:
        """Modules of flowpost, which learn at a higher rate than a user's."""
        own = super().own_parts()
        if not self.likelihood.custom:
            own.append(self.likelihood)
        return own if self.latent is None else [*own, self.latent]

    @property
    def unscaled(self) -> bool:
        """Whether the scales of the likelihood are not set."""
        return not bool(self.likelihood.fitted)

    def fit_scale(self, x: Any, z: Any) -> None:
        """Set the scales of likelihood and latents, of inputs and labels; `flowpost.fit` does.

        See `set_scales` for encoder and head too.
        """
        z = self.head._columns(as_tensor(z, "labels"))
        if self.latent is not None:
            self.latent.fit_scale(z.to(next(self.latent.parameters())))
            generator = torch.Generator().manual_seed(0)
            latents = torch.randn(len(z), self.latent.size, generator=generator)
            z = torch.cat([z, latents.to(z)], -1)
        self.likelihood.fit_scale(self.measured(x), z)

    def measured(self, x: Any) -> Any:
        """The data of the likelihood, of the encoder's input."""
        return x if self.data is None else called(self.data, x)

    def event_loss(
        self, x: Any, z: Any, mask: Any = None, *, reference: Any = None, base: bool = False
    ) -> EventLoss:
        """Extended supervised loss of each event (N,), and its base coordinates if asked for.

        Raises:
            ValueError: If labels are masked: the likelihood needs them all.
        """
        if mask is not None:
            raise ValueError(
                "Expected events with all labels for the extended loss; got a mask. Train the "
                "posterior first, with a PosteriorModel of the same encoder and head."
            )
        z = self.head._columns(as_tensor(z, "labels"))
        posterior, likelihood = self._learning()
        context = None
        if posterior or base or self.latent is not None:
            context = self.encode(x)
        loss, u, own, extra = z.new_zeros(len(z)), None, None, None
        if posterior or base:
            own, u, *_ = self._posterior_loss(context, z, None, reference, base)
            loss = own if posterior or not likelihood else own.new_zeros(len(z))
        if likelihood:
            self._warn_unscaled()
            extra = likelihood_loss(
                self.likelihood, self.measured(x), z, latent=self.latent, context=context
            )
            loss = loss.to(extra) + extra
        return EventLoss(loss, u, posterior=own if posterior else None, data=extra)

    def _warn_unscaled(self) -> None:
        """Say once, in training, that the scales of the likelihood are not set."""
        if self.training and self.unscaled and not (self._warned or self.likelihood.custom):
            self._warned = True
            warnings.warn(
                "The likelihood has no scales: it takes labels and data as standardised. Call "
                "model.set_scales(x, z) before a loop of your own.",
                stacklevel=4,
            )

    def _learning(self) -> tuple[bool, bool]:
        """Whether posterior and likelihood are of the loss: both, where neither learns."""
        posterior = learns(self.head) or (self.encoder is not None and learns(self.encoder))
        likelihood = learns(self.likelihood) or (self.latent is not None and learns(self.latent))
        neither = not (posterior or likelihood)
        return posterior or neither, likelihood or neither


def learns(module: nn.Module) -> bool:
    """Whether any parameter is not frozen."""
    return any(p.requires_grad for p in module.parameters())
