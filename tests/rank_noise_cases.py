"""The cases of tests/test_rank_noise_scale.py, run on each rank; each gives something that can be saved."""

from __future__ import annotations

import copy
import warnings
from contextlib import nullcontext
from itertools import product
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from rank_noise_runs import ONE, RAGGED, Net, Run, batch, same_training, wrap
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from curvdiag import Hessian, Objective
from curvdiag.errors import DistributedError
from curvdiag.noise import RankNoiseScale, RunningNoiseScale
from curvdiag.sandbox import numerics

ENGINES = ("ddp", "fsdp")
FIRST = lambda rank: rank == 0  # noqa: E731

WEIGHED = {
    "mean": (lambda size, own, everyone: 1 / len(own), {}),
    "divisor": (lambda size, own, everyone: 1 / 8, {"accumulation": "mean", "divisor": 8}),
    "sum": (lambda size, own, everyone: 1.0, {"accumulation": "sum"}),
    "samples": (lambda size, own, everyone: size / sum(own), {"accumulation": "samples"}),
    "global": (
        lambda size, own, everyone: len(everyone) * size / sum(map(sum, everyone)),
        {"accumulation": "global"},
    ),
}


def same_bits() -> dict[str, bool]:
    """Training with and without, in all ways of setting up the engine."""
    engine: dict[str, dict[str, Any]] = {
        "plain": {},
        "static": {"static_graph": True},
        "unused": {"find_unused_parameters": True},
    }
    found = {}
    for optimizer, (name, options), view in product(("sgd", "adamw"), engine.items(), (False, True)):
        found[f"ddp {optimizer} {name} view={view}"] = same_training(
            "ddp",
            optimizer=optimizer,
            sizes=ONE if name == "static" else RAGGED,
            dtype=torch.float32,
            options={**options, "gradient_as_bucket_view": view, "bucket_cap_mb": 1e-4},
            skip=FIRST if name == "unused" else lambda rank: False,
        )
    halves = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    policies = {"float32": {}, "bfloat16": {"mp_policy": halves}, "kept": {"reshard_after_forward": False}}
    for name, options in policies.items():
        optimizer = "sgd" if name == "kept" else "adamw"
        found[f"fsdp {optimizer} {name}"] = same_training(
            "fsdp", optimizer=optimizer, sizes=RAGGED, dtype=torch.float32, options=options
        )
    found["ddp own hook"] = same_training(
        "ddp", dtype=torch.float32, prepare=lambda model: model.register_comm_hook(None, allreduce_hook)
    )
    return found


def numbers() -> dict[str, dict[str, Any]]:
    """What is found, against gradients taken one by one."""
    by_way: dict[str, dict[str, Any]] = {name: {"weigh": w, "noise": n} for name, (w, n) in WEIGHED.items()}
    cases: dict[str, dict[str, Any]] = {
        "one": {},
        "several": {"sizes": RAGGED},
        "each reduced": {"sizes": RAGGED, "every": True},
        "zeroed": {"sizes": RAGGED, "to_none": False},
        "clipped": {"before_step": lambda m: nn.utils.clip_grad_norm_(m.parameters(), 1e-3)},
        "frozen": {"frozen": ("first.weight", "first.bias"), "sizes": RAGGED},
        "aside": {"aside": ("second.weight", "last.bias"), "sizes": RAGGED},
        "closure": {"closure": True, "sizes": RAGGED},
        "meddled": {"between": _meddle, "sizes": RAGGED},
        "measured": {"before_step": _measure, "sizes": RAGGED},
    }
    found = {
        f"{engine} {name}": Run(engine, **options).found() for engine in ENGINES for name, options in cases.items()
    }
    without_engine: dict[str, dict[str, Any]] = {
        **{name: {**options, "sizes": RAGGED} for name, options in by_way.items()},
        "adamw": {"optimizer": "adamw", "sizes": RAGGED},
        "zeroed each": {"sizes": RAGGED, "every": True, "to_none": False},
        "constant": {"noise": {"samples": 4}},
        "function": {"noise": {"samples": lambda: 4}},
        "factor": {
            "between": lambda model, loss: loss.register_hook(lambda grad: grad * 512),
            "noise": {"scale": lambda: 512.0},
        },
    }
    for name, options in without_engine.items():
        found[f"ddp {name}"] = Run("ddp", **options).found()
    unused = {"options": {"find_unused_parameters": True}, "skip": FIRST, "sizes": RAGGED}
    found["ddp unused"] = Run("ddp", **unused).found()
    found["ddp view"] = Run("ddp", options={"gradient_as_bucket_view": True}, sizes=RAGGED).found()
    found["ddp static"] = Run("ddp", options={"static_graph": True}).found()
    mesh = init_device_mesh("cpu", (dist.get_world_size(), 1), mesh_dim_names=("copies", "shards"))
    found["fsdp thawed"] = Run("fsdp", thawed=("first.weight", "first.bias"), sizes=RAGGED).found()
    found["fsdp copies"] = Run("fsdp", options={"mesh": mesh}, sizes=RAGGED).found()
    return found


