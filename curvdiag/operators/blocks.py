"""Diagonal blocks of one matrix, multiplied together during one visit of each of its graphs."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.operators.base import Cost

if TYPE_CHECKING:
    from curvdiag.operators.objective_operator import ObjectiveOperator


class Blocks:
    """Diagonal blocks of an objective's matrix by name; they may overlap, and need not cover it.

    A graph that does not fit into memory is built once for the vectors of all blocks, not once for each block.

    Attributes:
        operators: Each block by itself, whose products made here are counted in its own cost as well.
        sizes: Order of each block.
        cost: What all of them together have done.
    """

    def __init__(self, whole: ObjectiveOperator, operators: Mapping[str, ObjectiveOperator]) -> None:
        if not operators:
            raise ArgumentError("there is no layer: name at least one, as {name: selection of parameters}")
        self._whole, self.operators, self.cost = whole, dict(operators), Cost()
        self.sizes = {name: block.size for name, block in operators.items()}
        self.dtype, self.device = whole.dtype, whole.device

    def __len__(self) -> int:
        return len(self.operators)

    def apply(self, rows: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Products ``[k, P_l]`` of some of the blocks, each with its own contiguous rows ``[k, P_l]``.

        Raises:
            ArgumentError: A name is not that of a block, or rows are not as long as their block.
        """
        for name, part in rows.items():
            if name not in self.operators:
                raise ArgumentError(f"there is no block {name!r}; there are {', '.join(self.operators)}")
            length = self.operators[name].space.local
            if part.ndim != 2 or part.shape[1] != length:
                raise ArgumentError(f"the block {name!r} takes rows [k, {length}], not of shape {tuple(part.shape)}")
        if not rows:
            return {}
        engine, started = self._whole._engine, time.perf_counter()
        before = engine.graphs_built
        with torch.inference_mode(False):
            positions = [self.operators[name]._positions for name in rows]
            products = self._whole._whole_blocks(list(rows.values()), positions)
        for name, part in rows.items():
            self.operators[name].cost.matvecs += len(part)
        self.cost.matvecs += sum(map(len, rows.values()))
        self.cost.graphs += engine.graphs_built - before
        self.cost.seconds += time.perf_counter() - started
        return dict(zip(rows, products, strict=True))

    def refresh(self) -> None:
        """Check, once per algorithm, that the matrix still means what it meant when it was made."""
        self._whole.refresh()
