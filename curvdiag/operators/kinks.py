"""Gradients through activations that are straight between kinks, without the zeros that PyTorch adds there.

The gradient in the input of a ReLU is the gradient in its output where a mask says so. The mask has no derivative: the
second backward pass of PyTorch makes a tensor of zeros for it, as large as the activation, and adds that to what
arrives from elsewhere. On a ReLU network this is 3 % of a product. Here the mask is taken from a value without a
history, so that there is nothing to walk; all other bits stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from curvdiag.operators.second_derivative import walk

_aten = torch.ops.aten


def _relu(node: Any, slope: Tensor) -> Tensor:
    return _aten.threshold_backward(slope, node._saved_result.detach(), 0)


def _leaky_relu(node: Any, slope: Tensor) -> Tensor:
    return _aten.leaky_relu_backward(slope, node._saved_self.detach(), node._saved_negative_slope, False)


def _hardtanh(node: Any, slope: Tensor) -> Tensor:
    return _aten.hardtanh_backward(slope, node._saved_self.detach(), node._saved_min_val, node._saved_max_val)


def _max_pool2d(node: Any, slope: Tensor) -> Tensor:
    window = node._saved_kernel_size, node._saved_stride, node._saved_padding, node._saved_dilation
    before = node._saved_self.detach()
    return _aten.max_pool2d_with_indices_backward(slope, before, *window, node._saved_ceil_mode, node._saved_result1)


GRADIENTS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "ReluBackward0": _relu,
    "LeakyReluBackward0": _leaky_relu,
    "HardtanhBackward0": _hardtanh,  # ReLU6 as well
    "MaxPool2DWithIndicesBackward0": _max_pool2d,
}
"""The gradient in the input of such an operation, by the name of its node."""


def masked(output: Any) -> list[Any]:
    """The nodes of a model whose gradient has a mask, from the node of its output on.

    Those of the loss stay as they are: whether it has a second derivative at all is asked of its graph.
    """
    return [node for node in walk(output, set()) if node.name() in GRADIENTS]


@contextmanager
def without_zeros(masked: Sequence[Any]) -> Iterator[None]:
    """While it is open, a backward pass that makes a graph makes one without derivatives of the masks of these nodes.

    What they have saved must be at hand: not be made again when it is asked for, as in a checkpoint. Where a hook of
    the user's has changed a gradient it stays as it is.
    """

    def replaced(node: Any, made: Tensor | None, slope: Tensor | None) -> tuple[Tensor] | None:
        if made is None or slope is None or made.grad_fn is None or type(made) is not Tensor:
            return None
        without = GRADIENTS[node.name()](node, slope)
        same = without.grad_fn is not None and without.grad_fn.name() == made.grad_fn.name()
        return (without,) if same else None

    handles = []
    try:
        for node in masked:
            handles.append(node.register_hook(lambda made, slopes, node=node: replaced(node, made[0], slopes[0])))
        yield
    finally:
        for handle in handles:
            handle.remove()
