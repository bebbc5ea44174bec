"""The test of C against H: three methods with one answer, known answers, and refusals."""

from __future__ import annotations

import functools
import json

import numpy as np
import pytest
import torch
from nets import cut, make, mlp
from test_directions import oracle
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.errors import ArgumentError, LossError, TooLargeError
from curvdiag.scaling import alike, blocks
from curvdiag.scaling.measure import scaling_test
from curvdiag.scaling.result import Bounds


def problem(samples: int = 60, activation=nn.ReLU, sizes=(4, 6, 5, 3), seed: int = 0, **options) -> Objective:
    """A net halfway through its training, on labels that depend on the inputs."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, sizes[0], generator=generator, dtype=torch.float64)
    y = (x[:, : sizes[-1]] + 0.5 * torch.randn(samples, sizes[-1], generator=generator, dtype=torch.float64)).argmax(1)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = mlp(activation, sizes).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    return Objective(model, nn.CrossEntropyLoss(**options), cut((x, y), (samples - 13, 7, 6)))


def same(one, other, tolerance: float) -> None:
    """Two measurements along the same directions."""
    np.testing.assert_allclose(one.curvature, other.curvature, rtol=tolerance)
    np.testing.assert_allclose(one.noise, other.noise, rtol=tolerance)
    np.testing.assert_allclose(one.square, other.square, rtol=tolerance)
    np.testing.assert_allclose(one.noise_fits["ols"].exponent, other.noise_fits["ols"].exponent, rtol=tolerance)
    np.testing.assert_allclose(one.noise_fits["ols"].low, other.noise_fits["ols"].low, rtol=tolerance)


def test_three_methods_give_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "top_eigenpairs", functools.partial(blocks.top_eigenpairs, tol=1e-10, max_matvecs=4000))
    objective = problem()
    options = {"block": "2.weight", "directions": 8, "bootstrap": 200}
    dense, kronecker, free = (
        scaling_test(objective, method=m, **options) for m in ("dense", "kronecker", "matrix-free")
    )
    assert [r.method for r in (dense, kronecker, free)] == ["dense", "kronecker", "matrix-free"]
    for other, tolerance in ((kronecker, 1e-8), (free, 1e-6)):
        same(dense.held_out, other.held_out, tolerance)
        same(dense.in_sample, other.in_sample, tolerance)
        np.testing.assert_allclose(np.abs(dense.coupling), np.abs(other.coupling), rtol=1e-5, atol=1e-9)
        assert dense.windows[0].commutator == pytest.approx(other.windows[0].commutator, rel=1e-5)
        for name, value in dense.windows[0].baseline.items():
            assert other.windows[0].baseline[name] == pytest.approx(value, rel=1e-6)
        np.testing.assert_allclose(other.coupling_baseline, dense.coupling_baseline, rtol=1e-6, atol=1e-9)
        assert dense.verdict.word == other.verdict.word
    np.testing.assert_allclose(dense.noise_spectrum, kronecker.noise_spectrum, rtol=1e-8, atol=1e-14)
    np.testing.assert_allclose(dense.curvature_spectrum, kronecker.curvature_spectrum, rtol=1e-8, atol=1e-14)
    assert free.noise_spectrum is None
    assert dense.commutator.standard_error == 0
    for name in ("commutator", "cosine"):
        exact, estimated = getattr(dense, name).value, getattr(free, name)
        assert abs(estimated.value - exact) < 4 * estimated.standard_error


def plain_fit(gradients: Tensor, hessians: Tensor, count: int) -> tuple[np.ndarray, np.ndarray, float]:
    """The published in-sample fit, as one would write it in NumPy."""
    g, h = gradients.numpy(), hessians.numpy().mean(0)
    centred = g - g.mean(0)
    c = centred.T @ centred / len(g)
    values, vectors = np.linalg.eigh(h)
    values, vectors = values[::-1][:count], vectors[:, ::-1][:, :count]
    noise = np.einsum("pk,pq,qk->k", vectors, c, vectors)
    return values, noise, np.polyfit(np.log10(values), np.log10(noise), 1)[0]


@pytest.mark.parametrize("block", ["2.weight", "*.bias", None])
def test_the_in_sample_fit_is_the_published_one(block: str | None) -> None:
    objective = problem(activation=nn.Tanh)
    names = list((objective.restricted_to(block) if block else objective).parameters.names)
    batch = tuple(torch.cat(parts) for parts in zip(*objective.batches, strict=True))
    curvature, noise, exponent = plain_fit(*oracle(objective.model, nn.CrossEntropyLoss(), batch, names), 7)
    result = scaling_test(objective, block, directions=7, bootstrap=0)
    assert result.method == ("kronecker" if block == "2.weight" else "dense")
    assert result.in_sample.biased
    np.testing.assert_allclose(result.in_sample.curvature, curvature, rtol=1e-8)
    np.testing.assert_allclose(result.in_sample.noise, noise, rtol=1e-8)
    assert result.in_sample.noise_fits["ols"].exponent[-1] == pytest.approx(exponent, rel=1e-8)
    assert result.verdict.word == "undecided"  # no bootstrap, no interval


def test_the_held_out_basis_knows_nothing_of_the_samples_that_are_measured() -> None:
    """Eigenvectors of one half's Hessian, numbers of the other half: against the dense definitions."""
    objective = problem(samples=41, activation=nn.Tanh)
    halves = objective.split(3)
    first, second = (tuple(torch.cat(p) for p in zip(*half.batches, strict=True)) for half in halves)
    names = ["2.weight"]
    _, one = oracle(objective.model, nn.CrossEntropyLoss(), first, names)
    gradients, two = oracle(objective.model, nn.CrossEntropyLoss(), second, names)
    vectors = torch.linalg.eigh(one.mean(0))[1].flip(1)[:, :6]
    result = scaling_test(objective, "2.weight", directions=6, seed=3, bootstrap=0)
    np.testing.assert_allclose(result.held_out.curvature, (vectors * (two.mean(0) @ vectors)).sum(0), rtol=1e-8)
    np.testing.assert_allclose(result.held_out.noise, (gradients @ vectors).var(0, correction=0), rtol=1e-8)
    np.testing.assert_allclose(
        result.held_out.square, torch.einsum("npq,qk->npk", two, vectors).square().sum(1).mean(0), rtol=1e-8
    )
    assert not result.held_out.biased


