"""A scan gives what the monitor would have measured, and goes on where it stopped."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import (
    QUICK,
    STEPS,
    assert_same_densities,
    curvature,
    data,
    net,
    numbers,
    objective,
    quick,
    state_dicts,
    train,
    untrained,
)
from torch import nn
from torch.nn import functional as F

from curvdiag import Objective, RunStore
from curvdiag.checkpoints import scan

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return untrained(tmp_path / "ckpts")


# The same numbers as in the training


@pytest.mark.parametrize("options", [{"preset": "standard"}, {"preset": "full"}, {"measure": ["lambda_max", "layers"]}])
def test_a_scan_measures_bit_for_bit_what_the_monitor_measured_in_the_training(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    train(tmp_path / "live.db", state_dicts(tmp_path / "ckpts"), **options)
    result = scan(objective(), str(tmp_path / "ckpts" / "*.pt"), tmp_path / "scan.db", **QUICK, **options)
    assert result.measured == STEPS
    live, after = curvature(tmp_path / "live.db"), numbers(tmp_path / "scan.db")
    assert after == live
    assert all(set(values) == set(STEPS) for values in after.values())
    assert len(set(after["curv/hessian/lambda_max"].values())) == len(STEPS)
    if "preset" in options:
        assert_same_densities(tmp_path / "live.db", tmp_path / "scan.db")


def test_rates_and_epochs_come_from_the_checkpoint(tmp_path: Path) -> None:
    def save(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
        whole = {"model_state_dict": model.state_dict(), "optimizer_state_dict": optimizer.state_dict()}
        torch.save({**whole, "global_step": step, "epoch": step / 4}, tmp_path / f"net{step}.pt")

    train(tmp_path / "live.db", save, preset="light")
    scan(objective(), str(tmp_path / "*.pt"), tmp_path / "scan.db", preset="light", **QUICK)
    assert numbers(tmp_path / "scan.db") == numbers(tmp_path / "live.db")
    assert numbers(tmp_path / "scan.db")["train/lr/0"] == dict.fromkeys(STEPS, 0.2)
    with RunStore(tmp_path / "scan.db", readonly=True) as store:
        assert store.scalars("curv/hessian/trace").epochs.tolist() == [0.5, 1.0, 1.5]


def test_a_checkpoint_in_another_precision_is_cast_to_the_models(tmp_path: Path) -> None:
    trained = net(3)
    torch.save(
        {k: v.double() if v.is_floating_point() else v for k, v in trained.state_dict().items()}, tmp_path / "step1.pt"
    )
    torch.save(trained.state_dict(), tmp_path / "step2.pt")
    quick(tmp_path, paths=str(tmp_path / "*.pt"), name="a")
    found = curvature(tmp_path.parent / "run.db", "a")
    assert found["curv/hessian/trace"][1] == found["curv/hessian/trace"][2]


def test_the_model_leaves_with_the_bits_with_which_it_came(folder: Path) -> None:
    (folder / "step=5.pt").write_bytes(b"broken")
    torch.save({**net(1).state_dict(), "3.weight": torch.ones(2, 2)}, folder / "step=7.pt")
    watched = objective()
    before = {name: tensor.clone() for name, tensor in watched.model.state_dict().items()}
    identities = [id(parameter) for parameter in watched.model.parameters()]
    watched.model.train()
    quick(folder, objective=watched)
    with pytest.raises(KeyboardInterrupt):
        quick(folder, objective=watched, again=True, progress=interrupt_after(1))
    assert all(torch.equal(tensor, before[name]) for name, tensor in watched.model.state_dict().items())
    assert identities == [id(parameter) for parameter in watched.model.parameters()]
    assert all(module.training for module in watched.model.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in watched.model.parameters())


# Going on


def interrupt_after(count: int) -> Any:
    def progress(done: int, total: int) -> None:
        if done == count:
            raise KeyboardInterrupt

    return progress


def test_a_scan_goes_on_where_it_stopped_and_again_measures_anew(folder: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        quick(folder, progress=interrupt_after(2))
    told: list[str] = []
    seen: list[tuple[int, int]] = []
    second = quick(folder, tell=told.append, progress=lambda *counts: seen.append(counts))
    assert (second.held, second.measured, second.failed) == ((2, 4), (6,), ())
    assert seen == [(0, 1), (1, 1)]
    assert "continues run 'scan of ckpts'" in told[0]
    third = quick(folder)
    assert (third.held, third.measured) == (STEPS, ())
    assert quick(folder, again=True).measured == STEPS
    assert "1 checkpoints measured, 2 there already" in str(second)
    with RunStore(folder.parent / "run.db", readonly=True) as store:
        assert len(store.runs()) == 1


KILLED = """
import os, signal, sys
sys.path.insert(0, {tests!r})
from checkpointed import Path, quick
quick(Path({folder!r}), progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL) if done == 2 else None)
"""


def test_a_killed_scan_goes_on(folder: Path) -> None:
    script = KILLED.format(tests=str(Path(__file__).parent), folder=str(folder))
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=200)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    result = quick(folder)
    assert (result.held, result.measured) == ((2, 4), (6,))
    assert set(curvature(folder.parent / "run.db")["curv/hessian/trace"]) == set(STEPS)


def test_a_checkpoint_written_anew_is_measured_again(folder: Path) -> None:
    quick(folder)
    before = curvature(folder.parent / "run.db")["curv/hessian/trace"]
    torch.save(net(33).state_dict(), folder / "step=4.pt")
    os.utime(folder / "step=4.pt", (time.time() + 5, time.time() + 5))
    told: list[str] = []
    result = quick(folder, tell=told.append)
    assert (result.held, result.measured) == ((2, 6), (4,))
    assert any("step=4.pt is not what step 4 was measured from" in line for line in told)
    after = curvature(folder.parent / "run.db")["curv/hessian/trace"]
    assert {step for step in STEPS if before[step] != after[step]} == {4}


def test_other_settings_another_folder_and_another_name_begin_another_run(folder: Path, tmp_path: Path) -> None:
    quick(folder)
    assert quick(folder, seed=1).measured == STEPS
    assert quick(folder, name="mine").measured == STEPS
    (tmp_path / "b").mkdir()
    folder.rename(tmp_path / "b" / "ckpts")
    moved = scan(objective(), tmp_path / "b" / "ckpts", tmp_path / "run.db", measure=["trace"], **QUICK)
    assert moved.measured == STEPS
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert [run.name for run in store.runs()] == ["scan of ckpts", "scan of ckpts", "mine", "scan of ckpts"]
        config = store.run(1).config
    assert config["curvdiag"]["objective"] == repr(objective())
    assert config["curvdiag"]["measure"] == ["trace"]
    assert config["checkpoints"]["folder"] == str(folder)


def test_other_data_or_another_loss_begin_another_run(folder: Path) -> None:
    """Where all else is alike, numbers of one must not pass for those of the other."""
    (inputs, targets), model = data(), net(9)
    told: list[str] = []
    assert quick(folder).measured == STEPS
    others = [
        Objective(model, F.cross_entropy, (inputs, targets.roll(1))),
        Objective(model, nn.CrossEntropyLoss(label_smoothing=0.1), (inputs, targets)),
        Objective(model, nn.CrossEntropyLoss(label_smoothing=0.2), (inputs, targets)),
        Objective(model, functools.partial(F.cross_entropy, label_smoothing=0.3), (inputs, targets)),
    ]
    for other in others:
        assert quick(folder, objective=other, tell=told.append).measured == STEPS
        assert quick(folder, objective=other).held == STEPS
    begun = [line for line in told if line.startswith("begins run 'scan of ckpts' anew, since run ")]
    assert [line.partition(" of this name ")[2] for line in begun] == [
        f"differs in data or loss, of {folder.parent / 'run.db'}"
    ] * len(others)
