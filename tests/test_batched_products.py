"""Several vectors through a graph in one backward pass: the same numbers, chosen safely."""

from __future__ import annotations

import warnings

import pytest
import torch
from nets import Checkpointed, cut, make
from oracles import criterion_loss, dense_hessian, relative
from torch import Tensor, nn

from curvdiag import EmpiricalFisher, Fisher, GaussNewton, Hessian, NoiseCovariance, Objective, spectral_density, trace
from curvdiag.errors import ArgumentError
from curvdiag.operators import batched
from curvdiag.operators.kept_graph import KeptGraph
from curvdiag.spectrum import diagonal

NETS = ("mlp-relu", "conv-batchnorm", "transformer-tied", "encoder-layer", "in-place")


def objective(net: str, samples: int = 10) -> Objective:
    model, batch = make(net, samples)
    return Objective(model, nn.CrossEntropyLoss(), cut(batch, (samples - 3, 3)))


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each backward pass of a product is batched, as they come."""
    seen: list[bool] = []
    backward = KeptGraph._backward

    def watched(self, *args, batched=False, **options):
        seen.append(batched)
        return backward(self, *args, batched=batched, **options)

    monkeypatch.setattr(KeptGraph, "_backward", watched)
    return seen


@pytest.mark.parametrize("net", NETS)
def test_batched_hessians_are_the_dense_truth(net: str, passes: list[bool]) -> None:
    model, batch = make(net)
    truth = dense_hessian(model, criterion_loss(nn.CrossEntropyLoss(), batch))
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3))), batched=True, micro_batch=4)
    passes.clear()
    assert relative(op.dense(), truth) < 1e-10
    assert any(passes)


@pytest.mark.parametrize("options", [{}, {"memory": 0, "micro_batch": 7}, {"micro_batch": 4}], ids=str)
@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NoiseCovariance, EmpiricalFisher], ids=lambda k: k.__name__)
@pytest.mark.parametrize("net", ["mlp-relu", "transformer-tied"])
def test_batched_and_single_passes_agree(net: str, kind: type, options: dict, passes: list[bool]) -> None:
    problem = objective(net)
    vectors = torch.randn(problem.parameters.size, 70, dtype=torch.float64)  # more than one batch of them
    together, alone = kind(problem, batched=True, **options), kind(problem, batched=False, **options)
    passes.clear()
    expected = alone @ vectors
    assert not any(passes)
    assert relative(together @ vectors, expected) < 1e-12
    assert any(passes)
    name = problem.parameters.names[0]
    assert relative(together.block(name).dense(), alone.block(name).dense()) < 1e-12


def test_shared_graphs_and_drawn_labels_are_batched_too(passes: list[bool]) -> None:
    problem = objective("mlp-relu")
    hessian = Hessian(problem, batched=True)
    passes.clear()
    assert relative(GaussNewton(problem, graphs=hessian).dense(), GaussNewton(problem, batched=False).dense()) < 1e-12
    assert any(passes)
    drawn = Fisher(problem, method="monte-carlo", draws=3)
    vectors = torch.eye(drawn.size, dtype=torch.float64)
    assert relative(drawn @ vectors, torch.stack([drawn @ v for v in vectors], 1)) < 1e-12


def test_the_rule_batches_small_nets_and_many_vectors_only(passes: list[bool]) -> None:
    small = Hessian(objective("mlp-relu"))
    for count, batches in ((1, False), (batched.FEWEST - 1, False), (batched.FEWEST, True)):
        passes.clear()
        small.apply(torch.randn(count, small.size, dtype=torch.float64))
        assert any(passes) is batches
    large_model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10))
    large = Hessian(Objective(large_model, nn.CrossEntropyLoss(), (torch.randn(2000, 64), torch.randint(10, (2000,)))))
    passes.clear()
    large.apply(torch.randn(8, large.size))
    assert not any(passes)


def test_the_rule_gives_the_same_bits_each_time() -> None:
    model, batch = make("conv-batchnorm", dtype=torch.float32)
    vectors = torch.randn(215, 9, generator=torch.Generator().manual_seed(0))
    products = [Hessian(Objective(model, nn.CrossEntropyLoss(), batch)) @ vectors for _ in range(3)]
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), batch))
    products += [op @ vectors, op @ vectors]  # the first one chooses, the second has chosen
    assert all(torch.equal(product, products[0]) for product in products)


def test_a_timing_is_made_once_for_each_shape(monkeypatch: pytest.MonkeyPatch, passes: list[bool]) -> None:
    problem, asked = objective("mlp-relu"), []

    def clock(rows: Tensor, once) -> bool:
        asked.append(len(rows))
        return False

    monkeypatch.setattr(batched, "_faster", clock)
    vectors = torch.randn(problem.parameters.size, 20, dtype=torch.float64)
    for _ in range(2):
        op = Hessian(problem, batched="timed")
        op @ vectors, op @ vectors[:, :5]
        passes.clear()
        op @ vectors
        assert not any(passes)  # as the clock said
    assert asked == [20, 5]
    monkeypatch.undo()
    assert relative(Hessian(objective("mlp-relu"), batched="timed") @ vectors, op @ vectors) < 1e-12


def test_recomputed_graphs_are_walked_one_vector_at_a_time(passes: list[bool]) -> None:
    torch.manual_seed(0)
    model, batch = Checkpointed(reentrant=False).double(), make("mlp-tanh")[1]
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), batch), batched=True)
    passes.clear()
    assert relative(op.dense(), dense_hessian(model, criterion_loss(nn.CrossEntropyLoss(), batch))) < 1e-10
    assert not any(passes)


class _Cube(torch.autograd.Function):
    """Its backward pass is plain operations, which a batch passes through, unless it has a fault."""

    wrong_in_a_batch = False
    looks_at_numbers = False

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        batch = torch._C._functorch.is_batchedtensor(grad)
        if _Cube.looks_at_numbers:
            float(grad.sum())  # a batch of numbers is no number
        return (2.0 if batch and _Cube.wrong_in_a_batch else 1.0) * 3 * grad * x**2


class _Cubed(nn.Module):
    def __init__(self, *, plain: bool) -> None:
        super().__init__()
        self.first, self.last, self.plain = nn.Linear(4, 5), nn.Linear(5, 3), plain

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x**3 if self.plain else _Cube.apply(x))


@pytest.mark.filterwarnings("ignore:the custom function")
@pytest.mark.parametrize("fault", ["looks_at_numbers", "wrong_in_a_batch", None])
def test_what_cannot_be_batched_is_walked_one_vector_at_a_time_in_silence(
    fault: str | None, passes: list[bool], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    model, batch = _Cubed(plain=False).double(), make("mlp-tanh")[1]
    plain = _Cubed(plain=True).double()
    plain.load_state_dict(model.state_dict())
    problem = Objective(model, nn.CrossEntropyLoss(), batch)
    if fault:
        monkeypatch.setattr(_Cube, fault, True)
    op = Hessian(problem, batched=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        first = op.dense()
        passes.clear()
        again = op.dense()
    assert any(passes) is (fault is None)
    truth = dense_hessian(plain, criterion_loss(nn.CrossEntropyLoss(), batch))
    assert relative(first, truth) < 1e-10
    assert torch.equal(first, again)


def test_an_operation_without_a_rule_is_noticed_by_its_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = objective("mlp-relu")

    def once(rows: Tensor, keep: bool, several: bool) -> list[Tensor]:
        if several:
            warnings.warn(
                "There is a performance drop because we have not yet implemented the batching rule", stacklevel=2
            )
        return [2 * rows]

    op = Hessian(problem, batched=True)
    rows = torch.randn(3, 4, dtype=torch.float64)
    assert not op._engine.batching.together(op._engine.kept[0], rows, once, "with a warning")
    assert op._engine.batching.together(op._engine.kept[0], rows, lambda rows, *_: [2 * rows], "without")


@pytest.mark.parametrize("memory", [None, 0])
def test_probes_go_through_each_graph_together(memory: int | None) -> None:
    """Density, trace and diagonal give all their probes to one visit of each graph."""
    problem = objective("mlp-relu")
    op, calls = Hessian(problem, memory=memory, micro_batch=None if memory is None else 7), []
    apply = op.apply
    op.apply = lambda rows: calls.append(len(rows)) or apply(rows)  # type: ignore[method-assign]
    spectral_density(op, steps=6, probes=8)
    assert max(calls) == 8
    assert op.cost.matvecs <= 8 * 6
    if memory == 0:
        assert op.cost.graphs == 2 * len(calls)
        assert len(calls) <= 6
    for estimate in (trace, diagonal):
        calls.clear()
        estimate(op, probes=8)
        assert len(calls) <= 3, estimate


def test_refused_settings() -> None:
    with pytest.raises(ArgumentError, match="batched"):
        Hessian(objective("mlp-relu"), batched="always")
