"""Spectra of all layers from one pass a step: the numbers of one run for each layer, at the price of one."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from layered import NETS, block, dense_block, hessian, quadratic
from matrices import with_spectrum
from nets import cut, make
from scipy.linalg import eigh_tridiagonal
from torch import Tensor, nn

from curvdiag import GaussNewton, Hessian, NoiseCovariance, Objective, layer_spectra, spectral_density
from curvdiag.operators.blocks import Blocks
from curvdiag.operators.objective_operator import ObjectiveOperator
from curvdiag.space.probes import rademacher
from curvdiag.spectrum import layers as module
from curvdiag.spectrum.lanczos import Recurrence, lanczos


@pytest.mark.parametrize("options", [{}, {"memory": 0}, {"micro_batch": 3}], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_the_numbers_are_those_of_one_run_for_each_layer(net: str, options: dict[str, int]) -> None:
    op = hessian(net, **options)
    found = layer_spectra(op, steps=5, probes=2, seed=4)
    assert list(found) == list(op.parameters.layers())
    for name, layer in found.layers.items():
        alone = spectral_density(block(op, name), steps=5, probes=2, seed=4)
        scale = np.abs(alone.nodes).max()
        assert np.abs(layer.density.nodes - alone.nodes).max() < 1e-10 * scale
        assert np.abs(layer.density.weights - alone.weights).max() < 1e-10
        assert layer.trace.value == pytest.approx(alone.trace().value, rel=1e-10, abs=1e-10 * scale)
        assert layer.trace.standard_error == pytest.approx(alone.trace().standard_error, rel=1e-8, abs=1e-10 * scale)
        assert (layer.size, layer.matvecs) == (alone.size, alone.matvecs) == (layer.density.size, 10)
        assert layer.lambda_max == pytest.approx(alone.lambda_max, rel=1e-10)


@pytest.mark.parametrize("kind", [Hessian, GaussNewton, NoiseCovariance])
@pytest.mark.parametrize("net", NETS)
def test_residuals_bound_the_distance_to_an_eigenvalue_of_the_dense_block(
    net: str, kind: Callable[..., ObjectiveOperator]
) -> None:
    model, batch = make(net)
    op = kind(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3))))
    blocks = {name: dense_block(op, name) for name in op.parameters.layers()}
    truth = {name: torch.linalg.eigvalsh(one).numpy() for name, one in blocks.items()}
    for steps in (2, 5, 12):
        found = layer_spectra(op, steps=steps, probes=2, seed=1)
        for name, layer in found.layers.items():
            values, norm = truth[name], np.abs(truth[name]).max()
            assert np.abs(values - layer.lambda_max).min() <= layer.residual + 1e-12 * norm, (name, steps)
            assert layer.lambda_max <= values[-1] + 1e-12 * norm
            signs = rademacher(2, len(values), seed=1, dtype=torch.float64)
            samples = ((signs @ blocks[name]) * signs).sum(1)
            assert layer.trace.value == pytest.approx(float(samples.mean()), rel=1e-10, abs=1e-10 * norm)


@pytest.mark.parametrize("options", [{}, {"memory": 0}], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_with_a_tolerance_lambda_max_is_that_of_lapack(net: str, options: dict[str, int]) -> None:
    op = hessian(net, **options)
    for tol, accuracy in ((1e-2, 1e-2), (1e-6, 1e-10)):
        for name, layer in layer_spectra(op, tol=tol).layers.items():
            truth = float(torch.linalg.eigvalsh(dense_block(op, name))[-1])
            assert layer.converged
            assert layer.residual <= tol * abs(layer.lambda_max) + 1e-12
            assert layer.lambda_max == pytest.approx(truth, rel=accuracy), name


def ritz(alphas: np.ndarray, betas: np.ndarray) -> tuple[float, float]:
    values, vectors = eigh_tridiagonal(alphas, betas[:-1])
    return float(values[-1]), float(betas[-1] * abs(vectors[-1, -1]))


def chance_of_hiding(alphas: np.ndarray, betas: np.ndarray, point: float, size: int) -> float:
    """Of an eigenvalue at ``point`` of a matrix whose Lanczos run has these coefficients.

    At most ``1 / (p^T p)`` of the start vector lies along it, with the polynomials ``p_0 = 1, ..., p_m`` that the
    recurrence ``(T - point) p + beta_m p_m e_m = 0`` defines; a random vector has about ``g^2 / size`` there.
    """
    m = len(alphas)
    rows = np.zeros((m, m + 1))
    rows[:, :m] = np.diag(alphas - point) + np.diag(betas[:-1], 1) + np.diag(betas[:-1], -1)
    rows[-1, -1] = betas[-1]
    rest = np.linalg.solve(rows[:, 1:], -rows[:, 0])
    return math.erf(math.sqrt(size / (1 + rest @ rest) / 2))


@pytest.mark.parametrize("tol", [1e-1, 1e-3])
def test_a_layer_drops_out_at_the_step_at_which_its_largest_eigenvalue_is_known(tol: float) -> None:
    """To the tolerance, and with a chance of 1 % that there is a larger one."""
    op = hessian("transformer-tied")
    found = layer_spectra(op, tol=tol, seed=2)
    for name, layer in found.layers.items():
        run = lanczos(dense_block(op, name), rademacher(1, layer.size, seed=2, dtype=torch.float64), layer.matvecs)
        alphas, betas = run.alphas[0], run.betas[0]
        known = []
        for m in range(1, layer.matvecs + 1):
            value, residual = ritz(alphas[:m], betas[:m])
            above = value + max(tol, 0.01) * abs(value)
            hides = 0.0 if betas[m - 1] == 0 else chance_of_hiding(alphas[:m], betas[:m], above, layer.size)
            known.append(residual <= tol * abs(value) and hides <= 0.01)
        assert not any(known[:-1]), name
        assert known[-1] or layer.matvecs == layer.size, name
    taken = [layer.matvecs for layer in found.layers.values()]
    assert len(set(taken)) > 2
    assert found.matvecs == sum(taken)


def test_what_the_first_steps_do_not_see_is_waited_for() -> None:
    """The second of two close eigenvalues often has a small residual before the first one shows."""
    bulk = 0.5 * torch.rand(597, generator=torch.Generator().manual_seed(0))
    matrix, _ = with_spectrum(torch.cat([torch.tensor([2.0, 1.9, 1.5]), bulk]).double())
    tol, hasty, missed = 0.01, 0, 0
    for seed in range(100):
        run = lanczos(matrix, rademacher(1, 600, seed=seed, dtype=torch.float64), 14)
        parts = [(run.alphas[:, :m], run.betas[:, :m]) for m in range(1, 15)]
        values = [ritz(alphas[0], betas[0]) for alphas, betas in parts]
        hasty += next(value for value, residual in values if residual <= tol * value) < 2 * (1 - tol)
        stopped = [module._settled(alphas, betas, 600, tol) for alphas, betas in parts].index(True)
        missed += values[stopped][0] < 2 * (1 - tol)
    assert hasty > 5
    assert missed == 0


def test_a_bulk_of_equal_eigenvalues_does_not_hide_the_largest_one() -> None:
    """After one step the Ritz value of the bulk has a residual of 1 %."""
    diagonal = torch.ones(10_000, dtype=torch.float64)
    diagonal[17] = 2.0
    found = layer_spectra(quadratic(one=diagonal, other=3 * diagonal), tol=0.1)
    assert found["one"].lambda_max == pytest.approx(2.0, rel=1e-6)
    assert found["other"].lambda_max == pytest.approx(6.0, rel=1e-6)


def test_with_steps_and_a_tolerance_the_densities_stay_and_lambda_max_is_taken_further() -> None:
    op = hessian("conv-batchnorm")
    plain, further = layer_spectra(op, steps=3, probes=3), layer_spectra(op, steps=3, probes=3, tol=1e-6)
    for name, layer in further.layers.items():
        assert np.array_equal(layer.density.nodes, plain[name].density.nodes)
        assert layer.trace == plain[name].trace
        assert layer.converged
        truth = float(torch.linalg.eigvalsh(dense_block(op, name))[-1])
        assert layer.lambda_max == pytest.approx(truth, rel=1e-9), name
        assert layer.density.matvecs == 9 < layer.matvecs < 9 + layer.size
    assert sum(further[name].residual < plain[name].residual for name in plain) == len(plain)
    plain, enough = layer_spectra(op, steps=20), layer_spectra(op, steps=20, tol=0.1)
    assert enough.matvecs == plain.matvecs
    assert enough.lambda_max == plain.lambda_max


def test_a_step_builds_each_graph_once_whatever_the_number_of_layers() -> None:
    op = hessian("transformer-tied", memory=0, micro_batch=7)
    assert op.plan is not None
    groups, layers = len(op.plan.rebuilt), len(op.parameters.layers())
    assert (groups, layers) == (2, 7)
    found = layer_spectra(op, steps=5, probes=3)
    assert found.graphs == 5 * groups
    assert found.matvecs == 5 * 3 * layers
    calls: list[int] = []
    handle = op.objective.model.register_forward_hook(lambda *_: calls.append(1))
    layer_spectra(op, steps=4, probes=2)
    assert len(calls) == 4 * groups
    calls.clear()
    lean = layer_spectra(op, tol=1e-3)
    handle.remove()
    longest = max(layer.matvecs for layer in lean.layers.values())
    assert len(calls) == lean.graphs == longest * groups
    assert layer_spectra(hessian("transformer-tied"), steps=3).graphs == 0


def test_without_a_tolerance_nobody_waits_for_the_device_before_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU nothing waits; but every look at the coefficients would."""
    looks: list[int] = []
    original = Recurrence.coefficients
    monkeypatch.setattr(Recurrence, "coefficients", lambda run: looks.append(run.done) or original(run))
    layer_spectra(hessian("mlp-tanh"), steps=7)
    assert looks == [7, 7, 7]


