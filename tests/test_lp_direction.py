"""The l_p direction: exact by hand and by loops, the minimiser it claims to be, and its invariances."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from update_rules import arrays, conjugate_norm, parameters, power_direction, set_gradients

from curvdiag.errors import ArgumentError
from curvdiag.optim import dual_norm, lp_direction

POWERS = (2.0, 2.0001, 2.5, 3.0, 6.0, 9.0, 100.0, math.inf)


def test_directions_by_hand():
    g = torch.tensor([16.0, -1 / 16, 1.0, 0.0], dtype=torch.float64)
    # p = 3: |g|^(1/2); p = 5: |g|^(1/4); infinity: the sign.
    for p, expected in ((3, [4, -0.25, 1, 0]), (5, [2, -0.5, 1, 0]), (math.inf, [1, -1, 1, 0])):
        found = lp_direction(g, p, eps=0.0)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)
    # With eps = 3 at p = 3: 16/sqrt(19), and 1/sqrt(4).
    found = lp_direction(g, 3, eps=3.0)
    assert float(found[0]) == pytest.approx(16 / 19**0.5, rel=1e-14)
    assert float(found[2]) == pytest.approx(0.5, rel=1e-14)


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float64, 1e-14), (torch.float32, 4e-6)])
def test_directions_are_right_to_the_rounding_promised(p, dtype, rounding):
    for seed in range(4):
        tensors = parameters(seed, dtype, [(2000,)])
        set_gradients(tensors, seed)
        g = tensors[0].grad
        truth = [power_direction(float(x), p) for x in g]
        np.testing.assert_allclose(lp_direction(g, p).double().numpy(), truth, rtol=rounding, atol=0)


def test_at_two_it_is_the_gradient_itself():
    g = torch.randn(5, generator=torch.Generator().manual_seed(0))
    assert lp_direction(g, 2) is g


def test_close_to_two_it_is_close_to_the_gradient_and_far_away_close_to_the_sign():
    g = torch.tensor([3.0, -1e-3, 2e-7], dtype=torch.float64)
    drop = (g - lp_direction(g, 2 + 1e-9, eps=0.0)) / g
    # 1 - |g|^-rho with rho = 1e-9.
    np.testing.assert_allclose(drop.numpy(), 1e-9 * np.log(np.abs(g.numpy())), rtol=1e-5)
    np.testing.assert_allclose(lp_direction(g, 1e12, eps=0.0).numpy(), np.sign(g.numpy()), rtol=1e-10)
    np.testing.assert_array_equal(lp_direction(g, math.inf, eps=0.0).numpy(), np.sign(g.numpy()))


@pytest.mark.parametrize("p", POWERS)
@pytest.mark.parametrize("eps", [0.0, 1e-8, 1e-300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_stay_zero_in_every_dtype(p, eps, dtype):
    found = lp_direction(torch.tensor([0.0, -0.0, 1.0], dtype=dtype), p, eps=eps)
    assert found.dtype == dtype
    assert found[:2].tolist() == [0.0, 0.0]
    # (1 + eps)^-rho.
    assert float(found[2]) == pytest.approx(1.0, rel=1.001e-8)


@pytest.mark.parametrize("p", [2.5, 6.0, math.inf])
def test_the_smallest_numbers_neither_overflow_nor_vanish_without_eps(p):
    # From the smallest normal number up.
    g = torch.tensor([1.2e-38, 1e-30, 3e38])
    truth = [power_direction(float(x), p, 0.0) for x in g]
    np.testing.assert_allclose(lp_direction(g, p, eps=0.0)[1:].double().numpy(), truth[1:], rtol=16e-6)
    assert 0.4 * truth[0] < float(lp_direction(g, p, eps=0.0)[0]) < 1.01 * truth[0]


def test_half_precision_keeps_eps_and_rounds_once():
    assert torch.tensor(1e-8, dtype=torch.float16) == 0
    for dtype in (torch.float16, torch.bfloat16):
        g = torch.tensor([0.0, 6e-8, 1e-3, 2.0], dtype=dtype)
        for p in (3.0, 6.0, math.inf):
            truth = torch.tensor([power_direction(float(x), p) for x in g], dtype=torch.float64)
            # Half a unit in the last place, and the rounding in single precision.
            limit = truth.abs() * (torch.finfo(dtype).eps / 2 + 4e-6)
            assert bool(((lp_direction(g, p).double() - truth).abs() <= limit).all())


@pytest.mark.parametrize("p", [2.0, 3.0, 6.0, math.inf])
def test_the_whole_step_is_the_minimiser_of_its_model(p):
    """``<eta g, d> + 1/2 ||d||_p^2``, by a solver that knows nothing of the formula."""
    generator = np.random.default_rng(0)
    for _ in range(5):
        g, eta = generator.normal(size=4), 0.3

        def model(d, g=g, eta=eta):
            return eta * g @ d + np.linalg.norm(d, p) ** 2 / 2

        rho = 1.0 if math.isinf(p) else (p - 2) / (p - 1)
        gradient = torch.from_numpy(g)
        step = -eta * float(dual_norm([gradient], p)) ** rho * lp_direction(gradient, p, eps=0.0).numpy()
        if math.isinf(p):
            # As a smooth problem: the least t with |d_i| <= t.
            limits = [{"type": "ineq", "fun": lambda z, s=s: z[-1] - s * z[:-1]} for s in (1, -1)]
            start = np.append(-0.1 * g, 1.0)
            smooth = lambda z, g=g, eta=eta: eta * g @ z[:-1] + z[-1] ** 2 / 2  # noqa: E731
            found = minimize(smooth, start, constraints=limits, tol=1e-14).x[:-1]
        else:
            found = minimize(model, -0.1 * g, method="BFGS", options={"gtol": 1e-10}).x
            found = minimize(model, found, method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-15}).x
        assert model(step) <= model(found) + 1e-12
        np.testing.assert_allclose(step, found, atol=3e-5)
        # Its length in the l_p norm, and what it wins.
        norm = conjugate_norm([g], p)
        assert np.linalg.norm(step, p) == pytest.approx(eta * norm, rel=1e-12)
        assert model(step) == pytest.approx(-((eta * norm) ** 2) / 2, rel=1e-12)


@pytest.mark.parametrize("p", [2.5, 6.0, 30.0, math.inf])
def test_invariances(p):
    g = torch.randn(50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    u = lp_direction(g, p, eps=0.0)
    power = 0.0 if math.isinf(p) else 1 / (p - 1)
    close = {"rtol": 1e-12, "atol": 0}
    # Homogeneous of degree 1/(p-1), odd, and blind to order and shape.
    torch.testing.assert_close(lp_direction(1000 * g, p, eps=0.0), 1000**power * u, **close)
    assert torch.equal(lp_direction(-g, p, eps=0.0), -u)
    assert torch.equal(lp_direction(g.flip(0), p, eps=0.0), u.flip(0))
    assert torch.equal(lp_direction(g.view(5, 10), p, eps=0.0), u.view(5, 10))
    # Steps in two coordinates of a quadratic differ by (lam_i theta_i / lam_j theta_j)^(1/(p-1)).
    assert float(u[3] / u[7]) == pytest.approx(math.copysign(abs(g[3] / g[7]) ** power, g[3] * g[7]), rel=1e-12)
    # The norm is absolutely homogeneous.
    assert float(dual_norm([1000 * g], p)) == pytest.approx(1000 * float(dual_norm([g], p)), rel=1e-12)


@pytest.mark.parametrize("p", POWERS)
def test_the_dual_norm_is_that_of_all_gradients_together(p):
    tensors = parameters(0)
    set_gradients(tensors, 0)
    gradients = [t.grad for t in tensors]
    assert float(dual_norm(gradients, p)) == pytest.approx(conjugate_norm(arrays(gradients), p), rel=1e-13)
    single = [g.float() for g in gradients]
    assert float(dual_norm(single, p)) == pytest.approx(conjugate_norm(arrays(single), p), rel=1e-6)
    mixed = [gradients[0], single[1], gradients[4].to(torch.bfloat16)]
    assert float(dual_norm(mixed, p)) == pytest.approx(conjugate_norm(arrays(mixed), p), rel=1e-6)


def test_the_dual_norm_spans_slices_and_neither_overflows_nor_vanishes():
    g = torch.full((300_001,), 1e-30)
    assert float(dual_norm([g], 2)) == pytest.approx(1e-30 * 300_001**0.5, rel=1e-5)
    assert float(dual_norm([torch.full((300_001,), 1e30)], 2)) == pytest.approx(1e30 * 300_001**0.5, rel=1e-5)
    assert float(dual_norm([torch.zeros(3)], 6)) == 0
    assert float(dual_norm([], 6)) == 0
    assert float(dual_norm([torch.zeros(0), torch.ones(4)], 2)) == 2


def test_directions_let_gradients_through():
    g = torch.tensor([0.5, -2.0, 0.0], dtype=torch.float64, requires_grad=True)
    for p in (2.0, 3.0, 6.0):
        lp_direction(g, p, eps=0.1).sum().backward()
        rho = (p - 2) / (p - 1)
        size = g.detach().abs()
        # d/dg of g (|g| + eps)^-rho.
        truth = (size + 0.1) ** -rho - rho * size * (size + 0.1) ** (-rho - 1)
        torch.testing.assert_close(g.grad, truth, rtol=1e-12, atol=0)
        g.grad = None


@pytest.mark.parametrize("p", [1.99, -6, math.nan, -math.inf, "6", None, torch.tensor(6.0)])
def test_powers_below_two_and_other_things_are_refused(p):
    for call in (lambda: lp_direction(torch.ones(2), p), lambda: dual_norm([torch.ones(2)], p)):
        with pytest.raises(ArgumentError, match="from 2"):
            call()


@pytest.mark.parametrize("eps", [-1e-8, math.nan, math.inf])
def test_bad_eps_and_tensors_that_are_not_real_are_refused(eps):
    with pytest.raises(ArgumentError, match="eps"):
        lp_direction(torch.ones(2), 6, eps=eps)
    for dtype in (torch.complex64, torch.int64):
        with pytest.raises(ArgumentError, match="real"):
            lp_direction(torch.ones(2, dtype=dtype), 6)
