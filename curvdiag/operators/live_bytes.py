"""Bytes of the tensors that a piece of code makes and leaves alive, and the most that were alive at once."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from curvdiag.operators.watching import Watching


class LiveBytes(Watching):
    """Counts, while it is entered, the memory that PyTorch's operations allocate, backward passes among them.

    What was there before is not counted, nor are views of it. Storages are watched and not held. What an operation
    needs only inside itself is not seen.

    Args:
        recording: Keep a history.

    Attributes:
        history: Bytes alive after each operation.
    """

    def __init__(self, *, recording: bool = True) -> None:
        super().__init__()
        self.recording = recording
        self.history: list[int] = []
        self._found: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if _gives_views(func):
            fresh: Iterable[Tensor] = ()
        elif func.namespace == "aten":
            fresh = _strided(result)
        else:  # whose signature may not say what it hands through
            there = {tensor.untyped_storage()._cdata for tensor in _strided((args, kwargs))}
            fresh = (tensor for tensor in _strided(result) if tensor.untyped_storage()._cdata not in there)
        for tensor in fresh:
            storage = tensor.untyped_storage()
            # A storage that is watched keeps its place in memory, so that no other takes its number.
            if storage._cdata not in self._found:
                self._found[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        if self.recording:  # looking for what has gone after each operation takes time
            self.history.append(self.now())
        return result

    def now(self) -> int:
        """Bytes that are alive now."""
        self._found = {key: (ref, size) for key, (ref, size) in self._found.items() if not ref.expired()}
        return sum(size for _, size in self._found.values())

    def peak(self) -> int:
        """The most bytes that were alive at once, after any operation since the last :meth:`reset`."""
        return max(self.history, default=self.now())

    def reset(self) -> None:
        """Forget the history so far."""
        self.history = [self.now()]


@functools.cache
def _gives_views(function: Any) -> bool:
    """Whether an operation gives what it took, or views of that."""
    aliases = [returned.alias_info is not None for returned in function._schema.returns]
    return any(aliases) or function is torch.ops.aten._unsafe_view.default


def _strided(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.device.type != "meta" and value.layout == torch.strided:
            yield value
    elif isinstance(value, tuple | list):  # what operations take and give
        for part in value:
            yield from _strided(part)
    elif isinstance(value, dict):
        for part in value.values():
            yield from _strided(part)
