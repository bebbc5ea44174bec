"""The manners of p-schedules: the published cosine, chaining, groups, checkpoints, and what they refuse."""

from __future__ import annotations

import copy
import io
import logging
import math
import pickle

import pytest
import torch
from torch.optim.lr_scheduler import ChainedScheduler, CosineAnnealingLR, ExponentialLR, LinearLR, SequentialLR

from curvdiag.errors import ArgumentError
from curvdiag.optim import LPSGD, LPSGDM
from curvdiag.schedules import ConstantP, CosineP, PScheduler


def optimizer(*ps, make=LPSGDM, **options):
    groups = [{"params": [torch.zeros(2, requires_grad=True)], "p": p} for p in ps or (6.0,)]
    return make(groups, lr=0.1, **options)


def ps(optimizer):
    return [float(group["p"]) for group in optimizer.param_groups]


def follow(schedule, steps):
    """``p`` of the first group from now on, ``steps + 1`` values."""
    found = ps(schedule.optimizer)[:1]
    for _ in range(steps):
        schedule.optimizer.step()
        schedule.step()
        found += ps(schedule.optimizer)[:1]
    return found


def published(s, total, p_max):
    return 2 + (p_max - 2) * (1 + math.cos(math.pi * (s - 1) / (total - 1))) / 2


# The published schedule


@pytest.mark.parametrize("p_max", [2.0, 6.0, 8.0, 9.0, 100.0])
@pytest.mark.parametrize("epochs", [2, 5, 60, 200])
def test_cosine_p_is_the_published_formula_in_every_epoch(epochs, p_max):
    found = follow(CosineP(optimizer(2.0), epochs, p_max), epochs - 1)
    assert found == [published(s, epochs, p_max) for s in range(1, epochs + 1)]
    assert found[0] == p_max
    assert found[-1] == 2.0


def test_cosine_p_by_hand():
    # cos(0), cos(pi/4), cos(pi/2), cos(3 pi/4), cos(pi)
    root = math.sqrt(0.5)
    by_hand = [6, 2 + 2 * (1 + root), 4, 2 + 2 * (1 - root), 2]
    assert follow(CosineP(optimizer(), 5), 4) == pytest.approx(by_hand, rel=1e-15)


def test_after_the_last_epoch_p_stays_at_2():
    assert follow(CosineP(optimizer(), 4), 50)[3:] == [2.0] * 48


def test_one_epoch_has_p_max():
    assert follow(CosineP(optimizer(), 1, p_max=8), 2) == [8.0, 2.0, 2.0]


def test_per_step_it_is_the_same_formula_with_the_total_of_steps():
    found = follow(CosineP(optimizer(), 4, steps_per_epoch=25), 99)
    assert found == [published(s, 100, 6.0) for s in range(1, 101)]


def test_p_max_is_the_optimizers_own_p_or_one_for_each_group():
    opt = optimizer(6.0, 3.0)
    CosineP(opt, 3).step()
    assert ps(opt) == [4.0, 2.5]
    opt = optimizer(6.0, 3.0)
    CosineP(opt, 3, p_max=[8, 4]).step()
    assert ps(opt) == [5.0, 3.0]


def test_the_optimizer_steps_with_the_p_that_the_schedule_set():
    weight = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    opt = LPSGD([weight], lr=0.1, p=6.0, eps=0.0)
    schedule = CosineP(opt, 3)
    by_hand = torch.ones(2, dtype=torch.float64)
    for p in (6.0, 4.0, 2.0):
        weight.grad = torch.tensor([3.0, 0.01], dtype=torch.float64)
        opt.step()
        schedule.step()
        by_hand -= 0.1 * weight.grad / weight.grad ** ((p - 2) / (p - 1))
    assert torch.allclose(weight, by_hand, rtol=1e-12)


def test_a_p_that_is_a_tensor_is_filled():
    opt = optimizer()
    held = opt.param_groups[0]["p"] = torch.tensor(6.0)
    CosineP(opt, 3).step()
    assert opt.param_groups[0]["p"] is held
    assert float(held) == 4.0
    assert opt.param_groups[0]["initial_p"] == 6.0


# Constant


def test_constant_p_holds_the_optimizers_p_or_the_one_given():
    assert follow(ConstantP(optimizer(5.3)), 3) == [5.3] * 4
    assert follow(ConstantP(optimizer(6.0), 3.7), 3) == [3.7] * 4
    assert follow(ConstantP(optimizer(3.0), 7), 3) == [7.0] * 4
    assert follow(ConstantP(optimizer(6.0), math.inf), 2) == [math.inf] * 3
    assert follow(ConstantP(optimizer(math.inf)), 2) == [math.inf] * 3


# Several of them


class Steps(PScheduler):
    """Factors from a list."""

    def __init__(self, optimizer, factors, p_max=None):
        self.listed = factors
        super().__init__(optimizer, p_max)

    def factors(self):
        return [self.listed[self.last_epoch]] * len(self.base_ps)


