"""What a file says of a model: its kind, and the options that build each part again."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import nn

from .. import encoders
from ..head import PosteriorHead
from ..likelihood import ExtendedModel, FlowLikelihood, Latent, PointProcess, PoissonCounts
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
    )

__all__ = [
    "CONDITIONED",
    "ENCODERS",
    "KINDS",
    "LIKELIHOODS",
    "MARGINAL",
    "RECALIBRATOR",
    "REMEDY",
    "SUMMARY",
    "USERS",
    "Parts",
    "describe",
    "parts_of",
]

# soft bins in the place of a posterior head
SUMMARY = "SummaryModel"
KINDS = ("PosteriorHead", "PosteriorModel", "ExtendedModel", "Calibrator", "Filter", SUMMARY)
# two models in one file
MARGINAL = "MarginalModel"
# a model in another's file
RECALIBRATOR = "Recalibrator"
LIKELIHOODS = {t.__name__: t for t in (FlowLikelihood, PoissonCounts, PointProcess)}
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
        head: The head.
        model: The model of the head, or None where it is alone.
        calibrator: The calibrator of the model, or None.
        filter: The filter of the calibrator, or None.
    """

    head: PosteriorHead | SoftBins
    model: PosteriorModel | SummaryModel | None = None
    calibrator: Calibrator | None = None
    filter: Filter | None = None

    @property
    def outer(self) -> str:
        """Prefix of the tensors of the model."""
        return "calibrator." * (self.filter is not None) + "model." * (self.calibrator is not None)

    @property
    def users(self) -> dict[str, str]:
        """Prefix of the tensors of each module that is a user's own, by its name in `USERS`."""
        found = {}
        encoder = None if self.model is None else self.model.encoder
        if encoder is not None and not _is_own(encoder):
            found["encoder"] = f"{self.outer}encoder."
        if isinstance(self.model, ExtendedModel):
            if self.model.likelihood.custom:
                found["decoder"] = f"{self.outer}likelihood.decoder."
            if self.model.data is not None:
                found["data"] = f"{self.outer}data."
        return found

    @property
    def own(self) -> dict[str, str]:
        """Prefix of the tensors of each part of flowpost within the model."""
        if self.model is None:
            return {"head": ""}
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
    cut = rest if type(rest) is Filter else None
    rest = rest if cut is None else cut.calibrator
    calibrator = rest if type(rest) is Calibrator else None
    rest = rest if calibrator is None else calibrator.model
    if _is_summary(rest):
        return Parts(rest.head, rest)
    model: PosteriorModel | None = rest if type(rest) in (PosteriorModel, ExtendedModel) else None
    head = rest.head if isinstance(rest, PosteriorModel) else rest
    if type(head) is not PosteriorHead or (model is None and head is not rest):
        raise ValueError(
            f"Expected a {', '.join((*KINDS[:-1], MARGINAL, RECALIBRATOR))} or {KINDS[-1]}; "
            f"got {_kind(saved)} for {path}. Save other modules with torch.save or safetensors, "
            "or their parts alone."
        )
    if isinstance(model, ExtendedModel):
        for part, kinds in ((model.likelihood, LIKELIHOODS.values()), (model.latent, (Latent,))):
            if part is not None and type(part) not in kinds:
                raise ValueError(
                    f"Expected a {' or '.join(t.__name__ for t in kinds)} of flowpost; got "
                    f"{type(part).__name__} for {path}. Save other modules with torch.save or "
                    "safetensors."
                )
    return Parts(head, model, calibrator, cut)


def describe(parts: Parts) -> dict[str, Any]:
    """The description of a model, from which it is built again."""
    model, outermost = parts.model, parts.filter or parts.calibrator or parts.model or parts.head
    config: dict[str, Any] = {"kind": type(outermost).__name__, "head": parts.head.config()}
    if model is not None:
        own = model.encoder is None or "encoder" not in parts.users
        config["encoder"] = _encoder(model.encoder) if own else _custom(model.encoder)
    if isinstance(model, ExtendedModel):
        config["likelihood"] = model.likelihood.config()
        if model.likelihood.custom:
            config["likelihood"]["decoder"] = _custom(model.likelihood.decoder)
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


def _custom(module: Any) -> dict[str, Any]:
    kind = type(module)
    return {"type": "custom", "class": f"{kind.__module__}.{kind.__qualname__}"}
