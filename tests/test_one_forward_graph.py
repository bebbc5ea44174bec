"""The Hessian, the Gauss-Newton matrix and C of the same samples come from one forward pass."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from nets import Transformer, cut, make, mlp
from oracles import relative
from torch import Tensor, nn

from curvdiag import EmpiricalFisher, GaussNewton, Hessian, NoiseCovariance, Objective
from curvdiag.errors import ArgumentError, LossError, SecondDerivativeError
from curvdiag.operators.gradient_graph import GradientGraph

NETS = ("mlp-tanh", "conv-batchnorm", "transformer-tied", "lstm")


def objective(net: str, criterion: nn.Module | None = None) -> Objective:
    """Ten samples in ragged batches."""
    model, batch = make(net)
    return Objective(model, criterion or nn.CrossEntropyLoss(), cut(batch, (7, 3)))


class Counting(nn.Module):
    """Counts the forward passes that are part of a graph."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, inputs: Tensor) -> Tensor:
        COUNTS.append(len(inputs))
        return self.model(inputs)


COUNTS: list[int] = []


@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"micro_batch": 4}], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_products_on_one_graph_are_those_of_separate_operators(net: str, options: dict) -> None:
    problem = objective(net)
    hessian = Hessian(problem, **options)
    newton = GaussNewton(problem, graphs=hessian)
    assert relative(newton.dense(), GaussNewton(problem).dense()) < 1e-10
    assert relative(NoiseCovariance(problem, graphs=hessian).dense(), NoiseCovariance(problem).dense()) < 1e-10
    assert relative(EmpiricalFisher(problem, graphs=newton).dense(), EmpiricalFisher(problem).dense()) < 1e-10
    assert relative(hessian.dense(), Hessian(problem).dense()) < 1e-10


@pytest.mark.parametrize(
    "criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss(), nn.HuberLoss()], ids=lambda c: type(c).__name__
)
def test_any_loss_of_the_outputs_will_do(criterion: nn.Module) -> None:
    model, (inputs, _) = make("mlp-tanh")
    targets = torch.rand(10, 3, dtype=torch.float64)
    problem = Objective(model, criterion, (inputs, targets))
    shared = GaussNewton(problem, graphs=Hessian(problem))
    assert relative(shared.dense(), GaussNewton(problem).dense()) < 1e-10


def test_all_three_take_one_forward_pass_over_the_samples() -> None:
    model, batch = make("mlp-tanh")
    problem = Objective(Counting(model), nn.CrossEntropyLoss(), cut(batch, (7, 3)))
    GaussNewton(problem, graphs=Hessian(problem)) @ torch.ones(83, dtype=torch.float64)  # checks, once
    GaussNewton(problem)
    vector = torch.randn(83, 3, dtype=torch.float64)
    COUNTS.clear()
    hessian = Hessian(problem)
    newton, noise = GaussNewton(problem, graphs=hessian), NoiseCovariance(problem, graphs=hessian)
    for op in (hessian, newton, noise):
        op @ vector
    assert COUNTS == [10]
    assert hessian.cost.graphs == 1
    assert newton.cost.graphs == noise.cost.graphs == 0
    assert newton.cost.matvecs == 3
    COUNTS.clear()
    for kind in (Hessian, GaussNewton, NoiseCovariance):
        kind(problem) @ vector
    assert COUNTS == [10, 10, 10]


def test_a_rebuilt_graph_serves_all_vectors_before_it_is_dropped() -> None:
    model, batch = make("mlp-tanh")
    problem = Objective(Counting(model), nn.CrossEntropyLoss(), cut(batch, (7, 3)))
    hessian = Hessian(problem, memory=0, micro_batch=7)
    newton = GaussNewton(problem, graphs=hessian)
    vectors = torch.randn(83, 8, dtype=torch.float64)
    hessian @ vectors, newton @ vectors
    for op in (hessian, newton):
        COUNTS.clear()
        before = op.cost.graphs
        op @ vectors
        assert COUNTS == [7, 3]
        assert op.cost.graphs - before == 2


