r"""Calibrated p-values: the rank of an event's scores among held-out simulation.

With n held-out good events of scores :math:`s_i`, low where the fit is bad, and U uniform,

.. math:: p = \frac{\#\{s_i < s\} + U (\#\{s_i = s\} + 1)}{n + 1}

is uniform for good events by construction, whatever the score: a cut at p < 0.01 loses 1 % of them.
Where several scores are asked for, the first half of the held-out events calibrates each of them,
the smallest of their p is the new score, and its rank in the second half is the p of the event: the
rule of the smallest p, made exact for scores that depend on each other. A density of contexts is
fitted to half of the events that calibrate it, which then do not.

That holds for any draws, but p of one event is one draw of it: see `Calibrator`.

Sources: V. Vovk, A. Gammerman, G. Shafer, *Algorithmic learning in a random world*, 2005,
https://doi.org/10.1007/b106715; L. H. C. Tippett, *The methods of statistics*, 1931.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from ..likelihood import ExtendedModel
from .predictive import check_model, count_of, p_value, seeded
from .scores import ContextDensity, contexts, typicality

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["CalibratedP", "Calibrator"]

STATISTICS = ("p", "two_sided", "typicality", "context")
_FEWEST = 20
_LARGEST = 1e300
# draws of an event of the smallest p, in units of those of the others
_ADAPTIVE = 16
# between seeds of draws and those of ties
_TIES = 1_000_003


@dataclass(frozen=True, eq=False, repr=False)
class CalibratedP:
    """Calibrated p-values of N events.

    Attributes:
        p: Calibrated p (N,), uniform for good events.
        each: Calibrated p of each statistic (N,), by name.
        labels: Posterior mean of the labels (N, D).
    """

    p: Tensor
    each: dict[str, Tensor]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.p)

    def __str__(self) -> str:
        if not len(self):
            return "Calibrated p of 0 events"
        shares = "  ".join(
            f"{100 * float((self.p < t).double().mean()):.2f} %" for t in (0.01, 0.05, 0.5)
        )
        return f"Calibrated p of {len(self)} events: below 0.01, 0.05 and 0.5: {shares}"

    def plot(
        self, ax: Axes | None = None, *, bins: int = 20, threshold: float | None = None
    ) -> Axes:
        """Draw the distribution of p against the uniform; see `flowpost.plots.plot_p_values`."""
        from ..plots import plot_p_values

        return plot_p_values(self, ax, bins=bins, threshold=threshold)

    def __repr__(self) -> str:
        return f"CalibratedP(N={len(self)}, of {', '.join(self.each)})"


class Calibrator(nn.Module):
    """Turns scores into p-values that are uniform for good events.

    `calibrator(x)` is `calibrator.p_value(x)`. The scores are estimates from draws, which are those
    of all events together: with another seed, or in another portion or order of a file, an event
    has another p within its Monte-Carlo error, and one near a cut may pass or not. Of 20 000 good
    events of the exact Gaussian model with twenty values, cut at 1 % as a whole, 14 % of the lost
    ones pass in portions of 1000; it is 29 % with `max_draws=draws`, which takes a sixth less time,
    and 15 % with 1000 draws of every event. `max_draws` narrows it until small p are known to a
    third; from there on, more `draws` do.

    Arguments:
        model: A trained posterior with its likelihood.
        statistics: Scores to use: `"p"` (the one-sided posterior-predictive p), `"two_sided"`,
            `"typicality"`, `"context"`.
        draws: Posterior draws of each event, the same for held-out and new events.
        max_draws: As of `p_value`, for held-out and new events alike; 16 · draws where it is None.
            `max_draws=draws` gives all events the same.
        by: Name of a label column, such as `"energy"`, or `"position[0]"` of a block of several:
            the p is then calibrated in bins of its posterior mean, and uniform in each.
        bins: Number of those bins, of equal content.

    Raises:
        ValueError: If a statistic or column is unknown, or the model has no likelihood.

    Example:
        >>> import torch, flowpost as fp
        >>> head = fp.PosteriorHead(2, fp.Real(1), flow="affine")
        >>> likelihood = fp.likelihood.FlowLikelihood(fp.Real(1), 2, flow="diagonal")
        >>> model = fp.likelihood.ExtendedModel(None, head, likelihood)
        >>> calibrator = Calibrator(model, draws=20).fit(torch.randn(100, 2))
        >>> calibrator.p_value(torch.randn(5, 2)).p.shape
        torch.Size([5])
    """

    edges: Tensor

    def __init__(
        self,
        model: ExtendedModel,
        statistics: str | Sequence[str] = ("p",),
        draws: int = 200,
        *,
        max_draws: int | None = None,
        by: str | None = None,
        bins: int = 4,
    ) -> None:
        super().__init__()
        check_model(model)
        names = (statistics,) if isinstance(statistics, str) else tuple(statistics)
        if not names or set(names) - set(STATISTICS) or len(set(names)) != len(names):
            raise ValueError(
                f"Expected statistics as some of {', '.join(STATISTICS)}; got {statistics!r}."
            )
        columns = model.head.space.names
        if by is not None and by not in columns:
            raise ValueError(
                f"Expected by as a label column; got {by!r}. Columns are {', '.join(columns)}."
            )
        if "context" in names and not model.head.context:
            raise ValueError("Expected a model with a context for the statistic 'context'.")
        self.model, self.statistics, self.by = model, names, by
        self.draws = check_positive_int(draws, "draws", minimum=2)
        most = _ADAPTIVE * draws if max_draws is None else max_draws
        self.max_draws = check_positive_int(most, "max_draws", minimum=draws)
        self.bins = check_positive_int(bins, "bins") if by is not None else 1
        self.contexts = ContextDensity(model.head.context) if "context" in names else None
        self.register_buffer("edges", torch.zeros(self.bins - 1, dtype=torch.float64))
        # sorted scores of held-out events, for each bin one after the other, and their numbers
        for name in (*names, "joint"):
            self.register_buffer(f"scores_{name}", torch.zeros(0, 2, dtype=torch.float64))
            self.register_buffer(f"counts_{name}", torch.zeros(self.bins, dtype=torch.int64))

    def config(self) -> dict[str, Any]:
        """JSON description, without the model."""
        return {
            "statistics": list(self.statistics),
            "draws": self.draws,
            "max_draws": self.max_draws,
            "by": self.by,
            "bins": self.bins,
        }

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        # as many scores as were held out
        for name in (*self.statistics, "joint"):
            saved = state.get(f"{prefix}scores_{name}")
            if saved is not None and saved.ndim == 2 and saved.shape[1] == 2:
                own: Tensor = getattr(self, f"scores_{name}")
                setattr(self, f"scores_{name}", own.new_zeros(saved.shape))
        super()._load_from_state_dict(state, prefix, *args)

    @property
    def _counts(self) -> Tensor:
        """Held-out events of each bin among which p is a rank."""
        name = "joint" if len(self.statistics) > 1 else self.statistics[0]
        counts: Tensor = getattr(self, f"counts_{name}")
        return counts

    @property
    def held(self) -> int:
        """Held-out events among which p is a rank, of all bins."""
        return int(self._counts.sum())

    @property
    def resolution(self) -> float:
        """The smallest threshold that means something: one over the events of the smallest bin."""
        return 1 / (int(self._counts.min()) + 1)

    @property
    def fitted(self) -> bool:
        """Whether it has seen held-out events."""
        return len(getattr(self, f"scores_{self.statistics[0]}")) > 0

    def fit(
        self, x: Any, *, reference: Any = None, seed: int = 0, progress: bool = False
    ) -> Calibrator:
        """Calibrate by held-out simulation of good events, on which nothing was trained.

        Arguments:
            x: Inputs of n events; p has steps of about 1/n.
            reference: First guesses, for a head that wants them.
            seed: Of all draws.
            progress: Show a progress bar.

        Raises:
            ValueError: If there are too few events for the bins.
        """
        total, several = count_of(x), len(self.statistics) > 1
        least = self._fewest()
        if total < least:
            raise ValueError(
                f"Expected at least {least} held-out events for bins={self.bins} and "
                f"{len(self.statistics)} of the statistics; got {total}."
            )
        generator = seeded(seed + _TIES)
        order = torch.randperm(total, generator=generator)
        first, second = (order[: total // 2], order[total // 2 :]) if several else (order, order)
        known = first[:0]
        if self.contexts is not None:
            known = first[: len(first) // 2]
            self.contexts.fit(contexts(self.model, x)[known])
        scores, labels = self._scores(x, reference, seed, progress)
        if self.by is not None:
            column = labels[:, self.model.head.space.names.index(self.by)]
            levels = torch.arange(1, self.bins, dtype=torch.float64) / self.bins
            self.edges = torch.quantile(column[first].double(), levels)
        places = self._bin(labels)
        for part in (first[len(known) :], second):
            self._check_bins(places[part])
        for name, score in scores.items():
            alone = first[len(known) :] if name == "context" else first
            self._keep(name, score[alone], places[alone])
        if several:
            each = self._each(scores, places, generator)
            self._keep("joint", _smallest(each)[second], places[second])
        return self

    def _check_bins(self, places: Tensor) -> None:
        found = places.bincount(minlength=self.bins).tolist()
        if not all(found):
            raise ValueError(
                f"Expected events in every bin of {self.by}; got {', '.join(map(str, found))}. "
                "Give more events, or fewer bins."
            )

    def _fewest(self) -> int:
        """Held-out events that are needed, for some in each bin of all parts they are cut into."""
        parts = 2 if len(self.statistics) > 1 else 1
        if self.contexts is None:
            return _FEWEST * self.bins * parts
        return parts * 2 * max(_FEWEST * self.bins, self.contexts.size + 1)

    def p_value(
        self, x: Any, *, reference: Any = None, seed: int = 1, progress: bool = False
    ) -> CalibratedP:
        """Calibrated p-values of N events.

        Arguments:
            x: Inputs of N events; there may be none.
            reference: First guesses, for a head that wants them.
            seed: Of all draws, and of the random breaking of ties.
            progress: Show a progress bar.

        Raises:
            ValueError: If the calibrator is not fitted or inputs do not fit.
        """
        if not self.fitted:
            raise ValueError("Expected a fitted Calibrator; call fit with held-out simulation.")
        generator = seeded(seed + _TIES)
        scores, labels = self._scores(x, reference, seed, progress)
        places = self._bin(labels)
        each = self._each(scores, places, generator)
        p = next(iter(each.values()))
        if len(each) > 1:
            p = self._rank("joint", _smallest(each), places, generator)
        return CalibratedP(p, each, labels)

    def forward(self, x: Any, **options: Any) -> CalibratedP:
        """Calibrated p-values of N events; options are those of `p_value`."""
        return self.p_value(x, **options)

    def _scores(
        self, x: Any, reference: Any, seed: int, progress: bool
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Scores (N, 2) by name, the second of which breaks ties of the first; and labels."""
        options = {"reference": reference, "seed": seed, "progress": progress}
        found = p_value(self.model, x, self.draws, max_draws=self.max_draws, **options)
        scores = {}
        for name in self.statistics:
            tie = torch.zeros_like(found.p)
            if name == "p":
                value, tie = found.p, found.z_score
            elif name == "two_sided":
                value, tie = found.two_sided, -found.z_score.abs()
            elif name == "typicality":
                value = typicality(self.model, x, **options)
            else:
                assert self.contexts is not None
                value = self.contexts.log_prob(contexts(self.model, x))
            # what cannot be evaluated fits worst
            pair = torch.stack([value, tie], -1).nan_to_num(-_LARGEST, _LARGEST, -_LARGEST)
            scores[name] = pair
        return scores, found.labels

    def _bin(self, labels: Tensor) -> Tensor:
        if self.by is None:
            return torch.zeros(len(labels), dtype=torch.int64)
        column = labels[:, self.model.head.space.names.index(self.by)].double().contiguous()
        return torch.bucketize(column, self.edges.cpu())

    def _keep(self, name: str, scores: Tensor, places: Tensor) -> None:
        parts = [sort_pairs(scores[places == i]) for i in range(self.bins)]
        setattr(self, f"scores_{name}", torch.cat(parts))
        setattr(self, f"counts_{name}", torch.tensor([len(p) for p in parts]))

    def _each(
        self, scores: dict[str, Tensor], places: Tensor, generator: torch.Generator
    ) -> dict[str, Tensor]:
        return {n: self._rank(n, score, places, generator) for n, score in scores.items()}

    def _rank(
        self, name: str, scores: Tensor, places: Tensor, generator: torch.Generator
    ) -> Tensor:
        """Calibrated p (N,) of scores (N, 2) among those held out in the same bin."""
        known: Tensor = getattr(self, f"scores_{name}").cpu()
        counts: Tensor = getattr(self, f"counts_{name}").cpu()
        u = torch.rand(len(scores), generator=generator, dtype=torch.float64)
        p = torch.empty(len(scores), dtype=torch.float64)
        for i, part in enumerate(known.split(counts.tolist())):
            own = places == i
            below, upto = positions(part, scores[own].to(part))
            p[own] = (below + u[own] * (upto - below + 1)) / (len(part) + 1)
        return p


def _smallest(each: dict[str, Tensor]) -> Tensor:
    """Pairs (N, 2) of the smallest of several p (N,), which has no ties."""
    smallest = torch.stack(list(each.values())).amin(0)
    return torch.stack([smallest, torch.zeros_like(smallest)], -1)


def sort_pairs(pairs: Tensor) -> Tensor:
    """Pairs (n, 2) in lexicographic order."""
    pairs = pairs[pairs[:, 1].argsort(stable=True)]
    return pairs[pairs[:, 0].argsort(stable=True)]


def positions(known: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
    """How many of sorted pairs (n, 2) come before pairs (N, 2), and how many before or with."""
    both = torch.cat([known, pairs])
    # pairs as whole numbers of the same order
    _, first = both[:, 0].unique(return_inverse=True)
    _, second = both[:, 1].unique(return_inverse=True)
    key = first * (int(second.max()) + 1) + second
    own, new = key[: len(known)].contiguous(), key[len(known) :].contiguous()
    return torch.searchsorted(own, new), torch.searchsorted(own, new, right=True)
