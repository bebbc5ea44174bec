"""Shards on the command line: of a Slurm array, of torchrun, and as the documentation has them."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from docs_pages import ROOT, Block, blocks_of
from sharded import STEPS, array, checkpoints, contents, steps_in

from curvdiag.cli import main
from curvdiag.cli.scan import check_ranks
from curvdiag.errors import ArgumentError

PAGE = ROOT / "docs" / "how-to" / "many-checkpoints.md"
TASK = "from checkpointed import objective\n"
QUICK = ("--measure", "trace", "--probes", "2", "--lanczos-steps", "8")


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with checkpoints and a task."""
    checkpoints(tmp_path)
    (tmp_path / "task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name, module in sys.modules.items() if str(tmp_path) in str(vars(module).get("__file__"))]:
        del sys.modules[name]


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def test_the_tasks_of_an_array_and_a_merge_give_the_file_of_one_scan(
    at_home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("scan", "task.py:objective", "-c", "ckpts/*.pt", *QUICK)
    assert curvdiag(*words, "--store", "whole.db") == 0
    for task in (3, 1, 2):
        for name, value in array(task, 1, 3, 3).items():
            monkeypatch.setenv(name, value)
        assert curvdiag(*words, "--shard", "auto", "--store", "part-{shard}.db") == 0
    out = capsys.readouterr().out
    assert "part-1.db, run 'scan of ckpts', shard 1/3: 2 checkpoints measured" in out
    assert steps_in(at_home / "part-0.db") == [2, 10, 50]
    assert curvdiag("merge", "part-0.db", "part-1.db", "part-2.db", "-o", "run.db") == 0
    assert capsys.readouterr().out.endswith("run.db: run 'scan of ckpts', 7 measurements from 3 files\n")
    assert contents(at_home / "run.db") == contents(at_home / "whole.db")
    assert curvdiag(*words, "--store", "run.db") == 0
    assert "0 checkpoints measured, 7 there already" in capsys.readouterr().out


@pytest.mark.usefixtures("at_home")
def test_an_empty_shard_ends_well_and_merges(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("scan", "task.py:objective", "-c", "ckpts/step=2.pt", *QUICK, "--store", "p{shard}.db")
    assert curvdiag(*words, "--shard", "1/2") == 0
    assert "shard 1/2 has none of the 1 checkpoints: nothing to measure" in capsys.readouterr().err
    assert curvdiag(*words, "--shard", "0/2") == 0
    assert curvdiag("merge", "p*.db", "-o", "run.db") == 0
    assert steps_in(Path("run.db")) == [2]


@pytest.mark.usefixtures("at_home")
def test_a_shard_out_of_range_is_refused_before_anything_is_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("scan", "task.py:objective", "-c", "ckpts/*.pt", "--shard", "3/3") == 2
    assert "curvdiag: error: there is no shard 3/3: shards are counted from 0" in capsys.readouterr().err
    assert not Path("run.db").exists()


@pytest.mark.usefixtures("at_home")
def test_a_file_named_after_its_shard_needs_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("scan", "task.py:objective", "-c", "ckpts/*.pt", "--store", "part-{shard}.db") == 2
    assert "stands for the number of a shard: give --shard" in capsys.readouterr().err
    assert not list(Path().glob("*.db"))


def test_processes_that_would_all_do_the_same_or_wait_for_each_other_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    check_ranks(None, alone=True)
    check_ranks("auto", alone=True)
    check_ranks("1/2", alone=False)
    check_ranks(None, alone=False)
    with pytest.raises(ArgumentError, match="measure each checkpoint together"):
        check_ranks("auto", alone=False)
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_ranks(None, alone=True)  # left over from elsewhere
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    check_ranks("auto", alone=True)
    with pytest.raises(ArgumentError, match=r"each of the 4 processes .* --shard auto, or the data"):
        check_ranks(None, alone=True)


# As the documentation has it


def shown(words: str) -> Block:
    (found,) = [block for block in blocks_of(PAGE) if words in block.code and block.language == "bash"]
    return found


def test_the_slurm_script_of_the_documentation_measures_everything_and_its_merge_gives_the_file_of_one_scan(
    at_home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script, submission = shown("#SBATCH"), shown("--dependency")
    first, last = re.search(r"^#SBATCH --array=(\d+)-(\d+)$", script.code, flags=re.MULTILINE).groups()  # type: ignore[union-attr]
    (at_home / script.title).write_text(script.code)
    (at_home / "bin").mkdir()
    for name, line in (("srun", 'exec "$@"'), ("curvdiag", "printf '%s\\0' \"$@\"")):
        (at_home / "bin" / name).write_text(f"#!/bin/bash\n{line}\n")
        (at_home / "bin" / name).chmod(0o755)
    tasks = range(int(first), int(last) + 1)
    for task in tasks:
        slurm = array(task, tasks[0], tasks[-1], len(tasks))
        environ = {"PATH": f"{at_home / 'bin'}{os.pathsep}{os.environ['PATH']}", **slurm}
        ran = subprocess.run(
            ["bash", script.title], env=environ, capture_output=True, text=True, check=True, timeout=60
        )
        for name, value in slurm.items():
            monkeypatch.setenv(name, value)
        assert curvdiag(*ran.stdout.rstrip("\0").split("\0"), *QUICK) == 0
    assert script.title in submission.code
    wrapped = re.search(r'--wrap "curvdiag (.*)"', submission.code)
    assert wrapped is not None
    assert curvdiag(*shlex.split(wrapped[1])) == 0
    assert steps_in(at_home / "run.db") == list(STEPS)
    assert curvdiag("scan", "task.py:objective", "-c", "ckpts/*.pt", *QUICK, "--store", "whole.db") == 0
    assert contents(at_home / "run.db") == contents(at_home / "whole.db")


def torchrun(*words: str) -> subprocess.CompletedProcess[str]:
    """``curvdiag`` on two processes."""
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "curvdiag.cli", *words]
    path = f"{ROOT / 'tests'}{os.pathsep}{ROOT}"
    return subprocess.run(
        [sys.executable, *command], env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, check=False, timeout=150,
    )  # fmt: skip


WAITING = """
import os, time
from checkpointed import objective as made
from curvdiag import RunStore

def measured():
    try:
        with RunStore("run.db", readonly=True) as store:
            return store.run().measurements
    except Exception:
        return 0

def objective():
    if os.environ["RANK"] == "1":  # the shard that fails
        open("pid", "w").write(str(os.getpid()))
        return made()
    end = time.monotonic() + 100
    while measured() < 3 and time.monotonic() < end:  # until it has nothing left to do
        time.sleep(0.1)
    end = time.monotonic() + 4
    while os.path.exists(f"/proc/{open('pid').read()}") and time.monotonic() < end:
        time.sleep(0.1)
    time.sleep(1)  # if it is gone, torchrun ends this one here
    return made()
"""


def test_under_torchrun_a_broken_checkpoint_in_one_shard_does_not_end_the_others(at_home: Path) -> None:
    """torchrun ends all processes when one of them fails: the shard with the failure has to end last."""
    (at_home / "ckpts" / "step=3.pt").write_text("nothing")
    (at_home / "task.py").write_text(WAITING)
    words = shlex.split(shown("torchrun").code)
    assert words[:6] == ["torchrun", "--standalone", "--nproc-per-node", "4", "-m", "curvdiag.cli"]
    ended = torchrun(*words[6:], *QUICK)
    assert ended.returncode == 1, ended.stderr[-3000:]
    assert "shard 1/2: 3 checkpoints measured, 1 failed" in ended.stdout, ended.stdout + ended.stderr[-3000:]
    assert "shard 0/2: 4 checkpoints measured" in ended.stdout
    assert steps_in(at_home / "run.db") == list(STEPS)


TOGETHER = """
import atexit, os
import torch.distributed as dist
from checkpointed import data, net
from curvdiag import Objective
from torch.nn import functional as F
def objective():
    dist.init_process_group("gloo")
    atexit.register(os.abort)  # as a thread of gloo's may
    inputs, targets = (part[dist.get_rank()::2] for part in data())
    return Objective(net(9), F.cross_entropy, (inputs, targets), group="world")
"""


def test_under_torchrun_ranks_with_shares_of_the_data_make_one_run_and_one_of_them_speaks(at_home: Path) -> None:
    (at_home / "task.py").write_text(TOGETHER)
    ended = torchrun("scan", "task.py:objective", "-c", "ckpts/*.pt", "--store", "run.db", *QUICK)
    assert ended.returncode == 0, ended.stderr[-3000:]
    assert ended.stdout.count("checkpoints measured") == 1
    assert "run.db, run 'scan of ckpts': 7 checkpoints measured" in ended.stdout
    assert len([line for line in ended.stderr.splitlines() if line.startswith("begins run")]) == 1
    assert steps_in(at_home / "run.db") == list(STEPS)
