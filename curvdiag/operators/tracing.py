"""The Hessian product of one group of samples, written down as a list of plain tensor operations.

The gradient and its derivatives are run once on tensors without values, and each operation is noted. Since no value
is there while tracing, none can be baked in: weights, buffers, batches and all other tensors that the model reads are
arguments of the list, and what depends on values (``if x.sum() > 0``) cannot be traced.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node

from curvdiag.data import Batch, map_tensors, place, sample_count, tensors_of
from curvdiag.errors import CurvdiagError
from curvdiag.objective import Objective
from curvdiag.sandbox import sandbox, with_tensors
from curvdiag.weights import Weights


class UntraceableError(CurvdiagError):
    """The product cannot be written down as a list of operations; the message says why."""


@dataclass(frozen=True)
class Group:
    """A group of samples at some weights.

    Attributes:
        batch: On the model's device, in the precision of the operator.
        count: What a mean over the group counts.
        tensors: The arguments of a trace: weights, buffers and the tensors of the batch.
        key: Groups of one model with equal keys have the same trace.
    """

    objective: Objective
    weights: Weights
    batch: Batch
    dtype: torch.dtype | None
    count: float
    tensors: tuple[Tensor, ...]
    key: tuple[Any, ...]

    @classmethod
    def of(cls, objective: Objective, weights: Weights, batch: Batch, dtype: torch.dtype | None) -> Group:
        batch, loss = place(batch, objective.device, dtype), objective.loss(dtype)
        count = 1.0 if loss.per_sample else float(loss.counts(batch))
        own = (*weights.chosen, *weights.fixed.values(), *weights.buffers.values(), *tensors_of(batch))
        tensors = tuple(t.detach() for t in own)
        shapes = tuple((t.shape, t.stride(), t.dtype, t.device) for t in tensors)
        nest = repr(map_tensors(lambda _: torch.empty(0), batch))
        names = (weights.names, *weights.fixed, *weights.buffers)
        about = (objective.mode, dtype, objective.total_weight, count, names)
        return cls(objective, weights, batch, dtype, count, tensors, (loss, *about, nest, shapes))

    def replaced(self, tensors: Sequence[Tensor]) -> tuple[Weights, Batch]:
        """Weights and batch with other tensors in their places."""
        given, own = iter(tensors), self.weights
        chosen = tuple(next(given).detach().requires_grad_() for _ in own.chosen)
        fixed = {name: next(given) for name in own.fixed}
        buffers = {name: next(given) for name in own.buffers}
        return Weights(chosen, fixed, buffers, own.names), map_tensors(lambda _: next(given), self.batch)

    def totals(self, model: nn.Module, batch: Batch) -> Tensor:
        """As :meth:`Objective.totals`, for tensors without values."""
        loss = self.objective.loss(self.dtype)
        return loss.totals(model, batch) if loss.per_sample else loss.value(model, batch) * self.count


@dataclass(frozen=True)
class Trace:
    """The operations, and which of them are what.

    Attributes:
        arguments: The tensors of the group, then ``constants``.
        constants: Other tensors that the model reads (plain attributes, class weights): themselves, so that values
            that change are followed.
        vectors: The vector, by parameter.
        coefficients: One number for each sample.
        gradients: By parameter; None where the loss does not reach it.
        products: The Hessian's rows; None where they are zero.
        dots: Derivative ``[B]`` of each sample's share along the vector.
        gathered: ``sum_i c_i grad t_i`` by parameter.
    """

    arguments: list[Node]
    constants: list[Tensor]
    vectors: list[Node]
    coefficients: Node
    loss: Node
    gradients: list[Node | None]
    products: list[Node | None]
    dots: Node | None
    gathered: list[Node | None]


def trace(group: Group) -> Trace:
    """Write down gradient and products of one group of samples.

    Raises:
        UntraceableError: Something depends on values, draws random numbers, or is unknown to the tracer.
    """
    from torch.fx.experimental.proxy_tensor import make_fx

    options: dict[str, Any] = {"tracing_mode": "fake", "_allow_non_fake_inputs": True}
    objective, wanted = group.objective, group.dtype or group.objective.dtype
    samples = (sample_count(group.batch),) if objective.loss(group.dtype).per_sample else ()
    vectors = [torch.empty_like(w) for w in group.weights.chosen]
    inputs = [*group.tensors, *vectors, torch.empty(samples, dtype=wanted, device=objective.device)]
    derivatives = _Derivatives(group)
    try:
        with _tracing(objective):
            module = make_fx(derivatives, **options)(*inputs)
            constants = _lift_constants(module)
            plain: Any = torch.func.functionalize(module, remove="mutations")
            module = make_fx(plain, **options)(*inputs, *constants)
        _check(module.graph)
    except (UntraceableError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model does
        name = type(error).__name__
        where = "a branch or a number depends on values" if "DataDependent" in name else name
        raise UntraceableError(f"{where}: {first_line(error)}") from error
    nodes = [node for node in module.graph.nodes if node.op == "placeholder"]
    cuts = len(group.tensors), len(inputs) - 1
    return Trace(
        arguments=[*nodes[: cuts[0]], *nodes[cuts[1] + 1 :]],
        constants=constants,
        vectors=nodes[cuts[0] : cuts[1]],
        coefficients=nodes[cuts[1]],
        **derivatives.named(_outputs(module.graph)),
    )


def hooked(model: nn.Module) -> str | None:
    """A module with a hook of the user's, which may keep what it sees; those of PyTorch do not."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(nn.modules.module, f"_global{kind}") for kind in kinds):
        return "all modules"
    for name, module in model.named_modules():
        hooks = [hook for kind in kinds for hook in getattr(module, kind).values()]
        if any(str(getattr(hook, "__module__", "")).split(".")[0] != "torch" for hook in hooks):
            return repr(name) if name else "the model"
    return None


