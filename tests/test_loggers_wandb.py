"""What an offline run of Weights & Biases holds is what was measured, and the user's own rows stay whole."""

from __future__ import annotations

import math

import numpy as np
import pytest
from logged import Training, collected, offline, read_wandb, renamed
from PIL import Image

from curvdiag.loggers import WandbLogger
from curvdiag.loggers.histogram import histogram
from curvdiag.loggers.wandb import STEP

wandb = pytest.importorskip("wandb")
HEATMAP = "curv/hessian/heatmap"
pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


@pytest.fixture(autouse=True)
def _no_run_is_left():
    yield
    if wandb.run is not None:
        wandb.run.finish()


def ours(rows):
    return [row for row in rows if STEP in row]


def numbers(row):
    """The scalars of a row, NaN and infinity as W&B writes them; without what W&B adds."""
    words = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
    return {
        key: words.get(value, value) if isinstance(value, str) else value
        for key, value in row.items()
        if not key.startswith("_") and key != STEP and not isinstance(value, dict)
    }


def test_a_run_of_its_own_holds_everything_over_the_monitors_step_and_ends_with_the_monitor(tmp_path):
    logger = WandbLogger(**offline(tmp_path, project="curvature"))
    options = {"loggers": [logger], "name": "first", "config": {"lr": 0.1}, "preset": "full", "measure": None}
    training = Training(**options).step()
    training.monitor.record({"mine": 0.5, "odd": math.nan, "infinite": math.inf})
    assert wandb.run is logger.run
    training.step().close()
    assert wandb.run is None
    assert logger.run.name == "first"
    file = read_wandb(tmp_path)
    assert file.finished
    assert file.config["lr"] == 0.1
    assert file.config["curvdiag"]["preset"] == "full"
    one, two = ours(file.rows)
    assert (one[STEP], two[STEP]) == (1, 2)
    beside = {"mine": 0.5, "odd": math.nan, "infinite": math.inf}
    for row, measurement, more in [(one, training.history[0], beside), (two, training.history[1], {})]:
        assert numbers(row) == pytest.approx({**renamed(measurement.scalars), **more}, nan_ok=True)
    keys = {key for row in (one, two) for key in row if not key.startswith("_")} - {STEP}
    assert {key: file.axes.get(key) for key in keys} == dict.fromkeys(keys, STEP)
    assert STEP in file.axes
    assert not any("*" in key for key in file.axes)


def test_densities_are_histograms_and_the_heatmap_an_image_at_the_end(tmp_path):
    training = Training(loggers=[WandbLogger(**offline(tmp_path))]).step(3).close()
    rows = ours(read_wandb(tmp_path).rows)
    for row, measurement in zip(rows, training.history, strict=True):
        for key, block in [("curv/hessian/density", ""), ("curv/layer/2/density", "2")]:
            expected = histogram(measurement.densities["hessian", block])
            assert row[key]["_type"] == "histogram"
            assert row[key]["bins"] == pytest.approx(expected.edges)
            assert row[key]["values"] == pytest.approx(expected.counts)
    assert [HEATMAP in row for row in rows] == [False, False, True]
    (picture,) = tmp_path.rglob("*.png")
    assert rows[-1][HEATMAP]["path"] in str(picture)
    assert np.asarray(Image.open(picture)).shape == (504, 840, 3)


def test_the_run_that_is_open_is_used_and_left_open_and_keeps_its_own_words(tmp_path):
    with wandb.init(**offline(tmp_path), config={"lr": 9.0}, name="theirs") as run:
        training = Training(
            loggers=[WandbLogger(**offline(tmp_path))], name="first", config={"lr": 0.1, "depth": 3}
        ).step()
        training.close()
        assert wandb.run is run
        run.log({"train/loss": 7.0})
    file = read_wandb(tmp_path)
    assert (file.config["lr"], file.config["depth"], file.config["curvdiag"]["probes"]) == (9.0, 3, 2)
    assert run.name == "theirs"
    (row,) = ours(file.rows)
    assert row["train/loss"] == 7.0, "curvdiag's is curv/train/loss"
    assert row["curv/train/loss"] == float(training.history[0]["train/loss"])
    assert "train/loss" not in file.axes


