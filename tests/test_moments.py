"""Moments of per-sample gradients against one backward pass for each sample."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from nets import NETS, Checkpointed, cut, make, sequences, vectors
from oracles import relative
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from curvdiag import Objective
from curvdiag.errors import LossError, NonFiniteError
from curvdiag.noise.moments import GradientMoments, gradient_moments
from curvdiag.samples import per_sample_gradients

TOLERANCE = 1e-10


def one_by_one(model: nn.Module, loss: Callable[[Any, int], Tensor], count: int) -> Tensor:
    """``[N, P]``: one backward pass of ``loss(model, i)`` each, on a twin in eval mode."""
    twin = copy.deepcopy(model).eval()
    parameters = [p for p in twin.parameters() if p.requires_grad]
    rows = []
    for i in range(count):
        twin.zero_grad()
        value = loss(twin, i)
        if value.requires_grad:
            value.backward()
        rows.append(torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters]))
    return torch.stack(rows)


def classification(model: nn.Module, batch: tuple) -> Tensor:
    return one_by_one(model, lambda m, i: F.cross_entropy(m(batch[0][i : i + 1]), batch[1][i : i + 1]), len(batch[1]))


def check(found: GradientMoments, rows: Tensor, objective: Objective) -> None:
    centred = rows - rows.mean(0)
    assert found.samples == len(rows)
    assert relative(found.mean, rows.mean(0)) < TOLERANCE
    assert relative(found.diagonal, centred.square().mean(0)) < TOLERANCE
    assert found.trace == pytest.approx(float(centred.square().sum() / len(rows)), rel=TOLERANCE)
    assert relative(found.norms, rows.norm(dim=1)) < TOLERANCE
    layout = objective.parameters
    for name, members in layout.layers().items():
        own = torch.cat([rows[:, layout.slices[layout.names.index(m)]] for m in members], dim=1)
        block = found.blocks[name]
        size = float(own.norm(dim=1).max())
        assert block.mean_norm == pytest.approx(float(own.mean(0).norm()), rel=TOLERANCE, abs=1e-12 * size)
        spread = float((own - own.mean(0)).square().sum() / len(own))
        assert block.trace == pytest.approx(spread, rel=TOLERANCE, abs=1e-12 * size**2)
        assert float((block.norms - own.norm(dim=1)).abs().max()) <= TOLERANCE * size
    parts = torch.cat(list(per_sample_gradients(objective, chunk=4)))
    assert relative(parts, rows) < TOLERANCE


def ways(found: GradientMoments) -> dict[str, str]:
    """What did not take a rule."""
    return {name: way for name, way in found.ways.items() if way != "rule"}


@pytest.mark.parametrize("sizes", [(10,), (7, 3), (1, 4, 5)], ids=str)
@pytest.mark.parametrize("net", NETS)
def test_every_net_by_rules_alone(net: str, sizes: tuple[int, ...]) -> None:
    model, batch = make(net)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, sizes))
    found = gradient_moments(objective)
    check(found, classification(model, batch), objective)
    assert ways(found) == {}


class Net(nn.Module):
    """Modules and a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: Any) -> None:
        super().__init__()
        self.function = forward
        for name, one in modules.items():
            setattr(self, name, one)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def convolutional(build: Callable[[], nn.Module], width: int, shape: tuple[int, ...]) -> Callable[[], tuple]:
    def make_it() -> tuple:
        model = nn.Sequential(build(), nn.Tanh(), nn.Flatten(), nn.LazyLinear(3))
        x = torch.randn(10, width, *shape)
        model(x)
        return model, (x, torch.randint(3, (10,)))

    return make_it


def on(data: Callable[[], tuple], forward: Callable[..., Tensor], **modules: Callable[[], Any]) -> Callable[[], tuple]:
    return lambda: (Net(forward, **{name: build() for name, build in modules.items()}), data())


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


PARAMETER = {"shift": lambda: nn.Parameter(torch.randn(5)), "gain": lambda: nn.Parameter(torch.tensor(0.7))}
LINEARS = {"own": lambda: nn.Linear(4, 5), "head": lambda: nn.Linear(5, 3)}

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


def prepared(build: Callable[[], tuple]) -> tuple[nn.Module, tuple]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model, (x, y) = build()
    if hasattr(model, "mask"):
        mask = model.mask
        del model.mask
        model.register_buffer("mask", mask)
    return model.double(), (x.double() if x.is_floating_point() else x, y)


@pytest.mark.parametrize("name", COVERED)
def test_layers_and_layouts_that_rules_cover(name: str) -> None:
    model, batch = prepared(COVERED[name])
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, (len(batch[1]) - 1, 1)))
    found = gradient_moments(objective)
    check(found, classification(model, batch), objective)
    assert ways(found) == {}


