"""The Fisher matrix against expectations over all labels, and its drawn form against all that can be drawn."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import pytest
import torch
from jacobians import dense_gauss_newton, jacobian
from nets import cut, make
from oracles import relative
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Fisher, GaussNewton, Objective
from curvdiag.errors import ArgumentError, LossError


def slopes(model: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients ``[n, V, P]`` of ``-log p(label)`` at each of ``n`` positions for each label, and ``p`` ``[n, V]``."""
    outputs, rows = jacobian(model, inputs)
    chances = outputs.softmax(1)
    mean = (chances.unsqueeze(-1) * rows).sum(1, keepdim=True)
    flat = lambda t: t.movedim(1, t.ndim - 2).flatten(0, -3)  # noqa: E731
    return flat(mean - rows), chances.movedim(1, -1).flatten(0, -2)


def outer(rows: Tensor, weights: Tensor) -> Tensor:
    return torch.einsum("n,np,nq->pq", weights, rows, rows)


def some_vectors(size: int) -> Tensor:
    return torch.randn(size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("options", [{}, {"memory": 0, "micro_batch": 7}, {"micro_batch": 3}], ids=str)
@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm", "transformer-tied"])
def test_it_is_the_expectation_over_all_labels(net: str, options: dict) -> None:
    model, (x, y) = make(net)
    ignored = y.clone()
    ignored.view(-1)[[2, 7]] = -100
    for targets in (y, ignored):
        rows, chances = slopes(model, x)
        kept = (targets != -100).flatten()
        weights = chances * kept[:, None] / kept.sum()
        truth = outer(rows.flatten(0, 1), weights.flatten())
        objective = Objective(model, nn.CrossEntropyLoss(), cut((x, targets), (7, 3)))
        vectors = some_vectors(len(truth))
        assert relative(Fisher(objective, **options) @ vectors, truth @ vectors) < 1e-10
        assert relative(GaussNewton(objective, **options) @ vectors, truth @ vectors) < 1e-10


def test_the_labels_of_the_data_are_not_used() -> None:
    model, (x, y) = make("mlp-tanh")
    one = Fisher(Objective(model, nn.CrossEntropyLoss(), (x, y))).dense()
    soft = torch.rand(10, 3, dtype=torch.float64)  # not even normalised
    assert relative(Fisher(Objective(model, nn.CrossEntropyLoss(), (x, y.flip(0)))).dense(), one) == 0
    assert relative(Fisher(Objective(model, nn.CrossEntropyLoss(), (x, soft))).dense(), one) < 1e-12


@pytest.mark.parametrize("net", ["mlp-tanh", "transformer-tied"])
def test_squared_errors_are_normal_with_variance_half_the_outputs(net: str) -> None:
    model, (x, _) = make(net)
    outputs, rows = jacobian(model, x)
    rows = rows.flatten(0, -2)
    truth = rows.T @ rows * (2 / outputs[0].numel()) / len(x)
    objective = Objective(model, nn.MSELoss(), (x, torch.randn_like(outputs)))
    assert relative(Fisher(objective).dense(), truth) < 1e-10
    assert relative(GaussNewton(objective).dense(), truth) < 1e-10


def test_binary_labels_are_one_for_each_output() -> None:
    model, (x, _) = make("mlp-tanh")
    outputs, rows = jacobian(model, x)
    targets = torch.rand_like(outputs).round()
    truth = torch.zeros(rows.shape[-1], rows.shape[-1], dtype=torch.float64)
    for label in (0.0, 1.0):
        chance = outputs.sigmoid() if label else 1 - outputs.sigmoid()
        gradients = (outputs.sigmoid() - label).unsqueeze(-1) * rows
        truth += outer(gradients.flatten(0, 1), chance.flatten() / outputs.numel())
    objective = Objective(model, nn.BCEWithLogitsLoss(), cut((x, targets), (7, 3)))
    assert relative(Fisher(objective).dense(), truth) < 1e-10
    assert relative(GaussNewton(objective).dense(), dense_gauss_newton(model, nn.BCEWithLogitsLoss(), (x, targets))) < (
        1e-10
    )


@pytest.mark.parametrize("criterion", [nn.MSELoss(), nn.BCEWithLogitsLoss()], ids=str)
def test_one_output_without_a_dimension_of_its_own(criterion: nn.Module) -> None:
    net, (x, y) = make("mlp-tanh")
    flat = nn.Sequential(net, nn.Linear(3, 1).double(), nn.Flatten(0))
    objective = Objective(flat, criterion, (x, (y > 0).double()))
    truth = dense_gauss_newton(flat, criterion, (x, (y > 0).double()))
    assert relative(Fisher(objective).dense(), truth) < 1e-10
    assert relative(GaussNewton(objective).dense(), truth) < 1e-10
    assert relative(monte_carlo(objective, draws=20_000), truth) < 0.1


@pytest.mark.parametrize("guard", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_off(guard: Any) -> None:
    whole = [Fisher(problem("text"), method=method) for method in ("exact", "monte-carlo")]
    vector = torch.ones(whole[0].size, dtype=torch.float64)
    for op in whole:
        with guard():
            product = Fisher(problem("text"), method=op.method) @ vector
        assert torch.equal(product, op @ vector)


def monte_carlo(objective: Objective, **options: Any) -> Tensor:
    return Fisher(objective, method="monte-carlo", **options).dense()


def test_drawn_labels_give_one_of_the_matrices_that_labels_can_give() -> None:
    """All 81 label sets of four samples, and for text all 49 of two tokens: exactly one of them is the matrix."""
    for net, samples, positions in (("mlp-tanh", 4, 1), ("transformer-tied", 1, 2)):
        model, (x, y) = make(net)
        x, y = (t[:samples, :positions] if net == "transformer-tied" else t[:samples] for t in (x, y))
        rows, chances = slopes(model, x)
        vector = torch.randn(rows.shape[-1], dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        parts = rows * (rows @ vector).unsqueeze(-1) / len(rows)
        possible = [
            sum(part[label] for part, label in zip(parts, labels, strict=True))
            for labels in itertools.product(range(chances.shape[1]), repeat=len(rows))
        ]
        objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
        seen = set()
        for seed in range(12):
            drawn = Fisher(objective, method="monte-carlo", seed=seed) @ vector
            matches = [i for i, product in enumerate(possible) if relative(product, drawn) < 1e-10]
            assert len(matches) == 1
            seen.add(matches[0])
        assert len(seen) > 3


CASES = {
    "categorical": ("mlp-tanh", nn.CrossEntropyLoss()),
    "text": ("transformer-tied", nn.CrossEntropyLoss(ignore_index=2)),
    "normal": ("mlp-tanh", nn.MSELoss()),
    "binary": ("mlp-tanh", nn.BCEWithLogitsLoss()),
}


def problem(case: str, sizes: tuple[int, ...] = (10,)) -> Objective:
    net, criterion = CASES[case]
    model, (x, y) = make(net)
    if case in ("normal", "binary"):
        y = F.one_hot(y, 3).double()
    return Objective(model, criterion, cut((x, y), sizes))


@pytest.mark.parametrize("case", CASES)
def test_drawn_labels_are_right_in_the_mean(case: str) -> None:
    objective = problem(case)
    exact = Fisher(objective).dense()
    vectors = torch.linalg.eigh(exact).eigenvectors[:, [-1, -2, -5]]
    truth = (vectors * (exact @ vectors)).sum(0)
    values = []
    for seed in range(150):
        op = Fisher(objective, method="monte-carlo", seed=seed)
        values.append((vectors * (op @ vectors)).sum(0))
    drawn = torch.stack(values)
    error = drawn.std(0) / len(drawn) ** 0.5
    assert (error < 0.15 * truth).all()
    assert ((drawn.mean(0) - truth).abs() < 4 * error).all()
    many = Fisher(objective, method="monte-carlo", draws=150, seed=1000)
    assert (((vectors * (many @ vectors)).sum(0) - truth).abs() < 4 * error).all()


@pytest.mark.parametrize("case", CASES)
def test_one_seed_is_one_matrix_however_samples_lie_in_batches(case: str) -> None:
    one = Fisher(problem(case), method="monte-carlo", draws=2, seed=3)
    vectors = some_vectors(one.size)
    products = one @ vectors

    def other(sizes: tuple[int, ...], **options: Any) -> Tensor:
        options = {"draws": 2, "seed": 3, **options}
        return Fisher(problem(case, sizes), method="monte-carlo", **options) @ vectors

    for sizes in ((7, 3), (4, 1, 5)):
        for options in ({}, {"memory": 0}, {"micro_batch": 2}, {"dtype": torch.float64}):
            assert relative(other(sizes, **options), products) < 1e-12
    assert relative(other((10,), seed=4), products) > 0.01
    assert torch.linalg.eigvalsh(problem_matrix := monte_carlo(problem(case)))[0] > -1e-12 * problem_matrix.norm()


def test_labels_follow_the_model_and_a_generator_gives_a_seed() -> None:
    """A model that is sure draws what it is sure of: its gradients vanish."""
    model, (x, y) = make("mlp-tanh")
    with torch.no_grad():
        model[-1].weight.zero_()
        model[-1].bias.copy_(torch.tensor([200.0, 0.0, 0.0]))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    assert float(monte_carlo(objective, draws=20).abs().max()) < 1e-80
    objective = problem("categorical")
    one, other = (monte_carlo(objective, seed=torch.Generator().manual_seed(s)) for s in (0, 1))
    assert relative(monte_carlo(objective, seed=torch.Generator().manual_seed(0)), one) == 0
    assert relative(other, one) > 0.01


def test_probabilities_as_targets_keep_their_convention_when_labels_are_drawn() -> None:
    """Each sample counts as one, whatever its number of positions; labels are drawn at each."""
    model, (x, _) = make("transformer-tied")
    soft = torch.rand(10, 7, 5, dtype=torch.float64)
    batches = [(x[:4, :3], soft[:4, :, :3]), (x[4:], soft[4:])]
    objective = Objective(model, nn.CrossEntropyLoss(), batches)
    exact = Fisher(objective).dense()
    truth = torch.zeros_like(exact)
    for inputs, _ in batches:
        rows, chances = slopes(model, inputs)
        truth += outer(rows.flatten(0, 1), chances.flatten() / inputs.shape[1] / 10)
    assert relative(exact, truth) < 1e-10
    assert relative(monte_carlo(objective, draws=3000), exact) < 0.05


def test_losses_that_are_no_likelihood_are_refused_with_the_reason() -> None:
    model, (x, y) = make("mlp-tanh")
    weight, hot = torch.ones(3, dtype=torch.float64), F.one_hot(y, 3).double()
    cases: list[tuple[Any, Tensor, str]] = [
        (nn.CrossEntropyLoss(weight=weight), y, "weights"),
        (functools.partial(F.cross_entropy, weight=weight), y, "weights"),
        (nn.BCEWithLogitsLoss(pos_weight=weight), hot, "weights"),
        (nn.CrossEntropyLoss(label_smoothing=0.1), y, "smoothing"),
        (lambda z, t: F.mse_loss(z.softmax(1), t), hot, "squared errors of probabilities"),
        (nn.HuberLoss(), hot, "HuberLoss"),
    ]
    for criterion, targets, match in cases:
        for method in ("exact", "monte-carlo"):
            with pytest.raises(LossError, match=match):
                Fisher(Objective(model, criterion, (x, targets)), method=method)
    with pytest.raises(LossError, match="GaussNewton"):
        Fisher(Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch=(x, y)))
    with pytest.raises(LossError, match="sum"):
        Fisher(Objective(model, nn.CrossEntropyLoss(reduction="sum"), (x, y)))
    with pytest.raises(LossError, match="one for each prediction"), pytest.warns(UserWarning, match="broadcast"):
        Fisher(Objective(model, nn.MSELoss(), (x, hot[:, :1])))
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    for options in ({"draws": 0}, {"draws": True}, {"method": "sampled"}, {"seed": "x", "method": "monte-carlo"}):
        with pytest.raises(ArgumentError):
            Fisher(objective, **options)


def test_blocks_and_what_it_says_of_itself() -> None:
    objective = problem("text", (7, 3))
    op = Fisher(objective, method="monte-carlo", draws=2)
    dense, block = op.dense(), op.block("attention.*")
    assert "2 drawn labels" in repr(op)
    layout = op.parameters
    index = torch.cat([torch.arange(op.size)[layout.slices[layout.names.index(n)]] for n in block.parameters.names])
    assert relative(block.dense(), dense[index][:, index]) < 1e-12
    assert op.unreached == []
