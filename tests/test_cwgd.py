"""Curvature-weighted gradient diversity against closed forms and dense matrices, and what its errors promise."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from matrices import heavy_tailed, with_spectrum
from nets import cut, make
from oracles import criterion_loss, dense_hessian
from test_noise import covariance, gradients
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Estimate, Hessian, Objective
from curvdiag.errors import ArgumentError, LossError
from curvdiag.noise.cwgd import cwgd
from curvdiag.noise.cwgd_diagonal import diagonal_form
from curvdiag.noise.cwgd_full import full_form
from curvdiag.space.probes import rademacher


def quadratic(a: Tensor, samples: int = 12, seed: int = 0) -> tuple[Objective, Tensor]:
    """The objective ``0.5 (w - x)^T A (w - x)`` and the covariance of ``x``: ``H = A``, ``C = A cov(x) A``."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, len(a), generator=generator, dtype=torch.float64)
    model = nn.ParameterList([nn.Parameter(torch.ones(len(a), dtype=torch.float64))])
    loss = lambda m, b: 0.5 * ((m[0] - b) @ a * (m[0] - b)).sum(1)  # noqa: E731
    return Objective.from_loss(model, loss, x), covariance(x)


def weighted(h: Tensor, c: Tensor, delta: float) -> float:
    """``2 tr((|H| + delta)^-1 C)``."""
    values, basis = torch.linalg.eigh(h)
    return float(2 * ((basis.T @ c @ basis).diagonal() / (values.abs() + delta)).sum())


def all_sums(rows: Tensor) -> Tensor:
    """Every one of the ``2^N`` random-sign sums: their second moment is exactly ``C``."""
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=len(rows))), dtype=torch.float64)
    return signs @ (rows - rows.mean(0)) / len(rows) ** 0.5


