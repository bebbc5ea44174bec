"""Several processes open, make and write one run file at the same time."""

from __future__ import annotations

import contextlib
import multiprocessing
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from curvdiag.record import RunStore, database, schema

FILES = 8


def open_and_record(path: str, index: int, barrier: Any, pipe: Any) -> None:
    try:
        for attempt in range(FILES):
            barrier.wait(60)
            with RunStore(f"{path}{attempt}.db") as store:
                run = store.new_run("shared", {"of": index}, unless=lambda info: info.name == "shared")
                run.record(index, {"x": float(index)})
                run.event(0, "note", "once")
        pipe.send(None)
    except BaseException as error:
        barrier.abort()
        pipe.send(repr(error))


def test_processes_that_make_a_file_at_the_same_time_share_one_run(tmp_path: Path) -> None:
    context, count = multiprocessing.get_context("forkserver"), 4
    context.set_forkserver_preload(["curvdiag.record", "curvdiag.spectrum.density"])
    barrier, (near, far) = context.Barrier(count), context.Pipe(duplex=False)
    children = [
        context.Process(target=open_and_record, args=(str(tmp_path / "run"), index, barrier, far))
        for index in range(count)
    ]
    for child in children:
        child.start()
    for _ in children:
        assert near.poll(120)
        assert near.recv() is None
    for child in children:
        child.join(60)
    for attempt in range(FILES):
        with RunStore(tmp_path / f"run{attempt}.db", readonly=True) as store:
            assert [run.measurements for run in store.runs()] == [count]
            assert store.scalars("x").values.tolist() == list(range(count))
            assert [event.message for event in store.events()] == ["once"]
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"run{attempt}.db" for attempt in range(FILES)]


def test_a_file_that_becomes_a_run_file_while_it_is_opened_is_taken_for_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What tells a run file from others is read at one moment: not half before and half after it is made."""
    path, tried = tmp_path / "run.db", []

    def meanwhile(statement: str) -> None:
        if "sqlite_master" not in statement or tried:
            return
        tried.append(statement)
        other = sqlite3.connect(path, timeout=0, isolation_level=None)
        with contextlib.closing(other), contextlib.suppress(sqlite3.OperationalError):  # it may have to wait
            other.execute("BEGIN IMMEDIATE")
            schema.create(other)
            schema.mark(other)
            other.execute("COMMIT")

    connect = database.connect

    def traced(path: Path, mode: str) -> sqlite3.Connection:
        connection = connect(path, mode)
        connection.set_trace_callback(meanwhile)
        return connection

    monkeypatch.setattr(database, "connect", traced)
    with RunStore(path) as store:
        store.new_run("a").record(1, {"x": 1.0})
        assert store.run().measurements == 1
    assert tried


def test_of_several_runs_that_are_alike_the_latest_is_continued(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        store.new_run("a")
        store.new_run("a")
        assert store.new_run("a", unless=lambda info: info.name == "a").id == 2
        assert store.new_run("b", unless=lambda info: info.name == "b").id == 3
        assert [run.name for run in store.runs()] == ["a", "a", "b"]


def test_an_event_is_recorded_once_for_its_step_kind_and_words(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        first, second = store.new_run("a"), store.new_run("b")
        for run in (first, first, second):
            run.event(1, "note", "x")
        first.event(2, "note", "x")
        first.event(1, "error", "x")
        first.event(1, "note", "y")
        assert [(e.step, e.kind, e.message) for e in first.events()] == [
            (1, "note", "x"), (2, "note", "x"), (1, "error", "x"), (1, "note", "y"),
        ]  # fmt: skip
        assert len(second.events()) == 1
