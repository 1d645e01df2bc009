"""Sizes in a description, refused where the file has too few numbers or tensors for them.

A model is sketched without memory, but loops and lists grow with the sizes in its description: they
are bounded here by what the file holds, before any part is built.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .._checks import check_positive_int
from ..likelihood import with_latents
from ..spaces import Real, Space, space_from_config
from .describe import GENERATOR, INNER, SUMMARY

__all__ = ["check_sizes"]

# pairs of coordinates without a parameter for each, levels of a description, dimensions of an array
_MOST_PAIRS, _MOST_NESTED, _MOST_DIMENSIONS = 2**21, 100, 64
# spline layers of the heads within likelihoods and latents
_LAYERS = 2
_MASKED = ("layers", "depth", "hidden")


def check_sizes(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> dict[str, Space]:
    """The spaces of a description: of the head, and of likelihood, its data and latents, if any.

    Raises:
        ValueError: If a size is larger than the file bears out.
    """
    elements, spaces = sum(t.numel() for t in tensors.values()), dict[str, Space]()
    if config["kind"] == GENERATOR:
        _check_likelihood(config["likelihood"], "likelihood", spaces, tensors, elements)
        return spaces
    head, encoder = config["head"], config.get("encoder") or {}
    for options in (encoder, encoder.get("encoder") or {}):
        _check_repeats(options, tensors)
    if config["kind"] == SUMMARY:
        return {}
    spaces["head"] = _space(head["space"], elements)
    layers = check_positive_int(head["layers"], "layers", minimum=0)
    _check_pairs(spaces["head"], head["flow"], layers, elements)
    _check_draws(config.get("calibrator"))
    likelihood, latent = config.get("likelihood"), config.get("latent")
    if latent is not None:
        spaces["latent"] = _space(latent["space"], elements)
        values = _space(Real(latent["size"]).config(), elements, "latents")
        _check_pairs(values, latent["flow"], _LAYERS, elements)
    if likelihood is not None:
        _check_likelihood(likelihood, "likelihood", spaces, tensors, elements)
        _check_agreement(spaces, latent)
    return spaces


def _check_likelihood(
    config: Mapping[str, Any],
    at: str,
    spaces: dict[str, Space],
    tensors: Mapping[str, Tensor],
    elements: int,
) -> None:
    """Refuse sizes in the description of a likelihood, and add its spaces at its place in it."""
    kind = config["type"]
    for part, known in INNER.get(kind, {}).items():
        if config[part]["type"] not in known:
            raise ValueError(
                f"Expected {part} as a {' or '.join(known)}; got {str(config[part]['type'])[:80]}"
            )
        _check_likelihood(config[part], f"{at}.{part}", spaces, tensors, elements)
    if kind == "TwoStep":
        _check_groups(config["groups"]["sizes"], elements)
        spaces[at] = spaces[f"{at}.first"]
        return
    spaces[at] = _space(config["space"], elements)
    if kind == "Student":
        wanted = spaces[f"{at}.teacher"]
        if spaces[at] != wanted:
            raise ValueError(f"Expected a student over {str(wanted)[:200]}, as its teacher")
        own = {k: config[k] for k in ("hidden", "depth") if config[k] is not None}
        space = spaces[f"{at}.teacher.data"]
        _check_masked({**config["teacher"], **own}, space, tensors, elements)
        return
    # a user's decoder has layers of its own
    if kind != "PoissonCounts" or "decoder" not in config:
        _check_repeats(config, tensors)
    if "data" in config:
        spaces[f"{at}.data"] = space = _space(config["data"], elements, "data columns")
        if kind == "Teacher":
            _check_masked(config, space, tensors, elements)
        else:
            _check_pairs(space, config["flow"], _LAYERS, elements)
    if "shape" in config:
        _check_cells(config["shape"], elements)
    if len(config.get("sensors") or []) > elements:
        raise ValueError(f"Expected at most {elements} sensors; got {len(config['sensors'])}")


def _space(config: Any, elements: int, what: str = "label columns") -> Space:
    """A space with no more columns than there are numbers."""
    columns, rest = 0.0, [(config, 0)]
    while rest:
        item, depth = rest.pop()
        if depth > _MOST_NESTED:
            raise ValueError(f"Expected a description of at most {_MOST_NESTED} levels; got more")
        if isinstance(item, dict):
            columns += abs(float(item.get("size") or 0))
            item = list(item.values())
        rest += [(part, depth + 1) for part in item] if isinstance(item, list) else []
    if columns > elements:
        raise ValueError(f"Expected at most {elements} {what}; got {columns:g}")
    return space_from_config(config)


def _check_agreement(spaces: Mapping[str, Space], latent: Mapping[str, Any] | None) -> None:
    """Refuse other labels than those of the head, before networks that read them are built."""
    wanted = {"likelihood": spaces["head"]}
    if latent is not None:
        wanted["latent"] = spaces["head"]
        wanted["likelihood"] = with_latents(spaces["head"], latent["size"])
    for name, space in wanted.items():
        if spaces[name] != space:
            raise ValueError(f"Expected the {name} over {space!r}; got {str(spaces[name])[:200]}")


def _check_pairs(space: Space, flow: Any, layers: int, elements: int) -> None:
    """Refuse a flow with more pairs of coordinates than its parameters may be."""
    if flow == "spline" and layers:
        pairs, most = layers * space.dof * space.feature_size, elements
    else:
        pairs, most = space.dof * (space.dof - 1) // 2, max(elements, _MOST_PAIRS)
    if pairs > most:
        raise ValueError(f"Expected at most {most} pairs of coordinates; got {pairs}")


def _check_masked(
    options: Mapping[str, Any], space: Space, tensors: Mapping[str, Tensor], elements: int
) -> None:
    """Refuse masked flows with more layers than tensors, or more weights than numbers."""
    layers, depth, hidden = (check_positive_int(options[k], k) for k in _MASKED)
    if layers * depth > len(tensors):
        raise ValueError(f"Expected at most {len(tensors)} hidden layers; got {layers * depth}")
    # of the first hidden layers alone
    weights = layers * hidden * space.dof
    if weights > elements:
        raise ValueError(f"Expected at most {elements} weights of masked networks; got {weights}")


def _check_groups(sizes: Any, elements: int) -> None:
    """Refuse groups of more values than there are numbers."""
    values = sum(check_positive_int(n, "a group's size", minimum=2) for n in sizes)
    if values > elements:
        raise ValueError(f"Expected groups of at most {elements} values; got {values}")


def _check_cells(shape: Any, elements: int) -> None:
    """Refuse counts of more cells than there are numbers."""
    # whole numbers first, for a product of other things may be as long as it likes
    if len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"Expected shape of at most {_MOST_DIMENSIONS} sizes; got {len(shape)}")
    cells = math.prod([check_positive_int(n, "shape") for n in shape])
    if cells > elements:
        raise ValueError(f"Expected shape of at most {elements} cells; got {cells}")


def _check_draws(calibrator: Mapping[str, Any] | None) -> None:
    """Refuse most draws that are no number of them."""
    if calibrator is not None and calibrator["max_draws"] is not None:
        draws = check_positive_int(calibrator["draws"], "draws")
        check_positive_int(calibrator["max_draws"], "max_draws", minimum=draws)


def _check_repeats(options: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Refuse more layers than there are tensors."""
    for name in {"layers", "blocks", "label_layers"} & set(options):
        if options[name] is not None and check_positive_int(options[name], name) > len(tensors):
            raise ValueError(f"Expected at most {len(tensors)} {name}; got {options[name]}")
