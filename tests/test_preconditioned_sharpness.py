"""The top eigenvalue of the Hessian as the optimizer's own scaling sees it, against the dense matrix."""

from __future__ import annotations

import functools

import pytest
import torch
from nets import Transformer, make, tokens
from oracles import criterion_loss, dense_hessian
from test_optimizer_scaling import Own
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, CurvdiagWarning, Hessian, Objective, top_eigenpairs
from curvdiag.errors import ArgumentError
from curvdiag.monitor import warm
from curvdiag.optim import LPSGDM

pytestmark = pytest.mark.filterwarnings("ignore:measuring every")

KEY = "curv/preconditioned/lambda_max"
NAME = "preconditioned_lambda_max"


def watch(objective, measure=(NAME,), **options):
    options = {"steps": 8, "probes": 3, "tol": 1e-9, "every": 1, "strict": True, **options}
    return CurvatureMonitor(objective, measure=list(measure), **options)


class Training:
    def __init__(self, make_optimizer, model=None, batch=None, measure=(NAME,), params=None, **options):
        ready, vectors = make("mlp-tanh")
        self.model, self.batch = model or ready, batch or vectors
        self.optimizer = make_optimizer(self.model.parameters())
        objective = Objective(self.model, F.cross_entropy, self.batch, params=params)
        self.monitor = watch(objective, measure, **options)

    def step(self, times=1):
        for _ in range(times):
            self.optimizer.zero_grad()
            F.cross_entropy(self.model(self.batch[0]), self.batch[1]).backward()
            self.optimizer.step()

    def truth(self, diagonal_of):
        """Largest eigenvalue of the dense ``D^(-1/2) H D^(-1/2)``, with ``D`` in the order of the objective."""
        named = dict(self.model.named_parameters())
        names = self.monitor.objective.parameters.names
        diagonal = torch.cat([diagonal_of(named[name]).detach().flatten() for name in names])
        root = torch.where(diagonal > 0, diagonal.rsqrt(), 0.0)
        matrix = dense_hessian(self.model, criterion_loss(F.cross_entropy, self.batch), names)
        return float(torch.linalg.eigvalsh(root[:, None] * matrix * root)[-1])


def adam_diagonal(optimizer, key="exp_avg_sq"):
    def diagonal(parameter):
        state, group = optimizer.state[parameter], optimizer.param_groups[0]
        return (state[key] / (1 - group["betas"][1] ** float(state["step"]))).sqrt() + group["eps"]

    return diagonal


