"""AnisotropyP behind a monitor, in training loops as people write them."""

from __future__ import annotations

import logging
import math

import pytest
import torch
from nets import make
from torch.nn import functional as F
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, SequentialLR

from curvdiag import CurvatureMonitor, Objective, OverheadBudget
from curvdiag.errors import ArgumentError
from curvdiag.optim import LPSGDM
from curvdiag.schedules import AnisotropyP
from curvdiag.spectrum import MEASURES

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")


class Training:
    """A small net in full batches; ``groups`` makes parameter groups of its parameters."""

    def __init__(self, groups=None, **options):
        self.model, self.batch = make("mlp-tanh")
        parameters = self.model.parameters() if groups is None else groups(self.model)
        self.optimizer = LPSGDM(parameters, lr=0.05, p=6.0)
        self.objective = Objective(self.model, F.cross_entropy, self.batch)
        options = {"every": 5, "measure": ["anisotropy"], "steps": 6, "probes": 2, **options}
        self.monitor = CurvatureMonitor(self.objective, **options).attach(self.optimizer)

    def schedule(self, **options):
        return AnisotropyP(self.optimizer, self.monitor, **{"smoothing": 0.0, **options})

    def loss(self, part=slice(None)):
        return F.cross_entropy(self.model(self.batch[0][part]), self.batch[1][part])

    def step(self, schedule, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            self.loss().backward()
            self.optimizer.step()
            schedule.step()


def ps(optimizer):
    return [float(group["p"]) for group in optimizer.param_groups]


def by_layer(model):
    """The first layer; the weights of the others; the biases of the others."""
    first, *others = [module for module in model if hasattr(module, "weight")]
    return [
        {"params": list(first.parameters()), "name": "first"},
        {"params": [layer.weight for layer in others], "name": "weights"},
        {"params": [layer.bias for layer in others], "p": 4.0, "name": "biases"},
    ]


def expected(a, low, high, p_max=6.0):
    return 2 + (p_max - 2) * min(max(math.log(a / low) / math.log(high / low), 0), 1)


@pytest.mark.parametrize(("measure", "a_high"), [("participation_ratio", None), ("top_ratio", 9.0)])
def test_p_follows_what_the_monitor_measured_and_is_held_in_between(measure, a_high):
    training = Training()
    schedule = training.schedule(measure=measure, a_high=a_high)
    low = MEASURES[measure].isotropic(training.objective.parameters.size)
    for step in range(1, 24):
        training.step(schedule)
        measured = [m[f"curv/anisotropy/{measure}"] for m in training.monitor.history]
        right = [expected(measured[-1], low, a_high or measured[0])] if measured else [6.0]
        assert ps(training.optimizer) == pytest.approx(right, rel=1e-14)
        assert schedule.age == (None if step < 5 else step % 5)
    assert len({round(one.chosen["p/0"], 6) for one in schedule.history}) > 2, "p moves"
    assert [one.step for one in schedule.history] == [5, 10, 15, 20]


def test_what_it_saw_and_chose_stands_in_the_run():
    training = Training(by_layer)
    schedule = training.schedule()
    training.step(schedule, 11)
    for (step, numbers), choice in zip(training.monitor.recorded, schedule.history, strict=True):
        assert step == choice.step
        assert numbers == {
            "schedule/anisotropy_p/a": choice.seen["a"],
            **{f"schedule/anisotropy_p/{key}": p for key, p in choice.chosen.items()},
        }
        assert set(choice.chosen) == {"p/first", "p/weights", "p/biases"}


@pytest.mark.parametrize(("measure", "a_low", "a_high"), [("effective_rank", None, None), ("negative_mass", 0.05, 0.5)])
def test_each_group_by_the_layers_that_it_holds(measure, a_low, a_high):
    training = Training(by_layer, measure=["layer_anisotropy"])
    schedule = training.schedule(measure=measure, per_layer=True, a_low=a_low, a_high=a_high)
    training.step(schedule, 21)
    rises = MEASURES[measure].rises
    layers = {name: training.model.get_submodule(name) for name in ("0", "2", "4")}
    low = {n: a_low or MEASURES[measure].isotropic(sum(p.numel() for p in m.parameters())) for n, m in layers.items()}
    history = [
        {n: (max if rises else min)(m[f"curv/layer/{n}/anisotropy/{measure}"], low[n]) for n in layers}
        for m in training.monitor.history
    ]
    held = {
        "first": {"0": 1.0},
        "weights": {n: layers[n].weight.numel() for n in ("2", "4")},
        "biases": {n: layers[n].bias.numel() for n in ("2", "4")},
    }

    def mean(values, weights):
        return math.prod(values[n] ** (w / sum(weights.values())) for n, w in weights.items())

    for choice, values in zip(schedule.history, history, strict=True):
        for index, (group, weights) in enumerate(held.items()):
            a, first, isotropic = mean(values, weights), a_high or mean(history[0], weights), mean(low, weights)
            assert choice.seen[f"a/{group}"] == pytest.approx(a)
            assert schedule.a_high[index] == pytest.approx(first)
            right = expected(a, isotropic, first, 4.0 if group == "biases" else 6.0)
            assert choice.chosen[f"p/{group}"] == pytest.approx(right)
    assert len({tuple(choice.chosen.values()) for choice in schedule.history}) > 2


def test_a_layer_without_a_value_holds_its_own_groups_alone(caplog):
    training = Training(by_layer, measure=["layer_anisotropy"], every=1)
    schedule = training.schedule(per_layer=True)
    training.step(schedule, 3)
    before = ps(training.optimizer)
    training.optimizer.zero_grad()
    training.loss().backward()
    training.optimizer.step()
    key = "curv/layer/2/anisotropy/effective_rank"
    training.monitor.latest.scalars[key] = math.nan
    schedule.step()
    after = ps(training.optimizer)
    assert after[0] != before[0]
    assert after[1:] == before[1:]
    assert set(schedule.history[-1].seen) == {"a/first"}
    assert f"{key} = nan" in schedule.history[-1].note
    assert f"{key} = nan" in caplog.text
    training.step(schedule)
    assert set(schedule.history[-1].seen) == {"a/first", "a/weights", "a/biases"}


def test_a_group_that_the_objective_does_not_hold_stays_at_p_max_and_that_is_said_once(caplog):
    training = Training(by_layer, measure=["layer_anisotropy"])
    training.optimizer.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "name": "other", "p": 5.0})
    schedule = training.schedule(per_layer=True)
    training.step(schedule, 15)
    assert ps(training.optimizer)[3] == 5.0
    line = "AnisotropyP of parameter group other: its parameters are not among those that the monitor measures"
    assert caplog.text.count(line) == 1


