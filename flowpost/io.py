r"""Models on disk: a JSON description and safetensors, nothing that can execute.

A directory holds ``config.json`` and ``weights.safetensors``; a path that ends in ``.safetensors``
is one file with the description in its header. The description carries the format version, the
version of flowpost, and the SHA-256 of everything else, so that a file whose bytes were altered is
refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from . import encoders
from .head import PosteriorHead, PosteriorModel
from .spaces import space_from_config

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1
_BLANK = "0" * 64
_CONFIG, _WEIGHTS, _SUFFIX = "config.json", "weights.safetensors", ".safetensors"


def save(model: PosteriorModel | PosteriorHead, path: str | os.PathLike[str]) -> None:
    """Write a model, or a head alone, to a directory or a single `.safetensors` file.

    An encoder of flowpost is described so that `load` builds it again; of any other encoder the
    weights are kept, and `load` is given a fresh one to fill. What was at the path before is
    replaced only when the new files are complete.

    Arguments:
        model: A model or head.
        path: A directory, or a file name that ends in `.safetensors`.

    Raises:
        ValueError: If it is neither, or the path is a directory of something else.
    """
    from . import __version__

    if not isinstance(model, (PosteriorModel, PosteriorHead)):
        raise ValueError(
            f"Expected a PosteriorModel or PosteriorHead; got {type(model).__name__}. Save other "
            "modules with torch.save or safetensors."
        )
    target = Path(path)
    config: dict[str, Any] = {
        "format": "flowpost",
        "format_version": FORMAT_VERSION,
        "flowpost_version": __version__,
        "kind": type(model).__name__,
        "head": (model.head if isinstance(model, PosteriorModel) else model).config(),
    }
    if isinstance(model, PosteriorModel):
        config["encoder"] = _describe(model.encoder)
    tensors = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    # tied weights share memory, which safetensors refuses
    tensors = {k: v.clone() for k, v in tensors.items()}
    config["sha256"] = _BLANK
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
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
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent) as work:
        new, old = Path(work) / "new", Path(work) / "old"
        new.mkdir()
        (new / _CONFIG).write_bytes(described)
        (new / _WEIGHTS).write_bytes(weights)
        if target.is_dir():
            os.replace(target, old)
        try:
            os.replace(new, target)
        except OSError:
            if old.is_dir():
                os.replace(old, target)
            raise


def load(
    path: str | os.PathLike[str], encoder: nn.Module | None = None
) -> PosteriorModel | PosteriorHead:
    """Read what `save` wrote, in evaluation mode, on the CPU.

    Arguments:
        path: The directory or file.
        encoder: A fresh instance of your own encoder, which is filled with the saved weights.

    Raises:
        ValueError: If the path holds no model, was altered, comes from a later format, or does not
            fit the encoder; the error names the tensor.
    """
    config, tensors = _read(Path(path))
    try:
        head_options = dict(config["head"])
        space = space_from_config(head_options.pop("space"))
        context = head_options.pop("context")
        kind = config["kind"]
        # building draws initial weights, which are no business of the user's generator
        with torch.random.fork_rng(devices=[]):
            head = PosteriorHead(context, space, **head_options)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"Expected the description of a model in {path}; got {error!r}."
        ) from error
    if kind == "PosteriorHead":
        if encoder is not None:
            raise ValueError(f"{path} holds a head alone; load it without encoder=.")
        model: PosteriorModel | PosteriorHead = head
    else:
        with torch.random.fork_rng(devices=[]):
            model = PosteriorModel(_rebuild(config.get("encoder"), encoder, path), head)
    _check_fit(model.state_dict(), tensors, path)
    model.load_state_dict(tensors, assign=True)
    return model.eval()


def _describe(encoder: nn.Module | None) -> dict[str, Any] | None:
    if encoder is None:
        return None
    if isinstance(encoder, encoders.Encoder) and type(encoder).__name__ in encoders.__all__:
        return encoder.config()
    return {"type": "custom", "class": f"{type(encoder).__module__}.{type(encoder).__qualname__}"}


def _rebuild(config: dict[str, Any] | None, given: nn.Module | None, path: Any) -> nn.Module | None:
    if config is None:
        if given is not None:
            raise ValueError(f"The model in {path} has no encoder; load it without encoder=.")
        return None
    if given is not None:
        return given
    options = dict(config)
    kind = options.pop("type", None)
    if kind == "custom":
        raise ValueError(
            f"The model in {path} has an encoder of your own, {options.get('class')}. Load it with "
            f"flowpost.load({str(path)!r}, encoder={str(options.get('class')).split('.')[-1]}(…))."
        )
    if kind not in encoders.__all__ or kind in ("Encoder", "Squash"):
        raise ValueError(f"Expected an encoder of flowpost in {path}; got {kind!r}.")
    try:
        return getattr(encoders, kind)(**options)
    except TypeError as error:
        raise ValueError(f"Expected the options of a {kind} in {path}; got {options}.") from error


def _check_fit(own: dict[str, Tensor], saved: dict[str, Tensor], path: Any) -> None:
    for name, tensor in own.items():
        if name not in saved:
            raise ValueError(
                f"Expected tensor {name!r} in {path}; it is not there. Is this the encoder that "
                "was saved?"
            )
        if saved[name].shape != tensor.shape:
            raise ValueError(
                f"Expected tensor {name!r} of shape {tuple(tensor.shape)}; got "
                f"{tuple(saved[name].shape)} in {path}. Build the encoder as it was saved."
            )
    extra = sorted(set(saved) - set(own))
    if extra:
        raise ValueError(
            f"Tensor {extra[0]!r} in {path} has no place in this model"
            + (f" (nor have {len(extra) - 1} others)" if len(extra) > 1 else "")
            + ". Build the encoder as it was saved."
        )


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


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
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
        tensors = load_tensors(raw)
    except (ValueError, SafetensorError, RecursionError) as error:
        raise ValueError(f"{refuse} ({error}). {remedy}") from error
    if not isinstance(config, dict) or config.get("format") != "flowpost":
        raise ValueError(f"{refuse}. {remedy}")
    version = config.get("format_version")
    if not isinstance(version, int) or version > FORMAT_VERSION:
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


def _header(raw: bytes, refuse: str) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > len(raw) - 8:
        raise ValueError(refuse)
    try:
        return json.loads(raw[8 : 8 + size])["__metadata__"]["flowpost"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(refuse) from error
