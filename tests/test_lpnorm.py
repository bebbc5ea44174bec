"""The comparison of optimizers as a whole: statistics by hand, files, words, and a run that was interrupted."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from curvdiag.estimate import Estimate
from curvdiag.experiments import lpnorm
from curvdiag.experiments.lpnorm_figure import FOLLOWED, draw
from curvdiag.experiments.lpnorm_methods import BASELINES, CONTROLS, METHODS, PUBLISHED
from curvdiag.experiments.lpnorm_summary import Outcome, Summary, paired, points, summarise, table, verdict
from curvdiag.experiments.lpnorm_tasks import DIGITS
from curvdiag.experiments.lpnorm_training import Curves, Job, Run, train
from figures import assert_no_text_over_another

pytest.importorskip("sklearn")

SMALL = replace(DIGITS, **lpnorm.QUICK)


def made(method: str, seed: int, accuracy: float, *, final: bool = True, lr: float = 0.1) -> Run:
    return Run("digits", method, lr, 1e-3, seed, final, accuracy, 1.0, 2.0, 2.0)


def test_intervals_are_students_and_differences_are_paired_by_seed() -> None:
    ours = [made(PUBLISHED, seed, accuracy) for seed, accuracy in enumerate((0.90, 0.92, 0.97))]
    theirs = [made("SGD-M", seed, accuracy) for seed, accuracy in ((2, 0.96), (0, 0.88), (1, 0.91), (9, 0.1))]
    difference = paired(ours, theirs)
    assert difference.samples == 3
    assert difference.value == pytest.approx((0.02 + 0.01 + 0.01) / 3)
    deviation = math.sqrt(sum((x - 0.04 / 3) ** 2 for x in (0.02, 0.01, 0.01)) / 2)
    half = 4.302653 * deviation / math.sqrt(3)  # Student's t with two degrees of freedom
    assert difference.interval() == pytest.approx((0.04 / 3 - half, 0.04 / 3 + half), rel=1e-6)
    assert points(difference) == f"+1.33 ({100 * (0.04 / 3 - half):+.2f} to {100 * (0.04 / 3 + half):+.2f})"

    tuning = [made(name, 500, 0.5, final=False) for name in (PUBLISHED, "SGD-M")]
    rows = {one.method: one for one in summarise([*ours, *theirs, *tuning])}
    assert list(rows) == ["SGD-M", PUBLISHED]
    assert rows[PUBLISHED].accuracy.value == pytest.approx(0.93)
    assert rows[PUBLISHED].ahead == {"SGD-M": difference}
    assert rows["SGD-M"].ahead == {}
    assert rows[PUBLISHED].second is None
    assert (rows[PUBLISHED].settings, rows[PUBLISHED].tuning_runs, rows[PUBLISHED].validation) == (1, 1, 0.5)


def test_the_second_best_setting_shows_what_hangs_on_the_choice() -> None:
    tuning = [made("Lion", 500, accuracy, final=False, lr=lr) for lr, accuracy in ((0.1, 0.5), (0.2, 0.7), (0.3, 0.6))]
    best = [made("Lion", seed, 0.8 + 0.01 * seed, lr=0.2) for seed in range(4)]
    second = [made("Lion", seed, accuracy, lr=0.3) for seed, accuracy in ((0, 0.83), (1, 0.83), (2, 0.86))]
    (row,) = summarise([*second, *best, *tuning])
    assert row.lr == 0.2
    assert row.accuracy.samples == 4
    assert row.accuracy.value == pytest.approx(0.815)
    assert row.second is not None
    assert row.second.samples == 3
    assert row.second.value == pytest.approx((0.03 + 0.02 + 0.04) / 3)
    assert "| +3.00 |" in table([row])[-1]


@pytest.mark.parametrize(
    ("differences", "word"),
    [((0.02, 0.03, 0.025), "ahead"), ((-0.02, -0.03, -0.025), "behind"), ((0.02, -0.01, 0.01), "undecided")],
)
def test_a_verdict_needs_the_whole_interval_on_one_side(differences: tuple[float, ...], word: str) -> None:
    ours = [made(PUBLISHED, seed, 0.5 + x) for seed, x in enumerate(differences)]
    assert verdict(paired(ours, [made("Lion", seed, 0.5) for seed in range(3)])) == word


# The whole


@pytest.fixture
def few() -> Iterator[None]:
    """Two methods, to save time."""
    whole = dict(METHODS)
    for name in set(METHODS) - {"SGD-M", "AdamW"}:
        del METHODS[name]
    yield
    METHODS.clear()  # so that their order is what it was
    METHODS.update(whole)


def without_times(runs: list[Run]) -> list[Run]:
    return [replace(run, seconds=0.0, total_seconds=0.0) for run in runs]


@pytest.mark.usefixtures("few")
def test_an_interrupted_experiment_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = tmp_path / "journal"
    whole = lpnorm.run(quick=True, seed=2)

    started: list[Job] = []

    def breaks(one: Job) -> Run:
        started.append(one)
        if len(started) == 9:
            raise KeyboardInterrupt
        return train(one)

    monkeypatch.setattr(lpnorm, "train", breaks)
    with pytest.raises(KeyboardInterrupt):
        lpnorm.run(quick=True, seed=2, journal=journal)
    text = journal.read_text(encoding="utf-8")
    assert text.count("\n") == 1 + 8
    journal.write_text(text[:-30], encoding="utf-8")  # cut off while a run was written
    lines: list[str] = []
    resumed = lpnorm.run(quick=True, seed=2, journal=journal, progress=lines.append)
    assert lines[0] == "7 runs are there already"
    assert without_times(resumed.outcomes["digits"].runs) == without_times(whole.outcomes["digits"].runs)
    runs = len(whole.outcomes["digits"].runs)
    assert len(started) == 9 + runs - 7
    assert lpnorm.run(quick=True, seed=2, journal=journal).outcomes["digits"].runs == resumed.outcomes["digits"].runs
    assert len(started) == 9 + runs - 7, "nothing is left to do"
    monkeypatch.setattr(lpnorm, "P_MAX", 7.0)
    lpnorm.run(quick=True, seed=2, journal=journal)
    assert len(started) == 9 + runs - 7 + runs, "with another p these are other runs"


@pytest.mark.long
@pytest.mark.usefixtures("few")
def test_the_number_of_processes_does_not_matter() -> None:
    one, two = (lpnorm.run(tasks=[SMALL], workers=workers).outcomes["digits"].runs for workers in (1, 2))
    assert without_times(one) == without_times(two)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path], list[str]]:
    folder, lines = tmp_path_factory.mktemp("lpnorm") / "figures", []
    return folder, lpnorm.reproduce(folder, quick=True, progress=lines.append), lines


def test_it_leaves_a_picture_and_a_json_and_nothing_else(quick: tuple[Path, list[Path], list[str]]) -> None:
    folder, paths, _ = quick
    assert paths == [folder / "lpnorm.png", folder / "lpnorm.json"]
    assert sorted(folder.iterdir()) == sorted(paths)
    assert paths[0].read_bytes().startswith(b"\x89PNG")


def test_all_methods_were_tuned_alike_and_run_with_the_same_seeds(quick: tuple[Path, list[Path], list[str]]) -> None:
    saved = json.loads(quick[1][1].read_text())
    assert list(saved["results"]) == ["digits"]
    found = saved["results"]["digits"]
    assert [one["method"] for one in found["summaries"]] == list(METHODS)
    assert {(one["settings"], one["tuning_runs"]) for one in found["summaries"]} == {(2, 2)}
    seeds: dict[tuple[str, bool], set[int]] = {}
    for run in found["runs"]:
        seeds.setdefault((run["method"], run["final"]), set()).add(run["seed"])
    assert all(of == ({0, 1, 2} if final else {500}) for (_, final), of in seeds.items())
    counts = Counter((run["method"], run["final"]) for run in found["runs"])
    assert set(counts.values()) == {2, 3 + 1}, "three runs of the best setting, and one of the second"
    by_method = {one["method"]: one for one in found["summaries"]}
    for run in found["runs"]:
        if run["final"]:
            assert len(run["curves"]["accuracy"]) == len(run["curves"]["train_loss"]) == 2
        else:
            assert run["curves"] is None
    assert set(by_method[PUBLISHED]["ahead"]) == set(BASELINES)
    for name, one in by_method.items():
        tried = {
            (run["accuracy"], -run["loss"]): run["lr"]
            for run in found["runs"]
            if (run["method"], run["final"]) == (name, False)
        }
        assert one["lr"] == tried[max(tried)], "the better of the two in validation"
        mine = [r["accuracy"] for r in found["runs"] if (r["method"], r["final"], r["lr"]) == (name, True, one["lr"])]
        assert one["accuracy"]["value"] == pytest.approx(sum(mine) / 3, rel=1e-4)
    assert saved["options"]["tasks"]["digits"]["points"] == 2


def test_it_says_in_words_how_the_published_method_did(quick: tuple[Path, list[Path], list[str]]) -> None:
    said = [line for line in quick[2] if " percentage points, " in line]
    pairs = [(PUBLISHED, name) for name in BASELINES] + list(CONTROLS.items())
    assert [tuple(line.split(":")[0].split(" less ")) for line in said] == pairs
    assert len({name for name, _ in pairs}) == 3 + 3 + 2, "every p-schedule, and the two measured rates"
    assert all(line.endswith(("ahead", "behind", "undecided")) for line in said)


def test_the_picture_shows_every_method_and_no_text_over_another() -> None:
    epochs = range(1, SMALL.epochs + 1)
    runs = []
    for index, method in enumerate(METHODS):
        for seed in range(4):
            ends = [0.9 - 0.3 / epoch + 0.003 * index + 0.001 * seed for epoch in epochs]
            curves = Curves([1 - x for x in ends], list(epochs), ends, [1 - x for x in ends])
            if METHODS[method].p is not None:
                curves = replace(curves, p=[6 - 0.1 * epoch for epoch in epochs])
                curves = replace(curves, measured_at=[0.0, 2.0], anisotropy=[900.0 + 10 * seed, 300.0])
            runs.append(replace(made(method, seed, ends[-1]), curves=curves))
        runs.append(made(method, 500, 0.9, final=False))
    outcome = Outcome(SMALL, summarise(runs), [], runs)
    figure = draw({"digits": outcome, "cifar10": replace(outcome, task=replace(SMALL, title="CIFAR-10"))})
    assert_no_text_over_another(figure)
    top, curves = figure.axes[0], figure.axes[2]
    assert [label.get_text() for label in top.get_yticklabels()] == list(METHODS)
    assert tuple(curves.get_legend_handles_labels()[1]) == FOLLOWED
    assert len(figure.axes) == 10
    drawn = [[line.get_label() for line in ax.lines] for ax in (figure.axes[6], figure.axes[8])]
    assert drawn == [[name for name in FOLLOWED if METHODS[name].p is not None]] * 2


def test_the_tables_of_the_docs_are_those_of_the_committed_json() -> None:
    root = Path(__file__).parents[1]
    results = json.loads((root / "figures" / "lpnorm.json").read_text(encoding="utf-8"))["results"]
    assert list(results) == ["digits", "cifar10"]
    text = (root / "docs" / "lpnorm.md").read_text(encoding="utf-8")
    for found in results.values():
        rows = [summary_of(saved) for saved in found["summaries"]]
        assert [row.method for row in rows] == list(METHODS)
        assert "\n".join(table(rows)) in text
    written = json.dumps([found["comparisons"] for found in results.values()]) + "".join(re.findall(r"\|.*\|", text))
    quoted = re.findall(r"[+-]\d+\.\d\d \([+-]\d+\.\d\d to [+-]\d+\.\d\d\)", " ".join(text.split()))
    assert len(quoted) > 40
    assert all(one in written for one in quoted), "every difference in the text is one that was written"


def summary_of(saved: dict[str, Any]) -> Summary:
    ahead = {name: Estimate(**one) for name, one in saved["ahead"].items()}
    estimates = {name: Estimate(**saved[name]) for name in ("accuracy", "loss", "second")}
    return Summary(**{**saved, **estimates, "ahead": ahead})
