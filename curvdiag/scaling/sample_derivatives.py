"""First and second derivatives of each sample's loss along given directions, in three ways.

All of them return, for the totals ``t_i`` of a batch, ``v . grad t_i`` and ``v^T hess t_i v`` as rows ``[n, B]``:

- forward mode: a Jacobian-vector product of a Jacobian-vector product, all samples at once, no graph;
- reverse mode: the gradient of ``sum_i s_i t_i`` is linear in the sample weights ``s``, so that differentiating
  ``v^T H(s) v`` in ``s`` gives every sample its own; one more backward pass than a Hessian product;
- one by one: a graph for each sample. Slow, and the definition.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.func import grad, jvp, vmap
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from curvdiag.data import Batch, can_cut, map_tensors, sample_count, take, tensors_of
from curvdiag.objective import Objective
from curvdiag.sandbox import sandbox, with_tensors
from curvdiag.weights import Weights

Direction = tuple[Tensor, ...]
"""One vector of parameter space, in the shapes of the parameters."""


@dataclass(frozen=True)
class Place:
    """Where derivatives are taken: an objective, and the weights it has there.

    Attributes:
        objective: The risk; only its parameters are moved.
        weights: A picture of its tensors.
        dtype: Type of the data and the loss, None for their own.
    """

    objective: Objective
    weights: Weights
    dtype: torch.dtype | None

    def directions(self, vectors: Tensor) -> list[Direction]:
        """The columns of ``[P, n]``, each in the shapes and types of the parameters."""
        views = self.objective.parameters.views
        chosen = self.weights.chosen
        rows = vectors.detach().to(self.objective.device).T.contiguous()
        return [tuple(part.to(w.dtype) for part, w in zip(views(row), chosen, strict=True)) for row in rows]

    def totals(self, chosen: Sequence[Tensor], batch: Batch) -> Tensor:
        """``t_i`` of a batch where the chosen parameters have these values; to be called in the sandbox."""
        buffers = {name: buffer.clone() for name, buffer in self.weights.buffers.items()}
        tensors = {**self.weights.fixed, **dict(zip(self.weights.names, chosen, strict=True)), **buffers}
        return with_tensors(self.objective.model, tensors, lambda: self.objective.totals(batch, self.dtype))

    def inside(self, function: Callable[[], Any]) -> Any:
        """``function()`` in the sandbox, prepared for second derivatives."""
        with sandbox(self.objective.model, self.objective.mode, self.objective.device, twice=True):
            return function()

    @property
    def point(self) -> Direction:
        return tuple(tensor.detach() for tensor in self.weights.chosen)


Pair = tuple[Tensor, Tensor]


def forward_mode(place: Place, batch: Batch, directions: Sequence[Direction]) -> Pair:
    """Slopes and curvatures ``[n, B]``, each direction at the price of a few forward passes."""

    def along(direction: Direction) -> Pair:
        def slopes(*chosen: Tensor) -> Any:
            return jvp(lambda *p: place.totals(p, batch), chosen, direction)[1]

        both: Any = jvp(slopes, place.point, direction)
        return both

    with _PlainForwardOperations():
        found = place.inside(lambda: [along(direction) for direction in directions])
    return _stacked(found)


def reverse_mode(place: Place, batch: Batch, directions: Sequence[Direction]) -> Pair:
    """The same from one graph of the gradient, and three backward passes through it for each direction."""
    leaves = place.weights.chosen

    def all_along() -> list[Pair]:
        totals = place.totals(leaves, batch)
        ones = torch.ones_like(totals, requires_grad=True)
        gradient = _derivative((totals * ones).sum(), leaves)

        def along(direction: Direction) -> Pair:
            slope = _dot(gradient, direction)
            if slope is None:
                return torch.zeros_like(totals), torch.zeros_like(totals)
            slopes = torch.autograd.grad(slope, ones, retain_graph=True)[0].detach()
            curvature = _dot(_derivative(slope, leaves), direction)
            if curvature is None:
                return slopes, torch.zeros_like(slopes)
            found = torch.autograd.grad(curvature, ones, retain_graph=True, allow_unused=True)[0]
            return slopes, torch.zeros_like(slopes) if found is None else found.detach()

        return [along(direction) for direction in directions]

    return _stacked(place.inside(all_along))


def one_by_one(place: Place, batch: Batch, directions: Sequence[Direction]) -> tuple[Tensor, Tensor, Tensor]:
    """Slopes, curvatures and ``||hess t_i v||^2``, each ``[n, B]``, by a graph for each sample."""
    leaves = place.weights.chosen
    columns = []

    def one(batch: Batch, index: int) -> Tensor:
        total = place.totals(leaves, batch)[index]
        gradient = _derivative(total, leaves)
        zero = torch.zeros_like(total)
        return torch.stack([_definition(gradient, leaves, direction, zero) for direction in directions])

    for i in range(sample_count(batch)):
        alone, index = (take(batch, slice(i, i + 1)), 0) if can_cut(batch) else (batch, i)
        columns.append(place.inside(functools.partial(one, alone, index)))
    slopes, curvatures, squares = torch.stack(columns).unbind(-1)
    return slopes.T, curvatures.T, squares.T


def squares_by_vmap(place: Place, batch: Batch, directions: Sequence[Direction], chunk: int) -> Tensor:
    """``||hess t_i v||^2`` as rows ``[n, B]``, from the Hessian products of ``chunk`` samples at a time."""
    rows = [torch.cat(parts) for parts in zip(*_squares_of_chunks(place, batch, directions, chunk), strict=True)]
    return torch.stack(rows)


def _squares_of_chunks(
    place: Place, batch: Batch, directions: Sequence[Direction], chunk: int
) -> Iterator[list[Tensor]]:
    tensors = tensors_of(batch)
    mapped = tuple(0 if t.ndim else None for t in tensors)
    chosen = tuple(range(len(place.weights.chosen)))

    def square(direction: Direction, *tensors: Tensor) -> Tensor:
        parts = iter([t if axis is None else t[None] for t, axis in zip(tensors, mapped, strict=True)])
        sample = map_tensors(lambda _: next(parts), batch)

        def slope(*p: Tensor) -> Tensor:
            return jvp(lambda *q: place.totals(q, sample).sum(), p, direction)[1]

        products = grad(slope, argnums=chosen)(*place.point)
        return torch.stack([p.square().sum() for p in products]).sum()

    for start in range(0, sample_count(batch), chunk):
        few = [t[start : start + chunk] if t.ndim else t for t in tensors]

        def all_along(few: list[Tensor] = few) -> list[Tensor]:
            return [vmap(square, in_dims=(None, *mapped))(direction, *few) for direction in directions]

        with _PlainForwardOperations():
            yield place.inside(all_along)


def _definition(
    gradient: Sequence[Tensor | None], leaves: Sequence[Tensor], direction: Direction, zero: Tensor
) -> Tensor:
    """``v . g``, ``v^T H v`` and ``||H v||^2`` ``[3]`` from the graph of one gradient."""
    slope = _dot(gradient, direction)
    if slope is None:
        constant = [(g * v).sum() for g, v in zip(gradient, direction, strict=True) if g is not None]
        return torch.stack([sum(constant, zero), zero, zero]).detach()
    product = torch.autograd.grad(slope, leaves, retain_graph=True, allow_unused=True)
    curvature = [(h * v).sum() for h, v in zip(product, direction, strict=True) if h is not None]
    square = [h.square().sum() for h in product if h is not None]
    return torch.stack([slope, sum(curvature, zero), sum(square, zero)]).detach()


def _derivative(value: Tensor, leaves: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    return torch.autograd.grad(value, leaves, create_graph=True, allow_unused=True)


def _dot(tensors: Sequence[Tensor | None], direction: Direction) -> Tensor | None:
    """Their inner product as part of the graph; None where the graph does not reach it."""
    terms = [(t * v).sum() for t, v in zip(tensors, direction, strict=True) if t is not None]
    return sum(terms[1:], terms[0]) if any(term.requires_grad for term in terms) else None


def _stacked(pairs: Sequence[Pair]) -> Pair:
    slopes, curvatures = zip(*pairs, strict=True)
    return torch.stack(slopes).detach(), torch.stack(curvatures).detach()


class _PlainForwardOperations(TorchFunctionMode):
    """Operations whose nested forward derivative is missing or silently wrong, in plain arithmetic.

    (PyTorch 2.13: the second derivative of ``layer_norm`` by forward over forward mode is wrong, and so may be that of
    ``group_norm``; ``glu`` has none.)
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = PLAIN.get(func)
        return (plain or func)(*args, **(kwargs or {}))


