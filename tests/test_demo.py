"""The demo leaves a run that can be read and pictures that can be looked at."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import curvdiag.experiments.demo
from curvdiag import RunStore
from curvdiag.cli import app

pytest.importorskip("sklearn")

EPOCHS = 2
PICTURES = ["density.png", "heatmap.png", "scalars.png", "scaling.png"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "runs" / "demo"
    state, run_demo, kept = torch.get_rng_state(), curvdiag.experiments.demo.run_demo, []

    def keep(*args, **options):
        kept.append(run_demo(*args, **options))
        return kept[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(curvdiag.experiments.demo, "run_demo", keep)
        result = CliRunner().invoke(app, ["demo", "--out", str(folder), "--epochs", str(EPOCHS)])
    assert torch.equal(state, torch.get_rng_state())
    result.found = kept[0]
    return folder, result


def test_it_ends_well_and_says_where_things_are(demo):
    folder, result = demo
    assert result.exit_code == 0, result.output
    for name in ("run.db", *PICTURES):
        assert str(folder / name) in result.output.replace("\n", "")
    for word in ("lambda_max", "trace", "training loss", "held out"):
        assert word in result.output


def test_it_leaves_the_run_file_and_the_pictures_and_nothing_else(demo):
    folder, _ = demo
    assert sorted(p.name for p in folder.iterdir()) == sorted(["run.db", *PICTURES])


@pytest.mark.parametrize("name", PICTURES)
def test_each_picture_is_a_png_of_a_sensible_size_with_something_in_it(demo, name):
    from matplotlib.image import imread

    folder, _ = demo
    assert (folder / name).read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(folder / name)
    height, width = pixels.shape[:2]
    assert 600 <= height <= 2_000
    assert 800 <= width <= 2_000
    grey = pixels[..., :3].mean(-1)
    assert 0.01 < float((grey < 0.9).mean()) < 0.95


def test_it_says_in_words_whether_noise_is_shaped_like_curvature(demo):
    folder, result = demo
    found = result.found.scaling
    assert (found.block, found.size, found.samples) == ("8.weight", 240, 1_797 - 300)
    assert found.held_out is not found.in_sample
    assert any("held out: basis from 749 samples, numbers along it from 748" in note for note in found.notes)
    said = " ".join(result.output.split())
    assert f"last layer after training, on samples held out: {found.verdict.word}. " in said
    assert found.verdict.reasons[0] in said
    assert "C against curvature H" in result.found.pictures[folder / "scaling.png"]


def test_the_run_file_holds_a_measurement_before_training_and_after_each_epoch(demo):
    folder, _ = demo
    with RunStore(folder / "run.db", readonly=True) as store:
        (run,) = store.runs()
        assert run.name == "digits"
        assert run.measurements == EPOCHS + 1
        series = store.scalars("curv/hessian/lambda_max")
        per_epoch = series.steps[1]
        assert series.steps.tolist() == [per_epoch * k for k in range(EPOCHS + 1)]
        assert series.epochs.tolist() == [0.0, 1.0, 2.0]
        assert np.isfinite(series.values).all()
        assert (series.values > 0).all()
        assert len(store.densities("hessian").densities) == EPOCHS + 1
        loss = store.scalars("train/loss").values
        assert loss[-1] < loss[0] < 2.4
        assert not [event for event in store.events() if event.kind == "error"]
    assert not list(folder.glob("run.db-*"))


def test_it_can_be_repeated_over_its_own_files(demo, tmp_path):
    folder, _ = demo
    shutil.copytree(folder, tmp_path / "demo")
    result = CliRunner().invoke(app, ["demo", "--out", str(tmp_path / "demo"), "--epochs", str(EPOCHS)])
    assert result.exit_code == 0, result.output
    with RunStore(folder / "run.db", readonly=True) as one, RunStore(tmp_path / "demo" / "run.db") as other:
        assert len(other.runs()) == 1
        assert other.runs()[0].created > one.runs()[0].created
        before, after = (store.scalars("curv/hessian/trace").values for store in (one, other))
        assert after == pytest.approx(before, rel=1e-3)
