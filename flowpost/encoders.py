r"""Encoders: networks that turn an event into a context vector of shape (N, L).

They are conveniences: any `torch.nn.Module` that returns (N, L) works in their place. Each
standardises its inputs with what `fit_scale` finds in the training part (`flowpost.fit` calls it)
and squashes what is far out: with y = (x − loc) / scale,

.. math:: y \to y \ \text{for}\ |y| \le B, \qquad
          \pm\big(B + \mathrm{asinh}(|y| - B)\big) \ \text{beyond},

so that an input at a hundred standard deviations, as real catalogues have them, cannot blow up a
predicted width, while a linear dependence stays one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence

from ._checks import as_tensor, check_finite, check_positive_int, check_shape

__all__ = ["CNN", "DeepSets", "Encoder", "LSTM", "Squash", "Tabular"]

_SQUASH = 4.0
_FIT_ROWS = 200_000


class Squash(nn.Module):
    """Standardise the last dimension and squash outliers.

    Arguments:
        features: Size F of the last dimension.
    """

    loc: Tensor
    scale: Tensor
    fitted: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("fitted", torch.tensor(False))
        self.register_buffer("loc", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def fit(self, x: Tensor) -> None:
        """Set median and central width of each feature from rows (M, F); NaN is left out."""
        rows = (
            x[torch.linspace(0, len(x) - 1, min(len(x), _FIT_ROWS), dtype=torch.float64).long()]
            .detach()
            .cpu()
            .double()
        )
        rows = torch.where(torch.isfinite(rows), rows, torch.nan)
        levels = rows.new_tensor([0.158655, 0.5, 0.841345])
        # columns one by one: torch.quantile refuses more than 2²⁴ elements
        low, median, high = torch.stack(
            [torch.nanquantile(column, levels) for column in rows.T], 1
        ).nan_to_num(0.0)
        width = (high - low) / 2
        centred = (rows - rows.nanmean(0)).nan_to_num(0.0)
        spread = centred.square().mean(0).sqrt()
        width = torch.where(width > 0, width, spread)
        self.loc = median.to(self.loc)
        self.scale = torch.where(width > 0, width, torch.ones_like(width)).to(self.scale)
        self.fitted = torch.ones_like(self.fitted)

    def forward(self, x: Tensor) -> Tensor:
        """Standardised and squashed inputs of the shape of x."""
        y = (x - self.loc) / self.scale
        inner = y.clamp(-_SQUASH, _SQUASH)
        return inner + torch.asinh(y - inner)


class Encoder(nn.Module):
    """An encoder that can be saved: it knows the arguments that built it."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self._options = options

    def config(self) -> dict[str, Any]:
        """JSON description from which the encoder is built again."""
        return {"type": type(self).__name__, **self._options}

    def check(self, *args: Any, **named: Any) -> None:
        """Refuse inputs, arguments as in `forward`, before they are shuffled.

        Raises:
            ValueError: If their shape is wrong, or a value is not finite; the error names its row.
        """

    @property
    def fitted(self) -> bool:
        """Whether the standardisation has been set."""
        return all(bool(m.fitted) for m in self.modules() if isinstance(m, Squash))


def _mlp(sizes: list[int], dropout: float) -> nn.Sequential:
    parts: list[nn.Module] = []
    for i, (a, b) in enumerate(pairwise(sizes)):
        parts.append(nn.Linear(a, b))
        if i < len(sizes) - 2:
            parts += [nn.SiLU(), nn.Dropout(dropout)]
    return nn.Sequential(*parts)


