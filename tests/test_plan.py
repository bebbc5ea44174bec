"""How data are laid out in graphs: as few as fit, within the bytes that were given."""

from __future__ import annotations

import gc
from itertools import pairwise

import pytest
import torch
from nets import make
from oracles import relative
from torch import nn
from torch.nn import functional as F

from curvdiag import GaussNewton, Hessian, NoiseCovariance, Objective
from curvdiag.data import merge, sample_count, tensors_of
from curvdiag.errors import SecondDerivativeError
from curvdiag.operators import graphs
from curvdiag.operators.gradient_graph import GradientGraph as Graph
from curvdiag.operators.plan import GraphBytes, lay_out


class Text(nn.Module):
    """Attention over all positions: memory grows with the square of the length."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 5)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(((x @ x.transpose(1, 2)).softmax(-1) @ x).mean(1))


def text(samples: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randint(16, (samples, length)), torch.randint(5, (samples,))


def images(samples: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(samples, 6), torch.randint(3, (samples,))


def test_batches_that_alternate_in_length_are_merged_by_length() -> None:
    torch.manual_seed(0)
    batches = [text(4, length) for length in (8, 16, 8, 16)]
    op = Hessian(Objective(Text(), F.cross_entropy, batches))
    assert op.plan is not None
    assert sorted(op.plan.kept) == [8, 8]
    assert op.plan.rebuilt == ()


def test_the_longest_text_sets_the_price_of_a_sample() -> None:
    """Else a plan made from the first, short batch would keep graphs that do not fit."""
    torch.manual_seed(0)
    budget = 4_000_000
    long = Hessian(Objective(Text(), F.cross_entropy, text(8, 256))).plan
    assert long is not None
    each = long.bytes_kept / 8
    for lengths in ((8, 256, 256), (256, 256, 8)):
        batches = [text(4, length) for length in lengths]
        op = Hessian(Objective(Text(), F.cross_entropy, batches), memory=budget)
        assert op.plan is not None
        assert sum(op.plan.kept) * each <= 1.1 * budget < 12 * each


def test_what_belongs_to_the_graph_and_not_to_a_sample_is_counted_once() -> None:
    """A product of two weight matrices is saved once, however many samples go through it."""

    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(300, 300) / 17), nn.Parameter(torch.randn(300, 3) / 17)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.a.tanh() @ self.b)

    torch.manual_seed(0)
    objective = Objective(Factored(), F.cross_entropy, (torch.randn(2000, 300), torch.randint(3, (2000,))))
    op = Hessian(objective, memory=20_000_000)
    assert op.plan is not None
    assert op.plan.kept == (2000,)
    assert op.plan.bytes_kept < 10_000_000


def test_a_batch_that_does_not_fit_is_kept_in_part() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    inputs, targets = images(1024)
    objective = Objective(model, F.cross_entropy, (inputs.double(), targets))
    whole = Hessian(objective)
    assert whole.plan is not None
    part = Hessian(objective, memory=int(0.6 * whole.plan.bytes_kept))
    assert part.plan is not None
    assert 0.3 * 1024 < sum(part.plan.kept) < 1024
    assert sum(part.plan.kept) + sum(part.plan.rebuilt) == 1024
    assert max(part.plan.rebuilt) * whole.plan.bytes_kept / 1024 <= 0.3 * part.plan.budget
    vector = torch.randn(whole.size, dtype=torch.float64)
    assert relative(part @ vector, whole @ vector) < 1e-12


@pytest.mark.parametrize("budget", [0, 1, 100, 1000, 10_000])
@pytest.mark.parametrize("regroup", [True, False])
def test_every_sample_is_in_one_graph_and_the_kept_ones_fit(budget: int, regroup: bool) -> None:
    pieces = [images(n) for n in (32, 32, 7, 1)]
    size = GraphBytes(20.0, 10.0)
    plan, kept, rebuilt = lay_out(pieces, size, budget, 10**6, regroup=regroup)
    again = [merge(group) for group in rebuilt]
    assert sum(map(sample_count, kept)) + sum(map(sample_count, again)) == 72
    assert plan.rebuilt == tuple(map(sample_count, again))
    assert sum(size(sample_count(batch)) for batch in kept) <= budget
    assert plan.kept == tuple(map(sample_count, kept))
    rows = torch.cat([batch[0] for batch in (*kept, *again)])
    assert sorted(rows[:, 0].tolist()) == sorted(torch.cat([piece[0] for piece in pieces])[:, 0].tolist())


def test_more_memory_never_keeps_less() -> None:
    pieces = [images(n) for n in (32, 32, 7, 1)]
    kept = [sum(lay_out(pieces, GraphBytes(20.0, 10.0), b, 0, regroup=True)[0].kept) for b in range(0, 1000, 10)]
    assert all(later >= earlier for earlier, later in pairwise(kept))
    assert kept[-1] == 72


def test_one_rebuilt_graph_is_alive_at_a_time() -> None:
    model, batch = make("mlp-tanh")
    op = Hessian(Objective(model, F.cross_entropy, batch), memory=0, micro_batch=2)
    alive: list[int] = []
    build = Graph._build

    def built() -> int:
        return sum(isinstance(o, Graph) and hasattr(o, "edges") for o in gc.get_objects())

    def counting(graph: Graph, live: object) -> None:
        alive.append(built() - others)
        build(graph, live)  # type: ignore[arg-type]

    try:
        Graph._build = counting  # type: ignore[method-assign,assignment]
        gc.collect()
        others = built()  # those that fixtures of other tests still hold
        op @ torch.ones(op.size, dtype=op.dtype)
    finally:
        Graph._build = build  # type: ignore[method-assign]
    assert len(alive) > 2
    assert max(alive) == 0


def small_batches(count: int, samples: int) -> tuple[nn.Module, list[tuple[torch.Tensor, torch.Tensor]]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Tanh(), nn.Linear(64, 3)).double()
    return model, [(x.double(), y) for x, y in (images(samples) for _ in range(count))]


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NoiseCovariance])
def test_rebuilt_batches_are_merged_within_an_eighth_of_what_is_free(
    kind: type[Hessian], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, batches = small_batches(12, 16)
    whole = kind(Objective(model, F.cross_entropy, batches))
    assert whole.plan is not None
    each = whole.plan.bytes_kept / sum(whole.plan.kept)
    vectors = torch.randn(whole.size, 3, dtype=torch.float64)
    for samples, groups in ((40, (32,) * 6), (100, (96, 96)), (192, (192,)), (1, (16,) * 12)):
        monkeypatch.setattr(graphs, "free_bytes", lambda device, samples=samples: int(8.5 * samples * each))
        op = kind(Objective(model, F.cross_entropy, batches), memory=0)
        assert op.plan is not None
        assert (op.plan.kept, op.plan.rebuilt) == ((), groups)
        assert relative(op @ vectors, whole @ vectors) < 1e-12


def test_the_users_cut_and_batches_that_differ_are_not_merged() -> None:
    model, batches = small_batches(4, 16)
    cut = Hessian(Objective(model, F.cross_entropy, batches), memory=0, micro_batch=16).plan
    assert cut is not None
    assert cut.rebuilt == (16,) * 4
    texts = Hessian(Objective(Text(), F.cross_entropy, [text(4, n) for n in (8, 16, 8, 16)]), memory=0).plan
    assert texts is not None
    assert texts.rebuilt == (8, 8)


def test_no_copy_of_merged_batches_stays_between_products() -> None:
    model, batches = small_batches(4, 16)
    objective = Objective(model, F.cross_entropy, batches)
    op = Hessian(objective, memory=0)
    assert op.plan is not None
    assert op.plan.rebuilt == (64,)
    op @ torch.ones(op.size, dtype=op.dtype)
    storages = {x.untyped_storage().data_ptr() for x in tensors_of(objective.batches)}
    assert {x.untyped_storage().data_ptr() for x in tensors_of(op._engine.rebuilt)} <= storages  # type: ignore[union-attr]


def test_what_little_memory_leaves_over_is_merged_up_to_its_share_of_it() -> None:
    pieces = [images(2) for _ in range(100)]
    plan, _, _ = lay_out(pieces, GraphBytes(0.0, 10.0), 800, 10**6, regroup=True)
    assert plan.kept == (70,)
    assert set(plan.rebuilt) == {10}


@pytest.mark.parametrize(("samples", "checked"), [(64, 8), (5, 2), (2, 1), (1, 1)])
def test_the_symmetry_is_checked_once_on_a_few_samples(
    samples: int, checked: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    check = Graph._meets

    def recorded(graph: Graph) -> bool:
        seen.append(sample_count(graph.batch))
        return check(graph)

    monkeypatch.setattr(Graph, "_meets", recorded)
    model, batches = small_batches(1, samples)
    objective = Objective(model, F.cross_entropy, batches)
    Hessian(objective) @ torch.ones(objective.parameters.size, dtype=torch.float64)
    Hessian(objective, memory=0)
    assert seen == [checked]


class Squeezed(nn.Module):
    """One number for each sample, and none of its own for a batch of one."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x.tanh()).squeeze()


@pytest.mark.parametrize("samples", [2, 3, 4, 5, 7, 8, 33])
def test_a_net_that_squeezes_a_batch_of_one_is_measured_in_batches_of_any_other_size(samples: int) -> None:
    torch.manual_seed(0)
    model, x, y = Squeezed(), images(samples)[0], torch.rand(samples)
    hessian = Hessian(Objective(model, nn.BCEWithLogitsLoss(), (x, y)))
    assert hessian.plan is not None
    assert hessian.plan.kept == (samples,)


def rolled(model: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Losses whose gradient is made one that is none of any function."""
    x = model(batch[0]).clone()
    if x.requires_grad:
        x.register_hook(lambda slope: slope * x.roll(1, -1))
    return F.cross_entropy(x, batch[1], reduction="none")


@pytest.mark.parametrize("empty", [0, 32])
def test_samples_without_curvature_are_no_proof_of_symmetry(empty: int) -> None:
    torch.manual_seed(0)
    x, y = images(64)
    x[:empty] = 0
    objective = Objective.from_loss(nn.Linear(6, 3, bias=False), rolled, (x, y))
    assert objective.can_regroup
    with pytest.raises(SecondDerivativeError, match="not symmetric"):
        Hessian(objective)
