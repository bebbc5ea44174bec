"""Bases and projections keep to single precision where the process lets its matrix products be rounded to TF32."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from matrices import heavy_tailed
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from curvdiag import measure_spectrum, spectral_density, top_eigenpairs

PRODUCTS = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.addmm_.default}


class Diagonal:
    """Multiplies without a matrix product of its own."""

    shape, dtype = (400, 400), torch.float32

    def __matmul__(self, vector: Tensor) -> Tensor:
        return heavy_tailed().float() * vector


class Precisions(TorchDispatchMode):
    """In which precision CUDA's products of float32 would be made, at each one."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        if func in PRODUCTS and args[-1].dtype == torch.float32:
            self.seen.append(torch.backends.cuda.matmul.fp32_precision)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def rounded() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.usefixtures("rounded")
@pytest.mark.parametrize(
    "measure",
    [
        lambda op: spectral_density(op, steps=20, deflate=6),
        lambda op: top_eigenpairs(op, 3, tol=1e-5, basis_size=8),
        lambda op: measure_spectrum(op, 5, steps=20),
    ],
    ids=["density", "eigenpairs", "measurement"],
)
def test_every_product_of_the_recurrence_is_made_in_full(measure) -> None:
    with Precisions() as made:
        measure(Diagonal())
    assert len(made.seen) > 3
    assert set(made.seen) == {"ieee"}
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # as the process had it
