"""The callback's manners: where its numbers appear, what it refuses, when it lets go of its file."""

import builtins
import copy
import gc
import importlib
import pickle
import sys

import pytest
import tiny_transformers as tiny
import torch

import curvdiag
from curvdiag import Objective, RunStore
from curvdiag.errors import ArgumentError, MissingExtraError

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


def callback(objective=None, store=None, **options):
    from curvdiag.integrations.transformers import CurvatureCallback

    settings = {"every": 3, "measure": ["lambda_max"], "steps": 8, "probes": 1, **options}
    return CurvatureCallback([tiny.tokens()] if objective is None else objective, store, **settings)


# Reports


@pytest.mark.parametrize("named", [True, False])
def test_tensorboard_shows_curvature_beside_the_trainers_run(tmp_path, monkeypatch, named):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    if named:
        monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    else:
        monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    watched = callback(store=tmp_path / "run.db", measure=["lambda_max", "density"])
    tiny.trainer(tmp_path / "out", [watched], report_to=["tensorboard"]).train()
    folders = [tmp_path / "board"] if named else list((tmp_path / "out" / "runs").iterdir())
    assert len(folders) == 1
    trainers, own = (read(accumulator, folder) for folder in (folders[0], folders[0] / "curvature"))
    assert [one.step for one in trainers.Scalars("train/loss")] == [2, 4, 6]
    assert [one.step for one in own.Scalars("curv/hessian/lambda_max")] == [3, 6]
    assert own.Scalars("curv/hessian/lambda_max")[1].value == pytest.approx(watched.monitor.latest[MAX])
    assert own.Tags()["histograms"]


MAX = "curv/hessian/lambda_max"


def read(accumulator, folder):
    events = accumulator.EventAccumulator(str(folder))
    return events.Reload()


@pytest.mark.long
def test_mlflow_holds_both_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    monkeypatch.setenv("HF_MLFLOW_LOG_ARTIFACTS", "0")
    monkeypatch.chdir(tmp_path)
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path / 'mlflow.db'}")
    try:
        watched = callback()
        tiny.trainer(tmp_path / "out", [watched], report_to=["mlflow"]).train()
        runs = mlflow.search_runs(output_format="list", search_all_experiments=True)
        assert len(runs) == 1
        assert runs[0].data.metrics[MAX] == pytest.approx(watched.monitor.latest[MAX])
        assert "loss" in runs[0].data.metrics
    finally:
        mlflow.end_run()
        mlflow.set_tracking_uri(None)


@pytest.mark.long
def test_weights_and_biases_draws_both_in_one_run(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    for name, value in (("MODE", "offline"), ("DIR", str(tmp_path)), ("SILENT", "true")):
        monkeypatch.setenv(f"WANDB_{name}", value)
    rows = []
    watched = callback()
    trainer = tiny.trainer(tmp_path / "out", [watched], report_to=["wandb"], logging_steps=3)
    run = wandb.init(project="tiny")
    real = run._partial_history_callback
    monkeypatch.setattr(run, "_partial_history_callback", lambda row, *a, **o: (rows.append(row), real(row, *a, **o)))
    try:
        trainer.train()
        assert wandb.run is run  # left open for the Trainer
        assert run.summary[MAX] == pytest.approx(watched.monitor.latest[MAX])
        assert run.summary["train/global_step"] == 6
    finally:
        wandb.finish()
    assert [row["curv/step"] for row in rows if MAX in row] == [3, 6]


def test_reports_are_made_once_and_only_where_they_are_wanted(tmp_path, monkeypatch):
    from curvdiag.integrations.trainer_reports import reporters
    from curvdiag.loggers import TensorBoardLogger

    pytest.importorskip("tensorboard")
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "board"))
    assert reporters(tiny.trainer(tmp_path).args) == []
    told = []
    mine = TensorBoardLogger(tmp_path / "mine")
    for options in ({"log": False}, {"loggers": [mine]}, {"loggers": [lambda step, numbers: told.append(step)]}):
        watched = callback(**options)
        tiny.trainer(tmp_path / "out", [watched], report_to=["tensorboard"]).train()
        assert (tmp_path / "board" / "curvature").exists() == ("loggers" in options and options["loggers"] != [mine])
    assert set(told) == {3, 6}


def test_the_run_says_how_it_was_trained(tmp_path):
    tiny.trainer(tmp_path, [callback(store=tmp_path / "run.db", name="mine")], label_smoothing_factor=0.1).train()
    with RunStore(tmp_path / "run.db") as store:
        run = store.run()
    assert run.name == "mine"
    assert run.config["trainer"]["model"] == "GPT2LMHeadModel"
    assert run.config["trainer"]["label_smoothing_factor"] == 0.1
    assert run.config["curvdiag"]["cadence"] == "Every(steps=3)"


def test_a_callback_can_be_copied_and_sent_to_another_process(tmp_path):
    watched = callback(store=tmp_path / "run.db")
    tiny.trainer(tmp_path / "out", [watched]).train()
    for twin in (copy.deepcopy(watched), copy.copy(watched), pickle.loads(pickle.dumps(watched))):
        assert twin is not watched
        assert isinstance(twin, type(watched).__mro__[1])
        assert twin.monitor is None
        tiny.trainer(tmp_path / "out", [twin], max_steps=3).train()
        assert len(twin.monitor.history) == 1
    assert len(watched.monitor.history) == 2


