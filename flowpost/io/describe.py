"""What a file says of a model: its kind, and the options that build each part again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from .. import encoders
from ..head import PosteriorHead
from ..likelihood import (
    ExtendedModel,
    FlowLikelihood,
    Latent,
    Likelihood,
    PointProcess,
    PoissonCounts,
)
from ..model import PosteriorModel

if TYPE_CHECKING:
    from ..calibration import Recalibrator
    from ..goodness import Calibrator, Filter
    from ..inferno import SoftBins, SummaryModel
    from ..systematics import MarginalModel

    Saved: TypeAlias = (
        PosteriorHead
        | PosteriorModel
        | Calibrator
        | Filter
        | MarginalModel
        | Recalibrator
        | SummaryModel
        | Likelihood
    )

__all__ = [
    "CONDITIONED",
    "ENCODERS",
    "GENERATOR",
    "INNER",
    "KINDS",
    "LIKELIHOODS",
    "MARGINAL",
    "RECALIBRATOR",
    "REMEDY",
    "SUMMARY",
    "USERS",
    "Parts",
    "describe",
    "is_generator",
    "likelihood_class",
    "parts_of",
]

# soft bins in the place of a posterior head
SUMMARY = "SummaryModel"
# a likelihood without a posterior
GENERATOR = "Generator"
_MODELS = ("PosteriorHead", "PosteriorModel", "ExtendedModel", "Calibrator", "Filter")
KINDS = (*_MODELS, SUMMARY, GENERATOR)
# two models in one file
MARGINAL = "MarginalModel"
# a model in another's file
RECALIBRATOR = "Recalibrator"
_PLAIN = {t.__name__: t for t in (FlowLikelihood, PoissonCounts, PointProcess)}
# those of flowpost.generators, which is imported when one of them is there
_GENERATORS = ("Teacher", "Student", "TwoStep")
LIKELIHOODS = (*_PLAIN, *_GENERATORS)
_STEPS = ("FlowLikelihood", "Teacher", "Student")
# likelihoods within a likelihood, and what each of them may be
INNER: dict[str, dict[str, tuple[str, ...]]] = {
    "TwoStep": {"first": _STEPS, "second": _STEPS},
    "Student": {"teacher": ("Teacher",)},
}
_REMEDIES = {
    "Library": "Its events are all that it is: keep x and z, and build Library(x, z) of them",
    "NoiseNetwork": "Save network.state_dict() with safetensors.torch.save_file, and load it into "
    "a NoiseNetwork of the same options",
}
ENCODERS = [name for name in encoders.__all__ if name not in ("Encoder", "Squash")]
# an encoder around another
CONDITIONED = "ConditionedEncoder"
REMEDY = "Only what flowpost.save wrote can be loaded"
# modules that are a user's own, which `load` is given again, and what errors call them
USERS = {"encoder": "an encoder", "decoder": "a decoder", "data": "a data module"}


@dataclass(frozen=True)
class Parts:
    """A model, taken apart; names of tensors begin with a prefix for each part.

    Attributes:
        head: The head, or None where a likelihood is alone.
        model: The model of the head, or None where it is alone.
        calibrator: The calibrator of the model, or None.
        filter: The filter of the calibrator, or None.
        alone: The likelihood that is alone, or None.
    """

    head: PosteriorHead | SoftBins | None
    model: PosteriorModel | SummaryModel | None = None
    calibrator: Calibrator | None = None
    filter: Filter | None = None
    alone: Likelihood | None = None

    @property
    def outer(self) -> str:
        """Prefix of the tensors of the model."""
        return "calibrator." * (self.filter is not None) + "model." * (self.calibrator is not None)

    @property
    def likelihood(self) -> Likelihood | None:
        """The likelihood, of the model or alone."""
        return self.model.likelihood if isinstance(self.model, ExtendedModel) else self.alone

    @property
    def within(self) -> str:
        """Prefix of the tensors of the likelihood."""
        return "" if self.model is None else f"{self.outer}likelihood."

    @property
    def users(self) -> dict[str, str]:
        """Prefix of the tensors of each module that is a user's own, by its name in `USERS`."""
        found = {}
        encoder = None if self.model is None else self.model.encoder
        if encoder is not None and not _is_own(encoder):
            found["encoder"] = f"{self.outer}encoder."
        if self.likelihood is not None and self.likelihood.custom:
            found["decoder"] = f"{self.within}decoder."
        if isinstance(self.model, ExtendedModel) and self.model.data is not None:
            found["data"] = f"{self.outer}data."
        return found

    @property
    def own(self) -> dict[str, str]:
        """Prefix of the tensors of each part of flowpost within the model."""
        if self.model is None:
            return {"head" if self.alone is None else "likelihood": ""}
        names = ["head", *["encoder"] * ("encoder" not in self.users)]
        if isinstance(self.model, ExtendedModel):
            names += ["likelihood", "latent"]
        return {name: f"{self.outer}{name}." for name in names}


