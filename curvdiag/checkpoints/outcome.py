"""What came of a scan."""

from __future__ import annotations

from dataclasses import dataclass

from curvdiag.checkpoints.shards import Shard
from curvdiag.results import Result


@dataclass(frozen=True)
class Failure(Result):
    """A checkpoint that was not measured.

    Attributes:
        path: Which one.
        reason: Why not, in one line that begins with its name.
    """

    path: str
    reason: str


@dataclass(frozen=True)
class Scan(Result):
    """What came of a scan.

    Attributes:
        store: The run file.
        run: Number of the run in it.
        name: Its name.
        measured: Steps measured now, in order.
        held: Steps that the run held already.
        failed: Checkpoints that were not measured, in natural order.
        shard: ``(i, n)`` where only a share of the checkpoints was looked at.
    """

    store: str
    run: int
    name: str
    measured: tuple[int, ...]
    held: tuple[int, ...]
    failed: tuple[Failure, ...]
    shard: Shard | None = None

    def __str__(self) -> str:
        parts = [f"{len(self.measured)} checkpoints measured"]
        parts += [f"{len(self.held)} there already"] if self.held else []
        parts += [f"{len(self.failed)} failed"] if self.failed else []
        shard = "" if self.shard is None else f", shard {self.shard[0]}/{self.shard[1]}"
        return f"{self.store}, run {self.name!r}{shard}: {', '.join(parts)}"
