"""Whether a graph can be differentiated twice, and whether what looks like a zero is one.

PyTorch's own operations have a right second derivative or raise, with few exceptions (the fused ``weight_norm``, which
the sandbox replaces); a wrong one shows as a Hessian that is not symmetric. What hides one is custom: an
``autograd.Function`` whose backward pass is not differentiable, reentrant checkpointing, a detached value.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.utils.checkpoint
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from curvdiag.data import Batch, tensors_of
from curvdiag.errors import CurvdiagWarning, LossError, NonFiniteError, SecondDerivativeError
from curvdiag.gradients import gradient
from curvdiag.objective import Objective
from curvdiag.operators.finite_difference import FiniteDifferenceEngine
from curvdiag.weights import Weights

_REMEDY = "write its backward pass with differentiable operations, or use Hessian(method='finite-difference')"


def check_nodes(
    objective: Objective,
    loss: Tensor,
    parameters: Mapping[str, Tensor],
    rerun: Callable[[], Tensor],
    *,
    of_model: bool = True,
) -> bool:
    """Refuse functions that cannot be differentiated twice; warn once of those that might hide a dependence.

    Args:
        parameters: The model's own, which the graph of its copies must not contain.
        rerun: Repeats the forward pass, to find out which module a function belongs to.
        of_model: The model's own second derivative is needed; without it no custom function is warned of.

    Returns:
        Whether there is a function of which this is the first warning.

    Raises:
        SecondDerivativeError: Reentrant checkpointing, or a function marked once-differentiable.
        LossError: The loss uses a parameter of the live model behind the model's back.
    """
    warned: dict[type, str] = objective.__dict__.setdefault("_warned_functions", {})
    before = len(warned)
    live = {id(parameter): name for name, parameter in parameters.items()}
    for node in walk(loss.grad_fn, set()):
        held = live.get(id(getattr(node, "variable", None)))
        if held is not None:
            raise LossError(
                f"the loss uses the parameter {held!r} itself, from a list or closure, and not through the model that "
                "it is given: its curvature would be missed; take it from the model inside loss(model, batch)"
            )
        if not isinstance(node, BackwardCFunction):
            continue
        function: Any = node._forward_cls  # type: ignore[attr-defined]
        if function is torch.utils.checkpoint.CheckpointFunction:
            raise SecondDerivativeError(
                f"reentrant checkpointing in {_owner(objective, function, rerun)} has no second derivative: use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False), or Hessian(method='finite-difference')"
            )
        backward = function.backward if function.vjp is torch.autograd.Function.vjp else function.vjp  # its alias
        code = getattr(backward, "__code__", None)
        if code is not None and code.co_filename == torch.autograd.function.__file__:
            raise SecondDerivativeError(
                f"{function.__name__} in {_owner(objective, function, rerun)} is marked once-differentiable: {_REMEDY}"
            )
        if of_model and function not in warned and not function.__module__.startswith("torch."):
            warned[function] = f"{function.__name__} in {_owner(objective, function, rerun)}"
            warnings.warn(
                f"the custom function {warned[function]} may hide a "
                "dependence from the second derivative (a detached value in its backward pass goes unseen); one "
                "product is compared with finite differences, which can tell only where the model is smooth",
                CurvdiagWarning,
                stacklevel=2,
            )
    return len(warned) > before


def check_against_differences(
    objective: Objective,
    weights: Weights,
    batch: Batch,
    dtype: torch.dtype | None,
    product: Callable[[Tensor], Tensor],
) -> None:
    """Compare one product with finite differences, where these are accurate enough to judge.

    Raises:
        SecondDerivativeError: They disagree by more than a tenth.
    """
    try:
        differences = FiniteDifferenceEngine(objective, weights, dtype, [batch], rtol=0.02, kinks=False)
    except (SecondDerivativeError, NonFiniteError):  # kinks, or a loss that overflows nearby: nothing can be said
        return
    vector = differences.random_vector()
    truth = differences.product(vector)
    error = float((product(vector) - truth).norm() / truth.norm().clamp_min(1e-300))
    if error > 0.1:
        raise SecondDerivativeError(
            f"{_suspects(objective)} hides a dependence from the second derivative: a product differs from finite "
            f"differences by {error:.0%} of its norm; {_REMEDY}"
        )


def _suspects(objective: Objective) -> str:
    return ", ".join(objective.__dict__.get("_warned_functions", {}).values()) or "a call of detach() or .data"


@contextmanager
def missing_derivatives() -> Iterator[None]:
    """PyTorch's own refusals to differentiate twice, with what to do about them."""
    try:
        yield
    except RuntimeError as error:
        if "is not implemented" in str(error) or "twice" in str(error):
            raise SecondDerivativeError(
                f"{str(error).splitlines()[0]}: an operation of the model or the loss has no second derivative; use "
                "another, or Hessian(method='finite-difference')"
            ) from error
        raise


