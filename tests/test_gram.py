"""The Gram matrix's eigenvalues against the dense covariance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from nets import cut, make
from oracles import relative
from test_noise import covariance, gradients
from torch import nn

from curvdiag import NoiseCovariance, Objective
from curvdiag.errors import TooLargeError
from curvdiag.samples import streaming


def spectrum(rows: torch.Tensor, length: int) -> torch.Tensor:
    """The largest eigenvalues of the dense covariance, with zeros where it has no more."""
    values = torch.linalg.eigvalsh(covariance(rows)).flip(0)
    return torch.cat([values, values.new_zeros(max(0, length - len(values)))])[:length]


@pytest.mark.parametrize("net", ["mlp-tanh", "conv-batchnorm", "transformer-tied", "lstm"])
def test_its_values_are_the_nonzero_spectrum_of_c(net: str) -> None:
    model, batch = make(net)
    rows = gradients(model, batch)
    found = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), cut(batch, (7, 3)))).gram()
    assert found.size == rows.shape[1]
    assert relative(found.values, spectrum(rows, len(rows))) < 1e-10
    centred = rows - rows.mean(0)
    assert relative(found.matrix, centred @ centred.T / len(rows)) < 1e-10


def test_more_samples_than_parameters_leave_zeros() -> None:
    model, batch = make("mlp-tanh", samples=60)
    rows = gradients(model, batch)
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), cut(batch, (40, 20)))).block("4.*")
    found, own = op.gram(), rows[:, -18:]
    assert found.size == 18 < 60
    assert relative(found.values, spectrum(own, 60)) < 1e-10
    assert float(found.values[18:].abs().max()) < 1e-14 * float(found.values[0])


def test_a_block_and_the_mini_batch_scale() -> None:
    model, batch = make("conv-batchnorm")
    rows = gradients(model, batch)
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch), 4).block("conv2.*")
    start, size = op.objective.parameters.slices[op.objective.parameters.names.index("conv2.weight")].start, op.size
    assert size == 4 * 4 * 9 + 4
    assert relative(op.gram().values, spectrum(rows[:, start : start + size], 10) / 4) < 1e-10


@pytest.mark.parametrize("rows_that_fit", [1, 2, 3, 4, 7])
def test_where_gradients_do_not_fit_they_are_made_again(rows_that_fit: int) -> None:
    model, batch = make("transformer-tied")
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), cut(batch, (4, 5, 1))))
    memory = 3 * 8 * 10**2 + 4 * rows_that_fit * 8 * op.size
    assert relative(op.gram(memory=memory).matrix, op.gram().matrix) < 1e-12


def test_it_works_at_the_operators_weights_and_precision() -> None:
    model, batch = make("mlp-tanh", dtype=torch.float32)
    rows = gradients(model.double(), (batch[0].double(), batch[1]))
    model.float()
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch), dtype=torch.float64)
    with torch.no_grad():
        model[0].weight.zero_()
    assert relative(op.gram().values, spectrum(rows, len(rows))) < 1e-10


def test_a_matrix_that_does_not_fit_is_refused_with_the_remedy() -> None:
    model, batch = make("mlp-tanh")
    op = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch))
    with pytest.raises(TooLargeError, match="spectral_density"):
        op.gram(memory=1000)


def test_it_prints_draws_and_becomes_a_dictionary() -> None:
    model, batch = make("mlp-tanh")
    found = NoiseCovariance(Objective(model, nn.CrossEntropyLoss(), batch)).gram()
    assert "10 eigenvalues of C (83 parameters)" in str(found)
    assert set(found.to_dict()) == {"values", "size"}
    assert found.plot().lines


def test_linear_layers_need_no_gradient_of_a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left out of what is made row by row; class weights weigh the factors too."""
    asked = []
    rows_from = streaming.rows_from

    def watched(*args: Any) -> Any:
        asked.append(list(args[4]))
        return rows_from(*args)

    monkeypatch.setattr("curvdiag.operators.gram.rows_from", watched)
    for net, left in (("mlp-tanh", []), ("conv-batchnorm", [0, 1, 2, 3, 4, 5, 6])):
        model, (x, y) = make(net)
        weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
        rows = gradients(model, (x, y)) * (weight[y] / weight[y].mean())[:, None]
        objective = Objective(model, nn.CrossEntropyLoss(weight=weight), cut((x, y), (7, 3)))
        op = NoiseCovariance(objective)
        assert relative(op.gram().values, spectrum(rows, len(rows))) < 1e-10
        assert asked == ([left] if left else [])
        assert relative(op.gram(memory=3 * 8 * 10**2 + 100).matrix, op.gram().matrix) < 1e-12
        asked.clear()
