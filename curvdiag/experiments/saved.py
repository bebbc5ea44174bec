"""What an experiment leaves behind: a picture, and a JSON with what was asked for, what gave it, and what came out."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUMBERS = re.compile(r"\[[\d\s.,+eE-]*\]")
"""A list of nothing but numbers, which goes on one line."""
VERSIONS = ("curvdiag", "torch", "numpy", "scipy")


def save(
    name: str,
    out: Path,
    figure: Figure,
    results: Any,
    *,
    options: Mapping[str, Any],
    seed: int,
    seconds: float,
    digits: int = 6,
) -> list[Path]:
    """Write ``<name>.png`` and ``<name>.json`` into ``out``, which is made if need be.

    Args:
        results: Numbers, strings, lists and mappings. What is not finite becomes ``null``.
        options: What was asked for, beside the seed.
        seconds: What it took by the clock. The processor time of the whole process is written beside it, which does not
            depend on what else the machine was doing.
        digits: Significant ones of the numbers in the results.

    Raises:
        StoreError: The folder cannot be made, or a file not written.
    """
    from curvdiag.cli.plot import save as save_figure
    from curvdiag.cli.scaling import finite
    from curvdiag.record.export import replace_whole

    make_folder(out)
    whole = {
        "experiment": name,
        "options": dict(options),
        "seed": seed,
        "versions": {package: version(package) for package in VERSIONS},
        "seconds": round(seconds, 1),
        "processor_seconds": round(time.process_time(), 1),
        "results": finite(rounded(results, digits)),
    }
    text = NUMBERS.sub(lambda match: " ".join(match[0].split()), json.dumps(whole, indent=1, allow_nan=False))
    picture = save_figure(figure, out / f"{name}.png")
    return [picture, replace_whole(out / f"{name}.json", lambda file: print(text, file=file), "w")]


def make_folder(out: Path) -> None:
    """Make a folder that can be written into, or say why not; to be called before the work.

    Raises:
        StoreError: It cannot be made, or not be written into.
    """
    from curvdiag.record.database import translated

    with translated(out, "make the folder"):
        out.mkdir(parents=True, exist_ok=True)
    with translated(out, "write into"):
        probe = out / ".curvdiag-may-write"
        probe.touch()
        probe.unlink()


def rounded(value: Any, digits: int = 6) -> Any:
    """The same with so many significant digits, keys as strings, and tuples as lists."""
    if isinstance(value, float):
        return float(f"{value:.{digits}g}")
    if isinstance(value, Mapping):
        return {str(key): rounded(one, digits) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(one, digits) for one in value]
    return value
