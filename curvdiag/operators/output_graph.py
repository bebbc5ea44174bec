"""The model's outputs as a graph over the weights: products with ``J^T M J`` for a matrix ``M`` over the outputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge

from curvdiag.data import Batch
from curvdiag.errors import SecondDerivativeError
from curvdiag.objective import Objective
from curvdiag.operators.kept_graph import watched_hooks
from curvdiag.operators.output_hessian import Rule, closed_form
from curvdiag.operators.output_products import REMEDY, OutputProducts, linear_loss
from curvdiag.operators.outputs import Pick, caught_outputs, check_only_way
from curvdiag.operators.second_derivative import check_nodes
from curvdiag.weights import Weights


class OutputGraph(OutputProducts):
    """``J^T M J`` of one group of samples.

    Args:
        pick: Picks the outputs out of what the model returns.
        rule: Gives ``M``; where it gives None this is the Hessian of the loss in the outputs, differentiated twice.
    """

    def __init__(
        self,
        objective: Objective,
        weights: Weights,
        batch: Batch,
        dtype: torch.dtype | None,
        *,
        trusted: bool = False,
        counter: AbstractContextManager[object] | None = None,
        pick: Pick | None = None,
        rule: Rule = closed_form,
    ) -> None:
        self.pick, self.rule = pick, rule
        super().__init__(objective, weights, batch, dtype, trusted=trusted, counter=counter)

    def _build(self, live: Mapping[str, Tensor]) -> None:
        with watched_hooks() as hooks, caught_outputs(self.objective.model, self.pick) as outputs:
            totals = self.objective.totals(self.batch, self.dtype)
        value, self.output = outputs.single(), outputs.edge
        self.recomputes = bool(hooks)
        loss = totals.sum() / self.objective.total_weight
        self.custom = []
        if not self.checked:
            rerun = lambda: self.objective.totals(self.batch, self.dtype)  # noqa: E731
            check_nodes(self.objective, loss, live, rerun, of_model=False)
            self.custom = check_only_way(
                get_gradient_edge(loss) if loss.requires_grad else None, self.output, self.weights
            )
        self.matrix = self.rule(self.objective, value, self.batch, self.dtype) if outputs.alone else None
        slope = self._slope(loss, differentiable=self.matrix is None)
        self.outer = torch.zeros_like(value) if slope is None else slope.detach().clone()
        self.entry = self.outer.requires_grad_()
        self.shape = value.new_empty(value.shape, device="meta")
        gradients = self._pulled_back()
        if not self.checked:
            self._check_finite(loss, gradients)
            self._check_linear(gradients)
        self._take_edges(gradients)

    def _slope(self, loss: Tensor, *, differentiable: bool) -> Tensor | None:
        """The gradient of the loss in the outputs; its graph is kept where it will be differentiated again."""
        self.slope = None
        if self.output is None or not loss.requires_grad:
            return None
        (slope,) = torch.autograd.grad(loss, [self.output], create_graph=differentiable, allow_unused=True)
        if differentiable and slope is not None:
            self.slope = get_gradient_edge(slope) if slope.requires_grad else None
            if self.slope is None and bool(slope.any()):
                raise linear_loss()
        return slope

    def _pulled_back(self) -> tuple[Tensor | None, ...]:
        """``J^T u`` by parameter, as a graph that depends on ``u``; None where the outputs do not."""
        if self.output is None:
            return (None,) * len(self.weights.chosen)
        return torch.autograd.grad(self.output, self.weights.chosen, self.outer, create_graph=True, allow_unused=True)

    def _check_linear(self, gradients: Sequence[Tensor | None]) -> None:
        for name, gradient, nonzero in zip(self.weights.names, gradients, self.nonzero, strict=True):
            if gradient is not None and nonzero and not gradient.requires_grad:
                raise SecondDerivativeError(
                    f"the gradient in {name!r} does not show that it depends on the gradient in the outputs: a "
                    f"function of the model detaches it in its backward pass; {REMEDY}"
                )

    def multiply(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> list[Tensor | None]:
        return self.through_outputs(vectors, positions, keep=keep, batched=batched)

    def form(
        self, vectors: Sequence[Tensor], positions: Sequence[int], *, keep: bool, batched: bool = False
    ) -> Tensor | None:
        return self.form_at_outputs(vectors, positions, keep=keep, batched=batched)

    def _has_slope(self) -> bool:
        return bool(self.outer.detach().any())

    def _verify(self) -> None:
        self.checked = True
        self._check_outputs((self.pick, self.rule))