@pytest.mark.parametrize("order", [1, -1])
def test_factors_multiply_also_from_zero_and_in_any_order(order):
    opt = optimizer(2.0)
    first = [1, 0.5, 0, 0, 0.25, 1, 0, 0.5]
    second = [0.5, 0.5, 1, 0, 0, 0.5, 0.25, 1]
    both = [Steps(opt, first, 8.0), Steps(opt, second)]
    for a, b in zip(first, second, strict=True):
        assert ps(opt) == [2 + 6 * a * b]
        if both[0].last_epoch < len(first) - 1:
            for one in both[::order]:
                one.step()


def test_a_chained_scheduler_of_torch_steps_them_beside_schedules_of_the_rate():
    opt = optimizer()
    chained = ChainedScheduler([ExponentialLR(opt, 0.9), CosineP(opt, 5), CosineP(opt, 9)], optimizer=opt)
    for s in range(2, 6):
        opt.step()
        chained.step()
        factors = [(published(s, total, 6.0) - 2) / 4 for total in (5, 9)]
        assert ps(opt)[0] == pytest.approx(2 + 4 * factors[0] * factors[1], rel=1e-14)
        assert chained.get_last_lr() == [pytest.approx(0.1 * 0.9 ** (s - 1))]


def test_rates_of_a_sequential_scheduler_are_what_they_are_without_it():
    def run(with_p):
        opt = optimizer()
        rate = SequentialLR(opt, [LinearLR(opt, 0.1, total_iters=3), CosineAnnealingLR(opt, 7)], [3])
        p = CosineP(opt, 10) if with_p else None
        rates, found = [], []
        for _ in range(10):
            rates.append(rate.get_last_lr())
            found += ps(opt)
            opt.step()
            rate.step()
            if p is not None:
                p.step()
        return rates, found

    rates, found = run(True)
    assert rates == run(False)[0]
    assert found == [published(s, 10, 6.0) for s in range(1, 11)]


def test_one_that_was_replaced_is_detached(caplog):
    opt = optimizer()
    done = CosineP(opt, 3)
    follow(done, 2)
    done.detach()
    assert follow(CosineP(opt, 3), 2) == [6.0, 4.0, 2.0]
    opt = optimizer()
    one, other = CosineP(opt, 3), Steps(opt, [0.5, 0.5])
    other.step()
    one.detach()
    assert ps(opt) == [4.0]
    with caplog.at_level(logging.INFO):
        CosineP(opt, 3)
    assert "CosineP chains with Steps" in caplog.text
    opt = optimizer()
    follow(CosineP(opt, 3), 2)
    CosineP(opt, 3)  # as where a cell of a notebook is run again
    assert "CosineP begins after CosineP was stepped, whose factor goes on to count" in caplog.records[-1].getMessage()


def test_it_falls_from_a_constant_p_below_the_optimizers_own():
    opt = optimizer(6.0)
    ConstantP(opt, 4.0)
    assert follow(CosineP(opt, 3), 2) == [4.0, 3.0, 2.0]


def test_two_that_disagree_about_p_max_are_refused():
    opt = optimizer()
    CosineP(opt, 3, p_max=8)
    with pytest.raises(ArgumentError, match=r"p_max is \[9.0\] here and \[8.0\] in the CosineP.*leave p_max out"):
        CosineP(opt, 3, p_max=9)
    CosineP(opt, 5).step()
    assert ps(opt)[0] == published(2, 5, 8.0), "the refused one is no factor"


# Parameter groups that are added


def test_a_group_that_is_added_joins_with_its_own_p_as_p_max():
    opt = optimizer()
    schedules = [CosineP(opt, 5, p_max=8), Steps(opt, [1, 0.5, 0.5, 0.5])]
    opt.step()
    opt.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "p": 4.0})
    late = Steps(opt, [1] * 4)
    for schedule in schedules:
        schedule.step()
    half = 0.5 * (1 + math.cos(math.pi / 4)) / 2
    assert ps(opt) == pytest.approx([2 + 6 * half, 2 + 2 * half])
    assert schedules[0].base_ps == late.base_ps == [8.0, 4.0]


def test_a_group_that_cannot_join_is_an_error():
    opt = optimizer()
    schedule = CosineP(opt, 5)
    opt.add_param_group({"params": [torch.zeros(3, requires_grad=True)], "p": math.inf})
    with pytest.raises(ArgumentError, match=r"infinite in parameter group 1.*give add_param_group a finite p"):
        schedule.step()
    opt.param_groups.pop()
    schedule.step()
    del opt.param_groups[0]
    with pytest.raises(ArgumentError, match="drives 1 parameter groups, and the optimizer has 0"):
        schedule.step()


# Checkpoints


def saved(*parts):
    buffer = io.BytesIO()
    torch.save([part.state_dict() for part in parts], buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 1, 0], [1, 0, 2]])
