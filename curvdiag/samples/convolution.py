"""Per-sample gradients of convolutions, from patches of the input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn import grad as convolutions

from curvdiag.samples import totals
from curvdiag.samples.calls import Call, Names, NotCovered
from curvdiag.samples.layout import by_sample
from curvdiag.samples.totals import Totals

LARGE = 100
"""Positions in an image from which on, on a CPU, the library's own kernel is faster than patches and a product."""

_WEIGHT: dict[int, Callable[..., Tensor]] = {
    1: convolutions.conv1d_weight,
    2: convolutions.conv2d_weight,
    3: convolutions.conv3d_weight,
}


class Convolution(Call):
    """In one, two or three dimensions: the gradient of the weight is ``delta`` times the patches of the input."""

    signature: ClassVar[Names] = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    roles: ClassVar[Names] = ("weight", "bias")
    defaults: ClassVar[dict[str, Any]] = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1}

    def prepare(self) -> None:
        arguments = self.arguments
        weight = arguments["weight"]
        self.dims = weight.ndim - 2
        if arguments["input"].ndim != weight.ndim or weight.dtype.is_complex:
            raise NotCovered("a convolution without a batch")
        self.kernel = tuple(weight.shape[2:])
        self.stride, self.dilation = self._each(arguments["stride"]), self._each(arguments["dilation"])
        self.groups = arguments["groups"]
        reach = [d * (k - 1) for d, k in zip(self.dilation, self.kernel, strict=True)]
        padding = arguments["padding"]
        if padding == "valid":
            padding = 0
        if padding == "same":
            self.padding = [(r // 2, r - r // 2) for r in reach]
        else:
            self.padding = [(p, p) for p in self._each(padding)]
        self._arranged: tuple[str, Tensor, Tensor] | None = None

    def forget(self) -> None:
        super().forget()
        self._arranged = None

    def _each(self, value: Any) -> tuple[int, ...]:
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * self.dims if len(values) == 1 else values

    def _pair(self, layout: str) -> tuple[Tensor, Tensor] | None:
        """``delta`` as ``[B, R, O, L]`` and the input as ``[B, R, C, ...]``, R images to a sample."""
        if self._arranged is None or self._arranged[0] != layout:
            x = by_sample(self.activation("input"), self.samples, layout, keep=self.dims + 1)
            delta = by_sample(self.delta, self.samples, layout, keep=self.dims + 1)
            if x is None or delta is None or delta.shape[2] != self.arguments["weight"].shape[0]:
                return None
            self.positions = delta.shape[3:]
            self._arranged = layout, delta.flatten(3), x
        return self._arranged[1:]

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        pair = self._pair(layout)
        if pair is None:
            return None
        delta, x = pair[0][which], pair[1][which]
        if role == "bias":
            return delta.sum((1, 3))
        samples, images = delta.shape[:2]
        if delta.shape[3] >= LARGE and delta.device.type == "cpu":
            return self._grouped(delta, x)
        patches = self.patches(x.flatten(0, 1))  # [b R, C k, L]
        delta = delta.flatten(0, 1)
        if self.groups > 1:
            delta = delta.unflatten(1, (self.groups, -1)).flatten(0, 1)
            patches = patches.unflatten(1, (self.groups, -1)).flatten(0, 1)
        # Both with positions last in memory, the form that matrix products like best.
        rows = torch.mm(delta[0], patches[0].T) if len(delta) == 1 else torch.bmm(delta, patches.transpose(1, 2))
        if images > 1:
            rows = rows.view(samples, images, -1).sum(1)
        return rows.view(samples, *self.given["weight"].shape)

    def _grouped(self, delta: Tensor, x: Tensor) -> Tensor:
        """Through the library's own kernel, with the channels of each image as a group."""
        samples, images = delta.shape[:2]
        even = all(before == after for before, after in self.padding)
        x = x.flatten(0, 1) if even else self._padded(x.flatten(0, 1))
        x = x.reshape(1, -1, *x.shape[2:])
        shape = self.given["weight"].shape
        rows = _WEIGHT[self.dims](
            x,
            [samples * images * shape[0], *shape[1:]],
            delta.reshape(1, -1, *self.positions),
            self.stride,
            [before for before, _ in self.padding] if even else [0] * self.dims,
            self.dilation,
            self.groups * samples * images,
        )
        return rows.view(samples, images, *shape).sum(1) if images > 1 else rows.view(samples, *shape)

    def _padded(self, x: Tensor) -> Tensor:
        flat = [p for pair in reversed(self.padding) for p in pair]
        return F.pad(x, flat) if any(flat) else x

    def totals(self, role: str, layout: str) -> Totals:
        if role == "weight":
            return super().totals(role, layout)
        rows = self.rows(role, layout, slice(0, self.samples))
        if rows is None:
            raise NotCovered("samples cannot be told apart")
        return totals.of_rows(rows)

    def patches(self, x: Tensor) -> Tensor:
        """What the kernel sees at each position ``[n, C k, L]`` of images ``[n, C, ...]``."""
        even = all(before == after for before, after in self.padding)
        if max(self.kernel) == 1 and even and not any(before for before, _ in self.padding):
            for d, stride in enumerate(self.stride):
                x = x[(slice(None),) * (2 + d) + (slice(None, None, stride),)]
            return x.flatten(2)
        if self.dims == 2 and even:
            padding = tuple(before for before, _ in self.padding)
            return F.unfold(x, self.kernel, self.dilation, padding, self.stride)
        x = self._padded(x)
        for d, (kernel, stride, dilation) in enumerate(zip(self.kernel, self.stride, self.dilation, strict=True)):
            x = x.unfold(2 + d, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        # [n, C, positions, kernel]
        order = [0, 1, *range(2 + self.dims, 2 + 2 * self.dims), *range(2, 2 + self.dims)]
        return x.permute(order).flatten(2 + self.dims).flatten(1, 1 + self.dims)
