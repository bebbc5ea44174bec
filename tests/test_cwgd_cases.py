"""The cases in which curvature or noise change along the way, against dense matrices, samples and exact recursions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from curvdiag.experiments.cwgd_adaptive import Method, run_methods
from curvdiag.experiments.cwgd_cases import Multiplicative, Quartic, Regression, Rotated, Turning, all_cases, hutchinson
from curvdiag.experiments.quadratics import cosine, cwgd_factor, excess, second_moments


def dense(case: Any, t: int) -> tuple[np.ndarray, np.ndarray]:
    """The Hessian ``[d, d]`` of a turning case and the noise of one sample, written out."""
    d = len(case.curvatures)
    turn = np.eye(d)
    angle = np.pi / 2 * t / case.steps
    for k in range(d // 2):
        i, j = k, d - 1 - k
        turn[[i, i, j, j], [i, j, i, j]] = np.cos(angle), -np.sin(angle), np.sin(angle), np.cos(angle)
    return (turn * case.curvatures) @ turn.T, np.diag(case.variances)


@pytest.mark.parametrize("t", [0, 7, 20])
def test_the_turning_hessian_is_its_dense_one(t: int) -> None:
    case = Turning(20, noise="inverse")
    h, c = dense(case, t)
    x = np.random.default_rng(0).standard_normal((2, 1, 50))
    assert case.gradient(x, 0.0, t) == pytest.approx(x @ h, rel=1e-10, abs=1e-12)
    full, diagonal = 2 * np.trace(np.linalg.inv(h) @ c), 2 * np.sum(np.diag(c) / np.diag(h))
    assert case.cwgd("full", x, None, t) == pytest.approx(full, rel=1e-9)
    assert case.cwgd("diagonal", x, None, t) == pytest.approx(diagonal, rel=1e-9)
    if t == case.steps:
        assert case.error(x) == pytest.approx(0.5 * np.einsum("smi,ij,smj->sm", x, h, x))
        assert np.diag(h) == pytest.approx(case.curvatures[::-1])


def test_a_turning_case_follows_its_exact_recursion() -> None:
    """Plain cosine and the normalised variant, against the recursion of the dense second moment."""
    case = Turning(60, noise="proportional")
    methods = [Method(0.9), Method(0.9, "full")]
    errors, factors = run_methods(case, methods, 4000, np.random.default_rng(0))
    seen = np.array([2 * np.trace(np.linalg.inv(dense(case, t)[0]) @ dense(case, t)[1]) for t in range(60)])
    for i, factor in enumerate((np.ones(60), cwgd_factor(seen / seen[0], 1.0, normalized=True))):
        assert factors[:, i] == pytest.approx(factor, rel=1e-9)
        moments = np.full((50, 50), 100.0)
        for t, rate in enumerate(0.9 * cosine(60) * factor):
            h, c = dense(case, t)
            step = np.eye(50) - rate * h
            moments = step @ moments @ step.T + rate**2 * c / case.batch_size
        exact = 0.5 * np.trace(dense(case, 60)[0] @ moments)
        assert abs(errors[:, i].mean() - exact) < 4 * errors[:, i].std() / np.sqrt(4000)


@pytest.mark.parametrize("make", [Regression, Multiplicative, Rotated])
def test_noise_that_depends_on_the_state_follows_its_exact_recursion(make: Any) -> None:
    """The final error of plain cosine, over 1500 runs."""
    case = make(40, scale=3.0)
    errors, _ = run_methods(case, [Method(0.4)], 1500, np.random.default_rng(5))
    second = second_moments(0.4 * cosine(40), case.curvatures, case.expected_noise, 9.0)
    exact = float(excess(second, case.curvatures))
    assert abs(errors.mean() - exact) < 4 * errors.std() / np.sqrt(1500)
    assert errors.std() / np.sqrt(1500) < 0.05 * exact


def test_cwgd_of_regression_is_that_of_its_samples() -> None:
    """``2 sum_k C_kk / lambda_k`` from 200,000 drawn gradients; and the mini-batch's own form near it."""
    case = Regression(8, batch_size=200_000)
    x = np.random.default_rng(1).standard_normal((1, 1, 50))
    inputs, targets = case.draw(1, 1, np.random.default_rng(2))
    gradients = (inputs[0] @ x[0, 0] - targets[0, 0])[:, None] * inputs[0]
    truth = 2 * np.sum(gradients.var(0) / case.curvatures)
    assert case.cwgd("known", x, None, 1)[0, 0] == pytest.approx(truth, rel=0.01)
    case._diagonal = case.curvatures
    assert case.cwgd("mini-batch", x, (inputs, targets), 1)[0, 0] == pytest.approx(truth, rel=1e-3)
    assert case.gradient(x, (inputs, targets), 1)[0, 0] == pytest.approx(gradients.mean(0), rel=1e-9)


