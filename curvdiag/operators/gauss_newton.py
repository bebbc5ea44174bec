"""The generalised Gauss-Newton matrix: the Hessian without the curvature of the model itself."""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost
from curvdiag.operators.batched import Batched
from curvdiag.operators.borrowed import borrowed
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.operators.output_graph import OutputGraph
from curvdiag.operators.outputs import Pick
from curvdiag.operators.precision import Precision


class GaussNewton(ObjectiveOperator):
    """``G = (1/N) sum_i w_i J_i^T (hess_z l_i) J_i``, where ``J_i`` is the Jacobian of the outputs ``z_i``.

    It is the Hessian of the objective with the model replaced by its linearisation, and positive semi-definite
    where the loss is convex in the outputs. The Hessian of the loss in the outputs is in closed form for
    cross-entropy, squared error and binary cross-entropy with logits, and a second backward pass through the loss
    otherwise; it is never a matrix over classes. The loss may give only a mean, and BatchNorm may be in train mode.

    Args:
        objective: Its loss calls the model once, and depends on the parameters only through the outputs.
        outputs: Picks the tensor ``z`` (the logits) out of what the model returns. By default what it returns, or the
            ``logits`` in it.
        graphs: An exact Hessian, or a matrix of per-sample gradients, of the same objective: work on its graphs, at its
            weights, instead of building more; they know the outputs as well. Then it has said the following, and
            ``outputs`` stays as it is. Beside compiled graphs, which do not serve it, it keeps autograd's own.
        dtype, share, memory, micro_batch, batched, precision: As in :class:`~curvdiag.operators.Hessian`.

    Raises:
        LossError: The outputs cannot be found, are not the only way from the parameters to the loss, or the loss is
            linear in them.
        ArgumentError: ``graphs`` belongs to another objective or holds other graphs.
        SecondDerivativeError: A derivative is missing or wrong.
        NonFiniteError: The loss or its gradient is not finite.

    Source: Schraudolph, "Fast curvature matrix-vector products for second-order gradient descent", 2002.
    """

    _engine: GraphEngine[Any]

    @collectively
    def __init__(
        self,
        objective: Objective,
        *,
        outputs: Pick | None = None,
        graphs: ObjectiveOperator | None = None,
        dtype: torch.dtype | None = None,
        share: bool = False,
        memory: int | None = None,
        micro_batch: int | None = None,
        batched: Batched = "auto",
        precision: Precision = "full",
    ) -> None:
        started = time.perf_counter()
        self._product = "multiply" if graphs is None else "gauss_newton"
        if graphs is not None:
            given = (outputs, dtype, share, memory, micro_batch, batched, precision)
            unset = (None, None, False, None, None, "auto", "full")
            self._engine, self.cost = borrowed(graphs, objective, given != unset), Cost()
        super().__init__(objective, dtype, share, memory, graphs, precision)
        if graphs is not None:
            return
        self._set_engine(functools.partial(OutputGraph, pick=outputs), dtype, memory, micro_batch, batched=batched)
        self.cost = Cost(0, self._engine.graphs_built, time.perf_counter() - started)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._engine.multiply(rows, self._positions, self._product)

    def _multiply_blocks(self, rows: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        return self._engine.multiply_blocks(rows, positions, self._product)

    def _forms(self, rows: Tensor) -> Tensor:
        form = "form" if self._product == "multiply" else "gauss_newton_form"
        return self._engine.forms(rows, self._positions, form)

    def __repr__(self) -> str:
        return f"GaussNewton({self.size:,} parameters, {self.dtype}, {self.plan}{self._precision_note()})"
