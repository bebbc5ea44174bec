"""Which halves of a quadratic form are equal: where an operation is linear in each of two tensors.

Of ``op(a, W)`` that is linear in both, a motion of ``a`` and ``W`` leaves ``s . op(da, W)`` at the one and
``s . op(a, dW)`` at the other; both meet the motion in the same number, ``s . op(da, dW)``. One of them counted twice
spares the other: as a rule that of the activation, whose motion then need not be kept until the end.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

Place = tuple[Any, int]
"""A tensor by the node that made it, and its place among what that gives."""


def _always(node: Any) -> bool:
    return True


def _in_eval_mode(node: Any) -> bool:
    return not node._saved_training


PAIRS: Mapping[str, tuple[int, int, Callable[[Any], bool]]] = {
    "AddmmBackward0": (1, 2, _always),
    "MmBackward0": (0, 1, _always),
    "BmmBackward0": (0, 1, _always),
    "MulBackward0": (0, 1, _always),
    "ConvolutionBackward0": (0, 1, _always),
    "NativeBatchNormBackward0": (0, 1, _in_eval_mode),
    "CudnnBatchNormBackward0": (0, 1, _in_eval_mode),
}
"""Inputs in each of which an operation is linear, by the name of its node: one to be spared, one to count twice."""

LINEAR = {
    *("AddBackward0", "SubBackward0", "NegBackward0", "SumBackward0", "SumBackward1", "MeanBackward0", "MeanBackward1"),
    *("ViewBackward0", "UnsafeViewBackward0", "ReshapeAliasBackward0", "AliasBackward0", "CloneBackward0"),
    *("TBackward0", "TransposeBackward0", "PermuteBackward0", "ExpandBackward0", "SqueezeBackward1", "ToCopyBackward0"),
    *("UnsqueezeBackward0", "SelectBackward0", "SliceBackward0", "SplitBackward0", "CatBackward0", "StackBackward0"),
    *("IndexBackward0", "EmbeddingBackward0", "AvgPool2DBackward0", "AdaptiveAvgPool2DBackward0", "NllLossBackward0"),
}
"""Operations that leave nothing at what they take, being linear in all of it; what is not here may leave something."""


class Twins(NamedTuple):
    """Places that are spared, and those that are counted twice instead."""

    spared: frozenset[Place]
    twice: frozenset[Place]


def twins(nodes: Sequence[Any], flat: Sequence[Any]) -> Twins:
    """What can be spared in the graph of a loss.

    A place is spared where nothing else leaves anything there, and counts twice where all that is left there does.

    Args:
        flat: Nodes that leave nothing at what they take, whatever their names.
    """
    users: dict[Place, list[tuple[Any, int]]] = {}
    for node in nodes:
        for slot, place in enumerate(node.next_functions):
            users.setdefault(place, []).append((node, slot))
    products = [node for node in nodes if node.name() in PAIRS and PAIRS[node.name()][2](node)]
    pairs = {node: PAIRS[node.name()][:2] for node in products}
    # Of a factor without a history nothing moves, and the operation is linear in the other one.
    constant = {node for node, pair in pairs.items() if any(node.next_functions[slot][0] is None for slot in pair)}
    silent = {node for node in nodes if node.name() in LINEAR} | constant | set(flat)
    for node in constant:
        del pairs[node]

    def fits(node: Any) -> bool:
        places = [node.next_functions[slot] for slot in pairs[node]]
        return all(maker in silent or not _keeps_result(maker.__class__) for maker, _ in places) and all(
            user in silent or (user in pairs and pairs[user][which] == slot)
            for which, place in enumerate(places)
            for user, slot in users[place]
        )

    while unfit := [node for node in pairs if not fits(node)]:
        for node in unfit:
            del pairs[node]
    spared, twice = (frozenset(node.next_functions[pair[i]] for node, pair in pairs.items()) for i in (0, 1))
    return Twins(spared, twice)


@functools.cache
def _keeps_result(kind: type) -> bool:
    """Whether operations of this kind keep what they gave, and so leave something there."""
    return any(name.startswith(("_saved_result", "_saved_out")) for name in dir(kind))
