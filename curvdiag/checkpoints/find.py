"""Which files a pattern means: checkpoints, each once, in natural order."""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from curvdiag.errors import ArgumentError

WEIGHTS = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What holds the weights in a folder of Transformers, the first that is there."""

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors", ".bin")

BESIDE = ("optimizer", "scheduler", "scaler", "rng_state", "training_args")
"""How the names of files begin that lie beside weights and hold none."""

PIECE = re.compile(r"(.+)-\d{5}-of-\d{5}(\.\w+)")

Patterns = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]


def find(patterns: Patterns) -> list[Path]:
    """The checkpoints that paths and patterns mean.

    A pattern is one of :mod:`glob`, with ``**`` for folders of any depth. A folder with weights in it
    (``checkpoint-500/model.safetensors``) is one checkpoint; any other folder stands for the checkpoints in it. So does
    the output folder of a Transformers Trainer; its final model is one more if ``trainer_state.json`` tells its step.

    Raises:
        ArgumentError: A pattern matches nothing.
    """
    given = [patterns] if isinstance(patterns, str | os.PathLike) else list(patterns)
    if not given:
        raise ArgumentError("no checkpoints are given: name files, folders or a pattern such as 'ckpts/*.pt'")
    found: dict[str, Path] = {}
    for pattern in given:
        for path in sorted(matches(os.fspath(pattern)), key=natural):
            for one in spread(path):
                found.setdefault(os.path.realpath(one), one)
    return sorted(found.values(), key=natural)


def matches(pattern: str) -> list[Path]:
    expanded = Path(pattern).expanduser()
    if expanded.exists():
        return [expanded]
    paths = [Path(path) for path in glob.glob(str(expanded), recursive=True)]
    if not paths:
        relative = "" if expanded.is_absolute() else f" in {Path.cwd()}"
        raise ArgumentError(f"no file or folder matches {pattern!r}{relative}")
    return paths


def spread(path: Path) -> Iterable[Path]:
    """What a matched path stands for: itself, the whole of which it is a piece, or what lies in it."""
    if not path.is_dir():
        return [whole(path)]
    if weights_file(path) is not None:
        kept = [one for one in path.glob("checkpoint-*") if weights_file(one) is not None]
        return kept if kept and not (path / "trainer_state.json").is_file() else [*kept, path]
    inside = [one for one in path.iterdir() if weights_file(one) is not None or is_weights(one)]
    return [whole(one) for one in inside] or [path]


def whole(path: Path) -> Path:
    """The folder of Transformers whose weights a file is; for a piece of them, the same or their index."""
    piece = PIECE.fullmatch(path.name)
    if piece is not None:
        index = path.with_name(f"{piece[1]}{piece[2]}.index.json")
        path = index if index.exists() else path
    folder = path.parent
    return folder if path == weights_file(folder) and folder.name else path


def is_weights(path: Path) -> bool:
    return path.is_file() and path.suffix in ENDINGS and not path.name.startswith(BESIDE)


def weights_file(folder: Path) -> Path | None:
    """The file of a Transformers folder that holds, or lists, its weights."""
    return next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)


def natural(path: Path) -> list[tuple[int, int | str]]:
    """A key under which ``step_9`` comes before ``step_10``."""
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in re.split(r"(\d+)", str(path)) if part]
