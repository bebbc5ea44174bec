"""The channel on which ranks tell each other how they are doing: small numbers and words, on the CPU.

Before every collective there is one round of it, so that a rank which failed, or is somewhere else in the program,
is noticed by all of them instead of leaving the others to wait.
"""

from __future__ import annotations

import datetime
import functools
import pickle
import zlib
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from curvdiag.errors import DistributedError, RankFailedError, RankLostError

T = TypeVar("T")

LONGEST, WORD = 1 << 16, 8
"""Bytes of an error that others are told, and those that say how many there are."""


class Control:
    """Rounds of status over a gloo group of the same processes as ``group``; made by all of them together.

    Attributes:
        lost: What was said when a rank went missing; nothing can be exchanged after that.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.count = dist.get_rank(group), dist.get_world_size(group)
        self.lost: str | None = None
        self.group = group
        if dist.get_backend(group) != "gloo":
            members = dist.get_process_group_ranks(group)
            make = functools.partial(dist.new_group, timeout=timeout_of(group), use_local_synchronization=True)
            self.group = self.answered(lambda: make(members, backend="gloo"), "making of a group on the CPU")

    def round(self, place: str, error: Exception | None = None, signature: int = 0, length: int = 0) -> int:
        """Tell the others that this rank has come to ``place``, or what went wrong on the way, and hear of them.

        Args:
            signature: What must be the same on all ranks.
            length: Of something that is told next; the largest of all ranks is returned.

        Raises:
            RankFailedError: Another rank failed.
            DistributedError: Another rank is at another place, or has another signature.
            RankLostError: A rank is gone.
        """
        at = zlib.crc32(place.encode())
        words = b"" if error is None else f"{type(error).__name__}: {error}".encode()
        # The largest of x and of -x are those of all ranks where they all have the same.
        told = torch.tensor([len(words), at, -at, signature, -signature, length], dtype=torch.int64, device="cpu")
        self.answered(lambda: dist.all_reduce(told, dist.ReduceOp.MAX, group=self.group), place)
        failed, most_at, least_at, most, least, longest = told.tolist()
        if failed:
            self._explain(place, words, failed)
        elif most_at != -least_at:
            raise DistributedError(
                f"the ranks are at different places: {_listed(self._texts(place, place.encode(), LONGEST))}. Every "
                "rank of the group has to make the same calls, with the same arguments, in the same order"
            )
        elif most != -least:
            raise DistributedError(
                f"the ranks disagree in the {place}: its vectors or its parameters are not the same on all of them. "
                "Give the same seed and the same arguments on every rank; ranks on different kinds of processors may "
                "round differently, and cannot measure together"
            )
        return int(longest)

    def _explain(self, place: str, words: bytes, longest: int) -> None:
        texts = self._texts(place, words, min(longest, LONGEST))
        if not words:  # else its own rank raises it
            raise RankFailedError("; ".join(f"rank {i} failed: {text}" for i, text in enumerate(texts) if text))

    def _texts(self, place: str, words: bytes, room: int) -> list[str]:
        return [part.decode(errors="replace") for part in self.exchange(words[:room], room, place)]

    def gather(self, value: T, place: str, signature: int = 0) -> list[T]:
        """The values of all ranks, in their order, after a round of status."""
        data = pickle.dumps(value)
        room = self.round(place, signature=signature, length=len(data))
        return [pickle.loads(part) for part in self.exchange(data, room, place)]

    def exchange(self, data: bytes, room: int, place: str) -> list[bytes]:
        """What each rank has to say, at most ``room`` bytes."""
        own = torch.zeros(room + WORD, dtype=torch.uint8, device="cpu")
        message = len(data).to_bytes(WORD, "little") + data
        own[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        parts = [torch.empty_like(own) for _ in range(self.count)]
        self.answered(lambda: dist.all_gather(parts, own, group=self.group), place)
        found = [part.numpy().tobytes() for part in parts]
        return [one[WORD:][: int.from_bytes(one[:WORD], "little")] for one in found]

    def answered(self, collective: Callable[[], T], place: str) -> T:
        """What a collective returns; a rank that does not answer is an error of its own.

        Raises:
            RankLostError
        """
        if self.lost is not None:
            raise RankLostError(self.lost)
        try:
            return collective()
        except RuntimeError as error:  # what every backend raises, by other names
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            self.lost = (
                f"a rank is gone, or has not answered within the timeout of the process group, in the {place} "
                f"(seen by rank {self.rank} of {self.count}): {reason}. What that rank printed says why; where it is "
                "well, it does not make the calls that the others make, or as many steps of a training"
            )
            raise RankLostError(self.lost) from error


def timeout_of(group: dist.ProcessGroup) -> datetime.timedelta:
    """How long a rank of the group waits for another."""
    try:
        return group._get_backend(group._device_types[0]).options._timeout
    except (AttributeError, IndexError, RuntimeError):  # a backend, or a version of PyTorch, that does not say
        return dist.default_pg_timeout


def _listed(places: list[str]) -> str:
    return ", ".join(f"rank {i} in the {place}" for i, place in enumerate(places))
