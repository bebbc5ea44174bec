"""Per-sample gradients of embeddings, by pairs of a sample and a token."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from curvdiag.samples.calls import Call, Names, NotCovered
from curvdiag.samples.layout import by_sample
from curvdiag.samples.totals import Totals


class Embed(Call):
    """Rows of a table, by token."""

    signature: ClassVar[Names] = (
        "input",
        "weight",
        "padding_idx",
        "max_norm",
        "norm_type",
        "scale_grad_by_freq",
        "sparse",
    )
    roles: ClassVar[Names] = ("weight",)
    defaults: ClassVar[dict[str, Any]] = {"padding_idx": None, "scale_grad_by_freq": False}

    def prepare(self) -> None:
        if self.arguments["scale_grad_by_freq"]:
            raise NotCovered("gradients scaled by the frequency of tokens")

    def _pairs(self, layout: str) -> tuple[Tensor, Tensor] | None:
        """Tokens ``[B, R]`` and ``delta`` ``[B, R, d]``, zero at padding."""
        tokens = by_sample(self.arguments["input"], self.samples, layout, keep=0)
        delta = by_sample(self.delta, self.samples, layout, keep=1)
        if tokens is None or delta is None:
            return None
        padding = self.arguments["padding_idx"]
        if padding is not None:
            padding = padding % len(self.given["weight"])
            delta = delta * (tokens != padding).unsqueeze(-1)
        return tokens, delta

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        pairs = self._pairs(layout)
        if pairs is None:
            return None
        tokens, delta = pairs[0][which], pairs[1][which]
        rows = delta.new_zeros(len(delta), *self.given[role].shape)
        index = tokens.unsqueeze(-1).expand(delta.shape)
        return rows.scatter_add_(1, index, delta)

    def totals(self, role: str, layout: str) -> Totals:
        pairs = self._pairs(layout)
        if pairs is None:
            raise NotCovered("samples cannot be told apart")
        tokens, delta = pairs
        shape = self.given[role].shape
        keys = tokens + shape[0] * torch.arange(len(tokens), device=tokens.device).unsqueeze(1)
        unique, inverse = torch.unique(keys, return_inverse=True)  # pairs of a sample and a token
        sums = delta.new_zeros(len(unique), shape[1]).index_add_(0, inverse.flatten(), delta.flatten(0, 1))
        squares = sums.square()
        which = unique % shape[0]
        first = sums.new_zeros(shape).index_add_(0, which, sums)
        second = sums.new_zeros(shape).index_add_(0, which, squares)
        norms = sums.new_zeros(self.samples).index_add_(0, unique // shape[0], squares.sum(1))
        return Totals(first, second, norms)