def _meddle(model: nn.Module, loss: torch.Tensor) -> None:
    """Other gradients in the middle of the training's own."""
    inner = getattr(model, "module", model)
    if isinstance(model, DistributedDataParallel):
        torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        x, y = batch(0, 77, 0, 3, torch.float64)
        objective = Objective.from_loss(inner, lambda m, b: F.cross_entropy(m(b[0])["out"], b[1]), batch=(x, y))
        hessian = Hessian(objective)
        hessian @ torch.ones(hessian.size, dtype=torch.float64)
    with torch.no_grad():
        model(torch.ones(9, 5, dtype=torch.float64))


def _measure(model: nn.Module) -> None:
    """A measurement that goes through the engine's own backward pass, and puts the gradients back."""
    before = [p.grad for p in model.parameters()]
    model.zero_grad()
    if not isinstance(model, DistributedDataParallel):
        model.set_requires_gradient_sync(True)
    with numerics(torch.device("cpu")):
        model(torch.ones(3, 5, dtype=torch.float64))["out"].sum().backward()
    for p, grad in zip(model.parameters(), before, strict=True):
        p.grad = grad


def halves() -> dict[str, Any]:
    """FSDP2 with weights, gradients and their reduction in bfloat16; expected are those of single precision."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
    return Run("fsdp", dtype=torch.float32, sizes=RAGGED, options={"mp_policy": policy}, steps=1).found()


def joined() -> dict[str, Any]:
    """Ranks with batches of unequal number, under DDP's join()."""
    model = wrap(Net(torch.float64), "ddp", {})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = RankNoiseScale(model, optimizer)

    def train(steps: int) -> tuple[int, int]:
        for step in range(steps):
            x, y = batch(dist.get_rank(), step, 0, 4, torch.float64)
            F.cross_entropy(model(x)["out"], y).backward()
            optimizer.step()
            optimizer.zero_grad()
        return noise.updates, noise.skipped

    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        with model.join():
            within = train(1 + dist.get_rank())
    return {"told": sum("under join()" in str(one.message) for one in told), "within": within, "after": train(2)}


def scaled() -> dict[str, Any]:
    """A GradScaler; the second step of five has infinite gradients on one rank."""
    found = {}
    for view in (False, True):
        scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
        run = Run(
            "ddp",
            steps=5,
            poison=(1,),
            scaler=scaler,
            sizes=RAGGED,
            noise={"scale": scaler},
            options={"gradient_as_bucket_view": view},
            before_step=lambda m, scaler=scaler: None,
        )
        found[f"view={view}"] = {**run.found(), "scale": scaler.get_scale()}
    return found


