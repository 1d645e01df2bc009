r"""Models on disk: a JSON description and safetensors, nothing that can execute.

A directory holds ``config.json`` and ``weights.safetensors``; a path that ends in ``.safetensors``
is one file with the description in its header. The description carries the format version, the
version of flowpost, and the SHA-256 of everything else, so that a file whose bytes were altered is
refused. As a checksum can be made anew, a model is sketched without memory first, and built only
where names and shapes are those of the tensors in the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from ..model import PosteriorModel
from .build import assemble, complete, described, fill
from .checks import check_fit, check_given, check_recalibrator, check_tensors, check_values
from .describe import MARGINAL, RECALIBRATOR, REMEDY, describe, parts_of
from .files import FORMAT_VERSION, read, write
from .sizes import check_sizes

if TYPE_CHECKING:
    from .describe import Saved

__all__ = ["FORMAT_VERSION", "load", "save"]


def save(model: Saved, path: str | os.PathLike[str]) -> None:
    """Write a model, a head or a likelihood alone, to a directory or one `.safetensors` file.

    A `goodness.Calibrator` or `goodness.Filter` is written with its model and what it found in
    held-out events, as is a `calibration.Recalibrator`; a `systematics.MarginalModel` with both of
    its models, and a `generators.Student` with its teacher. Parts of flowpost are described so
    that `load` builds them again; of an encoder, decoder or data module of your own the weights
    are kept, and `load` is given a fresh one to fill. What was at the path before is replaced only
    when the new files are complete.

    Arguments:
        model: A `PosteriorHead`, `PosteriorModel`, `likelihood.ExtendedModel`,
            `goodness.Calibrator`, `goodness.Filter`, `inferno.SummaryModel`, a
            `calibration.Recalibrator` of one of the first three, a `systematics.MarginalModel`
            without modules of your own, or a likelihood by itself: `generators.Teacher`, `Student`
            or `TwoStep`, or one of `flowpost.likelihood`.
        path: A directory, or a file name that ends in `.safetensors`.

    Raises:
        ValueError: If it is none of these, is of a class derived from them, has a tensor that is
            not finite or types that do not agree, or the path is a directory of something else.
    """
    from .. import __version__

    target = Path(path)
    pack: Any = _packed
    if _is_recalibrator(model):
        pack = _packed_recalibrator
    elif _is_pair(model):
        pack = _packed_pair
    about, tensors = pack(model, target)
    config = {
        "format": "flowpost",
        "format_version": FORMAT_VERSION,
        "flowpost_version": __version__,
        **about,
    }
    write(target, config, tensors)


def load(
    path: str | os.PathLike[str],
    encoder: nn.Module | None = None,
    *,
    decoder: nn.Module | None = None,
    data: nn.Module | None = None,
) -> Saved:
    """Read what `save` wrote, in evaluation mode, on the CPU.

    Draws of the same generator, and densities, are those of the model that was saved; a
    `generators.Student` has its teacher again.

    Arguments:
        path: The directory or file.
        encoder: A fresh instance of your own encoder, which is filled with the saved weights.
        decoder: One of the decoder that you gave to `likelihood.PoissonCounts`.
        data: One of the data module that you gave to `likelihood.ExtendedModel`.

    Raises:
        ValueError: If the path holds no model, was altered, comes from a later format, or does not
            fit the modules given; the error names the tensor.
    """
    path = Path(path)
    config, tensors = read(path)
    given = {"encoder": encoder, "decoder": decoder, "data": data}
    if config.get("kind") == MARGINAL:
        return _unpacked_pair(config, tensors, given, path).eval()
    if config.get("kind") == RECALIBRATOR:
        return _unpacked_recalibrator(config, tensors, given, path).eval()
    return _unpacked(config, tensors, given, path).eval()


def _packed(model: Saved, target: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a model, checked."""
    parts = parts_of(model, target)
    config = describe(parts)
    # copies, for tied weights share memory, which safetensors refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with described(target):
        check_sizes(config, tensors)
    check_values(parts, {name for name, _ in model.named_parameters()}, tensors, target)
    return config, tensors


def _unpacked(
    config: dict[str, Any], tensors: dict[str, Tensor], given: dict[str, Any], path: Path
) -> Saved:
    """A model from its description and tensors."""
    check_given(config, given, path)
    # building draws initial weights, which are no business of the user's generator
    with torch.random.fork_rng(devices=[]):
        with described(path):
            spaces = check_sizes(config, tensors)
            with torch.device("meta"):
                sketch = assemble(config, spaces, given, tensors)
        parts = parts_of(sketch, path)
        complete(sketch, tensors)
        check_fit(parts, sketch.state_dict(), tensors, path)
        check_values(parts, {name for name, _ in sketch.named_parameters()}, tensors, path)
        model = assemble(config, spaces, given, tensors).cpu()
    fill(model, tensors, path)
    return model


# ------------------------------------------------------- a conditioned model and its nuisances

_PAIR = ("model", "nuisances")


def _is_pair(model: Any) -> bool:
    from ..systematics import MarginalModel

    return type(model) is MarginalModel


