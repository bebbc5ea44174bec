"""The one place that touches a live model, and puts everything back."""

from __future__ import annotations

import copy
import random
import sys
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

Mode = str
"""``"eval"`` or ``"train"``: how layers such as BatchNorm and dropout behave during a measurement."""


class _Depth:
    """How many contexts of measurements are open, in whatever thread autograd runs their hooks."""

    def __init__(self) -> None:
        self.open = 0

    def __enter__(self) -> None:
        self.open += 1

    def __exit__(self, *_: object) -> None:
        self.open -= 1


_DEPTH = _Depth()


def measuring() -> bool:
    """Whether a measurement runs: what it does to the model is no part of the training."""
    return _DEPTH.open > 0


def numerics(device: torch.device) -> AbstractContextManager[None]:
    """Autocast and inference mode off, gradients on: what every product needs, forward pass or not."""
    kinds = [kind for kind in {"cpu", device.type} if torch.amp.is_autocast_available(kind)]
    plain = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    if plain and not any(map(torch.is_autocast_enabled, kinds)):
        return _DEPTH  # all that is left to note; setting the rest would take as long as a small product
    return _plain(kinds)


@contextmanager
def _plain(kinds: Sequence[str]) -> Iterator[None]:
    with ExitStack() as stack:
        stack.enter_context(_DEPTH)
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in kinds:
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextmanager
def sandbox(model: nn.Module, mode: Mode, device: torch.device, *, twice: bool) -> Iterator[None]:
    """Everything a forward pass of a measurement needs, restored on leaving.

    Training flags and plain attributes of each submodule, sparse gradients of embeddings, random states, autocast,
    gradient and inference mode, compiled calls, attention backends and cuDNN. Parameters and buffers are not
    restored because they are not touched: :func:`with_tensors` runs the model on copies.

    Args:
        twice: The forward pass will be differentiated twice: fused attention and cuDNN's recurrent nets,
            which have no second derivative, are replaced by their plain forms.
    """
    with ExitStack() as stack:
        stack.enter_context(numerics(device))
        stack.enter_context(random_states())
        stack.enter_context(_eager())
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            if any(name.endswith(("_g", ".original0")) for name, _ in model.named_parameters()):
                stack.enter_context(_PlainWeightNorm())
            if device.type == "cuda" and any(isinstance(m, nn.RNNBase) for m in model.modules()):
                stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        stack.enter_context(_attributes(model))
        for module in model.modules():
            if (plain := vars(module).get("_original_forward")) is not None:  # accelerate's has an autocast of its own
                module.forward = plain
            if getattr(module, "sparse", None) is True:  # sparse gradients cannot be differentiated again
                module.sparse = False  # type: ignore[assignment]
            if mode == "eval" and module.training:  # assigning to a module is slow
                module.training = False
        if mode != "eval":
            model.train()
        yield


@contextmanager
def _attributes(model: nn.Module) -> Iterator[None]:
    """Plain attributes that forward passes set (counters, caches, last outputs), restored.

    What such an attribute holds after a measurement may belong to its graph, or be in another precision. Of nested
    containers only the outermost is restored.
    """
    kept = [(vars(module), dict(vars(module))) for module in model.modules()]
    buffers = [(module._buffers, set(module._buffers)) for module in model.modules()]
    own = vars(nn.Module())
    mutable = [
        (value, copy.copy(value))
        for _, before in kept
        for name, value in before.items()
        if name not in own and type(value) in (list, dict, set, deque, OrderedDict, defaultdict)
    ]
    small = [  # large ones are tables, which forward passes read
        (value, value.detach().clone())
        for _, before in kept
        for name, value in before.items()
        if name not in own and isinstance(value, Tensor) and value.numel() <= 65_536
    ]
    try:
        yield
    finally:
        for value, content in mutable:
            value.clear()
            (value.extend if isinstance(value, list | deque) else value.update)(content)
        for tensor, content in small:
            if not torch.equal(tensor, content):
                with torch.no_grad():
                    tensor.copy_(content)
        for now, names in buffers:
            for name in now.keys() - names:
                del now[name]
        for now, before in kept:
            for name in now.keys() - before.keys():
                del now[name]
            for name, value in before.items():
                if name not in now or now[name] is not value:
                    now[name] = value


@contextmanager
def random_states(*generators: torch.Generator | None) -> Iterator[None]:
    """Random states of PyTorch (CPU and CUDA devices), Python, NumPy and ``generators``, restored."""
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002 - it is the global state that is kept
    torch_cpu = torch.get_rng_state()
    torch_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    own = [(g, g.get_state()) for g in generators if g is not None]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.set_rng_state(torch_cpu)
        if torch_cuda is not None:
            torch.cuda.set_rng_state_all(torch_cuda)
        for generator, state in own:
            generator.set_state(state)


def random_fingerprint() -> tuple[object, ...]:
    """Something that changes when any of the random states does."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    numpy = np.random.get_state()  # noqa: NPY002
    states = [state.numpy().tobytes() for state in (torch.get_rng_state(), *cuda)]
    return random.getstate(), numpy[1].tobytes(), numpy[2], *states  # type: ignore[index]


@contextmanager
def _eager() -> Iterator[None]:
    """Compiled functions run as plain Python: compiled graphs cannot be differentiated twice."""
    if "torch._dynamo" not in sys.modules:  # nothing was compiled, and importing it takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield


class _PlainWeightNorm(TorchFunctionMode):
    """``torch._weight_norm`` in plain operations: the second derivative of its fused form is wrong, silently.

    (PyTorch 2.13, float64, CPU: the Hessian of a linear layer with weight_norm is asymmetric by 29 % of its norm.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch._weight_norm:
            return _weight_norm(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weight_norm(v: Tensor, g: Tensor, dim: int = 0) -> Tensor:
    others = [d for d in range(v.ndim) if d != dim % v.ndim] if dim != -1 else list(range(v.ndim))
    return v * (g / v.square().sum(others, keepdim=True).sqrt())


class _Host(nn.Module):
    """Runs any function while the model's tensors are swapped for others."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[], Any]) -> Any:
        return function()


def with_tensors(model: nn.Module, tensors: dict[str, Tensor], function: Callable[[], Any]) -> Any:
    """``function()`` while ``model`` holds ``tensors`` in place of its own parameters and buffers."""
    return functional_call(_Host(model), {f"model.{name}": t for name, t in tensors.items()}, (function,))


def unwrap(model: nn.Module) -> nn.Module:
    """The plain module inside ``torch.compile``, ``DataParallel`` and ``DistributedDataParallel``."""
    while True:
        if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
            model = model.module
        elif isinstance(getattr(model, "_orig_mod", None), nn.Module):
            model = model._orig_mod  # type: ignore[assignment]
        else:
            return model
