r"""What the sensors of the three-dimensional telescope see, and the exact likelihood of the hits.

Light of an event of energy E reaches sensor s as a Poisson process of intensity (hits per ns)

.. math::

    \lambda_s(t) = E\, a_s\, f(t | t_s, \rho_s) + b, \qquad
    f = F', \quad F(t) = \exp(-e^{-(t - t_s)/\tau}), \quad \tau = \tau_0 (1 + \rho_s/\lambda) .

The arrival times are Gumbel distributed: a sharp rise at the time of flight :math:`t_s`, and a tail
of scattered light that grows with the path ρ. Brightness and time of flight are, for a *cascade*
(a point at p that shines about the Cherenkov angle :math:`\cos\theta_c = v/c` to its direction d,
blurred by scattering),

.. math::

    a_s = A\, \frac{e^{-\rho/\ell}}{1 + \rho^2/r_0^2}\, h(d \cdot (s - p) / \rho), \quad
    h(c) \propto \frac{1}{1 + (c - \cos\theta_c)^2 / w^2}, \quad w = w_0 (1 + \rho/\lambda), \quad
    \rho = \sqrt{|s - p|^2 + r_1^2}, \quad t_s = \rho / v,

with h normalised to a mean of one over −1 < c < 1, and for a *track* (a line through p, crossed
there at t = 0 with the speed of light c; r⊥ is the distance of the sensor from the line, l its
coordinate along it),

.. math::

    a_s = A\, k\, \frac{e^{-\rho/\ell}}{1 + \rho/r_0}, \quad
    \rho = \sqrt{r_\perp^2 + r_1^2} / \sin\theta_c, \quad
    t_s = (l + \rho \sin\theta_c \tan\theta_c) / c ,

the geometry of a Cherenkov cone. With T the recorded window and N_s the number of sensors, the
density of the hits in time order, per nanosecond and hit, is

.. math:: \ln p(\mathrm{hits}|z) = \sum_j \ln \lambda_{s_j}(t_j) - \sum_s \mu_s, \qquad
    \mu_s = E\, a_s\, [F(t_{\max}) - F(t_{\min})] + b\, T .

Nuisances are factors on this response, one set (y, s, β) per event: β on the noise, y on the light,
and s on the amount of scattering per metre, which blurs times and ring and shortens the reach of
the light: where it diffuses, its range goes as √(absorption length × scattering length).

.. math:: A \to y A, \qquad \lambda \to \lambda / s, \quad \ell \to \ell / \sqrt{s}, \qquad
    b \to \beta\, b .

Time spread τ₀ and ring width w₀ beside the event, and the speed v, stay.

Source: *Optical properties of deep glacial ice at the South Pole*, M. Ackermann et al., 2006,
https://doi.org/10.1029/2005JD006687 (the propagation length).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import as_tensor, check_shape
from .._hits import check_hits
from .._nuisance import Factors, check_nuisance
from .checks import check_labels

__all__ = ["LIGHT_SPEED", "Light", "Response3D"]

LIGHT_SPEED = 0.299792458
"""c in metres per nanosecond."""

_ELEMENTS = 2**21
"""Numbers per temporary tensor, by which work on many events is cut into chunks."""


class Light(NamedTuple):
    """What reaches points from events, each of shape (..., points).

    Attributes:
        photons: E·a, expected photons.
        time: t_s, time of flight, ns.
        spread: τ, ns.
    """

    photons: Tensor
    time: Tensor
    spread: Tensor


@dataclass(frozen=True)
class Response3D:
    """Sensors, light and noise of the telescope (see the module's docstring for the symbols).

    Attributes:
        kind: "cascade" or "track".
        strings: Number of strings along x and along y.
        sensors_per_string: Number of sensors along z.
        string_spacing: Distance between neighbouring strings, metres.
        sensor_spacing: Distance between neighbouring sensors of a string, metres.
        box: Positions lie in [−box, box]³, metres.
        energy_range: Energies lie between these, TeV, uniform in the logarithm.
        window: Hits before and after these times are not recorded, ns.
        light_yield: A, expected photons at a sensor beside a cascade per TeV.
        track_share: k, the light beside a track in units of that beside a cascade.
        attenuation: ℓ, metres.
        scattering: λ, the path on which time spread and ring width double, metres.
        near_field: r₀, metres.
        sensor_radius: r₁, metres.
        ring_width: w₀, the width of the Cherenkov ring of a cascade in the cosine.
        speed: v, speed of light in the medium, metres per ns.
        time_spread: τ₀, ns.
        noise: b, noise hits per sensor and ns.
    """

    kind: str = "cascade"
    strings: tuple[int, int] = (5, 5)
    sensors_per_string: int = 8
    string_spacing: float = 25.0
    sensor_spacing: float = 15.0
    box: float = 50.0
    energy_range: tuple[float, float] = (2.0, 100.0)
    window: tuple[float, float] = (-400.0, 700.0)
    light_yield: float = 0.6
    track_share: float = 0.4
    attenuation: float = 25.0
    scattering: float = 20.0
    near_field: float = 12.0
    sensor_radius: float = 3.0
    ring_width: float = 0.15
    speed: float = 0.22
    time_spread: float = 4.0
    noise: float = 1.2e-5

    def __post_init__(self) -> None:
        if self.kind not in ("cascade", "track"):
            raise ValueError(f"Expected kind as 'cascade' or 'track'; got {self.kind!r}.")
        counts = (*self.strings, self.sensors_per_string)
        if len(counts) != 3 or not all(isinstance(n, int) and n > 0 for n in counts):
            raise ValueError(
                "Expected strings as two positive whole numbers and sensors_per_string as one; "
                f"got {self.strings!r} and {self.sensors_per_string!r}."
            )
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < math.inf:
                raise ValueError(f"Expected {name} as a positive number; got {value!r}.")
        if not self.speed < LIGHT_SPEED:
            raise ValueError(
                f"Expected speed below {LIGHT_SPEED:g} m/ns, that of light in vacuum; got "
                f"{self.speed!r}."
            )
        low, high = self.energy_range
        if not 0 < low < high < math.inf:
            raise ValueError(f"Expected energy_range as 0 < low < high; got {self.energy_range}.")
        first, last = self.window
        if not -math.inf < first < last < math.inf:
            raise ValueError(f"Expected window as two increasing times; got {self.window}.")

    @property
    def sensors(self) -> Tensor:
        """Positions (x, y, z) of the sensors in metres, centred on 0, shape (N_s, 3), float64."""
        counts = (*self.strings, self.sensors_per_string)
        axes = [
            (torch.arange(n, dtype=torch.float64) - (n - 1) / 2) * spacing
            for n, spacing in zip(counts, self._spacings, strict=True)
        ]
        return torch.cartesian_prod(*axes)

    @property
    def _spacings(self) -> tuple[float, float, float]:
        return self.string_spacing, self.string_spacing, self.sensor_spacing

    def light(self, z: Tensor, points: Tensor, factors: Factors | None = None) -> Light:
        """Return what reaches points, shapes (..., 7) and (..., points, 3) -> (..., points).

        The factors, 1 by default, broadcast against (...).
        """
        energy, x, y, height, u, v, w = z[..., None].unbind(-2)
        dx, dy, dz = (points[..., i] - p for i, p in enumerate((x, y, height)))
        square = dx * dx + dy * dy + dz * dz
        along = dx * u + dy * v + dz * w
        cosine = self.speed / LIGHT_SPEED
        if self.kind == "track":
            sine = math.sqrt(1 - cosine**2)
            across = ((square - along * along).clamp_min(0) + self.sensor_radius**2).sqrt()
            path = across / sine
            time = (along + across * (sine / cosine)) / LIGHT_SPEED
            falloff = self.track_share / (1 + path / self.near_field)
        else:
            path = (square + self.sensor_radius**2).sqrt()
            time = path / self.speed
            width = self.ring_width * self._blur(path, factors)
            # the mean of 1/(1 + ((c - cosine)/width)²) over −1 < c < 1
            mean = width * (((1 - cosine) / width).atan() + ((1 + cosine) / width).atan()) / 2
            ring = mean * (1 + ((along / path - cosine) / width).square())
            falloff = 1 / ((1 + (path / self.near_field).square()) * ring)
        reach = -path if factors is None else -path * factors.scattering[..., None].sqrt()
        photons = energy * self.light_yield * (reach / self.attenuation).exp() * falloff
        if factors is not None:
            photons = photons * factors.light_yield[..., None]
        return Light(photons, time, self.time_spread * self._blur(path, factors))

    def _blur(self, path: Tensor, factors: Factors | None) -> Tensor:
        """Return 1 + ρ/λ, by which scattering widens time spread and ring."""
        scattered = path if factors is None else path * factors.scattering[..., None]
        return 1 + scattered / self.scattering

    def expected_counts(self, z: Tensor, nuisance: Mapping[str, Any] | None = None) -> Tensor:
        """Return the expected number of hits μ of every sensor in the window, noise included.

        Arguments:
            z: Energy (TeV), position (metres) and direction of travel, shape (N, 7).
            nuisance: Factors on "light_yield", "scattering" and "noise", each a number or of shape
                (N,); 1 where left out.

        Returns:
            Expected counts, shape (N, N_s).

        Raises:
            ValueError: If shapes differ from these, an energy or a factor is not positive or a
                direction no unit vector.
        """
        z = check_labels(z)
        return self._counts(z, self.sensors.to(z), check_nuisance(nuisance, z))

    def intensity(
        self, hits: Tensor, z: Tensor, nuisance: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return the expected hits per ns, λ_s(t), at given sensors and times.

        Arguments:
            hits: Sensor x, y, z (metres) and time (ns), shape (N, M, 4).
            z: Energy (TeV), position (metres) and direction of travel, shape (N, 7).
            nuisance: As in `expected_counts`.

        Returns:
            Intensities, shape (N, M).

        Raises:
            ValueError: If shapes differ from these, or labels or factors are out of range.
        """
        z = check_labels(z)
        hits = as_tensor(hits, "hits", like=z).to(z.dtype)
        check_shape(hits, (len(z), "M", 4), "hits", "A hit is (sensor x, y, z, time).")
        return self._intensity(hits, z, check_nuisance(nuisance, z))

    def log_prob_hits(
        self,
        hits: Tensor,
        lengths: Tensor,
        z: Tensor,
        nuisance: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return ln p(hits | z) of the inhomogeneous Poisson process.

        It is the log-density of the number of hits, their sensors and their times in time order.

        Arguments:
            hits: Sensor x, y, z (metres) and time (ns), padded, shape (N, M, 4).
            lengths: The number of hits of every event, shape (N,).
            z: Energy (TeV), position (metres) and direction of travel, shape (N, 7).
            nuisance: As in `expected_counts`.

        Returns:
            Log-densities in nats (times in ns), shape (N,), in the dtype of `z`.

        Raises:
            ValueError: If shapes differ from these, or labels, factors, lengths, sensors or times
                are out of range.
        """
        z = check_labels(z)
        factors = check_nuisance(nuisance, z)
        hits, lengths = self.check_hits(hits, lengths, like=z)
        check_shape(lengths, (len(z),), "lengths", "Give one hit list per label.")
        hits = hits.to(z.dtype)
        rows = max(1, _ELEMENTS // (len(self.sensors) + hits.shape[1]))
        parts = [z.new_zeros(0)]
        for start in range(0, len(z), rows):
            part = slice(start, start + rows)
            some = Factors(*(factor[part, None] for factor in factors))
            parts.append(self.log_likelihood(hits[part], lengths[part], z[part, None], some)[:, 0])
        return torch.cat(parts)

    def log_likelihood(
        self, hits: Tensor, lengths: Tensor, z: Tensor, factors: Factors | None = None
    ) -> Tensor:
        """Return ln p(hits | z) at S labels per event, without checks.

        Shapes (N, M, 4), (N,) and (N, S, 7) -> (N, S); factors broadcast against (N, S).
        """
        real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
        logs = self._intensity(hits[:, None], z, factors).log()
        seen = torch.where(real[:, None], logs, torch.zeros_like(logs)).sum(-1)
        return seen - self._counts(z, self.sensors.to(z), factors).sum(-1)

    def arrival_cdf(self, time: Tensor | float, light: Light) -> Tensor:
        """Return F(t), the share of the light that has arrived."""
        return (-(-_standardise(time, light)).exp()).exp()

    def check_hits(
        self, hits: Any, lengths: Any, like: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return hits (N, M, 4) and lengths (N,) as tensors.

        Raises:
            ValueError: If shapes differ from these, or a hit is at no sensor or outside the window.
        """
        counts = (*self.strings, self.sensors_per_string)
        form = "sensor x, y, z, time"
        return check_hits(hits, lengths, counts, self._spacings, self.window, form, like)

    def _intensity(self, hits: Tensor, z: Tensor, factors: Factors | None) -> Tensor:
        light = self.light(z, hits[..., :3], factors)
        s = _standardise(hits[..., 3], light)
        signal = light.photons * (-s - (-s).exp()).exp() / light.spread
        return signal + (self.noise if factors is None else self.noise * factors.noise[..., None])

    def _counts(self, z: Tensor, sensors: Tensor, factors: Factors | None) -> Tensor:
        first, last = self.window
        light = self.light(z, sensors, factors)
        share = self.arrival_cdf(last, light) - self.arrival_cdf(first, light)
        dark = self.noise * (last - first)
        return light.photons * share + (
            dark if factors is None else dark * factors.noise[..., None]
        )


def _standardise(time: Tensor | float, light: Light) -> Tensor:
    # Below −60 the cdf is zero anyway, and exp(60) still fits float32.
    return ((time - light.time) / light.spread).clamp(min=-60.0)


_POSITIVE = (
    "string_spacing",
    "sensor_spacing",
    "box",
    "light_yield",
    "track_share",
    "attenuation",
    "scattering",
    "near_field",
    "sensor_radius",
    "ring_width",
    "speed",
    "time_spread",
    "noise",
)
