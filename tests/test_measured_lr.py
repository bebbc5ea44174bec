"""The bases of measured learning-rate schedules: in every composition they are what PyTorch's own schedules are."""

from __future__ import annotations

import pytest
import torch
from lr_schedules import Scaled, Told, rates_of, sgd, walk
from torch import nn
from torch.optim import lr_scheduler as torch_lr

from curvdiag.errors import ArgumentError
from curvdiag.schedules.measured_lr import optimizer_of

# PyTorch warns of schedules that are used in the wrong way; ours must never be.
pytestmark = pytest.mark.filterwarnings("error")


def plain(optimizer):
    return torch_lr.CosineAnnealingLR(optimizer, 12, eta_min=0.01)


def warm_up(optimizer):
    return torch_lr.LinearLR(optimizer, 0.25, total_iters=5)


INNER = {
    "cosine": plain,
    "linear": warm_up,
    "step": lambda o: torch_lr.StepLR(o, 3, 0.5),
    "exponential": lambda o: torch_lr.ExponentialLR(o, 0.9),
    "lambda": lambda o: torch_lr.LambdaLR(o, lambda t: 1 / (1 + t)),
    "one-cycle": lambda o: torch_lr.OneCycleLR(o, 0.7, 15),
    "cyclic": lambda o: torch_lr.CyclicLR(o, 0.1, 0.6, 3, cycle_momentum=True),
    "restarts": lambda o: torch_lr.CosineAnnealingWarmRestarts(o, 4),
    "ours": Told,
}
COMPOSED = {
    "alone": lambda o, inner: inner,
    "sequential": lambda o, inner: torch_lr.SequentialLR(o, [warm_up(o), inner], [4]),
    "sequential, first": lambda o, inner: torch_lr.SequentialLR(o, [inner, torch_lr.StepLR(o, 2, 0.5)], [7]),
    "chained": lambda o, inner: torch_lr.ChainedScheduler([warm_up(o), inner]),
}


def optimizer_for(tensor):
    return sgd(0.5, 0.125, tensor=tensor, momentum=0.9)


@pytest.mark.parametrize("tensor", [False, True])
@pytest.mark.parametrize("name", INNER)
def test_a_wrapped_schedule_is_scaled_bit_for_bit_and_goes_on_as_though_alone(name, tensor):
    wrapped, bare = optimizer_for(tensor), optimizer_for(tensor)
    outer, alone = Scaled(INNER[name](wrapped)), INNER[name](bare)
    for _ in range(14):
        assert rates_of(wrapped) == [0.5 * rate for rate in rates_of(bare)] == [float(lr) for lr in outer.get_last_lr()]
        assert outer.wanted_lrs == rates_of(bare)
        wrapped.step(), bare.step()
        outer.step(), alone.step()
    assert outer.last_epoch == 14


@pytest.mark.parametrize("composition", COMPOSED)
@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "ours"])
def test_a_wrapper_of_a_composition_scales_it_bit_for_bit(name, composition):
    wrapped, bare = optimizer_for(False), optimizer_for(False)
    outer = Scaled(Scaled(COMPOSED[composition](wrapped, INNER[name](wrapped))), 0.25)
    alone = COMPOSED[composition](bare, INNER[name](bare))
    assert walk(wrapped, outer, 14) == [0.125 * rate for rate in walk(bare, alone, 14)]


@pytest.mark.parametrize("name", ["cosine", "linear", "exponential", "ours"])
@pytest.mark.parametrize("composition", COMPOSED)
def test_a_wrapper_inside_a_composition_scales_its_own_part(name, composition):
    wrapped, bare = optimizer_for(False), optimizer_for(False)
    outer = COMPOSED[composition](wrapped, Scaled(INNER[name](wrapped)))
    alone = COMPOSED[composition](bare, INNER[name](bare))
    found, expected = walk(wrapped, outer, 14), walk(bare, alone, 14)
    own = {"alone": range(14), "sequential": range(4, 14), "sequential, first": range(7), "chained": range(14)}
    assert found == [(0.5 if t in own[composition] else 1) * rate for t, rate in enumerate(expected)]


def test_what_other_schedules_multiply_is_kept_before_and_after_a_wrapper():
    """Not halves: the wrapped schedule's rate is found again by a division."""
    for order in ([0, 1], [1, 0]):
        optimizer, bare = sgd(0.5), sgd(0.5)
        both = [warm_up(optimizer), Scaled(plain(optimizer), 1 / 3)]
        bare_both = [warm_up(bare), plain(bare)]
        alone = torch_lr.ChainedScheduler([bare_both[i] for i in order])
        found = walk(optimizer, torch_lr.ChainedScheduler([both[i] for i in order]), 12)
        assert found == pytest.approx([rate / 3 for rate in walk(bare, alone, 12)], rel=1e-12)


