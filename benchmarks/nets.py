"""The three nets on which every figure is measured, and a user's own loop over the batches."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


def mlp() -> tuple[nn.Module, Batches]:
    """784-512-512-10 ReLU, 0.67M parameters; 512 samples in 4 batches."""
    model = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, [(torch.randn(128, 784), torch.randint(10, (128,))) for _ in range(4)]


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(y + self.shortcut(x))


def resnet(width: int = 16) -> tuple[nn.Module, Batches]:
    """ResNet-18 for 32x32 images at width 16, 0.70M parameters; 32 samples in 4 batches."""
    layers: list[nn.Module] = [nn.Conv2d(3, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
    inputs = width
    for stage in range(4):
        for block in range(2):
            outputs = width * 2**stage
            layers.append(_Block(inputs, outputs, 2 if stage and not block else 1))
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return model, [(torch.randn(8, 3, 32, 32), torch.randint(10, (8,))) for _ in range(4)]


class _Attention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // self.heads) ** -0.5
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.out((weights @ v).transpose(1, 2).reshape(b, t, c))


class GPT(nn.Module):
    """A causal transformer with learned positions and plain softmax attention; logits as ``[B, V, T]``."""

    def __init__(
        self, vocabulary: int = 65, length: int = 128, layers: int = 4, width: int = 128, heads: int = 4
    ) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList()
        for _ in range(layers):
            block = nn.ModuleDict({
                "norm1": nn.LayerNorm(width), "attention": _Attention(width, heads), "norm2": nn.LayerNorm(width),
                "mlp": nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)),
            })  # fmt: skip
            self.blocks.append(block)
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = x + block["attention"](block["norm1"](x))  # type: ignore[index,operator]
            x = x + block["mlp"](block["norm2"](x))  # type: ignore[index,operator]
        return self.head(self.norm(x)).transpose(1, 2)


def gpt() -> tuple[nn.Module, Batches]:
    """4 layers, width 128, 4 heads, 128 tokens, vocabulary 65, 0.83M parameters; 8 sequences in 4 batches."""
    tokens = [torch.randint(65, (2, 129)) for _ in range(4)]
    return GPT(), [(t[:, :-1], t[:, 1:]) for t in tokens]


NETS: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {"MLP": mlp, "ResNet": resnet, "GPT": gpt}


def gradient(model: nn.Module, batches: Batches) -> None:
    """The unit of cost: the user's own loop, one forward and one backward pass for each batch."""
    model.zero_grad()
    for inputs, targets in batches:
        (F.cross_entropy(model(inputs), targets) / len(batches)).backward()


def product_by_differences(model: nn.Module, batches: Batches, vector: Tensor, step: float = 1e-4) -> Tensor:
    """``H v`` for a flat ``v`` by central differences of that loop in float64: the referee, right on smooth nets."""
    twin = copy.deepcopy(model).double()
    batches = [(x.double() if x.is_floating_point() else x, y) for x, y in batches]
    parameters = list(twin.parameters())
    here = nn.utils.parameters_to_vector(parameters).detach().clone()
    ends = []
    for sign in (1, -1):
        nn.utils.vector_to_parameters(here + sign * step * vector.double(), parameters)
        gradient(twin, batches)
        ends.append(torch.cat([p.grad.reshape(-1) for p in parameters if p.grad is not None]))
    return (ends[0] - ends[1]) / (2 * step)
