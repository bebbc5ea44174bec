"""Activity-weight duality against dense loops over samples with autograd, and where it is exact in closed form."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian
from torch.nn import functional as F

from curvdiag.errors import ArgumentError, NonFiniteError, TooLargeError
from curvdiag.scaling import dual_changes
from curvdiag.scaling import duality as module
from curvdiag.scaling.dual_changes import dual_weight_changes, nearest_partners
from curvdiag.scaling.duality import Duality, activity_weight_duality

NAMES = ("whole", "same-sample", "decoupled", "isotropic", "pairs")


class Layer(NamedTuple):
    """The arguments of the function under test, in its order."""

    weight: Tensor
    activations: Tensor
    labels: Tensor
    output_gradients: Tensor
    output_hessians: Tensor


def relu_layer(samples: int) -> tuple[Layer, Tensor, Tensor]:
    """The middle layer of a ReLU net; with it g_p ``[N, D]`` and h_p ``[N, D, D]`` by autograd in the weight itself.

    Sample 0 is alone in its class, and the input of sample 1 is zero.
    """
    with torch.random.fork_rng():
        torch.manual_seed(5)
        inputs, labels = torch.randn(samples, 5), torch.randint(2, (samples,))
        first, last = nn.Linear(5, 4).double(), nn.Linear(3, 3).double()
        weight = torch.randn(3, 4, dtype=torch.float64)
        bias = torch.randn(3, dtype=torch.float64)
    labels[0] = 2
    with torch.no_grad():
        activations = F.relu(first(inputs.double()) + 0.3)
        activations[1] = 0

    def loss(z: Tensor, label: Tensor) -> Tensor:
        return F.cross_entropy(last(F.relu(z) ** 2), label)

    def by_weight(p: int):
        return lambda w: loss(w.reshape(3, 4) @ activations[p] + bias, labels[p])

    def by_output(p: int):
        return lambda z: loss(z, labels[p])

    points, flat = activations @ weight.T + bias, weight.reshape(-1)
    found = Layer(
        weight,
        activations,
        labels,
        torch.stack([jacobian(by_output(p), points[p]) for p in range(samples)]),
        torch.stack([hessian(by_output(p), points[p]) for p in range(samples)]),
    )
    g = torch.stack([jacobian(by_weight(p), flat) for p in range(samples)])
    h = torch.stack([hessian(by_weight(p), flat) for p in range(samples)])
    return found, g, h


def brute(layer: Layer, g: Tensor, h: Tensor, batch: int) -> tuple[dict[str, Tensor], Tensor, dict[int, int], Tensor]:
    """Predictions, C, partners and dual weight changes, by loops over samples and dense matrices."""
    a, size = layer.activations, layer.weight.numel()
    partners = {}
    for p in range(len(a)):
        others = [q for q in range(len(a)) if q != p and layer.labels[q] == layer.labels[p]]
        if others and a[p].norm() > 0:
            partners[p] = min(others, key=lambda q, p=p: float((a[q] - a[p]).norm()))
    dw = torch.stack(
        [torch.outer(layer.weight @ (a[q] - a[p]), a[p]).flatten() / (a[p] @ a[p]) for p, q in partners.items()]
    )
    n, used = len(partners), list(partners)
    u = torch.stack([h[p] @ change for p, change in zip(used, dw, strict=True)])
    second = sum(torch.outer(x, x) for x in dw) / n
    sigma = second.trace() / size
    pairs = sum(torch.outer(g[q] - g[p], g[q] - g[p]) for p, q in partners.items()) / (2 * n)
    # All batches of B samples drawn with replacement: pairs p = q once in B, all pairs else.
    whole = sum(torch.outer(x, x) for x in u) / (2 * n)
    whole = whole + (batch - 1) / 2 * sum(torch.outer(x, y) for x in u for y in u) / n**2
    predictions = {
        "whole": whole,
        "same-sample": sum(torch.outer(x, x) for x in u) / (2 * n),
        "decoupled": sum(h[p] @ second @ h[p] for p in used) / (2 * n),
        "isotropic": sigma / 2 * sum(h[p] @ h[p] for p in used) / n,
        "pairs": pairs,
    }
    centred = g - g.mean(0)
    return predictions, centred.T @ centred / len(g), partners, dw


@pytest.mark.parametrize("samples", [12, 40])
@pytest.mark.parametrize("dense", [True, False])
def test_predictions_are_those_of_dense_loops(samples: int, dense: bool) -> None:
    layer, g, h = relu_layer(samples)
    predictions, c, _, _ = brute(layer, g, h, 7)
    directions = torch.linalg.eigh(h.mean(0)).eigenvectors.flip(1)[:, :6]
    found = activity_weight_duality(*layer, directions=directions, batch_size=7, dense=dense)
    curvature = torch.einsum("dk,de,ek->k", directions, h.mean(0), directions).numpy()
    np.testing.assert_allclose(found.curvature, curvature, rtol=1e-9)
    np.testing.assert_allclose(found.noise, torch.einsum("dk,de,ek->k", directions, c, directions).numpy(), rtol=1e-9)
    assert found.noise_trace == pytest.approx(float(c.trace()), rel=1e-10)
    assert tuple(found.predictions) == NAMES == tuple(predictions)
    for name, truth in predictions.items():
        p = found.predictions[name]
        along = torch.einsum("dk,de,ek->k", directions, truth, directions).numpy()
        assert p.trace_ratio == pytest.approx(float(truth.trace() / c.trace()), rel=1e-10)
        np.testing.assert_allclose(p.along, along, rtol=1e-9, atol=1e-14)
        positive = curvature > 0
        slope = np.polyfit(np.log(curvature[positive]), np.log(along[positive]), 1)[0]
        assert p.exponent == pytest.approx(slope, rel=1e-8)
        if dense:
            assert p.cosine == pytest.approx(float((truth * c).sum() / truth.norm() / c.norm()), rel=1e-10)
        else:
            assert math.isnan(p.cosine)
    assert (found.samples, found.without_partner, found.zero_inputs) == (samples - 2, 1, 1)


@pytest.mark.parametrize("limit", [0, 5000])
@pytest.mark.parametrize("samples", [12, 40])
def test_the_changes_are_those_of_dense_loops(samples: int, limit: int, monkeypatch) -> None:
    monkeypatch.setattr(dual_changes, "SPECTRUM_LIMIT", limit)
    layer, g, h = relu_layer(samples)
    _, _, _, dw = brute(layer, g, h, 1)
    found = activity_weight_duality(*layer).changes
    second = dw.T @ dw / len(dw)
    values = torch.linalg.eigvalsh(second).flip(0)
    assert found.sigma_w_squared == pytest.approx(float(second.trace()) / 12, rel=1e-10)
    assert found.participation == pytest.approx(float(second.trace() ** 2 / (12 * (second @ second).trace())), rel=1e-9)
    assert found.mean_share == pytest.approx(float(dw.mean(0).square().sum() / second.trace()), rel=1e-10)
    if limit == 0:
        assert found.spectrum is None
        assert found.top_shares == {}
    else:
        np.testing.assert_allclose(found.spectrum, values[: len(found.spectrum)], atol=1e-9 * float(values[0]))
        assert len(found.spectrum) == min(12, samples - 2)
        assert set(found.top_shares) == {1, 10}
        assert found.top_shares[10] == pytest.approx(float(values[:10].sum() / values.sum()), rel=1e-10)


def test_first_order_changes_are_those_of_dense_loops() -> None:
    layer, g, h = relu_layer(40)
    _, _, partners, dw = brute(layer, g, h, 1)
    found = activity_weight_duality(*layer).first_order
    u = torch.stack([h[p] @ x for p, x in zip(partners, dw, strict=True)])
    p, q = list(partners), list(partners.values())
    a, delta = layer.activations, layer.output_gradients
    moved = torch.stack([torch.outer(delta[j] - delta[i], a[i]).flatten() for i, j in partners.items()])
    response = torch.stack([layer.output_hessians[i] @ layer.weight @ (a[j] - a[i]) for i, j in partners.items()])
    arrived = torch.stack(
        [torch.outer(delta[i] + r, a[j]).flatten() for (i, j), r in zip(partners.items(), response, strict=True)]
    )
    cases = {
        "weight change": (moved, u),
        "partner": (g[q] - g[p], u),
        "partner with input": (g[q] - g[p], arrived - g[p]),
    }
    for name, (true, predicted) in cases.items():
        assert found[name].error == pytest.approx(float((true - predicted).norm() / true.norm()), rel=1e-9)
        cosine = float((true * predicted).sum() / true.norm() / predicted.norm())
        assert found[name].cosine == pytest.approx(cosine, rel=1e-9)


def test_the_dual_change_does_to_the_output_what_the_partner_does() -> None:
    layer, _, _ = relu_layer(40)
    w, a = layer.weight, layer.activations[2:]
    partners = nearest_partners(a, layer.labels[2:])
    changed = w + dual_weight_changes(w, a, partners)
    assert torch.allclose((changed @ a[:, :, None])[:, :, 0], a[partners] @ w.T, rtol=0, atol=1e-12)
    assert not torch.allclose((w @ a.T).T, a[partners] @ w.T, atol=1e-3)


def test_first_order_is_exact_to_second_order_in_the_step() -> None:
    """Halving all steps halves the relative error of a smooth loss at the changed weights."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    base = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    step = torch.randn(10, 4, generator=generator, dtype=torch.float64)
    errors = []
    for scale in (1e-2, 5e-3):
        a = torch.cat([base, base + scale * step])
        labels, partners = torch.arange(10).repeat(2), torch.cat([torch.arange(10, 20), torch.arange(10)])
        probabilities = (a @ w.T).softmax(1)
        delta = probabilities - F.one_hot(labels % 3, 3)
        curved = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None]
        found = activity_weight_duality(w, a, labels, delta, curved, partners=partners)
        errors.append([found.first_order[name].error for name in ("weight change", "partner with input")])
    np.testing.assert_allclose(np.array(errors[0]) / errors[1], 2, rtol=0.02)


