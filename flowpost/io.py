r"""Models on disk: a JSON description and safetensors, nothing that can execute.

A directory holds ``config.json`` and ``weights.safetensors``; a path that ends in ``.safetensors``
is one file with the description in its header. The description carries the format version, the
version of flowpost, and the SHA-256 of everything else, so that a file whose bytes were altered is
refused. As a checksum can be made anew, a model is sketched without memory first, and built only
where names and shapes are those of the tensors in the file.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from . import encoders
from ._checks import check_positive_int
from .head import PosteriorHead, PosteriorModel
from .spaces import Space, space_from_config

__all__ = ["FORMAT_VERSION", "load", "save"]

FORMAT_VERSION = 1
_BLANK = "0" * 64
_CONFIG, _WEIGHTS, _SUFFIX = "config.json", "weights.safetensors", ".safetensors"
_FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}
_OWN = [name for name in encoders.__all__ if name not in ("Encoder", "Squash")]
_REMEDY = "Only what flowpost.save wrote can be loaded"
# pairs of coordinates without a parameter for each, and levels of a description
_MOST_PAIRS, _MOST_NESTED = 2**21, 100
_MALFORMED: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError)
_MALFORMED += (LookupError, MemoryError, RuntimeError, TypeError, ValueError)


def save(model: PosteriorModel | PosteriorHead, path: str | os.PathLike[str]) -> None:
    """Write a model, or a head alone, to a directory or a single `.safetensors` file.

    An encoder of flowpost is described so that `load` builds it again; of any other encoder the
    weights are kept, and `load` is given a fresh one to fill. What was at the path before is
    replaced only when the new files are complete.

    Arguments:
        model: A model or head.
        path: A directory, or a file name that ends in `.safetensors`.

    Raises:
        ValueError: If it is neither, is of a class derived from them, has a tensor that is not
            finite or types that do not agree, or the path is a directory of something else.
    """
    from . import __version__

    head = model.head if isinstance(model, PosteriorModel) else model
    # a derived class would come back as the one it derives from
    if type(model) not in (PosteriorModel, PosteriorHead) or type(head) is not PosteriorHead:
        raise ValueError(
            f"Expected a PosteriorModel or PosteriorHead; got {type(model).__name__} (head "
            f"{type(head).__name__}) for {path}. Save other modules with torch.save or safetensors."
        )
    target = Path(path)
    config: dict[str, Any] = {
        "format": "flowpost",
        "format_version": FORMAT_VERSION,
        "flowpost_version": __version__,
        "kind": type(model).__name__,
        "head": head.config(),
    }
    if isinstance(model, PosteriorModel):
        config["encoder"] = _describe(model.encoder)
    # copies, for tied weights share memory, which safetensors refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with _description_in(target):
        _space(config, tensors)
    _check_values(model, tensors, target)
    config["sha256"] = _BLANK
    try:
        text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False, default=_plain) + "\n"
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"Expected options that {target} can describe in JSON; got {error}. Build the model "
            "with numbers and strings of Python."
        ) from error
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
    path = Path(path)
    config, tensors = _read(path)
    kind = config.get("kind")
    if kind == "PosteriorModel":
        _check_encoder(config.get("encoder"), encoder, path)
    elif kind != "PosteriorHead":
        raise ValueError(
            f"Expected kind as PosteriorModel or PosteriorHead in {path}; got {kind!r}. {_REMEDY}."
        )
    elif encoder is not None:
        raise ValueError(f"{path} holds a head alone; load it without encoder=.")
    # building draws initial weights, which are no business of the user's generator
    with torch.random.fork_rng(devices=[]):
        with _description_in(path):
            space = _space(config, tensors)
            with torch.device("meta"):
                sketch = _assemble(config, space, encoder)
        for name, tensor in sketch.state_dict().items():
            if name.endswith("referenced"):  # files from before there were references
                tensors.setdefault(name, torch.zeros(tensor.shape, dtype=torch.bool))
        _check_fit(sketch.state_dict(), tensors, path)
        _check_values(sketch, tensors, path)
        model = _assemble(config, space, encoder).cpu()
    # first the masks of the conditioners, which no file holds
    head = model.head if isinstance(model, PosteriorModel) else model
    head.to(tensors["loc" if head is model else "head.loc"].dtype)
    for name, tensor in model.state_dict(keep_vars=True).items():
        # in place, so that weights of two names stay tied
        tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    for name, tensor in model.state_dict().items():
        # bit by bit, for NaN is not equal to itself
        if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, tensors[name]))):
            raise ValueError(
                f"Expected tensor {name!r} in {path} to be alike under each name that the encoder "
                "ties to it; got two. Build the encoder as it was saved."
            )
    return model.eval()


def _is_own(encoder: nn.Module | None) -> bool:
    """Whether it is built again from its description; a class derived from ours is the user's."""
    name = type(encoder).__name__
    return name in _OWN and type(encoder) is getattr(encoders, name)


def _describe(encoder: nn.Module | None) -> dict[str, Any] | None:
    if encoder is None:
        return None
    if isinstance(encoder, encoders.Encoder) and _is_own(encoder):
        return encoder.config()
    kind = type(encoder)
    return {"type": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}


def _plain(value: Any) -> Any:
    """Numbers of numpy and torch as Python's."""
    if hasattr(value, "item"):
        return value.item()
    raise TypeError(f"{value!r} of type {type(value).__name__}")


