r"""Classifiers by name, how their inputs are scaled, and their scores as log-odds.

A probabilistic classifier that minimises the cross-entropy of two samples of equal total weight
estimates

.. math:: f(x) = \frac{p(x)}{p(x) + q(x)}, \qquad
          s(x) = \ln f(x) - \ln(1 - f(x)) = \ln \frac{p(x)}{q(x)},

so its log-odds s are the log density ratio, and order the events as any test of them would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, silu

from .._checks import require

__all__ = ["NAMED", "Network", "Scaler", "Trained", "named_classifiers", "train"]

_LINEAR = 10.0
# of the log-odds: a probability of exactly 0 or 1 says no more
_LARGEST = 36.0


class Scaler:
    """Features (N, F) of mean 0 and standard deviation 1, logarithmic beyond 10 of them.

    Where the middle half of the events spreads by less than a normal variable of the same standard
    deviation, as beside far outliers, its spread is the scale.

    Arguments:
        values: Features of the training part (N, F).
    """

    def __init__(self, values: np.ndarray) -> None:
        # squares of values beyond 1e154 are infinite
        largest = np.abs(values).max(0)
        self.unit = np.where(largest > 0, largest, 1.0)
        values = values / self.unit
        low, self.loc, high = np.quantile(values, [0.25, 0.5, 0.75], axis=0)
        middle, spread = (high - low) / 1.349, values.std(0)
        scale = np.where(middle > 0.1 * spread, middle, spread)
        self.scale = np.where(scale > 0, scale, 1.0)

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return scaled features (N, F), a monotone function of each column."""
        with np.errstate(over="ignore"):
            u = np.nan_to_num((values / self.unit - self.loc) / self.scale)
        size = np.abs(u)
        far = np.sign(u) * _LINEAR * (1 + np.log(np.maximum(size, _LINEAR) / _LINEAR))
        return np.where(size <= _LINEAR, u, far)