def test_a_linear_net_with_a_quadratic_loss_is_exact() -> None:
    """With loss |B W a - y|^2 / 2 and one target for each class, A = B^T B is constant and nothing is left out."""
    generator = torch.Generator().manual_seed(1)
    w, b = (torch.randn(*s, generator=generator, dtype=torch.float64) for s in ((3, 4), (2, 3)))
    a = torch.randn(30, 4, generator=generator, dtype=torch.float64)
    labels = torch.arange(30) % 3
    targets = torch.randn(3, 2, generator=generator, dtype=torch.float64)[labels]
    delta = (a @ w.T @ b.T - targets) @ b
    found = activity_weight_duality(w, a, labels, delta, (b.T @ b).expand(30, 3, 3))
    for name in ("weight change", "partner with input"):
        assert found.first_order[name].error < 1e-13
        assert found.first_order[name].cosine == pytest.approx(1, rel=1e-13)
    assert found.first_order["partner"].error > 0.1
    g = (delta[:, :, None] * a[:, None]).flatten(1)
    changed = w + dual_weight_changes(w, a, nearest_partners(a, labels))
    at_changed = ((((changed @ a[:, :, None])[:, :, 0] @ b.T - targets) @ b)[:, :, None] * a[:, None]).flatten(1)
    half = (at_changed - g).square().sum(1).mean() / 2
    assert found.predictions["same-sample"].trace_ratio * found.noise_trace == pytest.approx(float(half), rel=1e-12)


