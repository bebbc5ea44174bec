"""The Hessian of an objective, by exact double backward or by finite differences."""

from __future__ import annotations

import copy
import time
from typing import Literal

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, StaleWeightsError
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost, SymmetricOperator
from curvdiag.operators.finite_difference import FiniteDifferenceEngine
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.plan import Plan
from curvdiag.parameters import Selection
from curvdiag.weights import Weights


class Hessian(SymmetricOperator):
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
        if share and dtype is not None:
            raise ArgumentError("share=True works on the model's own weights and cannot change their dtype")
        if dtype is not None and not dtype.is_floating_point:
            raise ArgumentError(f"dtype is a real floating-point type, not {dtype}")
        if memory is not None and memory < 0:
            raise ArgumentError(f"memory is a number of bytes, not {memory}")
        if not rtol > 0:
            raise ArgumentError(f"rtol is a positive fraction, not {rtol}")
        started = time.perf_counter()
        self.objective = objective
        self.parameters = objective.parameters
        self.dtype = dtype or objective.dtype
        self.device = objective.device
        self.size = self.parameters.size
        self._positions = range(len(self.parameters))
        self._weights: Weights = objective.weights(dtype=dtype, share=share)
        self._fingerprint = _fingerprint(self._live()) if share else None
        self._engine: GraphEngine | FiniteDifferenceEngine
        if method == "exact":
            self._engine = GraphEngine(objective, self._weights, dtype, memory, micro_batch)
        elif method == "finite-difference":
            self._engine = FiniteDifferenceEngine(
                objective, self._weights, dtype, list(objective.micro_batches(micro_batch)), rtol
            )
        else:
            raise ArgumentError(f"method is 'exact' or 'finite-difference', not {method!r}")
        self.method = method
        self.cost = Cost(0, self._engine.graphs_built, time.perf_counter() - started)

    def apply(self, rows: Tensor) -> Tensor:
        started, before = time.perf_counter(), self._engine.graphs_built
        products = self._engine.multiply(rows, self._positions)
        self.cost.matvecs += len(rows)
        self.cost.graphs += self._engine.graphs_built - before
        self.cost.seconds += time.perf_counter() - started
        return products

    def refresh(self) -> None:
        if self._fingerprint is not None and not torch.equal(self._fingerprint, _fingerprint(self._live())):
            raise StaleWeightsError(
                "the model's weights changed since this operator was made with share=True: make a new one, or leave "
                "share out so that it keeps a copy"
            )

    def _live(self) -> list[Tensor]:
        model = self.objective.model
        return [t.detach() for t in (*model.parameters(), *model.buffers())]

    def block(self, selection: Selection) -> Hessian:
        """The diagonal block over some of the parameters, on the same graphs; its products cost less.

        Raises:
            ParameterError: The selection matches nothing.
            SecondDerivativeError: Finite differences are not accurate on the block.
        """
        inside = self.parameters.select(selection, [self._weights.chosen[i] for i in self._positions])
        block = copy.copy(self)
        block._positions = [self._positions[i] for i in inside]  # type: ignore[assignment]
        block.parameters = self.parameters.subset(inside)
        block.size = block.parameters.size
        block.cost = Cost()
        if isinstance(self._engine, FiniteDifferenceEngine):
            self._engine.check(block._positions)
        return block

    @property
    def plan(self) -> Plan | None:
        """How the data are laid out in graphs; None for finite differences."""
        return self._engine.plan

    @property
    def unreached(self) -> list[str]:
        """Names of parameters that the loss does not depend on; their rows are zero."""
        self._engine.visit()
        reached = self._engine.reached
        return [self._weights.names[i] for i in self._positions if not reached[i]]

    def __repr__(self) -> str:
        return (
            f"Hessian({self.size:,} parameters, {self.method}, {self.dtype}, {self.plan or 'two gradients a product'})"
        )


def _fingerprint(tensors: list[Tensor]) -> Tensor:
    """Numbers that change whenever any weight does, short of a conspiracy: sums of values and of squares."""
    real = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).double() for t in tensors if t.numel()]
    if not real:
        return torch.zeros(0)
    ramps = [torch.arange(1, t.numel() + 1, device=t.device, dtype=torch.float64) for t in real]
    sums = [torch.stack([t.sum(), t.square().sum(), t.flatten() @ r]) for t, r in zip(real, ramps, strict=True)]
    return torch.stack(sums)
