r"""The library: draws are events of the training sample with labels near those that are asked for.

With the k nearest training labels z_(1), …, z_(k) to z, in units of their standard deviations,

.. math:: x = x_{(r)},\ r \sim U\{1, …, k\} \qquad \text{or} \qquad
          x = \sum_j w_j x_{(j)},\ w \sim \mathrm{Dirichlet}(1, …, 1).

Nothing is learned, so it is the baseline that a trained generator has to beat. Chosen events are
true ones at slightly wrong labels, and there are never more than N different ones. Interpolated
events are new, but no true ones: for neighbours of the same distribution the mean is right, and

.. math:: \mathrm{Var}(x) = \sigma^2\, \mathbb{E} \sum_j w_j^2 = \frac{2}{k + 1} \sigma^2 ,

two thirds of the variance for k = 2, less for more; exact zeros survive only where all k agree.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from .base import check_labelled

__all__ = ["Library"]


class Library:
    """Generator that looks events up by their labels.

    Labels are compared by their Euclidean distance, each column in units of its standard deviation.
    Columns that matter on a logarithmic scale, such as energies, are to be given as logarithms, and
    angles as cosine and sine. Among the k nearest events every one is as likely as any other. Where
    several have the same label as the k-th, those that count are drawn at random, anew for every
    draw; between different labels at exactly the same distance the order of the tree decides.

    Arguments:
        x: Training events (N, F), or of any shape (N, …).
        z: Their labels (N, D), or (N,).
        k: Neighbours.
        interpolate: Mix the k neighbours with weights drawn uniformly from all that sum to one,
            instead of returning one of them; this shrinks the variance to 2/(k + 1).

    Raises:
        ValueError: If shapes do not fit, a value is not finite, or there are fewer than k events.

    Example:
        >>> library = Library(torch.tensor([[1.0], [2.0]]), torch.tensor([0.0, 10.0]))
        >>> library.sample(torch.tensor([[9.0], [-3.0]]))
        tensor([[2.],
                [1.]])
    """

    def __init__(self, x: Any, z: Any, k: int = 1, *, interpolate: bool = False) -> None:
        self.x, z = check_labelled(x, z)
        self.k = check_positive_int(k, "k")
        self.interpolate = bool(interpolate)
        if self.k > len(self.x):
            raise ValueError(f"Expected at least k = {self.k} events; got {len(self.x)}. Lower k.")
        if self.interpolate and self.k == 1:
            raise ValueError("Expected k of at least 2 to interpolate; got 1.")
        values = z.detach().cpu().double().numpy()
        spread = values.std(0)
        self.loc, self.scale = values.mean(0), np.where(spread > 0, spread, 1.0)
        # events of one label stand together: the tree holds each label once
        labels, group = np.unique(values, axis=0, return_inverse=True)
        self._order = np.argsort(group.reshape(-1), kind="stable")
        self._count = np.bincount(group.reshape(-1), minlength=len(labels))
        self._start = np.cumsum(self._count) - self._count
        self._tree = cKDTree((labels - self.loc) / self.scale)

    def __len__(self) -> int:
        return len(self.x)

    def __repr__(self) -> str:
        how = "interpolating " if self.interpolate else ""
        return f"Library({len(self)} events, {how}k={self.k})"

    def neighbours(self, z: Any, generator: torch.Generator | None = None) -> Tensor:
        """Return rows of the training events nearest to labels (M, D), (M, k), nearest first.

        Raises:
            ValueError: If labels have another number of columns or are not finite.
        """
        labels = self._labels(z)
        wanted = min(self.k, len(self._count))
        _, groups = self._tree.query(labels, k=np.arange(1, wanted + 1))
        before = np.cumsum(self._count[groups], 1)
        # rank r is of the first label with more than r events up to it
        rank = np.arange(self.k)
        at = np.minimum((before[:, None, :] <= rank[:, None]).sum(2), wanted - 1)
        return self._members(np.take_along_axis(groups, at, 1), generator)

    def _members(self, group: np.ndarray, generator: torch.Generator | None) -> Tensor:
        """Different rows (M, k) of the groups (M, k), drawn uniformly."""
        count = self._count[group]
        position = np.zeros_like(group)
        for rank in range(group.shape[1]):
            again = np.arange(len(group))
            while len(again):
                u = _uniform(len(again), generator).numpy()
                position[again, rank] = np.minimum(u * count[again, rank], count[again, rank] - 1)
                same = (group[again, :rank] == group[again, rank, None]) & (
                    position[again, :rank] == position[again, rank, None]
                )
                again = again[same.any(1)]
        return torch.as_tensor(self._order[self._start[group] + position])

    def sample(self, z: Any, generator: torch.Generator | None = None) -> Tensor:
        """Events (M, F) for labels (M, D), in the dtype and on the device of the training events.

        Raises:
            ValueError: If labels have another number of columns or are not finite.
        """
        rows = self.neighbours(z, generator)
        if not self.interpolate:
            rank = (_uniform(len(rows), generator) * self.k).long().clamp_max(self.k - 1)
            return self.x[rows.gather(1, rank[:, None])[:, 0].to(self.x.device)]
        # normalised exponentials are uniform on the simplex
        weight = -torch.log1p(-_uniform((len(rows), self.k), generator))
        weight = (weight / weight.sum(1, keepdim=True)).to(self.x)
        events = self.x[rows.to(self.x.device)]
        return (weight.reshape(*weight.shape, *[1] * (events.ndim - 2)) * events).sum(1)

    def _labels(self, z: Any) -> np.ndarray:
        z = as_tensor(z, "labels")
        z = z[:, None] if z.ndim == 1 and len(self.loc) == 1 else z
        check_shape(z, ("M", len(self.loc)), "labels", "As many columns as the library's labels.")
        check_finite(z, "labels")
        return (z.detach().cpu().double().numpy() - self.loc) / self.scale


def _uniform(shape: Any, generator: torch.Generator | None) -> Tensor:
    """Uniform float64 numbers in [0, 1) on the CPU, of a generator on any device."""
    device = "cpu" if generator is None else generator.device
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=device).cpu()
