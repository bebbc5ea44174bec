"""LPSGDM: its rule by hand and by loops, its limits, its two paths, and its preconditioner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from update_rules import arrays, assert_close, lpsgdm, parameters, set_gradients

from curvdiag.optim import LPSGD, LPSGDM

POWERS = (2.0, 2.5, 3.0, 6.0, 100.0, math.inf)


@pytest.fixture(params=["in parts", "one by one"])
def way(request):
    """The two ways through a step."""
    return {"foreach": request.param == "in parts"}


def moments(optimizer, tensors):
    return [optimizer.state[t]["momentum_buffer"] for t in tensors]


def test_two_steps_by_hand(way):
    theta = torch.tensor([1.0, -2.0], dtype=torch.float64, requires_grad=True)
    optimizer = LPSGDM([theta], lr=0.5, p=3, beta=0.75, eps=0.0, weight_decay=0.2, **way)
    theta.grad = torch.tensor([64.0, 0.0], dtype=torch.float64)
    optimizer.step()
    # m = 16, its direction 4: 0.9 - 2; no bias correction. Zero stays zero.
    torch.testing.assert_close(theta.detach(), torch.tensor([-1.1, -1.8], dtype=torch.float64), rtol=1e-14, atol=0)
    theta.grad = torch.tensor([-64.0, 4.0], dtype=torch.float64)
    optimizer.step()
    # m = 12 - 16 = -4, direction -2; m = 1, direction 1.
    torch.testing.assert_close(theta.detach(), torch.tensor([0.01, -2.12], dtype=torch.float64), rtol=1e-13, atol=0)
    torch.testing.assert_close(moments(optimizer, [theta])[0], torch.tensor([-4.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("maximize", [False, True])
def test_many_steps_are_those_of_the_formula(p, maximize, way):
    for seed in range(3):
        tensors = parameters(seed)
        theta, m = arrays(tensors), [np.zeros(t.shape) for t in tensors]
        options = {"lr": 0.1, "p": p, "beta": 0.8, "eps": 1e-6}
        optimizer = LPSGDM(tensors, weight_decay=0.3, maximize=maximize, **options, **way)
        for step in range(4):
            set_gradients(tensors, 10 * seed + step)
            gradients = [-t.grad.numpy() if maximize else t.grad.numpy() for t in tensors]
            optimizer.step()
            theta, m = lpsgdm(theta, gradients, m, wd=0.3, **options)
        assert_close(moments(optimizer, tensors), m, rtol=1e-12, atol=1e-18)
        assert_close(tensors, theta, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("maximize", [False, True])
def test_at_two_it_is_sgd_with_dampened_momentum_bit_for_bit(dtype, maximize, way):
    ours, theirs = parameters(0, dtype), parameters(0, dtype)
    options = {"lr": 0.0137, "maximize": maximize, **way}
    one = LPSGDM(ours, p=2, beta=0.9, **options)
    other = torch.optim.SGD(theirs, momentum=0.9, dampening=0.9, **options)
    for tensor in theirs:  # Left alone it would start at the first gradient.
        other.state[tensor]["momentum_buffer"] = torch.zeros_like(tensor)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        one.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("p", [2.0, 6.0, math.inf])
def test_without_momentum_it_is_lpsgd_bit_for_bit(p, way):
    ours, theirs = parameters(0), parameters(0)
    one, other = LPSGDM(ours, p=p, beta=0.0, **way), LPSGD(theirs, p=p, **way)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        one.step()
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("p", [2.0, 2.5, 6.0, math.inf])
def test_the_step_is_the_momentum_over_the_preconditioner(p):
    tensors = parameters(0)
    unused = torch.zeros(2, requires_grad=True)
    optimizer = LPSGDM([*tensors, unused], lr=0.5, p=p)
    assert optimizer.preconditioner() == {}
    for step in range(2):
        set_gradients(tensors, step)
        before = arrays(tensors)
        optimizer.step()
    optimizer.zero_grad()
    found = optimizer.preconditioner()
    assert list(found) == tensors
    assert unused not in optimizer.state
    rho = 1.0 if math.isinf(p) else (p - 2) / (p - 1)
    for tensor, old, m in zip(tensors, before, moments(optimizer, tensors), strict=True):
        kept = m.clone()
        scale = found[tensor]
        np.testing.assert_allclose(scale.numpy(), (np.abs(m.numpy()) + 1e-8) ** rho, rtol=1e-12)
        np.testing.assert_allclose(tensor.detach().numpy(), old - 0.5 * (m / scale).numpy(), rtol=1e-12)
        scale.zero_()
        assert torch.equal(m, kept)


def test_the_buffer_has_the_dtype_of_its_parameter_and_directions_are_single():
    for dtype in (torch.float16, torch.bfloat16):
        theta = torch.tensor([1.0, 0.5, 2.0], dtype=dtype, requires_grad=True)
        before = arrays([theta])
        theta.grad = torch.tensor([0.0, 1e-3, -8.0], dtype=dtype)
        optimizer = LPSGDM([theta], lr=0.1, p=6)
        optimizer.step()
        (m,) = moments(optimizer, [theta])
        assert m.dtype == dtype
        assert torch.equal(m, (theta.grad.double() * (1 - 0.9)).to(dtype))
        zero = [np.zeros(3)]
        # The formula from the buffer as it was rounded.
        truth, _ = lpsgdm(before, [m.double().numpy()], zero, lr=0.1, p=6, beta=0.0)
        np.testing.assert_allclose(arrays([theta])[0], truth[0], rtol=torch.finfo(dtype).eps / 2 + 1e-6)
        assert theta[0] == 1
        assert optimizer.preconditioner()[theta].dtype == torch.float32


def test_a_parameter_without_a_gradient_keeps_its_momentum_and_its_weights():
    one, two = parameters(0, shapes=[(3,), (3,)])
    optimizer = LPSGDM([one, two], weight_decay=0.5)
    set_gradients([one, two], 0)
    optimizer.step()
    kept, m = two.detach().clone(), optimizer.state[two]["momentum_buffer"].clone()
    two.grad = None
    optimizer.step()
    assert torch.equal(two, kept)
    assert torch.equal(optimizer.state[two]["momentum_buffer"], m)
