"""Where the samples of a batch lie in a tensor inside a model."""

from __future__ import annotations

from torch import Tensor

LAYOUTS = ("first", "second", "tokens")
"""``[B, ...]`` or flattened ``[B T, ...]``; ``[T, B, ...]``; flattened ``[T B, ...]``."""


def by_sample(tensor: Tensor, samples: int, layout: str, keep: int | None = None) -> Tensor | None:
    """The tensor as ``[B, R, ...]``: samples, positions that belong to one sample, the last ``keep`` dimensions.

    By default all dimensions but the samples' are kept, so that R is 1 where nothing was flattened.
    None where the tensor cannot have this layout.
    """
    if tensor.ndim == 0:
        return None
    first = tensor.shape[0]
    if layout == "second":
        if tensor.ndim < 2 or tensor.shape[1] != samples:
            return None
        parts = tensor.movedim(1, 0).unsqueeze(1)
    elif first % samples or (layout == "tokens" and first == samples):
        return None
    elif layout == "first":
        parts = tensor.unflatten(0, (samples, first // samples))
    else:
        parts = tensor.unflatten(0, (first // samples, samples)).movedim(1, 0)
    if keep is None:
        return parts
    if parts.ndim < keep + 2:
        return None
    return parts.flatten(1, parts.ndim - 1 - keep)
