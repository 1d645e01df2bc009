"""A progress bar that can be turned off."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ._checks import require

__all__ = ["progress_bar"]


class _Silent:
    def update(self, n: int) -> None:
        """Show nothing."""


@contextmanager
def progress_bar(total: int, name: str, shown: bool) -> Iterator[Any]:
    """A bar of `total` events, whose `update(n)` moves it by n; silent unless shown.

    Raises:
        ImportError: If it is to be shown and tqdm is not installed.
    """
    if not shown:
        yield _Silent()
        return
    with require("tqdm.auto", "train").tqdm(total=total, desc=name, unit="event") as bar:
        yield bar
