"""A forward pass that remembers each call of a layer, to tell single samples apart in its backward pass."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvdiag.samples.calls import NotCovered
from curvdiag.samples.convolution import Convolution
from curvdiag.samples.recorder import VIEWS
from curvdiag.scaling.layer_products import Product, dual
from curvdiag.scaling.sample_derivatives import PLAIN


@dataclass(frozen=True)
class Use:
    """One call with a parameter in it.

    Attributes:
        output: What came out of it.
        positions: The parameters in it, by their place.
        add: Adds to the products what follows from the gradient in the output and its derivative.
        activation, version: What went in, and how often it had been written into by then.
    """

    output: Tensor
    positions: tuple[int, ...]
    add: Callable[[list[Product], Tensor, Tensor | None], None]
    activation: Tensor | None
    version: int


class Recorder(TorchFunctionMode):
    """Runs a model, and remembers each call with one of the ``chosen`` parameters in it."""

    def __init__(self, chosen: Sequence[Tensor], samples: int) -> None:
        super().__init__()
        self.tensors = list(chosen)
        self.owners = list(range(len(chosen)))
        self.positions = {id(tensor): position for position, tensor in enumerate(chosen)}
        self.samples = samples
        self.uses: list[Use] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = (leaf for value in (*args, *kwargs.values()) for leaf in _leaves(value))
        named = [self.positions[id(leaf)] for leaf in leaves if id(leaf) in self.positions]
        if not named:
            return _PLAIN.get(func, func)(*args, **kwargs)
        if func in _KNOWN:
            return _KNOWN[func](self, *args, **kwargs)
        name = getattr(func, "__name__", "")
        found = func(*args, **kwargs)
        if name == "__get__" and not isinstance(found, Tensor):  # its shape, its type
            return found
        if not isinstance(found, Tensor) or (name not in VIEWS and name != "__get__") or len(named) > 1:
            raise NotCovered(f"a parameter in {name or func}")
        return self._view(found, named[0])

    def _view(self, tensor: Tensor, position: int) -> Tensor:
        """Entries of a parameter, each at most once: a parameter of their own."""
        if not found_in(tensor, self.tensors[position]):
            raise NotCovered("a function of parameters alone")
        self.positions[id(tensor)] = len(self.tensors)
        self.tensors.append(tensor)
        self.owners.append(self.owners[position])
        return tensor

    def products(self) -> list[Product]:
        """Empty, one for each parameter or view of one.

        Raises:
            NotCovered: A parameter is used in more than one view, so that squares do not simply add up.
        """
        used = {position for use in self.uses for position in use.positions}
        owners = [self.owners[position] for position in used]
        if len(set(owners)) < len(owners):
            raise NotCovered("several views of one parameter")
        return [Product(dual(tensor)[1]) for tensor in self.tensors]

    def position(self, tensor: Tensor | None) -> int | None:
        return self.positions.get(id(tensor))

    def record(
        self,
        out: Tensor,
        add: Callable[[list[Product], Tensor, Tensor | None], None],
        places: Sequence[int | None],
        activation: Tensor | None = None,
    ) -> Tensor:
        if out.shape[0] % self.samples:
            raise NotCovered("samples cannot be told apart")
        root = out if out.requires_grad else out.requires_grad_()
        positions = tuple(place for place in places if place is not None)
        self.uses.append(Use(root, positions, add, activation, 0 if activation is None else activation._version))
        return root.clone()  # what follows may write into it

    def by_sample(self, tensor: Tensor) -> Tensor:
        """``[B, R, last]``."""
        return tensor.reshape(self.samples, -1, tensor.shape[-1])

    def linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        place, shift = self.position(weight), self.position(bias)
        if input.shape[0] % self.samples or input.ndim < 2:
            raise NotCovered("samples cannot be told apart")

        def add(products: list[Product], delta: Tensor, change: Tensor | None) -> None:
            if place is not None:
                a, moved = dual(input)
                self._outer(products[place], delta, change, a, moved)
            if shift is not None and change is not None:
                products[shift].add_rows(self.by_sample(change).sum(1))

        return self.record(F.linear(input, weight, bias), add, (place, shift), input if place is not None else None)

    def _outer(self, product: Product, delta: Tensor, change: Tensor | None, a: Tensor, moved: Tensor | None) -> None:
        if change is not None and moved is not None:
            left = torch.cat([self.by_sample(change), self.by_sample(delta)], 1)
            product.pairs.append((left, torch.cat([self.by_sample(a), self.by_sample(moved)], 1)))
        elif change is not None:
            product.pairs.append((self.by_sample(change), self.by_sample(a)))
        elif moved is not None:
            product.pairs.append((self.by_sample(delta), self.by_sample(moved)))

    def convolution(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        arguments = Convolution.bind(args, kwargs)
        input, weight, bias = (arguments[name] for name in ("input", "weight", "bias"))
        place, shift = self.position(weight), self.position(bias)
        call = Convolution(arguments, {"weight": weight}, self.samples)
        if call.groups != 1:
            raise NotCovered("groups of channels")

        def add(products: list[Product], delta: Tensor, change: Tensor | None) -> None:
            if place is not None:
                parts = [t if t is None else t.flatten(2).mT for t in (delta, change)]
                images = [t if t is None else call.patches(t).mT for t in dual(input)]
                self._outer(products[place], *parts, *images)  # type: ignore[arg-type]
            if shift is not None and change is not None:
                products[shift].add_rows(change.flatten(2).sum(2).reshape(self.samples, -1, change.shape[1]).sum(1))

        return self.record(function(*args, **kwargs), add, (place, shift), input if place is not None else None)

    def embedding(self, input: Tensor, weight: Tensor, padding_idx: int | None = None, *rest: Any, **more: Any) -> Any:
        if (
            padding_idx is not None
            or any(rest[:1])
            or any(rest[2:])
            or any(more.get(k) for k in ("max_norm", "scale_grad_by_freq", "sparse"))
        ):
            raise NotCovered("options of a table")
        place = self.position(weight)

        def add(products: list[Product], delta: Tensor, change: Tensor | None) -> None:
            if change is not None and place is not None:
                tokens = input.reshape(self.samples, -1)
                products[place].pairs.append((self.by_sample(change), tokens))

        return self.record(F.embedding(input, weight), add, (place,))

    def shifted(self, out: Tensor, parameter: Tensor, shape: Sequence[int] | None = None, sign: float = 1.0) -> Tensor:
        """``out + parameter``, the parameter seen in another shape."""
        place = self.position(parameter)
        whole = self._reach(out, parameter, shape)

        def add(products: list[Product], delta: Tensor, change: Tensor | None) -> None:
            if change is not None and place is not None:
                products[place].add_rows(_reduced(change, whole) * sign)

        seen = parameter.reshape(whole)
        return self.record(out + seen if sign > 0 else out - seen, add, (place,))

    def scaled(self, out: Tensor, parameter: Tensor, shape: Sequence[int] | None = None) -> Tensor:
        """``out * parameter``."""
        place = self.position(parameter)
        whole = self._reach(out, parameter, shape)

        def add(products: list[Product], delta: Tensor, change: Tensor | None) -> None:
            a, moved = dual(out)
            parts = [x * y for x, y in ((change, a), (delta, moved)) if x is not None and y is not None]
            if parts and place is not None:
                products[place].add_rows(_reduced(sum(parts[1:], parts[0]), whole))

        return self.record(out * parameter.reshape(whole), add, (place,), out)

    def _reach(self, out: Tensor, parameter: Tensor, shape: Sequence[int] | None) -> tuple[int, ...]:
        """The shape of a parameter that is spread over the samples of ``out``."""
        seen = tuple(parameter.shape if shape is None else shape)
        whole = (1,) * (out.ndim - len(seen)) + seen
        if len(whole) != out.ndim or whole[0] != 1 or out.shape[0] != self.samples:
            raise NotCovered("samples cannot be told apart")
        return whole

    def normalisation(
        self, out: Tensor, weight: Tensor | None, bias: Tensor | None, shape: Sequence[int] | None = None
    ) -> Tensor:
        """Scale and shift, of which either may be chosen."""
        if weight is not None:
            known = self.position(weight) is not None
            out = self.scaled(out, weight, shape) if known else out * (weight if shape is None else weight.view(shape))
        if bias is not None:
            known = self.position(bias) is not None
            out = self.shifted(out, bias, shape) if known else out + (bias if shape is None else bias.view(shape))
        return out


def found_in(tensor: Tensor, whole: Tensor) -> bool:
    """Whether a tensor is a view of another in which no entry stands twice."""
    steps = sorted((step, size) for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    apart = all(step >= before * size for (before, size), (step, _) in itertools.pairwise(steps))
    same = tensor.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    return same and apart and all(step > 0 for step, _ in steps)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for part in value:
            yield from _leaves(part)
    else:
        yield value


def _reduced(change: Tensor, whole: Sequence[int]) -> Tensor:
    """Summed to ``[B, ...]`` over what a parameter of the shape ``whole`` is spread over."""
    lost = [axis for axis, size in enumerate(whole) if axis and size == 1]
    return change.sum(lost, keepdim=True) if lost else change


def _layer_norm(
    self: Recorder, input: Tensor, normalized_shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5,
    *_: Any,
) -> Tensor:  # fmt: skip
    return self.normalisation(PLAIN[F.layer_norm](input, normalized_shape, None, None, eps), weight, bias)


def _group_norm(
    self: Recorder, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any
) -> Tensor:
    shape = (-1, *(1,) * (input.ndim - 2))
    return self.normalisation(PLAIN[F.group_norm](input, num_groups, None, None, eps), weight, bias, _of(weight, shape))


def _batch_norm(
    self: Recorder, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None, bias: Any = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if training:
        raise NotCovered("statistics of the batch")
    out = F.batch_norm(input, running_mean, running_var, None, None, False, momentum, eps)
    return self.normalisation(out, weight, bias, _of(weight, (-1, *(1,) * (input.ndim - 2))))


def _of(weight: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    return len(weight), *shape[1:]


def _sum(self: Recorder, input: Any, other: Any) -> Tensor:
    return self.shifted(*_ordered(self, input, other))


def _difference(self: Recorder, input: Any, other: Any) -> Tensor:
    if self.position(other) is None:
        raise NotCovered("a parameter from which something is taken")
    return self.shifted(*_ordered(self, input, other), sign=-1.0)


def _times(self: Recorder, input: Any, other: Any) -> Tensor:
    return self.scaled(*_ordered(self, input, other))


def _ordered(self: Recorder, input: Any, other: Any) -> tuple[Tensor, Tensor]:
    """The activation and the parameter."""
    out, parameter = (input, other) if self.position(other) is not None else (other, input)
    if not isinstance(out, Tensor) or self.position(out) is not None:
        raise NotCovered("a function of parameters alone")
    return out, parameter


def _matmul(self: Recorder, input: Tensor, other: Tensor) -> Tensor:
    if self.position(input) is not None or other.ndim != 2:
        raise NotCovered("a product in another order")
    weight = self._view(other.mT, self.positions[id(other)])
    return self.linear(input, weight)


def _convolution(function: Any) -> Callable[..., Tensor]:
    return lambda self, *args, **kwargs: self.convolution(function, *args, **kwargs)


_KNOWN: dict[Any, Callable[..., Any]] = {
    F.linear: Recorder.linear,
    F.embedding: Recorder.embedding,
    F.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    F.batch_norm: _batch_norm,
    **{function: _convolution(function) for function in (torch.conv1d, torch.conv2d, torch.conv3d)},
    **dict.fromkeys([torch.matmul, torch.mm, Tensor.matmul, Tensor.mm, Tensor.__matmul__], _matmul),
    **dict.fromkeys([torch.add, Tensor.add, Tensor.__add__, Tensor.__radd__], _sum),
    **dict.fromkeys([torch.sub, Tensor.sub, Tensor.__sub__], _difference),
    **dict.fromkeys([torch.mul, Tensor.mul, Tensor.__mul__, Tensor.__rmul__], _times),
}


def _silu(input: Tensor, inplace: bool = False) -> Tensor:
    return input.mul_(input.sigmoid()) if inplace else input * input.sigmoid()


# The gradient of ``silu`` has no forward mode.
_PLAIN: dict[Any, Callable[..., Tensor]] = {**PLAIN, F.silu: _silu}
