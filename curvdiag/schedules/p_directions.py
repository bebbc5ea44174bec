"""The directions that an optimizer would take at several ``p``, as rows over one flat vector."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from curvdiag.errors import ArgumentError
from curvdiag.objective import Objective
from curvdiag.optim.direction import dual_norm, exponent, lp_direction

MOMENTUM = "momentum_buffer"


@dataclass(frozen=True)
class Layout:
    """Where the parameters of an optimizer lie in a flat vector.

    Attributes:
        size: ``P``.
        parts: For each parameter group, its parameters and where each lies.
    """

    size: int
    parts: tuple[tuple[tuple[Tensor, slice], ...], ...]

    @classmethod
    def of(cls, optimizer: Optimizer, objective: Objective | None) -> Layout:
        """The layout of the objective's vectors; without one, the parameters in the order of the groups.

        Raises:
            ArgumentError: The optimizer moves none of the objective's parameters.
        """
        groups = [group["params"] for group in optimizer.param_groups]
        if objective is None:
            sizes = [parameter.numel() for group in groups for parameter in group]
            ends = iter(torch.tensor(sizes).cumsum(0).tolist())
            parts = tuple(tuple((p, slice((e := next(ends)) - p.numel(), e)) for p in group) for group in groups)
            return cls(sum(sizes), parts)
        named = dict(objective.model.named_parameters(remove_duplicate=False))
        layout = objective.parameters
        where = {id(named[name]): place for name, place in zip(layout.names, layout.slices, strict=True)}
        parts = tuple(tuple((p, where[id(p)]) for p in group if id(p) in where) for group in groups)
        if not any(parts):
            raise ArgumentError(
                "the optimizer moves none of the objective's parameters: make both from the same model, and the "
                "optimizer after the model is on its device"
            )
        return cls(layout.size, parts)

    def directions(
        self,
        optimizer: Optimizer,
        gradient: Tensor,
        grid: Sequence[float],
        groups: Collection[int],
        p_max: Sequence[float],
    ) -> Tensor:
        """Rows ``[k, P]``, one for each ``p`` of the grid, zero outside ``groups`` and where nothing moves.

        A group takes no ``p`` above its ``p_max``. Within a row each group counts with its learning rate. What is
        followed is the momentum where there is one, else the gradient.

        Raises:
            ArgumentError: The gradient has another size.
        """
        if gradient.shape != (self.size,):
            raise ArgumentError(f"the gradient is a vector of {self.size} entries, not {tuple(gradient.shape)}")
        rows = gradient.new_zeros(len(grid), self.size)
        rates = {index: float(optimizer.param_groups[index]["lr"]) for index in groups}
        fastest = max(rates.values())
        for index, rate in rates.items():
            group = optimizer.param_groups[index]
            places = [place for _, place in self.parts[index]]
            followed = [_followed(optimizer, parameter, gradient[place]) for parameter, place in self.parts[index]]
            share = rate / fastest if fastest > 0 else 1.0  # a warm-up may begin at zero
            for row, wanted in zip(rows, grid, strict=True):
                p = min(wanted, p_max[index])
                scale = share * float(dual_norm(followed, p)) ** exponent(p) if group.get("dual_norm") else share
                for place, vector in zip(places, followed, strict=True):
                    torch.mul(lp_direction(vector, p, eps=group.get("eps", 1e-8)), scale, out=row[place])
        return rows


def _followed(optimizer: Optimizer, parameter: Tensor, gradient: Tensor) -> Tensor:
    momentum = optimizer.state.get(parameter, {}).get(MOMENTUM)
    return gradient if momentum is None else momentum.detach().reshape(-1).to(gradient)
