"""A run file that is written whole or not at all, and the files that it is made of."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from curvdiag.errors import ArgumentError, StoreError
from curvdiag.record.database import translated
from curvdiag.record.store import RunStore

Paths = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

BESIDE = ("-wal", "-shm", "-journal")
"""What SQLite puts beside a file that is open, or that a killed process left."""


def run_files(paths: Paths) -> list[Path]:
    """The files that paths and patterns mean, each once, in the order given.

    Raises:
        ArgumentError: Nothing is given, or a pattern matches nothing.
    """
    found: dict[str, Path] = {}
    for given in [paths] if isinstance(paths, str | os.PathLike) else paths:
        path = Path(given).expanduser()
        pattern = not path.exists() and glob.has_magic(str(path))
        matches = sorted(map(Path, glob.glob(str(path), recursive=True))) if pattern else [path]
        if not matches:
            raise ArgumentError(f"no run file matches {str(given)!r}")
        for match in matches:
            found.setdefault(os.path.realpath(match), match)
    if not found:
        raise ArgumentError("no run files are given: name them, or give a pattern such as 'run-*.db'")
    return list(found.values())


@contextmanager
def written_whole(target: Path, *, overwrite: bool) -> Iterator[RunStore]:
    """A new run file, which takes its place and name only at the end of the body, if that ends well.

    Args:
        overwrite: It may take the place of a run file that nobody has open.

    Raises:
        StoreError: Something is there already, or it cannot be written.
    """
    refuse_what_is_there(target, overwrite)
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    remove(part)
    try:
        with RunStore(part) as store:
            yield store
        refuse_what_is_there(target, overwrite)
        with translated(target, "write"):
            put(part, target, overwrite)
    finally:
        remove(part)


def refuse_what_is_there(target: Path, overwrite: bool) -> None:
    if not target.parent.is_dir():
        raise StoreError(f"cannot write {target}: the folder {target.parent} does not exist; create it first")
    if target.exists():
        if target.is_dir():
            raise StoreError(f"{target} is a folder; give the path of a run file, e.g. {target / 'run.db'}")
        if not overwrite:
            raise StoreError(f"{target} exists: give another name, or replace it with overwrite=True (--force)")
        # Is it a run file? What a killed process left beside it goes into it where it is opened to be written.
        RunStore(target, readonly=not beside(target)).close()
    if left := beside(target):
        # SQLite would take them for what belongs to the new file.
        why = "another process has it open" if target.exists() else "they are left of another run file: move them away"
        raise StoreError(f"cannot write {target} while {' and '.join(left)} lie{'s' * (len(left) == 1)} there: {why}")


def beside(target: Path) -> list[str]:
    return [name for name in (f"{target.name}{end}" for end in BESIDE) if target.with_name(name).exists()]


def put(part: Path, target: Path, overwrite: bool) -> None:
    if overwrite:
        part.replace(target)
        return
    try:
        os.link(part, target)  # unlike a renaming it fails where another process was faster
    except FileExistsError:
        raise StoreError(f"{target} was written by another process meanwhile; it was left as it is") from None
    except OSError:  # a file system without links
        if target.exists():
            raise
        part.replace(target)


def remove(part: Path) -> None:
    for end in ("", *BESIDE):
        part.with_name(f"{part.name}{end}").unlink(missing_ok=True)