def test_plateau_gets_its_metrics_through_a_wrapper():
    metrics = [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    wrapped, bare = sgd(0.5), sgd(0.5)
    make = lambda o: torch_lr.ReduceLROnPlateau(o, factor=0.5, patience=1)  # noqa: E731
    outer = Scaled(make(wrapped))
    expected = walk(bare, make(bare), 10, metrics)
    assert walk(wrapped, outer, 10, metrics) == [0.5 * rate for rate in expected]
    assert len(set(expected)) > 2
    before = rates_of(wrapped)
    with pytest.raises(TypeError):
        outer.step()  # without metrics: refused, and the rate is not left unscaled
    assert rates_of(wrapped) == before


def test_a_rate_that_somebody_sets_meanwhile_is_kept():
    optimizer = sgd(0.5)
    schedule = Scaled(torch_lr.ConstantLR(optimizer, 1.0), 0.25)
    optimizer.param_groups[0]["lr"] = 0.5 * 0.25 * 0.1
    walk(optimizer, schedule, 3)
    assert rates_of(optimizer) == [pytest.approx(0.5 * 0.25 * 0.1, rel=1e-12)]
    optimizer = sgd(0.0)
    schedule = Scaled(torch_lr.MultiplicativeLR(optimizer, lambda t: 1.0), 0.25)
    walk(optimizer, schedule, 2)
    assert rates_of(optimizer) == [0.0]
    optimizer.param_groups[0]["lr"] = 0.3  # no factor makes that of zero
    walk(optimizer, schedule, 2)
    assert rates_of(optimizer) == [0.25 * 0.3]


def test_what_a_tensor_rounds_off_is_not_taken_for_somebody_elses_work():
    optimizer, bare = optimizer_for(True), optimizer_for(True)
    schedule, alone = Scaled(plain(optimizer), 1 / 3), plain(bare)
    for _ in range(40):
        assert schedule.wanted_lrs == rates_of(bare)
        optimizer.step(), bare.step()
        schedule.step(), alone.step()


def test_a_parameter_group_that_is_added_is_wrapped_too():
    optimizer = sgd(0.5)
    schedule = Scaled(torch_lr.MultiplicativeLR(optimizer, lambda t: 1.0))
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 0.4})
    schedule.scheduler.lr_lambdas.append(lambda t: 1.0)
    walk(optimizer, schedule, 3)
    assert rates_of(optimizer) == [0.25, 0.2]


def test_only_a_schedule_of_an_optimizer_is_wrapped():
    for wrong in (sgd(), None, lambda: 1):
        with pytest.raises(ArgumentError, match=r"wraps a learning-rate scheduler, not .*ConstantLR"):
            optimizer_of(wrong, "Scaled")


# A factor of the initial rates


def square(t):
    return 1 / (1 + t) ** 2


@pytest.mark.parametrize("tensor", [False, True])
def test_alone_it_has_its_closed_form_to_the_last_bit(tensor):
    optimizer = optimizer_for(tensor)
    schedule = Told(optimizer)
    bases = [0.5, 0.125]
    for t in range(9):
        assert rates_of(optimizer) == [float(torch.tensor(b * square(t))) if tensor else b * square(t) for b in bases]
        assert [float(lr) for lr in schedule.get_last_lr()] == rates_of(optimizer)
        assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor) == tensor
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize("order", [[0, 1], [1, 0]])
@pytest.mark.parametrize("made", [[0, 1], [1, 0]])
def test_a_warm_up_multiplies_it_in_whatever_order_they_are_made_and_stepped(order, made):
    optimizer = sgd(0.5)
    both = {index: (warm_up, Told)[index](optimizer) for index in made}
    found = walk(optimizer, torch_lr.ChainedScheduler([both[index] for index in order]), 9)
    expected = [0.5 * square(t) * (0.25 + 0.75 * min(t, 5) / 5) for t in range(9)]
    assert found == pytest.approx(expected, rel=1e-12)


def test_after_a_sequential_warm_up_it_begins_at_the_milestone():
    optimizer = sgd(0.5)
    schedule = torch_lr.SequentialLR(optimizer, [warm_up(optimizer), Told(optimizer)], [5])
    found = walk(optimizer, schedule, 10)
    assert found[:5] == pytest.approx([0.5 * (0.25 + 0.15 * t) for t in range(5)], rel=1e-12)
    assert found[5:] == [0.5 * square(t) for t in range(5)]


def test_as_the_first_of_a_sequence_it_does_not_take_its_own_first_step_for_anothers():
    optimizer = sgd(0.5)
    first = Told(optimizer, lambda: 0.25)
    schedule = torch_lr.SequentialLR(optimizer, [first, torch_lr.StepLR(optimizer, 2, 0.5)], [3])
    assert walk(optimizer, schedule, 7) == [0.125, 0.125, 0.125, 0.5, 0.5, 0.25, 0.25]


def test_it_goes_on_from_a_last_epoch_without_counting_its_own_work_twice():
    optimizer = sgd(0.5)
    walk(optimizer, Told(optimizer), 4)
    again = Told(optimizer, last_epoch=3)
    assert again.last_epoch == 4
    assert walk(optimizer, again, 3) == [0.5 * square(t) for t in (4, 5, 6)]


@pytest.mark.parametrize("tensor", [False, True])
def test_a_parameter_group_that_is_added_joins_with_its_own_rate(tensor):
    optimizer = optimizer_for(tensor)
    schedule = Told(optimizer)
    walk(optimizer, schedule, 3)
    rate = torch.tensor(0.25) if tensor else 0.25
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": rate})
    for t in range(4, 7):
        optimizer.step()
        schedule.step()
        assert rates_of(optimizer) == pytest.approx([0.5 * square(t), 0.125 * square(t), 0.25 * square(t)], rel=1e-6)
    again = Told(optimizer)
    again.load_state_dict(schedule.state_dict())
    assert again.base_lrs == [0.5, 0.125, 0.25]


def test_what_is_no_optimizer_is_refused_as_pytorch_does():
    with pytest.raises(TypeError, match="is not an Optimizer"):
        Told([nn.Parameter(torch.zeros(1))])
