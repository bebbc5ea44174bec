"""Batches: what counts as one, how they are read once and kept, cut and merged by sample."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from curvdiag.errors import DataError, TooLargeError
from curvdiag.loaders import as_it_was, without_workers
from curvdiag.memory import free_bytes, human_bytes

Batch = Any
"""A nest of tuples, lists, mappings and dataclasses that holds tensors."""


def read_batches(
    data: Any, *, batch: Any = None, batches: Any = None, pairs: bool, keep_bytes: int | None = None
) -> tuple[list[Batch], list[str]]:
    """All batches of ``data``, read once, and notes on what was seen while reading.

    A tensor, a mapping or a tuple is one batch; a DataLoader, a list or another re-iterable holds batches.
    A DataLoader is read by a copy without workers, so that its own workers and epoch are left alone, and
    is :func:`~curvdiag.loaders.as_it_was` afterwards.

    Args:
        pairs: Batches are ``(inputs, targets)``; a list of two whose first element is a tensor is then one batch.
        keep_bytes: Refuse to keep more than this; a quarter of the free memory by default.

    Raises:
        DataError: No data, a one-shot iterator, an ambiguous list, or sizes that disagree.
        TooLargeError: The batches take more than ``keep_bytes``.
    """
    if sum(source is not None for source in (data, batch, batches)) != 1:
        raise DataError("give the data once: as the third argument, as batch= or as batches=")
    if batch is None and batches is None:
        if _is_one_batch(data, pairs):
            batch = data
        else:
            batches = data
    if batch is not None:
        kept: list[Batch] = [map_tensors(_copy, batch)]
        notes: list[str] = []
    else:
        kept, notes = _read(batches, free_bytes("cpu") // 4 if keep_bytes is None else keep_bytes)
    for index, one in enumerate(kept):
        _check(one, index, pairs)
    return kept, notes


def _is_one_batch(data: Any, pairs: bool) -> bool:
    if isinstance(data, Tensor | Mapping | tuple):
        return True
    if isinstance(data, list) and data and isinstance(data[0], Tensor):
        if not pairs:
            raise DataError(
                "a list whose first element is a tensor may be one batch or a list of batches: "
                "say batch=... or batches=..."
            )
        return len(data) == 2
    return False


def _read(batches: Any, keep_bytes: int) -> tuple[list[Batch], list[str]]:
    if not isinstance(batches, Iterable):
        raise DataError(f"expected a batch or an iterable of batches, got {type(batches).__name__}")
    if isinstance(batches, Iterator):
        raise DataError(
            f"a one-shot iterator ({type(batches).__name__}) cannot be read again and may belong to the training "
            "loop; give a list (for instance list(itertools.islice(loader, 8))) or the DataLoader itself"
        )
    source: Iterable[Batch] = without_workers(batches) if isinstance(batches, DataLoader) else batches
    kept: list[Batch] = []
    notes: list[str] = []
    total = 0
    with as_it_was(batches):
        for one in source:
            total += sum(t.nbytes for t in tensors_of(one))
            if total > keep_bytes:
                raise TooLargeError(
                    f"the first {len(kept) + 1} batches take {human_bytes(total)}, more than keep_bytes="
                    f"{human_bytes(keep_bytes)}: measure on fewer of them, list(itertools.islice(loader, "
                    f"{max(1, len(kept))})), or raise keep_bytes"
                )
            # A loader makes new tensors; anything else may hand out buffers that it, or the user, writes into again.
            kept.append(one if isinstance(batches, DataLoader) else map_tensors(_copy, one))
        if kept and not isinstance(batches, Sequence):
            again = next(iter(source), None)
            if not _same(kept[0], again):
                notes.append(
                    f"{type(batches).__name__} gives other data on a second pass (it shuffles or augments): "
                    "the batches of the first pass are kept, and another process would measure others"
                )
    if not kept:
        raise DataError(f"there is no batch in the {type(batches).__name__}")
    return kept, notes


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def _same(one: Batch, other: Batch) -> bool:
    a, b = tensors_of(one), tensors_of(other)
    return len(a) == len(b) and all(x.shape == y.shape and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def _check(batch: Batch, index: int, pairs: bool) -> None:
    if pairs:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            size = f" of {len(batch)}" if isinstance(batch, tuple | list) else ""
            raise DataError(
                f"batch {index} is a {type(batch).__name__}{size}, not a pair (inputs, targets); for anything else "
                "use Objective.from_loss(model, loss, data) with loss(model, batch)"
            )
        if not tensors_of(batch[0]):
            raise DataError(f"the inputs of batch {index} hold no tensor: {type(batch[0]).__name__}")
        sizes = {t.shape[0] for part in batch for t in tensors_of(part) if t.ndim}
        if len(sizes) > 1:
            shapes = ", ".join(str(tuple(t.shape)) for t in tensors_of(batch))
            raise DataError(
                f"the sizes of batch {index} disagree: tensors of shapes {shapes} do not have the same first "
                "dimension (samples); use Objective.from_loss where samples lie along another one"
            )
    if sample_count(batch) == 0:
        raise DataError(f"batch {index} holds no samples")


def sample_count(batch: Batch) -> int:
    """Number of samples: the first dimension of the first tensor that has one; 1 where there is none."""
    return next((t.shape[0] for t in tensors_of(batch) if t.ndim), 1)


def map_tensors(function: Callable[[Tensor], Tensor], batch: Batch) -> Batch:
    """The same nest with ``function`` applied to each tensor."""
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, Mapping):
        items = {key: map_tensors(function, value) for key, value in batch.items()}
        if not isinstance(batch, MutableMapping):
            return items
        twin = copy.copy(batch)  # keeps its type, and what else it holds
        twin.update(items)
        return twin
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(function, value) for value in batch))
    if isinstance(batch, tuple | list):
        return type(batch)(map_tensors(function, value) for value in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        changes = {f.name: map_tensors(function, getattr(batch, f.name)) for f in dataclasses.fields(batch)}
        return dataclasses.replace(batch, **changes)
    return batch


def tensors_of(batch: Batch) -> list[Tensor]:
    """All tensors of a nest, in order."""
    if isinstance(batch, Tensor):
        return [batch]
    if type(batch) in (tuple, list):  # asked for often, and most batches are pairs
        return [tensor for part in batch for tensor in tensors_of(part)]
    found: list[Tensor] = []

    def collect(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(collect, batch)
    return found


def place(batch: Batch, device: torch.device, dtype: torch.dtype | None) -> Batch:
    """The batch on ``device``; floating-point tensors in ``dtype`` where one is given."""

    def move(tensor: Tensor) -> Tensor:
        wanted = dtype if tensor.dtype.is_floating_point else None
        moved = tensor.detach().to(device=device, dtype=wanted)
        return moved.clone() if moved.is_inference() else moved  # an inference tensor cannot enter a graph

    return map_tensors(move, batch)


def can_cut(batch: Batch) -> bool:
    """Whether each tensor of the batch has the samples along its first dimension (or has no dimension)."""
    count = sample_count(batch)
    return all(t.ndim == 0 or t.shape[0] == count for t in tensors_of(batch))


def take(batch: Batch, samples: slice | Tensor) -> Batch:
    """Some samples of a batch that :func:`can_cut`."""
    return map_tensors(lambda t: t if t.ndim == 0 else t[samples], batch)


def can_merge(one: Batch, other: Batch) -> bool:
    """Whether two batches differ in nothing but their samples."""
    return can_cut(one) and can_cut(other) and signature(one) == signature(other)


def merge(batches: Sequence[Batch]) -> Batch:
    """One batch with the samples of several, each pair of which :func:`can_merge`."""
    if len(batches) == 1:
        return batches[0]
    columns = zip(*(tensors_of(one) for one in batches), strict=True)
    merged = iter([column[0] if column[0].ndim == 0 else torch.cat(column) for column in columns])
    return map_tensors(lambda _: next(merged), batches[0])


def signature(batch: Batch) -> str:
    """What two batches that :func:`can_merge` have in common: everything but their samples."""

    def describe(part: Any) -> Any:
        if isinstance(part, Tensor):
            return str((part.item(), part.dtype) if part.ndim == 0 else (part.shape[1:], part.dtype, part.device))
        if isinstance(part, Mapping):
            return {str(key): describe(value) for key, value in part.items()}
        if isinstance(part, tuple | list):
            return [describe(value) for value in part]
        return repr(part)

    return repr(describe(batch))
