"""How much memory is free, counting what the obvious figures leave out."""

from __future__ import annotations

from pathlib import Path

import torch


def free_bytes(device: torch.device | str) -> int:
    """Bytes that can still be allocated on ``device``.

    On CUDA: what the driver reports free plus what PyTorch's caching allocator has reserved and not handed
    out. On the CPU: the kernel's estimate of available memory, or what a container's limit leaves if less.
    Where neither can be read (other systems): 4 GiB, a guess.
    """
    device = torch.device(device)
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    candidates = [n for n in (_system_available(), _container_available()) if n is not None]
    return min(candidates) if candidates else 4 << 30


def human_bytes(count: float) -> str:
    """``1536 -> "1.5 KB"``, in powers of 1000 as memory sizes of matrices are usually quoted."""
    for unit in ("B", "KB", "MB", "GB", "TB", "PB"):
        if count < 1000 or unit == "PB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    raise AssertionError("unreachable")


def _system_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


def _container_available() -> int | None:
    """Limit less use of the control group (version 2, then 1); file cache that can be dropped is not use."""
    for limit_file, use_file, stat_file, cache_key in (
        ("memory.max", "memory.current", "memory.stat", "inactive_file"),
        (
            "memory/memory.limit_in_bytes",
            "memory/memory.usage_in_bytes",
            "memory/memory.stat",
            "total_inactive_file",
        ),
    ):
        root = Path("/sys/fs/cgroup")
        try:
            limit = int((root / limit_file).read_text())
            use = int((root / use_file).read_text())
            stat = dict(line.split() for line in (root / stat_file).read_text().splitlines())
        except (OSError, ValueError):
            continue
        if limit < 1 << 60:
            return max(0, limit - use + int(stat.get(cache_key, 0)))
    return None
