"""What a page shows, as plain data: everything that a run holds, thinned and packed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from curvdiag.errors import ArgumentError
from curvdiag.report.encoding import packed, plain
from curvdiag.report.grids import CELLS, grid
from curvdiag.report.thinning import evenly, extremes

if TYPE_CHECKING:
    from curvdiag.record import RunStore
    from curvdiag.record.queries import RunKey
    from curvdiag.record.series import RunInfo, Series

FORMAT = 1
RUNS = 20  # of a file, the latest
GRID_BYTES = 4_200_000  # all densities of a page together, before base64 makes four bytes of three
VALUES = 140_000  # all numbers of a page together; each takes about 20 characters with its error
LEAST, MOST = 24, 2000  # numbers of one series, and times of one density
EVENTS = 1000  # of a run, the latest


def bundle(store: RunStore, run: RunKey = None) -> dict[str, Any]:
    """The runs of a file for a page.

    Args:
        store: The file.
        run: Only this run; all of them, the latest 20, if not given.

    Returns:
        ``file``: its name; ``runs``: what there is, oldest first; ``held``: the data by the run's number, as text;
        ``chosen``: the number of the run to show first.

    Raises:
        ArgumentError: There is no such run, or nothing was recorded.
        StoreError: The file cannot be read.
    """
    infos = store.runs()
    if run is not None:
        wanted = [store.run(run)]
        if not filled(store, wanted[0]):
            raise ArgumentError(f"run {wanted[0].name!r} of {store.path} holds no measurement yet, and no event")
    else:
        wanted = [info for info in infos if filled(store, info)]
    if not wanted:
        what = f"the {len(infos)} runs of {store.path} hold" if infos else f"{store.path} holds no run, and"
        raise ArgumentError(f"{what} no measurement yet: measure first (CurvatureMonitor(..., store=...))")
    shown = wanted[-RUNS:]
    return {
        "format": FORMAT,
        "file": store.path.name,
        "runs": [summary(info) for info in shown],
        "left_out": len(wanted) - len(shown),
        "chosen": shown[-1].id,
        "held": {str(info.id): run_bundle(store, info, pages=len(shown)) for info in shown},
    }


def run_bundle(store: RunStore, info: RunInfo, *, pages: int = 1) -> dict[str, Any]:
    """One run; with ``pages`` runs in a page each has its share of the room."""
    filed = [(operator, block) for operator in store.operators(info.id) for block in store.blocks(operator, info.id)]
    times = between(GRID_BYTES // (CELLS * pages * max(len(filed), 1)))
    names = store.scalar_names(info.id)
    numbers = between(VALUES // (pages * max(len(names), 1)))
    events = store.events(info.id)
    return {
        **summary(info),
        "config": plain(info.config),
        "versions": {str(key): str(value) for key, value in info.versions.items()},
        "events": [[one.step, one.kind, one.message, one.time] for one in events[-EVENTS:]],
        "events_in_all": len(events),
        **scalars([store.scalars(name, info.id) for name in names], numbers),
        "densities": [one for one in (grid(store.densities(*key, info.id), times) for key in filed) if one],
    }


def summary(info: RunInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "name": info.name,
        "created": info.created,
        "measurements": info.measurements,
        "last_step": info.last_step,
    }


def scalars(series: list[Series], limit: int) -> dict[str, Any]:
    """Scalars with their errors, and the steps at which they stand, each set of steps once.

    ``band`` is half the width of the 95 % interval, as the figures of :mod:`curvdiag.plotting` draw it. Where a number
    is exact or has no error, neither is there. Layers share their steps, so that they make a matrix.
    """
    axes: dict[bytes, int] = {}
    packed_axes: list[dict[str, str]] = []
    found = []
    for one in series:
        kept = evenly(len(one), limit) if one.name.startswith("curv/layer/") else extremes(one.values, limit)
        key = one.steps[kept].tobytes()
        if key not in axes:
            axes[key] = len(packed_axes)
            packed_axes.append({"steps": packed(one.steps[kept]), "epochs": packed(one.epochs[kept])})
        entry: dict[str, Any] = {"name": one.name, "axis": axes[key], "values": packed(one.values[kept])}
        if len(kept) < len(one):
            entry["measured"] = len(one)
        errors = one.standard_errors[kept]
        if (np.nan_to_num(errors) > 0).any():
            entry["errors"] = packed(errors, "<f4")
            entry["band"] = packed(half_width(one)[kept], "<f4")
        found.append(entry)
    return {"axes": packed_axes, "scalars": found}


def half_width(one: Series) -> np.ndarray:
    """Of the 95 % interval; NaN where fewer than three samples say nothing usable."""
    from curvdiag.plotting.scalars import band

    return (band(one)[1] - band(one)[0]) / 2


def filled(store: RunStore, info: RunInfo) -> bool:
    return info.measurements > 0 or bool(store.events(info.id))


def between(limit: int) -> int:
    return min(max(limit, LEAST), MOST)
