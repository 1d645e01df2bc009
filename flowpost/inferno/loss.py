r"""The INFERNO loss: the expected variance of the parameter of interest.

With the covariance :math:`I^{-1}` of `flowpost.inferno.information`, the loss of a batch is

.. math:: L = \ln\, (I^{-1})_{00}

or, without the logarithm, the variance itself. The batch stands for the whole measurement: its
weighted means of soft bins, times the yields, are the expected counts.

Bins that no event favours get no gradient and stay empty. While the training is young, the entropy
of the bins' use u, the mean of soft bins over the processes, keeps them alive:

.. math:: L - \beta\, (1 - t)\, H(u), \qquad H(u) = -\sum_k u_k \ln u_k ,

with the progress t of the training in [0, 1].

Source: P. de Castro, T. Dorigo, *INFERNO: Inference-Aware Neural Optimisation*, 2019,
https://arxiv.org/abs/1806.04743.
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from .._checks import check_positive_int
from .._modes import evaluated
from .._progress import progress_bar
from .information import Information, Sums, expectation, gross, inverse, sums
from .model import CountingModel
from .samples import Key, blocks, check_nuisances, check_samples

__all__ = ["InfernoLoss", "InformationAccumulator", "information"]

# of all expected events in one bin: a summary that distinguishes nothing
_COLLAPSED = 1 - 1e-6


class InfernoLoss:
    """The variance of the parameter of interest that a summary is expected to reach.

    Arguments:
        model: The counting experiment.
        log: Return the logarithm of the variance, which trains better.
        spread: Weight β of the entropy of the bins' use at the begin of the training; `anneal`
            lowers it (`inferno.fit` calls it), and validations leave it out.
        by_hand: Propagate the tangents of known layers layer by layer; without it, every network
            by `torch.func.jvp`.

    Example:
        >>> from torch.distributions import Normal
        >>> from flowpost.inferno import CountingModel, Normalisation, Process
        >>> model = CountingModel(
        ...     [Process("signal", 50.0, signal=True), Process("background", 1000.0)],
        ...     [Normalisation(name="b", processes="background", constraint=Normal(1.0, 0.1))],
        ... )
        >>> events = {"signal": torch.randn(500, 2) + 1, "background": torch.randn(500, 2)}
        >>> loss = InfernoLoss(model)(torch.nn.Softmax(-1), events)
    """

    def __init__(
        self,
        model: CountingModel,
        *,
        log: bool = True,
        spread: float = 0.0,
        by_hand: bool = True,
    ) -> None:
        if not isinstance(model, CountingModel):
            raise ValueError(f"Expected a CountingModel; got {type(model).__name__}.")
        if not 0 <= spread < math.inf:
            raise ValueError(f"Expected spread as a number of at least 0; got {spread!r}.")
        self.model, self.log, self.spread, self.by_hand = model, log, spread, by_hand
        self._progress = 0.0
        self._looked = False

    def __repr__(self) -> str:
        return f"InfernoLoss({self.model!r}, log={self.log}, spread={self.spread:g})"

    def anneal(self, progress: float) -> None:
        """Lower the weight of the bins' use to that of a progress in [0, 1]."""
        self._progress = progress

    def __call__(self, summary: nn.Module, samples: Any) -> Tensor:
        """The loss of a batch.

        Arguments:
            summary: Inputs (N, …) to probabilities (N, K) of the bins: a `SummaryModel`, or any
                module of yours.
            samples: `Sample` or inputs of events of every process, by its name.

        Raises:
            ValueError: If samples are missing, the summary is not finite, or the bins leave a
                combination of parameters open.
        """
        if not self._looked:
            check_nuisances(self.model, check_samples(self.model, samples))
            self._looked = True
        found = sums(summary, blocks(self.model, samples), by_hand=self.by_hand)
        counts, slopes = expectation(self.model, found)
        size = gross(self.model, found)
        variance = inverse(self.model, counts, slopes, size)[0, 0]
        largest = float((size / size.sum()).detach().max())
        if largest > _COLLAPSED:
            self._warn(int(size.argmax()), math.sqrt(float(variance.detach())))
        value = variance.log() if self.log else variance
        weight = self.spread * (1 - self._progress)
        return value - weight * _entropy(self.model, found) if weight else value

    def evaluate(self, summary: nn.Module, samples: Any) -> float:
        """The loss of all events of samples together, in portions and evaluation mode."""
        variance = _gathered(self.model, summary, samples).covariance[0, 0]
        return float(variance.log() if self.log else variance)

    def _warn(self, bin_: int, width: float) -> None:
        warnings.warn(
            f"All events fall into bin {bin_}: the summary distinguishes nothing, and the "
            f"uncertainty on {self.model.poi} is that of a plain count, {width:.4g}. Start anew "
            "with another seed, a lower learning rate or a higher temperature.",
            stacklevel=3,
        )


