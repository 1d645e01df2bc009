r"""How a posterior is covered when a nuisance is off, and what its robustness costs.

A posterior that marginalises the nuisances is covered on average over their prior. At any one value
it need not be: with a label of flat prior, :math:`x = z + \nu + n` and
:math:`s = \sigma_\nu / \sigma_n`, the region of credibility p at :math:`\nu = t\,\sigma_\nu` covers

.. math:: \Phi(c\sqrt{1 + s^2} - st) - \Phi(-c\sqrt{1 + s^2} - st), \qquad
          c = \Phi^{-1}\big((1 + p)/2\big),

more than p at t = 0 and less from some t on. `report` measures this, for any model.

A posterior with a base costs a forward pass and a density for each event and point. One without,
such as the `Marginal` of several labels, is ranked among its own draws: S draws under M components
are S·M densities, some 50 ms of a CPU core for each event and point with four labels, 64 draws and
128 components. `MarginalModel(…, draws=32)` takes a quarter of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import check_positive_int
from .._events import Batch, TensorEvents, mapped, to_batch
from .._progress import progress_bar
from ..diagnostics import CoverageAccumulator, LevelAccumulator, hpd_levels
from ..posterior import BlockPosterior
from .datasets import check_function, check_labelled, check_prior
from .marginal import Marginal
from .marginalise import MarginalModel
from .nuisances import Nuisances
from .results import Point, SystematicsReport
from .widths import label_widths

__all__ = ["report"]

# events at a point of which widths are taken
_WIDTH_EVENTS = 2048
# events of a point and draws of an event, also where each of them costs many densities
_EVENTS, _SLOW_EVENTS = 20_000, 500
_DRAWS, _SLOW_DRAWS = 256, 64


def report(
    model: Any,
    make_events: Callable[[Tensor, torch.Generator], Any],
    prior: Nuisances,
    at: float | Sequence[float] = (-2, -1, 0, 1, 2),
    *,
    without: Any = None,
    events: int | None = None,
    levels: Sequence[float] = (0.682689, 0.9),
    draws: int | None = None,
    seed: int = 0,
    chunk: int = 2048,
    progress: bool = False,
) -> SystematicsReport:
    """Return coverage and sharpness averaged over the prior, at nominal, and at shifted nuisances.

    Arguments:
        model: A `PosteriorModel`, a `MarginalModel`, or any function of x that returns posteriors
            of a batch; called with `reference=` where the events have one. Coverage is that of
            base-ordered regions, and of highest-density ones where there is no base.
        make_events: A function of nuisances (n, k) and a `torch.Generator` that returns events of
            them, as for `Simulated`: (x, z), (x, z, weight), or a dict with `reference`.
        prior: The joint prior of the nuisances.
        at: Shifts of each nuisance in σ, or one, the others nominal; see `Nuisances.at`.
        without: The same model trained without systematics, to see what they cost.
        events: Events of each point, of 2 + k·(shifts other than 0) points; where it is None
            20 000, or 500 for a `MarginalModel` of more than one label, which takes some 25 s for
            each point.
        levels: Credible levels of the table.
        draws: Draws of each event for its widths, and for highest-density levels; where it is None
            256, or 64 for the levels of a `Marginal`. A level is known to 1/draws, and calibrated
            ones are uniform with any number.
        seed: Of the events; those of different points are independent, and both models see the
            same ones.
        chunk: Events that are in memory at once.
        progress: Show a progress bar.

    Raises:
        ValueError: If the events are no simulated events, weights are negative, or an option is
            wrong.
    """
    models = [model] if without is None else [model, without]
    _check_order(models, make_events)
    prior = check_prior(prior)
    slow = any(isinstance(m, MarginalModel) and not m.has_base for m in models)
    note = ""
    if events is None:
        events = _SLOW_EVENTS if slow else _EVENTS
        if slow:
            note = (
                f"events: {events} at each point, for the densities are mixtures; events= for more"
            )
    events, chunk = check_positive_int(events, "events"), check_positive_int(chunk, "chunk")
    if draws is not None:
        check_positive_int(draws, "draws", minimum=2)
    levels = tuple(float(c) for c in levels)
    if not levels or not all(0 < c < 1 for c in levels):
        raise ValueError(f"Expected levels between 0 and 1; got {levels}. 90 % is written 0.9.")
    places = _places(prior, at)
    whole = [m for m in models if isinstance(m, torch.nn.Module)]
    # one by one, for frozen parts may be in evaluation mode already
    modes = [(part, part.training) for m in whole for part in m.modules()]
    try:
        for module in whole:
            module.eval()
        points: list[Point] = []
        columns: tuple[str, ...] = ()
        with progress_bar(events * len(places), "report", progress) as bar:
            for i, (name, sigmas, nu) in enumerate(places):
                generator = torch.Generator().manual_seed(seed * 1_000_003 + i)
                measured = _Measurement(models, draws, widths=i < 2)
                for start in range(0, events, chunk):
                    n = min(chunk, events - start)
                    some = prior.sample(n, generator) if nu is None else nu.expand(n, -1)
                    measured.add(_events(make_events(some.clone(), generator)))
                    bar.update(n)
                points.append(measured.point(name, sigmas, nu))
                columns = columns or measured.columns
    finally:
        for part, training in modes:
            part.training = training
    return SystematicsReport(prior.names, levels, tuple(points), columns, note)


def _check_order(models: Sequence[Any], make_events: Any) -> None:
    """Refuse arguments in another order.

    Raises:
        ValueError: If a model or the function of the events is something else.
    """
    order = "The order is report(model, make_events, prior)."
    for model in models:
        if not callable(model):
            raise ValueError(
                f"Expected a model, or a function of x that returns posteriors; got "
                f"{type(model).__name__}. {order}"
            )
    if isinstance(make_events, (torch.nn.Module, Nuisances)):
        raise ValueError(
            f"Expected make_events as a function of nuisances and a torch.Generator; got "
            f"{type(make_events).__name__}. {order}"
        )
    check_function(make_events, "make_events", ("nu", "generator"))


def _places(
    prior: Nuisances, at: float | Sequence[float]
) -> list[tuple[str, float | None, Tensor | None]]:
    """Name, shift and nuisances of each point."""
    shifts = [float(s) for s in (at if isinstance(at, Iterable) else [at])]
    places: list[tuple[str, float | None, Tensor | None]] = [
        ("averaged", None, None),
        ("nominal", 0.0, prior.nominal),
    ]
    for name in prior.names:
        for shift in dict.fromkeys(shifts):
            if shift:
                places.append((name, shift, prior.at(name, shift)))
    return places


def _events(given: Any) -> Batch:
    batch = to_batch(given)
    check_labelled(batch, "make_events")
    if batch.mask is not None:
        raise ValueError(
            "Expected events of known labels; got a mask. Return a dict with keys x, z, weight, "
            "reference."
        )
    return TensorEvents(batch).batch


class _Measurement:
    """Coverage, NLL and widths of one or two models on the same stream of events."""

    def __init__(self, models: Sequence[Any], draws: int | None, widths: bool) -> None:
        self.models, self.draws, self.widths = models, draws, widths
        self.accumulators: list[LevelAccumulator | None] = [None] * len(models)
        # Σw, Σw², Σw d, Σw² d, Σw² d² with d the difference of two NLLs
        self.paired = torch.zeros(5, dtype=torch.float64)
        self.log_width: list[list[Tensor]] = [[] for _ in models]
        self.columns: tuple[str, ...] = ()
        self.seen = 0

    @torch.no_grad()
    def add(self, batch: Batch) -> None:
        """Add events."""
        if not len(batch.z):
            return
        log_probs = []
        for i, model in enumerate(self.models):
            q, z = _posterior(model, batch)
            log_probs.append(self._cover(i, q, z, batch.weight))
            left = _WIDTH_EVENTS - self.seen
            if self.widths and left > 0:
                few = q if left >= len(z) else q[slice(0, left)]
                named = label_widths(few, self.draws or _DRAWS)
                self.columns = tuple(named)
                self.log_width[i].append(torch.stack(list(named.values()), -1).log().cpu())
        if len(log_probs) == 2:
            d = (log_probs[1] - log_probs[0]).double().cpu()
            w = torch.ones_like(d) if batch.weight is None else batch.weight.to(d)
            terms = (w, w * w, w * d, w * w * d, w * w * d * d)
            self.paired += torch.stack([t.sum() for t in terms])
        self.seen += len(batch.z)

    def _cover(self, i: int, q: Any, z: Tensor, weight: Any) -> Tensor:
        """Add to the coverage of a model; return ln q of the true labels (N,)."""
        accumulator = self.accumulators[i]
        if _has_base(q):
            v, log_prob = q.to_base_and_log_prob(z)
            new = CoverageAccumulator(v.shape[-1]) if accumulator is None else accumulator
        else:
            generator = torch.Generator().manual_seed(self.seen)
            draws = self.draws or (_SLOW_DRAWS if isinstance(q, Marginal) else _DRAWS)
            v, log_prob = hpd_levels(q, z, draws, generator)
            new = LevelAccumulator("HPD") if accumulator is None else accumulator
        new.update(v, log_prob, weight)
        self.accumulators[i] = new
        return log_prob

    def point(self, name: str, sigmas: float | None, nu: Tensor | None) -> Point:
        """The results of all events."""
        found = [a.compute() for a in self.accumulators if a is not None]
        if not found:
            raise ValueError(f"Expected events from make_events; got none at {name}.")
        nats = error = None
        if len(found) == 2:
            w, w2, wd, w2d, w2d2 = self.paired.tolist()
            nats = wd / w
            error = math.sqrt(max(w2d2 - 2 * nats * w2d + nats * nats * w2, 0.0)) / w
        width = [torch.cat(parts).double().mean(0) for parts in self.log_width if parts]
        return Point(
            name,
            sigmas,
            nu,
            found[0],
            found[1] if len(found) == 2 else None,
            nats,
            error,
            width[0].exp() if width else None,
            (width[0] - width[1]).exp() if len(width) == 2 else None,
        )


def _has_base(q: Any) -> bool:
    if isinstance(q, BlockPosterior) or not hasattr(q, "to_base_and_log_prob"):
        return False
    return not isinstance(q, Marginal) or q.has_base


def _posterior(model: Any, batch: Batch) -> tuple[Any, Tensor]:
    """The posteriors of a batch, and its labels beside them."""
    x, reference, z = batch.x, batch.reference, batch.z
    if isinstance(model, torch.nn.Module):
        own = next(model.parameters(), None)
        if own is not None:
            device = own.device
            x, reference, z = (mapped(v, lambda t: t.to(device)) for v in (x, reference, z))
    return model(x) if reference is None else model(x, reference=reference), z
