r"""What the sensors of the telescope see of an event, and the exact likelihoods of its two views.

An event at position p with direction angle α and energy E sends light to sensor s over the
distance ρ = √(|s − p|² + r₁²) under the angle δ between its direction and the line of sight. The
light arrives as a Poisson process of intensity (hits per nanosecond)

.. math::

    \lambda_s(t) = E\, a_s(p, \alpha)\, f(t | \rho) + b, \qquad
    a_s = A\, \frac{e^{-\rho/\ell}}{1 + \rho^2/r_0^2}\,
          \frac{(1 + g \cos\delta)^2}{1 + g^2/2}, \qquad
    f = F', \quad F(t|\rho) = \exp(-e^{-(t - \rho/v)/\tau(\rho)}), \quad
    \tau = \tau_0 + \tau_1 \rho .

The arrival times are Gumbel distributed: a sharp rise at the time of flight and an exponential
tail of scattered light that grows with the distance. The cdf F is in closed form, so the expected
counts of a time bin are exactly the integral of the intensity,

.. math:: \mu_{sk} = E\, a_s\, [F(t_{k+1}) - F(t_k)] + b\, (t_{k+1} - t_k),

and the two views of one event agree: the image is the histogram of the hits. Their likelihoods are

.. math::

    \ln p(\mathrm{image}|z) = \sum_{sk} n_{sk} \ln \mu_{sk} - \mu_{sk} - \ln n_{sk}!, \qquad
    \ln p(\mathrm{hits}|z) = \sum_j \ln \lambda_{s_j}(t_j) - \sum_{sk} \mu_{sk}

(the second one per nanosecond and hit, for hits in the order of their times).

Nuisances are factors on this response, one set (y, s, β) per event: β on the noise, y on the light,
and s on the amount of scattering per metre, which lengthens the tail and shortens the reach of the
light: where it diffuses, its range goes as √(absorption length × scattering length).

.. math:: A \to y A, \qquad \tau_1 \to s\,\tau_1, \quad \ell \to \ell / \sqrt{s}, \qquad
    b \to \beta\, b .

The spread beside the event τ₀, the beaming g and the speed v stay.

Source: *Optical properties of deep glacial ice at the South Pole*, M. Ackermann et al., 2006,
https://doi.org/10.1029/2005JD006687 (the propagation length).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._checks import as_tensor, check_shape
from .._hits import check_hits
from .._nuisance import Factors, check_nuisance
from .checks import check_images, check_labels

__all__ = ["Channels", "Response"]


class Channels(NamedTuple):
    """The parts of one event that saw light: filled time bins of an image, or single hits.

    Attributes:
        sensor: Index of the sensor, shape (C,).
        photons: Number of photons, shape (C,).
        start: Time (start of the bin), ns, shape (C,).
        stop: End of the bin, ns, shape (C,); None for single hits.
    """

    sensor: Tensor
    photons: Tensor
    start: Tensor
    stop: Tensor | None

    def to(self, dtype: torch.dtype) -> Channels:
        """Return the channels with times and counts of another dtype."""
        stop = None if self.stop is None else self.stop.to(dtype)
        return Channels(self.sensor, self.photons.to(dtype), self.start.to(dtype), stop)


@dataclass(frozen=True)
class Response:
    """Sensors, light and noise of the telescope (see the module's docstring for the symbols).

    Attributes:
        rows: H, the number of sensor rows (along y).
        columns: W, the number of sensor columns (along x).
        spacing: Distance between neighbouring sensors, metres.
        box: Positions lie in [−box, box]², metres.
        energy_range: Energies lie between these, TeV, uniform in the logarithm.
        time_edges: Edges of the T time bins, ns after the event; hits outside are not recorded.
        light_yield: A, expected photons at a sensor beside the event per TeV.
        attenuation: ℓ, metres.
        near_field: r₀, metres.
        sensor_radius: r₁, metres.
        beaming: g between 0 (isotropic) and 1 (no light backwards).
        speed: v, metres per ns.
        time_spread: τ₀, ns.
        time_spread_growth: τ₁, ns per metre.
        noise: b, noise hits per sensor and ns.
    """

    rows: int = 8
    columns: int = 8
    spacing: float = 20.0
    box: float = 80.0
    energy_range: tuple[float, float] = (1.0, 100.0)
    time_edges: tuple[float, ...] = (-20.0, 50.0, 90.0, 140.0, 300.0)
    light_yield: float = 2.0
    attenuation: float = 20.0
    near_field: float = 8.0
    sensor_radius: float = 2.0
    beaming: float = 1.0
    speed: float = 0.22
    time_spread: float = 4.0
    time_spread_growth: float = 0.25
    noise: float = 1e-4

    def __post_init__(self) -> None:
        for name in ("rows", "columns"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"Expected {name} as a positive whole number; got {value!r}.")
        for name in _POSITIVE:
            value = getattr(self, name)
            if not 0 < value < float("inf"):
                raise ValueError(f"Expected {name} as a positive number; got {value!r}.")
        if not 0 <= self.beaming <= 1:
            raise ValueError(f"Expected beaming between 0 and 1; got {self.beaming!r}.")
        low, high = self.energy_range
        if not 0 < low < high:
            raise ValueError(f"Expected energy_range as 0 < low < high; got {self.energy_range}.")
        edges = self.time_edges
        if len(edges) < 2 or any(a >= b for a, b in pairwise(edges)):
            raise ValueError(
                f"Expected time_edges as at least two increasing times; got {edges}. Sort them."
            )

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(T, H, W) of an image."""
        return len(self.time_edges) - 1, self.rows, self.columns

    @property
    def sensors(self) -> Tensor:
        """Positions (x, y) of the sensors in metres, shape (H·W, 2), rows of equal y together."""
        x = (
            torch.arange(self.columns, dtype=torch.float64) - (self.columns - 1) / 2
        ) * self.spacing
        y = (torch.arange(self.rows, dtype=torch.float64) - (self.rows - 1) / 2) * self.spacing
        return torch.stack(torch.meshgrid(x, y, indexing="xy"), -1).reshape(-1, 2)

    def expected_images(
        self, z: Tensor, angle: Tensor, nuisance: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return the expected counts μ of every sensor and time bin.

        Arguments:
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).
            angle: Direction angles in radians, shape (N,).
            nuisance: Factors on "light_yield", "scattering" and "noise", each a number or of shape
                (N,); 1 where left out.

        Returns:
            Expected counts, noise included, shape (N, T, H, W).

        Raises:
            ValueError: If shapes differ from these, or an energy or a factor is not positive.
        """
        z, angle = check_labels(z, angle)
        return self._expected_images(z, angle, check_nuisance(nuisance, z))

    def intensity(
        self, hits: Tensor, z: Tensor, angle: Tensor, nuisance: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return the expected hits per ns, λ_s(t), at given sensors and times.

        Arguments:
            hits: Sensor x, sensor y (metres) and time (ns), shape (N, M, 3).
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).
            angle: Direction angles in radians, shape (N,).
            nuisance: As in `expected_images`.

        Returns:
            Intensities, shape (N, M).

        Raises:
            ValueError: If shapes differ from these, or an energy or a factor is not positive.
        """
        z, angle = check_labels(z, angle)
        hits = as_tensor(hits, "hits", like=z)
        check_shape(hits, (len(z), "M", 3), "hits", "A hit is (sensor x, sensor y, time).")
        return self._intensity(hits, z, angle, check_nuisance(nuisance, z))

    def log_prob_images(
        self, images: Tensor, z: Tensor, angle: Tensor, nuisance: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Return ln p(image | position, energy, angle) of independent Poisson counts.

        Arguments:
            images: Counts, shape (N, T, H, W).
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).
            angle: Direction angles in radians, shape (N,).
            nuisance: As in `expected_images`.

        Returns:
            Log-probabilities in nats, shape (N,).

        Raises:
            ValueError: If shapes differ from these, or counts, energies or factors are out of
                range.
        """
        z, angle = check_labels(z, angle)
        images = self.check_images(images, like=z)
        check_shape(images, (len(z), *self.image_shape), "images", "Give one image per label.")
        expected = self._expected_images(z, angle, check_nuisance(nuisance, z))
        images = images.to(expected.dtype)
        terms = torch.xlogy(images, expected) - expected - torch.lgamma(images + 1)
        return terms.flatten(1).sum(1)

    def log_prob_hits(
        self,
        hits: Tensor,
        lengths: Tensor,
        z: Tensor,
        angle: Tensor,
        nuisance: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Return ln p(hits | position, energy, angle) of the inhomogeneous Poisson process.

        It is the log-density of the number of hits, their sensors and their times in time order.

        Arguments:
            hits: Sensor x, sensor y (metres) and time (ns), padded, shape (N, M, 3).
            lengths: The number of hits of every event, shape (N,).
            z: Position (x, y) in metres and energy in TeV, shape (N, 3).
            angle: Direction angles in radians, shape (N,).
            nuisance: As in `expected_images`.

        Returns:
            Log-densities in nats (times in ns), shape (N,).

        Raises:
            ValueError: If shapes differ from these, or lengths, times, energies or factors are out
                of range.
        """
        z, angle = check_labels(z, angle)
        hits, lengths = self.check_hits(hits, lengths, like=z)
        check_shape(lengths, (len(z),), "lengths", "Give one hit list per label.")
        real = torch.arange(hits.shape[1], device=hits.device) < lengths[:, None]
        factors = check_nuisance(nuisance, z)
        logs = self._intensity(hits, z, angle, factors).log()
        total = self._expected_images(z, angle, factors).flatten(1).sum(1)
        return torch.where(real, logs, torch.zeros_like(logs)).sum(1) - total

    def photons(self, offset: Tensor, z: Tensor, angle: Tensor, factors: Factors) -> Tensor:
        """Return E·a_s, the expected photons, at offsets of shape (N, points, 2) -> (N, points)."""
        light, scattering = factors.light_yield[:, None], factors.scattering[:, None]
        distance = self.distance(offset)
        bright = self.brightness(offset, distance, angle[:, None], scattering)
        return z[:, 2, None] * bright * light

    def _expected_images(self, z: Tensor, angle: Tensor, factors: Factors) -> Tensor:
        offset = self.sensors.to(z) - z[:, None, :2]
        photons = self.photons(offset, z, angle, factors)
        edges = torch.tensor(self.time_edges, dtype=z.dtype, device=z.device)
        path, scattering = self.distance(offset)[:, None], factors.scattering[:, None, None]
        share = self.arrival_cdf(edges[:, None], path, scattering).diff(dim=1)
        dark = self.noise * edges.diff()[:, None] * factors.noise[:, None, None]
        return (photons[:, None] * share + dark).reshape(-1, *self.image_shape)

    def _intensity(self, hits: Tensor, z: Tensor, angle: Tensor, factors: Factors) -> Tensor:
        offset = hits[..., :2].to(z.dtype) - z[:, None, :2]
        photons = self.photons(offset, z, angle, factors)
        path, scattering = self.distance(offset), factors.scattering[:, None]
        density = self.arrival_density(hits[..., 2].to(z.dtype), path, scattering)
        return photons * density + self.noise * factors.noise[:, None]

    def distance(self, offset: Tensor) -> Tensor:
        """Return ρ of sensor − position, shape (..., 2) -> (...)."""
        return (offset.square().sum(-1) + self.sensor_radius**2).sqrt()

    def brightness(
        self, offset: Tensor, distance: Tensor, angle: Tensor, scattering: Tensor | float = 1.0
    ) -> Tensor:
        """Return a_s, photons per TeV; `angle` and `scattering` broadcast against `distance`."""
        along = offset[..., 0] * angle.cos() + offset[..., 1] * angle.sin()
        return self.falloff(distance, scattering) * (1 + self.beaming * along / distance).square()

    def falloff(self, distance: Tensor, scattering: Tensor | float = 1.0) -> Tensor:
        """Return a_s without (1 + g cos δ)²."""
        norm = self.light_yield / (1 + self.beaming**2 / 2)
        return (
            norm
            * (distance * -(scattering**0.5) / self.attenuation).exp()
            / (1 + (distance / self.near_field).square())
        )

    def spread(self, distance: Tensor, scattering: Tensor | float = 1.0) -> Tensor:
        """Return τ(ρ) in ns."""
        return self.time_spread + (self.time_spread_growth * scattering) * distance

    def arrival_cdf(
        self, time: Tensor, distance: Tensor, scattering: Tensor | float = 1.0
    ) -> Tensor:
        """Return F(t|ρ)."""
        return (-(-self._standardise(time, distance, scattering)).exp()).exp()

    def arrival_density(
        self, time: Tensor, distance: Tensor, scattering: Tensor | float = 1.0
    ) -> Tensor:
        """Return f(t|ρ) per ns."""
        s = self._standardise(time, distance, scattering)
        return (-s - (-s).exp()).exp() / self.spread(distance, scattering)

    def _standardise(self, time: Tensor, distance: Tensor, scattering: Tensor | float) -> Tensor:
        spread = self.spread(distance, scattering)
        # Below −60 the cdf is zero anyway, and exp(60) still fits float32.
        return ((time - distance / self.speed) / spread).clamp(min=-60.0)

    def image_channels(self, image: Tensor) -> Channels:
        """Return the filled bins of one image of shape (T, H, W)."""
        bins, rows, columns = image.nonzero(as_tuple=True)
        edges = torch.tensor(self.time_edges, dtype=torch.float64, device=image.device)
        sensor = rows * self.columns + columns
        return Channels(sensor, image[bins, rows, columns].double(), edges[bins], edges[bins + 1])

    def hit_channels(self, hits: Tensor) -> Channels:
        """Return the hits, shape (M, 3) without padding, as channels."""
        column = (hits[:, 0] / self.spacing + (self.columns - 1) / 2).round().long()
        row = (hits[:, 1] / self.spacing + (self.rows - 1) / 2).round().long()
        count = torch.ones(len(hits), dtype=torch.float64, device=hits.device)
        return Channels(row * self.columns + column, count, hits[:, 2].double(), None)

    def check_images(self, images: Any, like: Tensor | None = None) -> Tensor:
        """Return images (N, T, H, W) as a tensor.

        Raises:
            ValueError: If the shape differs from this, or a value is no count.
        """
        return check_images(images, self.image_shape, like)

    def check_hits(
        self, hits: Any, lengths: Any, like: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return hits (N, M, 3) and lengths (N,) as tensors.

        Raises:
            ValueError: If shapes differ from these, or a hit is at no sensor or outside the times.
        """
        window = self.time_edges[0], self.time_edges[-1]
        counts, spacings = (self.columns, self.rows), (self.spacing, self.spacing)
        form = "sensor x, sensor y, time"
        return check_hits(hits, lengths, counts, spacings, window, form, like)


_POSITIVE = (
    "spacing",
    "box",
    "light_yield",
    "attenuation",
    "near_field",
    "sensor_radius",
    "speed",
    "time_spread",
    "time_spread_growth",
    "noise",
)
