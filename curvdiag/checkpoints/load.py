"""The weights of a checkpoint in a live model, and the model's own back again."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from curvdiag.checkpoints.match import differ, listed
from curvdiag.checkpoints.read import EXTRA_STATE
from curvdiag.errors import CheckpointError


@contextmanager
def weights_kept(model: nn.Module) -> Iterator[None]:
    """Whatever happens inside, the model leaves with the bits of parameters and buffers with which it came."""
    tensors = {id(t): t for t in [*model.parameters(), *model.buffers()]}
    kept = [(tensor, tensor.detach().clone()) for tensor in tensors.values()]
    states = {name: copy.deepcopy(s) for name, s in model.state_dict().items() if name.endswith(EXTRA_STATE)}
    try:
        yield
    finally:
        with torch.inference_mode(False), torch.no_grad():
            for tensor, before in kept:
                tensor.copy_(before)
            if states:
                model.load_state_dict(states, strict=False)


def load(model: nn.Module, weights: Mapping[str, Any]) -> None:
    """Put weights into a model, in place, in the model's own type and on its device.

    Every parameter and every persistent buffer must be there, under one of its names where it has several (tied
    weights); what the model keeps out of its own checkpoints, or names as not to be expected, may be.

    Raises:
        CheckpointError: They do not fit; the message lists what is missing, not expected, or of another shape. The
            model may then hold some of them.
    """
    own = model.state_dict()
    wrong = [
        f"{name} is {described(weights[name])} and {described(tensor)} in the model"
        for name, tensor in own.items()
        if isinstance(tensor, Tensor) and name in weights and not fits(weights[name], tensor)
    ]
    refused = {name for name, tensor in own.items() if name in weights and not fits(weights[name], tensor)}
    tied = [names for names in names_of_tensors(model) if len(names) > 1]
    apart = [
        f"{one} and {other}"
        for one, *others in tied
        for other in others
        if {one, other} <= weights.keys() - refused and differ({"": weights[one]}, {"": weights[other]}, [""])
    ]
    with torch.inference_mode(False), torch.no_grad():
        try:
            found = model.load_state_dict({n: t for n, t in weights.items() if n not in refused}, strict=False)
        except Exception as error:  # a module's own way of loading may raise anything
            raise CheckpointError(f"cannot be loaded into the model: {error}") from error
    elsewhere = {name for names in names_of_tensors(model) if weights.keys() & set(names) for name in names}
    missing = [name for name in found.missing_keys if name not in elsewhere | refused and expected(name)]
    optional = {name for name, _ in model.named_buffers()}
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    unexpected = [
        name
        for name in found.unexpected_keys
        if name not in optional and not any(re.search(pattern, name) for pattern in ignored)
    ]
    faults = [
        f"{len(names)} {what}: {listed(names, '')}"
        for what, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("of another shape or kind", wrong),
            ("tied in the model and different here", apart),
        )
        if names
    ]
    if faults:
        raise CheckpointError(
            f"does not fit the model; of {len(own)} tensors {'; '.join(faults)}. "
            "Build the model in the task as the run had it"
        )


def names_of_tensors(model: nn.Module) -> list[list[str]]:
    """For each parameter and buffer all names that the model has for it."""
    names: dict[int, list[str]] = {}
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    for name, tensor in everything:
        names.setdefault(id(tensor), []).append(name)
    return list(names.values())


def expected(name: str) -> bool:
    """Whether weights without this one are not whole; BatchNorm's count of batches changes nothing in eval mode."""
    return not name.endswith("num_batches_tracked")


def fits(given: Any, own: Any) -> bool:
    """The same shape, and both floating, or both of another one and the same kind."""
    if not (isinstance(given, Tensor) and isinstance(own, Tensor)):
        return not isinstance(own, Tensor)
    kinds = given.is_floating_point(), own.is_floating_point()
    return given.shape == own.shape and (all(kinds) or (not any(kinds) and given.is_complex() == own.is_complex()))


def described(given: Any) -> str:
    if not isinstance(given, Tensor):
        return f"a {type(given).__name__}"
    return f"{str(given.dtype).removeprefix('torch.')} {list(given.shape)}"