def _packed_pair(pair: Any, target: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of both models, the names of which begin with that of the model.

    Raises:
        ValueError: If one of them cannot be saved, or has modules of the user.
    """
    config: dict[str, Any] = {"kind": MARGINAL, "draws": pair.draws}
    tensors = {}
    for name in _PAIR:
        part = getattr(pair, name)
        if isinstance(part, Tensor):
            config[name], tensors[name] = None, part.detach().cpu().contiguous().clone()
            continue
        if type(part) is not PosteriorModel or parts_of(part, target).users:
            raise ValueError(
                f"Expected a MarginalModel of PosteriorModels without modules of your own; its "
                f"{name} is another ({type(part).__name__}) for {target}. Save model.model and "
                "model.nuisances by themselves, and build MarginalModel(model, nuisances) of what "
                "load returns."
            )
        config[name], own = _packed(part, target)
        tensors |= {f"{name}.{k}": v for k, v in own.items()}
    return config, tensors


def _unpacked_pair(
    config: dict[str, Any], tensors: dict[str, Tensor], given: dict[str, Any], path: Path
) -> Saved:
    """Both models of a file as one.

    Raises:
        ValueError: If a module is given, or one of the models cannot be loaded.
    """
    from ..systematics import MarginalModel

    for name, module in given.items():
        if module is not None:
            raise ValueError(
                f"{path} holds a {MARGINAL}, which has no {name} of your own; load it without "
                f"{name}=."
            )
    parts: list[Any] = []
    for name in _PAIR:
        about, prefix = config.get(name), f"{name}."
        if about is None and name == "nuisances" and name in tensors:
            parts.append(tensors.pop(name))
            continue
        if not isinstance(about, dict) or about.get("kind") != PosteriorModel.__name__:
            raise ValueError(
                f"Expected the description of a PosteriorModel as the {name} of the {MARGINAL} in "
                f"{path}; got {str(about)[:80]}. {REMEDY}."
            )
        own = {k: tensors.pop(k) for k in list(tensors) if k.startswith(prefix)}
        own = {k.removeprefix(prefix): v for k, v in own.items()}
        parts.append(_unpacked(about, own, given, path))
    if tensors:
        raise ValueError(
            f"Tensor {min(tensors)!r} in {path} has no place in a {MARGINAL}. {REMEDY}."
        )
    with described(path):
        model, nuisances = parts
        return MarginalModel(model, nuisances, config["draws"])


# ------------------------------------------------------- a model and what recalibrates its base


def _is_recalibrator(model: Any) -> bool:
    if type(model).__name__ != RECALIBRATOR:
        return False
    from ..calibration import Recalibrator

    return type(model) is Recalibrator


def _packed_recalibrator(whole: Any, target: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Description and tensors of a recalibrator, those of its model under `model.`.

    Raises:
        ValueError: If it is not fitted, its model cannot be saved, or a map does not rise.
    """
    if not whole.fitted:
        raise ValueError(f"Expected a fitted {RECALIBRATOR} for {target}; call fit before save.")
    about, own = _packed(whole.model, target)
    tensors = {
        k: v.detach().cpu().contiguous().clone()
        for k, v in whole.state_dict().items()
        if not k.startswith("model.")
    }
    check_recalibrator(tensors, target)
    config = {"kind": RECALIBRATOR, "model": about, "recalibrator": whole.config()}
    return config, tensors | {f"model.{k}": v for k, v in own.items()}


def _unpacked_recalibrator(
    config: dict[str, Any], tensors: dict[str, Tensor], given: dict[str, Any], path: Path
) -> Saved:
    """A recalibrator from its description and tensors.

    Raises:
        ValueError: If its model cannot be loaded, or its tensors do not fit.
    """
    from ..calibration import Recalibrator

    about = config.get("model")
    if not isinstance(about, dict) or about.get("kind") not in ("PosteriorModel", "ExtendedModel"):
        raise ValueError(
            f"Expected the description of a PosteriorModel as the model of the {RECALIBRATOR} in "
            f"{path}; got {str(about)[:80]}. {REMEDY}."
        )
    own = {k: v for k, v in tensors.items() if not k.startswith("model.")}
    inner = {k.removeprefix("model."): v for k, v in tensors.items() if k not in own}
    model: Any = _unpacked(about, inner, given, path)
    check_recalibrator(own, path)
    with described(path):
        options = config["recalibrator"]
        # before tables of so many bins are made
        bins = options["bins"]
        count = bins if isinstance(bins, int) else len(bins) + 1
        if options["by"] is not None or options["given"]:
            check_positive_int(count, "bins")
            if count != len(own["held"]):
                raise ValueError(f"Expected {len(own['held'])} bins; got {count}")
        whole = Recalibrator._build(model, options)
    fresh = {k: v for k, v in whole.state_dict().items() if not k.startswith("model.")}
    check_tensors(fresh, own, lambda _: "recalibrator", path)
    with torch.no_grad():
        for name, tensor in whole.named_buffers():
            if name in own:
                tensor.data = own[name]
    return whole
