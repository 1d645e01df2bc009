r"""Soft bins and their derivatives with respect to nuisances that move the inputs.

The information needs :math:`\partial_\theta b_k(x(\theta))` of every event: one tangent for each
nuisance, propagated forward beside the value. A step of the training then differentiates once
backward, through both; the second derivatives of the likelihood are never formed.

Networks of known layers (those of `flowpost.encoders.Tabular`) are propagated layer by layer, and
their tangents only for events that move. All others go through `torch.func.jvp` under `vmap`, with
one draw of dropout masks for value and tangents; where a layer has no forward derivative (LSTMs),
the tangents are central differences with the same masks. Batch norm takes its statistics from all
events at nominal values, and no tangents through them: behind the training they are constants, and
do not move with a nuisance.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import MethodType
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, jvp, vmap
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.rnn import PackedSequence

from .._events import joined, sizes
from .._modes import evaluated
from ..encoders import _SQUASH, Squash, Tabular
from .model import Transform
from .samples import Block
from .summary import SoftBins, SummaryModel

__all__ = ["propagate"]

# networks that were found to have no forward derivative
_NO_FORWARD: WeakSet[nn.Module] = WeakSet()


def propagate(
    network: nn.Module, parts: Sequence[Block], *, by_hand: bool = True
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Bins (N, K) of the events of blocks, and their derivatives (N, K) by nuisance.

    Arguments:
        network: Inputs (N, …) to probabilities (N, K).
        parts: Blocks of events.
        by_hand: Take the shorter way where the layers are known.
    """
    groups: dict[tuple[Transform, ...], list[int]] = {}
    for i, part in enumerate(parts):
        groups.setdefault(part.moves, []).append(i)
    moving = [g for g in groups if g]
    if len(moving) > 1 and not _norms(network):
        # events do not see each other: each group for itself, with the tangents of its own alone
        still = groups.pop((), [])
        found: list[tuple[Tensor, dict[str, Tensor]]] = [(torch.empty(0), {})] * len(parts)
        for k, rows in enumerate(groups.values()):
            own = [*rows, *(still if not k else [])]
            result = _propagated(network, [parts[i] for i in own], by_hand)
            for i, b, slope in zip(own, *result, strict=True):
                found[i] = b, slope
        return [b for b, _ in found], [slope for _, slope in found]
    return _propagated(network, parts, by_hand)


def _norms(network: nn.Module) -> list[Any]:
    """Batch norms in training: their events see each other."""
    return [m for m in network.modules() if isinstance(m, _BatchNorm) and m.training]


def _propagated(
    network: nn.Module, parts: Sequence[Block], by_hand: bool
) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    names: dict[str, Transform] = {t.name: t for part in parts for t in part.moves}
    if not names:
        return _split(_forward(network, [p.x for p in parts]), parts), [{} for _ in parts]
    order = sorted(range(len(parts)), key=lambda i: not parts[i].moves)
    ordered = [parts[i] for i in order]
    moves = list(names.values())
    if by_hand and _known(network) and all(isinstance(p.x, Tensor) for p in parts):
        bins, tangents = _by_hand(network, ordered, moves)
    else:
        bins, tangents = _by_any(network, ordered, moves)
    values = _split(bins, ordered)
    moving = [p for p in ordered if p.moves]
    slopes = list(tangents.split([len(p) for p in moving], 1))
    found: list[dict[str, Tensor]] = [
        {t.name: s[i] for i, t in enumerate(moves) if t in p.moves}
        for p, s in zip(moving, slopes, strict=True)
    ]
    found += [{}] * (len(parts) - len(moving))
    back = sorted(range(len(parts)), key=lambda i: order[i])
    return [values[i] for i in back], [found[i] for i in back]


def _split(bins: Tensor, parts: Sequence[Block]) -> list[Tensor]:
    counts = [len(p) for p in parts]
    if bins.ndim != 2 or len(bins) != sum(counts):
        raise ValueError(
            f"Expected a summary of shape ({sum(counts)}, K); got {tuple(bins.shape)}. It takes "
            "inputs (N, …) to probabilities (N, K)."
        )
    return list(bins.split(counts))


def _forward(network: nn.Module, inputs: Sequence[Any]) -> Tensor:
    args, named = _arguments(network, inputs)
    return network(*args, **named)


