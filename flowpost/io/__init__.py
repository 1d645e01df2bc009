r"""Models on disk: a JSON description and safetensors, nothing that can execute.

A directory holds ``config.json`` and ``weights.safetensors``; a path that ends in ``.safetensors``
is one file with the description in its header. The description carries the format version, the
version of flowpost, and the SHA-256 of everything else, so that a file whose bytes were altered is
refused. As a checksum can be made anew, a model is sketched without memory first, and built only
where names and shapes are those of the tensors in the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from .build import assemble, complete, described, fill
from .checks import check_fit, check_given, check_values
from .describe import describe, parts_of
from .files import FORMAT_VERSION, read, write
from .sizes import check_sizes

if TYPE_CHECKING:
    from .describe import Saved

__all__ = ["FORMAT_VERSION", "load", "save"]


def save(model: Saved, path: str | os.PathLike[str]) -> None:
    """Write a model, or a head alone, to a directory or a single `.safetensors` file.

    A `goodness.Calibrator` or `goodness.Filter` is written with its model and what it found in
    held-out events. Parts of flowpost are described so that `load` builds them again; of an
    encoder, decoder or data module of your own the weights are kept, and `load` is given a fresh
    one to fill. What was at the path before is replaced only when the new files are complete.

    Arguments:
        model: A `PosteriorHead`, `PosteriorModel`, `likelihood.ExtendedModel`,
            `goodness.Calibrator` or `goodness.Filter`.
        path: A directory, or a file name that ends in `.safetensors`.

    Raises:
        ValueError: If it is none of these, is of a class derived from them, has a tensor that is
            not finite or types that do not agree, or the path is a directory of something else.
    """
    from .. import __version__

    target = Path(path)
    parts = parts_of(model, target)
    config = {
        "format": "flowpost",
        "format_version": FORMAT_VERSION,
        "flowpost_version": __version__,
        **describe(parts),
    }
    # copies, for tied weights share memory, which safetensors refuses
    tensors = {k: v.detach().cpu().contiguous().clone() for k, v in model.state_dict().items()}
    with described(target):
        check_sizes(config, tensors)
    check_values(parts, {name for name, _ in model.named_parameters()}, tensors, target)
    write(target, config, tensors)


def load(
    path: str | os.PathLike[str],
    encoder: nn.Module | None = None,
    *,
    decoder: nn.Module | None = None,
    data: nn.Module | None = None,
) -> Saved:
    """Read what `save` wrote, in evaluation mode, on the CPU.

    Arguments:
        path: The directory or file.
        encoder: A fresh instance of your own encoder, which is filled with the saved weights.
        decoder: One of the decoder that you gave to `likelihood.PoissonCounts`.
        data: One of the data module that you gave to `likelihood.ExtendedModel`.

    Raises:
        ValueError: If the path holds no model, was altered, comes from a later format, or does not
            fit the modules given; the error names the tensor.
    """
    path = Path(path)
    config, tensors = read(path)
    given = {"encoder": encoder, "decoder": decoder, "data": data}
    check_given(config, given, path)
    # building draws initial weights, which are no business of the user's generator
    with torch.random.fork_rng(devices=[]):
        with described(path):
            spaces = check_sizes(config, tensors)
            with torch.device("meta"):
                sketch = assemble(config, spaces, given, tensors)
        parts = parts_of(sketch, path)
        complete(sketch, tensors)
        check_fit(parts, sketch.state_dict(), tensors, path)
        check_values(parts, {name for name, _ in sketch.named_parameters()}, tensors, path)
        model = assemble(config, spaces, given, tensors).cpu()
    fill(model, tensors, path)
    return model.eval()