class _Double(torch.autograd.Function):
    """A product with a parameter that no rule can see, and that ``vmap`` does not know."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        return x * w

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, w = ctx.saved_tensors
        return grad * w, (grad * x).sum(0)


def _experts(m: Any, x: Tensor) -> Tensor:
    """Each sample goes through the first or the second, as its first feature says."""
    chosen, out = x[:, 0] > 0, x.new_zeros(len(x), 3)
    out[chosen] = m.own(x[chosen])
    out[~chosen] = m.other(x[~chosen])
    return out


def _branch(m: Any, x: Tensor) -> Tensor:
    return m.own(x) if len(x) == 1 or x.sum() > 0 else m.own(x) + 0.0 * m.other(x)


def _norm_of_all(m: Any, x: Tensor) -> Tensor:
    w = m.own.weight
    return F.linear(x, w) + x @ (w / (1 + w.square().sum())).T


UNCOVERED: dict[str, tuple[Callable[[], tuple], set[str]]] = {
    "custom function": (
        on(vectors, lambda m, x: m.head(_Double.apply(m.own(x), m.shift)), **LINEARS, shift=PARAMETER["shift"]),
        {"shift"},
    ),
    "checkpointed": (lambda: (Checkpointed(reentrant=False), vectors()), set()),
    "checkpointed, reentrant": (lambda: (Checkpointed(reentrant=True), vectors()), set()),
    "bag of embeddings": (
        on(
            lambda: (torch.randint(4, (10, 6)), torch.randint(3, (10,))),
            lambda m, t: m.head(m.own(t).tanh()),
            own=lambda: nn.EmbeddingBag(4, 5, mode="sum"),
            head=lambda: nn.Linear(5, 3),
        ),
        {"own.weight"},
    ),
    "experts": (on(vectors, _experts, own=lambda: nn.Linear(4, 3), other=lambda: nn.Linear(4, 3)), {"own.weight"}),
    "branches": (on(vectors, _branch, own=lambda: nn.Linear(4, 3), other=lambda: nn.Linear(4, 3)), set()),
    "a function of the weight": (on(vectors, _norm_of_all, own=lambda: nn.Linear(4, 3, bias=False)), set()),
}


@pytest.mark.parametrize("name", UNCOVERED)
def test_what_no_rule_covers_is_right_all_the_same(name: str) -> None:
    build, falls_back = UNCOVERED[name]
    model, batch = prepared(build)
    rows = classification(model, batch)
    objective = Objective(model, nn.CrossEntropyLoss(), batches=cut(batch, (7, 3)))
    found = gradient_moments(objective)
    check(found, rows, objective)
    assert falls_back <= set(ways(found))


def test_class_weights_and_ignored_labels_weigh_the_samples() -> None:
    model, (x, y) = make("mlp-tanh")
    weight = torch.tensor([1.0, 3.0, 0.5], dtype=torch.float64)
    y[2] = -100
    objective = Objective(model, nn.CrossEntropyLoss(weight=weight), batches=cut((x, y), (6, 4)))
    kept = y != -100
    rows = torch.zeros(len(y), objective.parameters.size, dtype=torch.float64)
    rows[kept] = classification(model, (x[kept], y[kept])) * weight[y[kept]][:, None]
    check(gradient_moments(objective), rows * len(y) / float(weight[y[kept]].sum()), objective)


def test_sequences_with_padding_are_weighed_by_their_tokens() -> None:
    model, (x, y) = make("transformer-tied")
    y[0, 3:] = y[4, 1:] = -100
    objective = Objective(model, nn.CrossEntropyLoss(), (x, y))
    rows = one_by_one(model, lambda m, i: F.cross_entropy(m(x[i : i + 1]), y[i : i + 1], reduction="sum"), len(y))
    check(gradient_moments(objective), rows * len(y) / float((y != -100).sum()), objective)


def test_a_function_of_model_and_batch() -> None:
    """With inputs in a dictionary, and a parameter that the loss itself uses."""
    model, (x, y) = make("mlp-tanh")
    model.temperature = nn.Parameter(torch.tensor(0.8, dtype=torch.float64))

    def loss(m: Any, batch: dict) -> Tensor:
        return F.cross_entropy(m(batch["x"]) * m.temperature, batch["y"], reduction="none")

    batches = [{"x": a, "y": b} for a, b in cut((x, y), (6, 4))]
    objective = Objective.from_loss(model, loss, batches=batches)
    rows = one_by_one(model, lambda m, i: loss(m, {"x": x[i : i + 1], "y": y[i : i + 1]}).mean(), len(y))
    found = gradient_moments(objective)
    check(found, rows, objective)
    assert ways(found) == {}


def test_samples_along_the_second_dimension_of_the_data() -> None:
    """Such a batch cannot be cut."""
    model, (x, y) = make("mlp-tanh")
    times = torch.stack([x, x.tanh(), -x])

    def loss(m: Any, batch: tuple) -> Tensor:
        return F.cross_entropy(m(batch[1]).mean(0), batch[0], reduction="none")

    objective = Objective.from_loss(model, loss, batch=(y, times))
    rows = one_by_one(model, lambda m, i: loss(m, (y[i : i + 1], times[:, i : i + 1])).mean(), len(y))
    found = gradient_moments(objective)
    check(found, rows, objective)
    assert ways(found) == {}


def test_a_block_of_parameters_by_glob() -> None:
    model, batch = make("conv-batchnorm")
    objective = Objective(model, nn.CrossEntropyLoss(), batch, params=["conv2.*", "norm1.*"])
    names, rows = [n for n, _ in model.named_parameters()], classification(model, batch)
    parts = dict(zip(names, rows.split([p.numel() for p in model.parameters()], dim=1), strict=True))
    own = torch.cat([parts[name] for name in objective.parameters.names], dim=1)
    check(gradient_moments(objective), own, objective)


def test_gradients_that_are_zero_at_first_are_right_later() -> None:
    """The last layer is all zeros: no other parameter has a gradient when the rules are tried."""
    model, batch = make("mlp-tanh")
    with torch.no_grad():
        model[4].weight.zero_()
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    assert float(gradient_moments(objective).blocks["0"].norms.max()) == 0.0
    with torch.no_grad():
        model[4].weight.normal_(generator=torch.Generator().manual_seed(0))
    check(gradient_moments(objective), classification(model, batch), objective)


class _Shared(nn.Module):
    """An activation that uses another layer's weight once more."""

    def __init__(self, other: nn.Linear) -> None:
        super().__init__()
        self.others = [other]

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() + 0.5 * (x @ self.others[0].weight).sum(1, keepdim=True)


