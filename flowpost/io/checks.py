"""Checks of what is saved and loaded: modules of the user, names, shapes and values of tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .describe import (
    CONDITIONED,
    ENCODERS,
    GENERATOR,
    KINDS,
    LIKELIHOODS,
    REMEDY,
    SUMMARY,
    USERS,
    Parts,
)

__all__ = [
    "check_fit",
    "check_given",
    "check_recalibrator",
    "check_tensors",
    "check_values",
    "owner",
]

_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def check_given(config: Mapping[str, Any], given: Mapping[str, Any], path: Path) -> None:
    """Refuse parts of unknown type, and other modules of the user than the description has.

    Raises:
        ValueError: If a module is missing, or one is given where none belongs.
    """
    kind = config.get("kind")
    if kind not in KINDS:
        raise ValueError(
            f"Expected kind as {', '.join(KINDS[:-1])} or {KINDS[-1]} in {path}; got {kind!r}. "
            f"{REMEDY}."
        )
    for name, module in given.items():
        if kind == "PosteriorHead" and module is not None:
            raise ValueError(f"{path} holds a head alone; load it without {name}=.")
    alone = kind in ("PosteriorHead", GENERATOR)
    found = {"encoder": None if alone else config.get("encoder")}
    if kind not in ("PosteriorHead", "PosteriorModel", SUMMARY):
        likelihood = config.get("likelihood")
        own = likelihood.get("type") if isinstance(likelihood, dict) else likelihood
        if own not in LIKELIHOODS:
            raise ValueError(
                f"Expected a likelihood of type {', '.join(LIKELIHOODS)} in {path}; got {own!r}. "
                "The file may come from a later flowpost."
            )
        found["decoder"] = config["likelihood"].get("decoder")
        found["data"] = None if alone else config.get("data")
    needed = {}
    for name, module in given.items():
        about = found.get(name)
        if about is not None and _is_custom(name, about, path):
            needed[name] = str(about.get("class"))
        elif about is None and module is not None:
            raise ValueError(f"The model in {path} has no {_noun(name)}; load it without {name}=.")
    missing = [name for name in needed if given[name] is None]
    if missing:
        call = ", ".join(f"{name}={kind.split('.')[-1]}(…)" for name, kind in needed.items())
        raise ValueError(
            f"The model in {path} has {USERS[missing[0]]} of your own, {needed[missing[0]]}. Load "
            f"it with flowpost.load({str(path)!r}, {call})."
        )


def _is_custom(name: str, about: Any, path: Path) -> bool:
    """Whether a part is a module of the user; refuses what is neither that nor ours."""
    if not isinstance(about, dict):
        raise ValueError(
            f"Expected the description of {USERS[name]} in {path}; got {about!r}. {REMEDY}."
        )
    kind = about.get("type")
    if name == "encoder" and kind == CONDITIONED:
        inner = about.get("encoder")
        own = inner is None or (isinstance(inner, dict) and inner.get("type") in ENCODERS)
        kind = CONDITIONED if own else f"{CONDITIONED} of {str(inner)[:80]}"
    known = [*ENCODERS, CONDITIONED] if name == "encoder" else []
    if kind != "custom" and kind not in known:
        raise ValueError(f"Expected {USERS[name]} of flowpost in {path}; got {kind!r}. {REMEDY}.")
    return kind == "custom"


def _noun(name: str) -> str:
    return USERS[name].partition(" ")[2]


def owner(parts: Parts, name: str) -> str:
    """What of a model a user builds again, where a tensor does not fit."""
    for user, prefix in parts.users.items():
        if name.startswith(prefix):
            return _noun(user)
    return "encoder" if set(parts.own) <= {"head", "encoder"} else "model"


def check_fit(
    parts: Parts, own: Mapping[str, Tensor], saved: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse other names, types or shapes than those of a model.

    Raises:
        ValueError: If one differs; the error names the tensor.
    """
    check_tensors(own, saved, lambda name: owner(parts, name), path)


def check_tensors(
    own: Mapping[str, Tensor],
    saved: Mapping[str, Tensor],
    noun: Callable[[str], str],
    path: Path,
) -> None:
    """Refuse other names, types or shapes than wanted; `noun` is what a tensor is part of.

    Raises:
        ValueError: If one differs; the error names the tensor.
    """
    for name, tensor in own.items():
        if name not in saved:
            raise ValueError(
                f"Expected tensor {name!r} in {path}; it is not there. Is this the "
                f"{noun(name)} that was saved?"
            )
        remedy = f"Build the {noun(name)} as it was saved."
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, saved[name])]
        if kinds[0] != kinds[1] or (
            kinds[0] == (False, False) and saved[name].dtype != tensor.dtype
        ):
            raise ValueError(
                f"Expected tensor {name!r} of type {tensor.dtype}; got {saved[name].dtype} in "
                f"{path}. {remedy}"
            )
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"Expected tensor {name!r} of shape {tuple(tensor.shape)}; got "
                f"{tuple(saved[name].shape)} in {path}. {remedy}"
            )
    extra = sorted(set(saved) - set(own))
    if extra:
        raise ValueError(
            f"Tensor {extra[0]!r} in {path} has no place in this model"
            + (f" (nor have {len(extra) - 1} others)" if len(extra) > 1 else "")
            + f". Build the {noun(extra[0])} as it was saved."
        )


