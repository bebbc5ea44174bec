"""Products in TF32 or bfloat16: cheaper where the hardware has units for them, and how wrong that makes them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from curvdiag.errors import ArgumentError, CurvdiagWarning

Precision = Literal["full", "tf32", "bfloat16"]
"""What products are computed in. ``"full"`` is the type of the weights, as the process has PyTorch set up."""

Multiplication = Literal["tf32", "ieee"]
"""How matrix products and convolutions of float32 are done on CUDA devices."""

NOTED = 0.05
"""Relative error of a product from which a warning is given."""


def check_precision(precision: Precision, device: torch.device, dtype: torch.dtype, *, share: bool) -> None:
    """Refuse what would change nothing, or cannot be.

    Raises:
        ArgumentError: TF32 without a device or a type that has it, or bfloat16 on shared weights.
    """
    if precision not in ("full", "tf32", "bfloat16"):
        raise ArgumentError(f"precision is 'full', 'tf32' or 'bfloat16', not {precision!r}")
    if precision == "tf32" and device.type != "cuda":
        raise ArgumentError(f"TF32 is done by CUDA devices only, and the model is on {device}: leave precision= out")
    if precision == "tf32" and dtype != torch.float32:
        raise ArgumentError(f"TF32 rounds products of float32, and the weights are {dtype}: give dtype=torch.float32")
    if precision == "bfloat16" and share:
        raise ArgumentError("share=True works on the model's own weights, and precision='bfloat16' on copies")
    if precision == "bfloat16" and dtype not in (torch.float32, torch.float64):
        raise ArgumentError(f"the weights are {dtype} already: precision='bfloat16' is for float32 and float64")


@contextmanager
def multiplication(kind: Multiplication | None) -> Iterator[None]:
    """Matrix products and convolutions of float32 on CUDA devices as said, and afterwards as before."""
    if kind is None:
        yield
        return
    settings = _settings()
    before = [getattr(owner, name) for owner, name in settings]
    try:
        for owner, name in settings:
            setattr(owner, name, kind if name == "fp32_precision" else kind == "tf32")
        yield
    finally:
        for (owner, name), value in zip(settings, before, strict=True):
            setattr(owner, name, value)


def _settings() -> list[tuple[Any, str]]:
    """PyTorch 2.9 has one switch for each library and operation; a switch set one way cannot be read the other."""
    products, convolutions = torch.backends.cuda.matmul, torch.backends.cudnn
    if hasattr(convolutions, "conv"):
        owners = (products, convolutions.conv, convolutions.rnn)
        return [(owner, "fp32_precision") for owner in owners]
    return [(products, "allow_tf32"), (convolutions, "allow_tf32")]


def true_products(full: Callable[[Tensor], Tensor], start: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Vectors ``[1, P]`` and their products: ``start``, and what one power step makes of it.

    A random vector weighs all eigenvalues alike, and its error is that of the matrix in the Frobenius norm; a power
    step turns it towards the largest ones.
    """
    pairs = [(start, full(start))]
    size = float(pairs[0][1].norm())
    if size > 0:
        ahead = pairs[0][1] / size
        pairs.append((ahead, full(ahead)))
    return pairs


def product_error(rough: Callable[[Tensor], Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> float:
    """Largest relative error of a product; warns of a large one."""
    errors = [float((rough(vector) - truth).norm() / truth.norm()) for vector, truth in pairs if truth.any()]
    worst = math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
    if not worst <= NOTED:
        warnings.warn(
            f"the products' precision changes one by {worst:.2g} of its norm; what is smaller than that share of the "
            "largest eigenvalue is lost in it: use precision='full' for the bulk of a spectrum",
            CurvdiagWarning,
            stacklevel=4,
        )
    return worst


def random_row(size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """A normal vector ``[1, P]``, the same each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(1, size, generator=generator, dtype=torch.float64).to(device, dtype)
