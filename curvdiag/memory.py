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
    """``1536 -> "1.54 KB"``, in powers of 1000 as memory sizes of matrices are usually quoted."""
    for unit in ("B", "KB", "MB", "GB", "TB"):
        if count < 999.5:  # what would be rounded to 1000 takes the next unit
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} PB" if count < 999.5 else f"{count:,.0f} PB"


def _system_available() -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        return None
    return None


# Below the root of its hierarchy: limit and use of a control group, and the use that can be dropped (file cache).
VERSION_2 = ("memory.max", "memory.current", "inactive_file")
VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
UNLIMITED = 1 << 60


def _container_available(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int | None:
    """The least that any control group of this process, or a parent of it, leaves: limit less use.

    In a container with a namespace of its own the limit stands at the root of what it sees; without one (Slurm,
    systemd slices) somewhere along the path that ``membership`` names, one line ``id:controllers:path`` for each
    hierarchy. Both versions of control groups may be there.
    """
    try:
        lines = [line.split(":", 2) for line in membership.read_text().splitlines()]
    except OSError:
        lines = []
    groups = {(root, VERSION_2), (root / "memory", VERSION_1)}
    for line in lines:
        if len(line) != 3:
            continue
        _, controllers, path = line
        if not controllers:
            groups |= {(group, VERSION_2) for top in (root, root / "unified") for group in _with_parents(top, path)}
        elif "memory" in controllers.split(","):
            tops = {root / "memory", root / controllers}
            groups |= {(group, VERSION_1) for top in tops for group in _with_parents(top, path)}
    left = [n for n in (_group_available(*group) for group in groups) if n is not None]
    return min(left) if left else None


def _with_parents(top: Path, path: str) -> list[Path]:
    """``top`` and every group on the way from there to ``path``; only ``top`` where the path leads out of it."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts:
        return [top]
    return [top.joinpath(*parts[:n]) for n in range(len(parts) + 1)]


def _group_available(group: Path, files: tuple[str, str, str]) -> int | None:
    limit_file, use_file, droppable = files
    try:
        limit = int((group / limit_file).read_text())  # "max" is no number
        use = int((group / use_file).read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return None
    return max(0, limit - use + int(stat.get(droppable, 0))) if limit < UNLIMITED else None
