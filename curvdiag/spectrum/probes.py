"""Random vectors that are the same on every device and in every grouping.

Probe ``i`` of a seed is a function of ``(seed, i)`` alone: it is drawn on the CPU from its own counter-based
stream, so splitting probes into groups, moving to another device or asking for more of them changes none.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from curvdiag.seeds import Seed, resolve_seed, stream


def rademacher(
    count: int,
    size: int,
    *,
    seed: Seed,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> Tensor:
    """Rows ``[count, size]`` of independent signs, probes ``first`` to ``first + count - 1`` of ``seed``."""
    seed = resolve_seed(seed)
    rows = torch.empty(count, size, dtype=dtype, device=device)
    for i in range(count):
        words = stream(seed, first + i, 0).random_raw(-(-size // 64)).astype("<u8", copy=False)
        signs = np.unpackbits(words.view(np.uint8), count=size).view(np.int8)
        rows[i].copy_(torch.from_numpy(signs)).mul_(2).sub_(1)
    return rows


def gaussian(
    count: int,
    size: int,
    *,
    seed: Seed,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    first: int = 0,
) -> Tensor:
    """Rows ``[count, size]`` of independent standard normal numbers, as :func:`rademacher`.

    Drawn in single precision whatever ``dtype`` is, so that the vectors do not depend on it.
    """
    seed = resolve_seed(seed)
    rows = torch.empty(count, size, dtype=dtype, device=device)
    for i in range(count):
        draw = np.random.Generator(stream(seed, first + i, 1)).standard_normal(size, dtype=np.float32)
        rows[i].copy_(torch.from_numpy(draw))
    return rows