def _arguments(network: nn.Module, inputs: Sequence[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of several blocks as those of one call: tuples and dicts are a network's arguments."""
    x = joined(list(inputs), [next(iter(sizes(v))) for v in inputs])
    if isinstance(network, SummaryModel) or isinstance(x, PackedSequence):
        return (x,), {}
    if isinstance(x, dict):
        return (), x
    return (x if isinstance(x, tuple) else (x,)), {}


def _moved(x: Any, moves: Sequence[Transform], all_moves: Sequence[Transform], at: Tensor) -> Any:
    for i, move in enumerate(all_moves):
        if move in moves:
            x = move.apply(x, at[i])
    return x


def _nominal(moves: Sequence[Transform], like: Tensor) -> Tensor:
    return like.new_tensor([float(t.nominal or 0.0) for t in moves])


def _by_any(
    network: nn.Module, parts: Sequence[Block], moves: Sequence[Transform]
) -> tuple[Tensor, Tensor]:
    if network in _NO_FORWARD or any(isinstance(m, nn.RNNBase) for m in network.modules()):
        return _by_differences(network, parts, moves)
    try:
        return _by_jvp(network, parts, moves)
    except torch.OutOfMemoryError:
        raise
    except (NotImplementedError, RuntimeError) as error:
        with evaluated(network), torch.no_grad():
            # what is wrong without derivatives has an error of its own
            _forward(network, [p.x for p in parts])
        _NO_FORWARD.add(network)
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"The network, or a Transform, has no forward derivative ({reason[:120]}): tangents "
            "are taken by differences, in more passes.",
            stacklevel=6,
        )
        return _by_differences(network, parts, moves)


def _by_differences(
    network: nn.Module, parts: Sequence[Block], moves: Sequence[Transform]
) -> tuple[Tensor, Tensor]:
    if _norms(network):
        raise ValueError(
            "Expected batch norm in evaluation mode beside a layer without forward derivatives "
            "(such as an LSTM); got it in training. Call .eval() on it, or use another norm."
        )
    like = next((p for p in network.parameters()), torch.zeros(()))
    at = _nominal(moves, like)
    moving = [p for p in parts if p.moves]
    still = [p.x for p in parts if not p.moves]
    # without dropout there is nothing to draw, and the global generator stays as it is
    seed = int(torch.empty((), dtype=torch.int64).random_()) if network.training else 0
    devices = [like.device] if like.device.type == "cuda" else []

    def run(values: Tensor) -> Tensor:
        # the same dropout masks in every pass
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            return _forward(network, [_moved(p.x, p.moves, moves, values) for p in moving])

    bins, tangents = run(at), []
    for i, move in enumerate(moves):
        # the error of rounding and that of the difference about alike, relative to one shift
        step = torch.finfo(at.dtype).eps ** 0.25 * float(move.shift or 0.0)
        unit = torch.zeros_like(at)
        unit[i] = step
        tangents.append((run(at + unit) - run(at - unit)) / (2 * step))
    if still:
        bins = torch.cat([bins, _forward(network, still)])
    return bins, torch.stack(tangents)


def _by_jvp(
    network: nn.Module, parts: Sequence[Block], moves: Sequence[Transform]
) -> tuple[Tensor, Tensor]:
    """Bins of all events and tangents (T, M, K) of the M events of blocks that move."""
    like = next((p for p in network.parameters()), torch.zeros(()))
    at = _nominal(moves, like)
    norms = _norms(network)
    moving = [p for p in parts if p.moves]
    still = [p.x for p in parts if not p.moves]

    def run(values: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        # batch norm writes its statistics: into copies, for a transform must not change its outside
        buffers = {k: b.clone() for k, b in network.named_buffers()}
        inputs = [_moved(p.x, p.moves, moves, values) for p in moving]
        inputs += still if norms else []
        args, named = _arguments(network, inputs)
        return functional_call(network, buffers, args, named), buffers

    def one(direction: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        found: Any = jvp(run, (at,), (direction,), has_aux=True)
        return found

    basis = torch.eye(len(moves), dtype=at.dtype, device=at.device)
    sides: Any = (None, 0, None)
    with _nominal_statistics(norms):
        bins, tangents, buffers = vmap(one, out_dims=sides, randomness="same")(basis)
    with torch.no_grad():
        for name, buffer in network.named_buffers():
            if norms:
                buffer.copy_(buffers[name])
    if still and not norms:
        bins = torch.cat([bins, _forward(network, still)])
    return bins, tangents[:, : sum(len(p) for p in moving)]


class _Constant(torch.autograd.Function):
    """A value without its tangent; gradients pass."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        return torch.zeros_like(tangent)


@contextmanager
def _nominal_statistics(norms: Sequence[Any]) -> Iterator[None]:
    """Batch norms in training, whose statistics carry no tangents."""
    own = [norm.__dict__.get("forward") for norm in norms]
    for norm in norms:
        norm.forward = MethodType(_normalised, norm)
    try:
        yield
    finally:
        for norm, before in zip(norms, own, strict=True):
            del norm.forward
            if before is not None:
                norm.forward = before


def _normalised(norm: Any, x: Tensor) -> Tensor:
    others = [i for i in range(x.ndim) if i != 1]
    shape = [1, -1] + [1] * (x.ndim - 2)
    mean = _Constant.apply(x.mean(others))
    var = _Constant.apply((x - mean.reshape(shape)).square().mean(others))
    if norm.track_running_stats:
        count = x.numel() // x.shape[1]
        norm.num_batches_tracked.add_(1)
        # momentum None stands for the mean over all batches
        share = norm.momentum
        if share is None:
            share = 1.0 / norm.num_batches_tracked.to(norm.running_mean)
        norm.running_mean.lerp_(mean.detach().to(norm.running_mean), share)
        unbiased = var.detach() * count / max(1, count - 1)
        norm.running_var.lerp_(unbiased.to(norm.running_var), share)
    y = (x - mean.reshape(shape)) * torch.rsqrt(var.reshape(shape) + norm.eps)
    if norm.affine:
        y = y * norm.weight.reshape(shape) + norm.bias.reshape(shape)
    return y


def _by_hand(
    network: nn.Module, parts: Sequence[Block], moves: Sequence[Transform]
) -> tuple[Tensor, Tensor]:
    inputs, tangents = [], []
    for part in parts:
        if not part.moves:
            inputs.append(part.x)
            continue
        at = _nominal(moves, part.x)

        slopes = []
        for direction in torch.eye(len(moves)).to(at):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(at, direction)
                moved = forward_ad.unpack_dual(_moved(part.x, part.moves, moves, dual))
            slopes.append(torch.zeros_like(part.x) if moved.tangent is None else moved.tangent)
        inputs.append(moved.primal)
        tangents.append(torch.stack(slopes))
    x, t = torch.cat(inputs), torch.cat(tangents, 1)
    return _layer(network, x, t)


def _known(module: nn.Module) -> bool:
    """Whether a network is made of layers whose tangents are written here."""
    hooks = [module._forward_hooks, module._forward_pre_hooks]
    hooks += [module._backward_hooks, module._backward_pre_hooks]
    if any(hooks) or "forward" in module.__dict__:
        return False
    if type(module) is Tabular and module.missing:
        return False
    if type(module) is nn.Softmax:
        return module.dim in (-1, 1)
    if type(module) in (SummaryModel, SoftBins, nn.Sequential, Tabular):
        return all(_known(m) for m in module.children())
    return type(module) is Squash or type(module) in _LAYERS


def _layer(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Values (N, F) and tangents (T, M, F) of the first M events behind a layer."""
    if type(module) is SummaryModel:
        if module.encoder is not None:
            x, t = _layer(module.encoder, x, t)
        return _layer(module.head, x, t)
    if type(module) is nn.Sequential:
        for part in module:
            x, t = _layer(part, x, t)
        return x, t
    if type(module) is Tabular:
        module.check(x)
        like = module.squash.loc
        x, t = _squash(module.squash, x.to(like), t.to(like))
        straight, straight_t = _linear(module.skip, x, t)
        x, t = _layer(module.net, x, t)
        return straight + x, straight_t + t
    if type(module) is SoftBins:
        cold = torch.exp(-module.log_temperature)
        x, t = (v * cold for v in _linear(module.logits, x, t))
        return _softmax(module, x, t)
    return _LAYERS[type(module)](module, x, t)


def _linear(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return module(x), F.linear(t, module.weight)


def _squash(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    y = module(x)
    # the derivative of asinh(a) is 1/√(1 + a²), with a the excess over the linear part
    part = (x[: t.shape[1]] - module.loc) / module.scale
    excess = part - part.clamp(-_SQUASH, _SQUASH)
    return y, t * torch.rsqrt(1 + excess.square()) / module.scale


def _softmax(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    b = torch.softmax(x, -1)
    moving = b[: t.shape[1]]
    return b, moving * (t - (moving * t).sum(-1, keepdim=True))


def _dropout(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    if not module.training or module.p == 0:
        return x, t
    mask = F.dropout(torch.ones_like(x), module.p)
    return x * mask, t * mask[: t.shape[1]]


def _pointwise(slope: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    def layer(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        y = module(x)
        return y, t * slope(x[: t.shape[1]], y[: t.shape[1]])

    return layer


class _SiLU(torch.autograd.Function):
    """x σ(x) and its derivative times tangents, with their gradient in closed form."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, t)
        s = torch.sigmoid(x)
        y = x * s
        return y, t * torch.addcmul(s, y, 1 - s)[: t.shape[1]]

    @staticmethod
    def backward(ctx: Any, gy: Tensor, gt: Tensor) -> tuple[Tensor, Tensor]:
        # of the inputs anew, so that it can be differentiated again
        x, t = ctx.saved_tensors
        m = t.shape[1]
        s = torch.sigmoid(x)
        y = x * s
        slope = torch.addcmul(s, y, 1 - s)
        gx = gy * slope
        # d slope / dx = σ' (2 + x − 2 y), with σ' = σ (1 − σ) and σ' x = y (1 − σ)
        s, y = s[:m], y[:m]
        bend = (1 - s) * (2 * s + y - 2 * s * y)
        moving = gx[:m] + (gt * t).sum(0) * bend
        return torch.cat([moving, gx[m:]]), gt * slope[:m]


def _silu(module: Any, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    return _SiLU.apply(x, t)


_LAYERS: dict[type, Callable[..., tuple[Tensor, Tensor]]] = {
    nn.Identity: lambda module, x, t: (x, t),
    nn.Linear: _linear,
    nn.Dropout: _dropout,
    nn.Softmax: _softmax,
    nn.SiLU: _silu,
    nn.ReLU: _pointwise(lambda x, y: (x > 0).to(x)),
    nn.Tanh: _pointwise(lambda x, y: 1 - y * y),
}
