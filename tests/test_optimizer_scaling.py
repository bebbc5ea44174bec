"""What an optimizer divides its steps by, against the steps that it takes."""

from __future__ import annotations

import copy

import pytest
import torch
from nets import Transformer, make, tokens
from torch import nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.monitor.scaling import optimizer_scaling, require_scaling
from curvdiag.optim import LPSGD, LPSGDM

LR = 1e-3


class Own(torch.optim.Optimizer):
    """``theta <- theta - lr * g / D`` with a ``D`` that the test chooses."""

    def __init__(self, params, given=None, **defaults):
        super().__init__(params, {"lr": LR, **defaults})
        self.given = given

    @torch.no_grad()
    def step(self):
        for parameter, diagonal in self.preconditioner().items():
            parameter.sub_(LR * parameter.grad / diagonal)

    def preconditioner(self):
        if self.given is not None:
            return self.given
        every = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        return {p: (p.grad.abs() + 1e-8) ** 0.8 for p in every}


ADAM = {
    "plain": {},
    "foreach": {"foreach": True},
    "fused": {"fused": True},
    "amsgrad": {"amsgrad": True, "betas": (0.9, 0.5)},
}
ADAM |= {
    "fused amsgrad": {"fused": True, "amsgrad": True, "betas": (0.9, 0.5)},
    "epsilon": {"eps": 0.1},
    "betas": {"betas": (0.5, 0.7)},
}
DOUBLE = {"dtype": torch.float64}
ADAM |= {
    "tensors": {"betas": (torch.tensor(0.7, **DOUBLE), torch.tensor(0.9, **DOUBLE)), "lr": torch.tensor(LR, **DOUBLE)}
}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=LR),
    "nesterov": lambda p: torch.optim.SGD(p, lr=LR, momentum=0.9, nesterov=True),
    "own": Own,
    "lpsgd": lambda p: LPSGD(p, lr=LR, p=6.0),
    "lpsgdm": lambda p: LPSGDM(p, lr=LR, p=6.0),
    **{f"adam {name}": lambda p, o=options: torch.optim.Adam(p, **{"lr": LR, **o}) for name, options in ADAM.items()},
    "adamw": lambda p: torch.optim.AdamW(p, lr=LR, weight_decay=0.0),
}


class Training:
    def __init__(self, make_optimizer, model=None, batch=None, **options):
        ready, vectors = make("mlp-tanh")
        self.model, self.batch = model or ready, batch or vectors
        self.objective = Objective(self.model, F.cross_entropy, self.batch, **options)
        self.optimizer = make_optimizer(self.model.parameters())
        self.taken = 0

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            # Gradients that rise and fall, so that the largest v of amsgrad is not the last one.
            self.taken += 1
            ((0.1, 3.0, 1.0)[self.taken % 3] * F.cross_entropy(self.model(self.batch[0]), self.batch[1])).backward()
            self.optimizer.step()
        return self

    def flat(self, what):
        return torch.cat([what(p).detach().flatten().clone() for p in self.model.parameters()])


def numerator(optimizer, parameter):
    """What the step divides by ``D``, times its rate."""
    state = optimizer.state.get(parameter, {})
    group = optimizer.param_groups[0]
    if "exp_avg" in state:
        return LR / (1 - float(group["betas"][0]) ** float(state["step"])) * state["exp_avg"]
    if group.get("nesterov"):
        return LR * (parameter.grad + group["momentum"] * state["momentum_buffer"])
    return LR * state.get("momentum_buffer", parameter.grad)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("steps", [1, 5])
def test_it_is_what_the_step_was_divided_by(name, steps):
    training = Training(OPTIMIZERS[name]).step(steps - 1)
    before = training.flat(lambda p: p)
    training.step()
    moved = before - training.flat(lambda p: p)
    found = optimizer_scaling(training.objective, training.optimizer)
    expected = training.flat(lambda p: numerator(training.optimizer, p)) / found.diagonal
    assert torch.allclose(moved, expected, rtol=1e-9, atol=1e-15)
    assert found.held == ()
    assert found.notes == []
    assert torch.allclose(found.inverse_root(torch.float64) ** 2 * found.diagonal, torch.ones_like(moved))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_asking_changes_nothing_in_the_optimizer(name):
    training = Training(OPTIMIZERS[name])
    for steps in (0, 1):
        training.step(steps)
        before, entries = copy.deepcopy(training.optimizer.state_dict()), len(training.optimizer.state)
        found = optimizer_scaling(training.objective, training.optimizer)
        after = training.optimizer.state_dict()
        assert len(training.optimizer.state) == entries
        assert str(before) == str(after)
        assert not found.diagonal.requires_grad


