"""Algorithms on real Hessians: the engine and the spectrum together, against LAPACK."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from nets import make
from torch import nn

from curvdiag import Hessian, Objective, anisotropy, diagonal, spectral_density, top_eigenpairs, trace
from curvdiag.space.probes import rademacher


def softmax_regression_at_zero(features: int = 12, classes: int = 10) -> Hessian:
    """At zero weights every class has probability 1/10: ``H = (X^T X / N) kron (I - 1 1^T / 10) / 10``.

    The second factor has nine equal eigenvalues and a zero, so every eigenvalue of H is nine-fold.
    """
    generator = torch.Generator().manual_seed(0)
    scales = 0.75 ** torch.arange(features, dtype=torch.float64)
    inputs = torch.randn(200, features, generator=generator, dtype=torch.float64) * scales
    targets = torch.randint(classes, (200,), generator=generator)
    model = nn.Linear(features, classes, bias=False).double()
    nn.init.zeros_(model.weight)
    return Hessian(Objective(model, nn.CrossEntropyLoss(), (inputs, targets)))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", [1, 9, 12, 20])
def test_every_copy_of_a_nine_fold_eigenvalue_is_found(k: int, seed: int) -> None:
    op = softmax_regression_at_zero()
    truth = torch.linalg.eigvalsh(op.dense()).flip(0)
    assert torch.allclose(truth[:9], truth[:1].expand(9)), "the problem is not the one it claims to be"
    pairs = top_eigenpairs(op, k, tol=1e-6, seed=seed)
    assert bool(pairs.converged.all())
    assert float((pairs.values - truth[:k]).abs().max()) < 1e-8 * float(truth[0])


@pytest.mark.parametrize("net", ["mlp-relu", "conv-batchnorm", "transformer-tied", "lstm"])
@pytest.mark.parametrize("which", ["LA", "SA", "LM", "BE"])
def test_residuals_bound_the_distance_to_an_eigenvalue(net: str, which: str) -> None:
    model, batch = make(net)
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), batch), dtype=torch.float64)
    truth = torch.linalg.eigvalsh(op.dense())
    pairs = top_eigenpairs(op, 3, which=which, tol=1e-2)  # type: ignore[arg-type]
    distance = (pairs.values[:, None] - truth).abs().min(1).values
    assert bool((distance <= pairs.residuals + 1e-12 * truth.abs().max()).all())
    explicit = (op @ pairs.vectors - pairs.vectors * pairs.values).norm(dim=0)
    assert torch.allclose(explicit, pairs.residuals, rtol=1e-3, atol=1e-10 * float(truth.abs().max()))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-8), (torch.float32, 1e-5)])
@pytest.mark.parametrize("net", ["mlp-relu", "conv-batchnorm", "transformer-tied"])
def test_quadrature_of_each_probe_has_the_moments_of_its_start_vector(
    net: str, dtype: torch.dtype, tolerance: float
) -> None:
    """Without reorthogonalisation: ``P sum_k w_k theta_k^j = z^T H^j z`` for each probe z."""
    model, batch = make(net)
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    matrix = Hessian(objective, dtype=torch.float64).dense()
    density = spectral_density(Hessian(objective, dtype=dtype), steps=60, probes=3, seed=4)
    starts = rademacher(3, len(matrix), seed=4, dtype=torch.float64, device=torch.device("cpu"))
    product, size = starts, float(torch.linalg.eigvalsh(matrix).abs().max())
    for power in range(1, 5):
        product = product @ matrix
        truth = (starts * product).sum(1).numpy()
        quadrature = len(matrix) * density.per_probe(lambda x, power=power: x**power)
        # The scale of a moment is that of its absolute value: odd ones may cancel.
        scale = np.maximum(np.abs(truth), (starts @ torch.linalg.matrix_power(matrix, 2) * starts).sum(1).numpy()
                           * size ** (power - 2))  # fmt: skip
        assert np.all(np.abs(quadrature - truth) <= tolerance * scale)
    assert np.allclose(density.weights.sum(1), 1, atol=1e-10)


def test_trace_and_diagonal_agree_with_the_dense_matrix() -> None:
    model, batch = make("mlp-tanh")
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), batch))
    matrix = op.dense()
    for method in ("hutchinson", "hutch++", "xtrace"):
        estimate = trace(op, method=method, probes=30)
        assert abs(float(estimate) - float(matrix.trace())) <= 4 * estimate.standard_error + 1e-10
    on_diagonal = diagonal(op, probes=400)
    error = np.abs(on_diagonal.value - matrix.diagonal().numpy())
    assert np.mean(error <= 3 * on_diagonal.standard_error + 1e-12) > 0.95


def test_anisotropy_agrees_with_the_dense_spectrum() -> None:
    """Where the trace is far from zero: the ratios' standard errors are first-order ones."""
    op = softmax_regression_at_zero()
    measured, exact = anisotropy(op, steps=80, probes=40), anisotropy(torch.linalg.eigvalsh(op.dense()))
    for name in ("stable_rank", "participation_ratio", "negative_mass", "intrinsic_dimension"):
        estimate, truth = getattr(measured, name), getattr(exact, name)
        assert abs(float(estimate) - float(truth)) <= 4 * estimate.standard_error + 1e-3 * abs(float(truth)), name
