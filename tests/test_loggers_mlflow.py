"""What MLflow's store gives back is what was measured."""

from __future__ import annotations

import math
import re
import sys

import numpy as np
import pytest
from logged import Training, collected, mlflow_uri, renamed
from PIL import Image

from curvdiag.loggers import MLflowLogger
from curvdiag.loggers.mlflow_names import Names, accepted, parameters

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


@pytest.fixture
def client(tmp_path, monkeypatch):
    """Of the SQLite store; artifacts of new experiments go below the test's own folder."""
    uri = mlflow_uri()
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.chdir(tmp_path)
    for name in ("MLFLOW_EXPERIMENT_NAME", "MLFLOW_EXPERIMENT_ID", "MLFLOW_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    return mlflow.MlflowClient(uri)


@pytest.fixture
def experiment(client, tmp_path, request):
    client.create_experiment(name := request.node.name, (tmp_path / "artifacts").as_uri())
    return name


def logger(experiment, **options):
    return MLflowLogger(experiment=experiment, tracking_uri=mlflow_uri(), **options)


def metrics(client, run_id):
    """All metrics by key: step, value."""
    keys = client.get_run(run_id).data.metrics
    return {key: [(m.step, m.value) for m in client.get_metric_history(run_id, key)] for key in keys}


def test_a_run_of_its_own_holds_everything_and_ends_with_the_monitor(client, experiment):
    import mlflow

    told = logger(experiment)
    config = {"lr": 0.1, "long": "x" * 9000, "model": {"depth": 3, "sizes": [2, 3]}}
    options = {"loggers": [told], "name": "first", "config": config, "preset": "full", "measure": None}
    training = Training(**options).step(2)
    training.monitor.record({"mine": 0.5, "odd [a]/b?": 2.0, "nan": math.nan, "infinite": math.inf})
    assert client.get_run(told.run_id).info.status == "RUNNING"
    assert mlflow.active_run() is None, "it is not the training's"
    training.close()
    run = client.get_run(told.run_id)
    assert (run.info.status, run.info.run_name) == ("FINISHED", "first")
    found = metrics(client, told.run_id)
    assert found.pop("mine") == [(2, 0.5)]
    assert found.pop("odd _a_/b_") == [(2, 2.0)]
    assert found.pop("infinite") == [(2, sys.float_info.max)]
    assert math.isnan(found.pop("nan")[0][1])
    expected = {}
    for measurement in training.history:
        for key, value in renamed(measurement.scalars).items():
            expected.setdefault(key, []).append((measurement.step, pytest.approx(value, nan_ok=True)))
    assert found == expected
    held = run.data.params
    assert (held["lr"], held["model/depth"], held["model/sizes"]) == ("0.1", "3", "[2, 3]")
    assert held["long"] == "x" * 5997 + "..."
    assert held["curvdiag/preset"] == "full"


def test_the_heatmap_is_an_image_at_the_end(client, experiment, tmp_path):
    told = logger(experiment)
    training = Training(loggers=[told], measure=["density"]).step(2)
    assert not list(tmp_path.rglob("*.png"))
    training.close()
    path = client.download_artifacts(told.run_id, "curv/hessian/heatmap.png", tmp_path)
    assert np.asarray(Image.open(path)).shape == (504, 840, 3)


def test_the_active_run_is_used_and_left_active_and_keeps_its_parameters(client, experiment):
    import mlflow

    before = mlflow.get_tracking_uri()
    mlflow.set_tracking_uri(mlflow_uri())
    try:
        with mlflow.start_run(experiment_id=client.get_experiment_by_name(experiment).experiment_id) as run:
            mlflow.log_param("lr", 9.0)
            mlflow.log_metric("train/loss", 7.0, step=1)
            told = MLflowLogger()
            Training(loggers=[told], config={"lr": 0.1, "depth": 3}, measure=["trace"]).step().close()
            assert told.run_id == run.info.run_id
            assert mlflow.active_run().info.run_id == run.info.run_id
    finally:
        mlflow.set_tracking_uri(before)
    held = client.get_run(run.info.run_id)
    assert (held.data.params["lr"], held.data.params["depth"]) == ("9.0", "3")
    found = metrics(client, run.info.run_id)
    assert found["train/loss"] == [(1, 7.0)], "curvdiag's is curv/train/loss"
    assert len(found["curv/hessian/trace"]) == len(found["curv/train/loss"]) == 1


def test_a_run_that_is_given_is_continued_and_left_as_it_is(client, experiment):
    told = logger(experiment)
    first = Training(loggers=[told], measure=["trace"]).step(2)
    state, run_id = first.monitor.state_dict(), told.run_id
    second = Training(loggers=[logger(None, run_id=run_id)], measure=["trace"], probes=3)
    second.monitor.load_state_dict(state)
    second.step(2).close()
    assert [step for step, _ in metrics(client, run_id)["curv/hessian/trace"]] == [1, 2, 3, 4]
    run = client.get_run(run_id)
    assert (run.info.status, run.data.params["curvdiag/probes"]) == ("RUNNING", "2")
    first.close()


def test_a_logger_that_serves_one_monitor_after_the_other_gives_each_its_own_run(client, experiment):
    told = logger(experiment)
    runs = []
    for _ in range(2):
        Training(loggers=[told], measure=["trace"]).step().close()
        runs.append(told.run_id)
    assert runs[0] != runs[1]
    for run_id in runs:
        assert len(metrics(client, run_id)["curv/hessian/trace"]) == 1
        assert client.get_run(run_id).info.status == "FINISHED"


def test_the_experiment_is_the_one_given_or_mlflows_own(client, experiment, monkeypatch):
    def of(name):
        told = logger(name)
        Training(loggers=[told], measure=["trace"]).step().close()
        return client.get_experiment(client.get_run(told.run_id).info.experiment_id).name

    assert of(f"{experiment}/new") == f"{experiment}/new"
    assert of(None) == "Default"
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.get_experiment_by_name(experiment).experiment_id)
    assert of(None) == experiment
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", f"{experiment}/named")
    assert of(None) == f"{experiment}/named"


