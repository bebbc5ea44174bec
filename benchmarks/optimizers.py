"""The price of one optimizer step on ten million parameters, in steps of ``AdamW(foreach=True)``."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import measure
import torch
from report import Row, row_of
from settings import Settings
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

from curvdiag.optim import GSGD, LPSGD, LPSGDM, Lion, SignSGD, Stacey

TARGET = 1.0
"""Most that a step of LPSGD and LPSGDM may cost."""
TURNS = 3
"""Turns for each of the products': a step is short."""
VOCABULARY, LENGTH, LAYERS, WIDTH = 8192, 512, 10, 256
Maker = Callable[[Iterable[Tensor]], Optimizer]
CANDIDATES: dict[str, tuple[Maker, float | None]] = {
    "LPSGD": (lambda ps: LPSGD(ps, weight_decay=0.01), TARGET),
    "LPSGDM": (lambda ps: LPSGDM(ps, weight_decay=0.01), TARGET),
    "Lion": (lambda ps: Lion(ps, weight_decay=0.01), None),
    "SignSGD": (lambda ps: SignSGD(ps, weight_decay=0.01), None),
    "GSGD": (lambda ps: GSGD(ps, total_steps=1000, weight_decay=0.01), None),
    "Stacey": (lambda ps: Stacey(ps, weight_decay=0.01), None),
    "torch SGD, momentum, foreach": (lambda ps: SGD(ps, momentum=0.9, foreach=True), None),
    "torch AdamW, one by one": (lambda ps: AdamW(ps, foreach=False), None),
    "torch AdamW, fused": (lambda ps: AdamW(ps, fused=True), None),
}


def optimizer_rows(settings: Settings) -> list[Row]:
    """All in turns, each between two blocks of the unit."""
    size = sum(tensor.numel() for tensor in weights())
    section = f"One optimizer step on {size / 1e6:.1f} million parameters, in steps of AdamW(foreach=True)"
    unit = AdamW(weights(), foreach=True).step
    steps: dict[str, Callable[[], object]] = {name: make(weights()).step for name, (make, _) in CANDIDATES.items()}
    timings = measure.alternate(unit, steps, rounds=TURNS * settings.rounds)
    return [row_of(section, "weights of a GPT", name, timings[name], limit) for name, (_, limit) in CANDIDATES.items()]


def weights() -> list[Tensor]:
    """The tensors of a GPT of width 256 and 10 layers, each with a gradient."""
    layer = [(3 * WIDTH, WIDTH), (3 * WIDTH,), (WIDTH, WIDTH), (WIDTH,), (4 * WIDTH, WIDTH), (4 * WIDTH,),
             (WIDTH, 4 * WIDTH), (WIDTH,), *[(WIDTH,)] * 4]  # fmt: skip
    shapes = [(VOCABULARY, WIDTH), (LENGTH, WIDTH), *layer * LAYERS, (WIDTH,), (WIDTH,)]
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]
    for tensor in tensors:
        tensor.grad = 1e-3 * torch.randn(tensor.shape, generator=generator)
    return tensors
