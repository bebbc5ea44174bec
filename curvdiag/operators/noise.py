"""Second moments of per-sample gradients: the centred covariance C, and the uncentred empirical Fisher matrix."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor

from curvdiag.distributed import collectively
from curvdiag.errors import ArgumentError, LossError
from curvdiag.objective import Objective
from curvdiag.operators.base import Cost
from curvdiag.operators.batched import Batched
from curvdiag.operators.borrowed import borrowed
from curvdiag.operators.gradient_graph import GradientGraph
from curvdiag.operators.gram import Gram, gram
from curvdiag.operators.graphs import GraphEngine
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.operators.precision import Precision
from curvdiag.operators.program import ALONG, GATHER
from curvdiag.operators.traced_graph import TracedGraphs
from curvdiag.space.inner_products import wide_dtype


class EmpiricalFisher(ObjectiveOperator):
    """``(1/N) sum_i g_i g_i^T`` of per-sample gradients at the given labels, uncentred.

    Not the Fisher matrix, whose labels are drawn from the model. A product is one backward pass for ``v . g_i`` of all
    samples at once and one that gathers the gradients again; no per-sample gradient is ever in memory.

    Args:
        objective: Its losses must be known for each sample.
        graphs: An exact Hessian, or another such matrix, of the same objective: work on its graphs, at its weights,
            instead of building more. Then it has said the following.
        dtype, share, memory, micro_batch, batched, precision, compile: As in :class:`~curvdiag.operators.Hessian`.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: ``graphs`` belongs to another objective or holds other graphs.
    """

    _engine: GraphEngine[GradientGraph]
    scale = 1.0

    @collectively
    def __init__(
        self,
        objective: Objective,
        *,
        graphs: ObjectiveOperator | None = None,
        dtype: torch.dtype | None = None,
        share: bool = False,
        memory: int | None = None,
        micro_batch: int | None = None,
        batched: Batched = "auto",
        precision: Precision = "full",
        compile: bool = False,
    ) -> None:
        if not objective.per_sample:
            raise LossError(f"{type(self).__name__} needs the loss of each sample: {objective.why()}")
        started = time.perf_counter()
        if graphs is not None:
            given = (dtype, share, memory, micro_batch, batched, precision, compile)
            unset = (None, False, None, None, "auto", "full", False)
            self._engine, self.cost = borrowed(graphs, objective, given != unset, ALONG, GATHER), Cost()
        super().__init__(objective, dtype, share, memory, graphs, precision)
        if graphs is not None:
            return
        build = TracedGraphs(ALONG, GATHER) if compile else GradientGraph
        self._set_engine(build, dtype, memory, micro_batch, batched=batched)
        self.cost = Cost(0, self._engine.graphs_built, time.perf_counter() - started)

    def _multiply(self, rows: Tensor) -> Tensor:
        return self._multiply_blocks([rows], [self._positions])[0]

    def _multiply_blocks(self, rows: Sequence[Tensor], positions: Sequence[Sequence[int]]) -> list[Tensor]:
        # g_i = (N / Z) grad t_i for the total weight Z; dots are v . g_i / N.
        centred = self._centred(self._engine.sample_dots_of_blocks(rows, positions))
        dots = [one * (self.scale * self.objective.size) for one in centred]
        return self._engine.gather_blocks([one / self.objective.total_weight for one in dots], positions, self.dtype)

    def _forms(self, rows: Tensor) -> Tensor:
        # N times the sum of squares of v . g_i / N: no gradient is gathered.
        (dots,) = self._centred([self._engine.sample_dots(rows, self._positions)])
        return self.scale * self.objective.size * dots.to(wide_dtype(dots.device)).square().sum(1)

    def _centred(self, dots: list[Tensor]) -> list[Tensor]:
        """The products with the samples' gradients, ``[k, N]`` for each block, about what the matrix is centred on."""
        return dots

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size:,} parameters, {self.dtype}, {self.plan}{self._precision_note()})"


class NoiseCovariance(EmpiricalFisher):
    """``C = (1/N) sum_i g_i g_i^T - g g^T``, the covariance of per-sample gradients; or that of a mini-batch's mean.

    It is centred over the samples of all ranks, for which each product reduces one number more for each vector.

    Args:
        objective: Its losses must be known for each sample.
        batch_size: Give the covariance of the mean of so many samples: ``C / B`` drawn with replacement,
            ``C / B (M - B) / (M - 1)`` without.
        replacement: How mini-batches are drawn.
        population: ``M``, the size of the training set; must be given for ``replacement=False``, since the objective
            usually holds a small part of it.
        graphs: An exact Hessian, or another such matrix, of the same objective, whose graphs serve both.
        dtype, share, memory, micro_batch, batched, precision, compile: As in :class:`~curvdiag.operators.Hessian`.

    Raises:
        LossError: The loss gives only a mean, or BatchNorm in train mode couples the samples.
        ArgumentError: The sizes make no sense, the population is missing, or ``graphs`` does not belong to the
            objective.
    """

    @collectively
    def __init__(
        self,
        objective: Objective,
        batch_size: int | None = None,
        replacement: bool = True,
        *,
        population: int | None = None,
        graphs: ObjectiveOperator | None = None,
        dtype: torch.dtype | None = None,
        share: bool = False,
        memory: int | None = None,
        micro_batch: int | None = None,
        batched: Batched = "auto",
        precision: Precision = "full",
        compile: bool = False,
    ) -> None:
        self.scale = _mini_batch_scale(batch_size, replacement, population)
        super().__init__(
            objective,
            graphs=graphs,
            dtype=dtype,
            share=share,
            memory=memory,
            micro_batch=micro_batch,
            batched=batched,
            precision=precision,
            compile=compile,
        )

    def _centred(self, dots: list[Tensor]) -> list[Tensor]:
        # Centred before the gradients are gathered: g (g . v) subtracted afterwards would cancel.
        ranks = self.objective.ranks
        if ranks.alone:
            means = [one.mean(dim=1, keepdim=True) for one in dots]
        else:  # one small reduction for all blocks
            sums = ranks.sum_(torch.cat([one.sum(dim=1, dtype=torch.float64) for one in dots]), "centring")
            parts = (sums / self.objective.size).split([len(one) for one in dots])
            means = [part[:, None].to(one.dtype) for part, one in zip(parts, dots, strict=True)]
        return [one - mean for one, mean in zip(dots, means, strict=True)]

    def gram(self, *, memory: int | None = None) -> Gram:
        """All nonzero eigenvalues, exactly, from the ``[N, N]`` matrix of products of per-sample gradients.

        Args:
            memory: Bytes it may take; half of what is free by default.

        Raises:
            TooLargeError: The matrix does not fit.
            ArgumentError: The gradients are in bfloat16, or the samples lie on several ranks.
        """
        if self.precision == "bfloat16":
            raise ArgumentError("gram() squares gradients, which bfloat16 is too coarse for: use precision='full'")
        self.refresh()
        dtype = self._engine.dtype
        return gram(self.objective, self._weights, dtype, self._positions, self.scale, memory=memory)


def _mini_batch_scale(batch_size: int | None, replacement: bool, population: int | None) -> float:
    if batch_size is None:
        return 1.0
    if batch_size < 1:
        raise ArgumentError(f"batch_size is a number of samples, at least 1, not {batch_size}")
    if replacement:
        return 1 / batch_size
    if population is None:
        raise ArgumentError("without replacement the covariance depends on the training set's size: give population=")
    if not batch_size <= population or population < 2:
        raise ArgumentError(f"mini-batches of {batch_size} cannot be drawn without replacement from {population}")
    return (population - batch_size) / (population - 1) / batch_size
