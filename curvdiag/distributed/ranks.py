"""The processes that measure one objective together, each with its share of the data."""

from __future__ import annotations

import atexit
import socket
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from curvdiag.distributed.control import Control
from curvdiag.errors import ArgumentError, DistributedError, RankLostError

T = TypeVar("T")
E = TypeVar("E", bound=Exception)

Group: TypeAlias = "dist.ProcessGroup | Literal['world'] | None"
"""None for this process alone, ``"world"`` for all processes of ``torch.distributed``, or a process group."""


@dataclass
class Traffic:
    """What went over the data channel.

    Attributes:
        reductions: All-reduces.
        bytes: Size of what they reduced.
    """

    reductions: int = 0
    bytes: int = 0


class Ranks:
    """The ranks of a process group. Every method is a collective: all ranks call it, in the same order.

    Tensors go over the group itself. Status, numbers and words go over a channel of their own on the CPU, so that
    nothing waits for the stream of a GPU.

    Attributes:
        group: The process group; None for a process alone.
        rank, count: Place in it, and its size.
        traffic: What was reduced so far.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.traffic = Traffic()
        self._control = None if group is None else Control(group)
        self.rank, self.count = (0, 1) if self._control is None else (self._control.rank, self._control.count)
        self._inside = 0  # how many bodies of together() this rank is in
        self._told: list[Exception] = []  # errors that all ranks have heard of, while it is in one
        self._neighbours = 1 if self.alone else 0

    @property
    def alone(self) -> bool:
        return self._control is None

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes for all."""
        return self.rank == 0

    @property
    def neighbours(self) -> int:
        """How many of the ranks share this machine's memory, with this one; a collective where it is first asked."""
        if not self._neighbours:
            names = self.gather(socket.gethostname(), "counting of neighbours")
            self._neighbours = names.count(names[self.rank])
        return self._neighbours

    def sum(self, place: str, function: Callable[[], Tensor], signature: Callable[[], int] | None = None) -> Tensor:
        """The sum over all ranks of the tensors that ``function`` gives on each: one all-reduce.

        Args:
            place: What is being done, in words for messages: "product of 3 vectors".
            function: Where it raises on one rank, all of them raise.
            signature: A number that must be the same on all ranks, as the shapes must.

        Raises:
            DistributedError: Another rank failed, or does something else.
        """
        if self._control is None:
            return function()
        found: list[Tensor] = []
        with self.together(place, lambda: _signature(found[0], 0 if signature is None else signature())):
            found.append(function().contiguous())
        self._reduce(found[0], place)
        return found[0]

    def sum_(self, tensor: Tensor, place: str = "sum") -> Tensor:
        """Replace a contiguous ``tensor`` by its sum over all ranks; returns it."""
        if self._control is not None:
            self._meet(place, _signature(tensor))
            self._reduce(tensor, place)
        return tensor

    def complete_(self, tensor: Tensor, place: str = "inner products") -> Tensor:
        """As :meth:`sum_`, for a few numbers within a loop: no round of status that would hurry a GPU's stream."""
        if self._control is not None:
            if self._control.group is self.group:  # on which the host waits in any case
                self._meet(place, _signature(tensor))
            self._reduce(tensor, place)
        return tensor

    def first_(self, tensor: Tensor, place: str = "broadcast") -> Tensor:
        """Replace a ``tensor`` by that of the first rank; returns it."""
        if self._control is not None and not tensor.is_contiguous():
            return tensor.copy_(self.first_(tensor.contiguous(), place))
        if self._control is not None:
            self._meet(place, _signature(tensor))
            source = dist.get_process_group_ranks(self._group)[0]
            self._control.answered(lambda: dist.broadcast(tensor, source, group=self._over(tensor)), place)
        return tensor

    def concatenate(self, tensor: Tensor, dim: int = -1, place: str = "concatenation") -> Tensor:
        """The tensors of all ranks one after the other along ``dim``, in which they may differ in length."""
        if self._control is None:
            return tensor
        wide = tensor.movedim(dim, 0)
        lengths = self._gathered(len(wide), place, _signature(wide[:0]))
        padded = wide.new_zeros(max(lengths), *wide.shape[1:])
        padded[: len(wide)] = wide
        parts = [torch.empty_like(padded) for _ in lengths]
        self._control.answered(lambda: dist.all_gather(parts, padded, group=self._over(padded)), place)
        return torch.cat([part[:n] for part, n in zip(parts, lengths, strict=True)]).movedim(0, dim)

    def gather(self, value: T, place: str = "gathering") -> list[T]:
        """The values of all ranks, in their order: small ones, which are pickled."""
        return [value] if self._control is None else self._gathered(value, place)

    def total(self, number: float, place: str = "sum of numbers") -> float:
        """The sum over ranks of a number, the same bits on all of them."""
        return number if self._control is None else sum(self.gather(number, place))

    def least(self, number: float, place: str = "smallest number") -> float:
        """The smallest over ranks of a number: of free memory, say."""
        return number if self._control is None else min(self.gather(number, place))

    def of_first(self, value: T, place: str = "what the first rank decides") -> T:
        """The first rank's value, on all ranks."""
        return value if self._control is None else self.gather(value, place)[0]

    def agree(self, what: str, value: Any, remedy: str = "give the same on every rank") -> None:
        """Refuse to go on where ``value``, which prints itself, is not the same on all ranks.

        Raises:
            DistributedError: On all of them, with who has what.
        """
        values = self.gather(value, f"comparison of {what}")
        if any(other != values[0] for other in values):
            told = ", ".join(f"{other} on rank {i}" for i, other in enumerate(values))
            raise self._known(DistributedError(f"the ranks have different {what}: {told}; {remedy}"))

    @contextmanager
    def together(self, place: str, signature: Callable[[], int] | None = None) -> Iterator[None]:
        """Go through the body on all ranks or on none: if it raises on one, all of them raise when they meet.

        They meet at the next exchange, at the latest where the body ends. What is no :class:`Exception` (an interrupt)
        ends the process, which the others notice by themselves.

        Raises:
            DistributedError: Another rank failed, or does something else.
        """
        if self._control is None:
            yield
            return
        self._inside += 1
        try:
            yield
            number = 0 if signature is None else signature()
        except Exception as error:
            if not self._has_told(error):
                self._known(error)
                try:
                    self._control.round(place, error)
                except RankLostError as lost:
                    if _of_a_collective(error):  # one within the body, such as an engine's of sharded weights
                        raise lost from error
                except DistributedError:  # its own error says more than that another rank has one as well
                    pass
            raise
        else:
            self._meet(place, number)
        finally:
            self._inside -= 1
            if not self._inside:
                self._told.clear()

    def _meet(self, place: str, signature: int = 0) -> None:
        """A round of status by a rank that is well."""
        assert self._control is not None
        try:
            self._control.round(place, signature=signature)
        except DistributedError as error:
            self._known(error)
            raise

    def _gathered(self, value: T, place: str, signature: int = 0) -> list[T]:
        assert self._control is not None
        try:
            return self._control.gather(value, place, signature)
        except DistributedError as error:
            self._known(error)
            raise

    def _known(self, error: E) -> E:
        """Note that all ranks know of ``error``, which is not to be told again on its way out."""
        if self._inside:
            self._told.append(error)
        return error

    def _has_told(self, error: BaseException | None) -> bool:
        """Whether all ranks know of an error, or of one that it is made of."""
        if isinstance(error, RankLostError):  # nobody is left to be told
            return True
        return error is not None and (any(error is one for one in self._told) or self._has_told(error.__cause__))

    @property
    def _group(self) -> dist.ProcessGroup:
        assert self.group is not None
        return self.group

    def _over(self, tensor: Tensor) -> dist.ProcessGroup | None:
        """The group that moves a tensor: what lies on the CPU, as a buffer may beside a GPU, goes with the words."""
        assert self._control is not None
        return self._control.group if tensor.device.type == "cpu" else self.group

    def _reduce(self, tensor: Tensor, place: str) -> None:
        assert self._control is not None
        self._control.answered(lambda: dist.all_reduce(tensor, group=self._over(tensor)), place)
        self.traffic.reductions += 1
        self.traffic.bytes += tensor.nbytes

    def __deepcopy__(self, memo: dict[int, Any]) -> Ranks:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        if self._control is not None:
            raise ArgumentError("what is measured on several ranks belongs to their processes, and cannot be pickled")
        return ranks_of, (None,)

    def __repr__(self) -> str:
        return "alone" if self.alone else f"rank {self.rank} of {self.count}"


