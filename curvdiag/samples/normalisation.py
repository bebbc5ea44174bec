"""Per-sample gradients of the scales and shifts of normalisations."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from curvdiag.samples.calls import Call, Names, NotCovered, precise
from curvdiag.samples.layout import by_sample


class Norm(Call):
    """A normalisation followed by a scale and a shift: gradients are ``sum delta * normalised`` and ``sum delta``."""

    roles: ClassVar[Names] = ("weight", "bias")
    defaults: ClassVar[dict[str, Any]] = {"weight": None, "bias": None}

    def rows(self, role: str, layout: str, which: slice) -> Tensor | None:
        parts = self._summed(self.delta, layout, which)
        if parts is None or role == "bias":
            return None if parts is None else self._reduce(parts)
        normalised = self._summed(self.normalised(), layout, which)
        assert normalised is not None
        return self._reduce(parts * normalised)

    def _summed(self, tensor: Tensor, layout: str, which: slice) -> Tensor | None:
        parts = by_sample(tensor, self.samples, layout, keep=self.kept())
        return None if parts is None else parts[which]

    def _reduce(self, parts: Tensor) -> Tensor:
        return parts.sum(1)

    def kept(self) -> int:
        """Trailing dimensions of an activation that do not hold samples or positions."""
        return self.given[next(iter(self.given))].ndim

    def normalised(self) -> Tensor:
        """The activations before scale and shift."""
        raise NotImplementedError


class LayerNorm(Norm):
    signature: ClassVar[Names] = ("input", "normalized_shape", "weight", "bias", "eps")
    defaults: ClassVar[dict[str, Any]] = {**Norm.defaults, "eps": 1e-5}

    def normalised(self) -> Tensor:
        return torch.layer_norm(
            self.activation("input"), self.arguments["normalized_shape"], None, None, self.arguments["eps"]
        )


class RMSNorm(Norm):
    signature: ClassVar[Names] = ("input", "normalized_shape", "weight", "eps")
    defaults: ClassVar[dict[str, Any]] = {**Norm.defaults, "eps": None}
    roles: ClassVar[Names] = ("weight",)

    def normalised(self) -> Tensor:
        # In the arguments' own precision, where the default eps is that of the type.
        x = self.arguments["input"].detach()
        return precise(torch.rms_norm(x, self.arguments["normalized_shape"], None, self.arguments["eps"]))


class ChannelNorm(Norm):
    """A norm with one scale for each channel: dimension 1."""

    def kept(self) -> int:
        return int(self.arguments["input"].ndim) - 1

    def _reduce(self, parts: Tensor) -> Tensor:
        return parts.sum([1, *range(3, parts.ndim)])


class GroupNorm(ChannelNorm):
    signature: ClassVar[Names] = ("input", "num_groups", "weight", "bias", "eps")
    defaults: ClassVar[dict[str, Any]] = {**Norm.defaults, "eps": 1e-5}

    def normalised(self) -> Tensor:
        return torch.group_norm(
            self.activation("input"), self.arguments["num_groups"], None, None, self.arguments["eps"]
        )


class BatchNorm(ChannelNorm):
    """With running statistics, that is in eval mode."""

    signature: ClassVar[Names] = (
        "input",
        "running_mean",
        "running_var",
        "weight",
        "bias",
        "training",
        "momentum",
        "eps",
    )
    defaults: ClassVar[dict[str, Any]] = {**Norm.defaults, "training": False, "eps": 1e-5}

    def prepare(self) -> None:
        if self.arguments["training"] or self.arguments["running_mean"] is None:
            raise NotCovered("statistics of the batch")

    def normalised(self) -> Tensor:
        mean, variance = (precise(self.arguments[name].detach()) for name in ("running_mean", "running_var"))
        return torch.batch_norm(
            self.activation("input"), None, None, mean, variance, False, 0.0, self.arguments["eps"], False
        )
