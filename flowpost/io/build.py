"""A model from its description, and what it is filled with from the file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import encoders
from ..head import PosteriorHead
from ..likelihood import ExtendedModel, Latent
from ..model import PosteriorModel
from ..spaces import Space
from .checks import owner
from .describe import (
    CONDITIONED,
    GENERATOR,
    INNER,
    REMEDY,
    SUMMARY,
    is_generator,
    likelihood_class,
    parts_of,
)

if TYPE_CHECKING:
    from ..goodness import Calibrator
    from .describe import Saved

__all__ = ["assemble", "complete", "described", "fill"]

_MALFORMED: tuple[type[Exception], ...] = (ArithmeticError, AssertionError, AttributeError)
_MALFORMED += (LookupError, MemoryError, RuntimeError, TypeError, ValueError)
# buffers of a head that files from before they existed do not hold, with the value that means what
# those did: no references, and splines that have done waiting
_LATER = {"referenced": 0.0, "flow.waited": 2.0}


@contextmanager
def described(path: Path) -> Iterator[None]:
    """Whatever a malformed description raises, as a ValueError that names the file."""
    try:
        yield
    except _MALFORMED as error:
        raise ValueError(
            f"Expected the description of a model in {path}; got one that cannot be built "
            f"({type(error).__name__}: {error}). {REMEDY}."
        ) from error


def assemble(
    config: Mapping[str, Any],
    spaces: Mapping[str, Space],
    given: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
) -> Saved:
    """Build a model, not yet filled.

    Arguments:
        config: Its description.
        spaces: The spaces in it, as `check_sizes` returns them.
        given: Modules that are the user's own, by their name in `USERS`.
        tensors: Those of the file, which set how many held-out scores a calibrator has.
    """
    kind, encoder = config["kind"], given.get("encoder")
    if kind == GENERATOR:
        return _likelihood(config["likelihood"], spaces, given.get("decoder"))
    if kind == "PosteriorHead":
        return PosteriorHead(**{**config["head"], "space": spaces["head"]})
    if encoder is None:
        encoder = _encoder(config.get("encoder"))
    if kind == SUMMARY:
        from ..inferno import SoftBins, SummaryModel

        return SummaryModel(encoder, SoftBins(**config["head"]))
    head = PosteriorHead(**{**config["head"], "space": spaces["head"]})
    if kind == "PosteriorModel":
        return PosteriorModel(encoder, head)
    likelihood = _likelihood(config["likelihood"], spaces, given.get("decoder"))
    latent = config.get("latent")
    if latent is not None:
        latent = Latent(**{**latent, "space": spaces["latent"]})
    model = ExtendedModel(encoder, head, likelihood, latent, given.get("data"))
    if kind == "ExtendedModel":
        return model
    from ..goodness import Calibrator, Filter

    options = dict(config["calibrator"])
    if options["max_draws"] is None:
        # of files from before there were more draws by default: all events had the same
        options["max_draws"] = options["draws"]
    calibrator = Calibrator(model, **options)
    cut = Filter(calibrator, **config["filter"]) if kind == "Filter" else None
    _make_room(calibrator, tensors, "" if cut is None else "calibrator.")
    return calibrator if cut is None else cut


def _encoder(config: Mapping[str, Any] | None) -> nn.Module | None:
    """An encoder of flowpost, whose type was checked."""
    if config is None:
        return None
    if config["type"] == CONDITIONED:
        from ..systematics import ConditionedEncoder

        return ConditionedEncoder._build(config, _encoder(config["encoder"]))
    options = dict(config)
    return getattr(encoders, options.pop("type"))(**options)


def _likelihood(
    config: Mapping[str, Any],
    spaces: Mapping[str, Space],
    decoder: nn.Module | None = None,
    at: str = "likelihood",
) -> Any:
    """A likelihood, whose spaces are found at its place in the description."""
    kind = likelihood_class(config["type"])
    options = {k: v for k, v in config.items() if k not in ("type", "decoder")}
    for part in INNER.get(config["type"], {}):
        options[part] = _likelihood(options[part], spaces, at=f"{at}.{part}")
    if config["type"] == "TwoStep":
        options["groups"] = likelihood_class("GroupSums")(**options["groups"])
    elif config["type"] == "Student":
        # that of the teacher
        del options["space"]
    else:
        options["space"] = spaces[at]
    if f"{at}.data" in spaces:
        options["data"] = spaces[f"{at}.data"]
    if decoder is not None:
        options["decoder"] = decoder
    return kind(**options)


def _make_room(calibrator: Calibrator, tensors: Mapping[str, Tensor], prefix: str) -> None:
    """Buffers of held-out scores as long as those in the file."""
    for name in dict(calibrator.named_buffers(recurse=False)):
        saved = tensors.get(f"{prefix}{name}")
        if name.startswith("scores_") and saved is not None and saved.ndim == 2:
            setattr(calibrator, name, torch.zeros(len(saved), 2, dtype=torch.float64))


def complete(sketch: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Add what an earlier flowpost did not write."""
    own = sketch.state_dict()
    for prefix, _ in _heads(sketch):
        for name, value in _LATER.items():
            wanted, like = own.get(f"{prefix}{name}"), tensors.get(f"{prefix}loc")
            if wanted is None or like is None or f"{prefix}{name}" in tensors:
                continue
            dtype = like.dtype if wanted.is_floating_point() else wanted.dtype
            tensors[f"{prefix}{name}"] = torch.full(wanted.shape, value, dtype=dtype)


def fill(model: Saved, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Fill a model, in the types of the file.

    Raises:
        ValueError: If a tensor of several names is not the same under each of them.
    """
    # first the masks of the conditioners, which no file holds
    for prefix, head in _heads(model):
        head.to(tensors[f"{prefix}loc"].dtype)
    parts = parts_of(model, path)
    if parts.likelihood is not None and is_generator(parts.likelihood):
        own = (t for k, t in tensors.items() if k.startswith(parts.within))
        parts.likelihood.to(next(t.dtype for t in own if t.is_floating_point()))
    for name, tensor in model.state_dict(keep_vars=True).items():
        # in place, so that weights of two names stay tied
        tensor.data = tensor.data.to(tensors[name].dtype)
    model.load_state_dict(tensors)
    for name, tensor in model.state_dict().items():
        # bit by bit, for NaN is not equal to itself
        if not torch.equal(*(t.reshape(-1).view(torch.uint8) for t in (tensor, tensors[name]))):
            noun = owner(parts, name)
            raise ValueError(
                f"Expected tensor {name!r} in {path} to be alike under each name that the "
                f"{noun} ties to it; got two. Build the {noun} as it was saved."
            )


def _heads(model: nn.Module) -> Iterator[tuple[str, PosteriorHead]]:
    """Every head with the prefix of its tensors."""
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PosteriorHead):
            yield f"{name}." if name else "", module
