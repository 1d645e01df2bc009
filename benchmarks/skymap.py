"""Sky maps of densities from 1″ to 20° and of thin rings: cost, integral, areas against truth.

`python benchmarks/skymap.py` prints for each density how many values its multi-order map took, the
integral before normalisation, the seconds to a FITS file, and the 90 % area divided by the true
one: of the map, and of 50 000 draws alone by

    A_p = (1/S) Σ 1[q_i ≥ q_p] / q_i,    q_p the (1 − p) quantile of the draws' densities q_i.

The last lines time a head with untrained spline layers, from its context to the file.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import flowpost as fp
from flowpost import skymap

DEGREE = math.pi / 180
AXIS = np.array([0.3, -0.5, 0.81]) / np.linalg.norm([0.3, -0.5, 0.81])


class Density:
    """A density around AXIS that depends on the angle θ from it alone."""

    batch_shape, event_shape = torch.Size([]), torch.Size([3])
    device = torch.device("cpu")

    def __init__(self) -> None:
        east = np.cross([1.0, 0.0, 0.0], AXIS)
        east /= np.linalg.norm(east)
        self.frame = torch.as_tensor(np.stack([east, np.cross(AXIS, east), AXIS]))

    def place(self, cosine: Tensor, sine: Tensor, generator: torch.Generator | None) -> Tensor:
        """Vectors at angles from the axis, anywhere around it."""
        turn = torch.rand(cosine.shape, generator=generator, dtype=torch.float64)
        phi = 2 * math.pi * turn
        return torch.stack([sine * phi.cos(), sine * phi.sin(), cosine], -1) @ self.frame


class Peak(Density):
    """Von Mises–Fisher of κ = σ⁻²."""

    def __init__(self, sigma: float) -> None:
        super().__init__()
        self.kappa = 1 / sigma**2
        self.norm = -math.expm1(-2 * self.kappa)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density per steradian."""
        v = (value - self.frame[2]).square().sum(-1) / 2
        return math.log(self.kappa / (2 * math.pi * self.norm)) - self.kappa * v

    def sample(self, shape: tuple[int], generator: torch.Generator | None = None) -> Tensor:
        """Unit vectors."""
        p = torch.rand(shape, generator=generator, dtype=torch.float64)
        v = -torch.log1p(-p * self.norm) / self.kappa
        return self.place(1 - v, (v * (2 - v)).sqrt(), generator)

    def area(self, level: float) -> float:
        """Square degrees of the region of a level."""
        return -2 * math.pi * math.log1p(-level * self.norm) / self.kappa / DEGREE**2


class Ring(Density):
    """Normal of width σ in θ − θ₀, uniform around the axis."""

    def __init__(self, angle: float, sigma: float) -> None:
        super().__init__()
        self.angle, self.sigma = angle, sigma

    def log_prob(self, value: Tensor) -> Tensor:
        """Log density per steradian."""
        x, y, z = (value @ self.frame.T).unbind(-1)
        sine = torch.hypot(x, y)
        pull = (torch.atan2(sine, z) - self.angle) / self.sigma
        return -pull.square() / 2 - torch.log((2 * math.pi) ** 1.5 * self.sigma * sine)

    def sample(self, shape: tuple[int], generator: torch.Generator | None = None) -> Tensor:
        """Unit vectors."""
        noise = torch.randn(shape, generator=generator, dtype=torch.float64)
        theta = self.angle + self.sigma * noise
        return self.place(theta.cos(), theta.sin(), generator)

    def area(self, level: float) -> float:
        """Square degrees of the region of a level."""
        width = 2 * self.sigma * float(torch.special.ndtri(torch.tensor((1 + level) / 2)))
        return 2 * math.pi * math.sin(self.angle) * width / DEGREE**2


CASES: dict[str, Peak | Ring] = {
    "1″": Peak(DEGREE / 3600),
    "1′": Peak(DEGREE / 60),
    "1°": Peak(DEGREE),
    "20°": Peak(20 * DEGREE),
    "ring 30° ± 1°": Ring(30 * DEGREE, DEGREE),
    "ring 30° ± 3′": Ring(30 * DEGREE, DEGREE / 20),
}


def area_of_draws(posterior: Peak | Ring, level: float, draws: int) -> float:
    z = posterior.sample((draws,), torch.Generator().manual_seed(1))
    log_q = posterior.log_prob(z)
    dense = log_q >= torch.quantile(log_q, 1 - level)
    return float(torch.exp(-log_q[dense]).sum()) / draws / DEGREE**2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draws", type=int, default=50_000)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "map.fits"
        # imports healpy and astropy
        skymap.multiorder(CASES["1°"], frame="C").write(path)
        print("density         values   cells  integral  seconds   area/true  draws/true")
        for name, posterior in CASES.items():
            begin = time.perf_counter()
            sky = skymap.multiorder(posterior, frame="C")
            sky.write(path, overwrite=True)
            seconds = time.perf_counter() - begin
            true = posterior.area(0.9)
            drawn = area_of_draws(posterior, 0.9, options.draws) / true
            print(
                f"{name:14s} {sky.evaluations:7d} {len(sky.order):7d} {sky.integral:9.5f} "
                f"{seconds:8.2f} {sky.area(0.9) / true:11.4f} {drawn:11.4f}"
            )
        head = fp.PosteriorHead(64, fp.Sphere(), flow="spline")
        context = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
        for _ in range(2):
            begin = time.perf_counter()
            sky = skymap.multiorder(head(context)[0], frame="C")
            sky.write(path, overwrite=True)
            print(f"head: {sky.evaluations} values, {time.perf_counter() - begin:.2f} s")
        print(f"{options.threads} thread(s)")


if __name__ == "__main__":
    main()
