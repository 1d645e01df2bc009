"""A report on one page: tables and the pictures of a folder, in a single HTML file."""

from __future__ import annotations

import base64
import html
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

__all__ = ["format_table", "write_report"]

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem;"
    "color:#222}table{border-collapse:collapse;margin:1rem 0}td,th{padding:.3rem .8rem;"
    "text-align:right;border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}"
    "img{max-width:100%}figure{margin:2rem 0}figcaption{color:#666}"
)

Table = Sequence[Mapping[str, str]]


def _columns(rows: Table) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row))


def format_table(rows: Table) -> str:
    """Rows of named cells as aligned text.

    Example:
        >>> print(format_table([{"head": "mse", "NLL": "1.2"}, {"head": "spline", "NLL": "0.9"}]))
        head    NLL
        mse     1.2
        spline  0.9
    """
    names = _columns(rows)
    cells = [names, *([row.get(n, "") for n in names] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in cells
    )


def _html_table(rows: Table) -> str:
    names = _columns(rows)
    head = "".join(f"<th>{html.escape(n)}</th>" for n in names)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(row.get(n, ''))}</td>" for n in names) + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def write_report(folder: str | os.PathLike[str], title: str, tables: Mapping[str, Table]) -> str:
    """Write `report.html` with the tables and every PNG of the folder, and return the tables' text.

    Arguments:
        folder: Where the pictures lie and the page is written.
        title: Heading of the page.
        tables: Rows of named cells under each heading.

    Raises:
        ValueError: If the folder does not exist.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"Expected a folder at {folder}; there is none. Make it first.")
    parts = [f"<h1>{html.escape(title)}</h1>"]
    text = []
    for heading, rows in tables.items():
        parts.append(f"<h2>{html.escape(heading)}</h2>{_html_table(rows)}")
        text.append(f"{heading}\n{format_table(rows)}")
    for picture in sorted(folder.glob("*.png")):
        data = base64.b64encode(picture.read_bytes()).decode()
        name = html.escape(picture.stem.replace("_", " "))
        parts.append(
            f'<figure><img alt="{name}" src="data:image/png;base64,{data}">'
            f"<figcaption>{name}</figcaption></figure>"
        )
    page = (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f"<style>{_STYLE}</style>{''.join(parts)}</html>\n"
    )
    (folder / "report.html").write_text(page, encoding="utf-8")
    return "\n\n".join([*text, f"report: {folder / 'report.html'}"])
