r"""Posterior-predictive p-values: does the event look like those that its posterior predicts?

With labels :math:`z_s \sim q_\phi(z|x_\mathrm{obs})` and data :math:`x_s \sim p_\theta(x|z_s)`,

.. math:: p = \frac{1}{S} \sum_s \mathbb{1}\big[T(x_s, z_s) \le T(x_\mathrm{obs}, z_s)\big], \qquad
          T(x, z) = \frac{\ln p_\theta(x|z)}{\max(N_d, 1)},

with :math:`N_d` the number of measured values of the event, so that an event that fits badly has a
low p. It is conservative: among good events small p are rarer than uniform, the more so the fewer
values there are; `Calibrator` makes them uniform. An event that fits too well, with too little
scatter, has p near one; the two-sided p is low for it as well.

The draws of all events come one after the other from one generator, in portions: an event has other
draws, and within its error another p, with another seed, in another order and in another portion of
a file. More draws narrow this.

Sources: A. Gelman, X.-L. Meng, H. Stern, *Posterior predictive assessment of model fitness via
realized discrepancies*, 1996, https://www.jstor.org/stable/24306036; T. Glüsenkamp, *Unifying
supervised learning and VAEs*, 2020, https://arxiv.org/abs/2008.05825, section 5.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._checks import check_positive_int
from .._events import chosen, leaves, sizes
from .._modes import evaluating
from .._progress import progress_bar
from ..likelihood import BoundLikelihood, ExtendedModel
from ..model import PosteriorModel
from ..posterior import Posterior

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = [
    "PredictiveP",
    "encoded",
    "over_events",
    "p_value",
    "replicas",
    "seeded",
]

# numbers of the likelihood held at once
_CHUNK = 2**22
# apart from those of a simulation, which would have the same numbers
_SEEDS = 0x60_0D_F1_70_0000
# draws on the rarer side of the observed value, below which an event gets more draws
_LEAST = 10


@dataclass(frozen=True, eq=False, repr=False)
class PredictiveP:
    """Posterior-predictive p-values of N events; all tensors on the CPU.

    Attributes:
        p: One-sided p (N,): low where the event fits badly.
        two_sided: 2·min(p, 1 − p) (N,), with each side including ties: low also where it fits too
            well.
        error: Monte-Carlo standard error of p (N,).
        draws: Posterior draws of each event (N,).
        z_score: Observed minus replicated T, in standard deviations of the replicated (N,): goes on
            where p is 0 or 1.
        statistic: Mean observed T over the posterior in nats per measured value (N,).
        labels: Posterior mean of the labels (N, D).
    """

    p: Tensor
    two_sided: Tensor
    error: Tensor
    draws: Tensor
    z_score: Tensor
    statistic: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.p)

    def __str__(self) -> str:
        p = self.p
        if not len(p):
            return "Posterior-predictive p of 0 events"
        shares = "  ".join(f"{100 * float((p < t).double().mean()):.2f} %" for t in (0.01, 0.05))
        return (
            f"Posterior-predictive p of {len(p)} events: mean {float(p.mean()):.3f}, standard "
            f"deviation {float(p.std(correction=0)):.3f}; below 0.01 and 0.05: {shares} (not "
            f"uniform by construction: see Calibrator); {int(self.draws.min())} to "
            f"{int(self.draws.max())} draws"
        )

    def plot(
        self, ax: Axes | None = None, *, bins: int = 20, threshold: float | None = None
    ) -> Axes:
        """Draw the distribution of p against the uniform; see `flowpost.plots.plot_p_values`."""
        from ..plots import plot_p_values

        return plot_p_values(self, ax, bins=bins, threshold=threshold)

    def __repr__(self) -> str:
        return f"PredictiveP(N={len(self)})"


def p_value(
    model: ExtendedModel,
    x: Any,
    draws: int = 200,
    *,
    max_draws: int | None = None,
    reference: Any = None,
    seed: int = 0,
    progress: bool = False,
) -> PredictiveP:
    """Posterior-predictive p-value of each event.

    Arguments:
        model: A trained posterior with its likelihood.
        x: Inputs of N events, a tensor or a tuple or dict of tensors; there may be none.
        draws: Posterior draws S of each event.
        max_draws: Events with few draws on one side of the observed value get more draws, doubled
            up to this number; None gives all events the same. For p well below 1/S. As it stops
            where there are enough, p of such events is some 8 % too high, a quarter of its error.
        reference: First guesses, for a head that wants them.
        seed: Of all draws, which are those of all events together: p of an event depends, within
            its error, on the events before it.
        progress: Show a progress bar.

    Returns:
        p-values with their errors; memory grows with N by a few numbers an event.

    Raises:
        ValueError: If the model has no likelihood, or inputs do not fit.
    """
    check_model(model)
    most = check_positive_int(draws, "draws", minimum=2)
    if max_draws is not None:
        most = check_positive_int(max_draws, "max_draws", minimum=draws)
    if not count_of(x):
        return _result(
            torch.zeros(0, 6, dtype=torch.float64),
            torch.zeros(0, model.head.space.label_size, dtype=torch.float64),
        )
    generator = seeded(seed)

    def sums(q: Posterior, context: Tensor | None, data: Any) -> tuple[Tensor, ...]:
        return _counts(model, q, context, data, draws, most, generator)

    return _result(*over_events(model, x, reference, draws, sums, "p-values", progress))


def over_events(
    model: ExtendedModel,
    x: Any,
    reference: Any,
    draws: int,
    ask: Callable[[Posterior, Tensor | None, Any], tuple[Tensor, ...]],
    name: str,
    progress: bool,
) -> list[Tensor]:
    """What is asked of posterior, context and data of events, of all, worked on in portions."""
    total = count_of(x)
    device = next(model.parameters()).device
    found = []
    with evaluating(model), progress_bar(total, name, progress) as bar:
        for rows in event_chunks(model, total, draws):
            part, guess = (chosen(v, rows, device) for v in (x, reference))
            context = encoded(model, part)
            q = model.head(context, reference=guess, validate_args=False)
            found.append(ask(q, context, model.measured(part)))
            bar.update(len(rows))
    return [torch.cat(parts) for parts in zip(*found, strict=True)]


def seeded(seed: int) -> torch.Generator:
    """A generator of draws on the CPU, which serves every device."""
    return torch.Generator().manual_seed(_SEEDS + seed)


def count_of(x: Any) -> int:
    """The number of events of inputs.

    Raises:
        ValueError: If parts differ in it, or are no tensors or arrays.
    """
    if not all(isinstance(part, Tensor) or hasattr(part, "__array__") for part in leaves(x)):
        raise ValueError(
            f"Expected x as a tensor, or a tuple or dict of tensors; got a {type(x).__name__} of "
            "something else. Convert it with torch.as_tensor."
        )
    found = set(sizes(x))
    if len(found) != 1:
        raise ValueError(
            "Expected x as a tensor, or a tuple or dict of tensors, with one row for each event; "
            f"got {sorted(found) if found else type(x).__name__}."
        )
    return found.pop()


def encoded(model: ExtendedModel | PosteriorModel, x: Any) -> Tensor | None:
    """Contexts (N, L) of inputs.

    Raises:
        ValueError: If the encoder does not take as many inputs.
    """
    several = isinstance(x, (tuple, dict))
    if several and model.encoder is None:
        raise ValueError(
            f"Expected x as one tensor, without labels, where there is no encoder; got {len(x)}."
        )
    try:
        return model.encode(x)
    except TypeError as error:
        raise ValueError(
            "Expected x as the inputs of the encoder, without labels; got "
            f"{len(x) if several else 1} of them, which it does not take ({error})."
        ) from error


def check_model(model: Any) -> None:
    """Refuse what has no likelihood.

    Raises:
        ValueError: If it is no `ExtendedModel`.
    """
    if not isinstance(model, ExtendedModel):
        raise ValueError(
            f"Expected an ExtendedModel; got {type(model).__name__}. A goodness of fit needs the "
            "likelihood of the data: flowpost.likelihood.ExtendedModel(encoder, head, likelihood)."
        )


def event_chunks(model: ExtendedModel, total: int, draws: int) -> list[Tensor]:
    """Indices of events that are worked on together."""
    size = max(1, _CHUNK // (draws * model.likelihood.size))
    return list(torch.arange(total).split(size))


def replicas(
    model: ExtendedModel,
    q: Posterior,
    context: Tensor | None,
    draws: int,
    generator: torch.Generator,
) -> Iterator[tuple[Tensor, BoundLikelihood]]:
    """Labels (S, n, D) of the posterior, and the likelihood there, in portions that fit memory."""
    events = max(1, q.batch_shape.numel())
    portion = max(1, _CHUNK // (events * model.likelihood.size))
    for start in range(0, draws, portion):
        z = q.sample((min(portion, draws - start),), generator)
        if model.latent is not None:
            latent = model.latent.posterior(context, z).sample((), generator)
            yield z, model.likelihood._bind(torch.cat([z, latent], -1))
        else:
            yield z, model.likelihood._bind(z)


def _counts(
    model: ExtendedModel,
    q: Posterior,
    context: Tensor | None,
    data: Any,
    draws: int,
    most: int,
    generator: torch.Generator,
) -> tuple[Tensor, ...]:
    """Sums over draws for each event, with more draws where few are on one side."""
    events, device = q.batch_shape.numel(), q.device
    sums = torch.zeros(6, events, dtype=torch.float64, device=device)
    labels = None
    todo, portion = torch.arange(events, device=device), draws
    while len(todo):
        whole = len(todo) == events
        part_q = q if whole else q[todo]
        part_c = context if context is None or whole else context[todo]
        part_x = data if whole else chosen(data, todo)
        kept = []
        for z, bound in replicas(model, part_q, part_c, portion, generator):
            number = bound.measured(part_x).clamp_min(1)
            observed = (bound.log_prob(part_x, generator) / number).double()
            value, number = bound.replica(generator)
            replicated = (value / number.clamp_min(1)).double()
            terms = (
                (replicated <= observed).double(),
                (replicated >= observed).double(),
                observed,
                replicated,
                replicated.square(),
                torch.ones_like(observed),
            )
            sums[:, todo] += torch.stack([t.sum(0) for t in terms])
            if labels is None:
                kept.append(z)
        if labels is None:
            labels = q.space.mean(torch.cat(kept).double())
        rarer = torch.minimum(sums[0], sums[1])
        done = sums[5]
        todo = ((rarer < _LEAST) & (2 * done <= most)).nonzero()[:, 0]
        portion = int(done[todo].min()) if len(todo) else 0
    assert labels is not None
    return (sums.T.cpu(), labels.cpu())


def _result(sums: Tensor, labels: Tensor) -> PredictiveP:
    low, high, observed, replicated, square, draws = sums.T
    p, above = low / draws, high / draws
    smooth = (low + 1) / (draws + 2)
    mean = replicated / draws
    spread = (square / draws - mean.square()).clamp_min(0).sqrt()
    score = (observed / draws - mean) / spread.clamp_min(1e-300)
    return PredictiveP(
        p=p,
        two_sided=(2 * torch.minimum(p, above)).clamp_max(1.0),
        error=(smooth * (1 - smooth) / draws).sqrt(),
        draws=draws.long(),
        z_score=torch.where(
            spread > 0, score, torch.sign(observed / draws - mean) * math.inf
        ).nan_to_num(0.0, math.inf, -math.inf),
        statistic=observed / draws,
        labels=labels,
    )
