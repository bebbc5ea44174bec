"""A training that goes on from a Trainer's checkpoint continues the same run, as though it had never stopped."""

import json
import warnings

import pytest
import tiny_transformers as tiny
import torch

from curvdiag import RunStore
from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.optim import LPSGD
from curvdiag.schedules import AnisotropyLR, AnisotropyP, CosineP, SharpnessCappedLR

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

LIGHT = {"measure": ["trace"], "steps": 8, "probes": 1, "warm": False}
SAVING = {"save_strategy": "steps", "save_steps": 4, "max_steps": 8, "lr_scheduler_type": "constant"}


def callback(store=None, **options):
    from curvdiag.integrations.transformers import CurvatureCallback

    return CurvatureCallback([tiny.tokens()], store, **{"every": 2, **LIGHT, **options})


def interrupted(folder, make, **options):
    """A whole run; and one that is stopped at its checkpoint of step 4 and resumed, by a new callback."""
    options = {**SAVING, **options}
    whole = tiny.trainer(folder / "whole", [make(folder / "whole.db")], **options)
    whole.train()
    first = tiny.trainer(folder / "halves", [make(folder / "halves.db"), StopAfter(5)()], **options)
    first.train()  # beyond the checkpoint, which is where a crash leaves things
    second = tiny.trainer(folder / "halves", [make(folder / "halves.db")], **options)
    second.train(resume_from_checkpoint=str(folder / "halves" / "checkpoint-4"))
    return whole, second


