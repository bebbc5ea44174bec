"""Moments of per-sample gradients against one backward pass for each sample: losses, weights, precision, traces."""

from __future__ import annotations

import copy
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, cut, make, vectors
from oracles import relative
from sample_gradients import TOLERANCE, check, classification, one_by_one, ways
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.errors import LossError, NonFiniteError
from curvdiag.noise.moments import gradient_moments
from curvdiag.samples import per_sample_gradients, streaming
from curvdiag.samples.recorder import Recorder


@pytest.mark.parametrize("sizes", [(10,), (7, 3), (1, 4, 5)], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_every_net_by_rules_alone(net: str, sizes: tuple[int, ...]) -> None:
    model, batch = make(net)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, sizes))
    found = gradient_moments(objective)
    check(found, classification(model, batch), objective)
    assert ways(found) == {}


def test_class_weights_and_ignored_labels_weigh_the_samples() -> None:
    model, (x, y) = make("mlp-tanh")
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    y[2] = -100
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), batches=cut((x, y), (6, 4)))
    kept = y != -100
    rows = torch.zeros(len(y), objective.parameters.size, dtype=torch.float64)
    rows[kept] = classification(model, (x[kept], y[kept])) * weight[y[kept]][:, None]
    check(gradient_moments(objective), rows * len(y) / float(weight[y[kept]].sum()), objective)


def test_sequences_with_padding_are_weighed_by_their_tokens() -> None:
    model, (x, y) = make("transformer-tied")
    y[0, 3:] = y[4, 1:] = -100
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    rows = one_by_one(model, lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1], reduction="sum"), len(y))
    check(gradient_moments(objective), rows * len(y) / float((y != -100).sum()), objective)


def test_a_function_of_model_and_batch() -> None:
    """With inputs in a dictionary, and a parameter that the loss itself uses."""
    model, (x, y) = make("mlp-tanh")
    model.temperature = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def loss(m: Any, batch: dict) -> Tensor:
        return F.cross_entropy(m(batch["x"]) * m.temperature, batch["y"], reduction="none")

    batches = [{"x": a, "y": b} for a, b in cut((x, y), (6, 4))]
    objective = Objective.from_loss(model, loss, batches=batches)
    rows = one_by_one(model, lambda m, i: loss(m, {"x": x[i : i + 1], "y": y[i : i + 1]}).mean(), len(y))
    found = gradient_moments(objective)
    check(found, rows, objective)
    assert ways(found) == {}


def test_samples_along_the_second_dimension_of_the_data() -> None:
    """Such a batch cannot be cut."""
    model, (x, y) = make("mlp-tanh")
    times = torch.stack([x, x.tanh(), -x])

    def loss(m: Any, batch: tuple) -> Tensor:
        return F.cross_entropy(m(batch[1]).mean(0), batch[0], reduction="none")

    objective = Objective.from_loss(model, loss, batch=(y, times))
    rows = one_by_one(model, lambda m, i: loss(m, (y[i : i + 1], times[:, i : i + 1])).mean(), len(y))
    found = gradient_moments(objective)
    check(found, rows, objective)
    assert ways(found) == {}


