"""Loggers are told of a run in order, and what goes wrong with one never reaches the training."""

from __future__ import annotations

import builtins
import math
import sys

import pytest
import torch
from logged import Spy, Training, collected

from curvdiag import RunStore, loggers
from curvdiag.errors import ArgumentError, MissingExtraError
from curvdiag.loggers import CallableLogger, Logger, MLflowLogger, TensorBoardLogger, WandbLogger

NORM = "curv/hessian/frobenius_norm"
pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


# What loggers are told


def test_a_logger_is_told_of_the_run_in_order_and_closed_at_the_end(tmp_path):
    spy = Spy()
    training = Training(tmp_path / "run.db", loggers=[spy], name="first", config={"lr": 0.1, "path": tmp_path})
    assert spy.calls == []
    training.step(2)
    training.monitor.record({"mine": 3})
    training.close()
    assert spy.names() == ["begin", "log", "log", "numbers", "close"]
    _, name, config = spy.calls[0]
    assert name == "first"
    assert config["lr"] == 0.1
    assert config["path"] == str(tmp_path)
    assert config["curvdiag"]["measure"] == ["density", "layers"]
    assert [call[1] for call in spy.calls[1:3]] == training.history
    assert spy.calls[3] == ("numbers", 2, {"mine": 3.0})
    training.close()
    assert spy.names().count("close") == 1


def test_the_first_number_begins_the_run_too_and_what_never_began_is_not_closed(tmp_path):
    recording, idle = Spy(), Spy()
    Training(tmp_path / "run.db", loggers=[idle]).close()
    assert idle.calls == []
    training = Training(tmp_path / "run.db", loggers=[recording])
    training.monitor.record({"mine": math.nan})
    training.close()
    assert recording.names() == ["begin", "numbers", "close"]
    assert recording.calls[0][1] == "run 1", "the name that the run file gave it"


def test_a_function_gets_the_step_and_a_dictionary_of_floats():
    seen = []
    training = Training(loggers=[lambda step, numbers: seen.append((step, numbers))]).step(2)
    training.monitor.record({"mine": 3})
    training.close()
    one, two = training.history
    assert seen == [
        (1, {key: float(value) for key, value in one.scalars.items()}),
        (2, {key: float(value) for key, value in two.scalars.items()}),
        (2, {"mine": 3.0}),
    ]
    assert all(type(value) is float for _, numbers in seen for value in numbers.values())
    assert "train/loss" in seen[0][1]


def test_what_a_function_does_to_its_dictionary_reaches_no_one_else(tmp_path):
    def spoil(step, numbers):
        numbers.clear()

    spy = Spy()
    training = Training(tmp_path / "run.db", loggers=[spoil, spy]).step()
    training.monitor.record({"mine": 1.0})
    assert spy.calls[-1] == ("numbers", 1, {"mine": 1.0})
    assert NORM in training.history[0].scalars
    assert training.monitor.run.scalars("mine").values.tolist() == [1.0]
    training.close()


def test_what_is_no_logger_is_refused_with_what_one_is():
    for given, words in [
        (3, "is a list"),
        ("tensorboard", "is a list"),
        ([3], "begin.., log.., numbers.. and close.., or is a function"),
        ([TensorBoardLogger], r"TensorBoardLogger\(...\) makes one"),
    ]:
        with pytest.raises(ArgumentError, match=words):
            Training(loggers=given)
    assert isinstance(Spy(), Logger)
    assert isinstance(CallableLogger(print), Logger)


def test_a_configuration_that_is_not_json_reaches_loggers_as_text():
    spy = Spy()
    Training(
        loggers=[spy],
        config={
            "sizes": {(1, 2): 3},
            "odd": {
                1: {
                    2,
                }
            },
        },
    ).step().close()
    config = spy.calls[0][2]
    assert config["sizes"] == "{(1, 2): 3}"
    assert config["odd"] == {"1": "{2}"}


# Failures


@pytest.mark.parametrize("where", ["begin", "log", "numbers", "close"])
def test_a_logger_that_fails_is_dropped_with_one_warning_and_an_event_and_the_others_go_on(where, tmp_path):
    broken, sound = Spy((where,)), Spy()
    training = Training(tmp_path / "run.db", loggers=[broken, sound])

    def run():
        for _ in range(3):
            training.step()
            training.monitor.record({"mine": 1.0})
        training.close()

    (message,) = collected(run)
    assert "no space left" in message
    assert "Spy" in message
    assert "training goes on" in message
    assert sound.names() == ["begin", *["log", "numbers"] * 3, "close"]
    told = broken.names()
    assert told.count(where) == 1
    expected = {
        "begin": ["begin", "close"],
        "log": ["begin", "log", "close"],
        "numbers": ["begin", "log", "numbers", "close"],
        "close": [*sound.names()[:-1], "close"],
    }
    assert told == expected[where], "it is closed, and told no more"
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        (event,) = [event for event in store.events() if event.kind == "error"]
        assert event.step == (3 if where == "close" else 1)
        assert "no space left" in event.message
        assert store.scalars(NORM).steps.tolist() == [1, 2, 3]
        assert store.scalars("mine").steps.tolist() == [1, 2, 3]


