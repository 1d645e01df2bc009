r"""The joint prior p(ν) of named nuisances.

Training on events whose nuisances were drawn from it,

.. math:: \nu_i \sim p(\nu), \quad (x_i, z_i) \sim P_t(x, z \,|\, \nu_i),

targets the posterior with systematics marginalised,
:math:`\int P_t(z|x, \nu)\, p(\nu|x)\, \mathrm{d}\nu`, by the same joint KL.

Source: T. Glüsenkamp, *Unifying supervised learning and VAEs – coverage, systematics and
goodness-of-fit in normalizing-flow based neural network models for astro-particle
reconstructions*, 2020, https://arxiv.org/abs/2008.05825.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from ..simulators._random import resolve_generator
from ..spaces import Product, Space
from .priors import Part, part_of, quantile, seeded, space_of, stddev

__all__ = ["Nuisances"]


class Nuisances:
    """Named nuisances ν with a joint prior: independent distributions, each of one or several.

    Arguments:
        priors: Distributions by name, where a joint one stands under a tuple of names; for names
            that are no words of Python, and to be mixed with `named`.
        named: A distribution by name, or a pair of it and the nominal value. Without one the
            nominal value is the mean, and where there is none (Cauchy) the median.

    Attributes:
        names: The nuisances in the order of the columns.
        size: Their number k.
        nominal: Nominal values, of shape (k,).
        stddev: Standard deviation of each, of shape (k,): half the central 68.27 % interval where
            it is not finite, from a fixed set of draws where there is no formula.

    Raises:
        ValueError: If a name is given twice, or what it stands for is no distribution of as many
            real numbers with a density, or a nominal value is outside its support.

    Example:
        >>> from torch.distributions import Normal, Uniform
        >>> nuisances = Nuisances(light_yield=Normal(1.0, 0.1), noise=(Uniform(1.0, 3.0), 1.0))
        >>> nuisances.names, nuisances.nominal
        (('light_yield', 'noise'), tensor([1., 1.]))
        >>> nuisances.sample(5, seed=0).shape
        torch.Size([5, 2])
        >>> nuisances.at("light_yield", -2)
        tensor([0.8000, 1.0000])
    """

    def __init__(self, priors: Mapping[Any, Any] | None = None, /, **named: Any) -> None:
        given = [*(priors or {}).items(), *named.items()]
        if not given:
            raise ValueError(
                "Expected at least one nuisance; got none. Try Nuisances(scale=Normal(1.0, 0.1))."
            )
        parts: list[Part] = []
        self.size = 0
        for key, value in given:
            part = part_of(key, value, self.size)
            known = [n for p in parts for n in p.names] + list(part.names)
            for name in part.names:
                if known.count(name) > 1:
                    raise ValueError(f"Expected each nuisance once; got {name!r} twice.")
            parts.append(part)
            self.size += len(part.names)
        self._parts = tuple(parts)
        self.names = tuple(n for p in parts for n in p.names)
        self.nominal = torch.cat([p.nominal for p in parts])
        self.stddev = torch.cat([stddev(p) for p in parts])

    def __repr__(self) -> str:
        return f"Nuisances({'; '.join(map(str, self._parts))})"

    @property
    def space(self) -> Space:
        """A label space of ν by name, for a head that infers the nuisances themselves."""
        spaces = {}
        for part in self._parts:
            for name in part.names:
                spaces[name] = space_of(part)
        return Product(**spaces)

    def sample(
        self, n: int, generator: torch.Generator | None = None, seed: int | None = None
    ) -> Tensor:
        """Draw ν of shape (n, k), on the generator's device.

        Arguments:
            n: Number of draws.
            generator: The source of randomness; torch's global one without it and a seed.
            seed: A seed, in place of a generator.

        Raises:
            ValueError: If `n` is no positive whole number, or both others are set.
        """
        n = check_positive_int(n, "n")
        generator = resolve_generator(generator, seed)
        with seeded(generator):
            columns = [p.distribution.sample((n,)).reshape(n, -1) for p in self._parts]
        device = columns[0].device if generator is None else generator.device
        return torch.cat([c.to(device) for c in columns], 1)

    def log_prob(self, nu: Any) -> Tensor:
        """Log density in nats of ν (..., k), of shape (...); −∞ outside the support.

        Raises:
            ValueError: If the shape does not fit or a value is not finite.
        """
        nu = self._check(nu)
        total = nu.new_zeros(nu.shape[:-1])
        for part in self._parts:
            values = nu[..., part.columns]
            inside = part.inside(values)
            safe = torch.where(inside.unsqueeze(-1), values, part.typical.to(values))
            log_prob = part.distribution.log_prob(part.shaped(safe))
            total = total + torch.where(inside, log_prob, -torch.inf)
        return total

    def at(self, name: str, sigmas: float) -> Tensor:
        """ν of shape (k,) with one nuisance moved by ±σ and the others nominal.

        A nuisance with a distribution of its own stands at its quantile Φ(sigmas), which is
        mean + sigmas·σ of a normal, and lies in the support of any; at 0 it has the nominal value,
        which need not be the median. One of a joint distribution stands at nominal + sigmas·σ.

        Arguments:
            name: The nuisance.
            sigmas: Number of standard deviations.

        Raises:
            ValueError: If there is no such nuisance, or the point is outside the support of a
                joint distribution.
        """
        part, column = self._find(name)
        nu = self.nominal.clone()
        if not math.isfinite(sigmas):
            raise ValueError(f"Expected a finite number of sigmas of {name!r}; got {sigmas!r}.")
        if not sigmas:
            return nu
        if len(part.names) == 1:
            level = 0.5 * math.erfc(-sigmas / math.sqrt(2))
            nu[column] = quantile(part, level)
            check_finite(nu, f"nuisance {name!r} at {sigmas:+g} σ", "Ask for fewer σ.")
            return nu
        nu[column] += sigmas * self.stddev[column]
        if not bool(part.inside(nu[part.columns])):
            raise ValueError(
                f"Expected {name!r} in the support of its joint prior; got {nu[column].item():g} "
                f"at {sigmas:+g} σ with the others nominal. Ask for fewer σ."
            )
        return nu

    def unpack(self, nu: Any) -> dict[str, Tensor]:
        """The columns of ν (..., k) by name, each of shape (...).

        Raises:
            ValueError: If the shape does not fit.
        """
        nu = self._check(nu, finite=False)
        return {name: nu[..., i] for i, name in enumerate(self.names)}

    def pack(self, values: Mapping[str, Any]) -> Tensor:
        """ν of shape (..., k) from values (...) by name; nominal ones for the names left out.

        Numbers of Python are in the floating type of the nominal values, tensors in their own.

        Raises:
            ValueError: If a name is unknown or shapes do not fit.
        """
        found = {n: as_tensor(v, f"nuisance {n!r}", like=self.nominal) for n, v in values.items()}
        for name in found:
            self._find(name)
        columns = [found.get(n, self.nominal[i]) for i, n in enumerate(self.names)]
        # those of Python are double
        own = [n for n, v in values.items() if isinstance(v, Tensor) or hasattr(v, "__array__")]
        kind = found[own[0]] if own else self.nominal
        try:
            return torch.stack(torch.broadcast_tensors(*(c.to(kind) for c in columns)), -1)
        except RuntimeError as error:
            shapes = ", ".join(f"{n} {tuple(v.shape)}" for n, v in found.items())
            raise ValueError(f"Expected nuisances of one shape; got {shapes}.") from error

    def _find(self, name: str) -> tuple[Part, int]:
        for part in self._parts:
            if name in part.names:
                return part, part.columns.start + part.names.index(name)
        raise ValueError(f"Expected one of the nuisances {', '.join(self.names)}; got {name!r}.")

    def _check(self, nu: Any, finite: bool = True) -> Tensor:
        nu = as_tensor(nu, "nu", like=self.nominal)
        if nu.ndim == 0 or nu.shape[-1] != self.size:
            raise ValueError(
                f"Expected nu of shape (..., {self.size}), the columns {', '.join(self.names)}; "
                f"got {tuple(nu.shape)}."
            )
        if finite:
            check_finite(nu, "nu")
        return nu