def test_a_group_that_is_added_in_the_middle_is_measured_too():
    training = Training(lambda model: by_layer(model)[:2], measure=["layer_anisotropy"])
    schedule = training.schedule(per_layer=True)
    training.step(schedule, 7)
    training.optimizer.add_param_group({**by_layer(training.model)[2], "p": 3.0})
    training.step(schedule)
    assert ps(training.optimizer)[2] == 3.0
    training.step(schedule, 2)
    assert schedule.a_high[2] == schedule.history[-1].seen["a/biases"]
    assert ps(training.optimizer)[2] == 3.0
    training.step(schedule, 10)
    assert 2 <= ps(training.optimizer)[2] < 3.0


# What goes wrong


def test_a_monitor_that_does_not_measure_it_is_refused_with_the_remedy():
    training = Training(measure=["lambda_max"])
    with pytest.raises(ArgumentError, match=r"measures anisotropy; this one .*measure=\['lambda_max', 'anisotropy'\]"):
        training.schedule()
    with pytest.raises(ArgumentError, match=r"measure=\['lambda_max', 'layer_anisotropy'\]"):
        training.schedule(per_layer=True)
    with pytest.raises(ArgumentError, match="no top_ratio of single layers"):
        Training(measure=["layer_anisotropy"]).schedule(per_layer=True, measure="top_ratio")


