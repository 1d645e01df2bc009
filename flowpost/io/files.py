"""Bytes of a model on disk: description and tensors, a checksum, replacement in one move."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

__all__ = ["FORMAT_VERSION", "read", "write"]

FORMAT_VERSION = 1
_BLANK = "0" * 64
_CONFIG, _WEIGHTS, _SUFFIX = "config.json", "weights.safetensors", ".safetensors"


def write(target: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Write description and tensors with their checksum; what was there before goes last.

    Raises:
        ValueError: If the description cannot be JSON, or the path is of something else.
    """
    text = _text({**config, "sha256": _BLANK}, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == _SUFFIX:
        raw = save_tensors(tensors, {"flowpost": text})
        _replace_file(target, raw.replace(_BLANK.encode(), _digest(raw), 1))
        return
    if target.is_file():
        raise ValueError(
            f"Expected {target} as a directory or a new path; got a file. For a single file end "
            f"the name in {_SUFFIX}."
        )
    if target.is_dir() and any(p.name not in (_CONFIG, _WEIGHTS) for p in target.iterdir()):
        raise ValueError(
            f"Expected {target} to be empty or a saved model; it holds other files. Name a new "
            "directory."
        )
    weights = save_tensors(tensors)
    described = text.encode()
    described = described.replace(_BLANK.encode(), _digest(described, weights), 1)
    _replace_directory(target, {_CONFIG: described, _WEIGHTS: weights})


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of what `write` wrote.

    Raises:
        ValueError: If there is nothing, bytes were altered, or the format is a later one.
    """
    refuse = f"{path} is no model of flowpost, or its bytes were altered"
    remedy = "Only what flowpost.save wrote can be loaded; pickles never are."
    if not path.exists():
        raise ValueError(f"Expected a saved model at {path}; there is nothing.")
    if path.is_dir():
        for name in (_CONFIG, _WEIGHTS):
            if not (path / name).is_file():
                raise ValueError(f"Expected {name} in {path}; it is not there. {remedy}")
        text, raw = (path / _CONFIG).read_bytes(), (path / _WEIGHTS).read_bytes()
    else:
        raw = path.read_bytes()
        text = _header(raw, f"{refuse}. {remedy}")
    try:
        config = json.loads(text)
        json.dumps(config, allow_nan=False)
        tensors = load_tensors(raw)
    except (ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{refuse} ({error}). {remedy}") from error
    if not isinstance(config, dict) or config.get("format") != "flowpost":
        raise ValueError(f"{refuse}. {remedy}")
    version = config.get("format_version")
    if type(version) is not int or not 1 <= version <= FORMAT_VERSION:
        raise ValueError(
            f"Expected format version {FORMAT_VERSION} or earlier; got {version!r} in {path}, "
            f"written by flowpost {config.get('flowpost_version')}. Update flowpost."
        )
    stated = str(config.get("sha256")).encode()
    parts = (text, raw) if path.is_dir() else (raw,)
    blank = parts[0].replace(stated, _BLANK.encode(), 1)
    if len(stated) != len(_BLANK) or stated != _digest(blank, *parts[1:]):
        raise ValueError(f"{refuse}: its checksum differs. {remedy}")
    return config, tensors


def _text(config: dict[str, Any], target: Path) -> str:
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False, default=_plain)
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected options that {target} can describe in JSON; got {error}. Build the model "
            "with numbers and strings of Python."
        ) from error
    return text + "\n"


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _digest(*parts: bytes) -> bytes:
    """SHA-256 of bytes in which its own place is blank, as hexadecimal digits."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest().encode()


def _replace_file(target: Path, data: bytes) -> None:
    handle, partial = tempfile.mkstemp(prefix=f".{target.name}.", dir=target.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    finally:
        Path(partial).unlink(missing_ok=True)


def _replace_directory(target: Path, files: dict[str, bytes]) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        new, old = Path(work) / "new", Path(work) / "old"
        new.mkdir()
        for name, data in files.items():
            (new / name).write_bytes(data)
        if target.is_dir():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            if old.is_dir():
                os.replace(old, target)
            raise


def _header(raw: bytes, refuse: str) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > len(raw) - 8:
        raise ValueError(refuse)
    try:
        return json.loads(raw[8 : 8 + size])["__metadata__"]["flowpost"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(refuse) from error
