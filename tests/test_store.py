"""The run file keeps what it was given, says what it refuses, and can be read while it is written."""

from __future__ import annotations

import csv
import json
import logging
import multiprocessing
import os
import resource
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from curvdiag.errors import ArgumentError, StoreError
from curvdiag.estimate import Estimate
from curvdiag.record import RunStore, database, schema
from curvdiag.spectrum.density import SpectralDensity


def some_density(seed: int = 0, probes: int = 3, points: int = 7, deflated: int = 2) -> SpectralDensity:
    rng = np.random.default_rng(seed)
    return SpectralDensity(
        nodes=rng.standard_normal((probes, points)) * 10.0 ** rng.integers(-300, 300, (probes, points)),
        weights=rng.dirichlet(np.ones(points), probes) * (1 - deflated / 100),
        size=100,
        deflated=rng.standard_normal(deflated),
        steps=points,
        matvecs=probes * points,
        note="clipped \N{GREEK SMALL LETTER LAMDA}",
    )


def same(a: SpectralDensity, b: SpectralDensity) -> bool:
    arrays = all(
        x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()
        for x, y in ((a.nodes, b.nodes), (a.weights, b.weights), (a.deflated, b.deflated))
    )
    return arrays and (a.size, a.steps, a.matvecs, a.note) == (b.size, b.steps, b.matvecs, b.note)


def files(path: Path) -> list[str]:
    return sorted(p.name for p in path.parent.iterdir())


# What goes in comes out


@pytest.mark.parametrize("reopened", [False, True])
def test_a_measurement_comes_back_exactly(tmp_path: Path, reopened: bool) -> None:
    path = tmp_path / "run.db"
    measured = {("hessian", ""): some_density(1), ("hessian", "conv.1"): some_density(2, 1, 3, 0)}
    store = RunStore(path)
    run = store.new_run("a", {"lr": 0.1, "layers": [1, 2]})
    run.record(3, {"x": Estimate(1 / 3, 1e-300, 5), "y": 0.1}, measured, epoch=0.5, wall_time=1e9 + 0.25)
    run.record(10, {"x": Estimate.exact(2.0)}, {("hessian", ""): some_density(3)})
    if reopened:
        store.close()
        store = RunStore(path, readonly=True)
    x, y = store.scalars("x"), store.scalars("y")
    assert x.steps.tolist() == [3, 10]
    assert x.values.tolist() == [1 / 3, 2.0]
    assert x.standard_errors.tolist() == [1e-300, 0.0]
    assert x.samples.tolist() == [5, 0]
    assert x.epochs[0] == 0.5
    assert np.isnan(x.epochs[1])
    assert x.times[0] == 1e9 + 0.25
    assert y.values.tolist() == [0.1]
    assert np.isnan(y.standard_errors[0])
    whole = store.densities("hessian")
    assert whole.steps.tolist() == [3, 10]
    assert same(whole.densities[0], some_density(1))
    assert same(whole.densities[1], some_density(3))
    assert same(store.densities("hessian", "conv.1").densities[0], some_density(2, 1, 3, 0))
    assert store.scalar_names() == ["x", "y"]
    assert store.operators() == ["hessian"]
    assert store.blocks("hessian") == ["", "conv.1"]
    assert store.run().config == {"lr": 0.1, "layers": [1, 2]}
    assert store.run().versions.keys() == {"python", "torch", "numpy", "curvdiag"}
    store.close()


def test_nan_and_infinity_survive(tmp_path: Path) -> None:
    values = [float("nan"), float("inf"), -float("inf"), -0.0, 5e-324]
    odd = SpectralDensity(np.array([values]), np.array([values]), 5, deflated=np.array(values))
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run()
        for step, value in enumerate(values):
            run.record(step, {"x": value, "e": Estimate(value, float("nan"), 1)}, {("hessian", ""): odd})
        for name in ("x", "e"):
            np.testing.assert_array_equal(run.scalars(name).values, values)
        assert np.isnan(run.scalars("e").standard_errors).all()
        assert all(same(d, odd) for d in run.densities().densities)


