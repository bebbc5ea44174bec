"""What a checkpoint holds: weights by name, and what it says of its place in the training.

Nothing in a file is ever run: torch files are read with ``weights_only=True``.
"""

from __future__ import annotations

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from curvdiag.checkpoints.find import WEIGHTS, weights_file
from curvdiag.errors import CheckpointError
from curvdiag.extras import require
from curvdiag.monitor.training import optimizer_scalars

STEP_KEYS = ("global_step", "step", "global_steps", "iteration", "iter", "iter_num", "num_updates", "train_step")
EPOCH_KEYS = ("epoch", "current_epoch", "epochs")
OPTIMIZERS = ("optimizer_states", "optimizer_state_dict", "optimizer", "optimizer_state", "optim")
DEPTH = 3
"""So many mappings deep weights are looked for."""

ZIP = b"PK\x03\x04"
PICKLE, NEWEST = b"\x80", bytes([pickle.HIGHEST_PROTOCOL])
SAFETENSORS = b"\x00\x00{"
"""The end of the length of its header, and how that begins."""

EXTRA_STATE = "_extra_state"

MOST = 2**63
"""A run file holds steps below it."""


@dataclass(frozen=True)
class Contents:
    """A checkpoint as it was read.

    Attributes:
        path: Where from.
        groups: Tensors by name, for each place in the file that holds some: ``""`` the file itself, ``"state_dict"``,
            ``"model"``, ...
        step: Optimizer step that it says of itself.
        epoch: Epoch that it says of itself.
        scalars: ``train/lr/<group>`` and the like, as its optimizer has them.
    """

    path: Path
    groups: dict[str, dict[str, Any]]
    step: int | None = None
    epoch: float | None = None
    scalars: dict[str, float] = field(default_factory=dict)


def read(path: Path, *, weights: bool = True) -> Contents:
    """Read a checkpoint: a file of torch, safetensors or Lightning, an index of pieces, or a folder of Transformers.

    Args:
        weights: Without it only what costs little is read: the step, the epoch, and of torch files where tensors lie.

    Raises:
        CheckpointError: It is none of these, damaged, or holds what only running its code could read.
        MissingExtraError: It is a safetensors file, and that package is not installed.
    """
    try:
        return with_trainer_state(read_any(path, weights))
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror or error}") from error


def read_any(path: Path, weights: bool) -> Contents:
    if path.is_dir():
        inside = weights_file(path)
        if inside is None:
            raise CheckpointError(about_folder(path))
        found = read_any(inside, weights)
        return Contents(path, found.groups, found.step, found.epoch, found.scalars)
    if path.name.endswith(".index.json"):
        return read_index(path, weights)
    if path.suffix == ".safetensors":
        return read_safetensors(path, weights)
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError("is empty: it was never finished, or is being written now")
    if head[6:] == SAFETENSORS:  # first: the length before it may begin like a pickle
        return read_safetensors(path, weights)
    if head.startswith(ZIP) or (head.startswith(PICKLE) and head[1:2] <= NEWEST):
        return read_torch(path, mapped=head.startswith(ZIP))
    raise CheckpointError("is no checkpoint: neither a file of torch.save nor of safetensors")


# Files of torch


def read_torch(path: Path, *, mapped: bool) -> Contents:
    # Mapped, an optimizer's states, often twice the weights, are never read. A file that somebody cuts short between
    # here and the copy into the model ends the process; what was measured is kept.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of other pickle protocols and TorchScript; what matters is an error
            found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:
        raise CheckpointError(torch_refusal(error)) from error
    if not isinstance(found, Mapping):
        raise CheckpointError(f"holds a {type(found).__name__} and no weights by name")
    groups = dict(tensors_in(found, "", DEPTH))
    if not groups:
        names = ", ".join(repr(str(key)) for key in list(found)[:6])
        raise CheckpointError(f"holds no weights by name; it holds {names or 'nothing'}")
    several = any(isinstance(value, Tensor) and value.ndim for value in found.values())
    said = {key: value for key, value in found.items() if not (several and isinstance(value, Tensor))}
    return Contents(path, groups, whole_number(said, STEP_KEYS), number(said, EPOCH_KEYS), rates(found))


def torch_refusal(error: Exception) -> str:
    """In one line, why torch did not read a file, and what to do."""
    text = str(error)
    name = re.search(r"GLOBAL (\S+)", text)
    if isinstance(error, pickle.UnpicklingError) and name is not None:
        own = f"holds Python objects beside weights ({name[1]})"
        if "is blocked" in text:
            return f"{own} that could do harm; it was not read, and no code of it was run"
        return (
            f"{own}, and a checkpoint is read with weights_only=True, so that no code of it is run: save "
            "model.state_dict() instead, or allow the class in the module of the task, if you trust it: "
            "torch.serialization.add_safe_globals([...])"
        )
    if "TorchScript" in text:
        return "is a TorchScript program, which is not read: save model.state_dict() instead"
    if "central directory" in text or "EOF" in text or isinstance(error, EOFError | IndexError):
        return "is cut off or damaged: it was never finished, or is being written now"
    first = " ".join(text.rpartition("WeightsUnpickler error:")[2].split())[:120]
    return f"cannot be read as a file of torch.save: it is damaged or something else ({type(error).__name__}: {first})"


