"""PredictedDecreaseP where something is missing or fails: p is held, it is said, and training goes on."""

from __future__ import annotations

import logging
import math
import re
from typing import Any

import pytest
import torch
from nets import make
from torch import Tensor, nn

from curvdiag import CurvatureMonitor, Objective
from curvdiag.errors import ArgumentError, LossError
from curvdiag.optim import LPSGD, LPSGDM
from curvdiag.schedules.predicted_decrease_p import PredictedDecreaseP

GOOD = torch.tensor([3.0, 1.0]), torch.diag(torch.tensor([3.0, 1.0]))  # Newton's direction is that of all signs


def following(slope: Any, **options: Any) -> PredictedDecreaseP:
    return PredictedDecreaseP(LPSGD([nn.Parameter(torch.zeros(2))], p=6.0), slope, **{"smoothing": 0.0, **options})


def task(**optimizer: Any) -> tuple[nn.Module, Objective, Any]:
    model, batch = make("mlp-tanh")
    return model, Objective(model, nn.CrossEntropyLoss(), batch), LPSGDM(model.parameters(), p=6.0, **optimizer)


def raises(error: Exception) -> Any:
    raise error


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (lambda: raises(torch.cuda.OutOfMemoryError("no memory left")), "no memory left"),
        (lambda: raises(ZeroDivisionError("in user code")), "ZeroDivisionError: in user code"),
        (lambda: (torch.tensor([math.nan, 1.0]), GOOD[1]), "no candidate"),
        (lambda: (torch.zeros(2), GOOD[1]), "no candidate"),
        (lambda: (GOOD[0], -GOOD[1]), "no candidate leads downhill and meets positive curvature"),
        (lambda: (GOOD[0], math.nan * GOOD[1]), "no candidate"),
        (lambda: (torch.ones(3), GOOD[1]), "2 entries"),
        (lambda: (GOOD[0], torch.eye(3)), "order 3"),
        (lambda: 7, "int"),
    ],
)
def test_a_measurement_that_fails_is_held_and_logged_once(
    answer: Any, words: str, caplog: pytest.LogCaptureFixture
) -> None:
    answers = [lambda: GOOD, answer, answer, lambda: (GOOD[0].flip(0), GOOD[1])]
    schedule = following(lambda: answers.pop(0)())
    before = schedule.get_last_p()
    assert before == [6.0]
    for age in (1, 2):
        schedule.step()
        assert schedule.get_last_p() == before
        assert schedule.age == age
        assert words in schedule.history[-1].note
        assert "held" in schedule.history[-1].note
    warned = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(warned) == 1
    assert words in warned[0].getMessage()
    schedule.step()
    assert (schedule.age, schedule.history[-1].note, schedule.get_last_p()) == (0, "", [2.0])