def _of_a_collective(error: Exception) -> bool:
    """Whether PyTorch's communication failed, which gloo says by no type of its own."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo" in str(error))


def _signature(tensor: Tensor, start: int = 0) -> int:
    """A number that differs where shapes, types or ``start`` do."""
    return zlib.crc32(repr((tuple(tensor.shape), tensor.dtype, start)).encode())


ALONE = Ranks(None)
"""A process that measures by itself."""

_KNOWN: dict[dist.ProcessGroup, Ranks] = {}


@atexit.register
def _let_go() -> None:
    """Forget all groups while their threads can still be joined, also those of objectives that somebody keeps.

    A gloo group that lives until the interpreter is taken apart aborts the process now and then.
    """
    for ranks in _KNOWN.values():
        ranks.group = ranks._control = None
    _KNOWN.clear()
    # PyTorch's own functions have the world's group as it was when they were imported, which its compiler does in the
    # middle of a run, as a default.
    module = sys.modules.get("torch.distributed.nn.functional")
    for function in () if module is None else vars(module).values():
        defaults = getattr(function, "__defaults__", None) or ()
        if any(isinstance(one, dist.ProcessGroup) for one in defaults):
            function.__defaults__ = tuple(None if isinstance(one, dist.ProcessGroup) else one for one in defaults)


def ranks_of(group: Group) -> Ranks:
    """The ranks of a group; the first call for a group that is not on gloo makes its channel, on all ranks together.

    Raises:
        ArgumentError: There is no such group, or this process is none of it.
    """
    if group is None:
        return ALONE
    if not dist.is_available() or not dist.is_initialized():
        raise ArgumentError(
            f"group={group!r} needs processes that know each other: start them with torchrun, and call "
            "torch.distributed.init_process_group() before"
        )
    if isinstance(group, str):
        if group != "world":
            raise ArgumentError(f'group is "world", a process group or None, not {group!r}')
        group = dist.group.WORLD
    if not isinstance(group, dist.ProcessGroup):
        raise ArgumentError(
            f'group is "world", a process group or None, not {group!r}; of a device mesh give mesh.get_group(...)'
        )
    if group not in _KNOWN:
        _KNOWN[group] = Ranks(group)
    return _KNOWN[group]
