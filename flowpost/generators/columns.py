"""What teacher and student have in common: a masked flow over the columns of a data space."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Size, Tensor

from .._checks import as_tensor
from ..likelihood import BoundLikelihood, LabelEncoder, Likelihood
from ..likelihood.base import check_events
from ..spaces import Real, Scale, Space
from ..spaces.real import Line
from .maf import MaskedFlow, Path

__all__ = ["BoundColumns", "Columns"]

Projected: TypeAlias = list[tuple[Tensor, Tensor]]


class Columns(Likelihood):
    """A likelihood that is a masked flow; `Teacher` and `Student` are the two directions of it.

    Attributes:
        data: The space of the data.
        labels: The network that reads labels.
        flow: The masked flow.
    """

    unit: Tensor
    loc: Tensor
    scale: Tensor

    def __init__(self, space: Space, data: int | Space, inverse: bool, **options: int) -> None:
        own = Real(data) if isinstance(data, int) else data
        if not isinstance(own, Space) or not all(isinstance(b.space, Line) for b in own.blocks):
            raise ValueError(
                f"Expected data as a number of columns, or a space of real, positive or bounded "
                f"ones; got {own!r}. Give directions as FlowLikelihood takes them."
            )
        super().__init__(space, data=own.config(), **options)
        self.data = own
        self.labels = LabelEncoder(
            space, options["context"], options["label_hidden"], options["label_layers"]
        )
        self.flow = MaskedFlow(
            own.dof,
            options["context"],
            layers=options["layers"],
            bins=options["bins"],
            hidden=options["hidden"],
            depth=options["depth"],
            inverse=inverse,
        )
        for name, value in (("unit", 1.0), ("loc", 0.0), ("scale", 1.0)):
            self.register_buffer(name, torch.full((own.dof,), value))

    @property
    def size(self) -> int:
        """Parameters of the maps of all columns."""
        return sum(layer.columns * layer.size for layer in self.flow._masked)

    def fit_scale(self, x: Any, z: Any) -> Columns:
        """Set the scales from data (N, F) and labels (N, D) of the training part.

        Raises:
            ValueError: If data or labels are not in their space.
        """
        x = self.data.validate(as_tensor(x, "x"), "x")
        self.labels.fit_scale(self._labels(z))
        for name, value in self.data.fit_scale(x)._asdict().items():
            setattr(self, name, value.to(self.loc))
        self.fitted = torch.ones_like(self.fitted)
        return self

    def to_chart(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whitened columns (..., F) of data, in the type of the parameters, and ladj (...)."""
        parts = [b.space.to_plane(x[..., b.columns], at) for b, at in self._leaves()]
        columns, ladj = (torch.cat(p, -1).to(self.loc.dtype) for p in zip(*parts, strict=True))
        return columns, ladj.sum(-1)

    def from_chart(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Inverse of `to_chart`, with the ladj (...) of that direction."""
        parts = [b.space.from_plane(columns[..., b.base], at) for b, at in self._leaves()]
        x, ladj = (torch.cat(p, -1) for p in zip(*parts, strict=True))
        return x, ladj.sum(-1)

    def _leaves(self) -> Iterator[tuple[Any, Scale]]:
        # without directions the base has the columns in their order
        for b in self.data.blocks:
            yield b, Scale(self.unit[b.base], self.loc[b.base], self.scale[b.base])

    def _bind(self, z: Tensor) -> BoundColumns:
        return BoundColumns(self, self.flow.project(self.labels(z)), z.shape[:-1])


class BoundColumns(BoundLikelihood):
    """A masked flow bound to labels."""

    def __init__(self, model: Columns, projected: Projected, batch_shape: Size) -> None:
        self.model, self.projected, self.batch_shape = model, projected, batch_shape

    def noise(self, generator: torch.Generator | None = None) -> Tensor:
        """Base points (*batch, F)."""
        like = self.model.loc
        device = like.device if generator is None else generator.device
        shape = (*self.batch_shape, self.model.flow.columns)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=device).to(like)

    def path_of(self, columns: Tensor) -> Path:
        """The fast way of whitened columns (*batch, F), or of base points where that is fast."""
        return self.model.flow.fast(columns, self.projected)

    def _base(self, x: Any) -> tuple[Tensor, Tensor]:
        """Base points (*batch, F) of data, and ladj (*batch)."""
        x = as_tensor(x, "x", like=self.model.loc)
        if self.model.data.label_size == 1 and x.shape[-1:] != (1,):
            x = x.unsqueeze(-1)
        check_events(x.shape[:-1], self.batch_shape, "x")
        columns, ladj = self.model.to_chart(self.model.data.validate(x, "x"))
        columns = columns.expand(*self.batch_shape, -1)
        if self.model.flow.inverse:
            u, step = self.model.flow.slow(columns, self.projected)
        else:
            path = self.path_of(columns)
            u, step = path.states[-1], path.ladj
        return u, ladj + step

    def log_prob(self, x: Any, generator: torch.Generator | None = None) -> Tensor:
        """ln p(x|z) of data (*batch, F); the generator is not needed."""
        u, ladj = self._base(x)
        return self.model.flow.log_base(u) + ladj

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Data (*batch, F)."""
        return self.sample_and_log_prob(generator)[0]

    def sample_and_log_prob(
        self, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """Data (*batch, F) and ln p of them, from the same passes."""
        with torch.no_grad():
            u = self.noise(generator)
            if self.model.flow.inverse:
                path = self.path_of(u)
                columns, step = path.states[0], path.ladj
            else:
                columns, step = self.model.flow.slow(u, self.projected)
            x, ladj = self.model.from_chart(columns)
            return x, self.model.flow.log_base(u) - step - ladj

    def measured(self, x: Any) -> Tensor:
        """The columns of x."""
        x = as_tensor(x, "x", like=self.model.loc)
        if self.model.data.label_size == 1 and x.shape[-1:] != (1,):
            x = x.unsqueeze(-1)
        return x.new_full(x.shape[:-1], float(x.shape[-1]))

    def residuals(
        self, x: Any, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Base points (*batch, F)."""
        return self._base(x)[0], None
