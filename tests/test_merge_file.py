"""A merged file is written whole or not at all, and in the place of nothing that it should not replace."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
from test_merge import SCAN, fill, names_in, record, rows, steps_of

from curvdiag.cli import main
from curvdiag.errors import ArgumentError, StoreError
from curvdiag.record import RunStore, merge, merge_runs, output


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    return [fill(tmp_path / f"run-{i}.db", range(i, 6, 2)) for i in range(2)]


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_nothing_is_replaced_without_being_asked(tmp_path: Path, parts: list[Path]) -> None:
    fill(tmp_path / "run.db", [77])
    before = (tmp_path / "run.db").read_bytes()
    with pytest.raises(StoreError, match=r"run\.db exists: give another name, or replace it with .*--force"):
        merge_runs(parts, tmp_path / "run.db")
    assert (tmp_path / "run.db").read_bytes() == before
    merge_runs(parts, tmp_path / "run.db", overwrite=True)
    assert steps_of(tmp_path / "run.db") == list(range(6))
    assert listed(tmp_path) == ["run-0.db", "run-1.db", "run.db"]


def test_what_is_no_run_file_is_neither_read_nor_replaced(tmp_path: Path, parts: list[Path]) -> None:
    (tmp_path / "text.db").write_text("thesis " * 300)
    with pytest.raises(StoreError, match="not a run file"):
        merge_runs(parts, tmp_path / "text.db", overwrite=True)
    with pytest.raises(StoreError, match="not a run file"):
        merge_runs([*parts, tmp_path / "text.db"], tmp_path / "run.db")
    with pytest.raises(StoreError, match=r"there is no run file .*missing\.db"):
        merge_runs([*parts, tmp_path / "missing.db"], tmp_path / "run.db")
    with pytest.raises(StoreError, match="is a folder"):
        merge_runs(parts, tmp_path, overwrite=True)
    with pytest.raises(StoreError, match="does not exist; create it first"):
        merge_runs(parts, tmp_path / "no" / "run.db")
    with pytest.raises(ArgumentError, match=r"no run file matches '.*x-\*\.db'"):
        merge_runs(tmp_path / "x-*.db", tmp_path / "run.db")
    with pytest.raises(ArgumentError, match="no run files are given"):
        merge_runs([], tmp_path / "run.db")
    with pytest.raises(ArgumentError, match="contradict"):
        merge_runs(parts, tmp_path / "run.db", apart=True, join=True)
    RunStore(tmp_path / "none.db").close()
    with pytest.raises(StoreError, match=r"there is nothing to merge: no run in .*none\.db"):
        merge_runs(tmp_path / "none.db", tmp_path / "run.db")
    assert listed(tmp_path) == ["none.db", "run-0.db", "run-1.db", "text.db"]


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("failing", ["measured", "put", "events"])
def test_a_merge_that_fails_or_is_interrupted_leaves_everything_as_it_was(
    tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch, failing: str, overwrite: bool
) -> None:
    if overwrite:
        fill(tmp_path / "run.db", [77])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    calls = 0

    def interrupted(*arguments: object) -> None:
        nonlocal calls
        calls += 1
        raise KeyboardInterrupt

    where = {"measured": (merge, "united"), "put": (output, "put"), "events": (merge, "insert_events")}[failing]
    monkeypatch.setattr(*where, interrupted)
    with pytest.raises(KeyboardInterrupt):
        merge_runs([parts[0], *parts, fill(tmp_path / "more.db", [4])], tmp_path / "run.db", overwrite=overwrite)
    (tmp_path / "more.db").unlink()
    assert calls == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def elsewhere(function: Callable[..., None], *arguments: object) -> int | None:
    """The exit code of a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "curvdiag.checkpoints"])
    child = context.Process(target=function, args=arguments)
    child.start()
    child.join(100)
    return child.exitcode


def killed_while_it_merges(paths: list[Path], target: Path, overwrite: bool) -> None:
    merge.insert_events = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore[assignment]
    merge_runs(paths, target, overwrite=overwrite)


def killed_with_an_open_file(path: Path) -> None:
    store = RunStore(path)
    store.resume()
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_killed_merge_leaves_no_half_written_output_and_the_next_one_succeeds(
    tmp_path: Path, parts: list[Path], overwrite: bool
) -> None:
    target = tmp_path / "run.db"
    if overwrite:
        fill(target, [77])
    before = target.read_bytes() if overwrite else None
    assert elsewhere(killed_while_it_merges, parts, target, overwrite) == -signal.SIGKILL
    assert (target.read_bytes() if target.exists() else None) == before
    merge_runs([tmp_path / "run-*.db"], target, overwrite=overwrite)
    assert steps_of(target) == list(range(6))


