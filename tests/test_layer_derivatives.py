"""Derivatives from what layers see, against one graph a sample, for each kind of call that is known or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from nets import lived_in
from oracles import relative
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.samples.calls import NotCovered
from curvdiag.scaling.layer_derivatives import by_layers
from curvdiag.scaling.sample_derivatives import Place, one_by_one


class Own(nn.Module):
    """A function of an input ``[B, 5, 4]`` and of parameters of its own."""

    def __init__(self, function: Callable[..., Tensor], *shapes: tuple[int, ...]) -> None:
        super().__init__()
        self.parts = nn.ParameterList([torch.randn(shape) for shape in shapes])
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, *self.parts).flatten(1)


def convolution(**options) -> nn.Sequential:
    return nn.Sequential(nn.Conv1d(5, 4, 3, **options), nn.Tanh(), nn.Conv1d(4, 3, 2), nn.Flatten())


def tabled(**options) -> nn.Sequential:
    table = nn.Embedding(6, 3, **options)
    return nn.Sequential(Own(lambda x: (10 * x[:, :, 0]).long() % 6), table, nn.Flatten(), nn.Linear(15, 4), nn.Tanh())


KNOWN: dict[str, Callable[[], nn.Module]] = {
    "linear on vectors": lambda: nn.Sequential(nn.Flatten(), nn.Linear(20, 6), nn.Tanh(), nn.Linear(6, 3)),
    "linear on few positions": lambda: nn.Sequential(nn.Linear(4, 30), nn.Tanh(), nn.Linear(30, 30), nn.Flatten()),
    "linear on many positions": lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2), nn.Flatten()),
    "one matrix twice": lambda: Own(lambda x, w, b: F.linear(F.linear(x, w, b).tanh(), w, b), (4, 4), (4,)),
    "matrix product": lambda: Own(lambda x, w, u: (x @ w).tanh() @ u, (4, 4), (4, 2)),
    "transposed": lambda: Own(lambda x, w: (x @ w.T).tanh(), (3, 4)),
    "convolution": lambda: convolution(stride=2, padding=2, dilation=1),
    "same": lambda: convolution(padding="same", dilation=2, bias=False),
    "two dimensions": lambda: nn.Sequential(nn.Unflatten(1, (1, 5)), nn.Conv2d(1, 2, (3, 2)), nn.Tanh(), nn.Flatten()),
    "norms": lambda: nn.Sequential(nn.LayerNorm(4), nn.GroupNorm(5, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Flatten()),
    "table": tabled,
    "scale, shift": lambda: Own(lambda x, a, b, c: (c + (x * a - b).tanh()) * a, (4,), (5, 1), (1, 4)),
    "part of a shift": lambda: Own(lambda x, b: (x + b[:5]).tanh(), (7, 4)),
    "written over": lambda: Own(lambda x, w: F.linear(x, w).add_(1).square(), (3, 4)),
}


def place_of(model: nn.Module, samples: int = 6) -> tuple[Place, tuple[Tensor, Tensor], list]:
    torch.manual_seed(2)
    batch = torch.randn(samples, 5, 4).double(), torch.randint(2, (samples,))
    objective = Objective(lived_in(model).requires_grad_().double(), nn.CrossEntropyLoss(), batch)
    place = Place(objective, objective.weights(), None)
    return place, batch, place.directions(torch.randn(objective.parameters.size, 2, dtype=torch.float64))


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        return make()


@pytest.mark.parametrize("name", KNOWN)
def test_each_known_call_gives_what_one_graph_a_sample_gives(name: str) -> None:
    place, batch, directions = place_of(built(KNOWN[name]))
    truth = one_by_one(place, batch, directions)
    found = by_layers(place, batch, directions, squares=True)
    for one, other in zip(found, truth, strict=True):
        assert float(other.norm()) > 0
        assert relative(one, other) < 1e-12
    assert len(by_layers(place, batch, directions, squares=False)) == 2


REFUSED: dict[str, Callable[[], nn.Module]] = {
    "padded table": lambda: tabled(padding_idx=2),
    "groups": lambda: nn.Sequential(nn.Conv1d(5, 5, 2, groups=5), nn.Flatten()),
    "recurrent": lambda: nn.Sequential(nn.LSTM(4, 3, batch_first=True), Own(lambda out: out[0])),
    "made of parameters": lambda: Own(lambda x, w, u: F.linear(x, w @ u), (3, 4), (4, 4)),
    "two views": lambda: Own(lambda x, b: (x + b[:5]).tanh() * b[2:], (7, 4)),
    "repeated": lambda: Own(lambda x, b: x + b[None].expand(len(x), -1, -1), (5, 4)),
    "matrix and scale": lambda: Own(lambda x, w: F.linear(x * w[:1], w), (4, 4)),
    "spread over no sample": lambda: Own(lambda x, b: x + b, (6, 5, 4)),
    "power": lambda: Own(lambda x, b: x.abs() ** b, (4,)),
    "changed afterwards": lambda: Own(lambda x, w: F.linear((y := x * 2), w) + y.add_(1)[..., :1], (3, 4)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_known_is_refused(name: str) -> None:
    place, batch, directions = place_of(built(REFUSED[name]))
    with pytest.raises(NotCovered):
        by_layers(place, batch, directions, squares=True)


def test_a_loss_that_does_not_reach_a_parameter_has_no_derivative_there() -> None:
    place, batch, directions = place_of(built(lambda: Own(lambda x, w, u: F.linear(x, w) + 0 * F.linear(x, u).detach(),
                                                          (3, 4), (3, 4))))  # fmt: skip
    for one, other in zip(by_layers(place, batch, directions, squares=True), one_by_one(place, batch, directions),
                          strict=True):  # fmt: skip
        assert relative(one, other) < 1e-12
    nothing = place_of(built(lambda: Own(lambda x, w: x + 0 * F.linear(x, w).detach()[..., :1], (3, 4))))
    assert all(not part.any() for part in by_layers(*nothing, squares=True))
