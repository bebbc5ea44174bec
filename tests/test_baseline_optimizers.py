"""Lion, SignSGD, GSGD and Stacey: each by hand and against loops over its own formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from update_rules import (
    arrays,
    assert_close,
    conjugate_norm,
    gsgd,
    lion,
    lpsgd,
    parameters,
    set_gradients,
    sign,
    signsgd,
)

from curvdiag.errors import ArgumentError
from curvdiag.optim import GSGD, LPSGD, Lion, SignSGD, Stacey


@pytest.fixture(params=["in parts", "one by one"])
def way(request):
    """The two ways through a step."""
    return {"foreach": request.param == "in parts"}


def leaf(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_lion_by_hand(way):
    theta = leaf(1.0, -1.0, 2.0)
    optimizer = Lion([theta], lr=0.1, betas=(0.5, 0.75), weight_decay=0.5, **way)
    theta.grad = torch.tensor([4.0, -8.0, 0.0], dtype=torch.float64)
    optimizer.step()
    # u = (1, -1, 0); theta - 0.1 (u + theta / 2); m = (1, -2, 0).
    torch.testing.assert_close(theta.detach(), leaf(0.85, -0.85, 1.9).detach(), rtol=1e-14, atol=0)
    theta.grad = torch.tensor([-0.5, 2.0, -1.0], dtype=torch.float64)
    optimizer.step()
    # Interpolation (1/4, 0, -1/2): signs (1, 0, -1); m = (0.625, -1, -0.25).
    truth = leaf(0.95 * 0.85 - 0.1, -0.95 * 0.85, 0.95 * 1.9 + 0.1)
    torch.testing.assert_close(theta.detach(), truth.detach(), rtol=1e-14, atol=0)
    assert optimizer.state[theta]["exp_avg"].tolist() == [0.625, -1, -0.25]


@pytest.mark.parametrize("maximize", [False, True])
def test_lion_is_its_formula(maximize, way):
    for seed in range(3):
        tensors = parameters(seed)
        theta, m = arrays(tensors), [np.zeros(t.shape) for t in tensors]
        options = {"lr": 0.1, "betas": (0.9, 0.99)}
        optimizer = Lion(tensors, weight_decay=0.3, maximize=maximize, **options, **way)
        for step in range(5):
            set_gradients(tensors, 10 * seed + step)
            gradients = [-t.grad.numpy() if maximize else t.grad.numpy() for t in tensors]
            optimizer.step()
            theta, m = lion(theta, gradients, m, wd=0.3, **options)
        assert_close([optimizer.state[t]["exp_avg"] for t in tensors], m, rtol=1e-12, atol=1e-18)
        assert_close(tensors, theta, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("maximize", [False, True])
def test_signsgd_is_its_formula(maximize, way):
    for seed in range(3):
        tensors = parameters(seed)
        set_gradients(tensors, seed)
        theta = arrays(tensors)
        gradients = [-t.grad.numpy() if maximize else t.grad.numpy() for t in tensors]
        SignSGD(tensors, lr=0.1, weight_decay=0.3, maximize=maximize, **way).step()
        assert_close(tensors, signsgd(theta, gradients, lr=0.1, wd=0.3), rtol=1e-13, atol=1e-15)


def test_signs_are_exact_for_the_smallest_numbers(way):
    theta = torch.zeros(4, requires_grad=True)
    theta.grad = torch.tensor([1e-45, -1e-38, 0.0, 3e38])
    SignSGD([theta], lr=1.0, **way).step()
    assert theta.tolist() == [-1.0, 1.0, 0.0, -1.0]


def test_gsgd_by_hand(way):
    theta = leaf(0.0, 0.0, 0.0)
    theta.grad = torch.tensor([16.0, -1 / 16, 0.0], dtype=torch.float64)
    optimizer = GSGD([theta], lr=1.0, total_steps=4, **way)
    # Exponents 0, 1/4, 1/2, 3/4, and 1 beyond the run.
    for first, second in ((1, 1), (2, 0.5), (4, 0.25), (8, 0.125), (16, 1 / 16), (16, 1 / 16)):
        before = theta.detach().clone()
        optimizer.step()
        expected = torch.tensor([-first, second, 0.0], dtype=torch.float64)
        torch.testing.assert_close(theta.detach() - before, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("maximize", [False, True])
def test_gsgd_is_its_formula_and_goes_from_signsgd_to_sgd(maximize, way):
    total = 50
    tensors, signs = parameters(0), parameters(0)
    optimizer = GSGD(tensors, lr=0.1, total_steps=total, weight_decay=0.2, maximize=maximize, **way)
    for t in range(1, total + 1):
        set_gradients(tensors, t)
        theta = arrays(tensors)
        gradients = [-x.grad.numpy() if maximize else x.grad.numpy() for x in tensors]
        optimizer.step()
        truth = gsgd(theta, gradients, lr=0.1, t=t, total=total, wd=0.2)
        assert_close(tensors, truth, rtol=1e-12, atol=1e-14)
        if t == 1:
            set_gradients(signs, 1)
            SignSGD(signs, lr=0.1, weight_decay=0.2, maximize=maximize, **way).step()
            assert all(torch.equal(a, b) for a, b in zip(tensors, signs, strict=True))
    # At the last step within |g|^(1/T) of SGD, after it SGD bit for bit.
    for tensor, old, g in zip(arrays(tensors), theta, gradients, strict=True):
        step, sgd = (0.98 * old - tensor) / 0.1, g
        np.testing.assert_allclose(np.abs(step), np.abs(sgd) ** (1 - 1 / total), rtol=1e-9, atol=1e-12)
    theirs = [t.detach().clone().requires_grad_() for t in tensors]
    for one, other in zip(tensors, theirs, strict=True):
        other.grad = one.grad
    optimizer.param_groups[0]["weight_decay"] = 0
    optimizer.step()
    torch.optim.SGD(theirs, lr=0.1, maximize=maximize).step()
    assert all(torch.equal(a, b) for a, b in zip(tensors, theirs, strict=True))


def test_gsgd_counts_its_steps_across_a_checkpoint():
    one, two = parameters(0), parameters(0)
    first = GSGD(one, total_steps=6)
    for step in range(3):
        set_gradients(one, step)
        first.step()
    second = GSGD(two, total_steps=100)
    second.load_state_dict(first.state_dict())
    assert (second.param_groups[0]["steps_taken"], second.param_groups[0]["total_steps"]) == (3, 6)


@pytest.mark.parametrize("total", [0, -3, 2.5, True, None, math.nan])
def test_gsgd_refuses_runs_without_length(total):
    with pytest.raises(ArgumentError, match="total_steps"):
        GSGD(parameters(0), total_steps=total)


@pytest.mark.parametrize("p", [2.0, 2.5, 3.0, 6.0, math.inf])
def test_stacey_is_its_formula_and_lpsgd_with_the_dual_norm(p, way):
    tensors, twins = parameters(0), parameters(0)
    one = Stacey(tensors, lr=0.1, p=p, eps=1e-12, weight_decay=0.1, **way)
    other = LPSGD(twins, lr=0.1, p=p, eps=1e-12, weight_decay=0.1, dual_norm=True, **way)
    for step in range(4):
        set_gradients(tensors, step)
        set_gradients(twins, step)
        theta, gradients = arrays(tensors), [t.grad.numpy() for t in tensors]
        one.step()
        other.step()
        # Its own formula: ||g||_q^((p-2)/(p-1)) sign(g) |g|^(1/(p-1)).
        power = 0.0 if math.isinf(p) else 1 / (p - 1)
        length = conjugate_norm(gradients, p) ** (1 - power)
        for tensor, old, g in zip(arrays(tensors), theta, gradients, strict=True):
            signs = np.vectorize(sign, otypes=[float])(g)
            np.testing.assert_allclose(tensor, 0.99 * old - 0.1 * length * signs * np.abs(g) ** power, rtol=0.02)
        assert_close(tensors, lpsgd(theta, gradients, lr=0.1, p=p, eps=1e-12, wd=0.1, dual=True), 1e-12, 1e-12)
        assert all(torch.equal(a, b) for a, b in zip(tensors, twins, strict=True))
