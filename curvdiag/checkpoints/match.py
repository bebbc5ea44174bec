"""Which tensors of a checkpoint are those of a model, whatever is written before their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from curvdiag.checkpoints.read import EXTRA_STATE, Contents
from curvdiag.errors import CheckpointError

WRAPPERS = re.compile(r"(?:^|(?<=\.))(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What ``torch.compile``, ``DistributedDataParallel`` and others put into names."""

USUAL = {"state_dict", "model_state_dict", "model", "module", "_orig_mod", "net", "network", "weights", "params"}
"""Parts of a place that say only "the model". Another one (``ema``) is taken where no place of this kind fits."""

SHOWN = 5
"""Names in a list, at most."""

PROBED = 40
"""Names of the model by which prefixes are looked for."""


@dataclass(frozen=True)
class Candidate:
    """One way to read a checkpoint as the model's weights.

    Attributes:
        label: Where the weights are: entry and prefix, such as ``"state_dict.net"``; ``""`` for the file itself.
        tensors: What is there, by the model's names where it has them.
        found: How many of the model's tensors are there with their own shape, and how many by name.
    """

    label: str
    tensors: dict[str, Any]
    found: tuple[int, int]

    @property
    def usual(self) -> bool:
        return all(part in USUAL for part in self.label.split(".") if part)


def weights_in(contents: Contents, model: nn.Module, part: str | None = None) -> dict[str, Any]:
    """The tensors of a checkpoint that belong to ``model``, by the model's own names, with those it does not know.

    Args:
        part: Take the weights there, e.g. ``"ema"``: the end of a place's label. By default the place that fits.

    Raises:
        CheckpointError: Nothing fits, or several places fit equally well.
    """
    own = model.state_dict()
    known = [place for group, tensors in contents.groups.items() for place in places_in(group, tensors, own)]
    if part is not None:
        chosen = [place for place in known if place.label == part or place.label.endswith(f".{part}")]
        if not chosen:
            labels = listed(sorted({repr(place.label) for place in known}), "it has weights at") or "it fits nowhere"
            raise CheckpointError(f"has no weights of the model at {part!r}; {labels}")
        known = chosen
    if not known:
        names = [name for tensors in contents.groups.values() for name in tensors]
        raise CheckpointError(
            f"holds nothing of the model: {listed(names, 'it has')}; the model has {listed(list(own), '')}".rstrip()
        )
    most = max(place.found for place in known)
    best = [place for place in known if place.found == most]
    best = [place for place in best if place.usual] or best
    if len(best) > 1 and most[0] and any(differ(best[0].tensors, other.tensors, own) for other in best[1:]):
        labels = ", ".join(repr(place.label) for place in best[:SHOWN])
        raise CheckpointError(f"holds several sets of weights that fit the model, at {labels}: choose one with --part")
    return min(best, key=lambda place: len(place.tensors)).tensors


def places_in(group: str, tensors: Mapping[str, Any], own: Mapping[str, Any]) -> list[Candidate]:
    """All ways to find the model's names among those of one group: as they are, or else without wrappers' parts."""
    places = []
    for strip in (str, lambda name: WRAPPERS.sub("", name)):
        theirs, ours = {strip(name): name for name in tensors}, {strip(name): name for name in own}
        if len(theirs) < len(tensors) or len(ours) < len(own):
            continue  # two names would become one
        for before, within in prefixes(theirs, ours):
            known = {before + name[len(within) :]: ours[name] for name in ours if name.startswith(within)}
            here = {name: tensor for name, tensor in tensors.items() if strip(name).startswith(before)}
            renamed = {known.get(strip(name), strip(name)[len(before) :]): tensor for name, tensor in here.items()}
            shaped = sum(alike(renamed.get(name), tensor) for name, tensor in own.items())
            label = ".".join(part for part in (group, before.rstrip(".")) if part)
            places.append(Candidate(label, renamed, (shaped, len(renamed.keys() & own.keys()))))
    return places


def prefixes(theirs: Iterable[str], ours: Iterable[str]) -> set[tuple[str, str]]:
    """Pairs: what stands before the model's names in the checkpoint, and what of these it leaves out."""
    names, own = set(theirs), list(ours)
    found: set[tuple[str, str]] = set()
    for name in own[:: max(1, len(own) // PROBED)]:
        found |= {(other[: -len(name)], "") for other in names if f".{other}".endswith(f".{name}")}
        parts = name.split(".")
        for cut in range(1, len(parts)):
            if ".".join(parts[cut:]) in names:
                found.add(("", ".".join(parts[:cut]) + "."))
    return found


def alike(one: Any, other: Any) -> bool:
    return isinstance(one, Tensor) and isinstance(other, Tensor) and one.shape == other.shape


def differ(one: Mapping[str, Any], other: Mapping[str, Any], own: Iterable[str]) -> bool:
    """Whether two sets of weights are not the same numbers under the model's names; NaN is one number here."""

    def same(a: Any, b: Any) -> bool:
        if not (isinstance(a, Tensor) and isinstance(b, Tensor)):
            return a is b
        if a is b or a.dtype != b.dtype or a.shape != b.shape:
            return a is b
        return bool(((a == b) | ((a != a) & (b != b))).all())

    return any(not same(one.get(name), other.get(name)) for name in own if not name.endswith(EXTRA_STATE))


def listed(names: list[str], before: str) -> str:
    """``it has a, b and 3 more``; empty where there is nothing."""
    if not names:
        return ""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{before} {', '.join(names[:SHOWN])}{more}".strip()
