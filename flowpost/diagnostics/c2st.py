r"""Classifier two-sample test of a posterior: true pairs (x, z) against (x, z' ~ q(z|x)).

If q is the posterior of the simulation, no classifier can tell the joint pairs apart, whatever it
looks at. That is stronger than coverage, which a posterior that equals the prior passes: here it
fails as soon as x says anything of z. Each event gives one pair of either kind; given x, true and
drawn label may be exchanged under the null, so that the permutation within events is exact.

A network that is told labels in their own scale sees little of posteriors a thousand times narrower
than their prior. The base coordinates u(z; x), standard normal if q is right, are residuals in
units of the posterior's width: they stand beside the labels as a second set of features.

References:
    L-C2ST: Local Diagnostics for Posterior Approximations in Simulation-Based Inference
    (J. Linhart, A. Gramfort, P. Rodrigues, 2023) https://arxiv.org/abs/2306.03580

    Discriminative calibration (Y. Yao, J. Domke, 2023) https://arxiv.org/abs/2305.14593
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_shape
from .._events import called, chosen, sizes
from .._modes import evaluating
from .draws import matched

if TYPE_CHECKING:
    from ..metrics import ClassifierTest

__all__ = ["c2st"]

_CHUNK = 4096
# between seeds of draws and those of the test
_DRAWS = 2_000_003


def c2st(
    model: Any,
    x: Any,
    z: Any,
    *,
    reference: Any = None,
    summary: Any = None,
    weight: Any = None,
    features: Mapping[str, Callable[[Tensor | None, Tensor], Any]] | None = None,
    seed: int = 0,
    **options: Any,
) -> ClassifierTest:
    """Ask classifiers to tell true labels from posterior draws; needs `flowpost[diagnostics]`.

    The first sample is (context, true label), the second (context, draw), of the same events.

    Arguments:
        model: A `PosteriorModel`, or anything that makes a posterior of batch shape (N,) of x, as a
            head does of contexts.
        x: Inputs of N events that did not train the model; None for an unconditional density.
        z: Their true labels (N, D).
        reference: First guesses of the labels (N, D), for a head that wants them.
        summary: What classifiers see of x: a tensor (N, L), or a function of x that returns one.
            By default the context of the model; of a model without `encode`, x itself.
        weight: Event weights (N,), of an event's true and drawn label alike.
        features: Sets of features by name, each a function of contexts (N, L), None where there are
            none, and labels (N, D). By default "labels", the context beside the labels as the
            space has them for networks (angles as cosine and sine); and "base", beside the base
            coordinates, if the posterior has them.
        seed: Of draws, splits, trainings and permutations.
        options: Further options of `flowpost.metrics.classifier_test`, such as `classifiers`,
            `permutations` and `progress`.

    Returns:
        The result of the test.

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or there are fewer than 50 events.
        ImportError: If scikit-learn is not installed.
    """
    from ..metrics import classifier_test

    taken = {"paired", "weight_x", "weight_y"} & set(options)
    if taken:
        raise ValueError(
            f"Expected options of classifier_test that are free; got {', '.join(sorted(taken))}. "
            "The pairs are those of events; their weights are given as `weight`."
        )
    z = as_tensor(z, "true labels z").detach()
    for name, part in (("x", x), ("reference", reference)):
        if any(n != len(z) for n in sizes(part)):
            raise ValueError(
                f"Expected {name} of {len(z)} events, as z has; got {sorted(set(sizes(part)))}."
            )
    told = None
    if summary is not None:
        told = as_tensor(called(summary, x) if callable(summary) else summary, "summary")
        check_shape(told, (len(z), "L"), "summary", "One row an event.")
    generator = torch.Generator().manual_seed(_DRAWS + seed)
    parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
    device = None if parameter is None else parameter.device
    pieces = []
    with evaluating(model):
        for rows in torch.arange(len(z)).split(_CHUNK):
            part, guess = (chosen(v, rows, device) for v in (x, reference))
            context, q = _posterior(model, part, guess)
            if told is not None:
                context = told[rows.to(told.device)]
            pieces.append(_pairs(q, z[rows.to(z.device)], context, features, generator))
    if not pieces:
        raise ValueError("Expected at least one event; got none.")
    sets = {k: tuple(torch.cat([p[k][i] for p in pieces]) for i in (0, 1)) for k in pieces[0]}
    first, second = next(iter(sets.values()))
    return classifier_test(
        first,
        second,
        weight_x=weight,
        weight_y=weight,
        features=sets,
        paired=True,
        seed=seed,
        **options,
    )


def _posterior(model: Any, x: Any, reference: Any) -> tuple[Any, Any]:
    """Contexts (n, L) or None, and the posterior of the same events."""
    known = {} if reference is None else {"reference": reference}
    if hasattr(model, "encode") and hasattr(model, "head"):
        context = model.encode(x)
        return context, model.head(context, **known)
    return x, model(x, **known)


def _pairs(
    q: Any, z: Tensor, context: Any, features: Any, generator: torch.Generator
) -> dict[str, tuple[Tensor, Tensor]]:
    """Features of true labels and of draws, by name."""
    space = getattr(q, "space", None)
    q, z = matched(q, z)
    if space is not None:
        z = space.validate(z, "true labels z")
    drawn = q.sample((), generator=generator)
    labels = (z.to(drawn.dtype), drawn)
    if context is not None and not isinstance(context, Tensor):
        raise ValueError(
            f"Expected a model that encodes x as contexts (N, L); got {type(context).__name__}. "
            "Give what classifiers shall see of x as `summary`."
        )
    if features is not None:
        ask = {k: partial(f, context) for k, f in features.items()}
    else:
        ask = {
            "labels": partial(_with_context, context, _same if space is None else space.features)
        }
        if hasattr(q, "to_base"):
            ask["base"] = partial(_with_context, context, q.to_base)
    return {name: (_cpu(f(labels[0]), name), _cpu(f(labels[1]), name)) for name, f in ask.items()}


def _same(z: Tensor) -> Tensor:
    return z


def _with_context(
    context: Tensor | None, function: Callable[[Tensor], Tensor], z: Tensor
) -> Tensor:
    values = function(z)
    if context is None:
        return values
    return torch.cat([context.reshape(len(z), -1).to(values), values], 1)


def _cpu(value: Any, name: str) -> Tensor:
    return as_tensor(value, f"features {name!r}").detach().cpu().double()
