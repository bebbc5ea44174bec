"""Tensors in parts that stay in cache, so that a step of many small operations reads each number from memory once."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

Row = tuple[Tensor, ...]
"""Tensors of one shape and device that belong together: a parameter, its gradient, its momentum."""

# For each thread: four arrays of these, a megabyte in single precision, fit into a core's second-level cache or nearly,
# and are enough to make the price of a call small. PyTorch deals an operation out to its threads in equal shares.
CPU_ELEMENTS = 65_536
# On an accelerator the launches count, and the size only limits the temporaries.
DEVICE_ELEMENTS = 2**24
# Devices on which one operation after another on a piece in cache is faster than lists of tensors.
PIECEWISE = ("cpu",)


def by_way(rows: Iterable[Row]) -> tuple[list[Row], list[Row]]:
    """Rows for :func:`pieces`, and rows for :func:`buckets`, as all are for the compiler."""
    ways: tuple[list[Row], list[Row]] = [], []
    for row in rows:
        ways[torch.compiler.is_compiling() or row[0].device.type not in PIECEWISE].append(row)
    return ways


def pieces(rows: Iterable[Row]) -> Iterator[Row]:
    """The same rows with the large ones in slices, for a CPU.

    Tensors without elements are left out. Where the tensors of a large row cannot be seen as one-dimensional in the
    same order (strided, or a gradient in another memory format than its parameter), the row stays whole.
    """
    size = CPU_ELEMENTS * torch.get_num_threads()
    for row in rows:
        elements = row[0].numel()
        if elements > size:
            yield from _slices(row, size)
        elif elements:
            yield row


def buckets(rows: Iterable[Row]) -> Iterator[list[list[Tensor]]]:
    """The same rows as lists of parameters, of gradients, ..., together of limited size, for an accelerator.

    Within a bucket each list has one device and one dtype. Tensors without elements are left out; one that is larger
    than a bucket is sliced if it can be. Under ``torch.compile`` nothing is split, since the compiler does that.
    """
    whole = torch.compiler.is_compiling()
    waiting: dict[object, list[Row]] = defaultdict(list)
    filled: dict[object, int] = defaultdict(int)
    for row in rows:
        elements = row[0].numel()
        if not elements:
            continue
        key = (row[0].device, *(tensor.dtype for tensor in row))
        for part in [row] if whole or elements <= DEVICE_ELEMENTS else _slices(row, DEVICE_ELEMENTS):
            if filled[key] and filled[key] + part[0].numel() > DEVICE_ELEMENTS and not whole:
                yield _columns(waiting.pop(key))
                filled[key] = 0
            waiting[key].append(part)
            filled[key] += part[0].numel()
    for remaining in waiting.values():
        yield _columns(remaining)


class Workspace:
    """Memory for the temporaries of piece after piece: fresh memory would cost more than the arithmetic."""

    def __init__(self) -> None:
        self.buffers: dict[torch.dtype, Tensor] = {}
        self.views: dict[tuple[torch.dtype, torch.Size], Tensor] = {}

    def like(self, tensor: Tensor, dtype: torch.dtype) -> Tensor | None:
        """Uninitialised numbers in the shape of ``tensor``; None if that is strided. The next call may reuse them."""
        if not tensor.is_contiguous():
            return None
        key = (dtype, tensor.shape)
        if key not in self.views:
            if dtype not in self.buffers or self.buffers[dtype].numel() < tensor.numel():
                least = CPU_ELEMENTS * torch.get_num_threads()
                self.buffers[dtype] = torch.empty(max(least, tensor.numel()), dtype=dtype)
            self.views[key] = self.buffers[dtype][: tensor.numel()].view(tensor.shape)
        return self.views[key]


def _columns(rows: list[Row]) -> list[list[Tensor]]:
    return [list(column) for column in zip(*rows, strict=True)]


def _slices(row: Row, size: int) -> list[Row]:
    flat = row
    if not all(tensor.is_contiguous() for tensor in row):
        # Weights in another memory format, such as channels_last, are contiguous in the order of their strides.
        order = sorted(range(row[0].dim()), key=row[0].stride, reverse=True)
        flat = tuple(tensor.permute(order) for tensor in row)
        if not all(tensor.is_contiguous() for tensor in flat):
            return [row]
    return list(zip(*(tensor.view(-1).split(size) for tensor in flat), strict=True))
