"""A run killed at random moments leaves a file that opens and holds every completed measurement."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import sqlite3
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest

from curvdiag.record import RunStore, database
from curvdiag.spectrum.density import SpectralDensity

KILLS = 30
NAMES = [f"curv/x{i}" for i in range(20)]


def measurement(step: int) -> tuple[dict[str, float], dict[tuple[str, str], SpectralDensity]]:
    """Several pages of data that its step determines."""
    nodes = np.random.default_rng(step).standard_normal((3, 40 + step % 100))
    density = SpectralDensity(nodes, np.abs(nodes), 1000, steps=step)
    return {name: step + i / 100 for i, name in enumerate(NAMES)}, {("hessian", ""): density, ("hessian", "b"): density}


def write_until_killed(path: str, journal: str, first: int, pipe: Connection) -> None:
    if journal == "delete":
        database.network_file_system = lambda path: "nfs4"
    store = RunStore(path)
    assert store._database.journal == journal
    run = store.resume() if store.runs() else store.new_run("killed")
    for step in range(first, first + 100_000):
        run.record(step, *measurement(step))
        pipe.send(step)


@pytest.mark.parametrize("journal", ["wal", "delete"])
def test_every_acknowledged_measurement_survives_sigkill(tmp_path: Path, journal: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["curvdiag.record", "curvdiag.spectrum.density"])
    path, rng = tmp_path / "run.db", random.Random(0)
    acknowledged: list[int] = []
    interrupted = 0
    for kill in range(KILLS):
        near, far = context.Pipe(duplex=False)
        first = 1 + max(acknowledged, default=0)
        # A step that was killed on its way may be there: it is written again, and replaced.
        child = context.Process(target=write_until_killed, args=(str(path), journal, first, far))
        child.start()
        far.close()
        before = len(acknowledged)
        if kill % 5 and near.poll(20):  # every fifth is killed at any moment, also while it opens the file
            acknowledged.append(near.recv())
        time.sleep(rng.uniform(0.0, 0.05))
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        child.join()
        assert child.exitcode == -signal.SIGKILL
        try:
            while True:
                acknowledged.append(near.recv())
        except EOFError:
            near.close()
        interrupted += len(acknowledged) > before
        if acknowledged:
            check(path, acknowledged)
    assert interrupted >= 20, "hardly any child was killed while it was recording"
    with RunStore(path):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["run.db"]
    check(path, acknowledged)


def check(path: Path, acknowledged: list[int]) -> None:
    with RunStore(path, readonly=True) as store:
        assert len(store.runs()) == 1
        steps = store.scalars(NAMES[0]).steps.tolist()
        # One more than acknowledged may have been completed just before each kill.
        assert set(acknowledged) <= set(steps)
        assert len(steps) == len(set(steps)) <= len(acknowledged) + 1
        for i, name in enumerate(NAMES):
            np.testing.assert_array_equal(store.scalars(name).steps, steps)
            np.testing.assert_array_equal(store.scalars(name).values, [step + i / 100 for step in steps])
        for block in ("", "b"):
            densities = store.densities("hessian", block)
            np.testing.assert_array_equal(densities.steps, steps)
            for step, density in zip(steps, densities.densities, strict=True):
                expected = measurement(step)[1][("hessian", "")]
                np.testing.assert_array_equal(density.nodes, expected.nodes)
                np.testing.assert_array_equal(density.weights, expected.weights)
                assert density.steps == step
    connection = sqlite3.connect(path)
    assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    assert connection.execute("PRAGMA foreign_key_check").fetchall() == []
    connection.close()
