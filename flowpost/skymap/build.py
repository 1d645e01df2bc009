r"""Sky maps of a direction posterior, and of files.

The density of a map at direction n of its own frame is that of the posterior at the direction
:math:`R^T n` of the labels' frame, re-evaluated at every cell: rotating keeps areas, so

.. math:: p(n) = q(R^T n \,|\, x),

and nothing is interpolated.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .._checks import check_positive_int
from . import cells, fits, regions
from .frames import FRAMES, check_rotation
from .refine import Cells, refine
from .result import SkyMap

__all__ = ["DirectionPosterior", "flat", "multiorder", "read"]

_CHUNK = 65_536
_TOLERANCE = 5e-6
_AMISS = 0.01  # of the integral


class DirectionPosterior(Protocol):
    """What a map needs of a `flowpost.Posterior` of one direction."""

    @property
    def batch_shape(self) -> torch.Size:
        """Shape of the events: () or (1,)."""

    @property
    def event_shape(self) -> torch.Size:
        """(3,)."""

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""

    def log_prob(self, value: Any) -> Tensor:
        """Log density per steradian."""

    def sample(self, sample_shape: Any = ..., generator: torch.Generator | None = None) -> Tensor:
        """Unit vectors."""


def multiorder(
    posterior: DirectionPosterior,
    *,
    frame: str = "local",
    rotation: Any = None,
    draws: int = 10_000,
    tolerance: float = _TOLERANCE,
    max_evaluations: int = 1_000_000,
    generator: torch.Generator | None = None,
) -> SkyMap:
    """Map the posterior of one event with cells as fine as it needs, from 12 to order 29.

    The cells follow draws of the posterior and are then refined by its density, so no mode that
    draws have hit is missed, however narrow: about 25 000 evaluations for one peak of any width,
    and more for structures that are long and thin.

    Arguments:
        posterior: Of one direction (3,) and one event, batch shape () or (1,): `q[i]`, and
            `q["direction"]` of a product.
        frame: Frame of its labels, and without `rotation` of the map: "C" equatorial (ICRS), "G"
            Galactic, or "local", of which no multi-order file is written.
        rotation: Matrix (3, 3) of determinant +1 that takes vectors of the labels' frame to
            equatorial ones, see `detector_rotation` and `galactic_rotation`. The map is then "C",
            and a true label has to be rotated too before it is compared: `R @ label.numpy()`.
        draws: Draws S that seed the cells.
        tolerance: Estimated error of the probability of four cells that has them refined.
        max_evaluations: Where to stop refining, with a warning.
        generator: Source of the draws; by default one of seed 0.

    Returns:
        The map, normalised; its `integral` is that before.

    Raises:
        ValueError: If the posterior is not of one direction of one event, its density is NaN or
            infinite, or an argument does not fit, such as a rotation of equatorial labels.

    Warns:
        UserWarning: If the integral before normalisation differs from 1 by more than 1 %, or
            refinement stopped early.

    Example:
        >>> import flowpost as fp
        >>> head = fp.PosteriorHead(16, fp.Sphere(), flow="diagonal")
        >>> q = head(torch.zeros(5, 16))
        >>> sky = multiorder(q[0])
        >>> 0 < sky.area(0.5) < sky.area(0.9) < 41253
        True
    """
    density, frame = _density(posterior, frame, rotation)
    if not tolerance > 0:
        raise ValueError(f"Expected tolerance above 0; got {tolerance}.")
    found = _refined(posterior, density, rotation, draws, tolerance, max_evaluations, generator)
    return _normalised(
        found.order, found.pixel, found.mass / cells.area(found.order), frame, found.evaluations
    )


def flat(
    posterior: DirectionPosterior,
    nside: int,
    *,
    frame: str = "local",
    rotation: Any = None,
    draws: int = 10_000,
    generator: torch.Generator | None = None,
) -> SkyMap:
    """Map the posterior of one event with pixels of one size.

    Where the posterior is finer than the pixels, a pixel holds the sum of finer cells; elsewhere
    its density is that at its centre. So a mode narrower than a pixel keeps its probability.
    `rasterize(nside, nest=…, density=…)` of the result gives the array.

    Arguments:
        posterior: As in `multiorder`.
        nside: A power of two up to 8192; 12 nside² densities are evaluated.
        frame: As in `multiorder`.
        rotation: As in `multiorder`.
        draws: Draws S that find what is finer than the pixels.
        generator: Source of the draws; by default one of seed 0.

    Returns:
        The map, normalised, of 12 nside² cells.

    Raises:
        ValueError: As in `multiorder`, or if `nside` does not fit.

    Warns:
        UserWarning: If the integral before normalisation differs from 1 by more than 1 %.
    """
    level = cells.check_nside(nside)
    density, frame = _density(posterior, frame, rotation)
    found = _refined(posterior, density, rotation, draws, _TOLERANCE, 1_000_000, generator)
    mass, coarse = regions.fixed_pixels(found.order, found.pixel, found.mass, level)
    values = mass / cells.area(level)
    todo = np.flatnonzero(coarse)
    for part in np.array_split(todo, max(1, -(-len(todo) // _CHUNK))):
        values[part] = density(cells.centres(np.full(len(part), level), part))
    order = np.full(len(values), level, dtype=np.int64)
    evaluations = found.evaluations + len(todo)
    return _normalised(order, np.arange(len(values)), values, frame, evaluations)


def read(path: Any) -> SkyMap:
    """Read a multi-order or flat sky map from FITS.

    Arguments:
        path: The file; columns UNIQ and PROBDENSITY, or PROB (or PROBABILITY) per pixel.

    Returns:
        The map, normalised. Its frame is "local" where the file names none.

    Raises:
        ValueError: If there is no file, it is no such map, or it does not cover the sky once.

    Warns:
        UserWarning: If the map's sum differs from 1 by more than 1 %.
    """
    order, pixel, density, frame = fits.read_cells(path)
    start = cells.first(order, pixel)
    rank = np.argsort(start, kind="stable")
    try:
        cells.check_cover(order[rank], start[rank])
        return _normalised(order[rank], pixel[rank], density[rank], frame, 0)
    except ValueError as error:
        raise ValueError(f"Expected a sky map of the whole sky in {path}. {error}") from error


def _refined(
    posterior: DirectionPosterior,
    density: Callable[[np.ndarray], np.ndarray],
    rotation: Any,
    draws: int,
    tolerance: float,
    max_evaluations: int,
    generator: torch.Generator | None,
) -> Cells:
    count = check_positive_int(draws, "draws", 100)
    # a CPU generator gives the same draws whatever the device of the model
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    with torch.no_grad():
        drawn = posterior.sample((count,), generator=generator).reshape(count, -1)
    z = drawn.double().cpu().numpy()
    length = np.linalg.norm(z, axis=1, keepdims=True)
    if z.shape[1] != 3 or not (np.abs(length - 1) < 1e-3).all():
        raise ValueError(
            "Expected a posterior whose draws are unit vectors (x, y, z); got others. Give its "
            "direction block, and labels of fp.Sphere()."
        )
    z = z / length if rotation is None else z / length @ check_rotation(rotation).T
    return refine(density, z, tolerance, check_positive_int(max_evaluations, "max_evaluations"))


def _density(
    posterior: DirectionPosterior, frame: str, rotation: Any
) -> tuple[Callable[[np.ndarray], np.ndarray], str]:
    """The density per steradian at vectors (P, 3) of the map's frame, and that frame."""
    batch, event = tuple(posterior.batch_shape), tuple(posterior.event_shape)
    if event != (3,):
        raise ValueError(
            f"Expected a posterior of one direction, event shape (3,); got {event}. Take the "
            'block, as in q["direction"].'
        )
    if batch not in ((), (1,)):
        raise ValueError(
            f"Expected the posterior of one event, batch shape () or (1,); got {batch}. Take one, "
            "as in q[0]."
        )
    if frame not in FRAMES:
        raise ValueError(f"Expected frame as one of {', '.join(FRAMES)}; got {frame!r}.")
    if frame == "C" and rotation is not None:
        raise ValueError(
            'Expected a rotation of labels that are not equatorial; got one with frame="C". Leave '
            "out frame where the labels are of a detector, or rotation where they are equatorial."
        )
    matrix = None if rotation is None else check_rotation(rotation)
    dtype = torch.float32 if posterior.device.type == "mps" else torch.float64

    def density(vectors: np.ndarray) -> np.ndarray:
        labels = vectors if matrix is None else vectors @ matrix  # Rᵀ n, row by row
        out = np.empty(len(labels))
        for i in range(0, len(labels), _CHUNK):
            z = torch.as_tensor(labels[i : i + _CHUNK], dtype=dtype, device=posterior.device)
            with torch.no_grad():
                value = posterior.log_prob(z.unsqueeze(1) if batch else z).reshape(-1)
            out[i : i + _CHUNK] = value.double().cpu().numpy()
        if np.isnan(out).any() or np.isposinf(out).any():
            raise ValueError(
                "Expected log q without NaN or +∞; got such. Has the training diverged?"
            )
        return np.exp(out)

    return density, "C" if matrix is not None else frame


def _normalised(
    order: np.ndarray, pixel: np.ndarray, density: np.ndarray, frame: str, evaluations: int
) -> SkyMap:
    integral = float((density * cells.area(order)).sum())
    if not 0 < integral < np.inf:
        raise ValueError(
            f"Expected a density of positive integral; got {integral}. Does q.log_prob fit the "
            "draws of q?"
        )
    if abs(integral - 1) > _AMISS:
        warnings.warn(
            f"The sky map's integral was {integral:.4g} before normalisation, more than 1 % from "
            "1. Lower tolerance, and check that the density is normalised per steradian.",
            stacklevel=3,
        )
    return SkyMap(order, pixel, density / integral, frame, integral, evaluations)
