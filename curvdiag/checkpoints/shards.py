"""One of several processes that measure the checkpoints of a run, each a share of them."""

from __future__ import annotations

import operator
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import distributed

from curvdiag.checkpoints.steps import Place
from curvdiag.errors import ArgumentError

Shard = tuple[int, int]
"""``(i, n)``: the i-th of n, counted from 0."""

ARRAY = ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_MAX", "SLURM_ARRAY_TASK_COUNT")
"""Where Slurm says which task of an array this is."""

RANKS = ("RANK", "WORLD_SIZE")
"""Where torchrun says which process this is."""

POLL_SECONDS = 0.5

FROM_ZERO = "shards are counted from 0, so that i/n goes from 0/{n} to {last}/{n}"


def share(found: Sequence[Path], where: Mapping[Path, Place], shard: Shard) -> list[Path]:
    """The checkpoints of one shard: each n-th step from the i-th on, so that each shard goes over the whole training.

    Checkpoints of one step stay together. Those whose step is not known come after the others, one by one. A later
    step does not move the earlier ones to other shards.
    """
    index, count = shard
    steps = sorted({where[path].step for path in found if path in where})
    unplaced = [path for path in found if path not in where]
    mine, others = set(steps[index::count]), set(unplaced[(index - len(steps)) % count :: count])
    return [path for path in found if (where[path].step in mine if path in where else path in others)]


def checked(shard: Any) -> Shard:
    """``(i, n)`` as two integers in their range.

    Raises:
        ArgumentError: They are not.
    """
    try:
        index, count = (operator.index(number) for number in shard)
    except (TypeError, ValueError) as error:
        raise ArgumentError(f"a shard is a pair of whole numbers (i, n), not {shard!r}") from error
    if count < 1:
        raise ArgumentError(f"a shard is one of n, and n is 1 or more, not {count}")
    if not 0 <= index < count:
        raise ArgumentError(f"there is no shard {index}/{count}: {FROM_ZERO.format(n=count, last=count - 1)}")
    return index, count


def shard_named(text: str, environ: Mapping[str, str]) -> Shard:
    """The shard that ``"3/16"`` or ``"auto"`` means.

    Raises:
        ArgumentError: It means none; or it is the number of a task of a Slurm array whose numbers do not fit shards.
    """
    if text == "auto":
        return shard_of_environment(environ)
    found = re.fullmatch(r"\s*(-?\d+)\s*/\s*(\d+)\s*", text)
    if found is None:
        raise ArgumentError(f"--shard takes i/n, such as 3/16, or auto, not {text!r}")
    shard = int(found[1]), int(found[2])
    number, last = (environ.get(name, "") for name in (ARRAY[0], ARRAY[2]))
    if number == str(shard[0]) and last.isdecimal() and int(last) >= shard[1] > 0:
        # Told by each task, not only by the last: without the first shard the others are of little use.
        raise ArgumentError(
            f"the tasks of this Slurm array have numbers up to {last}, and there is no shard {last}/{shard[1]}: "
            f"{FROM_ZERO.format(n=shard[1], last=shard[1] - 1)}. Submit it with --array=0-{shard[1] - 1}, or give "
            "--shard auto"
        )
    return checked(shard)


def shard_of_environment(environ: Mapping[str, str]) -> Shard:
    """The process of torchrun, the task of a Slurm array, or the process of torchrun in the task of an array."""
    if not (ARRAY[0] in environ or all(name in environ for name in RANKS)):
        raise ArgumentError(
            "--shard auto is for torchrun and for Slurm arrays, and this process is in neither: RANK and WORLD_SIZE "
            "are not set, nor is SLURM_ARRAY_TASK_ID; give --shard i/n"
        )
    index, count = of_array(*numbers(ARRAY, environ)) if ARRAY[0] in environ else (0, 1)
    if all(name in environ for name in RANKS):
        rank, world = numbers(RANKS, environ)
        return checked((index * world + rank, count * world))
    return checked((index, count))


def of_array(task: int, least: int, most: int, count: int) -> Shard:
    """Place of a task in an array whose numbers are evenly spaced: ``0-15``, ``1-16``, ``10-40:10``."""
    spacing, left = divmod(most - least, max(count - 1, 1))
    place, off = divmod(task - least, max(spacing, 1))
    if left or off:
        raise ArgumentError(
            f"the {count} numbers of this Slurm array, from {least} to {most}, are not evenly spaced, and task {task} "
            "cannot tell which shard it is: give --shard $SLURM_ARRAY_TASK_ID/n, with the n of the whole array"
        )
    return place, count


def numbers(names: Iterable[str], environ: Mapping[str, str]) -> list[int]:
    values = {name: environ.get(name) for name in names}
    try:
        return [int(value or "") for value in values.values()]
    except ValueError as error:
        shown = ", ".join(
            f"{name}={value}" if value is not None else f"{name} not set" for name, value in values.items()
        )
        raise ArgumentError(
            f"--shard auto finds no whole numbers in the environment ({shown}): give --shard i/n"
        ) from error


def wait_for_torchrun(*, failed: bool) -> None:
    """Let the other processes of torchrun finish, where this one is about to end with an error.

    torchrun ends all processes as soon as one ends so: then a single broken checkpoint would end the work of all the
    others, each time anew. Outside torchrun it does nothing.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True" or not distributed.is_available():
        return
    _, world = numbers(RANKS, os.environ)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    done = f"curvdiag/shards done/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
    try:
        store = distributed.TCPStore(address, port, is_master=False)
        finished = store.add(done, 1)
        while failed and finished < world:
            time.sleep(POLL_SECONDS)
            finished = store.add(done, 0)
    except distributed.DistError:  # torchrun is gone
        return
