"""What a run measured, in one crash-safe SQLite file."""

from curvdiag.record.series import DensitySeries, Event, RunInfo, Series
from curvdiag.record.store import Run, RunStore

__all__ = ["DensitySeries", "Event", "Run", "RunInfo", "RunStore", "Series"]
