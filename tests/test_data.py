"""What counts as a batch, what is refused, and that reading data disturbs nobody."""

from __future__ import annotations

import pytest
import torch
from nets import cut, make
from oracles import criterion_loss, dense_hessian, relative
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from curvdiag.errors import CurvdiagError, DataError, TooLargeError
from curvdiag.objective import Objective
from curvdiag.operators import Hessian

SIZES = (4, 4, 2)


def by_dict(model, batch):
    return F.cross_entropy(model(batch["x"]), batch["y"])


def by_pair(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


class Again:
    """Re-iterable, without a length or an index."""

    def __init__(self, parts):
        self.parts = parts

    def __iter__(self):
        return iter(self.parts)


DATA = {
    "a tuple": lambda x, y: (x, y),
    "a list of two tensors": lambda x, y: [x, y],
    "a list of batches": lambda x, y: cut((x, y), SIZES),
    "a list of two batches": lambda x, y: cut((x, y), (7, 3)),
    "a list of one batch": lambda x, y: [(x, y)],
    "a list of lists": lambda x, y: [list(part) for part in cut((x, y), SIZES)],
    "a loader": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4),
    "a loader of one batch": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=10),
    "a loader of two batches": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=5),
    "a loader of samples": lambda x, y: DataLoader(TensorDataset(x, y), batch_size=1),
    "a re-iterable": lambda x, y: Again(cut((x, y), SIZES)),
}


@pytest.mark.parametrize("form", DATA)
def test_every_form_of_data_gives_the_same_hessian(form):
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    objective = Objective(model, nn.CrossEntropyLoss(), DATA[form](*batch))
    assert objective.size == 10
    assert relative(Hessian(objective).dense(), truth) < 1e-10


@pytest.mark.parametrize(
    ("form", "loss"),
    [
        (lambda x, y: {"x": x, "y": y}, by_dict),
        (lambda x, y: [{"x": a, "y": b} for a, b in cut((x, y), SIZES)], by_dict),
        (lambda x, y: (x, y), by_pair),
        (lambda x, y: cut((x, y), SIZES), by_pair),
        (lambda x, y: DataLoader(TensorDataset(x, y), batch_size=4), by_pair),
        (
            lambda x, y: torch.cat([x, y[:, None].double()], 1),
            lambda m, b: by_pair(m, (b[:, :4], b[:, 4].long())),
        ),
    ],
    ids=["a mapping", "mappings", "a tuple", "tuples", "a loader", "a tensor"],
)
def test_every_form_of_data_with_a_loss_of_model_and_batch(form, loss):
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    objective = Objective.from_loss(model, loss, form(*batch))
    assert objective.size == 10
    assert relative(Hessian(objective).dense(), truth) < 1e-10


def test_an_ambiguous_list_is_refused_until_it_is_named():
    model, batch = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, batch))
    with pytest.raises(DataError, match=r"(?s)batch=.*batches="):
        Objective.from_loss(model, by_pair, list(batch))
    named = Objective.from_loss(model, by_pair, batch=list(batch))
    assert relative(Hessian(named).dense(), truth) < 1e-10
    rows = torch.cat([batch[0], batch[1][:, None].double()], 1)
    parts = Objective.from_loss(
        model, lambda m, b: by_pair(m, (b[:, :4], b[:, 4].long())), batches=[rows[:6], rows[6:]]
    )
    assert parts.size == 10
    assert relative(Hessian(parts).dense(), truth) < 1e-10


def test_batch_and_batches_say_it_outright():
    model, (x, y) = make("mlp-tanh")
    truth = dense_hessian(model, criterion_loss(F.cross_entropy, (x, y)))
    for named in ({"batch": [x, y]}, {"batches": tuple(cut((x, y), SIZES))}, {"batches": [[x, y]]}):
        assert relative(Hessian(Objective(model, F.cross_entropy, **named)).dense(), truth) < 1e-10


@pytest.mark.parametrize("given", [{}, {"data": 1, "batch": 1}, {"batch": 1, "batches": 1}])
def test_data_is_given_exactly_once(given):
    model, batch = make("mlp-tanh")
    values = {"data": batch, "batch": batch, "batches": [batch]}
    with pytest.raises((CurvdiagError, TypeError)):
        Objective(model, F.cross_entropy, **{key: values[key] for key in given})


class TwoInputs(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, left, right, *, scale=1.0):
        return self.net(left + scale * right)


