"""``curvdiag scaling`` measures a task of the user's own, and says in one line where that task is wrong."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
from scaling_results import scaling_result

from curvdiag.cli import main
from curvdiag.cli.scaling import finite
from curvdiag.objective import Objective

TASK = """
import torch
from torch import nn
from curvdiag import Objective
from helpers_of_the_task import WIDTH

def objective():
    torch.manual_seed(0)
    inputs = torch.randn(120, 6)
    model = nn.Sequential(nn.Linear(6, WIDTH, bias=False), nn.Tanh(), nn.Linear(WIDTH, 3))
    return Objective(model, nn.CrossEntropyLoss(), (inputs, inputs[:, :3].argmax(1)))

def with_argument(width):
    return objective()

def number():
    return 3

def nothing():
    pass

def fails():
    inputs = torch.randn(4, 6)
    return nn.Linear(5, 2)(inputs)

def calls_what_fails():
    return fails()

def refused():
    batch = torch.randn(4, 6), torch.tensor([0, 1, 1, 0])
    return Objective(nn.Linear(6, 2), nn.CrossEntropyLoss(reduction="sum"), batch)

def leaves():
    raise SystemExit("usage: train.py DATA")

not_a_function = 3
"""


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a task in it."""
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "helpers_of_the_task.py").write_text("WIDTH = 4\n")
    (tmp_path / "lacks.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "breaks.py").write_text("x = 1\n1 / 0\n")
    (tmp_path / "mistyped.py").write_text("def objective(:\n")
    monkeypatch.chdir(tmp_path)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What the command asks of the test; its answer is made up."""
    calls: list[Any] = []

    def scaling_test(objective: Objective, *arguments: Any, progress: Any, **options: Any) -> Any:
        progress(1, 2)
        calls.append((objective, arguments, options))
        return scaling_result(40, commutator_baseline=float("nan"))

    monkeypatch.setitem(sys.modules, "curvdiag.scaling.measure", SimpleNamespace(scaling_test=scaling_test))
    return calls


@pytest.fixture
def undrawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the figure, which takes most of the time."""
    command = importlib.import_module("curvdiag.cli.scaling")  # the package's own name for it is the command
    monkeypatch.setattr(command, "draw", lambda result, path: path)


@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("task", ["my_task:objective", "./my_task.py:objective", "{folder}/my_task.py:objective"])
def test_a_task_is_a_function_of_a_module_or_of_a_file(task: str, folder: Path, asked: list[Any]) -> None:
    path = list(sys.path)
    assert curvdiag("scaling", task.format(folder=folder)) == 0
    ((objective, arguments, options),) = asked
    assert isinstance(objective, Objective)
    assert objective.size == 120
    assert arguments == (None, "hessian", None)
    assert options == {"method": "auto", "seed": 0}
    assert sys.path == path


@pytest.mark.usefixtures("undrawn")
def test_a_file_elsewhere_finds_its_neighbours_and_may_have_the_name_of_a_module(
    folder: Path, asked: list[Any]
) -> None:
    (folder / "elsewhere").mkdir()
    (folder / "helpers_of_the_task.py").rename(folder / "elsewhere" / "helpers_of_the_task.py")
    (folder / "my_task.py").rename(folder / "elsewhere" / "json.py")
    assert curvdiag("scaling", "elsewhere/json.py:objective") == 0
    assert sys.modules["json"] is json


@pytest.mark.usefixtures("undrawn")
def test_the_options_reach_the_test(folder: Path, asked: list[Any]) -> None:
    options = ("--block", "0.*", "--basis", "parameter", "--directions", 9, "--method", "matrix-free", "--seed", 5)
    assert curvdiag("scaling", "my_task:objective", *options) == 0
    assert asked[0][1:] == (("0.*", "parameter", 9), {"method": "matrix-free", "seed": 5})


def test_the_figure_and_the_json_are_written_and_named(
    folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert curvdiag("scaling", "my_task:objective", "--seed", 3) == 0
    out = folder / "runs" / "scaling"
    assert {path.name for path in out.iterdir()} == {"scaling.png", "scaling.json"}
    picture = matplotlib.image.imread(out / "scaling.png")[..., :3]
    assert min(picture.shape[:2]) > 800
    assert picture.std() > 0.05
    text, err = capsys.readouterr()
    assert "superlinear" in text
    assert f"wrote {out / 'scaling.png'}" in text
    assert f"wrote {out / 'scaling.json'}" in text
    assert "wrote" not in err
    found = json.loads((out / "scaling.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} in JSON"))
    assert found["options"]["task"] == "my_task:objective"
    assert found["options"]["seed"] == 3
    assert torch.__version__.startswith(found["versions"]["torch"].split("+")[0])
    assert found["result"]["commutator_baseline"] is None
    assert found["result"]["verdict"]["word"] == "superlinear"
    np.testing.assert_allclose(found["result"]["held_out"]["curvature"], scaling_result(40).held_out.curvature)


def test_numbers_that_json_does_not_know_become_null() -> None:
    given = {"a": [1.0, float("nan"), [float("inf")]], "b": {"c": -float("inf"), "d": True}, "e": "nan", "f": None}
    assert finite(given) == {"a": [1.0, None, [None]], "b": {"c": None, "d": True}, "e": "nan", "f": None}


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("my_task", "MODULE:FUNCTION"),
        ("my_task:", "MODULE:FUNCTION"),
        (":objective", "MODULE:FUNCTION"),
        ("my task:objective", "not the name of a module"),
        ("my_tosk:objective", "there is no module 'my_tosk'"),
        ("my_task.inner:objective", "'my_task.inner'"),
        ("nowhere/my_task.py:objective", "there is no file nowhere/my_task.py"),
        ("my_task:objectiv", "no function 'objectiv'; it has objective"),
        ("my_task:not_a_function", "but it is not a function"),
        ("my_task:with_argument", "missing a required argument: 'width'"),
        ("my_task:number", "returned a builtins.int; a task returns a curvdiag.Objective"),
        ("my_task:nothing", "returned nothing"),
        ("my_task:fails", "my_task:fails failed with RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
        ("my_task:refused", "my_task:refused failed with LossError: "),
        ("my_task:leaves", "ended the program (sys.exit): usage: train.py DATA"),
        (
            "lacks:objective",
            "failed with ModuleNotFoundError: No module named 'not_installed_anywhere' (lacks.py, line 1)",
        ),
        ("breaks:objective", "importing breaks failed with ZeroDivisionError"),
        ("./breaks.py:objective", "ZeroDivisionError: division by zero (breaks.py, line 2)"),
        ("mistyped:objective", "(mistyped.py, line 1)"),
    ],
)
def test_what_is_wrong_with_a_task_is_one_line_and_exit_code_2(
    task: str, message: str, folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    assert curvdiag("scaling", task) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curvdiag: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not asked


def test_the_line_of_the_users_own_code_is_named_and_the_traceback_shown_if_asked(
    folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    line = 1 + TASK.splitlines().index("    return nn.Linear(5, 2)(inputs)")
    for task in ("my_task:fails", "my_task:calls_what_fails"):
        assert curvdiag("scaling", task) == 2
        err = capsys.readouterr().err
        assert f"(my_task.py, line {line})" in err
        assert "--traceback" in err
    assert curvdiag("scaling", "my_task:fails", "--traceback") == 2
    err = capsys.readouterr().err
    assert "Traceback (most recent call last)" in err
    assert "return nn.Linear(5, 2)(inputs)" in err
    assert err.splitlines()[-1].startswith("curvdiag: error: my_task:fails failed with RuntimeError")


def test_a_folder_that_cannot_be_made_is_told_before_the_work(
    folder: Path, asked: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "taken").write_text("")
    assert curvdiag("scaling", "my_task:objective", "--out", "taken") == 2
    assert "cannot make the folder taken" in capsys.readouterr().err
    assert not asked


def test_bad_usage_exits_with_2_and_help_names_a_task_to_try(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("scaling", "my_task:objective", "--basis", "pie") == 2
    assert "Traceback" not in capsys.readouterr().err
    assert curvdiag("scaling", "--help") == 0
    assert "curvdiag.experiments.digits:objective" in " ".join(capsys.readouterr().out.replace("│", "").split())


def test_the_ready_task_is_a_trained_net_and_the_same_each_time() -> None:
    pytest.importorskip("sklearn")
    from curvdiag.experiments.digits import digits, objective

    state = torch.get_rng_state()
    one, two = objective(), objective()
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True):
        assert torch.equal(a, b)
    images, classes = digits()
    assert one.size == len(classes) == 1797
    with torch.no_grad():
        assert float((one.model(images).argmax(1) == classes).float().mean()) > 0.97


def test_the_command_as_installed_measures_a_task_in_the_current_folder(folder: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curvdiag.cli", "scaling", "my_task:objective", "--block", "0.weight", "--out", "here"],
        capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=200,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "here" / "scaling.json").read_text())["result"]
    assert found["size"] == 24
    assert found["samples"] == 120
    assert found["verdict"]["word"] in done.stdout
    assert (folder / "here" / "scaling.png").stat().st_size > 20_000
    assert not done.stderr