def test_the_mini_batch_form_of_regression_takes_the_batchs_own_hessian() -> None:
    """A mini-batch as large as a population has nearly the diagonal ``lambda``; a small one has not."""
    large, small = Regression(8, batch_size=100_000, condition=3.0), Regression(8, condition=3.0)
    for case, bound in ((large, 0.05), (small, 2.0)):
        case.draw(1, 0, np.random.default_rng(0))
        off = np.abs(case._diagonal / case.curvatures - 1).max()
        assert bound / 40 < off < bound
    before = small._diagonal
    small.steps = 80
    small.draw(1, 3, np.random.default_rng(1))
    assert small._diagonal is before, "kept until the next refresh"
    small.draw(1, 10, np.random.default_rng(1))
    assert small._diagonal is not before


def test_a_rotated_case_has_both_forms_of_its_dense_matrices() -> None:
    case = Rotated(10)
    x = np.random.default_rng(0).standard_normal((1, 1, 50)) * 5
    c = (case.basis * (1 + case.curvatures * x[0, 0] ** 2)) @ case.basis.T
    assert case.basis.T @ case.basis == pytest.approx(np.eye(50), abs=1e-12)
    full, diagonal = 2 * np.trace(np.linalg.inv(case.hessian) @ c), 2 * np.sum(np.diag(c) / np.diag(case.hessian))
    assert case.cwgd("full", x, None, 0)[0, 0] == pytest.approx(full, rel=1e-9)
    assert case.cwgd("diagonal", x, None, 0)[0, 0] == pytest.approx(diagonal, rel=1e-9)
    estimates = []
    for seed in range(400):
        case.draw(1, 0, np.random.default_rng(seed))
        estimates.append(case._diagonal[0, 0])
    error = np.std(estimates, axis=0) / 20
    assert np.all(np.abs(np.mean(estimates, axis=0) - np.diag(case.hessian)) < 4.5 * error + 1e-3)
    assert case.cwgd("diagonal, 20 probes", x, None, 0)[0, 0] == pytest.approx(
        2 * np.sum(np.diag(c) / case._diagonal[0, 0]), rel=1e-12
    )


def test_hutchinsons_diagonal_is_exact_for_diagonal_matrices_and_floored_as_curvdiags() -> None:
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (1, 3, 4))
    assert hutchinson(signs, signs * np.array([4.0, -2.0, 1e-9, 1.0]))[0, 0].tolist() == [4.0, 2.0, 0.004, 1.0]


def test_the_quartics_gradient_and_curvature_are_its_derivatives() -> None:
    case = Quartic(10)
    x = torch.linspace(-2, 2, 50, dtype=torch.float64)

    def value(y: torch.Tensor) -> torch.Tensor:
        return (torch.from_numpy(case.curvatures) * (y**2 / 2 + y**4 / 4)).sum()

    states = x.numpy()[None, None]
    assert case.error(states)[0, 0] == pytest.approx(float(value(x)))
    gradient = torch.autograd.functional.jacobian(value, x)
    assert case.gradient(states, 0.0, 0)[0, 0] == pytest.approx(gradient.numpy())
    curvature = torch.autograd.functional.hessian(value, x).diagonal()
    assert case.cwgd("known", states, None, 0)[0, 0] == pytest.approx(float(2 * (1 / curvature).sum()))


def test_the_normalised_variant_is_cwgd_cosine_at_twice_the_rate() -> None:
    """So that tuned, the two are one method: in every case and every form, with the same noise."""
    for case in all_cases(12):
        for form in case.forms:
            methods = [Method(0.2, form), Method(0.4, form, normalized=False), Method(0.2)]
            errors, _ = run_methods(case, methods, 3, np.random.default_rng(0))
            assert errors[:, 0] == pytest.approx(errors[:, 1], rel=1e-10)
            assert not np.allclose(errors[:, 0], errors[:, 2], rtol=1e-6), "and it is not plain cosine"
