"""Run files made one: nothing lost, nothing twice, nothing mixed."""

from __future__ import annotations

import itertools
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from curvdiag.errors import StoreError
from curvdiag.estimate import Estimate
from curvdiag.record import RunStore, merge_runs
from curvdiag.spectrum.density import SpectralDensity

SETTINGS = {"objective": "Objective(Net, 8 samples)", "preset": "light", "seed": 0}
SCAN = {"curvdiag": SETTINGS, "checkpoints": {"folder": "/data/ckpts", "part": None, "fingerprint": "0123"}}
TABLES = {
    "runs": "SELECT name, created, config, versions FROM runs ORDER BY id",
    "measurements": "SELECT run, step, epoch, wall_time, seconds FROM measurements ORDER BY run, step",
    "scalars": "SELECT run, step, name, value, standard_error, samples FROM scalars JOIN measurements "
    "ON measurements.id = measurement ORDER BY run, step, name",
    "densities": "SELECT run, step, operator, block, probes, points, nodes, weights, deflated, size, densities.steps, "
    "matvecs, note FROM densities JOIN measurements ON measurements.id = measurement "
    "ORDER BY run, step, operator, block",
    "events": "SELECT run, step, kind, message, time FROM events ORDER BY id",
}


def rows(path: Path) -> dict[str, list[Any]]:
    """All that a file holds."""
    connection = sqlite3.connect(path)
    found = {table: connection.execute(query).fetchall() for table, query in TABLES.items()}
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
    return found


def density(seed: int) -> SpectralDensity:
    nodes = np.random.default_rng(seed).standard_normal((2, 5 + seed % 3))
    return SpectralDensity(nodes, np.abs(nodes), 100, steps=5, note=f"of {seed}")


def fill(path: Path, steps: Any, *, name: str = "scan of ckpts", config: Any = None, off: float = 0.0) -> Path:
    """A file with one run; what it measured depends on the step alone."""
    with RunStore(path) as store:
        record(store.new_run(name, SCAN if config is None else config), steps, off)
    return path


def record(run: Any, steps: Any, off: float = 0.0) -> None:
    for step in steps:
        scalars = {"x": Estimate(step / 3 + off, 0.1, 3), "odd": float("nan"), "big": float("inf")}
        clocks = {"curv/cost/seconds": random.random(), "curv/cost/gradients": random.random()}
        run.record(
            step, {**scalars, **clocks}, {("hessian", ""): density(step), ("hessian", "b"): density(step + 1)},
            [("checkpoint", f"step={step}.pt [{step} bytes, modified 1]")], epoch=step / 8, seconds=0.5,
        )  # fmt: skip


def steps_of(path: Path, run: Any = None, scalar: str = "x") -> list[int]:
    with RunStore(path, readonly=True) as store:
        return store.scalars(scalar, run).steps.tolist()


def names_in(path: Path) -> list[str]:
    with RunStore(path, readonly=True) as store:
        return [run.name for run in store.runs()]


# What belongs together


def test_parts_of_a_scan_become_the_one_run_that_they_are_parts_of(tmp_path: Path) -> None:
    parts = [fill(tmp_path / f"run-{i}.db", range(i, 12, 3)) for i in range(3)]
    before = [part.read_bytes() for part in parts]
    result = merge_runs(tmp_path / "run-*.db", tmp_path / "run.db")
    assert steps_of(tmp_path / "run.db") == list(range(12))
    merged, held = rows(tmp_path / "run.db"), [rows(part) for part in parts]
    assert merged["runs"] == held[0]["runs"]  # of that which began first
    for table in ("measurements", "scalars", "densities"):  # bit for bit
        assert merged[table] == sorted(itertools.chain(*(part[table] for part in held)), key=lambda row: row[:4])
    assert sorted(merged["events"]) == sorted(itertools.chain(*(part["events"] for part in held)))
    assert [part.read_bytes() for part in parts] == before
    assert (result.runs[0].measurements, len(result.runs[0].files), result.notes) == (12, 3, ())
    assert str(result) == f"{tmp_path / 'run.db'}: run 'scan of ckpts', 12 measurements from 3 files"
    assert result.to_dict()["runs"][0]["name"] == "scan of ckpts"
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_the_order_of_the_files_changes_nothing_and_a_second_merge_neither(
    tmp_path: Path, order: tuple[int, ...]
) -> None:
    """Files of one scan that overlap, and of trainings, one of them copied halfway."""
    parts = [fill(tmp_path / f"{i}.db", range(i, 6)) for i in range(2)]
    with RunStore(tmp_path / "2.db") as store:
        run = store.new_run("training", {"curvdiag": SETTINGS})
        record(run, range(3))
        shutil.copy(tmp_path / "2.db", tmp_path / "copy.db")
        run.record(2, events=[("error", "again")])
        record(run, range(3, 5))
        run.record(2, events=[("error", "again")])
        record(store.new_run("other", {"curvdiag": SETTINGS}), range(2))
    files = [*parts, tmp_path / "2.db"]
    merge_runs([tmp_path / "copy.db", *files], tmp_path / "one.db")
    merge_runs([*(files[i] for i in order), tmp_path / "copy.db"], tmp_path / "other.db")
    one = rows(tmp_path / "one.db")
    assert one == rows(tmp_path / "other.db")
    assert [row[0] for row in one["runs"]] == ["scan of ckpts", "training", "other"]
    assert [len(steps_of(tmp_path / "one.db", run)) for run in (1, 2, 3)] == [6, 5, 2]
    assert [row[3] for row in one["events"] if row[2] == "error"] == ["again", "again"]
    merge_runs([tmp_path / "one.db", *files], tmp_path / "again.db")
    assert rows(tmp_path / "again.db") == one
    merge_runs([tmp_path / "one.db", tmp_path / "0.db"], tmp_path / "one.db", overwrite=True)
    assert rows(tmp_path / "one.db") == one
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".part")]


