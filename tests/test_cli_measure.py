"""``curvdiag measure`` prints one measurement; ``export`` and ``runs`` give machines what a run file holds."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import QUICK, data, net, objective
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Estimate, Objective, RunStore
from curvdiag.cli import main
from curvdiag.spectrum.density import SpectralDensity

TASK = """
from checkpointed import net, data, objective
from curvdiag import Objective
from torch.nn import functional as F

def mean():
    return Objective.from_loss(net(), lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]), batch=data())
"""
FEW = ("--lanczos-steps", str(QUICK["steps"]), "--probes", str(QUICK["probes"]))


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "my_task.py").write_text(TASK)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if "my_task" in name]:
        del sys.modules[name]


def monitored(**options: object) -> dict[str, object]:
    """What a monitor measures of the same objective."""
    monitor = CurvatureMonitor(objective(), **{**QUICK, **options})  # type: ignore[arg-type]
    found = monitor.measure()
    assert found is not None
    return {k: v for k, v in found.scalars.items() if not k.startswith(("curv/cost/", "curv/overhead"))}


def test_a_measurement_is_a_table_with_errors_of_each_number(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("measure", "my_task:objective", *FEW) == 0
    rows = {words[0]: words[1:] for words in map(str.split, capsys.readouterr().out.splitlines()) if words}
    wanted = monitored()
    assert wanted.keys() <= rows.keys()
    for name, value in wanted.items():
        assert rows[name][0] == f"{float(value):.6g}"  # type: ignore[arg-type]
    trace = wanted["curv/hessian/trace"]
    assert isinstance(trace, Estimate)
    assert rows["curv/hessian/trace"][1] == f"{trace.standard_error:.2g}"
    assert len(rows["curv/hessian/lambda_max"]) == 1


def test_json_holds_the_numbers_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("measure", "my_task.py:objective", "--json", "--preset", "standard", *FEW) == 0
    found = json.loads(capsys.readouterr().out)
    for name, value in monitored().items():
        if isinstance(value, Estimate):
            assert found["scalars"][name] == {
                "value": value.value, "standard_error": value.standard_error, "samples": value.samples,
            }  # fmt: skip
        else:
            assert found["scalars"][name] == value
    (density,) = found["densities"]
    assert (density["operator"], density["block"], density["size"]) == ("hessian", "", objective().parameters.size)
    assert np.array(density["nodes"]).shape == np.array(density["weights"]).shape
    assert found["settings"]["steps"] == QUICK["steps"]
    assert found["step"] is None
    assert found["failures"] == {}


def test_it_measures_at_the_weights_of_a_checkpoint(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"state_dict": net(4).state_dict(), "global_step": 12, "epoch": 2}, folder / "a.ckpt")
    words = ("--measure", "trace", "--checkpoint", "a.ckpt", "--json", *FEW)
    assert curvdiag("measure", "my_task:objective", *words) == 0
    found = json.loads(capsys.readouterr().out)
    with CurvatureMonitor(Objective(net(4), F.cross_entropy, data()), measure=["trace"], **QUICK) as monitor:
        wanted = monitor.measure()
    assert wanted is not None
    assert found["scalars"]["curv/hessian/trace"]["value"] == wanted["curv/hessian/trace"]
    assert (found["step"], found["epoch"]) == (12, 2)


def test_what_cannot_be_measured_is_said(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert curvdiag("measure", "my_task:mean", "--preset", "full", *FEW) == 0
    assert "left out: noise_scale, noise_trace, cwgd, alignment need the loss" in capsys.readouterr().out
    assert curvdiag("measure", "my_task:mean", "--measure", "cwgd") == 2
    assert "cwgd needs the loss of each sample" in capsys.readouterr().err
    assert curvdiag("measure", "my_task:objective", "-c", "none.pt") == 2
    assert "error: none.pt cannot be read: No such file" in capsys.readouterr().err
    from curvdiag.monitor import quantities

    def fails(work: object) -> None:
        raise RuntimeError("no\nluck")

    monkeypatch.setitem(quantities.QUANTITIES, "layers", fails)
    words = ("--measure", "trace", "--measure", "layers", *FEW)
    assert curvdiag("measure", "my_task:objective", *words) == 1
    assert "layers failed: RuntimeError: no luck" in " ".join(capsys.readouterr().out.split())
    assert curvdiag("measure", "my_task:objective", "--json", *words) == 1
    out, err = capsys.readouterr()
    assert json.loads(out)["failures"] == {"layers": "RuntimeError: no\nluck"}
    assert err == "layers failed: RuntimeError: no luck\n"


# What a run file holds


@pytest.fixture
def filled(folder: Path) -> Path:
    density = SpectralDensity(np.array([[1.0, 2.0]]), np.array([[0.5, 0.5]]), 7, steps=2, matvecs=2)
    with RunStore(folder / "run.db") as store:
        store.new_run("[red]one", {"lr": 0.1}).record(1, {"a": float("nan")})
        run = store.new_run("two")
        run.record(5, {"a": Estimate(2.0, 0.5, 3), "b": 1.0}, {("hessian", "fc"): density}, epoch=0.5)
        run.record(10, {"a": 3.0}, events=[("error", "went [bold]wrong"), ("note", "as planned")])
    return folder / "run.db"


def test_a_run_is_exported_as_json_with_everything(filled: Path, folder: Path) -> None:
    assert curvdiag("export", filled, "-o", folder / "out.json") == 0
    found = json.loads((folder / "out.json").read_text())
    assert found["run"]["name"] == "two"
    assert found["scalars"]["a"]["steps"] == [5, 10]
    assert found["scalars"]["a"]["values"] == [2.0, 3.0]
    assert found["scalars"]["a"]["standard_errors"] == [0.5, None]
    assert found["scalars"]["a"]["epochs"] == [0.5, None]
    (series,) = found["densities"]
    assert (series["operator"], series["block"], series["steps"]) == ("hessian", "fc", [5])
    assert series["densities"][0]["nodes"] == [[1.0, 2.0]]
    assert [event["message"] for event in found["events"]] == ["went [bold]wrong", "as planned"]
    assert curvdiag("export", filled, "-o", folder / "one.json", "--run", "1") == 0
    one = json.loads((folder / "one.json").read_text())
    assert one["run"]["config"] == {"lr": 0.1}
    assert one["scalars"]["a"]["values"] == [None]


def test_runs_and_events_are_listed_as_they_are_named(filled: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("runs", filled) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[:2] == ["1", "[red]one"]
    assert lines[3].split()[-5:-1] == ["2", "10", "1", "hessian"]
    assert curvdiag("runs", filled, "--events") == 0
    assert "went [bold]wrong" in capsys.readouterr().out
    assert curvdiag("runs", filled, "--events", "--run", "1") == 0
    assert "wrong" not in capsys.readouterr().out
    assert curvdiag("runs", filled, "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert [(run["name"], run["measurements"], run["last_step"]) for run in found] == [
        ("[red]one", 1, 1),
        ("two", 2, 10),
    ]
    assert found[1]["events"][0]["kind"] == "error"
    assert curvdiag("runs", filled, "--run", "three") == 2