def StopAfter(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            control.should_training_stop = state.global_step == step

    return Stop


def numbers(path):
    with RunStore(path) as store:
        assert len(store.runs()) == 1
        names = [one for one in store.scalar_names() if not one.startswith(("curv/cost/", "curv/overhead"))]
        found = {name: store.scalars(name) for name in names}
        resumed = [event.message for event in store.events() if event.kind == "resumed"]
    return {name: (one.steps.tolist(), one.values.tolist()) for name, one in found.items()}, resumed


def assert_the_same(folder, whole, second):
    assert tiny.same(tiny.weights(whole), tiny.weights(second))
    expected, found = numbers(folder / "whole.db"), numbers(folder / "halves.db")
    assert found[0] == expected[0]
    assert not expected[1]
    assert len(found[1]) == 1
    assert tiny.added(second) == tiny.added(whole)
    mine, theirs = tiny.own_history(second), tiny.own_history(whole)
    assert [one["loss"] for one in mine if "loss" in one] == [one["loss"] for one in theirs if "loss" in one]


@pytest.mark.parametrize("restore", [False, True])
def test_a_resumed_training_continues_the_same_run(tmp_path, restore):
    whole, second = interrupted(tmp_path, callback, restore_callback_states_from_checkpoint=restore)
    assert_the_same(tmp_path, whole, second)
    steps, _ = numbers(tmp_path / "halves.db")[0]["curv/hessian/trace"]
    assert steps == [2, 4, 6, 8]


class Halving:
    """A schedule of the user's own, which begins with the rate that it finds."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0
        self.base = optimizer.param_groups[0]["lr"]

    def step(self):
        self.count += 1
        self.optimizer.param_groups[0]["lr"] = self.base * 0.5**self.count

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


SCHEDULES = {
    "own": lambda optimizer, monitor: Halving(optimizer),
    "p": lambda optimizer, monitor: CosineP(optimizer, epochs=8, p_max=6.0),
    "measured p": lambda optimizer, monitor: AnisotropyP(optimizer, monitor, p_max=6.0),
    "both": lambda optimizer, monitor: [
        CosineP(optimizer, epochs=8, p_max=6.0),
        AnisotropyLR(torch.optim.lr_scheduler.MultiStepLR(optimizer, [3, 6], gamma=0.5), monitor),
    ],
    "capped": lambda optimizer, monitor: SharpnessCappedLR(
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step)), monitor, limit=0.02, fraction=1.0
    ),
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(one, marks=() if one == "both" else pytest.mark.long) for one in SCHEDULES],
)
def test_schedules_go_on_where_they_were(tmp_path, name):
    needs = {"p": "trace", "own": "trace", "capped": "preconditioned_lambda_max"}.get(name, "anisotropy")
    options = {"schedules": SCHEDULES[name], "measure": [needs]}
    rates = []

    def make(path):
        return callback(path, **options)

    def optimizer(parameters):
        found = LPSGD(parameters, lr=3e-3, p=4.0)
        rates.append([])
        found.register_step_pre_hook(
            lambda *_, kept=rates[-1]: kept.append([(group["lr"], group["p"]) for group in found.param_groups])
        )
        return found

    whole, second = interrupted(tmp_path, make, optimizer=optimizer)
    assert_the_same(tmp_path, whole, second)
    assert rates[2] == rates[0][4:]
    assert len(set(map(str, rates[0]))) > 2  # they do move


def test_a_schedule_of_rates_takes_the_place_of_the_trainers(tmp_path):
    factors = torch.optim.lr_scheduler.ExponentialLR
    for kind in ("constant", "linear"):
        rates = []

        def optimizer(parameters, rates=rates):
            found = torch.optim.SGD(parameters, lr=0.08)
            found.register_step_pre_hook(lambda *_: rates.append(found.param_groups[0]["lr"]))
            return found

        watched = callback(schedules=lambda optimizer, monitor: factors(optimizer, 0.5))
        trainer = tiny.trainer(tmp_path, [watched], optimizer=optimizer, lr_scheduler_type=kind)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", CurvdiagWarning)
            trainer.train()
        assert rates == pytest.approx([0.08 * 0.5**k for k in range(6)])
        told = [one for one in caught if "the Trainer's own schedule moves the learning rate too" in str(one.message)]
        assert len(told) == (kind == "linear")


def test_without_schedules_the_trainers_rates_are_its_own(tmp_path):
    rates = []

    def optimizer(parameters):
        found = LPSGD(parameters, lr=0.06, p=4.0)
        found.register_step_pre_hook(lambda *_: rates.append(found.param_groups[0]["lr"]))
        return found

    watched = callback(schedules=SCHEDULES["p"])
    tiny.trainer(tmp_path, [watched], optimizer=optimizer, lr_scheduler_type="linear").train()
    assert rates == pytest.approx([0.06, 0.05, 0.04, 0.03, 0.02, 0.01])


def test_what_schedules_chose_is_in_the_run(tmp_path):
    watched = callback(tmp_path / "run.db", schedules=SCHEDULES["measured p"], measure=["anisotropy"])
    tiny.trainer(tmp_path, [watched], optimizer=lambda p: LPSGD(p, lr=1e-3, p=4.0)).train()
    found, _ = numbers(tmp_path / "run.db")
    assert any(name.startswith("schedule/") for name in found)


def test_two_callbacks_keep_two_states(tmp_path):
    def both(folder):
        return [callback(folder / "one.db", name="one"), callback(folder / "two.db", name="two", every=1)]

    tiny.trainer(tmp_path / "out", both(tmp_path), **SAVING).train()
    again = tiny.trainer(tmp_path / "out", both(tmp_path), **SAVING)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    saved = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    assert len(saved["stateful_callbacks"]["CurvatureCallback"]) == 2  # and not those of earlier checkpoints
    for name, steps in (("one", [2, 4, 6, 8]), ("two", [1, 2, 3, 4, 5, 6, 7, 8])):
        with RunStore(tmp_path / f"{name}.db") as store:
            assert [run.name for run in store.runs()] == [name]
            assert store.scalars("curv/hessian/trace").steps.tolist() == steps


def test_a_checkpoint_from_before_the_callback_begins_a_run_at_its_step(tmp_path):
    tiny.trainer(tmp_path / "out", **SAVING).train()
    trainer = tiny.trainer(tmp_path / "out", [callback(tmp_path / "run.db")], **SAVING)
    with pytest.warns(CurvdiagWarning, match="holds no state of this CurvatureCallback; a new run begins at step 4"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
    assert numbers(tmp_path / "run.db")[0]["curv/hessian/trace"][0] == [6, 8]
    saved = json.loads((tmp_path / "out" / "checkpoint-8" / "trainer_state.json").read_text())
    assert "CurvatureCallback" in saved["stateful_callbacks"]


def test_other_schedules_than_those_of_the_checkpoint_are_refused(tmp_path):
    def optimizer(parameters):
        return LPSGD(parameters, lr=1e-3, p=4.0)

    first = callback(tmp_path / "run.db", schedules=SCHEDULES["p"])
    tiny.trainer(tmp_path / "out", [first], optimizer=optimizer, **SAVING).train()
    other = callback(tmp_path / "run.db", schedules=SCHEDULES["measured p"], measure=["anisotropy"])
    trainer = tiny.trainer(tmp_path / "out", [other], optimizer=optimizer, **SAVING)
    with pytest.raises(ArgumentError, match=r"the checkpoint holds the states of the schedules \['CosineP'\]"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-4"))
