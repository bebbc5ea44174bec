"""Diagonal blocks multiplied together: exact, one visit of each graph, and each only in its own part of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from nets import cut, make
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from curvdiag import EmpiricalFisher, Fisher, GaussNewton, Hessian, NoiseCovariance, Objective
from curvdiag.errors import ArgumentError, ParameterError, StaleWeightsError
from curvdiag.operators import gradient_graph
from curvdiag.operators.objective_operator import ObjectiveOperator

OPERATORS: dict[str, Callable[..., ObjectiveOperator]] = {
    "hessian": Hessian,
    "gauss-newton": GaussNewton,
    "covariance": NoiseCovariance,
    "empirical-fisher": EmpiricalFisher,
    "fisher": Fisher,
    "covariance on the graphs of H": lambda objective, **options: NoiseCovariance(
        objective, graphs=Hessian(objective, **options)
    ),
    "gauss-newton on the graphs of H": lambda objective, **options: GaussNewton(
        objective, graphs=Hessian(objective, **options)
    ),
}
LAYOUTS = {"kept": (1, 0), "rebuilt": (0, 2), "some of both": (2, 2)}


def problem(net: str = "transformer-tied") -> Objective:
    model, batch = make(net)
    return Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))


def rows_for(sizes: dict[str, int], count: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    return {name: torch.randn(count, n, generator=generator, dtype=torch.float64) for name, n in sizes.items()}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", OPERATORS)
def test_every_block_is_that_of_the_dense_matrix(kind: str, layout: str) -> None:
    options: dict[str, int] = {"memory": 0, "micro_batch": 7} if layout == "rebuilt" else {}
    if layout == "some of both":
        all_kept = OPERATORS[kind](problem(), micro_batch=3).plan
        assert all_kept is not None
        options = {"micro_batch": 3, "memory": int(0.9 * all_kept.bytes_kept)}
    op = OPERATORS[kind](problem(), **options)
    assert op.plan is not None
    assert (len(op.plan.kept), len(op.plan.rebuilt)) == LAYOUTS[layout]
    dense, layers = OPERATORS[kind](problem()).dense(), op.parameters.layers()  # from one kept graph
    slices = dict(zip(op.parameters.names, op.parameters.slices, strict=True))
    blocks = op.blocks()
    assert list(blocks.sizes) == list(layers)
    rows = rows_for(blocks.sizes)
    for name, products in blocks.apply(rows).items():
        inside = torch.cat([torch.arange(op.size)[slices[one]] for one in layers[name]])
        truth = rows[name] @ dense[inside][:, inside]
        assert float((products - truth).abs().max()) <= 1e-12 * float(dense.abs().max()), name


@pytest.mark.parametrize("net", ["mlp-relu", "conv-batchnorm", "transformer-tied"])
def test_blocks_of_the_hessian_agree_with_double_differentiation(net: str) -> None:
    model, batch = make(net)
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3))), memory=0)
    for name, names in op.parameters.layers().items():
        truth = dense_hessian(model, criterion_loss(nn.CrossEntropyLoss(), batch), names)
        (found,) = op.blocks({name: names}).apply({name: torch.eye(len(truth), dtype=torch.float64)}).values()
        assert relative(found, truth) < 1e-10, name


def test_blocks_may_overlap_leave_some_out_and_belong_to_a_block() -> None:
    op = Hessian(problem()).block(["attention.*", "mlp.*"])
    blocks = op.blocks({"all": "*", "weights": ["*.weight"], "mlp": "mlp.*"})
    rows = rows_for(blocks.sizes)
    found = blocks.apply({name: rows[name] for name in ("mlp", "all")})
    assert list(found) == ["mlp", "all"]
    assert relative(found["all"], rows["all"] @ op.dense()) < 1e-12
    assert relative(found["mlp"], rows["mlp"] @ op.block("mlp.*").dense()) < 1e-12
    assert blocks.apply({}) == {}


def test_finite_differences_take_one_block_after_the_other() -> None:
    objective = problem("mlp-tanh")
    op, exact = Hessian(objective, method="finite-difference"), Hessian(objective)
    rows = rows_for(op.blocks().sizes)
    found, truth = op.blocks().apply(rows), exact.blocks().apply(rows)
    for name in rows:
        assert relative(found[name], truth[name]) < 1e-5


@pytest.mark.parametrize(("kind", "visits"), [(Hessian, 1), (GaussNewton, 1), (NoiseCovariance, 2)])
def test_a_graph_is_built_once_for_all_layers_and_vectors(kind: Callable[..., ObjectiveOperator], visits: int) -> None:
    """C needs all samples' dots before any is centred, so its graphs are visited twice."""
    objective = problem()
    op = kind(objective, memory=0, micro_batch=7)
    assert op.plan is not None
    groups = len(op.plan.rebuilt)
    assert groups == 2
    blocks, calls = op.blocks(), []
    handle = objective.model.register_forward_hook(lambda *_: calls.append(1))
    rows = rows_for(blocks.sizes, 3)
    blocks.apply(rows)  # the first one also checks the graphs
    calls.clear()
    before = blocks.cost.graphs
    blocks.apply(rows)
    handle.remove()
    assert blocks.cost.graphs - before == visits * groups
    assert len(calls) == visits * groups
    assert blocks.cost.matvecs == 2 * 3 * len(rows)
    assert [block.cost.matvecs for block in blocks.operators.values()] == [6] * len(rows)
    assert op.cost.matvecs == 0