def small_problem() -> tuple[Tensor, Tensor]:
    h = with_spectrum(torch.tensor([5.0, 2.0, 0.3, 0.01, -0.002, -0.4]))[0]
    return h, torch.randn(7, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


@pytest.mark.parametrize("delta", [None, 0.1])
def test_the_full_form_is_the_trace(delta: float | None) -> None:
    """Over every sign vector, with negative eigenvalues: exact, at three deltas, and in its slope."""
    h, rows = small_problem()
    found = full_form(h, all_sums(rows), delta=delta)
    assert found.delta == pytest.approx(0.005 if delta is None else delta, rel=1e-10)
    c, d = covariance(rows), found.delta
    assert found.value.value == pytest.approx(weighted(h, c, d), rel=1e-9)
    assert found.with_tenth.value == pytest.approx(weighted(h, c, d / 10), rel=1e-9)
    assert found.with_tenfold.value == pytest.approx(weighted(h, c, d * 10), rel=1e-9)
    slope = (math.log(weighted(h, c, d * 1.001)) - math.log(weighted(h, c, d / 1.001))) / (2 * math.log(1.001))
    assert found.log_slope.value == pytest.approx(slope, rel=1e-5)
    assert found.lambda_max == pytest.approx(5.0)
    assert found.converged


def test_it_is_the_published_distance_of_pairs() -> None:
    """``E ||H^(-1/2) (g_i - g_j)||^2`` over independent pairs; distinct ones give ``N / (N - 1)`` times that."""
    rows = small_problem()[1]
    values = torch.tensor([5.0, 2.0, 0.7, 0.3, 0.2, 0.1], dtype=torch.float64)
    h, basis = with_spectrum(values)
    turned = rows @ basis / values.sqrt()
    pairs = torch.cdist(turned, turned).square()
    found = full_form(h, all_sums(rows), delta=1e-13).value.value
    assert found == pytest.approx(float(pairs.mean()), rel=1e-9)
    assert found * 7 / 6 == pytest.approx(float(pairs.sum() / (7 * 6)), rel=1e-9)


def test_a_quadratic_loss_has_a_closed_form() -> None:
    """``2 tr(A^-1 C) = 2 tr(A cov(x))``, and by the diagonal ``2 sum_k A_kk cov(x)_kk`` for diagonal ``A``."""
    a = torch.diag(torch.tensor([4.0, 1.0, 0.5, 0.1, 0.02], dtype=torch.float64))
    objective, spread = quadratic(a)
    truth = float(2 * (a * spread).sum())
    found = cwgd(objective, starts=200, delta=1e-12)
    assert abs(found.value.value - truth) < 4 * found.value.standard_error
    assert found.value.standard_error < 0.1 * truth
    one = cwgd(objective, "diagonal", probes=1)
    assert one.value.value == pytest.approx(truth, rel=1e-10)
    assert math.isnan(one.value.standard_error)
    assert (one.on_floor, one.negative, one.floor_share) == (0, 0, 0.0)
    ten = cwgd(objective, "diagonal")
    assert ten.value.value == pytest.approx(truth, rel=1e-10)
    assert ten.value.standard_error < 1e-10 * truth
    assert abs(ten.bias) < 1e-10 * truth


@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm"])
def test_both_forms_equal_dense_matrices_on_networks(net: str) -> None:
    model, batch = make(net)
    c = covariance(gradients(model, batch))
    h = dense_hessian(model.eval(), criterion_loss(F.cross_entropy, batch))
    objective = Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))
    hessian = Hessian(objective)
    found = cwgd(objective, starts=30, hessian=hessian)
    assert found.converged
    assert found.delta == pytest.approx(1e-3 * float(torch.linalg.eigvalsh(h)[-1]), rel=1e-3)
    for value, delta in ((found.value, 1.0), (found.with_tenfold, 10.0)):
        assert abs(value.value - weighted(h, c, found.delta * delta)) < 4 * value.standard_error
    # One estimate of the diagonal that is exact.
    diagonal, variances = h.diagonal().numpy(), c.diagonal().numpy()
    exact = diagonal_form(variances, diagonal[None], np.ones(1))
    floor = 1e-3 * diagonal.max()
    terms = 2 * variances / np.maximum(np.abs(diagonal), floor)
    assert exact.value.value == pytest.approx(terms.sum(), rel=1e-12)
    assert exact.floor_share == pytest.approx(terms[np.abs(diagonal) <= floor].sum() / terms.sum(), abs=1e-12)
    floored = diagonal_form(variances, diagonal[None], np.ones(1), negative="floor")
    assert floored.value.value == pytest.approx((2 * variances / np.maximum(diagonal, floor)).sum(), rel=1e-12)
    assert floored.negative == (diagonal < 0).sum()
    assert floored.on_floor == (diagonal <= floor).sum()
    # And the one that probes find, from the same graphs: with a high floor it is smooth, and its error tells.
    high = float(np.abs(diagonal).max())
    noisy = cwgd(objective, "diagonal", probes=200, floor=high / 4, negative="floor", hessian=hessian)
    truth = (2 * variances / np.maximum(diagonal, high / 4)).sum()
    assert abs(noisy.value.value - noisy.bias - truth) < 5 * noisy.value.standard_error
    assert hessian.cost.matvecs == found.matvecs + 200
    assert hessian.cost.graphs == len(hessian.plan.kept)


def noisy_diagonal(seed: int) -> Tensor:
    """Hutchinson's estimates of the diagonal of a matrix of order 40 from ten sets of two probes."""
    h = MATRIX
    z = rademacher(20, 40, seed=seed, dtype=torch.float64)
    return (z * (z @ h)).view(10, 2, 40).mean(1)