def test_a_block_of_parameters_by_glob() -> None:
    model, batch = make("conv-batchnorm")
    objective = Objective(model, nn.CrossEntropyLoss(), batch, params=["conv2.*", "norm1.*"])
    names, rows = [n for n, _ in model.named_parameters()], classification(model, batch)
    parts = dict(zip(names, rows.split([p.numel() for p in model.parameters()], dim=1), strict=True))
    own = torch.cat([parts[name] for name in objective.parameters.names], dim=1)
    check(gradient_moments(objective), own, objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_right_to_its_rounding(dtype: torch.dtype) -> None:
    for net in ("mlp-tanh", "transformer-tied", "conv-batchnorm"):
        model, (x, y) = make(net, dtype=dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        wide = copy.deepcopy(model).double()
        rows = classification(wide, (x.double() if x.is_floating_point() else x, y))
        found = gradient_moments(Objective(model, nn.CrossEntropyLoss(), (x, y)))
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        assert found.mean.dtype == torch.float32
        assert relative(found.mean, rows.mean(0)) < tolerance
        assert relative(found.diagonal, (rows - rows.mean(0)).square().mean(0)) < tolerance
        assert relative(found.norms, rows.norm(dim=1)) < tolerance
        precise = gradient_moments(Objective(model, nn.CrossEntropyLoss(), (x, y)), dtype=torch.float64)
        assert relative(precise.mean, rows.mean(0)) < TOLERANCE


def test_the_live_model_is_left_alone() -> None:
    model, batch = make("in-place")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        gradient_moments(objective)
    assert all(m.training for m in model.modules())
    assert all(bool((p.grad == 1).all()) and p.requires_grad and p.is_leaf for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_objectives_without_single_samples_are_refused() -> None:
    model, batch = make("conv-batchnorm")
    with pytest.raises(LossError, match="BatchNorm"):
        gradient_moments(Objective(model, nn.CrossEntropyLoss(), batch, mode="train"))
    mean = Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    with pytest.raises(LossError, match="one loss for each sample"):
        gradient_moments(mean)
    with pytest.raises(LossError, match="one loss for each sample"):
        per_sample_gradients(mean)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 0"):
        gradient_moments(objective)


def test_a_gradient_that_is_not_finite_is_named() -> None:
    """The square root of zero has a value and no slope."""
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.zero_()
        model.bias.zero_()
    x = vectors()[0].double()
    objective = Objective.from_loss(model, lambda m, b: m(b).square().sum(1).sqrt(), batch=x)
    with pytest.raises(NonFiniteError, match="weight"):
        gradient_moments(objective)


def test_norms_of_many_numbers_in_single_precision() -> None:
    """Six million in one layer, where a plain dot product is off by 1e-5."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, x = nn.Linear(2000, 3000), torch.randn(3, 4, 2000) + 0.5
    objective = Objective.from_loss(model, lambda m, b: m(b).square().sum((1, 2)), batch=x)
    found, precise = gradient_moments(objective), gradient_moments(objective, dtype=torch.float64)
    assert relative(found.norms, precise.norms) < 1e-6
    for name, block in found.blocks.items():
        assert block.mean_norm == pytest.approx(precise.blocks[name].mean_norm, rel=1e-6)


@pytest.mark.parametrize("fails", [False, True])
def test_what_was_recorded_goes_when_it_was_used(fails: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hooks in the graph that hold the recorder, which holds the graph, would never go."""
    made: list[weakref.ref] = []
    start = Recorder.__init__

    def watched(self: Recorder, *args: Any) -> None:
        start(self, *args)
        made.append(weakref.ref(self))

    monkeypatch.setattr(Recorder, "__init__", watched)
    model, (x, y) = make("transformer-tied")
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    if fails:
        with torch.no_grad():
            model.mlp[2].bias[0] = torch.nan
    for use in (gradient_moments, lambda o: list(per_sample_gradients(o))):
        if fails:
            with pytest.raises(NonFiniteError):
                use(objective)
        else:
            use(objective)
    gc.collect()
    assert made
    assert all(recorder() is None for recorder in made)


@pytest.mark.parametrize("net", ["MLP", "ResNet", "GPT"])
def test_on_the_benchmark_nets_no_parameter_falls_back(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    own = sys.modules.pop("nets")
    try:
        import nets as benchmark

        model, batches = benchmark.NETS[net]()
    finally:
        sys.modules["nets"] = own
    model.eval()
    small = [(x[:2], y[:2]) for x, y in batches[:2]]
    objective = Objective(model, nn.CrossEntropyLoss(), batches=small)
    found = gradient_moments(objective)
    assert set(found.ways.values()) == {"rule"}
    assert relative(found.mean, objective.gradient()) < 1e-4


def test_no_tensor_waits_for_the_collector_of_circles() -> None:
    model, batch = make("conv-batchnorm")
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, (6, 4)))
    gradient_moments(objective)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())
        gradient_moments(objective)
        list(per_sample_gradients(objective))
        assert sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()) == before
    finally:
        gc.enable()


class MeanOverTime(nn.Module):
    """Linear layers on the mean over positions: batches of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.mean(1))


def test_batches_that_cannot_be_merged_are_added_up() -> None:
    torch.manual_seed(0)
    model = MeanOverTime().double()
    batches = [
        (torch.randn(size, length, 3, dtype=torch.float64), torch.randint(3, (size,)))
        for size, length in ((4, 6), (3, 6), (5, 9), (2, 6))
    ]
    objective = Objective(model, nn.CrossEntropyLoss(), batches=batches)
    found = gradient_moments(objective)
    check(found, torch.cat([classification(model, batch) for batch in batches]), objective)
    assert ways(found) == {}


def test_little_free_memory_makes_many_groups_and_the_same_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, (4, 3, 3)))
    weights = objective.weights()
    assert [size for size, _, _ in streaming.all_totals(objective, weights, None)] == [10]
    monkeypatch.setattr(streaming, "SMALL", 0)
    monkeypatch.setattr(streaming, "free_bytes", lambda device: 1)
    assert [size for size, _, _ in streaming.all_totals(objective, weights, None)] == [4, 3, 3]
    check(gradient_moments(objective), classification(model, batch), objective)
