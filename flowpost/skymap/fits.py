"""Sky maps in FITS: multi-order tables of unique numbers, and flat maps of healpy's layout.

Sources:
    Multi-order sky maps (LIGO/Virgo/KAGRA Public Alerts User Guide)
    https://emfollow.docs.ligo.org/userguide/tutorial/multiorder_skymaps.html;
    healpy.write_map (the healpy developers) https://healpy.readthedocs.io
"""

from __future__ import annotations

import os
import tempfile
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from .._checks import require
from .cells import area, check_nside, from_uniq, ring_to_nested, to_uniq

__all__ = ["header_cards", "read_cells", "write_flat", "write_multiorder"]

Cards = dict[str, tuple[Any, str]]
_FRAMES = {
    "C": ("C", "CEL", "ICRS", "EQUATORIAL", "CELESTIAL", "RADEC", "EQ"),
    "G": ("G", "GAL", "GALACTIC"),
}
_ROW = 1024  # pixels per row of a flat table, as healpy writes it


def header_cards(name: str | None, time: Any, origin: str | None) -> Cards:
    """Optional header entries.

    Arguments:
        name: Of the event.
        time: Of the event, an astropy Time or what it takes (UTC).
        origin: Who made the map.

    Raises:
        ValueError: If a text does not fit into a header or the time is none.
    """
    from .. import __version__

    cards: Cards = {"CREATOR": (f"flowpost {__version__}", "Program that made this file")}
    for key, text, what in (("OBJECT", name, "name"), ("ORIGIN", origin, "origin")):
        if text is None:
            continue
        if not (isinstance(text, str) and text.isascii() and text.isprintable() and len(text) < 60):
            raise ValueError(
                f"Expected {what} as ASCII text of less than 60 letters; got {text!r}."
            )
        cards[key] = (text, "Event" if key == "OBJECT" else "Who made this map")
    if time is not None:
        try:
            when = require("astropy.time", "sky").Time(time).utc
            cards["DATE-OBS"] = (str(when.isot), "Time of the event, UTC")
            cards["MJD-OBS"] = (float(when.mjd), "Time of the event, modified Julian date")
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"Expected time as an astropy Time; got {time!r}. A number needs its format: "
                'astropy.time.Time(…, format="mjd").'
            ) from error
    return cards


def write_multiorder(
    path: Any,
    order: np.ndarray,
    pixel: np.ndarray,
    density: np.ndarray,
    cards: Cards,
    overwrite: bool,
) -> None:
    """Write equatorial cells (M,) and their density per steradian (M,) in ascending UNIQ order.

    Raises:
        FileExistsError: If there is a file and `overwrite` is not set.
    """
    uniq = to_uniq(order, pixel)
    rank = np.argsort(uniq)
    columns = [("UNIQ", "K", None, uniq[rank]), ("PROBDENSITY", "D", "sr-1", density[rank])]
    header: Cards = {
        "PIXTYPE": ("HEALPIX", "HEALPIX pixelisation"),
        "ORDERING": ("NUNIQ", "Pixel ordering scheme: RING, NESTED, or NUNIQ"),
        "COORDSYS": ("C", "Ecliptic, Galactic or Celestial (equatorial)"),
        "MOCORDER": (int(order.max()), "Order of the finest pixels"),
        "INDXSCHM": ("EXPLICIT", "Indexing: IMPLICIT or EXPLICIT"),
    }
    _write(path, columns, header | cards, overwrite)


def write_flat(
    path: Any, probability: np.ndarray, nest: bool, frame: str, cards: Cards, overwrite: bool
) -> None:
    """Write the probability per pixel (12 nside²,) as `healpy.write_map` lays it out.

    Raises:
        FileExistsError: If there is a file and `overwrite` is not set.
    """
    count = len(probability)
    wide = count >= _ROW
    values = probability.reshape(-1, _ROW) if wide else probability
    header: Cards = {
        "PIXTYPE": ("HEALPIX", "HEALPIX pixelisation"),
        "ORDERING": ("NESTED" if nest else "RING", "Pixel ordering scheme: RING or NESTED"),
        "NSIDE": (round((count / 12) ** 0.5), "Resolution parameter of HEALPIX"),
        "FIRSTPIX": (0, "First pixel # (0 based)"),
        "LASTPIX": (count - 1, "Last pixel # (0 based)"),
        "INDXSCHM": ("IMPLICIT", "Indexing: IMPLICIT or EXPLICIT"),
        "OBJECT": ("FULLSKY", "Sky coverage, either FULLSKY or PARTIAL"),
    }
    if frame in _FRAMES:
        header["COORDSYS"] = (frame, "Ecliptic, Galactic or Celestial (equatorial)")
    columns = [("PROB", f"{_ROW}D" if wide else "D", "pix-1", values)]
    _write(path, columns, header | cards, overwrite)


