r"""Tails of generated events, with the error that the training set leaves them.

The share of events beyond a threshold, :math:`P(S > s)`, of a generator that was trained on n
events is as uncertain as those leave it, however many events it generates. Counting errors of
generated events say nothing of that: a generator trained anew on other events of the same truth
gives another share. With one share for each of R training sets, and the same from exact or sampled
truth,

.. math:: t = \frac{\bar P - P_{\mathrm{true}}}{\sqrt{\sigma^2_{\bar P} + \sigma^2_{\mathrm{true}}}}

has σ of the mean from bootstraps over training sets, and is compared with Student's distribution of
R − 1 degrees of freedom (Welch's where the truth is a sample). With one training set,
`bootstrap_tails` draws its events with replacement and trains again each time.

Where *no* event is generated beyond s there is no spread to go by. A generator that does no more
than repeat its n training events, M times at random, has each of them with probability
:math:`c = 1 - e^{-M/n}`, and none beyond s with at most

.. math:: p = (1 - c\, P_{\mathrm{true}})^{R n} , \qquad
          p = \Big( \frac{m}{m + c R n} \Big)^k

if k of m true events are beyond. A generator that makes M fresh events has none more rarely, as
:math:`c\, n \le \min(n, M)`. Without the number of training events nothing is said.

Reference:
    An Introduction to the Bootstrap (B. Efron, R. Tibshirani, 1993), chapter 6
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int
from .._progress import progress_bar
from .tail_shares import FEWEST, Trained, Truth, sample_shares
from .tails_result import TailReport, TailRow

__all__ = ["bootstrap_tails", "tails"]


def tails(
    generated: Mapping[str, Sequence[Any]],
    thresholds: Any = None,
    *,
    true: Any = None,
    weight_true: Any = None,
    probabilities: Any = None,
    statistic: Callable[[Tensor], Any] | None = None,
    training_size: int | None = None,
    bootstraps: int = 1000,
    seed: int = 0,
) -> TailReport:
    """Compare shares beyond thresholds of generators that were each trained on several sets.

    Arguments:
        generated: By the generator's name, generated events (M, …) of each training set, or pairs
            of them and their weights (M,). At least two training sets, independent of each other;
            the same ones for all generators where these are to be compared.
        thresholds: Thresholds of the statistic, in its units. By default those that 10, 1 and 0.1 %
            of the true events exceed, as far as at least ten do.
        true: True events (N, …) that trained nothing.
        weight_true: Event weights (N,), at least 0.
        probabilities: Exact shares beyond each threshold, in place of true events.
        statistic: S, a function of events to values (N,); None where events are values already.
        training_size: Events n of a training set. Without it, nothing is said of a generator that
            has no event beyond a threshold.
        bootstraps: Over training sets, for the errors.
        seed: Of the bootstraps.

    Returns:
        A table by generator and threshold, with a report of what is off.

    Raises:
        ValueError: If there are fewer than two training sets, neither or both of true events and
            probabilities, or something is not finite.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> cut = [torch.rand(1000, generator=g) for _ in range(4)]
        >>> fair = [torch.empty(1000).exponential_(generator=g) for _ in range(4)]
        >>> exact = {"probabilities": [0.6065, 0.3679], "training_size": 1000}
        >>> print(tails({"cut": cut, "fair": fair}, [0.5, 1], **exact))
        Shares beyond thresholds, errors by bootstrap over training sets
          truth exact
          generator       beyond      share  / truth  ± error  Poisson         p  for all
          cut                0.5     0.4925   0.812   0.009    0.013   0.000254   0.000254  too few
          cut                  1          0   0.000       -        -          0          0  none
          fair               0.5     0.6053   0.998   0.011    0.013      0.863          1
          fair                 1     0.3663   0.996   0.009    0.021      0.663          1
          => cut is off: too few beyond 0.5; none beyond 1
    """
    check_positive_int(bootstraps, "bootstraps", minimum=2)
    if not isinstance(generated, Mapping) or not generated:
        raise ValueError(
            f"Expected generated samples by the name of the generator; got {type(generated)}. One "
            'is written {"flow": [samples of each training set]}.'
        )
    if training_size is not None:
        training_size = check_positive_int(training_size, "training_size")
    truth = Truth(true, weight_true, probabilities, thresholds, statistic)
    rng = np.random.default_rng(seed)
    rows: list[TailRow] = []
    for name, samples in generated.items():
        if not isinstance(samples, (list, tuple)) or len(samples) < 2:
            raise ValueError(
                f"Expected samples of {name!r} as a list over at least two training sets; got "
                f"{type(samples).__name__}. With one training set use bootstrap_tails, which "
                "resamples it."
            )
        made = [
            sample_shares(part, f"samples of {name!r}", statistic, truth.at) for part in samples
        ]
        shares = np.stack([share for share, _, _ in made])
        drawn = rng.integers(len(shares), size=(bootstraps, len(shares)))
        # a bootstrap of R values has the spread of R − 1
        error = shares[drawn].mean(1).std(0) * np.sqrt(len(shares) / (len(shares) - 1))
        least = min(m for _, _, m in made)
        rows += truth.judge(
            str(name),
            shares.mean(0),
            np.where(np.ptp(shares, axis=0) > 0, error, 0.0),
            shares.std(0, ddof=1),
            np.sum([v for _, v, _ in made], axis=0) / len(shares) ** 2,
            len(shares) - 1,
            Trained(training_size, least, len(shares)),
        )
    return TailReport(tuple(rows), truth.count, truth.exact, "training sets", training_size)


def bootstrap_tails(
    generators: Mapping[str, Callable[[Tensor, int], Any]],
    training: Any,
    thresholds: Any = None,
    *,
    true: Any = None,
    weight_true: Any = None,
    probabilities: Any = None,
    statistic: Callable[[Tensor], Any] | None = None,
    resamplings: int = 20,
    seed: int = 0,
    progress: bool = False,
) -> TailReport:
    """Compare shares beyond thresholds of generators that have one training set.

    Each generator is trained on the set, and again on `resamplings` drawings of its events with
    replacement, the same ones for all generators: their spread is the error.

    Arguments:
        generators: By name, functions of a training set (n, …) and a seed, which train and return
            generated events (M, …), or a pair of them and their weights (M,).
        training: Training events (n, …).
        thresholds: As of `tails`, as are the other arguments.
        true: True events (N, …) that are not in the training set.
        weight_true: Event weights (N,).
        probabilities: Exact shares beyond each threshold.
        statistic: S, a function of events.
        resamplings: Further trainings of each generator.
        seed: Of the drawings; a seed for each training is derived from it.
        progress: Show a progress bar of the trainings.

    Raises:
        ValueError: As of `tails`, or if there are fewer than ten training events.
    """
    check_positive_int(resamplings, "resamplings", minimum=2)
    if not isinstance(generators, Mapping) or not generators:
        raise ValueError(f"Expected generators by name; got {type(generators).__name__}.")
    training = as_tensor(training, "training events")
    if not training.ndim or len(training) < FEWEST:
        raise ValueError(
            f"Expected at least {FEWEST} training events; got shape {tuple(training.shape)}."
        )
    check_finite(training, "training events")
    truth = Truth(true, weight_true, probabilities, thresholds, statistic)
    rng, n = np.random.default_rng(seed), len(training)
    seeds = rng.integers(2**31, size=1 + resamplings).tolist()
    drawn = [torch.arange(n)]
    drawn += [torch.as_tensor(rng.integers(n, size=n)) for _ in range(resamplings)]
    rows: list[TailRow] = []
    with progress_bar(len(generators) * len(drawn), "trainings", progress) as bar:
        for name, generate in generators.items():
            made = []
            for events, own_seed in zip(drawn, seeds, strict=True):
                part = generate(training[events.to(training.device)], own_seed)
                made.append(sample_shares(part, f"samples of {name!r}", statistic, truth.at))
                bar.update(1)
            error = np.stack([share for share, _, _ in made[1:]]).std(0, ddof=1)
            first, variance, m = made[0]
            trained = Trained(n, m, 1)
            rows += truth.judge(str(name), first, error, error, variance, resamplings - 1, trained)
    return TailReport(tuple(rows), truth.count, truth.exact, "resampled training events", n)
