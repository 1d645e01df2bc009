r"""PosteriorHead: the one line that replaces an MSE regression head.

Minimising the joint KL divergence between simulation and model is supervised learning with

.. math:: \mathcal{L} = \frac{1}{\sum_i w_i} \sum_i w_i \cdot \big(-\ln q_\phi(z_i|x_i)\big),

which `PosteriorHead.loss` computes. MSE is the special case of a normal with fixed width.

Source: T. Glüsenkamp, *Unifying supervised learning and VAEs – coverage, systematics and
goodness-of-fit in normalizing-flow based neural network models for astro-particle
reconstructions*, 2020, https://arxiv.org/abs/2008.05825, eq. 8.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ._checks import as_tensor, check_finite, check_positive_int, check_shape
from ._weights import check_weights, weighted_mean
from .flows import ResidualFlow
from .masks import known_coordinates, read_mask
from .posterior import Posterior
from .posterior.base import log_density
from .references import blocks_named, listed, named_blocks, read_reference
from .spaces import Scale, Space

__all__ = ["PosteriorHead"]


class PosteriorHead(nn.Module):
    """Turns the context vector of any network into a posterior: `head(context) -> Posterior`.

    Arguments:
        context: Features L of the context; 0 for an unconditional density.
        space: The label space.
        flow: The rung of the ladder: `"mse"` (location), `"diagonal"` (and width), `"affine"` (and
            correlation) or `"spline"` (any shape).
        layers: Spline layers; where it is None two, but none beside the warps of a sphere alone,
            which do without the plane of the splines and so without its pole.
        bins: Bins K of a spline.
        hidden: Hidden units of each coordinate's conditioner.
        coupling: Coupling instead of autoregressive conditioning: fewer sequential steps of a draw
            where there are many labels.
        dropout: Share of conditioner units dropped in training mode, once per event; where it is
            None, `flowpost.fit` drops a tenth and a loop of your own none.
        warps: Zonal warps of each `Sphere`, for densities with fine structure all over the sky
            (32 to 64 where there is no context); a posterior around one direction needs none.
        wait: Training steps for which the splines of a `Circle` or `Sphere` wait for the location,
            to grow in as many more; where it is None, `flowpost.fit` has them wait a tenth of its
            steps and a loop of your own 300. Give a longer one a tenth of its steps.
        reference: Whether every event brings a first guess of its label, to which the location is
            relative: True, False, or the names of the blocks that have one. Where it is None,
            `fit_scale` decides by what it is given, or the first step of training with one.

    Raises:
        ValueError: If an option is unknown or out of range.

    Example:
        >>> import flowpost as fp
        >>> head = PosteriorHead(16, fp.Product(energy=fp.Positive(), vertex=fp.Real(3)))
        >>> q = head(torch.zeros(5, 16))
        >>> q.batch_shape, q.event_shape
        (torch.Size([5]), torch.Size([4]))
    """

    unit: Tensor
    loc: Tensor
    scale: Tensor
    fitted: Tensor
    referenced: Tensor

    def __init__(
        self,
        context: int,
        space: Space,
        flow: str = "spline",
        *,
        layers: int | None = None,
        bins: int = 8,
        hidden: int = 64,
        coupling: bool = False,
        dropout: float | None = None,
        warps: int = 0,
        wait: int | None = None,
        reference: bool | str | Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(space, Space):
            raise ValueError(
                f"Expected space as a label space; got {space!r}. Try flowpost.Real(2)."
            )
        self.space = space
        self.context = check_positive_int(context, "context", minimum=0)
        if dropout is not None and not (isinstance(dropout, Real) and 0 <= dropout < 1):
            raise ValueError(
                f"Expected dropout as a share of at least 0 and below 1; got {dropout!r}. Set 0 "
                "for none."
            )
        bent = bool(warps) and all(b.space.directional for b in space.blocks)
        if layers is None:
            layers = 0 if bent else 2
        # numbers of Python, which can be written as JSON
        self._options: dict[str, Any] = {
            "flow": flow,
            "layers": check_positive_int(
                layers, "layers", minimum=int(flow == "spline" and not bent)
            ),
            "bins": check_positive_int(bins, "bins", minimum=2),
            "hidden": check_positive_int(hidden, "hidden"),
            "coupling": bool(coupling),
            "dropout": None if dropout is None else float(dropout),
            "warps": check_positive_int(warps, "warps", minimum=0),
            "wait": None if wait is None else check_positive_int(wait, "wait"),
            "reference": None,
        }
        if reference is not None:
            self._options["reference"] = blocks_named(space, reference)
        self.flow = ResidualFlow(
            space,
            self.context,
            flow,
            layers=self._options["layers"],
            bins=self._options["bins"],
            hidden=self._options["hidden"],
            coupling=self._options["coupling"],
            dropout=self._options["dropout"] or 0.0,
            warps=self._options["warps"],
            wait=self._options["wait"],
        )
        for name, value in space.default_scale()._asdict().items():
            self.register_buffer(name, value)
        self.register_buffer("fitted", torch.tensor(False))
        names = self._options["reference"] or ()
        self.register_buffer("referenced", torch.tensor([b.name in names for b in space.blocks]))

    def config(self) -> dict[str, Any]:
        """JSON description from which the head is built again."""
        return {"context": self.context, "space": self.space.config(), **self._options}

    def fit_scale(self, z: Any, weight: Any = None, reference: Any = None) -> PosteriorHead:
        """Set the whitening of the labels from the training part of the data.

        Call it once before training (`flowpost.fit` does); no gradient flows through it.

        Arguments:
            z: Labels of shape (N, D).
            weight: Event weights of shape (N,); their absolute values count.
            reference: First guesses of the labels, as in `forward`; the labels are whitened
                relative to them, and the head asks for them from then on. Another call decides
                anew, unless the head was built with a choice.

        Raises:
            ValueError: If a label or reference is not in the space or there is none, or the head
                was built for other references.
        """
        z = as_tensor(z, "labels").detach().cpu()
        z = self._columns(z) if z.ndim == 1 else z
        hint = self.space._hint(z.shape[-1]) if z.ndim else ""
        check_shape(z, ("N", self.space.label_size), "labels", hint)
        if not len(z):
            raise ValueError("Expected labels of at least one event; got none.")
        z = self.space.validate(z)
        if weight is not None:
            weight = as_tensor(weight, "weight").detach().cpu().double().abs()
            weight = check_weights(weight, z[:, 0].double())
            if not bool(weight.sum() > 0):
                raise ValueError("Expected weights with a positive sum; all are 0.")
        guess, flags = self._reference(reference, 2, fitting=True)
        if guess is not None:
            guess = guess.detach().cpu()
            if guess.shape != z.shape:
                raise ValueError(
                    f"Expected reference of shape {tuple(z.shape)} as the labels; got "
                    f"{tuple(guess.shape)}. Give one first guess for each event."
                )
        fitted = self.space.fit_blocks(z, weight, guess, flags)
        for name, value in fitted._asdict().items():
            check_finite(value.to(self.scale.dtype), f"{name} of the labels", "Change their units.")
        if not bool((fitted.unit.to(self.scale.dtype) > 0).all()):
            raise ValueError(
                f"Expected labels in units that {self.scale.dtype} can hold; got labels of about "
                f"{fitted.unit.min().item():g}. Change their units."
            )
        for name, value in fitted._asdict().items():
            setattr(self, name, value.to(getattr(self, name)))
        self.fitted = torch.ones_like(self.fitted)
        self.referenced = torch.tensor(flags, device=self.fitted.device)
        return self

    def _check_referenced(self, names: list[str], given: bool) -> None:
        """Refuse references of other blocks than those that have one."""
        blocks = self.space.blocks
        wanted = [b.name for b, own in zip(blocks, self.referenced.tolist(), strict=True) if own]
        if set(names) == set(wanted):
            return
        built = self._options["reference"] is not None
        if given and 0 < len(wanted) < len(blocks):
            remedy = f"Give {{{', '.join(f'{n!r}: …' for n in wanted)}}}."
        elif built and not wanted:
            remedy = "Leave it out, or build the head with reference=None."
        else:
            remedy = (
                "Pass reference=… wherever the head is called and to set_scales, fit_scale or fit"
            )
            if not built:
                remedy += ", or nowhere; head.fit_scale(z, reference=…) scales it anew"
            remedy += "."
        how = "built or scaled" if built or bool(self.fitted) else "called in training"
        raise ValueError(
            f"Expected a reference of {listed(wanted)}, as the head was {how}; got that of "
            f"{listed(names)}. {remedy}"
        )

    def _reference(
        self,
        reference: Any,
        ndim: int | None = None,
        known: Tensor | None = None,
        *,
        fitting: bool = False,
    ) -> tuple[Tensor | None, tuple[bool, ...]]:
        """First guesses (..., D) of so many dimensions, and which leaf blocks have one.

        Those of labels that are not known need not be either. A scale that is being fitted is bound
        only by how the head was built.
        """
        if isinstance(reference, Mapping) and not reference:
            reference = None
        blocks, names = self.space.blocks, named_blocks(self.space, reference)
        built = self._options["reference"] is not None
        if built or (not fitting and bool(self.fitted | self.referenced.any())):
            self._check_referenced(names, reference is not None)
        if reference is None:
            return None, (False,) * len(blocks)
        flags = tuple(b.name in names for b in blocks)
        if self._options["warps"] and any(
            b.space.directional and own for b, own in zip(blocks, flags, strict=True)
        ):
            raise ValueError(
                "Expected no reference of a direction that warps bend; got one. Set warps=0."
            )
        centre = self.space.centre(Scale(self.unit, self.loc, self.scale))
        z = read_reference(self.space, reference, centre, self.flow.bias, ndim)
        if known is not None and known.shape == z.shape:
            z = torch.where(known.to(z.device), z, centre.to(z))
        if not torch.compiler.is_compiling():
            z = self.space.validate(z, "reference")
        return z.to(self.flow.bias.device), flags

    def _columns(self, z: Tensor, context: Any = None) -> Tensor:
        """Labels (N,) of a single column as (N, 1), also where N is 1."""
        if self.space.label_size != 1:
            return z
        bare = z.ndim == 1 and (context is None or np.ndim(context) > 1)
        return z.unsqueeze(-1) if bare or z.shape[-1:] != (1,) else z

    def _context(self, context: Any) -> Tensor | None:
        if context is None:
            if self.context:
                raise ValueError(
                    f"Expected a context of shape (N, {self.context}); got None. Only a head with "
                    "context=0 is an unconditional density."
                )
            return None
        context = as_tensor(context, "context", like=self.flow.bias)
        if context.ndim == 0 or context.shape[-1] != self.context:
            raise ValueError(
                f"Expected context of shape (N, {self.context}); got {tuple(context.shape)}. Set "
                "PosteriorHead(context=…) to the width of the encoder's output."
            )
        if not torch.compiler.is_compiling():
            check_finite(
                context.detach(),
                "context",
                "Look for NaN in the inputs of that row of the batch, or a diverged network.",
            )
        return context

    def _load_from_state_dict(self, state: Any, prefix: str, *args: Any) -> None:
        # weights from before there were references
        state.setdefault(f"{prefix}referenced", torch.zeros_like(self.referenced))
        super()._load_from_state_dict(state, prefix, *args)

    def forward(
        self, context: Tensor | None, *, reference: Any = None, validate_args: bool = True
    ) -> Posterior:
        """The posterior of each event.

        Arguments:
            context: Context of shape (N, L), or None for an unconditional density.
            reference: A first guess of every label, of shape (N, D), or a dict of those of some
                blocks by name: the location is predicted relative to it, in units of the predicted
                width, as an offset (`Real`), a factor (`Positive`), an offset of the normal
                quantile (`Interval`) or a rotation (`Circle`, `Sphere`). A double reference keeps
                its digits, and so do labels and draws with it.
            validate_args: Whether the posterior checks labels.

        Raises:
            ValueError: If the context is not finite or has another width, or a reference is
                missing, not in the space or not asked for.
        """
        return self._bind(context, reference, validate_args=validate_args)

    def _bind(
        self,
        context: Tensor | None,
        reference: Any,
        known: Tensor | None = None,
        validate_args: bool = True,
    ) -> Posterior:
        scale = Scale(self.unit.clone(), self.loc.clone(), self.scale.clone())
        context = self._context(context)
        ndim = None if context is None else context.ndim
        guess, flags = self._reference(reference, ndim, known)
        if guess is not None and context is not None and guess.shape[:-1] != context.shape[:-1]:
            raise ValueError(
                f"Expected one reference for each context; got contexts of shape "
                f"{tuple(context.shape)} and references of shape {tuple(guess.shape)}."
            )
        if any(flags) and self.training and torch.is_grad_enabled():
            # decided from now on; in place, so that it works in any training loop
            self.referenced |= torch.tensor(flags, device=self.referenced.device)
        flow = self.flow(context, scale, guess, flags)
        return Posterior(flow, validate_args=validate_args)

    def loss(
        self,
        context: Tensor | None,
        z: Any,
        weight: Any = None,
        mask: Any = None,
        *,
        reference: Any = None,
        signed_weights: bool = False,
    ) -> Tensor:
        """Joint KL in nats: the weighted mean of −ln q(z|x).

        Arguments:
            context: Context of shape (N, L), or None.
            z: Labels of shape (N, D).
            weight: Event weights of shape (N,); the mean is normalised by their sum.
            mask: True where a label column is known, of shape (N, D), or a dict of those of some
                blocks by name, (N,) or (N, k); other blocks are known. Missing columns are
                marginalised, which is exact for whole trailing blocks of the flow; others are
                refused, and so are directions and angles where any other label is known, for they
                come first. Their values are not read and may be NaN.
            reference: First guesses of the labels, as in `forward`.
            signed_weights: Allow negative weights, as of next-to-leading-order generators.

        Raises:
            ValueError: If labels, weights or mask do not fit.
        """
        log_prob = self.log_prob(context, z, mask, reference=reference)
        return weighted_mean(-log_prob, weight, signed_weights)

    def log_prob(
        self, context: Tensor | None, z: Any, mask: Any = None, *, reference: Any = None
    ) -> Tensor:
        """Log density of each event's label in nats, of shape (N,); arguments as in `loss`.

        Raises:
            ValueError: If labels or mask do not fit.
        """
        if mask is None:
            q, z = self._bind(context, reference), self._columns(as_tensor(z, "labels"), context)
            self._match(q, z)
            return q.log_prob(z)
        return self._masked(context, z, mask, reference)[1]

    def _masked(
        self, context: Tensor | None, z: Any, mask: Any, reference: Any
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Base coordinates (N, d), log density (N,), and which events (N,) have all labels.

        Those of missing labels are arbitrary.
        """
        z = self._columns(as_tensor(z, "labels", like=self.flow.bias), context)
        z = z.to(self.flow.bias.device)
        known = read_mask(self.space, mask, z)
        terms = known_coordinates(self.space, known)
        q = self._bind(context, reference, known)
        self._match(q, z)
        dummy = self.space.centre(q._flow.scale)
        z = q._labels(torch.where(known, z, dummy.to(z)))
        u, ladj = q._flow.to_base(z)
        return u, torch.where(terms, log_density(u, ladj), 0.0).sum(-1), known.all(-1)

    def _match(self, q: Posterior, z: Tensor) -> None:
        """Refuse labels of other events than the contexts', which would broadcast."""
        if q.batch_shape and z.shape[:-1] != q.batch_shape:
            hint = self.space._hint(z.shape[-2]) if z.shape[-1] == 1 and z.ndim > 1 else ""
            remedy = f"Give as many labels as inputs, {(*q.batch_shape, self.space.label_size)}."
            if len(q.batch_shape) > 1:
                remedy = f"An encoder gives (N, {self.context}): flatten what it returns."
            raise ValueError(
                f"Expected one label for each context; got contexts of shape "
                f"{(*q.batch_shape, self.context)} and labels of shape {tuple(z.shape)}. "
                f"{hint or remedy}"
            )

    def to_base_and_log_prob(
        self, context: Tensor | None, z: Any, *, reference: Any = None
    ) -> tuple[Tensor, Tensor]:
        """Base coordinates (N, d) and log density (N,) of each event's label.

        Raises:
            ValueError: If labels do not fit.
        """
        q = self(context, reference=reference)
        z = self._columns(as_tensor(z, "labels"), context)
        self._match(q, z)
        return q.to_base_and_log_prob(z)
