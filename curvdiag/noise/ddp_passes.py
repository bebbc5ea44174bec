"""Backward passes under ``DistributedDataParallel``: a rank's gradient, and the mean of all ranks in its place."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from curvdiag.noise.backward_passes import BackwardPass, BackwardPasses
from curvdiag.noise.squares import Squares


class DDPPasses(BackwardPasses):
    """Hooks beside DDP's own, in front of its reduction; a communication hook of the user's stays what it is.

    Args:
        model: The wrapped model. It decides in the forward pass whether the next backward pass reduces, and so does
            this.
        parameters: Those to count.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        parameters: list[nn.Parameter],
        heard: Callable[[BackwardPass], None],
    ) -> None:
        super().__init__(model, heard)
        self.parameters = parameters
        self.groups = [model.process_group]
        self.ranks = model.process_group.size()
        self.device = parameters[0].device
        self._model = model
        self._reduces = False
        counted = {id(p) for p in parameters}
        for parameter in averaged_parameters(model):
            self.listen(parameter, id(parameter) in counted)

    @property
    def alone(self) -> bool:
        # Under join() the ranks without data answer DDP's own collectives only.
        return bool(getattr(getattr(self._model, "_join_config", None), "enable", False))

    def _forward(self) -> None:
        if self._model.require_backward_grad_sync:
            self._reduces = True

    def _has_reduced(self) -> bool:
        reduced, self._reduces = self._reduces, False
        return reduced

    def _reduced(self) -> Tensor | None:
        squares = Squares()
        for parameter in self.parameters:
            if parameter.grad is not None:
                squares.add(parameter.grad)
        total = squares.total()
        return None if total is None else total / self.ranks


def averaged_parameters(model: DistributedDataParallel) -> list[nn.Parameter]:
    """The parameters whose gradients DDP averages."""
    return [p for name, p in model.module.named_parameters() if name not in model.parameters_to_ignore]
