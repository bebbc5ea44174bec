"""What a Lanczos run on sharded weights keeps on each rank: its share of every vector, and never a whole one.

Counted are the tensors that PyTorch's operations make. The engine's buffers, a unit at a time, are there before.
"""

from __future__ import annotations

from typing import Any

import pytest
from ranks import launch

pytestmark = pytest.mark.timeout(290)

SCRIPT = """
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from curvdiag import Hessian, Objective, spectral_density
from curvdiag.operators.live_bytes import LiveBytes

WIDTH, LAYERS = 48, 6

class Watched(LiveBytes):
    # DTensors have no memory of their own, and of what is inside them it is the shard that counts.
    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return func(*args, **(kwargs or {}))
        result = super().__torch_dispatch__(func, types, args, kwargs)
        for one in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(one, torch.Tensor) and not isinstance(one, DTensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.itemsize)
        return result

def measured(group):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(LAYERS)))
    mesh = DeviceMesh.from_group(group, "cpu")
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    inputs = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(0))  # the same mean on any number of ranks
    objective = Objective(model, nn.MSELoss(), (inputs, torch.zeros(4, WIDTH)), group=group)
    with Watched() as making:
        hessian = Hessian(objective, method="finite-difference")
    with Watched() as watched:
        density = spectral_density(hessian, probes=1, steps=5, seed=0)
    return dict(
        size=hessian.size, local=hessian.space.local, unit=WIDTH * (WIDTH + 1), making=making.peak(),
        running=watched.peak(), largest=max(making.largest, watched.largest),
        moments=[float(density.moment(k)) for k in (1, 2, 3)],
    )

groups = [dist.new_group(list(range(count))) for count in (1, 2, 3)]
for count, group in enumerate(groups, 1):
    if rank < count:
        saved[count] = measured(group)
    dist.barrier()
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> dict[int, list[dict[str, Any]]]:
    """Of the first, the first two and all of three ranks."""
    saved = launch(SCRIPT, 3, tmp_path_factory.mktemp("memory"), limit=280)
    return {count: [one[count] for one in saved[:count]] for count in (1, 2, 3)}


def test_no_rank_ever_holds_a_whole_vector(runs: dict[int, list[dict[str, Any]]]) -> None:
    for world in (2, 3):
        for one in runs[world]:
            assert one["unit"] < one["size"] / world  # so that what the engine gathers is less than a share
            assert one["local"] <= 1.05 * one["size"] / world
            assert one["local"] <= one["largest"] <= 1.05 * one["size"] / world


@pytest.mark.parametrize("phase", ["making", "running"])
def test_memory_falls_as_one_over_the_ranks_plus_a_constant(runs: dict[int, list[dict[str, Any]]], phase: str) -> None:
    one, two, three = (max(rank[phase] for rank in runs[world]) / 4 for world in (1, 2, 3))  # in numbers of 4 bytes
    share = 2 * (one - two)  # of a peak of constant + share / ranks
    constant = one - share
    assert three == pytest.approx(constant + share / 3, rel=0.05)
    size, unit = runs[1][0]["size"], runs[1][0]["unit"]
    assert 4 * size < share < 10 * size  # weights kept, both gradients, the vector and those of the algorithm
    assert constant < unit


def test_moments_of_a_density_do_not_depend_on_the_number_of_ranks(runs: dict[int, list[dict[str, Any]]]) -> None:
    for world in (2, 3):
        for one in runs[world]:
            assert one["moments"] == runs[world][0]["moments"]
            assert one["moments"] == pytest.approx(runs[1][0]["moments"], rel=2e-3)
