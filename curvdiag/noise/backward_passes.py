"""Listening to the backward passes of a model whose gradients are averaged over ranks."""

from __future__ import annotations

import abc
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from curvdiag.noise.squares import Squares
from curvdiag.sandbox import measuring
from curvdiag.spectrum.vectors import wide_dtype

# The engine's own callbacks end the reduction, and may queue one another; ours goes to the end of the queue this often.
LATER = 2


@dataclass(frozen=True)
class BackwardPass:
    """What one backward pass of the training has left.

    Attributes:
        own: Squared norm of this rank's own gradient of this pass alone; on the device.
        reduced: This rank's share of the squared norm of ``.grad`` after the reduction: those of all ranks add up to
            it. None where this pass reduced nothing.
        lengths: First dimension of the first tensor that went into each forward pass since the last backward pass.
        fresh: No gradient was left from an earlier pass: a new step begins.
    """

    own: Tensor
    reduced: Tensor | None
    lengths: tuple[int, ...]
    fresh: bool


class BackwardPasses(abc.ABC):
    """Calls ``heard`` at the end of each backward pass, before ``backward()`` returns. Changes no number.

    A pass begins at a hook on the outputs of the model's forward pass, and ends at a callback of the autograd engine
    behind those in which DDP and FSDP end their reduction. In between, hooks in front of the nodes that accumulate into
    ``.grad`` see the gradient of this pass alone. These nodes do not run under ``torch.autograd.grad``, which nobody
    reduces.

    Attributes:
        parameters: Those whose gradients are counted, of those that are averaged.
        device: Where sums over ranks are exchanged.
        groups: Process groups over which a sum, one after the other, is one over all ranks.
        ranks: Number of ranks whose gradients are averaged.
        alone: Whether what a rank sends would meet nothing on the others, because some of them have no more data.
    """

    parameters: list[nn.Parameter]
    device: torch.device
    groups: list[dist.ProcessGroup]
    ranks: int

    def __init__(self, model: nn.Module, heard: Callable[[BackwardPass], None]) -> None:
        self._heard = heard
        self._removers: list[Callable[[], None]] = []
        self._nodes: dict[int, tuple[Tensor, Any]] = {}  # kept, or their hooks would go with them
        self._lengths: list[int] = []
        self._squares = Squares()
        self._started = self._fresh = self._accumulated = False
        self.keep(model.register_forward_pre_hook(Hook(self._before), with_kwargs=True))
        self.keep(model.register_forward_hook(Hook(self._after)))

    @abc.abstractmethod
    def _forward(self) -> None:
        """A forward pass of the training begins."""

    @abc.abstractmethod
    def _has_reduced(self) -> bool:
        """Whether the pass that ends has reduced; alike on all ranks. Asked once."""

    @abc.abstractmethod
    def _reduced(self) -> Tensor | None:
        """``reduced`` of the pass that ends; None for nothing."""

    @property
    def alone(self) -> bool:
        return False

    def keep(self, handle: Any) -> None:
        """Have a hook removed by :meth:`close`."""
        self._removers.append(handle.remove)

    def listen(self, parameter: Tensor, counted: bool) -> None:
        """See the gradients that go into ``parameter.grad``; nothing happens where that is so already.

        Args:
            counted: False where it matters only that there was one: every rank that reduces has to know that it does.
        """
        if id(parameter) in self._nodes or not parameter.requires_grad:
            return
        with torch.enable_grad(), torch.inference_mode(False):
            node = get_gradient_edge(parameter).node
        self._nodes[id(parameter)] = parameter, node
        self.keep(node.register_prehook(Hook(self._counting if counted else self._accumulating)))

    def close(self) -> None:
        """Remove all hooks."""
        for remove in self._removers:
            remove()
        self._removers.clear()
        self._nodes.clear()
        self._started = False

    def _before(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if measuring() or not torch.is_grad_enabled():
            return
        self._started = False  # an exception may have cut the last pass short
        self._forward()
        first = next(tensors((args, kwargs)), None)
        self._lengths.append(0 if first is None or first.ndim == 0 else len(first))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        if measuring() or not torch.is_grad_enabled():
            return
        for tensor in tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(self._begin)

    def _begin(self, _: Any = None) -> None:
        if self._started:
            return
        self._started = True
        self._squares, self._accumulated = Squares(), False
        self._fresh = self._is_fresh()
        self._later(LATER)

    def _is_fresh(self) -> bool:
        return all(parameter.grad is None for parameter in self.parameters)

    def _accumulating(self, *_: Any) -> bool:
        """Whether a gradient of the training goes into ``.grad``."""
        if measuring() or not (self._started or self._lengths):
            return False
        self._begin()  # where no tensor was found among the outputs
        self._accumulated = True
        return True

    def _counting(self, grads: tuple[Tensor | None, ...]) -> None:
        if self._accumulating() and grads[0] is not None:
            with torch.no_grad():
                self._squares.add(grads[0])

    def _later(self, times: int) -> None:
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._later(times - 1) if times else self._end())

    def _end(self) -> None:
        started, self._started = self._started, False
        if not (started and self._accumulated):  # torch.autograd.grad, which changes no gradient
            return
        lengths = tuple(self._lengths)
        self._lengths.clear()
        with torch.no_grad():
            own = self._there(self._squares.total())
            self._squares = Squares()
            reduced = self._there(self._reduced()) if self._has_reduced() else None
            self._heard(BackwardPass(own, reduced, lengths, self._fresh))

    def _there(self, total: Tensor | None) -> Tensor:
        if total is None:
            return torch.zeros((), dtype=wide_dtype(self.device), device=self.device)
        return total.to(self.device, wide_dtype(self.device))


class Hook:
    """A bound method as a hook of a module that may be copied: the copy hears nothing."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method: Callable[..., Any] = method
        if "torch._dynamo" in sys.modules:  # compiled code must not compile it into itself
            self._method = torch.compiler.disable(method)

    def __call__(self, *args: Any) -> None:
        self._method(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return _deaf, ()


def _deaf() -> Callable[..., None]:
    return _nothing


def _nothing(*_: Any) -> None:
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    """The tensors in tuples, lists, mappings and dataclasses, in their order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, tuple | list):
        for item in value:
            yield from tensors(item)
    elif is_dataclass(value) and not isinstance(value, type):
        for field in fields(value):
            yield from tensors(getattr(value, field.name, None))
