"""Which parameters take part, in which order, and what becomes of those the loss does not reach."""

from __future__ import annotations

import pytest
import torch
from nets import make, mlp
from oracles import chosen, criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F

from curvdiag.errors import ParameterError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian

SELECTIONS = {
    "a name": ("0.weight", ["0.weight"]),
    "a glob": ("2.*", ["2.weight", "2.bias"]),
    "globs": (["*.bias", "4.*"], ["0.bias", "2.bias", "4.weight", "4.bias"]),
    "overlapping globs": (["0.*", "*.weight"], ["0.weight", "0.bias", "2.weight", "4.weight"]),
    "globs out of order": (["4.bias", "0.bias"], ["0.bias", "4.bias"]),
    "a predicate": (lambda name, tensor: tensor.ndim == 2, ["0.weight", "2.weight", "4.weight"]),
    "everything": ("*", ["0.weight", "0.bias", "2.weight", "2.bias", "4.weight", "4.bias"]),
}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
def test_a_selection_is_the_sub_block_of_the_dense_hessian(selection, memory):
    params, names = SELECTIONS[selection]
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), names)
    objective = Objective(model, F.cross_entropy, batch, params=params)
    assert list(objective.parameters.names) == names
    assert relative(Hessian(objective, memory=memory).dense(), truth) < 1e-10
    block = Hessian(Objective(model, F.cross_entropy, batch), memory=memory).block(params)
    assert relative(block.dense(), truth) < 1e-10
    assert relative(block @ torch.ones(len(truth)).double(), truth.sum(1)) < 1e-10
    assert block.shape == tuple(truth.shape)


def test_a_block_of_a_block():
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), ["2.bias"])
    block = Hessian(Objective(model, F.cross_entropy, batch)).block("2.*").block("*.bias")
    assert relative(block.dense(), truth) < 1e-10


@pytest.mark.parametrize("params", ["layer9.*", ["a", "b"], lambda name, tensor: False, []])
def test_a_selection_of_nothing_is_an_error_that_lists_names(params):
    model, batch = make("mlp-tanh")
    with pytest.raises(ParameterError, match=r"0\.weight"):
        Objective(model, F.cross_entropy, batch, params=params)
    with pytest.raises(ParameterError, match=r"0\.weight"):
        Hessian(Objective(model, F.cross_entropy, batch)).block(params)


def test_one_of_several_globs_that_matches_nothing_is_an_error():
    model, batch = make("mlp-tanh")
    with pytest.raises(ParameterError, match=r"4\.wieght"):
        Objective(model, F.cross_entropy, batch, params=["0.*", "4.wieght"])


def test_a_model_without_trainable_parameters_is_refused():
    model, batch = make("mlp-tanh")
    with pytest.raises(ParameterError):
        Objective(model.requires_grad_(False), F.cross_entropy, batch)


def test_tied_weights_count_once_under_either_name():
    model, batch = make("transformer-tied")
    objective = Objective(model, F.cross_entropy, batch)
    assert objective.parameters.size == sum(p.numel() for p in model.parameters())
    assert "head.weight" not in objective.parameters.names
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), ["embed.weight"])
    for name in ("embed.weight", "head.weight", "head.*", ["embed.*", "head.*"]):
        tied = Objective(model, F.cross_entropy, batch, params=name)
        assert relative(Hessian(tied).dense(), truth) < 1e-10


def test_frozen_parameters_are_left_out_unless_named():
    model, batch = make("mlp-tanh")
    loss = criterion_loss(F.cross_entropy, batch)
    everything = dense_hessian(model, loss)
    model[0].requires_grad_(False)
    assert relative(Hessian(Objective(model, F.cross_entropy, batch)).dense(), dense_hessian(model, loss)) < 1e-10
    named = Objective(model, F.cross_entropy, batch, params="*")
    assert relative(Hessian(named).dense(), everything) < 1e-10
    assert not model[0].weight.requires_grad


