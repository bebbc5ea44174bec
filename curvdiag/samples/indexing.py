"""Whether a function that takes entries by index moves samples to other places, as sorting them by length does."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

BY_DIMENSION = frozenset({
    "gather", "index_add", "index_add_", "index_copy", "index_copy_", "index_fill", "index_fill_", "index_select",
    "scatter", "scatter_", "scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_", "take_along_dim",
})  # fmt: skip
"""Functions of a tensor, a dimension and an index."""

BY_BRACKETS = frozenset({"__getitem__", "__setitem__", "index_put", "index_put_"})


def moves_samples(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], samples: int) -> bool:
    """Whether the function ``name`` of a tensor indexes it along its samples in any other than their own order.

    Which samples end up where then depends on their values, so that it may be seen in one batch and not in another.
    """
    if name not in BY_BRACKETS and name not in BY_DIMENSION:
        return False
    tensor, *rest = [*args, *kwargs.values()]
    if not isinstance(tensor, Tensor):
        return False
    pairs = _bracketed(rest[0]) if name in BY_BRACKETS else _along(tensor, rest)
    return any(not _in_order(tensor, dimension, index, samples) for dimension, index in pairs)


def _bracketed(index: Any) -> Iterator[tuple[int, Tensor]]:
    """The tensors of whole numbers among indices, each with the dimension that it is for."""
    dimension = 0
    for entry in index if isinstance(index, tuple) else (index,):
        if entry is Ellipsis:
            return
        numbers = isinstance(entry, np.ndarray) or (isinstance(entry, list) and all(isinstance(i, int) for i in entry))
        one = torch.as_tensor(entry) if numbers else entry
        if isinstance(one, Tensor):
            boolean = one.dtype in (torch.bool, torch.uint8)
            if not boolean:
                yield dimension, one
            dimension += one.ndim if boolean else 1
        elif one is not None:
            dimension += 1


def _along(tensor: Tensor, rest: list[Any]) -> Iterator[tuple[int, Tensor]]:
    dimension = next((one for one in rest if isinstance(one, int)), 0)
    index = next((one for one in rest if isinstance(one, Tensor) and not one.dtype.is_floating_point), None)
    if index is not None and tensor.ndim:
        yield dimension % tensor.ndim, index


def _in_order(tensor: Tensor, dimension: int, index: Tensor, samples: int) -> bool:
    """Whether an index takes the entries of each sample to that sample's own place, or is not for samples at all."""
    size = tensor.shape[dimension] if dimension < tensor.ndim else 0
    if not size or (size % samples if dimension == 0 else dimension > 1 or size != samples):
        return True
    if index.numel() % samples:
        return False
    own, flat = torch.arange(samples, device=index.device), index.flatten() % size
    together = flat.view(samples, -1) // (size // samples) == own.unsqueeze(1)
    return bool(together.all()) or bool((flat.view(-1, samples) % samples == own).all())