@pytest.mark.parametrize("kind", ["tuple", "mapping"])
@pytest.mark.parametrize("several", [False, True])
def test_inputs_of_several_tensors_are_unpacked(kind, several):
    net, (x, y) = make("mlp-tanh")
    other = torch.randn_like(x)
    truth = dense_hessian(net, lambda m: F.cross_entropy(m(x + other), y))

    def batch(left, right, targets):
        return ((left, right) if kind == "tuple" else {"right": right, "left": left}), targets

    parts = [batch(*p) for p in zip(x.split(SIZES), other.split(SIZES), y.split(SIZES), strict=True)]
    data = parts if several else batch(x, other, y)
    for micro_batch in (None, 3):
        op = Hessian(Objective(TwoInputs(net), F.cross_entropy, data), micro_batch=micro_batch)
        assert relative(op.dense(), truth) < 1e-10


ONE_SHOT = {
    "a generator": lambda parts: (part for part in parts),
    "a map": lambda parts: map(tuple, parts),
    "a loader's iterator": lambda parts: iter(DataLoader(TensorDataset(*parts[0]), batch_size=2)),
    "a list's iterator": iter,
    "enumerate": enumerate,
}


@pytest.mark.parametrize("kind", ONE_SHOT)
def test_a_one_shot_iterator_is_refused_unread(kind):
    model, batch = make("mlp-tanh")
    data = ONE_SHOT[kind](cut(batch, SIZES))
    with pytest.raises(DataError, match="list"):
        Objective(model, F.cross_entropy, data)
    assert next(data) is not None
    with pytest.raises(DataError, match="list"):
        Objective.from_loss(model, by_pair, ONE_SHOT[kind](cut(batch, SIZES)))


@pytest.mark.parametrize(
    "data",
    [
        [],
        Again([]),
        DataLoader(TensorDataset(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long))),
        (torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.long)),
        [(torch.zeros(0, 4).double(), torch.zeros(0, dtype=torch.long))],
        (),
    ],
    ids=["list", "re-iterable", "loader", "batch", "list of an empty batch", "tuple"],
)
def test_empty_data_is_refused(data):
    with pytest.raises(DataError):
        Objective(make("mlp-tanh")[0], F.cross_entropy, data)


@pytest.mark.parametrize("several", [False, True])
def test_sizes_that_disagree_are_refused_with_both_sizes(several):
    model, (x, y) = make("mlp-tanh")
    data = [(x, y), (x[:6], y[:5])] if several else (x[:6], y[:5])
    with pytest.raises(DataError, match=r"(?s)6.*5|5.*6"):
        Objective(model, F.cross_entropy, data)


@pytest.mark.parametrize("data", [7, None, "text", [1, 2], [("a", "b")], torch.zeros(3, 4)])
def test_what_is_no_data_is_refused(data):
    with pytest.raises(CurvdiagError):
        Objective(make("mlp-tanh")[0], F.cross_entropy, data)


def test_a_loader_of_more_than_keep_bytes_is_refused_with_sizes():
    model, batch = make("mlp-tanh", samples=100)
    loader = DataLoader(TensorDataset(*batch), batch_size=10)
    with pytest.raises((TooLargeError, DataError), match=r"\d+(\.\d+)? [KM]?B"):
        Objective(model, F.cross_entropy, loader, keep_bytes=1500)
    assert Objective(model, F.cross_entropy, loader, keep_bytes=100_000).size == 100


def test_an_endless_loader_ends_in_an_error():
    class Endless(IterableDataset):
        def __iter__(self):
            while True:
                yield torch.zeros(4), 0

    with pytest.raises(CurvdiagError):
        Objective(
            make("mlp-tanh")[0].float(),
            F.cross_entropy,
            DataLoader(Endless(), batch_size=8),
            keep_bytes=10_000,
        )


def samples_in(objective: Objective) -> set[int]:
    """For a net that gives sample i its own weight i, the samples are where the gradient is not zero."""
    return set(objective.gradient().nonzero().flatten().tolist())


@pytest.mark.parametrize("samples", [10, 11])
@pytest.mark.parametrize("sizes", [None, (4, 3, 3), (9, 1)])
def test_split_halves_are_disjoint_complete_and_set_by_the_seed(samples, sizes):
    model = nn.Linear(samples, 1, bias=False).double()
    batch = (torch.eye(samples).double(), 3 + torch.rand(samples, 1).double())
    data = batch if sizes is None else cut(batch, (*sizes[:-1], samples - sum(sizes[:-1])))
    objective = Objective(model, nn.MSELoss(), data)
    first, second = objective.split(0)
    assert samples_in(first) | samples_in(second) == set(range(samples))
    assert not samples_in(first) & samples_in(second)
    assert {first.size, second.size} == {samples // 2, samples - samples // 2}
    assert len(samples_in(first)) == first.size
    assert samples_in(objective.split(0)[0]) == samples_in(first)
    assert len({frozenset(samples_in(objective.split(seed)[0])) for seed in range(8)}) > 1
    mean = (first.size * first.value() + second.size * second.value()) / samples
    assert mean == pytest.approx(objective.value(), rel=1e-12)
