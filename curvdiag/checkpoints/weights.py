"""A checkpoint's weights in a model, in one call."""

from __future__ import annotations

import os
from pathlib import Path

from torch import nn

from curvdiag.checkpoints.load import load
from curvdiag.checkpoints.match import weights_in
from curvdiag.checkpoints.read import Contents, read
from curvdiag.errors import CheckpointError


def load_checkpoint(model: nn.Module, path: str | os.PathLike[str], part: str | None = None) -> Contents:
    """Put the weights of a checkpoint into a model, in place; returns what else it says (step, epoch).

    Args:
        path: Of any kind that :func:`curvdiag.checkpoints.scan` reads.
        part: Which weights, where several fit the model, e.g. ``"ema"``.

    Raises:
        CheckpointError: It cannot be read, or does not fit the model, which may then hold some of it.
    """
    path = Path(path).expanduser()
    try:
        contents = read(path)
        load(model, weights_in(contents, model, part))
    except CheckpointError as error:
        raise CheckpointError(f"{path} {error}") from error
    return contents
