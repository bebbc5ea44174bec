"""What goes wrong on one of several ranks: the others hear of it, none waits, and training goes on or ends on all."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from monitored import same
from ranks import launch

from curvdiag.record import RunStore

SCRIPT = """
warnings.filterwarnings("ignore", "measuring every|the measurement|at step|.*measurements stay in memory")
import sqlite3
import monitored
from monitored import numbers, shard, trained
from torch.nn import functional as F
from curvdiag import CurvatureMonitor, Objective
from curvdiag.errors import UnwritableStoreError
from curvdiag.monitor.quantities import QUANTITIES
from curvdiag.monitor.survey import Survey
from curvdiag.optim import LPSGD
from curvdiag.record import Run
from curvdiag.schedules import PredictedDecreaseP

data, original, take, write = shard(rank, world), dict(QUANTITIES), Survey.take, Run.record

def run(name, net=monitored.noisy, after=None, optimizer=None, **options):
    kept = {}
    def watch(model, made):
        objective = Objective(model, F.cross_entropy, data, group="world")
        kept["monitor"] = CurvatureMonitor(
            objective, os.path.join(folder, name + ".db"),
            **{"every": 2, "steps": 6, "probes": 2, "measure": ["lambda_max", "trace", "density"], **options})
        kept["monitor"].attach(made)
        kept["after"] = after(made, objective) if after else lambda step: None
    chosen = {"optimizer": optimizer} if optimizer else {}
    error = ""
    try:
        left = trained(data, net(), watch=watch, after_step=lambda step: kept["after"](step), **chosen)
    except Exception as raised:
        left, error = None, f"{type(raised).__name__}: {raised}"
    QUANTITIES.update(original)
    Survey.take, Run.record = take, write
    monitor = kept["monitor"]
    monitor.close()
    saved[name] = {"left": left, "error": error, "numbers": numbers(monitor)}

def failing(name, late, on=1):
    def fail(work):
        if late:  # after all that it exchanges, and with numbers noted down
            original[name](work)
        if rank == on and work.optimizer.param_groups[0]["lr"] == 0.1:
            raise ValueError(f"spoilt {name}")
        if not late:
            original[name](work)
    return fail

saved["bare"] = {"left": trained(data, monitored.noisy())}
for late in (False, True):
    QUANTITIES["trace"] = failing("trace", late)
    run("late" if late else "early")
QUANTITIES["density"] = failing("density", True, on=0)
run("first")
QUANTITIES["lambda_max"] = failing("lambda_max", True)
run("strict", strict=True)

# All of a measurement on one rank, once.
def no_memory(self, *given, first):
    if rank == 1 and len(spoilt) < 1:
        spoilt.append(1)
        raise MemoryError("no room for graphs")
    return take(self, *given, first=first)
spoilt = []
Survey.take = no_memory
run("whole")

# What the first rank alone does.
def full(self, *arguments, **options):
    raise UnwritableStoreError("the disk is full")
Run.record = full
run("full disk")
Run.record = full
run("full disk strict", strict=True)

def logger(step, scalars):
    raise OSError("no network")
run("logger", loggers=[logger])
run("logger strict", strict=True, loggers=[logger])
if rank == 0:
    run_warnings = warnings.catch_warnings()
    run_warnings.__enter__()
    warnings.simplefilter("error")
run("errors of warnings", loggers=[logger])
if rank == 0:
    run_warnings.__exit__(None, None, None)
class Spoilt:
    def observe(self, **_):
        pass
    def __call__(self, step):
        if step == 3:
            raise ValueError("spoilt cadence")
        return step == 1
run("cadence", every=None, cadence=Spoilt())
try:
    objective = Objective(monitored.smooth(), F.cross_entropy, data, group="world")
    CurvatureMonitor(objective, os.path.join(folder, "no", "file.db"))
except Exception as raised:
    saved["nowhere"] = f"{type(raised).__name__}: {raised}"