def check_symmetry(
    objective: Objective, dtype: torch.dtype | None, product: Callable[[Tensor], Tensor], rtol: float | None = None
) -> bool:
    """``u . H v = v . H u`` for random vectors, which a wrong derivative somewhere breaks.

    Args:
        rtol: Asymmetry that is accepted, relative to the Frobenius norm; by default well above rounding.

    Returns:
        Whether there was anything to see: a Hessian of zeros tells nothing.

    Raises:
        SecondDerivativeError: They differ by more.
    """
    u, v = random_pair(objective, dtype)
    return compare_products(u, v, product, _dot_and_norm, rtol or symmetry_tolerance(u.dtype))


def random_pair(objective: Objective, dtype: torch.dtype | None) -> tuple[Tensor, Tensor]:
    """The vectors ``[P]`` with which symmetry is checked."""
    size, generator = objective.parameters.size, torch.Generator().manual_seed(1)
    u, v = (_random(size, generator).to(objective.device, dtype or objective.dtype) for _ in range(2))
    return u, v


def symmetry_tolerance(dtype: torch.dtype) -> float:
    """How far ``u . H v`` and ``v . H u`` may be apart, relative to the Frobenius norm: well above rounding."""
    return float(torch.finfo(dtype).eps ** 0.3)


def compare_products(
    u: Tensor,
    v: Tensor,
    product: Callable[[Tensor], Tensor],
    dot_and_norm: Callable[[Tensor, Tensor], tuple[float, float]],
    tolerance: float,
) -> bool:
    """``u . H v = v . H u`` for random vectors of variance 1, however they are held; as :func:`check_symmetry`."""
    # For entries of variance 1 |H v| is the Frobenius norm in the mean, and so is u . H v in the root mean square.
    forth, scale = dot_and_norm(u, product(v))
    back, other = dot_and_norm(v, product(u))
    error, scale = abs(forth - back), max(scale, other)
    if error > tolerance * scale:
        raise SecondDerivativeError(
            f"the Hessian is not symmetric (two products that must agree differ by {error / scale:.2g} of its norm): "
            "an operation of the model or the loss has a wrong first or second derivative (gradient reversal has no "
            "Hessian, nor has a backward pass written as that of another function); replace it, or leave it out of the "
            "measurement"
        )
    return scale > 0


def _random(size: int, generator: torch.Generator) -> Tensor:
    """Independent numbers of variance 1 and next to no mean, from a byte each: normal ones take three times as long."""
    words = torch.randint(-(2**63), 2**63 - 1, (-(-size // 8),), generator=generator)
    return words.view(torch.int8)[:size].float().mul_((12 / (256**2 - 1)) ** 0.5)


def _dot_and_norm(x: Tensor, y: Tensor) -> tuple[float, float]:
    return float(x @ y), float(y.norm())


def check_truly_zero(
    objective: Objective,
    weights: Weights,
    batches: list[Batch],
    positions: Sequence[int],
    dtype: torch.dtype | None,
) -> None:
    """Parameters that have a gradient but no second derivative: is the gradient really constant in them?

    A parameter that enters the loss linearly has true zeros there; then moving it changes no gradient at all.

    Raises:
        SecondDerivativeError: The gradient changes, so that a second derivative is missing.
    """
    known: set[str] = objective.__dict__.setdefault("_linear_parameters", set())
    suspects = [i for i in positions if weights.names[i] not in known]
    if not suspects:
        return
    before = gradient(objective, weights, batches, dtype).double()
    for i in suspects:
        moved = list(weights.chosen)
        noise = torch.randn(moved[i].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        size = 1e-2 * max(1.0, float(moved[i].detach().norm()))
        moved[i] = moved[i].detach() + (size * noise / noise.norm()).to(moved[i])
        after = gradient(objective, weights.replaced(tuple(moved)), batches, dtype).double()
        eps = torch.finfo(moved[i].dtype).eps
        if float((after - before).norm()) > 1e3 * eps * float(before.norm()):
            raise SecondDerivativeError(
                f"the gradient depends on {weights.names[i]!r}, yet the second backward pass does not see it: a value "
                f"is detached on the way, in its module or after it, by {_suspects(objective)}; {_REMEDY}"
            )
        known.add(weights.names[i])


def walk(root: Any, seen: set[Any]) -> Iterator[Any]:
    stack = [root]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(following for following, _ in node.next_functions)


def _owner(objective: Objective, function: type, rerun: Callable[[], Tensor]) -> str:
    """The innermost module whose forward pass applies ``function``.

    What is new in the graph when a module is entered was made by the one around it; what is new when it is left,
    by the module itself.
    """
    seen: set[Any] = set()
    active = ["the loss"]
    found: list[str] = []

    def credit(tensors: Any) -> None:
        for tensor in tensors_of(tensors):
            for node in walk(tensor.grad_fn, seen):
                if isinstance(node, BackwardCFunction) and node._forward_cls is function:  # type: ignore[attr-defined]
                    found.append(active[-1])

    def enter(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any) -> None:
            credit(inputs)
            active.append(f"the module {name!r}" if name else "the model itself")

        return hook

    def leave(module: Any, inputs: Any, outputs: Any) -> None:
        credit(outputs)
        active.pop()

    modules = list(objective.model.named_modules())
    handles = [module.register_forward_pre_hook(enter(name)) for name, module in modules]
    handles += [module.register_forward_hook(leave) for _, module in modules]
    try:
        rerun()
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss"
