"""A trace cut where the vector enters: what is run once and kept, and what is run for each product.

All that follows from the vector is linear in it. A product of a block therefore needs only what its own vectors reach
on the way to its own rows; a zero that enters there from elsewhere is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx import Graph, GraphModule, Node

from curvdiag.errors import CurvdiagError
from curvdiag.operators.tracing import first_line
from curvdiag.sandbox import random_states

aten = torch.ops.aten
_NOT_LINEAR = {aten.ones_like, aten.full_like, aten.new_ones, aten.new_full, aten.empty_like, aten.new_empty}
"""Operations whose result is not zero where their argument is; they use its shape alone."""


class UncompilableError(CurvdiagError):
    """There is no compiled code; the message says why."""


@dataclass(frozen=True)
class LinearPart:
    """The operations that follow from some inputs, up to some outputs.

    Attributes:
        run: Takes the inputs, then the values of ``kept``; returns the outputs that are not zero.
        inputs: Which of the inputs it takes, by number.
        kept: Nodes before it, whose values it needs.
        outputs: Which of the outputs it returns, by number.
    """

    run: GraphModule
    inputs: list[int]
    kept: list[Node]
    outputs: list[int]


def linear_part(entries: Sequence[Node], inputs: Iterable[int], outputs: Sequence[Node | None]) -> LinearPart:
    """What leads from some of the ``entries`` to ``outputs``, while all other entries are zero."""
    inputs = list(inputs)
    everything = _following(entries)
    shapes = [node for node in everything if getattr(node.target, "overloadpacket", None) in _NOT_LINEAR]
    moving = _following([*(entries[i] for i in inputs), *shapes])
    there = [k for k, node in enumerate(outputs) if node is not None and (node in moving or node not in everything)]
    ends = [node for node in (outputs[k] for k in there) if node is not None]
    steps = [node for node in _leading_to(ends, moving) if node.op != "placeholder"]
    graph = Graph()
    new: dict[Node, Node] = {entries[i]: graph.placeholder(f"v{i}") for i in inputs}
    used = [a for node in steps for a in node.all_input_nodes] + ends
    kept = list(dict.fromkeys(a for a in used if a not in everything))
    new.update({node: graph.placeholder(f"k{k}") for k, node in enumerate(kept)})

    def place(node: Node) -> Node:
        if node not in new:  # it follows from entries that are zero
            new[node] = _zeros(graph, node)
        return new[node]

    for node in steps:
        same = _sum_with_zero(node, lambda a: a in everything and a not in moving)
        new[node] = place(same) if same is not None else graph.node_copy(node, place)
    graph.output(tuple(place(node) for node in ends))
    return LinearPart(GraphModule(torch.nn.Module(), graph), inputs, kept, there)


def compiled(part: LinearPart, example: Sequence[Tensor]) -> Callable[..., Sequence[Tensor]]:
    """``part.run`` as machine code, for inputs of the shapes of ``example``.

    The compiler is called directly: nothing of it stands in the tables of ``torch.compile``, whose limits, resets and
    stances belong to the training.

    Raises:
        UncompilableError: There is no compiler, or it fails.
    """
    if not part.outputs:
        return part.run
    graph = Graph()
    graph.output(graph.graph_copy(part.run.graph, {}))
    for node in graph.nodes:
        node.meta.clear()
    try:
        import torch._inductor

        with random_states(), torch.no_grad():
            code: Callable[..., Sequence[Tensor]] = torch._inductor.compile(
                GraphModule(torch.nn.Module(), graph), list(example)
            )
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a compiler says
        raise UncompilableError(f"{type(error).__name__}: {first_line(error)}") from error
    return code


def first_part(arguments: Sequence[Node], outputs: Sequence[Node]) -> GraphModule:
    """The operations that lead from the arguments of a trace to some of its nodes."""
    graph = Graph()
    new = {node: graph.placeholder(f"a{k}") for k, node in enumerate(arguments)}
    for node in _leading_to(outputs, None):
        if node not in new:
            new[node] = graph.node_copy(node, new.__getitem__)
    graph.output(tuple(new[node] for node in outputs))
    return GraphModule(torch.nn.Module(), graph)


def bytes_of(nodes: Iterable[Node], known: Iterable[Node]) -> int:
    """Memory that the values of ``nodes`` hold, without that of ``known``; views share it."""
    there = {_storage(node)[0] for node in known}
    return sum(dict(_storage(node) for node in nodes if _storage(node)[0] not in there).values())


def _storage(node: Node) -> tuple[Any, int]:
    storage = node.meta["val"].untyped_storage()
    return storage._cdata, storage.nbytes()


def _following(roots: Sequence[Node]) -> set[Node]:
    found = set(roots)
    stack = list(roots)
    while stack:
        for user in stack.pop().users:
            if user not in found and user.op != "output":
                found.add(user)
                stack.append(user)
    return found


def _leading_to(ends: Sequence[Node], inside: set[Node] | None) -> list[Node]:
    """All nodes that ``ends`` need, in order of execution; with ``inside`` only those of it."""
    needed: set[Node] = set()
    stack = [node for node in ends if inside is None or node in inside]
    while stack:
        node = stack.pop()
        if node not in needed:
            needed.add(node)
            stack += [a for a in node.all_input_nodes if inside is None or a in inside]
    return [node for node in ends[0].graph.nodes if node in needed] if ends else []


def _sum_with_zero(node: Node, zero: Callable[[Node], bool]) -> Node | None:
    """What a sum is equal to because the other summand is zero; None if it is no such thing."""
    if node.target is not aten.add.Tensor or node.kwargs:
        return None
    one, other = node.args[:2]
    if not isinstance(one, Node) or not isinstance(other, Node):
        return None
    same = one if zero(other) else other if zero(one) else None
    return same if same is not None and _layout(same) == _layout(node) else None


def _layout(node: Node) -> tuple[Any, ...]:
    value = node.meta["val"]
    return value.shape, value.stride(), value.dtype


def _zeros(graph: Graph, node: Node) -> Node:
    """Zeros in the place of a node, laid out in memory like its values, since views of them follow."""
    like: Tensor = node.meta["val"]
    options: dict[str, Any] = {"dtype": like.dtype, "device": like.device}
    if like.is_contiguous():
        return graph.call_function(aten.zeros.default, (list(like.shape),), options)
    size = 1 + sum((n - 1) * step for n, step in zip(like.shape, like.stride(), strict=True)) if like.numel() else 0
    flat = graph.call_function(aten.zeros.default, ([size],), options)
    return graph.call_function(aten.as_strided.default, (flat, list(like.shape), list(like.stride())))
