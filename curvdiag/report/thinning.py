"""Which of many measurements a page shows, so that its size does not grow with the length of a run."""

from __future__ import annotations

from itertools import pairwise

import numpy as np


def evenly(count: int, limit: int) -> np.ndarray:
    """Indices of at most ``limit`` of ``count`` things, the first and the last among them, evenly spaced."""
    if count <= limit:
        return np.arange(count)
    return np.unique(np.round(np.linspace(0, count - 1, max(limit, 2))).astype(np.int64))


def extremes(values: np.ndarray, limit: int) -> np.ndarray:
    """Indices of at most ``limit`` of ``values``: the ends, and the least and the largest of each stretch between.

    A spike of a single value is kept, which an even choice would lose. NaN counts as neither.
    """
    count = len(values)
    if count <= limit:
        return np.arange(count)
    borders = np.linspace(1, count - 1, max((limit - 2) // 2, 1) + 1).astype(np.int64)
    kept = {0, count - 1}
    for low, high in pairwise(borders):
        part = values[low:high]
        known = np.flatnonzero(~np.isnan(part))
        if len(known):
            kept |= {int(low + known[part[known].argmin()]), int(low + known[part[known].argmax()])}
        elif len(part):
            kept.add(int(low))  # the gap is kept too
    return np.array(sorted(kept))
