"""The Hessian of an objective, by exact double backward or by finite differences."""

from __future__ import annotations

import time
from typing import Literal

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost
from curvdiag.operators.finite_difference import FiniteDifferenceEngine
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.operators.second_derivative import check_symmetry


class Hessian(ObjectiveOperator):
    """``H = (1/N) sum_i w_i hess l_i`` over the objective's parameters, at the weights it has now.

    The operator is a picture: it works on copies of the weights and buffers, so that whatever training does
    afterwards changes nothing in it.

    Args:
        objective: What is differentiated.
        method: ``"exact"`` differentiates the gradient's graph. ``"finite-difference"`` takes central differences
            of gradients, for smooth models without a second derivative; two gradients a product.
        dtype: Make the copies in another type (float64 for oracles, float32 for bfloat16 weights).
        share: Work on the model's own weights instead of copies; if they change, the next use raises.
        memory: Bytes that kept graphs may take; half of the free memory by default. What does not fit is
            rebuilt at each product, with ``memory=0`` everything.
        micro_batch: Cut batches into pieces of at most so many samples, a graph for each; without it they are merged
            into as few graphs as fit.
        rtol: Largest error of finite differences that is accepted, measured once by halving the step.

    Raises:
        SecondDerivativeError: A second derivative is missing, or finite differences are not accurate.
        NonFiniteError: The loss or its gradient is not finite.
        StaleWeightsError: With ``share=True``, the weights changed.

    Source: Pearlmutter, "Fast exact multiplication by the Hessian", 1994.
    """

    def __init__(
        self,
        objective: Objective,
        *,
        method: Literal["exact", "finite-difference"] = "exact",
        dtype: torch.dtype | None = None,
        share: bool = False,
        memory: int | None = None,
        micro_batch: int | None = None,
        rtol: float = 0.05,
    ) -> None:
        if not rtol > 0:
            raise ArgumentError(f"rtol is a positive fraction, not {rtol}")
        started = time.perf_counter()
        super().__init__(objective, dtype, share, memory)
        if method == "exact":
            self._engine = GraphEngine(objective, self._weights, dtype, memory, micro_batch)
        elif method == "finite-difference":
            pieces = list(objective.micro_batches(micro_batch))
            self._engine = FiniteDifferenceEngine(objective, self._weights, dtype, pieces, rtol)
            if not objective.__dict__.get("_symmetric"):
                check_symmetry(objective, dtype, self._engine.product, max(rtol, 0.05))
                objective.__dict__["_symmetric"] = True
        else:
            raise ArgumentError(f"method is 'exact' or 'finite-difference', not {method!r}")
        self.method = method
        self.cost = Cost(0, self._engine.graphs_built, time.perf_counter() - started)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._engine.multiply(rows, self._positions)

    def __repr__(self) -> str:
        return (
            f"Hessian({self.size:,} parameters, {self.method}, {self.dtype}, {self.plan or 'two gradients a product'})"
        )
