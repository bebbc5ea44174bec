"""The nets of the GPU part, of the sizes that people train; and tiny ones for the same code on a CPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from nets import GPT, Batches, resnet
from torch import Tensor, nn


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions with a shortcut, four times as wide at its end."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn3(self.conv3(F.relu(self.bn2(self.conv2(y)))))
        return F.relu(y + self.shortcut(x))


def resnet50(width: int = 64, blocks: tuple[int, ...] = (3, 4, 6, 3), classes: int = 1000) -> nn.Module:
    """ResNet-50 for images of 3 channels: 25.6M parameters at width 64 with 1000 classes."""
    layers: list[nn.Module] = [
        nn.Conv2d(3, width, 7, 2, 3, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
        nn.MaxPool2d(3, 2, 1),
    ]
    inputs = width
    for stage, count in enumerate(blocks):
        for block in range(count):
            layers.append(Bottleneck(inputs, width * 2**stage, 2 if stage and not block else 1))
            inputs = 4 * width * 2**stage
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, classes))


def gpu_nets(device: str) -> dict[str, Callable[[], tuple[nn.Module, Batches]]]:
    """Makers of nets and data on ``device``; on the CPU tiny ones."""
    tiny = device == "cpu"

    def mlp() -> tuple[nn.Module, Batches]:
        width, count = (16, 4) if tiny else (512, 128)
        model = nn.Sequential(
            nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10)
        )
        return model, _images(count, (784,), 10)

    def resnet18() -> tuple[nn.Module, Batches]:
        model, _ = resnet(4 if tiny else 64)
        return model, _images(2, (3, 8, 8), 10) if tiny else _images(32, (3, 32, 32), 10)

    def bottlenecks() -> tuple[nn.Module, Batches]:
        if tiny:
            return resnet50(4, (1, 1), 10), _images(2, (3, 32, 32), 10)
        return resnet50(), _images(8, (3, 224, 224), 1000)

    def gpt() -> tuple[nn.Module, Batches]:
        layers, width, heads, length, count = (1, 16, 2, 8, 1) if tiny else (6, 384, 6, 256, 8)
        tokens = [torch.randint(65, (count, length + 1)) for _ in range(4)]
        return GPT(65, length, layers, width, heads), [(t[:, :-1], t[:, 1:]) for t in tokens]

    makers = {"MLP": mlp, "ResNet-18": resnet18, "ResNet-50": bottlenecks, "GPT": gpt}
    return {name: lambda make=make: _moved(*make(), device) for name, make in makers.items()}


def _images(count: int, shape: tuple[int, ...], classes: int) -> Batches:
    return [(torch.randn(count, *shape), torch.randint(classes, (count,))) for _ in range(4)]


def _moved(model: nn.Module, batches: Batches, device: str) -> tuple[nn.Module, Batches]:
    return model.to(device), [(x.to(device), y.to(device)) for x, y in batches]
