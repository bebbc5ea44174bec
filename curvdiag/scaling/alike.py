"""Several ranks that do alike: along the same directions, in the memory of the poorest, failing together."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TypeVar

import torch
from torch import Tensor

from curvdiag.distributed import Ranks
from curvdiag.errors import CurvdiagError
from curvdiag.memory import free_bytes
from curvdiag.objective import Objective
from curvdiag.scaling.power_law import DirectionSamples

T = TypeVar("T")

# Rows of the directions that ranks compare.
COMPARED = 4096


def free_here(objective: Objective) -> int:
    """Bytes that are free for this rank; those of a machine are shared with the ranks beside it."""
    free = free_bytes(objective.device)
    return free // objective.ranks.neighbours if objective.device.type == "cpu" else free


def free_on_each(objective: Objective) -> int:
    """Bytes that are free for every rank: the same number on all of them."""
    return int(objective.ranks.least(free_here(objective), "free memory"))


def along_same(ranks: Ranks, vectors: Tensor) -> AbstractContextManager[None]:
    """A body that goes through on all ranks or on none, and at whose end they have to have the same directions."""

    def signature() -> int:
        return zlib.crc32(vectors[:COMPARED].detach().contiguous().view(torch.uint8).cpu().numpy().tobytes())

    return ranks.together("derivatives along directions", signature)


def of_all(ranks: Ranks, own: DirectionSamples, device: torch.device) -> DirectionSamples:
    """The samples of all ranks, one rank's after the other's; ``device`` is what the ranks' group talks from."""
    if ranks.alone:
        return own

    def whole(part: Tensor) -> Tensor:
        return ranks.concatenate(part.to(device), 0, "samples along directions").cpu()

    squares = None if own.squares is None else whole(own.squares)
    return DirectionSamples(whole(own.slopes), whole(own.curvatures), squares)


def on_all(ranks: Ranks, place: str, function: Callable[[], T], expected: tuple[type[CurvdiagError], ...]) -> T:
    """``function()`` on all ranks; or, on all of them, the ``expected`` error that it raised on some.

    So all of them go on in the same way where the error is caught. The function does not talk to other ranks.

    Raises:
        DistributedError: It raised another error on another rank.
    """
    if ranks.alone:
        return function()
    error: CurvdiagError | None = None
    with ranks.together(place):
        try:
            found = function()
        except expected as caught:
            error = caught
    told = ranks.gather(None if error is None else (type(error), str(error)), place)
    if error is not None:
        raise error
    for rank, other in enumerate(told):
        if other is not None:
            kind, words = other
            raise kind(f"on rank {rank}: {words}")
    return found
