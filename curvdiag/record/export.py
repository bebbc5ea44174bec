"""A run for other programs: CSV for tables, npz for NumPy."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from curvdiag.record.database import translated
from curvdiag.record.series import DensitySeries, RunInfo, Series

COLUMNS = (
    "run", "run_name", "name", "step", "epoch", "wall_time", "seconds", "value", "standard_error", "samples",
)  # fmt: skip


def write_csv(path: Path, run: RunInfo, rows: Sequence[tuple[Any, ...]]) -> Path:
    """Scalars in long form, one line a value, with the columns of :data:`COLUMNS`.

    What is not known is empty; an infinite value is ``inf``, a value that is NaN is ``nan``. Numbers are
    written so that they read back exactly.
    """

    def write(file: IO[Any]) -> None:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        for name, step, epoch, wall_time, seconds, value, error, samples in rows:
            value = "nan" if value is None else value
            writer.writerow((run.id, run.name, name, step, epoch, wall_time, seconds, value, error, samples))

    return replace_whole(path, write, "w")


def write_npz(path: Path, run: RunInfo, series: Sequence[Series], densities: Sequence[DensitySeries]) -> Path:
    """Scalars and densities as arrays of one compressed npz file.

    Keys: ``scalars/<name>/steps`` (and ``epochs``, ``times``, ``values``, ``standard_errors``, ``samples``),
    each ``[T]``; ``densities/<operator>/<block>/steps`` (``epochs``, ``times``), ``nodes`` and ``weights``
    ``[T, probes, m]`` (shorter ones padded with weight 0), ``probes`` ``[T]`` (how many rows are real),
    ``deflated`` ``[T, k]`` (padded with NaN), ``size``, ``lanczos_steps``, ``matvecs``, ``note`` ``[T]``; and
    ``run`` with the name. The block of the whole model is empty: ``densities/hessian//nodes``.
    """
    arrays: dict[str, np.ndarray] = {"run": np.array(run.name)}
    for one in series:
        for part in ("steps", "epochs", "times", "values", "standard_errors", "samples"):
            arrays[f"scalars/{one.name}/{part}"] = getattr(one, part)
    for many in densities:
        found = many.densities
        parts: dict[str, np.ndarray] = {
            "steps": many.steps,
            "epochs": many.epochs,
            "times": many.times,
            "nodes": stacked([d.nodes for d in found], 0.0),
            "weights": stacked([d.weights for d in found], 0.0),
            "probes": np.array([d.nodes.shape[0] for d in found]),
            "deflated": stacked([d.deflated for d in found], np.nan),
            "size": np.array([d.size for d in found]),
            "lanczos_steps": np.array([d.steps for d in found]),
            "matvecs": np.array([d.matvecs for d in found]),
            "note": np.array([d.note for d in found]),
        }
        arrays |= {f"densities/{many.operator}/{many.block}/{part}": values for part, values in parts.items()}
    return replace_whole(path, lambda file: np.savez_compressed(file, **arrays), "wb")  # type: ignore[arg-type]


def stacked(arrays: Sequence[np.ndarray], fill: float) -> np.ndarray:
    """Arrays of unequal sizes as one, filled up at the end of each axis."""
    shape = np.max([a.shape for a in arrays], axis=0)
    out = np.full((len(arrays), *shape), fill)
    for target, source in zip(out, arrays, strict=True):
        target[tuple(slice(n) for n in source.shape)] = source
    return out


def replace_whole(path: Path, write: Callable[[IO[Any]], None], mode: str) -> Path:
    """Write beside the target and rename, so that a failure never leaves half a file in its place."""
    path = path.expanduser().absolute()
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    text: dict[str, Any] = {} if "b" in mode else {"newline": "", "encoding": "utf-8"}
    with translated(path, "write"):
        try:
            with part.open(mode, **text) as file:
                write(file)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    return path