class _Derivatives:
    """All derivatives of a group as a function of tensors; it gives those that there are, and knows which."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.there: dict[str, list[bool]] = {}

    def __call__(self, *inputs: Tensor) -> list[Tensor]:
        group, objective = self.group, self.group.objective
        weights, batch = group.replaced(inputs)
        vectors, coefficients = inputs[len(group.tensors) : -1], inputs[-1]

        def differentiate() -> dict[str, Sequence[Tensor | None]]:
            totals = group.totals(objective.model, batch)
            share = torch.ones_like(totals, requires_grad=True)
            loss = (totals * share).sum() / objective.total_weight
            grads = torch.autograd.grad(loss, weights.chosen, create_graph=True, allow_unused=True)
            along = [(g, v) for g, v in zip(grads, vectors, strict=True) if g is not None and g.requires_grad]
            leaves = [*weights.chosen, share]
            products: Sequence[Tensor | None] = [None] * len(leaves)
            if along:
                edges, outer = zip(*along, strict=True)
                products = torch.autograd.grad(edges, leaves, outer, retain_graph=True, allow_unused=True)
            gathered = torch.autograd.grad(totals, weights.chosen, coefficients.to(totals.dtype), allow_unused=True)
            found = {"loss": [loss], "gradients": grads, "products": products[:-1], "dots": products[-1:]}
            return {**found, "gathered": gathered}

        with torch.enable_grad():
            found = with_tensors(objective.model, weights.tensors(), differentiate)
        self.there = {name: [t is not None for t in tensors] for name, tensors in found.items()}
        return [t.detach() for tensors in found.values() for t in tensors if t is not None]

    def named(self, outputs: Sequence[Node]) -> dict[str, Any]:
        """The nodes of the outputs, as they are called in :class:`Trace`."""
        given = iter(outputs)
        named = {name: [next(given) if there else None for there in kind] for name, kind in self.there.items()}
        return {**named, "loss": named["loss"][0], "dots": named["dots"][0]}


def _tracing(objective: Objective) -> ExitStack:
    stack = ExitStack()
    stack.enter_context(sandbox(objective.model, objective.mode, objective.device, twice=True))
    if objective.device.type == "cpu" and any(isinstance(m, nn.RNNBase) for m in objective.model.modules()):
        stack.callback(torch._C._set_mkldnn_enabled, torch._C._get_mkldnn_enabled())
        torch._C._set_mkldnn_enabled(False)  # its recurrent nets cannot be traced
    return stack


def _lift_constants(module: GraphModule) -> list[Tensor]:
    """Make tensors that the operations hold further arguments; returns them."""
    constants: dict[str, Tensor] = {}
    nodes: dict[str, Node] = {}
    held = [node for node in module.graph.nodes if node.op == "get_attr"]
    last = [node for node in module.graph.nodes if node.op == "placeholder"][-1]
    for node in held:
        name = str(node.target)
        if name not in constants:
            tensor = getattr(module, name)
            if not isinstance(tensor, Tensor):
                raise UntraceableError(f"it holds a {type(tensor).__name__}")
            constants[name] = tensor.detach()
            with module.graph.inserting_after(last):
                last = nodes[name] = module.graph.placeholder(f"constant_{len(nodes)}")
        node.replace_all_uses_with(nodes[name])
        module.graph.erase_node(node)
    module.graph.set_codegen(torch.fx.graph.CodeGen())
    module.recompile()
    return list(constants.values())


def _check(graph: Graph) -> None:
    for node in graph.nodes:
        if node.op not in ("placeholder", "call_function", "output"):
            raise UntraceableError(f"it needs a {node.op} ({node.target})")
        if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            raise UntraceableError(f"{node.target} draws random numbers")
        values = torch.utils._pytree.tree_leaves(node.meta.get("val"))
        sizes = [size for value in values for size in (value.shape if isinstance(value, Tensor) else [value])]
        if any(isinstance(size, torch.SymInt | torch.SymFloat | torch.SymBool) for size in sizes):
            raise UntraceableError(f"the shape of {node.target} depends on values")


def _outputs(graph: Graph) -> list[Node]:
    (last,) = (node for node in graph.nodes if node.op == "output")
    return list(last.args[0])


def first_line(error: Exception) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), "").strip()[:300]
