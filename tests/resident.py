"""Run as a process of its own: how much resident memory grows, beside what was foretold.

``python tests/resident.py graphs CASE MATRIX`` and ``python tests/resident.py density``.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag import GaussNewton, Hessian, NoiseCovariance, Objective, spectral_density

Batches = list[tuple[Tensor, Tensor]]
MATRICES: dict[str, Callable[..., Any]] = {"H": Hessian, "GGN": GaussNewton, "C": NoiseCovariance}


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn = nn.Embedding(1000, 64), nn.LSTM(64, 256, batch_first=True)
        self.head = nn.Linear(256, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.rnn(self.embed(tokens))[0][:, -1])


class Attending(nn.Module):
    """One layer of attention over a large vocabulary: outputs ``[B, V, T]`` that outweigh all else."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.qkv, self.norm = nn.Embedding(8000, 64), nn.Linear(64, 192), nn.LayerNorm(64)
        self.head = nn.Linear(64, 8000, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        q, k, v = self.qkv(x).chunk(3, -1)
        x = self.norm(x + (q @ k.transpose(1, 2) / 8).softmax(-1) @ v)
        return self.head(x).transpose(1, 2)


class Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(50_000, 128), nn.Linear(128, 20)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(torch.tanh(self.embed(tokens)).mean(1))


def images(count: int, *shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(count, *shape), torch.randint(10, (count,))


def tokens(count: int, length: int, vocabulary: int, classes: int | None = None) -> tuple[Tensor, Tensor]:
    labels = torch.randint(vocabulary, (count, length)) if classes is None else torch.randint(classes, (count,))
    return torch.randint(vocabulary, (count, length)), labels


def mlp() -> tuple[nn.Module, Batches]:
    model = nn.Sequential(nn.Linear(256, 512), nn.Tanh(), nn.Linear(512, 512), nn.GELU(), nn.Linear(512, 10))
    return model, [images(12_000, 256)]


def wide_inputs() -> tuple[nn.Module, Batches]:
    """Inputs that outweigh what is computed from them, copied where their batches are merged."""
    return nn.Sequential(nn.Linear(4096, 32), nn.Tanh(), nn.Linear(32, 10)), [images(2500, 4096) for _ in range(4)]


def convolutions() -> tuple[nn.Module, Batches]:
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 32), (32, 64)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))
    return model, [images(80, 3, 32, 32)]


def recurrent() -> tuple[nn.Module, Batches]:
    return Recurrent(), [tokens(64, 60, 1000, 20)]


def attending() -> tuple[nn.Module, Batches]:
    return Attending(), [tokens(8, 128, 8000) for _ in range(2)]


def averaging() -> tuple[nn.Module, Batches]:
    return Averaging(), [tokens(2000, 64, 50_000, 20)]


CASES = {f.__name__: f for f in (mlp, wide_inputs, convolutions, recurrent, attending, averaging)}


def graphs(case: str, matrix: str, mode: str = "eval") -> dict[str, float]:
    torch.manual_seed(0)
    model, batches = CASES[case]()
    objective = Objective(model, nn.CrossEntropyLoss(), batches=batches, mode=mode)
    few = [tuple(part[:4] for part in batch) for batch in batches]
    small = MATRICES[matrix](Objective(model, nn.CrossEntropyLoss(), batches=few, mode=mode), memory=0)
    small @ torch.ones(small.size)  # all code is loaded now
    del small
    before = resident()
    op = MATRICES[matrix](objective)
    op @ torch.ones(op.size)
    copies = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    assert op.plan is not None
    assert not op.plan.rebuilt
    return {"foretold": op.plan.bytes_kept, "grown": resident() - before - copies}


def density() -> dict[str, float]:
    """The peak of a density of a net whose vectors and graphs weigh about as much as each other."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 2048), nn.Tanh(), nn.Linear(2048, 2048), nn.Tanh(), nn.Linear(2048, 10))
    few = Hessian(Objective(model, nn.CrossEntropyLoss(), images(4, 784)))
    spectral_density(few, steps=1, probes=1)
    del few
    objective = Objective(model, nn.CrossEntropyLoss(), images(3000, 784))
    before = resident()
    plan = objective.plan(steps=2, probes=2)
    planning = peak() - before
    spectral_density(Hessian(objective), steps=2, probes=2)
    grown = peak() - before
    return {"foretold": plan.peak_bytes, "resident": plan.resident_bytes, "grown": grown, "planning": planning}


def resident() -> int:
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak() -> int:
    """Not ``ru_maxrss``, which begins at what the process that started this one held."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


if __name__ == "__main__":
    what, *arguments = sys.argv[1:]
    print(json.dumps({"graphs": graphs, "density": density}[what](*arguments)))