def tensors_in(found: Mapping[Any, Any], where: str, depth: int) -> list[tuple[str, dict[str, Any]]]:
    """Places in nested mappings that hold tensors by name, with these; the outermost first."""
    own = {key: value for key, value in found.items() if isinstance(key, str)}
    direct = {key: value for key, value in own.items() if isinstance(value, Tensor) or key.endswith(EXTRA_STATE)}
    groups = [(where, direct)] if any(isinstance(value, Tensor) for value in direct.values()) else []
    for key, value in own.items():
        if isinstance(value, Mapping) and depth and key not in OPTIMIZERS and not key.endswith(EXTRA_STATE):
            groups += tensors_in(value, f"{where}.{key}".lstrip("."), depth - 1)
    return groups


def rates(found: Mapping[Any, Any]) -> dict[str, float]:
    """Learning rate, momentum and p, as the optimizer of a checkpoint has them."""
    state = next((found[key] for key in OPTIMIZERS if key in found), None)
    state = state[0] if isinstance(state, list) and state else state
    groups = state.get("param_groups") if isinstance(state, Mapping) else None
    if not isinstance(groups, list) or not all(isinstance(group, Mapping) for group in groups):
        return {}
    return optimizer_scalars(SimpleNamespace(param_groups=groups))  # type: ignore[arg-type]


# safetensors, and weights in several files


def read_safetensors(path: Path, weights: bool) -> Contents:
    library = require("safetensors", extra="safetensors")
    try:
        with library.safe_open(path, framework="pt", device="cpu") as file:
            said = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()} if weights else {}  # noqa: SIM118
    except library.SafetensorError as error:
        raise CheckpointError(
            f"is no whole safetensors file: cut off, damaged, being written now, or something else ({error})"
        ) from error
    return Contents(path, {"": tensors}, whole_number(said, STEP_KEYS), number(said, EPOCH_KEYS))


def read_index(path: Path, weights: bool) -> Contents:
    """Weights in several files, as an index lists them."""
    index = load_json(path)
    listed = index.get("weight_map")
    if not isinstance(listed, dict) or not all(isinstance(name, str) for name in listed.values()):
        raise CheckpointError("is no index of weights: it has no 'weight_map' of names and files")
    pieces = sorted(set(listed.values()))
    if outside := [name for name in pieces if Path(name).name != name]:
        raise CheckpointError(f"lists a file outside its folder, which is not read: {outside[0]}")
    if missing := [name for name in pieces if not (path.parent / name).is_file()]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise CheckpointError(f"lacks {missing[0]}{more} of the {len(pieces)} files that its index lists")
    tensors: dict[str, Any] = {}
    for name in pieces if weights else []:
        try:
            tensors.update(read_any(path.parent / name, True).groups[""])
        except (CheckpointError, KeyError) as error:
            raise CheckpointError(f"cannot be read for one of its files: {name} {error}") from error
    return Contents(path, {"": tensors})


def about_folder(path: Path) -> str:
    if any(path.glob("*.distcp")):
        return (
            "is a distributed checkpoint, which is not read: make one file of it with "
            "torch.distributed.checkpoint.format_utils.dcp_to_torch_save"
        )
    if (path / "adapter_model.safetensors").exists():
        return "holds only the weights of an adapter: merge them into the model, and save that"
    return "is a folder without checkpoints: neither model.safetensors nor pytorch_model.bin, nor any file of weights"


def with_trainer_state(found: Contents) -> Contents:
    """The same with what the Transformers Trainer wrote beside the weights: step, epoch and learning rate."""
    folder = found.path if found.path.is_dir() else found.path.parent if found.path.name in WEIGHTS else None
    file = None if folder is None else folder / "trainer_state.json"
    if file is None or not file.is_file():
        return found
    state = load_json(file)
    step, epoch, scalars = whole_number(state, STEP_KEYS), number(state, EPOCH_KEYS), dict(found.scalars)
    log = state.get("log_history")
    for line in log if isinstance(log, list) else []:
        if isinstance(line, dict) and line.get("step") == step and isinstance(line.get("learning_rate"), float):
            scalars["train/lr/0"] = line["learning_rate"]
    return Contents(found.path, found.groups, step, epoch, scalars)


def load_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"cannot be read for {path.name}, which is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"cannot be read for {path.name}, which is a list and no table")
    return found


def number(said: Mapping[Any, Any], keys: tuple[str, ...]) -> float | None:
    """The first of the keys whose value is a finite number, not negative."""
    for value in (said[key] for key in keys if key in said):
        if isinstance(value, bool) or not isinstance(value, int | float | str | Tensor):
            continue
        try:
            found = float(value)
        except (ValueError, RuntimeError):
            continue
        if 0 <= found < float("inf"):
            return found
    return None


def whole_number(said: Mapping[Any, Any], keys: tuple[str, ...]) -> int | None:
    found = number(said, keys)
    return int(found) if found is not None and found.is_integer() and found < MOST else None