# A schedule that measures by itself.
def schedule(optimizer, objective):
    made = PredictedDecreaseP(optimizer, objective, every=2, grid=[2.0, 3.0, 6.0])
    find, calls = made._find, []
    def sometimes():
        found = find()
        calls.append(1)
        if rank == 1 and len(calls) == 2:
            raise ValueError("spoilt slope")
        return found
    made._find = sometimes
    def after(step):
        made.step()
        saved.setdefault("p", []).append(made.get_last_p()[0])
        saved["notes"] = [one.note for one in made.history]
    return after
run("schedule", monitored.smooth, after=schedule, optimizer=lambda p: LPSGD(p, lr=0.3, p=6.0))
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What each of three ranks saw, and the folder."""
    folder = tmp_path_factory.mktemp("failures")
    return launch(SCRIPT, 3, folder, limit=280), folder


def events(folder, name):
    with RunStore(folder / f"{name}.db", readonly=True) as store:
        return [event.message for event in store.events() if event.kind == "error"]


@pytest.mark.parametrize(("name", "failed"), [("early", "trace"), ("late", "trace"), ("first", "density")])
def test_a_quantity_that_fails_on_one_rank_is_given_up_on_all_and_the_next_goes_on(ranks, name, failed):
    saved, folder = ranks
    keys = {
        "trace": {"curv/hessian/trace"},
        "density": {"curv/hessian/lambda_min", "curv/hessian/frobenius_norm"},
        "lambda_max": {"curv/hessian/lambda_max"},
    }
    for one in saved:
        assert not one[name]["error"]
        assert repr(one[name]["numbers"]) == repr(saved[0][name]["numbers"])
        for step, scalars, _ in one[name]["numbers"]:
            assert step in (2, 4, 6)
            for quantity, own in keys.items():
                assert (own & scalars.keys() == set()) == (quantity == failed), (step, quantity)
    failing = 0 if name == "first" else 1
    assert events(folder, name) == [f"rank {failing} failed: ValueError: spoilt {failed}"] * 3


@pytest.mark.parametrize("name", ["early", "late", "first", "whole", "full disk", "logger"])
def test_training_is_bit_identical_through_every_failure(ranks, name):
    for one in ranks[0]:
        assert not one[name]["error"]
        assert same(one[name]["left"], one["bare"]["left"])


def test_with_strict_every_rank_raises(ranks):
    saved, _ = ranks
    for rank, one in enumerate(saved):
        words = "ValueError: spoilt lambda_max"
        assert one["strict"]["error"] == (words if rank == 1 else f"RankFailedError: rank 1 failed: {words}")


def test_a_measurement_that_fails_on_one_rank_leaves_the_next_ones(ranks):
    saved, folder = ranks
    for one in saved:
        assert [step for step, _, _ in one["whole"]["numbers"]] == [4, 6]
    assert events(folder, "whole") == ["rank 1 failed: MemoryError: no room for graphs"]


def test_where_the_first_rank_cannot_write_all_keep_their_numbers(ranks):
    for one in ranks[0]:
        assert [step for step, _, _ in one["full disk"]["numbers"]] == [2, 4, 6]
        assert [step for step, _, _ in one["logger"]["numbers"]] == [2, 4, 6]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("full disk strict", "UnwritableStoreError: the disk is full"),
        ("logger strict", "OSError: no network"),
        ("errors of warnings", "CurvdiagWarning: at step 2 the logger"),
        ("cadence", "ValueError: spoilt cadence"),
    ],
)
def test_what_the_first_rank_raises_ends_the_training_of_all(ranks, name, words):
    first, *others = (one[name]["error"] for one in ranks[0])
    assert first.startswith(words)
    for other in others:
        assert other == f"RankFailedError: rank 0 failed: {first}"


def test_where_the_run_file_cannot_be_made_every_rank_says_so(ranks):
    first, *others = (one["nowhere"] for one in ranks[0])
    assert first.startswith("StoreError")
    for other in others:
        assert other == f"RankFailedError: rank 0 failed: {first}"


def test_a_schedule_whose_measurement_fails_on_one_rank_holds_on_all(ranks):
    saved, _ = ranks
    for one in saved:
        assert not one["schedule"]["error"]
        assert one["p"] == saved[0]["p"]
        assert same(one["schedule"]["left"]["weights"], saved[0]["schedule"]["left"]["weights"])
        spoilt = [index for index, note in enumerate(one["notes"]) if note]
        assert spoilt == [2], "the third of four measurements"
        assert "spoilt slope" in one["notes"][2]
    assert len({*saved[0]["p"]}) > 1


# A rank that is gone. The processes are forked after the imports; no launcher ends those that are left.

GONE = """
import datetime, json, os, signal, sys, time, warnings
import torch
import torch.distributed as dist
from torch.nn import functional as F
import monitored
from curvdiag import CurvatureMonitor, Objective
from curvdiag.monitor.quantities import QUANTITIES