def test_a_run_that_is_given_is_used_though_none_is_open(tmp_path):
    run = wandb.init(**offline(tmp_path), reinit="create_new")
    assert wandb.run is None
    Training(loggers=[WandbLogger(run)], measure=["trace"]).step().close()
    run.finish()
    assert [row[STEP] for row in ours(read_wandb(tmp_path).rows)] == [1]


@pytest.mark.parametrize("explicit", [True, False], ids=["steps of their own", "no steps"])
def test_the_users_rows_stay_whole_whatever_steps_they_give(explicit, tmp_path):
    """Two logs at one step, around the measurement: W&B drops the second where anything has moved its step on."""
    with wandb.init(**offline(tmp_path)) as run:
        training = Training(loggers=[WandbLogger(**offline(tmp_path))], measure=["trace"])
        for k in range(1, 6):
            run.log({"loss": float(k)}, **({"step": 10 * k} if explicit else {}))
            training.step()
            run.log({"accuracy": float(k)}, **({"step": 10 * k} if explicit else {}))
        training.close()
    rows = read_wandb(tmp_path).rows
    for key in ("loss", "accuracy"):
        found = [(row["_step"], row[key]) for row in rows if key in row]
        assert [value for _, value in found] == [1.0, 2.0, 3.0, 4.0, 5.0]
        assert not explicit or [step for step, _ in found] == [10, 20, 30, 40, 50]
    traces = [(row[STEP], row["curv/hessian/trace"]) for row in ours(rows)]
    assert traces == [(m.step, m["curv/hessian/trace"]) for m in training.history]


def test_measurements_between_two_rows_of_the_user_are_all_kept(tmp_path):
    with wandb.init(**offline(tmp_path)) as run:
        training = Training(loggers=[WandbLogger(**offline(tmp_path))], measure=["trace"])
        run.log({"loss": 1.0}, step=100)
        training.step(4)
        run.log({"loss": 2.0}, step=200)
        training.step(2).close()
        run.log({"loss": 3.0}, step=300)
    rows = read_wandb(tmp_path).rows
    assert [row[STEP] for row in ours(rows)] == [1, 2, 3, 4, 5, 6]
    assert [(row["_step"], row["loss"]) for row in rows if "loss" in row] == [(100, 1.0), (200, 2.0), (300, 3.0)]


def test_a_resumed_monitor_goes_on_at_its_step(tmp_path):
    first = Training(measure=["trace"]).step(3)
    second = Training(measure=["trace"], loggers=[WandbLogger(**offline(tmp_path))])
    second.monitor.load_state_dict(first.monitor.state_dict())
    second.step(2).close()
    assert [row[STEP] for row in ours(read_wandb(tmp_path).rows)] == [4, 5]


def test_a_logger_that_serves_one_monitor_after_the_other_gives_each_its_own_run(tmp_path):
    logger = WandbLogger(**offline(tmp_path))
    runs = []
    for _ in range(2):
        training = Training(loggers=[logger], measure=["trace"]).step()
        runs.append(wandb.run)
        training.close()
    assert wandb.run is None
    assert runs[0].id != runs[1].id
    with wandb.init(**offline(tmp_path)) as theirs:
        Training(loggers=[logger], measure=["trace"]).step().close()
        assert logger.run is theirs
        assert wandb.run is theirs, "left open"
    files = [read_wandb(path.parent) for path in sorted(tmp_path.rglob("*.wandb"))]
    assert [[row[STEP] for row in ours(file.rows)] for file in files] == [[1], [1], [1]]
    assert all(file.axes["curv/hessian/trace"] == STEP for file in files)


def test_a_disabled_run_costs_nothing_and_breaks_nothing(tmp_path):
    training = Training(loggers=[WandbLogger(**offline(tmp_path, mode="disabled"))]).step(2).close()
    assert len(training.history) == 2
    assert not list(tmp_path.rglob("*.wandb"))


def test_a_run_that_the_user_ends_too_soon_costs_one_warning(tmp_path):
    training = Training(loggers=[WandbLogger(**offline(tmp_path))], measure=["trace"]).step()
    wandb.run.finish()
    (message,) = collected(lambda: training.step(2).close())
    assert "WandbLogger" in message
    assert len(training.history) == 3
