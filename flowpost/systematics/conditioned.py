"""A head that is told the nuisances: an encoder that takes ν beside the event."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._events import sizes
from .nuisances import Nuisances

__all__ = ["ConditionedEncoder", "at"]


def at(x: Any, nu: Any) -> Any:
    """Inputs of a `ConditionedEncoder`: those of N events, and their nuisances.

    Arguments:
        x: Inputs of shape (N, …), or a tuple or dict of such.
        nu: Nuisances of shape (N, k), or (k,) for all events alike.

    Returns:
        (x, nu) where x is a tensor, (*x, nu) where it is a tuple, {**x, "nu": nu} where it is a
        dict; nu of shape (N, k).

    Raises:
        ValueError: If shapes do not fit, or a nuisance is not finite.
    """
    nu = as_tensor(nu, "nu")
    check_finite(nu, "nu")
    found = set(sizes(x))
    if len(found) != 1:
        raise ValueError(f"Expected inputs of as many events each; got {sorted(found)} events.")
    count = found.pop()
    nu = nu.expand(count, -1) if nu.ndim == 1 else nu
    check_shape(nu, (count, "k"), "nu", "One row of nuisances for each event.")
    if isinstance(x, Mapping):
        return {**x, "nu": nu}
    return (*x, nu) if isinstance(x, (tuple, list)) else (x, nu)


class ConditionedEncoder(nn.Module):
    """An encoder whose context also holds the nuisances: (N, L + k) for a head.

    The head is then q(z|x, ν): at any ν it is the posterior that an analysis which fits ν wants,
    and `marginal` integrates ν out again.

    Arguments:
        encoder: Any network that returns (N, L), or None where the inputs (N, L) are the context.
        nuisances: Their prior, by which they are standardised and named; or their number k, for
            those that need no standardising, such as a one-hot alternative.
        context: Features L of the encoder's output, for which L + k is the head's `context`.
        hidden: Units of a network that mixes context and nuisances, for what x says of z can depend
            on ν in more than an offset; 0 appends ν alone.

    Attributes:
        names: Names of the nuisances; None where only their number was given.

    Example:
        >>> from torch.distributions import Normal
        >>> prior = Nuisances(shift=Normal(0.0, 2.0))
        >>> encoder = ConditionedEncoder(nn.Linear(3, 8), prior, context=8)
        >>> encoder(torch.zeros(5, 3), torch.zeros(5, 1)).shape
        torch.Size([5, 9])
    """

    loc: Tensor
    scale: Tensor

    def __init__(
        self, encoder: nn.Module | None, nuisances: Nuisances | int, context: int, hidden: int = 64
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.context = check_positive_int(context, "context")
        self.names: tuple[str, ...] | None = None
        if isinstance(nuisances, Nuisances):
            self.names = nuisances.names
            kind = torch.get_default_dtype()
            loc, scale = (
                t.detach().to("cpu", kind).clone() for t in (nuisances.nominal, nuisances.stddev)
            )
        else:
            size = check_positive_int(nuisances, "nuisances")
            loc, scale = torch.zeros(size), torch.ones(size)
        self.register_buffer("loc", loc)
        self.register_buffer("scale", scale)
        self.hidden = hidden
        total = self.context + len(self.loc)
        self.mix: nn.Sequential | None = None
        if check_positive_int(hidden, "hidden", minimum=0):
            self.mix = nn.Sequential(
                nn.Linear(total, hidden), nn.SiLU(), nn.Linear(hidden, self.context)
            )
            # at initialisation nothing but the appended nuisances
            for parameter in self.mix[-1].parameters():
                nn.init.zeros_(parameter)

    def config(self) -> dict[str, Any]:
        """JSON description, without the encoder inside; the standardisation is in the weights."""
        return {
            "type": type(self).__name__,
            "nuisances": len(self.loc) if self.names is None else list(self.names),
            "context": self.context,
            "hidden": self.hidden,
        }

    @classmethod
    def _build(cls, config: Mapping[str, Any], encoder: nn.Module | None) -> ConditionedEncoder:
        """Build one from its description, around an encoder."""
        nuisances = config["nuisances"]
        named = isinstance(nuisances, list)
        new = cls(
            encoder, len(nuisances) if named else nuisances, config["context"], config["hidden"]
        )
        new.names = tuple(str(n) for n in nuisances) if named else None
        return new

    @property
    def fitted(self) -> bool:
        """Whether the encoder inside has its scales, or needs none."""
        inside = callable(getattr(self.encoder, "fit_scale", None))
        return not inside or bool(getattr(self.encoder, "fitted", False))

    def fit_scale(self, *x: Any, **named: Any) -> ConditionedEncoder:
        """Set the scales of the encoder inside, if it has any, from inputs as in `forward`."""
        x, named, _ = self._apart(x, named)
        if callable(getattr(self.encoder, "fit_scale", None)):
            self.encoder.fit_scale(*x, **named)  # type: ignore[union-attr, operator]
        return self

    def forward(self, *x: Any, **named: Any) -> Tensor:
        """Context (N, L + k) of the encoder's inputs and, last or by name, nu of shape (N, k).

        Raises:
            ValueError: If the encoder does not return (N, L), or nu does not fit.
        """
        x, named, nu = self._apart(x, named)
        return self.append(self.inner(*x, **named), nu)

    def inner(self, *x: Any, **named: Any) -> Tensor:
        """Context (N, L) of the encoder inside.

        Raises:
            ValueError: If it is of another shape.
        """
        context = x[0] if self.encoder is None else self.encoder(*x, **named)
        check_shape(
            context, ("N", self.context), "the encoder's context", "Set context=… to its width."
        )
        return context

    def append(self, context: Tensor, nu: Any) -> Tensor:
        """Context (N, L + k) of contexts (N, L) and nuisances (N, k).

        Raises:
            ValueError: If nu does not fit.
        """
        nu = as_tensor(nu, "nu", like=context).to(context)
        check_shape(nu, (len(context), len(self.loc)), "nu", "One row of nuisances for each event.")
        standard = (nu - self.loc.to(context)) / self.scale.to(context)
        if self.mix is not None:
            context = context + self.mix(torch.cat([context, standard], -1))
        return torch.cat([context, standard], -1)

    def _apart(self, x: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any], Any]:
        named = dict(named)
        nu = named.pop("nu", None)
        if nu is None:
            if len(x) < 2 and not (named and x):
                raise ValueError(
                    "Expected the inputs of the encoder and nu; got nu or the inputs alone. Call "
                    "the model with systematics.at(x, nu)."
                )
            x, nu = x[:-1], x[-1]
        return x, named, nu
