"""Products, gradients and traffic of weights sharded by FSDP2, on two and three ranks, against one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import launch
from shard_cases import net, normed, of_all, tied

from curvdiag import Hessian

pytestmark = pytest.mark.timeout(280)

SCRIPT = """
from shard_cases import *
from curvdiag import Hessian, top_eigenpairs
from curvdiag.errors import SecondDerivativeError
from torch.profiler import ProfilerActivity, profile

def whole(operator, rows):
    return operator.space.gathered(rows)

for dtype in (torch.float64, torch.float32):
    objective = of_rank(sharded(net(dtype)), rank, dtype)
    hessian = Hessian(objective, method="finite-difference")
    vectors = hessian.space.gaussian(3, seed=5, dtype=dtype, device="cpu")
    name = str(dtype)
    saved[name] = {
        "value": objective.value(), "gradient": whole(hessian, objective.gradient()[None])[0],
        "vectors": whole(hessian, vectors), "products": whole(hessian, hessian.apply(vectors)),
        "error": hessian._engine.error, "local": hessian.space.local, "size": objective.size,
        "weight": objective.total_weight, "sharded": objective.sharded, "repr": repr(hessian),
    }
    for seed in (2, 3, 4):
        try:
            Hessian(of_rank(sharded(kinked(dtype, seed)), rank, dtype), method="finite-difference")
        except SecondDerivativeError as error:
            saved.setdefault("kinks", []).append(str(error))
    if dtype == torch.float64:
        layers = hessian.blocks({"second": "3.*"})
        block = layers.operators["second"]
        some = block.space.gaussian(2, seed=6, dtype=dtype, device="cpu")
        saved["block"] = whole(block, some), whole(block, layers.apply({"second": some})["second"])
        pairs = top_eigenpairs(hessian, k=1, seed=0)
        saved["eigenvalues"], saved["unreached"] = pairs.values, hessian.unreached
        saved["traffic"] = hessian.traffic()
        row = hessian.space.rademacher(1, seed=0, dtype=dtype, device="cpu")
        with profile(activities=[ProfilerActivity.CPU]) as oracle:
            hessian.apply(row)
        saved["oracle"] = {one.key: one.count for one in oracle.key_averages() if one.key.startswith("c10d::")}

        alone = net(dtype)
        for layer in (alone[0], alone[3]):
            fully_shard(layer)  # the rest lies whole on every rank, and its gradients are averaged by nobody
        part = Hessian(of_rank(alone, rank, dtype), method="finite-difference")
        v = part.space.gaussian(1, seed=8, dtype=dtype, device="cpu")
        saved["unwrapped"] = whole(part, v), whole(part, part.apply(v)), part.space.owned, part.space.local

        frozen = net(dtype)
        frozen[0].weight.requires_grad_(False)
        model = sharded(frozen)
        one = Hessian(of_rank(model, rank, dtype, params=["0.*", "5.bias"]), method="finite-difference")
        v = one.space.gaussian(1, seed=9, dtype=dtype, device="cpu")
        saved["chosen"] = whole(one, v), whole(one, one.apply(v))
        saved["flags"] = [p.requires_grad for p in model.parameters()]

        one = Hessian(of_rank(fully_shard(tied(dtype)), rank, dtype), method="finite-difference")
        v = one.space.gaussian(1, seed=4, dtype=dtype, device="cpu")
        saved["tied"] = whole(one, v), whole(one, one.apply(v)), one.size
        model = fully_shard(normed(dtype))
        model[1].running_mean += rank  # training leaves running statistics different
        saved["buffers"] = [
            of_rank(model, rank, dtype, mode=mode).value() for mode in ("eval", "train")
        ], model[1].running_mean.tolist()
