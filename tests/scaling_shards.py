"""The test of C against H on all samples, or on the shards of several ranks; and how two results are compared."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from nets import lived_in, mlp
from torch import Tensor, nn
from torch.nn import functional as F

from curvdiag import Objective
from curvdiag.scaling import blocks
from curvdiag.scaling.measure import scaling_test

SAMPLES = 240
SHARDS = {1: (240,), 2: (151, 89), 3: (33, 120, 87)}
"""Samples of each rank, by the number of ranks."""


class Small(nn.Module):
    """Two convolutions and a head, smooth."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm2d(3)
        self.second = nn.Conv2d(3, 3, 3, stride=2)
        self.head = nn.Linear(12, 3)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.norm(self.first(images)))
        return self.head(torch.tanh(self.second(x)).flatten(1))


TWICE = 100.0


class Sometimes(nn.Sequential):
    """Layers of which one is called once more where the inputs are long."""

    def forward(self, x: Tensor) -> Tensor:
        out = super().forward(x)
        return out + 0.1 * self[4](self[2](self[0](x))) if float(x.norm(dim=1).max()) > TWICE / 2 else out


CLASSES = torch.tensor([0.5, 1.0, 3.0], dtype=torch.float64)
CASES: dict[str, dict[str, Any]] = {
    "dense": {"method": "dense", "directions": 8},
    "dense, coordinates": {"method": "dense", "basis": "parameter", "directions": 10},
    "kronecker": {"method": "kronecker", "block": "2.weight", "directions": 8},
    "kronecker, no squares": {"method": "kronecker", "block": "0.weight", "directions": 6, "squares": False},
    "found out": {"block": "2.weight", "directions": 6, "holdout": False},
    "weighted": {"method": "dense", "directions": 6, "weighted": True},
    "products": {"method": "matrix-free", "directions": 5},
    "convolutions": {"method": "matrix-free", "directions": 5, "holdout": False, "images": True},
    "single precision": {"method": "matrix-free", "directions": 4, "holdout": False, "dtype": torch.float32},
}
"""Options of the test; ``weighted`` and ``images`` choose the problem."""


def cases(world: int) -> list[str]:
    """What is measured on so many ranks: more of them are slow on a small machine, and not so different."""
    return [name for name in CASES if world < 3 or name in ("dense", "kronecker", "weighted", "products")]


def problem(
    rank: int = 0,
    world: int = 1,
    *,
    weighted: bool = False,
    images: bool = False,
    spoilt: int | None = None,
    twice: int | None = None,
    soft: int | None = None,
) -> Objective:
    """The shard of one rank, in ragged batches; a net halfway through its training.

    One rank may be ``spoilt`` by a NaN, or have a sample that goes through a layer ``twice``, or ``soft`` labels.
    """
    x, y = data(images)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(3)
        model = (lived_in(Small()) if images else Sometimes(*mlp(nn.ReLU))).double().eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    optimizer.zero_grad()
    if weighted:
        y[::7] = -100  # ignored
    first, size = sum(SHARDS[world][:rank]), SHARDS[world][rank]
    x, y = (part[first : first + size] for part in (x, y))
    if rank == spoilt:
        x[-1] = torch.nan
    if rank == twice:
        x[-1] *= TWICE / x[-1].norm()
    if rank == soft:
        y = 0.1 + 0.7 * F.one_hot(y, 3).double()
    batches = list(zip(x.split(50), y.split(50), strict=True))
    criterion = nn.CrossEntropyLoss(weight=CLASSES if weighted else None)
    return Objective(model, criterion, batches, group=None if world == 1 else "world")


def data(images: bool) -> tuple[Tensor, Tensor]:
    """All samples."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(SAMPLES, *((1, 5, 5) if images else (4,)), generator=generator, dtype=torch.float64)
    score = x.flatten(1)[:, :3] + 1.5 * torch.randn(SAMPLES, 3, generator=generator, dtype=torch.float64)
    return x, score.argmax(1)


def measure(name: str, rank: int = 0, world: int = 1) -> Any:
    """One case; eigenvectors of products are found as far as they can be, so that results compare."""
    options = dict(CASES[name])
    task = {key: options.pop(key) for key in ("weighted", "images") if key in options}
    exact = options.get("dtype") is None
    original = blocks.top_eigenpairs
    blocks.top_eigenpairs = functools.partial(original, tol=1e-12 if exact else 1e-6, max_matvecs=2000)
    try:
        return scaling_test(problem(rank, world, **task), bootstrap=200, **options)
    finally:
        blocks.top_eigenpairs = original


def fields(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every number and word in a result, by where it stands."""
    if dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from fields(getattr(value, field.name), f"{path}.{field.name}")
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from fields(part, f"{path}[{key}]")
    elif isinstance(value, list | tuple):
        for index, part in enumerate(value):
            yield from fields(part, f"{path}[{index}]")
    else:
        yield path, value


def differences(one: Any, other: Any, *, signs: bool = False) -> dict[str, float]:
    """How far the numbers of two results are from each other, relative to the largest beside them.

    What is no real number has to be equal. With ``signs`` numbers may differ by theirs: eigenvectors have none.
    """
    found, own, others = {}, dict(fields(one)), dict(fields(other))
    assert own.keys() == others.keys()
    for path, value in own.items():
        mine, yours = np.asarray(value), np.asarray(others[path])
        if mine.dtype.kind != "f":
            assert mine.dtype == yours.dtype, path
            assert np.array_equal(mine, yours), (path, value, others[path])
            continue
        assert mine.shape == yours.shape, path
        assert np.array_equal(np.isnan(mine), np.isnan(yours)), (path, mine, yours)
        if signs:
            mine, yours = np.abs(mine), np.abs(yours)
        scale = float(np.nanmax(np.abs(mine))) if mine.size and not np.isnan(mine).all() else 0.0
        gap = float(np.nanmax(np.abs(mine - yours))) if scale else 0.0
        found[path] = gap / scale if scale else (0.0 if not gap else math.inf)
    return found
