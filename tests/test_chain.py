"""Chain: an entry of the parameter groups that several schedules move, each by a factor."""

from __future__ import annotations

import math

import pytest
import torch
from torch.optim.lr_scheduler import ExponentialLR

from curvdiag.schedules.chain import Chain, set_entry


def optimizer(*values, key="lr"):
    groups = [{"params": [torch.zeros(2, requires_grad=True)], key: value} for value in values]
    return torch.optim.SGD(groups, lr=0.1)


def move(chain, optimizer, factors):
    for group, value in zip(optimizer.param_groups, chain.values(optimizer, factors), strict=True):
        set_entry(group, chain.key, value)
    chain.settle(optimizer)


def entries(optimizer, key="lr"):
    return [float(group[key]) for group in optimizer.param_groups]


def test_alone_it_is_the_closed_form_to_the_last_bit_however_often_it_is_set():
    opt = optimizer(0.3, 0.07)
    chain = Chain(opt, "lr", 0.0, [0.3, 0.07])
    for step in range(1000):
        factors = [abs(math.cos(step)), 1 / (1 + step)]
        move(chain, opt, factors)
        assert entries(opt) == [0.3 * factors[0], 0.07 * factors[1]]


def test_the_floor_is_what_a_factor_of_zero_gives():
    opt = optimizer(6.0, 3.0, key="p")
    chain = Chain(opt, "p", 2.0, [6.0, 3.0])
    move(chain, opt, [0.25, 0.0])
    assert entries(opt, "p") == [3.0, 2.0]


def test_beside_a_schedule_of_torch_the_factors_multiply():
    opt = optimizer(0.3)
    other = ExponentialLR(opt, 0.9)
    chain = Chain(opt, "lr", 0.0, [0.3])
    for step in range(1, 200):
        opt.step()
        other.step()
        move(chain, opt, [1 / step])
        assert entries(opt)[0] == pytest.approx(0.3 * 0.9**step / step, rel=1e-12)


def test_what_others_did_before_it_was_made_counts():
    opt = optimizer(0.3)
    ExponentialLR(opt, 0.5)
    opt.param_groups[0]["lr"] *= 0.5
    chain = Chain(opt, "lr", 0.0, [0.3])
    for factor in (0.5, 0.25):
        move(chain, opt, [factor])
        assert entries(opt)[0] == pytest.approx(0.3 * 0.5 * factor)


@pytest.mark.parametrize("who", [0, 1])
def test_of_two_chains_either_may_pass_through_zero_while_the_other_waits(who):
    opt = optimizer(6.0, key="p")
    chains = [Chain(opt, "p", 2.0, [6.0]), Chain(opt, "p", 2.0, [6.0])]
    for moved, waiting in [(1.0, 1.0), (0.5, 0.75), (0.0, 0.75), (0.0, 0.75), (0.5, 0.75), (0.75, 0.5)]:
        for index, chain in enumerate(chains):
            move(chain, opt, [moved if index == who else waiting])
        assert entries(opt, "p")[0] == pytest.approx(2 + 4 * moved * waiting, rel=1e-14)


def test_another_schedule_that_starts_at_zero_is_followed_out_of_it():
    opt = optimizer(0.3)
    set_entry(opt.param_groups[0], "lr", 0.0)
    chain = Chain(opt, "lr", 0.0, [0.3])
    move(chain, opt, [0.5])
    assert entries(opt) == [0.0]
    set_entry(opt.param_groups[0], "lr", 0.03 * 0.5)  # the other is at a tenth now, and the own half still in it
    move(chain, opt, [0.25])
    assert entries(opt)[0] == pytest.approx(0.3 * 0.1 * 0.25)


def test_alone_on_request_it_forgets_the_others():
    opt = optimizer(0.3)
    chain = Chain(opt, "lr", 0.0, [0.3])
    set_entry(opt.param_groups[0], "lr", 0.1)
    assert chain.values(opt, [0.5], alone=True) == [0.3 * 0.5]


def test_a_tensor_stays_the_same_tensor_and_its_rounding_is_nobodys_factor():
    opt = torch.optim.SGD([torch.zeros(2, requires_grad=True)], lr=torch.tensor(0.3), foreach=False)
    held = opt.param_groups[0]["lr"]
    chain = Chain(opt, "lr", 0.0, [float(held)])
    for step in range(1, 300):
        move(chain, opt, [1 / step])
        assert chain.others == [1.0]
    assert opt.param_groups[0]["lr"] is held
    assert float(held) == pytest.approx(0.3 / 299, rel=1e-6)


def test_its_state_continues_it_bit_for_bit():
    def run(cut):
        opt = optimizer(0.3)
        other, chain = ExponentialLR(opt, 0.97), Chain(opt, "lr", 0.0, [0.3])
        for step in range(40):
            if step == cut:
                states = opt.state_dict(), other.state_dict(), chain.state_dict()
                opt = optimizer(0.3)
                other, chain = ExponentialLR(opt, 0.97), Chain(opt, "lr", 0.0, [0.3])
                for part, state in zip((opt, other, chain), states, strict=True):
                    part.load_state_dict(state)
            opt.step()
            other.step()
            move(chain, opt, [abs(math.sin(step))])
        return entries(opt)

    assert run(cut=17) == run(cut=None)
