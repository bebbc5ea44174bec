"""The callback in a real Transformers Trainer: it measures what is trained, and leaves no trace in the training."""

import pytest
import tiny_transformers as tiny
import torch

from curvdiag import Hessian, Objective, RunStore, top_eigenpairs
from curvdiag.optim import LPSGD

pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

LIGHT = {"measure": ["lambda_max", "trace"], "steps": 10, "probes": 2}


def callback(objective=None, store=None, every=2, **options):
    from curvdiag.integrations.transformers import CurvatureCallback

    return CurvatureCallback(
        [tiny.tokens()] if objective is None else objective, store, every=every, **{**LIGHT, **options}
    )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 1, "optim": "sgd"},
        {
            "gradient_accumulation_steps": 3,
            "label_smoothing_factor": 0.1,
            "evaluate": tiny.Sequences(8, seed=3),
            "eval_strategy": "steps",
            "eval_steps": 2,
        },
        {"bf16": True},
    ],
    ids=["accumulating", "every batch", "smoothing and evaluating", "autocast"],
)
def test_training_is_bit_identical_with_and_without_the_callback(tmp_path, options):
    plain = tiny.trainer(tmp_path / "plain", **options)
    plain.train()
    states = tiny.random_states()
    everything = [] if options else ["density", "alignment"]
    watched = callback(store=tmp_path / "run.db", measure=["lambda_max", "trace", "noise_scale", *everything], probes=1)
    trainer = tiny.trainer(tmp_path / "watched", [watched], **options)
    begun = tiny.weights(trainer)
    trainer.train()
    assert tiny.random_states() == states
    assert tiny.same(tiny.weights(plain), tiny.weights(trainer))
    assert not tiny.same(tiny.weights(trainer), begun)
    assert tiny.own_history(trainer) == tiny.own_history(plain)
    assert trainer.optimizer.state_dict()["state"].keys() == plain.optimizer.state_dict()["state"].keys()
    assert [one.step for one in watched.monitor.history] == [2, 4, 6]
    assert "noise/scale" in watched.monitor.latest.scalars


@pytest.mark.parametrize("accumulation", [1, 2, 4])
def test_steps_are_optimizer_steps_and_epochs_are_the_trainers(tmp_path, accumulation):
    from transformers import TrainerCallback

    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            seen.append((state.global_step, state.epoch))

    watched = callback(every=1, store=tmp_path / "run.db")
    data = tiny.Sequences(20)  # five batches in an epoch, the last step of which takes what is left
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 7, "data": data}
    tiny.trainer(tmp_path, [watched, Watch()], **options).train()
    assert [(one.step, one.epoch) for one in watched.monitor.history] == [pytest.approx(one) for one in seen]
    assert len(seen) == 7
    with RunStore(tmp_path / "run.db") as store:
        assert store.scalars("curv/hessian/lambda_max").steps.tolist() == list(range(1, 8))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_probe_batches_are_measured_with_the_trainers_loss(tmp_path, smoothing):
    batch = tiny.tokens()
    watched = callback([batch], every=6)
    trainer = tiny.trainer(tmp_path, [watched], label_smoothing_factor=smoothing)
    trainer.train()
    trainer.model.eval()
    with torch.no_grad():
        expected = trainer.compute_loss(trainer.model, dict(batch)).item()
    objective = watched.monitor.objective
    assert objective.model is trainer.model
    assert objective.value() == pytest.approx(expected, rel=1e-6)
    fresh = Objective.from_huggingface(trainer.model, batch, label_smoothing=smoothing)
    found = top_eigenpairs(Hessian(fresh), k=1, tol=1e-4).values[0].item()
    assert watched.monitor.latest["curv/hessian/lambda_max"] == pytest.approx(found, rel=0.01)


def test_numbers_stand_in_the_log_history_at_their_step(tmp_path):
    watched = callback(store=tmp_path / "run.db", every=3)
    trainer = tiny.trainer(tmp_path, [watched])
    trainer.train()
    history = tiny.added(trainer)
    assert [one["step"] for one in history] == [3, 6]
    assert [one["epoch"] for one in history] == [1.0, 2.0]
    with RunStore(tmp_path / "run.db") as store:
        kept = store.scalars("curv/hessian/lambda_max")
        loss = store.scalars("train/loss")
        assert not any(event.kind == "error" for event in store.events())
    assert [one["curv/hessian/lambda_max"] for one in history] == kept.values.tolist()
    logged = {one["step"]: one["loss"] for one in tiny.own_history(trainer) if "loss" in one}
    assert loss.steps.tolist() == [3, 6]  # the Trainer logs at steps 2, 4 and 6, and step 3 is in the mean of step 4
    assert loss.values.tolist() == [logged[4], logged[6]]
    quiet = tiny.trainer(tmp_path, [callback(log=False)])
    quiet.train()
    assert tiny.added(quiet) == []


