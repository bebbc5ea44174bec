"""Sums of squares of gradients of every kind, against NumPy in double precision."""

from __future__ import annotations

import pytest
import torch

from curvdiag.noise.squares import Squares
from curvdiag.spectrum.vectors import PIECE


def some(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


KINDS = {
    "matrix": some(5, 7),
    "transposed": some(5, 7).t(),
    "channels last": some(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "every second": some(6, 8)[:, ::2],
    "expanded": some(3).expand(4, 3),
    "scalar": some(1)[0],
    "empty": torch.zeros(0, 3),
    "long": some(PIECE * 2 + 3),
    "double": some(9).double(),
    "bfloat16": some(9).bfloat16(),
    "half": some(9).half() * 300,  # its square is beyond half precision
    "sparse": torch.sparse_coo_tensor(torch.tensor([[1, 1, 3]]), some(3, 2), (5, 2), check_invariants=True),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_tensor_of_any_kind(kind):
    squares = Squares()
    squares.add(KINDS[kind])
    numbers = KINDS[kind].to_dense().double().numpy()
    assert squares.total().dtype == torch.float64
    assert float(squares.total()) == pytest.approx(float((numbers**2).sum()), rel=2e-6, abs=0)


def test_all_of_them_together_and_nothing():
    squares = Squares()
    assert squares.total() is None
    for tensor in KINDS.values():
        squares.add(tensor)
    wanted = sum(float((tensor.to_dense().double().numpy() ** 2).sum()) for tensor in KINDS.values())
    assert float(squares.total()) == pytest.approx(wanted, rel=2e-6)
