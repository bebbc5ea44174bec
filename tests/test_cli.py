"""The command line draws and exports runs, and says in one line what it cannot do."""

from __future__ import annotations

import csv
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import matplotlib.image
import numpy as np
import pytest

from curvdiag import cli
from curvdiag.cli import main
from curvdiag.estimate import Estimate
from curvdiag.record import RunStore, Series
from curvdiag.spectrum.density import SpectralDensity

STEPS = (1, 10, 100)


def density(seed: int) -> SpectralDensity:
    nodes = np.random.default_rng(seed).standard_normal((3, 10)) + seed
    return SpectralDensity(nodes, np.full(nodes.shape, 0.1), 500, steps=10, matvecs=30)


def fill(store: RunStore) -> None:
    for name in ("first", "second"):
        run = store.new_run(name)
        for step in STEPS:
            scalars: dict[str, Estimate | float] = {
                "curv/hessian/lambda_max": step + (name == "second"),
                "curv/hessian/trace": Estimate(float(step), 1.0, 4),
                "curv/layer/a/trace": 1.0,
                "curv/layer/b/trace": 2.0,
            }
            run.record(step, scalars, {("hessian", ""): density(step), ("hessian", "conv.1"): density(2)})
        run.record(200, events=[("error", "went wrong")])


@pytest.fixture
def live(tmp_path: Path) -> Iterator[Path]:
    """A run file that its writer has open."""
    with RunStore(tmp_path / "run.db") as store:
        fill(store)
        yield tmp_path / "run.db"


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


@pytest.mark.parametrize("kind", ["heatmap", "density", "scalars"])
def test_each_picture_is_drawn_while_the_run_is_written(live: Path, kind: str, tmp_path: Path) -> None:
    assert curvdiag("plot", live, kind, "-o", tmp_path / "out.png") == 0
    picture = matplotlib.image.imread(tmp_path / "out.png")[..., :3]
    assert min(picture.shape[:2]) > 400
    assert picture.std() > 0.05
    assert not list(tmp_path.glob("*.part"))


def test_a_heatmap_of_one_measurement_says_how_to_have_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunStore(tmp_path / "run.db") as store:
        run = store.new_run("short")
        run.record(1, densities={("hessian", ""): density(1)})
        assert curvdiag("plot", tmp_path / "run.db", "heatmap") == 0
        assert "every=" in capsys.readouterr().err
        run.record(2, densities={("hessian", ""): density(2)})
        assert curvdiag("plot", tmp_path / "run.db", "heatmap") == 0
        assert capsys.readouterr().err == ""


@pytest.mark.parametrize("ending", ["pdf", "svg", "PNG"])
def test_the_ending_of_the_name_says_the_format(live: Path, ending: str, tmp_path: Path) -> None:
    assert curvdiag("plot", live, "heatmap", "-o", tmp_path / f"out.{ending}") == 0
    assert ending.lower().encode() in (tmp_path / f"out.{ending}").read_bytes()[:500].lower()