# Refusals


@pytest.mark.parametrize(("given", "what"), [(None, "None"), ("model", "the model")])
def test_what_cannot_be_measured_is_refused_at_once(given, what):
    from curvdiag.integrations.transformers import CurvatureCallback

    with pytest.raises(ArgumentError, match=f"probe batches, an Objective or a function .* not {what}"):
        CurvatureCallback(tiny.gpt2() if given == "model" else given)


def test_an_objective_of_another_model_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="the objective is of another model than the one that the Trainer trains"):
        tiny.trainer(tmp_path, [callback(Objective.from_huggingface(tiny.gpt2(), tiny.tokens()))]).train()


def test_a_function_that_gives_no_objective_is_refused(tmp_path):
    with pytest.raises(ArgumentError, match="a function that returns an Objective, not dict"):
        tiny.trainer(tmp_path, [callback(lambda model, args: tiny.tokens())]).train()


def test_an_objective_of_the_trained_model_is_taken(tmp_path):
    model = tiny.gpt2(layers=1)
    objective = Objective.from_huggingface(model, tiny.tokens())
    watched = callback(objective)
    tiny.trainer(tmp_path, [watched], model=model).train()
    assert watched.monitor.objective is objective
    first, second = watched.monitor.history
    assert first[MAX] != second[MAX]  # the weights have moved


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    monkeypatch.delitem(sys.modules, "curvdiag.integrations.transformers", raising=False)
    for name in [one for one in sys.modules if one.split(".")[0] == "transformers"]:
        monkeypatch.delitem(sys.modules, name)
    real = builtins.__import__

    def refuse(name, *arguments, **options):
        if name.split(".")[0] == "transformers":
            raise ModuleNotFoundError(f"No module named {name!r}", name="transformers")
        return real(name, *arguments, **options)

    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=r"pip install 'curvdiag\[transformers\]'"):
        importlib.import_module("curvdiag.integrations.transformers")
    # Without the package everything else works, from_huggingface included.
    model = torch.nn.Linear(2, 2)
    assert hasattr(curvdiag.Objective(model, torch.nn.MSELoss(), (torch.ones(3, 2), torch.ones(3, 2))), "value")


# The file


def test_the_file_is_closed_at_the_end(tmp_path):
    watched = callback(store=tmp_path / "run.db")
    tiny.trainer(tmp_path / "out", [watched]).train()
    assert watched.monitor.closed
    assert [one.name for one in tmp_path.glob("run.db*")] == ["run.db"]  # a closed file has nothing beside it


class Broken(tiny.Sequences):
    def __init__(self):
        super().__init__()
        self.left = 40

    def __getitem__(self, index):
        self.left -= 1
        if self.left < 0:
            raise OSError("the disk is gone")
        return super().__getitem__(index)


def fail(folder, watched, **options):
    trainer = tiny.trainer(folder / "out", [watched], data=Broken(), max_steps=20, **options)
    with pytest.raises(OSError, match="the disk is gone"):
        trainer.train()
    return trainer


def test_after_an_error_the_file_holds_everything_and_is_closed_with_the_callback(tmp_path):
    watched = callback(store=tmp_path / "run.db")
    trainer = fail(tmp_path, watched)
    monitor, steps = watched.monitor, trainer.state.global_step
    assert not monitor.closed
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.scalars(MAX).steps.tolist() == list(range(3, steps + 1, 3))
    del trainer, watched
    gc.collect()
    assert monitor.closed
    assert [one.name for one in tmp_path.glob("run.db*")] == ["run.db"]


def test_after_an_error_the_next_training_closes_the_file_and_begins_a_new_run(tmp_path):
    watched = callback(store=tmp_path / "run.db")
    fail(tmp_path, watched)
    broken = watched.monitor
    tiny.trainer(tmp_path / "out", [watched]).train()
    assert broken.closed
    assert watched.monitor is not broken
    with RunStore(tmp_path / "run.db") as store:
        assert len(store.runs()) == 2


def test_it_can_be_closed_by_hand(tmp_path):
    watched = callback(store=tmp_path / "run.db")
    watched.close()  # harmless before there is anything
    trainer = fail(tmp_path, watched)
    watched.close()
    watched.close()
    assert watched.monitor.closed
    assert not trainer.optimizer.optimizer._optimizer_step_post_hooks


def test_a_measurement_that_fails_is_recorded_and_training_goes_on(tmp_path):
    from curvdiag.errors import CurvdiagWarning

    def make(model, args):
        objective = Objective.from_huggingface(model, tiny.tokens())
        objective.batches[0]["input_ids"][:] = tiny.VOCABULARY + 5  # no such token
        return objective

    trainer = tiny.trainer(tmp_path, [callback(make, tmp_path / "run.db")])
    with pytest.warns(CurvdiagWarning, match="training goes on"):
        trainer.train()
    assert trainer.state.global_step == 6
    with RunStore(tmp_path / "run.db") as store:
        assert [event.step for event in store.events() if event.kind == "error"] == [3, 6]
