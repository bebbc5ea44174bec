"""Measured learning-rate schedules in whole runs: resumed bit for bit, with GradScaler, with accumulation."""

from __future__ import annotations

import io
import json
import logging
import warnings

import pytest
import torch
from lr_schedules import Training, rates_of
from torch.nn import functional as F
from torch.optim import lr_scheduler as torch_lr

from curvdiag.optim import LPSGDM
from curvdiag.schedules.anisotropy_lr import AnisotropyLR
from curvdiag.schedules.cwgd_cosine_lr import CWGDCosineLR
from curvdiag.schedules.noise_curvature_lr import NoiseCurvatureLR
from curvdiag.schedules.sharpness_capped_lr import SharpnessCappedLR

pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.filterwarnings("ignore:measuring every")]

STEPS, EVERY = 23, 5


def plain(o):
    return torch_lr.CosineAnnealingLR(o, 30, eta_min=1e-3)


def warm_up(o):
    return torch_lr.LinearLR(o, 0.25, total_iters=6)


def noise_of(o, m):
    return NoiseCurvatureLR(o, m, 8, smoothing=0.9, high=5.0)


def anisotropy_of(s, m):
    return AnisotropyLR(s, m, smoothing=0.6)


SCHEDULES = {
    "cwgd": (["cwgd"], lambda o, m: CWGDCosineLR(o, 30, m)),
    "cwgd, diagonal": (["cwgd_diagonal"], lambda o, m: CWGDCosineLR(o, 30, m, form="diagonal", normalized=True)),
    "noise": (["noise_scale"], noise_of),
    "anisotropy": (["anisotropy"], lambda o, m: anisotropy_of(plain(o), m)),
    "capped": (["lambda_max"], lambda o, m: SharpnessCappedLR(plain(o), m, fraction=0.05)),
    "chained": (["cwgd"], lambda o, m: torch_lr.ChainedScheduler([warm_up(o), CWGDCosineLR(o, 30, m)])),
    "chained, other order": (["cwgd"], lambda o, m: torch_lr.ChainedScheduler([CWGDCosineLR(o, 30, m), warm_up(o)])),
    "sequential": (["cwgd"], lambda o, m: torch_lr.SequentialLR(o, [warm_up(o), CWGDCosineLR(o, 30, m)], [7])),
    "capped in sequential": (
        ["cwgd", "lambda_max"],
        lambda o, m: torch_lr.SequentialLR(
            o, [warm_up(o), SharpnessCappedLR(CWGDCosineLR(o, 30, m), m, fraction=0.05)], [7]
        ),
    ),
    "sequential in capped": (
        ["lambda_max"],
        lambda o, m: SharpnessCappedLR(torch_lr.SequentialLR(o, [warm_up(o), plain(o)], [7]), m, fraction=0.05),
    ),
    "three deep": (
        ["anisotropy", "noise_scale", "lambda_max"],
        lambda o, m: SharpnessCappedLR(anisotropy_of(noise_of(o, m), m), m, fraction=0.05),
    ),
    "plateau": (
        ["lambda_max"],
        lambda o, m: SharpnessCappedLR(torch_lr.ReduceLROnPlateau(o, factor=0.7, patience=0), m, fraction=0.05),
    ),
    "one cycle": (
        ["lambda_max"],
        lambda o, m: SharpnessCappedLR(torch_lr.OneCycleLR(o, 0.5, 40), m, fraction=0.05),
    ),
    "preconditioned": (
        ["preconditioned_lambda_max"],
        lambda o, m: SharpnessCappedLR(torch_lr.SequentialLR(o, [warm_up(o), plain(o)], [7]), m, fraction=0.05),
    ),
}


class Run:
    """A training run that can be stopped anywhere and saved."""

    def __init__(self, name, tensor=False):
        rate = torch.tensor(0.2, dtype=torch.float64) if tensor else 0.2
        measure, make = SCHEDULES[name]

        def optimizer(parameters):
            first, *rest = parameters
            groups = [{"params": [first], "lr": 0.5 * rate}, {"params": rest}]
            return (
                LPSGDM(groups, rate, p=4.0) if name == "preconditioned" else torch.optim.SGD(groups, rate, momentum=0.9)
            )

        self.training = Training(optimizer, every=EVERY, measure=measure, signal=True)
        self.schedule = make(self.training.optimizer, self.training.monitor)
        self.takes_metrics = name == "plateau"
        self.rates = []

    def step(self):
        self.rates.append(rates_of(self.training.optimizer))
        self.loss = self.training.step()

    def step_schedule(self):
        self.schedule.step(*([self.loss] if self.takes_metrics else []))

    def parts(self):
        training = self.training
        return {
            "schedule": self.schedule,
            "model": training.model,
            "optimizer": training.optimizer,
            "monitor": training.monitor,
        }

    def checkpoint(self):
        file = io.BytesIO()
        own = {"step": self.training.step_number, "loss": getattr(self, "loss", 0.0)}
        torch.save({"run": own} | {name: part.state_dict() for name, part in self.parts().items()}, file)
        file.seek(0)
        return file

    def load(self, file, order):
        states = torch.load(file, weights_only=True)
        parts = self.parts()
        for name in order:
            parts[name].load_state_dict(states[name])
        self.training.step_number, self.loss = states["run"]["step"], states["run"]["loss"]

    def result(self):
        tensors = [p.detach().clone() for p in self.training.model.parameters()]
        tensors += [s["momentum_buffer"].clone() for s in self.training.optimizer.state.values()]
        return tensors, json.dumps(self.schedule_state(), sort_keys=True)

    def schedule_state(self):
        return as_plain(self.schedule.state_dict())


