"""Tensor parallelism, and meshes of two dimensions: hybrid shards, and FSDP2 over tensor parallelism."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from ranks import launch
from shard_cases import criterion, data, net, of_all, wide

from curvdiag import Hessian, Objective

pytestmark = pytest.mark.timeout(290)

COMMON = """
from shard_cases import *
from curvdiag import Hessian
from curvdiag.errors import CurvdiagError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import (
    ColwiseParallel, PrepareModuleInput, RowwiseParallel, SequenceParallel, parallelize_module
)
from torch.distributed.tensor import Replicate, Shard

dtype = torch.float64

def keep(name, objective):
    hessian = Hessian(objective, method="finite-difference")
    v = hessian.space.gaussian(1, seed=3, dtype=dtype, device="cpu")
    saved[name] = {
        "vectors": hessian.space.gathered(v), "products": hessian.space.gathered(hessian.apply(v)),
        "held": (hessian.space.owned, hessian.space.local), "size": objective.size,
    }

def told(name, function):
    try:
        saved[name] = "", str(function())
    except CurvdiagError as error:
        saved[name] = type(error).__name__, str(error)

def parallel(model, mesh):
    return parallelize_module(model, mesh, {"0": ColwiseParallel(), "3": RowwiseParallel()})
"""

TWO = (
    COMMON
    + """
mesh = init_device_mesh("cpu", (2,))
model = parallel(wide(dtype), mesh)
keep("tensor", of_rank(model, 0, dtype, group=None))
told("different", lambda: of_rank(model, rank, dtype, group=None))
told("twice", lambda: Hessian(of_rank(model, 0, dtype, group="world"), method="finite-difference"))
told("exact", lambda: Hessian(of_rank(model, 0, dtype, group=None)))
weights = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
saved["restored"] = all(torch.equal(p, q) for p, q in zip(weights, wide(dtype).parameters()))

hybrid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
keep("hybrid", of_rank(sharded(net(dtype), mesh=hybrid), rank, dtype))
"""
)

FOUR = (
    COMMON
    + """
both = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
place = both["dp"].get_local_rank()
model = parallel(wide(dtype), both["tp"])
for layer in (model[0], model[3]):
    fully_shard(layer, mesh=both["dp"])
fully_shard(model, mesh=both["dp"])
keep("both", of_rank(model, place, dtype, group=both["dp"].get_group()))
told("world", lambda: of_rank(model, place, dtype))
saved["place"] = place
hybrid = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
torch.manual_seed(0)
one = sharded(net(dtype), mesh=hybrid)
keep("hybrid", of_rank(one, rank % 3, dtype))
"""
)


def dense(world: int) -> torch.Tensor:
    return Hessian(of_all(world, torch.float64, model=wide(torch.float64))).dense()


def check(found: dict[str, Any], matrix: torch.Tensor) -> None:
    truth = found["vectors"] @ matrix
    assert float((found["products"] - truth).norm() / truth.norm()) < 1e-8


@pytest.fixture(scope="module")
def two(tmp_path_factory: Any) -> list[dict[str, Any]]:
    return launch(TWO, 2, tmp_path_factory.mktemp("two"), limit=270)


def test_tensor_parallel_products_are_exact_and_vectors_are_shared_out(two: list[dict[str, Any]]) -> None:
    for one in two:
        check(one["tensor"], dense(1))
        assert one["tensor"]["size"] == 11
    held = [one["tensor"]["held"] for one in two]
    assert sum(owned for owned, _ in held) == len(dense(1))
    assert held[0][0] == held[0][1]  # the first rank counts what both hold
    assert held[1][0] < held[1][1]
    assert all(one["restored"] for one in two)


def test_tensor_parallel_ranks_need_the_same_data(two: list[dict[str, Any]]) -> None:
    for one in two:
        assert one["different"][0] == "DistributedError"
        assert "tensor parallelism" in one["different"][1]


def test_a_group_that_counts_the_same_batch_twice_is_refused(two: list[dict[str, Any]]) -> None:
    for one in two:
        assert one["twice"][0] == "ArgumentError"
        assert "tensor parallelism" in one["twice"][1]
        assert one["exact"][0] == "ArgumentError"


def test_hybrid_shards_are_counted_once(two: list[dict[str, Any]]) -> None:
    matrix = Hessian(of_all(2, torch.float64)).dense()
    for one in two:
        check(one["hybrid"], matrix)
    assert [one["hybrid"]["held"] for one in two] == [(len(matrix), len(matrix)), (0, len(matrix))]


@pytest.mark.long
def test_shards_over_tensor_parallelism_on_four_ranks(tmp_path_factory: Any) -> None:
    four = launch(FOUR, 4, tmp_path_factory.mktemp("four"), limit=280)
    whole = [batch for rank in (0, 1, 2, 0) for batch in data(rank, torch.float64)]
    matrix = Hessian(Objective(net(torch.float64), criterion(torch.float64), whole)).dense()
    for one in four:
        check(one["hybrid"], matrix)
        check(one["both"], dense(2))
        assert one["world"][0] == "ArgumentError"
    assert sum(one["both"]["held"][0] for one in four) == len(dense(2))
    assert max(one["both"]["held"][1] for one in four) < 0.5 * len(dense(2))


def test_nothing_is_imported_that_a_single_process_does_not_need() -> None:
    kinds = ("torch.distributed.fsdp", "torch.distributed.tensor")
    code = f"import sys, curvdiag; print([m for m in sys.modules if m.startswith({kinds})])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
