"""LPSGD: its rule by hand and by loops, its limits, its two paths, and its preconditioner."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from update_rules import (
    arrays,
    assert_close,
    conjugate_norm,
    lpsgd,
    parameters,
    set_gradients,
)

from curvdiag.optim import LPSGD

POWERS = (2.0, 2.5, 3.0, 6.0, 100.0, math.inf)


@pytest.fixture(params=["in parts", "one by one"])
def way(request):
    """The two ways through a step."""
    return {"foreach": request.param == "in parts"}


def test_a_step_by_hand(way):
    theta = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64, requires_grad=True)
    theta.grad = torch.tensor([16.0, -1 / 16, 0.0], dtype=torch.float64)
    LPSGD([theta], lr=0.5, p=3, eps=0.0, weight_decay=0.2, **way).step()
    # 0.9 * (1, 2, -3) - 0.5 * (4, -1/4, 0)
    torch.testing.assert_close(
        theta.detach(), torch.tensor([-1.1, 1.925, -2.7], dtype=torch.float64), rtol=1e-14, atol=0
    )


def test_a_whole_step_by_hand(way):
    theta = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    theta.grad = torch.tensor([1.0, -8.0], dtype=torch.float64)
    # p = 3, q = 1.5: ||g||_q = (1 + 8^1.5)^(2/3), its root times (1, -sqrt 8).
    LPSGD([theta], lr=0.1, p=3, eps=0.0, dual_norm=True, **way).step()
    length = (1 + 8**1.5) ** (1 / 3)
    truth = torch.tensor([-0.1 * length, 0.1 * length * 8**0.5], dtype=torch.float64)
    torch.testing.assert_close(theta.detach(), truth, rtol=1e-14, atol=0)


@pytest.mark.parametrize("dual", [False, True])
@pytest.mark.parametrize("p", POWERS)
def test_many_steps_are_those_of_the_formula(p, dual, way):
    for seed in range(3):
        tensors = parameters(seed)
        theta = arrays(tensors)
        optimizer = LPSGD(tensors, lr=0.1, p=p, eps=1e-6, weight_decay=0.3, dual_norm=dual, **way)
        for step in range(4):
            set_gradients(tensors, 10 * seed + step)
            gradients = [t.grad.numpy() for t in tensors]
            optimizer.step()
            theta = lpsgd(theta, gradients, lr=0.1, p=p, eps=1e-6, wd=0.3, dual=dual)
        assert_close(tensors, theta, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("p", POWERS)
def test_in_single_precision_too(p, way):
    tensors = parameters(0, torch.float32)
    theta = arrays(tensors)
    set_gradients(tensors, 1)
    LPSGD(tensors, lr=0.1, p=p, **way).step()
    # The step to 4e-6, and the rounding of the weights.
    truth = lpsgd(theta, [t.grad.double().numpy() for t in tensors], lr=float(np.float64(0.1)), p=p)
    for tensor, new, old in zip(arrays(tensors), truth, theta, strict=True):
        assert (np.abs(tensor - new) <= 4e-6 * np.abs(new - old) + 2**-23 * np.abs(new)).all()


@pytest.mark.parametrize("maximize", [False, True])
@pytest.mark.parametrize(
    ("dtype", "decay"),
    [(torch.float16, 0), (torch.bfloat16, 0), (torch.float32, 0), (torch.float32, 0.3), (torch.float64, 0.3)],
)
def test_at_two_it_is_sgd_bit_for_bit(dtype, decay, maximize, way):
    """With weight decay too, where nothing is in half precision: decoupled and coupled are then the same formula."""
    ours, theirs = parameters(0, dtype), parameters(0, dtype)
    options = {"lr": 0.0137, "maximize": maximize, "weight_decay": decay, **way}
    one, other = LPSGD(ours, p=2, **options), torch.optim.SGD(theirs, **options)
    for step in range(5):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        one.step()
        other.step()
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        assert all(torch.equal(a.grad, b.grad) for a, b in zip(ours, theirs, strict=True))


def test_at_two_a_learning_rate_as_a_tensor_is_that_of_sgd_too(way):
    ours, theirs = parameters(0, torch.float32), parameters(0, torch.float32)
    rate = torch.tensor([0.0137])
    one, other = LPSGD(ours, rate, p=2.0, **way), torch.optim.SGD(theirs, rate, **way)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        one.step()
        other.step()
        rate *= 0.7
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_towards_infinity_it_is_signsgd(way):
    far, farther, signs = (parameters(0) for _ in range(3))
    for tensors in (far, farther, signs):
        set_gradients(tensors, 3)
    LPSGD(far, lr=0.1, p=math.inf, eps=0.0, **way).step()
    LPSGD(farther, lr=0.1, p=1e10, eps=0.0, **way).step()
    with torch.no_grad():
        for t in signs:
            t.sub_(0.1 * t.grad.sign())
    assert_close(far, arrays(signs), rtol=1e-15)
    assert_close(farther, arrays(signs), rtol=1e-7)


@pytest.mark.parametrize("p", [2.0, 2.5, 6.0, math.inf])
@pytest.mark.parametrize("dual", [False, True])
def test_the_step_is_the_gradient_over_the_preconditioner(p, dual):
    tensors = parameters(0)
    set_gradients(tensors, 1)
    unused = torch.zeros(2, requires_grad=True)
    optimizer = LPSGD([*tensors, unused], lr=0.5, p=p, dual_norm=dual)
    before = arrays(tensors)
    optimizer.step()
    found = optimizer.preconditioner()
    assert list(found) == tensors
    rho = 1.0 if math.isinf(p) else (p - 2) / (p - 1)
    factor = conjugate_norm([t.grad.numpy() for t in tensors], p) ** rho if dual else 1.0
    for tensor, old in zip(tensors, before, strict=True):
        scale = found[tensor]
        assert scale.shape == tensor.shape
        assert not scale.requires_grad
        truth = (tensor.grad.abs().numpy() + 1e-8) ** rho / factor
        np.testing.assert_allclose(scale.numpy(), truth, rtol=1e-12)
        np.testing.assert_allclose(tensor.detach().numpy(), old - 0.5 * (tensor.grad / scale).numpy(), rtol=1e-12)
        gradient = tensor.grad.clone()
        scale.zero_()
        assert torch.equal(tensor.grad, gradient)


def test_the_preconditioner_of_half_precision_is_single():
    theta = torch.ones(3, dtype=torch.float16, requires_grad=True)
    theta.grad = torch.tensor([0.0, 1.0, 4.0], dtype=torch.float16)
    found = LPSGD([theta], p=math.inf).preconditioner()[theta]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), [1e-8, 1, 4], rtol=4e-6)


def test_each_group_has_its_own_p_and_its_own_norm():
    one, two = parameters(0, shapes=[(4,), (3,)])
    set_gradients([one, two], 1)
    theta = arrays([one, two])
    groups = [{"params": [one]}, {"params": [two], "p": 3.0, "lr": 0.2}]
    LPSGD(groups, lr=0.1, p=6, dual_norm=True).step()
    assert_close([one], lpsgd(theta[:1], [one.grad.numpy()], lr=0.1, p=6, dual=True), rtol=1e-13)
    assert_close([two], lpsgd(theta[1:], [two.grad.numpy()], lr=0.2, p=3, dual=True), rtol=1e-13)


def test_a_whole_step_is_homogeneous_of_degree_one_in_the_gradient():
    steps = []
    for scale in (1.0, 1000.0):
        (theta,) = parameters(0, shapes=[(40,)])
        set_gradients([theta], 1)
        theta.grad *= scale
        before = theta.detach().clone()
        LPSGD([theta], lr=1.0, p=6, eps=0.0, dual_norm=True).step()
        steps.append(theta.detach() - before)
    torch.testing.assert_close(steps[1], 1000 * steps[0], rtol=1e-10, atol=1e-12)


def test_half_precision_weights_move_by_the_single_precision_step():
    """1e-8 is zero in float16; a zero gradient stays one, and the others see it."""
    for dtype in (torch.float16, torch.bfloat16):
        theta = torch.tensor([1.0, 0.5, -0.25, 2.0], dtype=dtype, requires_grad=True)
        theta.grad = torch.tensor([0.0, 6e-8, -1e-3, 8.0], dtype=dtype)
        for foreach in (True, False):
            twin = theta.detach().clone().requires_grad_()
            twin.grad = theta.grad
            LPSGD([twin], lr=0.1, p=6, foreach=foreach).step()
            truth = lpsgd(arrays([theta]), [theta.grad.double().numpy()], lr=0.1, p=6)[0]
            assert np.isfinite(arrays([twin])[0]).all()
            assert twin[0] == 1
            np.testing.assert_allclose(arrays([twin])[0], truth, rtol=torch.finfo(dtype).eps / 2 + 1e-6)