def test_a_file_made_by_another_process_meanwhile_is_not_replaced(
    tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    target, put = tmp_path / "run.db", output.put

    def late(*arguments: object) -> None:
        fill(target, [77])
        put(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(output, "put", late)
    with pytest.raises(StoreError, match="was written by another process meanwhile"):
        merge_runs(parts, target)
    assert steps_of(target) == [77]


def test_a_file_that_is_open_is_not_replaced_and_one_that_a_killed_process_left_open_is(
    tmp_path: Path, parts: list[Path]
) -> None:
    """SQLite would take what lies beside the old file for a part of the new one."""
    target = tmp_path / "run.db"
    with RunStore(target) as store:
        run = store.new_run("mine", SCAN)
        record(run, [77])
        with pytest.raises(
            StoreError, match=r"while run\.db-wal and run\.db-shm lie there: another process has it open"
        ):
            merge_runs(parts, target, overwrite=True)
        record(run, [78])
    assert steps_of(target) == [77, 78]
    assert elsewhere(killed_with_an_open_file, target) == -signal.SIGKILL
    assert "run.db-wal" in listed(tmp_path)
    merge_runs(parts, target, overwrite=True)
    assert steps_of(target) == list(range(6))
    assert listed(tmp_path) == ["run-0.db", "run-1.db", "run.db"]


def test_what_is_left_of_a_removed_file_does_not_get_into_the_new_one(tmp_path: Path, parts: list[Path]) -> None:
    for end in ("-journal", "-wal"):
        left = tmp_path / f"run.db{end}"
        left.write_bytes(b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7" * 64)
        with pytest.raises(StoreError, match=rf"while run\.db{end} lies there: they are left of another run file"):
            merge_runs(parts, tmp_path / "run.db")
        left.unlink()
    assert listed(tmp_path) == ["run-0.db", "run-1.db"]


@pytest.mark.parametrize("linked", [True, False])
def test_the_merged_file_is_complete_by_itself(
    tmp_path: Path, parts: list[Path], monkeypatch: pytest.MonkeyPatch, linked: bool
) -> None:
    if not linked:  # a file system without hard links

        def refused(*arguments: object) -> None:
            raise PermissionError(1, "Operation not permitted")

        monkeypatch.setattr(os, "link", refused)
    merge_runs(parts, tmp_path / "run.db")
    assert listed(tmp_path) == ["run-0.db", "run-1.db", "run.db"]
    connection = sqlite3.connect(tmp_path / "run.db")
    assert connection.execute("PRAGMA journal_mode").fetchone() == ("delete",)
    connection.close()
    assert (tmp_path / "run.db").stat().st_nlink == 1
    with RunStore(tmp_path / "run.db") as store:  # it is a run file like any other
        run = store.resume("scan of ckpts")
        record(run, [100])
    assert steps_of(tmp_path / "run.db") == [*range(6), 100]


def test_files_that_are_written_to_can_be_merged(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a.db") as store:
        run = store.new_run("scan", SCAN)
        record(run, [1])
        merge_runs(tmp_path / "a.db", tmp_path / "run.db")
        record(run, [2])
        merge_runs(["".join((str(tmp_path), "/a.db")), tmp_path / "a.db"], tmp_path / "run.db", overwrite=True)
    assert steps_of(tmp_path / "run.db") == [1, 2]
    assert len(rows(tmp_path / "run.db")["events"]) == 2


# The command


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def test_the_command_merges_and_says_what_it_did(
    tmp_path: Path, parts: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "run.db"
    assert curvdiag("merge", *parts, "-o", target) == 0
    out, err = capsys.readouterr()
    assert (out, err) == (f"{target}: run 'scan of ckpts', 6 measurements from 2 files\n", "")
    assert curvdiag("merge", *parts, "-o", target) == 2
    assert capsys.readouterr().err.startswith(f"curvdiag: error: {target} exists")
    other = fill(tmp_path / "other.db", [5, 6], off=0.5)
    assert curvdiag("merge", target, other, "-o", target, "--force") == 2
    assert "hold different measurements" in capsys.readouterr().err
    assert curvdiag("merge", target, other, "-o", target, "--force", "--newest") == 0
    out, err = capsys.readouterr()
    assert "7 measurements from 2 files" in out
    assert err.startswith("run 'scan of ckpts', step 5: measured otherwise in run.db (x: ")
    seeds = fill(tmp_path / "seeds.db", [1], config={**SCAN, "curvdiag": {"seed": 5}})
    assert curvdiag("merge", target, seeds, "-o", target, "--force") == 2
    err = capsys.readouterr().err
    assert "differ in" in err
    assert err.count("\n") == 1
    assert curvdiag("merge", target, seeds, "-o", target, "--force", "--apart") == 0
    assert names_in(target) == ["scan of ckpts"] * 2
    for index, name in enumerate("ab"):
        fill(tmp_path / f"{name}.db", [index], name="training", config={"curvdiag": {}})
    assert curvdiag("merge", tmp_path / "[ab].db", "-o", tmp_path / "t.db", "--join") == 0
    assert steps_of(tmp_path / "t.db") == [0, 1]
    capsys.readouterr()
    assert curvdiag("merge", tmp_path / "a.db", "-o", tmp_path / "one.db") == 0
    assert capsys.readouterr().out.endswith("run 'training', 1 measurement from 1 file\n")
