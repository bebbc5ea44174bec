"""Training under DDP and FSDP2 with a RankNoiseScale, and the same numbers from gradients taken one by one."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from curvdiag.noise import RankNoiseScale, RunningNoiseScale

Sizes = Callable[[int, int], list[int]]

ONE: Sizes = lambda rank, step: [4]  # noqa: E731
RAGGED: Sizes = lambda rank, step: [2 + rank, 3, 1 + (step + rank) % 3]  # noqa: E731


class Net(nn.Module):
    """Three layers; the second may be left out on some batches, and the last weight is used by no forward pass."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.last = nn.Linear(5, 7), nn.Linear(7, 7), nn.Linear(7, 3)
        self.to(dtype)

    def forward(self, x: Tensor, skip: bool = False) -> dict[str, Tensor]:
        x = torch.tanh(self.first(x))
        return {"out": self.last(x if skip else torch.tanh(self.second(x)))}


def batch(rank: int, step: int, micro: int, size: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + 100 * micro + rank)
    return torch.randn(size, 5, generator=generator).to(dtype), torch.randint(3, (size,), generator=generator)


def wrap(model: nn.Module, engine: str, options: dict[str, Any]) -> nn.Module:
    if engine == "ddp":
        return DistributedDataParallel(model, **options)
    for layer in (model.first, model.second, model.last):
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def reducing(model: nn.Module, last: bool) -> Any:
    if isinstance(model, DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    model.set_requires_gradient_sync(last)
    return nullcontext()


def full(parameter: Tensor) -> Tensor:
    tensor = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
    return tensor.detach().clone()


def weights(model: nn.Module) -> list[Tensor]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return [full(p) for p in inner.parameters()]


class Run:
    """Some steps of training; ``self.expected`` is what the noise scale should have found.

    Args:
        watch: Whether a RankNoiseScale listens.
        sizes: Samples of the micro-batches of a rank in a step.
        weigh: What a micro-batch's mean loss is multiplied by: ``(size, sizes of this rank, of all ranks) -> c``.
        accumulation: Of the RankNoiseScale, to go with it.
        every: Whether each micro-batch is reduced, not only the last.
        skip: Whether a rank leaves out the second layer.
        frozen: Names of parameters that are not trained.
        aside: Names of parameters that get gradients and belong to no optimizer.
        thawed: Names of parameters that the optimizer has, and that are trained from the second step on.
    """

    def __init__(
        self,
        engine: str,
        *,
        watch: bool = True,
        steps: int = 3,
        sizes: Sizes = ONE,
        weigh: Callable[..., float] = lambda size, own, everyone: 1 / len(own),
        dtype: torch.dtype = torch.float64,
        optimizer: str = "sgd",
        options: dict[str, Any] | None = None,
        prepare: Callable[[nn.Module], None] = lambda model: None,
        frozen: tuple[str, ...] = (),
        aside: tuple[str, ...] = (),
        thawed: tuple[str, ...] = (),
        skip: Callable[[int], bool] = lambda rank: False,
        every: bool = False,
        to_none: bool = True,
        before_step: Callable[[nn.Module], None] = lambda model: None,
        between: Callable[[nn.Module, Tensor], None] = lambda model, loss: None,
        closure: bool = False,
        scaler: Any = None,
        poison: tuple[int, ...] = (),
        noise: dict[str, Any] | None = None,
    ) -> None:
        self.rank, self.world = dist.get_rank(), dist.get_world_size()
        self.sizes, self.weigh, self.skip, self.dtype, self.poison = sizes, weigh, skip, dtype, poison
        plain = Net(dtype)
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name not in frozen + thawed)
        self.left_out, self.thawed = frozen + aside, thawed
        self.model = wrap(plain, engine, options or {})
        prepare(self.model)
        inner = getattr(self.model, "module", self.model)
        chosen = [p for name, p in inner.named_parameters() if name not in self.left_out]
        groups = [{"params": chosen[:1], "lr": 0.05}, {"params": chosen[1:]}]
        self.optimizer = {
            "sgd": lambda: torch.optim.SGD(groups, lr=0.1, momentum=0.9),
            "adamw": lambda: torch.optim.AdamW(groups, lr=0.01),
        }[optimizer]()
        self.noise = RankNoiseScale(self.model, self.optimizer, **(noise or {})) if watch else None
        self.expected = RunningNoiseScale()
        self.left_out += thawed
        self.values: list[Any] = []
        for step in range(steps):
            self._step(step, every, to_none, before_step, between, closure, scaler)
        self.weights = weights(self.model)

    def _step(self, step, every, to_none, before_step, between, closure, scaler) -> None:
        if self.noise is not None:
            self._expect(step)
        if closure:
            self.optimizer.step(lambda: self._backward(step, every, between, scaler))
        else:
            self._backward(step, every, between, scaler)
            before_step(self.model)
            if scaler is None:
                self.optimizer.step()
            else:
                scaler.step(self.optimizer)
                scaler.update()
        if self.noise is not None:
            self.values.append((self.noise.value.value, self.noise.updates, self.noise.skipped))
        self.optimizer.zero_grad(set_to_none=to_none)
        if self.thawed and step == 0:
            self.left_out = tuple(name for name in self.left_out if name not in self.thawed)
            for name, parameter in self.model.named_parameters():
                parameter.requires_grad_(name not in self.left_out)

    def _everyone(self, step: int) -> list[list[int]]:
        return [self.sizes(rank, step) for rank in range(self.world)]

    def _batches(self, step: int) -> list[tuple[float, tuple[Tensor, Tensor]]]:
        everyone = self._everyone(step)
        own = everyone[self.rank]
        found = []
        for micro, size in enumerate(own):
            x, y = batch(self.rank, step, micro, size, self.dtype)
            if step in self.poison and self.rank == 0 and micro == 0:
                x = x * float("inf")
            found.append((self.weigh(size, own, everyone), (x, y)))
        return found

    def _backward(self, step, every, between, scaler) -> Tensor:
        batches = self._batches(step)
        for micro, (c, (x, y)) in enumerate(batches):
            with reducing(self.model, every or micro == len(batches) - 1):
                loss = c * F.cross_entropy(self.model(x, skip=self.skip(self.rank))["out"], y)
                between(self.model, loss)
                (loss if scaler is None else scaler.scale(loss)).backward()
        return loss

    def _expect(self, step: int) -> None:
        """From one backward pass a micro-batch on a model that no engine knows."""
        plain = Net(self.dtype)
        for p, value in zip(plain.parameters(), weights(self.model), strict=True):
            p.data = value
        trained = [p for name, p in plain.named_parameters() if name not in self.left_out]
        found = []
        for c, (x, y) in self._batches(step):
            loss = F.cross_entropy(plain(x, skip=self.skip(self.rank))["out"], y)
            grads = torch.autograd.grad(loss, trained, allow_unused=True, materialize_grads=True)
            found.append((c, len(y), torch.cat([g.flatten() for g in grads])))
        ranks: list[Any] = [None] * self.world
        dist.all_gather_object(ranks, found)
        everything = [one for rank in ranks for one in rank]
        shares = [c / self.world for c, _, _ in everything]
        large = sum(a * g for a, (_, _, g) in zip(shares, everything, strict=True))
        whole, spread = sum(shares), sum(a * a / b for a, (_, b, _) in zip(shares, everything, strict=True))
        small = sum(float(g @ g) for _, _, g in everything) / len(everything)
        inverse = sum(1 / b for _, b, _ in everything) / len(everything)
        self.expected.update(small, float(large @ large) / whole**2, 1 / inverse, whole**2 / spread)

    def found(self) -> dict[str, Any]:
        """What a test compares: found and expected, and whether all hooks go."""
        assert self.noise is not None
        both = {}
        for name, one in (("found", self.noise), ("expected", self.expected)):
            both[name] = [one.value.value, one.value.standard_error, one.gradient_square.value, one.trace.value]
        return {**both, "updates": self.noise.updates, "skipped": self.noise.skipped, "values": self.values}


def same_training(engine: str, **options: Any) -> bool:
    """Whether training ends with the same bits with a RankNoiseScale and without, having moved."""
    without, watched = Run(engine, watch=False, **options), Run(engine, **options)
    start = [full(p) for p in Net(options.get("dtype", torch.float64)).parameters()]
    moved = any(not torch.equal(a, b) for a, b in zip(start, watched.weights, strict=True))
    assert moved
    assert watched.noise is not None
    assert watched.noise.updates > 0
    return all(torch.equal(a, b) for a, b in zip(without.weights, watched.weights, strict=True))
