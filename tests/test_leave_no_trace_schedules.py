"""What schedules need is measured and recorded without a trace, whatever the optimizer."""

from __future__ import annotations

import pytest
import torch
from test_leave_no_trace import OPTIMIZERS, Augmented, differing, reference, train
from torch.nn import functional as F

from curvdiag import CurvatureMonitor, Objective
from curvdiag.monitor.settings import ONLY_BY_NAME
from curvdiag.optim import LPSGDM

WANTED = {
    "curv/preconditioned/lambda_max",
    "noise/cwgd_diagonal",
    "noise/gradient_square",
    "noise/gradient_curvature",
    "noise/trace_hc",
    "curv/layer/0/anisotropy/stable_rank",
}


class Powered(torch.optim.Optimizer):
    """``theta <- theta - lr * m / D`` with ``D = (|m| + eps)^0.8``, which it tells."""

    def __init__(self, params):
        super().__init__(params, {"lr": 1e-3})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    m = self.state[p].setdefault("m", torch.zeros_like(p))
                    m.mul_(0.9).add_(p.grad, alpha=0.1)
        for p, diagonal in self.preconditioner().items():
            p.sub_(group["lr"] * self.state[p]["m"] / diagonal)

    def preconditioner(self):
        return {p: (state["m"].abs() + 1e-8) ** 0.8 for p, state in self.state.items()}


OWN = {"powered": Powered, "lpsgdm": lambda p: LPSGDM(p, lr=1e-3, p=6.0)}


def watching(model, source, store):
    data = source
    if source is None:
        augmented = Augmented()
        data = augmented.images[:8], augmented.classes[:8]
    names = [*ONLY_BY_NAME, "noise_scale", "layers"]
    objective = Objective(model, F.cross_entropy, data)
    return CurvatureMonitor(objective, store, every=2, measure=names, steps=6, probes=2, strict=True)


@pytest.mark.filterwarnings("ignore:measuring every")
@pytest.mark.parametrize("source", ["batch", "loader"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw-fused", "adamw-foreach", *OWN])
def test_a_run_measured_for_schedules_ends_with_the_same_bits(optimizer, source, tmp_path, monkeypatch):
    for name, make in OWN.items():
        monkeypatch.setitem(OPTIMIZERS, name, make)
    monitors = []

    def watch(model, batches):
        monitors.append(watching(model, None if source == "batch" else batches, tmp_path / "run.db"))
        return monitors[0]

    def disturb(run, batches):
        monitors[0].record({"sched/p": torch.tensor(6.0), "sched/lr": 0.1})
        assert monitors[0].measure() is not None  # between backward pass and step

    run, monitor = train(optimizer, watch=watch, disturb=disturb)
    assert differing(reference(optimizer, "plain"), run.trace()) == []
    assert {2, 4, 6, 8, 10} <= {one.step for one in monitor.history}
    assert all(set(one.scalars) >= WANTED for one in monitor.history)
    assert monitor.recorded == [(3, {"sched/p": 6.0, "sched/lr": 0.1}), (6, {"sched/p": 6.0, "sched/lr": 0.1})]


def test_before_the_first_step_no_state_is_left_in_the_optimizer(tmp_path):
    for make in [*OPTIMIZERS.values(), *OWN.values()]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Tanh(), torch.nn.Linear(3, 3))
        optimizer = make(model.parameters())
        target = Objective(model, F.cross_entropy, (torch.randn(6, 4), torch.arange(6) % 3))
        monitor = CurvatureMonitor(target, measure=["preconditioned_lambda_max"], strict=True).attach(optimizer)
        monitor.measure()
        assert not optimizer.state
        assert all(p.grad is None for p in model.parameters())
