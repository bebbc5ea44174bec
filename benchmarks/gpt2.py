"""GPT-2 small from its configuration: random weights, 124 million parameters, 2 x 128 tokens, float32.

Measured in a process of its own, so that the most that is resident is that of the density alone;
``python benchmarks/gpt2.py 40`` prints what it found.
"""

from __future__ import annotations

import ctypes
import functools
import json
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
import torch.nn.functional as F
from report import Row
from settings import Settings
from torch import Tensor, nn

from curvdiag import Hessian, Objective, layer_spectra, spectral_density
from curvdiag.memory import free_bytes

LAYERS, WIDTH, HEADS, VOCABULARY, POSITIONS = 12, 768, 12, 50257, 1024
SEQUENCES, TOKENS = 2, 128
STEPS, PROBES = 40, 1
STEP, BLOCKS, RESIDENT = 3.2, 3.0, 8.0
"""Most gradients a step, densities for the 12 blocks, and GiB resident."""
NEEDED = 12 << 30
"""Free bytes without which nothing is measured."""
PATIENCE = 1200
"""Seconds after which the process is stopped; what it has found by then counts."""
SECTION = "GPT-2 small, 124 million parameters, 2 x 128 tokens"


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, c = x.shape
        q, k, v = self.c_attn(x).view(b, t, 3, HEADS, c // HEADS).permute(2, 0, 3, 1, 4)
        scores = (q @ k.transpose(-2, -1)) * (c // HEADS) ** -0.5
        mask = torch.ones(t, t, dtype=torch.bool, device=x.device).tril()
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return self.c_proj((weights @ v).transpose(1, 2).reshape(b, t, c))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.ln_1, self.attn = nn.LayerNorm(WIDTH), Attention()
        self.ln_2, self.mlp = nn.LayerNorm(WIDTH), MLP()

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    def __init__(self, layers: int) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(POSITIONS, WIDTH)
        self.h = nn.ModuleList(Block() for _ in range(layers))
        self.ln_f = nn.LayerNorm(WIDTH)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.wte(tokens) + self.wpe.weight[: tokens.shape[1]]
        for block in self.h:
            x = block(x)
        return self.ln_f(x)


class GPT2(nn.Module):
    """Names and shapes of the published model, its linear layers transposed; the embedding is the head."""

    def __init__(self, layers: int = LAYERS) -> None:
        super().__init__()
        self.transformer = Transformer(layers)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                # Those that end a residual branch are smaller, as in the published initialisation.
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if name.endswith("c_proj.weight") else 0.02)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.lm_head(self.transformer(tokens))


def losses(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    """The loss of each token ``[B, T]``."""
    tokens, targets = batch
    return F.cross_entropy(model(tokens).flatten(0, 1), targets.flatten(), reduction="none").view(targets.shape)


def gpt2_rows(settings: Settings) -> list[Row]:
    """A density, its memory, and the largest eigenvalue of each block."""
    free = free_bytes("cpu")
    if free < NEEDED:
        note = f"{free / 2**30:.0f} GiB are free, and {NEEDED / 2**30:.0f} are wanted"
        return [Row(SECTION, "GPT-2", "not measured", 0.0, 0.0, 0.0, note=note, unit="none")]
    steps = 4 if settings.quick else STEPS
    settings.tell(f"GPT-2 small: {steps} steps of a density, then lambda_max of its blocks")
    command = [sys.executable, str(Path(__file__)), str(steps), *(["--no-blocks"] if settings.quick else [])]
    found = _found_by(command, settings.tell)
    rows = rows_of(found, steps)
    if not settings.quick and "blocks" not in found:
        note = f"stopped after {PATIENCE} s, or failed; see what it printed"
        rows.append(Row(SECTION, "GPT-2", "blocks: not measured", 0.0, 0.0, 0.0, note=note, unit="none"))
    return rows


def _found_by(command: list[str], tell: Callable[[str], None]) -> dict[str, float]:
    """The last figures that a process prints; its other lines are told as they come."""
    found: dict[str, float] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        watch = threading.Timer(PATIENCE, process.kill)
        watch.start()
        try:
            for line in process.stdout or ():
                if line.startswith("{"):
                    found = json.loads(line)
                else:
                    tell(line.rstrip())
        finally:
            watch.cancel()
    if not found:
        raise RuntimeError(f"GPT-2 ended with code {process.returncode} before it had found anything; see above")
    return found


def rows_of(found: dict[str, float], steps: int) -> list[Row]:
    """What :func:`measured` found, as rows."""
    unit, density = found["unit"], found["density"]
    step, product = density / steps / unit, found["product"] / unit
    reused = "freed memory cannot be kept and reused here"
    if "unit kept" in found:
        reused = f"{found['product kept'] / found['unit kept']:.2f} where freed memory is kept and reused in both"
    between = f"beyond the bare product: {step - product:.2f} of reading and writing vectors of 0.5 GB"
    rows = [
        _row("H @ v, graphs kept", product, None, reused),
        _row(f"a step of a density of {steps} steps, 1 probe", step, STEP, between, density / steps),
        _row("most resident memory in GiB", found["resident"], RESIDENT, "the whole process", unit="times"),
        _row("building the graphs and their checks", found["building"] / unit, None, "once", found["building"]),
    ]
    if "blocks" in found:
        note = f"{found['products']:.0f} products of blocks, {found['converged']:.0f} of {LAYERS} converged to 1e-2"
        what = f"lambda_max of {LAYERS} blocks, in such densities"
        rows.append(_row(what, found["blocks"] / density, BLOCKS, note, found["blocks"], unit="times"))
    return rows


def measured(steps: int, *, blocks: bool, clock: Callable[[], float] = time.perf_counter) -> None:
    """Print seconds of a gradient, a product, a density and the blocks, and GiB that were resident at most by then."""
    begun = told = clock()

    def tell(what: str, done: int, planned: int) -> None:
        nonlocal told
        if clock() - told > 10:
            told = clock()
            print(f"  {what}: {done} of at most {planned} products, {told - begun:.0f} s", flush=True)

    def seconds(call: Callable[[], object], repeats: int = 3) -> float:
        call()
        started = clock()
        for _ in range(repeats):
            call()
        return (clock() - started) / repeats

    torch.manual_seed(0)
    model = GPT2().eval()
    tokens = torch.randint(VOCABULARY, (SEQUENCES, TOKENS + 1))
    batch = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def gradient() -> None:
        model.zero_grad()
        losses(model, batch).mean().backward()

    before = seconds(gradient)
    model.zero_grad()
    started = clock()
    hessian = Hessian(Objective.from_loss(model, losses, batch=batch))
    building = clock() - started
    spectral_density(hessian, steps=1, probes=PROBES)
    started = clock()
    spectral_density(hessian, steps=steps, probes=PROBES, progress=functools.partial(tell, "density"))
    density = clock() - started
    resident = peak_resident()
    unit = (before + seconds(gradient)) / 2
    model.zero_grad()
    product = functools.partial(hessian.apply, torch.ones(1, hessian.size))
    found = {"unit": unit, "building": building, "density": density, "resident": resident, "product": seconds(product)}
    print(json.dumps(found), flush=True)
    if blocks:
        started = clock()
        names = {str(i): f"transformer.h.{i}.*" for i in range(LAYERS)}
        layers = layer_spectra(hessian, names, tol=1e-2, progress=functools.partial(tell, "blocks"))
        found |= {"blocks": clock() - started, "products": layers.matvecs}
        found["converged"] = sum(layer.converged for layer in layers.layers.values())
    if keep_freed_memory():
        found["product kept"] = seconds(product)
        found["unit kept"] = seconds(gradient)
    print(json.dumps(found), flush=True)


def peak_resident() -> float:
    """GiB, of this process alone: ``ru_maxrss`` begins at what the process that started it held."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) / 2**20 for line in lines if line.startswith("VmHWM"))


def keep_freed_memory() -> bool:
    """From now on the C library reuses large freed blocks; by default it gives them back and fetches them again.

    That spares a sixth of each product and is not done in the library itself: before version 2.38 glibc cannot give a
    freed block to an aligned request of the same size, so that half as much memory again may be resident.
    """
    with suppress(OSError, AttributeError):
        allocator = ctypes.CDLL(None)
        return all(allocator.mallopt(what, 2**31 - 1) for what in (-3, -1))  # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
    return False


def _row(
    what: str, value: float, most: float | None, note: str, seconds: float | None = None, unit: str = "gradients"
) -> Row:
    target = "" if most is None else f"at most {most:.3g}"
    holds = None if most is None else value <= most
    return Row(SECTION, "GPT-2", what, value, value, value, target, holds, note, unit, seconds=seconds)


if __name__ == "__main__":
    measured(int(sys.argv[1]), blocks="--no-blocks" not in sys.argv)
