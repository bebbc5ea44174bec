"""What PyTorch's collectives move while a piece of code runs: how many of each kind, and how many bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvdiag.memory import human_bytes
from curvdiag.results import Result


@dataclass(frozen=True)
class CollectiveTraffic(Result):
    """Collectives in which this rank took part, with the size of what is gathered, scattered or reduced.

    The rounds of status that ranks exchange on the CPU are all-reduces of a few bytes, and are among them.

    Attributes:
        all_gathers, all_gather_bytes: Of weights, before each pass through a group of them.
        reduce_scatters, reduce_scatter_bytes: Of gradients.
        all_reduces, all_reduce_bytes: Of vectors that every rank holds, inner products and status.
        others: Other collectives.
    """

    all_gathers: int
    all_gather_bytes: int
    reduce_scatters: int
    reduce_scatter_bytes: int
    all_reduces: int
    all_reduce_bytes: int
    others: int

    def __str__(self) -> str:
        return (
            f"{self.all_gathers} all-gathers of {human_bytes(self.all_gather_bytes)}, {self.reduce_scatters} "
            f"reduce-scatters of {human_bytes(self.reduce_scatter_bytes)}, {self.all_reduces} all-reduces of "
            f"{human_bytes(self.all_reduce_bytes)}" + (f", {self.others} others" if self.others else "")
        )


class Collectives(TorchDispatchMode):
    """Counts the collectives that this process takes part in while it is entered, backward passes among them."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = {"gather": [0, 0], "scatter": [0, 0], "reduce": [0, 0], "other": [0, 0]}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        space, _, name = func.name().partition("::")
        if space in ("c10d", "_c10d_functional"):
            self._count(name.split(".")[0], args, result, functional=space != "c10d")
        return result

    def _count(self, name: str, args: Any, result: Any, *, functional: bool) -> None:
        if name in ("wait_tensor", "barrier", "monitored_barrier_"):
            return
        if "reduce_scatter" in name:
            kind, moved = "scatter", args[0] if functional else args[1]
        elif "allgather" in name or "all_gather" in name:
            kind, moved = "gather", result if functional else args[0]
        elif "allreduce" in name or "all_reduce" in name:
            kind, moved = "reduce", args[0]
        else:
            kind, moved = "other", args[0]
        self._counts[kind][0] += 1
        self._counts[kind][1] += _bytes(moved)

    def traffic(self) -> CollectiveTraffic:
        """What was counted so far."""
        (gathers, gathered), (scatters, scattered), (reductions, reduced), (others, _) = self._counts.values()
        return CollectiveTraffic(gathers, gathered, scatters, scattered, reductions, reduced, others)


def _bytes(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.nbytes
    return sum(map(_bytes, value)) if isinstance(value, Sequence) and not isinstance(value, str) else 0
