"""Soft bins: the head that turns a context into a summary of K bins.

With logits :math:`\\ell_k(c)`, linear in the context, and a temperature T,

.. math:: b_k(x) = \\mathrm{softmax}_k(\\ell(c(x)) / T),

the expected count of bin k is the mean of :math:`b_k` times the yield, and differentiable; after
the training an event goes into the bin :math:`\\arg\\max_k b_k`.

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743, equation 4.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._events import called, chosen, mapped, sizes
from .._modes import evaluated
from ..encoders import Encoder

__all__ = ["SoftBins", "SummaryModel", "hard_assign", "signal_order"]

_LEARNED = "learned"


class SoftBins(nn.Module):
    """A head of K soft bins.

    Arguments:
        context: Features L of the context.
        bins: Bins K.
        temperature: What logits are divided by: a positive number, `"learned"`, or a function of
            the training's progress in [0, 1], which `anneal` asks (`inferno.fit` calls it).

    Raises:
        ValueError: If a size or a temperature is not positive.

    Example:
        >>> SoftBins(8, bins=10)(torch.randn(5, 8)).shape
        torch.Size([5, 10])
    """

    log_temperature: Tensor

    def __init__(
        self,
        context: int,
        bins: int = 10,
        temperature: float | str | Callable[[float], float] = 0.5,
    ) -> None:
        super().__init__()
        self.context = check_positive_int(context, "context")
        self.bins = check_positive_int(bins, "bins", minimum=2)
        self.logits = nn.Linear(self.context, self.bins)
        self.schedule = temperature if callable(temperature) else None
        self.learned = temperature == _LEARNED
        if isinstance(temperature, str) and not self.learned:
            raise ValueError(
                f"Expected temperature as a number, 'learned' or a function; got {temperature!r}."
            )
        start = torch.zeros(())
        if self.learned:
            self.log_temperature = nn.Parameter(start)
        else:
            self.register_buffer("log_temperature", start)
            self.anneal(0.0) if self.schedule else self._set(temperature)

    def extra_repr(self) -> str:
        """Sizes and temperature, for printing."""
        kind = _LEARNED if self.learned else "scheduled" if self.schedule else "fixed"
        return f"bins={self.bins}, temperature={self.temperature:.4g} ({kind})"

    @property
    def temperature(self) -> float:
        """What logits are divided by now."""
        return math.exp(float(self.log_temperature.detach()))

    def _set(self, value: Any) -> None:
        if not (isinstance(value, (int, float)) and 0 < value < math.inf):
            raise ValueError(f"Expected temperature as a positive number; got {value!r}.")
        with torch.no_grad():
            self.log_temperature.fill_(math.log(value))

    def anneal(self, progress: float) -> None:
        """Set the temperature of a schedule at a progress in [0, 1]; others stay as they are."""
        if self.schedule is not None:
            self._set(float(self.schedule(progress)))

    def config(self) -> dict[str, Any]:
        """JSON description from which the head is built again, with a schedule at its present."""
        temperature: float | str = _LEARNED if self.learned else self.temperature
        return {"context": self.context, "bins": self.bins, "temperature": temperature}

    def forward(self, context: Tensor) -> Tensor:
        """Probabilities (N, K) of the bins for contexts (N, L)."""
        check_shape(context, ("N", self.context), "context", "Set SoftBins(context=…) to it.")
        logits = self.logits(context.to(self.logits.weight.dtype))
        return torch.softmax(logits * torch.exp(-self.log_temperature), -1)


class SummaryModel(nn.Module):
    """An encoder and its soft bins: inputs (N, …) to probabilities (N, K).

    Arguments:
        encoder: Any module that returns (N, L); None where the input is the context itself.
        head: The soft bins.

    Raises:
        ValueError: If the head is no `SoftBins`.
    """

    def __init__(self, encoder: nn.Module | None, head: SoftBins) -> None:
        super().__init__()
        if not isinstance(head, SoftBins):
            raise ValueError(
                f"Expected head as SoftBins; got {type(head).__name__}. The order is "
                "SummaryModel(encoder, head)."
            )
        self.encoder = encoder
        self.head = head

    @property
    def bins(self) -> int:
        """Bins K."""
        return self.head.bins

    def fit_scale(self, x: Any) -> SummaryModel:
        """Set the standardisation of a flowpost encoder from inputs (N, …), unless it was set."""
        if isinstance(self.encoder, Encoder) and not self.encoder.fitted:
            called(self.encoder.fit_scale, x)  # type: ignore[arg-type]
        return self

    def forward(self, x: Any) -> Tensor:
        """Probabilities (N, K); tuples and dicts are passed on as the encoder's arguments."""
        return self.head(as_tensor(x, "x") if self.encoder is None else called(self.encoder, x))

    @torch.no_grad()
    def assign(self, x: Any, chunk: int = 65536) -> Tensor:
        """The hard bin (N,) of each event, in evaluation mode and on the network's device.

        Raises:
            ValueError: If there are no events, or the network gives NaN.
        """
        total = next(iter(sizes(x)), 0)
        if not total:
            raise ValueError("Expected at least one event; got none.")
        device = self.head.logits.weight.device
        found = []
        with evaluated(self):
            for rows in torch.arange(total).split(chunk):
                part = mapped(chosen(x, rows), lambda t: t.to(device))
                found.append(hard_assign(self(part)))
        return torch.cat(found)


def hard_assign(probabilities: Any) -> Tensor:
    """The most probable bin (N,) of probabilities or logits (N, K).

    Raises:
        ValueError: If the shape is another or a value is not finite.
    """
    p = as_tensor(probabilities, "probabilities")
    check_shape(p, ("N", "K"), "probabilities")
    check_finite(p, "probabilities", "Look for NaN in the inputs.")
    return p.argmax(-1)


def signal_order(signal: Any, background: Any) -> Tensor:
    """Indices (K,) of bins by rising signal over background, empty ones first, for display.

    Arguments:
        signal: Expected signal counts (K,).
        background: Expected background counts (K,).
    """
    s, b = as_tensor(signal, "signal").double(), as_tensor(background, "background").double()
    check_shape(b, tuple(s.shape), "background", "One count a bin, as the signal's.")
    ratio = torch.where(s + b > 0, s / (s + b), -torch.inf)
    return ratio.argsort(stable=True)
