"""A scan goes past what fails: it is told in one line, recorded once, and tried again next time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import STEPS, net, objective, quick, untrained
from torch import nn
from torch.nn import functional as F

from curvdiag import Objective, RunStore
from curvdiag.checkpoints import work
from curvdiag.checkpoints.load import load
from curvdiag.errors import ArgumentError, LossError, StoreError

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return untrained(tmp_path / "ckpts")


def events(run_file: Path, kind: str) -> list[str]:
    with RunStore(run_file, readonly=True) as store:
        return [event.message for event in store.events() if event.kind == kind]


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
    assert sum("both of step 4 and differ" in line for line in told) == 1
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
    for wrong in (-1, 1.5, True, 2**63):
        with pytest.raises(ArgumentError, match="a step is a whole number"):
            quick(folder, at=[wrong, 2, 3])


def test_a_step_that_no_run_file_holds_is_none(folder: Path) -> None:
    torch.save({"state_dict": net(1).state_dict(), "global_step": 2**63}, folder / "best.ckpt")
    (folder / "step=6.pt").rename(folder / f"step={2**63}.pt")
    result = quick(folder)
    assert result.measured == (2, 4)
    assert [failure.reason.partition(":")[0] for failure in result.failed] == [
        "best.ckpt does not tell its step",
        f"step={2**63}.pt does not tell its step",
    ]


def test_a_checkpoint_that_is_written_anew_while_it_is_read_is_not_taken_for_either(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_and_overwrite(model: nn.Module, weights: dict[str, Any]) -> None:
        load(model, weights)
        if weights["3.bias"].equal(net(4).state_dict()["3.bias"]):
            (folder / "new").write_bytes((folder / "step=6.pt").read_bytes())
            (folder / "new").replace(folder / "step=4.pt")

    monkeypatch.setattr(work, "load", load_and_overwrite)
    result = quick(folder)
    assert result.measured == (2, 6)
    assert [failure.reason for failure in result.failed] == ["step=4.pt was written anew while it was read"]
    assert quick(folder).measured == (4,)
