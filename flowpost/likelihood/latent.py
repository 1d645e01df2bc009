r"""Unlabelled latents z_u: what an event varies by beside its labels.

An amortised posterior :math:`q_\phi(z_u|x, z_o)` and a prior :math:`p(z_u|z_o)`, a standard normal
or one that is learned.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from ..head import PosteriorHead
from ..posterior import Posterior
from ..spaces import Real, Space
from .base import LabelEncoder

__all__ = ["Latent"]


class Latent(nn.Module):
    """Latents of a likelihood: their posterior given the event and its labels, and their prior.

    Arguments:
        space: The label space; None where events have no labels.
        size: Latents k of an event.
        context: Features L of the encoder's context.
        flow: The rung of their posterior.
        prior: `"normal"`, a standard normal whatever the labels, or `"learned"`.
        hidden: Units of the network that reads the labels.

    Raises:
        ValueError: If an option is unknown or out of range.
    """

    def __init__(
        self,
        space: Space | None,
        size: int,
        context: int,
        flow: str = "affine",
        *,
        prior: str = "normal",
        hidden: int = 32,
    ) -> None:
        super().__init__()
        if prior not in ("normal", "learned"):
            raise ValueError(f"Expected prior as 'normal' or 'learned'; got {prior!r}.")
        self._options: dict[str, Any] = {
            "size": check_positive_int(size, "size"),
            "context": check_positive_int(context, "context", minimum=0),
            "flow": flow,
            "prior": prior,
            "hidden": check_positive_int(hidden, "hidden"),
        }
        self.space, self.size = space, size
        self.latent_space = Real(size)
        if space is None and prior == "learned":
            raise ValueError("Expected prior as 'normal' where there are no labels; got 'learned'.")
        self.labels = None if space is None else LabelEncoder(space, hidden, hidden, 2)
        inputs = context + (hidden if space is not None else 0)
        self.head = PosteriorHead(inputs, self.latent_space, flow)
        if self.head.flow.weight is not None:
            # where neither posterior nor likelihood depends on them, no gradient makes them do so
            with torch.no_grad():
                self.head.flow.weight[: self.latent_space.location_size].normal_(
                    std=2 * inputs**-0.5
                )
        self.prior_head = (
            PosteriorHead(hidden, self.latent_space, flow) if prior == "learned" else None
        )

    def config(self) -> dict[str, Any]:
        """JSON description."""
        space = None if self.space is None else self.space.config()
        return {"space": space, **self._options}

    def fit_scale(self, z: Tensor) -> Latent:
        """Set the standardisation of the labels (N, D)."""
        if self.labels is not None:
            self.labels.fit_scale(z)
        return self

    def posterior(self, context: Tensor | None, z: Tensor | None) -> Posterior:
        """q(z_u|x, z_o) of contexts (N, L) and labels (*sample, N, D)."""
        if self.labels is None or z is None:
            return self.head(context)
        features = self.labels(z.to(self.head.flow.bias))
        if context is None:
            return self.head(features)
        context = context.expand(*features.shape[:-1], context.shape[-1])
        return self.head(torch.cat([context, features], -1))

    def prior_log_prob(self, latent: Tensor, z: Tensor | None) -> Tensor:
        """ln p(z_u|z_o) of latents (*sample, N, k) and labels (*sample, N, D)."""
        if self.prior_head is None or self.labels is None or z is None:
            return -(latent.square().sum(-1) + latent.shape[-1] * math.log(2 * math.pi)) / 2
        return self.prior_head(self.labels(z.to(latent))).log_prob(latent)
