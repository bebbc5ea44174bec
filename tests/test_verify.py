"""``curvdiag verify`` agrees with the references, and would notice if it did not."""

from __future__ import annotations

import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import curvdiag.verify.checks as checks
from curvdiag.cli import main
from curvdiag.errors import CurvdiagError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian
from curvdiag.operators.base import SymmetricOperator
from curvdiag.spectrum import SpectralDensity, spectral_density
from curvdiag.verify import Check, Problem, Verification, problems, verify
from curvdiag.verify.dense import Dense
from curvdiag.verify.pyhessian import PyHessian

RANDOM = ("trace, Hutchinson", "its standard error, relative", "eigenvalues above")


class Altered(SymmetricOperator):
    """A Hessian whose products ``change`` falsifies."""

    def __init__(self, change: Callable[[Tensor, Tensor], Tensor], objective: Objective, **options: Any) -> None:
        self.true, self.change = Hessian(objective, **options), change
        self.size, self.dtype, self.device = self.true.size, self.true.dtype, self.true.device

    def apply(self, rows: Tensor) -> Tensor:
        return self.change(rows, self.true.apply(rows))


class BatchesAlike(SymmetricOperator):
    """The mistake of others: the mean of the batches' Hessians, whatever the batches' sizes."""

    def __init__(self, objective: Objective, **options: Any) -> None:
        criterion = torch.nn.CrossEntropyLoss()
        parts = [Objective(objective.model, criterion, batch=batch) for batch in objective.batches]
        self.parts = [Hessian(part, **options) for part in parts]
        self.size, self.dtype, self.device = self.parts[0].size, self.parts[0].dtype, self.parts[0].device

    def apply(self, rows: Tensor) -> Tensor:
        return torch.stack([part.apply(rows) for part in self.parts]).mean(0)


@pytest.fixture(scope="module")
def cases() -> dict[str, Problem]:
    return {problem.name: problem for problem in problems()}


@pytest.fixture(scope="module")
def whole(cases: dict[str, Problem]) -> Verification:
    """The true operator on every problem."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # quiet, whatever PyHessian makes PyTorch say
        return verify(list(cases.values()))


def altered(change: Callable[[Tensor, Tensor], Tensor]) -> Callable[..., Altered]:
    return lambda objective, **options: Altered(change, objective, **options)


def failed(result: Verification) -> set[tuple[str, str]]:
    return {(check.quantity, check.against) for check in result.failures}


def test_every_comparison_holds(whole: Verification, cases: dict[str, Problem]) -> None:
    assert whole.passed, "\n".join(map(str, whole.failures))
    assert {check.problem for check in whole.checks} == set(cases)
    for name in cases:
        rows = [check for check in whole.checks if check.problem == name]
        assert len(rows) == 17
        assert {"LAPACK", "PyHessian"} <= {check.against for check in rows}


def test_the_dense_reference_is_the_hessian_by_differences(cases: dict[str, Problem]) -> None:
    """The reference itself, against central differences of a plain backward pass."""
    problem = cases["transformer"]
    truth = Dense.hessian(problem)
    (inputs, targets), parameters = problem.batches[0], list(problem.model.parameters())
    direction = torch.randn(truth.size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    at = torch.nn.utils.parameters_to_vector(parameters).detach().clone()

    def gradient(flat: Tensor) -> Tensor:
        torch.nn.utils.vector_to_parameters(flat, parameters)
        loss = torch.nn.functional.cross_entropy(problem.model(inputs), targets)
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)])

    h = 1e-5
    try:
        product = (gradient(at + h * direction) - gradient(at - h * direction)) / (2 * h)
    finally:
        torch.nn.utils.vector_to_parameters(at, parameters)
    torch.testing.assert_close(truth.matrix @ direction, product, rtol=1e-6, atol=1e-7)
    assert truth.projector(truth.widest_gap()).trace == pytest.approx(
        int((truth.eigenvalues > truth.widest_gap()).sum()), abs=1e-9
    )


def test_a_scale_off_by_one_in_ten_thousand_is_noticed(cases: dict[str, Problem]) -> None:
    """In every row whose tolerance is not statistical; these see a factor of four."""
    everything = failed_rows(cases["MLP"], lambda _, product: 4 * product)
    sharp = failed_rows(cases["MLP"], lambda _, product: 1.0001 * product)
    names = {quantity for quantity, _ in everything}
    rows = verify([cases["MLP"]]).checks
    assert names == {check.quantity for check in rows} - {"mass of the density"}
    assert sharp == {row for row in everything if not row[0].startswith(RANDOM)}


def failed_rows(problem: Problem, change: Callable[[Tensor, Tensor], Tensor]) -> set[tuple[str, str]]:
    return failed(verify([problem], operator=altered(change)))


@pytest.mark.parametrize(
    "change",
    [
        lambda rows, product: product + 1e-6 * rows,
        lambda rows, product: product.clone().index_fill_(1, torch.tensor([3]), 0.0),
        lambda rows, product: product + 1e-6 * rows.roll(1, 1),
        lambda rows, product: product.float().double() if product.dtype == torch.float64 else product,
        lambda rows, product: torch.full_like(product, math.nan),
    ],
    ids=["shifted", "a row is zero", "not symmetric", "single precision", "NaN"],
)
def test_a_wrong_operator_fails_against_both_references(
    cases: dict[str, Problem], change: Callable[[Tensor, Tensor], Tensor]
) -> None:
    rows = failed_rows(cases["MLP"], change)
    assert {("product, relative", "LAPACK"), ("product, relative", "PyHessian")} <= rows


def test_batches_weighted_alike_fail_where_batches_are_ragged(cases: dict[str, Problem]) -> None:
    result = verify([cases["ragged batches 32,32,32,4"]], operator=BatchesAlike)
    assert {("product, relative", "LAPACK"), ("product, relative", "PyHessian")} <= failed(result)


@pytest.mark.parametrize("loss", ["nodes", "weights"])
def test_a_wrong_density_is_noticed(cases: dict[str, Problem], monkeypatch: pytest.MonkeyPatch, loss: str) -> None:
    def wrong(*arguments: Any, **options: Any) -> SpectralDensity:
        right = spectral_density(*arguments, **options)
        nodes = right.nodes * (1.001 if loss == "nodes" else 1)
        weights = right.weights * (1.001 if loss == "weights" else 1)
        return SpectralDensity(nodes, weights, right.size, steps=right.steps, matvecs=right.matvecs)

    monkeypatch.setattr(checks, "spectral_density", wrong)
    rows = {quantity for quantity, _ in failed(verify([cases["MLP"]]))}
    moments = {"moments 1 to 4, float64, relative", "moments 1 to 4, float32, relative"}
    expected = moments | {"density, distance of the curves"}
    assert rows == (expected | {"mass of the density"} if loss == "weights" else expected)


def test_an_operator_that_raises_is_a_failed_row_that_says_why(cases: dict[str, Problem]) -> None:
    def refuse(objective: Objective, **_: Any) -> SymmetricOperator:
        raise RuntimeError("out of order")

    result = verify([cases["MLP"]], operator=refuse)
    assert not result.passed
    assert "out of order" in result.checks[0].note


def test_nothing_compared_is_nothing_verified() -> None:
    assert not verify([]).passed
    assert not Check("p", "q", "r", 1.0, 1.0, math.nan, 1.0).passed


def test_pyhessians_density_is_tried_and_its_failure_told(whole: Verification) -> None:
    rows = [check for check in whole.checks if check.quantity.startswith("density")]
    assert len(rows) == 4
    for row in rows:
        assert re.search(r"PyHessian's density fails.*eig", row.note)


def test_a_pyhessian_whose_density_works_is_compared_with(
    cases: dict[str, Problem], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As soon as torch.eig, or a PyHessian without it, exists again."""

    def eig(matrix: Tensor, eigenvectors: bool) -> tuple[Tensor, Tensor]:
        values, vectors = torch.linalg.eigh(matrix)
        return torch.stack([values, torch.zeros_like(values)], 1), vectors

    monkeypatch.setattr(torch, "eig", eig, raising=False)
    result = verify([cases["MLP"]])
    row = next(check for check in result.checks if check.quantity == "trace of the density")
    assert row.passed, row
    assert ("trace of the density", "PyHessian") in failed_rows(cases["MLP"], lambda _, product: 20 * product)


