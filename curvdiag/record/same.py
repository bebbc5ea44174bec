"""Which runs are one: what a run's configuration says of what was measured, and how."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from curvdiag.record.series import RunInfo

SECTIONS = ("curvdiag", "checkpoints")
"""Where a monitor and a scan describe what they measure, and how; the rest of a configuration is the user's own."""

WORDS = {"fingerprint": "data or loss"}


def is_scan(config: Mapping[str, Any]) -> bool:
    """Whether a run is a scan of checkpoints: its numbers depend on its description alone, wherever it is made."""
    checkpoints = config.get("checkpoints")
    return isinstance(checkpoints, Mapping) and "fingerprint" in checkpoints


def described(config: Mapping[str, Any]) -> dict[str, Any]:
    """The sections of a configuration that say what was measured."""
    return {section: config[section] for section in SECTIONS if section in config}


def identity(run: RunInfo) -> str:
    """The same text for two runs that are parts, or copies, of one.

    Scans are one where name and description are the same. Two trainings may have the same of both; a training's run is
    known again only by the moment at which it began.
    """
    moment = None if is_scan(run.config) else run.created
    return json.dumps([run.name, described(run.config), moment], sort_keys=True)


def differing(config: Mapping[str, Any], description: Mapping[str, Any]) -> list[str]:
    """In what a run's configuration is not that of a description, in words."""
    return list(differences(config, description))


def unlike(one: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two configurations have where they differ, by what it is, in words; None where one has nothing."""
    return {key: (b, a) for key, (a, b) in differences(other, one).items()} | differences(one, other)


def differences(config: Mapping[str, Any], description: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    found: dict[str, tuple[Any, Any]] = {}
    for section, wanted in description.items():
        held = config.get(section)
        if isinstance(wanted, Mapping):
            known = held if isinstance(held, Mapping) else {}
            pairs = {WORDS.get(key, str(key)): (known.get(key), value) for key, value in wanted.items()}
        else:
            pairs = {section: (held, wanted)}
        found |= {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    return found