def test_nothing_new_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    answers = [None, GOOD, None, (GOOD[0].flip(0), GOOD[1])]
    schedule = following(lambda: answers.pop(0))
    assert (schedule.age, schedule.get_last_p()) == (None, [6.0])
    for expected in ((0, 6.0), (1, 6.0), (0, 2.0)):
        schedule.step()
        assert (schedule.age, schedule.get_last_p()[0]) == expected
    assert len(schedule.history) == 2
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_one_group_without_a_candidate_does_not_hold_the_others() -> None:
    optimizer = LPSGD([{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(2)], p=6.0)
    gradient, bad = torch.tensor([1.0, 3.0, 1.0, 3.0]), torch.diag(torch.tensor([3.0, 1.0, -3.0, -1.0]))
    schedule = PredictedDecreaseP(optimizer, lambda: (gradient, bad), per_group=True, smoothing=0.0)
    assert schedule.get_last_p() == [2.0, 6.0]
    assert schedule.history[-1].note.startswith("group 1 held")
    assert all(math.isnan(schedule.history[-1].seen[f"decrease/{p}/1"]) for p in (2, 3, 4, 6))


def test_where_one_group_fails_halfway_no_group_is_moved() -> None:
    class Breaks:
        """A matrix whose products fail from the third call on."""

        shape, dtype, calls = (4, 4), torch.float32, 0

        def __matmul__(self, vector: Tensor) -> Tensor:
            self.calls += 1
            if self.calls > 3 * 4:  # two groups and the first of the second measurement, four candidates each
                raise RuntimeError("out of memory")
            return torch.tensor([3.0, 1.0, 3.0, 1.0]) * vector

    optimizer = LPSGD([{"params": [nn.Parameter(torch.zeros(2))]} for _ in range(2)], p=6.0)
    gradients = iter([torch.tensor([3.0, 1.0, 3.0, 1.0]), torch.tensor([1.0, 3.0, 1.0, 3.0])])
    operator = Breaks()
    schedule = PredictedDecreaseP(optimizer, lambda: (next(gradients), operator), per_group=True, smoothing=0.0)
    assert schedule.get_last_p() == [6.0, 6.0]
    schedule.step()
    assert "out of memory" in schedule.history[-1].note
    assert schedule.get_last_p() == [6.0, 6.0]


@pytest.mark.filterwarnings("ignore:measuring every")
def test_a_checkpoint_between_the_monitors_measurement_and_the_schedules_loses_nothing() -> None:
    def build() -> tuple[nn.Module, Any, CurvatureMonitor, PredictedDecreaseP]:
        model, objective, optimizer = task(lr=0.05)
        monitor = CurvatureMonitor(objective, measure=["trace"], probes=2, every=1).attach(optimizer)
        return model, optimizer, monitor, PredictedDecreaseP(optimizer, monitor, smoothing=0.0)

    model, optimizer, monitor, schedule = build()
    nn.functional.cross_entropy(model(torch.ones(2, 4, dtype=torch.float64)), torch.tensor([0, 1])).backward()
    optimizer.step()  # the monitor has measured now, and the schedule not yet
    states = [part.state_dict() for part in (model, optimizer, monitor, schedule)]
    schedule.step()
    twins = build()
    for part, state in zip(twins, states, strict=True):
        part.load_state_dict(state)
    twins[-1].step()
    assert (schedule.age, twins[-1].age) == (0, 0)
    assert twins[-1].history[-1] == schedule.history[-1]


def test_a_loss_that_is_nan_in_training_is_survived_and_left_behind() -> None:
    model, objective, optimizer = task()
    schedule = PredictedDecreaseP(optimizer, objective)
    kept = [p.detach().clone() for p in model.parameters()]
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    schedule.step()
    assert (schedule.age, "NonFiniteError" in schedule.history[-1].note) == (1, True)
    with torch.no_grad():
        for parameter, old in zip(model.parameters(), kept, strict=True):
            parameter.copy_(old)
    schedule.step()
    assert schedule.age == 0
    with torch.no_grad():
        model[0].weight[0, 0] = math.nan
    assert PredictedDecreaseP(optimizer, objective).age is None  # not finite yet is no reason to refuse


@pytest.mark.filterwarnings("ignore:measuring every")
def test_with_a_monitor_it_measures_whenever_that_does_and_writes_into_its_run() -> None:
    model, objective, optimizer = task(lr=0.05)
    monitor = CurvatureMonitor(objective, measure=["trace"], probes=2, every=2).attach(optimizer)
    schedule = PredictedDecreaseP(optimizer, monitor)
    assert (schedule.age, schedule.get_last_p()) == (None, [6.0])
    ages = []
    for _ in range(6):
        optimizer.zero_grad()
        batch = objective.batches[0]
        nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        schedule.step()
        ages.append(schedule.age)
    assert ages == [None, 0, 1, 0, 1, 0]
    assert [choice.step for choice in schedule.history] == [2, 4, 6]
    written = dict(monitor.recorded)
    assert sorted(written) == [2, 4, 6]
    for choice in schedule.history:
        numbers = {k: v for k, v in {**choice.seen, **choice.chosen}.items() if math.isfinite(v)}
        assert written[choice.step] == {f"schedule/predicted_decrease_p/{key}": v for key, v in numbers.items()}
    monitor.close()
    for _ in range(3):
        schedule.step()
    assert schedule.age == 3


def test_a_loss_without_gauss_newton_is_refused_at_once_with_the_remedy() -> None:
    model, batch = make("mlp-tanh")
    optimizer = LPSGD(model.parameters(), p=6.0)

    def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(model(batch[0]), batch[1]) + model[0].weight.square().sum()

    objective = Objective.from_loss(model, penalised, batch)
    for source in (objective, CurvatureMonitor(objective, measure=["trace"])):
        with pytest.raises(LossError, match=re.escape('or give PredictedDecreaseP curvature="hessian"')):
            PredictedDecreaseP(optimizer, source)
    assert PredictedDecreaseP(optimizer, objective, curvature="hessian").age == 0


def test_options_reach_the_operator() -> None:
    _, objective, optimizer = task()
    with pytest.raises(TypeError, match="no_such_option"):
        PredictedDecreaseP(optimizer, objective, options={"no_such_option": 1})
    with pytest.raises(ArgumentError, match="micro_batch"):
        PredictedDecreaseP(optimizer, objective, options={"micro_batch": -1})
    whole, pieces = (PredictedDecreaseP(optimizer, objective, options=o).history[0] for o in ({}, {"micro_batch": 3}))
    assert pieces.seen == pytest.approx(whole.seen, rel=1e-9)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"source": 3}, "not int"),
        ({"every": 0}, "at least 1"),
        ({"every": True}, "at least 1"),
        ({"every": 2.5}, "at least 1"),
        ({"curvature": "fisher"}, "'fisher'"),
        ({"smoothing": 1.0}, "smoothing"),
        ({"smoothing": -0.1}, "smoothing"),
        ({"grid": [2.0]}, "two or more"),
        ({"grid": [1.5, 3.0]}, "at least 2"),
        ({"grid": [2.0, math.inf]}, "finite"),
        ({"grid": [2.0, math.nan]}, "finite"),
        ({"grid": [4.0, 8.0, 16.0]}, "p_max = 6"),
        ({"p_max": 3.0}, "below p=6"),
        ({"p_max": math.inf}, "infinite"),
        ({"p_max": [6.0, 6.0]}, "2 values of p_max"),
    ],
)
def test_what_means_nothing_is_refused(arguments: dict[str, Any], words: str) -> None:
    _, objective, optimizer = task()
    with pytest.raises(ArgumentError, match=re.escape(words)):
        PredictedDecreaseP(optimizer, **{"source": objective, **arguments})


