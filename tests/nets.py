"""Small nets and data shared by tests: small enough for a dense Hessian, awkward enough to matter."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

Batch = tuple[Tensor, Tensor]


class Residual(nn.Module):
    """Convolutions with BatchNorm and a skip connection, averaged over the image."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(images)))
        x = torch.tanh(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    """Causal attention; ``plain=True`` (for oracles) spells out what the fused kernel computes."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.plain = False
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, time, width = x.shape
        shape = (batch, time, self.heads, width // self.heads)
        q, k, v = (part.view(shape).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        if self.plain:
            future = torch.ones(time, time, dtype=torch.bool, device=x.device).triu(1)
            scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
            mixed = scores.softmax(-1) @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Transformer(nn.Module):
    """One causal block; the embedding is the head. Outputs ``[B, V, T]`` for ``CrossEntropyLoss``."""

    def __init__(self, vocabulary: int = 7, width: int = 4, heads: int = 2, time: int = 5) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(0.3 * torch.randn(time, width))
        self.norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.position[: tokens.shape[1]]
        x = x + self.attention(self.norm(x))
        x = x + self.mlp(x)
        return self.head(x).transpose(1, 2)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.lstm(sequences)[0][:, -1])


class Encoder(nn.Module):
    """PyTorch's own encoder layer, which has a fast path of its own without gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(4, 2, 6, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.encoder(F.pad(sequences, (0, 1), value=0.5)).mean(1))


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.memory = nn.GRU(3, 3, num_layers=2, bidirectional=True, dropout=0.3, batch_first=True)
        self.head = nn.Linear(6, 3)

    def forward(self, sequences: Tensor) -> Tensor:
        return self.head(self.memory(sequences)[0].mean(1))


class Checkpointed(nn.Module):
    """An MLP whose middle is recomputed in the backward pass; ``plain=True`` (for oracles) keeps it instead.

    With ``closure`` the recomputed part is a function of the module's weights, and no module is called in it.
    """

    def __init__(self, reentrant: bool, closure: bool = False) -> None:
        super().__init__()
        self.reentrant, self.closure, self.plain = reentrant, closure, False
        self.first = nn.Linear(4, 5)
        self.middle = nn.Sequential(nn.Linear(5, 5), nn.Tanh())
        self.last = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).tanh()
        x = self.middle(x) if self.plain else checkpoint(self.part, x, use_reentrant=self.reentrant)
        return self.last(x)

    def part(self, x: Tensor) -> Tensor:
        if self.closure:
            return torch.tanh(x @ self.middle[0].weight.T + self.middle[0].bias)
        return self.middle(x)


class Drop(nn.Module):
    """BatchNorm and dropout, whose modes and buffers a measurement must leave as they were."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Dropout(0.5))
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def mlp(activation: Callable[[], nn.Module] = nn.Tanh, sizes: tuple[int, ...] = (4, 6, 5, 3)) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), activation()]
    return nn.Sequential(*layers[:-1])


def in_place() -> nn.Sequential:
    """As written in many a ResNet."""
    return nn.Sequential(
        *(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(inplace=True), nn.Dropout(0.5, inplace=True)),
        *(nn.Linear(6, 5), nn.SiLU(inplace=True), nn.Linear(5, 3)),
    )


def lived_in(model: nn.Module) -> nn.Module:
    """Give norms running statistics, scales and shifts that are not those of a new net."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            module.running_mean.copy_(0.3 * torch.randn_like(module.running_mean))
            module.running_var.copy_(0.5 + torch.rand_like(module.running_var))
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.LayerNorm):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model


def vectors(samples: int = 10, features: int = 4, classes: int = 3) -> Batch:
    return torch.randn(samples, features), torch.randint(classes, (samples,))


def images(samples: int = 10) -> Batch:
    return torch.randn(samples, 1, 6, 6), torch.randint(3, (samples,))


def tokens(samples: int = 10, time: int = 5, vocabulary: int = 7) -> Batch:
    text = torch.randint(vocabulary, (samples, time + 1))
    return text[:, :-1], text[:, 1:].clone()


def sequences(samples: int = 10) -> Batch:
    return torch.randn(samples, 4, 3), torch.randint(3, (samples,))


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[..., Batch]]] = {
    "mlp-tanh": (mlp, vectors),
    "mlp-relu": (lambda: mlp(nn.ReLU), vectors),
    "conv-batchnorm": (Residual, images),
    "transformer-tied": (Transformer, tokens),
    "lstm": (Recurrent, sequences),
    "gru": (Gated, sequences),
    "encoder-layer": (Encoder, sequences),
    "in-place": (in_place, vectors),
}


def make(name: str, samples: int = 10, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Batch]:
    """A net of ``NETS`` and one batch for it; a net is new for each call and the same for each seed."""
    build, data = NETS[name]
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        with torch.no_grad():
            model = lived_in(build())
        inputs, targets = data(samples)
    return model.to(dtype), (inputs.to(dtype) if inputs.is_floating_point() else inputs, targets)


def cut(batch: Batch, sizes: tuple[int, ...]) -> list[Batch]:
    """The same samples in several batches of the given sizes."""
    return list(zip(*(torch.split(part, sizes) for part in batch), strict=True))


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return 2 * grad


class OnceDifferentiable(nn.Module):
    """Twice its input; a model with it trains, and cannot be measured."""

    def forward(self, x):
        return _Once.apply(x)
