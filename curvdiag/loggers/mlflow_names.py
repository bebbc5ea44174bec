"""Names and values as MLflow accepts them."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

KEY, VALUE = 250, 6000  # most characters
REFUSED = re.compile(r"[^A-Za-z0-9_\-. /]")


class Names:
    """Keys and the names that stand for them; two keys never share one."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}
        self._taken: set[str] = set()

    def __getitem__(self, key: str) -> str:
        if key not in self._names:
            name = accepted(key)
            if name in self._taken:
                name = _marked(name, key)
            self._names[key] = name
            self._taken.add(name)
        return self._names[key]


def accepted(key: str) -> str:
    """``key`` with an underscore for each character that MLflow refuses, and as a path that is its own short form."""
    parts = [part if part.strip(".") else "_" * len(part) for part in REFUSED.sub("_", key).split("/") if part]
    name = "/".join(parts) or "_"
    return name if len(name) <= KEY else _marked(name, key)


def parameters(config: Mapping[str, Any]) -> dict[str, str]:
    """A configuration as MLflow's parameters: nested keys joined by slashes, everything else as text that fits."""
    names = Names()
    found = {}
    for key, value in _leaves("", config):
        text = value if isinstance(value, str) else json.dumps(value, default=str)
        found[names[key]] = text if len(text) <= VALUE else f"{text[: VALUE - 3]}..."
    return found


def _leaves(prefix: str, config: Mapping[str, Any]) -> list[tuple[str, Any]]:
    leaves = []
    for key, value in config.items():
        nested = isinstance(value, Mapping) and value
        leaves += _leaves(f"{prefix}{key}/", value) if nested else [(f"{prefix}{key}", value)]
    return leaves


def _marked(name: str, key: str) -> str:
    mark = hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()[:8]
    return f"{name[: KEY - 9]}_{mark}"
