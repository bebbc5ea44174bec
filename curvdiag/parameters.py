"""Which parameters are measured, and how they lie in one flat vector."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from itertools import accumulate
from math import prod

import torch
from torch import Tensor, nn

from curvdiag.errors import ParameterError

Selection = str | Sequence[str] | Callable[[str, Tensor], bool]
"""A glob over parameter names (``"layer4.*"``), several of them, or a predicate of (name, tensor)."""


@dataclass(frozen=True)
class Parameters:
    """The layout of a flat vector ``[P]``: named tensors one after the other, in the model's own order.

    Attributes:
        names: One name for each tensor; a tied tensor has the name under which the model lists it first.
        shapes: Their shapes.
        aliases: For each tensor all names under which the model holds it.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]
    aliases: tuple[tuple[str, ...], ...]

    @classmethod
    def of(cls, model: nn.Module, selection: Selection | None = None) -> Parameters:
        """The parameters of ``model`` that ``selection`` names; all that require gradients by default.

        Tied weights count once, and match under any of their names.

        Raises:
            ParameterError: Nothing matches, or a chosen parameter is complex or not floating-point.
        """
        tensors: dict[int, Tensor] = {}
        names: dict[int, list[str]] = {}
        for name, tensor in model.named_parameters(remove_duplicate=False):
            tensors[id(tensor)] = tensor
            names.setdefault(id(tensor), []).append(name)
        if selection is None:
            chosen = [key for key, tensor in tensors.items() if tensor.requires_grad]
            if not chosen:
                raise ParameterError(
                    f"none of the {len(tensors)} parameters requires gradients; name frozen ones with params="
                )
        else:
            chosen = _matching(selection, [(names[key], tensors[key]) for key in tensors], list(tensors))
        for key in chosen:
            if not tensors[key].dtype.is_floating_point:
                raise ParameterError(
                    f"parameter {names[key][0]!r} is {tensors[key].dtype}; curvature is defined here for real "
                    "parameters only: hold the real and imaginary parts as two real parameters, or leave it out "
                    "with params="
                )
        return cls(
            tuple(names[key][0] for key in chosen),
            tuple(tensors[key].shape for key in chosen),
            tuple(tuple(names[key]) for key in chosen),
        )

    def __len__(self) -> int:
        return len(self.names)

    @cached_property
    def numels(self) -> tuple[int, ...]:
        return tuple(prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """``P``, the number of entries of a flat vector."""
        return sum(self.numels)

    @cached_property
    def slices(self) -> tuple[slice, ...]:
        """Where each tensor lies in the flat vector."""
        ends = list(accumulate(self.numels))
        return tuple(slice(end - n, end) for end, n in zip(ends, self.numels, strict=True))

    @cached_property
    def _places(self) -> tuple[tuple[torch.Size, tuple[int, ...], int], ...]:
        """Shape and strides of each tensor, and where in the flat vector it begins."""
        strides = (torch.empty(shape, device="meta").stride() for shape in self.shapes)
        return tuple(zip(self.shapes, strides, (part.start for part in self.slices), strict=True))

    @cached_property
    def _subsets(self) -> dict[tuple[int, ...], Parameters]:
        return {}

    def in_short(self) -> str:
        """What parameters there are, in a few words that differ where names or shapes do."""
        told = zlib.crc32(repr((self.names, self.shapes)).encode())
        return f"{len(self)} tensors of {self.size:,} numbers ({told:08x})"

    def views(self, vector: Tensor) -> list[Tensor]:
        """The parts of a vector ``[P]``, or of several as rows, in the parameters' shapes; no copies.

        Raises:
            ParameterError: The vector has another length, or is not contiguous.
        """
        if vector.shape[-1] != self.size or (vector.stride(-1) != 1 and self.size > 1):
            raise ParameterError(
                f"views need contiguous vectors of {self.size} numbers, not {vector.shape[-1]} with a stride of "
                f"{vector.stride(-1)}"
            )
        several, apart, start = vector.shape[:-1], vector.stride()[:-1], vector.storage_offset()
        if not several:
            return [vector.as_strided(shape, strides, start + first) for shape, strides, first in self._places]
        return [
            vector.as_strided((*several, *shape), (*apart, *strides), start + first)
            for shape, strides, first in self._places
        ]

    def flatten(self, tensors: Iterable[Tensor]) -> Tensor:
        """One vector ``[P]`` from tensors in the shapes of the parameters."""
        return torch.cat([tensor.reshape(-1) for tensor in tensors])

    def select(self, selection: Selection, tensors: Sequence[Tensor] | None = None) -> list[int]:
        """Positions of the parameters that ``selection`` names.

        Raises:
            ParameterError: Nothing matches.
        """
        shown = tensors or [torch.empty(shape, device="meta") for shape in self.shapes]
        named = [(list(a), t) for a, t in zip(self.aliases, shown, strict=True)]
        return _matching(selection, named, list(range(len(self))))

    def subset(self, positions: Sequence[int]) -> Parameters:
        """The layout of a vector over the parameters at ``positions`` alone."""
        positions = tuple(positions)
        if positions not in self._subsets:  # each product asks for the same ones
            self._subsets[positions] = Parameters(
                tuple(self.names[i] for i in positions),
                tuple(self.shapes[i] for i in positions),
                tuple(self.aliases[i] for i in positions),
            )
        return self._subsets[positions]

    def layers(self) -> dict[str, list[str]]:
        """Names of the parameters of each layer: the module that holds them directly.

        A parameter held by the model itself is a layer of its own.
        """
        layers: dict[str, list[str]] = {}
        for name in self.names:
            layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
        return layers


def _matching(selection: Selection, named: list[tuple[list[str], Tensor]], keys: list[int]) -> list[int]:
    if callable(selection):
        chosen = [key for (names, tensor), key in zip(named, keys, strict=True) if selection(names[0], tensor)]
        wanted = "the predicate"
    else:
        globs = [selection] if isinstance(selection, str) else list(selection)
        for glob in globs:
            if not any(fnmatchcase(name, glob) for names, _ in named for name in names):
                raise ParameterError(f"no parameter matches {glob!r}; {_some([names[0] for names, _ in named])}")
        chosen = [
            key
            for (names, _), key in zip(named, keys, strict=True)
            if any(fnmatchcase(name, glob) for name in names for glob in globs)
        ]
        wanted = repr(selection)
    if not chosen:
        raise ParameterError(f"no parameter matches {wanted}; {_some([names[0] for names, _ in named])}")
    return chosen


def _some(names: list[str], limit: int = 12) -> str:
    if not names:
        return "the model has no parameters"
    more = f", and {len(names) - limit} more" if len(names) > limit else ""
    return "the model has " + ", ".join(names[:limit]) + more