def test_a_model_that_changes_is_looked_at_again() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    check(gradient_moments(objective), classification(model, batch), objective)
    model[1] = _Shared(model[0])
    check(gradient_moments(objective), classification(model, batch), objective)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lower_precision_is_right_to_its_rounding(dtype: torch.dtype) -> None:
    for net in ("mlp-tanh", "transformer-tied", "conv-batchnorm"):
        model, (x, y) = make(net, dtype=dtype)
        x = x.to(dtype) if x.is_floating_point() else x
        wide = copy.deepcopy(model).double()
        rows = classification(wide, (x.double() if x.is_floating_point() else x, y))
        found = gradient_moments(Objective(model, nn.CrossEntropyLoss(), (x, y)))
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        assert found.mean.dtype == torch.float32
        assert relative(found.mean, rows.mean(0)) < tolerance
        assert relative(found.diagonal, (rows - rows.mean(0)).square().mean(0)) < tolerance
        assert relative(found.norms, rows.norm(dim=1)) < tolerance
        precise = gradient_moments(Objective(model, nn.CrossEntropyLoss(), (x, y)), dtype=torch.float64)
        assert relative(precise.mean, rows.mean(0)) < TOLERANCE


def test_the_live_model_is_left_alone() -> None:
    model, batch = make("in-place")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    model.train()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    random = torch.get_rng_state()
    with torch.no_grad():
        gradient_moments(objective)
    assert all(m.training for m in model.modules())
    assert all(bool((p.grad == 1).all()) and p.requires_grad and p.is_leaf for p in model.parameters())
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert torch.equal(random, torch.get_rng_state())


def test_objectives_without_single_samples_are_refused() -> None:
    model, batch = make("conv-batchnorm")
    with pytest.raises(LossError, match="BatchNorm"):
        gradient_moments(Objective(model, nn.CrossEntropyLoss(), batch, mode="train"))
    mean = Objective.from_loss(model, lambda m, b: F.cross_entropy(m(b[0]), b[1]), batch)
    with pytest.raises(LossError, match="one loss for each sample"):
        gradient_moments(mean)
    with pytest.raises(LossError, match="one loss for each sample"):
        per_sample_gradients(mean)


def test_a_loss_that_is_not_finite_is_named() -> None:
    model, batch = make("mlp-tanh")
    objective = Objective(model, nn.CrossEntropyLoss(), batch)
    with torch.no_grad():
        model[0].bias[0] = torch.nan
    with pytest.raises(NonFiniteError, match="batch 0"):
        gradient_moments(objective)


@pytest.mark.parametrize("net", ["MLP", "ResNet", "GPT"])
def test_on_the_benchmark_nets_no_parameter_falls_back(net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    own = sys.modules.pop("nets")
    try:
        import nets as benchmark

        model, batches = benchmark.NETS[net]()
    finally:
        sys.modules["nets"] = own
    model.eval()
    small = [(x[:2], y[:2]) for x, y in batches[:2]]
    objective = Objective(model, nn.CrossEntropyLoss(), batches=small)
    found = gradient_moments(objective)
    assert set(found.ways.values()) == {"rule"}
    assert relative(found.mean, objective.gradient()) < 1e-4