def test_isotropic_changes_are_found_to_be_isotropic() -> None:
    """All steps +-e_k at all inputs e_j: S is 1/D, C_same = A^2 kron 1 / (2 D), the isotropic part that over ``in``."""
    outputs = inputs = 3
    w = torch.eye(3, dtype=torch.float64)
    curved = torch.tensor([[3.0, 1, 0], [1, 2, 0], [0, 0, 1]], dtype=torch.float64)
    starts, arrivals = [], []
    for j in range(inputs):
        for k in range(outputs):
            for sign in (1, -1):
                starts.append(w[j])
                arrivals.append(w[j] + sign * w[k])
    a = torch.stack(starts + arrivals)
    n = len(starts)
    partners = torch.cat([torch.arange(n, 2 * n), torch.full((n,), -1)])
    found = activity_weight_duality(
        w, a, torch.zeros(2 * n).long(), a @ curved, curved.expand(2 * n, 3, 3), partners=partners, batch_size=50
    )
    assert found.samples == n
    assert found.changes.sigma_w_squared == pytest.approx(1 / 9, rel=1e-12)
    assert found.changes.participation == pytest.approx(1, rel=1e-12)
    assert found.changes.mean_share == pytest.approx(0, abs=1e-15)
    traces = {name: p.trace_ratio * found.noise_trace for name, p in found.predictions.items()}
    expected = float((curved @ curved).trace()) * inputs / (2 * 9)
    assert traces["same-sample"] == pytest.approx(expected, rel=1e-12)
    assert traces["whole"] == pytest.approx(expected, rel=1e-12)  # these steps have no mean
    assert traces["isotropic"] == pytest.approx(expected / inputs, rel=1e-12)
    assert traces["decoupled"] == pytest.approx(expected / inputs, rel=1e-12)