class Tabular(Encoder):
    """A multilayer perceptron with a linear path beside it, for columns of numbers.

    At initialisation it is the linear path.

    Arguments:
        features: Columns F of the input.
        context: Features L of the context.
        hidden: Units of a hidden layer.
        layers: Hidden layers.
        dropout: Share of hidden units dropped in training.
        missing: Take NaN and infinity as missing values: they are set to the column's median, and
            the network is told which were. Otherwise they are an error.

    Raises:
        ValueError: If the input has another width, or is not finite while `missing` is not set.
    """

    def __init__(
        self,
        features: int,
        context: int,
        hidden: int = 128,
        layers: int = 3,
        dropout: float = 0.2,
        missing: bool = False,
    ) -> None:
        super().__init__(
            features=features,
            context=context,
            hidden=hidden,
            layers=layers,
            dropout=dropout,
            missing=missing,
        )
        self.features = check_positive_int(features, "features")
        check_positive_int(layers, "layers")
        self.missing = missing
        inputs = features * (2 if missing else 1)
        self.squash = Squash(features)
        self.skip = nn.Linear(inputs, check_positive_int(context, "context"))
        self.net = _mlp([inputs, *[hidden] * layers, context], dropout)
        for p in self.net[-1].parameters():
            nn.init.zeros_(p)

    def fit_scale(self, x: Any) -> Tabular:
        """Set the standardisation from inputs (N, F)."""
        self.squash.fit(self._columns(x))
        return self

    def check(self, x: Any) -> None:
        """Refuse inputs (N, F) of another width, or not finite where none may be missing."""
        x = as_tensor(x, "x")
        check_shape(x, ("N", self.features), "x", "Set Tabular(features=…) to its columns.")
        if not self.missing and not torch.compiler.is_compiling():
            check_finite(x, "x", "Set Tabular(missing=True) where values may be missing.")

    def _columns(self, x: Any) -> Tensor:
        x = as_tensor(x, "x", like=self.skip.weight)
        self.check(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Context (N, L) of inputs (N, F)."""
        x = self._columns(x).to(self.skip.weight.dtype)
        if self.missing:
            known = torch.isfinite(x)
            x = self.squash(torch.where(known, x, self.squash.loc))
            x = torch.cat([x, (~known).to(x)], -1)
        else:
            x = self.squash(x)
        return self.skip(x) + self.net(x)


class CNN(Encoder):
    """A small convolutional network for images of any size of at least 4 × 4 pixels.

    Arguments:
        channels: Channels C of an image.
        context: Features L of the context.
        width: Filters of the first layer; doubled in each block.
        blocks: Blocks of two convolutions; from the second on they halve the image.
        dropout: Share of pooled features dropped in training.
    """

    def __init__(
        self, channels: int, context: int, width: int = 32, blocks: int = 2, dropout: float = 0.1
    ) -> None:
        super().__init__(
            channels=channels, context=context, width=width, blocks=blocks, dropout=dropout
        )
        self.channels = check_positive_int(channels, "channels")
        self.squash = Squash(channels)
        parts: list[nn.Module] = []
        size = channels
        for i in range(check_positive_int(blocks, "blocks")):
            out, stride = width * 2**i, 2 if i else 1
            parts += [nn.Conv2d(size, out, 3, padding=1, stride=stride), nn.SiLU()]
            parts += [nn.Conv2d(out, out, 3, padding=1), nn.SiLU()]
            size = out
        self.convolutions = nn.Sequential(*parts)
        self.pool = nn.AdaptiveAvgPool2d(4)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(16 * size, check_positive_int(context, "context"))

    def fit_scale(self, x: Any) -> CNN:
        """Set the standardisation of each channel from images (N, C, H, W)."""
        x = self._images(x)
        self.squash.fit(x.movedim(1, -1).reshape(-1, self.channels))
        return self

    def check(self, x: Any) -> None:
        """Refuse images of another shape than (N, C, H, W), or not finite."""
        x = as_tensor(x, "x")
        check_shape(x, ("N", self.channels, "H", "W"), "x", "Set CNN(channels=…) to its channels.")
        if not torch.compiler.is_compiling():
            check_finite(x, "x", "Mask or fill dead pixels.")

    def _images(self, x: Any) -> Tensor:
        x = as_tensor(x, "x", like=self.out.weight)
        self.check(x)
        return x

    def forward(self, x: Tensor) -> Tensor:
        """Context (N, L) of images (N, C, H, W)."""
        x = self._images(x).to(self.out.weight.dtype)
        x = self.squash(x.movedim(1, -1)).movedim(-1, 1)
        return self.out(self.dropout(self.pool(self.convolutions(x)).flatten(1)))


def _element_mask(x: Tensor, lengths: Any, mask: Any) -> Tensor:
    """Which elements (N, M) of padded events (N, M, F) are real."""
    if mask is not None:
        mask = torch.as_tensor(mask, device=x.device).bool()
        check_shape(mask, tuple(x.shape[:2]), "mask", "True is a real element.")
        return mask
    if lengths is None:
        return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    lengths = torch.as_tensor(lengths, device=x.device)
    check_shape(lengths, (len(x),), "lengths", "One length an event.")
    if bool(((lengths < 0) | (lengths > x.shape[1])).any()):
        raise ValueError(
            f"Expected lengths between 0 and {x.shape[1]}; got {int(lengths.min())} to "
            f"{int(lengths.max())}. Pad the events to the longest."
        )
    return torch.arange(x.shape[1], device=x.device) < lengths[:, None]


class _Sequences(Encoder):
    """What encoders of padded elements (N, M, F) share."""

    features: int
    squash: Squash

    def check(self, x: Any, lengths: Any = None, mask: Any = None) -> None:
        """Refuse events (N, M, F) of another shape, or with a real element that is not finite."""
        if isinstance(x, PackedSequence):
            return
        x = as_tensor(x, "x")
        check_shape(x, ("N", "M", self.features), "x", "Pad the events to one length.")
        known = _element_mask(x, lengths, mask)
        if bool((known & ~torch.isfinite(x).all(-1)).any()):
            check_finite(torch.where(known.unsqueeze(-1), x, 0.0), "x")

    def _elements(self, x: Any, lengths: Any, mask: Any) -> tuple[Tensor, Tensor]:
        x = as_tensor(x, "x", like=self.squash.loc).to(self.squash.loc.dtype)
        check_shape(x, ("N", "M", self.features), "x", "Pad the events to one length.")
        known = _element_mask(x, lengths, mask)
        x = torch.where(known.unsqueeze(-1), x, 0.0)
        if not torch.compiler.is_compiling():
            check_finite(x, "x")
        return x, known

    def fit_scale(self, x: Any, lengths: Any = None, mask: Any = None) -> _Sequences:
        """Set the standardisation from the elements of events; arguments as in `forward`."""
        if isinstance(x, PackedSequence):
            self.squash.fit(x.data)
        else:
            x, known = self._elements(x, lengths, mask)
            if bool(known.any()):
                self.squash.fit(x[known])
        return self


class LSTM(_Sequences):
    """A bidirectional LSTM for sequences of variable length; events may be empty.

    Arguments:
        features: Features F of an element.
        context: Features L of the context.
        hidden: Units in each direction.
        layers: Stacked layers.
        dropout: Share of features dropped before the output in training.
    """

    def __init__(
        self, features: int, context: int, hidden: int = 64, layers: int = 1, dropout: float = 0.1
    ) -> None:
        super().__init__(
            features=features, context=context, hidden=hidden, layers=layers, dropout=dropout
        )
        self.features = check_positive_int(features, "features")
        self.squash = Squash(features)
        self.lstm = nn.LSTM(features, hidden, layers, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(dropout)
        self.out = _mlp([4 * hidden + 1, 2 * hidden, check_positive_int(context, "context")], 0.0)

    def forward(self, x: Any, lengths: Any = None) -> Tensor:
        """Context (N, L); N may be 0.

        Arguments:
            x: Padded events of shape (N, M, F), or a `PackedSequence`.
            lengths: Elements of each event, of shape (N,); all M where it is None.

        Raises:
            ValueError: If shapes or lengths do not fit.
        """
        if not isinstance(x, PackedSequence):
            x, known = self._elements(x, lengths, None)
            if not len(x):  # no events: torch packs none
                return self.out(x.new_zeros(0, self.out[0].in_features))
            # an empty event is one element of zeros, known by its count of none
            count = known.sum(1)
            steps = count.clamp_min(1).cpu()
            data = self.squash(x) if x.shape[1] else x.new_zeros(len(x), 1, self.features)
            packed = pack_padded_sequence(data, steps, batch_first=True, enforce_sorted=False)
        else:
            packed = x._replace(data=self.squash(x.data.to(self.squash.loc.dtype)))
            _, count = nn.utils.rnn.pad_packed_sequence(packed, batch_first=True)
            count = count.to(packed.data.device)
        output, (state, _) = self.lstm(packed)
        padded, _ = nn.utils.rnn.pad_packed_sequence(output, batch_first=True)
        mean = padded.sum(1) / count.clamp_min(1).to(padded).unsqueeze(1)
        last = state[-2:].transpose(0, 1).flatten(1)
        size = torch.log1p(count.to(padded)).unsqueeze(1)
        return self.out(self.dropout(torch.cat([last, mean, size], 1)))


class DeepSets(_Sequences):
    """A permutation-invariant network for point clouds of variable size; events may be empty.

    Source: *Deep Sets*, M. Zaheer et al., 2017, https://arxiv.org/abs/1703.06114.

    Arguments:
        features: Features F of a point.
        context: Features L of the context.
        hidden: Units of a hidden layer.
        dropout: Share of hidden units dropped in training after pooling.
    """

    def __init__(
        self, features: int, context: int, hidden: int = 128, dropout: float = 0.1
    ) -> None:
        super().__init__(features=features, context=context, hidden=hidden, dropout=dropout)
        self.features = check_positive_int(features, "features")
        self.squash = Squash(features)
        self.point = _mlp([features, hidden, hidden, hidden], 0.0)
        self.out = _mlp([2 * hidden + 1, hidden, check_positive_int(context, "context")], dropout)

    def forward(self, x: Any, lengths: Any = None, mask: Any = None) -> Tensor:
        """Context (N, L).

        Arguments:
            x: Padded events of shape (N, M, F).
            lengths: Points of each event, of shape (N,).
            mask: True where a point is real, of shape (N, M), in place of lengths.

        Raises:
            ValueError: If shapes, lengths or mask do not fit.
        """
        x, known = self._elements(x, lengths, mask)
        # padding costs nothing: events are of very different size
        real = known.flatten().nonzero()[:, 0]
        points = self.point(self.squash(x.flatten(0, 1).index_select(0, real)))
        padded = points.new_zeros(known.numel(), points.shape[1]).index_copy(0, real, points)
        padded, keep = padded.unflatten(0, known.shape), known.unsqueeze(-1)
        count = known.sum(1, keepdim=True).to(points)
        mean = padded.sum(1) / count.clamp_min(1)
        if x.shape[1]:
            top = torch.where(keep, padded, -torch.inf).amax(1)
            top = torch.where(count > 0, top, 0.0)
        else:
            top = mean
        return self.out(torch.cat([mean, top, torch.log1p(count)], 1))
