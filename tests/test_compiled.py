"""`compile=True` gives the products of autograd's own graphs, on every layout of the data and for every block."""

from __future__ import annotations

import pytest
import torch
from nets import cut, make, mlp
from oracles import criterion_loss, dense_hessian, relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvdiag import EmpiricalFisher, GaussNewton, Hessian, NoiseCovariance, Objective
from curvdiag.data import merge
from curvdiag.errors import ArgumentError, CurvdiagWarning, NonFiniteError, StaleWeightsError
from curvdiag.operators import linear_part, program, traced_graph

LAYOUTS: list[dict] = [{}, {"memory": 0, "micro_batch": 7}, {"micro_batch": 3}, {"memory": 20_000}]


@pytest.fixture(autouse=True)
def _operation_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler itself takes seconds; tests/test_compiled_code.py has it."""
    monkeypatch.setattr(program, "compiled", lambda part, example: part.run)


def problem(net: str = "conv-batchnorm", **options) -> Objective:
    model, batch = make(net)
    return Objective(model, cross_entropy, cut(batch, (7, 3)), **options)


def some(operator) -> Tensor:
    return torch.randn(operator.size, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def is_traced(operator) -> bool:
    """Whether all graphs of the operator are traced ones."""
    engine = operator._engine
    graphs = [*engine.kept, *(engine._graph(merge(group), True) for group in engine.rebuilt)]
    return bool(graphs) and all(type(graph) is traced_graph.TracedGraph for graph in graphs)


@pytest.mark.parametrize("net", ["mlp-relu", "conv-batchnorm", "transformer-tied", "lstm", "encoder-layer", "in-place"])
def test_products_equal_those_of_the_dense_hessian(net: str) -> None:
    model, batch = make(net)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    operator = Hessian(Objective(model, cross_entropy, batch), compile=True)
    assert is_traced(operator)
    assert relative(operator @ some(operator), truth @ some(operator)) < 1e-10


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_every_layout_of_the_data_gives_the_same_products(options: dict) -> None:
    model, batch = make("conv-batchnorm")
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    operator = Hessian(problem(), compile=True, **options)
    assert is_traced(operator)
    assert relative(operator @ some(operator), truth @ some(operator)) < 1e-10


def test_batchnorm_in_train_mode_couples_the_samples_of_each_batch() -> None:
    plain, compiled = (Hessian(problem(mode="train"), compile=flag) for flag in (False, True))
    assert is_traced(compiled)
    assert relative(compiled @ some(plain), plain @ some(plain)) < 1e-10


def test_double_precision_copies_of_single_precision_weights() -> None:
    model, batch = make("transformer-tied", dtype=torch.float32)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    operator = Hessian(Objective(model, cross_entropy, batch), compile=True, dtype=torch.float64)
    assert is_traced(operator)
    assert relative(operator @ some(operator), truth @ some(operator)) < 1e-10


@pytest.mark.parametrize("net", ["lstm", "conv-batchnorm", "transformer-tied"])
def test_products_in_single_precision(net: str) -> None:
    model, batch = make(net, dtype=torch.float32)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    operator = Hessian(Objective(model, cross_entropy, batch), compile=True)
    assert is_traced(operator)
    assert relative(operator @ some(operator), truth @ some(operator)) < 2e-5


@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=str)
def test_blocks_are_those_of_the_whole_and_run_less(options: dict) -> None:
    model, batch = make("transformer-tied")
    objective = Objective(model, cross_entropy, batch)
    plain, whole = Hessian(objective), Hessian(objective, compile=True, **options)
    whole @ some(whole)
    for selection in ("attention.*", "mlp.2.*", "embed.weight", ["position", "mlp.0.bias"]):
        block = whole.block(selection)
        vectors = some(block)
        assert relative(block @ vectors, plain.block(selection) @ vectors) < 1e-12
    (program,) = objective.__dict__["_programs"].values()
    size = {positions: len(part.run.graph.nodes) for (_, positions), part in program.parts.items()}
    assert len(size) == 5
    assert size[tuple(whole.block("mlp.2.*")._positions)] < 0.4 * size[program.whole]


@pytest.mark.parametrize("options", LAYOUTS, ids=str)
def test_matrices_of_gradients_of_samples(options: dict) -> None:
    objective = problem("mlp-tanh")
    own = NoiseCovariance(objective, compile=True, **options)
    hessian = Hessian(objective, compile=True, **options)
    lent = NoiseCovariance(objective, graphs=hessian)
    truth, vectors = NoiseCovariance(objective), some(own)
    assert is_traced(own)
    assert is_traced(hessian)
    assert relative(own @ vectors, truth @ vectors) < 1e-10
    assert relative(lent @ vectors, truth @ vectors) < 1e-10
    inside = some(lent.block("2.*"))
    assert relative(lent.block("2.*") @ inside, truth.block("2.*") @ inside) < 1e-10
    uncentred = EmpiricalFisher(objective, compile=True, **options)
    assert relative(uncentred @ vectors, EmpiricalFisher(objective) @ vectors) < 1e-10
    borrowed = GaussNewton(objective, graphs=hessian)
    assert relative(borrowed @ vectors, GaussNewton(objective) @ vectors) < 1e-10


def test_kept_bytes_are_those_that_the_graphs_hold() -> None:
    for net in ("mlp-tanh", "conv-batchnorm", "transformer-tied"):
        model, batch = make(net, samples=32)
        objective = Objective(model, cross_entropy, batch)
        operator = Hessian(objective, compile=True)
        (graph,) = operator._engine.kept
        held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in graph.values.values()}
        for tensor in graph.group.tensors:
            held.pop(tensor.untyped_storage().data_ptr(), None)
        assert operator.plan.bytes_kept == sum(held.values())


def test_a_budget_is_kept() -> None:
    model, batch = make("mlp-tanh", samples=60)
    objective = Objective(model, cross_entropy, cut(batch, (20, 20, 20)))
    whole = Hessian(objective, compile=True).plan.bytes_kept
    plan = Hessian(objective, compile=True, memory=whole // 2).plan
    assert 0 < plan.bytes_kept <= whole // 2
    assert 0 < sum(plan.kept) <= 30
    assert sum(plan.kept) + sum(plan.rebuilt) == 60


def test_parameters_that_the_loss_does_not_reach_have_zero_rows() -> None:
    model = mlp().double()
    model.register_parameter("idle", nn.Parameter(torch.ones(2, dtype=torch.float64)))
    torch.manual_seed(0)
    objective = Objective(model, cross_entropy, (torch.randn(9, 4).double(), torch.randint(3, (9,))))
    for memory in (None, 0):
        operator = Hessian(objective, compile=True, memory=memory)
        assert operator.unreached == ["idle"]
        assert relative(operator.dense(), Hessian(objective).dense()) < 1e-12


def test_some_parameters_and_another_loss_have_traces_of_their_own() -> None:
    objective = problem("mlp-tanh")
    whole = Hessian(objective, compile=True).dense()
    part = objective.restricted_to("2.*")
    assert relative(Hessian(part, compile=True).dense(), Hessian(objective).block("2.*").dense()) < 1e-12
    halves = objective.split()
    for half in halves:
        assert relative(Hessian(half, compile=True).dense(), Hessian(half).dense()) < 1e-12
    assert relative(sum(h.size * Hessian(h, compile=True).dense() for h in halves) / objective.size, whole) < 1e-12


def test_class_weights_means_and_weighted_samples() -> None:
    model, (inputs, targets) = make("mlp-tanh")
    weight = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
    batch = [(inputs[:6], targets[:6]), (inputs[6:], targets[6:])]

    def only_a_mean(outputs: Tensor, labels: Tensor) -> Tensor:
        return cross_entropy(outputs, labels) * 2

    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1], reduction="none")

    counted = Objective.from_loss(model, loss, batches=batch, weight=lambda b: 1.0 + b[1])
    for objective in (
        Objective(model, nn.CrossEntropyLoss(weight=weight), batches=batch),
        Objective(model, nn.CrossEntropyLoss(ignore_index=1, label_smoothing=0.1), batches=batch),
        Objective(model, only_a_mean, batches=batch),
        counted,
    ):
        operator = Hessian(objective, compile=True)
        assert is_traced(operator)
        assert relative(operator.dense(), Hessian(objective).dense()) < 1e-12


def test_an_operator_is_a_picture_and_leaves_nothing_behind() -> None:
    objective = problem()
    model = objective.model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attributes, state = set(vars(model.norm1)), torch.get_rng_state()
    operator = Hessian(objective, compile=True)
    truth = operator @ some(operator)
    assert torch.equal(state, torch.get_rng_state())
    assert model.training
    assert model.norm1.training
    assert set(vars(model.norm1)) == attributes
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad():
        model.head.weight.mul_(2)
    assert torch.equal(operator @ some(operator), truth)
    shared = Hessian(objective, compile=True, share=True)
    shared @ some(shared)
    with torch.no_grad():
        model.head.weight.mul_(2)
    with pytest.raises(StaleWeightsError):
        shared @ some(shared)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_modes_of_the_training_change_nothing(around) -> None:
    model, batch = make("conv-batchnorm", dtype=torch.float32)
    objective = Objective(model, cross_entropy, batch)
    truth = Hessian(objective)
    truth = truth @ some(truth)
    with around():
        operator = Hessian(objective, compile=True)
        assert is_traced(operator)
        product = operator @ some(operator)
    assert product.dtype == torch.float32
    assert relative(product, truth) < 1e-6


@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=str)
def test_a_loss_that_is_not_finite_names_the_batch(options: dict) -> None:
    model, (inputs, targets) = make("mlp-tanh")
    batches = [(inputs[:5], targets[:5]), (inputs[5:], targets[5:])]
    objective = Objective(model, cross_entropy, batches=batches)
    Hessian(objective, compile=True, micro_batch=5, **options).dense()
    objective.batches[1] = (inputs[5:] * torch.inf, targets[5:])
    with pytest.raises(NonFiniteError, match="batch 1"):
        Hessian(objective, compile=True, micro_batch=5, **options).dense()


def test_finite_differences_are_not_compiled() -> None:
    with pytest.raises(ArgumentError, match="finite-difference"):
        Hessian(problem(), method="finite-difference", compile=True)
    objective = problem()
    with pytest.raises(ArgumentError, match="leave these out"):
        NoiseCovariance(objective, graphs=Hessian(objective), compile=True)


def test_what_follows_from_a_zero_vector_is_left_out() -> None:
    graph = torch.fx.Graph()
    u, v, a = (graph.placeholder(name) for name in "uva")
    like = torch.zeros(3, dtype=torch.float64)
    square = graph.call_function(torch.ops.aten.outer.default, (v, a))
    turned = graph.call_function(torch.ops.aten.t.default, (square,))
    lasting = graph.call_function(torch.ops.aten.outer.default, (a, u))
    lying = graph.call_function(torch.ops.aten.t.default, (lasting,))
    upright = graph.call_function(
        torch.ops.aten.t.default, (graph.call_function(torch.ops.aten.sub.Tensor, (turned, lying)),)
    )
    both = graph.call_function(torch.ops.aten.view.default, (upright, [9]))  # of the layout that there would have been
    product = graph.call_function(torch.ops.aten.mul.Tensor, (u, a))
    other = graph.call_function(torch.ops.aten.mul.Tensor, (v, a))
    ones = graph.call_function(torch.ops.aten.ones_like.default, (other,))
    total = graph.call_function(torch.ops.aten.add.Tensor, (product, other))
    end = graph.call_function(torch.ops.aten.mul.Tensor, (total, ones))
    stack = graph.call_function(torch.ops.aten.cat.default, ([product, other],))
    graph.output((end, stack, other, both))
    for node in (u, v, a, product, other, ones, total, end, stack):
        node.meta["val"] = torch.cat([like, like]) if node is stack else like
    turned.meta["val"] = torch.zeros(3, 3, dtype=torch.float64).t()
    part = linear_part.linear_part([u, v], [0], [end, stack, other, both])
    x, y = torch.tensor([1.0, 2.0, 3.0]).double(), torch.tensor([4.0, 5.0, 6.0]).double()
    first, second, third = part.run(x, y)
    assert part.outputs == [0, 1, 3]
    assert torch.equal(third, -torch.outer(y, x).flatten())
    assert torch.equal(first, x * y)
    assert torch.equal(second, torch.cat([x * y, like]))


@pytest.mark.parametrize("options", LAYOUTS[:2], ids=str)
def test_graphs_that_are_lent_serve_from_one_forward_pass_and_count_what_they_keep(
    monkeypatch: pytest.MonkeyPatch, options: dict
) -> None:
    objective, passes = problem("mlp-tanh"), []
    values = program.Program.values
    hessian = Hessian(objective, compile=True, **options)
    vectors = some(hessian)
    before, kept = hessian @ vectors, lambda: sum(graph.bytes for graph in hessian._engine.kept)
    beside = hessian.plan.bytes_kept - kept()  # merged samples
    noise = NoiseCovariance(objective, graphs=hessian)
    assert is_traced(noise)
    noise @ vectors
    monkeypatch.setattr(program.Program, "values", lambda *a, **o: passes.append(1) or values(*a, **o))
    noise @ vectors
    assert len(passes) == len(hessian.plan.rebuilt) * 2  # once for v . g_i, and once to gather
    assert torch.equal(hessian @ vectors, before)
    assert hessian.plan.bytes_kept == noise.plan.bytes_kept == kept() + beside


def test_products_that_are_lent_are_compared_before_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    objective = problem("mlp-tanh")
    hessian = Hessian(objective, compile=True)
    run = program.Program.run

    def wrong(self, kind, *rest):
        return [1.001 * product if kind == program.ALONG else product for product in run(self, kind, *rest)]

    monkeypatch.setattr(program.Program, "run", wrong)
    with pytest.warns(CurvdiagWarning, match="no effect.*a product differs"):
        noise = NoiseCovariance(objective, graphs=hessian)
    vectors = some(noise)
    assert relative(noise @ vectors, NoiseCovariance(objective) @ vectors) < 1e-10
    assert relative(hessian @ vectors, Hessian(objective) @ vectors) < 1e-10