def test_optimizers_that_cannot_be_driven_are_refused() -> None:
    model, objective, _ = task()
    with pytest.raises(ArgumentError, match="use LPSGD or LPSGDM"):
        PredictedDecreaseP(torch.optim.SGD(model.parameters(), 0.1), objective)
    with pytest.raises(ArgumentError, match="maximises"):
        PredictedDecreaseP(LPSGD(model.parameters(), maximize=True), objective)
    with pytest.raises(ArgumentError, match="moves none of the objective's parameters"):
        PredictedDecreaseP(LPSGD(make("mlp-tanh")[0].parameters()), objective)
    with pytest.raises(ArgumentError, match="leave every= out"):
        PredictedDecreaseP(LPSGD(model.parameters()), CurvatureMonitor(objective), every=3)


def test_a_group_that_is_added_later_joins() -> None:
    model, objective, _ = task()
    first, *rest = model.parameters()
    optimizer = LPSGD([first], p=6.0)
    schedule = PredictedDecreaseP(optimizer, objective, per_group=True, smoothing=0.0)
    optimizer.add_param_group({"params": rest, "p": 4.0})
    schedule.step()
    assert {"winner/0", "winner/1"} <= set(schedule.history[-1].seen)
    assert schedule.get_last_p() == [schedule.history[-1].seen[f"winner/{i}"] for i in range(2)]
