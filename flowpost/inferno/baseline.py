r"""What a summary is compared with: a classifier by cross-entropy, and hard bins of any kind.

With balanced classes, the cross-entropy of a logit :math:`\ell(x)` is

.. math::

    L = \frac12 \sum_{i \in S} w_i \ln\!\big(1 + e^{-\ell(x_i)}\big)
      + \frac12 \sum_{i \in B} w_i \ln\!\big(1 + e^{\ell(x_i)}\big) ,
    \qquad \sum_S w_i = \sum_B w_i = 1 ,

smallest for the ratio of densities :math:`\ell = \ln f_S / f_B`, of which every signal fraction is
a monotone function. Nuisances have no part in it: they enter where events are counted in bins.

The information of hard bins needs :math:`\partial_\theta \lambda_i`. A hard bin has no derivative
in an event, so events are moved by a Transform to both sides of its nominal value,

.. math:: \partial_\theta \lambda_i \approx
          \frac{\lambda_i(\theta + h) - \lambda_i(\theta - h)}{2h} ,

and everything else is counted as for soft bins.

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743, section 5.1, whose baseline this is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .._checks import check_finite, check_positive_int, check_shape
from .._events import called, chosen, joined, mapped, sizes
from .._modes import evaluated
from .information import Information, Sums, added
from .model import CountingModel
from .samples import Block, blocks, check_nuisances, check_samples, first_floating

__all__ = ["CrossEntropyLoss", "hard_information", "hard_sums", "score"]


class CrossEntropyLoss:
    """Cross-entropy of signals against backgrounds, both of weight one, in nats.

    Within a class, processes are mixed in proportion to their yields. Only nominal events count:
    samples of nuisances may be there and are left aside. Weights may be negative.

    Arguments:
        model: The counting experiment.

    Raises:
        ValueError: If the model has no background.

    Example:
        >>> from flowpost.inferno import CountingModel, Process
        >>> signal, background = Process("signal", 50.0, signal=True), Process("background", 1e3)
        >>> model = CountingModel([signal, background])
        >>> events = {"signal": torch.randn(500, 2) + 1, "background": torch.randn(500, 2)}
        >>> loss = CrossEntropyLoss(model)(torch.nn.Linear(2, 1), events)
    """

    def __init__(self, model: CountingModel) -> None:
        totals = [sum(p.expected for p in model.processes if p.signal == s) for s in (True, False)]
        if not all(totals):
            raise ValueError(
                "Expected a model of signals and backgrounds; got no background. Add one: "
                "Process(name, expected)."
            )
        self.model = model
        self._nominal = CountingModel(model.processes, (), model.poi, model.nominal)
        self._share = {p.name: 0.5 * p.expected / totals[not p.signal] for p in model.processes}
        self._signal = {p.name: p.signal for p in model.processes}

    def __repr__(self) -> str:
        return f"CrossEntropyLoss({self._nominal!r})"

    def evaluate(self, network: nn.Module, samples: Any, chunk: int = 65536) -> float:
        """The loss of all events of samples, in evaluation mode, `chunk` of them at once."""
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        total = 0.0
        with evaluated(network), torch.no_grad():
            for part in blocks(self._nominal, samples):
                weight = self._weight(part).double()
                for portion in part.split(chunk):
                    nats = self._nats(network, [portion.to(device)]).double().cpu()
                    total += float(
                        (portion.weights[part.key].double().cpu() * nats).sum()
                        * self._share[part.key.process]
                        / weight.cpu()
                    )
        return total

    def __call__(self, network: nn.Module, samples: Any) -> Tensor:
        """The loss of a batch.

        Arguments:
            network: Inputs (N, …) to logits (N,) or (N, 1) of signal against background; tuples and
                dicts of inputs are its arguments.
            samples: `Sample` or inputs of events of every process, by its name.

        Raises:
            ValueError: If samples are missing, the weights of one do not sum to a positive number,
                or the logits have another shape or are not finite.
        """
        parts = blocks(self._nominal, samples)
        nats = self._nats(network, parts)
        loss = nats.new_zeros(())
        for part, own in zip(parts, nats.split([len(p) for p in parts]), strict=True):
            weight = part.weights[part.key].to(own)
            loss = loss + self._share[part.key.process] * (weight * own).sum() / self._weight(part)
        return loss

    def _nats(self, network: nn.Module, parts: list[Block]) -> Tensor:
        """Cross-entropy (N,) of each event of blocks."""
        counts = [len(p) for p in parts]
        logits = _logits(network, joined([p.x for p in parts], counts), sum(counts))
        check_finite(logits, "logits", "Look for NaN in the inputs, or lower the learning rate.")
        sign = [-1.0 if self._signal[p.key.process] else 1.0 for p in parts]
        signs = torch.tensor(sign).repeat_interleave(torch.tensor(counts))
        return F.softplus(logits * signs.to(logits))

    def _weight(self, part: Block) -> Tensor:
        """The sum of weights of a block."""
        total = part.weights[part.key].sum()
        if not bool(total > 0):
            raise ValueError(
                f"Expected weights of {part.key.process!r} with a positive sum; got "
                f"{float(total):g}. Use larger batches: negative weights must not outweigh the "
                "positive ones."
            )
        return total


def _logits(network: nn.Module, x: Any, events: int) -> Tensor:
    logits = called(network, x)
    if not isinstance(logits, Tensor) or tuple(logits.shape) not in ((events,), (events, 1)):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(
            f"Expected logits of shape ({events},) or ({events}, 1); got {got}. The network takes "
            "inputs (N, …) to one number an event."
        )
    return logits.reshape(events)


def score(network: nn.Module, chunk: int = 65536) -> Callable[[Any], Tensor]:
    """The sigmoid of a network's logit as a plain function of inputs.

    Arguments:
        network: As `CrossEntropyLoss` takes it.
        chunk: Events that go through it at once.

    Returns:
        A function of inputs (N, …) to scores (N,) in [0, 1], float64, of the network in evaluation
        mode, on its device and without gradient. In double precision scores close to one do not
        merge. It raises ValueError if a logit is NaN or the shape is another.

    Example:
        >>> score(torch.nn.Linear(3, 1))(torch.zeros(5, 3)).shape
        torch.Size([5])
    """
    check_positive_int(chunk, "chunk")

    @torch.no_grad()
    def function(x: Any) -> Tensor:
        total = next(iter(sizes(x)), 0)
        if not total:
            raise ValueError("Expected at least one event; got none.")
        device = next((p.device for p in network.parameters()), torch.device("cpu"))
        found = []
        with evaluated(network):
            for rows in torch.arange(total).split(chunk):
                part = mapped(chosen(x, rows), lambda t: t.to(device))
                found.append(_logits(network, part, len(rows)).double())
        logits = torch.cat(found)
        if bool(logits.isnan().any()):
            check_finite(logits, "logits", "Look for NaN in the inputs.")
        return logits.sigmoid()

    return function


def hard_information(
    model: CountingModel,
    assign: Callable[[Any], Tensor],
    samples: Any,
    bins: int,
    *,
    step: float = 0.5,
    chunk: int = 65536,
) -> Information:
    """The expected uncertainty of events counted in hard bins: the number to compare summaries by.

    Arguments:
        model: The counting experiment.
        assign: Inputs (N, …) to bins (N,), whole numbers from 0 to K − 1: `summary.assign`, or
            `lambda x: binning(score(x))`.
        samples: `Sample` or inputs of every process, by its name. Take events on which neither the
            network nor its bins were chosen; those promise too much.
        bins: Bins K.
        step: The distance h from nominal to which a Transform moves events for its derivative, in
            units of its shift. Larger values have more bias from curvature, smaller ones more noise
            of the few events that change bins, which reads as information on the nuisance.
        chunk: Events that are assigned at once.

    Raises:
        ValueError: If samples are missing, a bin is not one of K, or the bins leave a combination
            of parameters open.

    Example:
        >>> from flowpost.inferno import CountingModel, Process
        >>> signal, background = Process("signal", 50.0, signal=True), Process("background", 1e3)
        >>> model = CountingModel([signal, background])
        >>> events = {"signal": torch.ones(10), "background": torch.zeros(10)}
        >>> print(f"{hard_information(model, lambda x: x.long(), events, bins=2).width:.2f}")
        7.07
    """
    check_nuisances(model, check_samples(model, samples))
    found = hard_sums(assign, blocks(model, samples), bins, step, chunk)
    return Information.of(model, found).told()


def hard_sums(
    assign: Callable[[Any], Tensor],
    parts: Iterable[Block],
    bins: int,
    step: float = 0.5,
    chunk: int = 65536,
) -> Sums:
    """Sums over the events of blocks in hard bins, in float64; arguments as `hard_information`.

    Raises:
        ValueError: If a bin is not one of K, or `step` is not positive.
    """
    check_positive_int(bins, "bins")
    check_positive_int(chunk, "chunk")
    if not (isinstance(step, (int, float)) and 0 < step < math.inf):
        raise ValueError(f"Expected step as a positive number; got {step!r}. Try 0.5.")
    with torch.no_grad():
        return added(
            _counted(assign, portion, bins, step) for part in parts for portion in part.split(chunk)
        )


def _counted(assign: Callable[[Any], Tensor], part: Block, bins: int, step: float) -> Sums:
    found = Sums(totals={part.key: part.total})
    weights = {k: w.double() for k, w in part.weights.items()}
    index = _assigned(assign, part.x, part, bins)
    for key, weight in weights.items():
        found.bins[key] = torch.bincount(index, weight, bins)
        found.weight[key] = weight.sum()
    if not part.key.nuisance:
        found.gross[part.key] = torch.bincount(index, weights[part.key].abs(), bins)
        found.hard[part.key] = torch.bincount(index, minlength=bins)
    like = first_floating(part.x)
    for move in part.moves:
        nominal, h = float(move.nominal or 0.0), step * float(move.shift or 0.0)
        down, up = (
            torch.bincount(
                _assigned(assign, move.apply(part.x, like.new_tensor(value)), part, bins),
                weights[part.key],
                bins,
            )
            for value in (nominal - h, nominal + h)
        )
        found.moved[part.key.process, move.name] = (up - down) / (2 * h)
    return found


def _assigned(assign: Callable[[Any], Tensor], x: Any, part: Block, bins: int) -> Tensor:
    """Bins (N,) of the events of a block, or of their moved inputs."""
    index = torch.as_tensor(assign(x))
    check_shape(index, (len(part),), "assigned bins", "One whole number an event.")
    if index.is_floating_point() or index.is_complex() or index.dtype == torch.bool:
        raise ValueError(
            f"Expected bins as whole numbers; got {index.dtype}. A Binning makes them of scores."
        )
    low, high = (int(v) for v in index.aminmax())
    if low < 0 or high >= bins:
        raise ValueError(
            f"Expected bins from 0 to {bins - 1}; got {low if low < 0 else high}. Set bins=… to "
            "their number."
        )
    return index.to(part.weights[part.key].device, torch.int64)
