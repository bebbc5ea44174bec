"""Shards of a scan are everything, each step once, and together give the run that one scan gives."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import data, net, quick
from sharded import STEPS, array, checkpoints, contents
from torch.nn import functional as F

from curvdiag import Objective, RunStore
from curvdiag.checkpoints.shards import checked, shard_named, share
from curvdiag.checkpoints.steps import Place
from curvdiag.errors import ArgumentError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints(tmp_path)


# Who measures what


@pytest.mark.parametrize("seed", range(60))
def test_shards_are_everything_each_once_of_even_size_and_all_over_the_training(seed: int) -> None:
    rng = random.Random(seed)
    steps = [rng.randrange(30) for _ in range(rng.randrange(40))]
    nameless, count = rng.randrange(6), rng.randrange(1, 13)
    found = [Path(f"{i}.pt") for i in range(len(steps) + nameless)]
    where = {path: Place(step, None) for path, step in zip(found, steps, strict=False)}
    shards = [share(found, where, (index, count)) for index in range(count)]
    assert sorted(path for shard in shards for path in shard) == sorted(found)
    for index, step in enumerate(sorted(set(steps))):  # neighbours in time are in different shards
        alike = {path for path in where if where[path].step == step}
        assert alike <= set(shards[index % count])
    units = [len({where.get(path, path) for path in shard}) for shard in shards]
    assert max(units) - min(units) <= 1


def test_a_later_checkpoint_moves_no_earlier_one_to_another_shard() -> None:
    found = [Path(f"{i}.pt") for i in range(20)]
    where = {path: Place(10 * i, None) for i, path in enumerate(found)}
    for index in range(3):
        assert share(found, where, (index, 3))[:4] == share(found[:12], where, (index, 3))


@pytest.mark.parametrize("shard", [(3, 3), (-1, 3), (0, 0), (0, -2), (1.0, 2), "12", (1,), None, (0, 1, 2)])
def test_what_is_no_shard_is_refused(shard: Any) -> None:
    with pytest.raises(ArgumentError, match=r"shard"):
        checked(shard)


def test_a_shard_is_named_by_its_number_or_by_its_environment() -> None:
    assert shard_named("3/16", {}) == (3, 16)
    assert shard_named("3/16", array(3, 0, 15, 16)) == (3, 16)
    assert shard_named("7/16", array(7, 3, 7, 2)) == (7, 16)  # of an array that is submitted again in part
    assert shard_named("auto", {"RANK": "1", "WORLD_SIZE": "4"}) == (1, 4)
    for least, most, spacing in ((0, 15, 1), (1, 16, 1), (10, 40, 10), (5, 5, 1)):
        tasks = range(least, most + 1, spacing)
        found = [shard_named("auto", array(task, least, most, len(tasks))) for task in tasks]
        assert found == [(index, len(tasks)) for index in range(len(tasks))]
    both = [
        shard_named("auto", {**array(task, 1, 3, 3), "RANK": str(rank), "WORLD_SIZE": "2"})
        for task in (1, 2, 3)
        for rank in (0, 1)
    ]
    assert both == [(index, 6) for index in range(6)]


@pytest.mark.parametrize(
    ("text", "environ", "message"),
    [
        ("16/16", {}, r"no shard 16/16: shards are counted from 0, so that i/n goes from 0/16 to 15/16"),
        ("-1/4", {}, "no shard -1/4"),
        ("0/0", {}, "n is 1 or more"),
        ("3", {}, r"takes i/n, such as 3/16, or auto, not '3'"),
        ("/", {}, "takes i/n"),
        ("a/b", {}, "takes i/n"),
        ("auto", {}, "this process is in neither"),
        ("auto", {"RANK": "0"}, "this process is in neither"),
        ("auto", {"RANK": "x", "WORLD_SIZE": "2"}, r"RANK=x, WORLD_SIZE=2"),
        ("auto", {"SLURM_ARRAY_TASK_ID": "3"}, r"SLURM_ARRAY_TASK_MIN not set"),
        ("auto", array(2, 1, 10, 4), "not evenly spaced"),
        ("auto", array(3, 1, 6, 3), "not evenly spaced"),
    ],
)
def test_what_names_no_shard_is_refused_with_what_to_do(text: str, environ: dict[str, str], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        shard_named(text, environ)


def test_every_task_of_an_array_that_counts_from_1_is_refused_and_not_only_the_last() -> None:
    """Else all but one would work, and the first shard would be missing."""
    for task in range(1, 5):
        with pytest.raises(ArgumentError, match=r"no shard 4/4.*--array=0-3.*--shard auto"):
            shard_named(f"{task}/4", array(task, 1, 4, 4))


# What comes of it


@pytest.mark.parametrize("count", [1, 3, 10])
def test_shards_one_after_the_other_into_one_file_give_the_run_of_one_scan(folder: Path, count: int) -> None:
    (folder / "step=31.pt").write_text("nothing")
    (folder / "junk.pt").write_text("nothing")
    options = {"measure": ["density", "trace"]}
    whole = quick(folder, **options)
    (folder.parent / "run.db").rename(folder.parent / "whole.db")
    told: list[str] = []
    parts = [quick(folder, shard=(index, count), tell=told.append, **options) for index in reversed(range(count))]
    assert sorted(step for part in parts for step in part.measured) == list(STEPS) == list(whole.measured)
    assert sorted(f.path for part in parts for f in part.failed) == sorted(f.path for f in whole.failed)
    assert len(whole.failed) == 2
    assert sorted(line for line in told if "is no checkpoint" in line) == sorted(f.reason for f in whole.failed)
    assert contents(folder.parent / "run.db") == contents(folder.parent / "whole.db")
    assert [part.shard for part in parts] == [(index, count) for index in reversed(range(count))]
    after = quick(folder, **options)
    assert (after.measured, after.held, after.shard) == ((), STEPS, None)


def test_notes_of_the_run_are_recorded_once_by_all_shards(folder: Path) -> None:
    """Those of the objective, that come with the first measurement, and what the steps are."""
    for path in folder.iterdir():
        path.rename(path.with_name(path.name.replace("step=", "net")))
    options = {"measure": None, "preset": "full", "objective": note_of_a_mean()}
    quick(folder, **options)
    (folder.parent / "run.db").rename(folder.parent / "whole.db")
    for index in (2, 0, 1):
        quick(folder, shard=(index, 3), **options)
    notes = [event for event in contents(folder.parent / "whole.db")[-1] if event[1] == "note"]
    assert any("steps are the numbers in their names" in message for _, _, message in notes)
    assert any("left out" in message for _, _, message in notes)
    assert contents(folder.parent / "run.db") == contents(folder.parent / "whole.db")


def note_of_a_mean() -> Objective:
    return Objective.from_loss(net(9), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch=data())


def test_a_shard_without_checkpoints_says_so_and_is_no_failure(folder: Path) -> None:
    told: list[str] = []
    result = quick(folder, shard=(8, 9), tell=told.append)
    assert (result.measured, result.held, result.failed) == ((), (), ())
    assert told[-1] == "shard 8/9 has none of the 7 checkpoints: nothing to measure"
    with RunStore(folder.parent / "run.db", readonly=True) as store:
        assert store.run().measurements == 0


def killed_after_one(folder: Path) -> None:
    torch.set_num_threads(1)
    quick(folder, shard=(1, 3), progress=lambda done, _: os.kill(os.getpid(), signal.SIGKILL) if done == 1 else None)


def test_a_killed_shard_goes_on_by_itself(folder: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "curvdiag.checkpoints"])
    child = context.Process(target=killed_after_one, args=(folder,))
    child.start()
    child.join(100)
    assert child.exitcode == -signal.SIGKILL
    again = quick(folder, shard=(1, 3))
    assert (again.held, again.measured) == ((4,), (30,))
    assert quick(folder, shard=(0, 3)).measured == (2, 10, 50)
    assert quick(folder, shard=(1, 3)).held == (4, 30)
    assert quick(folder).measured == (6, 32)


# At the same time


def one_shard(folder: str, index: int, count: int, barrier: Any, pipe: Any) -> None:
    torch.set_num_threads(1)
    barrier.wait(60)
    for again in range(3):  # opened and closed in turn, while the others write
        result = quick(Path(folder), shard=(index, count))
        pipe.send((result.run, result.measured if again == 0 else result.held))


def test_shards_at_the_same_time_in_one_file_give_the_run_of_one_scan(folder: Path) -> None:
    quick(folder)
    (folder.parent / "run.db").rename(folder.parent / "whole.db")
    context, count = multiprocessing.get_context("forkserver"), 4
    context.set_forkserver_preload(["torch", "curvdiag.checkpoints"])
    barrier = context.Barrier(count)
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    children = [
        context.Process(target=one_shard, args=(str(folder), index, count, barrier, pipe[1]))
        for index, pipe in enumerate(pipes)
    ]
    for child in children:
        child.start()
    for _, far in pipes:
        far.close()
    for index, (child, (near, _)) in enumerate(zip(children, pipes, strict=True)):
        for _ in range(3):
            assert near.poll(120)
            assert near.recv() == (1, STEPS[index::count])
        child.join(60)
        assert child.exitcode == 0
    assert contents(folder.parent / "run.db") == contents(folder.parent / "whole.db")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["ckpts", "run.db", "whole.db"]
    connection = sqlite3.connect(folder.parent / "run.db")
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    connection.close()
