"""CurvatureCallback under DDP: two processes on the CPU, of which the first measures, or both together."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from curvdiag.record import RunStore

SCRIPT = Path(__file__).with_name("lightning_ddp.py")


@pytest.fixture(scope="module")
def seen(tmp_path_factory):
    """What each of the two processes saw, by case; and the folder."""
    return launch(
        tmp_path_factory.mktemp("ddp"), "bare", "watched", "homeless", "together", "together_scheduled", "sharded"
    )


@pytest.fixture(scope="module")
def scheduled(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("scheduled"), "bare", "scheduled", "resumed", "clocked")


def launch(folder, *cases):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    around = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(folder), *cases],
            env={**around, "LOCAL_RANK": str(rank), "NODE_RANK": "0"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        said = [process.communicate(timeout=240)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert all(process.returncode == 0 for process in processes), "\n".join(said)[-5000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)], folder


def test_training_on_two_processes_is_bit_identical_with_and_without_it(seen):
    for found in seen[0]:
        assert found["bare"]["weights"] == found["watched"]["weights"]
        assert found["bare"]["own"] == found["watched"]["own"]


def test_the_first_process_measures_and_writes_one_file(seen):
    ranks, folder = seen
    assert [found["watched"]["steps"] for found in ranks] == [[2, 4, 6, 8], None]
    assert sorted(file.name for file in folder.glob("*.db*")) == ["sharded.db", "together.db", "watched.db"]
    assert measured_at(folder, "watched.db") == [2, 4, 6, 8]


def test_with_an_objective_of_both_they_measure_together_and_train_as_without_it(seen):
    ranks, folder = seen
    for found in ranks:
        assert found["together"]["weights"] == found["bare"]["weights"]
        assert found["together"]["own"] == found["bare"]["own"]
        assert found["together"]["steps"] == [2, 4, 6, 8]
        assert found["together"]["size"] == 64
        assert found["together"]["numbers"] == ranks[0]["together"]["numbers"]
        assert found["together"]["told"] == [pytest.approx(found["together"]["numbers"][-1]["curv/hessian/lambda_max"])]
    with RunStore(folder / "together.db", readonly=True) as store:
        first, _ = store.runs()
        assert store.scalars("curv/hessian/lambda_max", first.id).steps.tolist() == [2, 4, 6, 8]


def test_together_they_may_read_the_clock_and_schedules_choose_alike(seen):
    one, other = (found["together_scheduled"] for found in seen[0])
    assert one == other
    assert one["steps"][0] == 1
    assert one["weights"] != seen[0][0]["bare"]["weights"]


def test_with_fully_shard_they_measure_on_the_shards(seen):
    ranks, folder = seen
    for found in ranks:
        assert found["sharded"]["sharded"]
        assert found["sharded"]["watched"] == found["sharded"]["bare"]
        assert len(found["sharded"]["trace"]) == 4
        assert found["sharded"]["trace"] == ranks[0]["sharded"]["trace"]
        assert "give objective= a function that makes one of all processes" in found["sharded"]["refused"]
    with RunStore(folder / "sharded.db", readonly=True) as store:
        assert store.scalars("curv/hessian/trace").steps.tolist() == [2, 4, 6, 8]


def test_where_the_first_process_cannot_begin_no_other_waits_for_it(seen):
    first, second = (found["homeless"] for found in seen[0])
    assert "missing" in first
    assert second == "another process could not begin to measure, and its own error says why"


@pytest.mark.long
@pytest.mark.parametrize(("case", "measurements"), [("scheduled", 4), ("resumed", 6)])
def test_schedules_choose_alike_on_all_processes(scheduled, case, measurements):
    ranks, _ = scheduled
    one, other = (found[case] for found in ranks)
    assert {**one, "own": None} == {**other, "own": None}
    assert len(one["history"]) == measurements
    assert one["p"] < 6
    assert one["weights"] != ranks[0]["bare"]["weights"]


@pytest.mark.long
def test_a_resumed_training_on_two_processes_goes_on_in_the_same_run(scheduled):
    assert [file.name for file in scheduled[1].glob("*.db*")] == ["scheduled.db"]
    assert measured_at(scheduled[1], "scheduled.db") == [2, 4, 6, 8, 10, 12]


@pytest.mark.long
def test_a_cadence_that_the_other_process_cannot_know_is_refused_on_both(scheduled):
    for found in scheduled[0]:
        assert "reads the clock: give every=" in found["clocked"]


def measured_at(folder, name):
    with RunStore(folder / name, readonly=True) as store:
        assert len(store.runs()) == 1
        return store.scalars("curv/hessian/lambda_max").steps.tolist()
