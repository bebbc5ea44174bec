"""Random vectors that are the same on every device, in every grouping, and however they are cut among ranks.

Probe ``i`` of a seed is a function of ``(seed, i)`` alone: it is drawn on the CPU from its own counter-based
stream, so splitting probes into groups, moving to another device, asking for more of them or only for pieces changes
none.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from operator import itemgetter

import numpy as np
import torch
from torch import Tensor

from curvdiag.seeds import Seed, resolve_seed, stream
from curvdiag.space.pieces import Block, Piece, blocks

# Numbers of a probe that are drawn at once where only pieces of it are wanted.
AT_ONCE = 1 << 20
# Philox gives four words at each count, of 64 signs each.
SIGNS = 256


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
        rows[i].copy_(torch.from_numpy(_bits(seed, first + i, 0, size))).mul_(2).sub_(1)
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


def rademacher_pieces(
    count: int, pieces: Sequence[Piece], *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
) -> Tensor:
    """What :func:`rademacher` has at the ``pieces``, one after the other, at a cost of what they span."""
    seed = resolve_seed(seed)
    rows = torch.empty(count, sum(piece.size for piece in pieces), dtype=dtype, device=device)
    for place, block in _jobs(pieces):
        begin, length = block.begin + block.rows.start * block.row, (block.rows.stop - block.rows.start) * block.row
        for i in range(count):
            bits = torch.from_numpy(_bits(seed, first + i, begin, begin + length))
            own = bits.view(-1, *block.shape[1:])[(slice(None), *block.inside)]
            rows[i, place].copy_(own.reshape(-1)).mul_(2).sub_(1)
    return rows


def gaussian_pieces(
    count: int, pieces: Sequence[Piece], *, seed: Seed, dtype: torch.dtype, device: torch.device | str, first: int = 0
) -> Tensor:
    """What :func:`gaussian` has at the ``pieces``, one after the other.

    Normal numbers take a random number of words each, so that all of the vector up to the last piece is drawn, a
    little at a time, and forgotten.
    """
    seed = resolve_seed(seed)
    rows = torch.empty(count, sum(piece.size for piece in pieces), dtype=dtype, device=device)
    jobs = sorted(((block.begin, place, block) for place, block in _jobs(pieces)), key=itemgetter(0))
    for i in range(count):
        generator, drawn = np.random.Generator(stream(seed, first + i, 1)), 0
        for begin, group in itertools.groupby(jobs, key=itemgetter(0)):
            while drawn < begin:
                drawn += len(generator.standard_normal(min(AT_ONCE, begin - drawn), dtype=np.float32))
            numbers: Tensor | None = None
            for _, place, block in group:
                if numbers is None:  # boxes of one parameter may share it
                    numbers = torch.from_numpy(generator.standard_normal(block.length, dtype=np.float32))
                    drawn += block.length
                own = numbers.view(block.shape)[(block.rows, *block.inside)]
                rows[i, place].copy_(own.reshape(-1))
    return rows


def _jobs(pieces: Sequence[Piece]) -> list[tuple[slice, Block]]:
    """The blocks of all pieces, and where in the local vector each goes."""
    jobs, done = [], 0
    for piece in pieces:
        for block in blocks(piece, AT_ONCE):
            jobs.append((slice(done, done + block.kept), block))
            done += block.kept
    return jobs


def _bits(seed: int, index: int, begin: int, end: int) -> np.ndarray:
    """Entries ``begin`` to ``end`` of a random 0-1 vector; the stream jumps to the first of them."""
    jump = begin // SIGNS
    words = stream(seed, index, 0)
    if jump:
        words.advance(jump)
    drawn = words.random_raw(-(-(end - SIGNS * jump) // 64)).astype("<u8", copy=False)
    return np.unpackbits(drawn.view(np.uint8), count=end - SIGNS * jump)[begin - SIGNS * jump :].view(np.int8)
