"""One prior among the nuisances: its support, nominal value, width and quantiles."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Distribution, Independent, constraints

from .._checks import as_tensor, check_finite
from ..spaces import Interval, Positive, Real, Space

__all__ = ["Part", "part_of", "quantile", "seeded", "space_of", "stddev"]

# draws from which a width or quantile is taken that has no closed form
_DRAWS = 2**18
_MARGIN = 1e-6


@dataclass(frozen=True)
class Part:
    """A distribution over the nuisances of some columns, and a draw of it inside the support."""

    names: tuple[str, ...]
    distribution: Distribution
    nominal: Tensor
    typical: Tensor
    columns: slice

    def shaped(self, values: Tensor) -> Tensor:
        """Values (..., m) as the distribution takes them."""
        return values.reshape((*values.shape[:-1], *self.distribution.event_shape))

    def inside(self, values: Tensor) -> Tensor:
        """Whether values (..., m) lie in the support, of shape (...)."""
        try:
            support = self.distribution.support
        except NotImplementedError:
            support = None
        if support is None or constraints.is_dependent(support):
            return torch.isfinite(values).all(-1)
        return support.check(self.shaped(values))

    def draws(self) -> Tensor:
        """A fixed set of draws (S, m)."""
        with seeded(torch.Generator().manual_seed(0)):
            return self.distribution.sample((_DRAWS,)).reshape(_DRAWS, -1)

    def __str__(self) -> str:
        name = self.names[0] if len(self.names) == 1 else f"({', '.join(self.names)})"
        return f"{name}={_written(self.distribution)}, nominal {_text(self.nominal)}"


@contextmanager
def seeded(generator: torch.Generator | None) -> Iterator[None]:
    """Seed torch's global generators from one, and leave them as they were afterwards.

    Distributions of torch draw from the global ones. Nothing is done where it is None.
    """
    if generator is None:
        yield
        return
    seed = int(torch.randint(2**63 - 1, (), generator=generator, device=generator.device))
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        torch.default_generator.manual_seed(seed)
        if devices:
            torch.cuda.manual_seed_all(seed)
        yield


def part_of(key: Any, value: Any, start: int) -> Part:
    """The prior under a name or a tuple of names, for the columns from `start` on.

    Raises:
        ValueError: If it is no density of as many real numbers, or its nominal value is outside.
    """
    names = (key,) if isinstance(key, str) else key
    if not isinstance(names, tuple) or not names or not all(isinstance(n, str) for n in names):
        raise ValueError(f"Expected a name or a tuple of names of nuisances; got {key!r}.")
    if any(not n or "." in n for n in names):
        raise ValueError(f"Expected names of nuisances without dots; got {key!r}.")
    title = repr(key) if isinstance(key, str) else f"({', '.join(names)})"
    given = None
    if isinstance(value, (tuple, list)) and len(value) == 2:
        value, given = value
    if not isinstance(value, Distribution):
        raise ValueError(
            f"Expected a torch distribution as the prior of {title}, or a pair of it and the "
            f"nominal value; got {value!r}. Try Normal(1.0, 0.1)."
        )
    if value.batch_shape:
        value = Independent(value, len(value.batch_shape))
    if len(value.event_shape) > 1 or value.event_shape.numel() != len(names):
        raise ValueError(
            f"Expected a distribution of {len(names)} numbers for {title}; got {value} of shape "
            f"{tuple(value.event_shape)}. Give a name for each column."
        )
    typical = _draw(value, title)
    nominal = _nominal(value, given, typical, title)
    part = Part(names, value, nominal, typical, slice(start, start + len(names)))
    if not bool(part.inside(nominal)):
        raise ValueError(
            f"Expected the nominal value of {title} in the support of {value}; got "
            f"{_text(nominal)}. Give another: ({type(value).__name__}(…), nominal)."
        )
    return part


def _draw(distribution: Distribution, title: str) -> Tensor:
    """A draw (m,) of a distribution that has a density."""
    remedy = "Alternatives without a density are mixed by systematics.Mixed or Weighted."
    try:
        discrete = bool(distribution.support.is_discrete)  # type: ignore[union-attr]
    except (NotImplementedError, AttributeError):
        discrete = False
    with seeded(torch.Generator().manual_seed(0)):
        value = distribution.sample()
    try:
        distribution.log_prob(value)
    except NotImplementedError:
        discrete = True
    if discrete:
        raise ValueError(
            f"Expected a density as the prior of {title}; {distribution} has none. {remedy}"
        )
    return value.reshape(-1)


def _nominal(distribution: Distribution, given: Any, like: Tensor, title: str) -> Tensor:
    """Nominal values (m,): those given, or the mean, or the median."""
    if given is not None:
        value = as_tensor(given, f"the nominal value of {title}", like=like).to(like)
        if value.numel() != len(like):
            raise ValueError(
                f"Expected {len(like)} nominal values of {title}; got {tuple(value.shape)}."
            )
        check_finite(value, f"nominal value of {title}")
        return value.reshape(len(like)).clone()
    for middle in (lambda: distribution.mean, lambda: distribution.icdf(like.new_tensor(0.5))):
        try:
            value = middle()
        except NotImplementedError:
            continue
        if bool(torch.isfinite(value).all()):
            return value.reshape(len(like)).clone()
    raise ValueError(
        f"Expected the nominal value of {title}, for {distribution} has no mean; got none. Give "
        f"the pair ({type(distribution).__name__}(…), nominal)."
    )


def stddev(part: Part) -> Tensor:
    """Standard deviation (m,), or half the central 68.27 % interval where there is none."""
    try:
        value = part.distribution.stddev.reshape(-1)
        if bool(torch.isfinite(value).all()):
            return value.clone()
    except NotImplementedError:
        pass
    if len(part.names) == 1:
        return (quantile(part, 0.841345) - quantile(part, 0.158655)).reshape(1) / 2
    return part.draws().std(0)


def quantile(part: Part, level: float) -> Tensor:
    """Quantile () of a nuisance of its own, from draws where there is no formula."""
    distribution = part.distribution
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    # double, for a level close to 1
    at = torch.tensor(level, dtype=torch.float64, device=part.typical.device)
    try:
        value = distribution.icdf(at)
    except NotImplementedError:
        value = torch.quantile(part.draws()[:, 0], level)
    return value.to(part.typical).reshape(())


def space_of(part: Part) -> Space:
    """A label space for each nuisance of a distribution, by its support."""
    try:
        support: Any = part.distribution.support
    except NotImplementedError:
        return Real()
    while isinstance(support, constraints.independent):
        support = support.base_constraint
    low, high = getattr(support, "lower_bound", None), getattr(support, "upper_bound", None)
    if low is not None and high is not None and len(part.names) == 1:
        a, b = float(low), float(high)
        return Interval(a, b, clip=_MARGIN * (b - a))
    if low is not None and high is None and torch.as_tensor(low).eq(0).all():
        return Positive()
    return Real()


def _text(value: Tensor | Sequence[float]) -> str:
    return ", ".join(f"{float(v):g}" for v in value)


def _written(distribution: Distribution) -> str:
    """A distribution with all of its parameters, without the rounding of single precision."""
    while isinstance(distribution, Independent):
        distribution = distribution.base_dist
    known = distribution.arg_constraints
    # those given, of several that mean the same; some have none but properties
    names = [n for n in known if n in vars(distribution)] or list(known)
    parts = []
    for name in names:
        value = getattr(distribution, name, None)
        if isinstance(value, Tensor):
            parts.append(f"{name}={_number(value)}")
    return f"{type(distribution).__name__}({', '.join(parts)})"


def _number(value: Tensor) -> str:
    if not value.ndim:
        return f"{float(value):g}"
    return f"[{', '.join(map(_number, value))}]"