def test_a_configuration_that_json_does_not_know_is_kept_as_text(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        store.new_run("a", {"path": Path("x"), 3: {"lr": float("inf")}})
        assert store.run().config == {"path": "x", "3": {"lr": float("inf")}}
        circular: dict[str, object] = {}
        circular["self"] = circular
        with pytest.raises(ArgumentError, match="JSON"):
            store.new_run("b", circular)


def test_numbers_of_any_library_are_taken_and_others_refused(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run()
        run.record(np.int64(1), {"a": np.float32(0.5), "b": torch.tensor(2.0), "c": 3, "d": True})
        assert [run.scalars(n).values[0] for n in "abcd"] == [0.5, 2.0, 3.0, 1.0]
        for bad in ("text", None, [1.0, 2.0], torch.zeros(2), 1j, Estimate(np.zeros(2), np.zeros(2), 3)):
            with pytest.raises(ArgumentError, match="'x'"):
                run.record(2, {"good": 1.0, "x": bad})  # type: ignore[dict-item]
        with pytest.raises(ArgumentError, match="operator, block"):
            run.record(2, densities={"hessian": some_density()})  # type: ignore[dict-item]
        with pytest.raises(ArgumentError, match="integer"):
            run.record(2.5, {"x": 1.0})  # type: ignore[arg-type]
        assert store.run().measurements == 1


# Runs


def test_several_runs_live_in_one_file_and_the_latest_is_meant(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        first, second = store.new_run("a"), store.new_run("b")
        unnamed = store.new_run()
        first.record(1, {"x": 1.0})
        second.record(2, {"x": 2.0})
        unnamed.record(7, {"x": 3.0})
        third = store.new_run("a")
        third.record(9, {"x": 4.0})
        assert [(r.id, r.name, r.measurements, r.last_step) for r in store.runs()] == [
            (1, "a", 1, 1), (2, "b", 1, 2), (3, "run 3", 1, 7), (4, "a", 1, 9),
        ]  # fmt: skip
        wanted = {None: 4.0, "b": 2.0, 1: 1.0, "3": 3.0, "a": 4.0, "run 3": 3.0, second: 2.0}
        assert {key: store.scalars("x", key).values[0] for key in wanted} == wanted
        with pytest.raises(ArgumentError, match=r"no run 'c'.*1 \(a\), 2 \(b\)"):
            store.scalars("x", "c")


def test_a_resumed_run_continues_the_same_run(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with RunStore(path) as store:
        store.new_run("a").record(10, {"x": 1.0})
        store.new_run("b")
    with RunStore(path) as store:
        run = store.resume("a")
        run.record(20, {"x": 2.0})
        assert len(store.runs()) == 2
        assert store.scalars("x", "a").steps.tolist() == [10, 20]


def test_a_run_resumed_from_an_earlier_step_drops_the_path_left_behind_with_its_first_measurement(
    tmp_path: Path,
) -> None:
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run()
        for step in (10, 20, 30, 40):
            run.record(step, {"x": float(step)}, {("hessian", ""): some_density(step)})
        again = store.resume(run.id, step=20)
        assert again.scalars("x").steps.tolist() == [10, 20, 30, 40]
        again.record(25, {"x": -1.0})
        again.record(35, {"x": -2.0})
        assert again.scalars("x").steps.tolist() == [10, 20, 25, 35]
        assert again.densities().steps.tolist() == [10, 20]
        assert [(e.kind, e.step) for e in again.events()] == [("resumed", 20)]
        assert "removed 2 measurements" in again.events()[0].message


def test_a_measurement_at_a_recorded_step_replaces_it_and_a_failed_one_does_not(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run()
        run.record(5, {"x": 1.0, "y": 1.0}, {("hessian", ""): some_density()})
        run.record(5, events=[("error", "out of memory \udc80")])
        assert run.scalars("x").values.tolist() == [1.0]
        run.record(5, {"x": 2.0})
        assert run.scalars("x").values.tolist() == [2.0]
        assert run.scalar_names() == ["x"]
        assert run.blocks() == []
        assert [(e.kind, e.step) for e in run.events()] == [("error", 5)]
        assert run.info.measurements == 1


def test_what_a_run_does_not_hold_is_refused_with_what_it_holds(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        with pytest.raises(ArgumentError, match="no run yet"):
            store.scalars("x")
        run = store.new_run("a")
        with pytest.raises(ArgumentError, match="none so far"):
            store.scalars("x")
        run.record(1, {"curv/trace": 1.0}, {("hessian", ""): some_density()})
        with pytest.raises(ArgumentError, match="curv/trace"):
            store.scalars("trace")
        with pytest.raises(ArgumentError, match="hessian, block ''"):
            store.densities("hessian", "conv")


# Export


def test_the_csv_reads_back_exactly(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run('a, "b"')
        run.record(1, {"x": Estimate(0.1, 0.01, 3), "y": float("nan")}, epoch=2, seconds=1.5)
        run.record(2, {"x": float("inf")})
        written = store.export_csv(tmp_path / "out.csv")
    with written.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert [(line["name"], line["step"]) for line in lines] == [("x", "1"), ("x", "2"), ("y", "1")]
    first = lines[0]
    assert (first["run_name"], first["epoch"], first["seconds"]) == ('a, "b"', "2.0", "1.5")
    assert (float(first["value"]), float(first["standard_error"]), first["samples"]) == (0.1, 0.01, "3")
    assert [lines[1]["value"], lines[1]["standard_error"], lines[2]["value"]] == ["inf", "", "nan"]


def test_the_npz_holds_scalars_and_densities_of_unequal_shape(tmp_path: Path) -> None:
    large, small = some_density(1, 3, 7, 2), some_density(2, 2, 5, 0)
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run("a")
        run.record(1, {"curv/x": Estimate(0.1, 0.01, 3)}, {("hessian", ""): large, ("hessian", "b"): small})
        run.record(2, {"curv/x": 5.0}, {("hessian", ""): small})
        written = store.export_npz(tmp_path / "out.npz")
    with np.load(written) as arrays:
        assert arrays["scalars/curv/x/values"].tolist() == [0.1, 5.0]
        assert arrays["scalars/curv/x/samples"].tolist() == [3, 0]
        assert arrays["densities/hessian//steps"].tolist() == [1, 2]
        assert arrays["densities/hessian//probes"].tolist() == [3, 2]
        nodes, weights = arrays["densities/hessian//nodes"], arrays["densities/hessian//weights"]
        np.testing.assert_array_equal(nodes[0], large.nodes)
        np.testing.assert_array_equal(nodes[1, :2, :5], small.nodes)
        assert weights[1].sum() == pytest.approx(2.0)
        np.testing.assert_array_equal(arrays["densities/hessian//deflated"][0], large.deflated)
        np.testing.assert_array_equal(arrays["densities/hessian/b/nodes"][0], small.nodes)


def test_a_failed_export_leaves_the_old_file(tmp_path: Path) -> None:
    target = tmp_path / "out.csv"
    target.write_text("old")
    with RunStore(tmp_path / "run.db") as store:
        store.new_run("a").record(1, {"x" * 1000: 1.0})
        with file_size_limit(100), pytest.raises(StoreError, match="cannot write"):
            store.export_csv(target)
    assert target.read_text() == "old"
    assert files(target) == ["out.csv", "run.db"]


# Files


@pytest.mark.parametrize("how", ["close", "with", "reader open", "two writers", "garbage"])
def test_a_closed_file_has_no_side_files_and_reading_it_makes_none(tmp_path: Path, how: str) -> None:
    path = tmp_path / "run.db"
    store = RunStore(path)
    store.new_run().record(1, {"x": 1.0})
    other = RunStore(path, readonly=how != "two writers")
    other.scalars("x")
    if how == "with":
        with store:
            pass
    elif how == "garbage":
        del store
    else:
        store.close()
        store.close()
    if how != "reader open":
        other.close()
    assert files(path) == ["run.db"]
    with RunStore(path, readonly=True) as reader:
        assert reader.scalars("x").values.tolist() == [1.0]
        assert files(path) == ["run.db"]
    assert files(path) == ["run.db"]


def test_the_file_by_itself_is_complete_before_it_is_closed(tmp_path: Path) -> None:
    path, copy = tmp_path / "run.db", tmp_path / "copy.db"
    with RunStore(path) as store:
        run = store.new_run()
        for step in range(5):
            run.record(step, {"x": float(step)}, {("hessian", ""): some_density(step)})
        shutil.copy(path, copy)  # without its write-ahead log, as people copy files
        with RunStore(copy, readonly=True) as reader:
            assert len(reader.densities()) == 5


def test_a_script_that_ends_without_closing_leaves_no_side_files(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    code = (
        "import sys; from curvdiag.record import RunStore; store = RunStore(sys.argv[1]); "
        "store.new_run().record(1, {'x': 1.0}); sys.keep = store; raise SystemExit(3)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)], check=False).returncode == 3
    assert files(path) == ["run.db"]
    assert RunStore(path, readonly=True).scalars("x").values.tolist() == [1.0]


def test_a_closed_store_refuses_to_work(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run.db")
    run = store.new_run()
    store.close()
    for use in (lambda: run.record(1, {"x": 1.0}), lambda: store.runs(), lambda: store.new_run()):
        with pytest.raises(StoreError, match="closed"):
            use()


def test_a_reader_never_writes(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with RunStore(path) as store:
        store.new_run().record(1, {"x": 1.0})
    before = path.read_bytes()
    with RunStore(path, readonly=True) as store:
        with pytest.raises(StoreError, match="readonly"):
            store.new_run()
        with pytest.raises(StoreError, match="readonly"):
            store.resume()
        store.scalars("x")
    assert path.read_bytes() == before


def test_any_thread_may_record(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run()

        def work(first: int) -> None:
            for step in range(first, first + 10):
                run.record(step, {"x": float(step)})
                run.scalars("x")

        threads = [threading.Thread(target=work, args=(10 * i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert run.scalars("x").values.tolist() == list(range(40))


# Journals


@pytest.mark.parametrize("why", ["no shared memory", "first write fails", "network"])
def test_where_a_write_ahead_log_does_not_work_a_rollback_journal_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, why: str
) -> None:
    connect, try_write = database.connect, database.try_write
    if why == "no shared memory":  # SQLite's layer for such file systems has none
        monkeypatch.setattr(database, "connect", lambda path, mode: connect(path, f"{mode}&vfs=unix-dotfile"))
    elif why == "first write fails":

        def fail_in_wal(connection: sqlite3.Connection, path: Path) -> None:
            if connection.execute("PRAGMA journal_mode").fetchone() == ("wal",):
                raise sqlite3.OperationalError("locking protocol")
            try_write(connection, path)

        monkeypatch.setattr(database, "try_write", fail_in_wal)
    else:
        monkeypatch.setattr(database, "network_file_system", lambda path: "nfs4")
    path = tmp_path / "run.db"
    with caplog.at_level(logging.INFO, "curvdiag"), RunStore(path) as store:
        run = store.new_run()
        run.record(1, {"x": 1.0}, {("hessian", ""): some_density()})
        assert files(path)[0] == "run.db"
        assert "run.db-wal" not in files(path)
        with RunStore(path, readonly=True) as reader:
            assert reader.scalars("x").values.tolist() == [1.0]
        run.record(2, {"x": 2.0})
    assert "rollback journal" in caplog.text
    assert files(path) == ["run.db"]
    assert RunStore(path, readonly=True).scalars("x").values.tolist() == [1.0, 2.0]


def test_a_local_file_uses_a_write_ahead_log_and_syncs_fully(tmp_path: Path) -> None:
    with RunStore(tmp_path / "run.db") as store:
        store.new_run()
        connection = store._database._connection
        assert connection is not None
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)


def test_network_file_systems_are_told_from_local_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = "/dev/sda / ext4 rw 0 0\nhost:/x /srv/my\\040data nfs4 rw 0 0\ntmpfs /srv/my\\040data/fast tmpfs rw 0 0\n"
    monkeypatch.setattr(Path, "read_text", lambda self: mounts)
    found = [database.network_file_system(Path(p)) for p in ("/srv/a", "/srv/my data/a", "/srv/my data/fast/a")]
    assert found == [None, "nfs4", None]


# Reading while writing


def write_slowly(path: str, pipe: Connection, count: int) -> None:
    with RunStore(path) as store:
        run = store.new_run()
        run.record(0, {"x": 0.0, "y": 0.0}, {("hessian", ""): some_density(0)})
        pipe.send("begun")
        for step in range(1, count):
            run.record(step, {"x": step, "y": -step}, {("hessian", ""): some_density(step)})


def test_another_process_reads_whole_measurements_while_they_are_written(tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curvdiag.record", "curvdiag.spectrum.density"])
    near, far = context.Pipe()
    path, count = tmp_path / "run.db", 150
    writer = context.Process(target=write_slowly, args=(str(path), far, count))
    writer.start()
    assert near.recv() == "begun"
    lengths = []
    with RunStore(path, readonly=True) as store:
        while writer.is_alive():
            arrays = np.load(store.export_npz(tmp_path / "out.npz"))  # one moment of the file
            n = len(arrays["scalars/x/values"])
            lengths.append(n)
            assert arrays["scalars/x/steps"].tolist() == list(range(n))
            np.testing.assert_array_equal(arrays["scalars/y/values"], -np.arange(n))
            np.testing.assert_array_equal(arrays["densities/hessian//nodes"][-1], some_density(n - 1).nodes)
        writer.join()
        assert writer.exitcode == 0
        assert len(store.densities()) == count
    assert lengths == sorted(lengths)
    assert len(set(lengths)) > 2, "the reader never overlapped with the writer"
    assert files(path) == ["out.npz", "run.db"]


# What is refused, and what happens when the disk does not cooperate


def test_a_store_from_a_newer_schema_is_refused_untouched(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    RunStore(path).close()
    with sqlite3.connect(path) as connection:
        connection.execute(f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    connection.close()
    before = path.read_bytes()
    for readonly in (False, True):
        with pytest.raises(StoreError, match=r"newer curvdiag.*upgrade"):
            RunStore(path, readonly=readonly)
    assert path.read_bytes() == before
    assert files(path) == ["run.db"]


def test_what_is_not_a_run_file_is_refused_untouched(tmp_path: Path) -> None:
    text, foreign = tmp_path / "text.db", tmp_path / "foreign.db"
    text.write_text("not a database, " * 100)
    with sqlite3.connect(foreign) as connection:
        connection.execute("CREATE TABLE t (x)")
    connection.close()
    (tmp_path / "empty.db").touch()
    before = text.read_bytes(), foreign.read_bytes()
    for readonly in (False, True):
        with pytest.raises(StoreError, match="not a run file"):
            RunStore(text, readonly=readonly)
        with pytest.raises(StoreError, match="another program"):
            RunStore(foreign, readonly=readonly)
        with pytest.raises(StoreError, match="is a folder"):
            RunStore(tmp_path, readonly=readonly)
        with pytest.raises(StoreError, match="does not exist; create it"):
            RunStore(tmp_path / "missing" / "run.db", readonly=readonly)
    with pytest.raises(StoreError, match="there is no run file"):
        RunStore(tmp_path / "none.db", readonly=True)
    with pytest.raises(StoreError, match="is empty"):
        RunStore(tmp_path / "empty.db", readonly=True)
    assert (text.read_bytes(), foreign.read_bytes()) == before


def test_a_database_with_no_room_left_loses_nothing_and_recovers(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with RunStore(path) as store:
        run = store.new_run()
        run.record(1, {"x": 1.0}, {("hessian", ""): some_density(1)})
        connection = store._database._connection
        assert connection is not None
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")
        big = some_density(2, 10, 1000)
        with pytest.raises(StoreError, match="disk is full"):
            run.record(2, {"x": 2.0}, {("hessian", ""): big})
        assert run.scalars("x").steps.tolist() == [1]
        connection.execute("PRAGMA max_page_count = 100000")
        run.record(3, {"x": 3.0}, {("hessian", ""): big})
    with RunStore(path, readonly=True) as store:
        assert store.scalars("x").steps.tolist() == [1, 3]
        assert same(store.densities().densities[1], big)
    assert files(path) == ["run.db"]


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """The kernel refuses to let any file grow beyond this, as a disk or a quota does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_a_write_that_the_file_system_refuses_loses_nothing_and_recovers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, journal: str
) -> None:
    if journal == "delete":
        monkeypatch.setattr(database, "network_file_system", lambda path: "nfs4")
    path, big = tmp_path / "run.db", some_density(2, 10, 1000)
    with RunStore(path) as store:
        assert store._database.journal == journal
        run = store.new_run()
        run.record(1, {"x": 1.0}, {("hessian", ""): some_density(1)})
        with file_size_limit(path.stat().st_size + 20_000):
            for _ in range(3):
                with pytest.raises(StoreError, match="what was recorded is safe"):
                    run.record(2, {"x": 2.0}, {("hessian", ""): big})
            assert run.scalars("x").steps.tolist() == [1]
        run.record(3, {"x": 3.0}, {("hessian", ""): big})
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    connection.close()
    with RunStore(path, readonly=True) as store:
        assert store.scalars("x").steps.tolist() == [1, 3]
        assert same(store.densities().densities[1], big)
    assert files(path) == ["run.db"]


@pytest.fixture
def guarded() -> Iterator[Path]:
    """A folder whose permissions count, also where the tests run as root."""
    folder = Path(tempfile.mkdtemp(prefix="curvdiag-test-"))
    root = os.geteuid() == 0
    if root:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    try:
        yield folder
    finally:
        if root:
            os.seteuid(0)
        folder.chmod(0o700)
        shutil.rmtree(folder)


def test_a_read_only_folder_can_be_read_and_is_refused_for_writing(guarded: Path) -> None:
    path = guarded / "run.db"
    with RunStore(path) as store:
        store.new_run().record(1, {"x": 1.0})
    path.chmod(0o400)
    guarded.chmod(0o500)
    with pytest.raises(StoreError, match=r"read-only.*readonly=True"):
        RunStore(path)
    with pytest.raises(StoreError, match="may be written to"):
        RunStore(guarded / "new.db")
    with RunStore(path, readonly=True) as store:
        assert store.scalars("x").values.tolist() == [1.0]


def test_a_file_left_in_wal_mode_is_read_where_nothing_may_be_written(guarded: Path) -> None:
    path = guarded / "run.db"
    with RunStore(path) as store:
        store.new_run().record(1, {"x": 1.0})
    with sqlite3.connect(path) as connection:
        connection.execute("PRAGMA journal_mode = WAL")
    connection.close()
    path.chmod(0o400)
    guarded.chmod(0o500)
    with RunStore(path, readonly=True) as store:
        assert store.scalars("x").values.tolist() == [1.0]


def test_another_program_can_read_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.db"
    with RunStore(path) as store:
        store.new_run("a", {"lr": 1}).record(1, {"x": 1.0}, {("hessian", ""): some_density(4)})
    connection = sqlite3.connect(path)
    assert json.loads(connection.execute("SELECT config FROM runs").fetchone()[0]) == {"lr": 1}
    nodes, probes, points = connection.execute("SELECT nodes, probes, points FROM densities").fetchone()
    np.testing.assert_array_equal(np.frombuffer(nodes, "<f8").reshape(probes, points), some_density(4).nodes)
    connection.close()
