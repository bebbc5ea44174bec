"""A model whose weights are spread over ranks, borrowed for the passes of a measurement and given back as it was.

Nothing is gathered here: the engine that shards the weights (FSDP2, tensor parallelism) runs its own forward and
backward passes, on shards that are moved where they lie.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from curvdiag.data import Batch, tensors_of
from curvdiag.distributed import fsdp
from curvdiag.distributed.boxes import holders, local
from curvdiag.distributed.in_step import in_step
from curvdiag.distributed.ranks import Ranks
from curvdiag.errors import ArgumentError, DistributedError, SecondDerivativeError
from curvdiag.sandbox import sandbox
from curvdiag.weights import buffers_of_first, checksum


def sharded_model(model: nn.Module, data: Ranks) -> ShardedModel | None:
    """The model as one with sharded weights; None where they are whole.

    Args:
        data: The ranks whose data differ.

    Raises:
        ArgumentError: FSDP's first version, or a group that does not fit the engine's.
        SecondDerivativeError: The engine computes in less than float32.
    """
    fsdp.refuse_older(model)
    fsdp.reshard(model)
    return ShardedModel(model, data) if any(map(fsdp.is_sharded, model.parameters())) else None


class ShardedModel:
    """A model with DTensors as parameters.

    Attributes:
        data: The ranks whose data differ.
        ranks: Those that hold the weights together.
        device: Where passes are computed, which under CPU offload is not where the shards are.
    """

    def __init__(self, model: nn.Module, data: Ranks) -> None:
        self.model, self.data = model, data
        _check_group(model, data)
        if (coarse := fsdp.coarse_type(model)) is not None:
            raise SecondDerivativeError(
                f"sharded weights are measured by finite differences, which need passes in float32 or float64, and the "
                f"MixedPrecisionPolicy says {coarse}: call fully_shard with float32 in it, or {REMAINING}"
            )
        shrinking = [name for name, m in model.named_modules() if getattr(m, "max_norm", None) is not None]
        if shrinking:
            raise ArgumentError(
                f"{shrinking[0]!r} has max_norm, which moves its weights during a forward pass, and of sharded weights "
                "no copy is measured: leave max_norm out"
            )
        parameters = list(model.parameters())
        self.ranks = holders(parameters, data)
        kind = next(p for p in parameters if fsdp.is_sharded(p)).device_mesh.device_type  # type: ignore[attr-defined]
        self.device = torch.device(kind) if kind == "cpu" else torch.device(kind, _current(kind))
        self.ranks.agree("weights", checksum([p for p in parameters if not fsdp.is_sharded(p)]), _REMEDY)

    def live(self, names: Sequence[str]) -> list[nn.Parameter]:
        """The parameters, as shards."""
        fsdp.reshard(self.model)
        found = dict(self.model.named_parameters(remove_duplicate=False))
        return [found[name] for name in names]

    def own_tensors(self) -> list[Tensor]:
        """This rank's shards of all parameters, and the buffers."""
        fsdp.reshard(self.model)
        return [local(t) for t in (*self.model.parameters(), *self.model.buffers())]

    def buffers(self) -> dict[str, Tensor]:
        """The first rank's buffers where those of the ranks differ, else none."""
        own = {name: local(buffer) for name, buffer in self.model.named_buffers()}
        return buffers_of_first(own, self.ranks) or {}

    def compare_data(self, batches: Sequence[Batch]) -> None:
        """Ranks that hold the same place among the data's, as those of tensor parallelism do, need the same data.

        Raises:
            DistributedError: They have different data.
        """
        if self.ranks is self.data:
            return
        own = checksum([tensor for batch in batches for tensor in tensors_of(batch)])
        told = self.ranks.gather((self.data.rank, own), "comparison of data")
        different = {place for place, word in told for other, another in told if place == other and word != another}
        if different:
            raise DistributedError(
                "ranks that share the computation of one batch (tensor parallelism) have different data: give them the "
                "same, and as group= those ranks whose data differ, such as mesh['dp'].get_group()"
            )

    def look(self, mode: str, function: Callable[[], object], spare: Callable[[], object]) -> None:
        """``function()``, which makes forward passes without gradients; other ranks make as many.

        Args:
            spare: Makes one, for a rank whose function makes none.
        """
        buffers = self.buffers()
        with (
            self.ranks.together("forward passes"),
            self.borrowed(mode, None, buffers),
            torch.no_grad(),
            in_step(self.model, self.ranks, spare),
        ):
            function()

    def refuse_whole(self) -> ArgumentError:
        """The error for whatever needs whole weights."""
        return ArgumentError(
            f"this needs whole weights, and those of the {type(self.model).__name__} are spread over "
            f"{self.ranks.count} ranks: what remains is Hessian(objective, method='finite-difference') of a "
            f"smooth model, with its spectrum, trace and eigenpairs; for all else {REMAINING}"
        )

    @contextmanager
    def borrowed(self, mode: str, chosen: Sequence[nn.Parameter] | None, buffers: dict[str, Tensor]) -> Iterator[None]:
        """The model in ``mode``, without gradients of its training, and afterwards as it was.

        Args:
            chosen: Those whose gradients are taken; None leaves it as the training has it.
            buffers: What the buffers hold meanwhile.
        """
        with ExitStack() as stack:
            stack.enter_context(fsdp.own_passes(self.model))
            stack.enter_context(sandbox(self.model, mode, self.device, twice=False))
            stack.enter_context(_gradients_aside(list(self.model.parameters()), chosen))
            stack.enter_context(_other_buffers(self.model, buffers))
            yield

    def divisors(self) -> dict[int, float]:
        """By the identity of each parameter: what the engine divides the sum of gradients by, where it takes it."""
        return fsdp.divisors(self.model, self.data.count)