def test_without_a_name_the_picture_lies_beside_the_run_file(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = {
        ("heatmap",): "run-heatmap-hessian.png",
        ("heatmap", "--block", "conv.1", "--scale", "symlog"): "run-heatmap-hessian-conv.1.png",
        ("density",): "run-density-hessian-step100.png",
        ("density", "--step", "12", "--run", "1"): "run-density-hessian-step10.png",
        ("scalars", "--run", "first"): "run-scalars.png",
    }
    for arguments, name in wanted.items():
        assert curvdiag("plot", live, *arguments) == 0
        assert str(live.with_name(name)) in capsys.readouterr().out
        assert live.with_name(name).exists()


def test_a_step_without_a_measurement_takes_the_nearest_and_says_so(
    live: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert curvdiag("plot", live, "density", "--step", "12") == 0
    assert "nearest, step 10" in capsys.readouterr().err


def test_the_run_and_the_scalars_asked_for_are_drawn(live: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from curvdiag import plotting

    drawn: list[Series] = []
    scalars = plotting.scalars
    monkeypatch.setattr(plotting, "scalars", lambda one, *a, **k: (drawn.append(one), scalars(one, *a, **k))[1])

    def names(*arguments: str) -> list[str]:
        drawn.clear()
        assert curvdiag("plot", live, "scalars", *arguments) == 0
        return [one.name for one in drawn]

    assert names() == ["curv/hessian/lambda_max", "curv/hessian/trace"]
    assert drawn[0].values.tolist() == [2, 11, 101]
    assert names("--names", "curv/layer/*", "--run", "first") == ["curv/layer/a/trace", "curv/layer/b/trace"]
    assert names("--names", "curv/hessian/trace", "--names", "*/lambda_max", "--run", "1") == [
        "curv/hessian/trace",
        "curv/hessian/lambda_max",
    ]
    assert drawn[1].values.tolist() == [1, 10, 100]


@pytest.mark.parametrize("kind", ["heatmap", "density", "scalars"])
def test_a_run_begun_meanwhile_does_not_lend_its_numbers_to_another_runs_picture(
    live: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from curvdiag import plotting

    plot = importlib.import_module("curvdiag.cli.plot")  # the package's own name for it is the command
    run, save = RunStore.run, plot.save
    drawn: list[Any] = []
    titles: list[str] = []

    def found_and_overtaken(store: RunStore, key: Any = None) -> Any:
        info = run(store, key)
        with RunStore(live) as writer:
            writer.new_run("third").record(100, {"curv/hessian/lambda_max": -9.0}, {("hessian", ""): density(7)})
        return info

    monkeypatch.setattr(RunStore, "run", found_and_overtaken)
    function = getattr(plotting, kind)
    monkeypatch.setattr(plotting, kind, lambda one, *a, **k: (drawn.append(one), function(one, *a, **k))[1])
    monkeypatch.setattr(
        plot, "save", lambda figure, path: (titles.append(figure.axes[0].get_title()), save(figure, path))[1]
    )
    assert curvdiag("plot", live, kind) == 0
    assert "second" in titles[0]
    if kind == "scalars":
        assert drawn[0].values.tolist() == [2, 11, 101]
    else:
        last = drawn[0] if kind == "density" else drawn[0].densities[-1]
        np.testing.assert_array_equal(last.nodes, density(100).nodes)


def test_runs_are_listed(live: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("runs", live) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in ("first", "second"):
        row = next(line.split() for line in lines if name in line)
        assert {"3", "100", "1", "hessian"} <= set(row)


def test_a_run_is_exported(live: Path, tmp_path: Path) -> None:
    assert curvdiag("export", live, "-o", tmp_path / "a.csv", "--run", "first") == 0
    with (tmp_path / "a.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["run_name"] for row in rows} == {"first"}
    assert len(rows) == 4 * len(STEPS)
    assert curvdiag("export", live, "-o", tmp_path / "b.CSV", "--run", "first") == 0
    assert (tmp_path / "b.CSV").read_bytes() == (tmp_path / "a.csv").read_bytes()
    assert curvdiag("export", live, "-o", tmp_path / "a.npz") == 0
    with np.load(tmp_path / "a.npz") as arrays:
        np.testing.assert_array_equal(arrays["densities/hessian//nodes"][1], density(10).nodes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("plot", "missing.db", "heatmap"), "there is no run file"),
        (("plot", "text.db", "heatmap"), "not a run file"),
        (("runs", "."), "is a folder"),
        (("plot", "run.db", "heatmap", "--operator", "fisher"), "holds no densities of 'fisher'"),
        (("plot", "run.db", "density", "--block", "conv"), "block 'conv'"),
        (("plot", "run.db", "heatmap", "--run", "third"), "there is no run 'third'"),
        (("plot", "run.db", "scalars", "--names", "nothing"), "no scalar 'nothing'"),
        (("plot", "run.db", "heatmap", "--time", "epochs"), "steps"),
        (("plot", "run.db", "heatmap", "-o", "out.txt"), "ends in one of"),
        (("plot", "run.db", "heatmap", "-o", "nowhere/out.png"), "cannot write"),
        (("export", "run.db", "-o", "out.xls"), "ends in .csv or .npz"),
    ],
)
def test_what_cannot_be_done_is_one_line_on_stderr_and_exit_code_2(
    live: Path,
    arguments: tuple[str, ...],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(live.parent)
    Path("text.db").write_text("no database " * 200)
    assert curvdiag(*arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curvdiag: error: ")
    assert message in err
    assert err.count("\n") == 1


def test_an_empty_file_of_runs_is_no_accident(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with RunStore(tmp_path / "run.db") as store:
        assert curvdiag("runs", store.path) == 0
        assert "no runs yet" in capsys.readouterr().out
        assert curvdiag("plot", store.path, "heatmap") == 2
        assert "holds no run yet" in capsys.readouterr().err
        store.new_run("a")
        assert curvdiag("plot", store.path, "scalars") == 2
        assert "no scalars yet" in capsys.readouterr().err


def test_help_names_every_command_and_bad_usage_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("--help") == 0
    text = capsys.readouterr().out
    assert all(command in text for command in ("plot", "runs", "export"))
    for command in ("plot", "runs", "export"):
        assert curvdiag(command, "--help") == 0
        assert "RUN.db" in capsys.readouterr().out
    assert curvdiag("plot", "run.db", "pie") == 2
    assert "Traceback" not in capsys.readouterr().err


def test_the_version_is_shown_and_python_m_works() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "curvdiag.cli", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("curvdiag ")


@pytest.mark.parametrize(("code", "ended"), [(None, 0), (0, 0), (3, 3), ("no data", 1)])
def test_after_a_task_made_a_process_group_the_process_ends_with_the_same_code(
    code: object, ended: int, capsys: pytest.CaptureFixture[str]
) -> None:
    with (
        mock.patch.object(cli, "main", side_effect=SystemExit(code)),
        mock.patch.object(cli.dist, "is_initialized", return_value=True),
        mock.patch.object(cli.os, "_exit") as leave,
    ):
        cli.run()
    leave.assert_called_once_with(ended)
    assert capsys.readouterr().err == ("no data\n" if code == "no data" else "")


def test_without_one_it_ends_as_ever() -> None:
    with mock.patch.object(cli, "main", side_effect=SystemExit(3)), pytest.raises(SystemExit) as ended:
        cli.run()
    assert ended.value.code == 3
