"""What a run of the benchmark was asked for, and the one net that several parts measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from measure import relative
from nets import Batches, gradient, product_by_differences
from peers import Peer, peers
from torch import Tensor, nn

from curvdiag import Hessian, Objective

# Two single-precision products of the same matrix, summed in different orders.
AGREEMENT = 1e-4


@dataclass(frozen=True)
class Settings:
    """What was asked for.

    Attributes:
        quick: Only to see that it runs.
        rounds: Turns of each product.
        slq_rounds: Turns of each peer's density.
        pairs: Training runs with the monitor.
        seconds: Length of each.
        long: Also what takes minutes more.
        device: Of the GPU part; ``"cpu"`` runs the same code with tiny nets, for tests.
        nets: Only these, in parts that measure several; all if empty.
        tell: Says what is being done.
    """

    quick: bool = False
    rounds: int = 5
    slq_rounds: int = 2
    pairs: int = 3
    seconds: float = 20.0
    long: bool = False
    device: str = "cuda"
    nets: list[str] = field(default_factory=list)
    tell: Callable[[str], None] = field(default=print, compare=False)


class Subject:
    """One net with what is measured on it; operators and peers are made where a part first asks for them."""

    def __init__(self, name: str, make: Callable[[], tuple[nn.Module, Batches]], *, quick: bool) -> None:
        torch.manual_seed(0)
        self.name, self.quick = name, quick
        self.model, self.batches = make()
        self.model.eval()
        self.objective = Objective(self.model, nn.CrossEntropyLoss(), batches=self.batches)
        self.vector = torch.randn(self.objective.parameters.size)
        self.vector /= self.vector.norm()

    def unit(self) -> None:
        """One gradient, as the user would take it."""
        gradient(self.model, self.batches)

    @cached_property
    def kept(self) -> Hessian:
        return Hessian(self.objective)

    @cached_property
    def rebuilt(self) -> Hessian:
        return Hessian(self.objective, memory=0)

    @cached_property
    def peers(self) -> list[Peer]:
        return peers(self.model, self.batches, quick=self.quick)

    @cached_property
    def product(self) -> Tensor:
        """Ours, which all others are compared with."""
        return self.kept @ self.vector

    @cached_property
    def theirs(self) -> dict[str, Tensor]:
        """The same product from each peer."""
        return {peer.name: peer.flat(peer.multiply(peer.prepare(self.vector))) for peer in self.peers}

    @cached_property
    def referee(self) -> Tensor:
        """Where two disagree, a third that shares no code with either says who is right."""
        return product_by_differences(self.model, self.batches, self.vector)

    def agrees(self, name: str) -> bool:
        return relative(self.theirs[name], self.product) <= AGREEMENT

    def difference(self, name: str) -> str:
        """How far a peer's product is from ours, in words."""
        other = self.theirs[name]
        text = differs(other, self.product)
        if self.agrees(name):
            return text
        return (
            f"void: {text}; from central differences in float64, curvdiag's differs by "
            f"{relative(self.product, self.referee):.0e}, its own by {relative(other, self.referee):.0e}"
        )

    def verdict(self, name: str, holds: bool) -> bool | None:
        """``holds``; None where the peer computes something else, which is no comparison."""
        if self.agrees(name):
            return holds
        return None if relative(self.product, self.referee) <= AGREEMENT else False


def differs(other: Tensor, ours: Tensor) -> str:
    return f"product differs from curvdiag's by {relative(other, ours):.0e}"
