"""Finished runs of a long experiment, kept line by line, so that an interruption loses only those under way."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from curvdiag.experiments.lpnorm_training import Key, Run
from curvdiag.record.database import translated


class Journal:
    """A file of JSON lines: first what all runs have in common, then a run a line.

    A file that was written under other options is begun anew, and a last line that was cut off is left out.

    Args:
        path: Of the file; None to keep nothing.
        options: Seed, versions, sizes of the tasks: whatever would make other runs of these.

    Attributes:
        runs: Those finished, by key.
    """

    def __init__(self, path: Path | None, options: Mapping[str, Any]) -> None:
        self.path = path
        self.runs: dict[Key, Run] = {}
        if path is None:
            return
        head = json.dumps(options, sort_keys=True)
        lines = path.read_text(encoding="utf-8").split("\n") if path.exists() else []
        whole = lines[1:-1] if lines and lines[0] == head else []
        for line in whole:
            run = Run.from_dict(json.loads(line))
            self.runs[run.key] = run
        with translated(path, "write"):
            path.write_text("\n".join([head, *whole, ""]), encoding="utf-8")

    def add(self, run: Run) -> None:
        """Keep a finished run."""
        self.runs[run.key] = run
        if self.path is not None:
            with translated(self.path, "write"), self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run.to_dict()) + "\n")