def test_kept_graphs_are_built_no_more() -> None:
    blocks = Hessian(problem()).blocks()
    blocks.apply(rows_for(blocks.sizes))
    assert blocks.cost.graphs == 0


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_a_block_walks_only_the_part_of_the_graph_above_it(layer: int) -> None:
    """Two matrix products for each layer from the block's own to the loss, none below: that of a chain by hand."""
    sizes, samples = (5, 7, 4, 6, 3), 10
    model = nn.Sequential(*(nn.Linear(a, b, bias=False) for a, b in itertools.pairwise(sizes)))
    chain = nn.Sequential(*(part for one in model for part in (one, nn.Tanh())))
    data = torch.randn(samples, sizes[0]), torch.randint(3, (samples,))
    blocks = Hessian(Objective(chain.double(), nn.CrossEntropyLoss(), (data[0].double(), data[1]))).blocks()
    name = list(blocks.sizes)[layer]
    rows = rows_for({name: blocks.sizes[name]}, 1)
    blocks.apply(rows)
    with FlopCounterMode(display=False) as counter:
        blocks.apply(rows)
    above = list(itertools.pairwise(sizes))[layer:]
    assert counter.get_total_flops() == sum(2 * 2 * samples * a * b for a, b in above)


def test_a_rebuilt_graph_is_checked_once_for_each_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    checked: list[int] = []
    original = gradient_graph.check_nodes
    monkeypatch.setattr(gradient_graph, "check_nodes", lambda *a, **k: checked.append(1) or original(*a, **k))
    blocks = Hessian(problem("mlp-tanh"), memory=0, micro_batch=7).blocks()
    rows = rows_for(blocks.sizes)
    checked.clear()
    for names, expected in ((["0"], 2), (["0"], 0), (["0", "2"], 2), (["2"], 0), (["0", "2", "4"], 2), (["4"], 0)):
        blocks.apply({name: rows[name] for name in names})
        assert len(checked) == expected, names
        checked.clear()


def test_what_is_wrong_is_named() -> None:
    op = Hessian(problem("mlp-tanh"))
    blocks = op.blocks()
    with pytest.raises(ArgumentError, match="no block 'head'; there are 0, 2, 4"):
        blocks.apply({"head": torch.zeros(1, 3)})
    with pytest.raises(ArgumentError, match=r"\[k, 30\], not of shape \(1, 31\)"):
        blocks.apply({"0": torch.zeros(1, 31, dtype=torch.float64)})
    with pytest.raises(ArgumentError, match="no layer"):
        op.blocks({})
    with pytest.raises(ParameterError, match="no parameter matches 'head"):
        op.blocks({"head": "head.*"})


def test_shared_weights_that_changed_are_noticed() -> None:
    objective = problem("mlp-tanh")
    blocks = Hessian(objective, share=True).blocks()
    blocks.refresh()
    with torch.no_grad():
        objective.model[0].weight.mul_(2)
    with pytest.raises(StaleWeightsError):
        blocks.refresh()
