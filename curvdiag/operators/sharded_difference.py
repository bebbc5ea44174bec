"""Finite differences of weights that are spread over ranks: gradients by the engine that shards them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvdiag.data import Batch
from curvdiag.distributed.boxes import local
from curvdiag.distributed.sharded_gradient import ShardedGradient, moved
from curvdiag.distributed.sharded_model import REMAINING, ShardedModel
from curvdiag.distributed.shards import Shards
from curvdiag.errors import LossError, SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators.finite_difference import FiniteDifferenceEngine
from curvdiag.operators.second_derivative import compare_products
from curvdiag.weights import Weights


class ShardedDifferences(FiniteDifferenceEngine):
    """The same differences on this rank's shards, which are moved where they lie and copied back.

    Vectors hold this rank's numbers, and no rank holds more of them. All ranks multiply together.

    Raises:
        SecondDerivativeError: The differences are not accurate, or the engine computes in less than float32.
        LossError: The engine's gradient is not the slope of the loss.
        RankLostError: Another rank failed within a pass, or is gone; after the timeout of the process group, since
            this one waits for it in the middle of the engine's own exchanges.
    """

    remedies = (f"use a smooth activation, or {REMAINING}", f"train in float64, or {REMAINING}")

    def __init__(
        self, objective: Objective, model: ShardedModel, weights: Weights, pieces: list[Batch], rtol: float
    ) -> None:
        self.objective, self.weights, self.dtype, self.pieces = objective, weights, None, pieces
        self.model, self.rtol, self.error = model, rtol, 0.0
        self.precision = max(torch.finfo(p.dtype).eps for p in weights.chosen)
        coarse = next((p.dtype for p in weights.chosen if p.dtype not in (torch.float32, torch.float64)), None)
        if coarse is not None:
            raise SecondDerivativeError(
                f"finite differences need weights in float32 or float64, and the sharded ones are {coarse}: {REMAINING}"
            )
        self.gradient = ShardedGradient(objective, model, pieces)
        self.shards, self.device = self.gradient.shards, self.gradient.device
        self._layouts = {tuple(range(len(weights.chosen))): self.shards}
        self.squares = self._squares([local(p) for p in weights.chosen])
        self.refuse_kinks()
        if not objective.__dict__.get("_slope_is_right"):
            self.check_slope()
            objective.__dict__["_slope_is_right"] = True
        self.check(range(len(weights.chosen)))

    def check(self, positions: Sequence[int]) -> None:
        self.layout(positions)
        super().check(positions)

    def layout(self, positions: Sequence[int]) -> Shards:
        """Where the shards of some of the parameters lie in vectors of their own; new ones by all ranks together."""
        key = tuple(positions)
        if key not in self._layouts:
            self._layouts[key] = self.shards.subset(positions)
        return self._layouts[key]

    def multiply(self, rows: Tensor, positions: Sequence[int]) -> Tensor:
        some = self.layout(positions)
        products = torch.empty_like(rows)
        for row, product in zip(rows, products, strict=True):
            full = row.new_zeros(self.shards.space.local)
            for i, own in zip(positions, some.parts(row), strict=True):
                self.shards.parts(full)[i].copy_(own)
            full = self.product(full)
            for i, own in zip(positions, some.parts(product), strict=True):
                own.copy_(self.shards.parts(full)[i])
        return products

    def check_symmetry(self, rtol: float) -> bool:
        """As :func:`curvdiag.operators.second_derivative.check_symmetry`, of vectors on shards."""

        def dot_and_norm(x: Tensor, y: Tensor) -> tuple[float, float]:
            return float(self.shards.space.dots(x[None], y[None])), self._length(y)

        return compare_products(self._random(1), self._random(2), self.product, dot_and_norm, rtol)

    def check_slope(self) -> None:
        """Compare the gradient's length with the slope of the loss along it, which knows nothing of how it is averaged.

        Nothing is said where the loss is rounded too coarsely to tell.

        Raises:
            LossError: They differ.
        """
        ratio = 1.0
        with self.gradient.borrowed() as live:
            along, loss = self.gradient.at(live)
            self.gradient.refuse_infinite(loss)
            reach, length = self._reach_and_length(along)
            if not 0 < length < float("inf"):
                return
            shards, shifts = [local(p) for p in live], self.shards.parts(along)
            kept = [shard.clone() for shard in shards]
            for fraction in (1.0, 1 / 8, 1 / 64):  # a long step bends, a short one is rounded
                h = fraction * self.precision ** (1 / 3) * reach / length
                with moved(shards, kept, shifts, h):
                    ahead = self.gradient.value()
                with moved(shards, kept, shifts, -h):
                    behind = self.gradient.value()
                rise = 2 * h * length**2
                ratio = (ahead - behind) / rise
                if abs(ratio - 1) <= 0.2 + 100 * self.precision * max(abs(ahead), abs(behind)) / rise:
                    return
        raise LossError(
            f"the loss rises {ratio:.3g} times as steeply as the gradient of its sharded weights says: gradients are "
            "summed or averaged otherwise than over the ranks of group=, or the loss differs between ranks that share "
            f"one batch; give as group= the ranks whose data differ, such as mesh['dp'].get_group(), or {REMAINING}"
        )

    def random_vector(self) -> Tensor:
        return self._random(0)

    @property
    def reached(self) -> list[bool]:
        with self.gradient.borrowed() as live:
            self.gradient.loss(backward=True)
            return [p.grad is not None for p in live]

    def _random(self, seed: int) -> Tensor:
        return self.shards.space.gaussian(1, seed=seed, dtype=self.objective.dtype, device=self.device)[0]

    def _squares(self, parts: Sequence[Tensor]) -> Tensor:
        return self.shards.squares(parts)

    def _length(self, vector: Tensor) -> float:
        return float(self.shards.space.dots(vector[None], vector[None]).sqrt())

    def _reach_and_length(self, vector: Tensor) -> tuple[float, float]:
        shares = self._squares(self.shards.parts(vector))
        return self._reach(shares), float(shares.sum().sqrt())

    def _inside(self, positions: Sequence[int]) -> Tensor:
        inside = torch.zeros(self.shards.space.local, dtype=self.objective.dtype, device=self.device)
        for i in positions:
            self.shards.parts(inside)[i].fill_(1.0)
        return inside

    def _change(self, vector: Tensor, h: float) -> Tensor:
        with self.gradient.borrowed() as live:
            shards, shifts = [local(p) for p in live], self.shards.parts(vector)
            kept = [shard.clone() for shard in shards]
            with moved(shards, kept, shifts, h):
                change, ahead = self.gradient.at(live)
            with moved(shards, kept, shifts, -h):
                there, behind = self.gradient.at(live)
        self.gradient.refuse_infinite(ahead + behind)
        return change.sub_(there)

    def _jumps(self) -> list[str]:
        with self.model.ranks.together("search for kinks"):
            own = super()._jumps()
        return sorted({name for found in self.model.ranks.gather(own, "kinks") for name in found})

    def _loss(self) -> Any:
        with self.gradient.borrowed():
            return self.objective.totals(self.pieces[0]).sum()
