"""What ranks send, counted while they do it, is what the formulas say."""

from __future__ import annotations

from pathlib import Path

import pytest
from ranks import launch

from curvdiag.spectrum.collectives import all_reduced, gathered, padded, units_of

SCRIPT = """
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from curvdiag import Hessian, Objective
from curvdiag.errors import ArgumentError


def sent():
    # What this process has written, to sockets among others.
    with open("/proc/self/io") as file:
        return int(dict(line.split(": ") for line in file)["wchar"])


class Collectives(TorchDispatchMode):
    # CommDebugMode gets lost where one call makes several forward passes.
    def __init__(self):
        super().__init__()
        self.counts = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func._opname
            self.counts[name] = self.counts.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def watched(call):
    call()
    dist.barrier()
    before = sent()
    with Collectives() as counter:
        call()
    after = sent()
    dist.barrier()
    return {"bytes": after - before, "counts": counter.counts}


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.tanh(self.up(x)))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 130), Block(130), Block(130), nn.Linear(130, 5))


inputs, targets = torch.randn(8, 7), torch.randint(5, (8,))
mesh = init_device_mesh("cpu", (world,))
saved["shapes"] = [(name, tuple(p.shape)) for name, p in net().named_parameters()]
for reshard in (None, False):
    model = net()
    for block in model[1:3]:
        fully_shard(block, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(model, mesh=mesh, reshard_after_forward=reshard)
    saved[f"fsdp {reshard}"] = watched(lambda: F.cross_entropy(model(inputs), targets).backward())

full = torch.empty(world * 100_000)
saved["scatter"] = watched(lambda: dist.reduce_scatter_tensor(torch.empty(100_000), full))
saved["gather"] = watched(lambda: dist.all_gather_into_tensor(full, torch.ones(100_000)))

shard = torch.randn(6 + rank, 7), torch.randint(5, (6 + rank,))
objective = Objective(net(), F.cross_entropy, shard, group="world")
hessian = Hessian(objective)
for k in (1, 3):
    rows = torch.ones(k, objective.parameters.size)
    reductions, size = objective.ranks.traffic.reductions, objective.ranks.traffic.bytes
    saved[f"product {k}"] = watched(lambda: hessian.apply(rows))
    traffic = objective.ranks.traffic
    saved[f"product {k}"]["traffic"] = (traffic.reductions - reductions, traffic.bytes - size)
plan = objective.plan(steps=4, probes=3)
saved["plan"] = plan.on_ranks.to_dict()
saved["text"] = str(plan)

parts = net()
for block in parts[1:3]:
    fully_shard(block, mesh=mesh)
fully_shard(parts, mesh=mesh)
split = Objective(parts, F.cross_entropy, shard, group="world")
saved["refusal"] = ""
try:
    split.plan()
except ArgumentError as error:
    saved["refusal"] = str(error)
differences = Hessian(split, method="finite-difference")
vectors = torch.ones(1, differences.space.local)
saved["difference"] = watched(lambda: differences.apply(vectors))
"""

NOISE = 10_000
"""Bytes of headers, and of the rounds in which ranks tell each other how they are doing."""


@pytest.fixture(scope="module", params=[2, 3])
def found(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, list[dict]]:
    folder: Path = tmp_path_factory.mktemp(f"scale{request.param}")
    return request.param, launch(SCRIPT, request.param, folder)


@pytest.mark.parametrize("reshard", [None, False])
def test_a_gradient_of_fsdp_gathers_and_scatters_as_often_as_its_units_say(found, reshard) -> None:
    _, ranks = found
    units = units_of(ranks[0]["shapes"], ["1", "2"])
    again = reshard is not False
    for rank in ranks:
        counts = rank[f"fsdp {reshard}"]["counts"]
        assert counts == {"_allgather_base_": units.gathers(reshard=again), "_reduce_scatter_base_": units.scatters()}


@pytest.mark.parametrize("reshard", [None, False])
def test_a_gradient_of_fsdp_sends_the_bytes_of_its_units_filled_up(found, reshard) -> None:
    """On gloo, which reduces and scatters by reducing everything: one more than on a ring of nccl."""
    world, ranks = found
    units = units_of(ranks[0]["shapes"], ["1", "2"])
    wanted = units.sent(world, 4, reshard=reshard is not False) + gathered(4 * units.numbers(world), world)
    assert units.numbers(world) == padded([shape for _, shape in ranks[0]["shapes"]], world)
    for rank in ranks:
        assert rank[f"fsdp {reshard}"]["bytes"] == pytest.approx(wanted, abs=NOISE)


def test_gathering_sends_what_the_formula_says_and_scattering_on_gloo_twice_that(found) -> None:
    world, ranks = found
    size = 4 * 100_000 * world
    for rank in ranks:
        assert rank["gather"]["bytes"] == pytest.approx(gathered(size, world), abs=NOISE)
        assert rank["scatter"]["bytes"] == pytest.approx(2 * gathered(size, world), abs=NOISE)


@pytest.mark.parametrize("k", [1, 3])
def test_a_data_parallel_product_sends_one_vector_for_each_probe_in_one_collective(found, k) -> None:
    world, ranks = found
    vector = 4 * sum(padded([shape], 1) for _, shape in ranks[0]["shapes"])
    for rank in ranks:
        product = rank[f"product {k}"]
        assert product["bytes"] == pytest.approx(all_reduced(k * vector, world), abs=NOISE)
        assert product["traffic"] == (2, 2 * k * vector)  # of two calls
        large = {name: count for name, count in product["counts"].items() if "reduce" in name}
        assert sum(large.values()) <= 2  # the other is the round of status


def test_a_difference_of_sharded_gradients_is_two_gradients_of_the_units(found) -> None:
    world, ranks = found
    units = units_of(ranks[0]["shapes"], ["1", "2"])
    on_gloo = units.sent(world, 4) + gathered(4 * units.numbers(world), world)
    for rank in ranks:
        counts = rank["difference"]["counts"]
        assert counts["_allgather_base_"] == 2 * units.gathers()
        assert counts["_reduce_scatter_base_"] == 2 * units.scatters()
        assert rank["difference"]["bytes"] == pytest.approx(2 * on_gloo, abs=4 * NOISE)  # steps are agreed upon, too


def test_a_plan_of_sharded_weights_says_to_plan_before(found) -> None:
    world, ranks = found
    for rank in ranks:
        assert f"objective.plan(world_size={world}, sharded=True)" in rank["refusal"]


def test_a_plan_on_several_ranks_is_for_so_many_and_for_all_samples(found) -> None:
    world, ranks = found
    vector = 4 * sum(padded([shape], 1) for _, shape in ranks[0]["shapes"])
    for rank in ranks:
        plan = rank["plan"]
        assert plan["ranks"] == world
        assert plan["samples"] == sum(range(6, 6 + world))
        whole, part = plan["shares"]
        assert whole["sent"] == all_reduced(vector, world)
        units = units_of(rank["shapes"], ["0", "1", "2", "3"])  # all children of the sequence
        assert part["sent"] == 2 * units.sent(world, 4)
        assert f"on {world} ranks" in rank["text"]