def test_what_happened_stays_in_the_order_in_which_it_happened(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a.db") as a, RunStore(tmp_path / "b.db") as b:
        runs = [a.new_run("scan", SCAN), b.new_run("scan", SCAN)]
        for turn in range(6):
            runs[turn % 2].event(9 - turn, "error", f"{turn}")
        for run in runs:
            run.event(0, "note", "of both")
    merge_runs([tmp_path / "a.db", tmp_path / "b.db"], tmp_path / "run.db")
    assert [row[3] for row in rows(tmp_path / "run.db")["events"]] == ["0", "1", "2", "3", "4", "5", "of both"]


def test_a_measurement_of_several_files_is_taken_once_and_what_one_of_them_lacks_from_the_other(tmp_path: Path) -> None:
    with RunStore(tmp_path / "a.db") as a, RunStore(tmp_path / "b.db") as b:
        a.new_run("scan", SCAN).record(1, {"x": 1.0, "only a": 2.0, "curv/cost/seconds": 5.0}, wall_time=10.0, epoch=3)
        b.new_run("scan", SCAN).record(
            1, {"x": 1.0, "curv/cost/seconds": 6.0}, {("hessian", ""): density(1)}, wall_time=20.0
        )
    for order in (["a.db", "b.db"], ["b.db", "a.db"]):
        merge_runs([tmp_path / name for name in order], tmp_path / f"of {order[0]}")
        found = rows(tmp_path / f"of {order[0]}")
        assert found["measurements"] == [(1, 1, 3.0, 20.0, None)]
        assert [row[2:4] for row in found["scalars"]] == [("curv/cost/seconds", 6.0), ("only a", 2.0), ("x", 1.0)]
        assert len(found["densities"]) == 1


# What does not


def test_measurements_that_contradict_each_other_are_refused_or_the_newest_is_taken(tmp_path: Path) -> None:
    fill(tmp_path / "a.db", range(4))
    fill(tmp_path / "b.db", range(2, 6), off=1e-15)
    (tmp_path / "run.db").write_bytes((tmp_path / "a.db").read_bytes())
    before = (tmp_path / "run.db").read_bytes()
    with pytest.raises(
        StoreError, match=r"a\.db and .*b\.db hold different measurements of run 'scan of ckpts'"
    ) as told:
        merge_runs([tmp_path / "a.db", tmp_path / "b.db"], tmp_path / "run.db", overwrite=True)
    assert "at step 2 (x: 0.6666666666666666 and 0.6666666666666676); contradictions are at steps 2, 3" in str(
        told.value
    )
    assert "--newest" in str(told.value)
    assert (tmp_path / "run.db").read_bytes() == before
    for order in (["a.db", "b.db"], ["b.db", "a.db"]):
        target = tmp_path / f"of {order[0]}"
        result = merge_runs([tmp_path / name for name in order], target, newest=True)
        with RunStore(target, readonly=True) as store:
            assert store.scalars("x").values.tolist() == [
                0,
                1 / 3,
                2 / 3 + 1e-15,
                1 + 1e-15,
                4 / 3 + 1e-15,
                5 / 3 + 1e-15,
            ]
            notes = [(event.step, event.message) for event in store.events() if event.kind == "note"]
        assert [step for step, _ in notes] == [2, 3]
        assert all("the later measurement, of b.db, is kept" in message for _, message in notes)
        assert len(result.notes) == 2


@pytest.mark.parametrize("what", ["density", "error", "epoch"])
def test_a_contradiction_in_anything_counts(tmp_path: Path, what: str) -> None:
    for index, name in enumerate(("a", "b")):
        with RunStore(tmp_path / f"{name}.db") as store:
            changed = {key: index * (key == what) for key in ("density", "error", "epoch")}
            store.new_run("scan", SCAN).record(
                1, {"x": Estimate(1.0, 0.1 + changed["error"], 3)}, {("hessian", "b"): density(changed["density"])},
                epoch=changed["epoch"],
            )  # fmt: skip
    wanted = {"density": "density of hessian, block b", "error": "error of x", "epoch": "epoch 0.0 and 1.0"}[what]
    with pytest.raises(StoreError, match=wanted):
        merge_runs([tmp_path / "a.db", tmp_path / "b.db"], tmp_path / "run.db")
    assert not (tmp_path / "run.db").exists()


def changed(section: str, **keys: Any) -> dict[str, Any]:
    return {**SCAN, section: {**SCAN[section], **keys}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (changed("curvdiag", seed=1), r"differ in seed \(0 and 1\): measure one of them anew"),
        (changed("curvdiag", objective="Objective(Other, 8 samples)"), r"objective \(Objective\(Net, 8 samples\) and"),
        (changed("checkpoints", fingerprint="4567"), r"data or loss \(0123 and 4567\)"),
        (changed("checkpoints", folder="/else"), r"folder \(/data/ckpts and /else\)"),
        (changed("curvdiag", more=1), r"more \(None and 1\)"),
        ({"curvdiag": SETTINGS}, r"differ in folder \(/data/ckpts and None\)"),
    ],
)
def test_runs_of_one_name_that_measured_something_else_are_refused_with_what_differs(
    tmp_path: Path, config: dict[str, Any], words: str
) -> None:
    files = [fill(tmp_path / "a.db", [1, 3]), fill(tmp_path / "b.db", [2, 4], config=config)]
    for join in (False, True):
        with pytest.raises(StoreError, match=words if not join else "cannot be joined") as told:
            merge_runs(files, tmp_path / "run.db", join=join)
        assert "apart=True (--apart)" in str(told.value)
        assert not (tmp_path / "run.db").exists()
    merge_runs(files, tmp_path / "run.db", apart=True)
    assert [steps_of(tmp_path / "run.db", run) for run in (1, 2)] == [[1, 3], [2, 4]]
    # Once they lie side by side, they are known to be two.
    again = fill(tmp_path / "c.db", [5])
    merge_runs([tmp_path / "run.db", again], tmp_path / "more.db")
    assert [steps_of(tmp_path / "more.db", run) for run in (1, 2)] == [[1, 3, 5], [2, 4]]


