"""The autocast, inference mode or no_grad of a caller changes no number of an algorithm."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from matrices import heavy_tailed, with_spectrum
from nets import make
from torch.nn import functional as F

from curvdiag import (
    Hessian,
    NoiseCovariance,
    Objective,
    cwgd,
    diagonal,
    frobenius_norm,
    layer_spectra,
    measure_spectrum,
    noise_scale,
    power_iteration,
    spectral_density,
    top_eigenpairs,
    trace,
)
from curvdiag.noise import gradient_moments
from curvdiag.scaling.alignment import alignment


@contextlib.contextmanager
def inference_with_gradients():
    with torch.inference_mode(), torch.enable_grad():
        yield


MODES = {
    "autocast": lambda: torch.autocast("cpu", dtype=torch.bfloat16),
    "inference": torch.inference_mode,
    "inference and gradients": inference_with_gradients,
    "no gradients": torch.no_grad,
}

MATRIX = with_spectrum(heavy_tailed(90))[0].float()
MODEL, BATCH = make("mlp-tanh", dtype=torch.float32)


def net():
    return Objective(MODEL, F.cross_entropy, BATCH)


def start(size):
    return torch.randn(size, 1, generator=torch.Generator().manual_seed(3))


def spectrum():
    found = measure_spectrum(Hessian(net()), 3, steps=12)
    return [*found.eigenpairs.values, found.trace.value, found.frobenius_norm.value]


def angle():
    objective = net()
    hessian = Hessian(objective)
    return alignment(hessian, NoiseCovariance(objective, graphs=hessian), probes=4).cosine.value


def rows_of_products():
    """Past everything that leaves the caller's modes before."""
    operator = Hessian(net())
    return operator.apply(start(operator.size).T.contiguous())


ALGORITHMS = {
    "apply": rows_of_products,
    "product": lambda: (op := Hessian(net())) @ start(op.size),
    "top_eigenpairs": lambda: top_eigenpairs(Hessian(net()), 5).vectors,
    "top_eigenpairs of a matrix": lambda: top_eigenpairs(MATRIX, 5).vectors,
    "top_eigenpairs, restarted": lambda: top_eigenpairs(MATRIX, 4, basis_size=9, start=start(90)).vectors,
    "power_iteration": lambda: power_iteration(MATRIX, start=start(90)).vectors,
    "measure_spectrum": spectrum,
    "spectral_density": lambda: spectral_density(MATRIX, steps=12, reorthogonalize="full").trace().value,
    "deflated density": lambda: spectral_density(MATRIX, steps=12, deflate="auto").trace().value,
    "layer_spectra": lambda: [one.lambda_max for one in layer_spectra(Hessian(net()), steps=8).layers.values()],
    "hutch++": lambda: trace(MATRIX, probes=9, method="hutch++").value,
    "xtrace": lambda: trace(MATRIX, probes=8, method="xtrace").value,
    "diagonal": lambda: diagonal(MATRIX, 4).value,
    "frobenius_norm": lambda: frobenius_norm(MATRIX, 4).value,
    "gradient_moments": lambda: gradient_moments(net()).trace,
    "noise_scale": lambda: noise_scale(net(), curvature=True).trace_hc.value,
    "cwgd": lambda: cwgd(net(), starts=2, steps=8, max_steps=8).value.value,
    "alignment": angle,
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_mode_of_the_caller_changes_no_bit(name, mode):
    outside = np.asarray(ALGORITHMS[name]())
    with MODES[mode]():
        inside = np.asarray(ALGORITHMS[name]())
    np.testing.assert_array_equal(inside, outside)


def test_the_modes_of_the_caller_are_back_afterwards_also_where_it_fails():
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.inference_mode():
        top_eigenpairs(MATRIX)
        with pytest.raises(ValueError):
            top_eigenpairs(MATRIX, 0)
        assert torch.is_autocast_enabled("cpu")
        assert torch.is_inference_mode_enabled()


def test_what_is_found_in_inference_mode_can_be_updated_and_differentiated():
    with torch.inference_mode():
        vectors = top_eigenpairs(MATRIX, 2).vectors
    vectors.mul_(2).requires_grad_().square().sum().backward()
    assert torch.equal(vectors.grad, 2 * vectors)
