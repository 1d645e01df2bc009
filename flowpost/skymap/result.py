"""A sky map: probability on the sphere, in cells of one or of mixed order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import cells, fits, regions
from .frames import FRAMES, show_area, show_direction

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["SkyMap"]

_SQUARE_DEGREE = (180 / np.pi) ** 2  # per steradian
_SUM = 1e-6


@dataclass(frozen=True, eq=False, repr=False)
class SkyMap:
    """Probability on the sky: cells that cover the sphere once, with a constant density in each.

    Directions are unit vectors (x, y, z) in the frame of the map. Arrays are numpy's, float64 and
    int64. Cells are sorted along the nested curve, from the first of base pixel 0.

    Attributes:
        order: HEALPix order k of each cell (M,): its nside is 2^k.
        pixel: Nested pixel of each cell (M,).
        density: Probability density per steradian (M,); its integral over the map is 1.
        frame: "C" equatorial (ICRS), "G" Galactic, or "local".
        integral: The integral before normalisation: how well the cells resolve the posterior.
        evaluations: How many densities were evaluated; 0 for a map from a file.

    Raises:
        ValueError: If shapes differ, a density is negative or not finite, or the cells do not
            cover the sky exactly once.
    """

    order: np.ndarray
    pixel: np.ndarray
    density: np.ndarray
    frame: str = "C"
    integral: float = 1.0
    evaluations: int = 0

    def __post_init__(self) -> None:
        if self.frame not in FRAMES:
            raise ValueError(f"Expected frame as one of {', '.join(FRAMES)}; got {self.frame!r}.")
        shapes = {np.shape(a) for a in (self.order, self.pixel, self.density)}
        if len(shapes) != 1 or len(shape := shapes.pop()) != 1 or not shape[0]:
            raise ValueError("Expected order, pixel and density of one shape (M,), M at least 1.")
        bad = ~(np.isfinite(self.density) & (self.density >= 0))
        if bad.any():
            raise ValueError(
                f"Expected densities of 0 or more; got {self.density[bad][0]} in cell "
                f"{int(bad.argmax())}."
            )
        cells.check_cover(self.order, self._start)
        total = float((self.density * self.cell_area).sum())
        if not abs(total - 1) < _SUM:
            raise ValueError(f"Expected a density of integral 1; got {total:g}. Normalise it.")

    @cached_property
    def _start(self) -> np.ndarray:
        return cells.first(self.order, self.pixel)

    @cached_property
    def cell_area(self) -> np.ndarray:
        """Area of each cell in steradians (M,)."""
        return cells.area(self.order)

    @property
    def probability(self) -> np.ndarray:
        """Probability of each cell (M,); their sum is 1."""
        return self.density * self.cell_area

    @property
    def uniq(self) -> np.ndarray:
        """Unique number 4·4^order + pixel of each cell (M,)."""
        return cells.to_uniq(self.order, self.pixel)

    def centres(self) -> np.ndarray:
        """Unit vectors of the cells' centres (M, 3)."""
        return cells.centres(self.order, self.pixel)

    def cell_at(self, direction: Any) -> np.ndarray:
        """Index into the cells of those that hold directions (N, 3) or (3,), of shape (N,) or ().

        Raises:
            ValueError: If `direction` is no unit vector.
        """
        vectors = cells.directions(direction)
        index = cells.index_of(vectors.reshape(-1, 3))
        found = np.searchsorted(self._start, index, side="right") - 1
        return found.reshape(vectors.shape[:-1])

    def density_at(self, direction: Any) -> np.ndarray:
        """Density per steradian of the cells that hold directions (N, 3) or (3,)."""
        return self.density[self.cell_at(direction)]

    @cached_property
    def maximum(self) -> np.ndarray:
        """Unit vector of the centre of the densest cell (3,)."""
        best = [int(self.density.argmax())]
        return cells.centres(self.order[best], self.pixel[best])[0]

    @cached_property
    def _levels(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        return regions.credible_levels(self.density, self.cell_area)

    @property
    def levels(self) -> np.ndarray:
        """Credible level of each cell (M,): the probability of all that is denser.

        Half of the cell itself, and of those of equal density, is included: the expectation for a
        direction somewhere inside. Cells of levels up to p make up the region of credibility p.
        """
        return self._levels[0]

    def area(self, level: float | Sequence[float] | np.ndarray = 0.9) -> Any:
        """Area in square degrees of the smallest region of a credibility.

        Arguments:
            level: Credibility in (0, 1], or several.

        Returns:
            A float, or an array of the shape of `level`. The last cell counts by the share of it
            that the level needs.

        Raises:
            ValueError: If a level is not in (0, 1].
        """
        wanted = np.asarray(level, dtype=np.float64)
        if not ((wanted > 0) & (wanted <= 1)).all():
            raise ValueError(f"Expected levels in (0, 1]; got {level}. 90 % is written 0.9.")
        areas = regions.region_areas(self.density, self.cell_area, wanted) * _SQUARE_DEGREE
        return areas if wanted.ndim else float(areas)

    def searched_area(self, direction: Any) -> Any:
        """Area in square degrees of all that is denser than the sky at a true direction.

        Half of the cell that holds it, and of those of equal density, is included, so the error is
        at most half of that cell and vanishes on average.

        Arguments:
            direction: Unit vector (3,) or several (N, 3), in the frame of the map: where that was
                made with a rotation R, the labels rotated too, `R @ label.numpy()` or
                `labels.numpy() @ R.T` of tensors.

        Returns:
            A float, or an array (N,).

        Raises:
            ValueError: If `direction` is no unit vector.
        """
        found = self._levels[1][self.cell_at(direction)] * _SQUARE_DEGREE
        return found if found.ndim else float(found)

    def searched_probability(self, direction: Any) -> Any:
        """Probability of all that is denser than the sky at a true direction, in [0, 1].

        It is the credible level at which the region reaches that direction: uniform over events
        where the posterior is calibrated. Arguments (directions in the frame of the map, so
        `R @ label.numpy()` after a rotation), returns and halves as of `searched_area`.
        """
        found = self.levels[self.cell_at(direction)]
        return found if found.ndim else float(found)

    def cone_probability(self, direction: Any, radius: float) -> Any:
        """Probability within `radius` degrees of a direction.

        Cells on the rim are divided until each carries less than 1e-7, with constant density
        inside a cell of the map; from there the centre decides.

        Arguments:
            direction: Axis of the cone, a unit vector (3,) or several (N, 3), in the map's frame:
                equatorial where that was made with a rotation.
            radius: Opening half-angle in degrees, in [0, 180].

        Returns:
            A float, or an array (N,).

        Raises:
            ValueError: If `direction` is no unit vector or `radius` is out of range.
        """
        vectors = cells.directions(direction)
        if not 0 <= radius <= 180:
            raise ValueError(f"Expected radius in degrees in [0, 180]; got {radius}.")
        found = [
            regions.mass_in_cone(self._start, self.order, self.density, axis, np.deg2rad(radius))
            for axis in vectors.reshape(-1, 3)
        ]
        return np.array(found) if vectors.ndim > 1 else found[0]

    def rasterize(self, nside: int, *, nest: bool = False, density: bool = False) -> np.ndarray:
        """Probability per pixel of a fixed grid; its sum is 1.

        Finer cells are added up, coarser ones shared out equally.

        Arguments:
            nside: A power of two up to 8192.
            nest: Whether pixels are in nested order, instead of ring order as healpy's default.
            density: Whether to return the mean density per steradian instead.

        Returns:
            Float64 of shape (12 nside²,).

        Raises:
            ValueError: If `nside` is no power of two or too large.
        """
        level = cells.check_nside(nside)
        values, _ = regions.fixed_pixels(self.order, self.pixel, self.probability, level)
        values = values / cells.area(level) if density else values
        return values if nest else values[cells.ring_to_nested(nside)]

    def coarsen(self, order: int) -> SkyMap:
        """The map with cells finer than `order` merged into cells of that order.

        Raises:
            ValueError: If `order` is not in 0 to 29.
        """
        if order not in range(cells.MAX_ORDER + 1):
            raise ValueError(f"Expected an order from 0 to {cells.MAX_ORDER}; got {order}.")
        coarse = np.minimum(self.order, order)
        pixel = np.right_shift(self.pixel, 2 * (self.order - coarse))
        start = cells.first(coarse, pixel)
        heads = np.flatnonzero(np.diff(start, prepend=-1))
        density = np.add.reduceat(self.probability, heads) / cells.area(coarse[heads])
        return replace(self, order=coarse[heads], pixel=pixel[heads], density=density)

    def write(
        self,
        path: Any,
        *,
        nside: int | None = None,
        nest: bool = False,
        name: str | None = None,
        time: Any = None,
        origin: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the map as FITS: multi-order, or flat with `nside` or where the map is flat.

        A multi-order file holds UNIQ and PROBDENSITY per steradian, as ligo.skymap, mhealpy,
        astropy-healpix and Aladin read it; it is equatorial by convention. A flat file holds PROB
        per pixel, as `healpy.read_map` reads it. The file appears complete or not at all.

        Arguments:
            path: Where to; `*.multiorder.fits` and `*.fits` are usual, with `.gz` compressed.
            nside: Of a flat file, a power of two. By default the file is multi-order, but flat
                where all cells are of one size and the name has no `.multiorder`.
            nest: Whether the flat file is in nested order.
            name: Of the event, OBJECT.
            time: Of the event, DATE-OBS and MJD-OBS: an astropy Time or what it takes (UTC).
            origin: Who made the map, ORIGIN.
            overwrite: Whether an existing file is replaced.

        Raises:
            ValueError: If a multi-order map is not equatorial, or an argument does not fit.
            FileExistsError: If there is a file and `overwrite` is not set.
        """
        cards = fits.header_cards(name, time, origin)
        even = self.order.min() == self.order.max()
        if nside is None and even and ".multiorder" not in Path(path).name:
            nside = 1 << int(self.order[0])
        if nside is not None:
            values = self.rasterize(nside, nest=nest)
            fits.write_flat(path, values, nest, self.frame, cards, overwrite)
            return
        if self.frame != "C":
            raise ValueError(
                f"Expected an equatorial map for a multi-order file; got frame {self.frame!r}. "
                "Make the map with rotation= to equatorial (galactic_rotation, "
                "detector_rotation), or give nside= for a flat file."
            )
        fits.write_multiorder(path, self.order, self.pixel, self.density, cards, overwrite)

    def plot(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the whole sky; options as of `flowpost.plots.plot_skymap`.

        A `truth` is in the frame of the map: `R @ label.numpy()` after a rotation.
        """
        from flowpost.plots.skymap import plot_skymap

        return plot_skymap(self, ax, **options)

    def plot_zoom(self, ax: Axes | None = None, **options: Any) -> Axes:
        """Draw the surroundings of the maximum; options as of `flowpost.plots.plot_zoom`.

        A `truth` is in the frame of the map: `R @ label.numpy()` after a rotation.
        """
        from flowpost.plots.skymap import plot_zoom

        return plot_zoom(self, ax, **options)

    def __str__(self) -> str:
        low, high = int(self.order.min()), int(self.order.max())
        kind = f"nside {1 << low}" if low == high else f"orders {low} to {high}"
        source = f" from {self.evaluations} densities" if self.evaluations else ""
        lines = [
            f"sky map of {len(self.order)} cells, {kind}, {FRAMES[self.frame]}",
            *(f"  {100 * p:.0f} % area      {show_area(self.area(p))}" for p in (0.5, 0.9)),
            f"  densest at     {show_direction(self.maximum, self.frame)}",
            f"  integral       {self.integral:.5f} before normalisation{source}",
        ]
        return "\n".join(lines)

    __repr__ = __str__