def _write(path: Any, columns: list[Any], header: Cards, overwrite: bool) -> None:
    fits = require("astropy.io.fits", "sky")
    target = Path(path)
    if target.exists() and not overwrite:
        raise FileExistsError(f"{target} exists. Give overwrite=True to replace it.")
    if not target.parent.is_dir():
        raise ValueError(f"Expected a folder {target.parent} to write into; there is none.")
    table = fits.BinTableHDU.from_columns(
        [fits.Column(name=n, format=f, unit=u, array=a) for n, f, u, a in columns]
    )
    for key, card in header.items():
        table.header[key] = card
    # a name that ends as the target's, since .gz at its end means compression
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        new = Path(work) / target.name
        fits.HDUList([fits.PrimaryHDU(), table]).writeto(new)
        if overwrite:
            os.replace(new, target)
            return
        try:
            os.link(new, target)  # unlike a rename, refuses a file that has come meanwhile
        except FileExistsError as error:
            raise FileExistsError(f"{target} exists. Give overwrite=True to replace it.") from error
        except OSError:  # a file system without hard links
            os.replace(new, target)


def read_cells(path: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, str]:
    """Orders, nested pixels, density per steradian (each (M,)) and frame of a map's file.

    Raises:
        ValueError: If there is no file, or it is no sky map.
    """
    fits = require("astropy.io.fits", "sky")
    if not Path(path).is_file():
        raise ValueError(f"Expected a sky map at {path}; there is no file.")
    try:
        with warnings.catch_warnings(), fits.open(path, memmap=False) as file:
            warnings.filterwarnings("error", message=".*truncated.*")
            table = next((h for h in file if isinstance(h, fits.BinTableHDU)), None)
            if table is None or "ORDERING" not in table.header:
                raise ValueError("no HEALPix table is in it")
            ordering = str(table.header["ORDERING"]).strip().upper()
            frame = _frame(table.header.get("COORDSYS"))
            if ordering == "NUNIQ":
                order, pixel = from_uniq(_column(table, "UNIQ"))
                density = _column(table, "PROBDENSITY") * _per_steradian(table, "PROBDENSITY")
            elif ordering in ("RING", "NESTED", "NEST"):
                order, pixel, density = _flat(table, nest=ordering != "RING")
            else:
                raise ValueError(f"ORDERING is {ordering!r}")
    except (OSError, ValueError, TypeError, KeyError, IndexError, UserWarning) as error:
        raise ValueError(
            f"Expected a HEALPix sky map in {path}: UNIQ and PROBDENSITY in ORDERING NUNIQ, or "
            f"PROB in RING or NESTED; got another file ({error})."
        ) from error
    return order, pixel, density, frame


def _flat(table: Any, nest: bool) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    names = [n for n in ("PROB", "PROBABILITY") if n in table.columns.names]
    if not names:
        raise ValueError(f"its columns are {table.columns.names}")
    if str(table.header.get("INDXSCHM", "IMPLICIT")).strip().upper() != "IMPLICIT":
        raise ValueError("it holds a part of the sky")
    values = _column(table, names[0]).astype(np.float64)
    nside = round((len(values) / 12) ** 0.5)
    if 12 * nside**2 != len(values):
        raise ValueError(f"{len(values)} pixels are no full sky")
    level = check_nside(nside)
    pixel = np.arange(len(values)) if nest else ring_to_nested(nside)
    order = np.full(len(values), level, dtype=np.int64)
    return order, pixel, values / area(level)


def _column(table: Any, name: str) -> np.ndarray:
    if name not in table.columns.names:
        raise ValueError(f"its columns are {table.columns.names}")
    values = np.asarray(table.data[name]).reshape(-1)
    if name == "UNIQ" and values.dtype.kind not in "iu":
        raise ValueError(f"UNIQ is of type {values.dtype}")
    return values.astype(np.int64 if name == "UNIQ" else np.float64)


def _per_steradian(table: Any, name: str) -> float:
    unit = table.columns[name].unit
    if unit is None:
        return 1.0
    return float(require("astropy.units", "sky").Unit(unit).to("sr-1"))


def _frame(text: Any) -> str:
    """ "C" or "G"; "local" where the file names none."""
    if text is None:
        return "local"
    for frame, names in _FRAMES.items():
        if str(text).strip().upper() in names:
            return frame
    raise ValueError(f"COORDSYS is {text!r}")