def check_values(
    parts: Parts, parameters: set[str], tensors: Mapping[str, Tensor], path: Path
) -> None:
    """Refuse what cannot be evaluated; buffers of a user's modules are their own business.

    Arguments:
        parts: The model, of which tensors are not read.
        parameters: Names of its parameters.
        tensors: Its tensors.
        path: Their file, for errors.

    Raises:
        ValueError: If types differ within a part, or a value is not finite, or not one that its
            tensor may have; the error names the tensor.
    """
    users = tuple(parts.users.values())
    ours = {k: t for k, t in tensors.items() if not k.startswith(users)}
    for part, prefix in parts.own.items():
        types = {t.dtype for k, t in ours.items() if k.startswith(prefix) and t.is_floating_point()}
        if len(types) > 1 or not types <= _FLOATS:
            raise ValueError(
                f"Expected one type of {part} tensors in {path}; got "
                f"{', '.join(sorted(map(str, types)))}. Give all one, as with model.float()."
            )
    _check_order(parts, tensors, path)
    held_out = _check_held_out(parts, tensors, path)
    for name, tensor in tensors.items():
        buffer_of_user = name not in ours and name not in parameters
        if tensor.dtype not in _FLOATS or buffer_of_user or name in held_out:
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Expected finite numbers in tensor {name!r} in {path}; got NaN or infinity. Train "
                "again, or save the model before it diverged."
            )
        whitening = name.rpartition(".")[2] in ("scale", "unit") and name in ours
        if whitening and not bool((tensor > 0).all()):
            raise ValueError(
                f"Expected positive numbers in tensor {name!r} in {path}; got "
                f"{tensor.min().item():g}. Fit the scale again, in a type that can hold it."
            )


def _check_order(parts: Parts, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse an order of grouped values that is none of the values of each group."""
    groups = getattr(parts.likelihood, "groups", None)
    if groups is None:
        return
    name = f"{parts.within}groups.order"
    found = [part.sort().values for part in tensors[name].split(groups.sizes)]
    if torch.cat(found).tolist() != list(range(groups.values)):
        raise ValueError(
            f"Expected each value once, among those of its group, in tensor {name!r} in {path}; "
            "got others. Fit the scales again."
        )


def _check_held_out(parts: Parts, tensors: Mapping[str, Tensor], path: Path) -> set[str]:
    """Check what a calibrator holds; returns the names of the scores, which may be infinite."""
    if parts.calibrator is None:
        return set()
    prefix, found = parts.outer.removesuffix("model."), {}
    for name, tensor in tensors.items():
        own = name.startswith(prefix) and not name.startswith(parts.outer)
        if own and tensor.is_floating_point() and tensor.dtype not in _FLOATS:
            raise ValueError(
                f"Expected tensor {name!r} in {path} in double precision; got {tensor.dtype}. "
                "Calibrate again."
            )
    edges = tensors[f"{prefix}edges"]
    if not bool((edges[1:] >= edges[:-1]).all()):
        raise ValueError(
            f"Expected increasing numbers in tensor {prefix + 'edges'!r} in {path}; got others. "
            "Calibrate again."
        )
    for name in (*parts.calibrator.statistics, "joint"):
        at, number_at = f"{prefix}scores_{name}", f"{prefix}counts_{name}"
        scores, counts = tensors[at], tensors[number_at].tolist()
        found[at] = len(scores)
        if bool(torch.isnan(scores).any()):
            raise ValueError(
                f"Expected numbers in tensor {at!r} in {path}; got NaN. Calibrate again."
            )
        if min(counts) < bool(len(scores)) or sum(counts) != len(scores):
            raise ValueError(
                f"Expected the number of held-out events of each bin in tensor {number_at!r} in "
                f"{path}, {len(scores)} in all; got {str(counts)[:80]}. Calibrate again."
            )
        if not all(_is_sorted(part) for part in scores.split(counts)):
            raise ValueError(
                f"Expected sorted scores in tensor {at!r} in {path}; got others. Calibrate again, "
                "in double precision."
            )
    *each, joint = found.values()
    if bool(joint) != (len(each) > 1 and bool(each[0])) or len({n > 0 for n in each}) > 1:
        raise ValueError(
            f"Expected held-out events of every statistic in {path}, and of all together where "
            f"there are several; got {found}. Calibrate again."
        )
    return set(found)


def _is_sorted(pairs: Tensor) -> bool:
    """Whether pairs (n, 2) are in lexicographic order."""
    a, b = pairs[:-1], pairs[1:]
    order = (a[:, 0] < b[:, 0]) | ((a[:, 0] == b[:, 0]) & (a[:, 1] <= b[:, 1]))
    return bool(order.all())


def check_recalibrator(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse maps that do not rise, and numbers that are not finite.

    Raises:
        ValueError: If there are some; the error names the tensor.
    """
    for name, tensor in tensors.items():
        remedy = f"in tensor {name!r} in {path}; got others. Recalibrate again."
        if tensor.is_complex() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"Expected finite numbers {remedy}")
        kind = name.rpartition("_")[2]
        rising = name == "events.edges" or kind in ("x", "y")
        if rising and not (tensor.ndim and bool((tensor.diff(dim=-1) > 0).all())):
            raise ValueError(f"Expected rising numbers {remedy}")
        if name in ("radius_x", "radius_y") and bool(tensor[..., :1].any()):
            raise ValueError(f"Expected radii from 0 on {remedy}")
        if (kind == "slope" and not bool((tensor > 0).all())) or (
            name == "held" and not bool((tensor >= 0).all() and tensor.any())
        ):
            raise ValueError(f"Expected positive numbers {remedy}")
