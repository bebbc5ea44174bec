"""Kept graphs take what their plan says, within a quarter, as resident memory of a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from curvdiag import Hessian, Objective, spectral_density
from curvdiag.operators.live_bytes import LiveBytes
from curvdiag.operators.plan import calibration

HERE = Path(__file__).parent
NEEDS_PROC = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
MB = 10**6


def measured(*arguments: str, **environment: str) -> dict[str, float]:
    command = [sys.executable, str(HERE / "resident.py"), *arguments]
    env = {**os.environ, **environment}
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=280, env=env)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


SHORT = [("wide_inputs", "H"), ("attending", "GGN"), ("recurrent", "H")]
LONG = [
    ("mlp", "H"),
    ("mlp", "GGN"),
    ("convolutions", "C"),
    ("convolutions", "H", "train"),
    ("attending", "H"),
    ("recurrent", "C"),
    ("averaging", "GGN"),
]


@NEEDS_PROC
@pytest.mark.parametrize("case", [*SHORT, *(pytest.param(case, marks=pytest.mark.long) for case in LONG)], ids="-".join)
def test_kept_graphs_take_what_was_foretold_within_a_quarter(case: tuple[str, ...]) -> None:
    found = measured("graphs", *case)
    assert found["grown"] > 90 * MB
    assert 0.75 <= found["foretold"] / found["grown"] <= 1.25


@NEEDS_PROC
@pytest.mark.parametrize("heap", [False, True], ids=["mapped", "heap"])
def test_a_density_peaks_where_the_plan_says_within_a_quarter(heap: bool) -> None:
    """Where every tensor is mapped on its own, its bytes count; else what the heap holds between them as well."""
    found = measured("density", **({} if heap else {"MALLOC_MMAP_THRESHOLD_": "65536"}))
    assert found["grown"] > 150 * MB
    if heap:
        assert 0.8 * found["foretold"] <= found["grown"] <= found["resident"]
    else:
        assert 0.75 <= found["foretold"] / found["grown"] <= 1.25
    assert found["planning"] < found["foretold"] / 2


@pytest.mark.parametrize("probes", [1, 2, 3])
def test_a_density_holds_three_vectors_for_each_probe_and_the_products_being_made(probes: int) -> None:
    model = nn.Sequential(nn.Linear(300, 500), nn.Tanh(), nn.Linear(500, 10))
    op = Hessian(Objective(model, F.cross_entropy, (torch.randn(2, 300), torch.randint(10, (2,)))), batched=False)
    with LiveBytes() as counter:
        spectral_density(op, steps=5, probes=probes)
    vectors = counter.peak() / (4 * op.size)
    assert 3 * probes <= vectors < 3 * probes + 1.1


def test_live_bytes_counts_new_storages_once_and_only_while_they_live() -> None:
    old = torch.zeros(1000)
    with LiveBytes() as counter:
        kept = old + 1
        views = kept.view(10, 100), old[:10], kept.t()
        passing = old + 2
        assert counter.now() == 8000
        del passing
        kept.add_(1)
        assert counter.now() == 4000
        assert counter.peak() == 8000
        counter.reset()
        assert counter.peak() == 4000
    del views
    unseen = old + 3
    assert counter.now() == kept.nbytes == unseen.nbytes


def test_live_bytes_sees_backward_passes_and_their_graphs() -> None:
    w = torch.randn(100, 100, requires_grad=True)
    with LiveBytes() as counter:
        loss = (w.tanh() ** 2).sum()
        forward = counter.now()
        (gradient,) = torch.autograd.grad(loss, [w], create_graph=True)
        assert counter.now() >= forward + gradient.nbytes
        assert forward >= w.nbytes


@pytest.mark.parametrize(
    ("count", "expected"),
    [(1, (1, 1)), (2, (1, 2)), (3, (1, 3)), (4, (2, 4)), (8, (2, 8)), (32, (8, 32)), (9999, (8, 32))],
)
def test_two_sizes_of_graphs_are_tried_from_two_samples_on(count: int, expected: tuple[int, int]) -> None:
    """A share that belongs to no sample would else be counted once for each further batch."""
    assert calibration(count, cut=True) == expected
    assert calibration(count, cut=False) == (count, count)


def test_small_batches_do_not_multiply_what_belongs_to_the_graph() -> None:
    class Factored(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Parameter(torch.randn(300, 300) / 17), nn.Parameter(torch.randn(300, 3) / 17)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x @ (self.a.tanh() @ self.b)

    torch.manual_seed(0)
    batches = [(torch.randn(4, 300), torch.randint(3, (4,))) for _ in range(25)]
    one = Hessian(Objective(Factored(), F.cross_entropy, batches[0])).plan
    many = Hessian(Objective(Factored(), F.cross_entropy, batches)).plan
    assert one is not None
    assert many is not None
    assert many.kept == (100,)
    assert many.bytes_kept < 3 * one.bytes_kept
