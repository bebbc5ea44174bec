"""Spectra of layers that are small, shared, unreached, frozen or badly asked for."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from layered import hessian, quadratic
from nets import make
from torch import Tensor, nn

from curvdiag import Hessian, LayerSpectra, Objective, layer_spectra, spectral_density
from curvdiag.errors import ArgumentError, NonFiniteError, ParameterError
from curvdiag.operators.blocks import Blocks
from curvdiag.spectrum import layers as module


def test_layers_may_overlap_and_be_named_by_globs() -> None:
    op = hessian("transformer-tied")
    found = layer_spectra(op, {"block": ["attention.*", "mlp.*"], "weights": "*.weight", "all": "*"}, steps=5)
    assert list(found.lambda_max) == ["block", "weights", "all"]
    for name, globs in (("block", ["attention.*", "mlp.*"]), ("weights", "*.weight")):
        alone = spectral_density(op.block(globs), steps=5, probes=3)
        assert np.allclose(found[name].density.nodes, alone.nodes, rtol=1e-10, atol=1e-13)
    assert found["all"].size == op.size


def test_a_tied_tensor_belongs_to_the_layer_that_lists_it_first() -> None:
    found = layer_spectra(hessian("transformer-tied"), steps=2, probes=1)
    assert "embed" in found.layers
    assert "head" not in found.layers
    assert found["embed"].size == 28


def test_layers_smaller_than_the_steps_are_known_exactly() -> None:
    op = quadratic(three=torch.tensor([1.0, 2.0, -5.0]).double(), one=torch.tensor([7.0]).double())
    for found in (layer_spectra(op, steps=9, probes=2), layer_spectra(op, steps=9, probes=2, tol=1e-8)):
        assert found["three"].lambda_max == pytest.approx(2.0, rel=1e-12)
        assert found["three"].converged
        assert found["three"].density.note == "9 steps clipped to 3, the order of the matrix"
        assert found["one"].lambda_max == pytest.approx(7.0, rel=1e-12)
        assert found["one"].trace.value == pytest.approx(7.0, rel=1e-12)
        assert (found["three"].matvecs, found["one"].matvecs) == (6, 2)
    assert layer_spectra(op, tol=1e-8)["one"].matvecs == 1


def test_a_layer_that_the_loss_does_not_reach_has_a_zero_block() -> None:
    model = nn.Sequential(nn.Linear(4, 3)).double()
    model.add_module("idle", nn.Module())
    model.idle.weight = nn.Parameter(torch.ones(5, dtype=torch.float64))
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    op = Hessian(Objective(model, nn.CrossEntropyLoss(), make("mlp-tanh")[1]))
    assert op.unreached == ["idle.weight"]
    for found in (layer_spectra(op, steps=4), layer_spectra(op, tol=1e-3)):
        idle = found["idle"]
        assert (idle.lambda_max, idle.residual, idle.converged, idle.trace.value) == (0.0, 0.0, True, 0.0)
        assert found["0"].lambda_max > 0
    assert found["idle"].matvecs == 1


def test_frozen_parameters_are_in_no_layer() -> None:
    model, batch = make("mlp-tanh")
    model[2].requires_grad_(False)
    model[0].bias.requires_grad_(False)
    found = layer_spectra(Hessian(Objective(model, nn.CrossEntropyLoss(), batch)), steps=2)
    assert {name: layer.size for name, layer in found.layers.items()} == {"0": 24, "4": 18}


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(around: type) -> None:
    truth = layer_spectra(hessian(), steps=4).lambda_max
    with around():
        assert layer_spectra(hessian(memory=0), steps=4).lambda_max == pytest.approx(truth, rel=1e-12)


def test_finite_differences_serve_as_well() -> None:
    exact, coarse = (layer_spectra(hessian(method=m), steps=5) for m in ("exact", "finite-difference"))
    for name in exact:
        assert coarse[name].lambda_max == pytest.approx(exact[name].lambda_max, rel=1e-5)


def test_single_precision_is_good_to_its_rounding() -> None:
    wide, narrow = layer_spectra(hessian(), tol=1e-4), layer_spectra(hessian(dtype=torch.float32), tol=1e-4)
    for name in wide:
        assert narrow[name].lambda_max == pytest.approx(wide[name].lambda_max, rel=2e-5)
        assert narrow[name].converged


def test_a_negative_block_has_its_largest_eigenvalue_too() -> None:
    diagonal = -torch.linspace(1, 5, 40, dtype=torch.float64)
    assert layer_spectra(quadratic(one=diagonal), tol=1e-6)["one"].lambda_max == pytest.approx(-1.0, rel=1e-9)


def test_what_has_not_converged_after_the_limit_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LIMIT", 4)
    found = layer_spectra(hessian("transformer-tied"), tol=1e-9)
    assert not any(layer.converged for layer in found.layers.values())
    assert found.matvecs == 4 * 7
    assert "(not converged)" in str(found)


def test_progress_counts_products() -> None:
    seen: list[tuple[int, int]] = []
    op = hessian()
    layer_spectra(op, steps=4, probes=2, progress=lambda *at: seen.append(at))
    assert seen == [(6 * i, 24) for i in range(1, 5)]
    for options in ({"tol": 1e-3}, {"tol": 1e-3, "steps": 3, "probes": 2}):
        seen.clear()
        found = layer_spectra(op, progress=lambda *at: seen.append(at), **options)  # type: ignore[arg-type]
        assert seen[-1][0] == found.matvecs <= seen[-1][1]


def test_products_that_are_not_finite_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    original = Blocks.apply

    def apply(blocks: Blocks, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: part * (torch.nan if name == "2" else 1) for name, part in original(blocks, rows).items()}

    monkeypatch.setattr(Blocks, "apply", apply)
    for options in ({"steps": 3}, {"tol": 1e-2}, {"steps": 3, "tol": 1e-2}):
        with pytest.raises(NonFiniteError):
            layer_spectra(hessian(), **options)  # type: ignore[arg-type]


def test_what_is_wrong_is_named() -> None:
    op = hessian()
    with pytest.raises(ArgumentError, match="objective's matrix"):
        layer_spectra(torch.eye(3))  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="no layer"):
        layer_spectra(op, {})
    for unnamed in ("0.*", ["0.*", "2.*"]):
        with pytest.raises(ArgumentError, match="name: selection"):
            layer_spectra(op, unnamed)  # type: ignore[arg-type]
    with pytest.raises(ParameterError, match="conv"):
        layer_spectra(op, {"conv": "conv.*"})
    for options in ({"tol": 0.0}, {"tol": float("nan")}, {"steps": 0}, {"probes": 1.5}, {"steps": True}):
        with pytest.raises(ArgumentError):
            layer_spectra(op, **options)  # type: ignore[arg-type]


def test_the_result_prints_as_a_table_and_becomes_a_dictionary() -> None:
    found = layer_spectra(hessian(), steps=3)
    assert isinstance(found, LayerSpectra)
    lines = str(found).splitlines()
    assert [line.split()[0] for line in lines] == ["0", "2", "4"]
    assert all("trace" in line and "parameters" in line for line in lines)
    plain = found.to_dict()
    assert plain["layers"]["2"]["lambda_max"] == found["2"].lambda_max
    assert plain["layers"]["2"]["density"]["size"] == 35
    assert len(found) == 3