def test_asking_leaves_no_trace(cases: dict[str, Problem]) -> None:
    problem = cases["ragged batches 32,32,32,4"]
    problem.model.train()
    for parameter in problem.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.manual_seed(3)
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    weights = {name: tensor.clone() for name, tensor in problem.model.state_dict().items()}
    try:
        assert verify([problem]).passed
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads
        assert torch.get_default_dtype() == torch.float32
        assert problem.model.training
        assert all(torch.equal(tensor, weights[name]) for name, tensor in problem.model.state_dict().items())
        assert all(torch.equal(p.grad, torch.ones_like(p)) for p in problem.model.parameters())
    finally:
        problem.model.eval().zero_grad()


def test_problems_are_the_same_each_time() -> None:
    for one, two in zip(problems(), problems(), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.model.parameters(), two.model.parameters(), strict=True))
        assert all(torch.equal(a, b) for x, y in zip(one.batches, two.batches, strict=True) for a, b in zip(x, y))  # noqa: B905


def test_without_pyhessian_the_error_says_what_to_install(
    cases: dict[str, Problem], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "pyhessian", None)
    with pytest.raises(CurvdiagError, match="pip install pyhessian"):
        PyHessian(cases["MLP"])
    with pytest.raises(SystemExit) as end:
        main(["verify"])
    assert end.value.code == 2
    assert "pip install pyhessian" in capsys.readouterr().err


def run(monkeypatch: pytest.MonkeyPatch, result: Verification, *arguments: str) -> int:
    monkeypatch.setattr("curvdiag.verify.verify", lambda **_: result)
    with pytest.raises(SystemExit) as end:
        main(["verify", *arguments])
    return int(end.value.code or 0)


def test_the_command_prints_every_row_and_saves_them(
    whole: Verification, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, whole, "--json", str(tmp_path / "rows.json")) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == len(whole.checks)
    assert "FAIL" not in out
    assert f"{len(whole.checks)} of {len(whole.checks)} checks passed" in out
    saved = json.loads((tmp_path / "rows.json").read_text())
    assert saved["passed"] is True
    assert saved["versions"]["pyhessian"]
    assert [row["difference"] for row in saved["checks"]] == [check.difference for check in whole.checks]


def test_one_failed_row_makes_exit_code_one(
    whole: Verification, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Check("MLP", "trace", "LAPACK", math.nan, 1.0, math.inf, 0.1, "[why]")
    result = Verification((*whole.checks[:3], bad))
    assert run(monkeypatch, result, "--json", str(tmp_path / "rows.json")) == 1
    out = capsys.readouterr().out
    assert out.count("FAIL") == 1
    assert "[why]" in out
    row = json.loads((tmp_path / "rows.json").read_text())["checks"][-1]
    assert (row["value"], row["difference"], row["passed"]) == ("nan", "inf", False)
    assert json.loads((tmp_path / "rows.json").read_text())["passed"] is False
