"""A scan of an objective whose data lie on several ranks: one file, one run, and the numbers of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import data, net, numbers, quick
from ranks import launch
from sharded import STEPS, checkpoints, contents
from torch.nn import functional as F

from curvdiag import Objective, RunStore
from curvdiag.errors import DistributedError

SCRIPT = """
from pathlib import Path
from checkpointed import data, net, quick
from curvdiag import Objective
from curvdiag.checkpoints import fingerprint, work
from curvdiag.errors import CheckpointError
from torch.nn import functional as F

ckpts = Path(folder) / "ckpts"
inputs, targets = data()
own = slice(0, 13) if rank == 0 else slice(13, None)  # of unequal size
objective = Objective(net(9), F.cross_entropy, (inputs[own], targets[own]), group="world")
before = {k: v.clone() for k, v in objective.model.state_dict().items()}
told = []
options = {"measure": ["trace", "lambda_max"], "tol": 1e-5, "objective": objective, "tell": told.append}

read = work.read
def unreadable(path):
    if rank == 1 and path.name == "step=30.pt":
        raise CheckpointError("is gone on this rank")
    return read(path)
work.read = unreadable
saved["first"] = quick(ckpts, **options)
work.read = read
saved["second"] = quick(ckpts, **options)
saved["told"] = list(told)
saved["shard"] = quick(ckpts, shard=(1, 3), name="sharded", **options)
saved["fingerprint"] = fingerprint.fingerprint(objective)
saved["same model"] = all(torch.equal(v, before[k]) for k, v in objective.model.state_dict().items())
for what, wrong in (("shards", {"shard": (rank, 2)}), ("nothing", {"paths": "none/*.pt"})):
    try:
        quick(ckpts, **options, **wrong)
    except Exception as error:
        saved[what] = f"{type(error).__name__}: {error}"
"""


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    where = tmp_path_factory.mktemp("ranks")
    checkpoints(where)
    (where / "ckpts" / "step=7.pt").write_text("nothing")
    return where, launch(SCRIPT, 2, where)


Ranks = tuple[Path, list[dict[str, Any]]]


def test_the_first_rank_alone_writes_and_all_return_the_same(ranks: Ranks) -> None:
    where, (first, second) = ranks
    for what in ("first", "second", "shard", "fingerprint"):
        assert first[what] == second[what]
    assert first["second"].measured == (30,)
    assert first["second"].held == (2, 4, 6, 10, 32, 50)
    assert first["shard"].measured == (4, 10, 50)  # of 2, 4, 6, 7, 10, 30, 32, 50
    assert second["told"] == []
    assert first["same model"]
    assert second["same model"]
    with RunStore(where / "run.db", readonly=True) as store:
        assert [(run.name, run.measurements) for run in store.runs()] == [("scan of ckpts", 7), ("sharded", 3)]
        events = [(event.step, event.kind) for event in store.events(1)]
    assert len(events) == len(set(events)) == 7 + 2


def test_the_numbers_are_those_of_one_process(ranks: Ranks, tmp_path: Path) -> None:
    where, _ = ranks
    whole = Objective(net(9), F.cross_entropy, data())
    quick(checkpoints(tmp_path), objective=whole, measure=["trace", "lambda_max"], tol=1e-5)
    alone, together = numbers(tmp_path / "run.db"), numbers(where / "run.db", 1)
    for name in ("curv/hessian/trace", "curv/hessian/lambda_max"):
        assert together[name].keys() == alone[name].keys() == set(STEPS)
        for step in STEPS:
            assert together[name][step] == pytest.approx(alone[name][step], rel=1e-4)


def test_a_checkpoint_that_one_rank_cannot_read_fails_on_all_and_the_others_are_measured(ranks: Ranks) -> None:
    _, (first, _) = ranks
    result = first["first"]
    assert result.measured == (2, 4, 6, 10, 32, 50)
    assert [Path(failure.path).name for failure in result.failed] == ["step=7.pt", "step=30.pt"]
    assert "rank 1 failed: CheckpointError: is gone on this rank" in result.failed[1].reason
    assert any("rank 1 failed" in line for line in first["told"])


def test_ranks_that_scan_different_things_are_told_so_and_none_waits(ranks: Ranks) -> None:
    _, (first, second) = ranks
    for rank in (first, second):
        assert "different shards: (0, 2) on rank 0, (1, 2) on rank 1; all ranks measure" in rank["shards"]
        assert rank["shards"].startswith(DistributedError.__name__)
    assert first["nothing"].startswith("ArgumentError: no file or folder matches")
    assert second["nothing"].startswith("RankFailedError: rank 0 failed: ArgumentError")


def test_the_data_of_every_rank_count_for_what_run_it_is(ranks: Ranks) -> None:
    where, (first, _) = ranks
    config = contents(where / "run.db")[1]
    assert config["checkpoints"]["fingerprint"] == first["fingerprint"]
    assert "on 2 ranks" in config["curvdiag"]["objective"]
    assert torch.distributed.is_initialized() is False
