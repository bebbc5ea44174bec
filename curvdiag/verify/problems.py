"""Small problems in double precision, each with something that a Hessian product can get wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

Batches = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Problem:
    """A model in eval mode and its batches ``(inputs, targets)``; the loss is the cross-entropy over all samples."""

    name: str
    model: nn.Module
    batches: Batches


def problems(seed: int = 0) -> list[Problem]:
    """All of them, the same for the same seed; the global random state stays as it was."""
    makers: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
        "MLP": _mlp,
        "conv net with BatchNorm": _conv_net,
        "transformer": _transformer,
        "ragged batches 32,32,32,4": _ragged,
    }
    made = []
    for index, (name, make) in enumerate(makers.items()):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed + index)
            model, batches = make()
        model = model.double().eval()
        made.append(Problem(name, model, [(x.double() if x.is_floating_point() else x, y) for x, y in batches]))
    return made


def _mlp() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 5), nn.Tanh(), nn.Linear(5, 4))
    return model, [(torch.randn(40, 6), torch.randint(4, (40,)))]


def _conv_net() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )
    for module in model:
        if isinstance(module, nn.BatchNorm2d):  # as after some training, not as made
            nn.init.normal_(module.running_mean, std=0.3)  # type: ignore[arg-type]
            nn.init.uniform_(module.running_var, 0.5, 1.5)  # type: ignore[arg-type]
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.3)
    return model, [(torch.randn(12, 1, 6, 6), torch.randint(3, (12,))) for _ in range(2)]


def _transformer() -> tuple[nn.Module, Batches]:
    text = torch.randint(6, (8, 6))
    return _Transformer(), [(text[:, :-1], text[:, 1:].clone())]


def _ragged() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(nn.Linear(5, 10), nn.ReLU(), nn.Linear(10, 4))
    # The four samples of the last batch are unlike the rest, so that weighting batches alike is far off.
    batches = [(torch.randn(size, 5), torch.randint(4, (size,))) for size in (32, 32, 32)]
    return model, [*batches, (3 * torch.randn(4, 5) + 2, torch.randint(4, (4,)))]


class _Transformer(nn.Module):
    """One causal block, attention spelled out: PyHessian cannot differentiate the fused kernel twice."""

    def __init__(self, vocabulary: int = 6, length: int = 5, width: int = 4) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.norm, self.qkv, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 6), nn.GELU(), nn.Linear(6, width))
        self.head = nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.positions.weight[: tokens.shape[1]]
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=-1)
        future = torch.ones(tokens.shape[1], tokens.shape[1], dtype=torch.bool, device=tokens.device).triu(1)
        scores = (q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).masked_fill(future, -torch.inf)
        x = x + self.out(scores.softmax(-1) @ v)
        return self.head(x + self.mlp(x)).transpose(1, 2)
