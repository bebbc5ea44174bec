"""``curvdiag scan``: patterns quoted or not, lines for what fails, an exit code that says so, and the same plots."""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpointed import STEPS, net

from curvdiag import RunStore
from curvdiag.checkpoints import scanning
from curvdiag.cli import main
from curvdiag.cli.scan import progress_bar, sorted_out
from curvdiag.errors import ArgumentError

TASK = """
from checkpointed import objective

def fails():
    raise RuntimeError("no data")
"""
QUICK = ("--measure", "trace", "--probes", "2", "--lanczos-steps", "6")


def curvdiag(*arguments: object) -> int:
    with pytest.raises(SystemExit) as end:
        main([str(a) for a in arguments])
    return int(end.value.code or 0)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The current folder, with a task and the checkpoints of its run."""
    (tmp_path / "my_task.py").write_text(TASK)
    (tmp_path / "ckpts").mkdir()
    for step in STEPS:
        torch.save(net(step).state_dict(), tmp_path / "ckpts" / f"step={step}.pt")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if "my_task" in name]:
        del sys.modules[name]


def recorded(path: Path | str = "run.db") -> list[int]:
    with RunStore(path, readonly=True) as store:
        return store.scalars("curv/hessian/trace").steps.tolist()


@pytest.mark.usefixtures("folder")
@pytest.mark.parametrize(
    "words",
    [
        ("my_task:objective", "--checkpoints", "ckpts/*.pt"),
        ("my_task.py:objective", "--checkpoints", "ckpts"),
        ("my_task:objective", "--checkpoints", "ckpts/step=2.pt", "ckpts/step=4.pt", "ckpts/step=6.pt"),
        ("--checkpoints", "ckpts/step=2.pt", "ckpts/step=4.pt", "ckpts/step=6.pt", "my_task:objective"),
        ("my_task:objective", "-c", "ckpts/*2.pt", "-c", "ckpts/*[46].pt"),
    ],
)
def test_patterns_may_be_quoted_or_expanded_by_the_shell(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert curvdiag("scan", *words, *QUICK) == 0
    out, err = capsys.readouterr()
    assert out.endswith("run.db, run 'scan of ckpts': 3 checkpoints measured\n")
    assert "begins run 'scan of ckpts'" in err
    assert recorded() == list(STEPS)


@pytest.mark.usefixtures("folder")
def test_what_fails_is_a_line_and_exit_code_1_and_the_command_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    Path("ckpts/step=3.pt").write_text("[red]no[/red] checkpoint")
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", *QUICK) == 1
    out, err = capsys.readouterr()
    assert "3 checkpoints measured, 1 failed" in out
    assert [line for line in err.splitlines() if line.startswith("step=3.pt is no checkpoint")]
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", *QUICK) == 1
    assert "0 checkpoints measured, 3 there already, 1 failed" in capsys.readouterr().out
    assert curvdiag("runs", "run.db", "--events") == 0
    assert "step=3.pt is no checkpoint: neither" in capsys.readouterr().out
    torch.save(net(3).state_dict(), "ckpts/step=3.pt")
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", *QUICK) == 0
    assert recorded() == [2, 3, 4, 6]
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", "--again", *QUICK) == 0
    assert "4 checkpoints measured" in capsys.readouterr().out


@pytest.mark.usefixtures("folder")
def test_the_same_plots_are_drawn_of_a_scan() -> None:
    words = ("--checkpoints", "ckpts/*.pt", "--store", "a.db", "--name", "after", "--preset", "standard")
    assert curvdiag("scan", "my_task:objective", *words, "--lanczos-steps", "6") == 0
    for kind in ("heatmap", "density", "scalars"):
        assert curvdiag("plot", "a.db", kind, "-o", f"{kind}.png") == 0
        assert Path(f"{kind}.png").stat().st_size > 10_000
    with RunStore("a.db", readonly=True) as store:
        assert store.run().name == "after"
        assert store.run().config["task"] == "my_task:objective"


@pytest.mark.usefixtures("folder")
def test_steps_may_be_given_where_nothing_tells_them(capsys: pytest.CaptureFixture[str]) -> None:
    for old, new in zip(STEPS, ("a", "b", "c"), strict=True):
        Path(f"ckpts/step={old}.pt").rename(f"ckpts/{new}.pt")
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", *QUICK) == 2
    assert "or give --steps" in capsys.readouterr().err
    assert not Path("run.db").exists()
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", "--steps", "5,10,500", *QUICK) == 0
    assert recorded() == [5, 10, 500]


@pytest.mark.usefixtures("folder")
def test_an_interrupted_scan_says_that_it_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    work = scanning.Work
    measure = work.measure

    def interrupted(self: object, path: Path, place: object) -> bool:
        if path.name == "step=6.pt":
            raise KeyboardInterrupt
        return measure(self, path, place)

    monkeypatch.setattr(work, "measure", interrupted)
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", *QUICK) == 130
    assert "what was measured is kept, and the same command goes on" in capsys.readouterr().err
    assert recorded() == [2, 4]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("my_task:objective",), "which checkpoints?"),
        (("my_task:objective", "-c", "nothing/*.pt"), "no file or folder matches 'nothing/*.pt'"),
        (("my_task", "-c", "ckpts/*.pt"), "a task is MODULE:FUNCTION"),
        (("my_task:fails", "-c", "ckpts/*.pt"), "failed with RuntimeError: no data (my_task.py, line 5)"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--measure", "lambda"), "did you mean 'lambda_max'?"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--preset", "light", "--measure", "trace"), "not both"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--steps", "1,b"), "whole numbers"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--steps", "1,2"), "2 steps are given for 3 checkpoints"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--store", "no/run.db"), "does not exist"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--store", "text.db"), "not a run file"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--store", "foreign.db"), "of another program"),
        (("my_task:objective", "-c", "ckpts/*.pt", "--store", "newer.db"), "upgrade curvdiag"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_2(
    folder: Path, words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "text.db").write_text("no database " * 200)
    spoil(folder / "foreign.db", "PRAGMA application_id = 77")
    spoil(folder / "newer.db", "PRAGMA user_version = 99")
    assert curvdiag("scan", *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curvdiag: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (folder / "run.db").exists()


@pytest.mark.parametrize("command", ["runs", "export", "plot"])
@pytest.mark.parametrize("kind", ["text", "foreign", "newer", "cut"])
def test_a_run_file_that_cannot_be_read_is_one_line_and_exit_code_2(
    tmp_path: Path, command: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "run.db"
    spoil(path, {"foreign": "PRAGMA application_id = 77", "newer": "PRAGMA user_version = 99"}.get(kind, "SELECT 1"))
    if kind == "text":
        path.write_text("no database " * 200)
    if kind == "cut":
        path.write_bytes(path.read_bytes()[:5000])
    words = {"runs": [], "export": ["-o", tmp_path / "a.csv"], "plot": ["heatmap"]}[command]
    assert curvdiag(command, path, *words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("curvdiag: error: ")
    assert err.count("\n") == 1
    wanted = {"text": "not a run file", "foreign": "of another program", "newer": "upgrade curvdiag", "cut": "damaged"}
    assert wanted[kind] in err


def spoil(path: Path, statement: str) -> None:
    with RunStore(path) as store:
        for name in ("a", "b"):
            store.new_run(name).record(1, {"curv/hessian/trace": 1.0})
    connection = sqlite3.connect(path)
    connection.execute(statement)
    connection.commit()
    connection.close()


def test_a_task_is_told_from_checkpoints_wherever_it_stands(tmp_path: Path) -> None:
    assert sorted_out(["a:b", "x.pt"], []) == ("a:b", ["x.pt"])
    assert sorted_out(["x.pt", "y.pt", "a:b"], ["w.pt"]) == ("a:b", ["w.pt", "x.pt", "y.pt"])
    assert sorted_out(["a"], ["w.pt"]) == ("a", ["w.pt"])
    with pytest.raises(ArgumentError, match="which checkpoints"):
        sorted_out(["a:b"], [])


@pytest.mark.usefixtures("folder")
def test_where_there_is_no_terminal_lines_tell_how_far_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    assert curvdiag("scan", "my_task:objective", "-c", "ckpts/*.pt", *QUICK) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines[1:]] == [f"{done} of 3 checkpoints" for done in (1, 2, 3)]
    assert all(line.endswith("left") for line in lines[1:3])


def test_the_time_left_is_known_although_each_measurement_takes_minutes() -> None:
    from rich.console import Console

    now = 0.0
    bar = progress_bar(Console(force_terminal=True))
    bar.get_time = lambda: now  # type: ignore[method-assign]
    row = bar.add_task("checkpoints", total=10)
    for done in range(4):
        now = 300.0 * done
        bar.update(row, completed=done)
    assert bar.tasks[0].time_remaining == pytest.approx(7 * 300)
