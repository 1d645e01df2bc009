r"""The nuisances of a conditioned head integrated out.

With draws :math:`\nu_s \sim p(\nu|x)`

.. math:: q(z|x) = \frac{1}{S} \sum_s q(z \,|\, x, \nu_s) \;\to\;
          \int q(z|x, \nu)\, p(\nu|x)\, \mathrm{d}\nu .

The draws must be those of :math:`p(\nu|x)`, not of the prior: an event may say something of ν. A
second head learns it, on the same simulated events with ν as the label. Draws of the prior are
right only where x says nothing of ν.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._events import mapped, sizes
from ..model import PosteriorModel
from ..spaces import Space
from .conditioned import ConditionedEncoder
from .marginal import Marginal, on_a_line

__all__ = ["MarginalModel", "marginal"]


def marginal(
    model: PosteriorModel,
    x: Any,
    nu: Any,
    *,
    draws: int = 128,
    reference: Any = None,
    generator: torch.Generator | None = None,
) -> Marginal:
    """Integrate the nuisances of a conditioned model out.

    Arguments:
        model: A model whose encoder is a `ConditionedEncoder`.
        x: Inputs of N events, without nuisances.
        nu: A model of p(ν|x): a `PosteriorModel` trained on (x, ν), as `Simulated(…,
            target="nuisances")` gives them. Or draws of it, of shape (S, N, k), or (S, k) for all
            events alike; draws of the prior are right only where x says nothing of ν.
        draws: Draws S from such a model.
        reference: First guesses of the labels, as in `PosteriorHead.forward`.
        generator: Source of those draws; seeded where it is None.

    Raises:
        ValueError: If the model is not conditioned, that of the nuisances is of others, or shapes
            do not fit.

    Example:
        >>> from torch.distributions import Normal
        >>> import flowpost as fp
        >>> from flowpost.systematics import ConditionedEncoder, Nuisances, marginal
        >>> prior = Nuisances(shift=Normal(0.0, 1.0))
        >>> encoder = ConditionedEncoder(fp.encoders.Tabular(3, 8), prior, context=8)
        >>> model = fp.PosteriorModel(encoder, fp.PosteriorHead(9, fp.Real(1)))
        >>> infer = fp.PosteriorModel(fp.encoders.Tabular(3, 8), fp.PosteriorHead(8, prior.space))
        >>> q = marginal(model.eval(), torch.zeros(5, 3), infer.eval())
        >>> q.log_prob(torch.zeros(5, 1)).shape
        torch.Size([5])
    """
    encoder = _conditioned(model)
    count = len(encoder.loc)
    found = set(sizes(x))
    if len(found) != 1:
        raise ValueError(f"Expected inputs of as many events each; got {sorted(found)} events.")
    events = found.pop()
    if isinstance(nu, torch.nn.Module):
        generator = generator or torch.Generator().manual_seed(0)
        _check_nuisances(encoder, nu)
        with torch.no_grad():
            nu = nu(x).sample((check_positive_int(draws, "draws"),), generator)
    nu = as_tensor(nu, "nu", like=encoder.loc).to(encoder.loc)
    if nu.ndim == 2:
        nu = nu.unsqueeze(1).expand(-1, events, -1)
    if nu.ndim != 3 or nu.shape[1:] != (events, count) or not len(nu):
        raise ValueError(
            f"Expected nu of shape (S, {events}, {count}), or (S, {count}) for all events alike; "
            f"got {tuple(nu.shape)}."
        )
    check_finite(nu, "nu")
    context = _context(encoder, x)
    reference = mapped(reference, lambda t: torch.as_tensor(t, device=context.device))
    return Marginal(model, context, nu.to(context), reference)


class MarginalModel(torch.nn.Module):
    """A conditioned model and one of its nuisances, as one: `model(x)` is their `marginal`.

    `systematics.report` takes it like any other model, and `flowpost.save` writes both.

    Arguments:
        model: A model whose encoder is a `ConditionedEncoder`.
        nuisances: A model of p(ν|x), or draws of ν for all events alike (S, k).
        draws: Draws S from such a model, the same random numbers in every call.

    Raises:
        ValueError: If the model is not conditioned, or that of the nuisances is of others.
    """

    nuisances: Any

    def __init__(self, model: PosteriorModel, nuisances: Any, draws: int = 128) -> None:
        super().__init__()
        encoder = _conditioned(model)
        self.model = model
        if isinstance(nuisances, torch.nn.Module):
            _check_nuisances(encoder, nuisances)
            self.nuisances = nuisances
        else:
            nu = as_tensor(nuisances, "nuisances", like=encoder.loc).detach()
            check_shape(nu, ("S", len(encoder.loc)), "nuisances", "Draws for all events alike.")
            check_finite(nu, "nuisances")
            self.register_buffer("nuisances", nu)
        self.draws = check_positive_int(draws, "draws")

    @property
    def has_base(self) -> bool:
        """Whether its posteriors have base coordinates: those of a single label on a line do."""
        return on_a_line(self.model.head.space)

    def forward(self, x: Any, *, reference: Any = None) -> Marginal:
        """The posterior of each event with the nuisances integrated out."""
        return marginal(self.model, x, self.nuisances, draws=self.draws, reference=reference)


def _conditioned(model: Any) -> ConditionedEncoder:
    """The encoder of a conditioned model.

    Raises:
        ValueError: If the model is no such.
    """
    encoder = getattr(model, "encoder", None)
    if not isinstance(encoder, ConditionedEncoder):
        raise ValueError(
            f"Expected a model with a ConditionedEncoder; got {type(encoder).__name__}. A model "
            "that was trained on events of many nuisances is marginalised already."
        )
    return encoder


def _check_nuisances(encoder: ConditionedEncoder, model: torch.nn.Module) -> None:
    """Refuse a model of something else than the nuisances that the encoder is told.

    Raises:
        ValueError: If its columns are others.
    """
    space = getattr(getattr(model, "head", None), "space", None)
    if encoder.names is not None and isinstance(space, Space) and space.names != encoder.names:
        raise ValueError(
            f"Expected a model of the nuisances {', '.join(encoder.names)}; got one of "
            f"{', '.join(space.names)}. Build its head with the prior's space, "
            "PosteriorHead(L, prior.space), and train it on events (x, ν)."
        )


def _context(encoder: ConditionedEncoder, x: Any) -> Tensor:
    """Contexts (N, L) of the encoder inside, of inputs in the precision of its parameters."""
    kind = next((p.dtype for p in encoder.parameters() if p.is_floating_point()), encoder.loc.dtype)

    def cast(value: Any) -> Tensor:
        tensor = torch.as_tensor(value)
        return tensor.to(kind) if tensor.is_floating_point() else tensor

    x = mapped(x, cast)
    if isinstance(x, dict):
        return encoder.inner(**x)
    return encoder.inner(*x) if isinstance(x, tuple) else encoder.inner(x)
