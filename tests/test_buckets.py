"""Lists of limited size: every element once, one dtype in each, and full."""

from __future__ import annotations

import torch

from curvdiag.optim import buckets


def test_every_element_comes_once_in_full_buckets_of_one_dtype(monkeypatch):
    size = 100 * torch.get_num_threads()
    monkeypatch.setattr(buckets, "CPU_ELEMENTS", 100)
    numbers = torch.arange(20 * size, dtype=torch.float64)
    tensors = list(numbers.split([5 * size + 1, 1, 0, size - 2, *[size // 4] * 40, 4 * size]))
    tensors[4:40:2] = [tensor.float() for tensor in tensors[4:40:2]]
    found = [part for (part,) in buckets.buckets((tensor,) for tensor in tensors)]
    assert all(len({tensor.dtype for tensor in part}) == 1 for part in found)
    filled = [sum(tensor.numel() for tensor in part) for part in found]
    assert max(filled) <= size
    # Two that follow each other would not have fitted into one, and two dtypes leave two that are not full.
    assert len(filled) <= 2 * numbers.numel() / size + 2
    assert sum(filled[:6]) >= 5 * size
    assert sorted(x for part in found for tensor in part for x in tensor.tolist()) == numbers.tolist()
    assert sum(len(part) == 4 for part in found) >= 6
