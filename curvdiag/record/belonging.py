"""Which runs of several files belong together, and which only seem to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from curvdiag.errors import StoreError
from curvdiag.record.same import described, identity, is_scan, unlike
from curvdiag.record.series import RunInfo

SHOWN = 60
"""Characters of a value, at most."""


@dataclass(frozen=True)
class Member:
    """One run of one file."""

    file: Path
    info: RunInfo


def grouped(members: Sequence[Member], *, apart: bool = False, join: bool = False) -> list[list[Member]]:
    """The members of each run of a merged file, the run that began first before the others.

    Args:
        apart, join: As of :func:`curvdiag.record.merge_runs`.

    Raises:
        StoreError: Runs of one name differ, and no file holds them side by side.
    """
    named: dict[str, dict[str, list[Member]]] = {}
    for member in members:
        named.setdefault(member.info.name, {}).setdefault(identity(member.info), []).append(member)
    groups: list[list[Member]] = []
    for runs in named.values():
        if join:
            groups.append(joined(list(runs.values())))
            continue
        if not apart:
            refuse_unlike(runs)
        groups += runs.values()
    return sorted(groups, key=lambda group: min(member.info.created for member in group))


def joined(runs: Sequence[Sequence[Member]]) -> list[Member]:
    first, *others = [run[0] for run in runs]
    for other in others:
        if described(first.info.config) != described(other.info.config):
            raise StoreError(
                f"{told(first, other)}, so they cannot be joined: keep them as runs of their own with apart=True "
                "(--apart)"
            )
    return [member for run in runs for member in run]


def refuse_unlike(runs: Mapping[str, Sequence[Member]]) -> None:
    """Refuse several runs of one name, unless a file holds all of them and so says that they are several."""
    held: dict[Path, set[str]] = {}
    for key, group in runs.items():
        for member in group:
            held.setdefault(member.file, set()).add(key)
    if any(keys == set(runs) for keys in held.values()):
        return
    groups = list(runs.values())
    first = groups[0][0]
    other = next(group[0] for group in groups[1:] if group[0].file != first.file)
    remedy = "keep them as runs of their own with apart=True (--apart)"
    if described(first.info.config) == described(other.info.config):
        remedy += ", or make one run of them with join=True (--join), if one training goes on in the other"
    elif is_scan(first.info.config):
        remedy = f"measure one of them anew as the other was, give them names, or {remedy}"
    raise StoreError(f"{told(first, other)}: {remedy}")


def told(one: Member, other: Member) -> str:
    """In what two runs of one name differ."""
    found = unlike(described(one.info.config), described(other.info.config))
    begun = [datetime.fromtimestamp(run.info.created, UTC).strftime("%Y-%m-%d %H:%M:%S.%f") for run in (one, other)]
    pairs = found or {"the moment at which they began": (begun[0], begun[1])}
    differ = ", ".join(f"{key} ({short(a)} and {short(b)})" for key, (a, b) in pairs.items())
    where = f"{one.file} and {other.file}" if one.file != other.file else str(one.file)
    return f"the runs {one.info.name!r} of {where} differ in {differ}"


def short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."
