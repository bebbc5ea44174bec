"""What an objective and its first operator do before the first product: no pass over the data that is not needed."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import GaussNewton, Hessian, Objective, trace
from curvdiag.errors import NonFiniteError, NotDeterministicError
from curvdiag.operators import kept_graph
from curvdiag.operators.plan import GraphBytes, all_fit, upper_bound
from curvdiag.space import WholeSpace
from curvdiag.spectrum.range import all_finite

Batch = tuple[Tensor, Tensor]


def data(count: int = 64) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(count, 6, generator=generator), torch.randint(3, (count,), generator=generator)


def net(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = [nn.Linear(6, 5), nn.BatchNorm1d(5) if norm else nn.Tanh(), nn.Linear(5, 3)]
    return nn.Sequential(*layers)


class Watched(nn.Module):
    """Notes how many samples each forward pass has."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        SEEN.append(len(x))
        return self.inner(x)


SEEN: list[int] = []


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    SEEN.clear()
    yield
    SEEN.clear()


def test_an_objective_passes_its_first_batch_twice_once_whole_and_once_in_halves() -> None:
    Objective(Watched(net()), nn.CrossEntropyLoss(), batches=[data(), data()])
    assert SEEN == [64, 32, 32]
    SEEN.clear()
    Objective.from_loss(Watched(net()), lambda model, b: F.cross_entropy(model(b[0]), b[1], reduction="none"), data())
    assert SEEN == [64, 32, 32]


def test_a_loss_that_changes_by_less_than_samples_may_is_not_deterministic_all_the_same() -> None:
    calls: list[int] = []

    def drifting(model: nn.Module, batch: Batch) -> Tensor:
        calls.append(0)
        return F.cross_entropy(model(batch[0]), batch[1], reduction="none") * (1 + 2e-4 * len(calls))

    with pytest.raises(NotDeterministicError, match="a state of its own"):
        Objective.from_loss(net(), drifting, data())
    assert len(calls) == 4


@pytest.mark.parametrize("operator", [Hessian, GaussNewton])
def test_a_first_operator_builds_one_graph_of_few_samples_and_one_of_all(operator: type) -> None:
    objective = Objective(Watched(net()), nn.CrossEntropyLoss(), batches=[data(), data()])
    SEEN.clear()
    op = operator(objective)
    assert [n for n in SEEN if n != 8] == [128]
    few = len(SEEN)
    again = operator(objective)
    assert SEEN[few:] == [128]
    plan = op.plan  # only now is the memory looked at more closely
    assert SEEN[few + 1 :] == [32]
    assert again.plan.bytes_kept == plan.bytes_kept
    assert op.plan is plan
    assert SEEN[few + 2 :] == []


def test_a_graph_that_cannot_be_cut_is_built_once_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[int] = []
    inside = kept_graph.KeptGraph.__init__

    def watch(
        graph: kept_graph.KeptGraph, objective: Objective, weights: object, batch: Batch, *a: object, **k: object
    ):
        built.append(len(batch[0]))
        inside(graph, objective, weights, batch, *a, **k)  # type: ignore[arg-type]

    monkeypatch.setattr(kept_graph.KeptGraph, "__init__", watch)
    objective = Objective(net(norm=True), nn.CrossEntropyLoss(), batches=[data(16), data(24)], mode="train")
    op = Hessian(objective)
    assert sorted(built) == [16, 24]
    assert op.cost.graphs == 2
    built.clear()
    rebuilt = Hessian(objective, memory=0)
    assert built == []
    vector = torch.ones(op.size)
    assert torch.equal(op @ vector, rebuilt @ vector)


def test_a_tight_budget_is_filled_by_what_graphs_take_and_not_by_the_bound() -> None:
    objective = Objective(net(), nn.CrossEntropyLoss(), data(1024))
    whole = Hessian(objective)
    assert whole.plan is not None
    fresh = Objective(net(), nn.CrossEntropyLoss(), data(1024))
    plan = Hessian(fresh, memory=int(1.01 * whole.plan.bytes_kept)).plan
    assert plan is not None
    assert plan.kept == (1024,)
    assert plan.bytes_kept == whole.plan.bytes_kept


def test_a_plan_can_be_asked_for_when_the_model_has_gone() -> None:
    model = net()
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), data()))
    before = op @ torch.ones(op.size)
    model[0] = nn.Identity()
    assert "1 graph" in repr(op)
    assert op.plan is not None
    assert op.plan.bytes_kept > 0
    assert torch.equal(op @ torch.ones(op.size), before)


def test_the_bound_is_above_every_graph_that_has_a_share_of_its_own_and_one_of_each_sample() -> None:
    size = GraphBytes(1000.0, 10.0)
    bound = upper_bound(8, size(8))
    assert all(bound(n) >= size(n) for n in (1, 8, 500))
    pieces = [data(8), data(64)]
    need = int(size(8) + size(64))
    assert all_fit(pieces, size, need)
    assert not all_fit(pieces, size, need - 1)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_bad_entry_of_a_product_stops_a_trace_and_large_ones_do_not(bad: float) -> None:
    for method in ("hutchinson", "xtrace"):
        with pytest.raises(NonFiniteError):
            trace(torch.diag(torch.tensor([1.0] * 49 + [bad])), probes=8, method=method)
    assert all_finite(WholeSpace(50), torch.full((2, 50), 3e38))  # though their sum is not
    assert not all_finite(WholeSpace(2), torch.tensor([[float("inf"), -float("inf")]]))


def test_a_first_product_imports_nothing_that_takes_long():
    script = (
        "import sys, torch, curvdiag\n"
        "batch = torch.randn(8, 4), torch.randint(3, (8,))\n"
        "objective = curvdiag.Objective(torch.nn.Linear(4, 3), torch.nn.CrossEntropyLoss(), batch)\n"
        "H = curvdiag.Hessian(objective)\n"
        "H @ torch.randn(H.size)\n"
        "curvdiag.spectral_density(H, steps=2, probes=2).trace().interval()\n"
        "slow = 'torch._dynamo', 'torch.distributed.fsdp', 'torch.distributed.tensor', 'scipy.stats', 'matplotlib'\n"
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
