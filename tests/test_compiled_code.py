"""The compiler itself: right numbers, one compilation for a training, and no compiler at all."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import warnings
from typing import Any

import pytest
import torch
from nets import make, mlp
from oracles import criterion_loss, dense_hessian, relative
from torch.nn.functional import cross_entropy

from curvdiag import Hessian, NoiseCovariance, Objective
from curvdiag.errors import CurvdiagWarning
from curvdiag.operators import linear_part, program, traced_graph

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))) or importlib.util.find_spec("torch._inductor") is None,
    reason="torch.compile's products on the CPU need a C++ compiler, and neither g++ nor clang++ is found",
)


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    seen: list[Any] = []
    compiled = linear_part.compiled
    monkeypatch.setattr(program, "compiled", lambda part, example: seen.append(part) or compiled(part, example))
    return seen


@needs_compiler
@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=str)
def test_compiled_products_equal_those_of_the_dense_hessian(compilations: list[Any], options: dict) -> None:
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    objective = Objective(model, cross_entropy, batch)
    operator = Hessian(objective, compile=True, **options)
    assert relative(operator.dense(), truth) < 1e-10
    with torch.no_grad():
        model[0].weight.mul_(1.5)
    changed = dense_hessian(model, criterion_loss(cross_entropy, batch))
    assert relative(Hessian(objective, compile=True, **options).dense(), changed) < 1e-10
    assert relative(operator.dense(), truth) < 1e-10
    assert len(compilations) == 1


@pytest.mark.long
@needs_compiler
@pytest.mark.parametrize(
    ("net", "dtype"),
    [
        ("mlp-relu", torch.float32),
        ("conv-batchnorm", torch.float32),
        ("transformer-tied", torch.float64),
        ("lstm", torch.float64),
    ],
    ids=str,
)
def test_compiled_products_of_every_net(compilations: list[Any], net: str, dtype: torch.dtype) -> None:
    model, batch = make(net, dtype=dtype)
    objective = Objective(model, cross_entropy, batch)
    truth = dense_hessian(model, criterion_loss(cross_entropy, batch))
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    assert relative(Hessian(objective, compile=True).dense(), truth) < tolerance
    noise = NoiseCovariance(Objective(make(net)[0], cross_entropy, make(net)[1]))
    assert relative(NoiseCovariance(objective, compile=True).dense(), noise.dense()) < tolerance
    assert len(compilations) == 3


@needs_compiler
def test_compiling_leaves_the_tables_of_torch_compile_and_the_random_states_alone() -> None:
    model, batch = make("mlp-tanh")
    objective, state = Objective(model, cross_entropy, batch), torch.get_rng_state()
    operator = Hessian(objective, compile=True)
    vector = torch.ones(operator.size, dtype=torch.float64)
    product = operator @ vector
    assert torch.equal(state, torch.get_rng_state())
    torch.compiler.reset()
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.equal(operator @ vector, product)
        assert torch.equal(Hessian(objective, compile=True) @ vector, product)


def test_without_a_compiler_products_run_uncompiled_and_one_warning_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch._inductor

    def missing(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(torch._inductor, "compile", missing)
    torch.manual_seed(0)
    objective = Objective(mlp(), cross_entropy, (torch.randn(9, 4), torch.randint(3, (9,))))
    with pytest.warns(CurvdiagWarning, match=r"without compiled code.*No working C\+\+ compiler found"):
        operator = Hessian(objective, compile=True)
    assert type(operator._engine.kept[0]) is traced_graph.TracedGraph
    assert relative(operator.dense(), Hessian(objective).dense()) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error", CurvdiagWarning)
        assert relative(Hessian(objective, compile=True).dense(), Hessian(objective).dense()) < 1e-5


def test_the_compiler_is_not_imported_without_being_asked_for() -> None:
    import subprocess

    code = "import curvdiag, sys; print(sorted({'torch._inductor', 'torch._dynamo'} & set(sys.modules)))"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"