@pytest.mark.parametrize("name", ["own", "lpsgd", "lpsgdm", "adamw", "adam fused"])
def test_before_the_first_step_nothing_is_known_and_that_is_said(name):
    training = Training(OPTIMIZERS[name])
    found = optimizer_scaling(training.objective, training.optimizer)
    assert bool((found.diagonal == torch.inf).all())
    assert not found.inverse_root(torch.float64).any()
    assert len(found.held) == 6
    (note,) = found.notes
    assert "known after the first step" in note


def test_sgd_is_known_before_the_first_step():
    training = Training(OPTIMIZERS["nesterov"])
    assert torch.equal(
        optimizer_scaling(training.objective, training.optimizer).diagonal, torch.ones(83, dtype=torch.float64)
    )


def test_a_fused_step_that_was_refused_leaves_nothing_known():
    training = Training(OPTIMIZERS["adam fused"])
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    model = training.model
    scaler.scale(F.cross_entropy(model(training.batch[0]), training.batch[1]) * torch.inf).backward()
    scaler.step(training.optimizer)
    assert len(training.optimizer.state) == 6  # there is a state, of no step
    assert optimizer_scaling(training.objective, training.optimizer).notes


# Which parameters


def test_each_group_has_its_own_epsilon_and_betas():
    model, batch = make("mlp-tanh")
    groups = [{"params": model[0].parameters(), "eps": 0.5}, {"params": model[2].parameters(), "betas": (0.9, 0.5)}]
    optimizer = torch.optim.Adam([*groups, {"params": model[4].parameters()}], lr=LR)
    training = Training(lambda p: optimizer, model, batch).step(2)
    expected = [
        (optimizer.state[p]["exp_avg_sq"] / (1 - group["betas"][1] ** 2)).sqrt().flatten() + group["eps"]
        for group in optimizer.param_groups
        for p in group["params"]
    ]
    assert torch.allclose(optimizer_scaling(training.objective, optimizer).diagonal, torch.cat(expected), rtol=1e-12)


def test_chosen_parameters_lie_as_the_objective_has_them():
    training = Training(OPTIMIZERS["own"], params=["4.*", "0.bias"]).step()
    found = optimizer_scaling(training.objective, training.optimizer)
    model = training.model
    expected = [(p.grad.abs() + 1e-8) ** 0.8 for p in (model[0].bias, model[4].weight, model[4].bias)]
    assert torch.equal(found.diagonal, torch.cat([d.flatten() for d in expected]))


def test_tied_weights_count_once():
    torch.manual_seed(0)
    model = Transformer().double()
    assert model.head.weight is model.embed.weight
    training = Training(OPTIMIZERS["adamw"], model, tokens()).step(2)
    found = optimizer_scaling(training.objective, training.optimizer)
    assert found.diagonal.shape == (training.objective.parameters.size,)
    assert found.held == ()


def test_what_the_optimizer_does_not_move_is_held_and_named():
    model, batch = make("mlp-tanh")
    optimizer = torch.optim.AdamW([*model[2].parameters(), *model[4].parameters()], lr=LR)
    training = Training(lambda p: optimizer, model, batch, params="*").step()
    model[2].bias.requires_grad_(False)  # frozen after a step: its state is there
    found = optimizer_scaling(training.objective, optimizer)
    assert found.held == ("0.weight", "0.bias", "2.bias")
    (note,) = found.notes
    assert "AdamW does not move 0.weight, 0.bias, 2.bias: held fixed" in note
    fixed = torch.cat([torch.full((p.numel(),), n in found.held) for n, p in model.named_parameters()])
    assert torch.equal(found.diagonal == torch.inf, fixed)
    assert torch.equal(found.inverse_root(torch.float64) == 0, fixed)