def test_a_gauss_newton_product_does_not_count_as_a_check_of_the_hessian(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, checked = objective("mlp-tanh"), []
    monkeypatch.setattr(GradientGraph, "_check_missing", lambda self, positions: checked.append(len(positions)))
    hessian = Hessian(problem, memory=0, micro_batch=7)
    vector = torch.ones(hessian.size, dtype=torch.float64)
    GaussNewton(problem, graphs=hessian) @ vector
    checked.clear()
    hessian @ vector
    assert len(checked) == 2  # one for each group of samples
    hessian @ vector
    assert len(checked) == 2


@pytest.mark.parametrize("net", ["mlp-tanh", "transformer-tied"])
def test_blocks_of_a_shared_graph(net: str) -> None:
    problem = objective(net)
    name = problem.parameters.names[-1]
    shared = GaussNewton(problem, graphs=Hessian(problem)).block(name)
    assert relative(shared.dense(), GaussNewton(problem).block(name).dense()) < 1e-10


def test_nothing_more_is_kept_for_it() -> None:
    problem = objective("transformer-tied")
    hessian = Hessian(problem)
    newton = GaussNewton(problem, graphs=hessian)
    newton @ torch.ones(newton.size, dtype=torch.float64)
    assert newton.plan is hessian.plan
    graph = hessian._engine.kept[0]
    assert graph.outputs.value is graph.shape
    assert graph.shape.is_meta
    gone = weakref.ref(graph)
    gc.disable()
    try:
        del graph, hessian, newton
        assert gone() is None
    finally:
        gc.enable()


def test_what_cannot_be_split_at_the_outputs_keeps_its_hessian() -> None:
    """The Hessian asks nothing of the outputs; only the Gauss-Newton matrix on its graphs does."""
    torch.manual_seed(0)
    model, batch = mlp().double(), torch.randn(6, 4, dtype=torch.float64)

    def penalty(net: nn.Module, x: Tensor) -> Tensor:
        return net(x).square().mean(1) + sum(p.square().sum() for p in net.parameters())

    def twice(net: nn.Module, x: Tensor) -> Tensor:
        return (net(x) - net(-x)).square().mean(1)

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp().double()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.net(x), x

    cases = [(model, penalty, "in other ways"), (model, twice, "called 2 times")]
    cases += [(Pair(), lambda net, x: net(x)[0].square().mean(1), "neither one floating-point tensor")]
    cases += [(model, lambda net, x: net(x).mean(1), "linear in them")]
    for net, loss, words in cases:
        problem = Objective.from_loss(net, loss, batch)
        hessian = Hessian(problem)
        hessian @ torch.ones(hessian.size, dtype=torch.float64)
        with pytest.raises(LossError, match=words):
            GaussNewton(problem, graphs=hessian) @ torch.ones(hessian.size, dtype=torch.float64)


class _Hidden(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 3 * x

    @staticmethod
    def backward(ctx, grad):
        return 3 * grad.detach()


def test_a_derivative_hidden_in_the_model_is_found_on_shared_graphs() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(4, 5), nn.Linear(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(_Hidden.apply(self.first(x).tanh()))

    torch.manual_seed(0)
    problem = Objective(Net().double(), nn.CrossEntropyLoss(), make("mlp-tanh")[1])
    with pytest.raises(SecondDerivativeError), pytest.warns(match="_Hidden"):
        GaussNewton(problem, graphs=Hessian(problem)) @ torch.ones(43, dtype=torch.float64)


def test_a_wrong_way_to_the_outputs_is_found_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = objective("mlp-tanh")
    hessian, forward = Hessian(problem), GradientGraph.forward
    monkeypatch.setattr(GradientGraph, "forward", lambda *args, **options: 2 * forward(*args, **options))
    with pytest.raises(SecondDerivativeError, match=r"J v and J\^T w"):
        GaussNewton(problem, graphs=hessian) @ torch.ones(hessian.size, dtype=torch.float64)


def test_settings_that_graphs_come_with_are_refused() -> None:
    problem = objective("mlp-tanh")
    hessian = Hessian(problem)
    for options in (
        {"outputs": lambda z: z},
        {"dtype": torch.float32},
        {"share": True},
        {"memory": 0},
        {"micro_batch": 2},
        {"batched": False},
        {"precision": "bfloat16"},
    ):
        with pytest.raises(ArgumentError, match="leave these out"):
            GaussNewton(problem, graphs=hessian, **options)
    with pytest.raises(ArgumentError, match="another objective"):
        GaussNewton(objective("mlp-tanh"), graphs=hessian)
    with pytest.raises(ArgumentError, match="no graph of per-sample"):
        GaussNewton(problem, graphs=GaussNewton(problem))
    with pytest.raises(ArgumentError, match="in full precision, or leave graphs= out"):
        GaussNewton(problem, graphs=Hessian(problem, dtype=torch.float32, precision="bfloat16"))


def test_language_models_with_logits_in_a_mapping() -> None:
    class Named(Transformer):
        def forward(self, tokens: Tensor) -> dict[str, Tensor]:
            return {"logits": super().forward(tokens), "hidden": self.embed(tokens)}

    torch.manual_seed(0)
    model, batch = Named().double(), make("transformer-tied")[1]

    def loss(net: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return nn.functional.cross_entropy(net(batch[0])["logits"], batch[1], reduction="none")

    problem = Objective.from_loss(model, loss, batches=cut(batch, (7, 3)))
    shared = GaussNewton(problem, graphs=Hessian(problem))
    assert relative(shared.dense(), GaussNewton(problem).dense()) < 1e-10


def test_rebuilt_graphs_of_c_are_checked_once_and_those_of_h_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    problem, finite, missing = objective("mlp-tanh"), [], []
    check = GradientGraph._check_finite
    monkeypatch.setattr(GradientGraph, "_check_finite", lambda *args: finite.append(1) or check(*args))
    monkeypatch.setattr(GradientGraph, "_check_missing", lambda self, positions: missing.append(len(positions)))
    hessian = Hessian(problem, memory=0, micro_batch=7)
    noise, vector = NoiseCovariance(problem, graphs=hessian), torch.ones(hessian.size, dtype=torch.float64)
    finite.clear()
    first = noise @ vector
    assert len(finite) == 2  # one for each group of samples
    assert torch.equal(noise @ vector, first)
    assert len(finite) == 2
    missing.clear()
    hessian @ vector
    assert len(missing) == 2