def test_trainings_of_one_name_are_two_unless_it_is_said_that_one_goes_on_in_the_other(tmp_path: Path) -> None:
    config = {"curvdiag": SETTINGS, "lr": 0.1}
    files = [
        fill(tmp_path / "a.db", [1, 2], name="run", config=config),
        fill(tmp_path / "b.db", [3, 4], name="run", config={**config, "lr": 0.2}),
    ]
    with pytest.raises(StoreError, match=r"differ in the moment at which they began .*\(--apart\).*\(--join\)"):
        merge_runs(files, tmp_path / "run.db")
    assert [run.measurements for run in merge_runs(files, tmp_path / "two.db", apart=True).runs] == [2, 2]
    result = merge_runs(files, tmp_path / "one.db", join=True)
    assert steps_of(tmp_path / "one.db") == [1, 2, 3, 4]
    assert result.notes == ("the configurations of run 'run' differ in lr: that of a.db is kept",)
    with RunStore(tmp_path / "one.db", readonly=True) as store:
        assert store.run().config["lr"] == 0.1


def test_runs_of_different_names_lie_beside_each_other_the_oldest_first(tmp_path: Path) -> None:
    for name in ("one", "two", "three"):
        fill(tmp_path / f"{name}.db", [1, 2], name=name, config={"curvdiag": SETTINGS}, off=len(name))
    result = merge_runs([tmp_path / f"{name}.db" for name in ("three", "one", "two")], tmp_path / "run.db")
    assert names_in(tmp_path / "run.db") == ["one", "two", "three"] == [run.name for run in result.runs]
    assert "run 'one', 2 measurements from 1 file; run 'two'" in str(result)


def test_other_versions_are_told_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curvdiag.record import store

    fill(tmp_path / "a.db", [1])
    monkeypatch.setattr(store, "versions", lambda: {"torch": "99", "python": "4"})
    for name in ("b", "c"):
        fill(tmp_path / f"{name}.db", [ord(name)])
    result = merge_runs([tmp_path / f"{name}.db" for name in "abc"], tmp_path / "run.db")
    assert len(result.notes) == 1
    assert "different versions" in result.notes[0]
    assert "and 99" in result.notes[0]
    notes = [row for row in rows(tmp_path / "run.db")["events"] if row[2] == "note"]
    assert [(row[1], row[3]) for row in notes] == [(0, result.notes[0].partition("step 0: ")[2])]
