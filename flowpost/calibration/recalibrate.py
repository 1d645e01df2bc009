r"""Recalibration at the base: monotone maps that make held-out base coordinates normal.

Of a calibrated posterior the base coordinates u of the true labels are N(0, I_d). Where held-out
events say otherwise, one more step of the flow makes them so on average: a rising map of each
coordinate, :math:`u_j \to \Phi^{-1}(F_j(u_j))`, and then one of the radius, with

.. math:: \ln q'(z|x) = \ln N(u'; 0, I_d) + \ln |\det \partial u / \partial z|
                        + \ln g'(r) + (d - 1) \ln \frac{g(r)}r ,

which is normalised for any rising g. What comes out is a `Posterior` like any other. Its coverage
is right on average over the events, or those of a bin, and no more than that: it is still the same
shape for every event of the bin.

Source for the idea, there for a single label: *Accurate uncertainties for deep learning using
calibrated regression*, V. Kuleshov, N. Fenner, S. Ermon, 2018, https://arxiv.org/abs/1807.00263.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_finite
from .._weights import check_weights
from ..head import PosteriorHead
from ..model import PosteriorModel
from ..posterior import Posterior
from .bins import EventBins, given_values, labels_of, of_each, posteriors
from .flow import RecalibratedFlow, rings_of
from .knots import IDENTITY, KNOTS, effective, line_map, radial_map
from .monotone import Knots, Monotone, stacked
from .radial import MARGINAL_KNOTS, each, marginal

__all__ = ["Recalibrator"]

_FEWEST, _FEW = 100, 500
_PARTS = ("x", "y", "slope")

_Maps = tuple[list[Knots], list[Knots], float]


class Recalibrator(nn.Module):
    """Makes the base-ordered coverage of a trained posterior right, by held-out events.

    `recalibrator(x)` is the posterior of the model with its base recalibrated.

    Arguments:
        model: A trained model; a head is that of contexts.
        radial: Map the radius, by which the base-ordered regions of every credibility hold as many
            labels as stated.
        coordinates: Map each base coordinate before, for heads that are biased or skewed, or of
            another width in each label. Those of a circle or sphere meet at the antipode: it has a
            map of its own radius.
        bins: Number of bins of equal content of a quantity that `fit` is given, or their inner
            edges.
        smooth: Bins learn from others too: an event so many bins away counts e^(−1/2), one in twice
            the distance e^(−2). With it the maps change little from bin to bin, and there can be
            many of them.

    Attributes:
        held: Held-out events of each bin, (K,).
        gain: By how many nats the mean −ln q falls in each bin for events that its map was not
            fitted to, from cross-validation; (K,).

    Raises:
        ValueError: If the model is none, or an option is out of range.

    Example:
        >>> import flowpost as fp
        >>> head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
        >>> z = 2 * torch.randn(1000, 2)
        >>> recalibrator = Recalibrator(head).fit(None, z)
        >>> round(recalibrator(None).credibility(z).mean().item(), 1)
        0.5
    """

    held: Tensor
    gain: Tensor

    def __init__(
        self,
        model: PosteriorModel | PosteriorHead,
        *,
        radial: bool = True,
        coordinates: bool = False,
        bins: int | Sequence[float] = 4,
        smooth: float = 0.0,
    ) -> None:
        super().__init__()
        if isinstance(model, PosteriorHead):
            model = PosteriorModel(None, model)
        if not isinstance(model, PosteriorModel):
            raise ValueError(
                f"Expected a PosteriorModel or PosteriorHead; got {type(model).__name__}. What has "
                "no base coordinates has conformal levels: flowpost.calibration.conformal_levels."
            )
        if not (radial or coordinates):
            raise ValueError("Expected radial, coordinates or both; got neither.")
        if not isinstance(smooth, (float, Real)) or not 0 <= smooth < float("inf"):
            raise ValueError(f"Expected smooth as a number of bins of at least 0; got {smooth!r}.")
        self.model = model
        self.radial, self.coordinates = bool(radial), bool(coordinates)
        self.smooth = float(smooth)
        events = EventBins(model, bins)
        self.bins = events.bins
        self._allocate(events)

    def _allocate(self, events: EventBins) -> None:
        """Buffers of as many bins as there are; none is fitted."""
        self.events = events
        count, space = self.events.count, self.model.head.space
        blocks = len(space.blocks)
        sizes = {
            "coordinate": (space.dof * self.coordinates, KNOTS),
            "radius": (blocks * self.radial, KNOTS if blocks == 1 else MARGINAL_KNOTS),
        }
        device = self.model.head.flow.bias.device
        for name, (size, knots) in sizes.items():
            line = torch.linspace(0, 1, knots, dtype=torch.float64, device=device)
            for part in _PARTS:
                values = line if part != "slope" else torch.ones_like(line)
                table = values.expand(count, size, knots).clone()
                self.register_buffer(f"{name}_{part}", table)
        zeros = torch.zeros(count, dtype=torch.float64, device=device)
        self.register_buffer("held", zeros.long())
        self.register_buffer("gain", zeros)
        self.events.to(device)

    def config(self) -> dict[str, Any]:
        """JSON description, without the model; a function or values by which are not kept."""
        return {
            "radial": self.radial,
            "coordinates": self.coordinates,
            "bins": self.bins,
            "smooth": self.smooth,
            "by": None if self.events.given else self.events.by,
            "given": self.events.given,
        }

    @classmethod
    def _build(cls, model: PosteriorModel, config: dict[str, Any]) -> Recalibrator:
        """Build one from its description, not yet filled."""
        options = dict(config)
        by, given = options.pop("by"), options.pop("given")
        new = cls(model, **options)
        new._allocate(EventBins(model, new.bins, torch.zeros(0) if given else by))
        return new

    @property
    def fitted(self) -> bool:
        """Whether it has seen held-out events."""
        return bool(self.held.any())

    def fit(
        self,
        x: Any,
        z: Any,
        weight: Any = None,
        by: Any = None,
        *,
        reference: Any = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Recalibrator:
        """Find the maps by events on which nothing was trained.

        Coverage of new events is off at some level by more than 1.63/√n in about one of a hundred
        fits, n the events of the bin: 0.023 with 5000.

        Arguments:
            x: Inputs of n events.
            z: Their labels (n, D).
            weight: Event weights (n,), not negative.
            by: What the bins are of, known without the label: a label column by name, such as
                `"energy"` (the label at the centre of the base is binned, not the true one), a
                function of the inputs that returns (n,), or values (n,), which `forward` then wants
                too. None for one map of all events.
            reference: First guesses, for a head that wants them.
            seed: Of the folds of the cross-validation.
            progress: Show a progress bar.

        Raises:
            ValueError: If shapes do not fit, a value is not finite, or a bin has fewer than 100
                events.
        """
        events = EventBins(self.model, self.bins, by)
        z = labels_of(self.model, z)
        if not len(z):
            raise ValueError("Expected labels of at least one event; got none.")
        w = torch.ones(len(z), dtype=torch.float64)
        if weight is not None:
            w = check_weights(weight, z[:, 0].double()).detach().double().cpu()
        values = by if events.given and not callable(by) else None
        u, seen = self._seen(events, x, z, values, reference, progress)
        events.fit_edges(seen)
        place = torch.bucketize(seen, events.edges, right=True)
        order = torch.randperm(len(u), generator=torch.Generator().manual_seed(seed)).numpy()
        near = (counts * w for counts in self._near(place, seen, events.count))
        found = self._fit_bins(u, near, events.intervals(), order)
        # nothing changes before all is well
        self._allocate(events)
        self.held = place.bincount(minlength=events.count).to(self.held)
        self.gain = torch.tensor([gain for _, _, gain in found]).to(self.gain)
        for name, index in (("coordinate", 0), ("radius", 1)):
            rows = [row[index] for row in found]
            if not rows[0]:
                continue
            count = getattr(self, f"{name}_x").shape[-1]
            for part, table in zip(_PARTS, stacked(rows, count), strict=True):  # type: ignore[arg-type]
                own: Tensor = getattr(self, f"{name}_{part}")
                setattr(self, f"{name}_{part}", table.to(own))
        return self

    def _seen(
        self, events: EventBins, x: Any, z: Tensor, values: Any, reference: Any, progress: bool
    ) -> tuple[Tensor, Tensor]:
        """Base coordinates (n, d) of the labels, and what is binned (n,), on the CPU in double."""
        found, binned = [], []
        by = given_values(values)
        for rows, _, q, value in posteriors(
            self.model, events, x, len(z), "recalibrate", progress, reference, by
        ):
            found.append(q.to_base(z[rows]).double().cpu())
            binned.append(value.double())
        u = torch.cat(found)
        check_finite(u, "base coordinates of the labels", "Has the training diverged?")
        return u, torch.cat(binned)

    def _near(self, place: Tensor, seen: Tensor, bins: int) -> Iterator[Tensor]:
        """How much events (n,) count in each bin: 1 in it, less in others if bins are smoothed."""
        if not self.smooth:
            yield from ((place == k).double() for k in range(bins))
            return
        rank = torch.empty_like(seen)
        rank[seen.argsort(stable=True)] = torch.arange(len(seen), dtype=seen.dtype)
        counts = place.bincount()
        first = counts.cumsum(0) - counts
        position = place + (rank - first[place] + 0.5) / counts[place]
        for k in range(bins):
            distance = torch.maximum(k - position, position - k - 1).clamp_min(0)
            near = torch.exp(-(distance / self.smooth).square() / 2)
            yield torch.where(near > 1e-3, near, 0.0)

    def _fit_bins(
        self, u: Tensor, near: Iterable[Tensor], intervals: Sequence[str], order: Any
    ) -> list[_Maps]:
        """What `_fit_bin` finds in each bin, of events of which so much counts there."""
        remedy = "Give more events, fewer bins, or smooth=1."
        if len(intervals) == 1:
            remedy = "Give more events."
        found, few = [], {}
        for weight, where in zip(near, intervals, strict=True):
            count = effective(weight.numpy())
            if count < _FEWEST:
                raise ValueError(
                    f"Expected at least {_FEWEST} held-out events in each bin; got {count:.0f} "
                    f"with {where}. {remedy}"
                )
            if count < _FEW:
                few[where] = count
            found.append(self._fit_bin(u, weight, order))
        if few:
            bins = ", ".join(f"{n:.0f} with {where}" for where, n in few.items())
            warnings.warn(
                f"{bins.replace(' with', ' held-out events with', 1)}: coverage there may be off "
                f"by {1.63 / min(few.values()) ** 0.5:.2f}. {remedy}",
                stacklevel=3,
            )
        return found

    def _fit_bin(self, u: Tensor, weight: Tensor, order: Any) -> _Maps:
        """Maps of coordinates and of the radius of each number of blocks, and the gain."""
        space = self.model.head.space
        rows = weight > 0
        order = _kept(order, rows.numpy())
        u, w = u[rows], weight[rows].numpy()
        lines: list[Knots] = []
        gain = 0.0
        if self.coordinates:
            for own in rings_of(space):
                knots, gained = radial_map(_square(u[:, own]), w, own.stop - own.start, True, order)
                lines += [knots] + [IDENTITY] * (own.stop - own.start - 1)
                gain += gained
            for j in range(space.compact_dof, space.dof):
                knots, gained = line_map(u[:, j].numpy(), w, order)
                lines.append(knots)
                gain += gained
            maps = Monotone(stacked([lines], KNOTS))
            u = each(u, maps, torch.zeros(len(u), dtype=torch.int64), rings_of(space))[0]
        rings: list[Knots] = []
        if self.radial:
            compact = space.compact_dof > 0
            knots, gained = radial_map(_square(u), w, space.dof, compact, order)
            gain += gained
            ends = [b.base.stop for b in space.blocks]
            rings = [marginal(knots, space.dof, end, compact) for end in ends[:-1]] + [knots]
        return lines, rings, gain

    def forward(self, x: Any, *, by: Any = None, reference: Any = None) -> Posterior:
        """The recalibrated posterior of each event of a batch of inputs.

        Arguments:
            x: Inputs, or None for an unconditional density.
            by: Values (N,) of what the bins are of, where `fit` was given values; they replace
                those of a function.
            reference: First guesses, for a head that wants them.

        Raises:
            ValueError: If it is not fitted, or values or references do not fit.
        """
        by = given_values(by)
        return self._recalibrated(of_each(self.model(x, reference=reference), by), x, by)

    def _recalibrated(self, q: Posterior, x: Any, by: Tensor | None) -> Posterior:
        """The posterior of the model, of inputs x, recalibrated."""
        if not self.fitted:
            raise ValueError("Expected a fitted Recalibrator; call fit with held-out events.")
        place = self.events.place(self.events.values(x, q, by), q)
        maps = [self._maps("coordinate"), self._maps("radius")]
        flow = RecalibratedFlow.of(q._flow, place, *maps)
        return Posterior(flow, validate_args=q._validate_args)

    def _maps(self, name: str) -> Monotone | None:
        tables = [getattr(self, f"{name}_{part}") for part in _PARTS]
        return Monotone(Knots(*tables)) if tables[0].shape[1] else None

    def __str__(self) -> str:
        if not self.fitted:
            return "Recalibrator, not fitted"
        lines = [f"Recalibrator of {int(self.held.sum())} held-out events"]
        rows = zip(self.events.intervals(), self.held.tolist(), self.gain.tolist(), strict=True)
        lines += [f"  {where}: {n} events, NLL falls by {gain:.4f} nats" for where, n, gain in rows]
        return "\n".join(lines)


def _square(u: Tensor) -> Any:
    return u.square().sum(-1).numpy()


def _kept(order: Any, rows: Any) -> Any:
    """A permutation of all events as one of some of them."""
    number = rows.cumsum() - 1
    return number[order[rows[order]]]
