"""Patterns find each checkpoint once, and its step is what it says or what its name says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from curvdiag.checkpoints.find import find
from curvdiag.checkpoints.read import Contents
from curvdiag.checkpoints.steps import places
from curvdiag.errors import ArgumentError


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def touch(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()


def found(*patterns: str) -> list[str]:
    return [str(path) for path in find(list(patterns))]


@pytest.mark.usefixtures("here")
def test_patterns_and_names_are_one_list_in_natural_order() -> None:
    touch("c/step_10.pt", "c/step_9.pt", "c/step_100.pt", "d/x[1].pt", "c/deep/step_1.pt")
    os.symlink("step_100.pt", "c/last.pt")
    assert found("c/*_*.pt") == ["c/step_9.pt", "c/step_10.pt", "c/step_100.pt"]
    assert found("c/step_10.pt", "c/step_9.pt", "c/*_9.pt") == ["c/step_9.pt", "c/step_10.pt"]
    assert found("c/**/*_1*.pt") == ["c/deep/step_1.pt", "c/step_10.pt", "c/step_100.pt"]
    assert found("d/x[1].pt") == ["d/x[1].pt"]
    assert len(found("c/*.pt")) == 3


@pytest.mark.usefixtures("here")
def test_a_folder_is_a_checkpoint_or_stands_for_those_in_it() -> None:
    for step in (2, 10):
        folder = f"out/checkpoint-{step}"
        touch(*(f"{folder}/{name}" for name in ("config.json", "optimizer.pt", "training_args.bin", "rng_state.pth")))
        touch(f"{folder}/model.safetensors")
    both = ["out/checkpoint-2", "out/checkpoint-10"]
    assert found("out") == both
    assert found("out/checkpoint-*") == both
    assert found("out/*/model.safetensors") == both
    assert found("out/checkpoint-2/", "out/checkpoint-2/model.safetensors") == both[:1]
    touch("out/model.safetensors", "out/training_args.bin")
    assert found("out") == both
    assert found("out/model.safetensors") == ["out"], "asked for by name"
    touch("out/trainer_state.json")
    assert found("out") == ["out", *both]
    touch("s/model-00001-of-00002.safetensors", "s/model-00002-of-00002.safetensors", "s/model.safetensors.index.json")
    assert found("s/*.safetensors") == ["s"]
    touch("e/notes.txt")
    assert found("e") == ["e"]


@pytest.mark.usefixtures("here")
def test_a_pattern_that_matches_nothing_is_an_error_with_the_place() -> None:
    touch("c/a.pt")
    with pytest.raises(ArgumentError, match=r"no file or folder matches 'd/\*.pt' in /"):
        find(["c/*.pt", "d/*.pt"])
    with pytest.raises(ArgumentError, match="no checkpoints are given"):
        find([])


def steps(names: list[str], says: dict[str, tuple[int | None, float | None]] | None = None) -> list[object]:
    """Step, or (step, epoch) where that is known, of files with these names."""
    contents = [Contents(Path(n), {"": {"w": torch.ones(1)}}, *(says or {}).get(n, (None, None))) for n in names]
    guessed, _ = places([Path(n) for n in names], contents)
    return [p if p is None else p.step if p.epoch is None else (p.step, p.epoch) for p in guessed]


@pytest.mark.parametrize(
    ("names", "wanted"),
    [
        (["step=500.pt", "step=1000.pt"], [500, 1000]),
        (["epoch=3-step=500.ckpt", "epoch=4-step=600-v1.ckpt"], [(500, 3), (600, 4)]),
        (["checkpoint-500", "checkpoint-20"], [500, 20]),
        (["run2_step_10k.pt", "run2_step_500.pt", "run2_step_1M.pt"], [10_000, 500, 1_000_000]),
        (["global_step7.pt", "ckpt_000020.pth", "model-iter30.pt", "STEP40.pt"], [7, 20, 30, 40]),
        (["step_5/model.pt", "step_15/model.pt"], [5, 15]),
        (["epoch_1.pt", "epoch_02.pt", "net-epoch-10.pt"], [(1, 1), (2, 2), (10, 10)]),
        (["net_v2_5.pt", "net_v2_25.pt"], [5, 25]),
        (["0001.pt", "0010.pt"], [1, 10]),
        (["a3/net.pt", "a4/net.pt"], [3, 4]),
        (["net_7.pt"], [7]),
        (["step_5.pt", "best.pt"], [5, None]),
        (["net_5.pt", "net_10.pt", "net_best.pt", "last.pt"], [5, 10, None, None]),
        (["mistep5_1.pt", "mistep5_2.pt"], [1, 2]),
    ],
)
def test_steps_are_read_from_names(names: list[str], wanted: list[object]) -> None:
    assert steps(names) == wanted


def test_what_a_checkpoint_says_counts_more_than_its_name() -> None:
    assert steps(["step_1.pt", "step_2.pt"], {"step_1.pt": (700, None)}) == [700, 2]
    assert steps(["a.pt", "b.pt"], {"a.pt": (700, 1.0), "b.pt": (900, 2.0)}) == [(700, 1.0), (900, 2.0)]
    assert steps(["x_1.pt", "x_2.pt"], {"x_1.pt": (None, 3.0), "x_2.pt": (None, 4.0)}) == [(3, 3.0), (4, 4.0)]


def test_numbers_of_two_kinds_are_never_mixed() -> None:
    assert steps(["step_100.pt", "epoch_3.pt", "net_7.pt"]) == [100, None, None]
    assert steps(["epoch_3.pt", "net_7.pt"], {"epoch_3.pt": (None, 3.0)}) == [(3, 3.0), None]


def test_that_the_steps_are_no_optimizer_steps_is_said() -> None:
    def kind(name: str) -> str:
        return places([Path(name)], [Contents(Path(name), {})])[1]

    assert "are their epochs" in kind("epoch_3.pt")
    assert "numbers in their names" in kind("net_3.pt")
    assert kind("step_3.pt") == ""


@pytest.mark.parametrize(
    "names",
    [
        ["best.pt", "last.pt"],
        ["a1_b2.pt", "a2_b3.pt"],
        ["net_1.pt", "final_2.pt"],
        ["x1y2.pt"],
        ["a_1.pt", "a_2.pt", "b_1.pt", "b_2.pt"],
    ],
)
def test_where_nothing_tells_the_order_the_error_says_how_to_name_them(names: list[str]) -> None:
    with pytest.raises(ArgumentError, match=r"nothing tells the steps .* step=500.pt, checkpoint-500 .* --steps"):
        steps(names)
