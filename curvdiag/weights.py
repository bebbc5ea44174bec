"""A picture of a model's tensors, on which everything is computed."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from curvdiag.distributed import Ranks


@dataclass(frozen=True)
class Weights:
    """The tensors of a model at one moment.

    Attributes:
        chosen: The parameters of interest, as leaves of their own that gradients are taken in.
        fixed: All other parameters, by name.
        buffers: Buffers, by name; each forward pass gets copies, so that running statistics go nowhere.
        names: Names of ``chosen``.
    """

    chosen: tuple[Tensor, ...]
    fixed: dict[str, Tensor]
    buffers: dict[str, Tensor]
    names: tuple[str, ...]

    @classmethod
    def of(cls, model: nn.Module, names: Sequence[str], *, dtype: torch.dtype | None, share: bool) -> Weights:
        """The tensors that ``model`` holds now: copies (in ``dtype``), or with ``share`` its own memory."""
        # Embedding(max_norm=...) shrinks its weight during the forward pass, which must not reach the model.
        shrunk = {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None}

        def picture(tensor: Tensor) -> Tensor:
            if share and id(tensor) not in shrunk:
                return tensor.detach()
            return tensor.detach().to(dtype=dtype if tensor.dtype.is_floating_point else None, copy=True)

        with torch.inference_mode(False):
            own = set(names)
            parameters = dict(model.named_parameters(remove_duplicate=False))
            fixed = {name: picture(p) for name, p in model.named_parameters() if name not in own}
            buffers = {name: picture(b) for name, b in model.named_buffers()}
            chosen = tuple(picture(parameters[name]).requires_grad_() for name in names)
        return cls(chosen, fixed, buffers, tuple(names))

    def tensors(self) -> dict[str, Tensor]:
        """All of them by name, for one forward pass."""
        buffers = {name: buffer.clone() for name, buffer in self.buffers.items()}
        return {**self.fixed, **dict(zip(self.names, self.chosen, strict=True)), **buffers}

    def rounded(self, dtype: torch.dtype) -> Weights:
        """Copies of all of them in another floating-point type."""

        def copy(tensor: Tensor) -> Tensor:
            return tensor.detach().to(dtype if tensor.is_floating_point() else None, copy=True)

        fixed, buffers = ({n: copy(t) for n, t in own.items()} for own in (self.fixed, self.buffers))
        return Weights(tuple(copy(t).requires_grad_() for t in self.chosen), fixed, buffers, self.names)

    def replaced(self, chosen: Sequence[Tensor]) -> Weights:
        """The same picture with other values of the chosen parameters, as new leaves."""
        return Weights(tuple(t.detach().requires_grad_() for t in chosen), self.fixed, self.buffers, self.names)


SEEN = 1024
"""Entries of each tensor, evenly spread, by which weights of different ranks are told apart."""


def same_on_all(weights: Weights, ranks: Ranks) -> Weights:
    """The picture with the first rank's buffers; training leaves running statistics different on different ranks.

    Raises:
        DistributedError: The parameters differ.
    """
    remedy = "each rank needs the same weights: those of the first, as DistributedDataParallel gives them"
    ranks.agree("weights", checksum([*weights.chosen, *weights.fixed.values()]), remedy)
    shared = buffers_of_first(weights.buffers, ranks)
    return weights if shared is None else Weights(weights.chosen, weights.fixed, shared, weights.names)


def buffers_of_first(buffers: dict[str, Tensor], ranks: Ranks) -> dict[str, Tensor] | None:
    """Copies of the first rank's buffers; None where all ranks have the same."""
    if not buffers:
        return None
    if len(set(ranks.gather(checksum(list(buffers.values())), "comparison of buffers"))) == 1:
        return None
    return {name: ranks.first_(b.detach().clone(), "buffers of the first rank") for name, b in buffers.items()}


def checksum(tensors: Sequence[Tensor]) -> str:
    """A word that differs where some of the entries looked at do."""
    word = 0
    for tensor in tensors:
        flat = tensor.detach().reshape(-1)
        some = flat[:: max(1, -(-len(flat) // SEEN))].contiguous().cpu()
        word = zlib.crc32(some.view(torch.uint8).numpy().tobytes() if len(some) else b"", word)
    return f"{word:08x}"
