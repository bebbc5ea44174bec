"""Backward passes under FSDP2: a rank's gradient of the whole weights, and its shard of the mean of all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate

from curvdiag.errors import ArgumentError
from curvdiag.noise.backward_passes import BackwardPass, BackwardPasses, Hook
from curvdiag.noise.squares import Squares


class FSDPPasses(BackwardPasses):
    """Hooks on the gathered weights, and on their shards, which FSDP2 calls after it has put the mean there.

    FSDP2 registers the gathered weights, the same objects each time, on their modules before a forward pass. A pass has
    reduced if a shard was given its gradient in it. Only what FSDP2 documents is used.

    Args:
        model: With ``fully_shard`` applied.
        parameters: Shards to count.

    Raises:
        ArgumentError: The shards lie on different meshes, or on one that splits single weights too.
    """

    def __init__(self, model: nn.Module, parameters: list[nn.Parameter], heard: Callable[[BackwardPass], None]) -> None:
        super().__init__(model, heard)
        self.parameters = parameters
        mesh, self._copies = _mesh_of(parameters)
        self.groups = [mesh.get_group(dim) for dim in range(mesh.ndim)]
        self.ranks = mesh.size()
        self.device = torch.device(mesh.device_type)
        if mesh.device_type != "cpu":
            self.device = torch.device(mesh.device_type, torch.accelerator.current_device_index())
        self._arrived = False
        self._accumulates = False
        self._shards = sharded_parameters(model)
        self._following: set[int] = set()
        counted = {id(p) for p in parameters}
        for module in model.modules():
            if isinstance(module, FSDPModule):
                places = _places(module, counted)
                self.keep(module.register_forward_pre_hook(Hook(self._gathered(places))))

    def _gathered(self, places: list[tuple[nn.Module, str, bool]]) -> Callable[..., None]:
        def listen(*_: Any) -> None:
            for module, name, counted in places:
                weight = getattr(module, name)
                if not isinstance(weight, DTensor):  # a shard where it was not gathered
                    self.listen(weight, counted)

        return listen

    def _forward(self) -> None:
        self._arrived = False
        for shard in self._shards:
            if shard.requires_grad and id(shard) not in self._following:
                self._following.add(id(shard))
                self.keep(shard.register_post_accumulate_grad_hook(Hook(self._arrival)))

    def _arrival(self, _: Tensor) -> None:
        if self._accumulating():
            self._arrived = True

    def _is_fresh(self) -> bool:
        # Gradients that wait for their reduction are kept elsewhere.
        return not self._accumulates and super()._is_fresh()

    def _has_reduced(self) -> bool:
        reduced, self._arrived = self._arrived, False
        self._accumulates = not reduced
        return reduced

    def _reduced(self) -> Tensor | None:
        squares = Squares()
        for shard in self.parameters:
            if isinstance(shard.grad, DTensor):
                squares.add(shard.grad.to_local())
        total = squares.total()
        return None if total is None else total / self._copies


def sharded_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters whose gradients FSDP2 averages."""
    return [p for p in model.parameters() if isinstance(p, DTensor)]


def _places(module: nn.Module, counted: set[int]) -> list[tuple[nn.Module, str, bool]]:
    """Where the weights of this module stand that no module of FSDP2 within it has for its own; and if they count."""
    found = [
        (module, name, id(p) in counted) for name, p in module.named_parameters(recurse=False) if isinstance(p, DTensor)
    ]
    for child in module.children():
        if not isinstance(child, FSDPModule):
            found += _places(child, counted)
    return found


def _mesh_of(parameters: list[nn.Parameter]) -> tuple[Any, int]:
    """The mesh over which gradients are averaged, and how many of its ranks hold the same shard."""
    meshes = {p.device_mesh for p in parameters if isinstance(p, DTensor)}
    if len(meshes) != 1:
        raise ArgumentError(
            "the shards lie on different device meshes, whose gradients are means over different ranks; give an "
            "optimizer of the parameters on one of them"
        )
    mesh = meshes.pop()
    for parameter in parameters:
        assert isinstance(parameter, DTensor)
        whole = [isinstance(placement, Replicate) for placement in parameter.placements]
        if whole not in ([False], [True], [True, False]):
            raise ArgumentError(
                f"a parameter is spread as {parameter.placements} over a mesh of {mesh.ndim} dimensions: the ranks' "
                "own gradients are known for fully_shard over one dimension, or over two of which the first replicates"
            )
    copies = mesh.size(0) if mesh.ndim == 2 or whole == [True] else 1
    return mesh, copies
