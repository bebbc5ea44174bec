"""Where randomness comes from: a seed, and streams of numbers that depend on nothing but it and an index."""

from __future__ import annotations

import numpy as np
import torch

from curvdiag.errors import ArgumentError

Seed = int | torch.Generator


def resolve_seed(seed: Seed) -> int:
    """A seed as a non-negative integer; a generator gives its next number, and so advances."""
    if isinstance(seed, torch.Generator):
        return int(torch.randint(2**63 - 1, (), generator=seed, device=seed.device))
    if isinstance(seed, bool) or not isinstance(seed, int | np.integer):
        raise ArgumentError(f"a seed is an integer or a torch.Generator, not {type(seed).__name__}")
    return int(seed) % 2**64


def stream(seed: int, index: int, kind: int) -> np.random.Philox:
    """The numbers of ``index``; each purpose has a ``kind`` of its own (0 signs, 1 normal vectors, 2 labels)."""
    return np.random.Philox(np.random.SeedSequence([seed, index, kind]))
