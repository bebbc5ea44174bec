"""A scan gives what the monitor would have measured, goes on where it stopped, and goes past what fails."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import QUICK, STEPS, assert_same_densities, curvature, net, numbers, objective, state_dicts, train
from torch import nn
from torch.nn import functional as F

from curvdiag import Objective, RunStore
from curvdiag.checkpoints import Scan, scan
from curvdiag.errors import ArgumentError, LossError, StoreError

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Checkpoints of a run that was not watched; what they hold does not matter."""
    save = state_dicts(tmp_path / "ckpts")
    for step in STEPS:
        save(net(step), torch.optim.SGD([torch.zeros(1)]), step)
    return tmp_path / "ckpts"


def quick(where: Path, **options: Any) -> Scan:
    """A cheap scan of a folder into the run file beside it."""
    made = options.pop("objective", None) or objective()
    return scan(
        made, options.pop("paths", where), where.parent / "run.db", **{"measure": ["trace"], **QUICK, **options}
    )


def events(run_file: Path, kind: str) -> list[str]:
    with RunStore(run_file, readonly=True) as store:
        return [event.message for event in store.events() if event.kind == kind]


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
from test_scan import Path, quick
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


# Past what fails


def test_what_is_broken_is_told_in_one_line_recorded_once_and_the_rest_is_measured(folder: Path) -> None:
    (folder / "notes.pt").write_text("learning rate 0.2")
    (folder / "step=3.pt").write_bytes((folder / "step=4.pt").read_bytes()[:700])
    torch.save(net(1), folder / "step=8.pt")
    torch.save(nn.Linear(4, 6).state_dict(), folder / "step=10.pt")
    torch.save({**net(1).state_dict(), "0.bias": torch.full((6,), torch.nan)}, folder / "step=12.pt")
    torch.save({"step": 3, "loss": 0.1}, folder / "step=14.pt")
    told: list[str] = []
    result = quick(folder, tell=told.append)
    assert result.measured == STEPS
    reasons = {Path(failure.path).name: failure.reason for failure in result.failed}
    assert list(reasons) == ["notes.pt", "step=3.pt", "step=8.pt", "step=10.pt", "step=12.pt", "step=14.pt"]
    wanted = {
        "notes.pt": "is no checkpoint",
        "step=3.pt": "is cut off or damaged",
        "step=8.pt": "torch.nn.modules.container.Sequential",
        "step=10.pt": "does not fit the model",
        "step=12.pt": "NonFiniteError",
        "step=14.pt": "holds no weights by name; it holds 'step', 'loss'",
    }
    for name, words in wanted.items():
        assert words in reasons[name]
        assert reasons[name].startswith(name)
        assert told.count(reasons[name]) == 1
        assert "\n" not in reasons[name]
    assert set(events(folder.parent / "run.db", "error")) == set(reasons.values())
    again = quick(folder)
    assert (again.held, len(again.failed)) == (STEPS, 6)
    assert len(events(folder.parent / "run.db", "error")) == 6
    torch.save(net(7).state_dict(), folder / "step=3.pt")
    assert quick(folder).measured == (3,)


def test_a_quantity_that_fails_leaves_the_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curvdiag.monitor import quantities

    def fails(work: object) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(quantities.QUANTITIES, "layers", fails)
    told: list[str] = []
    result = quick(folder, measure=["trace", "layers"], tell=told.append)
    assert (result.measured, result.failed) == (STEPS, ())
    assert told.count("step=2.pt, step 2: layers: RuntimeError: no luck") == 1
    assert len(events(folder.parent / "run.db", "error")) == len(STEPS)


def test_two_checkpoints_of_one_step_are_one_if_alike_and_none_if_not(folder: Path) -> None:
    state = torch.load(folder / "step=6.pt", weights_only=True)
    torch.save({"state_dict": state, "global_step": 6}, folder / "last.ckpt")
    torch.save({"state_dict": net(44).state_dict(), "global_step": 4}, folder / "best.ckpt")
    told: list[str] = []
    result = quick(folder, tell=told.append)
    assert result.measured == (2, 6)
    assert "last.ckpt and step=6.pt are the same weights of step 6; they are measured once" in told
    assert [Path(failure.path).name for failure in result.failed] == ["best.ckpt", "step=4.pt"]
    assert all("both of step 4 and differ" in failure.reason for failure in result.failed)
    (folder / "best.ckpt").unlink()
    torch.save(nn.Linear(2, 2).state_dict(), folder / "critic_step4.pt")
    result = quick(folder)
    assert result.measured == (4,)
    assert len(result.failed) == 1
    assert result.failed[0].reason.startswith("critic_step4.pt does not fit the model")


def test_a_checkpoint_that_is_deleted_meanwhile_is_a_line(folder: Path) -> None:
    def delete(done: int, total: int) -> None:
        (folder / "step=4.pt").unlink(missing_ok=True)

    result = quick(folder, progress=delete)
    assert result.measured == (2, 6)
    assert [failure.reason for failure in result.failed] == [
        f"step=4.pt: FileNotFoundError: [Errno 2] No such file or directory: '{folder / 'step=4.pt'}'"
    ]


def test_what_cannot_begin_is_refused_before_a_run_file_is_made(folder: Path) -> None:
    for options, error, words in (
        ({"paths": str(folder / "*.bin")}, ArgumentError, "no file or folder matches"),
        ({"at": [1, 2]}, ArgumentError, "2 steps are given for 3 checkpoints"),
        ({"measure": ["preconditioned_lambda_max"]}, ArgumentError, "attach(optimizer)"),
        ({"measure": ["lambda"]}, ArgumentError, "lambda_max"),
    ):
        with pytest.raises(error, match=words.replace("(", r"\(").replace(")", r"\)")):
            quick(folder, **options)
    mean = Objective.from_loss(
        net(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch=objective().batches[0]
    )
    with pytest.raises(LossError, match="noise_scale needs the loss of each sample"):
        quick(folder, objective=mean, measure=["noise_scale"])
    assert not (folder.parent / "run.db").exists()
    (folder.parent / "run.db").write_text("no database " * 100)
    with pytest.raises(StoreError, match="not a run file"):
        quick(folder)


def test_steps_may_be_given(folder: Path) -> None:
    assert quick(folder, at=[10, 200, 3000]).measured == (10, 200, 3000)
