"""Checkpoints for several processes, and all that a run file holds of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from checkpointed import net

from curvdiag import RunStore
from curvdiag.checkpoints.shards import ARRAY
from curvdiag.record.measured import CLOCKS, measured

STEPS = (2, 4, 6, 10, 30, 32, 50)


def checkpoints(where: Path) -> Path:
    made = where / "ckpts"
    made.mkdir()
    for step in STEPS:
        torch.save(net(step).state_dict(), made / f"step={step}.pt")
    return made


def array(task: int, least: int, most: int, count: int) -> dict[str, str]:
    """What Slurm puts into the environment of a task of an array."""
    return dict(zip(ARRAY, map(str, (task, least, most, count)), strict=True))


def contents(path: Path, run: int = 1) -> tuple[Any, ...]:
    """All that a run holds but for what a clock made: bytes, numbers and words."""
    with RunStore(path, readonly=True) as store:
        info = store.run(run)
        with store._database.reading() as connection:
            found = [
                (m.step, m.epoch, {k: v for k, v in m.scalars.items() if k not in CLOCKS}, m.densities)
                for m in measured(connection, run)
            ]
        events = sorted((event.step, event.kind, event.message) for event in store.events(run))
    return info.name, info.config, info.versions, found, events


def steps_in(path: Path) -> list[int]:
    with RunStore(path, readonly=True) as store:
        assert len(store.runs()) == 1
        return store.scalars("curv/hessian/trace").steps.tolist()