def test_many_held_names_are_counted():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    batch = torch.randn(4, 2, generator=torch.Generator().manual_seed(0)), torch.arange(4) % 2
    training = Training(lambda p: torch.optim.SGD(model[4].parameters(), lr=LR), model, batch)
    (note,) = optimizer_scaling(training.objective, training.optimizer).notes
    assert "0.weight, 0.bias, 1.weight, 1.bias, 2.weight and 3 more" in note


def test_entries_without_any_scale_are_held():
    training = Training(OPTIMIZERS["own"])
    own = {p: torch.ones_like(p) for p in training.model.parameters()}
    own[training.model[0].bias][:2] = 0.0
    own[training.model[0].bias][2] = 1e-39  # whose inverse single precision does not hold
    training.optimizer.given = own
    found = optimizer_scaling(training.objective, training.optimizer)
    for dtype, count in ((torch.float32, 3), (torch.float64, 2)):
        root = found.inverse_root(dtype)
        assert root.dtype == dtype
        assert root.isfinite().all()
        assert int((root == 0).sum()) == count
    assert any("zero in 2 entries" in note for note in found.notes)


def test_half_precision_is_worked_out_in_single():
    torch.manual_seed(0)
    model = nn.Linear(4, 2).bfloat16()
    batch = torch.randn(6, 4).bfloat16(), torch.arange(6) % 2
    training = Training(lambda p: torch.optim.AdamW(p, lr=LR), model, batch).step(3)
    assert optimizer_scaling(training.objective, training.optimizer).diagonal.dtype == torch.float32


# What is refused


class OtherSGD(torch.optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize("kind", [torch.optim.RMSprop, torch.optim.NAdam, torch.optim.LBFGS, OtherSGD])
def test_an_optimizer_that_is_not_known_is_named_with_the_remedy(kind):
    training = Training(lambda p: kind(p, lr=LR))
    for ask in (
        lambda: optimizer_scaling(training.objective, training.optimizer),
        lambda: require_scaling(training.optimizer),
    ):
        with pytest.raises(ArgumentError, match=rf"{kind.__name__} divides its steps.*preconditioner\(\)"):
            ask()


def test_a_subclass_with_the_same_step_is_known():
    class Renamed(torch.optim.Adam):
        pass

    training = Training(lambda p: Renamed(p, lr=LR)).step()
    assert optimizer_scaling(training.objective, training.optimizer).held == ()


def test_an_optimizer_of_other_weights_is_refused():
    training = Training(OPTIMIZERS["sgd"])
    other, _ = make("mlp-tanh", seed=1)
    training.model.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(ArgumentError, match=r"SGD holds none of the 6 parameters.*make it anew"):
        optimizer_scaling(training.objective, training.optimizer)


@pytest.mark.parametrize(
    ("diagonal", "error", "words"),
    [
        (torch.ones(2), ArgumentError, r"'0.weight' is a real tensor of shape \(6, 4\), not torch.float32 \(2,\)"),
        (1.0, ArgumentError, "not 1.0"),
        (torch.ones(6, 4, dtype=torch.complex64), ArgumentError, "complex64"),
        (torch.full((6, 4), torch.nan), NonFiniteError, "Own in '0.weight' holds NaN"),
        (torch.full((6, 4), -1.0), ArgumentError, "negative"),
    ],
)
def test_a_preconditioner_that_is_none_is_refused(diagonal, error, words):
    training = Training(OPTIMIZERS["own"])
    training.optimizer.given = {training.model[0].weight: diagonal}
    with pytest.raises(error, match=words):
        optimizer_scaling(training.objective, training.optimizer)


def test_a_preconditioner_that_is_no_dict_is_refused():
    training = Training(OPTIMIZERS["own"])
    training.optimizer.given = [torch.ones(6, 4)]
    with pytest.raises(ArgumentError, match=r"Own.preconditioner\(\) returns a dict of parameters, not list"):
        optimizer_scaling(training.objective, training.optimizer)
