"""What the optimizers share: ``theta <- (1 - lr weight_decay) theta - lr u``, for any direction ``u``."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from curvdiag.errors import ArgumentError
from curvdiag.optim.buckets import Row, buckets
from curvdiag.optim.direction import Direction, exponent, widened


@dataclass(frozen=True)
class _Work:
    """One parameter group at one step: what has a gradient, and where it goes."""

    group: dict[str, Any]
    rows: list[Row]
    direction: Direction


class DirectionOptimizer(Optimizer):
    """Base of the optimizers: a subclass says which direction a group's gradients give.

    Everything is checked, for all groups, before the first weight changes. Weight decay is decoupled, and computed as
    ``theta - lr (u + weight_decay theta)``: the same but for rounding, in one pass less over the weights, which are
    rounded once (a ``1 - lr weight_decay`` next to one would often be lost in half precision).

    With ``foreach``, on unless told otherwise, the tensors are worked through in parts: slices and lists that stay in a
    CPU's cache, or keep the launches on an accelerator few and the temporaries small. Subclasses of tensors are always
    taken one by one, as all are with ``differentiable=True``. A step does not wait for the device, unless a learning
    rate that is a tensor lies on another one than the parameters.
    """

    moment: ClassVar[str] = ""
    """Key of the one tensor that the state holds for each parameter, in its dtype, where there is one."""
    differentiates: ClassVar[bool] = False

    def __init__(self, params: ParamsT, defaults: dict[str, Any]) -> None:
        self.defaults = defaults
        self._check(defaults, "")
        super().__init__(params, defaults)

    @abstractmethod
    def _direction(self, group: dict[str, Any], gradients: list[Tensor]) -> Direction:
        """The direction of this step, from the group's options and all of its gradients."""

    def _advance(self, group: dict[str, Any]) -> None:
        """Called after a group's step."""

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One step.

        Args:
            closure: Evaluates the model again, with gradients, and returns the loss.

        Returns:
            What the closure returned.

        Raises:
            ArgumentError: A sparse gradient, or a ``p`` that has become less than 2. Nothing has changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            for work in [self._work(number, group) for number, group in enumerate(self.param_groups)]:
                self._follow(work)
                self._advance(work.group)
        return loss

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters with options of its own, as in torch.

        Raises:
            ArgumentError: An option is out of range, or a parameter is complex. The group is not added then.
        """
        where = f", parameter group {len(self.param_groups)}"
        if isinstance(param_group, dict):
            self._check({**self.defaults, **param_group}, where)
        super().add_param_group(param_group)
        for number, parameter in enumerate(self.param_groups[-1]["params"]):
            if parameter.is_complex():
                self.param_groups.pop()
                raise ArgumentError(
                    f"{type(self).__name__}{where}: parameter {number} of shape {tuple(parameter.shape)} is complex; "
                    f"make torch.view_as_real of it the parameter"
                )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # Options that a checkpoint lacks: it is older, or of another optimizer.
        for group in self.param_groups:
            for key, value in self.defaults.items():
                group.setdefault(key, value)

    def _work(self, number: int, group: dict[str, Any]) -> _Work:
        where = f"{type(self).__name__}, parameter group {number}"
        rows: list[Row] = []
        for place, parameter in enumerate(group["params"]):
            gradient = parameter.grad
            if gradient is None:
                continue
            if gradient.layout != torch.strided:
                raise ArgumentError(
                    f"{where}: the gradient of parameter {place} of shape {tuple(parameter.shape)} is sparse; make it "
                    f"dense (sparse=False in an embedding), or give this parameter to another optimizer"
                )
            rows.append((parameter, gradient, self._moment(parameter)) if self.moment else (parameter, gradient))
        try:
            direction = self._direction(group, [row[1] for row in rows])
        except ArgumentError as error:
            raise ArgumentError(f"{where}: {error}") from None
        return _Work(group, rows, direction)

    def _moment(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if self.moment not in state:
            state[self.moment] = torch.zeros_like(parameter, memory_format=torch.preserve_format).detach()
        elif self.defaults["differentiable"]:
            state[self.moment] = state[self.moment].clone()  # The graph of the last step keeps that one.
        return state[self.moment]

    def _follow(self, work: _Work) -> None:
        group, rates, decay = work.group, _Rates(work.group), work.group["weight_decay"]
        together = not group["differentiable"] if group["foreach"] is None else group["foreach"]
        for parameters, gradients, *moments in buckets(work.rows, together=together):
            rate = rates[parameters[0].device]
            if group["maximize"]:
                gradients = list(torch._foreach_neg(gradients))
            found = work.direction(gradients, *moments)
            if decay != 0:
                weights = [widened(parameter) for parameter in parameters]
                if any(found is kept for kept in (gradients, *moments)):
                    found = [widened(one.clone()) for one in found]
                torch._foreach_add_(found, weights, alpha=decay)
            if isinstance(rate, Tensor):
                torch._foreach_sub_(parameters, torch._foreach_mul(found, rate))
            else:
                torch._foreach_add_(parameters, found, alpha=-rate)

    def _check(self, options: dict[str, Any], where: str) -> None:
        """Raise an ArgumentError where an option is out of range."""
        name = f"{type(self).__name__}{where}"
        rate = options["lr"]
        if isinstance(rate, Tensor):
            if rate.numel() != 1:
                raise ArgumentError(f"{name}: lr as a tensor must hold one number, not {rate.numel()}")
            rate = rate.item()
        for key, value in (("lr", rate), *((key, options[key]) for key in ("eps", "weight_decay") if key in options)):
            if not isinstance(value, Real) or not 0 <= float(value) < math.inf:
                raise ArgumentError(f"{name}: {key} must be a finite number of at least 0, not {value!r}")
        for beta in (*options.get("betas", ()), *((options["beta"],) if "beta" in options else ())):
            if not isinstance(beta, Real) or not 0 <= float(beta) < 1:
                raise ArgumentError(f"{name}: beta must be a number in [0, 1), not {beta!r}")
        if "p" in options:
            try:
                exponent(options["p"])
            except ArgumentError as error:
                raise ArgumentError(f"{name}: {error}") from None
        if options["differentiable"]:
            if not self.differentiates or options.get("dual_norm"):
                what = " with the factor ||g||_q" if self.differentiates else ""
                raise ArgumentError(f"{name}: its step{what} cannot be differentiated; leave out differentiable=True")
            if options["foreach"]:
                raise ArgumentError(f"{name}: foreach and differentiable exclude each other; leave one of them out")


class _Rates(dict[torch.device, "float | Tensor"]):
    """The learning rate of a group on each device; a tensor where asking for its value would wait for the device."""

    def __init__(self, group: dict[str, Any]) -> None:
        super().__init__()
        self.rate, differentiable = group["lr"], group["differentiable"]
        if isinstance(self.rate, Tensor):
            self.rate = self.rate.reshape(())
            if self.rate.device.type == "cpu" and not differentiable and not torch.compiler.is_compiling():
                self.rate = self.rate.item()

    def __missing__(self, device: torch.device) -> float | Tensor:
        self[device] = self.rate.to(device) if isinstance(self.rate, Tensor) else self.rate
        return self[device]
