"""Checks of what users pass in, once, at the public boundary: "Expected …; got …. <what to do>"."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "as_tensor",
    "central_levels",
    "check_finite",
    "check_levels",
    "check_positive_int",
    "check_shape",
    "require",
]


def as_tensor(value: Any, name: str, like: Tensor | None = None) -> Tensor:
    """Return `value` as a floating tensor.

    Arguments:
        value: A tensor, array or sequence of numbers.
        name: What the value is called in an error.
        like: A tensor whose device the result is put on; integers take its dtype.

    Raises:
        ValueError: If `value` cannot be read as real numbers.
    """
    try:
        array = isinstance(value, torch.Tensor) or hasattr(value, "__array__")
        # Python's numbers are double
        tensor = torch.as_tensor(
            value,
            dtype=None if array else torch.float64,
            device=None if like is None else like.device,
        )
    except (TypeError, ValueError, RuntimeError) as error:
        remedy = f"Convert it with torch.as_tensor first ({error})."
        if isinstance(value, Mapping):
            remedy = "Stack its values into one tensor."
            if "labels" in name:
                remedy = "Pack it, as a Product does: space.pack({…})."
        raise ValueError(
            f"Expected {name} as a tensor or array of numbers; got {type(value).__name__}. {remedy}"
        ) from error
    if tensor.is_complex():
        raise ValueError(f"Expected {name} as real numbers; got {tensor.dtype}.")
    if not tensor.is_floating_point():
        tensor = tensor.to(torch.get_default_dtype() if like is None else like.dtype)
    return tensor


def check_shape(value: Tensor, expected: Sequence[int | str], name: str, remedy: str = "") -> None:
    """Raise unless the shape of `value` is `expected`, where strings stand for any size.

    Raises:
        ValueError: If the number of dimensions or a fixed size differs.
    """
    shape = tuple(value.shape)
    fits = len(shape) == len(expected) and all(
        isinstance(e, str) or e == s for e, s in zip(expected, shape, strict=True)
    )
    if not fits:
        wanted = "(" + ", ".join(str(e) for e in expected) + ("," * (len(expected) == 1)) + ")"
        raise ValueError(f"Expected {name} of shape {wanted}; got {shape}. {remedy}".rstrip())


def check_finite(value: Tensor, name: str, remedy: str = "") -> None:
    """Raise if `value` holds NaN or infinity, naming the first offending index.

    Raises:
        ValueError: If any element is not finite.
    """
    finite = torch.isfinite(value)
    if bool(finite.all()):
        return
    bad = (~finite).nonzero()
    index = tuple(int(i) for i in bad[0])
    where = f"row {index[0]}" + "".join(f", column {i}" for i in index[1:]) if index else "it"
    raise ValueError(
        f"Expected finite {name}; got {value[index].item()} in {where} "
        f"({len(bad)} such of {value.numel()}). {remedy}".rstrip()
    )


def check_positive_int(value: Any, name: str, minimum: int = 1) -> int:
    """Return `value` as an int of at least `minimum`.

    Raises:
        ValueError: If it is not a whole number or too small.
    """
    try:
        whole = not isinstance(value, bool) and int(value) == value >= minimum
    except (TypeError, ValueError, OverflowError, RuntimeError):
        # None, NaN and infinity, text, several numbers
        whole = False
    if not whole:
        raise ValueError(f"Expected {name} as a whole number of at least {minimum}; got {value!r}.")
    return int(value)


def check_levels(levels: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return levels as a tensor (Q,).

    Raises:
        ValueError: If one is not in (0, 1).
    """
    p = as_tensor(levels, "levels").to(device, dtype).reshape(-1)
    if not bool(((p > 0) & (p < 1)).all()):
        raise ValueError(f"Expected levels between 0 and 1; got {p.tolist()}.")
    return p


def central_levels(level: float) -> list[float]:
    """Levels of the two ends of a central interval.

    Raises:
        ValueError: If the level is not in (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"Expected level between 0 and 1; got {level!r}.")
    return [(1 - level) / 2, (1 + level) / 2]


def require(module: str, extra: str) -> ModuleType:
    """Import an optional dependency.

    Raises:
        ImportError: If it is not installed, with the extra that brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.split('.')[0]} is not installed; this needs `pip install flowpost[{extra}]`."
        ) from error
