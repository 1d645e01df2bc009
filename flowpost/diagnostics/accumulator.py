r"""Coverage of a stream of events in constant memory, which merges exactly.

For a calibrated posterior with base coordinates u(z_true) ~ N(0, I_d)

.. math:: v = F_{\chi^2_d}\left(\lVert u \rVert^2\right)
            = P\left(\tfrac d2, \tfrac{\lVert u \rVert^2}{2}\right) \sim U(0, 1),

with P the regularised lower incomplete gamma function: `torch.special.gammainc(d / 2, r2 / 2)`.

Source:
    Unifying supervised learning and VAEs – coverage, systematics and goodness-of-fit in
    normalizing-flow based neural network models for astro-particle reconstructions
    (T. Glüsenkamp, 2020) https://arxiv.org/abs/2008.05825, section 4
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .histogram import LevelHistogram
from .levels import LevelAccumulator, to_double
from .results import Coverage, interpolate

__all__ = ["CoverageAccumulator"]

_CHUNK = 65536


class CoverageAccumulator(LevelAccumulator):
    """Streaming coverage from base coordinates: levels F_χ²_d(‖u‖²) and a pull per coordinate.

    Memory does not grow with the events: (d + 1) histograms of B + 128 bins.

    Arguments:
        dof: Number d of base coordinates.
        bins: Equal bins B of credibility; the Kolmogorov–Smirnov statistics are known to 1/B.
        levels: Number of nominal credibilities, or the credibilities themselves.
        names: What the base coordinates are called; by default u0, u1, …

    Example:
        >>> u = torch.randn(1000, 2, generator=torch.Generator().manual_seed(0))
        >>> whole, first, second = (CoverageAccumulator(2) for _ in range(3))
        >>> whole.update(u); first.update(u[:300]); second.update(u[300:])
        >>> first.merge(second)
        >>> bool((first.histogram.counts == whole.histogram.counts).all())
        True
    """

    def __init__(
        self,
        dof: int,
        bins: int = 65536,
        levels: int | Sequence[float] | Tensor = 20,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__("base χ²", bins, levels)
        self.dof = check_positive_int(dof, "dof")
        self.names = tuple(names) if names is not None else tuple(f"u{j}" for j in range(dof))
        if len(self.names) != dof:
            raise ValueError(f"Expected {dof} names of base coordinates; got {len(self.names)}.")
        self.pulls = [LevelHistogram(bins) for _ in range(dof)]
        # Σw, Σw u and Σw u uᵀ as the blocks of one symmetric matrix of (1, u)
        self.moments = torch.zeros(dof + 1, dof + 1, dtype=torch.float64)

    def update(
        self, u: Tensor, log_prob: Tensor | None = None, weight: Tensor | None = None
    ) -> None:
        """Add events; an empty batch adds none.

        Arguments:
            u: Base coordinates of the true labels (N, d), for d = 1 also (N,), on any device.
            log_prob: log q(z_true|x) in nats (N,), in all updates or in none.
            weight: Event weights (N,), not negative.

        Raises:
            ValueError: If a shape is wrong, a value is not finite or a weight is negative.
        """
        u = as_base(u)
        check_shape(u, ("N", self.dof), "base coordinates u")
        check_finite(u, "base coordinates u", "Does the posterior support every label?")
        log_prob, weight = self._check(len(u), log_prob, weight, u)
        for start in range(0, len(u), _CHUNK):
            part = slice(start, start + _CHUNK)
            w = None if weight is None else weight[part]
            self._add(to_double(u[part]), w)
            self._score(None if log_prob is None else log_prob[part], w)

    def _add(self, u: Tensor, weight: Tensor | None) -> None:
        tail, above = chi2_tail(u)
        self.histogram.update(tail, above, weight)
        for j, histogram in enumerate(self.pulls):
            column = u[:, j]
            histogram.update(torch.special.ndtr(-column.abs()), column >= 0, weight)
        rows = torch.cat([torch.ones_like(u[:, :1]), u], dim=1)
        weighted = rows if weight is None else rows * weight[:, None]
        self.moments += (rows.T @ weighted).cpu()

    def merge(self, other: LevelAccumulator) -> None:
        """Add the events of another accumulator of the same dof and bins.

        Raises:
            ValueError: If it counts something else, or only one of the two has log_prob.
        """
        super().merge(other)
        if isinstance(other, CoverageAccumulator):
            self.moments = self.moments + other.moments

    def compute(self) -> Coverage:
        """Return the coverage of all events so far.

        Raises:
            ValueError: If there are none.
        """
        fields = self._level_fields()
        total = self.moments[0, 0]
        mean = self.moments[0, 1:] / total
        second = self.moments[1:, 1:] / total
        covariance = second - torch.outer(mean, mean)
        width = covariance.diagonal().clamp(min=0).sqrt()
        # one event, or a constant coordinate, has no correlation
        scale = torch.where(width > 0, width, torch.inf)
        correlation = (covariance / torch.outer(scale, scale)).fill_diagonal_(1.0)
        edges = torch.linspace(-4, 4, 81, dtype=torch.float64)
        below = torch.stack([h.cumulative() for h in self.pulls])
        return Coverage(
            **fields,
            dof=self.dof,
            names=self.names,
            pull_mean=mean,
            pull_width=width,
            pull_ks_pvalue=torch.tensor([h.ks()[1] for h in self.pulls], dtype=torch.float64),
            pull_edges=edges,
            pull_histogram=interpolate(below, torch.special.ndtr(edges)).diff(dim=-1),
            correlation=correlation,
            chi2_mean=float(second.trace()) / self.dof,
        )

    def state_dict(self) -> dict[str, Any]:
        """Return everything counted so far as plain numbers and tensors, to stop and resume."""
        return super().state_dict() | {"moments": self.moments.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`; what was counted before is replaced.

        Raises:
            ValueError: If it comes from an accumulator of something else.
        """
        super().load_state_dict(state)
        self.moments = state["moments"].clone()

    def _identity(self) -> str:
        return f"{self.kind} of {self.dof} dimensions in {self.histogram.bins} bins"

    def _histograms(self) -> list[LevelHistogram]:
        return [self.histogram, *self.pulls]


def as_base(u: Any) -> Tensor:
    # Base coordinates (N, d); (N,) is d = 1.
    u = as_tensor(u, "base coordinates u").detach()
    if u.ndim == 1:
        u = u[:, None]
    check_shape(u, ("N", "d"), "base coordinates u", "One row per event: posterior.to_base(z).")
    if not u.shape[1]:
        raise ValueError("Expected at least one base coordinate per event; got none.")
    return u


def chi2_tail(u: Tensor) -> tuple[Tensor, Tensor]:
    # min(v, 1 − v) and v ≥ ½ of the levels v = F_χ²_d(‖u‖²), to full relative precision.
    half = u.square().sum(-1) / 2
    shape = torch.full((), u.shape[-1] / 2, dtype=u.dtype, device=u.device)
    tail = torch.special.gammainc(shape, half)
    above = tail >= 0.5
    tail[above] = torch.special.gammaincc(shape, half[above])
    return tail, above