def as_plain(value):
    if isinstance(value, dict):
        return {str(key): as_plain(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(one) for one in value]
    return value.item() if isinstance(value, torch.Tensor) else value


def same(one, other):
    tensors, state = one.result()
    others, other_state = other.result()
    assert state == other_state
    assert all(torch.equal(a, b) for a, b in zip(tensors, others, strict=True))


ORDERS = (["model", "optimizer", "monitor", "schedule"], ["schedule", "monitor", "optimizer", "model"])


def check_resuming(name, cuts, tensor=False):
    """At each cut, ``(step, done)``: before that step, or after the optimizer's and before the schedule's."""
    whole, files = Run(name, tensor), {}
    for step in range(STEPS):
        files[step, False] = whole.checkpoint()
        whole.step()
        files[step, True] = whole.checkpoint()
        whole.step_schedule()
    assert len({rates[0] for rates in whole.rates}) > 2
    for index, (cut, done) in enumerate(cuts):
        resumed = Run(name, tensor)
        resumed.load(files[cut, done], ORDERS[index % 2])
        if done:
            with warnings.catch_warnings():  # PyTorch cannot know that the optimizer's step is in the checkpoint
                warnings.filterwarnings("ignore", "Detected call of")
                resumed.step_schedule()
        for _ in range(cut + done, STEPS):
            resumed.step()
            resumed.step_schedule()
        assert resumed.rates == whole.rates[cut + done :]
        same(resumed, whole)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_run_resumed_from_a_checkpoint_is_the_same_bit_for_bit(name):
    """Before anything was measured, amid a warm-up and after it; with a measurement that nobody has read yet."""
    check_resuming(name, cuts=[(2, False), (4, True), (7, False), (16, False)])


@pytest.mark.parametrize("name", ["cwgd", "capped in sequential"])
def test_so_is_one_with_a_tensor_for_its_rate(name):
    check_resuming(name, cuts=[(4, True), (16, False)], tensor=True)


def test_a_measurement_at_the_start_of_the_resumed_script_is_not_taken_for_a_new_one():
    def begin():
        run = Run.__new__(Run)
        run.training = Training(every=EVERY, measure=["cwgd"])
        run.training.monitor.measure()
        run.schedule = CWGDCosineLR(run.training.optimizer, 30, run.training.monitor)
        run.takes_metrics, run.rates = False, []
        return run

    whole = begin()
    for step in range(18):
        if step == 12:
            file = whole.checkpoint()
        whole.step()
        whole.step_schedule()
    resumed = begin()
    resumed.load(file, ORDERS[0])
    for _ in range(6):
        resumed.step()
        resumed.step_schedule()
    assert resumed.rates == whole.rates[12:]
    same(resumed, whole)


def test_going_back_to_a_checkpoint_in_the_same_process_forgets_what_came_after():
    run = Run("cwgd")
    for step in range(17):
        if step == 6:
            file = run.checkpoint()
        run.step()
        run.step_schedule()
    first = run.rates[6:]
    run.load(file, ORDERS[0])
    run.rates = []
    for _ in range(11):
        run.step()
        run.step_schedule()
    assert run.rates == first


# Beside other things that a loop does


def test_a_schedule_that_counts_epochs_follows_a_monitor_that_counts_steps():
    training = Training(every=4, measure=["lambda_max"])
    schedule = SharpnessCappedLR(torch_lr.ExponentialLR(training.optimizer, 0.9), training.monitor, fraction=0.05)
    for _ in range(4):
        for _ in range(5):
            training.step()
        schedule.step()
    assert [choice.step for choice in schedule.history] == [1, 2, 3, 4]
    assert schedule.sharpness == training.monitor.latest["curv/hessian/lambda_max"]
    assert schedule.age == 0


def test_gradient_accumulation_counts_optimizer_steps():
    training = Training(every=2, measure=["noise_scale"], signal=True)
    schedule = NoiseCurvatureLR(training.optimizer, training.monitor, batch_size=8, high=0.5)
    for step in range(4):
        training.optimizer.zero_grad()
        for half in range(2):
            part = slice(8 * step % 24 + 4 * half, 8 * step % 24 + 4 * half + 4)
            (F.cross_entropy(training.model(training.inputs[part]), training.targets[part]) / 2).backward()
        training.optimizer.step()
        schedule.step()
    assert [choice.step for choice in schedule.history] == [2, 4]
    assert training.monitor.steps_done == 4


def test_steps_that_grad_scaler_skips_are_followed_by_no_measurement_and_no_harm(caplog):
    caplog.set_level(logging.WARNING)
    training = Training(every=2, measure=["lambda_max"], dtype=torch.float32)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    schedule = SharpnessCappedLR(plain(training.optimizer), training.monitor, fraction=0.05)
    skipped = {3, 4, 8}
    for step in range(12):
        training.optimizer.zero_grad()
        scaler.scale(training.loss()).backward()
        if step in skipped:
            next(training.model.parameters()).grad[0] = torch.inf
        scaler.step(training.optimizer)
        scaler.update()
        schedule.step()
    assert training.monitor.steps_done == 12 - len(skipped)
    assert len(schedule.history) == len(training.monitor.history) == 4
    assert not caplog.records
