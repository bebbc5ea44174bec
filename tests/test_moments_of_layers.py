"""Moments by the rule of each kind of layer, wherever its samples lie, against one backward pass for each sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from nets import cut, sequences, vectors
from sample_gradients import LINEARS, PARAMETER, check, classification, on, prepared, ways
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from curvdiag import Objective
from curvdiag.noise.moments import gradient_moments


def convolutional(build: Callable[[], nn.Module], width: int, shape: tuple[int, ...]) -> Callable[[], tuple]:
    def make_it() -> tuple:
        model = nn.Sequential(build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        x = torch.randn(10, width, *shape)
        model(x)
        return model, (x, torch.randint(3, (10,)))

    return make_it


def _twice(m: Any, x: Tensor) -> Tensor:
    return m.head(m.own(m.own(x).tanh()).tanh())


def _steps(m: Any, x: Tensor) -> Tensor:
    """A recurrent net by hand, over time first."""
    state = x.new_zeros(x.shape[0], 4)
    for step in x.transpose(0, 1):
        state = torch.tanh(m.inner(step) + m.outer(state))
    return m.head(state)


def _time_first(m: Any, x: Tensor) -> Tensor:
    return m.head(m.norm(m.own(x.transpose(0, 1))).tanh().mean(0))


def _token(m: Any, x: Tensor) -> Tensor:
    x = torch.cat([m.token.expand(len(x), -1, -1), m.own(x)], dim=1)
    return m.head(m.encoder(x + m.place)[:, 0])


def _positions(m: Any, t: Tensor) -> Tensor:
    x = m.embed(t) + m.place(torch.arange(t.shape[1]))
    return m.head(x.tanh().mean(1))


def _flattened(m: Any, x: Tensor) -> Tensor:
    return m.head(m.own(x.reshape(-1, 3)).tanh().view(len(x), -1, 5).sum(1))


def _attended(m: Any, x: Tensor) -> Tensor:
    x = m.own(x)
    return m.head(m.attention(x, x, x.flip(1) + 0.1)[0].mean(1))


def _modulated(m: Any, x: Tensor) -> Tensor:
    return m.head((m.own(x) - m.shift) / m.width * m.gain)


def _in_place_bias(m: Any, x: Tensor) -> Tensor:
    x = m.own(x)
    x += m.shift
    return m.head(x.tanh_())


COVERED: dict[str, Callable[[], tuple]] = {
    "conv1d, stride, dilation": convolutional(lambda: nn.Conv1d(3, 4, 3, stride=2, dilation=2, padding=1), 3, (11,)),
    "conv2d, groups, stride": convolutional(lambda: nn.Conv2d(4, 6, 3, stride=2, groups=2, padding=1), 4, (7, 6)),
    "conv2d, depthwise, no bias": convolutional(lambda: nn.Conv2d(3, 6, 3, groups=3, bias=False), 3, (5, 5)),
    "conv2d, one by one": convolutional(lambda: nn.Conv2d(3, 4, 1, stride=2), 3, (5, 5)),
    "conv2d, same": convolutional(lambda: nn.Conv2d(2, 3, (2, 3), padding="same", dilation=(1, 2)), 2, (5, 6)),
    "conv2d, reflected": convolutional(lambda: nn.Conv2d(2, 3, 3, padding=1, padding_mode="reflect"), 2, (5, 6)),
    "conv2d, circular": convolutional(lambda: nn.Conv2d(2, 3, 3, padding=(1, 2), padding_mode="circular"), 2, (5, 6)),
    "conv3d": convolutional(lambda: nn.Conv3d(2, 3, (2, 3, 2), padding=(0, 1, 1), stride=(1, 2, 1)), 2, (4, 5, 3)),
    "transposed convolution": convolutional(lambda: nn.ConvTranspose2d(2, 3, 3, stride=2), 2, (4, 4)),
    "group norm": convolutional(lambda: nn.GroupNorm(2, 4), 4, (3, 3)),
    "instance norm": convolutional(lambda: nn.InstanceNorm2d(4, affine=True), 4, (3, 3)),
    "rms norm": on(vectors, lambda m, x: m.head(m.norm(m.own(x))), norm=lambda: nn.RMSNorm(5), **LINEARS),
    "prelu": on(vectors, lambda m, x: m.head(m.act(m.own(x))), act=lambda: nn.PReLU(5), **LINEARS),
    "bilinear": on(vectors, lambda m, x: m.own(x, x.tanh()), own=lambda: nn.Bilinear(4, 4, 3)),
    "embedding with padding": on(
        lambda: (torch.randint(4, (10, 6)), torch.randint(3, (10,))),
        lambda m, t: m.head(m.own(t).tanh().mean(1)),
        own=lambda: nn.Embedding(4, 5, padding_idx=1),
        head=lambda: nn.Linear(5, 3),
    ),
    "learned positions": on(
        lambda: (torch.randint(7, (10, 6)), torch.randint(3, (10,))),
        _positions,
        embed=lambda: nn.Embedding(7, 4),
        place=lambda: nn.Embedding(8, 4),
        head=lambda: nn.Linear(4, 3),
    ),
    "linear used twice": on(vectors, _twice, own=lambda: nn.Linear(4, 4), head=lambda: nn.Linear(4, 3)),
    "recurrent by hand": on(
        sequences, _steps, inner=lambda: nn.Linear(3, 4), outer=lambda: nn.Linear(4, 4), head=lambda: nn.Linear(4, 3)
    ),
    "lstm cell": on(
        sequences,
        lambda m, x: m.head(m.cell(x[:, 1], m.cell(x[:, 0]))[0]),
        cell=lambda: nn.LSTMCell(3, 4),
        head=lambda: nn.Linear(4, 3),
    ),
    "time first": on(
        sequences,
        _time_first,
        own=lambda: nn.Linear(3, 5),
        norm=lambda: nn.LayerNorm(5),
        head=lambda: nn.Linear(5, 3),
    ),
    "as many steps as samples": on(
        lambda: (torch.randn(3, 3, 3), torch.randint(3, (3,))),
        _time_first,
        own=lambda: nn.Linear(3, 5),
        norm=lambda: nn.LayerNorm(5),
        head=lambda: nn.Linear(5, 3),
    ),
    "samples times steps": on(sequences, _flattened, own=lambda: nn.Linear(3, 5), head=lambda: nn.Linear(5, 3)),
    "lstm, time first": on(
        sequences,
        lambda m, x: m.head(m.memory(x.transpose(0, 1))[0][-1]),
        memory=lambda: nn.LSTM(3, 4),
        head=lambda: nn.Linear(4, 3),
    ),
    "multi-head attention": on(
        sequences,
        _attended,
        own=lambda: nn.Linear(3, 4),
        attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True),
        head=lambda: nn.Linear(4, 3),
    ),
    "multi-head attention of other widths": on(
        sequences,
        lambda m, x: m.head(m.attention(m.own(x), x, x)[0].mean(1)),
        own=lambda: nn.Linear(3, 4),
        attention=lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=3),
        head=lambda: nn.Linear(4, 3),
    ),
    "class token": on(
        sequences,
        _token,
        own=lambda: nn.Linear(3, 4),
        token=lambda: nn.Parameter(torch.randn(1, 1, 4)),
        place=lambda: nn.Parameter(torch.randn(1, 5, 4)),
        encoder=lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True),
        head=lambda: nn.Linear(4, 3),
    ),
    "arithmetic": on(vectors, _modulated, width=lambda: nn.Parameter(torch.rand(5) + 0.5), **PARAMETER, **LINEARS),
    "bias in place": on(vectors, _in_place_bias, shift=PARAMETER["shift"], **LINEARS),
    "custom linear": on(
        vectors,
        lambda m, x: F.linear(x, m.w, m.b),
        w=lambda: nn.Parameter(torch.randn(3, 4)),
        b=lambda: nn.Parameter(torch.randn(3)),
    ),
    "scaled by a scalar": on(
        vectors,
        lambda m, x: F.linear(x, m.w * m.scale),
        w=lambda: nn.Parameter(torch.randn(3, 4)),
        scale=lambda: nn.Parameter(torch.tensor(0.5)),
    ),
    "matrix product": on(
        vectors,
        lambda m, x: torch.addmm(m.b, (x @ m.w).tanh(), m.v.T),
        w=lambda: nn.Parameter(torch.randn(4, 5)),
        v=lambda: nn.Parameter(torch.randn(3, 5)),
        b=lambda: nn.Parameter(torch.randn(3)),
    ),
    "einsum": on(
        sequences, lambda m, x: torch.einsum("btd,tdk->bk", x, m.w), w=lambda: nn.Parameter(torch.randn(4, 3, 3))
    ),
    "weight norm": on(
        vectors,
        lambda m, x: m.head(m.own(x).tanh()),
        own=lambda: parametrizations.weight_norm(nn.Linear(4, 5)),
        head=LINEARS["head"],
    ),
    "unused": on(vectors, lambda m, x: m.head(m.own(x)), other=lambda: nn.Linear(2, 2), **LINEARS),
    "masked weight": on(
        vectors,
        lambda m, x: F.linear(x, m.w * m.mask),
        w=lambda: nn.Parameter(torch.randn(3, 4)),
        mask=lambda: torch.eye(3, 4),
    ),
}


@pytest.mark.parametrize("name", COVERED)
def test_layers_and_layouts_that_rules_cover(name: str) -> None:
    model, batch = prepared(COVERED[name])
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, (len(batch[1]) - 1, 1)))
    found = gradient_moments(objective)
    check(found, classification(model, batch), objective)
    assert ways(found) == {}