def test_more_numbers_and_settings_than_mlflow_takes_at_once(client, experiment):
    told = logger(experiment)
    many = {f"key {k}": float(k) for k in range(2500)}
    training = Training(loggers=[told], config={f"setting {k}": k for k in range(250)}, measure=["trace"])
    training.monitor.record(many)
    training.close()
    data = client.get_run(told.run_id).data
    assert data.metrics == many
    assert {f"setting {k}": str(k) for k in range(250)}.items() <= data.params.items()


def test_a_store_that_fails_costs_one_warning(client, experiment, monkeypatch):
    told = logger(experiment)
    training = Training(loggers=[told], measure=["trace"]).step()
    monkeypatch.setattr(told._client, "log_batch", lambda *_, **__: (_ for _ in ()).throw(OSError("no such host")))
    (message,) = collected(lambda: training.step(2).close())
    assert "MLflowLogger" in message
    assert "no such host" in message
    assert len(training.history) == 3
    assert client.get_run(told.run_id).info.status == "FINISHED"


# Names


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("curv/layer/layer1.0.conv1/lambda_max", "curv/layer/layer1.0.conv1/lambda_max"),
        ("a[0]:b", "a_0__b"),
        ("größe", "gr__e"),
        ("/a//b/", "a/b"),
        ("a/./b/..", "a/_/b/__"),
        ("", "_"),
        ("x" * 250, "x" * 250),
    ],
)
def test_names_that_mlflow_accepts(key, name):
    validation = pytest.importorskip("mlflow.utils.validation")
    assert accepted(key) == name
    validation._validate_metric_name(accepted(key))


def test_long_names_are_cut_and_two_keys_never_share_one():
    names = Names()
    keys = ["a[0]", "a(0)", "a_0_", "x" * 300, "x" * 301, "y" * 249 + "[", "y" * 249 + "("]
    found = [names[key] for key in keys]
    assert len(set(found)) == len(keys)
    assert all(len(name) <= 250 and re.fullmatch(r"[\w\-. /]+", name) for name in found)
    assert [names[key] for key in keys] == found
    assert Names()["x" * 300] == found[3], "the same after a restart"


def test_a_configuration_becomes_parameters():
    given = {"a": {"b": {"c": 1}, "empty": {}}, "list": [1, "x"], "none": None, "flag": True, "text": "t"}
    expected = {"a/b/c": "1", "a/empty": "{}", "list": '[1, "x"]', "none": "null", "flag": "true", "text": "t"}
    assert parameters(given) == expected
