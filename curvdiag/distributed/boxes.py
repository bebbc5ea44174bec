"""Which box of each parameter a rank holds, and which of those that several ranks hold counts where."""

from __future__ import annotations

import atexit
import itertools
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from curvdiag.distributed.fsdp import is_sharded
from curvdiag.distributed.ranks import Ranks, ranks_of
from curvdiag.errors import ArgumentError

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Corner and shape of what is held of one parameter."""


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a parameter or gradient, as memory that can be written into."""
    if not is_sharded(tensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def box(name: str, tensor: Tensor) -> Box:
    """Where that lies in the whole parameter.

    Raises:
        ArgumentError: It is no box.
    """
    if not is_sharded(tensor):
        return (0,) * tensor.ndim, tuple(tensor.shape)
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape, start = compute_local_shape_and_global_offset(tensor.shape, mesh, placements)
    if any(one.is_partial() for one in placements) or tuple(shape) != tuple(local(tensor).shape):
        raise ArgumentError(
            f"what this rank holds of {name!r}, placed as {tuple(placements)}, is not a box of it: measure with "
            "weights that are sharded or replicated along whole dimensions"
        )
    return tuple(start), tuple(shape)


def counted_here(boxes: Sequence[Box], ranks: Ranks) -> list[bool]:
    """For each parameter whether this rank counts its box: the first rank that holds it does."""
    everyone = ranks.gather(list(boxes), "comparison of shards")
    return [all(before[i] != own for before in everyone[: ranks.rank]) for i, own in enumerate(boxes)]


def holders(parameters: Sequence[Tensor], data: Ranks) -> Ranks:
    """The ranks that hold the weights together: those of the largest mesh, and of the data."""
    sets = [{*p.device_mesh.mesh.flatten().tolist()} for p in parameters if is_sharded(p)]  # type: ignore[attr-defined]
    own = set() if data.group is None else {*dist.get_process_group_ranks(data.group)}
    everyone = set(itertools.chain(own, *sets))
    if everyone == own:
        return data
    if len(everyone) == dist.get_world_size() or everyone not in sets:
        return ranks_of("world")
    members = tuple(sorted(everyone))
    known = dist.group.WORLD, members  # a later world has groups of its own
    if known not in _GROUPS:
        _GROUPS[known] = dist.new_group(list(members), use_local_synchronization=True)
    return ranks_of(_GROUPS[known])


_GROUPS: dict[tuple[dist.ProcessGroup | None, tuple[int, ...]], dist.ProcessGroup] = {}
atexit.register(_GROUPS.clear)  # as curvdiag.distributed.ranks forgets its own
