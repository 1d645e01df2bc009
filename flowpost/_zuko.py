"""The only importer of zuko, and where its global side effects are contained.

Importing zuko switches argument validation off and empties ``arg_constraints`` for every torch
distribution of the process. Here both are put back, and given to zuko's own
distributions only, which rely on them. A process that has imported zuko before keeps what it has.
"""

from __future__ import annotations

import sys

from torch.distributions import Distribution

__all__ = ["MonotonicRQSTransform"]


def _import_contained() -> None:
    if "zuko" in sys.modules:
        return
    validate, constraints = Distribution._validate_args, Distribution.__dict__["arg_constraints"]
    try:
        import zuko.distributions as zuko_distributions
        import zuko.mixtures as zuko_mixtures
    finally:
        Distribution._validate_args = validate
        Distribution.arg_constraints = constraints  # type: ignore[method-assign]
    for module in (zuko_distributions, zuko_mixtures):
        for item in vars(module).values():
            if isinstance(item, type) and item.__module__ == module.__name__:
                if "_validate_args" not in vars(item):
                    item._validate_args = False  # type: ignore[attr-defined]
                if "arg_constraints" not in vars(item):
                    item.arg_constraints = {}  # type: ignore[attr-defined]


_import_contained()

from zuko.transforms import MonotonicRQSTransform  # noqa: E402