def test_the_parameter_basis_holds_the_exact_diagonals() -> None:
    objective = problem(samples=41)
    first, second = (tuple(torch.cat(p) for p in zip(*half.batches, strict=True)) for half in objective.split(0))
    _, one = oracle(objective.model, nn.CrossEntropyLoss(), first)
    gradients, two = oracle(objective.model, nn.CrossEntropyLoss(), second)
    order = one.mean(0).diagonal().argsort(descending=True)[:20]
    result = scaling_test(objective, basis="parameter", directions=20, bootstrap=0)
    np.testing.assert_allclose(result.held_out.curvature, two.mean(0).diagonal()[order], rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(result.held_out.noise, gradients.var(0, correction=0)[order], rtol=1e-8, atol=1e-12)
    squares = (two @ two).mean(0).diagonal()[order]
    np.testing.assert_allclose(result.held_out.square, squares, rtol=1e-8, atol=1e-12)
    assert result.basis == "parameter"
    assert result.windows  # spanned by eigenvectors all the same
    eigen = scaling_test(objective, directions=20, bootstrap=0)
    assert result.windows[0].first == 0
    assert result.commutator.value == pytest.approx(eigen.commutator.value)


def test_alignment_is_that_of_the_dense_matrices() -> None:
    objective = problem(activation=nn.Tanh)
    batch = tuple(torch.cat(parts) for parts in zip(*objective.batches, strict=True))
    gradients, hessians = oracle(objective.model, nn.CrossEntropyLoss(), batch, ["2.weight"])
    h, centred = hessians.mean(0), gradients - gradients.mean(0)
    c = centred.T @ centred / len(centred)
    result = scaling_test(objective, "2.weight", bootstrap=0, directions=5)
    assert result.commutator.value == pytest.approx(float((c @ h - h @ c).norm() / c.norm() / h.norm()), rel=1e-8)
    assert result.cosine.value == pytest.approx(float((c * h).sum() / c.norm() / h.norm()), rel=1e-8)
    vectors = torch.linalg.eigh(h)[1].flip(1)[:, :5]
    np.testing.assert_allclose(np.abs(result.coupling), (vectors.T @ c @ vectors).abs(), rtol=1e-7, atol=1e-12)
    np.testing.assert_allclose(result.noise_spectrum, torch.linalg.eigvalsh(c).flip(0), rtol=1e-8, atol=1e-12)
    np.testing.assert_allclose(result.curvature_spectrum, torch.linalg.eigvalsh(h).flip(0), rtol=1e-8, atol=1e-12)


def logistic(samples: int, seed: int, features: int = 12) -> Objective:
    """Logistic regression at the weights that drew its labels: C = H in the population."""
    generator = torch.Generator().manual_seed(seed)
    scales = torch.logspace(0, -1, features, dtype=torch.float64)
    inputs = scales * torch.randn(samples, features, generator=generator, dtype=torch.float64)
    model = nn.Linear(features, 2, bias=False).double()
    nn.init.normal_(model.weight, generator=generator)
    labels = torch.multinomial(model(inputs).softmax(1).detach(), 1, generator=generator).squeeze(1)
    return Objective(model, nn.CrossEntropyLoss(), (inputs, labels))


def test_where_c_is_h_the_verdict_is_proportional() -> None:
    results = [scaling_test(logistic(20_000, seed), bootstrap=400, seed=seed, duality=False) for seed in range(3)]
    assert [r.verdict.word for r in results].count("proportional") >= 2, [str(r.verdict) for r in results]
    for result in results:
        assert result.held_out.noise_fits["ols"].exponent[-1] == pytest.approx(1, abs=0.1)
        assert result.cosine.value > 0.99
        assert result.cosine_baseline < 0.6


def test_where_c_is_h_squared_it_is_not() -> None:
    """A regression whose noise is heteroscedastic: ``C_ii = H_ii^2`` along the inputs' axes."""
    generator = torch.Generator().manual_seed(0)
    features, samples = 8, 6000
    lengths = torch.logspace(0, -1, features, dtype=torch.float64)
    which = torch.randint(features, (samples,), generator=generator)
    inputs = torch.zeros(samples, features, dtype=torch.float64)
    inputs[torch.arange(samples), which] = lengths[which]
    noise = torch.randn(samples, 1, generator=generator, dtype=torch.float64) * lengths[which, None]
    model = nn.Linear(features, 1, bias=False).double()
    targets = model(inputs).detach() + noise
    result = scaling_test(Objective(model, nn.MSELoss(), (inputs, targets)), bootstrap=400)
    assert result.verdict.word == "superlinear"
    assert result.held_out.noise_fits["ols"].exponent[-1] == pytest.approx(2, abs=0.1)


def test_the_order_and_size_of_batches_change_nothing() -> None:
    objective = problem()
    x, y = (torch.cat(parts) for parts in zip(*objective.batches, strict=True))
    other = Objective(objective.model, nn.CrossEntropyLoss(), cut((x, y), (1, 29, 30)))
    one, two = (scaling_test(o, "2.weight", directions=6, bootstrap=100) for o in (objective, other))
    same(one.held_out, two.held_out, 1e-8)
    turned = torch.randperm(60, generator=torch.Generator().manual_seed(1))
    other = Objective(objective.model, nn.CrossEntropyLoss(), cut((x[turned], y[turned]), (20, 40)))
    three = scaling_test(other, "2.weight", directions=6, bootstrap=0)
    np.testing.assert_allclose(three.in_sample.noise, one.in_sample.noise, rtol=1e-8)
    np.testing.assert_allclose(three.in_sample.square, one.in_sample.square, rtol=1e-8)
    assert three.commutator.value == pytest.approx(one.commutator.value, rel=1e-8)


def test_bounds_hold_and_a_broken_one_shows() -> None:
    objective = problem()
    result = scaling_test(objective, "2.weight", bootstrap=0)
    assert result.bounds.lower_holds.all()
    assert result.bounds.upper_holds.all()
    batch = tuple(torch.cat(parts) for parts in zip(*objective.batches, strict=True))
    _, hessians = oracle(objective.model, nn.CrossEntropyLoss(), batch, ["2.weight"])
    assert result.bounds.kappa_max == pytest.approx(float(torch.linalg.eigvalsh(hessians).max()), rel=1e-8)
    tight = Bounds.of(result.held_out, 1e-3 * result.bounds.kappa_max)
    assert not tight.upper_holds.all()
    curved = scaling_test(problem(activation=nn.Tanh), "2.weight", bootstrap=0)
    assert curved.bounds.lower_holds.all()
    assert curved.bounds.upper_holds is None
    assert scaling_test(objective, "2.weight", bootstrap=0, squares=False, directions=5).bounds is None


def test_more_directions_than_positive_eigenvalues_are_clipped_and_noted() -> None:
    result = scaling_test(problem(), "2.weight", directions=30, bootstrap=0)
    assert len(result.held_out.curvature) < 30
    assert any("only" in note and "positive curvature" in note for note in result.notes)


def test_few_samples_to_a_direction_are_noted() -> None:
    notes = {n: scaling_test(logistic(n, 0, 4), bootstrap=0, duality=False).notes for n in (100, 1000)}
    assert any("towards 1" in note for note in notes[100])
    assert not any("towards 1" in note for note in notes[1000])


def test_the_duality_is_tried_where_there_are_classes_behind_a_layer() -> None:
    """On the same factors as the dense test: sample by sample nothing else is needed."""
    found = scaling_test(problem(), "2.weight", directions=5, bootstrap=0).duality
    assert found.size == 30
    assert len(found.noise) == 5
    assert scaling_test(problem(), "2.weight", directions=5, bootstrap=0, duality=False).duality is None
    assert scaling_test(problem(), "2.weight", directions=5, bootstrap=0, method="dense").duality is None
    x, _ = problem().batches[0]
    regression = Objective(problem().model, nn.MSELoss(), (x, torch.randn(len(x), 3, dtype=torch.float64)))
    assert scaling_test(regression, "2.weight", directions=5, bootstrap=0).duality is None


def test_without_a_half_held_out_it_says_so() -> None:
    result = scaling_test(problem(), "2.weight", directions=6, holdout=False, bootstrap=100)
    assert result.held_out is result.in_sample
    assert result.held_out.biased
    assert result.verdict.word == "undecided"
    assert any("no samples were held out" in note for note in result.notes)


def test_a_large_block_goes_without_matrices_and_in_single_precision() -> None:
    """Whole model, float32, few directions: the same as in float64 to single precision, within the chosen basis."""
    exact = scaling_test(problem(activation=nn.Tanh), directions=5, bootstrap=0, method="matrix-free")
    objective = problem(activation=nn.Tanh)
    seen: list[tuple[int, int]] = []
    options = {"directions": 5, "bootstrap": 0, "method": "matrix-free"}
    rough = scaling_test(objective, dtype=torch.float32, progress=lambda *n: seen.append(n), **options)
    np.testing.assert_allclose(rough.held_out.noise, exact.held_out.noise, rtol=1e-2)
    np.testing.assert_allclose(rough.held_out.curvature, exact.held_out.curvature, rtol=1e-2)
    assert seen


def test_without_the_eigenvalues_of_c_its_window_is_turned_at_random(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many samples for their products: the baseline keeps the eigenvalues of K, and so its trace."""
    monkeypatch.setattr(blocks, "GRAM_LIMIT", 10)
    result = scaling_test(problem(), directions=5, bootstrap=0, method="matrix-free")
    assert np.trace(result.coupling_baseline) == pytest.approx(np.trace(result.coupling), rel=1e-8)
    np.testing.assert_allclose(
        np.linalg.eigvalsh(result.coupling_baseline), np.linalg.eigvalsh(result.coupling), rtol=1e-6, atol=1e-12
    )


def test_the_whole_story_is_told_in_twenty_lines() -> None:
    result = scaling_test(problem(), "2.weight", bootstrap=200)
    text = str(result)
    for part in (
        "2.weight",
        "held out [95 %]",
        "in sample (biased)",
        "E[h^2]",
        "commutator",
        "top 1 to",
        "bounds",
        "verdict",
    ):
        assert part in text
    assert result.verdict.word in text
    assert len(text.splitlines()) <= 22
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["held_out"]["noise"] == result.held_out.noise.tolist()


def test_the_model_is_left_alone() -> None:
    objective = problem()
    objective.model.train()
    before = {name: tensor.clone() for name, tensor in objective.model.state_dict().items()}
    state = torch.get_rng_state()
    scaling_test(objective, "2.weight", bootstrap=0, directions=4)
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(before[name], tensor) for name, tensor in objective.model.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in objective.model.parameters())
    assert all(module.training for module in objective.model.modules())
    assert not any(module._forward_hooks for module in objective.model.modules())


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = make("conv-batchnorm")
    with pytest.raises(LossError, match="BatchNorm"):
        scaling_test(Objective(model, nn.CrossEntropyLoss(), batch, mode="train"))
    mean = functools.partial(lambda m, b: F.cross_entropy(m(b[0]), b[1]))
    with pytest.raises(LossError, match="mean"):
        scaling_test(Objective.from_loss(model, mean, batch))
    objective = problem()
    with pytest.raises(ArgumentError, match="basis"):
        scaling_test(objective, basis="fourier")
    with pytest.raises(ArgumentError, match="method"):
        scaling_test(objective, method="magic")
    with pytest.raises(ArgumentError, match="at least 3"):
        scaling_test(objective, directions=2)
    with pytest.raises(ArgumentError, match=r"nn\.Linear"):
        scaling_test(objective, "2.*", method="kronecker")
    with pytest.raises(TooLargeError, match="exact diagonal"):
        scaling_test(objective, basis="parameter", method="matrix-free")
    monkeypatch.setattr(alike, "free_bytes", lambda device: 1000)
    for method in ("dense", "kronecker"):
        with pytest.raises(TooLargeError, match=r"72 KB.*matrix-free"):
            scaling_test(objective, "2.weight", method=method)
