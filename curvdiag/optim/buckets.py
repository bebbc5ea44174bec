"""Tensors in lists of limited size: a step of many small operations then works in cache, and in few launches."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.nn import Parameter

Row = tuple[Tensor, ...]
"""Tensors of one shape and device that belong together: a parameter, its gradient, its momentum."""

# For each thread: a few arrays of these, half a megabyte each in single precision, stay in a core's second-level cache
# or near it, and the price of a call is small beside them. PyTorch deals an operation out to its threads evenly.
CPU_ELEMENTS = 131_072
# On an accelerator the launches count, and the size only limits the temporaries.
DEVICE_ELEMENTS = 2**24


def buckets(rows: Iterable[Row], *, together: bool = True) -> Iterator[list[list[Tensor]]]:
    """The rows as a list of parameters, one of gradients, ..., with so many elements in all as suit the device.

    Within a bucket each list has one device and one dtype. A large tensor is sliced, unless the tensors of its row
    cannot be seen as one-dimensional in the same order (strided, or a gradient in another memory format than its
    parameter). Subclasses of tensors are left whole and alone, and with ``together=False`` all are. Tensors without
    elements are left out. Under ``torch.compile`` nothing is split, since the compiler does that.
    """
    compiling = torch.compiler.is_compiling()
    waiting: dict[object, list[Row]] = defaultdict(list)
    filled: dict[object, int] = defaultdict(int)
    for row in rows:
        elements, device = row[0].numel(), row[0].device
        if not elements:
            continue
        if not together or not all(is_plain(tensor) for tensor in row):
            yield _columns([row])
            continue
        key = (device, *(tensor.dtype for tensor in row))
        size = CPU_ELEMENTS * torch.get_num_threads() if device.type == "cpu" else DEVICE_ELEMENTS
        for part in [row] if compiling or elements <= size else _slices(row, size):
            if filled[key] and filled[key] + part[0].numel() > size and not compiling:
                yield _columns(waiting.pop(key))
                filled[key] = 0
            waiting[key].append(part)
            filled[key] += part[0].numel()
    for remaining in waiting.values():
        yield _columns(remaining)


def is_plain(tensor: Tensor) -> bool:
    """Whether it is a tensor or a parameter of torch itself, rather than of a subclass, such as a ``DTensor``."""
    return type(tensor) in (Tensor, Parameter)


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