"""


@pytest.fixture(scope="module", params=[2, 3])
def runs(request: Any, tmp_path_factory: Any) -> list[dict[str, Any]]:
    return launch(SCRIPT, request.param, tmp_path_factory.mktemp("products"), limit=270)


def exact(world: int, **options: Any) -> torch.Tensor:
    return Hessian(of_all(world, torch.float64, **options)).dense()


def distance(products: torch.Tensor, vectors: torch.Tensor, matrix: torch.Tensor) -> float:
    truth = vectors.double() @ matrix
    return float((products.double() - truth).norm() / truth.norm())


def test_float64_products_are_the_exact_ones_of_one_process(runs: list[dict[str, Any]]) -> None:
    found, world = runs[0][str(torch.float64)], len(runs)
    assert distance(found["products"], found["vectors"], exact(world)) < 1e-8
    assert found["error"] < 1e-3


def test_float32_products_of_a_smooth_net_are_within_a_thousandth(runs: list[dict[str, Any]]) -> None:
    found, world = runs[0][str(torch.float32)], len(runs)
    assert distance(found["products"], found["vectors"], exact(world)) < 1e-3


def test_value_and_gradient_weigh_samples_exactly(runs: list[dict[str, Any]]) -> None:
    whole = of_all(len(runs), torch.float64)
    for one in runs:
        found = one[str(torch.float64)]
        assert (found["size"], found["weight"]) == (whole.size, whole.total_weight)
        assert found["value"] == pytest.approx(whole.value(), rel=1e-14)
        torch.testing.assert_close(found["gradient"], whole.gradient(), rtol=1e-12, atol=1e-15)


def test_every_rank_holds_its_part_and_all_come_to_the_same(runs: list[dict[str, Any]]) -> None:
    size = len(runs[0][str(torch.float64)]["gradient"])
    held = [one[str(torch.float64)]["local"] for one in runs]
    assert sum(held) == size
    assert max(held) <= size / len(runs) * 1.4
    for one in runs[1:]:
        for name in (str(torch.float64), str(torch.float32)):
            assert torch.equal(one[name]["products"], runs[0][name]["products"])
            assert one[name]["error"] == runs[0][name]["error"]
        assert torch.equal(one["eigenvalues"], runs[0]["eigenvalues"])


def test_blocks_are_those_of_the_whole_matrix(runs: list[dict[str, Any]]) -> None:
    block = Hessian(of_all(len(runs), torch.float64)).block("3.*")
    assert distance(runs[0]["block"][1], runs[0]["block"][0], block.dense()) < 1e-8
    assert runs[0]["unreached"] == []


def test_eigenvalues_from_shards_are_those_of_the_dense_matrix(runs: list[dict[str, Any]]) -> None:
    truth = torch.linalg.eigvalsh(exact(len(runs)))[-1:]
    torch.testing.assert_close(runs[0]["eigenvalues"].to(truth), truth, rtol=1e-5, atol=0)


def test_traffic_is_what_pytorch_counts(runs: list[dict[str, Any]]) -> None:
    traffic, oracle = runs[0]["traffic"], runs[0]["oracle"]
    assert sum(oracle.values()) == traffic.all_gathers + traffic.reduce_scatters + traffic.all_reduces + traffic.others
    assert oracle["c10d::_allgather_base_"] == traffic.all_gathers
    assert oracle["c10d::_reduce_scatter_base_"] == traffic.reduce_scatters
    assert oracle["c10d::allreduce_"] == traffic.all_reduces
    # Two gradients of two rounds, since the first rank has two batches: four passes over the same units.
    units, passes = 3, 4
    assert traffic.reduce_scatters == units * passes
    assert units * passes <= traffic.all_gathers <= 2 * units * passes
    weights = 8 * sum(p.numel() for p in net(torch.float64).parameters())
    assert weights * passes <= traffic.reduce_scatter_bytes <= 1.3 * weights * passes  # shards are padded
    assert "reduce-scatters of" in str(traffic)


def test_weights_outside_of_the_engine_are_summed_and_counted_once(runs: list[dict[str, Any]]) -> None:
    vectors, products, _, _ = runs[0]["unwrapped"]
    assert distance(products, vectors, exact(len(runs))) < 1e-8
    outside = 7 + 7 + 5 * 3 + 3  # the norm and the last layer
    owned, local = zip(*((one["unwrapped"][2], one["unwrapped"][3]) for one in runs), strict=True)
    assert [b - a for a, b in zip(owned, local, strict=True)] == [0] + [outside] * (len(runs) - 1)
    for one in runs[1:]:
        assert torch.equal(one["unwrapped"][1], products)


def test_chosen_parameters_frozen_ones_among_them(runs: list[dict[str, Any]]) -> None:
    model = net(torch.float64)
    model[0].weight.requires_grad_(False)
    matrix = exact(len(runs), model=model, params=["0.*", "5.bias"])
    assert distance(runs[0]["chosen"][1], runs[0]["chosen"][0], matrix) < 1e-8
    assert runs[0]["flags"] == [p.requires_grad for p in model.parameters()]


def test_buffers_are_those_of_the_first_rank_and_stay_as_they_are(runs: list[dict[str, Any]]) -> None:
    value = of_all(len(runs), torch.float64, model=normed(torch.float64)).value()
    for rank, one in enumerate(runs):
        (evaluated, trained), mean = one["buffers"]
        assert evaluated == pytest.approx(value, rel=1e-14)
        assert trained != evaluated
        assert mean == [float(rank)] * 7


def test_tied_weights_count_once(runs: list[dict[str, Any]]) -> None:
    vectors, products, size = runs[0]["tied"]
    matrix = exact(len(runs), model=tied(torch.float64))
    assert size == len(matrix)
    assert distance(products, vectors, matrix) < 1e-8


def test_kinks_are_refused_also_where_no_step_of_a_check_meets_one(runs: list[dict[str, Any]]) -> None:
    for one in runs:
        assert len(one["kinks"]) == 6
        assert all("ReLU '1', ReLU '4'" in text and "curvdiag scan" in text for text in one["kinks"])
        assert one["kinks"] == runs[0]["kinks"]
