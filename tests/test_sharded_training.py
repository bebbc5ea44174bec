"""A product of sharded weights leaves no trace in a training: every bit of it is as without."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import launch

pytestmark = pytest.mark.timeout(280)

SCRIPT = """
import random
from shard_cases import *
from curvdiag import Hessian
from curvdiag.errors import CurvdiagError
from torch.distributed.fsdp import CPUOffloadPolicy
from torch.utils.checkpoint import checkpoint

class Net(nn.Module):
    def __init__(self, checkpointed):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.norm, self.two = nn.Linear(4, 7), nn.BatchNorm1d(7), nn.Linear(7, 3)
        self.drop, self.checkpointed, self.calls = nn.Dropout(0.3), checkpointed, 0

    def forward(self, x):
        self.calls += 1
        layer = lambda z: torch.tanh(self.one(z))
        x = checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x)
        return self.two(self.drop(self.norm(x)))

def train(measure, case):
    model = Net(case == "checkpointed")
    options = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if case == "offload" else {}
    options["reshard_after_forward"] = case != "kept"
    fully_shard(model.one, **options)
    fully_shard(model, **options)
    if case == "factor":
        model.set_force_sum_reduction_for_comms(True)
        model.set_gradient_divide_factor(3.0)  # of one unit, and not of the other
    adam = torch.optim.AdamW(model.parameters(), lr=0.01, fused=case == "kept")
    steps = []
    if case == "hooks":  # an optimizer that steps within the backward pass
        for p in model.parameters():
            p.register_post_accumulate_grad_hook(lambda p: steps.append(p.shape))
    batches = data(rank, torch.float32)
    batch = data(0, torch.float32)[rank][0], data(0, torch.float32)[rank][1]
    loss = criterion(torch.float32)

    def look():
        if not measure:
            return
        objective = of_rank(model, rank, torch.float32)
        hessian = Hessian(objective, method="finite-difference")
        found.append(hessian.apply(hessian.space.gaussian(1, seed=0, dtype=torch.float32, device="cpu")))
        if case == "error":
            kept = objective._loss.unreduced
            objective._loss.unreduced = lambda outputs, targets: [][0]
            objective._moved_losses.clear()
            try:
                hessian.apply(found[-1])
            except IndexError:
                found.append(None)
            objective._loss.unreduced = kept

    found = []
    torch.manual_seed(7 + rank)
    random.seed(7)
    for step in range(2):
        if case == "accumulation":
            model.set_requires_gradient_sync(False)
            model.set_is_last_backward(False)
            loss(model(batch[0]), batch[1]).backward()
            look()
            model.set_requires_gradient_sync(True)
            model.set_is_last_backward(True)
        output = loss(model(batch[0]), batch[1])
        if case == "between":
            look()
        output.backward()
        grads = [p.grad for p in model.parameters()]
        if case not in ("accumulation", "between"):
            look()
        assert all(p.grad is g for p, g in zip(model.parameters(), grads))
        adam.step()
        adam.zero_grad()
    model.reshard()
    state = [p.to_local().detach().clone() for p in model.parameters()]
    state += [b.detach().clone() for b in model.buffers()]
    moments = [v.to_local() if hasattr(v, "to_local") else v for s in adam.state.values() for v in s.values()]
    return {
        "weights": state, "moments": moments, "random": [torch.rand(3), random.random()], "calls": model.calls,
        "flags": [m.training for m in model.modules()], "hooks": len(steps), "measured": len(found),
    }

for case in ("plain", "kept", "offload", "checkpointed", "accumulation", "between", "hooks", "factor", "error"):
    saved[case] = train(False, case), train(True, case)

model = sharded(net(torch.float64))
hessian = Hessian(of_rank(model, rank, torch.float64), method="finite-difference")
row = hessian.space.gaussian(1, seed=0, dtype=torch.float64, device="cpu")
before = hessian @ row[0]
with torch.no_grad():
    local = model[5].bias.to_local()
    local.add_(1e-3 * (rank == 1))  # only the second rank's shard changes
try:
    hessian @ row[0]
except CurvdiagError as error:
    saved["stale"] = type(error).__name__, str(error)
"""

CASES = ("plain", "kept", "offload", "checkpointed", "accumulation", "between", "hooks", "factor", "error")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return launch(SCRIPT, 2, tmp_path_factory.mktemp("training"), limit=270)


@pytest.mark.parametrize("case", CASES)
def test_training_with_products_in_between_is_bit_identical(runs: list[dict[str, Any]], case: str) -> None:
    for one in runs:
        without, with_products = one[case]
        assert without["measured"] == 0
        assert with_products["measured"] == (4 if case == "error" else 2)
        for name in ("weights", "moments"):
            assert len(without[name]) == len(with_products[name]) > 0
            for a, b in zip(without[name], with_products[name], strict=True):
                assert torch.equal(a, b), name
        assert torch.equal(without["random"][0], with_products["random"][0])
        assert without["random"][1] == with_products["random"][1]
        for name in ("flags", "calls", "hooks"):
            assert without[name] == with_products[name], name


def test_weights_that_changed_are_refused_on_all_ranks(runs: list[dict[str, Any]]) -> None:
    assert runs[1]["stale"][0] == "StaleWeightsError"
    assert "make a new one" in runs[1]["stale"][1]
    assert "rank 1 failed: StaleWeightsError" in runs[0]["stale"][1]
