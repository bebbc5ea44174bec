"""Several processes that measure together, on PyTorch's own process groups."""

from curvdiag.distributed.ranks import ALONE, Group, Ranks, ranks_of

__all__ = ["ALONE", "Group", "Ranks", "ranks_of"]
