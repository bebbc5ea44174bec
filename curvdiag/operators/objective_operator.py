"""What all operators of an objective have in common: a picture of its weights, blocks, costs."""

from __future__ import annotations

import abc
import copy
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.distributed.traffic import Collectives, CollectiveTraffic
from curvdiag.errors import ArgumentError, StaleWeightsError
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost, SymmetricOperator
from curvdiag.operators.batched import Batched
from curvdiag.operators.blocks import Blocks
from curvdiag.operators.finite_difference import FiniteDifferenceEngine
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.plan import Plan
from curvdiag.operators.precision import (
    Multiplication,
    Precision,
    check_precision,
    product_error,
    random_row,
    true_products,
)
from curvdiag.operators.sharded_difference import ShardedDifferences
from curvdiag.parameters import Selection
from curvdiag.space import Space, WholeSpace
from curvdiag.space.inner_products import row_dots
from curvdiag.weights import Weights


class ObjectiveOperator(SymmetricOperator):
    """A symmetric matrix over an objective's parameters, at the weights that it had when the operator was made.

    With ``graphs``, another such matrix whose graphs it works on, these are the weights of that one.

    Where several ranks hold the data, each multiplies with the share of the matrix that is of its own samples, and a
    product with ``k`` vectors is the sum of these: one all-reduce of ``[k, P]``. All of them call it, with the same
    vectors.

    Attributes:
        precision: What products are computed in.
        precision_error: Relative error that this makes in a product, as measured on the whole matrix; None in full
            precision.
    """

    _engine: GraphEngine[Any] | FiniteDifferenceEngine
    _weights: Weights
    _fingerprint: Tensor | None

    def __init__(
        self,
        objective: Objective,
        dtype: torch.dtype | None,
        share: bool,
        memory: int | None,
        graphs: ObjectiveOperator | None = None,
        precision: Precision = "full",
    ) -> None:
        if share and dtype is not None:
            raise ArgumentError("share=True works on the model's own weights and cannot change their dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise ArgumentError(f"dtype is a real floating-point type, not {dtype}")
        if memory is not None and memory < 0:
            raise ArgumentError(f"memory is a number of bytes, not {memory}")
        self.objective = objective
        self.parameters = objective.parameters
        self.dtype = graphs.dtype if graphs is not None else dtype or objective.dtype
        self.device = objective.device
        self.size = self.parameters.size
        self._positions: Sequence[int] = range(len(self.parameters))
        self.precision: Precision = precision
        self.precision_error: float | None = None
        check_precision(precision, self.device, self.dtype, share=share)
        self._compare = not objective.ranks.alone  # the vectors of the first product of an algorithm
        if graphs is None:
            self._weights = self._picture(dtype, share)
            self._fingerprint = _fingerprint(self._live()) if share or objective.sharded else None
        else:
            self._weights, self._fingerprint = graphs._weights, graphs._fingerprint

    def _picture(self, dtype: torch.dtype | None, share: bool) -> Weights:
        """The weights that it is about."""
        return self.objective.weights(dtype=dtype, share=share)

    @property
    def space(self) -> Space:
        if isinstance(self._engine, ShardedDifferences):
            return self._engine.layout(self._positions).space
        return WholeSpace(self.size, self.objective.ranks)

    @abc.abstractmethod
    def _multiply(self, rows: Tensor) -> Tensor:
        """Products of rows ``[k, P]`` with this process's share of the matrix, not yet counted."""

    def _multiply_blocks(self, rows: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Products of its share of the diagonal blocks over the parameters at ``positions``, not yet counted."""
        return self._engine.multiply_blocks(rows, positions)

    def _whole(self, rows: Tensor) -> Tensor:
        """Products with the whole matrix: the sum of all ranks' shares."""
        if self.objective.sharded:  # whose engine has summed them
            with self.objective.holders.together(f"product of {len(rows)} vectors"):
                return self._multiply(rows)
        signature = (lambda: _signature(rows, self._positions, self._weights.names)) if self._compare else None
        products = self.objective.ranks.sum(f"product of {len(rows)} vectors", lambda: self._multiply(rows), signature)
        self._compare = False
        return products

    def _forms(self, rows: Tensor) -> Tensor:
        """``v^T M v`` ``[k]`` of rows ``[k, P]`` with this process's share of the matrix, not yet counted."""
        return row_dots(rows, self._multiply(rows))

    def _whole_forms(self, rows: Tensor) -> Tensor:
        """Quadratic forms of the whole matrix: the sum of all ranks' shares, ``k`` numbers."""
        if self.objective.sharded:
            return self.space.dots(rows, self._whole(rows))
        signature = (lambda: _signature(rows, self._positions, self._weights.names)) if self._compare else None
        forms = self.objective.ranks.sum(
            f"quadratic forms of {len(rows)} vectors", lambda: self._forms(rows), signature
        )
        self._compare = False
        return forms

    def _whole_blocks(self, rows: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        """Products with the whole diagonal blocks, all in one reduction."""
        ranks = self.objective.ranks
        if self.objective.sharded:
            with self.objective.holders.together(f"products of vectors of {len(rows)} blocks"):
                return self._multiply_blocks(rows, positions)
        if ranks.alone:
            return self._multiply_blocks(rows, positions)

        def flat() -> Tensor:
            return torch.cat([part.reshape(-1) for part in self._multiply_blocks(rows, positions)])

        shapes, place = [part.shape for part in rows], f"products of vectors of {len(rows)} blocks"
        about = zlib.crc32(repr((shapes, [list(inside) for inside in positions])).encode())
        parts = ranks.sum(place, flat, lambda: about).split([shape.numel() for shape in shapes])
        return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]

    def _set_engine(
        self,
        build: Callable[..., Any],
        dtype: torch.dtype | None,
        memory: int | None,
        micro_batch: int | None,
        batched: Batched = "auto",
    ) -> None:
        """The engine of graphs, in the wanted precision; anything less than full is compared with that once."""

        def engine(
            weights: Weights, dtype: torch.dtype | None, memory: int | None, kind: Multiplication | None = None
        ) -> GraphEngine[Any]:
            return GraphEngine(self.objective, weights, dtype, memory, micro_batch, build, batched, kind)

        if self.precision == "full":
            self._engine = engine(self._weights, dtype, memory)
            return
        # Full precision comes first, since it is what can tell a wrong derivative from rounding.
        full = copy.copy(self)
        full._engine = engine(self._weights, dtype, 0, "ieee")
        pairs = true_products(full._whole, random_row(self.size, self.device, self.dtype))
        if self.precision == "tf32":
            self._engine = engine(self._weights, dtype, memory, "tf32")
        else:
            self._weights = self._weights.rounded(torch.bfloat16)
            self._engine = engine(self._weights, torch.bfloat16, memory)
        self.precision_error = product_error(self._whole, pairs)

    def _precision_note(self) -> str:
        error = self.precision_error
        return "" if error is None else f", products in {self.precision} with an error of {error:.2g}"

    @collectively
    def __matmul__(self, other: Tensor) -> Tensor:
        return super().__matmul__(other)

    def apply(self, rows: Tensor) -> Tensor:
        return self._counted(self._whole, rows)

    @collectively
    def quadratic_form(self, vectors: Tensor) -> Tensor:
        return super().quadratic_form(vectors)

    def forms(self, rows: Tensor) -> Tensor:
        return self._counted(self._whole_forms, rows)

    def _counted(self, function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        started, before = time.perf_counter(), self._engine.graphs_built
        found = function(rows)
        self.cost.matvecs += len(rows)
        self.cost.graphs += self._engine.graphs_built - before
        self.cost.seconds += time.perf_counter() - started
        return found

    @collectively
    def traffic(self) -> CollectiveTraffic:
        """What the ranks exchange for one product, counted in one; all ranks call it together."""
        row = self.space.rademacher(1, seed=0, dtype=self.dtype, device=self.device)
        self.refresh()
        with Collectives() as collectives:
            self.apply(row)
        return collectives.traffic()

    def refresh(self) -> None:
        self._compare = not self.objective.ranks.alone
        if self._fingerprint is None:
            return
        with self.objective.holders.together("comparison of weights"):
            if not torch.equal(self._fingerprint, _fingerprint(self._live())):
                made = "of sharded weights" if self.objective.sharded else "with share=True"
                copy = "" if self.objective.sharded else ", or leave share out so that it keeps a copy"
                raise StaleWeightsError(
                    f"the model's weights changed since this operator was made {made}: make a new one{copy}"
                )

    def _live(self) -> list[Tensor]:
        if self.objective.shards is not None:
            return self.objective.shards.own_tensors()
        model = self.objective.model
        return [t.detach() for t in (*model.parameters(), *model.buffers())]

    @collectively
    def block(self, selection: Selection) -> Self:
        """The diagonal block over some of the parameters, on the same graphs; its products cost less.

        Raises:
            ParameterError: The selection matches nothing.
            SecondDerivativeError: Finite differences are not accurate on the block.
        """
        inside = self.parameters.select(selection, [self._weights.chosen[i] for i in self._positions])
        block = copy.copy(self)
        block._positions = [self._positions[i] for i in inside]
        block.parameters = self.parameters.subset(inside)
        block.size = block.parameters.size
        block.cost = Cost()
        if isinstance(self._engine, FiniteDifferenceEngine):
            self._engine.check(block._positions)
        return block

    @collectively
    def blocks(self, layers: Mapping[str, Selection] | None = None) -> Blocks:
        """Several diagonal blocks by name, multiplied together; by default one for each layer.

        Raises:
            ArgumentError: There is no layer, or they have no names.
            ParameterError: A selection matches nothing.
            SecondDerivativeError: Finite differences are not accurate on a block.
        """
        if layers is not None and not isinstance(layers, Mapping):
            raise ArgumentError(f"layers are given by name, as {{name: selection of parameters}}, not as {layers!r}")
        if layers is None:
            layers = {name: _named(inside) for name, inside in self.parameters.layers().items()}
        return Blocks(self, {name: self.block(selection) for name, selection in layers.items()})

    @property
    def plan(self) -> Plan | None:
        """How the data are laid out in graphs; None for finite differences."""
        return self._engine.plan

    @property
    def unreached(self) -> list[str]:
        """Names of parameters that the loss does not depend on; their rows are zero."""
        ranks = self.objective.holders
        with ranks.together("search for parameters without influence"):
            self._engine.visit()
            reached = [bool(one) for one in self._engine.reached]
        anywhere = [any(each) for each in zip(*ranks.gather(reached), strict=True)]
        return [self._weights.names[i] for i in self._positions if not anywhere[i]]


def _named(names: Sequence[str]) -> Selection:
    """Exactly these parameters; as globs, names with brackets in them would match others or nothing."""
    wanted = frozenset(names)
    return lambda name, _: name in wanted


def _signature(rows: Tensor, positions: Sequence[int], names: Sequence[str]) -> int:
    """A number that differs where vectors do, in entries evenly spread over them, or what they are vectors of."""
    some = rows[:, :: max(1, -(-rows.shape[1] // COMPARED))].contiguous()
    about = zlib.crc32(repr([names[i] for i in positions]).encode())
    return zlib.crc32(some.view(torch.uint8).cpu().numpy().tobytes(), about)


COMPARED = 4096
"""Entries of each vector of an algorithm's first product that ranks compare."""


def _fingerprint(tensors: list[Tensor]) -> Tensor:
    """Numbers that change whenever any weight does, short of a conspiracy: sums of values and of squares."""
    real = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double() for t in tensors if t.numel()]
    if not real:
        return torch.zeros(0)
    ramps = [torch.arange(1, t.numel() + 1, device=t.device, dtype=torch.float64) for t in real]
    sums = [torch.stack([t.sum(), t.square().sum(), t.flatten() @ r]) for t, r in zip(real, ramps, strict=True)]
    return torch.stack(sums)