def test_each_of_several_failing_loggers_is_warned_of():
    names = ("first", "second")
    broken = [Spy(("log",), RuntimeError(name)) for name in names]
    messages = collected(lambda: Training(loggers=broken).step(3).close())
    assert len(messages) == 2
    assert all(name in message for name, message in zip(names, messages, strict=True))


def test_a_failing_logger_that_cannot_be_closed_either_is_warned_of_once():
    broken = Spy(("log", "close"))
    assert len(collected(lambda: Training(loggers=[broken]).step(3).close())) == 1
    assert broken.names() == ["begin", "log", "close"]


@pytest.mark.parametrize("where", ["begin", "log", "numbers", "close"])
def test_a_strict_monitor_raises_what_a_logger_raised(where, tmp_path):
    training = Training(tmp_path / "run.db", loggers=[Spy((where,), OSError("no route"))], strict=True)

    def run():
        training.step()
        training.monitor.record({"mine": 1.0})
        training.close()

    with pytest.raises(OSError, match="no route"):
        run()
    training.close()
    with RunStore(tmp_path / "run.db", readonly=True) as store:
        assert store.run().measurements == 1, "the run file had it before"


def test_interruptions_by_the_user_pass_through():
    def interrupt(step, numbers):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Training(loggers=[interrupt]).step()


def test_a_measurement_that_fails_is_no_business_of_the_loggers():
    spy = Spy()
    training = Training(loggers=[spy])
    with torch.no_grad():
        training.model[0].weight[0, 0] = math.nan
    assert len(collected(training.step)) == 1
    assert spy.calls == []


# Restarting


def test_after_a_resume_loggers_go_on_at_the_right_step_and_are_told_where(tmp_path):
    class Resumed(Spy):
        def resume(self, step, run):
            self._call("resume", step, None if run is None else run.densities().steps.tolist())

    first = Training(tmp_path / "run.db").step(2)
    state = first.monitor.state_dict()
    first.step(2).close()  # beyond the checkpoint, and lost in a crash
    plain, told = Spy(), Resumed()
    second = Training(tmp_path / "run.db", loggers=[plain, told], name="other")
    second.monitor.load_state_dict(state)
    second.step(2).close()
    assert plain.names() == ["begin", "log", "log", "close"]
    assert plain.calls[0][1] == "run 1", "it is the same run"
    assert [call[1].step for call in plain.calls[1:3]] == [3, 4]
    assert told.names() == ["resume", "begin", "log", "log", "close"]
    assert told.calls[0] == ("resume", 2, [1, 2, 3, 4]), "the file gives up what lies beyond with the first record"


def test_without_a_file_a_resumed_run_has_no_past():
    first = Training().step(2)
    told = []

    class Resumed(Spy):
        def resume(self, step, run):
            told.append((step, run))

    second = Training(loggers=[Resumed()])
    second.monitor.load_state_dict(first.monitor.state_dict())
    assert told == [(2, None)]


# Missing packages


@pytest.mark.parametrize(
    ("package", "make"),
    [
        ("tensorboard", lambda: TensorBoardLogger("runs")),
        ("wandb", WandbLogger),
        ("mlflow", MLflowLogger),
    ],
)
def test_a_missing_package_is_named_with_the_command_when_the_logger_is_made(package, make, monkeypatch):
    importing = builtins.__import__

    def missing(name, *arguments, **options):
        if name.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}", name=package)
        return importing(name, *arguments, **options)

    monkeypatch.setitem(sys.modules, package, None)  # what Python has for a module that is known to be missing
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingExtraError, match=rf"{package} is not installed.*pip install 'curvdiag\[{package}\]'"):
        make()


def test_every_logger_is_in_the_package_and_keeps_the_protocol():
    assert set(loggers.__all__) == {"CallableLogger", "Logger", "MLflowLogger", "TensorBoardLogger", "WandbLogger"}
    for name in set(loggers.__all__) - {"Logger"}:
        assert all(callable(getattr(getattr(loggers, name), call)) for call in ("begin", "log", "numbers", "close"))
