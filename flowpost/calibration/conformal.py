r"""Split-conformal credible levels: regions that hold the truth at least as often as stated.

Of n held-out events with levels :math:`v_{(1)} \le \dots \le v_{(n)}` of their true labels, the
region of credible level

.. math:: t = v_{(k)}, \qquad k = \lceil (n + 1)(1 - \alpha) \rceil,

holds the label of a new event with probability k/(n + 1): at least 1 − α, and less than
1 − α + 1/(n + 1) where no levels are equal. That is exact for every n and any posterior, good or
bad, as long as the new event is exchangeable with those held out: on average over both. For k > n
there is no such region but the whole space, and t = ∞.

Base-ordered regions are ordered by ‖u‖²: the credible level is its :math:`\chi^2_d` distribution
function, which rounds to 1 far out, where the labels of a head that is far too narrow are.

Sources: V. Vovk, A. Gammerman, G. Shafer, *Algorithmic learning in a random world*, 2005,
https://doi.org/10.1007/b106715; H. Papadopoulos, K. Proedrou, V. Vovk, A. Gammerman, *Inductive
confidence machines for regression*, 2002, https://doi.org/10.1007/3-540-36755-1_29.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_shape
from ..diagnostics import hpd_levels
from ..head import PosteriorHead
from ..model import PosteriorModel
from .bins import EventBins, given_values, labels_of, of_each, posteriors
from .recalibrate import Recalibrator

__all__ = ["Conformal", "conformal_levels"]

KINDS = ("base", "hpd")


def conformal_levels(
    levels_of_truth: Tensor, alpha: float | Sequence[float] | Tensor = 0.1
) -> Tensor:
    """The credible level whose regions hold 1 − α of the truths of new events.

    Arguments:
        levels_of_truth: Credible level of the true label of each held-out event, (n,):
            `q.credibility(z)`, `hpd_levels(q, z)[0]`, or any score by which regions are ordered.
            Pass ‖u‖² for heads that may be far too narrow, `q.to_base(z).square().sum(-1)`: levels
            of labels far out round to 1 and are no longer told apart.
        alpha: Share of the events whose label may lie outside, in (0, 1): one or Q of them.

    Returns:
        Levels t of the shape of alpha, float64: a region {z: level ≤ t} holds the label of a new
        event with a probability from 1 − α to 1 − α + 1/(n + 1). It is infinite, for the whole
        space, where n < 1/α − 1.

    Raises:
        ValueError: If a level is NaN, or α not between 0 and 1.

    Example:
        >>> conformal_levels(torch.arange(1.0, 100.0), alpha=[0.5, 0.1, 0.001])
        tensor([50., 90., inf], dtype=torch.float64)
    """
    levels = as_tensor(levels_of_truth, "levels of the truth").detach().double()
    check_shape(levels, ("n",), "levels of the truth")
    if bool(torch.isnan(levels).any()):
        raise ValueError("Expected levels of the truth without NaN; got NaN. Look for bad labels.")
    share = as_tensor(alpha, "alpha").double().to(levels.device)
    if share.ndim > 1 or not bool(((share > 0) & (share < 1)).all()):
        raise ValueError(f"Expected alpha between 0 and 1; got {alpha}. 90 % is alpha=0.1.")
    count = len(levels)
    ordered = torch.cat([levels.sort().values, levels.new_full((1,), math.inf)])
    # as 0.1 is not a tenth, a whole number is not one either
    k = ((count + 1) * (1 - share) - 1e-9 * (count + 1)).ceil().long().clamp(1, count + 1)
    return ordered[k - 1]


class Conformal:
    """Credible levels whose regions hold the truth at least as often as stated.

    Unlike a `Recalibrator` it leaves the posterior as it is, and says which of its regions to use.
    Where an event property decides which bin an event is in, the statement holds in each bin.

    Arguments:
        model: A trained model, a head, or a fitted `Recalibrator`.
        kind: `"base"` for the base-ordered regions, `"hpd"` for those of highest density.
        draws: Draws S of an event by which its HPD level is known to 1/(S + 1). Labels less dense
            than all draws are ordered by chance: of a head that is far too narrow, the region ends
            at random among them.
        bins: Number of bins of equal content of a quantity that `fit` is given, or their inner
            edges.

    Raises:
        ValueError: If an option is unknown.

    Example:
        >>> import flowpost as fp
        >>> head = fp.PosteriorHead(0, fp.Real(2), flow="diagonal")
        >>> conformal = Conformal(head).fit(None, 2 * torch.randn(999, 2))
        >>> bool(conformal.level(0.9) > 0.99)
        True
        >>> conformal.radius(0.9)
        tensor(4..., dtype=torch.float64)
    """

    def __init__(
        self,
        model: PosteriorModel | PosteriorHead | Recalibrator,
        kind: str = "base",
        *,
        draws: int = 256,
        bins: int | Sequence[float] = 4,
    ) -> None:
        if kind not in KINDS:
            raise ValueError(f"Expected kind as one of {', '.join(KINDS)}; got {kind!r}.")
        if isinstance(model, PosteriorHead):
            model = PosteriorModel(None, model)
        if not isinstance(model, (PosteriorModel, Recalibrator)):
            raise ValueError(
                f"Expected a PosteriorModel, PosteriorHead or Recalibrator; got "
                f"{type(model).__name__}. conformal_levels takes the levels of anything."
            )
        self.model, self.kind, self.draws, self.bins = model, kind, draws, bins
        self._inner = model.model if isinstance(model, Recalibrator) else model
        self.events = EventBins(self._inner, bins)
        self._scores: tuple[Tensor, ...] = ()

    @property
    def held(self) -> tuple[int, ...]:
        """Held-out events of each bin."""
        return tuple(map(len, self._scores))

    def fit(
        self,
        x: Any,
        z: Any,
        by: Any = None,
        *,
        reference: Any = None,
        seed: int = 0,
        progress: bool = False,
    ) -> Conformal:
        """Find the levels of the true labels of held-out events, not those of a `Recalibrator`.

        The events that are the edges of bins of equal content are left out, so that the others are
        exchangeable with new events of their bin.

        Arguments:
            x: Inputs of n events.
            z: Their labels (n, D).
            by: What the bins are of, as in `Recalibrator.fit`.
            reference: First guesses, for a head that wants them.
            seed: Of the draws.
            progress: Show a progress bar.

        Raises:
            ValueError: If shapes do not fit or there are no events in a bin.
        """
        events = EventBins(self._inner, self.bins, by)
        values = by if events.given and not callable(by) else None
        scores, seen = self._scored(events, x, z, values, reference, seed, progress)
        if not len(scores):
            raise ValueError("Expected labels of at least one event; got none.")
        edge = events.fit_edges(seen)
        place = torch.bucketize(seen, events.edges, right=True)
        found = tuple(scores[(place == k) & ~edge] for k in range(events.count))
        for where, part in zip(events.intervals(), found, strict=True):
            if not len(part):
                raise ValueError(
                    f"Expected held-out events in every bin; got none with {where}. Give more "
                    "events, or fewer bins."
                )
        self.events, self._scores = events, found
        return self

    def level(
        self, level: float = 0.9, x: Any = None, *, by: Any = None, reference: Any = None
    ) -> Tensor:
        """The credible level to use, for regions that hold the truth with a probability of `level`.

        Arguments:
            level: Probability to hold the truth, at least.
            x: Inputs of N events, where there are bins.
            by: Values (N,), where `fit` was given values.
            reference: First guesses, for a head that wants them.

        Returns:
            A credible level () of all events, or that of each (N,) where there are bins; infinite,
            for the whole space, where a bin has fewer than level / (1 − level) held-out events.
            A warning is given where a base-ordered level is so close to 1 that `q.credibility`
            rounds to it; `radius` and `contains` go on to tell labels apart.

        Raises:
            ValueError: If it is not fitted, the level is not between 0 and 1, or inputs or values
                are missing where there are bins.
        """
        found = self._credible(self._used(level, x, by, reference))
        rounding = torch.finfo(self._inner.head.flow.bias.dtype).eps
        if self.kind == "base" and bool(((found < math.inf) & (1 - found < rounding)).any()):
            warnings.warn(
                "Credible levels round to 1: the posterior is far too narrow for them. Use "
                "contains, or compare q.to_base(z).double().norm(dim=-1) with radius(…).",
                stacklevel=2,
            )
        return found

    def radius(
        self, level: float = 0.9, x: Any = None, *, by: Any = None, reference: Any = None
    ) -> Tensor:
        """Radius ‖u‖ of the base-ordered regions that hold the truth with such a probability.

        It tells apart what levels that round to 1 do not. Arguments are those of `level`.

        Returns:
            A radius () of all events, or that of each (N,) where there are bins; infinite for the
            whole space. A label z is in the region where `q.to_base(z).double().norm(dim=-1)` is
            no larger.

        Raises:
            ValueError: If the regions are those of highest density, or as of `level`.
        """
        if self.kind != "base":
            raise ValueError(
                f'Expected base-ordered regions; got kind={self.kind!r}. Use kind="base" or level.'
            )
        return self._used(level, x, by, reference).sqrt()

    def _used(self, level: float, x: Any, by: Any, reference: Any) -> Tensor:
        """The largest score in the region of all events (), or of each (N,)."""
        table, by = self._table(level), given_values(by)
        if self.events.count == 1:
            return table[0]
        if x is None and self._inner.head.context:
            asked = self.events.given and self.events.function is None
            raise ValueError(
                f"Expected x of the events{' and their values of by' * asked}; got None. There are "
                f"{len(table)} bins with a level each, and these tell which bin an event is in."
            )
        with torch.no_grad():
            q = of_each(self._inner(x, reference=reference), by)
            return table[self.events.place(self.events.values(x, q, by), q).cpu()]

    def _credible(self, scores: Tensor) -> Tensor:
        """Credible levels of scores; infinite ones stay so."""
        if self.kind != "base":
            return scores
        half = scores.new_tensor(self._inner.head.space.dof / 2)
        return torch.where(scores.isinf(), scores, torch.special.gammainc(half, scores / 2))

    def _table(self, level: float) -> Tensor:
        """The largest score in the region of each bin (K,)."""
        if not self._scores:
            raise ValueError("Expected a fitted Conformal; call fit with held-out events.")
        if not 0 < level < 1:
            raise ValueError(f"Expected level between 0 and 1; got {level}. 90 % is written 0.9.")
        return torch.stack([conformal_levels(part, 1 - level) for part in self._scores])

    def contains(
        self,
        x: Any,
        z: Any,
        level: float = 0.9,
        *,
        by: Any = None,
        reference: Any = None,
        seed: int = 1,
        progress: bool = False,
    ) -> Tensor:
        """Whether labels lie in the region of each event that holds the truth so often, (N,).

        Arguments are those of `fit` and `level`; seed is that of draws for HPD levels.

        Raises:
            ValueError: If it is not fitted or shapes do not fit.
        """
        table = self._table(level)
        scores, seen = self._scored(self.events, x, z, by, reference, seed, progress)
        return scores <= table[torch.bucketize(seen, self.events.edges, right=True)]

    def _scored(
        self,
        events: EventBins,
        x: Any,
        z: Any,
        by: Any,
        reference: Any,
        seed: int,
        progress: bool,
    ) -> tuple[Tensor, Tensor]:
        """‖u‖² or HPD levels (n,) of labels, and what is binned (n,), on the CPU in double."""
        z, by = labels_of(self._inner, z), given_values(by)
        generator = torch.Generator().manual_seed(seed)
        found, binned = [], []
        for rows, part, q, value in posteriors(
            self._inner, events, x, len(z), "conformal", progress, reference, by
        ):
            if isinstance(self.model, Recalibrator):
                given = by is not None and self.model.events.given
                q = self.model._recalibrated(q, part, by[rows] if given else None)
            if self.kind == "base":
                scores = q.to_base(z[rows]).double().square().sum(-1)
            else:
                scores, _ = hpd_levels(q, z[rows], self.draws, generator)
            found.append(scores.double().cpu())
            binned.append(value.double())
        scores = torch.cat(found)
        check_finite(scores, "levels of the labels", "Has the training diverged?")
        return scores, torch.cat(binned)

    def __str__(self) -> str:
        if not self._scores:
            return f"Conformal {self.kind} levels, not fitted"
        lines = [f"Conformal {self.kind} levels of {sum(self.held)} held-out events"]
        for where, part in zip(self.events.intervals(), self._scores, strict=True):
            used = self._credible(conformal_levels(part, [0.5, 0.32, 0.1, 0.05, 0.01])).tolist()
            lines.append(
                f"  {where}: for 50, 68, 90, 95, 99 %: " + ", ".join(f"{t:.4f}" for t in used)
            )
        return "\n".join(lines)
