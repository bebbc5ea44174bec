"""Weights that are shards on several processes move as whole ones do."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
from update_rules import parameters, set_gradients

from curvdiag.optim import GSGD, LPSGD, LPSGDM, Lion, SignSGD, Stacey

MAKERS = {
    "LPSGD": LPSGD,
    "LPSGDM": LPSGDM,
    "Lion": Lion,
    "SignSGD": SignSGD,
    "GSGD": lambda params, **options: GSGD(params, total_steps=4, **options),
    "Stacey": Stacey,
}
PROCESSES = 2


def compare(rank: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    try:
        for name, make in MAKERS.items():
            whole = parameters(0, torch.float64, [(6, 5), (7,)])
            shards = [torch.nn.Parameter(distribute_tensor(t.detach().clone(), mesh, [Shard(0)])) for t in whole]
            optimizers = [make(tensors, lr=0.1, weight_decay=0.1) for tensors in (whole, shards)]
            for step in range(3):
                set_gradients(whole, step)
                for shard, tensor in zip(shards, whole, strict=True):
                    shard.grad = distribute_tensor(tensor.grad.clone(), mesh, [Shard(0)])
                for optimizer in optimizers:
                    optimizer.step()
            for shard, tensor in zip(shards, whole, strict=True):
                told = lambda text, name=name: f"{name}: {text}"  # noqa: E731
                torch.testing.assert_close(shard.full_tensor(), tensor, rtol=1e-12, atol=1e-14, msg=told)
    finally:
        dist.destroy_process_group()


@pytest.mark.skipif(not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo")
@pytest.mark.long
def test_a_step_on_shards_is_that_on_the_whole(tmp_path):
    multiprocessing.spawn(compare, args=(str(tmp_path / "store"),), nprocs=PROCESSES)