CASES = {
    "sgd": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), lambda optimizer: torch.ones_like),
    "adam": (lambda p: torch.optim.Adam(p, lr=0.01), adam_diagonal),
    "adamw fused": (lambda p: torch.optim.AdamW(p, lr=0.01, fused=True), adam_diagonal),
    "amsgrad": (
        lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
        lambda optimizer: adam_diagonal(optimizer, "max_exp_avg_sq"),
    ),
    "own": (Own, lambda optimizer: lambda p: (p.grad.abs() + 1e-8) ** 0.8),
    "lpsgdm": (
        lambda p: LPSGDM(p, lr=0.01, p=6.0),
        lambda optimizer: lambda p: (optimizer.state[p]["momentum_buffer"].abs() + 1e-8) ** 0.8,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_it_is_the_top_eigenvalue_of_the_dense_preconditioned_hessian_at_each_step(name):
    make_optimizer, diagonal = CASES[name]
    training = Training(make_optimizer)
    training.monitor.attach(training.optimizer)
    for step in range(1, 4):
        training.step()
        found = training.monitor.latest
        assert found.step == step
        assert found[KEY] == pytest.approx(training.truth(diagonal(training.optimizer)), rel=1e-9)
        assert found[f"{KEY}_residual"] < 1e-8 * found[KEY]
        assert found.notes[:1] == () or "a measurement takes" in found.notes[0]


@pytest.mark.parametrize("params", [["2.*", "0.bias"], "4.weight"])
def test_chosen_parameters_are_measured_alone(params):
    training = Training(CASES["adam"][0], params=params)
    training.monitor.attach(training.optimizer)
    training.step(2)
    assert training.monitor.latest[KEY] == pytest.approx(training.truth(adam_diagonal(training.optimizer)), rel=1e-9)


def test_tied_weights_are_measured_once():
    torch.manual_seed(0)
    training = Training(CASES["adam"][0], Transformer().double(), tokens())
    training.monitor.attach(training.optimizer)
    training.step(2)
    assert training.monitor.latest[KEY] == pytest.approx(training.truth(adam_diagonal(training.optimizer)), rel=1e-9)


def test_what_the_optimizer_does_not_move_is_held_fixed_and_noted():
    model, _ = make("mlp-tanh")
    training = Training(lambda _: torch.optim.Adam(model[4].parameters(), lr=0.01), model)
    training.monitor.attach(training.optimizer)
    training.step()
    moved = {id(p) for p in model[4].parameters()}
    diagonal = adam_diagonal(training.optimizer)
    truth = training.truth(lambda p: diagonal(p) if id(p) in moved else torch.zeros_like(p))
    assert training.monitor.latest[KEY] == pytest.approx(truth, rel=1e-9)
    assert any("Adam does not move 0.weight, 0.bias, 2.weight, 2.bias" in n for n in training.monitor.latest.notes)


def test_before_the_first_step_a_note_says_when_it_will_be_measured(tmp_path):
    training = Training(CASES["lpsgdm"][0], measure=["trace", NAME], store=tmp_path / "run.db")
    with training.monitor.attach(training.optimizer) as monitor:
        first = monitor.measure()
        assert KEY not in first.scalars
        assert "curv/hessian/trace" in first.scalars
        assert any("LPSGDM has moved none" in note and "after the first step" in note for note in first.notes)
        training.step()
        assert monitor.latest[KEY] > 0
        assert monitor.run.scalars(KEY).steps.tolist() == [1]


def test_a_resumed_optimizer_has_its_scaling_at_once():
    first = Training(CASES["adam"][0])
    first.monitor.attach(first.optimizer)
    first.step(2)
    again = Training(CASES["adam"][0])
    again.model.load_state_dict(first.model.state_dict())
    again.optimizer.load_state_dict(first.optimizer.state_dict())
    assert again.monitor.attach(again.optimizer).measure()[KEY] == pytest.approx(first.monitor.latest[KEY], rel=1e-9)


def test_entries_without_scale_are_held_fixed():
    training = Training(Own)
    own = {p: torch.ones_like(p) for p in training.model.parameters()}
    own[training.model[4].weight][0] = 0.0
    training.optimizer.given = own
    training.monitor.attach(training.optimizer)
    found = training.monitor.measure()
    assert found[KEY] == pytest.approx(training.truth(own.__getitem__), rel=1e-9)
    assert any("D of Own is zero in 5 entries: held fixed" in note for note in found.notes)


def test_it_works_on_the_graphs_that_are_there_and_its_products_are_counted(monkeypatch):
    rows, graphs = [], []
    multiply, start = Hessian._multiply, Hessian.__init__
    monkeypatch.setattr(Hessian, "_multiply", lambda self, v: rows.append(len(v)) or multiply(self, v))
    monkeypatch.setattr(Hessian, "__init__", lambda self, *a, **o: graphs.append(1) or start(self, *a, **o))
    training = Training(CASES["sgd"][0], measure=["lambda_max", NAME])
    found = training.monitor.attach(training.optimizer).measure()
    assert len(graphs) == 1
    assert found["curv/cost/matvecs"] == sum(rows) > 10
    assert found[KEY] == pytest.approx(found["curv/hessian/lambda_max"], rel=1e-9)  # D is one


def test_it_is_in_the_precision_of_the_hessian():
    model, (inputs, targets) = make("mlp-tanh", dtype=torch.float32)
    training = Training(CASES["adam"][0], model, (inputs, targets), hessian={"dtype": torch.float64})
    training.monitor.attach(training.optimizer)
    training.step(2)
    found = training.monitor.latest
    assert found[f"{KEY}_residual"] < 1e-8 * found[KEY]


def test_one_that_has_not_converged_is_noted(monkeypatch):
    monkeypatch.setattr(warm, "top_eigenpairs", functools.partial(top_eigenpairs, max_matvecs=3))
    training = Training(CASES["own"][0])
    training.monitor.attach(training.optimizer)
    training.step()
    assert any(f"{NAME} has not converged" in note for note in training.monitor.latest.notes)


def test_without_an_optimizer_it_fails_and_the_rest_is_measured():
    training = Training(CASES["sgd"][0], measure=["trace", NAME], strict=False)
    with pytest.warns(CurvdiagWarning, match=rf"measurement of {NAME} at step 0 failed.*attach\(optimizer\)"):
        found = training.monitor.measure()
    assert "curv/hessian/trace" in found.scalars


def test_an_unknown_optimizer_is_refused_when_it_is_attached():
    training = Training(lambda p: torch.optim.RMSprop(p))
    with pytest.raises(ArgumentError, match=r"RMSprop divides its steps.*preconditioner\(\)"):
        training.monitor.attach(training.optimizer)
    training.step()
    assert training.monitor.steps_done == 0
    watch(training.monitor.objective, ["trace"]).attach(training.optimizer)
