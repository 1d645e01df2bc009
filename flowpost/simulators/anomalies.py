r"""Events that a telescope's simulation does not describe, to test a goodness of fit against.

- `overlay`: two events at once.
- `dead_string`: a string of sensors that sees nothing.
- `track_like`: cascades in a row, for what was trained on single ones. `Telescope3D(kind="track")`
  gives tracks to what was trained on cascades.
- More noise or light than the nominal response has:
  `telescope.sample(n, nuisance={"noise": 3.0})`, `{"light_yield": 1.5}`.

Images stay the histograms of the hits, and hits stay in time order. The labels are those of the
first event, of the unharmed event, of the start of the track: what a reconstruction would be asked.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._checks import as_tensor, check_finite, check_positive_int, check_shape
from ._nuisance import check_nuisance
from ._random import resolve_generator
from .telescope import Telescope, TelescopeEvents
from .telescope.checks import check_labels
from .telescope.events import draw_events
from .telescope3d import Telescope3D, Telescope3DEvents
from .telescope3d.response import LIGHT_SPEED

__all__ = ["dead_string", "overlay", "track_like"]

Events = TypeVar("Events", TelescopeEvents, Telescope3DEvents)


def overlay(events: Events, others: Events) -> Events:
    """Return pairs of events that are recorded together: counts add, hits merge in time order.

    Each event brings its own noise. To have it once, simulate the others with next to none:
    `telescope.sample(n, nuisance={"noise": 1e-9})`.

    Arguments:
        events: N events.
        others: N events of the same telescope; they take the dtype and device of `events`.

    Returns:
        N events with the labels of `events`, with N_i + N'_i hits.

    Raises:
        ValueError: If the two are not events of one kind of telescope and of equal number.

    Example:
        >>> from flowpost.simulators import Telescope
        >>> events = Telescope().sample(100, seed=0)
        >>> both = overlay(events[:50], events[50:])
        >>> bool((both.lengths == events.lengths[:50] + events.lengths[50:]).all())
        True
    """
    if not isinstance(events, (TelescopeEvents, Telescope3DEvents)) or type(events) is not type(
        others
    ):
        raise ValueError(
            "Expected events and others as events of one kind of telescope; got "
            f"{type(events).__name__} and {type(others).__name__}."
        )
    if len(events) != len(others):
        raise ValueError(
            f"Expected as many others as events; got {len(others)} and {len(events)}. Take "
            "others[:n]."
        )
    others = others.to(events.z)
    hits = torch.cat([events.hits, others.hits], 1)
    hits, lengths = _pack(hits, torch.cat([_real(events), _real(others)], 1))
    if isinstance(events, TelescopeEvents) and isinstance(others, TelescopeEvents):
        check_shape(others.images, events.images.shape, "images of others", "Use one telescope.")
        return replace(events, images=events.images + others.images, hits=hits, lengths=lengths)
    return replace(events, hits=hits, lengths=lengths)


def dead_string(
    telescope: Telescope | Telescope3D,
    events: Events,
    string: int | Tensor | str = "random",
    generator: torch.Generator | None = None,
    seed: int | None = None,
) -> Events:
    """Return events as they are recorded where a string of sensors sees nothing.

    A string of `Telescope` is a column of the image, the sensors of equal x, counted along x. One
    of `Telescope3D` is the sensors of equal x and y, counted along y first.

    Arguments:
        telescope: The telescope of the events.
        events: N events.
        string: "random" (one per event, all equally likely), "brightest" (the one with most hits
            in the event, the first of equals), an index, or one index per event, shape (N,).
        generator: The source of random strings.
        seed: A seed, in place of a generator.

    Returns:
        N events with the same labels, the hits of the string taken out.

    Raises:
        ValueError: If the events are not of this telescope, `string` is none of these or out of
            range, or both `generator` and `seed` are set.
    """
    _check_events(telescope, events)
    generator = resolve_generator(generator, seed)
    real, owner = _real(events), _string_of(telescope, events.hits)
    count = telescope.columns if isinstance(telescope, Telescope) else math.prod(telescope.strings)
    if isinstance(string, str):
        dead = _pick(string, owner, real, count, generator)
    else:
        dead = _check_index(string, len(events), count, events.z.device)
    hits, lengths = _pack(events.hits, real & (owner != dead[:, None]))
    if isinstance(events, TelescopeEvents):
        columns = torch.arange(count, device=dead.device)
        alive = (columns != dead[:, None])[:, None, None]
        images = torch.where(alive, events.images, torch.zeros_like(events.images))
        return replace(events, images=images, hits=hits, lengths=lengths)
    return replace(events, hits=hits, lengths=lengths)


def track_like(
    telescope: Telescope,
    z: Tensor,
    angle: Tensor,
    length: float | Tensor = 100.0,
    pieces: int = 10,
    generator: torch.Generator | None = None,
    seed: int | None = None,
    nuisance: Mapping[str, Any] | None = None,
) -> TelescopeEvents:
    r"""Simulate tracks in two dimensions: cascades in a row that share the energy.

    The track starts at p at t = 0 and goes along e = (cos α, sin α) with the speed of light in
    vacuum, c. Of P pieces, piece k = 1 … P is a cascade of energy E/P,

    .. math:: p_k = p + s_k e, \qquad t_k = s_k / c, \qquad s_k = (k - 1/2)\, L / P .

    Arguments:
        telescope: The telescope.
        z: Start (x, y) in metres and total energy in TeV, shape (N, 3).
        angle: Direction angles α in radians, shape (N,).
        length: L in metres, one number or shape (N,).
        pieces: P, at least 2.
        generator: The source of randomness, on the device of `z`.
        seed: A seed, in place of a generator.
        nuisance: As in `Telescope.simulate`.

    Returns:
        The events, with `z` and `angle` as labels, in the dtype of `z`.

    Raises:
        ValueError: If `telescope` is three-dimensional, shapes differ from these, an energy, a
            length or a factor is not positive, `pieces` is no whole number of at least 2, or both
            `generator` and `seed` are set.
    """
    if not isinstance(telescope, Telescope):
        raise ValueError(
            f"Expected telescope as a Telescope; got {type(telescope).__name__}. In three "
            'dimensions, Telescope3D(kind="track") simulates tracks.'
        )
    z, angle = check_labels(z, angle)
    if not len(z):
        raise ValueError("Expected at least one row in z; got none. Give labels to simulate.")
    pieces = check_positive_int(pieces, "pieces", 2)
    length = _check_length(length, z)
    factors = check_nuisance(nuisance, z)
    # the pieces bring the noise of one event together
    factors = factors._replace(noise=factors.noise / pieces)

    steps = (torch.arange(pieces, dtype=z.dtype, device=z.device) + 0.5) / pieces
    along = length[:, None] * steps
    x = z[:, :1] + along * angle.cos()[:, None]
    y = z[:, 1:2] + along * angle.sin()[:, None]
    parts = torch.stack([x, y, (z[:, 2:] / pieces).expand_as(x)], -1).flatten(0, 1)
    seen = draw_events(
        telescope,
        parts,
        angle.repeat_interleave(pieces),
        type(factors)(*(factor.repeat_interleave(pieces) for factor in factors)),
        resolve_generator(generator, seed),
        delay=along.flatten() / LIGHT_SPEED,
        parts=pieces,
    )
    return TelescopeEvents(z, angle, *seen)


def _real(events: TelescopeEvents | Telescope3DEvents) -> Tensor:
    """Return where hits are no padding, shape (N, M)."""
    index = torch.arange(events.hits.shape[1], device=events.hits.device)
    return index < events.lengths[:, None]


def _pack(hits: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the hits to keep in time order, padded with zeros, and their number per event."""
    time = hits[..., -1].masked_fill(~keep, torch.inf)
    order = time.argsort(stable=True, dim=1)
    lengths = keep.sum(1)
    order = order[:, : max(1, int(lengths.max()) if len(lengths) else 1)]
    chosen = hits.gather(1, order[..., None].expand(-1, -1, hits.shape[-1]))
    real = keep.gather(1, order)
    return torch.where(real[..., None], chosen, torch.zeros_like(chosen)), lengths