def test_partners_drawn_from_all_samples_give_the_covariance_itself() -> None:
    layer, _, _ = relu_layer(12)
    layer = Layer(layer.weight, *(part[2:] for part in layer[1:]))
    n = len(layer.labels)
    repeated = Layer(layer.weight, *(torch.cat([part] * n) for part in layer[1:]))
    partners = torch.cat([(torch.arange(n) + shift) % n for shift in range(n)])
    found = activity_weight_duality(*repeated, partners=partners).predictions["pairs"]
    assert found.trace_ratio == pytest.approx(1, rel=1e-10)
    assert found.cosine == pytest.approx(1, rel=1e-10)


def test_batches_of_one_sample_have_no_cross_terms() -> None:
    found = activity_weight_duality(*relu_layer(12)[0], batch_size=1).predictions
    assert found["whole"] == found["same-sample"]


def test_partners_are_the_nearest_of_the_class() -> None:
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(60, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(4, (60,), generator=generator)
    a[7], labels[7] = a[3], labels[3]  # duplicates are each other's partners
    labels[9] = 11
    found = nearest_partners(a, labels)
    for p in range(60):
        others = [q for q in range(60) if q != p and labels[q] == labels[p]]
        assert int(found[p]) == (min(others, key=lambda q, p=p: float((a[q] - a[p]).norm())) if others else -1)
    assert (int(found[3]), int(found[7]), int(found[9])) == (7, 3, -1)


@pytest.mark.parametrize("dense", [True, False])
def test_chunks_change_nothing(dense: bool, monkeypatch) -> None:
    layer, _, _ = relu_layer(40)
    directions = torch.eye(12, dtype=torch.float64)[:, :4]
    whole = activity_weight_duality(*layer, directions=directions, dense=dense).to_dict()
    monkeypatch.setattr(dual_changes, "CHUNK", 50)
    monkeypatch.setattr(module, "CHUNK", 50)
    parts = activity_weight_duality(*layer, directions=directions, dense=dense).to_dict()
    for name in NAMES:
        for key, value in whole["predictions"][name].items():
            np.testing.assert_allclose(parts["predictions"][name][key], value, rtol=1e-10, atol=1e-15)


def test_the_result_reads_as_text_and_becomes_a_dictionary() -> None:
    found = activity_weight_duality(*relu_layer(12)[0], directions=torch.eye(12))
    text = str(found)
    for part in (*NAMES, "participation", "first order, partner", "1 without a partner, 1 with zero input", "exponent"):
        assert part in text
    assert isinstance(found, Duality)
    assert len(found.to_dict()["predictions"]["whole"]["along"]) == 12


def test_what_cannot_be_done_is_refused(monkeypatch) -> None:
    layer, _, _ = relu_layer(12)
    with pytest.raises(ArgumentError, match="shapes"):
        activity_weight_duality(*layer[:4], layer.output_hessians[:, :2])
    with pytest.raises(ArgumentError, match=r"columns \[12, n\]"):
        activity_weight_duality(*layer, directions=torch.eye(5))
    with pytest.raises(ArgumentError, match="at least 1"):
        activity_weight_duality(*layer, batch_size=0)
    with pytest.raises(ArgumentError, match="indices"):
        activity_weight_duality(*layer, partners=torch.full((12,), 12))
    with pytest.raises(ArgumentError, match="none of 12 samples"):
        activity_weight_duality(*layer._replace(labels=torch.arange(12)))
    with pytest.raises(NonFiniteError):
        activity_weight_duality(*layer._replace(output_gradients=layer.output_gradients * math.nan))
    monkeypatch.setattr(module, "free_bytes", lambda device: 100)
    with pytest.raises(TooLargeError, match="dense=False"):
        activity_weight_duality(*layer)
    assert activity_weight_duality(*layer, dense=False).samples == 10