class Checkpointed(nn.Module):
    """Recomputes its first part in the backward pass."""

    def __init__(self, reentrant: bool | None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
        self.head, self.reentrant = nn.Linear(3, 3).double(), reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.reentrant is None:
            return self.head(self.inner(x))
        return self.head(checkpoint(self.inner, x.requires_grad_(), use_reentrant=self.reentrant))


def checkpointed() -> list[tuple[float, int, int]]:
    """Backward passes within the backward pass are no passes of their own."""
    found = []
    for reentrant in (None, False, True):
        model = DistributedDataParallel(Checkpointed(reentrant))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        noise = RankNoiseScale(model, optimizer)
        for step in range(3):
            x, y = batch(dist.get_rank(), step, 0, 4, torch.float64)
            F.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        found.append((noise.trace.value, noise.updates, noise.skipped))
    return found


def traffic() -> dict[str, Any]:
    """What goes over the group besides the engine's own reduction, and how often the model runs."""
    found = {}
    for engine in ("ddp", "fsdp"):
        run = Run(engine, steps=0)
        with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as sent:
            passes = []
            run.model.register_forward_pre_hook(lambda *_, passes=passes: passes.append(1))
            for step in range(3):
                run._backward(step, False, lambda model, loss: None, None)
                run.optimizer.step()
                run.optimizer.zero_grad()
            sizes = [call.args[0].numel() for call in sent.call_args_list]
        found[engine] = {"sizes": sizes, "passes": len(passes), "updates": run.noise.updates}
    return found


def manners() -> dict[str, Any]:
    """Copies, closing, going on, one rank, and what is refused."""
    found: dict[str, Any] = {}
    for engine in ("ddp", "fsdp"):
        run = Run(engine, sizes=RAGGED)
        state, noise = run.noise.state_dict(), run.noise
        again = RankNoiseScale(run.model, run.optimizer, decay=0.5)
        again.load_state_dict(state)
        found[f"{engine} state"] = (again.state_dict(), state)
        again.close()
        noise.close()
        hooks = [run.optimizer._optimizer_step_pre_hooks, run.optimizer._optimizer_step_post_hooks]
        hooks += [m._forward_hooks for m in run.model.modules()] if engine == "ddp" else []
        found[f"{engine} hooks"] = sum(len(one) for one in hooks)
        run._backward(9, False, lambda model, loss: None, None)
        run.optimizer.step()
        found[f"{engine} closed"] = (noise.updates, len(noise._passes._nodes))
    with RankNoiseScale(run.model, run.optimizer) as noise:
        pass
    model = wrap(Net(torch.float64), "ddp", {})
    noise = RankNoiseScale(model, torch.optim.SGD(model.parameters(), lr=0.1))
    twin = copy.deepcopy(model)
    twin.module(torch.ones(2, 5, dtype=torch.float64))["out"].sum().backward()
    found["copy"] = (noise.updates, len(noise._sizes))
    try:
        RankNoiseScale(model, torch.optim.SGD(model.parameters(), lr=0.1), decay=0.9 + dist.get_rank() / 100)
    except DistributedError as error:
        found["disagreement"] = str(error)
    found["hooks after it"] = len(model._forward_hooks)
    alone = [dist.new_group([rank]) for rank in range(dist.get_world_size())][dist.get_rank()]
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        found["alone"] = Run("ddp", options={"process_group": alone}, sizes=ONE).noise.skipped
        several = Run("ddp", options={"process_group": alone}, sizes=RAGGED)
    found["alone told"] = [str(one.message) for one in told if "one batch size" in str(one.message)]
    found["alone several"] = several.noise.updates
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        unknown = Run("ddp", noise={"samples": lambda: 0 if dist.get_rank() == 0 else 4})
    found["unknown"] = (unknown.noise.skipped, unknown.noise.updates, len(told))
    return found


def known_noise(steps: int = 40, runs: int = 40) -> dict[str, list[Any]]:
    """A loss that is linear in the weights: each sample's gradient is its input, whatever the weights are."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    mean = torch.tensor([0.6, -0.4, 0.3, 0.0, 0.2], dtype=torch.float64)
    model = DistributedDataParallel(nn.Linear(5, 1, bias=False).double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    noise = RankNoiseScale(model, optimizer, decay=0.98)
    fresh = RunningNoiseScale(0.98).state_dict()
    found: dict[str, list[Any]] = {"value": [], "gradient_square": [], "trace": []}
    size = 2 + 2 * dist.get_rank()
    for _ in range(runs):
        noise.load_state_dict(fresh)
        for _ in range(steps):
            for micro in range(2):
                with model.no_sync() if micro == 0 else nullcontext():
                    x = mean + torch.rand(size + micro, 5, generator=generator, dtype=torch.float64) * 12**0.5 - 3**0.5
                    (model(x).mean() / 2).backward()
            optimizer.step()
            optimizer.zero_grad()
        for name, kept in found.items():
            estimate = getattr(noise, name)
            kept.append((estimate.value, estimate.standard_error, *estimate.interval()))
    return found