def _string_of(telescope: Telescope | Telescope3D, hits: Tensor) -> Tensor:
    """Return the index of the string of every hit, shape (N, M)."""
    if isinstance(telescope, Telescope):
        return (hits[..., 0] / telescope.spacing + (telescope.columns - 1) / 2).round().long()
    i, j = (
        (hits[..., axis] / telescope.string_spacing + (telescope.strings[axis] - 1) / 2)
        .round()
        .long()
        for axis in (0, 1)
    )
    return i * telescope.strings[1] + j


def _pick(
    string: str, owner: Tensor, real: Tensor, count: int, generator: torch.Generator | None
) -> Tensor:
    """Return the string to kill in every event by name of the rule, shape (N,)."""
    if string == "random":
        device = owner.device if generator is None else generator.device
        drawn = torch.randint(count, (len(owner),), generator=generator, device=device)
        return drawn.to(owner.device)
    if string == "brightest":
        seen = torch.zeros(len(owner), count, dtype=torch.int64, device=owner.device)
        # the indices of padding mean nothing
        seen.scatter_add_(1, torch.where(real, owner, 0), real.long())
        first = torch.arange(count, 0, -1, device=owner.device)
        return (seen * (count + 1) + first).argmax(1)
    raise ValueError(f"Expected string as 'random', 'brightest' or indices; got {string!r}.")


def _check_index(string: Any, n: int, count: int, device: torch.device) -> Tensor:
    try:
        index = torch.as_tensor(string, device=device)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(
            f"Expected string as 'random', 'brightest' or indices; got {string!r}."
        ) from error
    if index.dtype == torch.bool or index.is_floating_point() or index.is_complex():
        raise ValueError(
            f"Expected string as whole numbers; got {index.dtype}. Give indices of strings."
        )
    if index.ndim == 0:
        index = index.expand(n)
    check_shape(index, (n,), "string", "Give one index per event, or one for all.")
    bad = (index < 0) | (index >= count)
    if bool(bad.any()):
        row = int(bad.nonzero()[0])
        raise ValueError(
            f"Expected string between 0 and {count - 1}; got {int(index[row])} in row {row}."
        )
    return index.long()


def _check_events(telescope: Any, events: Any) -> None:
    pairs = ((Telescope, TelescopeEvents), (Telescope3D, Telescope3DEvents))
    if not any(isinstance(telescope, t) and isinstance(events, e) for t, e in pairs):
        raise ValueError(
            "Expected a telescope and its events; got "
            f"{type(telescope).__name__} and {type(events).__name__}."
        )
    telescope.check_hits(events.hits, events.lengths)
    if isinstance(telescope, Telescope):
        telescope.check_images(events.images)


def _check_length(length: Any, z: Tensor) -> Tensor:
    value = as_tensor(length, "length", like=z).to(z.dtype)
    if value.ndim == 0:
        value = value.expand(len(z))
    check_shape(value, (len(z),), "length", "Give one length in metres per event, or one number.")
    check_finite(value, "length")
    if bool((value <= 0).any()):
        row = int((value <= 0).nonzero()[0])
        raise ValueError(f"Expected positive lengths; got {value[row].item():g} in row {row}.")
    return value
