"""The model's outputs inside a loss: caught on their way, and shown to be the only way to the parameters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import GradientEdge, get_gradient_edge

from curvdiag.data import map_tensors
from curvdiag.errors import LossError
from curvdiag.weights import Weights

Pick = Callable[[Any], Tensor]
"""Picks the tensor of outputs (the logits) out of what a model returns."""


@dataclass
class Outputs:
    """What one forward pass of the model gave to the loss.

    Attributes:
        calls: How often the model was called.
        value: The outputs ``[B, ...]``, detached.
        edge: Where they are in the graph; None if they depend on none of the chosen parameters.
        alone: They are all that the model returns.
        unclear: Why no outputs were found, where that was allowed.
    """

    calls: int = 0
    value: Tensor | None = None
    edge: GradientEdge | None = None
    alone: bool = False
    unclear: LossError | None = None

    def single(self) -> Tensor:
        """The outputs of the one call that there must be.

        Raises:
            LossError: The model was called more than once, or not by its own name.
        """
        if self.unclear is not None:
            raise self.unclear
        if self.calls != 1 or self.value is None:
            times = "not called" if self.calls == 0 else f"called {self.calls} times"
            raise LossError(
                f"the loss splits at the model's outputs, and the model was {times} in it: call the model once, as "
                "model(...), with all inputs of the batch, and compute the loss from what it returns; or use Hessian"
            )
        return self.value


@contextmanager
def caught_outputs(
    model: nn.Module, pick: Pick | None, shift: Tensor | None = None, *, must: bool = True
) -> Iterator[Outputs]:
    """Catch what ``model`` returns while the block runs, and with ``shift`` hand it on with this added.

    Without ``must`` a model whose outputs are not found runs on, and :meth:`Outputs.single` says why.
    """
    found = Outputs()

    def hook(module: nn.Module, inputs: Any, returned: Any) -> Any:
        found.calls += 1
        try:
            outputs = _picked(pick, returned)
        except LossError as error:
            if must:
                raise
            found.unclear = error.with_traceback(None)
            return None
        handed = outputs if shift is None else outputs + shift
        if outputs is returned and handed.requires_grad and handed.is_leaf:
            handed = handed.view_as(handed)  # a parameter returned as it is; a product needs a node of its own
        found.value, found.alone = handed.detach(), outputs is returned
        found.edge = get_gradient_edge(handed) if handed.requires_grad else None
        return None if handed is outputs else _replaced(returned, outputs, handed)

    handle = model.register_forward_hook(hook)
    try:
        yield found
    finally:
        handle.remove()


def check_only_way(loss: GradientEdge | None, edge: GradientEdge | None, weights: Weights) -> list[str]:
    """Refuse a loss that reaches the chosen parameters other than through the outputs; both by where they are.

    Returns:
        Names of custom functions between the outputs and the loss.

    Raises:
        LossError: It does.
    """
    names = {id(tensor): name for name, tensor in zip(weights.names, weights.chosen, strict=True)}
    custom: list[str] = []
    seen: set[Any] = set()
    stack: list[tuple[Any, int]] = [] if loss is None else [(loss.node, loss.output_nr)]
    while stack:
        node, number = stack.pop()
        if node is None or node in seen:
            continue
        if edge is not None and node == edge.node and number == edge.output_nr:
            continue
        name = names.get(id(getattr(node, "variable", None)))
        if name is not None:
            raise LossError(
                f"the loss depends on {name!r} in other ways than through the model's outputs (a penalty on weights "
                "or hidden layers, another tensor that the model returns, a loss computed inside the model): the "
                "Gauss-Newton matrix is that of a loss of the outputs alone; compute the loss from the outputs, name "
                "them with outputs=, or use Hessian"
            )
        if edge is None or node != edge.node:  # another output of the same function is followed each time it is met
            seen.add(node)
        if isinstance(node, BackwardCFunction) and not node._forward_cls.__module__.startswith("torch."):  # type: ignore[attr-defined]
            custom.append(node._forward_cls.__name__)  # type: ignore[attr-defined]
        stack.extend(node.next_functions)
    return custom


def _picked(pick: Pick | None, returned: Any) -> Tensor:
    if pick is not None:
        picked: Any = pick(returned)
        if not isinstance(picked, Tensor) or not picked.dtype.is_floating_point:
            raise LossError(f"outputs= must give a floating-point tensor, and gave {_described(picked)}")
        return picked
    outputs: Any = returned
    if isinstance(returned, Mapping):
        outputs = returned.get("logits")
    elif not isinstance(returned, Tensor):
        outputs = getattr(returned, "logits", None)
    if not isinstance(outputs, Tensor) or not outputs.dtype.is_floating_point:
        raise LossError(
            f"the model returns {_described(returned)}, neither one floating-point tensor nor something with "
            "`logits`: give outputs=, a function that picks the tensor that the loss is computed from, such as "
            "outputs=lambda returned: returned[0]"
        )
    return outputs


def _described(value: Any) -> str:
    return f"a tensor of {value.dtype}" if isinstance(value, Tensor) else f"a {type(value).__name__}"


def _replaced(returned: Any, old: Tensor, new: Tensor) -> Any:
    """What the model returns, with one tensor in another's place."""
    if isinstance(returned, Mapping) and hasattr(returned, "__setitem__"):
        twin = copy.copy(returned)
        for key, value in returned.items():
            if value is old:
                twin[key] = new
        return twin
    if isinstance(returned, Tensor | tuple | list | Mapping):
        return map_tensors(lambda tensor: new if tensor is old else tensor, returned)
    twin = copy.copy(returned)
    for key, value in vars(returned).items():
        if value is old:
            setattr(twin, key, new)
    return twin