def test_probes_that_do_not_fit_together_come_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    op = hessian("conv-batchnorm", memory=0)
    together = layer_spectra(op, steps=4, probes=3, tol=1e-5)
    monkeypatch.setattr(module, "free_bytes", lambda device: 2 * 2 * 5 * 8 * op.size)
    apart = layer_spectra(op, steps=4, probes=3, tol=1e-5)
    assert apart.graphs > together.graphs
    for name, layer in apart.layers.items():
        assert np.allclose(layer.density.nodes, together[name].density.nodes, rtol=1e-12, atol=1e-14)
        assert np.allclose(layer.density.weights, together[name].density.weights, rtol=1e-9, atol=1e-12)
        assert layer.lambda_max == pytest.approx(together[name].lambda_max, rel=1e-12)
        assert layer.matvecs == together[name].matvecs


def test_three_vectors_a_probe_are_all_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[int] = []
    original = Blocks.apply

    def apply(blocks: Blocks, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        found = original(blocks, rows)
        held = {}
        for one in gc.get_objects():
            if type(one) is Tensor and one.dtype == torch.float64 and one.shape in {r.shape for r in rows.values()}:
                held[one.untyped_storage().data_ptr()] = one.numel()
        alive.append(sum(held.values()))
        return found

    monkeypatch.setattr(Blocks, "apply", apply)
    size = 100_003  # no other tensor has this length twice
    diagonal = torch.linspace(0.1, 1, size, dtype=torch.float64)
    layer_spectra(quadratic(one=diagonal, other=diagonal[1:]), steps=6, probes=2)
    assert len(alive) == 6
    assert max(alive) == 3 * 2 * (2 * size - 1)
