"""Vectors of an operator: where their numbers lie, their inner products, and random ones."""

from curvdiag.space.pieces import Piece
from curvdiag.space.spaces import ShardedSpace, Space, WholeSpace

__all__ = ["Piece", "ShardedSpace", "Space", "WholeSpace"]
