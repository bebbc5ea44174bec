"""PyHessian's opinion, asked so that it leaves no trace: on a copy, silent, with its own random state."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag.errors import CurvdiagError
from curvdiag.verify.problems import Problem

MISSING = "the second opinion comes from PyHessian, which is not installed: pip install pyhessian"


def require() -> None:
    """Make sure that PyHessian can be asked.

    Raises:
        CurvdiagError: It is not installed.
    """
    with _silence():
        try:
            import pyhessian  # noqa: F401
        except ImportError as error:
            raise CurvdiagError(MISSING) from error


class PyHessian:
    """PyHessian 0.1 on a copy of the problem's model: one batch keeps its graph, several are walked each time."""

    def __init__(self, problem: Problem, seed: int = 0) -> None:
        require()
        self.problem, self.seed = problem, seed

    @contextmanager
    def _asked(self) -> Iterator[Any]:
        with _silence(), torch.random.fork_rng(devices=[]):
            from pyhessian import hessian

            default = torch.get_default_dtype()
            torch.set_default_dtype(torch.float64)  # its power iteration draws vectors of the default type
            torch.manual_seed(self.seed)
            batches = self.problem.batches
            data = {"data": batches[0]} if len(batches) == 1 else {"dataloader": batches}
            asked = None
            try:
                asked = hessian(copy.deepcopy(self.problem.model), nn.CrossEntropyLoss(), cuda=False, **data)
                yield asked
            finally:
                torch.set_default_dtype(default)
                if asked is not None:
                    asked.model.zero_grad()  # gradients that keep their graph keep each other alive

    def product(self, vector: Tensor) -> Tensor:
        """``H v`` for a flat vector ``[P]``."""
        with self._asked() as asked:
            from pyhessian.utils import hessian_vector_product

            sizes = [p.numel() for p in asked.params]
            parts = [part.view_as(p) for part, p in zip(vector.split(sizes), asked.params, strict=True)]
            if asked.full_dataset:
                rows = asked.dataloader_hv_product(parts)[1]
            else:
                rows = hessian_vector_product(asked.gradsH, asked.params, parts)
            return torch.cat([row.detach().reshape(-1) for row in rows])

    def eigenvalues(self, k: int, *, tol: float, iterations: int) -> list[float]:
        """The ``k`` eigenvalues of largest magnitude, by power iteration until two in a row agree to ``tol``."""
        with self._asked() as asked:
            return [float(x) for x in asked.eigenvalues(maxIter=iterations, tol=tol, top_n=k)[0]]

    def trace(self, probes: int) -> list[float]:
        """Hutchinson's ``z^T H z`` for each probe; with tolerance 0 it stops before ``probes`` only below zero."""
        with self._asked() as asked:
            return [float(x) for x in asked.trace(maxIter=probes, tol=0.0)]

    def density_trace(self, steps: int) -> float | str:
        """The trace that its density implies, from one probe; or in words what happened instead."""
        with self._asked() as asked:
            try:
                nodes, weights = asked.density(iter=steps, n_v=1)
                total = math.fsum(float(w) * float(x) for x, w in zip(nodes[0], weights[0], strict=True))
                return total * sum(p.numel() for p in asked.params)
            except Exception as error:
                first = (str(error).splitlines() or [""])[0]
                return f"{type(error).__name__}: {first}"


@contextmanager
def _silence() -> Iterator[None]:
    """It keeps graphs in ``.grad`` on purpose, about which PyTorch warns, and escapes strings carelessly."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