MATRIX = torch.diag(torch.logspace(0, -0.5, 40, dtype=torch.float64))
MATRIX = MATRIX + 0.04 * (lambda m: (m + m.T) * (1 - torch.eye(40)))(
    torch.randn(40, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
)


def test_the_diagonal_form_knows_its_bias_and_its_error() -> None:
    """``1 / lambda`` of a noisy estimate is too large: the bias is measured, and the interval less the bias covers."""
    variances = np.ones(40)
    truth = float(2 * (1 / MATRIX.diagonal()).sum())
    found = [diagonal_form(variances, noisy_diagonal(s).numpy(), np.full(10, 2), floor=1e-3) for s in range(500)]
    values, biases = np.array([f.value.value for f in found]), np.array([f.bias for f in found])
    assert values.mean() > truth + 10 * values.std() / 500**0.5
    assert biases.mean() == pytest.approx(values.mean() - truth, rel=0.3)
    hits = 0
    for f in found:
        low, high = f.value.interval()
        hits += low <= truth + f.bias <= high
    assert 0.92 <= hits / 500 <= 0.98


def test_it_says_how_much_of_it_the_noise_of_the_probes_made_up() -> None:
    """Three entries that are known and three that are lost: the share by hand from the six."""
    mean = np.array([4.0, 2.0, 1.0, 0.5, 0.2, -0.1])
    spread = np.array([0.1, 0.1, 0.1, 2.0, 2.0, 2.0])  # the standard error is this over 3, for sets of three probes
    groups = mean + spread * np.array([[-1.0], [1.0], [-1.0], [1.0]]) / math.sqrt(4 / 3)
    found = diagonal_form(np.ones(6), groups, np.full(4, 3), floor=0.15)
    terms = 2 / np.maximum(np.abs(mean), 0.15)
    assert found.lost_share == pytest.approx(terms[3:].sum() / terms.sum(), rel=1e-12)
    assert found.floor_share == pytest.approx(terms[5] / terms.sum(), rel=1e-12)
    edge = diagonal_form(np.ones(6), mean + (groups - mean) * 0.249, np.full(4, 3), floor=0.15)
    assert edge.lost_share == pytest.approx(terms[4:].sum() / terms.sum(), rel=1e-12)  # 0.5 > 2 * 0.249


def test_the_interval_of_the_full_form_covers() -> None:
    """A heavy-tailed spectrum of order 200 with a negative bulk, 100 gradients shaped like it, 300 seeds."""
    values = heavy_tailed(200)
    h, basis = with_spectrum(values)
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(100, 200, generator=generator, dtype=torch.float64) * (values.abs() + 1e-3).sqrt() @ basis.T
    centred = rows - rows.mean(0)
    truth, hits = weighted(h, covariance(rows), 0.05), 0
    for seed in range(300):
        sums = rademacher(8, 100, seed=seed, dtype=torch.float64) @ centred / 10
        low, high = full_form(h, sums, delta=0.05).value.interval()
        hits += low <= truth <= high
    assert 0.92 <= hits / 300 <= 0.98


DELTA = 5e-3


def flat_problem() -> tuple[Tensor, Tensor, Tensor]:
    """Order 300, a few outliers and a bulk of both signs about zero, where ``1 / (|lambda| + delta)`` has its peak.

    The matrix, the function ``(|lambda| + DELTA)^-1`` of it, and 100 gradients.
    """
    generator = torch.Generator().manual_seed(1)
    bulk = torch.randn(290, generator=generator, dtype=torch.float64) ** 3 * 0.02
    values = torch.cat([torch.logspace(0, -1.3, 10, dtype=torch.float64), bulk])
    h, basis = with_spectrum(values)
    noise = torch.randn(100, 300, generator=generator, dtype=torch.float64)
    return h, (basis / (values.abs() + DELTA)) @ basis.T, noise * (values.abs() + 1e-3).sqrt() @ basis.T


def test_steps_are_doubled_until_the_quadrature_settles() -> None:
    """What is left of its error, known start by start, is well below the standard error; too low a limit is said.

    Over 150 seeds at most 0.4 standard errors are left; where the ends of the last doubling alone had to agree, up to
    5.2 were, and 88 % were covered.
    """
    h, inverse, rows = flat_problem()
    for seed in range(10):
        sums = rademacher(8, 100, seed=seed, dtype=torch.float64) @ (rows - rows.mean(0)) / 10
        truth = float(2 * (sums @ inverse * sums).sum(1).mean())
        found = full_form(h, sums, delta=DELTA, steps=16)
        assert found.converged
        assert found.steps in (64, 128, 256)
        assert found.change[0] < found.value.standard_error
        assert abs(found.value.value - truth) < found.value.standard_error / 2
        assert found.matvecs == 8 * found.steps  # the run goes on where it stood
    short = full_form(h, sums, delta=DELTA, steps=4, max_steps=8)
    assert not short.converged
    assert short.steps == 8
    assert "not enough" in str(short)
    lengths = [full_form(h, sums, delta=DELTA, steps=n, max_steps=n).value.value for n in (4, 5, 6, 7, 8)]
    assert short.change[0] == pytest.approx(max(abs(lengths[-1] - v) for v in lengths[:-1]), rel=1e-9)


@pytest.mark.long
def test_the_interval_covers_where_the_quadrature_settles_slowly() -> None:
    """300 seeds; and as often as it would with ``b^T f(H) b`` known exactly for the same starts."""
    h, inverse, rows = flat_problem()
    centred = rows - rows.mean(0)
    truth, hits, exact_hits = float(2 * (inverse * covariance(rows)).sum()), 0, 0
    for seed in range(300):
        sums = rademacher(8, 100, seed=seed, dtype=torch.float64) @ centred / 10
        low, high = full_form(h, sums, delta=DELTA).value.interval()
        hits += low <= truth <= high
        low, high = Estimate.from_samples(2 * (sums @ inverse * sums).sum(1)).interval()
        exact_hits += low <= truth <= high
    print(f"covers {hits / 300:.1%}, with exact quadrature {exact_hits / 300:.1%}")
    assert 0.92 <= hits / 300 <= 0.98
    assert abs(hits - exact_hits) <= 6


def test_products_too_coarse_for_delta_are_noted() -> None:
    h, rows = small_problem()
    sums = all_sums(rows)[1:9].float()
    assert "do not resolve delta" in str(full_form(h.float(), sums, delta=1e-8))
    assert "do not resolve" not in str(full_form(h.float(), sums))


def test_without_noise_or_curvature_it_says_so() -> None:
    still = torch.zeros(3, 6, dtype=torch.float64)
    h = small_problem()[0]
    assert full_form(h, still).value.value == 0.0
    some = torch.cat([still, all_sums(small_problem()[1])[:3]])
    assert full_form(h, some, delta=0.1).value.value == pytest.approx(
        full_form(h, some[3:], delta=0.1).value.value / 2, rel=1e-9
    )
    flat = full_form(torch.zeros(6, 6, dtype=torch.float64), some[3:])
    assert math.isnan(flat.value.value)
    assert "no positive curvature" in str(flat)
    nothing = diagonal_form(np.ones(3), np.zeros((2, 3)), np.ones(2))
    assert math.isnan(nothing.value.value)
    assert "nothing to divide by" in str(nothing)
    bowl = diagonal_form(np.ones(2), np.array([[-1.0, -2.0]]), np.ones(1))
    assert bowl.value.value == pytest.approx(3.0)
    assert (bowl.negative, bowl.floor) == (2, 0.002)


def test_what_it_cannot_measure_is_refused() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    for wrong in (
        {"form": "half"},
        {"starts": 1},
        {"starts": 0},
        {"delta": 0.0},
        {"steps": 1},
        {"steps": 64, "max_steps": 32},
        {"form": "diagonal", "probes": 0},
        {"form": "diagonal", "floor": -1.0},
        {"form": "diagonal", "negative": "drop"},
        {"hessian": Hessian(objective, method="finite-difference")},
        {"hessian": Hessian(Objective(model, nn.CrossEntropyLoss(), batch))},
    ):
        with pytest.raises(ArgumentError):
            cwgd(objective, **wrong)
    mean = Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    with pytest.raises(LossError):
        cwgd(mean)


def test_a_seed_gives_one_result_and_another_gives_another() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    for form in ("full", "diagonal"):
        first, again, other = (cwgd(objective, form, seed=seed) for seed in (1, 1, 2))
        assert first.to_dict() == again.to_dict()
        assert first.value.value != other.value.value
        assert str(first).startswith(f"CWGD, {form} form")


def test_starts_that_do_not_fit_at_once_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """In groups, none of which keeps its vectors, so that each doubling begins again."""
    h, _, rows = flat_problem()
    sums = rademacher(8, 100, seed=0, dtype=torch.float64) @ (rows - rows.mean(0)) / 10
    whole = full_form(h, sums, delta=0.5, steps=4)
    monkeypatch.setattr("curvdiag.noise.cwgd_full.free_bytes", lambda device: 3 * 8 * 300 * 8)
    assert whole.steps >= 8
    parts = full_form(h, sums, delta=0.5, steps=4)
    assert parts.value.value == pytest.approx(whole.value.value, rel=1e-9)
    assert parts.matvecs == 8 * (2 * whole.steps - 4)
