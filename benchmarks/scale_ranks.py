"""What one rank of a few takes: bytes, seconds, memory. Run by ``scale.py`` under torchrun; rank 0 writes JSON.

Seconds are those of the slowest rank, bytes and memory those of the rank with most.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from curvdiag import Hessian, Objective, spectral_density
from curvdiag.operators.plan import GraphBytes
from curvdiag.spectrum.collectives import Units, all_reduced, gathered, ring_steps
from curvdiag.spectrum.hardware import Rates
from curvdiag.spectrum.objective_work import sharding_of
from curvdiag.spectrum.scale import Run, Work
from curvdiag.spectrum.scale import sharded as sharded_share
from curvdiag.spectrum.scale_plan import ScalePlan

SAMPLES, STEPS, PROBES = 256, 6, 2
"""Of each rank, and of a density."""
LARGE, SMALL = 16 << 20, 1 << 10
"""Bytes of all-reduces from which bandwidth and latency are taken."""
WIDTH, BLOCKS = 512, 4
"""Of the net whose products are timed."""
PAGE = os.sysconf("SC_PAGE_SIZE")


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


def net(width: int, blocks: int) -> nn.Sequential:
    """A smooth net, the same on all ranks."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), *(Block(width) for _ in range(blocks)), nn.Linear(width, 10))


def split(model: nn.Sequential) -> nn.Sequential:
    """The same sharded over all ranks, each child a group of its own."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for child in model:
        fully_shard(child, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def batch(samples: int = SAMPLES) -> tuple[Tensor, Tensor]:
    """This rank's."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    return torch.randn(samples, 64, generator=generator), torch.randint(10, (samples,), generator=generator)


def wire() -> dict[str, float]:
    """Bytes that collectives send, and how fast."""
    ranks, found = dist.get_world_size(), {}
    tensor = torch.ones(LARGE // 4)
    shard = torch.ones(LARGE // 4 // ranks)
    whole = torch.empty(len(shard) * ranks)
    found["all-reduce"] = sent_by(lambda: dist.all_reduce(tensor)) / all_reduced(LARGE, ranks)
    found["all-gather"] = sent_by(lambda: dist.all_gather_into_tensor(whole, shard)) / gathered(whole.nbytes, ranks)
    scatter = sent_by(lambda: dist.reduce_scatter_tensor(shard, whole))
    found["reduce-scatter"] = scatter / gathered(whole.nbytes, ranks)
    small = tensor[: SMALL // 4]
    found["latency"] = seconds_of(lambda: dist.all_reduce(small), 30) / (2 * ring_steps(ranks))
    found["bandwidth"] = all_reduced(LARGE, ranks) / seconds_of(lambda: dist.all_reduce(tensor), 5)
    return found


def data_parallel(rates: dict[str, float]) -> dict[str, float]:
    """Products of a density with all weights on each rank, and what the plan says of them."""
    ranks = dist.get_world_size()
    objective = Objective(net(WIDTH, BLOCKS), F.cross_entropy, batch(), group="world")
    share = plan_of(objective, rates).data_parallel
    hessian = Hessian(objective)
    rows = torch.ones(PROBES, objective.parameters.size)
    sent = sent_by(lambda: hessian.apply(rows)) / PROBES
    products = STEPS * PROBES
    seconds = seconds_of(lambda: spectral_density(hessian, steps=STEPS, probes=PROBES), 2) / products
    found = {"predicted": largest(share.product), "computing": largest(share.compute), "seconds": seconds}
    return {**found, "sent": sent / share.sent if ranks > 1 else 1.0}


def plan_of(objective: Objective, rates: dict[str, float]) -> ScalePlan:
    """What the plan says of these ranks, both ways."""
    known = {name: rates[name] for name in ("bandwidth", "latency")}
    plan = objective.plan(steps=STEPS, probes=PROBES, world_size=dist.get_world_size(), **known)
    if plan.on_ranks is None:
        raise RuntimeError("the plan is for one process")
    return plan.on_ranks


def sharded(rates: dict[str, float]) -> dict[str, float]:
    """Products of a density with sharded weights, and what the formulas say of them.

    Gloo reduces and scatters by reducing everything, so that a reduce-scatter counts as two.
    """
    ranks, own, whole = dist.get_world_size(), batch(), net(WIDTH, BLOCKS)
    share = plan_of(Objective(whole, F.cross_entropy, own, group="world"), rates).sharded
    units, computing = sharding_of(whole), largest(share.compute)
    formula = 2 * (units.sent(ranks, 4) + gathered(4 * units.numbers(ranks), ranks))
    steps = 2 * (units.gathers() + 2 * units.scatters()) * ring_steps(ranks)
    moving = formula / rates["bandwidth"] + steps * rates["latency"] if ranks > 1 else 0.0
    objective = Objective(split(net(WIDTH, BLOCKS)), F.cross_entropy, own, group="world")
    hessian = Hessian(objective, method="finite-difference")
    rows = torch.ones(1, hessian.space.local)
    return {
        "predicted": computing + moving,
        "computing": computing,
        "seconds": seconds_of(lambda: spectral_density(hessian, steps=STEPS, probes=1), 2) / STEPS,
        "sent": sent_by(lambda: hessian.apply(rows)) / formula if ranks > 1 else 1.0,
    }


def memory() -> dict[str, float]:
    """Bytes that are resident at most for a density with sharded weights, these included, and what is foretold."""
    density_of(16, 2)  # what stays for good: code, buffers of the connections
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    units = density_of(512, 8)
    found = peak() - before
    size = units.size
    work = Work(size, size, 8, None, GraphBytes(0, 0), GraphBytes(0, 0), GraphBytes(0, 0), units, 8)
    share = sharded_share(work, dist.get_world_size(), Rates(), Run(2, 1))
    constant = share.memory["gathered"] + share.memory["activations"]
    return {"peak": largest(found), "foretold": share.peak, "constant": constant, "weights": 4.0 * size}


def density_of(width: int, blocks: int) -> Units:
    """A short density of a net that was never whole on any rank."""
    with torch.device("meta"):
        model = net(width, blocks)
    units = sharding_of(model)
    split(model).to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5 / width**0.5)
    hessian = Hessian(Objective(model, F.cross_entropy, batch(8), group="world"), method="finite-difference")
    spectral_density(hessian, steps=2, probes=1)
    return units


def gradient(model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    model.zero_grad()
    F.cross_entropy(model(data[0]), data[1]).backward()


def sent_by(call: Callable[[], object]) -> float:
    """Bytes that this process writes in a second call, to sockets among others."""
    call()
    dist.barrier()
    before = written()
    call()
    after = written()
    dist.barrier()
    return largest(after - before)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Median over calls after one that does not count, all ranks starting together."""
    times = []
    for _ in range(repeats + 1):
        dist.barrier()
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return largest(statistics.median(times[1:]))


def largest(number: float) -> float:
    """Of all ranks."""
    tensor = torch.tensor(number, dtype=torch.float64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return float(tensor)


def written() -> int:
    return int(dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())["wchar"])


def resident() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def measured() -> dict[str, Any]:
    found: dict[str, Any] = {"memory": memory()}
    found["wire"] = wire() if dist.get_world_size() > 1 else {"bandwidth": 1.0, "latency": 1.0}
    found["data-parallel"] = data_parallel(found["wire"])
    found["sharded"] = sharded(found["wire"])
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(-3, 1 << 20)  # large tensors are mapped, so that what is freed is given back
    dist.init_process_group("gloo")
    result = measured()
    if dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(result))
    dist.barrier()
    dist.destroy_process_group()
