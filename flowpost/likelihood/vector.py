r"""A conditional flow as the likelihood of vectors, or of summaries of an event.

.. math:: \ln p_\theta(x|z) = \ln N\big(f^{-1}(x; z); 0, I\big)
          + \ln |\det \partial f^{-1} / \partial x| .
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor
from ..head import PosteriorHead
from ..posterior import Posterior
from ..spaces import Real, Space, space_from_config
from .base import BoundLikelihood, LabelEncoder, Likelihood, check_events

__all__ = ["FlowLikelihood"]


class FlowLikelihood(Likelihood):
    """A flow over vectors x, conditional on the labels.

    Arguments:
        space: The label space.
        data: Columns of x, or their space where they are not all real.
        flow: The rung of the ladder, as of `PosteriorHead`.
        context: Features between labels and flow.
        hidden: Units of a hidden layer of the network that reads the labels.
        layers: Its hidden layers.
        coupling: Coupling instead of autoregressive conditioning: draws take few steps where there
            are many columns.
        dequantize: Step of data on a grid, such as 1 for counts: x + step·U with U uniform in
            [0, 1) has a density, and draws are put back on the grid.

    Raises:
        ValueError: If an option is out of range.

    Example:
        >>> import flowpost as fp
        >>> likelihood = FlowLikelihood(fp.Real(2), data=5)
        >>> z = torch.zeros(3, 2)
        >>> likelihood.log_prob(likelihood.sample(z), z).shape
        torch.Size([3])
    """

    def __init__(
        self,
        space: Space,
        data: int | Space,
        flow: str = "spline",
        *,
        context: int = 64,
        hidden: int = 64,
        layers: int = 2,
        coupling: bool = False,
        dequantize: float = 0.0,
    ) -> None:
        own = Real(data) if isinstance(data, int) else data
        if not (math.isfinite(dequantize) and dequantize >= 0):
            raise ValueError(f"Expected dequantize as a step of at least 0; got {dequantize!r}.")
        super().__init__(
            space,
            data=own.config(),
            flow=flow,
            context=context,
            hidden=hidden,
            layers=layers,
            coupling=coupling,
            dequantize=float(dequantize),
        )
        self.data, self.dequantize = own, float(dequantize)
        self.labels = LabelEncoder(space, context, hidden, layers)
        self.head = PosteriorHead(context, own, flow, coupling=coupling)

    def fit_scale(self, x: Any, z: Any) -> FlowLikelihood:
        """Set the scales from data (N, F) and labels (N, D) of the training part."""
        # data on a grid may touch a bound of their space, but not with their noise
        x = _columns(self.data, as_tensor(x, "x")) + self.dequantize / 2
        x = self.data.validate(x, "x")
        self.labels.fit_scale(self._labels(z))
        self.head.fit_scale(x)
        self.fitted = torch.ones_like(self.fitted)
        return self

    @property
    def size(self) -> int:
        """Parameters of the flow."""
        return len(self.head.flow.bias)

    def _bind(self, z: Tensor) -> BoundFlowLikelihood:
        flow = self.head(self.labels(z), validate_args=False)
        return BoundFlowLikelihood(flow, self.dequantize)

    @classmethod
    def _build(cls, options: dict[str, Any]) -> FlowLikelihood:
        return cls(**{**options, "data": space_from_config(options["data"])})


class BoundFlowLikelihood(BoundLikelihood):
    """A flow bound to labels."""

    def __init__(self, flow: Posterior, step: float) -> None:
        self.flow, self.step = flow, step
        self.batch_shape = flow.batch_shape

    def _continuous(self, x: Any, generator: torch.Generator | None) -> Tensor:
        x = as_tensor(x, "x", like=self.flow._flow.location)
        x = _columns(self.flow.space, x, len(self.batch_shape))
        check_events(x.shape[:-1], self.batch_shape, "x")
        if self.step:
            device = x.device if generator is None else generator.device
            u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device)
            x = _within(x, self.step, u.to(x.device))
        return self.flow.space.validate(x, "x")

    def log_prob(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x|z), of data (*batch, F); of data on a grid with the noise of the generator."""
        return self.flow.log_prob(self._continuous(x, generator))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Data (*batch, F)."""
        return self._grid(self.flow.sample((), generator))

    def sample_and_log_prob(
        self, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data (*batch, F) and ln p of them, from one pass where they are not on a grid."""
        with torch.no_grad():
            if self.step:
                # with noise of their own, as data have it
                x = self.sample(generator)
                return x, self.log_prob(x, generator)
            return self.flow.sample_and_log_prob((), generator)

    def _grid(self, x: Tensor) -> Tensor:
        return torch.floor(x / self.step) * self.step if self.step else x

    def measured(self, x: Any) -> Tensor:
        """The columns of x."""
        x = as_tensor(x, "x", like=self.flow._flow.location)
        x = _columns(self.flow.space, x, len(self.batch_shape))
        return x.new_full(x.shape[:-1], float(x.shape[-1]))

    def residuals(
        self, x: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Base coordinates (*batch, F)."""
        return self.flow.to_base(self._continuous(x, generator)), None


def _within(x: Tensor, step: float, u: Tensor) -> Tensor:
    """x + step·u strictly between x and x + step, which may be bounds of the space."""
    inner = x + step * u.clamp_min(torch.finfo(u.dtype).eps)
    low = torch.nextafter(x, torch.full_like(x, math.inf))
    high = torch.nextafter(x + step, torch.full_like(x, -math.inf))
    return torch.minimum(torch.maximum(inner, low), high)


def _columns(space: Space, x: Tensor, batch: int = 1) -> Tensor:
    """Data of a single column with its axis, also those of one event."""
    if space.label_size != 1:
        return x
    bare = x.ndim == 1 and batch > 0
    return x.unsqueeze(-1) if bare or x.shape[-1] != 1 else x
