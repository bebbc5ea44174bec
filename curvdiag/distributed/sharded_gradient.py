"""The gradient of an objective whose weights are spread over ranks: what each rank holds of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from curvdiag.data import Batch
from curvdiag.distributed import fsdp
from curvdiag.distributed.boxes import local
from curvdiag.distributed.sharded_model import ShardedModel
from curvdiag.distributed.shards import Shards
from curvdiag.errors import NonFiniteError

if TYPE_CHECKING:
    from curvdiag.objective import Objective


class ShardedGradient:
    """Gradients by the engine that shards the weights; made and used by all ranks together.

    Every rank makes as many passes as the one with most batches: one with fewer repeats its last, at no weight.

    Args:
        pieces: This rank's batches.

    Attributes:
        shards: How this rank's numbers lie in vectors.
        device: Where they are.
    """

    def __init__(self, objective: Objective, model: ShardedModel, pieces: Sequence[Batch]) -> None:
        self.objective, self.model, self.pieces = objective, model, pieces
        self.rounds = max(model.ranks.gather(len(pieces), "counting of batches"))
        self.names = objective.parameters.names
        live = model.live(self.names)
        self.shards = Shards(self.names, live, model.ranks)
        self.device = local(live[0]).device
        self.buffers = model.buffers()

    @contextmanager
    def borrowed(self) -> Iterator[list[nn.Parameter]]:
        """The parameters, in a model that is ready for :meth:`at`, and afterwards as it was."""
        live = self.model.live(self.names)
        with self.model.borrowed(self.objective.mode, live, self.buffers):
            yield live

    def here(self) -> Tensor:
        """The gradient ``[local]`` at the model's present weights."""
        with self.borrowed() as live:
            gradient, loss = self.at(live)
        self.refuse_infinite(loss)
        return gradient

    def at(self, live: Sequence[nn.Parameter]) -> tuple[Tensor, Tensor]:
        """The gradient ``[local]`` where the parameters are now, and this rank's share of the loss."""
        loss = self.loss(backward=True)
        divisors, unsummed = self.model.divisors(), []
        vector = torch.zeros(self.shards.space.local, dtype=self.objective.dtype, device=self.device)
        for part, p in zip(self.shards.parts(vector), live, strict=True):
            if p.grad is not None:
                part.copy_(local(_placed_as(p, p.grad)))
                p.grad = None
            if id(p) in divisors:
                part.mul_(divisors[id(p)])
            else:
                unsummed.append(part)
        if unsummed and not self.model.data.alone:  # weights that no engine averages
            flat = torch.cat([part.reshape(-1) for part in unsummed])
            self.model.data.complete_(flat, "gradients of weights that are not sharded")
            for part, total in zip(unsummed, flat.split([part.numel() for part in unsummed]), strict=True):
                part.copy_(total.view_as(part))
        return vector, loss

    def loss(self, *, backward: bool) -> Tensor:
        """This rank's share of the loss, in float64; with ``backward``, gradients are then in ``.grad``."""
        fsdp.reshard(self.model.model)  # what was gathered before the shards moved is not to be used again
        found = torch.zeros((), dtype=torch.float64, device=self.objective.device)
        for index in range(self.rounds):
            own = index < len(self.pieces)
            loss = self.objective.totals(self.pieces[index if own else -1]).sum() / self.objective.total_weight
            if fsdp.is_sharded(loss):
                loss = loss.full_tensor()  # type: ignore[attr-defined]
            if own:
                found += loss.detach().double()
            if backward and loss.requires_grad:
                (loss if own else loss * 0.0).backward()
        return found

    def value(self) -> float:
        """The loss over all ranks, where the parameters are now; without gradients."""
        with torch.no_grad():
            return self.model.data.total(float(self.loss(backward=False)))

    def refuse_infinite(self, loss: Tensor) -> None:
        """Refuse a loss that is NaN or infinite on some rank; called by all, of which none goes on alone.

        Raises:
            NonFiniteError: This rank's share of the loss is NaN or infinite.
            RankFailedError: Another rank's is.
        """
        with self.model.ranks.together("loss of sharded weights"):
            if not bool(torch.isfinite(loss)):
                raise NonFiniteError(f"the loss on this rank's batches is {float(loss)}; there is no curvature here")


@contextmanager
def moved(shards: Sequence[Tensor], kept: Sequence[Tensor], shifts: Sequence[Tensor], step: float) -> Iterator[None]:
    """``shards`` at ``kept + step * shifts``, and afterwards at ``kept`` again, bit for bit."""
    try:
        with torch.no_grad():
            for shard, own, shift in zip(shards, kept, shifts, strict=True):
                shard.copy_(own + step * shift.to(own.dtype))
        yield
    finally:
        with torch.no_grad():
            for shard, own in zip(shards, kept, strict=True):
                shard.copy_(own)


def _placed_as(parameter: Any, grad: Any) -> Tensor:
    """A gradient with the placements of its parameter."""
    if not fsdp.is_sharded(grad) or grad.placements == parameter.placements:
        return grad
    return grad.redistribute(placements=parameter.placements)