def _layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    axes = list(range(-len(normalized_shape), 0))
    return _scaled_and_shifted(_standardised(input, axes, eps), weight, bias)


def _group_norm(
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *_: Any,
    **__: Any,
) -> Tensor:
    groups = input.reshape(input.shape[0], num_groups, -1)
    out = _standardised(groups, [-1], eps).reshape(input.shape)
    shape = (1, -1, *(1,) * (input.ndim - 2))
    parts = [None if t is None else t.reshape(shape) for t in (weight, bias)]
    return _scaled_and_shifted(out, parts[0], parts[1])


def _glu(input: Tensor, dim: int = -1) -> Tensor:
    value, gate = input.chunk(2, dim)
    return value * gate.sigmoid()


def _standardised(input: Tensor, axes: list[int], eps: float) -> Tensor:
    centred = input - input.mean(axes, keepdim=True)
    return centred * (centred.square().mean(axes, keepdim=True) + eps).rsqrt()


def _scaled_and_shifted(out: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    out = out if weight is None else out * weight
    return out if bias is None else out + bias


PLAIN: dict[Any, Callable[..., Tensor]] = {
    F.layer_norm: _layer_norm,
    torch.layer_norm: _layer_norm,
    F.group_norm: _group_norm,
    torch.group_norm: _group_norm,
    F.glu: _glu,
}
