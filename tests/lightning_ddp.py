"""Run by test_lightning_ddp in two processes: trainings under DDP, and what each process saw of them, as JSON."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

import torch
from lightning_runs import FAST, dataset, fit, loader, module, package
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torchmetrics.classification import MulticlassAccuracy

from curvdiag import Objective, OverheadBudget
from curvdiag.errors import ArgumentError, CurvdiagError, CurvdiagWarning
from curvdiag.integrations.lightning import CurvatureCallback
from curvdiag.optim import LPSGD
from curvdiag.schedules import AnisotropyP


def main(folder: Path, cases: list[str]) -> None:
    warnings.filterwarnings("ignore", category=CurvdiagWarning, message="measuring every")
    rank = int(os.environ["LOCAL_RANK"])
    found = {case: CASES[case](folder) for case in cases}
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    torch.distributed.barrier()  # else the first to end takes the connection from the other
    sys.stdout.flush()
    os._exit(0)  # without the end of the interpreter, at which a thread of gloo's may still run, and abort the process


def step(net, batch, index):
    """Everything in it that would wait for the other process, were it run as it is by one of them alone."""
    outputs = net(batch[0])
    net.metric.update(outputs, batch[1])
    net.log("accuracy", net.metric.compute())
    loss = F.cross_entropy(outputs, batch[1])
    net.log("train_loss", loss, sync_dist=True)
    return loss


def train(callbacks, **options):
    pl = package()
    net = module(pl, lambda net: LPSGD(net.parameters(), lr=0.02, p=6.0), step, metric=MulticlassAccuracy(3))
    ddp = {"strategy": "ddp", "devices": 2, "use_distributed_sampler": True}
    made, net = fit(pl, callbacks, net, loader(), **ddp, **options)
    # Buffers are each process's own: BatchNorm averages over the samples that it saw.
    weights, buffers = ([tensor.tolist() for tensor in tensors] for tensors in (net.parameters(), net.buffers()))
    return made, {"weights": weights, "own": [buffers, torch.get_rng_state().tolist()]}


def bare(folder):
    return train([])[1]


def watched(folder):
    callback = CurvatureCallback(store=folder / "watched.db", every=2, **FAST)
    _, found = train([callback])
    monitor = callback.monitor
    return {**found, "steps": None if monitor is None else [one.step for one in monitor.history]}


def together(folder, **options):
    """An objective of both processes, each with samples of its own."""
    told = []

    def objective(net, trainer):
        own = slice(trainer.global_rank * 32, (trainer.global_rank + 1) * 32)
        inputs, targets = dataset().tensors
        return Objective(net.net, F.cross_entropy, (inputs[own], targets[own]), group="world")

    class Listening(CurvatureCallback):
        def on_train_end(self, trainer, pl_module):
            told.append(float(trainer.callback_metrics["curv/hessian/lambda_max"]))

    callback = Listening(objective, store=folder / "together.db", **{"every": 2, **FAST, **options})
    _, found = train([callback])
    monitor = callback.monitor
    numbers = [{key: float(value) for key, value in one.scalars.items()} for one in monitor.history]
    steps = [one.step for one in monitor.history]
    return {**found, "steps": steps, "numbers": numbers, "told": told, "size": monitor.objective.size}


def together_scheduled(folder):
    """Also by the clock, which the first process reads for both."""

    def schedules(optimizer, monitor):
        return AnisotropyP(optimizer, monitor, a_high=0.5)  # p falls with the first measurement

    options = {"preset": None, "measure": ["lambda_max", "anisotropy"], "steps": 6}
    found = together(
        folder, schedules=schedules, every=None, cadence=OverheadBudget(0.5), name="by the clock", **options
    )
    return {**found, "own": None}


def sharded_step(net, batch, index):
    return F.cross_entropy(net.net(batch[0]), batch[1])


def sharded(folder):
    """fully_shard, without and with the callback, and with none of the kind that it takes."""
    pl = package()

    def objective(net, trainer):
        own = slice(trainer.global_rank * 32, (trainer.global_rank + 1) * 32)
        inputs, targets = dataset().tensors
        return Objective(net.net, F.cross_entropy, (inputs[own], targets[own]), group="world")

    def shard(net):
        fully_shard(net.net, mesh=net.device_mesh["data_parallel"])

    def run(callbacks):
        net = module(pl, lambda net: torch.optim.Adam(net.parameters(), lr=0.02), sharded_step)
        net.net = torch.nn.Sequential(
            torch.nn.Linear(6, 8), torch.nn.Tanh(), torch.nn.Dropout(0.3), torch.nn.Linear(8, 3)
        )
        torch.manual_seed(0)
        for tensor in net.net.parameters():
            torch.nn.init.normal_(tensor, std=0.3)
        type(net).configure_model = shard
        strategy = pl.strategies.ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
        _, net = fit(pl, callbacks, net, loader(), strategy=strategy, devices=2, use_distributed_sampler=True)
        weights = [tensor.full_tensor().tolist() for tensor in net.parameters()]
        return {"weights": weights, "random": torch.get_rng_state().tolist()}

    callback = CurvatureCallback(objective, store=folder / "sharded.db", every=2, measure=["trace"], probes=1)
    found = {"bare": run([]), "watched": run([callback])}
    trace = [one["curv/hessian/trace"] for one in callback.monitor.history]
    try:
        run([CurvatureCallback()])
    except ArgumentError as error:
        found["refused"] = str(error)
    return {**found, "trace": trace, "sharded": callback.monitor.objective.sharded}


def homeless(folder):
    """Only the first process opens the run file, and here it cannot."""
    try:
        train([CurvatureCallback(store=folder / "missing" / "run.db", **FAST)])
    except CurvdiagError as error:
        return str(error)
    return ""


def followed(folder, **options):
    def schedules(optimizer, monitor):
        return AnisotropyP(optimizer, monitor, smoothing=0.7)

    callback = CurvatureCallback(store=folder / "scheduled.db", schedules=schedules, every=2, probes=1, steps=12)
    made, found = train([callback], **options)
    made.save_checkpoint(folder / "last.ckpt")
    history = [dict(one.chosen) for one in callback.schedules[0].history]
    batches = [float(batch[0].double().sum()) for batch in callback.monitor.objective.batches]
    return {**found, "history": history, "p": made.optimizers[0].param_groups[0]["p"], "batches": batches}


def scheduled(folder):
    return followed(folder)


def resumed(folder):
    return followed(folder, max_epochs=3, ckpt_path=folder / "last.ckpt")


def clocked(folder):
    """A cadence that the other process cannot know."""
    callback = CurvatureCallback(schedules=lambda optimizer, monitor: AnisotropyP(optimizer, monitor))
    try:
        train([callback])
    except ArgumentError as error:
        return str(error)
    return ""


CASES = {
    one.__name__: one
    for one in (bare, watched, together, together_scheduled, sharded, homeless, scheduled, resumed, clocked)
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    os._exit(0)  # see ranks.TAIL: of groups that a mesh holds