folder, WORLD, TIMEOUT = sys.argv[1], 3, 4
torch.set_num_threads(1)

def vanish(kind):
    if kind == "killed" or kind == "first killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    raise KeyboardInterrupt

def train(kind, rank):
    victim = 0 if kind == "first killed" else 1
    store = dist.FileStore(os.path.join(folder, kind + ".rendezvous"), WORLD)
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=WORLD, timeout=datetime.timedelta(seconds=TIMEOUT))
    warnings.filterwarnings("ignore", "measuring every")
    original, calls = QUANTITIES["trace"], []
    def trace(work):
        original(work)
        calls.append(time.time())
        if len(calls) == 2 and rank == victim:
            vanish(kind)
    QUANTITIES["trace"] = trace
    data = monitored.shard(rank, WORLD)
    def watch(model, optimizer):
        objective = Objective(model, F.cross_entropy, data, group="world")
        path = os.path.join(folder, kind + ".db")
        CurvatureMonitor(objective, path, every=2, measure=["trace", "density"], steps=6, probes=2).attach(optimizer)
    try:
        monitored.trained(data, monitored.noisy(), watch=watch)
        error = "none"
    except BaseException as raised:
        error = f"{type(raised).__name__}: {raised}"
    with open(os.path.join(folder, f"{kind}.{rank}.json"), "w") as file:
        json.dump({"error": error, "after": time.time() - calls[-1]}, file)

for kind in ("killed", "first killed", "stopped", "interrupted"):
    children = []
    for rank in range(WORLD):
        child = os.fork()
        if not child:
            train(kind, rank)
            os._exit(0)
        children.append(child)
    victim = children[0 if kind == "first killed" else 1]
    for child in children:
        if child != victim:
            os.waitpid(child, 0)
    os.kill(victim, signal.SIGKILL)
    os.waitpid(victim, 0)
"""


@pytest.fixture(scope="module")
def gone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gone")
    here = Path(__file__).parent
    (folder / "script.py").write_text(textwrap.dedent(GONE))
    done = subprocess.run(
        [sys.executable, str(folder / "script.py"), str(folder)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)]), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    return folder


@pytest.mark.parametrize("kind", ["killed", "first killed", "stopped", "interrupted"])
def test_a_rank_that_is_gone_in_a_measurement_ends_the_others_with_an_error(gone, kind):
    left = [1, 2] if kind == "first killed" else [0, 2]
    for rank in left:
        told = json.loads((gone / f"{kind}.{rank}.json").read_text())
        assert told["error"].startswith("RankLostError: a rank is gone, or has not answered within the timeout")
        assert f"seen by rank {rank} of 3" in told["error"]
        assert told["after"] < 3 * 4, "the timeout of the group is 4 s"


@pytest.mark.parametrize("kind", ["killed", "first killed", "stopped", "interrupted"])
def test_the_run_file_stays_whole(gone, kind):
    with contextlib.closing(sqlite3.connect(gone / f"{kind}.db")) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    with RunStore(gone / f"{kind}.db", readonly=True) as store:
        assert store.scalars("curv/hessian/trace").steps.tolist() == [2]
        assert len(store.densities()) == 1
