"""PyHessian's class on this engine: ``from curvdiag.compat.pyhessian import hessian`` is the line that changes.

The interface is that of PyHessian 0.1 (Yao, Gholami, Keutzer and Mahoney 2020, arXiv:1912.07145).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from curvdiag.errors import ArgumentError, CurvdiagWarning
from curvdiag.modes import outside_modes
from curvdiag.objective import Objective
from curvdiag.operators import Hessian
from curvdiag.seeds import Seed, resolve_seed
from curvdiag.space.probes import rademacher
from curvdiag.spectrum import spectral_density, top_eigenpairs

# Probes between two looks at their spread. Fewer may all give the same number by chance.
GROUP = 8


class hessian:
    """The Hessian of a model's loss on one batch or a loader, in eval mode, asked as PyHessian is.

    What differs from PyHessian 0.1:

    - The model keeps its training mode, its ``.grad`` and everything else.
    - ``density`` works; PyHessian's calls ``torch.eig``, which PyTorch has removed.
    - ``eigenvalues`` runs thick-restart Lanczos instead of power iteration, and ``tol`` bounds residuals; it warns
      where ``maxIter`` did not suffice. ``trace`` stops by the spread of its probes, not when two means in a row agree.
    - Weights and batches are those of the moment at which the object is made; a loader is read once, then, and kept.
    - Random vectors come from ``seed``, not from PyTorch's global state; each call draws new ones.
    - ``cuda`` has to say where the model is; ``True`` without a CUDA device is an error that says so.
    - A criterion with ``reduction="sum"`` is refused, and class weights count across batches as they do within one.
    - The attributes ``inputs``, ``targets`` and ``gradsH`` are not there: :meth:`dataloader_hv_product` multiplies.

    Args:
        model: Any module.
        criterion: A function of ``(outputs, targets)``.
        data: One batch ``(inputs, targets)``.
        dataloader: Batches; give one of the two.
        cuda: Whether the model is on a CUDA device.
        seed: Of the random vectors; not in PyHessian.

    Attributes:
        params: The parameters that require gradients, in the model's order: how vectors are cut into lists.
        objective, operator: What curvdiag works on, for everything that PyHessian does not have.

    Raises:
        ArgumentError: ``data`` and ``dataloader`` together, or neither; ``cuda`` contradicts the model's device.
        DataError, LossError, ParameterError, NonFiniteError, TooLargeError: As from :class:`~curvdiag.Objective`.
    """

    def __init__(
        self,
        model: nn.Module,
        criterion: Callable[..., Tensor],
        data: Any = None,
        dataloader: Iterable[Any] | None = None,
        cuda: bool = True,
        *,
        seed: Seed = 0,
    ) -> None:
        if (data is None) == (dataloader is None):
            raise ArgumentError("give data= (one batch) or dataloader= (batches), one of the two")
        _check_device(model, cuda)
        self.model, self.criterion = model, criterion
        self.full_dataset = data is None
        self.data = dataloader if data is None else data
        self.device = "cuda" if cuda else "cpu"
        if self.full_dataset:
            self.objective = Objective(model, criterion, batches=dataloader)
        else:
            self.objective = Objective(model, criterion, batch=tuple(data))
        self.operator = Hessian(self.objective)
        found = dict(self.objective.model.named_parameters(remove_duplicate=False))
        self.params = [found[name] for name in self.objective.parameters.names]
        self._generator = torch.Generator().manual_seed(resolve_seed(seed))

    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        """``v^T H v`` and ``H v``, for a vector in the shapes of :attr:`params`; for one batch as well as for a loader.

        Raises:
            ArgumentError: ``v`` does not have these shapes.
        """
        shapes = [tuple(part.shape) for part in v]
        if shapes != [tuple(shape) for shape in self.objective.parameters.shapes]:
            raise ArgumentError(f"v is a list of tensors in the shapes of params, not of shapes {shapes}")
        flat = torch.cat([part.detach().reshape(-1).to(self.operator.device, self.operator.dtype) for part in v])
        image = self.operator @ flat
        return float(flat.double() @ image.double()), self._parts(image)

    def eigenvalues(
        self, maxIter: int = 100, tol: float = 1e-3, top_n: int = 1
    ) -> tuple[list[float], list[list[Tensor]]]:
        """The eigenvalues of largest magnitude, and their eigenvectors.

        Args:
            maxIter: Most products for each eigenvalue.
            tol: Largest residual ``|H v - lambda v|`` of a pair of length 1, relative to the largest eigenvalue's
                magnitude. An eigenvalue's own error is usually of order ``tol`` squared.
            top_n: How many.

        Returns:
            The eigenvalues, largest magnitude first, and for each a list of tensors in the shapes of :attr:`params`,
            of length 1 together.

        Raises:
            ArgumentError: An argument is out of range.
        """
        if not _whole(top_n) or not 1 <= top_n <= self.operator.size:
            raise ArgumentError(f"top_n is a number of eigenvalues from 1 to {self.operator.size:,}, not {top_n!r}")
        most = top_n * _positive(maxIter, "maxIter")
        pairs = top_eigenpairs(self.operator, int(top_n), which="LM", tol=tol, seed=self._generator, max_matvecs=most)
        converged = int(pairs.converged.sum())
        if converged < top_n:
            warnings.warn(
                f"{top_n - converged} of {top_n} eigenvalues have not converged to tol={tol:g} within {most} products: "
                "raise maxIter, or take a larger tol",
                CurvdiagWarning,
                stacklevel=2,
            )
        return pairs.values.tolist(), [self._parts(vector) for vector in pairs.vectors.unbind(1)]

    @outside_modes
    def trace(self, maxIter: int = 100, tol: float = 1e-3) -> list[float]:
        """Hutchinson's ``z^T H z`` for random signs ``z``; their mean estimates the trace.

        Args:
            maxIter: Most probes.
            tol: Stop when the standard error of the mean is at most ``tol`` times its magnitude, after eight probes or
                more.

        Returns:
            One number for each probe.

        Raises:
            ArgumentError: ``maxIter`` is not positive, or ``tol`` negative.
        """
        most, seed = _positive(maxIter, "maxIter"), resolve_seed(self._generator)
        if not tol >= 0:
            raise ArgumentError(f"tol is a fraction of the trace, not negative: {tol}")
        samples: list[float] = []
        while len(samples) < most and not _settled(samples, tol):
            count = min(GROUP, most - len(samples))
            like = {"dtype": self.operator.dtype, "device": self.operator.device}
            signs = rademacher(count, self.operator.size, seed=seed, first=len(samples), **like)  # type: ignore[arg-type]
            samples += self.operator.quadratic_form(signs.T).tolist()
        return samples

    def density(self, iter: int = 100, n_v: int = 1) -> tuple[list[list[float]], list[list[float]]]:
        """Eigenvalue density by stochastic Lanczos quadrature.

        Args:
            iter: Lanczos steps.
            n_v: How many random vectors.

        Returns:
            Nodes and weights, ``n_v`` lists of ``iter`` numbers each; the weights of a list add up to 1. Where the
            matrix has fewer than ``iter`` dimensions the rest are copies of the last node with weight 0. They fit
            PyHessian's ``density_plot.get_esd_plot``.

        Raises:
            ArgumentError: An argument is not positive.
        """
        steps, probes = _positive(iter, "iter"), _positive(n_v, "n_v")
        found = spectral_density(self.operator, steps=steps, probes=probes, seed=self._generator)
        rest = ((0, 0), (0, steps - found.nodes.shape[1]))
        nodes, weights = np.pad(found.nodes, rest, mode="edge"), np.pad(found.weights, rest)
        return nodes.tolist(), weights.tolist()

    def _parts(self, vector: Tensor) -> list[Tensor]:
        return [part.clone() for part in self.objective.parameters.views(vector.contiguous())]


def _check_device(model: nn.Module, cuda: bool) -> None:
    device = next((parameter.device for parameter in model.parameters()), None)
    if cuda and not torch.cuda.is_available():
        raise ArgumentError("cuda=True is PyHessian's default, and PyTorch sees no CUDA device here: say cuda=False")
    if device is None or cuda == (device.type == "cuda"):
        return
    remedy = "move it with model.cuda(), or say cuda=False" if cuda else "say cuda=True"
    raise ArgumentError(f"cuda={cuda}, but the model is on {device}: {remedy}")


def _settled(samples: list[float], tol: float) -> bool:
    if not samples:
        return False
    return float(np.std(samples, ddof=1)) / math.sqrt(len(samples)) <= tol * abs(float(np.mean(samples)))


def _positive(number: int, name: str) -> int:
    if not _whole(number) or number < 1:
        raise ArgumentError(f"{name} is a positive whole number, not {number!r}")
    return int(number)


def _whole(number: Any) -> bool:
    return isinstance(number, Real) and not isinstance(number, bool) and float(number).is_integer()
