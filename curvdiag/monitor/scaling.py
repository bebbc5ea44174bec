"""By what an optimizer divides its steps: the diagonal preconditioner ``D`` of its present step."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, Optimizer

from curvdiag.errors import ArgumentError, NonFiniteError
from curvdiag.monitor.training import as_number
from curvdiag.objective import Objective

NAMED = 5
"""Names of parameters in a note, at most."""


@dataclass(frozen=True)
class Scaling:
    """``D`` of an optimizer whose step is ``theta <- theta - lr * m / D``, over an objective's parameters.

    Attributes:
        diagonal: ``D`` ``[P]``, not negative, in single precision at least. Infinite where the optimizer moves nothing.
        held: Names of the parameters that it does not move: those of no group, frozen ones, and those that no step has
            reached yet.
        optimizer: Its name.
    """

    diagonal: Tensor
    held: tuple[str, ...]
    optimizer: str

    def inverse_root(self, dtype: torch.dtype) -> Tensor:
        """``D^(-1/2)`` ``[P]`` in ``dtype``; zero where the optimizer moves nothing.

        That includes the entries whose ``D`` is zero, or so small that ``1 / D`` is infinite in ``dtype``: the step is
        0 / 0 there, which optimizers without an epsilon take for none, and no eigenvalue could be told.
        """
        usable = self.diagonal.to(dtype) > 1 / torch.finfo(dtype).max
        return torch.where(usable, self.diagonal.to(dtype).rsqrt(), 0.0)

    @property
    def notes(self) -> list[str]:
        """What a reader of a number should know that was measured with it."""
        if not bool(self.diagonal.isfinite().any()):
            return [f"{self.optimizer} has moved none of the parameters so far: its D is known after the first step"]
        notes = []
        if self.held:
            more = f" and {len(self.held) - NAMED} more" if len(self.held) > NAMED else ""
            notes.append(f"{self.optimizer} does not move {', '.join(self.held[:NAMED])}{more}: held fixed")
        if zeros := int((self.diagonal == 0).sum()):
            notes.append(f"D of {self.optimizer} is zero in {zeros:,} entries: held fixed")
        return notes


def optimizer_scaling(objective: Objective, optimizer: Optimizer) -> Scaling:
    """``D`` of the step that ``optimizer`` took last, over the parameters of ``objective``.

    - An optimizer with a method ``preconditioner() -> {parameter: D}`` says it itself; what it leaves out is not moved.
    - ``torch.optim.SGD``: ones, with momentum of either kind, from the beginning.
    - ``torch.optim.Adam`` and ``AdamW``, fused or not: ``sqrt(v / (1 - beta2^t)) + eps``, with ``amsgrad`` of the
      largest ``v``. The other bias correction, ``1 - beta1^t``, belongs to the rate and soon is 1.

    Learning rates and weight decay are not part of ``D``.

    Raises:
        ArgumentError: The optimizer's ``D`` is not known, it holds none of these parameters, or its ``preconditioner``
            gives something else than a non-negative tensor in the shape of each parameter.
        NonFiniteError: ``D`` is NaN somewhere.
    """
    live = dict(objective.model.named_parameters(remove_duplicate=False))
    groups = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    kind = type(optimizer).__name__
    if not any(id(live[name]) in groups for name in objective.parameters.names):
        raise ArgumentError(
            f"{kind} holds none of the {len(objective.parameters)} parameters of the objective: attach the optimizer "
            "that moves them, or make it anew where the model's weights were replaced after it was made"
        )
    rows, held = [], []
    with torch.no_grad():
        diagonal_of = _diagonals(optimizer)
        for name, shape in zip(objective.parameters.names, objective.parameters.shapes, strict=True):
            parameter = live[name]
            moved = id(parameter) in groups and parameter.requires_grad
            found = diagonal_of(parameter, groups[id(parameter)]) if moved else None
            if found is None:
                held.append(name)
                rows.append(torch.full(shape, torch.inf, device=objective.device))
            else:
                rows.append(_checked(found, shape, f"{kind} in {name!r}").to(objective.device))
    return Scaling(objective.parameters.flatten(rows), tuple(held), kind)


def require_scaling(optimizer: Optimizer) -> None:
    """Refuse an optimizer whose ``D`` is not known, before a training run finds out.

    Raises:
        ArgumentError: It is none of those that :func:`optimizer_scaling` knows.
    """
    if not (_says_itself(optimizer) or steps_as(optimizer, SGD) or steps_as(optimizer, Adam)):
        raise ArgumentError(
            f"it is not known by what {type(optimizer).__name__} divides its steps: leave preconditioned_lambda_max "
            "out, or give the optimizer a method preconditioner() that returns {parameter: D}, where its step is "
            "theta - lr * m / D. torch.optim.SGD, Adam and AdamW are known without one"
        )


def _diagonals(optimizer: Optimizer) -> Callable[[Tensor, dict[str, Any]], Tensor | None]:
    """A function that gives ``D`` of one parameter in its group; None where no step has reached it."""
    require_scaling(optimizer)
    if _says_itself(optimizer):
        given = optimizer.preconditioner()  # type: ignore[attr-defined]
        if not isinstance(given, Mapping):
            kind = type(optimizer).__name__
            raise ArgumentError(f"{kind}.preconditioner() returns a dict of parameters, not {type(given).__name__}")
        by_identity = {id(parameter): diagonal for parameter, diagonal in given.items()}
        return lambda parameter, group: by_identity.get(id(parameter))
    if steps_as(optimizer, SGD):
        return lambda parameter, group: torch.ones_like(parameter)
    # Not optimizer.state[parameter]: asking a defaultdict would leave an empty entry behind.
    return lambda parameter, group: _adam(optimizer.state.get(parameter), group)


def _adam(state: Mapping[str, Any] | None, group: Mapping[str, Any]) -> Tensor | None:
    steps = as_number(state.get("step")) if state else None
    if not state or not steps:  # a fused step that GradScaler refused leaves a state of zero steps
        return None
    square = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
    beta2, eps = float(group["betas"][1]), float(group["eps"])
    return (_wide(square) / (1 - beta2**steps)).sqrt() + eps


def _says_itself(optimizer: Optimizer) -> bool:
    return callable(getattr(optimizer, "preconditioner", None))


def steps_as(optimizer: Optimizer, kind: type[Optimizer]) -> bool:
    """Whether its step is that of ``kind``, and not one of a subclass that does something else."""
    return isinstance(optimizer, kind) and inspect.unwrap(type(optimizer).step) is inspect.unwrap(kind.step)


def _checked(diagonal: Any, shape: torch.Size, where: str) -> Tensor:
    if not isinstance(diagonal, Tensor) or diagonal.shape != shape or diagonal.is_complex():
        given = f"{diagonal.dtype} {tuple(diagonal.shape)}" if isinstance(diagonal, Tensor) else repr(diagonal)
        raise ArgumentError(f"D of {where} is a real tensor of shape {tuple(shape)}, not {given}")
    if bool(diagonal.isnan().any()):
        raise NonFiniteError(f"D of {where} holds NaN")
    if bool((diagonal < 0).any()):
        raise ArgumentError(f"D of {where} holds negative numbers: its step is theta - lr * m / D with D >= 0")
    return _wide(diagonal.detach())


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
