"""The Hessian of an objective, by exact double backward or by finite differences."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost
from curvdiag.operators.batched import Batched
from curvdiag.operators.finite_difference import FiniteDifferenceEngine
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.operators.precision import Precision
from curvdiag.operators.program import HESSIAN
from curvdiag.operators.second_derivative import check_symmetry
from curvdiag.operators.sharded_difference import ShardedDifferences
from curvdiag.operators.traced_graph import TracedGraphs
from curvdiag.weights import Weights


class Hessian(ObjectiveOperator):
    """``H = (1/N) sum_i w_i hess l_i`` over the objective's parameters, at the weights it has now.

    The operator is a picture: it works on copies of the weights and buffers, so that whatever training does
    afterwards changes nothing in it.

    Args:
        objective: What is differentiated.
        method: ``"exact"`` differentiates the gradient's graph. ``"finite-difference"`` takes central differences
            of gradients, for smooth models without a second derivative; two gradients a product. A model whose
            parameters act through a kink (ReLU, max pooling) is refused, whatever its data. Weights that are
            spread over ranks (``objective.sharded``) are measured by these alone, where they lie: vectors then hold
            this rank's numbers, as :attr:`space` has them, all ranks multiply together, and each time the shards are
            copied back bit for bit.
        dtype: Make the copies in another type (float64 for oracles, float32 for bfloat16 weights).
        share: Work on the model's own weights instead of copies; if they change, the next use raises.
        memory: Bytes that kept graphs may take; half of the free memory by default. What does not fit is
            rebuilt at each product, with ``memory=0`` everything, in graphs of at most an eighth of the free memory.
        micro_batch: Cut batches into pieces of at most so many samples, a graph for each; without it they are merged
            into as few graphs as fit.
        batched: Whether several vectors go through a graph in one backward pass (``vmap``). It is faster on nets of a
            few thousand parameters and slower on large ones. ``"auto"`` decides by size, so that a measurement gives
            the same bits each time; ``"timed"`` by a short timing at the first product of each shape, kept with the
            objective, after which the last bits may differ from run to run; True and False say it. A graph that cannot
            be walked in a batch is walked vector by vector. A batch of 64 takes 64 times the memory of what passes by.
        precision: ``"full"`` computes in the weights' type. ``"tf32"`` (CUDA devices) and ``"bfloat16"`` (on copies of
            the weights) are cheaper where the hardware has units for them; vectors stay in the operator's type. The
            relative error of a product is measured once, on a random vector and on what a power step makes of it,
            and is in ``precision_error``. By Weyl's bound no eigenvalue moves by more than the norm of the error: the
            largest by about that share, while smaller ones than that share of the largest are not to be trusted.
        compile: Trace the product, keep what does not depend on the vector, and compile the rest (the compiler takes
            seconds to minutes, once for each shape of group; the objective keeps the code for its next operators).
            Blocks run the traced operations without compiled code. Each operator compares one product with autograd's
            own; what cannot be traced or compiled, or differs, runs without, with a warning that says why: branches on
            values, forward or backward hooks of the user's, on a CPU no C++ compiler. Model and loss are run once on
            tensors without values; a loss that keeps what it sees in a list of its own then finds such ones there.
        rtol: Largest error of finite differences that is accepted, measured once by halving the step.

    Raises:
        SecondDerivativeError: A second derivative is missing, or finite differences are not accurate or meet kinks.
        NonFiniteError: The loss or its gradient is not finite.
        StaleWeightsError: With ``share=True``, or with sharded weights, the weights changed.
        ArgumentError: The exact product is asked of sharded weights.
        LossError: The gradients of sharded weights are not averaged over the objective's ranks.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """

    @collectively
    def __init__(
        self,
        objective: Objective,
        *,
        method: Literal["exact", "finite-difference"] = "exact",
        dtype: torch.dtype | None = None,
        share: bool = False,
        memory: int | None = None,
        micro_batch: int | None = None,
        batched: Batched = "auto",
        precision: Precision = "full",
        compile: bool = False,
        rtol: float = 0.05,
    ) -> None:
        if not rtol > 0:
            raise ArgumentError(f"rtol is a positive fraction, not {rtol}")
        started = time.perf_counter()
        self.method = method
        super().__init__(objective, dtype, share, memory, precision=precision)
        if method == "exact":
            build = TracedGraphs(HESSIAN) if compile else GradientGraph
            self._set_engine(build, dtype, memory, micro_batch, batched=batched)
        elif method == "finite-difference":
            if precision != "full":
                raise ArgumentError("finite differences lose what precision= rounds off: leave it out")
            if compile:
                raise ArgumentError("compile=True compiles the exact product: leave out method='finite-difference'")
            pieces = list(objective.micro_batches(micro_batch))
            if objective.shards is not None:
                self._engine = engine = ShardedDifferences(objective, objective.shards, self._weights, pieces, rtol)
                self.device = engine.device
                if not objective.__dict__.get("_symmetric"):
                    objective.__dict__["_symmetric"] = engine.check_symmetry(max(rtol, 0.05))
                self.cost = Cost(0, 0, time.perf_counter() - started)
                return
            self._engine = FiniteDifferenceEngine(objective, self._weights, dtype, pieces, rtol)
            if not objective.__dict__.get("_symmetric"):
                seen = check_symmetry(objective, dtype, self._engine.product, max(rtol, 0.05))
                objective.__dict__["_symmetric"] = seen
        else:
            raise ArgumentError(f"method is 'exact' or 'finite-difference', not {method!r}")
        self.cost = Cost(0, self._engine.graphs_built, time.perf_counter() - started)

    def _picture(self, dtype: torch.dtype | None, share: bool) -> Weights:
        shards = self.objective.shards
        if shards is None or self.method != "finite-difference":
            return super()._picture(dtype, share)
        if dtype not in (None, self.objective.dtype):
            raise ArgumentError(
                f"sharded weights are measured where they are, in {self.objective.dtype}: leave dtype out"
            )
        names = self.objective.parameters.names
        return Weights(tuple(shards.live(names)), {}, {}, names)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._engine.multiply(rows, self._positions)

    def _forms(self, rows: Tensor) -> Tensor:
        if isinstance(self._engine, GraphEngine):
            return self._engine.forms(rows, self._positions)
        return super()._forms(rows)

    def __repr__(self) -> str:
        plan = self.plan or "two gradients a product"
        return f"Hessian({self.size:,} parameters, {self.method}, {self.dtype}, {plan}{self._precision_note()})"
