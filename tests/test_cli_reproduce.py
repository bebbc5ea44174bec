"""``curvdiag reproduce`` lists the experiments with their times and runs them."""

from __future__ import annotations

import importlib
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.image
import pytest

from curvdiag.cli import main
from curvdiag.cli.reproduce import EXPERIMENTS, about
from curvdiag.experiments.datasets import data_folder
from curvdiag.experiments.saved import rounded, save


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


def test_without_a_name_each_experiment_has_a_line_with_its_time(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("reproduce") == 0
    lines = capsys.readouterr().out.splitlines()
    for name, line in zip(EXPERIMENTS, lines, strict=False):
        assert line.split()[0] == name
        assert about(name).time in line
        assert about(name).summary in line
    assert "2 CPU cores" in lines[-1]


def test_the_help_has_times_and_what_each_experiment_says_of_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("reproduce", "--help") == 0
    shown = " ".join(capsys.readouterr().out.split())
    for name in EXPERIMENTS:
        one = about(name)
        assert f"{name} ({one.time}): " in shown
        assert " ".join(one.summary.replace("``", "`").split()) in shown
        assert one.text.replace("``", "`")[-40:] in shown


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_read_from_the_source_is_what_the_module_says(name: str) -> None:
    module: Any = importlib.import_module(f"curvdiag.experiments.{name}")
    one = about(name)
    assert one.minutes == module.MINUTES > 0
    assert f"{one.summary} {one.text}".strip() == " ".join(str(module.__doc__).split())
    assert one.summary.endswith((".", "?"))
    signature = inspect.signature(module.reproduce)
    assert list(signature.parameters) == ["out", "seed", "quick", "progress"]


def test_help_imports_no_experiment() -> None:
    code = (
        "import sys\nfrom curvdiag.cli import main\n"
        "for arguments in (['reproduce'], ['reproduce', '--help']):\n"
        "    try: main(arguments)\n    except SystemExit: pass\n"
        "loaded = [m for m in sys.modules if m.startswith('curvdiag.experiments.')]\n"
        "print('LOADED', loaded, 'matplotlib' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("LOADED [] False")


@pytest.mark.parametrize(("wrong", "meant"), [("geometri", "geometry"), ("CWGD", "cwgd"), ("lp-norm", "lpnorm")])
def test_a_wrong_name_gets_a_suggestion(wrong: str, meant: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("reproduce", wrong) == 2
    error = capsys.readouterr().err
    assert f"did you mean {meant!r}?" in error
    assert all(name in error for name in EXPERIMENTS)
    assert curvdiag("reproduce", "zzz") == 2
    assert "did you mean" not in capsys.readouterr().err


@pytest.fixture
def never(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Catches what the command would run."""
    calls: list[dict[str, Any]] = []

    def run(out: Path, **options: Any) -> list[Path]:
        calls.append({"out": out, **options})
        options["progress"]("half way")
        return [out / "geometry.png"]

    monkeypatch.setitem(sys.modules, "curvdiag.experiments.geometry", SimpleNamespace(reproduce=run))
    return calls


def test_options_reach_the_experiment_and_its_progress_is_shown(
    never: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert curvdiag("reproduce", "geometry", "--out", "here", "--seed", 7) == 0
    shown = capsys.readouterr().out.splitlines()
    assert shown == [f"geometry: about {about('geometry').time} on 2 CPU cores", "half way", "wrote here/geometry.png"]
    assert curvdiag("reproduce", "geometry") == 0
    assert curvdiag("reproduce", "geometry", "--quick") == 0
    found = [(call["out"], call["seed"], call["quick"]) for call in never]
    # A quick run does not take the place of the real figures.
    assert found == [(Path("here"), 7, False), (Path("figures"), 0, False), (Path("runs/quick"), 0, True)]
    assert Path("here").is_dir()


@pytest.mark.parametrize("kind", ["file", "read-only"])
def test_a_folder_that_cannot_be_written_into_is_refused_before_the_work(
    kind: str, never: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "target"
    if kind == "file":
        target.write_text("in the way")
    else:
        if os.geteuid() == 0:
            pytest.skip("root may write anywhere")
        target.mkdir(mode=0o500)
    assert curvdiag("reproduce", "geometry", "--out", target) == 2
    error = capsys.readouterr().err
    assert error.startswith("curvdiag: error: cannot")
    assert str(target) in error
    assert not never


@pytest.mark.parametrize("name", ["mixing", "calibration", "superlinear"])
def test_the_experiments_run_quickly_and_leave_a_picture_and_numbers(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name == "superlinear" and (data_folder() is None or not (data_folder() / "mnist").is_dir()):
        pytest.skip("CURVDIAG_DATA names no folder with MNIST")
    assert curvdiag("reproduce", name, "--quick", "--out", tmp_path, "--seed", 5) == 0
    assert capsys.readouterr().out.count("wrote ") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{name}.json", f"{name}.png"]
    assert matplotlib.image.imread(tmp_path / f"{name}.png")[..., :3].std() > 0.03
    whole = json.loads((tmp_path / f"{name}.json").read_text())
    assert (whole["experiment"], whole["seed"], whole["options"]["quick"]) == (name, 5, True)
    assert {"versions", "seconds"} <= set(whole)
    assert whole["results"]


def test_without_the_data_superlinear_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CURVDIAG_DATA", raising=False)
    assert curvdiag("reproduce", "superlinear", "--quick", "--out", tmp_path) == 2
    assert "CURVDIAG_DATA" in capsys.readouterr().err


def test_saved_numbers_are_rounded_and_json_knows_them_all(tmp_path: Path) -> None:
    from matplotlib.figure import Figure

    results = {2.0: (1 / 3, float("inf")), "words": ["a", True, None, float("nan")], "n": 12345678}
    assert rounded(results, 3) == {
        "2.0": [0.333, float("inf")],
        "words": ["a", True, None, pytest.approx(float("nan"), nan_ok=True)],
        "n": 12345678,
    }
    options = {"options": {"a": 1}, "seed": 0, "seconds": 1.25}
    _, path = save("x", tmp_path, Figure(), results | {"list": [1.0, -2e-9, 3.0]}, **options)
    text = path.read_text()
    assert "[ 1.0, -2e-09, 3.0 ]" in text
    whole = json.loads(text)
    assert whole["results"]["2.0"] == [0.333333, None]
    assert whole["results"]["words"] == ["a", True, None, None]
    assert whole["results"]["n"] == 12345678