def test_accelerates_wrappers_are_taken_off(tmp_path):
    watched = callback(every=2, measure=["lambda_max", "preconditioned_lambda_max"])
    trainer = tiny.trainer(tmp_path, [watched], optimizer=lambda parameters: LPSGD(parameters, lr=1e-3, p=4.0))
    trainer.train()
    assert type(trainer.optimizer).__name__ == "AcceleratedOptimizer"
    numbers = watched.monitor.latest.scalars
    assert numbers["train/p/0"] == 4.0
    assert numbers["train/lr/0"] == pytest.approx(1e-3 / 6)  # the last step of a linear decay
    assert numbers["curv/preconditioned/lambda_max"] > 0  # which needs the gradients, before they are set to zero


def test_steps_that_mixed_precision_skips_are_not_measured_and_move_no_schedule(tmp_path):
    from transformers import TrainerCallback

    seen = []

    def optimizer(parameters):
        found = LPSGD(parameters, lr=6.4e-4, p=4.0)

        def overflow(*_):  # what GradScaler tells a fused optimizer
            found.found_inf = torch.tensor(float(len(seen) == 2))
            seen.append(found.param_groups[0]["lr"])

        found.register_step_pre_hook(overflow)
        return found

    class Scaler(TrainerCallback):
        def on_optimizer_step(self, args, state, control, optimizer, **_):
            del optimizer.optimizer.found_inf  # as GradScaler does after the step

    watched = callback(every=1, schedules=lambda o, monitor: torch.optim.lr_scheduler.ExponentialLR(o, 0.5))
    trainer = tiny.trainer(tmp_path, [watched, Scaler()], optimizer=optimizer, lr_scheduler_type="constant")
    trainer.train()
    assert [one.step for one in watched.monitor.history] == [1, 2, 4, 5, 6]
    assert trainer.state.global_step == 6
    assert seen == pytest.approx([6.4e-4, 3.2e-4, 1.6e-4, 1.6e-4, 8e-5, 4e-5])


def test_what_is_a_function_gets_the_model_and_the_arguments(tmp_path):
    given = []

    def make(model, args):
        given.append((model, args))
        return Objective.from_huggingface(model, tiny.tokens(), params="*.mlp.*")

    watched = callback(make)
    trainer = tiny.trainer(tmp_path, [watched])
    trainer.train()
    assert given == [(trainer.model, trainer.args)]
    assert len(watched.monitor.history) == 3


def test_a_small_dataset_is_collated_as_the_trainer_does(tmp_path):
    probe = tiny.Sequences(10, seed=4)
    whole = torch.utils.data.default_collate([probe[i] for i in range(10)])
    expected = None
    for given in (probe, [probe[i] for i in range(10)], whole):
        watched = callback(given, every=6)
        trainer = tiny.trainer(tmp_path, [watched], per_device_eval_batch_size=4)
        trainer.train()
        value = watched.monitor.objective.value()
        assert watched.monitor.objective.size == 10
        expected = value if expected is None else expected
        assert value == pytest.approx(expected, rel=1e-6)


def test_a_masked_model_and_a_classifier_train_too(tmp_path):
    class Masked(tiny.Sequences):
        def __getitem__(self, index):
            one = super().__getitem__(index)
            chosen = torch.arange(len(one["labels"])) % 3 == 1
            return {**one, "labels": one["labels"].masked_fill(~chosen, -100)}

    class Classes(tiny.Sequences):
        def __getitem__(self, index):
            return {**super().__getitem__(index), "labels": index % 3}

    for model, data in ((tiny.bert(), Masked()), (tiny.bert("SequenceClassification", num_labels=3), Classes())):
        watched = callback(data, every=3, measure=["lambda_max", "noise_scale"])
        tiny.trainer(tmp_path, [watched], model=model, data=data).train()
        assert [one.step for one in watched.monitor.history] == [3, 6]
        assert "noise/scale" in watched.monitor.latest.scalars