def test_an_a_high_of_more_directions_than_there_are_is_refused():
    with pytest.raises(ArgumentError, match=r"a_high=500 is no more anisotropic than a_low=.*falls with anisotropy"):
        Training().schedule(a_high=500.0)
    with pytest.raises(ArgumentError, match="a_high=80 is no more anisotropic"):
        Training(measure=["layer_anisotropy"]).schedule(per_layer=True, a_high=80.0)


def test_a_measure_that_is_undefined_here_is_held_and_said_once(caplog):
    training = Training()
    schedule = training.schedule(measure="condition_number")
    training.step(schedule, 20)
    assert ps(training.optimizer) == [6.0]
    assert caplog.text.count("curv/anisotropy/condition_number = nan (missing, or not finite)") == 1


def test_a_dead_monitor_does_not_stop_training(caplog):
    training = Training()
    schedule = training.schedule()
    training.step(schedule, 12)
    held = ps(training.optimizer)
    training.monitor.close()
    training.step(schedule, 10)
    assert ps(training.optimizer) == held
    assert schedule.age == 12
    assert caplog.text.count("the monitor is closed") == 1
    assert "the monitor is closed" in schedule.history[-1].note


def test_one_line_says_that_the_monitor_depends_on_the_clock(caplog):
    Training().schedule()
    assert "clock" not in caplog.text
    Training(every=None, cadence=OverheadBudget(0.5)).schedule()
    assert caplog.text.count("whose cadence reads the clock") == 1
    assert all(record.levelno == logging.WARNING for record in caplog.records)
    assert "OverheadBudget" in AnisotropyP.__doc__


# Loops as people write them


def test_gradient_accumulation_gives_the_p_of_whole_batches():
    def run(parts):
        training = Training()
        schedule = training.schedule()
        for _ in range(16):
            training.optimizer.zero_grad()
            for part in range(parts):
                (training.loss(slice(part, None, parts)) / parts).backward()
            training.optimizer.step()
            schedule.step()
        return schedule.history

    whole, cut = run(1), run(2)
    assert [choice.step for choice in cut] == [choice.step for choice in whole] == [5, 10, 15]
    for one, other in zip(whole, cut, strict=True):
        assert other.chosen == pytest.approx(one.chosen, rel=1e-6)


def test_steps_that_grad_scaler_skips_are_no_measurements():
    training = Training()
    schedule = training.schedule()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=1000)
    skipped = {3, 5, 6, 11}
    for step in range(1, 19):
        training.optimizer.zero_grad()
        scaler.scale(training.loss() * (math.inf if step in skipped else 1)).backward()
        scaler.step(training.optimizer)
        scaler.update()
        schedule.step()
    # Of 18 steps 4 were skipped. The monitor measured at its fifth and tenth, which were the 8th and the 14th.
    assert training.monitor.steps_done == 14
    assert [choice.step for choice in schedule.history] == [8, 14]
    assert schedule.age == 4
    assert all(parameter.isfinite().all() for parameter in training.model.parameters())


def test_beside_a_sequential_schedule_of_the_rate_neither_disturbs_the_other():
    def run(with_p):
        training = Training()
        opt = training.optimizer
        rate = SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=4), CosineAnnealingLR(opt, 12)], [4])
        schedule = training.schedule() if with_p else rate
        rates = []
        for _ in range(15):
            training.step(schedule)
            if with_p:
                rate.step()
            rates.append(rate.get_last_lr())
        return rates, schedule

    rates, schedule = run(True)
    assert rates == run(False)[0]
    assert len(schedule.history) == 3
