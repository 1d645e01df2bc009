"""Held-out events: their posteriors in portions, and bins of what is known without the labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .._events import chosen, sizes
from .._modes import evaluating
from .._progress import progress_bar
from ..diagnostics.local_result import told_apart
from ..model import PosteriorModel
from ..posterior import Posterior

__all__ = ["EventBins", "given_values", "labels_of", "of_each", "posteriors"]

_ROWS = 4096
# what `by` is, where it is no label column
_GIVEN = "given"


def labels_of(model: PosteriorModel, z: Any) -> Tensor:
    """Labels (n, D) of held-out events.

    Raises:
        ValueError: If they are given by name, or are no numbers.
    """
    if isinstance(z, Mapping):
        space = model.head.space
        remedy = "Give model.head.space.pack(labels)."
        if not hasattr(space, "pack"):
            remedy = f"Stack its columns: {', '.join(space.names)}."
        raise ValueError(f"Expected labels as a tensor or array (n, D); got a dict. {remedy}")
    return model.head._columns(as_tensor(z, "labels"))


def posteriors(
    model: PosteriorModel,
    events: EventBins,
    x: Any,
    total: int,
    name: str,
    progress: bool,
    reference: Any,
    by: Tensor | None,
) -> Iterator[tuple[Tensor, Any, Posterior, Tensor]]:
    """Rows, inputs, posterior and what is binned (n,), on the CPU, of events in portions.

    Raises:
        ValueError: If there are not as many inputs, references or values as labels.
    """
    for what, value in (("inputs", x), ("reference", reference), ("by", by)):
        found = set(sizes(value))
        if found - {total}:
            raise ValueError(
                f"Expected {what} of as many events as there are labels, {total}; got "
                f"{sorted(found)}."
            )
    device = next(model.parameters()).device
    with progress_bar(total, name, progress) as bar, evaluating(model):
        for rows in torch.arange(total).split(_ROWS):
            part, guess, own = (chosen(v, rows, device) for v in (x, reference, by))
            q = model(part, reference=guess)
            q = q if q.batch_shape else q.expand((len(rows),))
            value = events.values(part, q, own)
            yield rows, part, q, torch.zeros(len(rows)) if value is None else value.cpu()
            bar.update(len(rows))


def given_values(by: Any) -> Tensor | None:
    """Values of by as a tensor, or None.

    Raises:
        ValueError: If they are a function, as the bins keep the one that they were fitted with.
    """
    if callable(by):
        raise ValueError(
            "Expected by as values (N,); got a function. Call fit with it, or give its values."
        )
    return None if by is None else as_tensor(by, "by")


def of_each(q: Posterior, by: Tensor | None) -> Posterior:
    """An unconditional posterior as that of each event that values are given of."""
    return q if by is None or q.batch_shape else q.expand(tuple(by.shape))


class EventBins(nn.Module):
    """Bins of a reconstructed quantity, so that an event's bin is known without its label.

    Arguments:
        model: The model of the events.
        bins: Number of bins of equal content, or their rising inner edges.
        by: None for a single bin, the name of a label column, a function of the inputs, or values.
    """

    edges: Tensor

    def __init__(self, model: PosteriorModel, bins: int | Sequence[float], by: Any = None) -> None:
        super().__init__()
        columns = model.head.space.names
        if isinstance(by, str) and by not in columns:
            raise ValueError(
                f"Expected by as a label column, a function of the inputs, or values (N,); got "
                f"{by!r}. Columns are {', '.join(columns)}."
            )
        self.column = columns.index(by) if isinstance(by, str) else None
        self.function = by if callable(by) else None
        self.by: str | None = None if by is None else by if isinstance(by, str) else _GIVEN
        edges = None
        if isinstance(bins, Integral):
            count = check_positive_int(bins, "bins")
        else:
            edges = as_tensor(bins, "bins").detach().cpu().double()
            check_shape(edges, ("K",), "bins")
            check_finite(edges, "bins")
            if not bool((edges.diff() > 0).all()):
                raise ValueError(f"Expected rising inner edges as bins; got {edges.tolist()}.")
            count = len(edges) + 1
        self.bins: int | list[float] = count if edges is None else edges.tolist()
        self.fixed = edges is not None and by is not None
        self.count = 1 if by is None else count
        start = edges if self.fixed and edges is not None else torch.zeros(self.count - 1)
        self.register_buffer("edges", start.double())

    @property
    def given(self) -> bool:
        """Whether events bring their values, or a function of the inputs has them."""
        return self.by == _GIVEN

    def values(self, x: Any, q: Posterior, by: Tensor | None) -> Tensor | None:
        """The quantity of each event (*batch), or None where there is a single bin.

        That of a label column is the label at the centre of the base.

        Raises:
            ValueError: If values are missing, not wanted, or do not fit.
        """
        if by is not None and not self.given:
            raise ValueError(
                f"Expected no values of by; the bins are of {self.by or 'all events together'}. "
                "Call fit with by= values or a function of the inputs to have other bins."
            )
        if self.by is None:
            return None
        if self.column is not None:
            with torch.no_grad():
                origin = torch.zeros(*q.batch_shape, q.dof, dtype=q.dtype, device=q.device)
                return q.from_base(origin)[..., self.column].double()
        if by is None and self.function is not None:
            by = self.function(x)
        if by is None:
            raise ValueError(
                "Expected by=… with the values (N,) that the bins are of; got None. A function is "
                "not saved: give its values."
            )
        found = as_tensor(by, "by").to(q.device).double()
        check_shape(found, tuple(q.batch_shape), "by", "One value per event.")
        check_finite(found, "by")
        return found

    def fit_edges(self, values: Tensor) -> Tensor:
        """Set edges of equal content; returns which events (n,) are edges themselves.

        The other events of a bin are then independent, and distributed as new ones in it.
        """
        chosen_edges = torch.zeros(len(values), dtype=torch.bool)
        if self.fixed or self.count == 1:
            return chosen_edges
        order = values.argsort(stable=True)
        at = order[torch.arange(1, self.count) * len(values) // self.count]
        self.edges = values[at].to(self.edges)
        if not bool((self.edges.diff() > 0).all()):
            raise ValueError(
                f"Expected a quantity with {self.count} bins of equal content; many events have "
                f"the same value. Give bins=… as edges, of {self.edges.tolist()} those that differ."
            )
        chosen_edges[at] = True
        return chosen_edges

    def place(self, values: Tensor | None, q: Posterior) -> Tensor:
        """Bin of each event (*batch)."""
        if values is None:
            return torch.zeros(q.batch_shape, dtype=torch.int64, device=q.device)
        return torch.bucketize(values.contiguous(), self.edges.to(values), right=True)

    def intervals(self) -> list[str]:
        """What each bin is, in words."""
        if self.count == 1:
            return ["all events"]
        name = "by" if self.by in (None, _GIVEN) else self.by
        # edges that were given are shown as they are
        edges = told_apart(self.edges.tolist(), 12 if self.fixed else 4)
        inner = [f"{low} ≤ {name} < {high}" for low, high in pairwise(edges)]
        return [f"{name} < {edges[0]}", *inner, f"{name} ≥ {edges[-1]}"]
