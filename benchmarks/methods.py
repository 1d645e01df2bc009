"""The methods that `defaults.py` trains: flowpost, zuko's NSF, and the exact posterior."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

Options = dict[str, Any]


class Trained(Protocol):
    """What a method returns: the density of events and draws for one."""

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        """Return ln q(z|x) of pairs (N, F), (N, D), shape (N,)."""
        ...

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Return draws (n, D) for one event (F,)."""
        ...


def train_flowpost(simulator: Any, x: Tensor, z: Tensor, seed: int, options: Options) -> Trained:
    """Train as the README does; the label space has the prior's bounds, where it has any."""
    bounds = simulator.bounds if options.get("space", "interval") == "interval" else None
    return _FlowpostTrained(simulator, bounds, x, z, seed, options)


def train_flowpost_real(
    simulator: Any, x: Tensor, z: Tensor, seed: int, options: Options
) -> Trained:
    """Train as the README does, with labels taken as unbounded."""
    return _FlowpostTrained(simulator, None, x, z, seed, options)


class _FlowpostTrained:
    def __init__(self, simulator: Any, bounds: Any, x: Tensor, z: Tensor, seed: int, set_: Options):
        import flowpost as fp

        targets: dict[str, Callable[..., Any]] = {
            "encoder": fp.encoders.Tabular,
            "head": fp.PosteriorHead,
            "fit": fp.fit,
        }
        options = route(set_, targets)
        width = options["encoder"].pop("context", 64)
        options["head"].pop("context", None)
        space = fp.Real(simulator.dim) if bounds is None else fp.Interval(*bounds)
        torch.manual_seed(seed)
        head = fp.PosteriorHead(width, space, **{"flow": "spline", **options["head"]})
        encoder = fp.encoders.Tabular(simulator.features, width, **options["encoder"])
        self.model = fp.PosteriorModel(encoder, head)
        settings = {"val": 0.1, "epochs": 100, "batch_size": 256, "lr": 1e-3, **options["fit"]}
        fp.fit(self.model, (x, z), seed=seed, progress=False, **settings)

    @torch.no_grad()
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        pairs = zip(x.split(5000), z.split(5000), strict=True)
        return torch.cat([self.model(a).log_prob(b) for a, b in pairs])

    @torch.no_grad()
    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.model(x[None]).sample((n,), generator=generator)[:, 0]


def route(options: Options, targets: dict[str, Callable[..., Any]]) -> dict[str, Options]:
    """Give each option to the callable that takes it; `name.key` chooses one of several.

    Raises:
        ValueError: If none or more than one takes it.
    """
    routed: dict[str, Options] = {name: {} for name in targets}
    for key, value in options.items():
        if key == "space":
            continue
        name, _, bare = key.rpartition(".")
        fits = [t for t, f in targets.items() if bare in inspect.signature(f).parameters]
        if key == "context":
            fits = ["encoder"]
        owners = [name] if name in targets else fits
        if len(owners) != 1:
            raise ValueError(
                f"Expected an option of one of {sorted(targets)}; got {key!r}, which belongs to "
                f"{owners or 'none'}. Write for example fit.{bare}=…."
            )
        routed[owners[0]][bare if (name or key != "context") else "context"] = value
    return routed


class _ZukoTrained:
    """A neural spline flow on standardised data and labels, trained with early stopping."""

    def __init__(self, simulator: Any, x: Tensor, z: Tensor, seed: int, options: Options):
        import zuko

        o: Options = {"transforms": 5, "epochs": 200, "patience": 20, "batch_size": 256}
        o |= {"lr": 1e-3, "weight_decay": 0.0, "one_cycle": False, **options}
        torch.manual_seed(seed)
        permutation = torch.randperm(len(x))
        n_val = len(x) // 10
        train, val = permutation[n_val:], permutation[:n_val]
        self.x_scale = x[train].mean(0), x[train].std(0)
        self.z_scale = z[train].mean(0), z[train].std(0)
        self.flow = zuko.flows.NSF(
            features=simulator.dim,
            context=simulator.features,
            transforms=o["transforms"],
        )
        self._train(self._standard(x, self.x_scale), self._standard(z, self.z_scale), train, val, o)

    def _train(self, x: Tensor, z: Tensor, train: Tensor, val: Tensor, o: Options) -> None:
        optimiser = torch.optim.AdamW(
            self.flow.parameters(), lr=o["lr"], weight_decay=o["weight_decay"]
        )
        steps = -(-len(train) // o["batch_size"])
        schedule = None
        if o["one_cycle"]:
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimiser, o["lr"], total_steps=steps * o["epochs"]
            )
        best, best_state, waited = float("inf"), self.flow.state_dict(), 0
        for _ in range(o["epochs"]):
            for batch in train[torch.randperm(len(train))].split(o["batch_size"]):
                optimiser.zero_grad()
                loss = -self.flow(x[batch]).log_prob(z[batch]).mean()
                loss.backward()
                torch.nn.utils.clip_grad_norm_(self.flow.parameters(), 5.0)
                optimiser.step()
                if schedule is not None:
                    schedule.step()
            with torch.no_grad():
                value = float(-self.flow(x[val]).log_prob(z[val]).mean())
            waited += 1
            if value < best:
                best, waited = value, 0
                best_state = {k: v.clone() for k, v in self.flow.state_dict().items()}
            if waited >= o["patience"] and schedule is None:
                break
        self.flow.load_state_dict(best_state)

    @staticmethod
    def _standard(value: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
        return (value - scale[0]) / scale[1]

    @torch.no_grad()
    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        x, z = self._standard(x, self.x_scale), self._standard(z, self.z_scale)
        pairs = zip(x.split(5000), z.split(5000), strict=True)
        log_q = torch.cat([self.flow(a).log_prob(b) for a, b in pairs])
        return log_q - self.z_scale[1].log().sum()

    @torch.no_grad()
    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        # zuko draws from torch's global generator
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(torch.randint(2**31, (1,), generator=generator)))
            z = self.flow(self._standard(x, self.x_scale)).sample((n,))
        return z * self.z_scale[1] + self.z_scale[0]


class _Exact:
    """The exact posterior, as the floor of the test."""

    def __init__(self, simulator: Any, x: Tensor, z: Tensor, seed: int, options: Options):
        self.simulator = simulator

    def log_prob(self, x: Tensor, z: Tensor) -> Tensor:
        return torch.full((len(x),), float("nan"))

    def sample(self, x: Tensor, n: int, generator: torch.Generator) -> Tensor:
        return self.simulator.posterior_sample(x, n, generator=generator)


METHODS: dict[str, Callable[[Any, Tensor, Tensor, int, Options], Trained]] = {
    "flowpost": train_flowpost,
    "flowpost-real": train_flowpost_real,
    "zuko-nsf": _ZukoTrained,
    "exact": _Exact,
}