class Unused(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.spare = nn.Linear(2, 2)
        self.net = net
        self.other = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return self.net(x)


@pytest.mark.parametrize("memory", [None, 0], ids=["kept", "rebuilt"])
def test_parameters_the_loss_does_not_reach_get_zero_rows_and_are_listed(memory):
    net, batch = make("mlp-tanh")
    model = Unused(net).double()
    inner = dense_hessian(net, criterion_loss(F.cross_entropy, batch))
    op = Hessian(Objective(model, F.cross_entropy, batch), memory=memory)
    truth = torch.zeros(op.size, op.size, dtype=torch.float64)
    place = torch.cat([torch.full((p.numel(),), n.startswith("net.")) for n, p in model.named_parameters()])
    truth[torch.outer(place, place)] = inner.flatten()
    dense = op.dense()
    assert relative(dense, truth) < 1e-10
    assert not dense[~place].any()
    assert sorted(op.unreached) == ["other", "spare.bias", "spare.weight"]
    assert sum(p.numel() for p in net.parameters()) < op.size


def test_a_parameter_reached_by_one_batch_only_is_reached():
    class Gate(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.extra = net, nn.Linear(4, 3).double()

        def forward(self, x):
            return self.net(x) + (self.extra(x).tanh() if len(x) == 4 else 0)

    net, (x, y) = make("mlp-tanh")
    model, parts = Gate(net), [(x[:4], y[:4]), (x[4:], y[4:])]

    def loss(m):
        return sum(F.cross_entropy(m(a), b) * len(a) for a, b in parts) / 10

    # A loss of the batch, so that the batches stay apart: their sizes steer this net.
    op = Hessian(
        Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), parts, weight=lambda b: len(b[1]))
    )
    assert list(op.unreached) == []
    assert relative(op.dense(), dense_hessian(model, loss)) < 1e-10


def test_complex_parameters_are_refused_by_name():
    class Phase(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp().double()
            self.phase = nn.Parameter(torch.ones(4, dtype=torch.complex128))

        def forward(self, x):
            return self.net(x * self.phase.abs())

    _, batch = make("mlp-tanh")
    with pytest.raises(ParameterError, match=r"phase.*complex|complex.*phase"):
        Objective(Phase(), F.cross_entropy, batch)
    kept = Objective(Phase(), F.cross_entropy, batch, params="net.*")
    assert Hessian(kept).dense().isfinite().all()


def test_layers_views_and_flat_vectors():
    model, batch = make("conv-batchnorm")
    parameters = Objective(model, F.cross_entropy, batch).parameters
    assert parameters.layers() == {
        "conv1": ["conv1.weight"],
        "norm1": ["norm1.weight", "norm1.bias"],
        "conv2": ["conv2.weight", "conv2.bias"],
        "norm2": ["norm2.weight", "norm2.bias"],
        "head": ["head.weight", "head.bias"],
    }
    named = dict(model.named_parameters())
    assert [tuple(shape) for shape in parameters.shapes] == [tuple(named[name].shape) for name in parameters.names]
    flat = torch.cat([named[name].detach().flatten() for name in parameters.names])
    assert parameters.size == len(flat)
    views = parameters.views(flat)
    assert all(torch.equal(view, named[name]) for view, name in zip(views, parameters.names, strict=True))
    assert all(view.untyped_storage().data_ptr() == flat.untyped_storage().data_ptr() for view in views)
    assert torch.equal(parameters.flatten(views), flat)
    rows = torch.stack([torch.zeros_like(flat), flat, torch.ones_like(flat)])[1:]
    for view, several in zip(views, parameters.views(rows), strict=True):
        assert torch.equal(several[0], view)
        assert bool((several[1] == 1).all())
    twice = torch.stack([flat, flat], 1)
    for wrong in (twice[:, 0], flat[:-1], torch.cat([flat, flat[:1]]), twice.T):
        with pytest.raises(ParameterError, match="contiguous vectors of"):
            parameters.views(wrong)


def test_each_layer_is_a_block():
    model, batch = make("conv-batchnorm")
    objective = Objective(model, F.cross_entropy, batch)
    op = Hessian(objective)
    for layer, names in objective.parameters.layers().items():
        truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), names)
        assert relative(op.block(names).dense(), truth) < 1e-10, layer


def test_a_compiled_model_is_unwrapped():
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    objective = Objective(torch.compile(model, backend="eager"), F.cross_entropy, batch)
    assert list(objective.parameters.names) == chosen(model)
    assert relative(Hessian(objective).dense(), truth) < 1e-10


def test_data_parallel_is_unwrapped():
    model, batch = make("mlp-tanh")
    objective = Objective(nn.DataParallel(model), F.cross_entropy, batch, params="0.*")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch), ["0.weight", "0.bias"])
    assert relative(Hessian(objective).dense(), truth) < 1e-10


def test_distributed_data_parallel_is_unwrapped(tmp_path, monkeypatch):
    from torch import distributed

    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meet", rank=0, world_size=1)
    try:
        model, batch = make("mlp-tanh")
        truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
        wrapped = nn.parallel.DistributedDataParallel(model)
        for outer in (wrapped, torch.compile(wrapped, backend="eager")):
            objective = Objective(outer, F.cross_entropy, batch)
            assert list(objective.parameters.names) == chosen(model)
            assert relative(Hessian(objective).dense(), truth) < 1e-10
    finally:
        distributed.destroy_process_group()
