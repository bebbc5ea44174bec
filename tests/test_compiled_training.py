"""One trace serves all operators of a training, and never one that it does not fit; what cannot be traced says so."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import Checkpointed, mlp
from oracles import relative
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvdiag import CurvatureMonitor, Hessian, NoiseCovariance, Objective
from curvdiag.errors import CurvdiagWarning, LossError, SecondDerivativeError
from curvdiag.operators import program
from curvdiag.operators.tracing import trace


@pytest.fixture(autouse=True)
def _operation_by_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "compiled", lambda part, example: part.run)


@pytest.fixture
def traces(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Every group that is traced."""
    seen: list[Any] = []
    monkeypatch.setattr(program, "trace", lambda group: seen.append(group) or trace(group))
    return seen


def data(samples: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(samples, 4, generator=generator, dtype=torch.float64)
    return inputs, torch.randint(3, (samples,), generator=generator)


def step(model: nn.Module, batch: tuple[Tensor, Tensor]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    for _ in range(3):
        optimizer.zero_grad()
        cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()


def error(objective: Objective, kind: Callable[..., Any] = Hessian, **options: Any) -> float:
    truth = kind(objective, **options)
    vectors = torch.randn(truth.size, 2, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return relative(kind(objective, compile=True, **options) @ vectors, truth @ vectors)


class Strange(nn.Module):
    """An MLP around something that depends on more than weights and inputs."""

    def __init__(self, middle: Callable[[Strange, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.middle = nn.Linear(4, 5), nn.Linear(5, 3), middle
        self.register_buffer("scale", torch.ones(5))
        self.table, self.temperature = torch.linspace(0.5, 2, 5, dtype=torch.float64), 1.0
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.middle(self, torch.tanh(self.first(x))))


def strange(middle: Callable[[Strange, Tensor], Tensor]) -> Strange:
    torch.manual_seed(0)
    return Strange(middle)


def test_one_trace_serves_a_whole_training(traces: list[Any]) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    objective = Objective(model, cross_entropy, data())
    for round_ in range(3):
        for options in ({}, {"memory": 0}):
            assert error(objective, **options) < 1e-10
            assert error(objective, NoiseCovariance, **options) < 1e-10
        step(model.train(), data(seed=round_ + 1))
        model.eval()
    assert len(traces) == 1


def test_batches_of_one_shape_share_a_trace_and_others_have_their_own(traces: list[Any]) -> None:
    torch.manual_seed(0)
    objective = Objective(mlp().double(), cross_entropy, batches=[data(5, 0), data(5, 1), data(2, 2)])
    assert error(objective, micro_batch=5) < 1e-10
    assert len(traces) == 2
    assert error(objective, memory=0, micro_batch=5) < 1e-10
    assert len(traces) == 2
    objective.batches[0] = data(5, 7)
    assert error(objective, memory=0, micro_batch=5) < 1e-10
    assert len(traces) == 2


def test_nothing_that_the_model_reads_is_baked_into_a_trace(traces: list[Any]) -> None:
    model = strange(lambda self, x: x * self.scale * self.table)
    weight = torch.tensor([1.0, 2.0, 0.5], dtype=torch.float64)
    model.last.bias.requires_grad_(False)
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), data())
    assert error(objective) < 1e-10
    for tensor in (model.scale, model.table, model.last.bias, weight):
        with torch.no_grad():
            before = Hessian(objective).dense()
            tensor.copy_(torch.linspace(2, 1, len(tensor)))
        objective = objective if tensor is not weight else Objective(model, nn.CrossEntropyLoss(weight=weight), data())
        assert relative(Hessian(objective).dense(), before) > 1e-3
        assert error(objective) < 1e-10
    assert len(traces) == 2


@pytest.mark.parametrize("change", ["table", "temperature", "middle"])
def test_a_model_that_has_changed_is_traced_anew(traces: list[Any], change: str) -> None:
    model = strange(lambda self, x: x * self.table * self.temperature)
    objective = Objective(model, cross_entropy, data())
    assert error(objective) < 1e-10
    other = {"table": model.table.flip(0), "temperature": 3.0, "middle": lambda self, x: x.detach() * 2}
    setattr(model, change, other[change])
    if change == "middle":
        objective = objective.restricted_to("last.*")
    assert error(objective) < 1e-10
    assert error(objective) < 1e-10
    assert len(traces) == 2


def test_a_stop_of_the_gradient_that_changes_no_value_is_noticed(traces: list[Any]) -> None:
    model = strange(lambda self, x: x + 0 * self.temperature)
    objective = Objective(model, cross_entropy, data(), params="last.*")
    assert error(objective) < 1e-10
    free = Objective(model, cross_entropy, data())
    assert error(free) < 1e-10
    model.middle = lambda self, x: x * x.detach() / x
    assert error(objective) < 1e-10
    assert error(free) < 1e-10


class _Cubed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class _Rough(torch.autograd.Function):
    """Numbers of another library: nothing can follow them without values."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.from_numpy(x.detach().numpy() ** 2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * ctx.saved_tensors[0] * grad


def branch(self: Strange, x: Tensor) -> Tensor:
    return x if x.sum() > 0 else 2 * x


def seeded(self: Strange, x: Tensor) -> Tensor:
    torch.manual_seed(1)
    return x * torch.rand(5).double()


UNTRACEABLE: dict[str, tuple[Callable[[Strange, Tensor], Tensor], str]] = {
    "a branch": (branch, "depends on values"),
    "a number taken out": (lambda self, x: x * float(x.max()), "depends on values"),
    "a list taken out": (lambda self, x: x * max(x.detach().flatten().tolist()), "depends on values"),
    "a mask of rows": (
        lambda self, x: x.index_add(0, torch.arange(3), x[x.sum(1) > -9][:3]),
        "the shape of aten.index.Tensor depends on values",
    ),
    "an array": (lambda self, x: _Rough.apply(x), "numpy"),
    "seeded noise": (seeded, "draws random numbers"),
    "a generator": (
        lambda self, x: x * torch.rand(5, generator=torch.Generator().manual_seed(1)).double(),
        "it holds a Generator",
    ),
}


@pytest.mark.parametrize("name", UNTRACEABLE)
@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=str)
def test_what_cannot_be_traced_is_left_to_autograd_with_a_reason(name: str, options: dict) -> None:
    middle, reason = UNTRACEABLE[name]
    objective = Objective(strange(middle), cross_entropy, data())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the custom function")
        truth = Hessian(objective, **options)
        vector = torch.ones(truth.size, dtype=torch.float64)
        with pytest.warns(CurvdiagWarning, match=f"no effect.*autograd's own graphs: .*{reason}"):
            assert relative(Hessian(objective, compile=True, **options) @ vector, truth @ vector) < 1e-10
    assert error(objective, **options) < 1e-10  # and says so once


def test_a_custom_function_and_a_recomputed_part_are_traced(traces: list[Any]) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="the custom function")
        assert error(Objective(strange(lambda self, x: _Cubed.apply(x)), cross_entropy, data())) < 1e-10
    assert len(traces) == 1


@pytest.mark.parametrize("closure", [False, True])
def test_checkpointing_without_reentrance_is_right(closure: bool) -> None:
    torch.manual_seed(0)
    objective = Objective(Checkpointed(False, closure).double(), cross_entropy, data())
    assert error(objective) < 1e-10
    assert error(objective, memory=0) < 1e-10


def test_errors_are_those_of_autograds_graphs() -> None:
    torch.manual_seed(0)
    with pytest.raises(SecondDerivativeError, match="reentrant"):
        Hessian(Objective(Checkpointed(True).double(), cross_entropy, data()), compile=True)
    model = mlp().double()
    kept = list(model.parameters())
    behind = Objective.from_loss(
        model, lambda m, b: cross_entropy(m(b[0]), b[1]) + sum(p.square().sum() for p in kept), data()
    )
    with pytest.raises(LossError, match="uses the parameter"):
        Hessian(behind, compile=True)


def test_a_wrong_product_is_never_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled code that is wrong is left out; a trace that is wrong as well."""

    def wrong(part: Any, example: Any) -> Any:
        return lambda *inputs: [1.001 * p for p in part.run(*inputs)]

    torch.manual_seed(0)
    model = mlp().double()
    monkeypatch.setattr(program, "compiled", wrong)
    with pytest.warns(CurvdiagWarning, match="without compiled code: a product differs"):
        assert error(Objective(model, cross_entropy, data())) < 1e-10

    def spoiled(group: Any) -> Any:
        found = trace(group)
        found.products[0], found.products[2] = found.products[2], found.products[0]
        return found

    monkeypatch.setattr(program, "trace", spoiled)
    model = mlp(sizes=(4, 4, 4, 4)).double()
    with pytest.warns(CurvdiagWarning, match="no effect.*differs"):
        assert error(Objective(model, cross_entropy, data())) < 1e-10


def test_a_hook_gets_no_tensors_without_values(traces: list[Any]) -> None:
    """It may keep what it sees; hooks of PyTorch itself do not."""
    torch.manual_seed(0)
    model = nn.Sequential(torch.nn.utils.spectral_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3)).double()
    objective, seen = Objective(model, cross_entropy, data()), []
    assert error(objective) < 1e-10
    assert len(traces) == 1
    places = [model[1].register_forward_hook, model[2].register_full_backward_hook, model.register_forward_pre_hook]
    for name, place in zip(("'1'", "'2'", "the model"), places, strict=True):
        handle = place(lambda module, *tensors: seen.extend(tensors) or None)
        with pytest.warns(CurvdiagWarning, match=f"no effect.* a hook of {name} would get tensors without values"):
            assert error(Objective(model, cross_entropy, data())) < 1e-10
        handle.remove()
    handle = nn.modules.module.register_module_forward_hook(lambda *tensors: seen.extend(tensors) or None)
    try:
        with pytest.warns(CurvdiagWarning, match="a hook of all modules"):
            assert error(objective) < 1e-10
    finally:
        handle.remove()
    assert seen
    assert len(traces) == 1
    assert error(objective) < 1e-10
    assert type(Hessian(objective, compile=True)._engine.kept[0]).__name__ == "TracedGraph"


def test_a_monitor_measures_with_one_trace(traces: list[Any]) -> None:
    torch.manual_seed(0)
    model, batch = mlp().double(), data()
    objective = Objective(model, cross_entropy, batch)
    names = ["lambda_max", "trace", "layers", "noise_trace", "alignment"]
    monitors = [
        CurvatureMonitor(objective, every=1, measure=names, hessian=options, warm=False, strict=True)
        for options in ({}, {"compile": True})
    ]
    for _ in range(2):
        plain, compiled = (monitor.measure().scalars for monitor in monitors)
        assert len(plain) > 8
        for name in plain.keys() - {"curv/cost/seconds", "curv/cost/gradients", "curv/overhead"}:
            assert float(compiled[name]) == pytest.approx(float(plain[name]), rel=1e-8, abs=1e-12), name
        step(model, batch)
    assert len(traces) == 1
