"""Memory of kept graphs against their forecast, and of a plain density in vectors; each case in a process of its own.

``python benchmarks/memory.py CASE`` prints what one case found.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from nets import GPT, Batches, resnet
from report import Row
from settings import Settings
from torch import nn

from curvdiag import Hessian, Objective, spectral_density

SECTION = "Memory"
LEEWAY = 0.25
"""How far the forecast may be from the measured growth, either way."""
PAGE = os.sysconf("SC_PAGE_SIZE") if hasattr(os, "sysconf") else 4096
STATUS = Path("/proc/self/status")


def memory_rows(settings: Settings) -> list[Row]:
    """A row for each net's kept graphs, and one for the vectors of a density."""
    if not STATUS.exists():
        return [Row(SECTION, "", "not measured: needs Linux's /proc", 0.0, 0.0, 0.0, unit="none")]
    rows = []
    for net in GRAPHS if not settings.quick else ("MLP",):
        found = in_own_process(net)
        ratio = found["forecast"] / found["grown"]
        note = f"forecast {found['forecast'] / 1e6:.0f} MB, resident growth {found['grown'] / 1e6:.0f} MB"
        holds = 1 / (1 + LEEWAY) <= ratio <= 1 + LEEWAY
        what, target = "kept graphs, forecast over measured growth", f"within {LEEWAY:.0%} either way"
        rows.append(Row(SECTION, net, what, ratio, ratio, ratio, target, holds, note, "times"))
    found = in_own_process("vectors")
    peak = found["peak"] / found["vector"]
    note = f"a vector is {found['vector'] / 1e6:.0f} MB; one probe, beyond weights, data and kept graphs"
    return [
        *rows,
        Row(SECTION, "wide MLP", "plain density, peak in vectors", peak, peak, peak, note=note, unit="times"),
    ]


def in_own_process(case: str) -> dict[str, float]:
    """What :func:`measure_case` prints in a fresh interpreter."""
    command = [sys.executable, str(Path(__file__)), case]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    if done.returncode:
        raise RuntimeError(f"the case {case} of memory failed:\n{done.stderr[-2000:]}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def graphs_of(make: Callable[[], tuple[nn.Module, Batches]]) -> dict[str, float]:
    """Forecast bytes of the graphs that an operator keeps, and how much more of them is resident."""
    torch.manual_seed(0)
    model, batches = make()
    model.eval()
    objective = Objective(model, nn.CrossEntropyLoss(), batches=batches)
    # A first operator, dropped again, leaves what stays for good: code, and the libraries' own working memory.
    Hessian(objective) @ torch.ones(objective.parameters.size)
    before = resident()
    operator = Hessian(objective)
    if operator.plan is None or operator.plan.rebuilt:
        raise RuntimeError(f"not all graphs are kept: {operator.plan}")
    grown = resident() - before - bytes_of(operator)
    return {"forecast": operator.plan.bytes_kept, "grown": grown}


def vectors_of_a_density() -> dict[str, float]:
    """The peak of a density of one probe beyond what stood there before it, and the bytes of one vector."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 4096), nn.ReLU(), nn.Linear(4096, 4096), nn.ReLU(), nn.Linear(4096, 10))
    batch = (torch.randn(16, 256), torch.randint(10, (16,)))
    operator = Hessian(Objective(model, nn.CrossEntropyLoss(), batches=[batch]))
    vector = 4 * operator.size
    spectral_density(operator, steps=2, probes=1)
    before = resident()
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    spectral_density(operator, steps=6, probes=1)
    return {"peak": peak() - before, "vector": vector}


def bytes_of(operator: Hessian) -> int:
    """Its copies of weights and buffers, which are no part of the graphs."""
    model = operator.objective.model
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def resident() -> int:
    """Resident bytes, once the C library has given back what it keeps in reserve."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def peak() -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


def wide_mlp() -> tuple[nn.Module, Batches]:
    """16,384 samples, so that the graphs are far larger than anything else."""
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    return model, [(torch.randn(4096, 64), torch.randint(10, (4096,))) for _ in range(4)]


def wide_resnet() -> tuple[nn.Module, Batches]:
    model, _ = resnet()
    return model, [(torch.randn(32, 3, 32, 32), torch.randint(10, (32,))) for _ in range(4)]


def long_gpt() -> tuple[nn.Module, Batches]:
    tokens = [torch.randint(65, (4, 129)) for _ in range(4)]
    return GPT(), [(t[:, :-1], t[:, 1:]) for t in tokens]


GRAPHS: dict[str, Callable[[], tuple[nn.Module, Batches]]] = {
    "MLP": wide_mlp,
    "ResNet": wide_resnet,
    "GPT": long_gpt,
}


def measure_case(case: str) -> dict[str, float]:
    return vectors_of_a_density() if case == "vectors" else graphs_of(GRAPHS[case])


if __name__ == "__main__":
    print(json.dumps(measure_case(sys.argv[1])))