def _check_encoder(config: Any, given: nn.Module | None, path: Path) -> None:
    if config is None:
        if given is not None:
            raise ValueError(f"The model in {path} has no encoder; load it without encoder=.")
        return
    if not isinstance(config, dict):
        raise ValueError(
            f"Expected the description of an encoder in {path}; got {config!r}. {_REMEDY}."
        )
    kind = config.get("type")
    if kind == "custom":
        if given is None:
            raise ValueError(
                f"The model in {path} has an encoder of your own, {config.get('class')}. Load it "
                f"with flowpost.load({str(path)!r}, "
                f"encoder={str(config.get('class')).split('.')[-1]}(…))."
            )
    elif kind not in _OWN:
        raise ValueError(f"Expected an encoder of flowpost in {path}; got {kind!r}. {_REMEDY}.")


@contextmanager
def _description_in(path: Path) -> Iterator[None]:
    """Whatever a malformed description raises, as a ValueError that names the file."""
    try:
        yield
    except _MALFORMED as error:
        raise ValueError(
            f"Expected the description of a model in {path}; got one that cannot be built "
            f"({type(error).__name__}: {error}). {_REMEDY}."
        ) from error


def _space(config: dict[str, Any], tensors: dict[str, Tensor]) -> Space:
    """The label space; refuses sizes for which the file has too few numbers or tensors."""
    elements = sum(t.numel() for t in tensors.values())
    head, encoder = config["head"], config.get("encoder") or {}
    columns, rest = 0.0, [(head["space"], 0)]
    while rest:
        item, depth = rest.pop()
        if depth > _MOST_NESTED:
            raise ValueError(f"Expected a description of at most {_MOST_NESTED} levels; got more")
        if isinstance(item, dict):
            columns += abs(float(item.get("size") or 0))
            item = list(item.values())
        rest += [(part, depth + 1) for part in item] if isinstance(item, list) else []
    if columns > elements:
        raise ValueError(f"Expected at most {elements} label columns; got {columns:g}")
    space = space_from_config(head["space"])
    if head["flow"] == "spline":
        pairs = check_positive_int(head["layers"], "layers") * space.dof * space.feature_size
        most = elements
    else:
        pairs, most = space.dof * (space.dof - 1) // 2, max(elements, _MOST_PAIRS)
    if pairs > most:
        raise ValueError(f"Expected at most {most} pairs of coordinates; got {pairs}")
    for name in {"layers", "blocks"} & set(encoder):
        if check_positive_int(encoder[name], name) > len(tensors):
            raise ValueError(f"Expected at most {len(tensors)} {name}; got {encoder[name]}")
    return space


def _assemble(
    config: dict[str, Any], space: Space, given: nn.Module | None
) -> PosteriorModel | PosteriorHead:
    head = PosteriorHead(**{**config["head"], "space": space})
    if config["kind"] == "PosteriorHead":
        return head
    encoder = given
    if given is None and config.get("encoder") is not None:
        options = dict(config["encoder"])
        encoder = getattr(encoders, options.pop("type"))(**options)
    return PosteriorModel(encoder, head)


def _check_fit(own: dict[str, Tensor], saved: dict[str, Tensor], path: Any) -> None:
    for name, tensor in own.items():
        if name not in saved:
            raise ValueError(
                f"Expected tensor {name!r} in {path}; it is not there. Is this the encoder that "
                "was saved?"
            )
        kinds = [(t.is_floating_point(), t.is_complex()) for t in (tensor, saved[name])]
        if kinds[0] != kinds[1] or (
            kinds[0] == (False, False) and saved[name].dtype != tensor.dtype
        ):
            raise ValueError(
                f"Expected tensor {name!r} of type {tensor.dtype}; got {saved[name].dtype} in "
                f"{path}. Build the encoder as it was saved."
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


def _check_values(
    model: PosteriorModel | PosteriorHead, tensors: dict[str, Tensor], path: Path
) -> None:
    """Refuse what cannot be evaluated; the buffers of a user's encoder are its own business."""
    parts, foreign = [""], ""
    if isinstance(model, PosteriorModel):
        own = model.encoder is None or _is_own(model.encoder)
        parts, foreign = ["head.", "encoder."][: 1 + own], "" if own else "encoder."
    for part in parts:
        types = {
            t.dtype for k, t in tensors.items() if k.startswith(part) and t.is_floating_point()
        }
        if len(types) > 1 or not types <= _FLOATS:
            raise ValueError(
                f"Expected one type of {part.strip('.') or 'head'} tensors in {path}; got "
                f"{', '.join(sorted(map(str, types)))}. Give all one, as with model.float()."
            )
    parameters = {name for name, _ in model.named_parameters()}
    for name, tensor in tensors.items():
        theirs = bool(foreign) and name.startswith(foreign)
        if tensor.dtype not in _FLOATS or (theirs and name not in parameters):
            continue
        if not bool(torch.isfinite(tensor).all()):
            raise ValueError(
                f"Expected finite numbers in tensor {name!r} in {path}; got NaN or infinity. Train "
                "again, or save the model before it diverged."
            )
        whitening = name.rpartition(".")[2] in ("scale", "unit") and not theirs
        if whitening and not bool((tensor > 0).all()):
            raise ValueError(
                f"Expected positive numbers in tensor {name!r} in {path}; got "
                f"{tensor.min().item():g}. Fit the scale again, in a type that can hold it."
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


def _header(raw: bytes, refuse: str) -> bytes:
    size = int.from_bytes(raw[:8], "little")
    if len(raw) < 8 or size > len(raw) - 8:
        raise ValueError(refuse)
    try:
        return json.loads(raw[8 : 8 + size])["__metadata__"]["flowpost"].encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(refuse) from error