class Network:
    """A few small networks that are trained together and averaged in their log-odds.

    Each of them is stopped at its lowest cross-entropy on a sixth of the events.

    Arguments:
        hidden: Units of each of the two hidden layers.
        members: Networks M.
        epochs: Most passes over the events.
        patience: Passes without a lower cross-entropy, of all networks, before it ends.
        seed: Of initial weights, of the held-out events and of the batches.
    """

    def __init__(
        self,
        hidden: int = 48,
        members: int = 4,
        epochs: int = 80,
        patience: int = 8,
        lr: float = 3e-3,
        decay: float = 0.1,
        seed: int = 0,
    ) -> None:
        self.hidden, self.members, self.epochs, self.patience = hidden, members, epochs, patience
        self.lr, self.decay, self.seed = lr, decay, seed

    def fit(
        self, values: np.ndarray, target: np.ndarray, sample_weight: np.ndarray | None = None
    ) -> Network:
        """Train on features (N, F), targets 0 or 1 (N,) and event weights (N,)."""
        if sample_weight is None:
            sample_weight = np.ones(len(target))
        generator = torch.Generator().manual_seed(self.seed)
        x, t, w = (torch.as_tensor(a, dtype=torch.float32) for a in (values, target, sample_weight))
        w = w / w.mean()
        order = torch.randperm(len(x), generator=generator)
        held, rows = order.tensor_split([max(len(x) // 6, 2)])
        with torch.enable_grad():
            self._train(x, t, w, held, rows, generator)
        return self

    def _train(
        self, x: Tensor, t: Tensor, w: Tensor, held: Tensor, rows: Tensor, g: torch.Generator
    ) -> None:
        sizes = (x.shape[1], self.hidden, self.hidden, 1)
        self.weights = []
        for inputs, outputs in pairwise(sizes):
            matrix = torch.randn(self.members, inputs, outputs, generator=g) * inputs**-0.5
            self.weights += [matrix * (outputs > 1), torch.zeros(self.members, 1, outputs)]
        for parameter in self.weights:
            parameter.requires_grad_()
        batch = min(128, max(16, len(rows) // 16))
        optimizer = torch.optim.AdamW(self.weights, lr=self.lr, weight_decay=self.decay)
        best = torch.full((self.members,), torch.inf)
        kept = [p.detach().clone() for p in self.weights]
        since = 0
        for _ in range(self.epochs):
            for part in rows[torch.randperm(len(rows), generator=g)].split(batch):
                optimizer.zero_grad()
                self._losses(x[part], t[part], w[part]).sum().backward()
                optimizer.step()
            with torch.no_grad():
                loss = self._losses(x[held], t[held], w[held])
            better = loss < best
            since = 0 if bool(better.any()) else since + 1
            best = torch.where(better, loss, best)
            for old, new in zip(kept, self.weights, strict=True):
                old[better] = new.detach()[better]
            if since >= self.patience:
                break
        self.weights = kept

    def _losses(self, x: Tensor, t: Tensor, w: Tensor) -> Tensor:
        logits = self._logits(x)
        each = binary_cross_entropy_with_logits(logits, t.expand_as(logits), reduction="none")
        return (each * w).mean(1)

    def _logits(self, x: Tensor) -> Tensor:
        first, bias_1, second, bias_2, third, bias_3 = self.weights
        h = silu(x @ first + bias_1)
        h = silu(torch.baddbmm(bias_2, h, second))
        return torch.baddbmm(bias_3, h, third)[..., 0]

    def decision_function(self, values: np.ndarray) -> np.ndarray:
        """Return log-odds (N,) of features (N, F), the mean over the networks."""
        with torch.no_grad():
            parts = torch.as_tensor(values, dtype=torch.float32).split(8192)
            return torch.cat([self._logits(p).mean(0) for p in parts]).double().numpy()

    def predict_proba(self, values: np.ndarray) -> np.ndarray:
        """Return probabilities of 0 and 1 (N, 2)."""
        s = torch.as_tensor(self.decision_function(values))
        return torch.stack([torch.sigmoid(-s), torch.sigmoid(s)], 1).numpy()


def _logistic(seed: int) -> Any:
    return require("sklearn.linear_model", "diagnostics").LogisticRegression(max_iter=2000)


def _quadratic(seed: int) -> Any:
    features = require("sklearn.preprocessing", "diagnostics").PolynomialFeatures(
        2, include_bias=False
    )
    scale = require("sklearn.preprocessing", "diagnostics").StandardScaler()
    pipeline = require("sklearn.pipeline", "diagnostics").make_pipeline
    return pipeline(features, scale, _logistic(seed))


def _boosting(seed: int) -> Any:
    return require("sklearn.ensemble", "diagnostics").HistGradientBoostingClassifier(
        learning_rate=0.05,
        max_iter=400,
        max_leaf_nodes=8,
        # weighted quantiles of each column are what training costs where there are weights
        max_bins=64,
        min_samples_leaf=30,
        l2_regularization=30.0,
        early_stopping=True,
        validation_fraction=1 / 6,
        n_iter_no_change=20,
        random_state=seed,
    )


def _mlp(seed: int) -> Any:
    return Network(seed=seed)


NAMED: dict[str, Callable[[int], Any]] = {
    "logistic": _logistic,
    "quadratic": _quadratic,
    "boosting": _boosting,
    "mlp": _mlp,
}


def _from_estimator(estimator: Any) -> Callable[[int], Any]:
    def make(seed: int) -> Any:
        new = require("sklearn.base", "diagnostics").clone(estimator)
        seeds = {k: seed for k in new.get_params() if k.split("__")[-1] == "random_state"}
        return new.set_params(**seeds)

    return make


def named_classifiers(classifiers: Any) -> dict[str, Callable[[int], Any]]:
    """Return what makes an untrained classifier from a seed, by name.

    Arguments:
        classifiers: A name of `NAMED`, an estimator of scikit-learn's interface, a sequence of
            them, or a dict of them by the name they get.

    Raises:
        ValueError: If there is none, a name is unknown or taken twice, or something is no
            estimator.
    """
    if isinstance(classifiers, Mapping):
        pairs = list(classifiers.items())
    else:
        several = isinstance(classifiers, Sequence) and not isinstance(classifiers, str)
        items = list(classifiers) if several else [classifiers]
        pairs = [(c if isinstance(c, str) else type(c).__name__, c) for c in items]
    made: dict[str, Callable[[int], Any]] = {}
    for name, item in pairs:
        if isinstance(item, str) and item not in NAMED:
            raise ValueError(f"Expected a classifier of {', '.join(NAMED)}; got {item!r}.")
        usable = hasattr(item, "predict_proba") or hasattr(item, "decision_function")
        if not isinstance(item, str) and not (usable and hasattr(item, "get_params")):
            raise ValueError(
                f"Expected classifiers as names or estimators of scikit-learn's interface with "
                f"predict_proba or decision_function; got {type(item).__name__}."
            )
        if name in made:
            raise ValueError(
                f"Expected one classifier of each name; got {name!r} twice. Give a dict of them by "
                "names of your own."
            )
        made[str(name)] = NAMED[item] if isinstance(item, str) else _from_estimator(item)
    if not made:
        raise ValueError("Expected at least one classifier; got none.")
    return made


class Trained:
    """A trained classifier with the scaling of its inputs.

    Attributes:
        probabilistic: Whether its scores are log-odds; else they only order the events.
    """

    def __init__(self, estimator: Any, scaler: Scaler) -> None:
        self.estimator, self.scaler = estimator, scaler
        self.probabilistic = hasattr(estimator, "predict_proba")

    def __call__(self, values: np.ndarray) -> np.ndarray:
        """Return scores (N,) of features (N, F): high where the first sample is the denser."""
        scaled = self.scaler(values)
        if not self.probabilistic:
            return np.asarray(self.estimator.decision_function(scaled), dtype=float)
        p = np.asarray(self.estimator.predict_proba(scaled), dtype=float)
        smallest = np.finfo(float).tiny
        odds = np.log(np.maximum(p[:, 1], smallest)) - np.log(np.maximum(p[:, 0], smallest))
        return np.clip(odds, -_LARGEST, _LARGEST)


def train(
    make: Callable[[int], Any],
    values: np.ndarray,
    target: np.ndarray,
    weight: np.ndarray,
    seed: int,
) -> Trained:
    """Train a new classifier; where it takes no weights, on events drawn by their weights.

    Arguments:
        make: What makes it from a seed.
        values: Features (N, F).
        target: 1 for the first sample, 0 for the second, (N,).
        weight: Weights (N,), of mean one and the same sum in both samples.
        seed: Seed of the classifier and of the drawing.
    """
    scaler = Scaler(values)
    estimator = make(seed)
    if np.ptp(weight) < 1e-12:
        estimator.fit(scaler(values), target)
    elif _takes_weights(estimator):
        estimator.fit(scaler(values), target, sample_weight=weight)
    else:
        rng = np.random.default_rng(seed)
        drawn = rng.choice(len(weight), len(weight), p=weight / weight.sum())
        estimator.fit(scaler(values[drawn]), target[drawn])
    return Trained(estimator, scaler)


def _takes_weights(estimator: Any) -> bool:
    has = require("sklearn.utils.validation", "diagnostics").has_fit_parameter
    return bool(has(estimator, "sample_weight"))
