"""Several processes that measure together, on PyTorch's own process groups."""

from curvdiag.distributed.calls import collectively
from curvdiag.distributed.ranks import ALONE, Group, Ranks, ranks_of
from curvdiag.distributed.sharding import shard

__all__ = ["ALONE", "Group", "Ranks", "collectively", "ranks_of", "shard"]