def _entropy(model: CountingModel, found: Sums) -> Tensor:
    """Entropy of the bins' use, of every process alike, in nats."""
    keys = [Key(p.name) for p in model.processes]
    use = torch.stack([found.bins[k] / found.weight[k] for k in keys]).mean(0)
    return torch.special.entr(use.clamp_min(torch.finfo(use.dtype).tiny)).sum()


class InformationAccumulator:
    """The expected uncertainty from all events, portion by portion.

    Small batches read a width that is too small: the noise of the derivatives counts as
    information on the nuisances. A validation adds up all its events before it computes the width.

    Arguments:
        model: The counting experiment.

    Example:
        >>> accumulator = InformationAccumulator(model)  # doctest: +SKIP
        >>> accumulator.update(summary, samples)  # doctest: +SKIP
        >>> print(accumulator.compute().width)  # doctest: +SKIP
    """

    def __init__(self, model: CountingModel) -> None:
        self.model = model
        self.sums = Sums()

    @torch.no_grad()
    def update(self, summary: nn.Module, samples: Any, *, chunk: int = 8192) -> None:
        """Add events, in evaluation mode, `chunk` of them at once.

        Raises:
            ValueError: As `InfernoLoss`.
        """
        for part in blocks(self.model, samples):
            self._add(summary, part, chunk)

    def _add(self, summary: nn.Module, part: Any, chunk: int) -> None:
        device = next((p.device for p in summary.parameters()), torch.device("cpu"))
        own = float(part.weights[part.key].double().sum())
        # portions of a larger sample say so by their total; others add up to one
        whole = abs(part.total - own) <= 1e-9 * abs(own)
        before = self.sums.totals.get(part.key, 0.0) if whole else 0.0
        with evaluated(summary):
            for portion in part.split(chunk):
                self.sums.add(sums(summary, [portion.to(device)]))
        self.sums.totals[part.key] = before + part.total

    def compute(self) -> Information:
        """The uncertainties that all events together give.

        Raises:
            ValueError: If there were no events, or the bins leave parameters open.
        """
        if not self.sums.bins:
            raise ValueError("Expected events; got none. Call update first.")
        return Information.of(self.model, self.sums)


def information(
    model: CountingModel,
    summary: nn.Module,
    samples: Any,
    *,
    chunk: int = 8192,
    progress: bool = False,
) -> Information:
    """The expected uncertainty of a summary from all events of samples.

    Arguments:
        model: The counting experiment.
        summary: Inputs (N, …) to probabilities (N, K).
        samples: `Sample` or inputs of every process, by its name.
        chunk: Events that go through the network at once.
        progress: Show a progress bar.

    Raises:
        ValueError: As `InfernoLoss`.
    """
    samples = check_samples(model, samples)
    check_nuisances(model, samples)
    return _gathered(model, summary, samples, chunk, progress).told()


def _gathered(
    model: CountingModel,
    summary: nn.Module,
    samples: Any,
    chunk: int = 8192,
    progress: bool = False,
) -> Information:
    check_positive_int(chunk, "chunk")
    accumulator = InformationAccumulator(model)
    parts = blocks(model, samples)
    with progress_bar(sum(map(len, parts)), "information", progress) as bar, torch.no_grad():
        for part in parts:
            accumulator._add(summary, part, chunk)
            bar.update(len(part))
    return accumulator.compute()