REMAINING = "measure a checkpoint on one device with `curvdiag scan`, or train data-parallel"
"""What remains where sharded weights cannot be measured."""

_REMEDY = "each rank needs the same weights where they are not sharded: those of the first"


@contextmanager
def _gradients_aside(parameters: Sequence[nn.Parameter], chosen: Sequence[nn.Parameter] | None) -> Iterator[None]:
    kept = [(p, p.grad, p.requires_grad) for p in parameters]
    wanted = None if chosen is None else {id(p) for p in chosen}
    # Hooks of the training, such as an optimizer that steps within the backward pass.
    hooks = [h for p in parameters for h in (p._post_accumulate_grad_hooks, p._backward_hooks) if h]
    contents = [dict(one) for one in hooks]
    try:
        for one in hooks:
            one.clear()
        for p in parameters:
            p.grad = None
            if wanted is not None:
                p.requires_grad_(id(p) in wanted)
        yield
    finally:
        for one, content in zip(hooks, contents, strict=True):
            one.update(content)
        for p, grad, needed in kept:
            p.grad = grad
            p.requires_grad_(needed)


@contextmanager
def _other_buffers(model: nn.Module, values: dict[str, Tensor]) -> Iterator[None]:
    """Copies in the place of buffers, with other ``values`` where some are given; the model's own are not touched."""
    with torch.no_grad():
        copies = {id(buffer): buffer.detach().clone() for buffer in model.buffers()}
        for name, buffer in model.named_buffers():
            if name in values:
                local(copies[id(buffer)]).copy_(values[name])
    owners = [(module._buffers, dict(module._buffers)) for module in model.modules() if module._buffers]
    try:
        for now, own in owners:
            now.update({name: None if buffer is None else copies[id(buffer)] for name, buffer in own.items()})
        yield
    finally:
        for now, own in owners:
            now.update(own)


def _check_group(model: nn.Module, data: Ranks) -> None:
    """The ranks whose data differ are those over which the engine averages gradients, and share no batch."""
    given = [] if data.group is None else sorted(dist.get_process_group_ranks(data.group))
    told = "this process alone" if data.group is None else f"ranks {given}"
    remedy = "give as group= the ranks whose data differ: 'world' for all, of a mesh mesh['dp'].get_group()"
    averaged = fsdp.averaged_over(model)
    if averaged is not None and len(averaged) > 1 and given != averaged:
        raise ArgumentError(
            f"the weights are sharded (fully_shard), and gradients averaged over ranks {averaged}, but the data are "
            f"those of {told}: {remedy}"
        )
    unaveraged = [p for p in model.parameters() if id(p) not in fsdp.divisors(model, data.count)]
    for p in filter(fsdp.is_sharded, unaveraged):
        sharing = p.device_mesh.mesh.flatten().tolist()  # type: ignore[attr-defined]
        if len({*sharing} & {*given}) > 1:
            raise ArgumentError(
                f"ranks {sharing} compute one batch together (tensor parallelism), and the data are those of {told}: "
                f"{remedy}, or None where all ranks share them"
            )


def _current(kind: str) -> int:
    module: Any = torch.get_device_module(kind)
    return int(module.current_device())
