"""How much of each layer of an objective lies in a parameter group."""

from __future__ import annotations

from typing import Any

from curvdiag.objective import Objective


class LayerWeights:
    """The layers of an objective, and what of them a parameter group holds.

    Attributes:
        sizes: Number of measured parameters of each layer, by name.
    """

    def __init__(self, objective: Objective) -> None:
        self._model, self._layers = objective.model, objective.parameters.layers()
        numels = dict(zip(objective.parameters.names, objective.parameters.numels, strict=True))
        self.sizes = {layer: sum(numels[name] for name in names) for layer, names in self._layers.items()}

    def of(self, group: dict[str, Any]) -> dict[str, float]:
        """How many parameters of each layer the group holds; without the layers of which it holds none."""
        held = {id(tensor): tensor.numel() for tensor in group["params"]}
        tensors = dict(self._model.named_parameters(remove_duplicate=False))
        counts = {
            layer: float(sum(held.get(id(tensors[name]), 0) for name in names)) for layer, names in self._layers.items()
        }
        return {layer: count for layer, count in counts.items() if count}
