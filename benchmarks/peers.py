"""The other libraries, each through its own public interface: a Hessian product and its own Lanczos quadrature."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from nets import Batches
from torch import Tensor, nn

PACKAGES = ("pyhessian", "hessian-eigenthings", "curvlinops-for-pytorch", "backpack-for-pytorch")


@dataclass(frozen=True)
class Peer:
    """One way of another library.

    Attributes:
        name: Library and way.
        prepare: From a flat vector to what its product takes; not timed.
        multiply: Its product.
        flat: From what its product returns to a flat vector; not timed.
        density: Its Lanczos quadrature with so many steps and one probe; all of them run probes one after the
            other, so that one probe shows the price of a step.
        steps: Steps to time it with.
        note: What a reader should know of the time of a step.
    """

    name: str
    prepare: Callable[[Tensor], Any]
    multiply: Callable[[Any], Any]
    flat: Callable[[Any], Tensor]
    density: Callable[[int], Any]
    steps: int
    note: str


def peers(model: nn.Module, batches: Batches, *, quick: bool = False) -> list[Peer]:
    """All of them, on copies of the model."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return [
            pyhessian(model, batches, whole=True, steps=8 if quick else 80),
            pyhessian(model, batches, whole=False, steps=4 if quick else 20),
            eigenthings(model, batches, steps=4 if quick else 20),
            curvlinops(model, batches, steps=3 if quick else 5),
        ]


def pyhessian(model: nn.Module, batches: Batches, *, whole: bool, steps: int) -> Peer:
    """``whole``: all data as one batch, whose graph it keeps; else it walks the batches at each product."""
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    one = tuple(torch.cat(parts) for parts in zip(*batches, strict=True))
    data = {"data": one} if whole else {"dataloader": batches}
    asked = hessian(copy.deepcopy(model), nn.CrossEntropyLoss(), cuda=False, **data)

    def density(steps: int) -> None:
        try:
            asked.density(iter=steps, n_v=1)
        except (RuntimeError, AttributeError) as error:
            if "eig" not in str(error):
                raise

    def multiply(parts: list[Tensor]) -> Any:
        return hessian_vector_product(asked.gradsH, asked.params, parts) if whole else product(parts)

    def product(parts: list[Tensor]) -> Any:
        return asked.dataloader_hv_product(parts)[1]

    return Peer(
        "PyHessian, one batch" if whole else "PyHessian, data loader",
        lambda v: [part.view_as(p) for part, p in zip(_split(v, asked.params), asked.params, strict=True)],
        multiply,
        _join,
        density,
        steps,
        "until it fails after its last step, for want of torch.eig" + ("" if whole else "; 80 reorthogonalise more"),
    )


def eigenthings(model: nn.Module, batches: Batches, *, steps: int) -> Peer:
    import hessian_eigenthings as library

    loss = library.supervised_loss(nn.CrossEntropyLoss())
    operator = library.HessianOperator(copy.deepcopy(model), batches, loss)
    return Peer(
        "hessian-eigenthings",
        lambda v: v,
        operator.matvec,
        lambda product: product.detach(),
        lambda steps: library.spectral_density(operator, num_runs=1, lanczos_steps=steps, seed=0),
        steps,
        "80 would reorthogonalise against a longer basis",
    )


def curvlinops(model: nn.Module, batches: Batches, *, steps: int) -> Peer:
    from curvlinops import HessianLinearOperator, lanczos_approximate_spectrum

    twin = copy.deepcopy(model)
    params = [p for p in twin.parameters() if p.requires_grad]
    operator = HessianLinearOperator(twin, nn.CrossEntropyLoss(), params, batches, check_deterministic=False)
    return Peer(
        "curvlinops",
        lambda v: v,
        lambda v: operator @ v,
        lambda product: product.detach(),
        lambda steps: lanczos_approximate_spectrum(operator, steps, num_repeats=1, boundaries=(-1.0, 1.0)),
        steps,
        "spectral bounds given, which it otherwise computes first",
    )


def gauss_newton(model: nn.Module, batches: Batches) -> Callable[[Tensor], Tensor]:
    """curvlinops' product with the generalised Gauss-Newton matrix, of flat vectors."""
    from curvlinops import GGNLinearOperator

    twin = copy.deepcopy(model)
    params = [p for p in twin.parameters() if p.requires_grad]
    operator = GGNLinearOperator(twin, nn.CrossEntropyLoss(), params, batches, check_deterministic=False)
    return lambda v: (operator @ v).detach()


def _split(vector: Tensor, params: list[Tensor]) -> tuple[Tensor, ...]:
    return vector.split([p.numel() for p in params])


def _join(parts: Any) -> Tensor:
    return torch.cat([part.detach().reshape(-1) for part in parts])
