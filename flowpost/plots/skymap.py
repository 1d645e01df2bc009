"""Sky maps: the whole sky in Mollweide's projection, and the maximum in a gnomonic one.

Both show the sky as seen from inside the sphere: longitude (right ascension) increases to the left,
latitude (declination) upwards. Every image pixel looks its cell up in the map.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from flowpost.plots.legend import LEGEND, free_legend
from flowpost.plots.regions import check_levels
from flowpost.skymap.cells import directions
from flowpost.skymap.frames import show_area, show_direction
from flowpost.skymap.projections import (
    field_of,
    mollweide_pixels,
    mollweide_place,
    small_parts,
    tangent_frame,
    tangent_pixels,
)
from flowpost.skymap.result import SkyMap

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["plot_skymap", "plot_zoom"]

_SQUARE_DEGREE = (180 / np.pi) ** 2  # per steradian
_STYLES, _LINE, _TRUTH = ("solid", "dashed", "dotted", "dashdot"), "#202020", "#D55E00"
_SATURATED = 0.05  # credibility of the region that may exceed the colour scale
_LOWEST, _RANGE = 0.95, 100  # credibility where a logarithmic scale ends, ratio that calls for it
_WIDTH = 1600  # image pixels across the whole sky
_SMALL = 3.5  # degrees: parts that are smaller get a circle on the whole sky, not rims
_PIXELS, _FIELD = 501, 60.0  # of a gnomonic field, and its widest half-width in degrees
_NAMES = {
    "C": ("right ascension", "declination"),
    "G": ("Galactic longitude", "latitude"),
    "local": ("azimuth from +x to +y", "altitude"),
}
_ALONG = {
    "C": ("east", "north"),
    "G": ("along Galactic longitude", "along latitude"),
    "local": ("along azimuth, from +x to +y", "along altitude"),
}
_UNITS = (("deg", "°", 1), ("arcmin", "′", 60), ("arcsec", "″", 3600))
_CIRCLE: dict[str, Any] = {"marker": "o", "mfc": "none", "mec": _LINE, "mew": 0.8, "ms": 14}
_STAR = 16  # pixels of a gnomonic field either side of a star


def plot_skymap(
    sky: SkyMap,
    ax: Axes | None = None,
    *,
    truth: Any = None,
    levels: Sequence[float] = (0.5, 0.9),
    center: float = 0.0,
    cmap: str = "Blues",
    colorbar: bool = True,
) -> Axes:
    """Draw the whole sky with the rims of the credible regions.

    Longitude increases to the left. Cells finer than the image are averaged, so a narrow mode keeps
    its probability; parts of regions within 3.5° get a circle in place of their rims. The colour
    scale ends where the densest 5 % of the probability begin, and is logarithmic where modes of
    very different width need it.

    Arguments:
        sky: The map.
        ax: Where to draw, of `projection="mollweide"`; by default a new figure.
        truth: True direction, a unit vector (3,) in the frame of the map: `R @ label.numpy()` where
            that was made with a rotation R. The legend gives its credible level.
        levels: Credibilities in (0, 1), at most 4.
        center: Longitude in the middle, in degrees; 180 keeps a region across 180° in one piece.
        cmap: Colour map of the density.
        colorbar: Whether to draw a colour bar.

    Returns:
        The axes.

    Raises:
        ValueError: If `ax` has another projection, or a level is not in (0, 1).
    """
    from matplotlib.image import AxesImage

    ax = _mollweide(ax)
    levels = _levels(levels)
    coarse = sky.coarsen(8)  # 0.23°, the size of an image pixel
    x, y, inside, vectors = mollweide_pixels(_WIDTH, center)
    cell = np.zeros(inside.shape, dtype=np.int64)
    cell[inside] = coarse.cell_at(vectors)
    shown = np.ma.array(coarse.density[cell] / _SQUARE_DEGREE, mask=~inside)
    image = AxesImage(ax, extent=(0, 1, 0, 1), transform=ax.transAxes, origin="lower", cmap=cmap)
    image.set(data=shown, norm=_scale(coarse, 1, log=True), zorder=0.5)
    ax.add_image(image)
    image.set_clip_path(ax.patch)
    level = np.ma.array(coarse.levels[cell], mask=~inside)
    for spot, reach in small_parts(coarse, max(levels), _SMALL):
        ax.plot(*mollweide_place(spot, center), clip_on=False, **_CIRCLE)
        near = vectors @ spot > np.cos(np.radians(1.5 * reach))
        level[inside] = np.where(near, 1.0, level[inside])  # no rims there
    steps = _steps(coarse, levels, 360 / _WIDTH)
    handles = _contours(ax, x, y, level, steps, sky, transform=ax.transAxes)
    if truth is not None:
        star = _star(sky, truth) | {"ms": 8, "clip_on": False}
        handles += ax.plot(*mollweide_place(_one(truth), center), **star)
    _graticule(ax, center, sky.frame)
    if colorbar:
        _colorbar(ax, image, "deg", orientation="horizontal", shrink=0.5, pad=0.02, aspect=30)
    ax.legend(handles=handles, loc="upper right", bbox_to_anchor=(1.06, 1.1), **LEGEND)
    return ax


def plot_zoom(
    sky: SkyMap,
    ax: Axes | None = None,
    *,
    truth: Any = None,
    levels: Sequence[float] = (0.5, 0.9),
    center: Any = None,
    radius: float | None = None,
    cmap: str = "Blues",
    colorbar: bool = True,
) -> Axes:
    """Draw the surroundings of the maximum in a gnomonic projection, east to the left.

    In a local frame the axes are along azimuth, counted from +x to +y, and altitude. By default the
    field holds that part of the largest credible region that hangs together with the maximum, but
    for a hundredth of its probability: other modes further away than its own size, and a few cells
    far out, are left out. The legend is in a corner that is free of regions, or below.

    Arguments:
        sky: The map.
        ax: Where to draw; by default a new figure.
        truth: True direction, a unit vector (3,) in the frame of the map: `R @ label.numpy()` where
            that was made with a rotation R. The legend gives its credible level, or its distance
            from the middle where it is outside the field.
        levels: Credibilities in (0, 1), at most 4.
        center: Unit vector (3,) in the middle; by default that of the region.
        radius: Half-width of the field in degrees, at most 60; by default that of the region.
        cmap: Colour map of the density.
        colorbar: Whether to draw a colour bar.

    Returns:
        The axes.

    Raises:
        ValueError: If a level is not in (0, 1), or `radius` not in (0, 60].
    """
    levels = _levels(levels)
    ax = _axes("rectilinear", (5.4, 4.6)) if ax is None else ax
    middle, reach = _field(sky, max(levels), center, radius)
    unit, sign, scale = _unit(reach)
    frame = tangent_frame(middle)
    half = np.tan(np.radians(reach))
    x, y, vectors = tangent_pixels(frame, half, _PIXELS)
    cell = sky.cell_at(vectors).reshape(x.shape)
    image = ax.imshow(
        sky.density[cell] / (_SQUARE_DEGREE * scale**2),
        extent=(-half, half, -half, half),
        origin="lower",
        cmap=cmap,
        norm=_scale(sky, scale, log=False),
        interpolation="nearest",
    )
    steps = _steps(sky, levels, 2 * np.degrees(half) / _PIXELS)
    handles = _contours(ax, x, y, np.ma.array(sky.levels[cell]), steps, sky)
    handles += _star_in_plane(ax, sky, truth, frame, half)
    ax.set(xlim=(half, -half), ylim=(-half, half))
    _offsets(ax, reach, scale, sign, sky.frame)
    place = show_direction(middle, sky.frame, max(2, int(np.ceil(-np.log10(reach))) + 2))
    ax.set_title(f"centre {place}", fontsize="medium")
    if colorbar:
        _colorbar(ax, image, unit, shrink=0.85)
    free_legend(ax, handles, _taken(sky.levels[cell] <= max(levels), ax, handles, half))
    return ax


def _unit(degrees: float) -> tuple[str, str, int]:
    """Name, sign, and number per degree of the unit that suits an angle."""
    return next((u for u in _UNITS if degrees * u[2] >= 1), _UNITS[-1])


def _axes(projection: str, size: tuple[float, float]) -> Any:
    import matplotlib.pyplot as plt

    return plt.subplots(figsize=size, layout="constrained", subplot_kw={"projection": projection})[
        1
    ]


def _mollweide(ax: Any) -> Any:
    if ax is not None and ax.name != "mollweide":
        raise ValueError(
            f"Expected axes of projection 'mollweide'; got {ax.name!r}. Make them by "
            'plt.subplots(subplot_kw={"projection": "mollweide"}).'
        )
    return _axes("mollweide", (8, 5)) if ax is None else ax


def _levels(levels: Sequence[float]) -> tuple[float, ...]:
    values = check_levels(levels)
    if len(values) > len(_STYLES):
        raise ValueError(f"Expected at most {len(_STYLES)} levels in one plot; got {len(values)}.")
    return values


def _one(direction: Any) -> np.ndarray:
    if (vector := directions(direction)).shape != (3,):
        raise ValueError(f"Expected one direction of shape (3,); got {vector.shape}.")
    return vector


def _field(sky: SkyMap, level: float, center: Any, radius: float | None) -> tuple[Any, float]:
    if radius is not None and not 0 < radius <= _FIELD:
        raise ValueError(
            f"Expected radius in degrees in (0, {_FIELD:.0f}]; got {radius}. Use plot_skymap."
        )
    middle, reach = field_of(sky, level, _FIELD, None if center is None else _one(center))
    return middle, reach if radius is None else radius


def _graticule(ax: Any, center: float, frame: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter

    names = _NAMES[frame]
    for axis, at, label in (
        (ax.xaxis, (-120, -60, 0, 60, 120), lambda x, _: f"{(center - np.degrees(x)) % 360:.0f}°"),
        (ax.yaxis, (-60, -30, 0, 30, 60), lambda y, _: _minus(f"{np.degrees(y):.0f}°")),
    ):
        axis.set_major_locator(FixedLocator(np.radians(at).tolist()))
        axis.set_major_formatter(FuncFormatter(label))
    ax.grid(lw=0.4, color="#888888", alpha=0.6)
    ax.tick_params(labelsize="small", colors="#555555")
    ax.set_xlabel(f"{names[0]} (increases to the left)", fontsize="small")
    ax.set_ylabel(names[1], fontsize="small")


def _minus(text: str) -> str:
    return text.replace("-", "−")


def _offsets(ax: Any, reach: float, scale: float, sign: str, frame: str) -> None:
    """Ticks at round angles from the centre, where the tangent plane stretches them."""
    from matplotlib.ticker import MaxNLocator

    angles = np.array(MaxNLocator(7).tick_values(-reach * scale, reach * scale))
    angles = angles[np.abs(angles) <= reach * scale]
    at = np.tan(np.radians(np.array(angles) / scale))
    labels = [_minus(f"{a:g}") for a in angles]
    ax.set_xticks(at, labels)
    ax.set_yticks(at, labels)
    across, up = _ALONG[frame]
    ax.set(xlabel=f"offset {across} [{sign}]", ylabel=f"offset {up} [{sign}]")


def _scale(sky: SkyMap, unit: float, log: bool) -> Any:
    """Colour scale of the density, in square degrees / unit², saturated in the densest 5 %.

    With `log` it is logarithmic where a linear one would show the narrowest mode alone.
    """
    from matplotlib.colors import LogNorm, Normalize

    ends = [sky.density[sky.levels >= p].max(initial=0) for p in (_SATURATED, _LOWEST)]
    top, low = np.array(ends) / (_SQUARE_DEGREE * unit**2)
    return LogNorm(low, top) if log and top > _RANGE * low > 0 else Normalize(0, top)


def _steps(sky: SkyMap, levels: Sequence[float], pixel: float) -> dict[float, float]:
    """Size of the cells near each level, in image pixels of so many degrees."""
    sizes = {}
    for p in sorted(levels):
        area = sky.cell_area[np.abs(sky.levels - p) < 0.05]
        sizes[p] = float(np.degrees(np.sqrt(np.median(area)))) / pixel if len(area) else 0.0
    return sizes


def _contours(
    ax: Any, x: Any, y: Any, level: Any, steps: dict[float, float], sky: SkyMap, **options: Any
) -> list[Any]:
    """Rims of the regions, without the steps of the cells, and their entries in a legend."""
    from matplotlib.lines import Line2D
    from scipy.ndimage import gaussian_filter

    inside = (~np.ma.getmaskarray(level)).astype(float)
    handles = []
    for (p, size), style in zip(steps.items(), _STYLES, strict=False):
        width = min(0.7 * size, _PIXELS / 15)
        total = gaussian_filter(level.data * inside, width, truncate=3)
        weight = gaussian_filter(inside, width, truncate=3)
        smooth = np.ma.array(total / np.maximum(weight, 1e-9), mask=level.mask)
        line = {"colors": _LINE, "linewidths": 0.9, "linestyles": style}
        if smooth.min() < p < smooth.max():
            ax.contour(x, y, smooth, levels=[p], **line, **options)
        text = f"{100 * p:g} %: {show_area(sky.area(p))}"
        handles.append(Line2D([], [], color=_LINE, lw=0.9, ls=style, label=text))
    return handles


def _star(sky: SkyMap, truth: Any) -> dict[str, Any]:
    text = f"truth, at {100 * sky.searched_probability(_one(truth)):.1f} %"
    edge = {"mfc": _TRUTH, "mec": "white", "mew": 0.7}
    return {"marker": "*", "ms": 11, "ls": "", "label": text, **edge}


def _star_in_plane(ax: Any, sky: SkyMap, truth: Any, frame: np.ndarray, half: float) -> list[Any]:
    """The truth and its entry in a legend; outside the field the entry says how far it is."""
    if truth is None:
        return []
    across, up, ahead = frame @ _one(truth)
    if ahead > 0 and max(abs(across), abs(up)) <= half * ahead:
        return list(ax.plot(across / ahead, up / ahead, **_star(sky, truth)))
    away = np.degrees(np.arctan2(np.hypot(across, up), ahead))
    _, sign, scale = _unit(away)
    return list(ax.plot([], [], ls="", label=f"truth, {away * scale:.3g}{sign} away"))


def _taken(region: np.ndarray, ax: Any, handles: list[Any], half: float) -> np.ndarray:
    """Pixels of a gnomonic field that hold regions or a star, where no legend may be."""
    taken = region[:, ::-1].copy()  # east is left
    for line in handles:
        for point in line.get_xydata() if line.axes is ax else ():
            place = np.array([-1, 1]) * point / half
            column, row = ((place + 1) / 2 * (_PIXELS - 1)).astype(int)
            taken[max(row - _STAR, 0) : row + _STAR, max(column - _STAR, 0) : column + _STAR] = True
    return taken


def _colorbar(ax: Any, image: Any, unit: str, **options: Any) -> None:
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import MaxNLocator

    over = bool(image.get_array().max() > image.norm.vmax)
    bar = ax.figure.colorbar(image, ax=ax, extend="max" if over else "neither", **options)
    if not isinstance(image.norm, LogNorm):
        bar.locator = MaxNLocator(5)
        bar.formatter.set_powerlimits((-2, 3))
    bar.set_label(f"probability per {unit}²")
