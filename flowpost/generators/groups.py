r"""Values in groups as sums and shares, with zeros below a threshold.

The shares of a group sum to one, so that n values have n − 1 free ones. The *sticks*

.. math:: s_i = \ln \frac{x_i}{\sum_{j > i} x_j}

are real numbers, and any of them give shares that sum to one; in a group of Dirichlet shares they
are independent. The values of a group are taken in the order of rising means.

Values below a threshold τ read zero. To have a density they are filled with noise of density r
below τ; draws below τ are set to zero again. Over the noise v,

.. math:: \mathrm{E}_v \big[\ln p(x, v|z) - \ln r(v)\big] \;\le\;
          \ln \int_{v < \tau} p(x, v|z)\, \mathrm{d} v ,

the likelihood of the values above the threshold and of the zeros; what stands under the mean is
the `TwoStep.log_prob` of an event. With uniform noise the density of ln v is highest right at the
threshold, where it then falls off a cliff, and a smooth flow that misses the edge draws zeros as
small values. So by default it vanishes there: v = τ y with y of Kumaraswamy's law, whose
distribution function is 1 − (1 − y²)⁸. A constant filling has no density: the likelihood of a flow
that is trained with it has no bound.

Sources: *A note on the evaluation of generative models*, L. Theis, A. van den Oord, M. Bethge,
2016, https://arxiv.org/abs/1511.01844; *CaloFlow*, C. Krause, D. Shih, 2021,
https://arxiv.org/abs/2106.05285.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .._checks import as_tensor, check_finite, check_positive_int

__all__ = ["GroupSums"]


def _uniform(u: Tensor) -> tuple[Tensor, Tensor]:
    return u, torch.zeros_like(u)


def _smooth(u: Tensor) -> tuple[Tensor, Tensor]:
    """Quantiles u of the law 1 − (1 − y²)⁸, and ln of its density 16 y (1 − y²)⁷."""
    rest = -torch.log1p(-u.clamp_max(1 - 1e-6)) / 8
    y = (-torch.expm1(-rest)).sqrt()
    return y, math.log(16) + y.log() - 7 * rest


_NOISES = {"smooth": _smooth, "uniform": _uniform}


class GroupSums(nn.Module):
    """Values of at least zero as sums of groups, and sticks within each group.

    Arguments:
        sizes: Values of each group; they lie one group after another.
        threshold: τ, below which values read zero; 0 for data without zeros.
        noise: What fills zeros: "smooth" vanishes at the threshold, "uniform" does not, and None
            fills them with τ/2, which is no density.

    Attributes:
        order: The values of each group by rising mean, shape (F,); set by `fit`.

    Raises:
        ValueError: If a group has fewer than two values, the threshold is negative, or the noise
            unknown.

    Example:
        >>> groups = GroupSums([3, 2])
        >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0, 4.0]])
        >>> sums, sticks, _ = groups.split(x)
        >>> sums
        tensor([[6., 8.]])
        >>> torch.allclose(groups.join(sums, sticks), x)
        True
    """

    order: Tensor

    def __init__(
        self, sizes: Sequence[int], threshold: float = 0.0, noise: str | None = "smooth"
    ) -> None:
        super().__init__()
        self.sizes = tuple(check_positive_int(n, "a group's size", minimum=2) for n in sizes)
        if not self.sizes or not 0 <= threshold < math.inf:
            raise ValueError(
                f"Expected groups and a threshold of at least 0; got {self.sizes}, {threshold!r}."
            )
        if noise not in (*_NOISES, None):
            raise ValueError(
                f"Expected noise as one of {', '.join(_NOISES)} or None; got {noise!r}."
            )
        self.threshold, self.noise = float(threshold), noise
        self.values = sum(self.sizes)
        self.sticks = self.values - len(self.sizes)
        self.register_buffer("order", torch.arange(self.values))

    def config(self) -> dict[str, Any]:
        """The arguments that build it again."""
        return {"sizes": list(self.sizes), "threshold": self.threshold, "noise": self.noise}

    def fit(self, x: Tensor) -> GroupSums:
        """Set the order of the values from data (N, F)."""
        parts, start = [], 0
        for mean in x.mean(0).split(self.sizes):
            parts.append(start + mean.argsort(stable=True))
            start += len(mean)
        self.order = torch.cat(parts).to(self.order)
        return self

    def check(self, x: Any) -> Tensor:
        """Return data (..., F).

        Raises:
            ValueError: If a value is negative or not finite, between zero and the threshold, or
                zero where there is no threshold, or there is another number of them.
        """
        x = as_tensor(x, "x")
        if x.ndim == 0 or x.shape[-1] != self.values:
            raise ValueError(
                f"Expected x of shape (..., {self.values}); got {tuple(x.shape)}. Its columns are "
                f"those of groups of {', '.join(map(str, self.sizes))}."
            )
        check_finite(x, "x")
        bad = (x < self.threshold * (1 - 1e-6)) & (x != 0) if self.threshold else x <= 0
        if bool(bad.any()):
            at = tuple(int(i) for i in bad.nonzero()[0])
            wanted = f"of zero or at least {self.threshold:g}" if self.threshold else "above zero"
            raise ValueError(
                f"Expected values {wanted}; got {x[at].item():g} in row {at[0]}, column {at[-1]}. "
                "Set what is below the threshold to zero, and the threshold where there are zeros."
            )
        return x

    def fill(self, x: Tensor, generator: torch.Generator | None = None) -> tuple[Tensor, Tensor]:
        """Data (..., F) with zeros filled, and −ln of the density of what fills them (...)."""
        zero = x == 0
        if self.noise is None or not self.threshold:
            return torch.where(zero, self.threshold / 2, x), torch.zeros_like(x[..., 0])
        device = x.device if generator is None else generator.device
        u = torch.rand(x.shape, generator=generator, dtype=x.dtype, device=device).to(x.device)
        # single precision draws zero itself, which has no logarithm
        y, log_density = _NOISES[self.noise](u.clamp_min(1e-7))
        density = (log_density - math.log(self.threshold)).masked_fill(~zero, 0.0)
        return torch.where(zero, self.threshold * y, x), -density.sum(-1)

    def cut(self, x: Tensor) -> Tensor:
        """Values below the threshold set to zero."""
        return torch.where(x >= self.threshold, x, 0.0)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Sums (..., K), sticks (..., F − K) and ln |∂(sums, sticks)/∂x| (...) of values x > 0."""
        sums, sticks, ladj = [], [], torch.zeros_like(x[..., 0])
        for part in x[..., self.order].log().split(self.sizes, -1):
            rest = part.flip(-1).logcumsumexp(-1).flip(-1)
            sums.append(rest[..., 0])
            sticks.append(part[..., :-1] - rest[..., 1:])
            # y_i and R_{i+1} / R_i, for all but the last value
            ladj = ladj - (part[..., :-1] + rest[..., 1:] - rest[..., :-1]).sum(-1)
        return torch.stack(sums, -1).exp(), torch.cat(sticks, -1), ladj

    def join(self, sums: Tensor, sticks: Tensor) -> Tensor:
        """Values (..., F) of sums (..., K) and sticks (..., F − K)."""
        parts = []
        counts = [n - 1 for n in self.sizes]
        for total, own in zip(sums.log().unbind(-1), sticks.split(counts, -1), strict=True):
            left = F.logsigmoid(-own).cumsum(-1)
            before = F.pad(left[..., :-1], (1, 0))
            last = total + left[..., -1]
            parts += [total[..., None] + before + F.logsigmoid(own), last[..., None]]
        return torch.cat(parts, -1).exp()[..., self.order.argsort()]
