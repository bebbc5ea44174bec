"""The basis in which eigenpairs are searched: orthogonal to rounding, from half the arithmetic of two whole passes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from curvdiag.operators.base import LinearMap
from curvdiag.spectrum import krylov
from curvdiag.spectrum.krylov import Subspace

SIZE, CAPACITY = 20_000, 40


def spectra() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(SIZE, generator=generator)
    outliers = 0.01 * noise
    outliers[:10] = torch.logspace(1, 4, 10)  # after these, what is left of a product is a millionth of it
    heavy = torch.rand(SIZE, generator=generator) ** -1.5
    return {"bulk": noise, "outliers": outliers, "heavy tail": heavy, "nearly the identity": 1 + 1e-5 * noise}


def grown(values: Tensor, starts: int) -> Subspace:
    return grown_by(lambda rows: rows * values, starts)


def grown_by(multiply: Callable[[Tensor], Tensor], starts: int) -> Subspace:
    space = Subspace(LinearMap(multiply, SIZE, torch.float32, torch.device("cpu")), CAPACITY)
    generator = torch.Generator().manual_seed(1)
    for _ in range(starts):
        space.add(torch.randn(SIZE, generator=generator))
    while space.used < CAPACITY:
        space.expand()
    return space


def check(space: Subspace, values: Tensor) -> None:
    basis, n = space.rows[: space.used].double(), space.processed
    assert (basis @ basis.T - torch.eye(space.used, dtype=torch.float64)).abs().max() < 2e-5
    relation = basis[:n] * values.double() - space.projected.T @ basis[:n] - space.coupling.T @ basis[n:]
    assert relation.norm(dim=1).max() < 5e-6 * values.abs().max()


@pytest.mark.parametrize("starts", [1, 3])
@pytest.mark.parametrize("spectrum", spectra())
def test_the_basis_is_orthogonal_and_the_relation_holds(spectrum: str, starts: int) -> None:
    values = spectra()[spectrum]
    check(grown(values, starts), values)


def test_after_a_restart_and_a_random_direction_too() -> None:
    values = spectra()["heavy tail"]
    space = grown(values, 1)
    ritz, coefficients, _ = space.ritz()
    space.restart(coefficients[:, -12:], ritz[-12:])
    space.add_random(torch.randn(SIZE, generator=torch.Generator().manual_seed(2)))
    for _ in range(20):
        space.expand()
    check(space, values)


def test_what_breaks_the_symmetry_is_noted_and_costs_no_orthogonality() -> None:
    values = spectra()["bulk"]

    def multiply(rows: Tensor) -> Tensor:
        skew = torch.empty_like(rows)
        skew[:, 0::2], skew[:, 1::2] = 1e-3 * rows[:, 1::2], -1e-3 * rows[:, 0::2]
        return rows * values + skew

    space = grown_by(multiply, 1)
    n = space.processed
    basis = space.rows[: space.used].double()
    assert (basis @ basis.T - torch.eye(space.used, dtype=torch.float64)).abs().max() < 2e-5
    found = multiply(space.rows[:n]).double() @ basis[:n].T
    assert space.defect == pytest.approx(float((found - found.T).tril(-1).norm()), rel=1e-3)
    assert grown(values, 1).defect < 1e-5 < space.defect


@pytest.mark.parametrize("starts", [1, 3])
def test_one_pass_is_all_that_an_ordinary_step_takes(starts: int) -> None:
    read: list[int] = []

    def counted(space: Any, vector: Tensor, basis: Tensor) -> Tensor:
        read.append(len(basis))
        return real(space, vector, basis)

    real = krylov.remove_components
    with mock.patch.object(krylov, "remove_components", counted):
        grown(spectra()["bulk"], starts)
    # Three passes for each start vector after the first; at each step the pending ones, and the basis once.
    assert sum(read) == 3 * sum(range(starts)) + sum(starts + length for length in range(starts, CAPACITY))