@pytest.mark.parametrize("cut", [0, 1, 4, 8])
def test_it_continues_bit_for_bit_in_whatever_order_the_states_are_loaded(order, cut):
    def build():
        opt = optimizer(6.0, 3.0)
        return [opt, CosineP(opt, 7, p_max=[6.5, 3.1]), Steps(opt, [1 / (1 + i) for i in range(12)])]

    def go_on(parts, steps):
        found = [ps(parts[0])]
        for _ in range(steps):
            for part in parts:
                part.step()
            found.append(ps(parts[0]))
        return found

    whole = go_on(build(), 10)
    parts = build()
    go_on(parts, cut)
    states = saved(*parts)
    again = build()
    for index in order:
        again[index].load_state_dict(states[index])
    assert again[1].get_last_p() == parts[1].get_last_p()
    assert go_on(again, 10 - cut) == whole[cut:]


def test_schedules_may_be_made_after_the_optimizer_was_loaded():
    opt = optimizer()
    schedule = CosineP(opt, 7)
    follow(schedule, 3)
    states = saved(opt, schedule)
    again = optimizer()
    again.load_state_dict(states[0])
    later = CosineP(again, 7)
    later.load_state_dict(states[1])
    assert ps(again) == ps(opt)
    assert follow(later, 3) == follow(schedule, 3)


def test_last_epoch_goes_on_from_the_optimizers_state():
    opt = optimizer()
    follow(CosineP(opt, 7), 3)
    again = optimizer(2.5)
    with pytest.raises(ArgumentError, match="no 'initial_p' to go on from at last_epoch=2"):
        CosineP(again, 7, last_epoch=2)
    again.load_state_dict(opt.state_dict())
    assert follow(CosineP(again, 7, last_epoch=2), 3) == [published(s, 7, 6.0) for s in range(4, 8)]


def test_a_state_of_more_groups_than_there_are_is_refused_and_one_of_fewer_is_joined():
    opt = optimizer(6.0, 4.0)
    state = CosineP(opt, 7).state_dict()
    with pytest.raises(ArgumentError, match="state is of 2 parameter groups and the optimizer has 1; call add_param"):
        CosineP(optimizer(), 7).load_state_dict(state)
    fewer = CosineP(optimizer(), 3).state_dict()
    schedule = CosineP(opt, 3)
    schedule.load_state_dict(fewer)
    schedule.step()
    assert ps(opt) == [4.0, 3.0]


def test_optimizer_and_schedule_can_be_copied_and_pickled_together():
    for twin in (copy.deepcopy, lambda whole: pickle.loads(pickle.dumps(whole))):
        schedule = CosineP(optimizer(), 5)
        follow(schedule, 1)
        again = twin(schedule)
        assert again.optimizer is not schedule.optimizer
        assert follow(again, 3) == follow(schedule, 3)


# What is refused


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CosineP(torch.optim.SGD([torch.zeros(1)], lr=0.1), 5), "group 0 of SGD has none; use LPSGD or LPSGDM"),
        (lambda: CosineP("optimizer", 5), "drives an optimizer, not str"),
        (lambda: CosineP(optimizer(), 5, p_max=1.5), "p_max is at least 2, and is 1.5 in parameter group 0"),
        (lambda: CosineP(optimizer(), 5, p_max=math.nan), "p_max is at least 2, and is nan"),
        (lambda: CosineP(optimizer(), 5, p_max=math.inf), "p_max is infinite in parameter group 0"),
        (lambda: CosineP(optimizer(math.inf), 5), "p_max is infinite in parameter group 0.*give p_max="),
        (lambda: CosineP(optimizer(), 5, p_max=5), "p_max=5 is below p=6 of parameter group 0"),
        (lambda: CosineP(optimizer(3.0, 6.0), 5, p_max=[6, 5]), "p_max=5 is below p=6 of parameter group 1"),
        (lambda: CosineP(optimizer(), 5, p_max=[6, 6]), "2 values of p_max for 1 parameter groups"),
        (lambda: ConstantP(optimizer(), 1.9), "p_max is at least 2, and is 1.9"),
        (lambda: CosineP(optimizer(), 0), "epochs is a whole number of at least 1, not 0"),
        (lambda: CosineP(optimizer(), 2.5), "epochs is a whole number of at least 1, not 2.5"),
        (lambda: CosineP(optimizer(), True), "epochs is a whole number of at least 1, not True"),
        (lambda: CosineP(optimizer(), 5, steps_per_epoch=0), "steps_per_epoch is a whole number"),
    ],
)
def test_what_means_nothing_is_refused_with_a_reason(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()


def test_a_group_whose_p_became_too_small_is_refused():
    opt = optimizer()
    opt.param_groups[0]["p"] = 1.5
    with pytest.raises(ArgumentError, match=r"parameter group 0 has p=1\.5; p is at least 2"):
        CosineP(opt, 5, p_max=6)
