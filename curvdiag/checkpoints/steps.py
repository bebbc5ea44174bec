"""At which step each checkpoint stands: what it says of itself, or else what its name says."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from curvdiag.checkpoints.read import MOST, Contents
from curvdiag.errors import ArgumentError

REMEDY = "name the files step=500.pt, checkpoint-500 or epoch=3.pt, save the step in them as 'step', or give --steps"

NUMBER = r"[=_\-.]?(\d+)([km])?(?![a-z0-9])"
STEP = re.compile(
    r"(?<![a-z])(?:global_?)?(?:steps?|iter(?:ation)?s?|updates?|checkpoint|ckpt)" + NUMBER, re.IGNORECASE
)
EPOCH = re.compile(r"(?<![a-z])(?:epochs?|ep)" + NUMBER, re.IGNORECASE)
TIMES = {"": 1, "k": 1_000, "m": 1_000_000}


@dataclass(frozen=True)
class Place:
    """Where in the training a checkpoint stands.

    Attributes:
        step: Optimizer step; where nothing tells it, the epoch or the number that tells the names apart.
        epoch: Epoch, if known.
    """

    step: int
    epoch: float | None


def places(paths: Sequence[Path], contents: Sequence[Contents | None]) -> tuple[list[Place | None], str]:
    """The place of each checkpoint, in the order given, and in words what the numbers are if not optimizer steps.

    All numbers are of one kind. The first kind that any checkpoint knows is taken: steps (from what it says of itself,
    else from its name), then epochs, then the only number in which the names differ. ``None`` stands for a checkpoint
    that does not know its own, or was not read.

    Raises:
        ArgumentError: Nothing tells the order.
    """
    epochs = [epoch_of(path, found) for path, found in zip(paths, contents, strict=True)]
    steps = [step_of(path, found) for path, found in zip(paths, contents, strict=True)]
    kind = ""
    readable = [found is not None for found in contents]
    if not any(s is not None for s, r in zip(steps, readable, strict=True) if r):
        if any(e is not None for e, r in zip(epochs, readable, strict=True) if r):
            steps = [None if e is None or e != int(e) else int(e) for e in epochs]
            kind = "nothing tells the optimizer steps of the checkpoints: the steps of this run are their epochs"
        else:
            steps = differing([str(path) for path in paths])
            kind = "nothing tells the optimizer steps of the checkpoints: the steps are the numbers in their names"
    if any(readable) and all(step is None for step in steps):
        shown = ", ".join(path.name for path in paths[:4]) + (", ..." if len(paths) > 4 else "")
        raise ArgumentError(f"nothing tells the steps of the {len(paths)} checkpoints ({shown}): {REMEDY}")
    return [None if s is None or s >= MOST else Place(s, e) for s, e in zip(steps, epochs, strict=True)], kind


def step_of(path: Path, found: Contents | None) -> int | None:
    return found.step if found is not None and found.step is not None else named(STEP, path)


def epoch_of(path: Path, found: Contents | None) -> float | None:
    return found.epoch if found is not None and found.epoch is not None else named(EPOCH, path)


def named(pattern: re.Pattern[str], path: Path) -> int | None:
    """The last number of this kind in a name: ``epoch=3-step=500.ckpt``, ``step_10k.pt``, ``checkpoint-500``.

    Where the name has no number at all, that of its folder: ``step_500/model.pt``.
    """
    name = path.name if path.is_dir() else path.stem
    found = pattern.findall(name if re.search(r"\d", name) else path.parent.name)
    return int(found[-1][0]) * TIMES[found[-1][1].lower()] if found else None


def differing(names: Sequence[str]) -> list[int | None]:
    """The only number in which the names differ; of a single name its only number; else None for each.

    Of names that have more than numbers apart those count of which there are most: ``net_1.pt`` and ``net_2.pt``
    beside ``best.pt``, which has none then.
    """
    if len(names) == 1:
        own = re.findall(r"\d+", Path(names[0]).stem)
        return [int(own[0])] if len(own) == 1 else [None]
    words = [tuple(re.split(r"\d+", name)) for name in names]
    numbers = [[int(number) for number in re.findall(r"\d+", name)] for name in names]
    (series, most), *others = Counter(words).most_common()
    of_series = [number for number, word in zip(numbers, words, strict=True) if word == series]
    varying = [index for index, column in enumerate(zip(*of_series, strict=True)) if len(set(column)) > 1]
    if len(varying) != 1 or any(count == most for _, count in others):
        return [None] * len(names)
    return [number[varying[0]] if word == series else None for number, word in zip(numbers, words, strict=True)]
