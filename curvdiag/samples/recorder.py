"""A forward pass that remembers each function call with a chosen parameter in it."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as trees
from torch.utils.hooks import RemovableHandle

from curvdiag.samples import elementwise, linear, normalisation
from curvdiag.samples.any_call import AnyCall
from curvdiag.samples.calls import Call, NotCovered, precise
from curvdiag.samples.convolution import Convolution
from curvdiag.samples.embedding import Embed
from curvdiag.samples.indexing import moves_samples

RULES: dict[Any, type[Call]] = {
    F.linear: linear.Linear,
    **dict.fromkeys([torch.conv1d, torch.conv2d, torch.conv3d], Convolution),
    F.embedding: Embed,
    F.layer_norm: normalisation.LayerNorm,
    F.rms_norm: normalisation.RMSNorm,
    F.group_norm: normalisation.GroupNorm,
    F.batch_norm: normalisation.BatchNorm,
    **dict.fromkeys([torch.addmm, Tensor.addmm], linear.AddMM),
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__], linear.MatMul),
    **dict.fromkeys(
        [torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__, Tensor.add_, Tensor.__iadd__], elementwise.Add
    ),
    **dict.fromkeys([torch.sub, torch.subtract, Tensor.sub, Tensor.__sub__], elementwise.Subtract),
    **dict.fromkeys([torch.mul, torch.multiply, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], elementwise.Multiply),
    **dict.fromkeys([torch.div, torch.true_divide, Tensor.div, Tensor.__truediv__], elementwise.Divide),
}
"""What is known of each function; :class:`AnyCall` serves the others."""

# fmt: off
VIEWS = frozenset({
    "T", "__getitem__", "adjoint", "chunk", "contiguous", "flatten", "float", "mT", "moveaxis", "movedim", "narrow",
    "permute", "reshape", "select", "split", "split_with_sizes", "squeeze", "swapaxes", "t", "tensor_split", "to",
    "transpose", "unbind", "unflatten", "unsqueeze", "view", "view_as",
})
"""Functions that hand on entries of a tensor, each at most once."""

REPEATS = frozenset({"broadcast_to", "expand", "expand_as", "repeat"})

DYNAMIC = frozenset({
    "__array__", "__float__", "__index__", "__int__", "_pack_padded_sequence", "_unique", "_unique2", "argwhere",
    "item", "masked_select", "nonzero", "nonzero_static", "numpy", "repeat_interleave", "tolist", "unique",
    "unique_consecutive",
})
"""After one of these the samples may lie anywhere."""

PLACING = frozenset({
    "T", "einsum", "flatten", "flip", "flipud", "mT", "moveaxis", "movedim", "permute", "reshape", "roll", "rot90",
    "swapaxes", "swapdims", "t", "transpose", "unflatten", "view",
})
# fmt: on
"""Where the samples lie depends on which of these were called: passes that differ in them take different paths."""


@dataclass(eq=False)
class Side:
    """A tensor made of parameters (and constants) alone.

    Attributes:
        tensor: With its graph down to the parameters.
        plain: Without.
        positions: The chosen parameters it depends on; none for a constant.
        moved: Whether it holds entries of one parameter, each at most once.
    """

    tensor: Tensor
    positions: frozenset[int]
    moved: bool
    plain: Tensor = field(init=False)

    def __post_init__(self) -> None:
        self.plain = self.tensor.detach() if self.positions else self.tensor


class Recorder(TorchFunctionMode):
    """Runs functions with parameters cut off from the graph, and remembers them.

    Args:
        chosen: The parameters.
        model: Holds them, and other parameters and buffers, which are constants here.
        samples: B.

    Attributes:
        calls: In their order; each with :attr:`Call.sides`, its parameters by role.
        roots: Leaves from which the graph grows; a backward pass down to them reaches every call.
        hidden: Parameters that were used in a way that was not remembered.
        arrived: Called with each call whose ``delta`` has come.
    """

    def __init__(self, chosen: tuple[Tensor, ...], model: nn.Module, samples: int) -> None:
        super().__init__()
        self.samples = samples
        self.calls: list[Call] = []
        self.roots: list[Tensor] = []
        self.hidden: set[int] = set()
        self.arrived: Callable[[Call], None] = _ignore
        self.adrift = False
        self.names: list[tuple[Any, ...]] = []
        self.placed: set[str] = set()
        self._sides: dict[int, Side] = {}
        self._hooks: list[RemovableHandle] = []
        for constant in (*model.parameters(), *model.buffers()):
            self._keep(constant, frozenset(), moved=False)
        for position, parameter in enumerate(chosen):
            self._keep(parameter, frozenset([position]), moved=True)

    @property
    def path(self) -> tuple[Any, ...]:
        """What was called on what: passes of the same path take the same rules."""
        return tuple(self.names), frozenset(self.hidden), frozenset(self.placed)

    def let_go(self) -> None:
        """Take the hooks off: the graph would hold the recorder and the recorder the graph, for ever.

        And forget who waits for the calls, which usually holds the recorder: the tensors of a pass would otherwise lie
        about until Python looks for circles.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self.arrived = _ignore

    def _keep(self, tensor: Tensor, positions: frozenset[int], *, moved: bool) -> None:
        self._sides[id(tensor)] = Side(tensor, positions, moved)

    def __torch_function__(self, func: Any, types_: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors(args, kwargs))
        sides = [self._sides.get(id(t)) for t in tensors]
        name = _name(func)
        if name in PLACING:
            self.placed.add(name)
        if not any(s.positions for s in sides if s is not None):
            # Before the call, which may write over an index.
            self.adrift = self.adrift or moves_samples(name, args, kwargs, self.samples)
        if not any(sides):
            out = func(*args, **kwargs)
            self._watch(func, args, out, made=not tensors)
            return out
        if name in REPEATS and sides[0] is not None:
            return self._repeat(func, sides[0], args, kwargs)
        if all(sides):
            out = func(*args, **kwargs)
            self._derive(name, [s for s in sides if s is not None], out)
            return out
        if not any(s.positions for s in sides if s is not None):
            return func(*args, **kwargs)
        return self._mixed(func, args, kwargs)

    def _watch(self, func: Any, args: Any, out: Any, *, made: bool) -> None:
        """Of a call without parameters: constants that it makes, and whether samples can still be told apart."""
        if made:
            # What is made for each sample, such as an initial state, is no constant.
            if isinstance(out, Tensor) and not (out.ndim > 1 and out.shape[0] == self.samples):
                self._keep(out, frozenset(), moved=False)
            return
        name = getattr(func, "__name__", "")
        self.adrift = self.adrift or name in DYNAMIC or (name == "where" and len(args) == 1)
        if name == "__getitem__":
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            self.adrift = self.adrift or any(
                isinstance(i, Tensor) and i.dtype in (torch.bool, torch.uint8) for i in index
            )

    def _derive(self, name: str, sides: list[Side], out: Any) -> None:
        positions = frozenset[int]().union(*(s.positions for s in sides))
        moved = name in VIEWS and len(positions) == 1 and all(s.moved for s in sides if s.positions)
        for tensor in trees.tree_leaves(out):
            if isinstance(tensor, Tensor) and id(tensor) not in self._sides:
                self._keep(tensor, positions if tensor.requires_grad else frozenset(), moved=moved)

    def _repeat(self, func: Any, side: Side, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if out.ndim and out.shape[0] == self.samples and (out.ndim > side.tensor.ndim or side.tensor.shape[0] == 1):
            if not side.positions or not torch.is_grad_enabled():
                return out.detach()
            call = elementwise.Expand({}, {"input": side.plain}, self.samples)
            return self._tap(out.detach(), call, func, {"input": side})
        self._derive("expand", [side], out)
        return out

    def _mixed(self, func: Any, args: Any, kwargs: Any) -> Any:
        rule = RULES.get(func)
        if rule is None and isinstance(func, types.FunctionType) and "has_torch_function" in func.__globals__:
            with self:  # a function of functions: look inside
                return _opened(func)(*args, **kwargs)

        def plain(value: Any) -> Any:
            side = self._sides.get(id(value)) if isinstance(value, Tensor) else None
            return value if side is None else side.plain

        plain_args, plain_kwargs = trees.tree_map(plain, (args, kwargs))
        try:
            in_place = _name(func) in ("add_", "__iadd__")  # of which the output must already be in the graph
            if self.adrift or not torch.is_grad_enabled() or (in_place and not plain_args[0].requires_grad):
                raise NotCovered("samples cannot be told apart")
            call, sides = self._call(rule, func, args, kwargs, plain_args, plain_kwargs)
        except NotCovered:
            self._hide(args, kwargs)
            return func(*plain_args, **plain_kwargs)
        return self._tap(func(*plain_args, **plain_kwargs), call, func, sides)

    def _call(
        self, rule: type[Call] | None, func: Any, args: Any, kwargs: Any, plain_args: Any, plain_kwargs: Any
    ) -> tuple[Call, dict[str, Side]]:
        if rule is not None:
            arguments = rule.bind(args, kwargs)
            sides = {}
            for name, value in arguments.items():
                side = self._sides.get(id(value)) if isinstance(value, Tensor) else None
                if side is not None and side.positions:
                    sides[name] = side
            if all(name in rule.roles for name in sides):
                try:
                    given = {name: side.plain for name, side in sides.items()}
                    return rule(rule.bind(plain_args, plain_kwargs), given, self.samples), sides
                except NotCovered:
                    pass
        flat = trees.tree_leaves((args, kwargs))
        found = {i: self._sides.get(id(leaf)) for i, leaf in enumerate(flat) if isinstance(leaf, Tensor)}
        places = {i: side for i, side in found.items() if side is not None and side.positions}
        given_places = {i: str(i) for i in places}
        call = AnyCall(func, plain_args, plain_kwargs, given_places, self.samples)
        return call, {str(i): side for i, side in places.items()}

    def _hide(self, args: Any, kwargs: Any) -> None:
        for tensor in _tensors(args, kwargs):
            side = self._sides.get(id(tensor))
            if side is not None:
                self.hidden |= side.positions

    def _tap(self, out: Any, call: Call, func: Any, sides: dict[str, Side]) -> Any:
        """The output, with a hook that catches the gradient of the loss in it."""
        call.sides = sides
        flat, spec = trees.tree_flatten(out)
        call.deltas = [None] * len(flat)
        for i, tensor in enumerate(flat):
            if not isinstance(tensor, Tensor) or not (tensor.dtype.is_floating_point or tensor.dtype.is_complex):
                continue
            if not tensor.requires_grad:
                root = tensor.requires_grad_()
                self.roots.append(root)
                tensor = root.clone()  # what follows may work in place, which a leaf does not allow
            elif len(flat) > 1:
                tensor = tensor.clone()  # one output may have been made from another

            def hook(delta: Tensor, i: int = i) -> None:
                call.deltas[i] = precise(delta.detach())
                self.arrived(call)

            self._hooks.append(tensor.register_hook(hook))
            flat[i] = tensor
        self.calls.append(call)
        roles = tuple((role, tuple(sorted(side.positions)), side.moved) for role, side in sides.items())
        self.names.append((type(call).__name__, _name(func), roles, call.describe()))
        return trees.tree_unflatten(flat, spec)


def _ignore(call: Call) -> None:
    pass


def _tensors(args: Any, kwargs: Any) -> Iterator[Tensor]:
    for value in (*args, *kwargs.values()) if kwargs else args:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple | dict):
            yield from (leaf for leaf in trees.tree_leaves(value) if isinstance(leaf, Tensor))


def _name(func: Any) -> str:
    name = getattr(func, "__name__", "")
    return getattr(func.__self__, "__name__", name) if name == "__get__" else name


def _opened(func: types.FunctionType) -> types.FunctionType:
    """The same function, which no longer hands itself over to the mode as a whole."""
    if func not in _OPENED:
        never = dict.fromkeys(
            ["has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"], lambda *_: False
        )
        twin = types.FunctionType(
            func.__code__, {**func.__globals__, **never}, func.__name__, func.__defaults__, func.__closure__
        )
        twin.__kwdefaults__ = func.__kwdefaults__
        _OPENED[func] = twin
    return _OPENED[func]


_OPENED: dict[types.FunctionType, types.FunctionType] = {}