def parts_of(saved: Any, path: Path) -> Parts:
    """Take a model apart.

    Raises:
        ValueError: If it or a part of it is of another class; one derived from ours would come back
            as the one that it derives from.
    """
    from ..goodness import Calibrator, Filter

    rest: Any = saved
    if isinstance(rest, Likelihood):
        _check_likelihood(rest, path)
        return Parts(None, alone=rest)
    cut = rest if type(rest) is Filter else None
    rest = rest if cut is None else cut.calibrator
    calibrator = rest if type(rest) is Calibrator else None
    rest = rest if calibrator is None else calibrator.model
    if _is_summary(rest):
        return Parts(rest.head, rest)
    model: PosteriorModel | None = rest if type(rest) in (PosteriorModel, ExtendedModel) else None
    head = rest.head if isinstance(rest, PosteriorModel) else rest
    if type(head) is not PosteriorHead or (model is None and head is not rest):
        names = ", ".join((*_MODELS, "Likelihood", MARGINAL, RECALIBRATOR))
        other = "Save other modules with torch.save or safetensors, or their parts alone"
        raise ValueError(
            f"Expected a {names} or {SUMMARY}; got {_kind(saved)} for {path}. "
            f"{_REMEDIES.get(type(saved).__name__, other)}."
        )
    if isinstance(model, ExtendedModel):
        _check_likelihood(model.likelihood, path)
        if model.latent is not None:
            _check_class(model.latent, ["Latent"], path)
    return Parts(head, model, calibrator, cut)


def likelihood_class(name: str) -> Any:
    """The class of a name in `LIKELIHOODS`, or of a part of one."""
    own = {**_PLAIN, "Latent": Latent}
    if name in own:
        return own[name]
    from .. import generators

    return getattr(generators, name)


def is_generator(likelihood: Likelihood | None) -> bool:
    """Whether it is one of `flowpost.generators`."""
    return type(likelihood).__name__ in _GENERATORS


def _check_likelihood(likelihood: Any, path: Path) -> None:
    """Refuse classes derived from ours, also of what is in a likelihood.

    Raises:
        ValueError: If it or a part of it is one.
    """
    _check_class(likelihood, LIKELIHOODS, path)
    kind = type(likelihood).__name__
    if kind == "TwoStep":
        _check_class(likelihood.groups, ["GroupSums"], path)
    for part, known in INNER.get(kind, {}).items():
        _check_class(getattr(likelihood, part), known, path)
        _check_likelihood(getattr(likelihood, part), path)


def _check_class(part: Any, names: Sequence[str], path: Path) -> None:
    """Refuse another class than those of flowpost by these names.

    Raises:
        ValueError: If it is one.
    """
    name = type(part).__name__
    if name not in names or type(part) is not likelihood_class(name):
        raise ValueError(
            f"Expected a {' or '.join(names)} of flowpost; got {name} for {path}. Save other "
            "modules with torch.save or safetensors."
        )


def describe(parts: Parts) -> dict[str, Any]:
    """The description of a model, from which it is built again."""
    if parts.head is None:
        return {"kind": GENERATOR, "likelihood": _likelihood(parts.alone)}
    model, outermost = parts.model, parts.filter or parts.calibrator or parts.model or parts.head
    config: dict[str, Any] = {"kind": type(outermost).__name__, "head": parts.head.config()}
    if model is not None:
        own = model.encoder is None or "encoder" not in parts.users
        config["encoder"] = _encoder(model.encoder) if own else _custom(model.encoder)
    if isinstance(model, ExtendedModel):
        config["likelihood"] = _likelihood(model.likelihood)
        config["latent"] = None if model.latent is None else model.latent.config()
        config["data"] = None if model.data is None else _custom(model.data)
    if parts.calibrator is not None:
        config["calibrator"] = parts.calibrator.config()
    if parts.filter is not None:
        config["filter"] = parts.filter.config()
    return config


def _is_summary(saved: Any) -> bool:
    if type(saved).__name__ != SUMMARY:
        return False
    from ..inferno import SoftBins, SummaryModel

    return type(saved) is SummaryModel and type(saved.head) is SoftBins


def _kind(saved: Any) -> str:
    """The name of a class, and of those of what is in it."""
    name = type(saved).__name__
    for part in ("calibrator", "model", "head"):
        inner = getattr(saved, part, None)
        if inner is not None and type(inner) is not PosteriorHead:
            return f"{name} of {_kind(inner)}"
    return name


def _is_own(encoder: nn.Module) -> bool:
    """Whether it is built again from its description; a class derived from ours is the user's."""
    from ..systematics import ConditionedEncoder

    if type(encoder) is ConditionedEncoder:
        inner = encoder.encoder
        return inner is None or (type(inner) is not ConditionedEncoder and _is_own(inner))
    name = type(encoder).__name__
    return name in ENCODERS and type(encoder) is getattr(encoders, name)


def _encoder(encoder: nn.Module | None) -> dict[str, Any] | None:
    from ..systematics import ConditionedEncoder

    if isinstance(encoder, ConditionedEncoder):
        return {**encoder.config(), "encoder": _encoder(encoder.encoder)}
    return encoder.config() if isinstance(encoder, encoders.Encoder) else None


def _likelihood(likelihood: Any) -> dict[str, Any]:
    config: dict[str, Any] = likelihood.config()
    return {**config, "decoder": _custom(likelihood.decoder)} if likelihood.custom else config


def _custom(module: Any) -> dict[str, Any]:
    kind = type(module)
    return {"type": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}
