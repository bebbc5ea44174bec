"""What a run measured, in one crash-safe SQLite file."""

from curvdiag.record.merge import Merge, MergedRun, merge_runs
from curvdiag.record.series import DensitySeries, Event, RunInfo, Series
from curvdiag.record.store import Run, RunStore

__all__ = [
    "DensitySeries",
    "Event",
    "Merge",
    "MergedRun",
    "Run",
    "RunInfo",
    "RunStore",
    "Series",
    "merge_runs",
]
